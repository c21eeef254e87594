"""Where rows come from: files, folders, the Hugging Face Hub and mixtures of them, with one split syntax for all.

Rows are streamed and handed on as they are. `datasets` and `pyarrow` are imported where they are needed, so that JSONL
stays light.
"""

import codecs
import contextlib
import dataclasses
import gzip
import hashlib
import itertools
import json
import os
import pathlib
import re
import sys
import textwrap
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

TABLE_ROWS = 1000  # so many rows of a table are Python values at one time


class RawRow(NamedTuple):
    """One row as its file has it."""

    part: str  # the data set it comes from, as named by the user
    where: str  # "PATH line 3" (JSONL) or "PATH row 3" (tables); for messages
    id: str  # "pairs.jsonl:3"; what a row without an id of its own is called
    content: bytes | dict  # a row of JSON as bytes, neither decoded nor parsed; or the columns of a table


_Numbered = tuple[str, int, bytes | dict]  # "line" or "row", its number from 1, its content


class _Part(NamedTuple):
    """A whole file, or a whole split of a data set."""

    name: str  # for people
    label: str  # what its rows are called
    count: int
    rows: Callable[[], Iterator[_Numbered]]
    digest: Callable[[], str]


class _Piece(NamedTuple):
    dataset: str  # as named by the user
    part: _Part
    taken: range  # of the part's rows


@dataclasses.dataclass(frozen=True)
class Source:
    """The rows of one split of a data set, or of a mixture, in order."""

    name: str  # for people
    pieces: tuple[_Piece, ...]

    @property
    def places(self) -> list[str]:
        """Where its pieces lie: what RawRow.where begins with."""
        return [piece.part.name for piece in self.pieces]

    def rows(self) -> Iterator[RawRow]:
        for dataset, part, taken in self.pieces:
            for unit, number, content in itertools.islice(part.rows(), taken.start, taken.stop):
                yield RawRow(dataset, f"{part.name} {unit} {number}", f"{part.label}:{number}", content)

    def digest(self) -> str:
        """Of the content and of which rows are taken, not of the place: a moved file has the same digest."""
        pieces = (f"{part.digest()} {taken.start}:{taken.stop}\n" for _, part, taken in self.pieces)
        return hashlib.sha256("".join(pieces).encode()).hexdigest()

    def __len__(self) -> int:
        return sum(len(piece.taken) for piece in self.pieces)


def open_source(dataset: str | Mapping[str, float], split: str, *, config: str | None = None) -> Source:
    """A file, a folder, a name on the Hub, or {any of these: which share of its rows to take, from the first on}.

    `split` is a name with or without a slice, or a sum: train, train[:1000], train[10%:20%], train+test[-500:]. Of a lone
    file only the slice matters. `config` chooses among the configurations of a data set on the Hub, or laid out as there.
    Raises ValueError or FileNotFoundError with one line that says what to change.
    """
    terms = _parse_split(split)
    if not isinstance(dataset, Mapping):
        return _open_one(os.fspath(dataset), terms, config)
    if not dataset:
        raise ValueError("the mixture names no data set; give {data set: fraction}, such as {pairs.jsonl: 1.0}")
    for name, fraction in dataset.items():
        if not 0 < fraction <= 1:
            raise ValueError(f"'{name}' has fraction {fraction}; give a share of its rows above 0 and at most 1")
    heads = [_head(_open_one(name, terms, config), fraction) for name, fraction in dataset.items()]
    return Source(" + ".join(head.name for head in heads), tuple(piece for head in heads for piece in head.pieces))


def source_of(rows, name: str) -> Source:
    """Rows that a program holds: a list of dicts, a datasets.Dataset or a pandas.DataFrame. `name` is what messages call them.

    Raises TypeError for anything else, and for what JSON cannot hold; ValueError where there are none.
    """
    # Whoever has their objects has imported them.
    datasets, pandas = (sys.modules.get(library) for library in ("datasets", "pandas"))
    if datasets is not None and isinstance(rows, datasets.Dataset):
        part = _dataset_part(name, name, rows)
    elif pandas is not None and isinstance(rows, pandas.DataFrame):
        whole = rows.astype(object).where(rows.notna(), None)  # NaN, NA and NaT stand for what is not there
        part = _list_part(
            name, [{str(column): value for column, value in row.items()} for row in whole.to_dict("records")]
        )
    elif isinstance(rows, list | tuple):
        part = _list_part(name, rows)
    else:
        raise TypeError(f"{name} is a {type(rows).__name__}; {_instead(rows)}")
    if not part.count:
        raise ValueError(f"{name} has no rows; give at least one")
    return Source(f"{name}, from Python", (_Piece(name, part, range(part.count)),))


def _instead(rows) -> str:
    """What to give in place of rows of a kind that is not taken."""
    if isinstance(rows, str | os.PathLike):
        return f"name files and data sets in the recipe: load_recipe(..., {{'data.dataset_name': '{rows}'}}), or data.eval_dataset_name"
    if type(rows).__name__ == "DatasetDict":
        return f"give one of its splits: {', '.join(f'data[{split!r}]' for split in rows)}"
    if type(rows).__name__ == "IterableDataset" or isinstance(rows, Iterator):
        return "it can be read once only, and training reads rows again: give list(...) of it"
    if isinstance(rows, Mapping):
        return "give a list of dicts, one for each row (datasets.Dataset.from_dict takes columns)"
    return "give a list of dicts, a datasets.Dataset or a pandas.DataFrame"


def _list_part(name: str, rows: Iterable) -> _Part:
    """The rows as they are now, whatever the program does with them later."""
    lines = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise TypeError(f"{name} row {number} is a {type(row).__name__}; wanted a dict with the row's columns")
        try:
            lines.append(json.dumps(dict(row), default=_plain).encode())
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{name} row {number} cannot be kept: {error}; give texts, numbers, lists and dicts"
            ) from None

    def digest():
        return hashlib.sha256(b"\n".join(lines)).hexdigest()

    return _Part(name, name, len(lines), lambda: (("row", n, line) for n, line in enumerate(lines, 1)), digest)


def _plain(value):
    """numpy's and pandas' values as Python's, moments as text."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise TypeError(f"a {type(value).__name__} is no JSON")


def has_splits(dataset: str) -> bool:
    """Whether a data set is more than one file, or one table that save_to_disk wrote."""
    path = pathlib.Path(os.path.expanduser(dataset))
    return not path.is_file() and not _is_lone(path)


def _head(source: Source, fraction: float) -> Source:
    left = int(fraction * len(source))
    if left == 0 and len(source) > 0:
        raise ValueError(f"fraction {fraction} of the {len(source)} rows of '{source.name}' is no row; raise it")
    pieces = []
    for piece in source.pieces:
        pieces.append(piece._replace(taken=piece.taken[:left]))
        left -= len(pieces[-1].taken)
    return Source(source.name, tuple(pieces))


def _open_one(dataset: str, terms: list["_Term"], config: str | None) -> Source:
    path = pathlib.Path(os.path.expanduser(dataset))
    splits = sorted({term.split for term in terms})
    if len(splits) > 1 and (path.is_file() or _is_lone(path)):
        raise ValueError(f"'{dataset}' has no splits, so {'+'.join(splits)} would repeat its rows; name one split")
    parts = {split: _find(dataset, path, split, config) for split in splits}
    names, pieces = [], []
    for term in terms:
        part = parts[term.split]
        taken = term.of(part.count)
        if part.count and not taken:
            raise ValueError(f"{term.slice} takes none of the {part.count} rows of '{part.name}'; widen the slice")
        names.append(part.name + term.slice)
        pieces.append(_Piece(dataset, part, taken))
    return Source(" + ".join(names), tuple(pieces))


def _find(dataset: str, path: pathlib.Path, split: str, config: str | None) -> _Part:
    if path.is_file():
        return _file_part(path)
    if path.is_dir():
        return _folder_part(path, split, config)
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", dataset) or _suffix(path) is not None:
        raise FileNotFoundError(
            f"'{dataset}' is neither a file nor a folder; give the path of a {', '.join(_SUFFIXES)} file, the path of a folder, or a name on the Hub"
        )
    name = f"{dataset}[{split}]"
    try:
        return _dataset_part(name, name, _load_dataset(dataset, config, split))
    except Exception as error:  # datasets raises many kinds
        raise FileNotFoundError(
            f"'{dataset}' is neither a file nor a folder nor a data set that loads from the Hub ({_cause(error)}); check name, split, config and network, or give a path"
        ) from None


def _cause(error: Exception) -> str:
    said = [str(one).rstrip(".") for one in (error, error.__cause__) if one is not None and str(one)]
    return textwrap.shorten(": ".join(said) or type(error).__name__, 200, placeholder=" ...")


# Splits


class _Term(NamedTuple):
    """One term of a split, such as train[10%:20%]."""

    split: str
    slice: str  # "[10%:20%]", or nothing
    bounds: tuple[str | None, str | None]

    @property
    def percent(self) -> bool:
        return "%" in self.slice  # as in datasets and TFDS, one percent sign makes both bounds percents

    def of(self, count: int) -> range:
        first, last = (self._row(bound, count) for bound in self.bounds)
        return range(count)[first:last]

    def _row(self, bound: str | None, count: int) -> int | None:
        if bound is None or not self.percent:
            return None if bound is None else int(bound)
        rows = round(abs(_number(bound)) * count / 100)
        return count - rows if _number(bound) < 0 else rows  # -1% of 7 rows is the end; a plain -0 would be the start


def _number(bound: str) -> float:
    return float(bound.rstrip("%"))


_BOUND = r"(-?\d+(?:_\d+)*|-?\d+(?:\.\d+)?%)?"
_TERM = re.compile(rf"([\w-]+(?:\.[\w-]+)*)(\[{_BOUND}:{_BOUND}\])?")


def _parse_split(split: str) -> list[_Term]:
    wanted = "write names with or without a slice, such as train, train[:1000], train[10%:20%] or train+test[-500:]"
    terms = []
    for text in split.split("+"):
        match = _TERM.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"split '{split}' is not understood; {wanted}")
        term = _Term(match[1], match[2] or "", match.group(3, 4))
        if term.percent and any(abs(_number(bound)) > 100 for bound in term.bounds if bound):
            raise ValueError(f"split '{split}' goes beyond 100%; {wanted}")
        terms.append(term)
    return terms


# Files


def _unpacked(path: pathlib.Path):
    return gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb")


def _lines(path: pathlib.Path) -> Iterator[_Numbered]:
    with _unpacked(path) as file:
        for number, line in enumerate(file, 1):
            row = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).rstrip(b"\r\n")
            if row.strip():
                yield "line", number, row


def _lines_or_array(path: pathlib.Path) -> Iterator[_Numbered]:
    _, _, start = next(_lines(path), ("line", 0, b""))
    if not start.lstrip().startswith(b"["):
        yield from _lines(path)
        return
    with _unpacked(path) as file:
        elements = json.load(file)
    for number, element in enumerate(elements, 1):
        yield "row", number, json.dumps(element).encode()


def _parquet(path: pathlib.Path) -> Iterator:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        yield from file.iter_batches(TABLE_ROWS)


def _arrow(path: pathlib.Path) -> Iterator:
    """The batches of Arrow's file format, or of its stream format, which `datasets` writes."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:
        if file.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(file)
            yield from map(reader.get_batch, range(reader.num_record_batches))
        else:
            file.seek(0)
            yield from pyarrow.ipc.open_stream(file)


def _table_rows(tables: Iterable) -> Iterator[_Numbered]:
    """The rows of pyarrow's tables or record batches, numbered throughout."""
    number = itertools.count(1)
    for table in tables:
        decode = dict
        if "arrow.json" in str(table.schema):  # datasets keeps what has mixed types as JSON texts, at any depth
            decode = _datasets().Features.from_arrow_schema(table.schema).decode_example
        for start in range(0, table.num_rows, TABLE_ROWS):
            for columns in table.slice(start, TABLE_ROWS).to_pylist():
                yield "row", next(number), decode(columns)


# What reads a file, by suffix, in the order in which a folder is searched.
_JSON = {".jsonl": _lines, ".jsonl.gz": _lines, ".json": _lines_or_array, ".json.gz": _lines_or_array}
_TABLES = {".parquet": _parquet, ".arrow": _arrow}
_SUFFIXES = (*_JSON, *_TABLES)


def _suffix(path: pathlib.Path) -> str | None:
    return next((suffix for suffix in _SUFFIXES if path.name.lower().endswith(suffix)), None)


@contextlib.contextmanager
def _reading(path: pathlib.Path):
    """What gzip, json and pyarrow raise over a damaged file becomes one line that names it."""
    try:
        yield
    except (
        OSError,
        EOFError,
        zlib.error,
        ValueError,
        NotImplementedError,
    ) as error:  # pyarrow's errors are kinds of these
        raise ValueError(
            f"{path} cannot be read as {_suffix(path)} ({_cause(error)}); write or fetch it again"
        ) from None


def _file_part(path: pathlib.Path) -> _Part:
    suffix = _suffix(path)
    if suffix is None:
        raise ValueError(f"'{path}' is no kind of file that is read here; give one of {', '.join(_SUFFIXES)}")

    def rows():
        with _reading(path):
            yield from _JSON[suffix](path) if suffix in _JSON else _table_rows(_TABLES[suffix](path))

    def digest():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with _reading(path):
        if suffix in _JSON:
            count = sum(1 for _ in _JSON[suffix](path))
        else:
            count = sum(table.num_rows for table in _TABLES[suffix](path))
    return _Part(str(path), path.name, count, rows, digest)


# Folders and the Hub


def _datasets():
    import datasets

    datasets.disable_progress_bars()
    return datasets


def _load_dataset(name: str, config: str | None, split: str):
    return _datasets().load_dataset(name, config, split=split)


def _is_lone(folder: pathlib.Path) -> bool:
    """Whether Dataset.save_to_disk wrote the folder: one table without splits."""
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def _folder_part(folder: pathlib.Path, split: str, config: str | None) -> _Part:
    for suffix in _SUFFIXES:
        if (folder / f"{split}{suffix}").is_file():
            return _file_part(folder / f"{split}{suffix}")
    files = (path for path in folder.iterdir() if _suffix(path) and not path.name.startswith("dataset_"))
    present = {path.name[: -len(_suffix(path))] for path in files}
    name, failed = f"{folder}[{split}]", ""
    try:
        if _is_lone(folder):
            return _dataset_part(str(folder), folder.name, _datasets().load_from_disk(folder))
        splits, load = _loadable_splits(folder, config)
        if split in splits:
            return _dataset_part(name, f"{folder.name}[{split}]", load(split))
        present.update(splits)
    except Exception as error:  # datasets raises many kinds
        failed = f" that loads ({_cause(error)})"
    raise FileNotFoundError(
        f"'{folder}' has no split '{split}'{failed}; splits present: {', '.join(sorted(present)) or 'none'}; name a split, or give a file itself"
    )


def _loadable_splits(folder: pathlib.Path, config: str | None) -> tuple[list[str], Callable]:
    """The splits that `datasets` sees in a folder, and what loads one: saved by save_to_disk, or laid out as on the Hub."""
    library = _datasets()
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_bytes())["splits"]
        return splits, lambda split: library.load_from_disk(folder / split)
    try:
        splits = library.get_dataset_split_names(str(folder), config)
    except (library.data_files.EmptyDatasetError, library.exceptions.DataFilesNotFoundError):
        splits = []
    return splits, lambda split: _load_dataset(str(folder), config, split)


def _dataset_part(name: str, label: str, dataset) -> _Part:
    """One split as `datasets` holds it: mapped from disk, not read into memory."""

    def tables():
        return dataset.with_format("arrow").iter(TABLE_ROWS)

    def digest():
        total = hashlib.sha256(dataset.features.arrow_schema.remove_metadata().serialize())
        for table in tables():
            for batch in table.combine_chunks().to_batches():
                total.update(batch.serialize())
        return total.hexdigest()

    return _Part(name, label, len(dataset), lambda: _table_rows(tables()), digest)
