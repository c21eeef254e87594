"""Hugging Face weights in and out: one table, read in both directions; torch is never needed.

Axis letters: D width, F MLP width, N query heads, K key/value heads, H head size, V vocabulary, L layers, Y labels.
"""

import functools
import itertools
import json
import math
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from repo_jax.distributed import wait_for_all
from repo_jax.models.config import DecoderConfig
from repo_jax.models.tensors import DTYPES, TensorFiles, nbytes, write_file

ROWS = 128  # of a stored tensor are read and turned at a time: they stay in the processor's cache
HOST_BYTES = 2**26  # of a stack of layers are put together on the host at a time, and of an array brought to it


class Weight(NamedTuple):
    hf: str  # Hugging Face's name; {i} is the layer. Rows of one name are its parts, in order, along its first axis
    ours: str  # where it stands in our parameter tree; a layer's may stand in another stack than layers_L (cfg.stacks)
    layout: str  # how theirs becomes ours, for einops; an axis that is split over devices comes first in its group

    @property
    def axes(self) -> list[str]:
        """Ours, of one layer."""
        return self.layout.partition(" -> ")[2].split()

    @property
    def groups(self) -> list[list[str]]:
        """Our axes that make up each of theirs."""
        return groups_of(self.layout.partition(" -> ")[0])

    def turned(self, stored: np.ndarray, cfg: DecoderConfig) -> np.ndarray:
        """Their tensor, or some of its rows, seen as ours: a view, also to write through."""
        inner = {axis: axis_size(cfg, axis) for _, *rest in self.groups for axis in rest}
        return einops.rearrange(stored, self.layout, **inner)


LAYER = "model.layers.{i}."
ENDS = [
    #      Hugging Face name                          ours                           how theirs becomes ours
    Weight("model.embed_tokens.weight",               "embed_VD",                    "V D -> V D"),
    Weight("model.norm.weight",                       "final_norm_D",                "D -> D"),
    Weight("lm_head.weight",                          "head_VD",                     "V D -> V D"),
    Weight("score.weight",                            "score_YD",                    "Y D -> Y D"),
]  # fmt: skip
ATTENTION = [
    Weight(LAYER + "self_attn.q_proj.weight",         "layers_L/attn/q_DNH",         "(N H) D -> D N H"),
    Weight(LAYER + "self_attn.k_proj.weight",         "layers_L/attn/k_DKH",         "(K H) D -> D K H"),
    Weight(LAYER + "self_attn.v_proj.weight",         "layers_L/attn/v_DKH",         "(K H) D -> D K H"),
    Weight(LAYER + "self_attn.o_proj.weight",         "layers_L/attn/o_NHD",         "D (N H) -> N H D"),
    Weight(LAYER + "self_attn.q_proj.bias",           "layers_L/attn/q_bias_NH",     "(N H) -> N H"),
    Weight(LAYER + "self_attn.k_proj.bias",           "layers_L/attn/k_bias_KH",     "(K H) -> K H"),
    Weight(LAYER + "self_attn.v_proj.bias",           "layers_L/attn/v_bias_KH",     "(K H) -> K H"),
    Weight(LAYER + "self_attn.o_proj.bias",           "layers_L/attn/o_bias_D",      "D -> D"),
]  # fmt: skip
HEAD_NORMS = [
    Weight(LAYER + "self_attn.q_norm.weight",         "layers_L/attn/q_norm_H",      "H -> H"),
    Weight(LAYER + "self_attn.k_norm.weight",         "layers_L/attn/k_norm_H",      "H -> H"),
]  # fmt: skip
WHOLE_NORMS = [
    Weight(LAYER + "self_attn.q_norm.weight",         "layers_L/attn/q_norm_NH",     "(N H) -> N H"),
    Weight(LAYER + "self_attn.k_norm.weight",         "layers_L/attn/k_norm_KH",     "(K H) -> K H"),
]  # fmt: skip
MLP = [
    Weight(LAYER + "mlp.gate_proj.weight",            "layers_L/mlp/gate_DF",        "F D -> D F"),
    Weight(LAYER + "mlp.up_proj.weight",              "layers_L/mlp/up_DF",          "F D -> D F"),
    Weight(LAYER + "mlp.down_proj.weight",            "layers_L/mlp/down_FD",        "D F -> F D"),
]  # fmt: skip
FUSED = [
    Weight(LAYER + "self_attn.qkv_proj.weight",       "layers_L/attn/q_DNH",         "(N H) D -> D N H"),
    Weight(LAYER + "self_attn.qkv_proj.weight",       "layers_L/attn/k_DKH",         "(K H) D -> D K H"),
    Weight(LAYER + "self_attn.qkv_proj.weight",       "layers_L/attn/v_DKH",         "(K H) D -> D K H"),
    Weight(LAYER + "self_attn.o_proj.weight",         "layers_L/attn/o_NHD",         "D (N H) -> N H D"),
    Weight(LAYER + "mlp.gate_up_proj.weight",         "layers_L/mlp/gate_DF",        "F D -> D F"),
    Weight(LAYER + "mlp.gate_up_proj.weight",         "layers_L/mlp/up_DF",          "F D -> D F"),
    Weight(LAYER + "mlp.down_proj.weight",            "layers_L/mlp/down_FD",        "D F -> F D"),
]  # fmt: skip
# Families give the same names to different norms.
BEFORE = [
    Weight(LAYER + "input_layernorm.weight",          "layers_L/attn_norm_D",        "D -> D"),
    Weight(LAYER + "post_attention_layernorm.weight", "layers_L/mlp_norm_D",         "D -> D"),
]  # fmt: skip
AROUND = [
    Weight(LAYER + "input_layernorm.weight",            "layers_L/attn_norm_D",      "D -> D"),
    Weight(LAYER + "post_attention_layernorm.weight",   "layers_L/attn_post_norm_D", "D -> D"),
    Weight(LAYER + "pre_feedforward_layernorm.weight",  "layers_L/mlp_norm_D",       "D -> D"),
    Weight(LAYER + "post_feedforward_layernorm.weight", "layers_L/mlp_post_norm_D",  "D -> D"),
]  # fmt: skip
AFTER = [
    Weight(LAYER + "post_attention_layernorm.weight",   "layers_L/attn_post_norm_D", "D -> D"),
    Weight(LAYER + "post_feedforward_layernorm.weight", "layers_L/mlp_post_norm_D",  "D -> D"),
]  # fmt: skip
LAYOUTS = {
    "llama": [*ENDS, *BEFORE, *ATTENTION, *HEAD_NORMS, *MLP],
    "gemma2": [*ENDS, *AROUND, *ATTENTION, *HEAD_NORMS, *MLP],
    "phi3": [*ENDS, *BEFORE, *FUSED],
    "olmo2": [*ENDS, *AFTER, *ATTENTION, *WHOLE_NORMS, *MLP],
}


def weights_of(cfg: DecoderConfig) -> list[Weight]:
    """The rows of the table that this checkpoint has."""
    has = {
        "head_VD": not cfg.tie_embeddings and not cfg.labels,
        "score_YD": cfg.labels > 0,
        "q_bias_NH": cfg.qkv_bias,
        "k_bias_KH": cfg.qkv_bias,
        "v_bias_KH": cfg.qkv_bias,
        "o_bias_D": cfg.o_bias,
        "q_norm_H": cfg.qk_norm == "head",
        "k_norm_H": cfg.qk_norm == "head",
    }
    return [w for w in LAYOUTS[cfg.layout] if has.get(w.ours.rpartition("/")[2], True)]


def groups_of(layout_side: str) -> list[list[str]]:
    """'(N H) D' -> [['N', 'H'], ['D']]."""
    return [group.strip("()").split() for group in re.findall(r"\(.*?\)|\S+", layout_side)]


def axis_size(cfg: DecoderConfig, axis: str) -> int:
    return cfg.labels if axis == "Y" else getattr(cfg, axis)


def shape_of(cfg: DecoderConfig, groups: list[list[str]]) -> tuple[int, ...]:
    """The sizes of axes as Hugging Face has them: without the rows that pad our vocabulary."""
    return tuple(math.prod(axis_size(cfg, axis) for axis in group) for group in groups)


class Place(NamedTuple):
    """Where a parameter of ours is in the files."""

    weight: Weight
    path: str  # in our tree
    layers: range | None  # whose tensors are stacked in it
    row: int  # of the tensor at which it begins


def places_of(cfg: DecoderConfig) -> list[Place]:
    """Every parameter, once."""
    places, rows = [], {}
    for w in weights_of(cfg):
        row = rows.get(w.hf, 0)
        rows[w.hf] = row + shape_of(cfg, w.groups)[0]
        if "{i}" not in w.hf:
            places.append(Place(w, w.ours, None, row))
            continue
        first = 0
        for stack, count in cfg.stacks.items():
            places.append(Place(w, w.ours.replace("layers_L", stack, 1), range(first, first + count), row))
            first += count
    return places


def expected_tensors(cfg: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape of every tensor that this checkpoint must have."""
    expected = {}
    for w in weights_of(cfg):
        rows, *rest = shape_of(cfg, w.groups)
        for i in range(cfg.L if "{i}" in w.hf else 1):
            name = w.hf.format(i=i)
            before = expected.get(name, (0,))[0]
            expected[name] = (before + rows, *rest)
    return expected


def check_tensors(files: TensorFiles, cfg: DecoderConfig) -> None:
    """Every tensor has a place and every parameter a tensor of the right shape, or one ValueError that lists what differs."""
    expected = expected_tensors(cfg)
    # Buffers that old exports carry, and the copy of the embedding that some write for a tied head.
    ignored = {
        n for n in files.names() if n.endswith("rotary_emb.inv_freq") or (cfg.tie_embeddings and n == "lm_head.weight")
    }
    faults = [f"missing {name}" for name in sorted(expected.keys() - files.names())]
    faults += [
        f"unexpected {name} ({files.file_of(name).path.name})"
        for name in sorted(files.names() - expected.keys() - ignored)
    ]
    for name in sorted(expected.keys() & files.names()):
        if (given := files.shape(name)) != expected[name]:
            where = files.file_of(name).path.name
            faults.append(f"{name} has shape {list(given)}, config.json says {list(expected[name])} ({where})")
    if faults:
        more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise ValueError(f"the tensors in '{files.folder}' do not fit its config.json: {'; '.join(faults[:8])}{more}")


def stored_dtypes(folder: str | pathlib.Path, cfg: DecoderConfig) -> dict[str, str]:
    """Hugging Face name -> dtype of every tensor of a folder, to write it back as it was."""
    files = TensorFiles(folder)
    return {name: files.dtype(name) for name in expected_tensors(cfg)}


class Deltas(Protocol):
    def delta(self, name: str, index: tuple[slice, ...]) -> np.ndarray | None:
        """What is added, in float32, to that part of the tensor of that Hugging Face name; None is nothing."""


def from_hf(
    folder: str | pathlib.Path,
    cfg: DecoderConfig,
    shardings: dict,
    *,
    dtype: str = "float32",
    deltas: Deltas | None = None,
) -> dict:
    """The parameters of a Hugging Face folder in `dtype`; every device receives its own part, read straight from the files.

    `shardings` is a tree like the parameters (sharding.param_shardings). Beside the parameters the host holds HOST_BYTES of a
    stack of layers, or its part of one tensor. Raises ValueError for tensors that do not fit, and where one has NaN or infinity.
    """
    files = TensorFiles(folder)
    check_tensors(files, cfg)
    shardings, params = flatten_dict(shardings, sep="/"), {}
    for place in places_of(cfg):
        shape = tuple(cfg.padded_V if axis == "V" else axis_size(cfg, axis) for axis in place.weight.axes)
        sharding = shardings[place.path]
        read = functools.partial(_read, files, cfg, place, dtype=dtype, deltas=deltas)
        if place.layers is None:
            params[place.path] = _spread(shape, sharding, read)
        else:
            params[place.path] = _stacked((len(place.layers), *shape), sharding, dtype, read)
    return unflatten_dict(params, sep="/")


def _spread(shape: tuple[int, ...], sharding, read) -> jax.Array:
    """An array of which every device gets its part by read(index); devices with the same part share one reading."""
    parts = {}

    def part(index):
        spans = tuple(one.indices(size)[:2] for one, size in zip(index, shape, strict=True))
        if spans not in parts:
            parts[spans] = read(tuple(slice(*span) for span in spans))
        return parts[spans]

    return jax.make_array_from_callback(shape, sharding, part)


def _stacked(shape: tuple[int, ...], sharding, dtype: str, read) -> jax.Array:
    """A parameter of many layers, a few layers at a time where this process's share of it is large."""
    L = shape[0]
    # The same number on every process, since all of them run the program below.
    share = nbytes(dtype, sharding.shard_shape(shape)) * -(-sharding.num_devices // jax.process_count())
    turns = min(L, -(-share // HOST_BYTES))
    if turns <= 1:
        return _spread(shape, sharding, read)
    stack = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()
    at_once = -(-L // turns)
    for first in range(0, L, at_once):

        def some(index, first=first):
            return read((slice(first + index[0].start, first + index[0].stop), *index[1:]))

        layers = _spread((min(at_once, L - first), *shape[1:]), sharding, some)
        stack = _putter(sharding)(stack, layers, first)
    return stack


@functools.cache
def _putter(sharding):
    def put(stack, layers, first):
        return jax.lax.dynamic_update_slice_in_dim(stack, layers, first, axis=0)

    return jax.jit(put, donate_argnums=0, out_shardings=sharding)


def _read(files: TensorFiles, cfg: DecoderConfig, place: Place, index: tuple[slice, ...], *, dtype: str, deltas):
    """The part of one of our parameters that `index` (start and stop given) asks for, reading nothing else of the files."""
    part = np.zeros([one.stop - one.start for one in index], DTYPES[dtype])  # also where rows pad the vocabulary
    if place.layers is None:
        _read_tensor(files, cfg, place, place.weight.hf, index, part, deltas)
    else:
        for i, layer in enumerate(place.layers[index[0]]):
            _read_tensor(files, cfg, place, place.weight.hf.format(i=layer), index[1:], part[i], deltas)
    return part


def _read_tensor(files, cfg, place: Place, name: str, index: tuple[slice, ...], part: np.ndarray, deltas) -> None:
    w = place.weight
    wanted, theirs = dict(zip(w.axes, index, strict=True)), []
    for first, *rest in w.groups:
        if any((wanted[axis].start, wanted[axis].stop) != (0, axis_size(cfg, axis)) for axis in rest):
            raise ValueError(
                f"{place.path} is split along {' or '.join(rest)}, which {name} cannot be; split it along {first}"
            )
        inner, size = _inner(cfg, rest), axis_size(cfg, first)
        theirs.append(slice(*(min(end, size) * inner for end in (wanted[first].start, wanted[first].stop))))
    first, *rest = w.groups[0]
    inner, begin = _inner(cfg, rest), theirs[0].start + place.row
    theirs[0] = slice(begin, theirs[0].stop + place.row)
    for piece, block in files.file_of(name).blocks(name, tuple(theirs), rows=max(1, ROWS // inner) * inner):
        if deltas is not None and (delta := deltas.delta(name, piece)) is not None:
            block = block.astype(np.float32) + delta
        rows = slice((piece[0].start - begin) // inner, (piece[0].stop - begin) // inner)
        # Turning numbers and converting them at once takes numpy twice as long as one after the other.
        part[_along(w.axes.index(first), rows)] = w.turned(block.astype(part.dtype, copy=False), cfg)


def _inner(cfg: DecoderConfig, rest: list[str]) -> int:
    """How many of their rows or columns make one step along the first of the axes that they merge."""
    return math.prod(axis_size(cfg, axis) for axis in rest)


def _along(axis: int, span: slice) -> tuple[slice, ...]:
    """array[_along(2, span)] is array[:, :, span]."""
    return (slice(None),) * axis + (span,)


def hf_tensors(
    params: dict, cfg: DecoderConfig, *, dtypes: str | dict[str, str], mine: set[str] | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor under its Hugging Face name and in its layout, one at a time on the host; `dtypes` is one for all, or by name.

    Where arrays are spread over processes, all of them run through this together and each receives what it calls `mine`.
    """
    params = {path: jnp.asarray(leaf) for path, leaf in flatten_dict(params, sep="/").items()}
    parts = {}
    for place in places_of(cfg):
        for i, layer in enumerate(place.layers or [None]):
            parts.setdefault(place.weight.hf.format(i=layer), []).append((place, i))
    for name, shape in expected_tensors(cfg).items():
        dtype = DTYPES[dtypes if isinstance(dtypes, str) else dtypes[name]]
        tensor = np.empty(shape, dtype) if mine is None or name in mine else None
        for place, i in parts[name]:
            _write_tensor(params[place.path], cfg, place, i, tensor)
        if tensor is not None:
            yield name, tensor
            del tensor  # or two were held while the next one is made


def _write_tensor(array: jax.Array, cfg: DecoderConfig, place: Place, i: int, tensor: np.ndarray | None) -> None:
    """Puts our parameter, or the i-th of a stack, where it stands in the tensor; None where another process has the tensor."""
    w = place.weight
    first, *rest = w.groups[0]
    axis, step = w.axes.index(first), max(1, ROWS // _inner(cfg, rest))
    shape = tuple(axis_size(cfg, axis) for axis in w.axes)
    for index, block in _blocks(array, () if place.layers is None else (i,), shape):
        if tensor is None:
            continue
        ours = w.turned(tensor[place.row : place.row + shape_of(cfg, w.groups)[0]], cfg)[index]
        block = np.asarray(block).view(array.dtype).reshape(ours.shape)
        with np.errstate(over="ignore"):  # what float16 cannot hold becomes infinity, which write_file refuses
            for start in range(0, ours.shape[axis], step):
                rows = _along(axis, slice(start, start + step))
                ours[rows] = block[rows].astype(tensor.dtype, copy=False)


def _blocks(
    array: jax.Array, lead: tuple[int, ...], shape: tuple[int, ...]
) -> Iterator[tuple[tuple[slice, ...], jax.Array]]:
    """The bits of array[lead] up to `shape`, in pieces of at most HOST_BYTES, each with its place; every process sees all of them."""
    everywhere = None if array.is_fully_addressable else NamedSharding(array.sharding.mesh, P())
    held = array.sharding.shard_shape(array.shape)[len(lead) :]
    # Cut along an axis that is not spread, where there is one: each piece is then gathered by itself.
    axis = min(range(len(shape)), key=lambda k: (shape[k] // held[k], -shape[k]))
    turns = min(shape[axis], -(-math.prod(shape) * array.itemsize // HOST_BYTES))
    size = -(-shape[axis] // turns)
    for start in range(0, shape[axis], size):
        start = min(start, shape[axis] - size)  # all pieces have one shape, so that there is one program
        starts = [start if k == axis else 0 for k in range(len(shape))]
        sizes = [size if k == axis else shape[k] for k in range(len(shape))]
        block = _slicer(everywhere)(array, (*lead, *starts), sizes=(*(1 for _ in lead), *sizes))
        # Waiting keeps a process that writes nothing from running far ahead, with a queue of pieces in memory.
        yield tuple(slice(s, s + n) for s, n in zip(starts, sizes, strict=True)), block.block_until_ready()


@functools.cache
def _slicer(sharding: NamedSharding | None):
    def cut(array, starts, sizes):
        # As bits, because on CPUs XLA gathers bfloat16 as float32, which is twice as much to send.
        bits = jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}")
        return jax.lax.dynamic_slice(bits, starts, sizes)

    return jax.jit(cut, static_argnames="sizes", out_shardings=sharding)


class File(NamedTuple):
    name: str
    process: int  # that writes it
    tensors: dict[str, tuple[str, tuple[int, ...]]]  # name -> dtype, shape


def plan_files(
    tensors: dict[str, tuple[str, tuple[int, ...]]], *, max_shard_bytes: int, processes: int = 1
) -> list[File]:
    """Which file holds which tensors, and which process writes it: each an equal share, in order."""
    total, offset, room, files = sum(nbytes(*tensor) for tensor in tensors.values()), 0, 0, []
    for name, tensor in tensors.items():
        process, size = offset * processes // total, nbytes(*tensor)
        if not files or process != files[-1].process or size > room:
            files.append(File("", process, {}))
            room = max_shard_bytes
        files[-1].tensors[name] = tensor
        offset, room = offset + size, room - size
    if len(files) == 1:
        return [files[0]._replace(name="model.safetensors")]
    return [file._replace(name=f"model-{i:05d}-of-{len(files):05d}.safetensors") for i, file in enumerate(files, 1)]


def to_hf(
    params: dict,
    cfg: DecoderConfig,
    folder: str | pathlib.Path,
    *,
    dtypes: str | dict[str, str],
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes the parameters into FOLDER as safetensors, in files of at most max_shard_bytes with an index if several.

    `dtypes` is one for all tensors, or one for each Hugging Face name (stored_dtypes). The host holds one tensor at a time. Several
    processes call this together, with one folder that all of them see; each writes its share of the files, and all return when
    the folder is whole. What fails leaves no file behind.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    index = folder / "model.safetensors.index.json"
    if there := sorted([*folder.glob("model*.safetensors"), *folder.glob(index.name)]):
        raise FileExistsError(f"'{folder}' holds weights already ({there[0].name}); name a new folder")
    tensors = {
        name: (dtypes if isinstance(dtypes, str) else dtypes[name], shape)
        for name, shape in expected_tensors(cfg).items()
    }
    files = plan_files(tensors, max_shard_bytes=max_shard_bytes, processes=jax.process_count())
    mine = [file for file in files if file.process == jax.process_index()]
    wait_for_all("looked for weights")  # nobody writes before everybody has looked into the folder
    stream = hf_tensors(params, cfg, dtypes=dtypes, mine={name for file in mine for name in file.tensors})
    try:
        for file in mine:
            write_file(folder / file.name, file.tensors, itertools.islice(stream, len(file.tensors)))
        for _ in stream:  # what the others have still to gather
            pass
        wait_for_all("weights are written")
        if len(files) > 1 and jax.process_index() == 0:
            total = sum(nbytes(*tensor) for tensor in tensors.values())
            weight_map = {name: file.name for file in files for name in file.tensors}
            text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True)
            index.write_text(text + "\n", encoding="utf-8")
        wait_for_all("the index is written")
    except BaseException:
        for file in mine:
            (folder / file.name).unlink(missing_ok=True)
        raise
