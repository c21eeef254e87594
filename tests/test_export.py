import json
import os
import shutil
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import ROOT, STORIES, one_device, stories

from repo_jax import export
from repo_jax.cli import main
from repo_jax.config import dump_recipe, to_recipe
from repo_jax.data.chat import load_tokenizer
from repo_jax.export import export_model, model_card, write_base
from repo_jax.models import hf
from repo_jax.models.decoder import Decoder, param_shapes
from repo_jax.models.hub import ModelFiles
from repo_jax.sharding import param_shardings

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"


@pytest.fixture
def base(tmp_path):
    tokenizer = load_tokenizer(STORIES, chat_template=TEMPLATE, eos_token="<s>")
    write_base(ModelFiles(STORIES, STORIES), stories()[0], tokenizer, tmp_path / "base")
    return tmp_path / "base"


def exported(base, output):
    cfg, params = stories()
    return export_model(
        params, cfg, one_device(), base=base, output=output, card=model_card("", base="some/model", results=None)
    )


def test_an_export_holds_the_weights_and_all_that_goes_with_them(base, tmp_path):
    assert exported(base, tmp_path / "out") == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (STORIES / "model.safetensors").read_bytes()
    assert "some/model" in (tmp_path / "out" / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == {(base / "config.json").stat().st_mode & 0o777}


def test_template_and_end_token_of_the_run_go_with_the_model(base, tmp_path):
    exported(base, tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.eos_token == "<s>" and tokenizer.chat_template == TEMPLATE
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["eos_token_id"] == 1


def test_a_list_of_end_tokens_is_kept_if_the_runs_is_among_them(tmp_path):
    source = shutil.copytree(STORIES, tmp_path / "source")
    for ends, kept in (([1, 5], [1, 5]), ([5, 6], 1), (7, 1)):
        (source / "generation_config.json").write_text(json.dumps({"eos_token_id": ends, "temperature": 0.6}))
        write_base(ModelFiles(source, source), stories()[0], load_tokenizer(source, eos_token="<s>"), tmp_path / "base")
        assert json.loads((tmp_path / "base" / "generation_config.json").read_text()) == {
            "eos_token_id": kept,
            "temperature": 0.6,
        }


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_half_precision_model_is_held_to_its_rounding_and_no_more(base, tmp_path, dtype, monkeypatch):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
    assert exported(base, tmp_path / "out") <= 1e-5
    original = hf.hf_tensors

    def spoilt(*args, **kwargs):
        for name, tensor in original(*args, **kwargs):
            yield name, (tensor * np.float32(1.05)).astype(tensor.dtype) if "2.self_attn.q_proj" in name else tensor

    monkeypatch.setattr(hf, "hf_tensors", spoilt)
    with pytest.raises(RuntimeError, match="nothing was written"):
        exported(base, tmp_path / "out")


@pytest.mark.parametrize("theirs", ["config.json", "thesis.tex", "README.md"])
def test_a_folder_that_is_not_an_export_is_never_replaced(base, tmp_path, theirs):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / theirs).write_text("keep me")
    with pytest.raises(ValueError, match="exists and is not an export of repo-jax; name a new folder"):
        exported(base, tmp_path / "out")
    assert (tmp_path / "out" / theirs).read_text() == "keep me"


def test_an_export_that_does_not_read_back_alike_is_no_export(base, tmp_path, monkeypatch):
    exported(base, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    original = hf.hf_tensors

    def spoilt(*args, **kwargs):
        for name, tensor in original(*args, **kwargs):
            yield name, tensor * np.float32(1.01) if name == "model.norm.weight" else tensor

    monkeypatch.setattr(hf, "hf_tensors", spoilt)
    with pytest.raises(
        RuntimeError, match=r"log-probs differ by .* nats per token from the trained one's; nothing was written"
    ):
        exported(base, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_probe_notices_a_change_in_any_parameter(dtype):
    cfg, params = stories()
    rounding = export._rounding(cfg, dict.fromkeys(hf.expected_tensors(cfg), dtype))
    model = Decoder(cfg, jnp.float32)
    plain = export.probe({"params": params}, model, one_device(), rounding)
    leaves, tree = jax.tree.flatten(params)
    for i, leaf in enumerate(leaves):
        changed = tree.unflatten([*leaves[:i], leaf * 1.05, *leaves[i + 1 :]])
        assert np.abs(export.probe({"params": changed}, model, one_device(), rounding) - plain).max() > 1e-3


POD = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize("127.0.0.1:" + sys.argv[1], 2, int(sys.argv[2]))
import optax
from repo_jax.checkpoint import Checkpoints
from repo_jax.models.config import DecoderConfig
from repo_jax.models.decoder import Decoder, param_shapes
from repo_jax.models.hf import from_hf
from repo_jax.sharding import make_mesh
from repo_jax.state import initial_state, state_shapes, state_shardings
model, run = sys.argv[3:]
cfg, optimizer, mesh = DecoderConfig.from_hf(model), optax.adamw(1e-3), make_mesh(1, 2, 2)
shapes = state_shapes(param_shapes(cfg), optimizer)
shardings = state_shardings(shapes, optimizer, mesh)
params = from_hf(model, cfg, shardings.params)
assert not params["embed_VD"].is_fully_addressable
with Checkpoints(run, keep=1) as checkpoints:
    checkpoints.save(initial_state(params, optimizer, shardings), 3)
"""


def test_a_checkpoint_of_several_processes_is_exported_by_one(base, tmp_path):
    recipe = to_recipe({"model": {"model_name_or_path": str(STORIES)}})
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-c", POD, str(port)]
    pod = [
        subprocess.Popen([*arguments, str(i), str(STORIES), str(tmp_path)], stderr=subprocess.PIPE, env=environment)
        for i in range(2)
    ]
    for process in pod:
        _, error = process.communicate(timeout=240)
        assert process.returncode == 0, error.decode()
    assert main(["export", "--checkpoint", str(tmp_path / "checkpoint-3"), "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (STORIES / "model.safetensors").read_bytes()


def test_tensors_of_several_dtypes_go_out_in_their_own(tmp_path):
    source = shutil.copytree(STORIES, tmp_path / "source", ignore=shutil.ignore_patterns("*.safetensors"))
    cfg, params = stories()
    dtypes = {name: "bfloat16" if "mlp" in name or ".2." in name else "float32" for name in hf.expected_tensors(cfg)}
    hf.to_hf(params, cfg, source, dtypes=dtypes)
    params = hf.from_hf(source, cfg, param_shardings(param_shapes(cfg), one_device()))
    write_base(ModelFiles(source, source), cfg, load_tokenizer(source), tmp_path / "base")
    card = model_card("", base="some/model", results=None)
    export_model(params, cfg, one_device(), base=tmp_path / "base", output=tmp_path / "out", card=card)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert not (tmp_path / "out" / "dtypes.json").exists()
    for dtype in ("float32", "float16"):
        options = {"base": tmp_path / "base", "output": tmp_path / "out", "card": card, "dtype": dtype}
        assert export_model(params, cfg, one_device(), **options) <= 1e-5
        assert set(hf.stored_dtypes(tmp_path / "out", cfg).values()) == {dtype}
        assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
