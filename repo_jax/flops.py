"""What an update needs in floating-point operations, from the lengths of its pairs: useful work, whatever is done beside it.

Counted, at 2 per multiply-add: the weight matmuls on every real token (a prompt's once), the attention products of every
(query, key) that is visible, and the output head on scored tokens. Not counted: padding, anything computed again, norms,
softmax, rotary positions, biases, the products of low-rank adapters, the optimizer.

Axis letters: B pairs, 2 is (chosen, rejected); D, F, N, K, H, V as in DecoderConfig.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from repo_jax.data.schema import PairTokens
from repo_jax.models.config import DecoderConfig

Trained = Literal["all", "adapters"]


class Lengths(NamedTuple):
    """Tokens of pairs; an answer that is not there has none."""

    prompt_B: np.ndarray
    branches_B2: np.ndarray
    scored_B2: np.ndarray

    def only(self, wanted_B2: np.ndarray) -> "Lengths":
        """Without the answers that are not wanted, and without the prompts of pairs of which neither is."""
        wanted_B2 = np.asarray(wanted_B2, bool)
        return Lengths(self.prompt_B * wanted_B2.any(axis=1), self.branches_B2 * wanted_B2, self.scored_B2 * wanted_B2)


def lengths_of(pairs: Sequence[PairTokens]) -> Lengths:
    return Lengths(
        np.array([len(pair.prompt) for pair in pairs], np.int64),
        np.array([[len(ids) for ids in pair.branches] for pair in pairs], np.int64).reshape(-1, 2),
        np.array([[mask.sum() for mask in pair.masks] for pair in pairs], np.int64).reshape(-1, 2),
    )


class Flops(NamedTuple):
    """Of scoring answers, and of pushing a gradient back through them."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


def useful_flops(cfg: DecoderConfig, pairs: Sequence[PairTokens], *, trained: Trained = "all") -> float:
    """What one forward and one backward pass over these pairs need."""
    return flops_of(cfg, lengths_of(pairs), trained=trained).total


def flops_of(cfg: DecoderConfig, lengths: Lengths, *, trained: Trained = "all") -> Flops:
    """What scoring these answers needs, and what pushing all of them back does.

    A matmul with a weight that is trained costs twice its forward pass again: gradients of its input and of the weight; under
    `adapters` weights are frozen, and it costs that of the input. Both inputs of attention's products have gradients.
    """
    weights = 2.0 * lengths.prompt_B.sum() * _layer_weights(cfg) * cfg.L
    weights += 2.0 * lengths.branches_B2.sum() * _layer_weights(cfg) * cfg.L
    weights += 2.0 * lengths.scored_B2.sum() * cfg.D * cfg.V
    # A query meets a key in H multiply-adds, and its value in as many, in each of N heads.
    attention = sum(
        4.0 * cfg.N * cfg.H * visible_keys(lengths, cfg.windows[i % len(cfg.windows)]) for i in range(cfg.L)
    )
    return Flops(weights + attention, {"all": 2, "adapters": 1}[trained] * weights + 2 * attention)


def visible_keys(lengths: Lengths, window: int | None) -> int:
    """How many (query, key) there are in a layer of this window: an answer sees its prompt and itself, never its rival."""
    prompt_B1 = lengths.prompt_B[:, None]
    inside_B2 = _causal(prompt_B1 + lengths.branches_B2, window) - _causal(prompt_B1, window)
    return int(_causal(lengths.prompt_B, window).sum() + inside_B2.sum())


def _causal(length, window: int | None):
    """(query, key) of a causal sequence: query i (from 0) sees min(i + 1, window) keys."""
    short = length if window is None else np.minimum(length, window)
    return short * (short + 1) // 2 + (length - short) * (window or 0)


def _layer_weights(cfg: DecoderConfig) -> int:
    """Numbers in the matrices of one layer: queries and outputs, keys and values, the MLP's three."""
    return cfg.D * cfg.H * (2 * cfg.N + 2 * cfg.K) + 3 * cfg.D * cfg.F
