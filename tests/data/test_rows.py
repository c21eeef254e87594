"""Packed rows, read back slot by slot: every scored token must be predicted from its prompt and the answer before it."""

import math

import numpy as np
import pytest
from examples import pair_of, random_pairs, tokens

from repo_jax.data.rows import RowShape, pack, row_batches, suggest_row_length, suggest_scored_length, too_long
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
    *ids, filled_B, weights_RS = batch
    assert {array.dtype for array in ids} == {np.dtype(np.int32)}
    assert filled_B.dtype == bool
    assert weights_RS is None


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
        shape = RowShape(R=int(rng.integers(1, 5)), T=int(rng.integers(36, 80)), S=int(rng.integers(24, 48)))
        batches = row_batches(pairs, shape, B=len(pairs) + seed % 3, wanted_B2=wanted_B2)
        assert read_back(batches) == expected(pairs, wanted_B2), f"seed {seed}"
        filled = sum((batch.filled_B[: len(pairs)] for batch in batches), np.zeros(len(pairs), int))
        there_B2 = wanted_B2 & np.array([[len(ids) > 0 for ids in pair.branches] for pair in pairs])
        assert filled.tolist() == there_B2.any(axis=1).tolist(), f"seed {seed}"


def test_every_batch_has_the_one_shape():
    batches = row_batches(random_pairs(40, V=V), RowShape(R=3, T=64, S=40))
    assert len(batches) > 1
    for batch in batches:
        assert [array.shape for array in batch[:-1]] == [(3, 64)] * 4 + [(3, 40)] * 3 + [(40,)]


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


def test_where_both_are_too_small_row_length_is_named_first():
    assert "raise row_length to 128" in str(too_long(a_pair((2, 30, 40)), T=71, S=69))


def test_the_suggested_row_length_is_the_longest_pair_in_whole_registers():
    assert suggest_row_length(np.array([1])) == 128
    assert suggest_row_length(np.array([128, 5])) == 128
    assert suggest_row_length(np.array([5, 129])) == 256


def test_the_suggested_scored_length_is_the_share_of_a_row_and_some():
    # Half of all tokens are scored: 512 of a row of 1024, and with 15 % on top 589, which is 640 in 64s.
    assert suggest_scored_length(np.array([100, 60]), np.array([50, 30]), 1024) == 640


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
