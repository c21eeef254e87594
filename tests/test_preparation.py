import dataclasses
import json
import re
import shutil
import types

import jax
import numpy as np
import pytest
import transformers
from examples import ASSETS, STORIES, TINY

from repo_jax import hardware, preparation
from repo_jax.config import ModelSection, to_recipe
from repo_jax.data.rows import known_of
from repo_jax.losses import Loss, make_loss
from repo_jax.models.config import DecoderConfig
from repo_jax.models.lora import adapter_shapes, save_adapter
from repo_jax.preparation import compute_dtype, keep_programs, kernel_of, set_up
from repo_jax.sharding import make_mesh


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


@pytest.mark.parametrize(
    "platform, devices, kernel, of_rewards",
    [
        ("tpu", 1, "splash", "dense"),
        ("tpu", 4, "splash", "dense"),
        ("gpu", 1, "flash", "dense"),
        ("gpu", 8, "flash", "dense"),
        ("cpu", 1, "blocked", "blocked"),
        ("cpu", 8, "dense", "dense"),
    ],
)
def test_auto_is_the_fastest_kernel_and_reward_models_whose_rows_have_no_views_get_one_that_needs_none(
    platform, devices, kernel, of_rewards
):
    mesh = types.SimpleNamespace(devices=np.array([device(platform)] * devices).reshape(1, -1, 1), size=devices)
    rewards = dataclasses.replace(TINY, labels=1)
    assert kernel_of(ModelSection(model_name_or_path="m"), TINY, mesh) == kernel
    assert kernel_of(ModelSection(model_name_or_path="m"), rewards, mesh) == of_rewards
    for name in ("dense", "blocked", "splash", "flash"):
        given = ModelSection(model_name_or_path="m", attn_implementation=name)
        assert kernel_of(given, TINY, mesh) == name
        assert kernel_of(given, rewards, mesh) == ("dense" if name in ("splash", "flash") else name)


@pytest.mark.parametrize(
    "backend, folder, told, kept",
    [
        ("tpu", "mine", None, {"jax_compilation_cache_dir": "mine"}),
        ("gpu", "mine", None, {"jax_compilation_cache_dir": "mine"}),
        ("gpu", "mine", "already", {}),
        ("gpu", None, None, {}),
        ("cpu", "mine", None, {}),
    ],
)
def test_programs_for_accelerators_are_kept_unless_jax_is_told_where(monkeypatch, backend, folder, told, kept):
    updated = {}
    config = types.SimpleNamespace(jax_compilation_cache_dir=told, update=updated.__setitem__)
    fake = types.SimpleNamespace(config=config, default_backend=lambda: backend)
    monkeypatch.setattr(preparation, "jax", fake)
    keep_programs(folder)
    assert updated == kept


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


@pytest.mark.parametrize(
    "model, message",
    [
        (
            {"attn_implementation": "splash"},
            "attn_implementation=splash runs on TPUs but the devices are cpus; leave it at auto",
        ),
        (
            {"attn_implementation": "blocked"},
            "attn_implementation=blocked is for one CPU device but there are 8 of cpu; leave it at auto",
        ),
        (
            {"remat": "offload"},
            "remat=offload moves what is kept to the host's memory, where a CPU has it already; choose full",
        ),
    ],
    ids=str,
)
def test_what_the_devices_cannot_do_is_refused_in_one_line(tmp_path, model, message):
    tree = recipe(tmp_path)
    with pytest.raises(ValueError) as refused:
        set_up(dataclasses.replace(tree, model=dataclasses.replace(tree.model, **model)), training=False)
    assert str(refused.value) == message


def test_rows_are_suggested_for_the_devices_and_obey_what_is_given(tmp_path):
    def shapes(**data):
        data |= {"dataset_name": str(ASSETS / "preferences"), "cache_dir": str(tmp_path)}
        return (
            setup := set_up(recipe(tmp_path, data=data, optim={"train_batch_size": 64}), training=True)
        ).shapes, setup

    suggested, setup = shapes()
    assert all(shape.R % 8 == 0 and shape.Y == 0 for shape in suggested)
    largest = suggested[0]
    for store in (setup.train, setup.held_out):
        assert store.slots.max() <= largest.T and store.scored.sum(axis=1).max() <= largest.S
    assert all(shape.R <= largest.R and shape.T <= largest.T for shape in suggested)
    given, _ = shapes(row_length=1024, rows_per_device=2)
    assert given[0].T == 1024 and {shape.R for shape in given} == {16}
    with pytest.raises(ValueError, match=r"slots \(prompt .* but row_length is 8; raise row_length to"):
        shapes(row_length=8)


def test_adapters_with_dropout_are_trained_in_direct_form_where_the_mode_is_auto(tmp_path):
    optim = adapters(tmp_path, lora_dropout=0.5, mode="auto").recipe.optim
    assert (optim.mode, optim.two_pass_below) == ("direct", None)
    assert adapters(tmp_path, mode="auto").recipe.optim.mode == "auto"


def test_what_only_two_passes_read_is_refused_where_there_is_one(tmp_path):
    with pytest.raises(ValueError, match="leaves only mode direct, so that nothing would read keep_layer_inputs=true"):
        adapters(tmp_path, lora_dropout=0.5, keep_layer_inputs=True)


def test_layer_inputs_are_kept_only_where_the_devices_divide_the_width(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "make_mesh", lambda *sizes: make_mesh(1, 3, 1, jax.devices()[:3]))
    monkeypatch.setattr(preparation, "param_shardings", lambda shapes, mesh: None)
    with pytest.raises(ValueError, match="the model's width of 64 over all 3 devices, which do not divide it"):
        adapters(tmp_path, keep_layer_inputs=True)


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


@pytest.mark.parametrize("loss", [{}, {"loss_type": "kto"}, {"loss_type": ["repo", "sft"]}])
def test_a_preference_objective_is_refused_answers_without_labels(tmp_path, loss):
    path = tmp_path / "chats.jsonl"
    path.write_text('{"prompt": "Once", "completion": " upon a time"}\n', encoding="utf-8")
    name = " + ".join(loss["loss_type"]) if isinstance(loss.get("loss_type"), list) else loss.get("loss_type", "repo")
    said = f"'{path}' has one answer for each prompt and no label (schema sft), but loss '{name}' learns from preferences; set loss_type to sft, or give preference data"
    for data, training in (({"dataset_name": str(path)}, True), ({"eval_dataset_name": str(path)}, False)):
        with pytest.raises(ValueError) as refused:
            set_up(recipe(tmp_path, data=data | {"cache_dir": str(tmp_path)}, loss=loss), training=training)
        assert str(refused.value) == said


def test_sft_takes_good_answers_with_or_without_labels_and_pairs_but_no_bad_answers(tmp_path, unpaired):
    given = {"loss": {"loss_type": "sft"}, "optim": {"train_batch_size": 1}}
    chats, bad = tmp_path / "chats.jsonl", tmp_path / "bad.jsonl"
    chats.write_text('{"prompt": "Once", "completion": " upon a time"}\n', encoding="utf-8")
    bad.write_text('{"prompt": "Once", "completion": " upon a time", "label": false}\n', encoding="utf-8")
    for path in (unpaired, str(chats), str(ASSETS / "preferences" / "test.jsonl")):
        data = {"dataset_name": path, "cache_dir": str(tmp_path)}
        made = set_up(recipe(tmp_path, data=data, **given), training=True)
        assert made.total_steps == len(made.train)
    with pytest.raises(
        ValueError, match=r"1 of the 1 rows of '.*bad\.jsonl' are labelled bad, which loss 'sft' would learn"
    ):
        set_up(recipe(tmp_path, data={"dataset_name": str(bad), "cache_dir": str(tmp_path)}, **given), training=True)


def own(fn=lambda pairs: pairs.mean_margin_B, **needs):
    fn.__name__ = "mine"
    return Loss(fn, **needs)


@pytest.fixture
def rows(tmp_path):
    """Writes pairs to a file, with these numbers in the first, the second, ..."""

    def write(*numbers):
        path = tmp_path / "rows.jsonl"
        texts = [
            {"id": f"row {i}", "prompt": f"Day {i}", "chosen": " was fun", "rejected": " was bad"} for i in range(4)
        ]
        lines = [json.dumps(text | more) for text, more in zip(texts, numbers or [{}] * 4, strict=True)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(path)

    return write


def with_data(tmp_path, path, **sections):
    data = {"dataset_name": path, "cache_dir": str(tmp_path / "cache")}
    return recipe(tmp_path, data=data, optim={"train_batch_size": 2} | sections.pop("optim", {}), **sections)


def test_columns_that_a_loss_asks_for_reach_its_pairs_and_no_others_do(tmp_path, rows):
    path = rows(*({"margin": i / 4, "weight": 2} for i in range(4)))
    setup = set_up(with_data(tmp_path, path), training=True, loss=own(columns=("margin",)))
    assert [setup.train[i].columns for i in range(4)] == [{"margin": i / 4} for i in range(4)]
    assert set_up(with_data(tmp_path, path), training=True).train[0].columns == {}


def test_columns_that_are_missing_stop_at_the_start(tmp_path, rows):
    loss = own(columns=("margin",))
    path = rows(*({"weight": 1} for _ in range(4)))
    with pytest.raises(ValueError) as refused:
        set_up(with_data(tmp_path, path), training=True, loss=loss)
    assert str(refused.value) == (
        f"loss 'mine' needs the column 'margin', which '{path}' does not have (it has weight); add it, or choose another loss"
    )
    path = rows({"margin": 1}, {}, {"margin": 2}, {})
    with pytest.raises(ValueError) as refused:
        set_up(with_data(tmp_path, path), training=True, loss=loss)
    assert str(refused.value) == (
        f"loss 'mine' needs the column 'margin', which 2 of the 4 pairs of '{path}' lack (the first: row 1); "
        "add it there, or leave these rows out"
    )


def test_columns_of_answers_are_two_numbers_for_each_pair(tmp_path, rows):
    loss = own(answer_columns=("score",), data=("use_poet",))
    path = rows(*({"score_chosen": i / 4, "score_rejected": -i} for i in range(4)))
    with pytest.raises(ValueError) as refused:
        set_up(with_data(tmp_path, path), training=True, loss=loss)
    assert str(refused.value) == "loss 'mine' needs use_poet, which is not set; set it in the data section"
    loss = loss._replace(data=())
    setup = set_up(with_data(tmp_path, path), training=True, loss=loss)
    assert [setup.train[i].columns for i in range(4)] == [{"score": (i / 4, -i)} for i in range(4)]
    known = known_of([setup.train[i] for i in range(4)], 4)
    assert known.columns["score"].tolist() == [[i / 4, -i] for i in range(4)]
    path = rows(*({"score_chosen": 1} for _ in range(4)))
    with pytest.raises(ValueError, match=r"needs the column 'score_rejected', which .* does not have"):
        set_up(with_data(tmp_path, path), training=True, loss=loss)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"gama": 1}, "loss 'mine' has no hyperparameter 'gama'; it takes gamma, beta"),
        ({"gamma": "high"}, "loss 'mine': gamma='high' must be a number"),
        ({"beta": 1}, "loss 'mine' needs gamma; give recipe.loss.gamma"),
    ],
    ids=str,
)
def test_hyperparameters_of_a_users_own_loss_are_its_keyword_arguments(tmp_path, given, message):
    def mine(pairs, *, gamma, beta=2.0):
        return gamma - beta * pairs.mean_margin_B

    with pytest.raises(ValueError) as refused:
        set_up(recipe(tmp_path, loss=given), training=False, loss=mine)
    assert str(refused.value) == message
    for given in ({"gamma": 1}, {"loss_type": "repo", "gamma": 1}):  # it stands in for what the recipe names
        setup = set_up(recipe(tmp_path, loss=given), training=False, loss=mine)
        assert setup.recipe.loss == {"loss_type": "mine", "gamma": 1.0, "beta": 2.0} and setup.loss == Loss(mine)


@pytest.mark.parametrize(
    "mine, message",
    [
        (make_loss("repo", sft_weight=0.1)[0], r"takes \*\*hparams, which does not say what its hyperparameters are"),
        (
            lambda pairs, *, gamma=None: pairs.mean_margin_B,
            "the default gamma=None must be a number, a text, true or false",
        ),
    ],
    ids=["anything", "None"],
)
def test_a_users_own_loss_says_what_its_hyperparameters_are(tmp_path, mine, message):
    with pytest.raises(ValueError, match=message):
        set_up(recipe(tmp_path), training=False, loss=mine)


@pytest.mark.parametrize("name", ["alphapo", "repo++_dpo", "mine"])
def test_gamma_auto_is_refused_where_gamma_is_no_margin_of_log_probs_per_token(tmp_path, rows, name):
    def mine(pairs, *, gamma=0.5):
        return gamma - pairs.mean_margin_B

    loss = {"gamma": "auto"} | ({} if name == "mine" else {"loss_type": name})
    given = with_data(tmp_path, rows(), loss=loss)
    message = f"gamma=auto is a margin of log-probs per token, and gamma of loss '{name}' is not known to be one alone; give a number"
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        set_up(given, training=True, loss=mine if name == "mine" else None)
    assert "\n" not in str(refused.value)
    if name == "mine":
        assert set_up(given, training=True, loss=Loss(mine, margin_gamma=True)).gamma_quantile == 0.9


def test_losses_that_mix_pairs_take_two_passes_or_stop_at_the_start(tmp_path, rows):
    path, loss = rows(), own(coupled=True)
    assert set_up(with_data(tmp_path, path), training=True, loss=loss).recipe.optim.mode == "two_pass"
    for sections, message in (
        (
            {"optim": {"mode": "direct"}},
            "mode=direct but loss 'mine' mixes the log-probs of several pairs, for which only two passes are exact; set mode to auto",
        ),
        (
            {"optim": {"two_pass_below": 0.5}},
            "loss 'mine' takes two passes always, so that nothing would read two_pass_below=0.5; leave it out",
        ),
        (
            {"model": {"model_name_or_path": str(STORIES), "use_peft": True, "lora_dropout": 0.5}},
            "lora_dropout=0.5 needs mode direct, but loss 'mine' takes two passes; set it to 0",
        ),
    ):
        with pytest.raises(ValueError) as refused:
            set_up(with_data(tmp_path, path, **sections), training=True, loss=loss)
        assert str(refused.value) == message


def test_sequences_that_no_data_bring_stop_at_the_start(tmp_path, rows):
    with pytest.raises(
        ValueError, match="loss 'mine' needs 'dreams' sequences, which no data brings; there are kl, rationale"
    ):
        set_up(with_data(tmp_path, rows()), training=True, loss=own(groups=("dreams",)))


def test_weights_of_the_recipe_reach_the_pairs_to_train_on_and_no_others(tmp_path):
    data = {"dataset_name": str(ASSETS / "preferences"), "cache_dir": str(tmp_path), "temporal_decay": 0.5}
    setup = set_up(recipe(tmp_path, data=data, optim={"train_batch_size": 8}), training=True)
    assert setup.train[0].weights[0][:3].tolist() == [0.5, 0.25, 0.125]
    assert setup.held_out[0].weights is None


def adapters(tmp_path, training=True, keep_layer_inputs=None, **fields):
    given = {"use_peft": True} | {name: value for name, value in fields.items() if name != "mode"}
    tree = recipe(tmp_path, data={"dataset_name": str(ASSETS / "preferences"), "cache_dir": str(tmp_path)})
    mode = fields.get("mode", "direct" if keep_layer_inputs is None else "auto")
    changes = {"train_batch_size": 8, "mode": mode, "keep_layer_inputs": keep_layer_inputs}
    optim = dataclasses.replace(tree.optim, **changes)
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


def with_token(tmp_path, token):
    """The model with a tokenizer that has one token more."""
    folder = shutil.copytree(STORIES, tmp_path / "with token")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([token], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return {"model_name_or_path": str(folder)}


def test_a_token_that_the_model_does_not_embed_harms_only_where_it_is_used(tmp_path, rows):
    model = with_token(tmp_path, "<image>")
    assert set_up(with_data(tmp_path, rows(), model=model), training=True).train is not None
    used = rows({}, {"chosen": " was <image>"}, {}, {})
    with pytest.raises(ValueError) as refused:
        set_up(with_data(tmp_path, used, model=model), training=True)
    assert str(refused.value) == (
        "the data hold '<image>', token 512, but the model embeds 512 tokens; give the tokenizer that belongs to the model, or data without it"
    )


def test_a_tokenizer_with_more_tokens_of_its_own_than_the_model_embeds_is_refused(tmp_path, rows, monkeypatch):
    larger = types.SimpleNamespace(added_tokens_decoder={600: "<image>"})
    tokenizer = type("Tokenizer", (types.SimpleNamespace,), {"__len__": lambda _: 601})(**vars(larger))
    monkeypatch.setattr(preparation, "tokenizer_of", lambda recipe: tokenizer)
    with pytest.raises(ValueError, match="the tokenizer has 601 tokens but the model embeds 512; give the tokenizer"):
        set_up(with_data(tmp_path, rows()), training=True)


def test_a_reference_model_of_its_own_stays_beside_adapters(tmp_path, rows):
    def live(**model):
        model = {"model_name_or_path": str(STORIES), "use_peft": True} | model
        return set_up(with_data(tmp_path, rows(), model=model, loss={"loss_type": "tdpo2"}), training=True).live_shapes

    assert live() is None
    assert live(reference_model_name_or_path=str(STORIES))["embed_VD"].shape == (512, 64)


def test_what_a_setup_trains_and_freezes(tmp_path):
    setup = adapters(tmp_path, lora_r=4)
    assert setup.model.lora_scale == 32 / 4 and setup.frozen_shapes["embed_VD"].dtype == "float32"
    assert sorted(setup.trained_shapes["layers_L"]["attn"]) == ["q_DNH", "v_DKH"]
    setup = adapters(tmp_path, use_peft=False, model_name_or_path=str(STORIES), lora_r=16)
    assert setup.frozen_shapes is None and setup.trained_shapes["embed_VD"].dtype == "float32"


@pytest.mark.parametrize("kind, line", [("TPU", "'jax[tpu]'"), ("NVIDIA GPU", "'jax[cuda12]'")])
def test_training_on_the_cpu_beside_an_idle_accelerator_is_refused_unless_it_is_meant(
    monkeypatch, tmp_path, kind, line
):
    file = tmp_path / {"TPU": "accel0", "NVIDIA GPU": "nvidia0"}[kind]
    file.touch()
    monkeypatch.setattr(preparation, "visible", lambda: hardware.visible(str(tmp_path)))
    preparation._check_backend()  # JAX_PLATFORMS=cpu, as in all tests
    unset = types.SimpleNamespace(default_backend=lambda: "cpu", config=types.SimpleNamespace(jax_platforms=None))
    monkeypatch.setattr(preparation, "jax", unset)
    with pytest.raises(ValueError, match=f"has a {kind} but JAX computes on the CPU") as refused:
        preparation._check_backend()
    assert line in str(refused.value) and "JAX_PLATFORMS=cpu" in str(refused.value)
    file.unlink()
    preparation._check_backend()
