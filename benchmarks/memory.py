"""How the memory of an update grows with the vocabulary and with the tokens of a micro-batch, by XLA's own analysis.

python benchmarks/memory.py [--topology v5e:2x2]      (compiled for chips that need not be there: compile.py says what to install)
python benchmarks/memory.py --topology cpu

The model is small and lies whole on every device (mesh.data), so that nothing hides behind sharding. "rest" is the peak of the program less
its arguments: parameters, gradients so far and the batch (Adam's moments are not among them). It is taken apart by a fit over
vocabularies and sizes of the head's chunk: bytes for each logit of a chunk (4 are one chunk in float32) and for each number of the tied head
(what lives at the peak of this micro-batch's own gradient of it and of the head as it is multiplied).
"""

import argparse
import dataclasses

import jax
import numpy as np
from compile import SHAPES, recipe_of

from repo_jax.data.rows import RowShape
from repo_jax.programs import Programs
from repo_jax.sharding import make_mesh
from repo_jax.topology import parse_topology, topology_devices, without_accelerators

MIB = 2**20
T, D = 1152, 256
BASE = dataclasses.replace(SHAPES["tiny"], D=D, L=2, tie_embeddings=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5e:2x2", help="or cpu, this machine")
    parser.add_argument("--programs", nargs="+", default=["add_direct", "add_weighted"])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32_768, 65_536, 131_072, 262_144])
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[1, 2, 4, 8], help="per device, at the smallest vocabulary"
    )
    parser.add_argument("--chunks", type=int, nargs=2, default=[512, 1024], help="tokens in a chunk of the head")
    arguments = parser.parse_args()
    on_cpu = arguments.topology == "cpu"
    without_accelerators()
    devices = jax.devices()[:1] if on_cpu else topology_devices(parse_topology(arguments.topology))
    mesh, dtype = make_mesh(len(devices), 1, 1, devices), "float32" if on_cpu else "bfloat16"

    def rest(name: str, V: int, rows: int, chunk: int) -> tuple[float, float]:
        """Peak and rest, in bytes."""
        cfg = dataclasses.replace(BASE, V=V)
        programs = Programs(recipe_of(16, dtype=dtype), cfg, mesh, RowShape(rows * len(devices), T, T, T))
        programs.model = programs.model.clone(head_chunks=(chunk, chunk))
        memory = programs(name).memory_analysis()
        peak = memory.peak_memory_in_bytes
        if on_cpu:  # XLA leaves temporaries out of a CPU's peak
            peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        return peak, peak - memory.argument_size_in_bytes

    print(
        f"{arguments.topology}, jax {jax.__version__}, {dtype}; {T} slots a row, all scored; D {D}, {BASE.L} layers, tied head"
    )
    for name in arguments.programs:
        print(f"\n{name}\n       V  chunk  peak MiB  rest MiB  grew by  one float32 chunk grew by")
        points = []
        for chunk in arguments.chunks:
            before = None
            for V in arguments.vocabularies:
                peak, left = rest(name, V, 1, chunk)
                points.append((V, chunk, left))
                grew = (
                    ""
                    if before is None
                    else f"{(left - before[1]) / MIB:8.1f} {4 * chunk * (V - before[0]) / MIB:12.1f}"
                )
                print(f"{V:8d} {chunk:6d} {peak / MIB:9.1f} {left / MIB:9.1f} {grew}", flush=True)
                before = V, left
        V, chunk, left = np.array(points, float).T
        (per_logit, per_weight, _), *_ = np.linalg.lstsq(
            np.stack([V * chunk, V * D, np.ones_like(V)], 1), left, rcond=None
        )
        print(f"fit: {per_logit:.2f} bytes per logit of a chunk, {per_weight:.2f} per number of the head")
        print("  tokens  rest MiB  KiB per token more")
        before, V, chunk = None, arguments.vocabularies[0], arguments.chunks[0]
        for rows in arguments.rows:
            left = rest(name, V, rows, chunk)[1]
            more = "" if before is None else f"{(left - before[1]) / (rows * T - before[0]) / 1024:10.1f}"
            print(f"{rows * T:8d} {left / MIB:9.1f} {more}", flush=True)
            before = rows * T, left


if __name__ == "__main__":
    main()
