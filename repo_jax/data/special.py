"""Text that looks like a special token is text: what a template writes and what people wrote are told apart."""

import functools
import itertools
import json
import os.path
import re
from collections.abc import Iterable, Iterator, Sequence

from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerFast


class SpecialTokens:
    """A tokenizer's special tokens, and encoding in which only those that the template wrote count as such.

    Messages that hold such text are rendered with it hidden behind a mark, a character that is in none of them. Revealing swaps
    the two spellings: the hidden text is plain again, and what the template wrote carries the mark. A twin of the tokenizer, whose
    special tokens are spelt with the mark, then encodes it all at once, so that nothing else is split otherwise.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        # Without a post-processor: it would trim the white space off the tokens' offsets. Nor is anything cut or padded here.
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.post_processor = None
        self._backend.no_truncation()
        self._backend.no_padding()
        added = tokenizer.added_tokens_decoder.values()
        names = {token.content for token in added if token.special}
        names |= {token.content for token in added if token.content in (tokenizer.bos_token, tokenizer.eos_token)}
        self._names = sorted(names, key=len, reverse=True)
        self.ids = frozenset(tokenizer.convert_tokens_to_ids(self._names))
        # With no special token at all, a pattern that is nowhere.
        self._pattern = re.compile("|".join(map(re.escape, self._names)) or r"(?!)")
        self._twin = functools.lru_cache(maxsize=4)(self._make_twin)

    def search(self, text: str) -> re.Match | None:
        """The first special token in what a template wrote."""
        return self._pattern.search(text)

    def mark_for(self, values: Iterable) -> str:
        """The mark for these messages: "" where nothing in them looks like a special token."""
        text = "\n".join(itertools.chain.from_iterable(map(_texts, values)))
        if not self._pattern.search(text):
            return ""
        return next(mark for mark in map(chr, itertools.count(0xF0000)) if mark not in text)

    def hide(self, value, mark: str):
        """The value with such text hidden in it, however deep."""
        if not mark:
            return value
        if isinstance(value, str):
            return self._pattern.sub(lambda found: self._marked(found[0], mark), value)
        if isinstance(value, dict):
            return {key: self.hide(inner, mark) for key, inner in value.items()}
        return [self.hide(inner, mark) for inner in value] if isinstance(value, list) else value

    def reveal(self, text: str, mark: str) -> str:
        if not mark:
            return text
        return re.sub(
            f"{mark}([0-9]+){mark}|{self._pattern.pattern}",
            lambda found: self._names[int(found[1])] if found[1] else self._marked(found[0], mark),
            text,
        )

    def common_prefix(self, one: str, other: str, mark: str) -> str:
        """What two revealed texts begin with, in whole special tokens."""
        special = f"{mark}[0-9]+{mark}" if mark else self._pattern.pattern
        pieces = (re.split(f"({special})", text) for text in (one, other))
        same = ""
        for i, (a, b) in enumerate(zip(*pieces, strict=False)):
            if a != b:
                return same if i % 2 else same + os.path.commonprefix([a, b])  # noqa: RUF071
            same += a
        return same

    def encode(self, texts: Sequence[str], marks: Sequence[str]) -> list[Encoding]:
        """The encodings of revealed texts, each under its mark, without what a tokenizer adds around a text."""
        encodings = [None] * len(texts)
        for mark in set(marks):
            here = [i for i, other in enumerate(marks) if other == mark]
            found = self._twin(mark).encode_batch([texts[i] for i in here], add_special_tokens=False)
            for i, encoding in zip(here, found, strict=True):
                encodings[i] = encoding
        return encodings

    def _marked(self, name: str, mark: str) -> str:
        return f"{mark}{self._names.index(name)}{mark}"

    def _make_twin(self, mark: str) -> Tokenizer:
        if not mark:
            return self._backend
        spelling = {name: self._marked(name, mark) for name in self._names}
        spec = json.loads(self._backend.to_str())
        for token in spec["added_tokens"]:
            token["content"] = spelling.get(token["content"], token["content"])
        model = spec["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {spelling.get(token, token): i for token, i in model["vocab"].items()}
        else:  # Unigram's pairs of piece and score
            model["vocab"] = [[spelling.get(piece, piece), score] for piece, score in model["vocab"]]
        if "merges" in model:  # BPE: none may lead to a spelling that is no longer in the vocabulary
            model["merges"] = [merge for merge in model["merges"] if "".join(merge) not in spelling]
        if model.get("unk_token") in spelling:
            model["unk_token"] = spelling[model["unk_token"]]
        return Tokenizer.from_str(json.dumps(spec))


def _texts(value) -> Iterator[str]:
    """Every text in a value, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)
