"""Measures what each of several processes reads, writes and holds while it imports and exports its part of a checkpoint.

python benchmarks/stream.py [--processes 4] [--shape 1b|tiny] [--dtype bfloat16] [--json]

It writes a checkpoint of random bfloat16 numbers in the shape of Llama 3.2 1B with a head of its own (1.5 billion of them, 3 GB), has
the processes (one CPU device each, fsdp over all) take it in and write it out again, compares every tensor, and deletes all of it. It
needs 7 GB of disk. Each process may read, write and hold its share of the parameters, the largest tensor and half a GiB; where one does
more, the exit code is 1. Bytes read are those that the kernel counts for the process, bytes written are the sizes of its files, and
memory is the most that was resident beyond what the process held when jax had started.
"""

import argparse
import json
import pathlib
import socket
import subprocess
import sys
import tempfile
import time

import numpy as np

SLACK = 2**29  # bytes
SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128_256}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64},
    "tiny": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "vocab_size": 500}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the parameters in memory"
    )
    parser.add_argument("--timeout", type=float, default=1800, help="seconds that the processes may take")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        rank, port, folder = arguments.worker
        return work(int(rank), arguments.processes, port, pathlib.Path(folder), arguments.dtype)
    result = measure(arguments.shape, arguments.processes, arguments.dtype, arguments.timeout)
    print(json.dumps(result) if arguments.json else table(result))
    sys.exit(0 if result["identical"] and all(within(result, one) for one in result["processes"]) else 1)


def measure(shape: str, processes: int, dtype: str, timeout: float) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        stored, largest = write_checkpoint(folder / "in", SHAPES[shape])
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        command = [sys.executable, __file__, "--processes", str(processes), "--dtype", dtype, "--worker"]
        workers = [
            subprocess.Popen([*command, str(rank), str(port), str(folder)], stdout=subprocess.PIPE, text=True)
            for rank in range(processes)
        ]
        try:
            results = [json.loads(worker.communicate(timeout=timeout)[0].splitlines()[-1]) for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
        share = stored * (2 if dtype == "float32" else 1) // processes
        return {
            "stored": stored,
            "share": share,
            "largest": largest,
            "limit": share + largest + SLACK,
            "identical": same_tensors(folder / "in", folder / "out"),
            "processes": results,
        }


def within(result: dict, process: dict) -> bool:
    read_or_written = max(process["import"]["bytes"], process["export"]["bytes"])
    held = max(process["import"]["memory"], process["export"]["memory"])
    return max(read_or_written, held) <= result["limit"]


def table(result: dict) -> str:
    gib = {name: result[name] / 2**30 for name in ("stored", "share", "largest", "limit")}
    lines = [
        f"{gib['stored']:.2f} GiB stored; limit {gib['limit']:.2f} GiB: share {gib['share']:.2f}, largest tensor {gib['largest']:.2f}, 0.5"
    ]
    lines.append("process   import: read  memory  seconds   export: written  memory  seconds   (GiB)")
    for rank, process in enumerate(result["processes"]):
        read, written = (
            (process[way]["bytes"] / 2**30, process[way]["memory"] / 2**30, process[way]["seconds"])
            for way in ("import", "export")
        )
        lines.append("{:7}{:15.2f}{:8.2f}{:9.1f}{:18.2f}{:8.2f}{:9.1f}".format(rank, *read, *written))
    lines.append("every tensor came out as it went in" if result["identical"] else "TENSORS DIFFER")
    return "\n".join(lines)


def write_checkpoint(folder: pathlib.Path, shape: dict) -> tuple[int, int]:
    """A model in files of about a fifth of it, with config.json and index; the bytes of all tensors and of the largest."""
    from repo_jax.models.config import DecoderConfig
    from repo_jax.models.hf import expected_tensors, plan_files
    from repo_jax.models.tensors import DTYPES, nbytes, write_file

    folder.mkdir()
    config = {"model_type": "llama", "tie_word_embeddings": False, "max_position_embeddings": 2048} | shape
    (folder / "config.json").write_text(json.dumps(config))
    shapes = expected_tensors(DecoderConfig.from_hf(folder))
    tensors = {name: ("bfloat16", shape) for name, shape in shapes.items()}
    sizes = [nbytes(*tensor) for tensor in tensors.values()]
    rng = np.random.default_rng(0)

    def numbers(tensors):
        for name, (dtype, shape) in tensors.items():
            bits = np.frombuffer(rng.bytes(nbytes(dtype, shape)), np.uint16) & 0xBFFF  # below 2: no NaN, no infinity
            yield name, bits.view(DTYPES[dtype]).reshape(shape)

    files = plan_files(tensors, max_shard_bytes=max(sum(sizes) // 5, max(sizes)))
    for file in files:
        write_file(folder / file.name, file.tensors, numbers(file.tensors))
    weight_map = {name: file.name for file in files for name in file.tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(sizes), max(sizes)


def same_tensors(one: pathlib.Path, other: pathlib.Path) -> bool:
    """As the safetensors package reads them."""
    import safetensors

    def tensors(folder):
        for path in sorted(folder.glob("*.safetensors")):
            file = safetensors.safe_open(path, framework="numpy")
            for name in file.keys():  # noqa: SIM118 - it is no dict
                yield name, file

    ones, others = dict(tensors(one)), dict(tensors(other))
    return ones.keys() == others.keys() and all(
        np.array_equal(*(files[name].get_tensor(name).view(np.uint16) for files in (ones, others))) for name in ones
    )


def work(rank: int, processes: int, port: str, folder: pathlib.Path, dtype: str) -> None:
    """One process: import, export, and a line of JSON with what they took."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    jax.distributed.initialize(f"localhost:{port}", processes, rank)

    from repo_jax.models import hf
    from repo_jax.models.config import DecoderConfig
    from repo_jax.models.decoder import param_shapes
    from repo_jax.sharding import make_mesh, param_shardings

    cfg = DecoderConfig.from_hf(folder / "in")
    shardings = param_shardings(param_shapes(cfg), make_mesh(1, processes, 1))
    before, result = kernel_counts(), {}

    written, write_file = [], hf.write_file

    def noted(path, *args):
        write_file(path, *args)
        written.append(path.stat().st_size)

    hf.write_file = noted  # the kernel counts what processes send each other too

    def taken(begin: dict, count: int) -> dict:
        after = kernel_counts()
        memory, seconds = after["VmHWM"] - before["VmRSS"], after["time"] - begin["time"]
        return {"bytes": count, "memory": memory, "seconds": seconds}

    begin = reset_peak()
    params = jax.block_until_ready(hf.from_hf(folder / "in", cfg, shardings, dtype=dtype))
    result["import"] = taken(begin, kernel_counts()["rchar"] - begin["rchar"])
    begin = reset_peak()
    hf.to_hf(params, cfg, folder / "out", dtypes=hf.stored_dtypes(folder / "in", cfg))
    result["export"] = taken(begin, sum(written))
    print(json.dumps(result))


def kernel_counts() -> dict:
    """Bytes read and written, resident memory now and at its peak, seconds."""
    counts = {"time": time.perf_counter()}
    for line in pathlib.Path("/proc/self/io").read_text().splitlines():
        name, _, value = line.partition(":")
        counts[name] = int(value)
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmRSS", "VmHWM"):
            counts[name] = int(value.split()[0]) * 1024
    return counts


def reset_peak() -> dict:
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident now
    return kernel_counts()


if __name__ == "__main__":
    main()
