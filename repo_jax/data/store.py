"""The token store: every pair tokenized once, kept as ArrayRecord by a TFDS builder, read back by random access."""

import collections
import contextlib
import hashlib
import os
import pathlib
from collections.abc import Sequence

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from repo_jax.data.chat import tokenize_pair
from repo_jax.data.schema import PairTokens, PreferenceExample, read_preferences

FORMAT = "1.0.0"  # raise it when what is stored changes
NAMED = 5  # how many dropped rows of each kind are kept by id


class TokenStore(Sequence):
    """The pairs of one file as ids, in file order; knows every length without reading the ids."""

    def __init__(self, path: pathlib.Path, source, metadata: dict, key: str):
        self._path, self._source = path, source
        self.key = key  # of data + tokenizer + options
        self.lengths = np.asarray(metadata["lengths"], np.int64).reshape(-1, 3)  # prompt, chosen, rejected
        self.scored = np.asarray(metadata["scored"], np.int64)
        self.dropped: dict[str, int] = metadata["dropped"]  # reason -> rows
        self.dropped_ids: dict[str, list[str]] = metadata["dropped_ids"]  # reason -> the first few

    @property
    def slots(self) -> np.ndarray:
        return self.lengths.sum(axis=1)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> PairTokens:
        if not 0 <= i < len(self):
            raise IndexError(f"pair {i} of {len(self)}")
        row = self._source[int(i)]
        arrays = (row[name].astype(np.int32) for name in ("prompt", "chosen", "rejected"))
        return PairTokens(
            row["id"].decode(),
            f"{self._path} {row['where'].decode()}",
            *arrays,
            tuple(int(skip) for skip in row["skips"]),
        )


class _LocalInfo(tfds.core.DatasetInfo):
    def initialize_from_bucket(self) -> None:
        """Does not ask TFDS's public bucket whether it knows this data set: it is the user's own."""


class _PreferenceTokens(tfds.core.GeneratorBasedBuilder):
    """TFDS writes into a temporary folder and renames it at the end, so a store is whole or not there."""

    VERSION = tfds.core.Version(FORMAT)

    def __init__(self, *, path: pathlib.Path, tokenizer, max_length: int, **kwargs):
        self._path, self._tokenizer, self._max_length = path, tokenizer, max_length
        self._metadata = tfds.core.MetadataDict()
        super().__init__(**kwargs)

    def _info(self):
        text, ids = tfds.features.Text(), tfds.features.Tensor(shape=(None,), dtype=np.int32)
        features = {"id": text, "where": text, "prompt": ids, "chosen": ids, "rejected": ids}
        features["skips"] = tfds.features.Tensor(shape=(2,), dtype=np.int32)
        return _LocalInfo(
            builder=self, disable_shuffling=True, metadata=self._metadata, features=tfds.features.FeaturesDict(features)
        )

    def _split_generators(self, dl_manager):
        return {"pairs": self._generate_examples()}

    def _generate_examples(self):
        dropped = collections.defaultdict(list)
        lengths, scored = [], []
        progress = tqdm(read_preferences(self._path), desc=f"tokenizing {self._path.name}", unit=" pairs", disable=None)
        for example in progress:
            pair = tokenize_pair(self._tokenizer, example)
            reason = why_dropped(example, pair, self._max_length)
            if reason is not None:
                dropped[reason].append(pair.id)
                continue
            # The file may be found elsewhere next time: its place is added when a row is read.
            line = pair.where.removeprefix(f"{self._path} ")
            yield len(lengths), pair._replace(where=line, skips=np.asarray(pair.skips, np.int32))._asdict()
            lengths.append(list(pair.lengths))
            scored.append(pair.scored)
        if not lengths:
            reasons = ", ".join(f"{len(ids)} {reason}" for reason, ids in dropped.items()) or "the file has no rows"
            raise ValueError(f"no pair of {self._path} can be used ({reasons} at max_length={self._max_length})")
        self._metadata["lengths"], self._metadata["scored"] = lengths, scored
        self._metadata["dropped"] = {reason: len(ids) for reason, ids in dropped.items()}
        self._metadata["dropped_ids"] = {reason: ids[:NAMED] for reason, ids in dropped.items()}


def why_dropped(example: PreferenceExample, pair: PairTokens, max_length: int) -> str | None:
    """None for a pair that can be trained on; else empty, identical or over_long."""
    answers = [
        answer if isinstance(answer, str) else answer[-1]["content"] for answer in (example.chosen, example.rejected)
    ]
    if any(not answer.strip() for answer in answers) or len(pair.prompt) == 0:
        return "empty"
    if example.chosen == example.rejected or np.array_equal(pair.chosen, pair.rejected):
        return "identical"
    if len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) > max_length:
        return "over_long"
    return None


def open_store(path: pathlib.Path, tokenizer, *, max_length: int, cache_dir: str) -> TokenStore:
    """The tokens of a preference file, prepared on first use and found again by data + tokenizer + options.

    Pairs whose prompt and longer answer exceed max_length tokens are dropped, as are empty and identical answers; the
    store counts them. Raises ValueError for a bad line, and when nothing is left.
    """
    key = _key(path, tokenizer, max_length)
    tfds.disable_progress_bar()
    folder = pathlib.Path(cache_dir) / key

    def make_builder():
        options = {"data_dir": folder, "file_format": "array_record"}
        return _PreferenceTokens(path=path, tokenizer=tokenizer, max_length=max_length, **options)

    builder = make_builder()
    if not builder.data_path.exists():
        try:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # TFDS prints announcements
                builder.download_and_prepare()
        except FileExistsError:
            if not builder.data_path.exists():
                raise
            builder = make_builder()  # another process was first: what it wrote is the same
    return TokenStore(path, builder.as_data_source("pairs"), builder.info.metadata, key)


def _key(path: pathlib.Path, tokenizer, max_length: int) -> str:
    digest = hashlib.sha256()
    for part in (
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.chat_template,
        tokenizer.bos_token,
        tokenizer.eos_token,
        max_length,
    ):
        digest.update(repr(part).encode())
    with open(path, "rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:24]
