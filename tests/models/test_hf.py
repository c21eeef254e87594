import dataclasses
import filecmp
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from examples import STORIES, TINY, one_device, random_params
from flax.traverse_util import flatten_dict

from repo_jax.models import hf
from repo_jax.models.config import DecoderConfig
from repo_jax.models.decoder import param_shapes
from repo_jax.sharding import make_mesh, param_shardings

CFG = DecoderConfig.from_hf(STORIES)


def load(folder, cfg=CFG, mesh=None):
    return hf.from_hf(folder, cfg, param_shardings(param_shapes(cfg), mesh or one_device()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 200_000])
def test_in_and_out_again_gives_the_same_bytes(tmp_path, dtype, max_shard_bytes):
    source, output = tmp_path / "source", tmp_path / "output"
    source.mkdir(), output.mkdir()
    tensors = safetensors.numpy.load_file(STORIES / "model.safetensors")
    tensors = {name: tensor.astype(hf.DTYPES[dtype]) for name, tensor in tensors.items()}
    safetensors.numpy.save_file(tensors, source / "model.safetensors")
    assert hf.TensorFiles(source).dtype(CFG) == dtype
    hf.to_hf(load(source), CFG, output, dtype=dtype, max_shard_bytes=max_shard_bytes)
    written = {}
    for file in output.glob("*.safetensors"):
        written |= safetensors.numpy.load_file(file)
    assert written.keys() == tensors.keys()
    assert all(written[name].tobytes() == tensors[name].tobytes() for name in tensors)
    several = len(list(output.glob("*.safetensors"))) > 1
    assert several == (max_shard_bytes < 10**9) == (output / "model.safetensors.index.json").exists()
    again = tmp_path / "again"
    again.mkdir()
    hf.to_hf(load(output), CFG, again, dtype=dtype, max_shard_bytes=max_shard_bytes)
    assert not filecmp.cmpfiles(output, again, [file.name for file in output.iterdir()], shallow=False)[1]


def test_every_parameter_has_one_row_in_the_table():
    for tied in (True, False):
        cfg = dataclasses.replace(TINY, tie_embeddings=tied)
        assert sorted(w.ours for w in hf.weights_of(cfg)) == sorted(flatten_dict(param_shapes(cfg), sep="/"))


def test_a_parameter_on_a_mesh_holds_what_it_holds_on_one_device():
    whole = load(STORIES)
    for shape in ((1, 8, 1), (2, 2, 2), (1, 2, 4)):
        spread = load(STORIES, mesh=make_mesh(*shape))
        for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(spread), strict=True):
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("axes, ways", [((1, 8, 1), 8), ((4, 2, 1), 2), ((2, 2, 2), 2)])
def test_each_part_is_read_once_and_no_whole_parameter_that_is_spread(monkeypatch, axes, ways):
    read = []
    original = hf.read_part

    def counted(*args):
        read.append(part := original(*args))
        return part

    monkeypatch.setattr(hf, "read_part", counted)
    params = load(STORIES, mesh=make_mesh(*axes))
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert sum(part.size for part in read) == total and max(part.size for part in read) <= CFG.V * CFG.D // ways


def test_an_untied_model_keeps_its_head(tmp_path):
    params = random_params(TINY)
    hf.to_hf(params, TINY, tmp_path, dtype="float32")
    np.testing.assert_array_equal(load(tmp_path, TINY)["head_VD"], params["head_VD"])


@pytest.fixture
def broken(tmp_path):
    """A copy of the real model, to be spoilt by the test."""
    shutil.copy(STORIES / "config.json", tmp_path)
    tensors = safetensors.numpy.load_file(STORIES / "model.safetensors")

    def spoil(change):
        change(tensors)
        safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
        return tmp_path

    return spoil


def test_tensors_that_do_not_fit_are_listed_by_name(broken):
    def change(tensors):
        tensors["extra.weight"] = tensors.pop("model.norm.weight")
        tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((3, 4), np.float32)

    with pytest.raises(ValueError) as error:
        load(broken(change))
    message = str(error.value)
    assert "missing model.norm.weight" in message and "unexpected extra.weight" in message
    assert "model.layers.0.mlp.up_proj.weight has shape [3, 4], config.json says [172, 64]" in message


def test_a_copy_of_a_tied_head_and_old_buffers_are_passed_over(broken):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        for name in list(tensors):
            tensors[name] = tensors[name].astype(np.float16)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)

    folder = broken(change)
    load(folder)
    assert hf.TensorFiles(folder).dtype(CFG) == "float16"


def test_mixed_and_integer_weights_are_refused(broken):
    folder = broken(lambda tensors: tensors.update({"model.norm.weight": np.ones(64, ml_dtypes.bfloat16)}))
    with pytest.raises(
        ValueError, match="are BF16 and F32; wanted one of F32, F16, BF16 throughout: save the model again in one dtype"
    ):
        hf.TensorFiles(folder).dtype(CFG)


def test_a_missing_or_cut_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no model.safetensors; the weights must be safetensors"):
        hf.TensorFiles(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((STORIES / "model.safetensors").read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"model.safetensors' is not a whole safetensors file .*; fetch it again"):
        hf.TensorFiles(tmp_path)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"has no model-00001-of-00002\.safetensors"):
        hf.TensorFiles(tmp_path)
    for text in ("version https://git-lfs.github.com/spec/v1", "{}"):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(
            ValueError, match=r"index.json' is not a safetensors index with a weight_map; fetch it again"
        ):
            hf.TensorFiles(tmp_path)
