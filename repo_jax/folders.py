"""Models between a Hugging Face folder and a program: parameters out of one, and back into one that loads anywhere."""

import dataclasses
import json
import math
import os
import pathlib
import shutil

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from repo_jax.distributed import primary
from repo_jax.export import SHARD_BYTES, replacing
from repo_jax.models import hf
from repo_jax.models.config import DecoderConfig
from repo_jax.models.decoder import param_shapes
from repo_jax.models.hub import TEXTS, ModelFiles, find_model
from repo_jax.models.pretrained import open_model
from repo_jax.sharding import make_mesh

CACHE = "~/.cache/repo_jax"  # where models at a URL are kept
# What describes the weights of the model that was read, or that model itself, and not those that are written.
OWN = ("model.safetensors.index.json", "adapter_config.json", "README.md")


def from_hf(
    model: str | os.PathLike, *, dtype: str = "float32", mesh: Mesh | None = None, revision: str | None = None
) -> tuple[dict, DecoderConfig]:
    """The parameters of a model and its configuration, for repo_jax.models.decoder.Decoder(cfg, jnp.float32).

    `model` is a folder, a URL or ORG/NAME; a PEFT adapter is added to the weights it belongs to. The parameters are a nested dict of jax
    arrays in `dtype` (float32 or bfloat16) whose names end in their axes (q_DNH: D width, N heads, H head size; cfg has the sizes, layers are
    stacked along L), spread over `mesh`, by default over as many of this machine's devices as divide D. Raises ValueError or FileNotFoundError
    for a folder that is not whole, or that is of no family known here.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype={dtype!r}; choose one of float32, bfloat16")
    found = open_model(_files(model, revision))
    if mesh is None:
        ways = math.gcd(found.cfg.D, jax.device_count())
        mesh = make_mesh(1, ways, 1, devices=jax.devices()[:ways])
    return found.params(mesh, dtype), found.cfg


def to_hf(
    params: dict,
    cfg: DecoderConfig,
    folder: str | os.PathLike,
    *,
    base: str | os.PathLike,
    dtype: str | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    revision: str | None = None,
) -> pathlib.Path:
    """Writes parameters as a Hugging Face folder that transformers loads, and returns its path: safetensors of ours, configuration, generation
    configuration and tokenizer of `base`, the model that the parameters were read from (a folder, a URL, ORG/NAME).

    Tensors get the dtypes they have in `base`, or all of them `dtype` (float32, bfloat16 or float16): what from_hf has read is written back
    bit for bit. `params` are jax or numpy arrays, as from_hf gives them, on any mesh. The folder is whole or not there. Raises ValueError where
    params, cfg and base do not belong together, or the folder holds something already.
    """
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={dtype!r}; choose one of float32, bfloat16, float16, or None for those of base")
    folder, files = pathlib.Path(os.path.expanduser(folder)), _files(base, revision)
    theirs = DecoderConfig.from_hf(files.weights)
    if cfg != theirs:
        other = [f.name for f in dataclasses.fields(cfg) if getattr(cfg, f.name) != getattr(theirs, f.name)]
        raise ValueError(
            f"cfg is not that of base '{base}': {_differences(cfg, theirs, other)}; name the model that cfg came with"
        )
    _check(params, cfg)
    with replacing(folder) as new:
        if primary():
            _copy_texts(files, new, dtype)
        hf.to_hf(
            params,
            cfg,
            new,
            dtypes=dtype or hf.stored_dtypes(files.weights, cfg),
            max_shard_bytes=max_shard_bytes,
        )
    return folder


def _files(model: str | os.PathLike, revision: str | None) -> ModelFiles:
    return find_model(os.path.expanduser(model), revision=revision, cache_dir=CACHE)


def _differences(one: DecoderConfig, other: DecoderConfig, names: list[str]) -> str:
    return ", ".join(f"{name} {getattr(one, name)!r} and {getattr(other, name)!r}" for name in names[:4])


def _check(params: dict, cfg: DecoderConfig) -> None:
    """Whether these are all parameters of the configuration, and nothing else, in their shapes."""
    wanted = {name: leaf.shape for name, leaf in flatten_dict(param_shapes(cfg), sep="/").items()}
    given = {name: np.shape(leaf) for name, leaf in flatten_dict(params, sep="/").items()}
    faults = [f"missing {name}" for name in wanted.keys() - given.keys()]
    faults += [f"unexpected {name}" for name in given.keys() - wanted.keys()]
    faults += [
        f"{name} has shape {given[name]}, wanted {wanted[name]}"
        for name in wanted.keys() & given.keys()
        if wanted[name] != given[name]
    ]
    if faults:
        raise ValueError(f"params are not those of cfg: {'; '.join(sorted(faults)[:6])}")


def _copy_texts(files: ModelFiles, folder: pathlib.Path, dtype: str | None) -> None:
    for source in dict.fromkeys((files.weights, files.tokenizer)):
        for pattern in TEXTS:
            for path in source.glob(pattern):
                if path.name not in OWN:
                    shutil.copyfile(path, folder / path.name)
    if dtype is not None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"dtype": dtype}
        config.pop("torch_dtype", None)  # transformers 4's name of dtype
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
