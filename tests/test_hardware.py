import types

import jax
import pytest

from repo_jax.hardware import CHIPS, GIB, chip_of, peak_memory


@pytest.mark.parametrize(
    "kind, name",
    [
        ("TPU v5 lite", "TPU v5e"),
        ("TPU v5p", "TPU v5p"),
        ("TPU v5", "TPU v5p"),
        ("TPU v6 lite", "TPU v6e"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200 SXM"),
        ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA L4", "L4"),
    ],
)
def test_a_chip_is_known_by_what_jax_calls_it(kind, name):
    assert chip_of(kind).name == name


@pytest.mark.parametrize("kind", ["cpu", "TPU v2", "NVIDIA L40S", "NVIDIA H2000", "AMD Instinct MI300X", ""])
def test_an_unknown_device_is_no_chip(kind):
    assert chip_of(kind) is None


def test_figures_have_plausible_sizes():
    # FLOPs per byte at which a chip's memory and arithmetic are in balance; a slip by 1000 would stand out.
    for chip in CHIPS.values():
        peak = chip.bf16_flops or chip.float32_flops
        assert 20 < peak / chip.hbm_rate < 700
        assert 14e9 < chip.hbm_bytes < 200e9
        assert chip.float32_flops is None or chip.bf16_flops is None or chip.float32_flops < chip.bf16_flops / 3


def test_a_peak_is_that_of_the_dtype():
    chip = chip_of("NVIDIA H200")
    assert (chip.peak("bfloat16"), chip.peak("float32")) == (989e12, 67e12)
    assert chip_of("Tesla T4").peak("bfloat16") is None


def test_peak_memory_is_that_of_the_fullest_device():
    devices = [
        types.SimpleNamespace(memory_stats=lambda size=size: {"peak_bytes_in_use": size * GIB}) for size in (2, 5, 3)
    ]
    assert peak_memory(devices) == {"peak_memory_gib": 5.0}


def test_on_cpu_peak_memory_is_the_processs_and_is_called_so():
    [(name, size)] = peak_memory(jax.local_devices()).items()
    assert name == "peak_process_memory_gib" and 0.1 < size < 64
