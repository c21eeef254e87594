"""Which pairs make up an update."""

import numpy as np
import pytest

from repo_jax.data import batches
from repo_jax.data.batches import batch_indices, steps_per_epoch

TEN_BY_THREE = {"pairs": 10, "train_batch_size": 3}  # three updates an epoch, and a pair left over


def epoch(number, *, pairs=10, train_batch_size=3, seed=0):
    """The pairs of an epoch in their order."""
    steps = steps_per_epoch(pairs, train_batch_size)
    options = {"pairs": pairs, "train_batch_size": train_batch_size, "seed": seed}
    return np.concatenate([batch_indices(number * steps + k, **options) for k in range(steps)]).tolist()


def test_the_last_partial_batch_is_dropped():
    assert steps_per_epoch(9, 3) == 3
    assert steps_per_epoch(10, 3) == 3
    assert steps_per_epoch(11, 3) == 3
    assert steps_per_epoch(12, 3) == 4


def test_every_batch_is_whole():
    assert [len(batch_indices(step, seed=0, **TEN_BY_THREE)) for step in range(9)] == [3] * 9


def test_a_step_has_the_same_pairs_whenever_it_is_asked_for():
    steps = [5, 0, 17, 5, 2, 17, 0]
    first = {step: batch_indices(step, seed=1, **TEN_BY_THREE).tolist() for step in steps}
    batches._order.cache_clear()
    for step in reversed(steps):
        assert batch_indices(step, seed=1, **TEN_BY_THREE).tolist() == first[step]


def test_an_epoch_covers_every_pair_once():
    assert sorted(epoch(0, pairs=12)) == list(range(12))
    assert sorted(epoch(7, pairs=12)) == list(range(12))


def test_an_epoch_takes_no_pair_twice_where_some_are_left_over():
    pairs = epoch(0)
    assert len(pairs) == len(set(pairs)) == 9
    assert set(pairs) < set(range(10))


def test_the_pairs_left_over_change_with_the_epoch():
    left_over = {(set(range(10)) - set(epoch(number))).pop() for number in range(20)}
    assert len(left_over) > 3


def test_epochs_differ_in_their_order():
    orders = {tuple(epoch(number, pairs=60)) for number in range(5)}
    assert len(orders) == 5


def test_seeds_differ_in_their_order():
    orders = {tuple(epoch(0, pairs=60, seed=seed)) for seed in range(5)}
    assert len(orders) == 5


def test_the_epochs_of_one_seed_are_not_those_of_the_next():
    assert epoch(1, pairs=60, seed=0) != epoch(0, pairs=60, seed=1)


def test_pairs_are_shuffled():
    assert epoch(0, pairs=60) != list(range(60))


def test_fewer_pairs_than_a_batch_are_refused():
    with pytest.raises(ValueError) as refused:
        steps_per_epoch(15, 16)
    assert str(refused.value) == (
        "train_batch_size=16 but there are 15 pairs to train on; lower train_batch_size to at most 15"
    )
    assert steps_per_epoch(16, 16) == 1
