"""The token store: every row tokenized once, kept as ArrayRecord by a TFDS builder, read back by random access."""

import abc
import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, Self

import filelock
import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from repo_jax.data.chat import PairTokenizer, Tokenized, TokenOptions
from repo_jax.data.schema import DamagedStoreError, Fault, PairTokens, PreferenceExample, read_examples
from repo_jax.data.sources import Source

FORMAT = "2.1.0"  # raise it when what is stored changes
NAMED = 5  # how many rows of each kind are kept by id
WARN = 0.01  # the share of rows above which what is counted is also warned about
CHUNK = 256  # rows that are tokenized together

# What can become of a row, and what to call it.
DROPPED = {
    "bad_row":                   "rows that cannot be read",
    "template_refused":          "conversations that the chat template refuses to write",
    "prompt_mismatch":           "pairs whose two answers do not follow one prompt",
    "template_mismatch":         "conversations whose beginning the chat template writes differently once an answer follows",
    "empty":                     "pairs with an empty answer or an empty prompt",
    "identical":                 "pairs whose answers are the same",
    "identical_after_truncation": "pairs whose answers are the same once they are cut",
    "over_long":                 "pairs over max_length or max_prompt_length",
}  # fmt: skip
BAD = ("bad_row", "template_refused")  # what stops a preparation, unless such rows are skipped
NOTICED = {
    "truncated":    "pairs that were cut to max_length or max_prompt_length",
    "missing_eos":  "pairs with an answer that no end token follows",
    "special_text": "conversations that hold text like a special token, which is encoded as text",
    "special_tokens": "rows that hold text like a special token, which is encoded as that token",
    "identical":    "pairs whose answers are the same, kept as the official code does",
}  # fmt: skip


class Pairs(Sequence):
    """Pairs by number, with what a loss asks for beside their ids: columns, log-probs under the reference model, further sequences."""

    key: str  # of data + tokens
    compared = True  # with a reference model, by losses that have one
    columns: Mapping[str, np.ndarray] = {}
    _asked: tuple[str, ...] = ()
    _reference: Callable[[int, PairTokens], np.ndarray] | None = None
    _groups: Mapping[str, Sequence[PairTokens]] = {}

    def serving(self, *, columns=None, reference=None, groups=None) -> Self:
        """The same pairs with these columns, these log-probs (of pair i: reference(i, pair), [2]) and these groups of the same length."""
        other = copy.copy(self)
        given = {"_asked": columns, "_reference": reference, "_groups": groups}
        other.__dict__.update({name: value for name, value in given.items() if value is not None})
        return other

    @property
    def groups(self) -> Mapping[str, Sequence[PairTokens]]:
        return self._groups

    def __getitem__(self, i: int) -> PairTokens:
        pair = self.plain(i)
        return pair._replace(
            columns={name: self._column(name, i) for name in self._asked},
            reference_2=None if self._reference is None else self._reference(i, pair),
            groups={name: pairs[i] for name, pairs in self._groups.items()},
        )

    def _column(self, name: str, i: int) -> float | tuple[float, float]:
        """Of pair i; one number for each answer where the data have NAME_chosen and NAME_rejected, 0 for an answer that is not there."""
        if name in self.columns:
            return float(self.columns[name][i])
        sides = (self.columns.get(f"{name}_{side}") for side in ("chosen", "rejected"))
        return tuple(0.0 if values is None or np.isnan(values[i]) else float(values[i]) for values in sides)

    @abc.abstractmethod
    def plain(self, i: int) -> PairTokens:
        """Pair i without any of that."""


class TokenStore(Pairs):
    """The pairs of one data set as ids, in its order; knows every length without reading the ids."""

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        source: Source | None = None,
        transform: Callable[[PairTokens], PairTokens] | None = None,
    ):
        """source: where the data lies now, if it is known; transform: what is done to every pair that is read
        (repo_jax.data.weights)."""
        self.folder, self._transform = folder, transform
        for name in ("dataset_info.json", "features.json", "metadata.json"):
            with _naming(folder, folder / name):
                metadata = json.loads((folder / name).read_bytes())
        with _naming(folder, folder):
            builder = tfds.builder_from_directory(folder)
            self._source = builder.as_data_source("pairs")
            self._shards = builder.info.splits["pairs"].filepaths
            self._shard_ends = np.cumsum(builder.info.splits["pairs"].shard_lengths)
        with _naming(folder, folder / "metadata.json"):
            self._take(metadata, source)
        for i in {0, len(self) - 1}:  # a file that was cut short is found out now rather than in the middle of a run
            self._read(i)

    def _take(self, metadata: dict, source: Source | None) -> None:
        self.name: str = metadata["name"] if source is None else source.name
        self._places: list[str] = metadata["places"] if source is None else source.places
        self.key: str = metadata["key"]  # of data + tokens
        self.tokens: dict = metadata["tokens"]  # tokenizer, template and options, as `described`
        self.schemas: list[str] = metadata["schemas"]  # those of its parts, as in SCHEMAS
        self.schema: str = metadata["schema"]  # for people
        self.unpaired: bool = metadata["unpaired"]
        self.lengths = np.asarray(metadata["lengths"], np.int64).reshape(-1, 3)  # prompt, chosen, rejected
        self.scored = np.asarray(metadata["scored"], np.int64).reshape(-1, 2)  # chosen, rejected
        # Optional columns of the data, one number per pair, nan where a row has none.
        self.columns = {name: np.asarray(values, np.float64) for name, values in metadata["columns"].items()}
        self.rows: int = metadata["rows"]  # of the data set, dropped ones included
        # What to say of the first row that was dropped for this reason, where there is more to say than its id.
        self.first = {reason: _placed(message, self._places) for reason, message in metadata["first"].items()}
        self.dropped: dict[str, int] = metadata["dropped"]  # reason -> rows
        self.noticed: dict[str, int] = metadata["noticed"]
        self.named: dict[str, list[str]] = metadata["named"]  # reason -> ids of the first few

    @property
    def slots(self) -> np.ndarray:
        return self.lengths.sum(axis=1)

    def __len__(self) -> int:
        return len(self.lengths)

    def plain(self, i: int) -> PairTokens:
        row = self._read(i)
        tokens = (row[name] for name in ("prompt", "chosen", "rejected", "chosen_mask", "rejected_mask"))
        pair = PairTokens(row["id"].decode(), _placed(row["where"].decode(), self._places), *tokens)
        return self.weighted(pair)

    def weighted(self, pair: PairTokens) -> PairTokens:
        """The pair with what single tokens of it count for."""
        return pair if self._transform is None else self._transform(pair)

    def counts(self) -> list[str]:
        """count_lines of what was dropped and of what was kept but noticed."""
        dropped = count_lines(self.rows, self.dropped, self.named, DROPPED, "dropped", self.first)
        return dropped + count_lines(self.rows, self.noticed, self.named, NOTICED, "kept", {})

    def source_row(self, i: int) -> tuple[str, dict]:
        """The id of pair i, and the row it was made of."""
        row = self._read(i)
        return row["id"].decode(), json.loads(row["row"])

    def _read(self, i: int) -> dict:
        if not 0 <= i < len(self):
            raise IndexError(f"pair {i} of {len(self)}")
        with _naming(self.folder, self._shards[int(np.searchsorted(self._shard_ends, i, side="right"))]):
            return self._source[int(i)]


def count_lines(
    rows: int,
    counts: dict[str, int],
    named: dict[str, list[str]],
    words: dict[str, str],
    done: str,
    first: dict[str, str],
) -> list[str]:
    """A line for every reason, with the first ids; above a share of WARN it is a warning."""
    return [
        f"{'warning: ' if n > WARN * rows else ''}{n} of {rows} rows {done} ({n / rows:.1%}), {words[reason]}: "
        + ", ".join(named[reason])
        + (", ..." if n > len(named[reason]) else "")
        + (f" ({first[reason]})" if reason in first else "")
        for reason, n in counts.items()
    ]


def _unplaced(text: str, places: Sequence[str]) -> str:
    """A text that begins with where a piece of the data lies, with the piece's number instead: the data may move."""
    found = (f"{k}{text[len(place) :]}" for k, place in enumerate(places) if text.startswith(place + " "))
    return next(found, text)


def _placed(text: str, places: Sequence[str]) -> str:
    """The inverse of _unplaced."""
    number = re.match(r"[0-9]+(?= )", text)
    return places[int(number[0])] + text[number.end() :] if number else text


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

    def __init__(self, name: str, rows: int, counts: list[str], dropped: dict[str, int]):
        words = "; ".join(line.removeprefix("warning: ") for line in counts)
        super().__init__(f"no pair of {name} can be used ({words or 'it has no rows'})")
        self.name, self.rows, self.counts, self.dropped = name, rows, counts, dropped


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
            row = {"row": json.dumps(example.row, ensure_ascii=False, default=str)}
            row["where"] = _unplaced(pair.where, self._metadata["places"])
            yield number, {name: getattr(pair, name) for name in fields} | row
        self._metadata.update(self._build.metadata())


class Build:
    """Tokenizes the rows of a source, and counts what becomes of each."""

    def __init__(self, source: Source, tokenizer, options: TokenOptions, *, schema: str, on_bad_rows: str):
        self._source, self._options, self._schema, self._on_bad_rows = source, options, schema, on_bad_rows
        self._tokenize = PairTokenizer(tokenizer, options)
        self._dropped, self._noticed = collections.defaultdict(list), collections.defaultdict(list)  # reason -> ids
        self._rows, self._schemas, self._unpaired, self._first = 0, {}, set(), {}
        self._lengths, self._scored, self._columns = [], [], []

    def pairs(self) -> Iterator[tuple[PreferenceExample, PairTokens]]:
        """What is kept, in order. Raises ValueError for a row that cannot be read, unless those are skipped."""
        for row, result in self._results():
            self._rows += 1
            if result.dropped is not None:
                if result.dropped in BAD and self._on_bad_rows == "error":
                    raise ValueError(result.message)
                if result.message:
                    self._first.setdefault(result.dropped, result.message)
                self._dropped[result.dropped].append(row.id)
                continue
            for notice in result.noticed:
                self._noticed[notice].append(row.id)
            self._schemas[row.schema, "messages" if row.conversational else "texts"] = None
            self._unpaired.add(None in row.answers)
            self._lengths.append(list(result.pair.lengths))
            self._scored.append([int(mask.sum()) for mask in result.pair.masks])
            self._columns.append(row.columns)
            yield row, result.pair
        if not self._lengths:
            dropped, named = self.metadata()["dropped"], self.metadata()["named"]
            counts = count_lines(self._rows, dropped, named, DROPPED, "dropped", self._first)
            raise NothingLeftError(self._source.name, self._rows, counts, dropped)
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
            waiting = None
            while chunk := list(itertools.islice(rows, CHUNK)):
                examples = [row for row in chunk if isinstance(row, PreferenceExample)]
                begun = chunk, pool.submit(self._tokenize, examples)
                if waiting is not None:
                    yield from _in_order(*waiting)
                waiting = begun
            if waiting is not None:
                yield from _in_order(*waiting)

    def metadata(self) -> dict:
        names = sorted({name for columns in self._columns for name in columns})
        named = self._noticed | self._dropped
        return {
            "schema": " + ".join(f"{schema}, {kind}" for schema, kind in self._schemas),
            "schemas": list(dict.fromkeys(schema for schema, _ in self._schemas)),
            "unpaired": self._unpaired == {True},
            "rows": self._rows,
            "first": {reason: _unplaced(message, self._source.places) for reason, message in self._first.items()},
            "lengths": self._lengths,
            "scored": self._scored,
            "columns": {name: [columns.get(name) for columns in self._columns] for name in names},
            "dropped": {reason: len(ids) for reason, ids in self._dropped.items()},
            "noticed": {reason: len(ids) for reason, ids in self._noticed.items()},
            "named": {reason: ids[:NAMED] for reason, ids in named.items()},
        }


def _in_order(chunk: list, tokenized: concurrent.futures.Future):
    results = iter(tokenized.result())
    for row in chunk:
        yield row, Tokenized(None, row.reason, (), row.message) if isinstance(row, Fault) else next(results)


def open_store(
    source: Source,
    tokenizer,
    options: TokenOptions,
    *,
    cache_dir: str,
    schema: str = "auto",
    on_bad_rows: Literal["error", "skip"] = "error",
    transform: Callable[[PairTokens], PairTokens] | None = None,
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
            about = {"name": source.name, "places": source.places, "key": key, "tokens": tokens}
            _write(PreferenceTokens(build=build, about=about, data_dir=place))
            shutil.rmtree(place / "downloads", ignore_errors=True)  # TFDS's, empty
    store = TokenStore(folder, source=source, transform=transform)
    if store.key != key:
        raise DamagedStoreError(
            f"'{folder}' holds other tokens than its place says (key {store.key}, wanted {key}); remove the folder '{place}'"
        )
    bad = [reason for reason in BAD if reason in store.dropped]
    if bad and on_bad_rows == "error":
        raise ValueError(store.first[bad[0]])
    return store


def is_prepared(folder: pathlib.Path) -> bool:
    """Whether a folder is a store itself, as `repo-jax prepare` names it."""
    return (folder / "features.json").is_file() and any(folder.glob("*.array_record*"))


def open_prepared(folder: pathlib.Path, tokenizer, options: TokenOptions, *, transform=None) -> TokenStore:
    """A store by its folder, without the data it was made of. Raises ValueError if it was made by other rules than these."""
    store, wanted = TokenStore(folder, transform=transform), described(tokenizer, options)
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
