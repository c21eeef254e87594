"""Useful operations against a count that walks over tokens, matrices and a real mask."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from examples import STORIES, TINY, random_pairs, tokens

from repo_jax.data.rows import RowShape, row_batches
from repo_jax.flops import Lengths, flops_of, lengths_of, useful_flops, visible_keys
from repo_jax.models.attention import visible
from repo_jax.models.config import DecoderConfig
from repo_jax.models.decoder import param_shapes

WINDOWED = dataclasses.replace(TINY, windows=(3, None), L=5)
CONFIGS = {"plain": TINY, "windowed": WINDOWED, "stories": DecoderConfig.from_hf(STORIES)}


def counted(cfg, pairs) -> tuple[int, int, int]:
    """Multiply-adds of weight matmuls, of attention and of the head, one token of a packed row after another."""
    [batch] = row_batches(pairs, RowShape(2, 128, 128))
    per_token = 0
    for stack in cfg.stacks:
        for path, leaf in jax.tree_util.tree_leaves_with_path(param_shapes(cfg)[stack]):
            if leaf.ndim > 2 and "norm" not in path[-1].key and "bias" not in path[-1].key:
                per_token += math.prod(leaf.shape)  # of all layers of the stack
    layers = attention = head = 0
    masks = {
        window: np.asarray(visible(batch.segments_RT, batch.prompts_RT, batch.positions_RT, window))
        for window in set(cfg.windows)
    }
    for row, segments_T in enumerate(batch.segments_RT):
        for slot, segment in enumerate(segments_T):
            if segment == 0:
                continue
            layers += per_token
            for layer in range(cfg.L):
                keys = masks[cfg.windows[layer % len(cfg.windows)]][row, slot].sum()
                attention += 2 * cfg.N * cfg.H * int(keys)
        head += cfg.D * cfg.V * int((batch.answers_RS[row] < 2 * len(pairs)).sum())
    return layers, attention, head


def pairs_with_unscored_tokens():
    pairs = random_pairs(5, V=TINY.V, most=12)
    masks = ([False, True, True], [True, False])
    return [*pairs, tokens([1, 2, 3], [4, 5, 6], [7, 8], masks)]


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_operations_are_those_of_a_walk_over_every_token(cfg):
    pairs = pairs_with_unscored_tokens()
    layers, attention, head = counted(cfg, pairs)
    forward = 2 * (layers + attention + head)
    assert flops_of(cfg, lengths_of(pairs)) == (forward, 2 * forward)
    assert useful_flops(cfg, pairs) == 3 * forward


def test_frozen_weights_have_no_gradient_of_their_own():
    pairs = pairs_with_unscored_tokens()
    layers, attention, head = counted(TINY, pairs)
    assert flops_of(TINY, lengths_of(pairs), trained="adapters").backward == 2 * (layers + head) + 4 * attention


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_visible_keys_are_the_ones_of_the_mask(window):
    pairs = random_pairs(6, V=TINY.V, most=9)
    [batch] = row_batches(pairs, RowShape(2, 128, 128))
    mask_BTS = np.asarray(visible(batch.segments_RT, batch.prompts_RT, batch.positions_RT, window))
    assert visible_keys(lengths_of(pairs), window) == mask_BTS[batch.segments_RT > 0].sum()


def test_an_answer_that_is_not_pushed_back_costs_nothing():
    lengths = Lengths(np.array([4, 6]), np.array([[3, 2], [5, 7]]), np.array([[3, 2], [5, 7]]))
    left = lengths.only(np.array([[True, False], [False, False]]))
    alone = Lengths(np.array([4]), np.array([[3, 0]]), np.array([[3, 0]]))
    assert flops_of(TINY, left) == flops_of(TINY, alone)
    assert flops_of(TINY, lengths.only(np.ones((2, 2)))) == flops_of(TINY, lengths)


def test_an_unpaired_row_counts_its_one_answer():
    unpaired = tokens([1, 2, 3], [4, 5], [])
    assert flops_of(TINY, lengths_of([unpaired])) == flops_of(
        TINY, Lengths(np.array([3]), np.array([[2, 0]]), np.array([[2, 0]]))
    )


def test_a_long_plain_text_costs_six_per_parameter_and_token():
    # Llama 3 8B. Attention is what stands above 6 N D: 2048 / 2 keys on average against a width of 4096.
    cfg = DecoderConfig(D=4096, F=14336, N=32, K=8, H=128, V=128256, L=32, max_positions=8192)
    parameters = 8_030_261_248 - 128256 * 4096  # the published number, without the embedding, which multiplies nothing
    length = 2048
    lengths = Lengths(np.array([1]), np.array([[length, 0]]), np.array([[length, 0]]))
    ratio = flops_of(cfg, lengths).total / (6 * parameters * length)
    assert 1.0 < ratio < 1.05
