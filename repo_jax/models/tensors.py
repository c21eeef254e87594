"""Safetensors files, read and written by byte ranges: in memory is what was asked for and nothing more.

A file is 8 bytes with the length of its header, the header (JSON: name -> dtype, shape, where its bytes are), and the bytes of all
tensors. Files are read by position and not mapped, because mapped pages count as memory of the process.
"""

import hashlib
import itertools
import json
import math
import os
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import ml_dtypes
import numpy as np

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
EXPONENTS = {
    "float32": np.uint32(0x7F800000),
    "float16": np.uint16(0x7C00),
    "bfloat16": np.uint16(0x7F80),
}  # their bits
CHUNK = 2**20  # numbers looked at together
SAMPLES, SAMPLE_BYTES = 64, 2**20  # of each file, for its fingerprint: small files are read whole
HEADER_LIMIT = 100_000_000  # bytes; safetensors itself reads no longer one


class Stored(NamedTuple):
    """One tensor of a file."""

    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file


class TensorFile:
    """The tensors of one safetensors file, opened but not read.

    Raises FileNotFoundError without one, and ValueError for a file that is not whole or has other than floating-point tensors.
    """

    def __init__(self, path: str | pathlib.Path):
        self.path = pathlib.Path(path)
        self.bytes_read = 0  # of tensors, since the file was opened
        self._stored = _read_header(self.path)

    def names(self) -> set[str]:
        return set(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored[name].shape

    def dtype(self, name: str) -> str:
        """float32, float16 or bfloat16."""
        return self._stored[name].dtype

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The part of a tensor that `index` asks for, in its own dtype; nothing else of the file is read.

        Raises ValueError where the part holds NaN or infinity.
        """
        [(_, part)] = self.blocks(name, index)
        return part

    def blocks(
        self, name: str, index: tuple[slice, ...] | None = None, *, rows: int | None = None
    ) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
        """What read returns, in pieces of at most `rows` along the first axis, each with its own index."""
        dtype, shape, offset = self._stored[name]
        index = index or (slice(None),) * len(shape)
        spans = [one.indices(size)[:2] for one, size in zip(index, shape, strict=True)]
        with open(self.path, "rb", buffering=0) as file:
            for first in _firsts(spans, rows):
                piece = first + spans[1:]
                part = np.empty([stop - start for start, stop in piece], DTYPES[dtype])
                self._fill(part, piece, file.fileno(), name, shape, offset)
                if _has_nonfinite(part):
                    raise ValueError(
                        f"{name} in '{self.path}' holds NaN or infinity; fetch the file again, or save the model again"
                    )
                yield tuple(slice(*span) for span in piece), part

    def _fill(self, part: np.ndarray, spans: list, file: int, name: str, shape: tuple, offset: int) -> None:
        """Reads the stretches of the file that make up these spans of a tensor's axes into `part`."""
        if not part.size:
            return
        strides = [part.itemsize * math.prod(shape[k + 1 :]) for k in range(len(shape))]
        # From the last axis that is not wanted whole on, what is wanted stands together.
        cut = max((k for k, span in enumerate(spans) if span != (0, shape[k])), default=0)
        buffer = memoryview(part.reshape(-1).view(np.uint8))
        length = part.itemsize * math.prod(part.shape[cut:])
        start = offset + (spans[cut][0] * strides[cut] if spans else 0)
        for number, outer in enumerate(itertools.product(*(range(*span) for span in spans[:cut]))):
            at = start + sum(i * stride for i, stride in zip(outer, strides, strict=False))
            into = buffer[number * length : (number + 1) * length]
            while into:
                count = os.preadv(file, [into], at)
                if not count:
                    raise ValueError(f"'{self.path}' ends within {name}; it was cut while it was read: fetch it again")
                into, at = into[count:], at + count
        self.bytes_read += part.nbytes


class TensorFiles:
    """The tensors of a Hugging Face folder, opened but not read: one safetensors file, or several with an index.

    Raises FileNotFoundError for a file that is not there, and ValueError for what is not whole.
    """

    def __init__(self, folder: str | pathlib.Path):
        self.folder = pathlib.Path(folder)
        index = self.folder / "model.safetensors.index.json"
        # transformers takes the one file where both are there.
        if (self.folder / "model.safetensors").is_file() or not index.is_file():
            places = {}
            files = ["model.safetensors"]
        else:
            places = _read_index(index)
            files = sorted(set(places.values()))
        self._files: dict[str, TensorFile] = {}
        for name in files:
            if not (self.folder / name).is_file():
                held = sorted(tensor for tensor, file in places.items() if file == name)
                holding = f", which holds {held[0]} and {len(held) - 1} more tensors" if held else ""
                raise FileNotFoundError(
                    f"'{self.folder}' has no {name}{holding}; the weights must be safetensors, all files present"
                )
            file = TensorFile(self.folder / name)
            for tensor in file.names():
                if tensor in self._files and tensor not in places:
                    raise ValueError(
                        f"{tensor} is in '{self._files[tensor].path}' and in '{file.path}'; keep one of them, or name one in {index.name}"
                    )
                if places.get(tensor, name) == name:
                    self._files[tensor] = file
        if lost := sorted(places.keys() - self._files.keys()):
            raise ValueError(
                f"'{self.folder / places[lost[0]]}' has no {lost[0]}, which {index.name} says it holds; fetch both again"
            )

    @property
    def bytes_read(self) -> int:
        return sum(file.bytes_read for file in set(self._files.values()))

    def names(self) -> set[str]:
        return set(self._files)

    def file_of(self, name: str) -> TensorFile:
        return self._files[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._files[name].shape(name)

    def dtype(self, name: str) -> str:
        """float32, float16 or bfloat16."""
        return self._files[name].dtype(name)

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        return self._files[name].read(name, index)


def fingerprint(*folders: pathlib.Path | None) -> str:
    """Tells the weights of one model from another's, from sizes and samples of the files; copies have the same."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in folders if folder is not None for path in folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for i in range(SAMPLES):
                file.seek(size * i // SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def write_file(
    path: str | pathlib.Path,
    tensors: dict[str, tuple[str, tuple[int, ...]]],
    parts: Iterator[tuple[str, np.ndarray]],
) -> None:
    """Writes one safetensors file: `tensors` (name -> dtype, shape) says what is in it, `parts` brings the tensors in any order.

    One tensor at a time is held, and the file is whole or not there.
    """
    path = pathlib.Path(path)
    # The larger dtypes come first, so that every tensor starts at a multiple of its own item's size.
    order = sorted(tensors, key=lambda name: (-np.dtype(DTYPES[tensors[name][0]]).itemsize, name))
    written_as = {ours: theirs for theirs, ours in SAFETENSORS_DTYPES.items()}
    header, offsets, end = {"__metadata__": {"format": "pt"}}, {}, 0  # transformers insists on the format
    for name in order:
        dtype, shape = tensors[name]
        offsets[name], end = end, end + nbytes(dtype, shape)
        header[name] = {"dtype": written_as[dtype], "shape": list(shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(f"{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, array in parts:
                dtype, shape = tensors[name]
                if array.shape != tuple(shape) or array.dtype != DTYPES[dtype]:
                    raise ValueError(f"{name} is {array.dtype} {array.shape}; {path.name} has room for {dtype} {shape}")
                if _has_nonfinite(array):
                    raise ValueError(f"{name} has NaN or infinity as {dtype}; {path.name} was not written")
                file.seek(8 + len(text) + offsets.pop(name))
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
                del array  # or two were held while the next one is made
        if offsets:
            raise ValueError(
                f"{', '.join(sorted(offsets)[:8])} never came; {path.name} needs every tensor of its header"
            )
        partial.chmod(0o644)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return np.dtype(DTYPES[dtype]).itemsize * math.prod(shape)


def _read_index(path: pathlib.Path) -> dict[str, str]:
    """The file that each tensor is in."""
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(name, str) for name in places.values()):
            raise TypeError
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, UnicodeDecodeError):
        raise ValueError(f"'{path}' is not a safetensors index with a weight_map; fetch it again") from None
    return places


def _read_header(path: pathlib.Path) -> dict[str, Stored]:
    """Where everything in a file is, once it is certain that all of it is there."""

    def damaged(why: str) -> ValueError:
        return ValueError(f"'{path}' is not a whole safetensors file ({why}); fetch it again")

    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if prefix == b"version ":
            raise damaged("it is a pointer of git-lfs: git lfs pull brings the file")
        if len(prefix) < 8 or length > HEADER_LIMIT:
            raise damaged("it has no header")
        if length > size - 8:
            raise damaged(f"it ends within its header of {length} bytes, after {size - 8}")
        text = file.read(length)
    start, end = 8 + length, 0
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        entries = sorted(
            (*map(int, entry["data_offsets"]), name, entry["dtype"], tuple(map(int, entry["shape"])))
            for name, entry in entries.items()
        )
        whole = all(len(entry) == 5 and min(entry[4], default=0) >= 0 for entry in entries)
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise damaged("its header cannot be read")
    stored = {}
    for begin, stop, name, dtype, shape in entries:
        if dtype not in SAFETENSORS_DTYPES:
            raise ValueError(
                f"{name} in '{path}' is {dtype}; supported: {', '.join(SAFETENSORS_DTYPES)}. Quantised weights are not supported: "
                "give the model's plain ones"
            )
        if begin != end or stop - begin != nbytes(SAFETENSORS_DTYPES[dtype], shape):
            raise damaged(
                f"its header gives {name} bytes {begin} to {stop}, which do not fit its shape or the tensor before"
            )
        if start + stop > size:
            raise damaged(f"it ends within {name}: it has {size} bytes, its header says {start + entries[-1][1]}")
        stored[name] = Stored(SAFETENSORS_DTYPES[dtype], shape, start + begin)
        end = stop
    if start + end != size:
        raise damaged(f"it has {size} bytes, its header says {start + end}")
    return stored


def _firsts(spans: list[tuple[int, int]], rows: int | None) -> Iterator[list[tuple[int, int]]]:
    """The span of the first axis in pieces; what has no axis or no rows is one piece."""
    if not spans or rows is None or spans[0][0] >= spans[0][1]:
        yield spans[:1]
        return
    start, stop = spans[0]
    for first in range(start, stop, rows):
        yield [(first, min(first + rows, stop))]


def _has_nonfinite(array: np.ndarray) -> bool:
    """Whether any exponent is all ones; on the bits, which is several times faster for bfloat16 than isfinite."""
    exponent, bits = EXPONENTS[array.dtype.name], np.ascontiguousarray(array).reshape(-1).view(f"u{array.itemsize}")
    return any((part & exponent == exponent).any() for part in np.split(bits, range(CHUNK, bits.size, CHUNK)))
