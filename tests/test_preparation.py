import dataclasses
import types

import jax
import numpy as np
import pytest
from examples import ASSETS, STORIES

from repo_jax.config import to_recipe
from repo_jax.models.config import DecoderConfig
from repo_jax.models.lora import adapter_shapes, save_adapter
from repo_jax.preparation import compute_dtype, set_up


def device(platform, **attributes):
    return types.SimpleNamespace(platform=platform, **attributes)


@pytest.mark.parametrize(
    "on, dtype",
    [
        (device("cpu"), "float32"),
        (device("tpu"), "bfloat16"),
        (device("gpu", compute_capability="9.0"), "bfloat16"),
        (device("gpu", compute_capability="10.0"), "bfloat16"),
        (device("gpu", compute_capability="7.5"), "float32"),
        (device("gpu", compute_capability="gfx90a"), "bfloat16"),
    ],
    ids=str,
)
def test_auto_is_bfloat16_where_the_hardware_is_fast_at_it(on, dtype):
    assert compute_dtype("auto", on) == dtype
    assert compute_dtype("float32", on) == "float32"


def recipe(tmp_path, **sections):
    data = {"eval_dataset_name": str(ASSETS / "preferences"), "cache_dir": str(tmp_path)}
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    model = {"model_name_or_path": str(STORIES), "chat_template": template}
    return to_recipe({"model": model, "data": data} | sections)


def test_a_setup_says_the_loss_and_the_dtype_that_defaults_stand_for(tmp_path):
    setup = set_up(recipe(tmp_path), training=False)
    assert setup.recipe.loss == {"loss_type": "repo", "gamma": 0.5}
    assert setup.recipe.model.compute_dtype == "float32"
    setup = set_up(recipe(tmp_path, loss={"loss_type": "simpo", "beta": 10}), training=False)
    assert setup.recipe.loss == {"loss_type": "simpo", "beta": 10, "gamma": 0.25, "label_smoothing": 0.0}


def test_evaluations_without_held_out_pairs_are_refused(tmp_path):
    data = {"dataset_name": str(ASSETS / "preferences" / "train.jsonl"), "cache_dir": str(tmp_path)}
    with pytest.raises(ValueError, match="eval_steps=5 but there are no held-out pairs; give eval_dataset_name"):
        set_up(recipe(tmp_path, data=data, run={"eval_steps": 5}), training=True)


@pytest.fixture
def unpaired(tmp_path):
    path = tmp_path / "unpaired.jsonl"
    path.write_text('{"prompt": "Once", "completion": " upon a time", "label": true}\n', encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("loss, name", [({}, "repo"), ({"loss_type": "simpo"}, "simpo")])
def test_unpaired_rows_are_refused_by_a_loss_that_compares_two_answers(tmp_path, unpaired, loss, name):
    message = f"'{unpaired}' is unpaired (prompt, completion, label) but loss '{name}' compares two answers; give pairs"
    pairs = str(ASSETS / "preferences" / "test.jsonl")
    for data, training in (
        ({"dataset_name": unpaired}, True),
        ({"dataset_name": pairs, "eval_dataset_name": unpaired}, True),
        ({"eval_dataset_name": unpaired}, False),
    ):
        with pytest.raises(ValueError) as refused:
            set_up(recipe(tmp_path, data=data | {"cache_dir": str(tmp_path)}, loss=loss), training=training)
        assert str(refused.value) == message


def test_weights_of_the_recipe_reach_the_pairs_to_train_on_and_no_others(tmp_path):
    data = {"dataset_name": str(ASSETS / "preferences"), "cache_dir": str(tmp_path), "temporal_decay": 0.5}
    setup = set_up(recipe(tmp_path, data=data, optim={"train_batch_size": 8}), training=True)
    assert setup.train[0].weights[0][:3].tolist() == [0.5, 0.25, 0.125]
    assert setup.held_out[0].weights is None


def adapters(tmp_path, training=True, **fields):
    given = {"use_peft": True} | {name: value for name, value in fields.items() if name != "mode"}
    tree = recipe(tmp_path, data={"dataset_name": str(ASSETS / "preferences"), "cache_dir": str(tmp_path)})
    optim = dataclasses.replace(tree.optim, train_batch_size=8, mode=fields.get("mode", "direct"))
    return set_up(
        dataclasses.replace(tree, model=dataclasses.replace(tree.model, **given), optim=optim), training=training
    )


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"lora_dropout": 0.5, "mode": "two_pass"},
            "lora_dropout=0.5 would drop other inputs in each pass of mode two_pass; set it to 0, or mode to direct",
        ),
        ({"lora_target_modules": ["q_prj"]}, "lora_target_modules=['q_prj'] but q_prj is no linear map"),
    ],
)
def test_adapters_that_cannot_be_trained_are_refused_for_training_alone(tmp_path, fields, message):
    with pytest.raises(ValueError) as refused:
        adapters(tmp_path, **fields)
    assert str(refused.value).startswith(message)
    assert adapters(tmp_path, training=False, **fields).held_out is not None


def test_adapters_are_not_trained_over_an_adapter(tmp_path):
    cfg = DecoderConfig.from_hf(STORIES)
    shapes = adapter_shapes(cfg, 2, None)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    folder = tmp_path / "adapter"
    folder.mkdir()
    options = {"r": 2, "alpha": 4, "dropout": 0.0, "target_modules": None, "base": str(STORIES)}
    save_adapter(zeros, cfg, folder, **options)
    with pytest.raises(ValueError, match="is an adapter, and adapters over an adapter are not supported; merge it"):
        adapters(tmp_path, model_name_or_path=str(folder))
    setup = adapters(tmp_path, training=False, model_name_or_path=str(folder))
    assert setup.pretrained.adapter is not None and setup.recipe.model.param_dtype == "float32"


def test_what_a_setup_trains_and_freezes(tmp_path):
    setup = adapters(tmp_path, lora_r=4)
    assert setup.model.lora_scale == 32 / 4 and setup.frozen_shapes["embed_VD"].dtype == "float32"
    assert sorted(setup.trained_shapes["layers_L"]["attn"]) == ["q_DNH", "v_DKH"]
    setup = adapters(tmp_path, use_peft=False, model_name_or_path=str(STORIES), lora_r=16)
    assert setup.frozen_shapes is None and setup.trained_shapes["embed_VD"].dtype == "float32"
