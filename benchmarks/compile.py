"""Compiles the programs of an update for TPUs or GPUs that are not there, and says what is in them: memory, kernels, collectives.

python benchmarks/compile.py --topology v5e:4x4 --shape 8b [--mesh 1,16,1] [--remat full] [--row_length 4352] [--keeps 1] [--json FILE]
python benchmarks/compile.py --topology h200:1x1x8 --shape 8b

Any machine does; nothing runs and no array is made. TPUs (v5e:4x4, v5p:2x2x2, v6e:4x4: numbers are chips) need `jax[tpu]`. NVIDIA's
(slices x hosts x GPUs) need `pip install --no-deps jax-cuda12-plugin jax-cuda12-pjrt` of jax's version, and no CUDA. A program that does not fit a
TPU's memory fails to compile; for GPUs compare the peak with the memory.

The marks in front of what is found: ok, or NO where a program should not be as it is. --hlo FOLDER keeps the text that they are read from.
"""

import argparse
import json
import pathlib
import re
import time

import jax
from jax.sharding import Mesh

from repo_jax.config import Recipe, to_recipe
from repo_jax.data.rows import RowShape
from repo_jax.hlo import KINDS, LOOPS, arrays_in, work_of
from repo_jax.models.config import DecoderConfig, Rope
from repo_jax.programs import PROGRAMS, Programs, with_dtypes
from repo_jax.sharding import batch_ways, make_mesh
from repo_jax.topology import parse_topology, topology_devices, usable_memory, without_accelerators

GIB = 2**30
LLAMA = {"H": 128, "K": 8, "V": 128_256, "max_positions": 8192, "rope": Rope(500_000.0), "norm_eps": 1e-5}
SHAPES = {
    "tiny": DecoderConfig(D=512, F=1024, N=4, L=4, **(LLAMA | {"K": 2, "V": 32_768})),
    "1b": DecoderConfig(D=2048, F=8192, N=32, L=16, tie_embeddings=True, **(LLAMA | {"H": 64})),  # Llama 3.2 1B
    "3b": DecoderConfig(D=3072, F=8192, N=24, L=28, tie_embeddings=True, **LLAMA),  # Llama 3.2 3B
    "8b": DecoderConfig(D=4096, F=14336, N=32, L=32, **LLAMA),  # Llama 3 8B
}


def recipe_of(pairs: int, *, remat: str = "full", loss: str = "repo", dtype: str = "bfloat16") -> Recipe:
    model = {"model_name_or_path": "none", "remat": remat, "compute_dtype": dtype, "param_dtype": "float32"}
    return with_dtypes(to_recipe({"model": model, "loss": {"loss_type": loss}, "optim": {"train_batch_size": pairs}}))


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
    parser.add_argument("--keeps", type=int, default=0, help="row batches whose layer inputs two passes keep")
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, help="default: all of an update")
    parser.add_argument("--compiler_options", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--hlo", type=pathlib.Path, help="a folder for the programs' text")
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()
    without_accelerators()
    topology = parse_topology(arguments.topology)
    devices = topology_devices(topology)
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
    recipe = recipe_of(arguments.pairs, remat=arguments.remat, loss=arguments.loss)
    compiled = Programs(recipe, cfg, mesh, shape, arguments.keeps)
    limit = usable_memory(topology, devices) / GIB
    print(f"{arguments.shape} for {arguments.topology}, mesh {dict(mesh.shape)}, {shape}, remat {arguments.remat}")
    print(f"jax {jax.__version__}; {limit:.1f} GiB per device")
    print(
        "held between updates: "
        + ", ".join(f"{name} {size / GIB:.2f}" for name, size in compiled.held.items())
        + " GiB"
    )
    found = {}
    for name in arguments.programs or compiled.names:
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
            "kept_gib": round(compiled.waiting * (name in ("score", "add_weighted")) / GIB, 2),  # those that wait
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
        said |= {"remat": arguments.remat, "keeps": arguments.keeps, "jax": jax.__version__, "programs": found}
        arguments.json.write_text(json.dumps(said, indent=1) + "\n")


# What the programs' text says


def report(text: str, cfg: DecoderConfig, mesh: Mesh, shape: RowShape, head_chunks: tuple[int, int]) -> dict:
    tensor, ways = mesh.shape["tensor"], batch_ways(mesh)
    V, D, layer = cfg.padded_V // tensor, cfg.D, cfg.D * cfg.F // tensor  # of a device; a layer's largest weight
    found = work_of(text, mesh.shape).collectives
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
    fits = "ok" if found["peak_gib"] + found["kept_gib"] < limit else "NO"
    beside = f", {found['kept_gib']} GiB of layer inputs wait beside it" if found["kept_gib"] else ""
    print(
        f"\n{name}: compiled in {found['compile_seconds']} s, {found['tpu_custom_calls']} TPU kernels (tpu_custom_call)"
    )
    print(f"  {fits}  peak {found['peak_gib']} GiB of {limit:.1f}, {found['argument_gib']} of them arguments{beside}")
    for check, against in found["checks"].items():
        print(f"  {'NO' if against else 'ok'}  {check}" + (": " + ", ".join(against[:6]) if against else ""))
    for what, one in found["collectives"].items():
        print(f"      {one['count']:3d} x {what:34} {one['gib']:8.3f} GiB, largest {one['largest']}")
    print(end="", flush=True)


if __name__ == "__main__":
    main()
