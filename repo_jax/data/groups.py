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

    def __init__(self, store: TokenStore, _tokenizer):
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


class Rationale(Pairs):
    """Why the chosen answer is the better one, from the data's `rationale`, after the prompt and both answers (arXiv:2407.14477).

    The answers follow the prompt as they are, with no words between them: the paper's own are not known here. What is longer than max_length
    loses the beginning of what stands before the rationale.
    """

    compared = False

    def __init__(self, store: TokenStore, tokenizer):
        self._store, self.key, texts = store, f"{store.key}-rationale-1", []
        for i in range(len(store)):
            name, row = store.source_row(i)
            text = row.get("rationale")
            if not isinstance(text, str) or not text.strip():
                raise ValueError(
                    f"row {name} of '{store.name}' has no text as 'rationale', which the loss needs; add it to every row"
                )
            texts.append(text)
        most, end = store.tokens["max_length"], [tokenizer.eos_token_id]
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
        self._ids = [np.array(ids[: most // 2 - 1] + end, np.int32) for ids in encoded]
        rationales = np.array([len(ids) for ids in self._ids])
        before = np.minimum(store.slots, most - rationales)
        # The length table, for rows to have room.
        self.lengths = np.stack([before, rationales, np.zeros_like(before)], axis=1)
        self.scored, self.slots = self.lengths[:, 1:], self.lengths.sum(axis=1)

    def __len__(self) -> int:
        return len(self._store)

    def plain(self, i: int) -> PairTokens:
        pair, ids = self._store.plain(i), self._ids[i]
        before = np.concatenate([pair.prompt, *pair.branches])[-self.lengths[i, 0] :]
        none = np.zeros(0, np.int32)
        return PairTokens(pair.id, pair.where, before, ids, none, np.ones(len(ids), bool), none.astype(bool))


# name -> the sequences of that name for the pairs of a store
GROUPS = {"kl": Mismatched, "rationale": Rationale}
