"""The token store: every row tokenized once, kept as ArrayRecord by a TFDS builder, read back by random access."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import filelock
import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from repo_jax.data.chat import PairTokenizer, Tokenized, TokenOptions
from repo_jax.data.schema import DamagedStoreError, Fault, PairTokens, PreferenceExample, read_examples
from repo_jax.data.sources import Source

FORMAT = "2.0.0"  # raise it when what is stored changes
NAMED = 5  # how many rows of each kind are kept by id
WARN = 0.01  # the share of rows above which what is counted is also warned about
CHUNK = 256  # rows that are tokenized together

# What can become of a row, and what to call it.
DROPPED = {
    "bad_row":                   "rows that cannot be read",
    "prompt_mismatch":           "pairs whose two answers do not follow one prompt",
    "template_mismatch":         "pairs whose prompt the chat template writes differently once an answer follows",
    "empty":                     "pairs with an empty answer or an empty prompt",
    "identical":                 "pairs whose answers are the same",
    "identical_after_truncation": "pairs whose answers are the same once they are cut",
    "over_long":                 "pairs over max_length or max_prompt_length",
}  # fmt: skip
NOTICED = {
    "truncated":    "pairs that were cut to max_length or max_prompt_length",
    "missing_eos":  "pairs with an answer that no end token follows",
    "special_text": "conversations that hold text like a special token, which is encoded as text",
    "identical":    "pairs whose answers are the same, kept as the official code does",
}  # fmt: skip


class TokenStore(Sequence):
    """The pairs of one data set as ids, in its order; knows every length without reading the ids."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        for name in ("dataset_info.json", "features.json", "metadata.json"):
            with _naming(folder, folder / name):
                metadata = json.loads((folder / name).read_bytes())
        with _naming(folder, folder):
            builder = tfds.builder_from_directory(folder)
            self._source = builder.as_data_source("pairs")
            self._shards = builder.info.splits["pairs"].filepaths
            self._shard_ends = np.cumsum(builder.info.splits["pairs"].shard_lengths)
        # What is done to every pair that is read (repo_jax.data.weights).
        self.transform: Callable[[PairTokens], PairTokens] | None = None
        with _naming(folder, folder / "metadata.json"):
            self._take(metadata)
        for i in {0, len(self) - 1}:  # a file that was cut short is found out now rather than in the middle of a run
            self._read(i)

    def _take(self, metadata: dict) -> None:
        self.name: str = metadata["name"]
        self.key: str = metadata["key"]  # of data + tokens
        self.tokens: dict = metadata["tokens"]  # tokenizer, template and options, as `described`
        self.schema: str = metadata["schema"]
        self.unpaired: bool = metadata["unpaired"]
        self.lengths = np.asarray(metadata["lengths"], np.int64).reshape(-1, 3)  # prompt, chosen, rejected
        self.scored = np.asarray(metadata["scored"], np.int64).reshape(-1, 2)  # chosen, rejected
        # Optional columns of the data, one number per pair, nan where a row has none.
        self.columns = {name: np.asarray(values, np.float64) for name, values in metadata["columns"].items()}
        self.rows: int = metadata["rows"]  # of the data set, dropped ones included
        self.first_bad: str | None = metadata["first_bad"]  # what to say of the first row that could not be read
        self.dropped: dict[str, int] = metadata["dropped"]  # reason -> rows
        self.noticed: dict[str, int] = metadata["noticed"]
        self.named: dict[str, list[str]] = metadata["named"]  # reason -> ids of the first few

    @property
    def slots(self) -> np.ndarray:
        return self.lengths.sum(axis=1)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> PairTokens:
        row = self._read(i)
        tokens = (row[name] for name in ("prompt", "chosen", "rejected", "chosen_mask", "rejected_mask"))
        pair = PairTokens(row["id"].decode(), row["where"].decode(), *tokens)
        return pair if self.transform is None else self.transform(pair)

    def counts(self) -> list[str]:
        """count_lines of what was dropped and of what was kept but noticed."""
        return count_lines(self.rows, self.dropped, self.named, DROPPED, "dropped") + count_lines(
            self.rows, self.noticed, self.named, NOTICED, "kept"
        )

    def source_row(self, i: int) -> dict:
        """The row that pair i was made of."""
        return json.loads(self._read(i)["row"])

    def _read(self, i: int) -> dict:
        if not 0 <= i < len(self):
            raise IndexError(f"pair {i} of {len(self)}")
        with _naming(self.folder, self._shards[int(np.searchsorted(self._shard_ends, i, side="right"))]):
            return self._source[int(i)]


def count_lines(rows: int, counts: dict[str, int], named: dict[str, list[str]], words: dict[str, str], done: str):
    """A line for every reason, with the first ids; above a share of WARN it is a warning."""
    return [
        f"{'warning: ' if n > WARN * rows else ''}{n} of {rows} rows {done} ({n / rows:.1%}), {words[reason]}: "
        + ", ".join(named[reason])
        + (", ..." if n > len(named[reason]) else "")
        for reason, n in counts.items()
    ]


@contextlib.contextmanager
def _naming(folder: pathlib.Path, file: pathlib.Path):
    """Whatever goes wrong in reading a store's file is said of that file."""
    try:
        yield
    except Exception as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedStoreError(
            f"'{file}' is damaged ({cause}); remove the folder '{folder}' and prepare it anew"
        ) from error


class NothingLeftError(ValueError):
    """No row of a data set can be used; tells what became of them all."""

    def __init__(self, message: str, *, rows: int, dropped: dict[str, int], named: dict[str, list[str]]):
        super().__init__(message)
        self.rows, self.dropped, self.named = rows, dropped, named


class _LocalInfo(tfds.core.DatasetInfo):
    def initialize_from_bucket(self) -> None:
        """Does not ask TFDS's public bucket whether it knows this data set: it is the user's own."""


class PreferenceTokens(tfds.core.GeneratorBasedBuilder):
    """TFDS writes into a temporary folder and renames it at the end, so a store is whole or not there."""

    VERSION = tfds.core.Version(FORMAT)

    def __init__(self, *, build: "Build", about: dict, **kwargs):
        self._build, self._metadata = build, tfds.core.MetadataDict(about)
        super().__init__(file_format="array_record", **kwargs)

    def _info(self):
        text = tfds.features.Text()
        ids, mask = (
            tfds.features.Tensor(shape=(None,), dtype=dtype, encoding="bytes") for dtype in (np.int32, np.bool_)
        )
        features = {"id": text, "where": text, "row": text, "prompt": ids, "chosen": ids, "rejected": ids}
        features |= {"chosen_mask": mask, "rejected_mask": mask}
        return _LocalInfo(
            builder=self, disable_shuffling=True, metadata=self._metadata, features=tfds.features.FeaturesDict(features)
        )

    def _split_generators(self, dl_manager):
        return {"pairs": self._generate_examples()}

    def _generate_examples(self):
        fields = [name for name in self.info.features if name != "row"]
        for number, (example, pair) in enumerate(self._build.pairs()):
            row = json.dumps(example.row, ensure_ascii=False, default=str)
            yield number, {name: getattr(pair, name) for name in fields} | {"row": row}
        self._metadata.update(self._build.metadata())


class Build:
    """Tokenizes the rows of a source, and counts what becomes of each."""

    def __init__(self, source: Source, tokenizer, options: TokenOptions, *, schema: str, on_bad_rows: str):
        self._source, self._options, self._schema, self._on_bad_rows = source, options, schema, on_bad_rows
        self._tokenize = PairTokenizer(tokenizer, options)
        self._dropped, self._noticed = collections.defaultdict(list), collections.defaultdict(list)  # reason -> ids
        self._rows, self._schemas, self._unpaired, self._first_bad = 0, {}, set(), None
        self._lengths, self._scored, self._columns = [], [], []

    def pairs(self) -> Iterator[tuple[PreferenceExample, PairTokens]]:
        """What is kept, in order. Raises ValueError for a row that cannot be read, unless those are skipped."""
        for row, result in self._results():
            self._rows += 1
            if result.dropped == "bad_row":
                if self._on_bad_rows == "error":
                    raise ValueError(result.message)
                self._first_bad = self._first_bad or result.message
            if result.dropped is not None:
                self._dropped[result.dropped].append(row.id)
                continue
            for notice in result.noticed:
                self._noticed[notice].append(row.id)
            self._schemas[f"{row.schema}, {'messages' if row.conversational else 'texts'}"] = None
            self._unpaired.add(None in row.answers)
            self._lengths.append(list(result.pair.lengths))
            self._scored.append([int(mask.sum()) for mask in result.pair.masks])
            self._columns.append(row.columns)
            yield row, result.pair
        if not self._lengths:
            words = ", ".join(f"{len(ids)} {DROPPED[reason]}" for reason, ids in self._dropped.items())
            raise NothingLeftError(
                f"no pair of {self._source.name} can be used ({words or 'it has no rows'}; max_length={self._options.max_length})",
                **{name: self.metadata()[name] for name in ("rows", "dropped", "named")},
            )
        if len(self._unpaired) > 1:
            raise ValueError(
                f"{self._source.name} mixes pairs with unpaired rows (prompt, completion, label); keep them in separate data sets"
            )

    def _results(self) -> Iterator[tuple[PreferenceExample | Fault, Tokenized]]:
        """Every row with what became of it; the next chunk is tokenized while one is used."""
        name = pathlib.PurePath(self._source.name).name
        rows = read_examples(self._source.rows(), schema=self._schema)
        rows = iter(tqdm(rows, desc=f"tokenizing {name}", unit=" rows", total=len(self._source), disable=None))
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            ahead = None
            while chunk := list(itertools.islice(rows, CHUNK)):
                examples = [row for row in chunk if isinstance(row, PreferenceExample)]
                chunk, ahead = ahead, (chunk, pool.submit(self._tokenize, examples))
                yield from _in_order(chunk)
            yield from _in_order(ahead)

    def metadata(self) -> dict:
        names = sorted({name for columns in self._columns for name in columns})
        named = self._noticed | self._dropped
        return {
            "schema": " + ".join(self._schemas),
            "unpaired": self._unpaired == {True},
            "rows": self._rows,
            "first_bad": self._first_bad,
            "lengths": self._lengths,
            "scored": self._scored,
            "columns": {name: [columns.get(name) for columns in self._columns] for name in names},
            "dropped": {reason: len(ids) for reason, ids in self._dropped.items()},
            "noticed": {reason: len(ids) for reason, ids in self._noticed.items()},
            "named": {reason: ids[:NAMED] for reason, ids in named.items()},
        }


def _in_order(tokenized: tuple[list, concurrent.futures.Future] | None):
    if tokenized is None:
        return
    rows, results = tokenized[0], iter(tokenized[1].result())
    for row in rows:
        yield row, Tokenized(None, row.reason, (), row.message) if isinstance(row, Fault) else next(results)


def open_store(
    source: Source,
    tokenizer,
    options: TokenOptions,
    *,
    cache_dir: str,
    schema: str = "auto",
    on_bad_rows: Literal["error", "skip"] = "error",
) -> TokenStore:
    """The tokens of a data set, prepared on first use and found again by data + tokenizer + template + options.

    Raises ValueError for a row that cannot be read (unless on_bad_rows is skip), and when nothing is left; DamagedStoreError for a
    store that cannot be read back.
    """
    tokens = described(tokenizer, options)
    key = _digest(source.digest(), tokens, schema)
    place = pathlib.Path(cache_dir) / key
    folder = place / "preference_tokens" / FORMAT
    place.mkdir(parents=True, exist_ok=True)
    # One process prepares and the others wait; a process that was killed holds no lock any more.
    with filelock.FileLock(place / "lock"):
        if not folder.exists():
            for rest in folder.parent.glob("incomplete*"):
                shutil.rmtree(rest)
            build = Build(source, tokenizer, options, schema=schema, on_bad_rows=on_bad_rows)
            _write(
                PreferenceTokens(build=build, about={"name": source.name, "key": key, "tokens": tokens}, data_dir=place)
            )
    store = TokenStore(folder)
    if store.key != key:
        raise DamagedStoreError(
            f"'{folder}' holds other tokens than its place says (key {store.key}, wanted {key}); remove the folder '{place}'"
        )
    if on_bad_rows == "error" and store.first_bad:
        raise ValueError(store.first_bad)
    return store


def is_prepared(folder: pathlib.Path) -> bool:
    """Whether a folder is a store itself, as `repo-jax prepare` names it."""
    return (folder / "features.json").is_file() and any(folder.glob("*.array_record*"))


def open_prepared(folder: pathlib.Path, tokenizer, options: TokenOptions) -> TokenStore:
    """A store by its folder, without the data it was made of. Raises ValueError if it was made by other rules than these."""
    store, wanted = TokenStore(folder), described(tokenizer, options)
    other = [name for name in wanted if store.tokens.get(name) != wanted[name]]
    if other:
        was, now = (", ".join(f"{name}={tokens.get(name)!r}" for name in other) for tokens in (store.tokens, wanted))
        raise ValueError(f"'{folder}' was prepared with {was} but the recipe has {now}; prepare it anew")
    return store


def described(tokenizer, options: TokenOptions) -> dict:
    """Everything besides the data that decides about the ids; long texts by their digest."""
    return {
        "tokenizer": _digest(tokenizer.backend_tokenizer.to_str()),
        "chat_template": _digest(tokenizer.chat_template),
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
    } | dataclasses.asdict(options)


def _digest(*parts) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _write(builder: PreferenceTokens) -> None:
    tfds.disable_progress_bar()  # it would count what ours counts
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # TFDS prints announcements
        builder.download_and_prepare()
