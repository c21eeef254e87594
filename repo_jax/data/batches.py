"""Which pairs make up step k: a pure function of the seed and k, so that a resumed run needs no iterator state."""

import functools

import numpy as np


def steps_per_epoch(pairs: int, train_batch_size: int) -> int:
    """Whole batches only: the last partial batch of an epoch is dropped."""
    if pairs < train_batch_size:
        raise ValueError(
            f"train_batch_size={train_batch_size} but there are {pairs} pairs to train on; lower train_batch_size to at most {pairs}"
        )
    return pairs // train_batch_size


@functools.lru_cache(maxsize=2)
def _order(pairs: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(pairs)


def batch_indices(step: int, *, pairs: int, train_batch_size: int, seed: int) -> np.ndarray:
    """The numbers of the pairs of update `step` (from 0); every epoch has an order of its own."""
    epoch, k = divmod(step, steps_per_epoch(pairs, train_batch_size))
    return _order(pairs, seed, epoch)[k * train_batch_size : (k + 1) * train_batch_size]
