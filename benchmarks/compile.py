"""Compiles the programs of an update for TPUs or GPUs that are not there, and says what is in them: memory, kernels, collectives.

python benchmarks/compile.py --topology v5e:4x4 --shape 8b [--mesh 1,16,1] [--remat full] [--row_length 4352] [--json FILE]
python benchmarks/compile.py --topology h200:1x1x8 --shape 8b

Any machine does; nothing runs and no array is made. TPUs (v5e:4x4, v5p:2x2x2, v6e:4x4: numbers are chips) need `jax[tpu]`. NVIDIA's
(slices x hosts x GPUs) need `pip install --no-deps jax-cuda12-plugin jax-cuda12-pjrt` of jax's version, and no CUDA. A program that does not fit a
TPU's memory fails to compile; for GPUs compare the peak with the memory.

The marks in front of what is found: ok, or NO where a program should not be as it is. --hlo FOLDER keeps the text that they are read from.
"""

import argparse
import functools
import json
import math
import os
import pathlib
import re
import time
from typing import NamedTuple

# Before jax: what stands in for the machine's own description. Two processes may compile at once.
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
os.environ |= {"TPU_ACCELERATOR_TYPE": "v5litepod-16", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from repo_jax.config import ModelSection, OptimSection
from repo_jax.data.rows import RowBatch, RowShape
from repo_jax.losses import make_loss
from repo_jax.memory import held_in_training
from repo_jax.models.config import DecoderConfig, Rope
from repo_jax.models.decoder import param_shapes
from repo_jax.optimizer import make_optimizer
from repo_jax.preparation import decoder
from repo_jax.sharding import BATCH, batch_ways, make_mesh
from repo_jax.state import state_shapes, state_shardings
from repo_jax.step import Gathered, add_direct, add_weighted, no_pairs, score, update

GIB = 2**30
LLAMA = {"H": 128, "K": 8, "V": 128_256, "max_positions": 8192, "rope": Rope(500_000.0), "norm_eps": 1e-5}
SHAPES = {
    "tiny": DecoderConfig(D=512, F=1024, N=4, L=4, **(LLAMA | {"K": 2, "V": 32_768})),
    "1b": DecoderConfig(D=2048, F=8192, N=32, L=16, tie_embeddings=True, **(LLAMA | {"H": 64})),  # Llama 3.2 1B
    "3b": DecoderConfig(D=3072, F=8192, N=24, L=28, tie_embeddings=True, **LLAMA),  # Llama 3.2 3B
    "8b": DecoderConfig(D=4096, F=14336, N=32, L=32, **LLAMA),  # Llama 3 8B
}
# GiB that programs may use: what the compiler says for v5e, and published figures.
MEMORY = {"v5e": 15.75, "v5p": 95, "v6e": 31, "h200": 141e9 / GIB, "h100": 80e9 / GIB}
GPU = """gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
memory_bandwidth: {rate} l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: {memory} shared_memory_per_block_optin: 232448
cuda_compute_capability {{ major: 9 }} registers_per_core_limit: 65536 registers_per_block_limit: 65536 }} platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }} device_description_str: "NVIDIA {name}" """
GPUS = {
    "h200": {"rate": 4_800_000_000_000, "memory": 150_754_820_096, "name": "H200"},
    "h100": {"rate": 3_352_320_000_000, "memory": 85_899_345_920, "name": "H100"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--mesh", help="data,fsdp,tensor; default: all devices in fsdp")
    parser.add_argument("--rows_per_device", type=int, default=1)
    parser.add_argument(
        "--row_length", type=int, default=4352, help="not the model's width: sizes are told apart by it"
    )
    parser.add_argument("--scored_length", type=int, help="default: 0.7 of row_length")
    parser.add_argument("--view_length", type=int, help="default: 0.75 of row_length")
    parser.add_argument("--pairs", type=int, default=128, help="per update")
    parser.add_argument("--remat", default="full")
    parser.add_argument("--loss", default="repo")
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--compiler_options", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--hlo", type=pathlib.Path, help="a folder for the programs' text")
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()
    devices = topology_devices(arguments.topology)
    data, fsdp, tensor = map(int, arguments.mesh.split(",")) if arguments.mesh else (1, len(devices), 1)
    mesh, cfg = make_mesh(data, fsdp, tensor, devices), SHAPES[arguments.shape]
    T = arguments.row_length
    if T in (cfg.D, cfg.F, cfg.V):
        parser.error(f"--row_length {T} is one of the model's own sizes; the report would mistake one for the other")
    shape = RowShape(
        arguments.rows_per_device * batch_ways(mesh),
        T,
        arguments.scored_length or round(0.7 * T / 128) * 128,
        arguments.view_length or round(0.75 * T / 128) * 128,
    )
    compiled = Programs(cfg, mesh, shape, arguments.pairs, remat=arguments.remat, loss=arguments.loss)
    limit = MEMORY[arguments.topology.split(":")[0]]
    print(f"{arguments.shape} for {arguments.topology}, mesh {dict(mesh.shape)}, {shape}, remat {arguments.remat}")
    print(f"jax {jax.__version__}; {limit:.1f} GiB per device")
    print(
        "held between updates: "
        + ", ".join(f"{name} {size / GIB:.2f}" for name, size in compiled.held.items())
        + " GiB"
    )
    found = {}
    for name in arguments.programs:
        begin = time.perf_counter()
        try:
            program = compiled(name, dict(option.split("=", 1) for option in arguments.compiler_options))
        except jax.errors.JaxRuntimeError as error:
            found[name] = {"failed": str(error).strip().splitlines()[0][:400]}
            print(f"\n{name}: NO  {found[name]['failed']}", flush=True)
            continue
        text, seconds = program.as_text(), time.perf_counter() - begin
        if arguments.hlo:
            arguments.hlo.mkdir(parents=True, exist_ok=True)
            (arguments.hlo / f"{name}.txt").write_text(text)
        memory = program.memory_analysis()
        found[name] = {
            "compile_seconds": round(seconds, 1),
            "peak_gib": round(memory.peak_memory_in_bytes / GIB, 2),
            "argument_gib": round(memory.argument_size_in_bytes / GIB, 2),
        } | report(text, cfg, mesh, shape, compiled.model.head_chunks)
        show(name, found[name], limit)
    if arguments.json:
        said = {
            "topology": arguments.topology,
            "mesh": dict(mesh.shape),
            "shape": arguments.shape,
            "rows": shape._asdict(),
        }
        said |= {"remat": arguments.remat, "jax": jax.__version__, "programs": found}
        arguments.json.write_text(json.dumps(said, indent=1) + "\n")


def topology_devices(name: str) -> list:
    kind, sizes = name.split(":")
    if kind not in GPUS:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    target = GPU.format(**GPUS[kind])
    found = topologies.get_topology_desc(platform="cuda", topology_name=kind, topology=sizes, target_config=target)
    return list(found.devices)


# Programs, jitted as Scorer and TrainStep do it


def sharded(shapes, shardings):
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )


class Programs:
    """The programs of an update on batches of one shape; calling it with a name compiles."""

    def __init__(
        self, cfg: DecoderConfig, mesh: Mesh, shape: RowShape, B: int, *, remat="full", loss="repo", dtype="bfloat16"
    ):
        section = ModelSection("none", remat=remat, compute_dtype=dtype, param_dtype="float32")
        self.cfg, self.mesh, self.model = cfg, mesh, decoder(section, cfg, mesh)
        self.loss, hparams = make_loss(loss)
        self.optimizer = make_optimizer(OptimSection(), 100)
        shapes = state_shapes(param_shapes(cfg), self.optimizer)
        self.shardings = state_shardings(shapes, self.optimizer, mesh)
        self.everywhere = NamedSharding(mesh, P())
        self.held = held_in_training(shapes, self.shardings, None)
        self.state = sharded(shapes, self.shardings)
        self.hparams = {name: self._whole((), jnp.float32) for name in hparams}
        self.slopes_B2 = self._whole((B, 2), jnp.float32)
        self.pairs = jax.tree.map(lambda leaf: self._whole(leaf.shape, leaf.dtype), jax.eval_shape(lambda: no_pairs(B)))
        (R, T, S, Y), rows = shape, NamedSharding(mesh, BATCH)
        ints = {name: (R, T) for name in ("tokens_RT", "positions_RT", "segments_RT", "prompts_RT")}
        ints |= {name: (R, S) for name in ("targets_RS", "sources_RS", "answers_RS")} | {"views_R2Y": (R, 2, Y)}
        self.batch = RowBatch(
            **{name: jax.ShapeDtypeStruct(size, jnp.int32, sharding=rows) for name, size in ints.items()},
            filled_B=self._whole((B,), bool),
        )

    def _whole(self, shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.everywhere)

    def __call__(self, name: str, compiler_options: dict | None = None):
        fn, args, out_shardings = PROGRAMS[name](self)
        platform = {"gpu": "cuda"}.get(self.mesh.devices.flat[0].platform, self.mesh.devices.flat[0].platform)
        with jax.set_mesh(self.mesh):
            traced = jax.jit(fn, donate_argnums=0, out_shardings=out_shardings).trace(*args)
            return traced.lower(lowering_platforms=(platform,)).compile(compiler_options or None)

    @property
    def grads(self):
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding), self.state.params
        )

    def score(self):
        return (
            functools.partial(score, model=self.model),
            (self.pairs, {"params": self.state.params}, self.batch),
            self.everywhere,
        )

    def add_direct(self):
        fn = functools.partial(add_direct, model=self.model, loss=self.loss)
        args = (Gathered(self.grads, self.pairs), self.state.params, None, self.batch, self.hparams, None)
        return fn, args, Gathered(self.shardings.params, self.everywhere)

    def add_weighted(self):
        fn = functools.partial(add_weighted, model=self.model)
        return fn, (self.grads, self.state.params, None, self.batch, self.slopes_B2), self.shardings.params

    def update(self):
        fn = functools.partial(update, optimizer=self.optimizer)
        return (
            fn,
            (self.state, self.grads, self._whole((), jnp.float32)),
            (self.shardings, self.everywhere, self.everywhere),
        )


PROGRAMS = {
    "score": Programs.score,
    "add_weighted": Programs.add_weighted,
    "add_direct": Programs.add_direct,
    "update": Programs.update,
}


# What the programs' text says

INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(\S+) = (.+?) ([a-z][\w\-]*)\((.*)$")
ARRAY = re.compile(r"\b(pred|[a-z]+\d+)\[([\d,]*)\]")
CALLED = re.compile(
    r"(?:body|condition|calls|to_apply|called_computations|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)"
)
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
LOOPS = ("layers", "head", "outside")


class Array(NamedTuple):
    dtype: str
    sizes: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.sizes)

    @property
    def bytes(self) -> int:
        return self.elements * max(1, int(re.sub(r"\D", "", self.dtype) or 8) // 8)

    def __str__(self):
        return f"{self.dtype}{list(self.sizes)}".replace(" ", "")


class Collective(NamedTuple):
    kind: str
    loop: str  # one of LOOPS
    backward: bool
    arrays: tuple[Array, ...]  # whole: what all-gather makes, what reduce-scatter takes
    source: str  # the line of jax's program that it comes from


def arrays_in(text: str) -> list[Array]:
    return [Array(dtype, tuple(int(n) for n in sizes.split(",") if n)) for dtype, sizes in ARRAY.findall(text)]


def computations(text: str) -> dict[str, list[tuple]]:
    """name -> (opcode, type, rest of the line) of each instruction."""
    found, current = {}, None
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            current = found.setdefault(line.removeprefix("ENTRY ").split(" ")[0].lstrip("%"), [])
        elif current is not None and (match := INSTRUCTION.match(line)):
            current.append((match[3], match[2], match[4]))
    return found


def op_name(rest: str) -> str:
    match = re.search(r'op_name="([^"]*)"', rest)
    return match[1] if match else ""


def loop_of(source: str) -> str:
    """What a loop of the program itself goes over. Others (windowed products, searches) count as where they stand."""
    if "Decoder._run/while" in source:
        return "layers"
    return "outside" if "Decoder" in source or not source.endswith("/while") else "head"


def collectives(text: str) -> list[Collective]:
    """Each collective once, with the loop that it runs in."""
    program = computations(text)
    entry = re.search(r"^ENTRY %?(\S+)", text, re.MULTILINE)[1]
    found, seen = {}, set()

    def walk(name: str, loop: str, source: str) -> None:
        if (name, loop) in seen:
            return
        seen.add((name, loop))
        for opcode, shape, rest in program.get(name, ()):
            here = op_name(rest) or source
            kind = opcode.removesuffix("-start")
            if kind in KINDS:
                arrays = whole(opcode, shape)
                # Fusions that overlap with a collective hold copies of it.
                found[kind, loop, op_name(rest) or rest.split("channel_id=")[-1].split(",")[0], str(arrays)] = (
                    Collective(kind, loop, "transpose(" in here, arrays, here)
                )
            inner = loop
            if opcode == "while" and loop == "outside":
                inner = loop_of(here)
            for group in CALLED.findall(rest):
                for called in group.split(", "):
                    walk(called.lstrip("%"), inner, here)

    walk(entry, "outside", "")
    return list(found.values())


def whole(opcode: str, shape: str) -> tuple[Array, ...]:
    """The collective's arrays in the form in which they are largest."""
    arrays = [array for array in arrays_in(shape) if array != Array("u32", ())]
    if opcode.endswith("-start") and opcode != "all-reduce-start":  # (inputs, outputs)
        half = len(arrays) // 2
        arrays = max(arrays[:half], arrays[half:], key=lambda part: sum(array.bytes for array in part))
    return tuple(arrays)


def report(text: str, cfg: DecoderConfig, mesh: Mesh, shape: RowShape, head_chunks: tuple[int, int]) -> dict:
    tensor, ways = mesh.shape["tensor"], batch_ways(mesh)
    V, D, layer = cfg.padded_V // tensor, cfg.D, cfg.D * cfg.F // tensor  # of a device; a layer's largest weight
    found = collectives(text)
    table = {}
    for loop in LOOPS:
        for kind in KINDS:
            those = [one for one in found if (one.loop, one.kind) == (loop, kind)]
            if those:
                largest = max((array for one in those for array in one.arrays), key=lambda array: array.bytes)
                table[f"{kind} in {loop}" if loop != "outside" else f"{kind} outside loops"] = {
                    "count": len(those),
                    "gib": round(sum(array.bytes for one in those for array in one.arrays) / GIB, 4),
                    "largest": str(largest),
                }
    # [tokens, V]: V beside anything but the width, a head's own or that of a shard of it, and more tokens than a chunk has.
    chunk = max(head_chunks)
    of_vocabulary = {array for array in arrays_in(text) if V in array.sizes or cfg.padded_V in array.sizes}
    tokens = {
        array
        for array in of_vocabulary
        if not {D, D // mesh.shape["fsdp"]} & set(array.sizes) and array.elements > chunk * V
    }
    in_head = [array for one in found if one.loop == "head" for array in one.arrays]
    layered = [
        array
        for one in found
        if one.kind == "all-gather"
        for array in one.arrays
        if cfg.padded_V not in array.sizes and V not in array.sizes and array.elements > layer
    ]
    weight = layer // max(1, cfg.F // (cfg.K * cfg.H // tensor))  # a layer's smallest matrix
    slopes = [one for one in found if one.backward and max(array.elements for array in one.arrays) >= weight // ways]
    summed = [array for one in slopes if one.kind == "all-reduce" for array in one.arrays if array.elements >= weight]
    checks = {
        "no [tokens, V] beyond a chunk": tokens,
        "no head-sized collective in the head's loop": {a for a in in_head if a.elements >= V * D // ways},
        "weights gathered a layer at a time": set(layered),
    }
    if mesh.devices.flat[0].platform != "tpu":  # libtpu's text has no reduce-scatter: it says all-reduce, and slices
        checks["weight gradients scattered, not all-reduced"] = set(summed)
    return {
        "tpu_custom_calls": len(re.findall('custom_call_target="tpu_custom_call"', text)),
        "collectives": table,
        "largest of V": str(max(of_vocabulary, key=lambda array: array.bytes)) if of_vocabulary else None,
        "checks": {check: sorted(map(str, against)) for check, against in checks.items()},
    }


def show(name: str, found: dict, limit: float) -> None:
    fits = "ok" if found["peak_gib"] < limit else "NO"
    print(
        f"\n{name}: compiled in {found['compile_seconds']} s, {found['tpu_custom_calls']} TPU kernels (tpu_custom_call)"
    )
    print(f"  {fits}  peak {found['peak_gib']} GiB of {limit:.1f}, {found['argument_gib']} of them arguments")
    for check, against in found["checks"].items():
        print(f"  {'NO' if against else 'ok'}  {check}" + (": " + ", ".join(against[:6]) if against else ""))
    for what, one in found["collectives"].items():
        print(f"      {one['count']:3d} x {what:34} {one['gib']:8.3f} GiB, largest {one['largest']}")
    print(end="", flush=True)


if __name__ == "__main__":
    main()
