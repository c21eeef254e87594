"""Out of memory: what is held on the devices, and what to change."""

import contextlib
import math
import os
import re
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from repo_jax.config import Recipe, StoppedError
from repo_jax.data.rows import RowShape, round_up
from repo_jax.distributed import from_primary
from repo_jax.models.config import DecoderConfig
from repo_jax.preparation import Setup, slots_per_device
from repo_jax.sharding import batch_ways
from repo_jax.state import TrainState
from repo_jax.step import recomputed, rooms

GIB = 2**30
# XLA's words on CPU, GPU and TPU, at run time and when it compiles.
WORDS = re.compile(r"out of memory|out_of_memory|alloc|reserve|hbm", re.IGNORECASE)
# A kernel that outgrows a core's own memory is another matter.
ON_CHIP = re.compile(r"vmem|smem|shared memory", re.IGNORECASE)
FRACTION = "XLA_CLIENT_MEM_FRACTION"
FRACTIONS = (FRACTION, "XLA_PYTHON_CLIENT_MEM_FRACTION")  # its older name; JAX refuses both together


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host in its place, had no room for an array or a program."""
    text = str(error)
    return (
        isinstance(error, jax.errors.JaxRuntimeError)
        and ("RESOURCE_EXHAUSTED" in text or "OUT_OF_MEMORY" in text)
        and WORDS.search(text) is not None
        and ON_CHIP.search(text) is None
    )


def bytes_per_device(shapes, shardings) -> int:
    """What a tree of arrays (or ShapeDtypeStructs) takes on each device under these shardings."""
    sizes = jax.tree.map(
        lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize, shapes, shardings
    )
    return sum(jax.tree.leaves(sizes))


def held_in_training(
    shapes: TrainState, shardings: TrainState, frozen: dict | None, live: dict | None = None
) -> dict[str, int]:
    """Bytes per device by kind, from before the first update to the end; `live` is a reference model that stays."""
    grads = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), shapes.params)
    held = {
        "parameters" if frozen is None else "adapters": bytes_per_device(shapes.params, shardings.params),
        "gradients": bytes_per_device(grads, shardings.params),
        "moments": bytes_per_device(shapes.opt_state, shardings.opt_state),
    }
    if live is not None:
        held["reference parameters"] = held_in_scoring(live)["parameters"]
    if frozen is None:
        return held
    return {"frozen parameters": held_in_scoring(frozen)["parameters"]} | held


def held_in_scoring(params: dict, live: dict | None = None) -> dict[str, int]:
    """Bytes per device of a model that is not trained, and of a reference model beside it: arrays or ShapeDtypeStructs with shardings."""
    models = {"parameters": params} | ({} if live is None else {"reference parameters": live})
    return {
        kind: bytes_per_device(model, jax.tree.map(lambda leaf: leaf.sharding, model)) for kind, model in models.items()
    }


# Of the memory that is free beside what training holds and what its programs need by formula, what layer inputs may take.
FOR_LAYER_INPUTS = 0.25


def layer_inputs(cfg: DecoderConfig, dtype, mesh: Mesh, slots: int) -> int:
    """Bytes per device of what every layer is given in so many slots, and of what the last one makes, in the form in which they wait."""
    share = math.ceil(cfg.D / mesh.size)
    if mesh.devices.flat[0].platform == "tpu":
        share = round_up(share, 128)  # the width of a register, which TPUs fill up
    return (cfg.L + 1) * slots * share * jnp.dtype(dtype).itemsize


def keeps_layer_inputs(recipe: Recipe, cfg: DecoderConfig, mesh: Mesh, size: int, free: float) -> bool:
    """Whether two passes keep layer inputs, which take `size` bytes of those that are free on a device: as the recipe says, or where it is
    of use, they are few, and no slow network lies between the devices that hold them."""
    asked = recipe.optim.keep_layer_inputs
    if recipe.optim.mode == "direct" or asked is not None:
        return bool(asked)
    possible = cfg.D % mesh.size == 0 and len({_near(device) for device in mesh.devices.flat}) == 1
    return possible and recomputed(recipe.model.remat) > 0.5 and size <= FOR_LAYER_INPUTS * free


def _near(device) -> int:
    """The slice of a TPU, the host of a GPU: within it links are fast."""
    return device.process_index if device.platform == "gpu" else getattr(device, "slice_index", 0)


def temporaries(remat: str, cfg: DecoderConfig, tokens: int, tensor: int, width: int, *, adapts: bool) -> float:
    """Bytes of a forward and backward pass beyond its arguments, by formula: what layers keep, one layer at work, and the head. `tokens` are
    those of a device, `width` the bytes of a number."""
    heads, keys = cfg.N * cfg.H / tensor, cfg.K * cfg.H / tensor
    results = heads + 2 * keys + 2 * cfg.D + 2 * cfg.F / tensor  # of weight matmuls
    kept = {
        "offload": 0,
        "full": cfg.D,
        "attention": cfg.D + heads + 2 * cfg.N / tensor,
        "dots": cfg.D + results,
        "none": 5 * cfg.D + 2 * results + 3 * cfg.F / tensor,
    }[remat]
    layer = (cfg.D * cfg.H * (2 * cfg.N + 2 * cfg.K) + 3 * cfg.D * cfg.F) / tensor
    head = cfg.padded_V * cfg.D / tensor
    # The head gathered, and its gradient in float32; one chunk of logits; two layers gathered and a layer's gradients.
    fixed = (
        head * (width + (0 if adapts else 4)) + 1024 * cfg.padded_V / tensor * 4 + layer * width * (2 if adapts else 3)
    )
    return fixed + tokens * width * (kept * cfg.L + results + 3 * cfg.F / tensor + 4 * cfg.D)


def at_work(recipe: Recipe, cfg: DecoderConfig, mesh: Mesh, shape: RowShape) -> float:
    """Temporaries of row batches of this shape, for a recipe whose dtypes are filled in."""
    tokens, width = shape.R // batch_ways(mesh) * shape.T, jnp.dtype(recipe.model.compute_dtype).itemsize
    adapts = recipe.model.use_peft
    return temporaries(recipe.model.remat, cfg, tokens, mesh.shape["tensor"], width, adapts=adapts)


def kept_slots(setup: Setup, held: dict[str, int]) -> tuple[int, dict[str, int]]:
    """Of how many slots two passes of this run keep layer inputs, those of a large update, and {"layer inputs": bytes per device}; 0 and {}
    where they do not. The same on all hosts."""
    B, mesh = setup.recipe.optim.train_batch_size * (1 + len(setup.loss.groups)), setup.mesh
    shape = setup.shapes[0]
    R, T, *_ = shape
    # Of random updates one in a thousand has more slots; and some stay empty.
    slots = B * float(setup.train.slots.mean()) + 3 * math.sqrt(B) * float(setup.train.slots.std())
    batches = rooms(math.ceil(1.05 * slots / (R * T)))
    size = layer_inputs(setup.cfg, setup.recipe.model.compute_dtype, mesh, batches * R * T)
    device = mesh.local_devices[0]
    limit = room(device) or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / jax.local_device_count()
    free = limit - sum(held.values()) - at_work(setup.recipe, setup.cfg, mesh, shape)
    keeps = keeps_layer_inputs(setup.recipe, setup.cfg, mesh, size, free)
    return (batches * R * T, {"layer inputs": size}) if from_primary(np.bool_(keeps)) else (0, {})


def room(device) -> int | None:
    """How many bytes programs may use on a device, where it says."""
    return (device.memory_stats() or {}).get("bytes_limit")


def explain(error: BaseException, held: dict[str, int], device, advice: list[str]) -> str:
    """What is said instead of a traceback: bytes per device by kind, and what helps, cheapest first."""
    limit, total = room(device), sum(held.values())
    return "\n".join(
        [
            f"out of memory on {device.device_kind}" + (f" ({limit / GIB:.2f} GiB)" if limit else ""),
            *(f"  {size / GIB:8.2f} GiB  {name}" for name, size in held.items()),
            f"  {total / GIB:8.2f} GiB  on each device before any row is computed, and then",
            f"  {str(error).strip().splitlines()[0]}",
            "what helps, cheapest first:",
            *(f"  {line}" for line in advice),
        ]
    )


@contextlib.contextmanager
def explained(mesh: Mesh, held: dict[str, int], advice: Callable[[], list[str]]) -> Iterator[None]:
    """Turns running out of memory in its body into a StoppedError that says what is held and what helps."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise StoppedError(explain(error, held, mesh.local_devices[0], advice())) from None


def what_helps(recipe: Recipe, mesh: Mesh, held: dict[str, int]) -> list[str]:
    """What would need less memory and is not done yet by a recipe whose every `auto` is filled in, cheapest first."""
    model, data, optim = recipe.model, recipe.data, recipe.optim
    device, limit = mesh.local_devices[0], room(mesh.local_devices[0])
    total = sum(size for kind, size in held.items() if kind != "layer inputs")
    full = "gradients" in held and "adapters" not in held  # all parameters are trained
    found = []

    def saves(size: int) -> str:
        return f"saves {size / GIB:.2f} GiB"

    if device.platform == "gpu" and not any(name in os.environ for name in FRACTIONS):
        found.append(f"{FRACTION}=0.95 in the environment (JAX takes 0.75 of a GPU unless told otherwise)")
    if limit is None or total < limit:  # else rows are not what there is no room for
        if data.rows_per_device is None:
            slots = data.slots_per_device or slots_per_device(device.platform)
            found.append(f"slots_per_device: {slots // 2} (now {slots}; the same result in more passes)")
        elif data.rows_per_device > 1:
            found.append(
                f"rows_per_device: {data.rows_per_device // 2} (now {data.rows_per_device}; the same result in more passes)"
            )
        if "gradients" in held and model.remat not in ("full", "offload"):
            found.append(f"remat: full (now {model.remat}; layers are computed twice instead of kept)")
    if "layer inputs" in held:
        found.append(f"keep_layer_inputs: false ({saves(held['layer inputs'])}; two passes compute more)")
    if (ways := mesh.shape["data"]) > 1:
        fsdp = ways * mesh.shape["fsdp"]
        found.append(
            f"mesh.data: 1 and mesh.fsdp: {fsdp} (no longer the same on {ways} devices; {saves(total - total // ways)})"
        )
    if full and optim.optim == "adamw" and optim.moment_dtype == "float32":
        found.append(f"moment_dtype: bfloat16 ({saves(held['moments'] // 4)})")
    if full and optim.optim == "lion" and optim.moment_dtype == "float32":
        found.append(f"moment_dtype: bfloat16, with adam_beta2: 0.99 ({saves(held['moments'] // 2)})")
    if full and optim.optim != "adafactor":
        found.append(f"optim: adafactor ({saves(held['moments'])})")
    if model.param_dtype == "float32":
        kept = held.get("frozen parameters", held.get("parameters", 0))
        found.append(f"param_dtype: bfloat16 ({saves(kept // 2)})")
    if full:
        found.append(f"use_peft: true, which trains adapters ({saves(held['gradients'] + held['moments'])})")
    found.append("a lower max_length (longer pairs are dropped or cut, and rows are shorter)")
    found.append("more devices, over which mesh.fsdp splits all of the above")
    return found
