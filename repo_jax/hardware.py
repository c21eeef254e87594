"""What known chips can do at most, by their makers' figures, and the most memory that was in use."""

import glob
import resource
import sys
from collections.abc import Iterable
from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """The published limits of what JAX calls one device: dense matmuls, no sparsity."""

    name: str
    bf16_flops: float | None  # per second; None: no fast bfloat16
    float32_flops: float | None  # per second, true float32 (not TF32); None: not published
    hbm_rate: float  # bytes per second
    hbm_bytes: float

    def peak(self, dtype: str) -> float | None:
        return {"bfloat16": self.bf16_flops, "float32": self.float32_flops}[dtype]


# TPUs: the specification tables of docs.cloud.google.com/tpu/docs (v4, v5e, v5p, v6e, tpu7x), bf16 per chip. A chip of TPU7x is
# two devices to JAX, so that half of its figures stand here. NVIDIA: the data sheets of each product, dense ("without
# sparsity"), float32 outside the tensor cores; B200 as one of the eight of an HGX B200.
TPU_V5E = Chip("TPU v5e", 197e12, None, 819e9, 16e9)
TPU_V5P = Chip("TPU v5p", 459e12, None, 2765e9, 95e9)
TPU_V6E = Chip("TPU v6e", 918e12, None, 1638e9, 32e9)
H100_SXM = Chip("H100 SXM", 989e12, 67e12, 3.35e12, 80e9)

# By the beginning of jax.Device.device_kind; the longest that fits is taken.
CHIPS = {
    "TPU v4": Chip("TPU v4", 275e12, None, 1228e9, 32 * GIB),
    "TPU v5 lite": TPU_V5E,
    "TPU v5e": TPU_V5E,
    "TPU v5": TPU_V5P,
    "TPU v5p": TPU_V5P,
    "TPU v6 lite": TPU_V6E,
    "TPU v6e": TPU_V6E,
    "TPU7x": Chip("TPU7x (one of a chip's two devices)", 2307e12 / 2, None, 7380e9 / 2, 96 * GIB),
    "NVIDIA A100-SXM4-40GB": Chip("A100 SXM 40GB", 312e12, 19.5e12, 1555e9, 40e9),
    "NVIDIA A100-SXM4-80GB": Chip("A100 SXM 80GB", 312e12, 19.5e12, 2039e9, 80e9),
    "NVIDIA A100-PCIE-40GB": Chip("A100 PCIe 40GB", 312e12, 19.5e12, 1555e9, 40e9),
    "NVIDIA A100 80GB PCIe": Chip("A100 PCIe 80GB", 312e12, 19.5e12, 1935e9, 80e9),
    "NVIDIA H100 80GB HBM3": H100_SXM,
    "NVIDIA H100 PCIe": Chip("H100 PCIe", 756e12, 51e12, 2.0e12, 80e9),
    "NVIDIA H200": Chip("H200 SXM", 989e12, 67e12, 4.8e12, 141e9),
    "NVIDIA H200 NVL": Chip("H200 NVL", 835e12, 60e12, 4.8e12, 141e9),
    "NVIDIA B200": Chip("B200", 2250e12, 75e12, 7.7e12, 180e9),
    "NVIDIA L4": Chip("L4", 121e12, 30.3e12, 300e9, 24e9),
    "Tesla T4": Chip("T4", None, 8.1e12, 320e9, 16e9),
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls so; None for others and for CPUs."""
    fits = [kind for kind in CHIPS if device_kind == kind or device_kind.startswith(f"{kind} ")]
    return CHIPS[max(fits, key=len)] if fits else None


# By which files they show, and what JAX needs to use them.
VISIBLE = {
    "TPU": (("accel[0-9]*", "vfio/[0-9]*"), "pip install -U 'jax[tpu]'"),
    "NVIDIA GPU": (("nvidia[0-9]*",), "pip install -U 'jax[cuda12]' (jax[cuda13] from driver 580 on)"),
}


def visible(folder: str = "/dev") -> tuple[str, str] | None:
    """The kind of accelerator that this machine has, whatever JAX uses, and the line that installs what JAX needs for it."""
    for kind, (patterns, line) in VISIBLE.items():
        if any(glob.glob(f"{folder}/{pattern}") for pattern in patterns):
            return kind, line
    return None


def peak_memory(devices: Iterable) -> dict[str, float]:
    """The most memory in use so far, in GiB, on the fullest of these devices; on CPU, which does not say, of the process."""
    stats = [device.memory_stats() or {} for device in devices]
    if all("peak_bytes_in_use" in stat for stat in stats):
        return {"peak_memory_gib": max(stat["peak_bytes_in_use"] for stat in stats) / GIB}
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return {"peak_process_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB}
