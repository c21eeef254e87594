"""Everything that can be wrong with what a user gave, found before the first device computation."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from repo_jax.config import Recipe
from repo_jax.data.batches import steps_per_epoch
from repo_jax.data.rows import RowShape, suggest_row_length, suggest_scored_length, too_long
from repo_jax.data.store import TokenStore
from repo_jax.losses import DEFAULT_LOSS, Loss, make_loss
from repo_jax.models.config import DecoderConfig
from repo_jax.models.decoder import Decoder, param_shapes
from repo_jax.models.hf import TensorFiles, check_tensors
from repo_jax.sharding import batch_ways, make_mesh, param_shardings
from repo_jax.stores import held_out_store, tokenizer_of, train_store


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
    tokenizer = tokenizer_of(recipe)
    if (largest := len(tokenizer)) > cfg.V:
        raise ValueError(
            f"the tokenizer has {largest} tokens but the model embeds {cfg.V}; give the tokenizer that belongs to the model"
        )
    train = train_store(recipe, tokenizer) if training else None
    held_out = held_out_store(recipe, tokenizer)
    if held_out is None and not training:
        raise ValueError("there is nothing to evaluate on; give --data a file of preference pairs")
    if held_out is None and recipe.run.eval_steps is not None:
        raise ValueError(
            f"eval_steps={recipe.run.eval_steps} but there are no held-out pairs; give eval_dataset_name, or leave eval_steps out"
        )
    for store in (train, held_out):
        if store is not None and store.unpaired:
            raise ValueError(
                f"'{store.name}' is unpaired (prompt, completion, label) but loss '{recipe.loss.get('loss_type', DEFAULT_LOSS)}' compares two answers; give pairs"
            )
    mesh = make_mesh(recipe.mesh.data, recipe.mesh.fsdp, recipe.mesh.tensor)
    param_shardings(param_shapes(cfg), mesh)
    shape = _row_shape(recipe, [store for store in (train, held_out) if store is not None], mesh)
    total_steps = _total_steps(recipe, train) if training else 0
    model = dataclasses.replace(recipe.model, compute_dtype=compute_dtype(recipe.model.compute_dtype, jax.devices()[0]))
    recipe = dataclasses.replace(recipe, model=model, loss={"loss_type": DEFAULT_LOSS} | recipe.loss | hparams)
    return Setup(recipe, loss, hparams, cfg, tokenizer, train, held_out, mesh, shape, total_steps)


def _row_shape(recipe: Recipe, stores: list[TokenStore], mesh: Mesh) -> RowShape:
    slots = np.concatenate([store.slots for store in stores])
    scored = np.concatenate([store.scored.sum(axis=1) for store in stores])
    T = recipe.data.row_length or suggest_row_length(slots)
    S = recipe.data.scored_length or suggest_scored_length(slots, scored, T)
    for sizes, room in ((slots, T), (scored, S)):
        if sizes.max() > room:
            largest = int(sizes.argmax())
            store = stores[0] if largest < len(stores[0]) else stores[1]
            raise too_long(store[largest - (store is not stores[0]) * len(stores[0])], T, S)
    return RowShape(recipe.data.rows_per_device * batch_ways(mesh), T, S)


def _total_steps(recipe: Recipe, train: TokenStore) -> int:
    steps = steps_per_epoch(len(train), recipe.optim.train_batch_size)
    return recipe.optim.max_steps or max(1, round(steps * recipe.optim.num_train_epochs))
