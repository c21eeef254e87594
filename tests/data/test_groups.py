"""Sequences made of other rows' answers."""

import types

import numpy as np
import pytest
from examples import random_pairs

from repo_jax.data.groups import Mismatched


def store_of(pairs):
    """What Mismatched reads of a store."""
    lengths = np.array([pair.lengths for pair in pairs])
    scored = np.array([[mask.sum() for mask in pair.masks] for pair in pairs])
    fields = {
        "lengths": lengths,
        "scored": scored,
        "slots": lengths.sum(axis=1),
        "key": "k",
        "plain": pairs.__getitem__,
    }
    return types.SimpleNamespace(**fields, weighted=lambda pair: pair, __len__=lambda: len(pairs))


class Store(types.SimpleNamespace):
    def __len__(self):
        return len(self.lengths)


def mismatched(pairs):
    return Mismatched(Store(**vars(store_of(pairs))), None)


def one_sided(pairs):
    none, nothing = np.zeros(0, np.int32), np.zeros(0, bool)
    return [
        pair._replace(rejected=none, rejected_mask=nothing)
        if i % 3
        else pair._replace(chosen=none, chosen_mask=nothing)
        for i, pair in enumerate(pairs)
    ]


@pytest.mark.parametrize("kind", ["pairs", "unpaired"])
def test_every_prompt_gets_the_answer_of_another_row_and_every_row_gives_its_own_once(kind):
    pairs = random_pairs(50, V=1000)
    pairs = one_sided(pairs) if kind == "unpaired" else pairs
    found, used = mismatched(pairs), []
    for i, pair in enumerate(pairs):
        mixed = found[i]
        assert mixed.prompt is pair.prompt
        assert [len(ids) > 0 for ids in mixed.branches] == [len(ids) > 0 for ids in pair.branches]

        def cut(ids, other):
            return len(ids) > 0 and ids.tolist() == other[: len(ids)].tolist()

        for side, ids in enumerate(mixed.branches):
            if len(ids):
                sides = [side] if kind == "pairs" else [0, 1]
                [giver] = {
                    j for j, other in enumerate(pairs) for s in sides if cut(ids, other.branches[s]) and len(ids) > 2
                } or {None}
                assert giver != i
                used.append((giver, side) if kind == "pairs" else giver)
            assert len(mixed.masks[side]) == len(ids)
    named = [one for one in used if one is not None and (kind == "unpaired" or one[0] is not None)]
    assert len(set(named)) == len(named) > 30


def test_nothing_outgrows_the_longest_pair():
    pairs = random_pairs(80, V=1000, most=60)
    found, store = mismatched(pairs), store_of(pairs)
    mixed = [found[i] for i in range(80)]
    assert max(pair.slots for pair in mixed) <= store.slots.max()
    assert max(pair.scored for pair in mixed) <= store.scored.sum(axis=1).max()
    assert max(max(pair.wholes) for pair in mixed) <= max(max(pair.wholes) for pair in pairs)
    whole = sum(pair.scored for pair in pairs)
    assert 0.8 * whole < sum(pair.scored for pair in mixed) <= whole and all(min(pair.lengths) > 0 for pair in mixed)


def test_they_are_the_same_each_time():
    pairs = random_pairs(9, V=1000)
    one, other = ([mismatched(pairs)[i].chosen.tolist() for i in range(9)] for _ in range(2))
    assert one == other
