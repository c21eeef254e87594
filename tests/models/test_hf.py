import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from examples import ROOT, STORIES, TINY, one_device, random_params
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from repo_jax.models import hf
from repo_jax.models.config import DecoderConfig
from repo_jax.models.decoder import param_shapes
from repo_jax.models.tensors import DTYPES, TensorFiles
from repo_jax.sharding import make_mesh, param_shardings

CFG = DecoderConfig.from_hf(STORIES)
FAMILIES = [
    "llama",
    "llama-bias",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3-bias",
    "gemma",
    "gemma2",
    "gemma3",
    "phi3",
    "olmo2",
]


def load(folder, cfg=CFG, mesh=None, **options):
    return hf.from_hf(folder, cfg, param_shardings(param_shapes(cfg), mesh or one_device()), **options)


def tensors_of(folder) -> dict[str, np.ndarray]:
    """All tensors of a folder, as the safetensors package reads them."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= safetensors.numpy.load_file(file)
    return found


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        (a := one[name]).dtype == (b := other[name]).dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        for name in one
    )


# In and out


@pytest.fixture(scope="module")
def checkpoints():
    pytest.importorskip("torch", reason="the checkpoints are written by transformers' own models, which need torch")
    import checkpoints

    return checkpoints


@pytest.mark.parametrize(
    "name, tied", [("llama-reward", False), *((name, tied) for name in FAMILIES for tied in (False, True))]
)
def test_every_familys_tensors_go_in_and_out_unchanged_and_load_in_transformers(checkpoints, tmp_path, name, tied):
    model = checkpoints.make(name, tmp_path / "in", dtype="bfloat16", tied=tied, shard_bytes=20_000)
    theirs, cfg = tensors_of(tmp_path / "in"), DecoderConfig.from_hf(tmp_path / "in")
    assert ("lm_head.weight" in theirs) == (not tied and not cfg.labels) and cfg.V % 128
    # Several files onto a mesh and out as several, those onto one device and out as one.
    params = load(tmp_path / "in", cfg, make_mesh(1, 4, 2), dtype="bfloat16")
    hf.to_hf(params, cfg, tmp_path / "several", dtypes="bfloat16", max_shard_bytes=20_000)
    assert same(tensors_of(tmp_path / "several"), theirs)
    index = json.loads((tmp_path / "several" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in theirs.values())}
    for file, sizes in files_of(index).items():
        tensors = safetensors.numpy.load_file(tmp_path / "several" / file)
        assert tensors.keys() == sizes
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 20_000
    shutil.copy(tmp_path / "in" / "config.json", tmp_path / "several")
    hf.to_hf(load(tmp_path / "several", cfg), cfg, tmp_path / "one", dtypes="bfloat16")
    assert same(tensors_of(tmp_path / "one"), theirs)
    assert [file.name for file in (tmp_path / "one").iterdir()] == ["model.safetensors"]
    shutil.copy(tmp_path / "in" / "config.json", tmp_path / "one")
    for folder in ("one", "several"):
        loaded, report = type(model).from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(report.values()), report
        assert all((one == other).all() for one, other in zip(loaded.parameters(), model.parameters(), strict=True))


def files_of(index: dict) -> dict[str, set[str]]:
    files = {}
    for name, file in index["weight_map"].items():
        files.setdefault(file, set()).add(name)
    return files


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3"])
def test_a_familys_parameters_are_the_same_on_every_mesh_and_part_by_part(checkpoints, name, monkeypatch):
    cfg = DecoderConfig.from_hf(checkpoints.folder_of(name))
    folder, shapes = checkpoints.folder_of(name), param_shapes(cfg)
    whole = load(folder, cfg)
    assert jax.tree.map(lambda leaf: leaf.shape, whole) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    for axes, host_bytes in (((1, 8, 1), 2**26), ((2, 2, 2), 2**26), ((1, 2, 4), 3000 if name == "gemma2" else 2**26)):
        monkeypatch.setattr(hf, "HOST_BYTES", host_bytes)
        shardings = param_shardings(shapes, make_mesh(*axes))
        spread = hf.from_hf(folder, cfg, shardings)
        assert jax.tree.map(lambda leaf: leaf.sharding, spread) == shardings
        jax.tree.map(np.testing.assert_array_equal, spread, whole)


def test_rows_that_pad_the_vocabulary_are_zero_and_never_written(tmp_path):
    params = random_params(TINY)
    assert params["head_VD"].shape == (128, TINY.D) and TINY.V == 50 and params["head_VD"][50:].any()
    hf.to_hf(params, TINY, tmp_path, dtypes="float32")
    assert tensors_of(tmp_path)["lm_head.weight"].shape == (50, TINY.D)
    for mesh in (
        one_device(),
        make_mesh(1, 1, 4, devices=jax.devices()[:4]),
    ):  # the last device has nothing but padding
        again = load(tmp_path, TINY, mesh)
        for name in ("embed_VD", "head_VD"):
            np.testing.assert_array_equal(again[name][:50], params[name][:50])
            np.testing.assert_array_equal(again[name][50:], 0)


def test_every_parameter_has_one_row_in_the_table():
    options = [
        {},
        {"tie_embeddings": True},
        {"labels": 3},
        {"qkv_bias": True},
        {"qkv_bias": True, "o_bias": True, "qk_norm": "head"},
        {"layout": "gemma2", "post_norms": True, "windows": (8, None)},
        {"layout": "phi3"},
        {"layout": "olmo2", "qk_norm": "whole", "pre_norms": False, "post_norms": True},
    ]
    assert {option.get("layout", "llama") for option in options} == set(hf.LAYOUTS)
    for option in options:
        cfg = dataclasses.replace(TINY, **option)
        places = [place.path for place in hf.places_of(cfg)]
        assert sorted(places) == sorted(flatten_dict(param_shapes(cfg), sep="/")), option


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 100_000])
def test_a_real_models_tensors_go_in_and_out_in_every_dtype(tmp_path, dtype, max_shard_bytes):
    source = tmp_path / "source"
    source.mkdir()
    tensors = safetensors.numpy.load_file(STORIES / "model.safetensors")
    tensors = {name: tensor.astype(DTYPES[dtype]) for name, tensor in tensors.items()}
    safetensors.numpy.save_file(tensors, source / "model.safetensors")
    dtypes = hf.stored_dtypes(source, CFG)
    assert set(dtypes.values()) == {dtype}
    hf.to_hf(load(source), CFG, tmp_path / "output", dtypes=dtypes, max_shard_bytes=max_shard_bytes)
    assert same(tensors_of(tmp_path / "output"), tensors)
    several = len(list((tmp_path / "output").glob("*.safetensors"))) > 1
    assert several == (max_shard_bytes < 10**9) == (tmp_path / "output" / "model.safetensors.index.json").exists()


def test_tensors_of_several_dtypes_keep_them(tmp_path, broken):
    kinds = sorted(DTYPES)

    def change(tensors):
        for i, name in enumerate(sorted(tensors)):
            tensors[name] = tensors[name].astype(DTYPES[kinds[i % 3]])

    folder = broken(change)
    dtypes = hf.stored_dtypes(folder, CFG)
    assert set(dtypes.values()) == set(kinds)
    hf.to_hf(load(folder), CFG, tmp_path / "output", dtypes=dtypes)
    assert same(tensors_of(tmp_path / "output"), tensors_of(folder))


def test_the_smallest_numbers_go_in_and_out_on_a_mesh(tmp_path, broken):
    """Subnormal ones, which processors that compute with them may take for zero."""

    def change(tensors):
        for name, tensor in tensors.items():
            bits = np.random.default_rng(0).integers(0x80, size=tensor.shape, dtype=np.uint16)
            tensors[name] = bits.view(ml_dtypes.bfloat16)

    folder = broken(change)
    for dtype in ("bfloat16", "float32"):
        params = load(folder, mesh=make_mesh(1, 4, 2), dtype=dtype)
        hf.to_hf(params, CFG, tmp_path / dtype, dtypes="bfloat16")
        assert same(tensors_of(tmp_path / dtype), tensors_of(folder))


def test_bfloat16_parameters_are_the_nearest_to_what_is_stored(tmp_path):
    rounded = load(STORIES, dtype="bfloat16")
    for one, other in zip(jax.tree.leaves(rounded), jax.tree.leaves(load(STORIES)), strict=True):
        assert one.dtype == "bfloat16"
        np.testing.assert_array_equal(one, np.asarray(other).astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("host_bytes", [1, 1500])
def test_the_size_of_what_the_host_holds_changes_nothing(tmp_path, monkeypatch, host_bytes):
    cfg = dataclasses.replace(TINY, L=5)
    params = random_params(cfg)
    monkeypatch.setattr(hf, "HOST_BYTES", host_bytes)
    hf.to_hf(params, cfg, tmp_path / "one", dtypes="float32")
    monkeypatch.setattr(hf, "HOST_BYTES", 2**26)
    hf.to_hf(params, cfg, tmp_path / "other", dtypes="float32")
    assert same(tensors_of(tmp_path / "one"), tensors_of(tmp_path / "other"))
    monkeypatch.setattr(hf, "HOST_BYTES", host_bytes)
    again = load(tmp_path / "one", cfg)
    for path, leaf in flatten_dict(params, sep="/").items():
        found = flatten_dict(again, sep="/")[path]
        np.testing.assert_array_equal(
            found[: cfg.V] if "VD" in path else found, leaf[: cfg.V] if "VD" in path else leaf
        )


# What is read


class Recorded(TensorFiles):
    """What was read from every folder since it was last emptied."""

    opened: list

    def __init__(self, folder):
        super().__init__(folder)
        self.opened.append(self)


@pytest.fixture
def opened(monkeypatch):
    monkeypatch.setattr(Recorded, "opened", [], raising=False)
    monkeypatch.setattr(hf, "TensorFiles", Recorded)
    return Recorded.opened


@pytest.mark.parametrize("axes", [(1, 8, 1), (4, 2, 1), (2, 2, 2), (8, 1, 1)])
def test_devices_that_hold_the_same_part_share_one_reading(opened, axes):
    params = load(STORIES, mesh=make_mesh(*axes))
    assert sum(files.bytes_read for files in opened) == sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def test_an_array_needs_only_the_bytes_of_the_devices_that_are_here(opened, monkeypatch):
    """One device's part of a mesh of eight: what a process with one of them reads."""
    mesh = make_mesh(1, 8, 1)
    original = jax.make_array_from_callback

    def first_device(shape, sharding, read):
        part = read(sharding.addressable_devices_indices_map(shape)[mesh.devices.flat[0]])
        assert part.shape == sharding.shard_shape(shape)
        return original(shape, one_device_sharding, lambda index: np.zeros(shape, part.dtype))

    one_device_sharding = NamedSharding(one_device(), P())
    monkeypatch.setattr(hf.jax, "make_array_from_callback", first_device)
    params = load(STORIES, mesh=mesh)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert sum(files.bytes_read for files in opened) == total // 8


def test_deltas_are_added_to_the_parts_that_are_read(tmp_path):
    names = ["model.layers.1.self_attn.q_proj.weight", "model.layers.2.mlp.down_proj.weight"]
    shapes = hf.expected_tensors(CFG)
    rng = np.random.default_rng(0)
    whole = {name: rng.normal(size=shapes[name]).astype(np.float32) for name in names}

    class Deltas:
        def delta(self, name, index):
            return whole[name][index] if name in whole else None

    expected = tensors_of(STORIES)
    for name in names:
        expected[name] = expected[name] + whole[name]
    for i, mesh in enumerate((one_device(), make_mesh(1, 4, 2))):
        params = load(STORIES, mesh=mesh, deltas=Deltas())
        hf.to_hf(params, CFG, tmp_path / str(i), dtypes="float32")
        assert same(tensors_of(tmp_path / str(i)), expected)


def test_a_split_that_the_files_cannot_serve_is_refused():
    mesh = make_mesh(1, 8, 1)
    shardings = param_shardings(param_shapes(CFG), mesh)
    shardings["layers_L"]["attn"]["q_DNH"] = NamedSharding(mesh, P(None, None, None, "fsdp"))
    with pytest.raises(
        ValueError, match=r"attn/q_DNH is split along H, which .*q_proj.weight cannot be; split it along N"
    ):
        hf.from_hf(STORIES, CFG, shardings)


# What is wrong with a folder


@pytest.fixture
def broken(tmp_path):
    """A copy of the real model, to be spoilt by the test."""
    folder = tmp_path / "broken"
    folder.mkdir()
    shutil.copy(STORIES / "config.json", folder)
    tensors = safetensors.numpy.load_file(STORIES / "model.safetensors")

    def spoil(change):
        change(tensors)
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
        return folder

    return spoil


def test_tensors_that_do_not_fit_are_listed_by_name_and_file(broken):
    def change(tensors):
        tensors["extra.weight"] = tensors.pop("model.norm.weight")
        tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((3, 4), np.float32)

    with pytest.raises(ValueError) as error:
        load(broken(change))
    message = str(error.value)
    assert "missing model.norm.weight" in message and "unexpected extra.weight (model.safetensors)" in message
    assert (
        "model.layers.0.mlp.up_proj.weight has shape [3, 4], config.json says [172, 64] (model.safetensors)" in message
    )


def test_a_fused_tensor_of_another_size_is_named(checkpoints, tmp_path):
    checkpoints.make("phi3", tmp_path)
    cfg = dataclasses.replace(DecoderConfig.from_hf(tmp_path), K=4)
    with pytest.raises(
        ValueError, match=r"layers.0.self_attn.qkv_proj.weight has shape \[64, 32\], .* says \[96, 32\]"
    ):
        load(tmp_path, cfg)


def test_a_copy_of_a_tied_head_and_old_buffers_are_passed_over(tmp_path, broken):
    expected = {}

    def change(tensors):
        for name in tensors:
            tensors[name] = tensors[name].astype(np.float16)
        expected.update(tensors)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].astype(np.float32)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)

    folder = broken(change)
    dtypes = hf.stored_dtypes(folder, CFG)
    assert set(dtypes.values()) == {"float16"}
    hf.to_hf(load(folder), CFG, tmp_path / "out", dtypes=dtypes)
    assert same(tensors_of(tmp_path / "out"), expected)


@pytest.mark.parametrize("axes", [(1, 1, 1), (1, 4, 2)])
def test_a_weight_that_is_not_a_number_is_named_with_its_file(broken, axes):
    def change(tensors):
        tensors["model.layers.3.mlp.down_proj.weight"][63, 171] = np.nan

    folder = broken(change)
    with pytest.raises(
        ValueError, match=rf"model.layers.3.mlp.down_proj.weight in '{folder}/model.safetensors' holds NaN or infinity"
    ):
        load(folder, mesh=make_mesh(*axes, devices=jax.devices()[: math.prod(axes)]))


def test_a_cut_or_missing_file_of_several_is_named_with_its_tensor(tmp_path):
    hf.to_hf(load(STORIES), CFG, tmp_path, dtypes="float32", max_shard_bytes=300_000)
    last = max(tmp_path.glob("*.safetensors"))
    names = sorted(safetensors.numpy.load_file(last))
    os.truncate(last, last.stat().st_size - 1)
    with pytest.raises(ValueError, match=rf"'{last}' is not a whole safetensors file \(it ends within {names[-1]}: "):
        load(tmp_path)
    last.unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"has no {last.name}, which holds {names[0]} and {len(names) - 1} more"
    ):
        load(tmp_path)


# What is written


def test_the_host_holds_one_tensor_at_a_time():
    cfg = dataclasses.replace(TINY, D=512, F=2048, L=2)
    params = jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape), param_shapes(cfg))
    list(hf.hf_tensors(params, cfg, dtypes="float32"))  # compiles
    tracemalloc.start()
    for _, tensor in hf.hf_tensors(params, cfg, dtypes="float32"):
        del tensor
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.5 * 512 * 2048 * 4


def test_an_export_that_fails_leaves_no_file(tmp_path, monkeypatch):
    params = load(STORIES)
    original = hf.hf_tensors

    def failing(*args, **options):
        for n, pair in enumerate(original(*args, **options)):
            if n == 30:
                raise OSError("No space left on device")
            yield pair

    with monkeypatch.context() as patch:
        patch.setattr(hf, "hf_tensors", failing)
        with pytest.raises(OSError, match="No space left"):
            hf.to_hf(params, CFG, tmp_path, dtypes="float32", max_shard_bytes=100_000)
    assert not list(tmp_path.iterdir())
    params["layers_L"]["mlp"]["up_DF"] = params["layers_L"]["mlp"]["up_DF"].at[4, 0, 0].set(1e5)
    with pytest.raises(ValueError, match=r"model.layers.4.mlp.up_proj.weight has NaN or infinity as float16"):
        hf.to_hf(params, CFG, tmp_path, dtypes="float16", max_shard_bytes=100_000)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "there", ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
)
def test_weights_that_are_there_are_never_mixed_with_new_ones(tmp_path, there):
    (tmp_path / there).write_text("mine")
    with pytest.raises(FileExistsError, match=f"holds weights already \\({there}\\); name a new folder"):
        hf.to_hf(random_params(TINY), TINY, tmp_path, dtypes="float32")
    assert (tmp_path / there).read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_files_are_shared_out_evenly_and_no_larger_than_asked():
    tensors = {f"t{i}": ("float32", (25,)) for i in range(40)} | {"large": ("bfloat16", (300,))}
    for processes in (1, 3, 4):
        files = hf.plan_files(tensors, max_shard_bytes=450, processes=processes)
        assert [name for file in files for name in file.tensors] == list(tensors)
        assert [file.name for file in files] == [
            f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
        ]
        sizes = [sum(600 if name == "large" else 100 for name in file.tensors) for file in files]
        assert all(size <= 450 or len(file.tensors) == 1 for size, file in zip(sizes, files, strict=True))
        for process in range(processes):
            share = sum(size for size, file in zip(sizes, files, strict=True) if file.process == process)
            assert abs(share - 4600 / processes) <= 600
    [file] = hf.plan_files(tensors, max_shard_bytes=10**9)
    assert file == hf.File("model.safetensors", 0, tensors)


def test_two_processes_share_the_reading_and_the_writing():
    command = [
        sys.executable,
        "benchmarks/stream.py",
        "--shape",
        "tiny",
        "--processes",
        "2",
        "--timeout",
        "240",
        "--json",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["identical"] and len(result["processes"]) == 2
    headers = 40_000  # bytes; every process reads those of all files
    for process in result["processes"]:
        assert result["share"] <= process["import"]["bytes"] <= result["share"] + headers
        assert abs(process["export"]["bytes"] - result["share"]) <= result["largest"] + headers
