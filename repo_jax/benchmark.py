"""How fast a recipe's updates are on this machine: its real step on its real pairs, with nothing written.

Axis letters: B pairs of the global batch; 2 is (chosen, rejected).
"""

import dataclasses
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Iterator
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from repo_jax.config import Recipe
from repo_jax.data.batches import batch_indices
from repo_jax.data.schema import PairTokens
from repo_jax.flops import flops_of, lengths_of
from repo_jax.hardware import chip_of, peak_memory
from repo_jax.losses import title_of
from repo_jax.memory import explained, held_in_training, kept_slots, what_helps
from repo_jax.models.config import DecoderConfig
from repo_jax.models.decoder import param_shapes
from repo_jax.models.lora import init_adapters
from repo_jax.models.pretrained import Pretrained
from repo_jax.optimizer import is_matrix, make_optimizer
from repo_jax.preparation import Setup, keep_programs, set_up
from repo_jax.progress import Compiled, compiled
from repo_jax.reference import live_reference, with_any_reference
from repo_jax.state import TrainState, initial_state, state_shapes, state_shardings, variables_of
from repo_jax.step import Scorer, TrainStep
from repo_jax.stores import model_files


class Untrained(Pretrained):
    """A model of which there is a configuration alone; its weights are drawn at random, as small as before pretraining."""

    def params(self, mesh: Mesh, dtype: str) -> dict:
        shapes = self.shapes(mesh, dtype)
        paths, treedef = jax.tree_util.tree_flatten_with_path(shapes)

        def draw(key):
            leaves = []
            for i, (path, leaf) in enumerate(paths):
                if is_matrix(path):
                    drawn = 0.02 * jax.random.normal(jax.random.fold_in(key, i), leaf.shape, leaf.dtype)
                else:
                    one = "norm" in path[-1].key and not self.cfg.unit_offset_norm
                    drawn = jnp.full(leaf.shape, float(one), leaf.dtype)
                leaves.append(drawn)
            return jax.tree.unflatten(treedef, leaves)

        return jax.jit(draw, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, shapes))(jax.random.key(0))


def prepare(recipe: Recipe, *, weights: Literal["read", "random"] = "read") -> Setup:
    """The recipe looked at as for training; nothing is made of its output folder.

    With random weights the model's folder needs no more than config.json and a tokenizer. Raises ValueError or FileNotFoundError.
    """
    unpushed = {"push_to_hub": False, "hub_model_id": None, "hub_revision": None, "hub_private_repo": None}
    recipe = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, **unpushed))
    if weights == "read":
        return set_up(recipe, training=True)
    files = model_files(recipe)
    return set_up(recipe, training=True, pretrained=Untrained(files, DecoderConfig.from_hf(files.weights), None))


class Run(NamedTuple):
    """What updates are done with."""

    scorer: Scorer
    step: TrainStep
    frozen: dict | None
    live: dict | None


def bench(setup: Setup, *, steps: int, warmup: int, split_steps: int) -> dict:
    """Times `steps` updates after `warmup` others, then takes a few more apart; everything it found, ready for JSON."""
    began, setup = compiled(), with_any_reference(setup)
    keep_programs(setup.recipe.run.compile_cache_dir)
    optimizer = make_optimizer(setup.recipe.optim, setup.total_steps)
    shapes = state_shapes(setup.trained_shapes, optimizer, setup.loss)
    shardings = state_shardings(shapes, optimizer, setup.mesh)
    held = held_in_training(shapes, shardings, setup.frozen_shapes, setup.live_shapes)
    slots, kept = kept_slots(setup, held)
    with explained(setup.mesh, held, lambda: what_helps(setup.recipe, setup.mesh, held | kept)):
        run, state = _start(setup, optimizer, shapes, shardings, keeps=slots)
        batches = _batches(setup)
        state, _ = measure(run.step, state, batches, warmup)
        warm = compiled()
        state, measured = measure(run.step, state, batches, steps)
        late, memory = compiled().since(warm), peak_memory(setup.mesh.local_devices)
        parts = split(setup, run, state, batches, split_steps) if split_steps else None
    found = {
        **about(setup),
        "steps": steps,
        "warmup": warmup,
        **speed(setup, measured, held),
        "split": parts,
        **memory,
        "padding_fraction": _mean(one.metrics["padding_fraction"] for one in measured),
        "active_fraction": _mean(one.metrics["active_fraction"] for one in measured),
        "active_token_fraction": _mean(one.metrics["active_token_fraction"] for one in measured),
        "keeps_layer_inputs": bool(kept),
        "two_pass_fraction": _mean(one.metrics["two_pass"] for one in measured),
        "shapes": [list(shape) for shape in setup.shapes],
        "compilations": {**_compilations(warm.since(began)), "while_measured": late.programs},
    }
    return found


def _start(setup: Setup, optimizer, shapes: TrainState, shardings: TrainState, *, keeps: int) -> tuple[Run, TrainState]:
    model, optim, run = setup.recipe.model, setup.recipe.optim, setup.recipe.run
    frozen = setup.pretrained.params(setup.mesh, model.param_dtype) if model.use_peft else None
    if frozen is None:
        params = setup.pretrained.params(setup.mesh, model.param_dtype)
    else:
        params = init_adapters(jax.random.key(run.seed), shapes.params, shardings.params)
    scorer = Scorer(setup.model, setup.loss, setup.hparams, setup.mesh, setup.shapes)
    options = {"mode": optim.mode, "two_pass_below": optim.two_pass_below, "frozen": frozen, "seed": run.seed}
    live = live_reference(setup, frozen)
    options |= {"live": live, "total_steps": setup.total_steps, "keeps": keeps}
    step = TrainStep(scorer, setup.model, setup.loss, optimizer, shardings, **options)
    return Run(scorer, step, frozen, live), initial_state(params, optimizer, shardings, setup.loss)


def _batches(setup: Setup) -> Iterator[list[PairTokens]]:
    """The pairs of update 0, 1, ... of a run by this recipe."""
    k, size = 0, setup.recipe.optim.train_batch_size
    while True:
        indices = batch_indices(k, pairs=len(setup.train), train_batch_size=size, seed=setup.recipe.run.seed)
        yield [setup.train[i] for i in indices]
        k += 1


class Measured(NamedTuple):
    """One update."""

    seconds: float
    pairs: list[PairTokens]
    metrics: dict[str, float]


def measure(step: TrainStep, state: TrainState, batches: Iterator, steps: int) -> tuple[TrainState, list[Measured]]:
    """So many updates as training does them: on accelerators one is started before that before it has ended.

    The seconds of an update reach from the end of the one before to its own, with its rows built within them, and without what XLA
    compiles while nothing runs.
    """
    ahead = 0 if jax.default_backend() == "cpu" else 1
    started, ended = [], []
    clock, compile_clock = time.perf_counter(), compiled().seconds

    def end():
        nonlocal clock, compile_clock
        pairs, metrics = started[len(ended)]
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now, so_far = time.perf_counter(), compiled().seconds
        ended.append(Measured(now - clock - (so_far - compile_clock), pairs, metrics))
        clock, compile_clock = now, so_far

    for _ in range(steps):
        pairs = next(batches)
        before = compiled().seconds
        state, metrics = step(state, pairs)
        if len(started) > len(ended):  # one ran meanwhile: no time to take off
            compile_clock += compiled().seconds - before
        started.append((pairs, metrics))
        if len(started) - len(ended) > ahead:
            end()
    while len(ended) < steps:
        end()
    jax.block_until_ready(state)
    return state, ended


def split(setup: Setup, run: Run, state: TrainState, batches: Iterator, steps: int) -> dict[str, float]:
    """Medians of the seconds that the parts of an update take, each waited for, and how much of it needs a backward pass.

    `backward` is the whole gradient without scoring, which is a pass of its own in two_pass alone. The rows of second passes are built within `backward`.
    """
    taken = [_split_once(setup, run, state, batches)]  # compiles
    for _ in range(steps):
        taken.append(_split_once(setup, run, taken[-1].pop("state"), batches))
    taken[-1].pop("state")
    return {name: statistics.median(one[name] for one in taken[1:]) for name in taken[1]} | {"steps": steps}


def _split_once(setup: Setup, run: Run, state: TrainState, batches: Iterator) -> dict:
    pairs, reading = _timed(lambda: next(batches))
    rows, building = _timed(lambda: run.scorer.rows(pairs))
    variables = variables_of(state.params, run.frozen, run.live)
    _, scoring = _timed(lambda: run.scorer.weigh(run.scorer(variables, rows)))
    form = run.step.form(state)
    (grads, metrics), gradient = _timed(
        lambda: run.step.mean_grads(state.params, pairs, update=state.step, rows=rows, form=form)
    )
    (state, _), optimizer = _timed(lambda: run.step.apply(state, grads, metrics))
    apart = form == "two_pass"
    return {
        "input": reading + building,
        "score": scoring if apart else 0.0,
        "backward": max(gradient - (scoring if apart else 0.0), 0.0),
        "optimizer": optimizer,
        "scoring_pass": scoring,
        "state": state,
    }


def _timed(work):
    started, before = time.perf_counter(), compiled().seconds
    done = jax.block_until_ready(work())
    return done, time.perf_counter() - started - (compiled().seconds - before)


def speed(setup: Setup, measured: list[Measured], held: dict[str, int]) -> dict:
    """Rates over all measured updates, and their share of what the chips can do at most."""
    times = [one.seconds for one in measured]
    seconds, chips = sum(times), setup.mesh.size
    flops = [
        flops_of(setup.cfg, lengths_of(one.pairs), trained="adapters" if setup.recipe.model.use_peft else "all")
        for one in measured
    ]
    useful = sum(
        of.forward + of.backward * one.metrics["active_token_fraction"] for of, one in zip(flops, measured, strict=True)
    )
    whole = sum(of.total for of in flops)
    tokens = sum(pair.slots for one in measured for pair in one.pairs)
    peak, source = peak_of(setup)
    return {
        "pairs_per_second": sum(len(one.pairs) for one in measured) / seconds,
        "tokens_per_second": tokens / seconds,
        "tokens_per_second_per_chip": tokens / seconds / chips,
        "useful_tflops_per_second": useful / seconds / 1e12,
        "mfu": peak and useful / seconds / peak,
        "mfu_without_skipping": peak and whole / seconds / peak,
        "peak_tflops_per_second": peak and peak / 1e12,
        "peak_is": source,
        "step_time": {"median": statistics.median(times), "shortest": min(times), "longest": max(times)},
        "roofline": roofline(setup, useful / len(measured), held),
    }


def peak_of(setup: Setup) -> tuple[float | None, str | None]:
    """The most operations a second of the whole mesh, and where the number is from."""
    device, dtype = setup.mesh.local_devices[0], setup.recipe.model.compute_dtype
    if device.platform == "cpu":  # CPU devices share the cores
        return measured_peak(device), "a float32 matmul of 1536 x 1536 measured in this process"
    chip = chip_of(device.device_kind)
    if chip is None or chip.peak(dtype) is None:
        return None, None
    return setup.mesh.size * chip.peak(dtype), f"{setup.mesh.size} x {chip.name} as published, {dtype}"


def measured_peak(device, n: int = 1536) -> float:
    """Operations a second in the fastest of a few float32 matmuls."""
    square = jax.device_put(jnp.ones((n, n), jnp.float32), device)
    matmul = jax.jit(jnp.matmul)
    jax.block_until_ready(matmul(square, square))
    return 2 * n**3 / min(_timed(lambda: matmul(square, square))[1] for _ in range(7))


def roofline(setup: Setup, useful: float, held: dict[str, int]) -> dict[str, float] | None:
    """Seconds an update would take if nothing but this were in its way; None for chips that are not known.

    The optimizer reads and writes parameters and moments, and reads gradients.
    """
    chip = chip_of(setup.mesh.local_devices[0].device_kind)
    peak = chip and chip.peak(setup.recipe.model.compute_dtype)
    if peak is None:
        return None
    moved = 2 * held.get("adapters", held.get("parameters", 0)) + held["gradients"] + 2 * held["moments"]
    return {"useful_operations": useful / (setup.mesh.size * peak), "optimizer_memory": moved / chip.hbm_rate}


def about(setup: Setup) -> dict:
    """What ran where."""
    recipe, device = setup.recipe, setup.mesh.local_devices[0]
    chosen = {"model": recipe.model, "optim": recipe.optim}
    values = {section: dataclasses.asdict(leaves) for section, leaves in chosen.items()}
    values["model"] = {
        name: value for name, value in values["model"].items() if name not in ("chat_template", "eos_token")
    }
    data = ("dataset_name", "dataset_mixer", "max_length", "row_length", "scored_length", "rows_per_device")
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(param_shapes(setup.cfg))),
        "trained_parameters": sum(leaf.size for leaf in jax.tree.leaves(setup.trained_shapes)),
        "weights": "random" if isinstance(setup.pretrained, Untrained) else "read",
        "device_kind": device.device_kind,
        "devices": setup.mesh.size,
        "mesh": dict(setup.mesh.shape),
        "recipe": {**values, "data": {name: getattr(recipe.data, name) for name in data}, "loss": recipe.loss},
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")},
            "platform": device.client.platform_version.splitlines()[0],
        },
    }


def _compilations(done: Compiled) -> dict[str, float]:
    return {"programs": done.programs, "seconds": done.seconds}


def _mean(values) -> float:
    return float(statistics.fmean(values))


def as_text(found: dict) -> str:
    """What bench found, for people."""
    recipe, times, parts = found["recipe"], found["step_time"], found["split"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items())
    memory = next(name for name in found if name.startswith("peak_") and name.endswith("memory_gib"))
    lines = [
        f"{recipe['model']['model_name_or_path']} ({found['parameters']:,} parameters, {found['weights']} weights), "
        f"{title_of(recipe['loss']['loss_type'])}, {recipe['optim']['train_batch_size']} pairs per update, {recipe['optim']['mode']}",
        f"{found['devices']} x {found['device_kind']} ({mesh}), {recipe['model']['compute_dtype']}, remat {recipe['model']['remat']}, "
        f"jax {found['versions']['jax']}",
        "",
        f"pairs a second     {found['pairs_per_second']:.4g}",
        f"tokens a second    {found['tokens_per_second']:.4g}  ({found['tokens_per_second_per_chip']:.4g} per chip; real ones, prompts once)",
        f"useful TFLOP/s     {found['useful_tflops_per_second']:.4g}",
    ]
    if found["mfu"] is not None:
        lines += [
            f"MFU                {found['mfu']:.1%} of {found['peak_tflops_per_second']:.4g} TFLOP/s ({found['peak_is']})",
            f"                   {found['mfu_without_skipping']:.1%} if every pair had been pushed back",
        ]
    lines.append(
        f"update             {times['median']:.4g} s, the median of {found['steps']} ({times['shortest']:.4g} to {times['longest']:.4g})"
    )
    if roof := found["roofline"]:
        lines.append(
            f"roofline           {roof['useful_operations']:.4g} s for the useful operations, {roof['optimizer_memory']:.4g} s for the optimizer's memory"
        )
    if parts is not None:
        named = ", ".join(f"{name} {parts[name]:.3g}" for name in ("input", "score", "backward", "optimizer"))
        lines.append(
            f"its parts          {named} s  (of other updates, each part waited for; a scoring pass takes {parts['scoring_pass']:.3g})"
        )
    lines += [
        f"peak memory        {found[memory]:.2f} GiB" + (" of the process" if "process" in memory else " on a device"),
        f"padding            {found['padding_fraction']:.1%} of all slots",
        f"active             {found['active_fraction']:.1%} of the pairs, {found['active_token_fraction']:.1%} of the scored tokens",
        f"layer inputs       {'kept' if found['keeps_layer_inputs'] else 'not kept'} in two passes",
        f"row shapes         {', '.join(f'{R} rows of {T} slots ({S} scored)' for R, T, S, *_ in found['shapes'])}",
        f"compiled           {found['compilations']['programs']} programs in {found['compilations']['seconds']:.1f} s, "
        f"{found['compilations']['while_measured']} more while measured",
    ]
    return "\n".join(lines)
