"""The programs of an update without an array in them: shapes that know where they would live, to be compiled for any devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from repo_jax.config import Recipe
from repo_jax.data.rows import Known, RowBatch, RowShape
from repo_jax.logps import is_live
from repo_jax.losses import make_loss
from repo_jax.memory import held_in_training, layer_inputs
from repo_jax.models.config import DecoderConfig
from repo_jax.models.decoder import param_shapes
from repo_jax.models.lora import adapter_shapes
from repo_jax.optimizer import make_optimizer
from repo_jax.preparation import decoder
from repo_jax.sharding import BATCH, batch_ways, param_shardings
from repo_jax.state import TrainState, state_shapes, state_shardings, variables_of
from repo_jax.step import (
    HELD,
    Gathered,
    Slopes,
    add_direct,
    add_weighted,
    bound,
    hold,
    no_kept,
    no_pairs,
    score,
    score_and_keep,
    take,
    takes_two_passes,
    update,
)


def with_dtypes(recipe: Recipe) -> Recipe:
    """The recipe with the dtypes that auto stands for on the accelerators that can be planned for, which all multiply bfloat16 fast."""
    model = recipe.model
    compute = "bfloat16" if model.compute_dtype == "auto" else model.compute_dtype
    kept = compute if model.use_peft else "float32"
    param = kept if model.param_dtype == "auto" else model.param_dtype
    return dataclasses.replace(recipe, model=dataclasses.replace(model, compute_dtype=compute, param_dtype=param))


def trained_and_frozen(recipe: Recipe, cfg: DecoderConfig) -> tuple[dict, dict | None]:
    """The shapes of what an update changes and of what adapters lie over, None where all parameters are trained."""
    model = recipe.model
    whole = param_shapes(cfg, model.param_dtype)
    if not model.use_peft:
        return whole, None
    return adapter_shapes(cfg, model.lora_r, model.lora_target_modules), whole


def sharded(shapes, shardings):
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )


class Held:
    """What an update of the recipe keeps on each device of a mesh, which need not be one of devices (AbstractMesh)."""

    def __init__(self, recipe: Recipe, cfg: DecoderConfig, mesh):
        trained, frozen = trained_and_frozen(recipe, cfg)
        self.optimizer, loss = make_optimizer(recipe.optim, 100), make_loss(**recipe.loss)[0]
        self.shapes = state_shapes(trained, self.optimizer, loss)
        self.shardings: TrainState = state_shardings(self.shapes, self.optimizer, mesh)
        self.frozen = None if frozen is None else sharded(frozen, param_shardings(frozen, mesh))
        whole = sharded(param_shapes(cfg, recipe.model.param_dtype), param_shardings(param_shapes(cfg), mesh))
        # Under adapters the frozen parameters are the reference model, unless another is named.
        other = self.frozen is None or recipe.model.reference_model_name_or_path is not None
        self.live = {"params": whole if other else self.frozen} if is_live(loss) else None
        beside = whole if self.live is not None and other else None
        self.bytes = held_in_training(self.shapes, self.shardings, self.frozen, beside)


class Programs:
    """The programs of an update on batches of one shape, jitted as Scorer and TrainStep do it; calling with a name compiles.

    The recipe's dtypes are filled in (with_dtypes). `keeps` is of how many row batches two passes keep layer inputs; 0: they do not.
    """

    def __init__(self, recipe: Recipe, cfg: DecoderConfig, mesh: Mesh, shape: RowShape, keeps: int = 0):
        loss, hparams = bound(*make_loss(**recipe.loss))
        B = recipe.optim.train_batch_size * (1 + len(loss.groups))
        held = Held(recipe, cfg, mesh)
        self.cfg, self.mesh, self.model = cfg, mesh, decoder(recipe.model, cfg, mesh)
        self.loss, self.mode = loss, recipe.optim.mode
        self.optimizer, self.shardings, self.held, self.frozen = held.optimizer, held.shardings, held.bytes, held.frozen
        self.live = held.live
        self.everywhere = NamedSharding(mesh, P())
        self.state = sharded(held.shapes, held.shardings)
        self.hparams = {name: self._whole((), jnp.float32) for name in hparams}
        one_B2 = self._whole((B, 2), jnp.float32)
        self.slopes = Slopes(one_B2, {name: one_B2 for name in loss.terms})
        columns = {name: self._whole((B,), jnp.float32) for name in loss.columns}
        columns |= {name: one_B2 for name in loss.answer_columns}
        self.known = Known(one_B2, one_B2 if loss.reference else None, columns)
        self.pairs = self._everywhere(jax.eval_shape(lambda: no_pairs(B, loss.terms)))
        self.dropout = self._everywhere(jax.eval_shape(lambda: jax.random.key(0))) if self.model.lora_dropout else None
        (R, T, S, Y), rows = shape, NamedSharding(mesh, BATCH)
        ints = {name: (R, T) for name in ("tokens_RT", "positions_RT", "segments_RT", "prompts_RT")}
        ints |= {name: (R, S) for name in ("targets_RS", "sources_RS", "answers_RS")}
        ints |= {"views_R2Y": (R, 2, Y)} if Y else {}
        self.batch = RowBatch(
            **{name: jax.ShapeDtypeStruct(size, jnp.int32, sharding=rows) for name, size in ints.items()},
            filled_B=self._whole((B,), bool),
        )
        self.waiting, self.row_batch, self.kept, self.held_kept = 0, 0, None, None  # bytes per device, and shapes
        if keeps:
            self.row_batch = (cfg.L + 1) * (R // batch_ways(mesh)) * T * cfg.D * self.model.dtype.itemsize
            self.waiting = layer_inputs(cfg, self.model.dtype, mesh, keeps * R * T)
            held = jax.eval_shape(lambda: no_kept(self.model, keeps * R * T))
            self.held_kept = self._spread(held, HELD)
            one = {
                stack: jax.ShapeDtypeStruct((leaf.shape[0], R, T, cfg.D), leaf.dtype) for stack, leaf in held.items()
            }
            self.kept = self._spread(one, P(None, *BATCH))

    @property
    def names(self) -> tuple[str, ...]:
        """Those that a run may take, evaluations among it, the largest first but for what waits beside it."""
        passes = ("add_weighted", "score", *(("hold", "take") if self.kept else ()), "update")
        if takes_two_passes(self.loss) or self.mode == "two_pass":
            return passes
        return ("add_direct", *passes[self.mode == "direct" :])

    def _spread(self, tree, spec):
        sharding = NamedSharding(self.mesh, spec)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)

    def _whole(self, shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.everywhere)

    def _everywhere(self, tree):
        return jax.tree.map(lambda leaf: self._whole(leaf.shape, leaf.dtype), tree)

    def __call__(self, name: str, compiler_options: dict | None = None):
        """The compiled program. Raises JaxRuntimeError where a TPU's compiler finds that it does not fit."""
        fn, args, out_shardings = PROGRAMS[name](self)
        platform = self.mesh.devices.flat[0].platform
        with jax.set_mesh(self.mesh):
            used_up = () if name == "take" else 0
            traced = jax.jit(fn, donate_argnums=used_up, out_shardings=out_shardings).trace(*args)
            lowered = traced.lower(lowering_platforms=({"gpu": "cuda"}.get(platform, platform),))
            return lowered.compile(compiler_options or None)

    def beside(self, name: str) -> int:
        """Bytes that a device holds while the program runs and that are none of its arguments."""
        if name in ("hold", "take"):
            return sum(self.held.values())
        waiting = self.waiting if name in ("score", "add_weighted") else 0
        # The optimizer sees no frozen parameters, and every other program no moments.
        kinds = ("frozen parameters", "reference parameters") if name == "update" else ("moments",)
        return waiting + sum(self.held.get(kind, 0) for kind in kinds)

    @property
    def grads(self):
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding), self.state.params
        )

    def score(self):
        args = (self.pairs, variables_of(self.state.params, self.frozen, self.live), self.batch)
        form, out_shardings = (score, self.everywhere) if self.kept is None else (score_and_keep, self._of(self.kept))
        return functools.partial(form, model=self.model, terms=self.loss.terms), args, out_shardings

    def _of(self, kept):
        return self.everywhere, jax.tree.map(lambda leaf: leaf.sharding, kept)

    def hold(self):
        args = (self.held_kept, self.kept, self._whole((), jnp.int32))
        return hold, args, jax.tree.map(lambda leaf: leaf.sharding, self.held_kept)

    def take(self):
        slots_RT = self._whole(self.batch.tokens_RT.shape, jnp.int32)
        return take, (self.held_kept, slots_RT), jax.tree.map(lambda leaf: leaf.sharding, self.kept)

    def add_direct(self):
        fn = functools.partial(add_direct, model=self.model, loss=self.loss)
        gathered = Gathered(self.grads, self.pairs)
        progress = self._whole((), jnp.float32)
        of_pairs = self.batch, self.known, self.hparams, progress
        args = (gathered, self.state.params, self.frozen, self.live, *of_pairs, self.dropout)
        return fn, args, Gathered(self.shardings.params, self.everywhere)

    def add_weighted(self):
        fn = functools.partial(add_weighted, model=self.model)
        args = (self.grads, self.state.params, self.frozen, self.live, self.batch, self.slopes, self.kept)
        return fn, args, self.shardings.params

    def update(self):
        fn = functools.partial(update, optimizer=self.optimizer)
        args = (self.state, self.grads, *(self._whole((), jnp.float32),) * 2, self.state.loss_state)
        return fn, args, (self.shardings, self.everywhere, self.everywhere)


PROGRAMS = {
    "score": Programs.score,
    "hold": Programs.hold,
    "take": Programs.take,
    "add_weighted": Programs.add_weighted,
    "add_direct": Programs.add_direct,
    "update": Programs.update,
}
