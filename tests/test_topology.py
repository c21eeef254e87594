"""Names of accelerators, and what is said where their compilers are missing. That devices come of them is in test_planning.py."""

import importlib.util
import sys

import pytest

from repo_jax.hardware import CHIPS, chip_of
from repo_jax.topology import (
    GPUS,
    TPUS,
    NoCompilerError,
    check_compiler,
    needed_and_there,
    parse_topology,
    target_config,
)


@pytest.mark.parametrize(
    "cloud, ours, devices",
    [
        ("v5litepod-16", "v5e:4x4", 16),
        ("v5litepod-1", "v5e:1x1", 1),
        ("v6e-256", "v6e:16x16", 256),
        ("v5p-16", "v5p:2x2x2", 8),  # cores, two to a chip
        ("v5p-128", "v5p:4x4x4", 64),
        ("v4-8", "v4:2x2x1", 4),
    ],
)
def test_a_clouds_name_and_the_compilers_mean_the_same_slice(cloud, ours, devices):
    topology = parse_topology(cloud)
    assert topology == parse_topology(ours)
    assert topology.name == ours and topology.devices == devices
    assert topology.accelerator_type == cloud


def test_slices_gpus_and_chips_of_two_devices_are_counted():
    slices = parse_topology("v6e:4x4", 2)
    assert (slices.devices, slices.near, str(slices)) == (32, 16, "2 slices of v6e:4x4")
    assert parse_topology("tpu7x:2x2x1").devices == 8
    nodes = parse_topology("h200:1x2x8")
    assert (nodes.devices, nodes.near, nodes.accelerator_type) == (16, 8, None)


def test_a_slice_of_an_unusual_form_has_no_name_in_clouds():
    assert parse_topology("v5e:2x8").accelerator_type is None
    assert parse_topology("tpu7x:2x2x1").accelerator_type is None


@pytest.mark.parametrize(
    "text, slices, words",
    [
        ("v7x:4x4", 1, "'v7x:4x4' is not known; give TPUs as v5e:4x4"),
        ("v5e", 1, "is not known; give TPUs as"),
        ("v5e:4x4x4", 1, "has 3 sizes but v5e takes 2 sizes in chips"),
        ("h200:8", 1, "takes slices x hosts x GPUs, as in h200:1x1x8"),
        ("a100:1x1x8", 1, "give a100-40 or a100-80"),
        ("v5p-15", 1, "no usual slice has 15 cores; choose one of v5p-8, v5p-16"),
        ("v5litepod-9", 1, "no usual slice has 9 chips"),
        ("tpu7x-16", 1, "give tpu7x:2x2x1 or larger"),
        ("v5e:4x4", 0, "--slices 0; give a number of slices from 1"),
        ("h200:1x1x8", 2, "for GPUs write h200:2x1x8"),
    ],
)
def test_a_name_that_means_nothing_is_answered_with_what_does(text, slices, words):
    with pytest.raises(ValueError, match="--") as raised:
        parse_topology(text, slices)
    assert words in str(raised.value)


@pytest.mark.parametrize("name", GPUS)
def test_a_gpu_is_described_by_what_jax_calls_it(name):
    text = target_config(GPUS[name])
    assert text.count("{") == text.count("}")
    assert f"device_memory_size: {GPUS[name].memory}" in text
    assert GPUS[name].chip in CHIPS.values()
    assert GPUS[name].memory == pytest.approx(GPUS[name].chip.hbm_bytes, rel=0.1)


def test_the_chips_are_those_that_devices_report():
    kinds = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}
    assert {name: chip_of(kinds[name]) for name in TPUS} == {name: tpu.chip for name, tpu in TPUS.items()}


@pytest.mark.parametrize(
    "text, needed, there",
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (28.13G) exceeds available HBM (15.75G).",
            28.13,
            15.75,
        ),
        ("E1000: CompileTimeHbmOom: ... (512.50M) exceeds available HBM (15.75G)", 512.5 / 1024, 15.75),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 16.95G of 15.75G hbm. Exceeded",
            16.95,
            15.75,
        ),
    ],
)
def test_the_compiler_says_what_is_needed_and_what_there_is(text, needed, there):
    assert [size / 2**30 for size in needed_and_there(text)] == pytest.approx([needed, there])


def test_other_words_of_the_compiler_say_nothing_of_memory():
    assert needed_and_there("E1001: CompileTimeScopedVmemOom: size 24.00M and limit 16.00M") is None


def test_off_linux_the_compiler_is_said_to_be_missing(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(NoCompilerError, match="Linux x86-64 only"):
        check_compiler(parse_topology("v5e:4x4"))


@pytest.mark.parametrize(
    "topology, install",
    [("v5e:4x4", "pip install 'repo_jax\\[tpu\\]'"), ("h200:1x1x8", "--no-deps jax-cuda12-plugin==[0-9.]+ jax-cuda12")],
)
def test_a_compiler_that_is_not_installed_is_named_with_how_to_get_it(topology, install, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(NoCompilerError, match=install):
        check_compiler(parse_topology(topology))
