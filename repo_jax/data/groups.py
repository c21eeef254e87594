"""Further sequences that some losses look at beside the pairs, made of the same data."""

import numpy as np

from repo_jax.data.schema import PairTokens
from repo_jax.data.store import Pairs, TokenStore


class Mismatched(Pairs):
    """Every prompt with the answer of another row, from which KTO estimates a divergence (arXiv:2402.01306).

    The other row is the next one in a fixed random order of the data set, so that log-probs under the reference model can be kept, and so
    that rows of one prompt which stand together do not meet. Answers are cut at their ends where a sequence would outgrow the longest
    pair of the data set, for which rows have room.
    """

    def __init__(self, store: TokenStore):
        self._store, self.key = store, f"{store.key}-mismatched-1"
        order = np.random.default_rng(0).permutation(len(store))
        self._other = np.empty_like(order)
        self._other[order] = np.roll(order, -1)
        views = store.lengths[:, :1] + store.lengths[:, 1:]
        self._most = int(store.slots.max()), int(store.scored.sum(axis=1).max()), int(views.max())

    def __len__(self) -> int:
        return len(self._store)

    def plain(self, i: int) -> PairTokens:
        pair, other = self._store.plain(i), self._store.plain(int(self._other[i]))
        answers = []
        for side, ids in enumerate(pair.branches):
            # An unpaired row has one answer: the other's stands in for it, whatever its label.
            found = side if len(other.branches[side]) else 1 - side
            answers.append((other.branches[found], other.masks[found]) if len(ids) else (ids, pair.masks[side]))
        (chosen, chosen_mask), (rejected, rejected_mask) = self._cut(len(pair.prompt), answers)
        mixed = PairTokens(pair.id, pair.where, pair.prompt, chosen, rejected, chosen_mask, rejected_mask)
        return self._store.weighted(mixed)

    def _cut(self, prompt: int, answers: list) -> list:
        slots, scored, view = self._most
        answers = [(ids[: view - prompt], mask[: view - prompt]) for ids, mask in answers]
        shares = _shared([len(ids) for ids, _ in answers], slots - prompt)
        answers = [(ids[:n], mask[:n]) for (ids, mask), n in zip(answers, shares, strict=True)]
        shares = _shared([int(mask.sum()) for _, mask in answers], scored)
        ends = [
            int(np.searchsorted(np.cumsum(mask), n, side="right")) for (_, mask), n in zip(answers, shares, strict=True)
        ]
        return [(ids[:end], mask[:end]) for (ids, mask), end in zip(answers, ends, strict=True)]


def _shared(wanted: list[int], room: int) -> list[int]:
    """As much as there is room for: the longer of two gives way first."""
    one, other = wanted
    return [min(one, max(room // 2, room - other)), min(other, max(room // 2, room - one))]


# name -> the sequences of that name for the pairs of a store
GROUPS = {"kl": Mismatched}
