"""What single tokens of an answer count for: transforms of pairs whose ids are known."""

import numpy as np

from repo_jax.data.schema import PairTokens


def ld(pair: PairTokens, *, alpha: float) -> PairTokens:
    """Length-desensitised log-probs: tokens beyond the shorter answer's length count for alpha (0 to 1). arXiv:2409.06411."""
    k = min(int(mask.sum()) for mask in pair.masks)
    return _weighted(pair, lambda t: np.where(t < k, 1.0, alpha))


def temporal_decay(pair: PairTokens, *, gamma: float) -> PairTokens:
    """D2PO: the t-th scored token, from 1, counts for gamma ** t (0 to 1). arXiv:2502.14340."""
    return _weighted(pair, lambda t: gamma ** (t + 1.0))


def _weighted(pair: PairTokens, weight) -> PairTokens:
    return pair._replace(weights=tuple(weight(np.arange(mask.sum())).astype(np.float32) for mask in pair.masks))
