"""Hugging Face weights in and out: one table, read in both directions; torch is never needed.

Axis letters: D width, F MLP width, N query heads, K key/value heads, H head size, V vocabulary, L layers.
"""

import json
import math
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

import einops
import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from repo_jax.models.config import DecoderConfig

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Weight(NamedTuple):
    hf: str  # Hugging Face's name; {i} is the layer
    ours: str  # where it stands in our parameter tree
    layout: str  # how theirs becomes ours, for einops; an axis that is split over devices comes first in its group


WEIGHTS = [
    #      Hugging Face name                                  ours                     how theirs becomes ours
    Weight("model.embed_tokens.weight",                       "embed_VD",              "V D -> V D"),
    Weight("model.layers.{i}.input_layernorm.weight",         "layers_L/attn_norm_D",  "D -> D"),
    Weight("model.layers.{i}.self_attn.q_proj.weight",        "layers_L/attn/q_DNH",   "(N H) D -> D N H"),
    Weight("model.layers.{i}.self_attn.k_proj.weight",        "layers_L/attn/k_DKH",   "(K H) D -> D K H"),
    Weight("model.layers.{i}.self_attn.v_proj.weight",        "layers_L/attn/v_DKH",   "(K H) D -> D K H"),
    Weight("model.layers.{i}.self_attn.o_proj.weight",        "layers_L/attn/o_NHD",   "D (N H) -> N H D"),
    Weight("model.layers.{i}.post_attention_layernorm.weight", "layers_L/mlp_norm_D",  "D -> D"),
    Weight("model.layers.{i}.mlp.gate_proj.weight",           "layers_L/mlp/gate_DF",  "F D -> D F"),
    Weight("model.layers.{i}.mlp.up_proj.weight",             "layers_L/mlp/up_DF",    "F D -> D F"),
    Weight("model.layers.{i}.mlp.down_proj.weight",           "layers_L/mlp/down_FD",  "D F -> F D"),
    Weight("model.norm.weight",                               "final_norm_D",          "D -> D"),
    Weight("lm_head.weight",                                  "head_VD",               "V D -> V D"),
]  # fmt: skip


def weights_of(cfg: DecoderConfig) -> list[Weight]:
    """The rows of the table that this checkpoint has."""
    return [w for w in WEIGHTS if not (cfg.tie_embeddings and w.ours == "head_VD")]


class TensorFiles:
    """The tensors of a Hugging Face folder, opened but not read: one safetensors file, or several with an index."""

    def __init__(self, folder: str | pathlib.Path):
        self.folder = pathlib.Path(folder)
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (json.JSONDecodeError, KeyError, UnicodeDecodeError):
                raise ValueError(f"'{index}' is not a safetensors index with a weight_map; fetch it again") from None
        else:
            files = ["model.safetensors"]
        self._slices = {}
        for name in files:
            path = self.folder / name
            if not path.is_file():
                raise FileNotFoundError(
                    f"'{self.folder}' has no {name}; the weights must be safetensors, all files present"
                )
            try:
                file = safetensors.safe_open(path, framework="numpy")
            except safetensors.SafetensorError as error:
                raise ValueError(f"'{path}' is not a whole safetensors file ({error}); fetch it again") from None
            for key in file.keys():  # noqa: SIM118 - it is no dict
                self._slices[key] = file.get_slice(key)

    def __getitem__(self, name: str):
        return self._slices[name]

    def names(self) -> set[str]:
        return set(self._slices)

    def dtype(self, cfg: DecoderConfig) -> str:
        """The one dtype of the weights (float32, float16 or bfloat16), or a ValueError when they have another or several."""
        found = {self[name].get_dtype() for name in expected_tensors(cfg)}
        if len(found) != 1 or not found <= set(SAFETENSORS_DTYPES):
            raise ValueError(
                f"the weights in '{self.folder}' are {' and '.join(sorted(found))}; wanted one of "
                f"{', '.join(SAFETENSORS_DTYPES)} throughout: save the model again in one dtype"
            )
        return SAFETENSORS_DTYPES[found.pop()]


def groups_of(layout_side: str) -> list[list[str]]:
    """'(N H) D' -> [['N', 'H'], ['D']]."""
    return [group.strip("()").split() for group in re.findall(r"\(.*?\)|\S+", layout_side)]


def read_part(stored, layout: str, index: tuple[slice, ...], cfg: DecoderConfig) -> np.ndarray:
    """The part of our array that `index` asks for, reading nothing else of the stored tensor."""
    theirs, ours = layout.split(" -> ")
    wanted = {axis: part.indices(getattr(cfg, axis)) for axis, part in zip(ours.split(), index, strict=True)}
    their_index, inner_sizes = [], {}
    for outer, *inner in groups_of(theirs):
        inner_sizes |= {axis: getattr(cfg, axis) for axis in inner}
        step = math.prod(getattr(cfg, axis) for axis in inner)
        start, stop, _ = wanted[outer]
        their_index.append(slice(start * step, stop * step))
    return einops.rearrange(stored[tuple(their_index)], layout, **inner_sizes)


def expected_tensors(cfg: DecoderConfig) -> dict[str, list[int]]:
    """Hugging Face name -> shape of every tensor that this checkpoint must have."""
    expected = {}
    for w in weights_of(cfg):
        theirs = groups_of(w.layout.split(" -> ")[0])
        shape = [math.prod(getattr(cfg, axis) for axis in group) for group in theirs]
        for i in range(cfg.L if "{i}" in w.hf else 1):
            expected[w.hf.format(i=i)] = shape
    return expected


def check_tensors(files: TensorFiles, cfg: DecoderConfig) -> None:
    """Every tensor has a place and every parameter a tensor of the right shape, or one ValueError that lists what differs."""
    expected = expected_tensors(cfg)
    # Buffers that old exports carry, and the copy of the embedding that some write for a tied head.
    ignored = {
        n for n in files.names() if n.endswith("rotary_emb.inv_freq") or (cfg.tie_embeddings and n == "lm_head.weight")
    }
    faults = [f"missing {name}" for name in sorted(expected.keys() - files.names())]
    faults += [f"unexpected {name}" for name in sorted(files.names() - expected.keys() - ignored)]
    for name in sorted(expected.keys() & files.names()):
        if (given := list(files[name].get_shape())) != expected[name]:
            faults.append(f"{name} has shape {given}, config.json says {expected[name]}")
    if faults:
        more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise ValueError(f"the tensors in '{files.folder}' do not fit its config.json: {'; '.join(faults[:8])}{more}")


def from_hf(folder: str | pathlib.Path, cfg: DecoderConfig, shardings: dict) -> dict:
    """The parameters of a Hugging Face folder in float32; every device receives its own part, read straight from the files.

    `shardings` is a tree like the parameters (sharding.param_shardings).
    """
    files = TensorFiles(folder)
    check_tensors(files, cfg)
    shardings, params = flatten_dict(shardings, sep="/"), {}
    for w in weights_of(cfg):
        axes = w.layout.split(" -> ")[1].split()
        layers = [w.hf.format(i=i) for i in range(cfg.L)] if "{i}" in w.hf else None
        shape = tuple(getattr(cfg, axis) for axis in (["L"] if layers else []) + axes)
        parts = {}  # devices that hold the same part share one reading of it

        def part(index, w=w, layers=layers, shape=shape, parts=parts):
            key = tuple(one.indices(size)[:2] for one, size in zip(index, shape, strict=True))
            if key not in parts:
                parts[key] = np.empty([stop - start for start, stop in key], np.float32)
                if layers:
                    for i, name in enumerate(layers[index[0]]):
                        parts[key][i] = read_part(files[name], w.layout, index[1:], cfg)
                else:
                    parts[key][...] = read_part(files[w.hf], w.layout, index, cfg)
            return parts[key]

        params[w.ours] = jax.make_array_from_callback(shape, shardings[w.ours], part)
    return unflatten_dict(params, sep="/")


def hf_tensors(params: dict, cfg: DecoderConfig, *, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor under its Hugging Face name and in its layout, one at a time on the host."""
    params = flatten_dict(params, sep="/")
    for w in weights_of(cfg):
        theirs, ours = w.layout.split(" -> ")
        for i in range(cfg.L if "{i}" in w.hf else 1):
            array = params[w.ours][i] if "{i}" in w.hf else params[w.ours]
            tensor = einops.rearrange(np.asarray(jax.device_get(array)), f"{ours} -> {theirs}")
            yield w.hf.format(i=i), np.ascontiguousarray(tensor.astype(DTYPES[dtype]))


def to_hf(
    params: dict, cfg: DecoderConfig, folder: str | pathlib.Path, *, dtype: str, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Writes the parameters into FOLDER as safetensors, in files of at most max_shard_bytes with an index if several."""
    folder = pathlib.Path(folder)
    files, held, size, total = [], {}, 0, 0

    def flush():
        path = folder / f"part-{len(files)}.safetensors"
        safetensors.numpy.save_file(held, path, metadata={"format": "pt"})  # transformers insists on the format key
        path.chmod(0o644)  # safetensors makes files that only their owner reads
        files.append((path, list(held)))

    for name, tensor in hf_tensors(params, cfg, dtype=dtype):
        if held and size + tensor.nbytes > max_shard_bytes:
            flush()
            held, size = {}, 0
        held[name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    if len(files) == 1:
        files[0][0].rename(folder / "model.safetensors")
        return
    weight_map = {}
    for i, (path, names) in enumerate(files, 1):
        final = f"model-{i:05d}-of-{len(files):05d}.safetensors"
        path.rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
