"""What single tokens count for: numbers by hand, and what two roads to the same sums must agree on."""

import numpy as np
import pytest
from examples import pair_of, tokens

from repo_jax.data.chat import poet
from repo_jax.data.weights import ld, temporal_decay


def as_lists(pair):
    return [weights.tolist() for weights in pair.weights]


def sums(pair, logps):
    """The weighted sums of log-probs given for every token of the branches."""
    weights = pair.weights or [np.ones(int(mask.sum())) for mask in pair.masks]
    return [float((w * branch[mask]).sum()) for w, branch, mask in zip(weights, logps, pair.masks, strict=True)]


def test_tokens_beyond_the_shorter_answers_length_count_for_alpha():
    assert as_lists(ld(tokens([1], [2, 3, 4, 5], [6, 7]), alpha=0.25)) == [[1, 1, 0.25, 0.25], [1, 1]]
    assert as_lists(ld(tokens([1], [2], [3, 4, 5]), alpha=0.5)) == [[1], [1, 0.5, 0.5]]
    assert as_lists(ld(tokens([1], [2, 3], [4, 5]), alpha=0.0)) == [[1, 1], [1, 1]]


def test_with_alpha_one_every_token_counts_the_same():
    assert as_lists(ld(tokens([1], [2, 3, 4], [5]), alpha=1.0)) == [[1, 1, 1], [1]]


def test_a_token_counts_for_gamma_to_the_power_of_its_place():
    assert as_lists(temporal_decay(tokens([1], [2, 3, 4], [5]), gamma=0.5)) == [[0.5, 0.25, 0.125], [0.5]]
    assert as_lists(temporal_decay(tokens([1], [2, 3], [4, 5]), gamma=1.0)) == [[1, 1], [1, 1]]


def test_only_scored_tokens_have_a_weight_and_a_place():
    pair = tokens([1], [2, 3, 4, 5], [6, 7, 8], masks=[[0, 1, 0, 1], [0, 0, 1]])
    assert as_lists(temporal_decay(pair, gamma=0.5)) == [[0.5, 0.25], [0.5]]
    assert as_lists(ld(pair, alpha=0.25)) == [[1, 0.25], [1]]


@pytest.mark.parametrize("transform", [lambda p: ld(p, alpha=0.3), lambda p: temporal_decay(p, gamma=0.9)])
def test_weights_are_float32_and_change_nothing_else(transform):
    pair = pair_of(np.random.default_rng(0), (3, 5, 2), V=100)
    weighted = transform(pair)
    assert [(w.dtype, len(w)) for w in weighted.weights] == [(np.float32, 5), (np.float32, 2)]
    assert weighted._replace(weights=None) == pair
    assert pair.weights is None


def test_the_missing_answer_of_an_unpaired_row_has_no_weights():
    assert as_lists(temporal_decay(tokens([1], [], [2, 3]), gamma=0.5)) == [[], [0.5, 0.25]]


def test_ld_with_alpha_zero_has_the_sums_of_poet_but_keeps_the_lengths():
    rng = np.random.default_rng(0)
    for _ in range(30):
        lengths = tuple(int(n) for n in rng.integers(1, 9, size=3))
        masks = [rng.random(n) < 0.7 for n in lengths[1:]]
        for mask in masks:
            mask[rng.integers(len(mask))] = True
        pair = pair_of(rng, lengths, V=100, masks=masks)
        logps = [rng.normal(size=n) for n in lengths[1:]]
        desensitised, cut = ld(pair, alpha=0.0), poet(pair)
        kept = [branch[: len(mask)] for branch, mask in zip(logps, cut.masks, strict=True)]
        np.testing.assert_allclose(sums(desensitised, logps), sums(cut, kept), rtol=1e-6)
        assert [mask.sum() for mask in cut.masks] == [min(mask.sum() for mask in masks)] * 2
        assert [mask.sum() for mask in desensitised.masks] == [mask.sum() for mask in masks]
