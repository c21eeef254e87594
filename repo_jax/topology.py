"""Accelerators by name, and devices that stand for them where there are none: XLA's compilers take them for real ones."""

import importlib.util
import math
import os
import platform
import re
import sys
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from repo_jax.hardware import CHIPS, Chip

GIB = 2**30
# The share of a GPU's memory that launch/flags.sh has JAX take.
GPU_SHARE = 0.92


class Tpu(NamedTuple):
    """One generation under the compiler's name."""

    chip: Chip
    axes: int  # of the torus
    type: str | None  # what a cloud calls N of them, before -N; None: only by topology
    pool: str  # what GKE calls a pool of them
    per_chip: int  # what N counts: 1 chips, 2 cores
    devices: int  # that JAX sees on a chip
    usable: int  # bytes of one device that the compiler of jax 0.10.2 lets programs have
    options: dict  # what the compiler must be told besides
    link: float | None  # bytes per second out of one device over the slice's own links
    network: float | None  # and out of the slice


class Gpu(NamedTuple):
    """One GPU as XLA's compiler wants it described."""

    chip: Chip
    memory: int  # bytes, as the driver reports them
    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    fpus: int  # of each
    shared: int  # bytes of each
    cache: int  # second level
    clock: float  # GHz
    link: float  # bytes per second out of one GPU to the others of its host


MEGACORE = {"chip_config_name": "megacore"}  # both cores of a chip as one device, as on Cloud
# Links: half of the "bidirectional ICI bandwidth per chip" of docs.cloud.google.com/tpu/docs (v4: 2400 Gbps), networks its "DCN bandwidth",
# per device. NVLink: half of the total of each data sheet.
# fmt: off
TPUS = {
    #             chip                 axes  type        pool                      per_chip devices usable        options  link   network
    "v4":    Tpu(CHIPS["TPU v4"],      3, "v4",        "tpu-v4-podslice",         2, 1, int(30.75 * GIB), MEGACORE, 300e9, None),
    "v5e":   Tpu(CHIPS["TPU v5e"],     2, "v5litepod", "tpu-v5-lite-podslice",    1, 1, int(15.75 * GIB), {},       200e9, 25e9 / 8),
    "v5p":   Tpu(CHIPS["TPU v5p"],     3, "v5p",       "tpu-v5p-slice",           2, 1, int(95.74 * GIB), {},       600e9, 50e9 / 8),
    "v6e":   Tpu(CHIPS["TPU v6e"],     2, "v6e",       "tpu-v6e-slice",           1, 1, int(31.25 * GIB), {},       400e9, 100e9 / 8),
    "tpu7x": Tpu(CHIPS["TPU7x"],       3, None,        "tpu7x",                   2, 2, int(94.75 * GIB), {},       300e9, None),
}
GPUS = {
    #               chip                                memory        capability cores fpus shared  cache       clock link
    "a100-40": Gpu(CHIPS["NVIDIA A100-SXM4-40GB"],  40_960 << 20, (8, 0),  108, 64,  167_936, 41_943_040,  1.41, 300e9),
    "a100-80": Gpu(CHIPS["NVIDIA A100-SXM4-80GB"],  81_920 << 20, (8, 0),  108, 64,  167_936, 41_943_040,  1.41, 300e9),
    "h100":    Gpu(CHIPS["NVIDIA H100 80GB HBM3"],  81_559 << 20, (9, 0),  132, 128, 233_472, 52_428_800,  1.98, 450e9),
    "h200":    Gpu(CHIPS["NVIDIA H200"],           143_771 << 20, (9, 0),  132, 128, 233_472, 52_428_800,  1.98, 450e9),
    "b200":    Gpu(CHIPS["NVIDIA B200"],           183_359 << 20, (10, 0), 148, 128, 233_472, 132_644_864, 1.97, 900e9),
}
# fmt: on
# The shapes that clouds give by a number of chips.
FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
DEEP = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8",
        1024: "8x8x16", 2048: "8x16x16"}  # fmt: skip
CLOUD = {"v5litepod": "v5e", "v5e": "v5e", "v5p": "v5p", "v6e": "v6e", "v4": "v4"}
KNOWN = (
    "TPUs as v5e:4x4, v5p:2x2x2, v6e:16x16, v4:2x2x2, tpu7x:2x2x1 (chips), clouds' v5litepod-16, v6e-256, v5p-16, v4-8 (the last "
    f"two count cores), or GPUs as h200:1x2x8 (slices x hosts x GPUs; {', '.join(GPUS)})"
)


class NoCompilerError(Exception):
    """The compiler for a topology is not on this machine; the message says how to get it."""


class Topology(NamedTuple):
    kind: str  # a key of TPUS or GPUS
    sizes: tuple[int, ...]  # of one slice in chips; of GPUs: slices, hosts, GPUs
    slices: int = 1

    @property
    def is_gpu(self) -> bool:
        return self.kind in GPUS

    @property
    def name(self) -> str:
        """As the compiler has it; slices of TPUs are counted beside it."""
        return f"{self.kind}:{'x'.join(map(str, self.sizes))}"

    def __str__(self) -> str:
        return self.name if self.slices == 1 or self.is_gpu else f"{self.slices} slices of {self.name}"

    @property
    def spec(self) -> Tpu | Gpu:
        return GPUS[self.kind] if self.is_gpu else TPUS[self.kind]

    @property
    def chip(self) -> Chip:
        return self.spec.chip

    @property
    def devices(self) -> int:
        if self.is_gpu:
            return math.prod(self.sizes)
        return math.prod(self.sizes) * self.slices * self.spec.devices

    @property
    def near(self) -> int:
        """Devices that share the fast links: a slice of TPUs, a host of GPUs."""
        return self.sizes[-1] if self.is_gpu else self.devices // self.slices

    @property
    def accelerator_type(self) -> str | None:
        """What a cloud calls one slice; None where only a topology says it."""
        if self.is_gpu or self.spec.type is None:
            return None
        chips = math.prod(self.sizes)
        usual = (FLAT if self.spec.axes == 2 else DEEP).get(chips)
        return f"{self.spec.type}-{chips * self.spec.per_chip}" if usual == "x".join(map(str, self.sizes)) else None

    def larger(self) -> list["Topology"]:
        """The next usual sizes."""
        if self.is_gpu:
            slices, hosts, gpus = self.sizes
            return [Topology(self.kind, (slices, hosts * n, gpus)) for n in (2, 4, 8)]
        shapes = FLAT if self.spec.axes == 2 else DEEP
        more = [shape for chips, shape in sorted(shapes.items()) if chips > math.prod(self.sizes)]
        return [Topology(self.kind, tuple(map(int, shape.split("x"))), self.slices) for shape in more[:3]]


def parse_topology(text: str, slices: int = 1) -> Topology:
    """Raises ValueError for a name that stands for nothing here."""
    if slices < 1:
        raise ValueError(f"--slices {slices}; give a number of slices from 1")
    if match := re.fullmatch(r"([a-z0-9]+)-(\d+)", text):
        return _from_cloud(text, match[1], int(match[2]), slices)
    match = re.fullmatch(r"([a-z0-9\-]+):(\d+(?:x\d+)*)", text)
    if match is None or match[1] not in TPUS | GPUS | {"a100": 0}:
        raise ValueError(f"--topology '{text}' is not known; give {KNOWN}")
    kind, sizes = match[1], tuple(map(int, match[2].split("x")))
    if kind == "a100":
        raise ValueError(f"--topology '{text}': there are A100s of 40 and of 80 GB; give a100-40 or a100-80")
    axes = 3 if kind in GPUS else TPUS[kind].axes
    if len(sizes) != axes or 0 in sizes:
        wanted = "slices x hosts x GPUs, as in h200:1x1x8" if kind in GPUS else f"{axes} sizes in chips"
        raise ValueError(f"--topology '{text}' has {len(sizes)} sizes but {kind} takes {wanted}")
    if kind in GPUS and slices > 1:
        raise ValueError(f"--slices {slices} is for TPUs; for GPUs write {kind}:{slices}x{sizes[1]}x{sizes[2]}")
    return Topology(kind, sizes, slices)


def _from_cloud(text: str, name: str, count: int, slices: int) -> Topology:
    if name == "tpu7x":
        raise ValueError(f"--topology '{text}': TPU7x is asked for by topology; give tpu7x:2x2x1 or larger")
    if name not in CLOUD:
        raise ValueError(f"--topology '{text}' is not known; give {KNOWN}")
    spec = TPUS[CLOUD[name]]
    shapes = FLAT if spec.axes == 2 else DEEP
    shape = None if count % spec.per_chip else shapes.get(count // spec.per_chip)
    if shape is None:
        unit = "cores" if spec.per_chip == 2 else "chips"
        there = ", ".join(f"{name}-{chips * spec.per_chip}" for chips in shapes)
        raise ValueError(f"--topology '{text}': no usual slice has {count} {unit}; choose one of {there}")
    return Topology(CLOUD[name], tuple(map(int, shape.split("x"))), slices)


def without_accelerators() -> None:
    """Has this process compute on its CPU alone and compile for machines that are not there; before any device is asked for."""
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # two processes may compile at once
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")
    # Programs for devices that are not there cannot be kept.
    jax.config.update("jax_compilation_cache_dir", None)


def check_compiler(topology: Topology) -> None:
    """Raises NoCompilerError where nothing here compiles for it."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise NoCompilerError(
            f"compilers for TPUs and GPUs run on Linux x86-64 only, and this is {platform.system()} {platform.machine()}"
        )
    if topology.is_gpu and not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
        version = jax.__version__
        raise NoCompilerError(
            "the compiler for NVIDIA GPUs is not installed; it needs no GPU and no CUDA: "
            f"pip install --no-deps jax-cuda12-plugin=={version} jax-cuda12-pjrt=={version}"
        )
    if not topology.is_gpu and not ("TPU_LIBRARY_PATH" in os.environ or importlib.util.find_spec("libtpu")):
        raise NoCompilerError(
            "the compiler for TPUs, libtpu, is not installed; it needs no TPU: pip install 'repo_jax[tpu]'"
        )


def topology_devices(topology: Topology) -> list:
    """Devices to compile for. Raises NoCompilerError, or ValueError for sizes that the compiler refuses."""
    check_compiler(topology)
    import jax.experimental.topologies as topologies

    try:
        if topology.is_gpu:
            options = {
                "platform": "cuda",
                "topology_name": topology.kind,
                "target_config": target_config(topology.spec),
            }
            found = topologies.get_topology_desc(topology="x".join(map(str, topology.sizes)), **options)
        else:
            options = dict(topology.spec.options)
            if topology.slices > 1:
                options["num_slices"] = topology.slices
            if math.prod(topology.sizes) == 1:  # a part of a host, which the compiler takes for a host of its own
                options["chips_per_host_bounds"] = [1, 1, 1]
            found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options)
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise ValueError(f"the compiler refuses {topology}: {str(error).splitlines()[0]}") from None
    return list(found.devices)


def target_config(gpu: Gpu) -> str:
    """The GPU in the text form of XLA's GpuTargetConfigProto."""
    (major, minor), rate = gpu.capability, int(gpu.chip.hbm_rate)
    return (
        "gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 "
        f"shared_memory_per_core: {gpu.shared} threads_per_core_limit: 2048 core_count: {gpu.cores} fpus_per_core: {gpu.fpus} "
        "block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 "
        f"memory_bandwidth: {rate} l2_cache_size: {gpu.cache} clock_rate_ghz: {gpu.clock} device_memory_size: {gpu.memory} "
        f"shared_memory_per_block_optin: {gpu.shared - 1024} cuda_compute_capability {{ major: {major} minor: {minor} }} "
        'registers_per_core_limit: 65536 registers_per_block_limit: 65536 } platform_name: "CUDA" '
        f'dnn_version_info {{ major: 9 minor: 8 }} device_description_str: "NVIDIA {gpu.chip.name}"'
    )


def published_memory(topology: Topology) -> int:
    """Bytes that programs may use on one device, without asking a compiler: of a GPU the share that the launch scripts take."""
    spec = topology.spec
    return int(GPU_SHARE * spec.memory) if topology.is_gpu else spec.usable


def usable_memory(topology: Topology, devices: list) -> int:
    """The same, of a TPU as its compiler says now."""
    if topology.is_gpu:
        return published_memory(topology)
    whole = NamedSharding(Mesh(np.array(devices), ("all",)), PartitionSpec())
    huge = jax.ShapeDtypeStruct((2**40,), np.int8, sharding=whole)
    try:  # what cannot fit anywhere is answered with the limit
        jax.jit(lambda x: x + 1).trace(huge).lower(lowering_platforms=("tpu",)).compile()
    except jax.errors.JaxRuntimeError as error:
        if asked := needed_and_there(str(error)):
            return asked[1]
    return published_memory(topology)


def needed_and_there(text: str) -> tuple[int, int] | None:
    """(bytes a program needs, bytes there are) from the words in which the TPU's compiler refuses it."""
    match = re.search(r"\(([\d.]+)([KMGT]?)B?\) exceeds available \w+ \(([\d.]+)([KMGT]?)B?\)", text) or re.search(
        r"[Uu]sed ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", text
    )
    if match is None:
        return None
    unit = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
    return tuple(int(float(match[i]) * 2 ** unit[match[i + 1]]) for i in (1, 3))
