"""Packed rows, read back slot by slot: every scored token must be predicted from its prompt and the answer before it."""

import gzip
import json
import math

import numpy as np
import pytest
from examples import ROOT, pair_of, random_pairs, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from repo_jax.data.rows import (
    RowShape,
    Sizes,
    pack,
    packed,
    row_batches,
    slots_before,
    spread,
    suggest_row_length,
    suggest_scored_length,
    suggest_shapes,
    too_long,
)
from repo_jax.data.weights import ld, temporal_decay

V = 1000


def expected(pairs, wanted_B2=None):
    """(pair, side) -> for each scored token, in order: what is seen before it, the positions of that, and the token."""
    answers = {}
    for number, pair in enumerate(pairs):
        for side in (0, 1):
            if wanted_B2 is not None and not wanted_B2[number][side]:
                continue
            prompt, branch = pair.prompt.tolist(), pair.branches[side].tolist()
            answers[number, side] = [
                (prompt + branch[:k], list(range(len(prompt) + k)), branch[k]) for k in np.flatnonzero(pair.masks[side])
            ]
    return {answer: scored for answer, scored in answers.items() if scored}


def with_holes(pair, rng):
    """The pair with some tokens of its answers not scored, wherever they stand."""
    masks = [rng.random(len(branch)) < 0.7 for branch in pair.branches]
    return pair._replace(chosen_mask=masks[0], rejected_mask=masks[1])


def without(pair, side):
    """The pair with one answer only, as an unpaired row has it."""
    name = ("chosen", "rejected")[side]
    return pair._replace(**{name: pair.branches[side][:0], f"{name}_mask": pair.masks[side][:0]})


def read_back(batches):
    """The same, from row batches, by the rule of visibility: before it in its own segment or in its prompt's."""
    answers, rows_of = {}, {}
    for number, batch in enumerate(batches):
        B = len(batch.filled_B)
        for r, s in np.ndindex(*batch.targets_RS.shape):
            if batch.answers_RS[r, s] == 2 * B:
                continue
            key = divmod(int(batch.answers_RS[r, s]), 2)
            source = batch.sources_RS[r, s]
            seen = [
                t
                for t in range(source + 1)
                if batch.segments_RT[r, t] in (batch.segments_RT[r, source], batch.prompts_RT[r, source])
            ]
            token = batch.tokens_RT[r, seen].tolist(), batch.positions_RT[r, seen].tolist(), int(batch.targets_RS[r, s])
            answers.setdefault(key, []).append(token)
            rows_of.setdefault(key, set()).add((number, r))
    assert all(len(rows) == 1 for rows in rows_of.values())
    return answers


def tokens_per_row(batches):
    return [int((row > 0).sum()) for batch in batches for row in batch.segments_RT]


def scored_per_row(batches):
    return [int((row < 2 * len(batch.filled_B)).sum()) for batch in batches for row in batch.answers_RS]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# One row


def test_two_pairs_share_a_row():
    p, c, r = 10, 20, 30  # and the token's place among its kind
    first = tokens([p, p + 1, p + 2], [c, c + 1], [r, r + 1, r + 2])
    second = tokens([p + 3, p + 4], [c + 2], [r + 3, r + 4])
    (batch,) = row_batches([first, second], RowShape(R=1, T=14, S=9))
    picture = {
        "tokens_RT": [10, 11, 12, 20, 21, 30, 31, 32, 13, 14, 22, 33, 34, 0],
        "positions_RT": [0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2, 2, 3, 0],
        "segments_RT": [1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 5, 6, 6, 0],
        "prompts_RT": [1, 1, 1, 1, 1, 1, 1, 1, 4, 4, 4, 4, 4, 0],
        "targets_RS": [20, 21, 30, 31, 32, 22, 33, 34, 0],
        "sources_RS": [2, 3, 2, 5, 6, 9, 9, 11, 0],
        "answers_RS": [0, 0, 1, 1, 1, 2, 3, 3, 4],
    }
    for name, row in picture.items():
        np.testing.assert_array_equal(getattr(batch, name), [row], err_msg=name)
    assert batch.filled_B.tolist() == [True, True]


def test_arrays_are_int32_but_for_the_mask(rng):
    (batch,) = row_batches([pair_of(rng, (2, 2, 2), V=V)], RowShape(1, 8, 8))
    *ids, filled_B, weights_RS, views_R2Y, _, starts_B3 = batch
    assert {array.dtype for array in (*ids, starts_B3)} == {np.dtype(np.int32)}
    assert filled_B.dtype == bool
    assert weights_RS is views_R2Y is None
    (batch,) = row_batches([pair_of(rng, (2, 2, 2), V=V)], RowShape(1, 8, 8, 8))
    assert batch.views_R2Y.dtype == np.int32


def test_tokens_that_are_not_scored_are_seen():
    pair = tokens([1], [2, 3, 4], [5, 6], masks=[[0, 0, 1], [0, 1]])
    (batch,) = row_batches([pair], RowShape(1, 6, 2))
    assert read_back([batch]) == {(0, 0): [([1, 2, 3], [0, 1, 2], 4)], (0, 1): [([1, 5], [0, 1], 6)]}


def test_an_answer_may_be_scored_in_pieces():
    # An answer of several messages: what a tool says between them is 22 and 23.
    pair = tokens([10, 11], [20, 21, 22, 23, 24, 25], [30, 31, 32], masks=[[1, 1, 0, 0, 1, 0], [0, 1, 0]])
    (batch,) = row_batches([pair], RowShape(R=1, T=12, S=5))
    picture = {
        "tokens_RT": [10, 11, 20, 21, 22, 23, 24, 25, 30, 31, 32, 0],
        "segments_RT": [1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 3, 0],
        "targets_RS": [20, 21, 24, 31, 0],
        "sources_RS": [1, 2, 5, 8, 0],
        "answers_RS": [0, 0, 0, 1, 2],
    }
    for name, row in picture.items():
        np.testing.assert_array_equal(getattr(batch, name), [row], err_msg=name)


# Unpaired


def test_an_unpaired_row_takes_room_for_its_one_answer():
    good, bad = tokens([1, 2], [3, 4], []), tokens([5], [], [6, 7])
    (batch,) = row_batches([good, bad], RowShape(R=1, T=7, S=4))
    picture = {
        "tokens_RT": [1, 2, 3, 4, 5, 6, 7],
        "positions_RT": [0, 1, 2, 3, 0, 1, 2],
        "segments_RT": [1, 1, 2, 2, 3, 4, 4],
        "prompts_RT": [1, 1, 1, 1, 3, 3, 3],
        "targets_RS": [3, 4, 6, 7],
        "sources_RS": [1, 2, 4, 5],
        "answers_RS": [0, 0, 3, 3],
    }
    for name, row in picture.items():
        np.testing.assert_array_equal(getattr(batch, name), [row], err_msg=name)
    assert batch.filled_B.tolist() == [True, True]


def test_an_answer_that_is_wanted_but_not_there_is_left_out():
    good, bad = tokens([1, 2], [3, 4], []), tokens([5], [], [6, 7])
    (batch,) = row_batches([good, bad], RowShape(1, 7, 4), wanted_B2=np.array([[True, True], [True, False]]))
    assert batch.filled_B.tolist() == [True, False]
    assert batch.tokens_RT.tolist() == [[1, 2, 3, 4, 0, 0, 0]]


def test_answers_without_a_common_prompt_begin_with_tokens_that_are_not_scored():
    """What compat: official makes where each answer keeps the end of a long prompt of its own."""
    pair = tokens([], [1, 2, 3], [4, 5, 6], masks=([False, True, True], [False, False, True]))
    (batch,) = row_batches([pair], RowShape(1, 8, 4))
    assert read_back([batch]) == {
        (0, 0): [([1], [0], 2), ([1, 2], [0, 1], 3)],
        (0, 1): [([4, 5], [0, 1], 6)],
    }


# Weights


def test_weights_stand_beside_the_tokens_they_belong_to():
    pair = tokens([1], [2, 3, 4, 5], [6, 7], masks=[[1, 0, 1, 1], [1, 1]])
    other = tokens([1], [2], [3, 4])
    (batch,) = row_batches([temporal_decay(pair, gamma=0.5), ld(other, alpha=0.25)], RowShape(1, 12, 10))
    assert batch.targets_RS.tolist() == [[2, 4, 5, 6, 7, 2, 3, 4, 0, 0]]
    assert batch.weights_RS.tolist() == [[0.5, 0.25, 0.125, 0.5, 0.25, 1, 1, 0.25, 0, 0]]
    assert batch.weights_RS.dtype == np.float32


def test_beside_pairs_with_weights_a_pair_without_counts_for_one():
    pair = tokens([1], [2, 3], [4])
    (batch,) = row_batches([pair, temporal_decay(pair, gamma=0.5)], RowShape(1, 8, 7))
    assert batch.weights_RS.tolist() == [[1, 1, 1, 0.5, 0.25, 0.5, 0]]


def test_weights_follow_the_answers_that_are_wanted_in_every_row_and_batch():
    pairs = [temporal_decay(pair, gamma=0.8) for pair in random_pairs(20, V=V, most=8)]
    wanted_B2 = np.random.default_rng(1).random((20, 2)) < 0.7
    batches = row_batches(pairs, RowShape(2, 40, 30), wanted_B2=wanted_B2)
    assert len(batches) > 1
    found = {}
    for batch in batches:
        for answer, weight in zip(batch.answers_RS.ravel(), batch.weights_RS.ravel(), strict=True):
            found.setdefault(int(answer), []).append(float(weight))
    assert set(found.pop(40, [0])) == {0}
    assert found == {
        2 * i + side: pairs[i].weights[side].tolist() for i in range(20) for side in (0, 1) if wanted_B2[i, side]
    }


# Left out


def test_an_answer_left_out_takes_no_room():
    pair = tokens([1, 2], [3, 4], [5])
    (chosen,) = row_batches([pair], RowShape(1, 4, 2), wanted_B2=np.array([[True, False]]))
    assert read_back([chosen]) == {(0, 0): [([1, 2], [0, 1], 3), ([1, 2, 3], [0, 1, 2], 4)]}
    (rejected,) = row_batches([pair], RowShape(1, 3, 1), wanted_B2=np.array([[False, True]]))
    assert read_back([rejected]) == {(0, 1): [([1, 2], [0, 1], 5)]}
    assert chosen.filled_B.all() and rejected.filled_B.all()


def test_a_pair_left_out_is_not_there_and_the_others_keep_their_numbers(rng):
    pairs = [pair_of(rng, (2, 2, 2), V=V) for _ in range(3)]
    wanted_B2 = np.array([[True, True], [False, False], [True, True]])
    (batch,) = row_batches(pairs, RowShape(1, 18, 12), wanted_B2=wanted_B2)
    assert batch.filled_B.tolist() == [True, False, True]
    assert read_back([batch]) == expected(pairs, wanted_B2)
    assert row_batches(pairs, RowShape(1, 18, 12), wanted_B2=np.zeros((3, 2), bool)) == []


def test_a_batch_has_room_for_more_pairs_than_there_are(rng):
    pairs = [pair_of(rng, (2, 2, 2), V=V) for _ in range(2)]
    (batch,) = row_batches(pairs, RowShape(1, 14, 10), B=5)
    assert batch.filled_B.tolist() == [True, True, False, False, False]
    assert batch.answers_RS[0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 10, 10]


# Many rows


def test_any_pairs_come_back_whole_from_their_rows():
    for seed in range(40):
        rng = np.random.default_rng(seed)
        pairs = random_pairs(int(rng.integers(1, 30)), V=V, seed=seed, most=12)
        pairs = [with_holes(pair if rng.random() < 0.8 else without(pair, rng.integers(2)), rng) for pair in pairs]
        wanted_B2 = rng.random((len(pairs), 2)) < 0.8
        shapes = [
            RowShape(int(rng.integers(1, 5)), T=int(rng.integers(36, 80)), S=int(rng.integers(24, 48)), Y=Y)
            for Y in [0, int(rng.integers(24, 60))][: 1 + seed % 2]
        ]
        batches = row_batches(pairs, shapes, B=len(pairs) + seed % 3, wanted_B2=wanted_B2)
        assert read_back(batches) == expected(pairs, wanted_B2), f"seed {seed}"
        filled = sum((batch.filled_B[: len(pairs)] for batch in batches), np.zeros(len(pairs), int))
        there_B2 = wanted_B2 & np.array([[len(ids) > 0 for ids in pair.branches] for pair in pairs])
        assert filled.tolist() == there_B2.any(axis=1).tolist(), f"seed {seed}"


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 30), st.integers(0, 2**31), st.booleans())
def test_the_slots_before_hold_the_same_tokens_at_the_same_places(n, seed, several):
    pairs, rng = random_pairs(n, V=V, seed=seed), np.random.default_rng(seed)
    before = row_batches(pairs, RowShape(3, 128, 100))
    wanted = rng.random((n, 2)) < 0.6
    for batch in row_batches(pairs, RowShape(2 if several else 4, 64 if several else 128, 60), wanted_B2=wanted):
        slots = slots_before(pairs, before, batch)
        assert slots.dtype == np.int32 and slots.shape == batch.tokens_RT.shape
        there = batch.segments_RT > 0
        for name in ("tokens_RT", "positions_RT"):
            old = np.concatenate([getattr(one, name).ravel() for one in before])
            np.testing.assert_array_equal(old[slots][there], getattr(batch, name)[there])
        # Of its own pair, not of another with the same tokens: neighbours in an answer were neighbours.
        steps, new = np.diff(slots, axis=1), np.diff(batch.segments_RT, axis=1)
        assert (steps[(new == 0) & there[:, 1:]] == 1).all()


def test_every_batch_has_the_one_shape():
    pairs = [temporal_decay(pair, gamma=0.5) for pair in random_pairs(40, V=V)]
    batches = row_batches(pairs, RowShape(R=3, T=64, S=40, Y=50))
    assert len(batches) > 1
    for batch in batches:
        shapes = [array.shape for array in batch._replace(known=None) if array is not None]
        assert shapes == [(3, 64)] * 4 + [(3, 40)] * 3 + [(40,), (3, 40), (3, 2, 50), (40, 3)]


def test_what_is_known_of_all_pairs_is_in_every_batch():
    pairs = [
        pair._replace(columns={"margin": i / 2, "score": (i, -i)}, reference_2=np.float32([-i, i]))
        for i, pair in enumerate(random_pairs(9, V=V))
    ]
    batches = row_batches(pairs, RowShape(R=1, T=64, S=40), B=11)
    assert len(batches) > 1 and all(batch.known is batches[0].known for batch in batches)
    known = batches[0].known
    assert known.lengths_B2.tolist() == [[mask.sum() for mask in pair.masks] for pair in pairs] + [[0, 0]] * 2
    assert known.columns["margin"].tolist() == [i / 2 for i in range(9)] + [0, 0]
    assert known.columns["score"].tolist() == [[i, -i] for i in range(9)] + [[0, 0]] * 2
    assert known.reference_B2.tolist() == [[-i, i] for i in range(9)] + [[0, 0]] * 2
    arrays = known.lengths_B2, known.reference_B2, *known.columns.values()
    assert {array.dtype for array in arrays} == {np.dtype(np.float32)}


def test_all_batches_but_the_last_have_all_their_rows_filled():
    batches = row_batches(random_pairs(40, V=V), RowShape(R=3, T=64, S=40))
    used = [tokens > 0 for tokens in tokens_per_row(batches)]
    assert used == sorted(used, reverse=True)
    assert len(used) - sum(used) < 3


def test_a_row_takes_no_more_scored_tokens_than_it_has_room_for(rng):
    pairs = [pair_of(rng, (1, 3, 2), V=V) for _ in range(4)]
    assert scored_per_row(row_batches(pairs, RowShape(R=1, T=100, S=20))) == [20]
    assert scored_per_row(row_batches(pairs, RowShape(R=1, T=100, S=19))) == [15, 5]
    assert scored_per_row(row_batches(pairs, RowShape(R=1, T=100, S=5))) == [5, 5, 5, 5]


def test_a_row_takes_no_more_tokens_than_it_has_slots_for(rng):
    pairs = [pair_of(rng, (1, 3, 2), V=V) for _ in range(4)]
    assert tokens_per_row(row_batches(pairs, RowShape(R=1, T=24, S=100))) == [24]
    assert tokens_per_row(row_batches(pairs, RowShape(R=1, T=23, S=100))) == [18, 6]


def test_packing_wastes_little():
    pairs = random_pairs(200, V=V)
    used = np.array(tokens_per_row(row_batches(pairs, RowShape(R=1, T=128, S=128))))
    assert used.sum() == sum(pair.slots for pair in pairs)
    assert used.mean() > 0.95 * 128


def test_pack_takes_the_longest_first():
    # In the order given, 2 3 4 would share a row and leave 5 and 6 one each.
    assert pack([2, 3, 4, 5, 6], [1, 1, 1, 1, 1], T=10, S=10) == [[4, 2], [3, 1, 0]]


def test_pack_fills_the_fullest_row_that_has_room():
    # 6 and 5 open a row each; 4 fills the row of 6, 3 and 2 that of 5.
    assert pack([6, 5, 4, 3, 2], [1, 1, 1, 1, 1], T=10, S=10) == [[0, 2], [1, 3, 4]]
    assert pack([6, 5, 4, 3, 2], [1, 1, 1, 1, 1], T=10, S=2) == [[0, 2], [1, 3], [4]]


def loads(sizes, rows):
    return [sum(sizes[i] for i in row) for row in rows]


ITEM = st.tuples(*[st.integers(1, 20)] * 2, st.tuples(*[st.integers(0, 20)] * 2))


@settings(max_examples=300, deadline=None)
@given(st.lists(ITEM, max_size=40), st.tuples(*[st.integers(20, 60)] * 3), st.integers(1, 8), st.booleans())
def test_any_items_land_whole_in_one_row_within_its_capacities(items, room, rows, with_views):
    slots, scored, views = zip(*items, strict=True) if items else ((), (), ())
    T, S, Y = room[0], room[1], with_views * room[2]
    capacities = [(slots, T), (scored, S)] + [([view[side] for view in views], Y) for side in (0, 1) if Y]
    best = pack(slots, scored, T, S, views=views, Y=Y)
    even = spread(slots, scored, T, S, rows=rows, views=views, Y=Y)
    for found in (best, even) if even is not None else (best,):
        assert sorted(i for row in found for i in row) == list(range(len(items)))
        for sizes, most in capacities:
            assert max(loads(sizes, found), default=0) <= most
    # No two rows could be one.
    for k, row in enumerate(best):
        for other in best[:k]:
            assert any(sum(sizes[i] for i in row + other) > most for sizes, most in capacities)
    assert even is None or len(even) == rows


# Views


def test_a_view_holds_the_prompts_and_one_side_of_the_answers():
    pairs = [tokens([1, 2, 3], [4, 5], [6, 7, 8]), tokens([1, 2], [3], [4, 5])]
    (batch,) = row_batches(pairs, RowShape(R=1, T=14, S=9, Y=10))
    #       slots: p  p  p  c  c  r  r  r  p  p  c   r   r
    chosen, rejected = batch.views_R2Y[0].tolist()
    assert chosen == [0, 1, 2, 3, 4, 8, 9, 10, 14, 14]
    assert rejected == [0, 1, 2, 5, 6, 7, 8, 9, 11, 12]


def test_a_prompt_without_a_chosen_answer_is_only_in_the_other_view():
    good, bad = tokens([1, 2], [3, 4], []), tokens([5], [], [6, 7])
    (batch,) = row_batches([good, bad], RowShape(R=1, T=8, S=4, Y=4))
    assert batch.views_R2Y.tolist() == [[[0, 1, 2, 3], [4, 5, 6, 8]]]


def test_causal_attention_within_segments_of_a_view_is_the_rule_of_visibility():
    for seed in range(12):
        rng = np.random.default_rng(seed)
        pairs = random_pairs(12, V=V, seed=seed, most=8)
        pairs = [pair if rng.random() < 0.8 else without(pair, rng.integers(2)) for pair in pairs]
        shape = RowShape(R=2, T=60, S=48, Y=40)
        for batch in row_batches(pairs, shape, wanted_B2=rng.random((12, 2)) < 0.7):
            for r in range(shape.R):
                assert_views_keep_visibility(batch, r, shape)


def assert_views_keep_visibility(batch, r, shape):
    segments, prompts, positions = batch.segments_RT[r], batch.prompts_RT[r], batch.positions_RT[r]
    for view in batch.views_R2Y[r].tolist():
        used = [slot for slot in view if slot < shape.T]
        assert view == used + [shape.T] * (shape.Y - len(used))
        assert used == sorted(set(used))
        for entry, slot in enumerate(used):
            seen = [other for other in used[: entry + 1] if prompts[other] == prompts[slot]]
            visible = [t for t in range(slot + 1) if segments[t] in (segments[slot], prompts[slot])]
            assert seen == visible
            assert [positions[other] for other in seen] == list(range(len(seen)))
    assert {slot for slot in batch.views_R2Y[r].ravel() if slot < shape.T} == set(np.flatnonzero(segments))


def test_a_row_takes_no_more_of_a_view_than_there_is_room_for(rng):
    pairs = [pair_of(rng, (1, 3, 2), V=V) for _ in range(4)]  # 4 entries beside chosen answers, 3 beside rejected ones
    assert tokens_per_row(row_batches(pairs, RowShape(R=1, T=100, S=100, Y=16))) == [24]
    assert tokens_per_row(row_batches(pairs, RowShape(R=1, T=100, S=100, Y=15))) == [18, 6]
    rejected_B2 = np.array([[False, True]] * 4)
    assert tokens_per_row(row_batches(pairs, RowShape(1, 100, 100, Y=12), wanted_B2=rejected_B2)) == [12]
    assert tokens_per_row(row_batches(pairs, RowShape(1, 100, 100, Y=11), wanted_B2=rejected_B2)) == [9, 3]


# Several shapes


def slots_taken(batches):
    return sum(batch.tokens_RT.size for batch in batches)


def test_the_shape_in_which_the_pairs_take_the_fewest_slots_is_taken():
    shapes = [RowShape(4, 96, 80), RowShape(4, 64, 56), RowShape(2, 75, 60), RowShape(1, 60, 40)]
    taken = set()
    for seed in range(40):
        pairs = random_pairs(1 + seed, V=V, seed=seed)
        batches = row_batches(pairs, shapes)
        assert slots_taken(batches) == min(slots_taken(row_batches(pairs, shape)) for shape in shapes)
        taken.add(batches[0].tokens_RT.shape)
    assert len(taken) > 2


def test_of_shapes_that_take_as_many_slots_the_first_is_taken(rng):
    pairs = [pair_of(rng, (1, 3, 2), V=V) for _ in range(4)]
    for shapes in ([RowShape(2, 12, 12), RowShape(1, 12, 12)], [RowShape(1, 12, 12), RowShape(2, 12, 12)]):
        assert row_batches(pairs, shapes)[0].tokens_RT.shape == shapes[0][:2]


def test_a_shape_that_does_not_hold_every_wanted_pair_is_not_taken(rng):
    pairs = [pair_of(rng, (4, 6, 6), V=V), pair_of(rng, (2, 2, 2), V=V)]
    shapes = [RowShape(1, 40, 40), RowShape(1, 14, 14)]
    assert row_batches(pairs, shapes)[0].tokens_RT.shape == (1, 40)
    for wanted in ([[True, False], [False, False]], [[False, False], [True, True]]):
        assert row_batches(pairs, shapes, wanted_B2=np.array(wanted))[0].tokens_RT.shape == (1, 14)
    assert row_batches(pairs[1:], [RowShape(1, 40, 40), RowShape(1, 14, S=3)])[0].tokens_RT.shape == (1, 40)
    assert row_batches(pairs[1:], [RowShape(1, 40, 40), RowShape(1, 14, 14, Y=3)])[0].tokens_RT.shape == (1, 40)


def test_a_pair_that_no_shape_holds_is_refused_by_the_largest(rng):
    pairs = [pair_of(rng, (1, 1, 1), V=V), a_pair((100, 30, 40))]
    with pytest.raises(ValueError, match=r"'ultra:9'.*row_length is 169;"):
        row_batches(pairs, [RowShape(1, 128, 512), RowShape(1, 169, 512), RowShape(4, 50, 512)])


def test_nothing_wanted_takes_no_rows():
    shapes = [RowShape(1, 40, 40), RowShape(1, 14, 14)]
    assert row_batches([], shapes) == []
    assert row_batches(random_pairs(3, V=V), shapes, wanted_B2=np.zeros((3, 2), bool)) == []


# Balance


def test_rows_of_an_update_have_about_the_same_work():
    for seed in range(5):
        pairs = random_pairs(60, V=V, seed=seed)
        used = np.array(tokens_per_row(row_batches(pairs, RowShape(R=8, T=256, S=200))))
        assert used.sum() == sum(pair.slots for pair in pairs)
        assert used.max() < 1.1 * used.mean()


def test_pairs_that_cannot_be_spread_evenly_are_packed_as_they_fit():
    sizes = [5, 5, 4, 3, 3]  # longest first to the emptiest row leaves no room for the last
    assert spread(sizes, [1] * 5, T=10, S=10, rows=2) is None
    pairs = [a_pair((size - 2, 1, 1)) for size in sizes]
    assert tokens_per_row(row_batches(pairs, RowShape(R=2, T=10, S=10))) == [10, 10]


def test_longest_first_to_the_emptiest_row():
    assert spread([2, 3, 4, 5], [1] * 4, T=10, S=10, rows=2) == [[2, 1], [3, 0]]
    # The emptiest row has no scored tokens left, the other has.
    assert spread([6, 3, 2], [1, 2, 1], T=10, S=2, rows=2) == [[1], [0, 2]]
    assert spread([6, 3, 2], [1, 2, 2], T=10, S=2, rows=2) is None


def test_a_device_has_heavy_rows_beside_light_ones():
    pairs = [a_pair((size, 1, 1)) for size in (10, 30, 20, 50, 40, 80, 70, 60)]
    used = np.array(tokens_per_row(row_batches(pairs, RowShape(R=8, T=82, S=2))))
    for devices in (2, 4):
        assert len(set(used.reshape(devices, -1).sum(axis=1))) == 1


def test_one_row_at_a_time_is_filled_before_the_next():
    pairs = [a_pair((size - 2, 1, 1)) for size in (6, 5, 3, 3)]
    assert tokens_per_row(row_batches(pairs, RowShape(R=1, T=10, S=10))) == [9, 8]
    pairs = pairs[:2] + pairs[3:]
    assert tokens_per_row(row_batches(pairs, RowShape(R=1, T=12, S=10))) == [11, 3]


# Room


def a_pair(lengths, unscored=(0, 0)):
    masks = [np.arange(n) >= left_out for n, left_out in zip(lengths[1:], unscored, strict=True)]
    ids = (np.zeros(n, np.int32) for n in lengths)
    return tokens(*ids, masks, name="ultra:9", where="pairs.jsonl line 9")


def test_a_pair_longer_than_a_row_is_refused():
    pair = a_pair((100, 30, 40))
    with pytest.raises(ValueError) as refused:
        row_batches([pair], RowShape(1, 169, 512))
    assert str(refused.value) == (
        "pair 'ultra:9' (pairs.jsonl line 9) takes 170 slots (prompt 100 + chosen 30 + rejected 40) but row_length is 169; "
        "raise row_length to 256, or lower max_length below 140 to drop or cut such pairs"
    )
    assert len(row_batches([pair], RowShape(1, 170, 512))) == 1


def test_a_pair_with_more_scored_tokens_than_a_row_is_refused():
    pair = a_pair((100, 30, 40), unscored=(1, 2))
    with pytest.raises(ValueError) as refused:
        row_batches([pair], RowShape(1, 512, 66))
    assert str(refused.value) == (
        "pair 'ultra:9' (pairs.jsonl line 9) has 67 scored tokens but scored_length is 66; raise scored_length to 128"
    )
    assert len(row_batches([pair], RowShape(1, 512, 67))) == 1


def test_a_pair_with_a_longer_view_than_a_row_has_room_for_is_refused():
    pair = a_pair((100, 30, 40))
    with pytest.raises(ValueError) as refused:
        row_batches([pair], RowShape(1, 512, 512, Y=139))
    assert str(refused.value) == (
        "pair 'ultra:9' (pairs.jsonl line 9) takes 140 entries of a view (prompt 100 + rejected 40) but view_length is 139; "
        "lower max_length below 140 to drop or cut such pairs"
    )
    assert len(row_batches([pair], RowShape(1, 512, 512, Y=140))) == 1


def test_where_both_are_too_small_row_length_is_named_first():
    assert "raise row_length to 128" in str(too_long(a_pair((2, 30, 40)), T=71, S=69))


def test_the_suggested_row_length_is_the_longest_pair_in_whole_registers():
    assert suggest_row_length(np.array([1])) == 128
    assert suggest_row_length(np.array([128, 5])) == 128
    assert suggest_row_length(np.array([5, 129])) == 256


def test_the_suggested_scored_length_is_the_share_of_a_row_and_some():
    # Half of all tokens are scored: 512 of a row of 1024, and with 8 % on top 553, which is 576 in 64s.
    assert suggest_scored_length(np.array([100, 60]), np.array([50, 30]), 1024) == 576


def test_the_suggested_scored_length_holds_a_pair_that_is_scored_more_than_most():
    slots, scored = np.array([400] * 9 + [500]), np.array([4] * 9 + [450])
    assert suggest_scored_length(slots, scored, 512) == 512 == 64 * math.ceil(450 / 64)


def test_the_suggested_scored_length_is_at_most_the_row():
    assert suggest_scored_length(np.array([100]), np.array([99]), 100) == 100


def test_the_suggested_lengths_hold_any_pairs():
    for seed in range(40):
        pairs = random_pairs(10, V=V, seed=seed, most=1 + 10 * seed)
        slots, scored = np.array([pair.slots for pair in pairs]), np.array([pair.scored for pair in pairs])
        T = suggest_row_length(slots)
        S = suggest_scored_length(slots, scored, T)
        assert slots.max() <= T < slots.max() + 128
        assert scored.max() <= S <= T
        assert row_batches(pairs, RowShape(1, T, S))


# Shapes


@pytest.fixture(scope="module")
def ultrafeedback():
    """The lengths of real pairs: GPT-2's tokens and four more for each message, at max_length 2048."""
    data = ROOT / "benchmarks" / "data"
    tokenizer = Tokenizer.from_buffer(gzip.decompress((data / "gpt2-tokenizer.json.gz").read_bytes()))
    with gzip.open(data / "ultrafeedback.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [
            json.loads(line)[column][-1]["content"] for line in file for column in ("prompt", "chosen", "rejected")
        ]
    lengths_B3 = 4 + np.array([len(text) for text in tokenizer.encode_batch(texts)]).reshape(-1, 3)
    lengths_B3 = lengths_B3[lengths_B3[:, 0] + lengths_B3[:, 1:].max(axis=1) <= 2048]
    assert len(lengths_B3) > 850
    return table_of(lengths_B3)


def table_of(lengths_B3) -> Sizes:
    answers_B2 = lengths_B3[:, 1:]
    return Sizes(lengths_B3.sum(axis=1), answers_B2.sum(axis=1), lengths_B3[:, :1] + answers_B2)


def paddings(table, shapes, part=1.0):
    """The share of all slots that stay empty, for random updates of 128 pairs or parts of such."""
    rng, found = np.random.default_rng(7), []
    for _ in range(30):
        update = table.of(rng.choice(len(table.slots_B), 128, replace=False)[: round(part * 128)])
        shape, rows = packed(update, shapes)
        found.append(1 - update.slots_B.sum() / (len(rows) * shape.T))
    return np.array(found)


@pytest.mark.parametrize("view_length", [False, True])
@pytest.mark.parametrize(["ways", "most"], [(1, 0.05), (8, 0.14), (16, 0.17), (32, 0.2)])
def test_real_pairs_leave_little_of_the_suggested_rows_empty(ultrafeedback, ways, most, view_length):
    shapes = suggest_shapes(*ultrafeedback, B=128, ways=ways, view_length=view_length)
    assert paddings(ultrafeedback, shapes).mean() <= most


def test_second_passes_take_fewer_slots_in_the_shorter_shapes(ultrafeedback):
    for ways, part, most in ((1, 0.2, 0.16), (8, 0.4, 0.25), (16, 0.4, 0.25)):
        shapes = suggest_shapes(*ultrafeedback, B=128, ways=ways)
        assert len(shapes) > 1
        padding = paddings(ultrafeedback, shapes, part).mean()
        assert padding < most
        assert padding < paddings(ultrafeedback, shapes[:1], part).mean() - 0.05


@pytest.mark.parametrize("ways", [1, 8, 256])
def test_the_first_suggested_shape_holds_every_pair_and_the_others_are_shorter(ultrafeedback, ways):
    shapes = suggest_shapes(*ultrafeedback, B=128, ways=ways, view_length=True)
    assert 1 <= len(shapes) <= 5
    assert ultrafeedback.fit(shapes[0])
    for shape in shapes:
        # What is short enough has room for its scored tokens and its views, too.
        assert ultrafeedback.of(ultrafeedback.slots_B <= shape.T).fit(shape)
        assert shape.R % ways == shape.T % 128 == shape.Y % 128 == 0
        assert shape.S <= shape.T and 0 < shape.Y <= shape.T
        assert shape.R // ways * shape.T <= 8192
    assert list(shapes) == sorted(set(shapes), key=lambda shape: (shape.T, shape.R), reverse=True)


def test_more_devices_than_pairs_have_a_row_each(ultrafeedback):
    assert {shape.R for shape in suggest_shapes(*ultrafeedback, B=8, ways=16)} == {16}
    assert {shape.R for shape in suggest_shapes(*ultrafeedback, B=128, ways=256)} == {256}


def test_a_pair_longer_than_the_budget_has_a_row_for_itself(ultrafeedback):
    longest = int(ultrafeedback.slots_B.max())
    largest, *_ = suggest_shapes(*ultrafeedback, B=128, ways=8, budget=longest // 2)
    assert largest[:2] == (8, 128 * math.ceil(longest / 128))


def test_what_is_given_is_obeyed(ultrafeedback):
    def suggested(**given):
        return suggest_shapes(*ultrafeedback, B=128, ways=8, **given)

    largest, *shorter = suggested(row_length=5000)
    assert largest.T == 5000
    assert all(shape.T == 5000 or shape.T % 128 == 0 for shape in shorter)
    largest, *shorter = suggested(scored_length=3100)
    assert largest.S == 3100
    assert all(shape.S <= 3100 and shape.Y == 0 for shape in shorter)
    assert {shape.R for shape in suggested(rows_per_device=3)} == {24}
    largest, *_ = suggested(row_length=4096, scored_length=3500, rows_per_device=2, view_length=True)
    assert largest == RowShape(16, 4096, 3500, largest.Y)


def test_lengths_that_are_too_short_for_a_pair_are_left_to_the_caller(ultrafeedback):
    for row_length, scored_length in ((1000, None), (None, 900), (10, None), (10, 5)):
        [shape] = suggest_shapes(*ultrafeedback, B=128, ways=8, row_length=row_length, scored_length=scored_length)
        assert not ultrafeedback.fit(shape)
        assert row_length in (None, shape.T)
        assert scored_length in (None, shape.S)


def test_the_suggestion_is_the_same_each_time(ultrafeedback):
    assert len({suggest_shapes(*ultrafeedback, B=64, ways=4) for _ in range(2)}) == 1


def test_the_suggested_shapes_hold_any_pairs():
    for seed in range(20):
        pairs = random_pairs(1 + seed, V=V, seed=seed, most=1 + 20 * seed)
        table = table_of(np.array([pair.lengths for pair in pairs]))
        shapes = suggest_shapes(*table, B=1 + seed // 2, ways=1 + seed % 3, view_length=seed % 2 == 0)
        batches = row_batches(pairs, shapes)
        assert sum(batch.filled_B.sum() for batch in batches) == len(pairs)
