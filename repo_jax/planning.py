"""What a recipe would need on accelerators that are not here: its real programs compiled for them, or, where no compiler is, a formula.

Of the model only config.json is read, and no data: how long pairs are is assumed (TYPICAL). Axis letters: R, T, S, Y as in data/rows.py;
B pairs of an update; 3 is (prompt, chosen, rejected).
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from repo_jax.config import Recipe
from repo_jax.data.rows import RowShape, Sizes, packed, suggest_shapes
from repo_jax.flops import Lengths, flops_of
from repo_jax.hlo import Work, by_kind_and_axes, work_of
from repo_jax.losses import DEFAULT_LOSS, make_loss, title_of
from repo_jax.memory import at_work, is_out_of_memory, keeps_layer_inputs, layer_inputs, temporaries
from repo_jax.models.config import DecoderConfig
from repo_jax.models.decoder import param_shapes
from repo_jax.preparation import in_its_form, slots_per_device, without_auto
from repo_jax.programs import Held, Programs, with_dtypes
from repo_jax.sharding import AXES, make_mesh
from repo_jax.step import check_held, recomputed, rooms
from repo_jax.stores import model_files
from repo_jax.topology import (
    NoCompilerError,
    Topology,
    needed_and_there,
    parse_topology,
    published_memory,
    topology_devices,
    usable_memory,
    without_accelerators,
)

GIB = 2**30
# Tokens of 64 pairs (prompt, chosen, rejected): even steps through 904 of UltraFeedback's, ordered by length, and the longest of those
# that fit into 2048 tokens (GPT-2's tokens; benchmarks/data).
TYPICAL = """
47,20,26 46,44,32 96,29,21 87,2,69 31,21,124 147,23,20 27,114,62 145,2,65 22,197,11 78,142,22 53,127,80 221,2,50 165,10,121
29,137,141 98,21,201 203,70,69 183,98,75 129,216,28 294,81,11 77,302,16 27,58,330 19,96,320 417,20,16 169,118,185 21,239,231
38,120,349 22,151,353 18,337,193 523,3,43 338,38,212 382,92,125 26,113,479 25,300,304 19,517,111 23,586,58 437,178,67
17,449,233 86,432,213 701,28,33 255,425,105 119,138,557 118,432,284 29,361,486 359,499,51 109,611,210 506,222,226 27,520,440
428,265,319 156,426,456 155,427,492 1024,50,27 42,579,525 296,236,655 32,570,619 1071,24,158 1287,5,3 84,619,629 57,886,467
525,571,383 455,389,685 73,1011,589 69,687,1056 38,1134,794 636,1312,1345
"""
# Which programs an update runs; those of a row batch as often as there are any.
FORMS = {"direct": ("add_direct", "update"), "two_pass": ("score", "hold", "take", "add_weighted", "update")}
ROOFLINE = (
    "a lower bound: the longest of matmul FLOPs over the published peak, memory traffic over the published rate (arguments and "
    "results of each program once, what collectives bring written and read), and bytes sent over the published one-way rate of the "
    "links, as if the three overlapped wholly and nothing else cost time"
)


def read_model_config(path: str) -> DecoderConfig:
    """The shape of a model from its config.json, under whatever name, or the folder that holds it.

    Raises FileNotFoundError, or ValueError for what is not supported.
    """
    given = pathlib.Path(path)
    if given.is_dir() or given.name == "config.json":
        return DecoderConfig.from_hf(given if given.is_dir() else given.parent)
    if not given.is_file():
        raise FileNotFoundError(f"--model_config '{path}' is not there; give a model's config.json or its folder")
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(given, pathlib.Path(folder) / "config.json")
        try:
            return DecoderConfig.from_hf(folder)
        except ValueError as error:
            raise ValueError(str(error).replace(str(pathlib.Path(folder) / "config.json"), path)) from None


def plan(
    recipe: Recipe,
    topology: str,
    *,
    slices: int = 1,
    model_config: str | None = None,
    searching: bool = False,
    command: str = "train CONFIG",
) -> dict:
    """The plan of a recipe for a named topology, of the best layout found where it is to be searched for.

    Takes this process off its accelerators. Raises ValueError or FileNotFoundError with a message that says what to change.
    """
    without_accelerators()
    there = parse_topology(topology, slices)
    recipe = dataclasses.replace(recipe, loss=without_auto(recipe.loss)[0])
    name = title_of(recipe.loss.get("loss_type", DEFAULT_LOSS))
    recipe = dataclasses.replace(recipe, optim=in_its_form(recipe, name, make_loss(**recipe.loss)[0]))
    cfg = read_model_config(model_config) if model_config else DecoderConfig.from_hf(model_files(recipe).weights)
    if not searching:
        return make_plan(recipe, cfg, there, command=command)
    best = search(recipe, cfg, there)
    changes = best[0].pop("change") if best and best[0]["fits"] else {}
    found = make_plan(changed(recipe, changes), cfg, there, command=f"{command} {flags(changes)}".strip())
    return found | {"search": [{name: value for name, value in one.items() if name != "change"} for one in best]}


# Rows


class Rows(NamedTuple):
    """An update's pairs, as long as they are assumed to be, in rows of one shape."""

    shape: RowShape
    batches: int  # of rows, in an update
    lengths: Lengths
    padding: float


def rows_for(recipe: Recipe, cfg: DecoderConfig, ways: int) -> Rows:
    """Rows for devices that spread them `ways` ways, as the recipe says or as would be suggested for TYPICAL pairs.

    Raises ValueError where the recipe's lengths leave none of these.
    """
    data = recipe.data
    sequences = 1 + len(make_loss(**recipe.loss)[0].groups)  # a pair's further ones are taken to be as long
    B = recipe.optim.train_batch_size * sequences
    pairs_B3 = np.array([list(map(int, pair.split(","))) for pair in TYPICAL.split()])
    limit = data.max_length or cfg.max_positions
    kept = (pairs_B3[:, 0] + pairs_B3[:, 1:].max(axis=1) <= limit) & (
        pairs_B3[:, 0] <= (data.max_prompt_length or limit)
    )
    kept &= (pairs_B3.sum(axis=1) <= (data.row_length or np.inf)) & (
        pairs_B3[:, 1:].sum(axis=1) <= (data.scored_length or np.inf)
    )
    if not kept.any():
        raise ValueError(
            f"max_length={limit}, max_prompt_length={data.max_prompt_length}, row_length={data.row_length} and "
            f"scored_length={data.scored_length} leave no pair of usual length; raise them"
        )
    pairs_B3 = pairs_B3[kept]
    table = _sizes(np.tile(pairs_B3, (math.ceil(2 * B / len(pairs_B3)), 1)))
    shape = suggest_shapes(
        *table,
        B=B,
        ways=ways,
        row_length=data.row_length,
        scored_length=data.scored_length,
        rows_per_device=data.rows_per_device,
        view_length=recipe.model.attn_implementation != "dense",
        budget=data.slots_per_device or slots_per_device("accelerator"),
    )[0]
    update_B3 = pairs_B3[np.arange(B) * len(pairs_B3) // B]
    _, rows = packed(_sizes(update_B3), [shape])
    batches = len(rows) // shape.R if shape.R > 1 else len(rows)
    of_pairs_B3 = update_B3[::sequences]
    lengths = Lengths(of_pairs_B3[:, 0], of_pairs_B3[:, 1:], of_pairs_B3[:, 1:])
    return Rows(shape, batches, lengths, 1 - update_B3.sum() / (batches * shape.R * shape.T))


def _sizes(pairs_B3: np.ndarray) -> Sizes:
    return Sizes(pairs_B3.sum(axis=1), pairs_B3[:, 1:].sum(axis=1), pairs_B3[:, :1] + pairs_B3[:, 1:])


# The mesh


def mesh_sizes(recipe: Recipe, topology: Topology) -> tuple[int, int, int]:
    """(data, fsdp, tensor) with -1 filled in; data 1 becomes as many as there are slices, which nothing else may span.

    Raises ValueError where they do not multiply to the devices.
    """
    mesh, n = recipe.mesh, topology.devices
    sizes = {"data": mesh.data, "fsdp": mesh.fsdp, "tensor": mesh.tensor}
    if mesh.data == 1 and not topology.is_gpu:
        sizes["data"] = topology.slices
    fixed = math.prod(size for size in sizes.values() if size != -1)
    left = n // fixed
    said = " ".join(f"{axis}={size}" for axis, size in sizes.items())
    if -1 in sizes.values() and n % fixed == 0 and left:
        return tuple(left if size == -1 else size for size in sizes.values())
    if fixed != n or -1 in sizes.values():
        raise ValueError(f"mesh {said} does not fit the {n} devices of {topology}; make the axes multiply to {n}")
    return tuple(sizes.values())


def goes_far(topology: Topology, sizes: dict[str, int], axes: str) -> bool:
    """Whether devices along these axes ("data+fsdp") lie in different slices, or different hosts of GPUs."""
    names = list(sizes)
    span = max(math.prod(list(sizes.values())[names.index(axis) :]) for axis in axes.split("+"))
    return span > topology.near


# By formula


def ring(n: int) -> float:
    """The share of an array that each of n devices sends when it is gathered or scattered."""
    return (n - 1) / n


class Estimate(NamedTuple):
    """What no compiler said."""

    held: dict[str, int]
    temporaries: float  # bytes, of the largest program
    flops: float  # executed, of a device, per update
    sent: float  # bytes out of a device, per update
    seconds: float
    limit: str  # compute, memory or links
    apart: float  # seconds, were nothing overlapped

    @property
    def peak(self) -> float:
        return sum(self.held.values()) + self.temporaries


def estimate(
    recipe: Recipe, cfg: DecoderConfig, topology: Topology, sizes: tuple[int, int, int], rows: Rows
) -> Estimate:
    """The direct form by formula. Raises ValueError where the mesh does not divide the model."""
    data, fsdp, tensor = sizes
    held = Held(recipe, cfg, AbstractMesh(sizes, AXES)).bytes
    tokens = rows.shape.R // (data * fsdp) * rows.shape.T  # of a device, at a time
    scored = rows.shape.R // (data * fsdp) * rows.shape.S
    width = 2 if recipe.model.compute_dtype == "bfloat16" else 4
    layer = cfg.D * cfg.H * (2 * cfg.N + 2 * cfg.K) + 3 * cfg.D * cfg.F
    head, adapts = cfg.padded_V * cfg.D, recipe.model.use_peft
    again = recomputed(recipe.model.remat)
    # A forward pass, and with remat as much of it again; backward costs two, under frozen weights one.
    passes = (2 if adapts else 3) + again
    view = rows.shape.Y or rows.shape.T
    attention = 2 * 2 * 2 * (tokens // rows.shape.T) * cfg.N * cfg.H * view * view / 2 * cfg.L
    flops = (
        passes * 2 * tokens * layer * cfg.L + (passes + 0.5) * attention + (3 if adapts else 4) * 2 * scored * head
    ) / tensor
    weights = (layer * cfg.L + head * (1 if cfg.tie_embeddings else 2)) / tensor * width  # on one device when gathered
    moved = (2 if adapts else 3) * weights * ring(fsdp)
    moved += 0 if adapts else 2 * weights / fsdp * ring(data)
    moved += 2 * ring(tensor) * (4 + 2 * again) * tokens * cfg.D * width * cfg.L
    traffic = 2 * weights * 3 + 2 * sum(held.values())
    chip, link = topology.chip, topology.spec.link
    slow = topology.spec.network if not topology.is_gpu and fsdp * tensor > topology.near else link
    seconds = {
        "compute": rows.batches * flops / (chip.peak(recipe.model.compute_dtype) or chip.bf16_flops),
        "memory": rows.batches * traffic / chip.hbm_rate,
        "links": rows.batches * moved / slow if slow else 0.0,
    }
    limit = max(seconds, key=seconds.get)
    needed = temporaries(recipe.model.remat, cfg, tokens, tensor, width, adapts=adapts)
    return Estimate(
        held, needed, rows.batches * flops, rows.batches * moved, seconds[limit], limit, sum(seconds.values())
    )


# By the compiler


def compiled(programs: Programs, name: str, rows: Rows) -> dict:
    """One program: its memory in bytes per device, what it does, how long it took to compile; or why it does not compile."""
    begin = time.perf_counter()
    beside = programs.beside(name)
    try:
        program = programs(name)
    except jax.errors.JaxRuntimeError as error:
        asked = needed_and_there(str(error))
        if not is_out_of_memory(error) or asked is None:
            raise
        words = str(error).strip().splitlines()[0][:300]
        return {"seconds": time.perf_counter() - begin, "failed": words, "peak": asked[0] + beside, "beside": beside}
    memory = program.memory_analysis()
    chunk = max(programs.model.head_chunks)
    rows_here = rows.shape.R // (programs.mesh.shape["data"] * programs.mesh.shape["fsdp"])
    work = work_of(
        program.as_text(),
        dict(programs.mesh.shape),
        # As many chunks as hold every scored token that there is room for.
        {"head": math.ceil(rows.shape.S / min(rows.shape.S, max(1, chunk // rows_here)))},
    )
    return {
        "seconds": time.perf_counter() - begin,
        "peak": memory.peak_memory_in_bytes + beside,
        "arguments": memory.argument_size_in_bytes,
        "beside": beside,
        "temporaries": memory.peak_memory_in_bytes - memory.argument_size_in_bytes,
        # hold and take touch but a row batch's share of what waits.
        "traffic": (
            2 * programs.row_batch
            if name in ("hold", "take")
            else memory.argument_size_in_bytes + memory.output_size_in_bytes
        )
        + 2 * sum(one.brought for one in work.collectives),
        "work": work,
    }


def make_plan(
    recipe: Recipe, cfg: DecoderConfig, topology: Topology, *, command: str = "train CONFIG", explain: bool = True
) -> dict:
    """What an update of the recipe takes on these accelerators and whether it fits, with what would where it does not (`explain`).

    Raises ValueError for what cannot be laid out there.
    """
    given, recipe = recipe, with_dtypes(recipe)
    sizes = mesh_sizes(recipe, topology)
    rows = rows_for(recipe, cfg, sizes[0] * sizes[1])
    guess = estimate(recipe, cfg, topology, sizes, rows)
    found = _header(recipe, cfg, topology, sizes, rows, command)
    try:
        devices = topology_devices(topology)
    except NoCompilerError as error:
        found |= _estimated(guess, topology, recipe) | {"no_compiler": str(error)}
        return found if found["fits"] or not explain else found | {"would_fit": what_would_fit(given, cfg, topology)}
    limit = usable_memory(topology, devices)
    mesh = make_mesh(*sizes, devices)
    programs = programs_for(recipe, cfg, mesh, rows, limit)
    parts = {}
    for name in programs.names:
        parts[name] = compiled(programs, name, rows)
        if parts[name]["peak"] > limit:  # the largest comes first
            break
    found |= _said(programs, parts, limit)
    if not found["fits"]:
        found["would_fit"] = what_would_fit(given, cfg, topology) if explain else []
    form = [
        name for name in FORMS["two_pass" if recipe.optim.mode == "two_pass" else "direct"] if name in programs.names
    ]
    if all("work" in parts.get(name, {}) for name in form):
        found |= _costs(recipe, cfg, topology, mesh, rows, {name: parts[name] for name in form})
    return found


def programs_for(recipe: Recipe, cfg: DecoderConfig, mesh: Mesh, rows: Rows, limit: int) -> Programs:
    """The programs of an update, which keep layer inputs where training would."""
    R, T, *_ = rows.shape
    size = layer_inputs(cfg, recipe.model.compute_dtype, mesh, rooms(rows.batches) * R * T)
    free = limit - sum(Held(recipe, cfg, mesh).bytes.values()) - at_work(recipe, cfg, mesh, rows.shape)
    if recipe.optim.keep_layer_inputs:
        check_held(cfg, mesh)
    keeps = keeps_layer_inputs(recipe, cfg, mesh, size, free)
    return Programs(recipe, cfg, mesh, rows.shape, rooms(rows.batches) if keeps else 0)


def _header(recipe, cfg, topology: Topology, sizes, rows: Rows, command: str) -> dict:
    R, T, S, Y = rows.shape
    return {
        "topology": topology.name,
        "slices": topology.slices,
        "devices": topology.devices,
        "chip": topology.chip.name,
        "mesh": dict(zip(AXES, sizes, strict=True)),
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(param_shapes(cfg))),
        "trained": "adapters" if recipe.model.use_peft else "all",
        "loss": recipe.loss.get("loss_type", "repo"),
        "remat": recipe.model.remat,
        "param_dtype": recipe.model.param_dtype,
        "compute_dtype": recipe.model.compute_dtype,
        "optim": recipe.optim.optim,
        "moment_dtype": recipe.optim.moment_dtype,
        "pairs_per_update": recipe.optim.train_batch_size,
        "rows": {"R": R, "T": T, "S": S, "Y": Y, "batches_per_update": rows.batches, "padding": round(rows.padding, 3)},
        "lengths": (
            f"assumed: those of UltraFeedback's pairs that fit max_length "
            f"{recipe.data.max_length or cfg.max_positions} (64 of them, GPT-2's tokens): mean "
            f"{rows.lengths.prompt_B.mean() + rows.lengths.branches_B2.sum(axis=1).mean():.0f} slots a pair, longest "
            f"{(rows.lengths.prompt_B + rows.lengths.branches_B2.sum(axis=1)).max()}"
        ),
        "launch": launch_commands(topology, sizes, command),
        "jax": jax.__version__,
    }


def _gib(size: float) -> float:
    return round(size / GIB, 3)


def _said(programs: Programs, parts: dict[str, dict], limit: int) -> dict:
    """Memory, of the program that needs most beside what waits meanwhile."""
    largest = max(parts, key=lambda name: parts[name]["peak"])
    peak = parts[largest]["peak"]
    memory = {kind: _gib(size) for kind, size in programs.held.items()}
    if programs.waiting and largest in ("score", "hold", "take", "add_weighted"):
        memory["layer inputs"] = _gib(programs.waiting + programs.row_batch)
    if "temporaries" in parts[largest]:
        memory["activations and temporaries"] = _gib(parts[largest]["temporaries"])
    return {
        "verified": "compiled",
        "fits": bool(peak <= limit),
        "peak_gib": _gib(peak),
        "hbm_gib": _gib(limit),
        "missing_gib": _gib(max(0.0, peak - limit)),
        "largest_program": largest,
        "memory_gib": memory,
        "compile_seconds": round(sum(part["seconds"] for part in parts.values()), 1),
        "programs": {
            name: {
                "compile_seconds": round(part["seconds"], 1),
                "peak_gib": _gib(part["peak"]),
                "waiting_gib": _gib(part["beside"]),
            }
            | ({"failed": part["failed"]} if "failed" in part else _work_said(part["work"]))
            for name, part in parts.items()
        },
    }


def _work_said(work: Work) -> dict:
    return {
        "matmul_flops_per_device": work.matmul_flops,
        "kernel_flops_per_device": work.kernel_flops,
        "assumed_turns": work.assumed,
        "sent_gib_per_device": {
            f"{kind} over {axes}": _gib(size)
            for (kind, axes), size in by_kind_and_axes(work.collectives, lambda one: one.sent).items()
        },
    }


def _costs(recipe, cfg, topology: Topology, mesh: Mesh, rows: Rows, parts: dict[str, dict]) -> dict:
    """FLOPs, bytes and the roofline of one update."""
    sizes, times = dict(mesh.shape), {name: 1 if name == "update" else rows.batches for name in parts}
    flops = sum(times[name] * (part["work"].matmul_flops + part["work"].kernel_flops) for name, part in parts.items())
    kernels = sum(times[name] * part["work"].kernel_flops for name, part in parts.items())
    sent = {}
    for name, part in parts.items():
        for key, size in by_kind_and_axes(part["work"].collectives, lambda one: one.sent).items():
            sent[key] = sent.get(key, 0.0) + times[name] * size
    far = sum(size for (_, axes), size in sent.items() if goes_far(topology, sizes, axes))
    near = sum(sent.values()) - far
    chip, network = topology.chip, None if topology.is_gpu else topology.spec.network
    seconds = {
        "compute": flops / (chip.peak(recipe.model.compute_dtype) or chip.bf16_flops),
        "memory": sum(times[name] * part["traffic"] for name, part in parts.items()) / chip.hbm_rate,
        "links": near / topology.spec.link,
        "network": (far / network if network else None) if far else 0.0,
    }
    known = {name: one for name, one in seconds.items() if one is not None}
    limit = max(known, key=known.get)
    B = recipe.optim.train_batch_size
    trained = "adapters" if recipe.model.use_peft else "all"
    model = flops_of(cfg, rows.lengths, trained=trained).total
    source = "read off the compiled programs' text: dots and convolutions, each as often as its loops turn"
    assumed = {what: count for part in parts.values() for what, count in part["work"].assumed.items()}
    if "head" in assumed:
        source += f"; the head over all {assumed['head']:g} chunks that there is room for"
    if "inner" in assumed:
        source += f"; attention over all of its blocks that a causal mask leaves ({assumed['inner']:g} on average)"
    if kernels:
        source += f"; {kernels / flops:.0%} of it attention kernels, by their shapes"
    return {
        "form": "direct" if "add_direct" in parts else "two_pass",
        "flops_per_update": {"model": model, "executed": flops * topology.devices, "executed_from": source},
        "sent_gib_per_device_and_update": {
            f"{kind} over {axes}": _gib(size) for (kind, axes), size in sorted(sent.items())
        },
        "roofline": {
            "seconds": {name: None if one is None else round(one, 4) for name, one in seconds.items()},
            "limit": limit,
            "step_seconds": round(known[limit], 4),
            "pairs_per_second": round(B / known[limit], 2),
            "mfu_at_most": round(model / (known[limit] * topology.devices * chip.bf16_flops), 3),
            "assumes": ROOFLINE
            + (
                ""
                if network or not far
                else f"; {far / GIB:.2f} GiB per device leave the host by a network of unknown rate"
            ),
        },
    }


def _estimated(guess: Estimate, topology: Topology, recipe: Recipe) -> dict:
    """The answer where there is no compiler."""
    limit = published_memory(topology)
    memory = {kind: _gib(size) for kind, size in guess.held.items()}
    B = recipe.optim.train_batch_size
    return {
        "verified": "estimated",
        "fits": bool(guess.peak <= limit),
        "peak_gib": _gib(guess.peak),
        "hbm_gib": _gib(limit),
        "missing_gib": _gib(max(0.0, guess.peak - limit)),
        "memory_gib": memory | {"activations and temporaries": _gib(guess.temporaries)},
        "flops_per_update": {"executed": guess.flops * topology.devices, "executed_from": "by formula"},
        "roofline": {
            "limit": guess.limit,
            "step_seconds": round(guess.seconds, 4),
            "pairs_per_second": round(B / guess.seconds, 2),
            "assumes": ROOFLINE + "; all of it by formula",
        },
    }


# What would fit, and what is best


def changed(recipe: Recipe, changes: dict) -> Recipe:
    """The recipe with {'section.leaf': value} laid over it."""
    sections = {}
    for name, value in changes.items():
        section, leaf = name.split(".")
        sections.setdefault(section, {})[leaf] = value
    return dataclasses.replace(
        recipe, **{name: dataclasses.replace(getattr(recipe, name), **leaves) for name, leaves in sections.items()}
    )


def flags(changes: dict) -> str:
    return " ".join(f"--{name.split('.')[1]} {str(value).lower()}" for name, value in changes.items())


def tried(recipe: Recipe, cfg: DecoderConfig, topology: Topology, changes: dict) -> dict:
    """Whether the recipe with these changes fits there, by its largest program compiled; by the formula where that is far off."""
    recipe = with_dtypes(changed(recipe, changes))
    sizes = mesh_sizes(recipe, topology)
    rows = rows_for(recipe, cfg, sizes[0] * sizes[1])
    guess = estimate(recipe, cfg, topology, sizes, rows)
    found = {"changes": flags(changes), "topology": str(topology), "mesh": dict(zip(AXES, sizes, strict=True))}
    try:
        devices = topology_devices(topology)
        limit = usable_memory(topology, devices)
    except NoCompilerError:
        devices, limit = [], published_memory(topology)
    if not devices or guess.peak > 1.5 * limit:
        return found | _brief(_estimated(guess, topology, recipe))
    # Without layer inputs: two passes keep them only where there is plenty of room.
    programs = Programs(recipe, cfg, make_mesh(*sizes, devices), rows.shape)
    name = programs.names[0]
    part = compiled(programs, name, rows)
    said = _said(programs, {name: part}, limit)
    if "work" in part:
        said |= _costs(recipe, cfg, topology, programs.mesh, rows, {name: part})
    return found | _brief(said)


def _brief(said: dict) -> dict:
    """What a comparison needs of a plan."""
    roofline = said.get("roofline", {})
    brief = {name: said[name] for name in ("fits", "verified", "peak_gib", "hbm_gib")}
    return brief | {name: roofline[name] for name in ("step_seconds", "pairs_per_second", "limit") if name in roofline}


def what_would_fit(recipe: Recipe, cfg: DecoderConfig, topology: Topology) -> list[dict]:
    """Ways to need less and the next larger slice, each looked at with everything else as it is, cheapest first."""
    less = {}
    if recipe.model.remat not in ("full", "offload"):
        less["model.remat"] = "full"
    if recipe.data.rows_per_device is None or recipe.data.rows_per_device > 1:
        less["data.rows_per_device"] = 1
    ways = [less] if less else []
    if not recipe.model.use_peft:
        half = {"model.param_dtype": "bfloat16"}
        if recipe.optim.optim == "adamw":
            ways.append(less | half | {"optim.moment_dtype": "bfloat16"})
        if recipe.optim.optim != "adafactor":
            ways.append(less | half | {"optim.optim": "adafactor", "optim.moment_dtype": "float32"})
        ways.append(less | {"model.use_peft": True})
    found = []
    for where, changes in [*((topology, one) for one in ways), *((larger, {}) for larger in topology.larger())]:
        with contextlib.suppress(ValueError):  # values that do not go together, or a mesh that is named for this slice
            found.append(tried(recipe, cfg, where, changes))
            if where != topology and found[-1]["fits"]:
                break
    return found


def candidates(recipe: Recipe, cfg: DecoderConfig, topology: Topology) -> Iterator[tuple[dict, Estimate]]:
    """Meshes, rows per device and remat policies that the model allows, with what the formula says of each."""
    n = topology.devices
    row_length = rows_for(with_dtypes(recipe), cfg, n).shape.T
    slices = 1 if topology.is_gpu else topology.slices
    for tensor in (1, 2, 4, 8):
        for data in (slices * 2**i for i in range(6)):
            fsdp = n // (tensor * data)
            if tensor * data * fsdp != n or tensor > topology.near:
                continue
            layout = {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor, "data.row_length": row_length}
            for rows_per_device in (1, 2, 4, 8):
                for remat in ("none", "dots", "attention", "full"):
                    changes = layout | {"data.rows_per_device": rows_per_device, "model.remat": remat}
                    one = with_dtypes(changed(recipe, changes))
                    with contextlib.suppress(ValueError):  # an axis of the model that the mesh does not divide
                        rows = rows_for(one, cfg, data * fsdp)
                        yield changes, estimate(one, cfg, topology, (data, fsdp, tensor), rows)


def search(recipe: Recipe, cfg: DecoderConfig, topology: Topology, *, compile_best: int = 4) -> list[dict]:
    """The best layouts, fastest first: chosen among all by the formula, then compiled where there is a compiler."""
    limit = published_memory(topology)
    # Nothing overlaps wholly: of two that are bound by compute, the one that sends less goes first.
    everything = [(one.apart, one.peak, changes) for changes, one in candidates(recipe, cfg, topology)]
    fitting = sorted((one for one in everything if one[1] <= limit), key=lambda one: one[:2])
    found = [{"change": changes} | tried(recipe, cfg, topology, changes) for _, _, changes in fitting[:compile_best]]
    return sorted(found, key=lambda one: (not one["fits"], one.get("step_seconds", math.inf)))


# What is said


def launch_commands(topology: Topology, sizes: tuple[int, int, int], command: str) -> list[str]:
    """What starts this training there. `command` is what comes after repo-jax."""
    if sizes[0] != 1 and "--data " not in command:
        command += f" --mesh.data {sizes[0]}"
    if topology.is_gpu:
        slices, hosts, gpus = topology.sizes
        if slices * hosts == 1:
            return [f"bash launch/local.sh {command.removeprefix('train ')}"]
        return [f"bash launch/slurm_gpu.sh --nodes={slices * hosts} --gpus-per-node={gpus} -- {command}"]
    kind, bucket = topology.accelerator_type, " --output_dir gs://BUCKET/RUN"
    command += "" if "--output_dir " in command else bucket
    slices = f" --slices {topology.slices}" if topology.slices > 1 else ""
    if kind is None:
        shape = "x".join(map(str, topology.sizes))
        pool = topology.spec.pool
        return [
            f"bash launch/gke.sh create NAME --image IMAGE --accelerator {pool} --topology {shape}{slices} -- {command}"
        ]
    return [f"bash launch/tpu_vm.sh resume NAME --zone ZONE --type {kind}{slices} -- {command}"]


def as_text(found: dict) -> str:
    """The plan in lines, for people."""
    mesh = " ".join(f"{axis}={size}" for axis, size in found["mesh"].items())
    rows, lines = found["rows"], []
    where = found["topology"] if found["slices"] == 1 else f"{found['slices']} slices of {found['topology']}"
    lines.append(f"{found['parameters'] / 1e9:.2f}B parameters on {where}: {found['devices']} devices, mesh {mesh}")
    lines.append(
        f"  {found['loss']}, trained: {found['trained']}; parameters {found['param_dtype']}, computing in {found['compute_dtype']}, "
        f"{found['optim']} (moments {found['moment_dtype']}), remat {found['remat']}"
    )
    lines.append(
        f"  {found['pairs_per_update']} pairs an update in {rows['batches_per_update']} batches of {rows['R']} rows of {rows['T']} slots "
        f"({rows['S']} scored, {rows['padding']:.0%} empty)"
    )
    lines.append(f"  lengths {found['lengths']}")
    if "no_compiler" in found:
        lines.append(f"NOT COMPILED: {found['no_compiler']}")
        lines.append("what follows is a formula's estimate:")
    verdict = "fits" if found["fits"] else f"DOES NOT FIT: {found['missing_gib']:.2f} GiB per device are missing"
    lines.append(f"{verdict} (peak {found['peak_gib']:.2f} of {found['hbm_gib']:.2f} GiB per device)")
    for kind, size in found["memory_gib"].items():
        lines.append(f"  {size:8.2f} GiB  {kind}")
    for name, part in found.get("programs", {}).items():
        words = part.get("failed", f"peak {part['peak_gib']:.2f} GiB ({part['waiting_gib']:.2f} of it waits beside it)")
        lines.append(f"  {name:13} compiled in {part['compile_seconds']:5.1f} s: {words}")
    if "compile_seconds" in found:
        lines.append(f"compile time {found['compile_seconds']:.0f} s in all")
    for one in found.get("would_fit", ()):
        fits = "fits" if one["fits"] else "does not fit"
        how = one["changes"] or "as it is"
        lines.append(
            f"  on {one['topology']}, {how}: {fits}, peak {one['peak_gib']:.2f} of {one['hbm_gib']:.2f} GiB ({one['verified']})"
        )
    lines += _cost_lines(found)
    for one in found.get("search", ()):
        fits = "fits" if one["fits"] else "does not fit"
        speed = f", {one['pairs_per_second']:.1f} pairs/s at most" if "pairs_per_second" in one else ""
        lines.append(f"  {one['changes']}: {fits}, peak {one['peak_gib']:.2f} GiB{speed} ({one['verified']})")
    lines.append("launch:")
    lines += [f"  {line}" for line in found["launch"]]
    return "\n".join(lines)


def _cost_lines(found: dict) -> list[str]:
    lines = []
    if flops := found.get("flops_per_update"):
        if "model" in flops:
            lines.append(
                f"model FLOPs {flops['model']:.3g} an update: unique real tokens, visible attention, scored head slots"
            )
        lines.append(f"executed FLOPs {flops['executed']:.3g} an update ({flops['executed_from']})")
    for what, size in found.get("sent_gib_per_device_and_update", {}).items():
        lines.append(f"  {size:8.2f} GiB out of each device an update  {what}")
    if roofline := found.get("roofline"):
        lines.append(
            f"roofline: {roofline['step_seconds']:.2f} s an update, {roofline['pairs_per_second']:.1f} pairs/s, limited by {roofline['limit']}"
            + (f" (form {found['form']}, all pairs active)" if "form" in found else "")
        )
        for name, seconds in roofline.get("seconds", {}).items():
            lines.append(f"  {name:8} " + ("unknown" if seconds is None else f"{seconds:.3f} s"))
        lines.append(f"  ({roofline['assumes']})")
    return lines


def command_of(config: str | None, overrides: dict) -> str:
    """The train command that a plan is of."""
    words = ["train", config or "CONFIG"]
    for name, value in overrides.items():
        words += [f"--{name.split('.')[1]}", value if isinstance(value, str) else json.dumps(value)]
    return shlex.join(words)
