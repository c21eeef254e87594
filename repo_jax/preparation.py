"""Everything that can be wrong with what a user gave, found before the first device computation."""

import dataclasses
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from repo_jax.config import Recipe
from repo_jax.data.batches import steps_per_epoch
from repo_jax.data.chat import load_tokenizer
from repo_jax.data.rows import RowShape, suggest_row_length, suggest_scored_length, too_long
from repo_jax.data.schema import resolve_split
from repo_jax.data.store import TokenStore, open_store
from repo_jax.losses import DEFAULT_LOSS, Loss, make_loss
from repo_jax.models.config import DecoderConfig
from repo_jax.models.decoder import Decoder, param_shapes
from repo_jax.models.hf import TensorFiles, check_tensors
from repo_jax.sharding import batch_ways, make_mesh, param_shardings


class Setup(NamedTuple):
    """A recipe whose every value has been looked at."""

    recipe: Recipe  # with the loss's defaults and the dtype that auto stands for filled in
    loss: Loss
    hparams: dict[str, float]
    cfg: DecoderConfig
    tokenizer: object
    train: TokenStore | None
    held_out: TokenStore | None
    mesh: Mesh
    shape: RowShape
    total_steps: int

    @property
    def model(self) -> Decoder:
        one_cpu = self.mesh.size == 1 and jax.default_backend() == "cpu"
        dtype = jnp.dtype(self.recipe.model.compute_dtype)
        return Decoder(self.cfg, dtype, self.recipe.model.remat, attention="blocked" if one_cpu else "dense")


def compute_dtype(name: str, device) -> str:
    """auto is bfloat16 where the hardware multiplies it fast: TPUs, NVIDIA GPUs from Ampere on, AMD's."""
    if name != "auto":
        return name
    capability = getattr(device, "compute_capability", "0")  # "9.0" on NVIDIA, "gfx90a" on AMD
    fast = device.platform == "tpu" or capability.startswith("gfx") or float(capability) >= 8
    return "bfloat16" if fast else "float32"


def set_up(recipe: Recipe, *, training: bool) -> Setup:
    """Loss, model, tokens, rows and mesh of a recipe; for training also how many updates there are.

    Raises ValueError or FileNotFoundError with a message that says what to change.
    """
    loss, hparams = make_loss(**recipe.loss)
    cfg = DecoderConfig.from_hf(recipe.model.model_name_or_path)
    check_tensors(TensorFiles(recipe.model.model_name_or_path), cfg)
    tokenizer = load_tokenizer(
        recipe.model.model_name_or_path, chat_template=recipe.model.chat_template, eos_token=recipe.model.eos_token
    )
    if (largest := len(tokenizer)) > cfg.V:
        raise ValueError(
            f"the tokenizer has {largest} tokens but the model embeds {cfg.V}; give the tokenizer that belongs to the model"
        )
    train_path, held_out_path = _paths(recipe, training=training)
    train = _open(train_path, recipe, cfg, tokenizer)
    held_out = _open(held_out_path, recipe, cfg, tokenizer)
    mesh = make_mesh(recipe.mesh.data, recipe.mesh.fsdp, recipe.mesh.tensor)
    param_shardings(param_shapes(cfg), mesh)
    shape = _row_shape(recipe, [store for store in (train, held_out) if store is not None], mesh)
    total_steps = _total_steps(recipe, train) if training else 0
    model = dataclasses.replace(recipe.model, compute_dtype=compute_dtype(recipe.model.compute_dtype, jax.devices()[0]))
    recipe = dataclasses.replace(recipe, model=model, loss={"loss_type": DEFAULT_LOSS} | recipe.loss | hparams)
    return Setup(recipe, loss, hparams, cfg, tokenizer, train, held_out, mesh, shape, total_steps)


def _paths(recipe: Recipe, *, training: bool) -> tuple[pathlib.Path | None, pathlib.Path | None]:
    data = recipe.data
    train = held_out = None
    if training:
        if data.dataset_name is None:
            raise ValueError(
                "recipe.data.dataset_name is not set; give a .jsonl file of preference pairs, or a folder of them"
            )
        train = resolve_split(data.dataset_name, data.dataset_train_split)
    if data.eval_dataset_name is not None:
        held_out = resolve_split(data.eval_dataset_name, data.dataset_test_split)
    elif data.dataset_name is not None and pathlib.Path(data.dataset_name).is_dir():
        held_out = resolve_split(data.dataset_name, data.dataset_test_split)
    if recipe.run.eval_steps is not None and held_out is None:
        raise ValueError(
            f"eval_steps={recipe.run.eval_steps} but there are no held-out pairs; give eval_dataset_name, or leave eval_steps out"
        )
    if not training and held_out is None:
        raise ValueError("there is nothing to evaluate on; give --data a .jsonl file of preference pairs")
    return train, held_out


def _open(path, recipe: Recipe, cfg: DecoderConfig, tokenizer) -> TokenStore | None:
    if path is None:
        return None
    max_length = recipe.data.max_length or cfg.max_positions
    if max_length > cfg.max_positions:
        raise ValueError(
            f"max_length={max_length} but the model has {cfg.max_positions} positions; lower max_length to at most that"
        )
    return open_store(path, tokenizer, max_length=max_length, cache_dir=recipe.data.cache_dir)


def _row_shape(recipe: Recipe, stores: list[TokenStore], mesh: Mesh) -> RowShape:
    slots = np.concatenate([store.slots for store in stores])
    scored = np.concatenate([store.scored for store in stores])
    T = recipe.data.row_length or suggest_row_length(slots)
    S = recipe.data.scored_length or suggest_scored_length(slots, scored, T)
    for size, room in (("slots", T), ("scored", S)):
        store = max(stores, key=lambda store: getattr(store, size).max())
        largest = int(getattr(store, size).argmax())
        if getattr(store, size)[largest] > room:
            raise too_long(store[largest], T, S)
    return RowShape(recipe.data.rows_per_device * batch_ways(mesh), T, S)


def _total_steps(recipe: Recipe, train: TokenStore) -> int:
    steps = steps_per_epoch(len(train), recipe.optim.train_batch_size)
    return recipe.optim.max_steps or max(1, round(steps * recipe.optim.num_train_epochs))
