"""Recipes of other trainers: accepted as they are, with their trainers' numbers, and one line for every key that cannot be had.

The files in foreign/ are named after the recipes they stand for, key by key; their chat templates are ours, which write the same.
"""

import dataclasses
import math
import re
import typing

import pytest
import yaml
from examples import ROOT
from test_configs import TALK, part, rendered, table

from repo_jax import cli, foreign, trainers
from repo_jax.config import SECTIONS, leaf_fields, load_recipe, read_file, read_tree
from repo_jax.losses import LOSSES, OPTIONS, hyperparameters, make_loss

FILES = sorted((ROOT / "tests" / "foreign").glob("*.yaml"))
# Devices that a published recipe is for, where they are not 4, and the recipe in configs/ where that has another name.
DEVICES = {"zephyr-7b-dpo-2024": 8, "zephyr-7b-dpo-2025": 8, "mistral-7b-base-simpo-2024-06": 8}
OURS = {"zephyr-7b-dpo-2024": "mistral-7b-base-dpo", "zephyr-7b-dpo-2025": "mistral-7b-base-dpo", "mistral-7b-base-simpo-2024-06": "mistral-7b-base-simpo"}  # fmt: skip
# What a run is called, how often it speaks and saves, and where it goes are not compared.
FREE = {
    "output_dir",
    "logging_steps",
    "eval_steps",
    "save_steps",
    "save_total_limit",
    "push_to_hub",
    "hub_model_id",
    "report_to",
}


def path_of(name: str):
    return ROOT / "tests" / "foreign" / f"{name}.yaml"


def quiet(text: str) -> None:
    """Nobody is told."""


def load(path, overrides=None, num_processes=4, **options):
    return load_recipe(path, overrides, num_processes=num_processes, **{"tell": quiet} | options)


def leaves(recipe) -> dict:
    return {
        (section, name): value
        for section, fields in dataclasses.asdict(recipe).items()
        for name, value in fields.items()
    }


@pytest.fixture
def write(tmp_path):
    """A foreign recipe as a file; `model_name_or_path: m` is added."""

    def written(text: str):
        path = tmp_path / "foreign.yaml"
        path.write_text(f"model_name_or_path: m\n{text}", encoding="utf-8")
        return path

    return written


@pytest.fixture
def tree_of(write):
    return lambda text, overrides=None, **options: read_tree(
        write(text), overrides, **{"num_processes": 4, "tell": quiet} | options
    )


@pytest.fixture
def refusal(write):
    """What is said of a file, without its name."""

    def said(text: str, **options) -> str:
        path = write(text)
        with pytest.raises(ValueError) as error:
            load(path, **options)
        return str(error.value).replace(f"'{path}': ", "")

    return said


# Whole files


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_accepted_as_it_is_and_every_key_of_it_is_told_of(path):
    told = []
    recipe = load(path, tell=told.append)
    make_loss(**recipe.loss)
    given = read_file(path)[0]
    lines = told[0].splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines[: len(given)]] == list(given)
    assert all(" -> " in line or " is not needed: " in line or "is replaced, " in line for line in lines[: len(given)])
    assert "nothing here reads it" not in told[0]


@pytest.mark.parametrize(
    "path", [path for path in FILES if not path.stem.startswith("trl-")], ids=lambda path: path.stem
)
def test_a_published_recipe_is_ours_of_that_name(path):
    theirs = leaves(load(path, num_processes=DEVICES.get(path.stem, 4)))
    ours = leaves(load_recipe(ROOT / "configs" / f"{OURS.get(path.stem, path.stem)}.yaml"))
    free = set(FREE)
    if path.stem == "zephyr-7b-dpo-2025":
        # The TRL of 2025 scores no header and draws the held-out pairs itself.
        free |= {"compat", "truncation", "dataset_config", "dataset_train_split", "dataset_test_split"}
    templates = [leaves_.pop(("model", "chat_template")) for leaves_ in (theirs, ours)]
    assert {k: v for k, v in theirs.items() if k[1] not in free} == {k: v for k, v in ours.items() if k[1] not in free}
    for options in ({}, {"add_generation_prompt": True}):
        first, second = (template and rendered(template, TALK, **options) for template in templates)
        assert first == second


def test_trls_simpo_has_its_gamma_per_token_and_its_nll_weight():
    assert load(path_of("trl-cpo-simpo")).loss == {"loss_type": "simpo", "beta": 2.5, "gamma": 1.375 / 2.5}
    # What CPOConfig leaves: a target margin of 5 nats per token, and CPO's term.
    assert load(path_of("trl-cpo-simpo-defaults")).loss == {
        "loss_type": "cpo_simpo",
        "beta": 0.1,
        "gamma": 5.0,
        "cpo_alpha": 1.0,
    }


def test_trls_dpo_with_adapters_and_a_sum_of_losses():
    recipe = load(path_of("trl-dpo"))
    assert recipe.loss == {"loss_type": ["dpo", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], "beta": 0.2}
    model = recipe.model
    assert (model.use_peft, model.lora_r, model.lora_alpha, model.lora_dropout) == (True, 32, 32, 0.05)
    assert (recipe.optim.train_batch_size, recipe.optim.num_train_epochs, recipe.optim.learning_rate) == (32, 3, 5e-7)
    assert (recipe.optim.lr_scheduler_type, recipe.optim.warmup_ratio, recipe.data.max_length) == ("linear", 0, 1024)
    assert (recipe.data.truncation, recipe.data.compat, recipe.run.eval_steps) == ("keep_start", "none", 50)


def test_trls_orpo_and_kto():
    orpo, kto = load(path_of("trl-orpo")), load(path_of("trl-kto"))
    assert orpo.loss == {"loss_type": "orpo", "beta": 0.05} and orpo.data.append_eos == "always"
    # transformers' schedule `constant` has no warm-up, whatever warmup_steps says; without eval_strategy nothing is held out.
    assert (orpo.optim.max_steps, orpo.optim.warmup_ratio, orpo.data.dataset_test_split) == (200, 0.0, None)
    assert kto.loss == {"loss_type": "kto", "beta": 0.1, "desirable_weight": 1.33, "undesirable_weight": 1.0}
    assert (kto.optim.train_batch_size, kto.optim.warmup_ratio) == (64, 0.1)


# Tables


def test_all_that_keys_become_is_ours():
    text = (ROOT / "repo_jax" / "foreign.py").read_text(encoding="utf-8")
    homes = {f"{section}.{name}" for name, (section, _) in leaf_fields().items()}
    homes |= {f"loss.{name}" for loss in LOSSES.values() for name in hyperparameters(loss)}
    homes |= {f"loss.{name}" for name in (*OPTIONS, "loss_type")}
    named = set(re.findall(r'"((?:model|data|loss|optim|run)\.[a-z_]+)"', text))
    assert named and named <= homes
    assert set(trainers.DPO_LOSSES.values()) <= set(LOSSES)


def test_a_key_that_is_one_trainers_alone_tells_it():
    for name, trainer in trainers.TRAINERS.items():
        assert set(trainer.telling) <= set(trainer.own) or name in ("repo", "simpo")
        others = [other for other in trainers.TRAINERS.values() if other.own != trainer.own]
        assert not set(trainer.telling) & {key for other in others for key in other.own}
        assert not set(trainer.losses) & {loss for other in others for loss in other.losses}


# Which trainer

TELL = {
    "gamma_beta_ratio: 0.5": "simpo",
    "gamma: 1.0": "simpo",
    "loss_type: repo": "repo",
    "trainer_type: simpo\nloss_type: sigmoid": "repo",
    "loss_type: simpo": "cpo",
    "cpo_alpha: 0.1": "cpo",
    "loss_type: apo_down": "dpo",
    "rpo_alpha: 1.0": "dpo",
    "desirable_weight: 1.0": "kto",
    "packing: true": "sft",
    "# ORPOTrainer arguments\nbeta: 0.1": "orpo",
    "# DPO trainer config\nbeta: 0.1": "dpo",
    "# SFT trainer config\nlearning_rate: 1e-5": "sft",
}


@pytest.mark.parametrize("text", TELL)
def test_the_trainer_is_known_by_its_keys_or_by_the_heading_above_them(write, text):
    told = []
    load(write(text), tell=told.append)
    assert f"is a recipe for {trainers.TRAINERS[TELL[text]].title}, translated:" in told[0]


def test_keys_that_all_have_are_asked_about(refusal, write):
    names = "repo, simpo, cpo, kto, orpo, sft, dpo"
    wanted = f"this recipe has no sections, and its keys do not say which trainer it was written for; add --trainer with one of {names}"
    assert refusal("beta: 0.1") == refusal("beta: 0.1\nloss_type: sigmoid") == refusal("") == wanted
    assert load(write("beta: 0.2"), trainer="dpo").loss == {"loss_type": "dpo", "beta": 0.2}
    assert load(write("beta: 0.2"), trainer="orpo").loss == {"loss_type": "orpo", "beta": 0.2}
    assert refusal("beta: 0.1", trainer="ppo") == f"trainer='ppo'; choose one of {names}"


@pytest.mark.parametrize(
    "text", ["model: {model_name_or_path: m}\nlearning_rate: 1", "wandb: {project: x}", "modle: {a: 1}"]
)
def test_a_file_with_a_section_or_with_no_key_of_a_trainers_is_ours(tmp_path, text):
    path = tmp_path / "ours.yaml"
    path.write_text(text)
    assert not foreign.is_foreign(read_file(path)[0], SECTIONS)
    with pytest.raises(ValueError, match=r"^recipe has no section"):
        load_recipe(path)


def test_what_is_said_of_a_trainer_is_refused_for_a_recipe_of_ours():
    path = ROOT / "configs" / "quickstart.yaml"
    for given, said in (({"trainer": "dpo"}, "trainer=dpo"), ({"num_processes": 4}, "num_processes=4")):
        with pytest.raises(ValueError) as error:
            load_recipe(path, **given)
        assert (
            str(error.value) == f"{said} is for recipes of other trainers, and '{path}' is none of these; leave it out"
        )


# Losses

SIMPO = "gamma_beta_ratio: 0.3\nbeta: 2.5\n"
CPO = "simpo_gamma: 1.0\nbeta: 2.0\n"
LOSS = {
    SIMPO: {"loss_type": "simpo", "beta": 2.5, "gamma": 0.3},
    SIMPO + "loss_type: hinge": {"loss_type": "simpo_hinge", "beta": 2.5, "gamma": 0.3},
    SIMPO + "loss_type: repo": {"loss_type": "repo", "reward_scale": 2.5, "gamma": 0.3},
    SIMPO + "sft_weight: 0.1\nlabel_smoothing: 0.2": {"loss_type": "simpo", "beta": 2.5, "gamma": 0.3, "sft_weight": 0.1, "label_smoothing": 0.2},
    SIMPO + "loss_type: hinge\nlabel_smoothing: 0.2\nsft_weight: 0": {"loss_type": "simpo_hinge", "beta": 2.5, "gamma": 0.3},
    "gamma_beta_ratio: 0.25": {"loss_type": "simpo", "beta": 2.0, "gamma": 0.25},
    "sft_weight: 0.0": {"loss_type": "simpo", "beta": 2.0, "gamma": 0.25},
    CPO + "loss_type: simpo\ncpo_alpha: 0": {"loss_type": "simpo", "beta": 2.0, "gamma": 0.5},
    CPO + "loss_type: simpo\ncpo_alpha: 0.05\nlabel_smoothing: 0.1": {"loss_type": "cpo_simpo", "beta": 2.0, "gamma": 0.5, "cpo_alpha": 0.05, "label_smoothing": 0.1},
    CPO + "loss_type: alphapo\nalpha: 0.25": {"loss_type": "alphapo", "beta": 2.0, "gamma": 0.5, "alpha": 0.25},
    CPO + "loss_type: simpo\ncpo_alpha: 0\nalpha: 0.25": {"loss_type": "alphapo", "beta": 2.0, "gamma": 0.5, "alpha": 0.25},
    CPO + "loss_type: alphapo\nalpha: 0.0\nlabel_smoothing: 0": {"loss_type": "simpo", "beta": 2.0, "gamma": 0.5},
    CPO: {"loss_type": "cpo", "beta": 2.0, "cpo_alpha": 1.0},
    "rpo_alpha: 1.0": {"loss_type": "dpo", "beta": 0.1, "sft_weight": 1.0},
    "rpo_alpha: null\nlabel_smoothing: 0.2": {"loss_type": "cdpo", "beta": 0.1, "label_smoothing": 0.2},
    "loss_type: [ipo]\nuse_weighting: true": {"loss_type": "ipo", "beta": 0.1, "use_weighting": True},
    "loss_type: ipo\nuse_weighting: false\nlabel_smoothing: 0.2\ndiscopop_tau: 1\nloss_weights: [1.0]": {"loss_type": "ipo", "beta": 0.1},
    "loss_type: robust": {"loss_type": "robust", "beta": 0.1, "label_smoothing": 0.0},
    "loss_type: exo_pair\nlabel_smoothing: 0.01": {"loss_type": "exo_pair", "beta": 0.1, "label_smoothing": 0.01},
    "loss_type: discopop": {"loss_type": "discopop", "beta": 0.1, "discopop_tau": 0.05},
    "loss_type: aot_pair": {"loss_type": "aot", "beta": 0.1, "label_smoothing": 0.0},
    "loss_type: sigmoid_norm\nbeta: 5": {"loss_type": "dpo_norm", "beta": 5},
    "loss_type: [sft]": {"loss_type": "sft"},
    "loss_type: apo_zero_unpaired": {"loss_type": "apo_zero_unpaired", "beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
    "loss_type: nll": {"loss_type": "sft"},
}  # fmt: skip


@pytest.mark.parametrize("text", LOSS)
def test_a_loss_is_translated_by_the_trainer_it_was_written_for(write, text):
    loss = load(write(text)).loss
    assert loss == LOSS[text]
    make_loss(**loss)


def test_ld_alpha_is_of_the_data(write):
    assert load(write("ld_alpha: 0.5")).data.ld_alpha == 0.5


# Data

DATA = {
    "dataset_name: d": {"dataset_name": "d", "dataset_train_split": "train", "dataset_test_split": None},
    "dataset_name: d\ndataset_config: c\ndataset_train_split: a\ndataset_test_split: b\neval_strategy: epoch": {
        "dataset_name": "d", "dataset_config": "c", "dataset_train_split": "a", "dataset_test_split": "b",
    },
    "dataset_name: d\neval_strategy: no\ndo_eval: true": {"dataset_name": "d", "dataset_train_split": "train", "dataset_test_split": "test"},
    "datasets: [{path: a, name: c}]": {"dataset_name": "a", "dataset_config": "c", "dataset_train_split": "train", "dataset_test_split": None},
    "datasets: [{path: a}, {path: b}]": {"dataset_mixer": {"a": 1.0, "b": 1.0}, "dataset_train_split": "train", "dataset_test_split": None},
    "datasets: [{path: a}]\ntest_split_size: 0.1\neval_strategy: steps": {
        "dataset_name": "a", "dataset_train_split": "train[:-10%]", "dataset_test_split": "train[-10%:]",
    },
    "datasets: [{path: a}, {path: a, split: more}]\ntest_split_size: 50": {
        "dataset_name": "a", "dataset_train_split": "train[:-50]+more", "dataset_test_split": None,
    },
    "dataset_mixture: {datasets: [{id: a, weight: 0.5}], seed: 0}": {"dataset_name": "a", "dataset_train_split": "train[:50%]", "dataset_test_split": None},
    "dataset_mixer: {a: 1.0, b: 0.5}\ndataset_splits: [train_sft, test_sft]\ndataset_configs: [c, c]": {
        "dataset_mixer": {"a": 1.0, "b": 0.5}, "dataset_config": "c", "dataset_train_split": "train_sft", "dataset_test_split": "test_sft",
    },
    "dataset_mixer: {a: 1}\ndataset_splits: [train_gen, train_sft]": {"dataset_name": "a", "dataset_train_split": "train_gen+train_sft", "dataset_test_split": None},
}  # fmt: skip


@pytest.mark.parametrize("text", DATA)
def test_data_are_found_where_the_trainer_finds_them(tree_of, text):
    data = tree_of(text, trainer="sft")["data"]
    assert {k: v for k, v in data.items() if k.startswith("dataset_")} == DATA[text]


def test_lengths_that_are_left_out_are_the_trainers(tree_of):
    def lengths(text, trainer):
        data = tree_of(text, trainer=trainer)["data"]
        return tuple(data.get(name) for name in ("max_length", "max_prompt_length", "compat", "truncation"))

    assert lengths("", "dpo") == (1024, None, None, "keep_start")
    assert lengths("max_length: null", "dpo") == (None, None, None, "keep_start")
    assert lengths("max_prompt_length: 512", "dpo") == (1024, 512, None, "keep_end")
    assert lengths("", "simpo") == lengths("max_length: null", "simpo") == (512, 128, "official", None)
    assert lengths("dataset_mixer: {a: 1}\noptim: adamw_hf", "dpo") == (512, 128, "official", None)
    assert lengths("max_seq_length: 300\nmax_length: 200", "sft") == (300, None, None, "keep_start")


# Schedule


def test_warmup_is_in_updates_or_in_a_share_of_them(tree_of):
    def ratio(text):
        return tree_of(text, trainer="dpo")["optim"]["warmup_ratio"]

    assert ratio("") == ratio("warmup_ratio: null") == ratio("warmup_steps: 0") == 0
    assert ratio("warmup_ratio: 0.1") == ratio("warmup_ratio: 0.1\nwarmup_steps: 0") == 0.1
    assert ratio("warmup_steps: 0.2\nwarmup_ratio: 0.1") == 0.2
    assert ratio("warmup_steps: 0.2\nlr_scheduler_type: constant") == 0
    assert ratio("warmup_steps: 0.2\nlr_scheduler_type: constant_with_warmup") == 0.2
    for total in range(100, 400):
        share = ratio(f"warmup_steps: 47\nmax_steps: {total}")
        assert math.ceil(total * share) == 47


def test_no_clipping_is_null(tree_of):
    assert tree_of("max_grad_norm: 0", trainer="dpo")["optim"]["max_grad_norm"] is None
    assert tree_of("", trainer="dpo")["optim"]["max_grad_norm"] == 1.0


# Our flags


def test_a_flag_goes_before_a_key_also_before_one_that_would_be_refused(write):
    told = []
    path = write(
        "optim: adamw_bnb_8bit\nlearning_rate: 1e-5\nrpo_alpha: 0.5\nlr_scheduler_type: inverse_sqrt\nwarmup_steps: 9"
    )
    flags = {
        "optim.optim": "lion",
        "optim.learning_rate": 1e-7,
        "optim.lr_scheduler_type": "cosine",
        "optim.warmup_ratio": 0.2,
    }
    recipe = load(path, flags, tell=told.append)
    optim = recipe.optim
    assert (optim.optim, optim.learning_rate, optim.lr_scheduler_type, optim.warmup_ratio) == (
        "lion",
        1e-7,
        "cosine",
        0.2,
    )
    assert "  optim: adamw_bnb_8bit is not looked at, for --optim says otherwise" in told[0]
    assert "  learning_rate: 1.0e-05 is not looked at, for --learning_rate says otherwise" in told[0]


def test_another_loss_leaves_the_recipes_own_hyperparameters_behind(write):
    recipe = load(write(SIMPO), {"loss.loss_type": "repo", "loss.gamma": 0.4})
    assert recipe.loss == {"loss_type": "repo", "gamma": 0.4}
    assert recipe.data.compat == "official"


def test_with_train_batch_size_no_devices_are_counted(write):
    def count():
        raise AssertionError

    assert load(write("rpo_alpha: 1"), {"optim.train_batch_size": 7}, num_processes=count).optim.train_batch_size == 7
    assert load(write("rpo_alpha: 1"), num_processes=lambda: 3).optim.train_batch_size == 24
    assert load(write("rpo_alpha: 1"), num_processes=None).optim.train_batch_size % 8 == 0


GATED = """\
trainer_type: simpo
max_steps: 100
warmup_steps: 10
use_peft: false
lora_r: 128
hub_model_id: org/m
hub_private_repo: true
push_to_hub: false
"""


def test_a_flag_switches_on_what_other_keys_are_of(write):
    told = []
    flags = {"optim.max_steps": 1000, "model.use_peft": True, "run.push_to_hub": True}
    recipe = load(write(GATED), flags, tell=told.append)
    model, optim, run = recipe.model, recipe.optim, recipe.run
    assert (run.push_to_hub, run.hub_model_id, run.hub_private_repo) == (True, "org/m", True)
    assert (model.use_peft, model.lora_r, model.lora_dropout) == (True, 128, 0.05)
    assert (optim.max_steps, math.ceil(1000 * optim.warmup_ratio)) == (1000, 10)
    for key, value in (("use_peft", "false"), ("push_to_hub", "false"), ("max_steps", "100")):
        assert f"  {key}: {value} is not looked at, for --{key} says otherwise" in told[0]


def test_a_flag_switches_off_what_other_keys_are_of(write):
    text = GATED.replace("use_peft: false", "use_peft: true").replace("push_to_hub: false", "push_to_hub: true")
    recipe = load(write(text), {"model.use_peft": False, "run.push_to_hub": False})
    assert (recipe.model.use_peft, recipe.model.lora_r, recipe.run.hub_model_id) == (False, 16, None)


def test_flags_decide_what_is_computed_from_them(tree_of):
    def leaf(section, name, text, flags, trainer="dpo"):
        return tree_of(text, flags, trainer=trainer)[section][name]

    # A number of updates as a share of those that are made.
    assert math.ceil(1000 * leaf("optim", "warmup_ratio", "warmup_steps: 10", {"optim.max_steps": 1000})) == 10
    assert leaf("run", "eval_steps", "eval_strategy: steps\nlogging_steps: 5", {"run.logging_steps": 7}) == 7
    assert leaf("run", "eval_steps", "eval_strategy: steps\nlogging_steps: 5", {"run.eval_steps": 9}) == 9
    assert leaf("data", "dataset_test_split", "dataset_name: d", {"run.eval_steps": 9}) == "test"
    assert leaf("data", "truncation", "truncation_mode: keep_end", {"data.max_prompt_length": 9}) == "keep_end"
    cosine = {"optim.lr_scheduler_type": "cosine"}
    assert leaf("optim", "warmup_ratio", "warmup_ratio: 0.1\nlr_scheduler_type: constant", cosine) == 0.1
    # A template that the name of the model decides.
    other = {"model.model_name_or_path": "org/mistral"}
    assert "chat_template" in tree_of("", other, trainer="simpo")["model"]
    assert "truncation" not in tree_of("", {"data.compat": "official"}, trainer="simpo")["data"]
    assert leaf("data", "truncation", "", {"data.compat": "none"}, "simpo") == "keep_end"
    mixer = "dataset_mixer: {a: 1, b: 1}\ndataset_splits: [train]"
    assert "dataset_mixer" not in tree_of(mixer, {"data.dataset_name": "d"}, trainer="sft")["data"]


FLAGGED = {
    ("beta: 2\nsimpo_gamma: 1\nloss_type: simpo\ncpo_alpha: 0", "beta", 10): {"loss_type": "simpo", "beta": 10, "gamma": 0.1},
    ("beta: 2\nsimpo_gamma: much\nloss_type: simpo\ncpo_alpha: 0", "gamma", 0.5): {"loss_type": "simpo", "beta": 2, "gamma": 0.5},
    ("simpo_gamma: 1\nbeta: 2\nloss_type: simpo\ncpo_alpha: 0", "cpo_alpha", 0.5): {"loss_type": "cpo_simpo", "beta": 2, "gamma": 0.5, "cpo_alpha": 0.5},
    ("simpo_gamma: 1\nbeta: 2\nloss_type: simpo", "cpo_alpha", 0): {"loss_type": "cpo_simpo", "beta": 2, "gamma": 0.5, "cpo_alpha": 0},
    ("simpo_gamma: 1\nbeta: 2\nloss_type: alphapo", "alpha", 0.5): {"loss_type": "alphapo", "beta": 2, "gamma": 0.5, "alpha": 0.5},
    ("gamma: 1\nbeta: 2", "beta", 10): {"loss_type": "simpo", "beta": 10, "gamma": 0.1},
    ("gamma: 1\nbeta: much", "beta", 10): {"loss_type": "simpo", "beta": 10, "gamma": 0.1},
    ("gamma: 1\nbeta: 2\nloss_type: repo", "reward_scale", 10): {"loss_type": "repo", "reward_scale": 10, "gamma": 0.5},
    ("rpo_alpha: 1", "label_smoothing", 0.1): {"loss_type": "cdpo", "beta": 0.1, "sft_weight": 1, "label_smoothing": 0.1},
    ("rpo_alpha: 1\nlabel_smoothing: 0.2", "label_smoothing", 0): {"loss_type": "cdpo", "beta": 0.1, "sft_weight": 1, "label_smoothing": 0},
}  # fmt: skip


@pytest.mark.parametrize("text, name, value", FLAGGED)
def test_a_hyperparameter_that_is_given_counts_for_those_computed_from_it(write, text, name, value):
    loss = load(write(text), {f"loss.{name}": value}).loss
    assert loss == FLAGGED[text, name, value]
    make_loss(**loss)


def test_another_loss_leaves_the_data_as_they_are(write):
    for text in ("ld_alpha: 0.5", "reference_free: true\nld_alpha: 0.5"):
        recipe = load(write(text), {"loss.loss_type": "simpo"})
        assert (recipe.loss, recipe.data.ld_alpha) == ({"loss_type": "simpo"}, 0.5)
    assert load(write("cpo_alpha: 1"), {"loss.loss_type": "simpo"}).data.append_eos == "always"


# Secrets

HIDDEN = (
    "hub_token: hf_SECRET",
    "env: {WANDB: SECRET}",
    "model_init_kwargs: {token: hf_SECRET}",
    "model_init_kwargs: {other: SECRET}",
    "wandb_api_key: SECRET",
    "wandb_key: SECRET",
    "HF_TOKEN: SECRET",
    "AWS_SECRET_ACCESS_KEY: SECRET",
    "password: SECRET",
    "dataset_kwargs: {storage: [{api_key: SECRET}]}",
)
# Every kind of line that shows a value: what becomes of it, what is refused, what is not needed.
SCRUBBED = (
    "dataset_name: https://user:SECRET@host/d.jsonl",
    "dataset_name: https://host/d.jsonl?sig=SECRET",
    "dataset_mixer: {'s3://user:SECRET@host/d': 1.0}\ndataset_splits: [train]",
    "datasets: [{path: 's3://user:SECRET@host/a'}, {path: 's3://user:SECRET@host/b'}]",
    f"datasets: [{{path: 's3://{'user' * 9}:SECRET@host/a', data_dir: b}}]",
    "logging_dir: s3://user:p@SECRET@host/d",
    "run_name: hf_SECRETSECRET",
    "zzz: https://user:SECRET@host",
)


@pytest.mark.parametrize("text", HIDDEN + SCRUBBED)
def test_what_is_secret_is_not_shown(write, text):
    told = []
    try:
        read_tree(write(text), num_processes=4, trainer="sft" if "dataset" in text else "dpo", tell=told.append)
    except ValueError as error:
        told.append(str(error))
    key = text.split(":")[0]
    assert "SECRET" not in told[0].replace("AWS_SECRET_ACCESS_KEY", "") and f"{key}: " in told[0]
    assert (f"{key}: ...:" in told[0]) == (text in HIDDEN)


def test_tokens_of_texts_and_keys_that_hold_nothing_are_shown(write):
    told = []
    load(write("eos_token: <end>\npad_token: <pad>\nhub_token: null\nenv: {}"), trainer="sft", tell=told.append)
    for line in ("eos_token: <end> ->", "pad_token: <pad> is", "hub_token: null is", "env: {} is"):
        assert f"  {line}" in told[0]


# Mistakes

MISTAKES = {
    # names
    ("dpo", "learning_rat: 1"): "learning_rat: 1: no such key is known of TRL's DPOConfig; did you mean 'learning_rate'?",
    ("dpo", "zzz: 1"): "zzz: 1: no such key is known of TRL's DPOConfig; leave it out",
    ("orpo", "rpo_alpha: 1"): "rpo_alpha: 1: it is of TRL's DPOConfig, and this recipe is for TRL's ORPOConfig; leave it out, or say --trainer",
    ("dpo", "1: 2"): "1: 2: no such key is known of TRL's DPOConfig; leave it out",
    # batch
    ("dpo", "per_device_train_batch_size: auto"): "per_device_train_batch_size: auto: give a whole number, 1 or more",
    ("dpo", "gradient_accumulation_steps: 0"): "gradient_accumulation_steps: 0: give a whole number, 1 or more",
    # optimizer and schedule
    ("dpo", "optim: adamw_bnb_8bit"): f"optim: adamw_bnb_8bit: choose one of {', '.join(trainers.OPTIMIZERS)}, or say --optim adamw (--moment_dtype bfloat16 saves memory)",
    ("dpo", "dataset_mixer: {a: 1}"): f"optim: rmsprop: choose one of {', '.join(trainers.OPTIMIZERS)}, or say --optim adamw (--moment_dtype bfloat16 saves memory)",
    ("dpo", "lr_scheduler_type: polynomial"): "lr_scheduler_type: polynomial: choose one of linear, cosine, constant, constant_with_warmup, or say --lr_scheduler_type",
    ("dpo", "warmup_steps: 100"): "warmup_steps: 100: a number of updates, of as many as the data make; give a share of them, --warmup_ratio",
    ("dpo", "warmup_steps: 100\nmax_steps: 20"): "warmup_steps: 100: more than the 20 that are made; give a share of them, --warmup_ratio",
    ("dpo", "warmup_ratio: much"): "warmup_ratio: much: give a number, 0 or more",
    ("dpo", "data_seed: 1"): "data_seed: 1: seed decides the order of the data here; leave it out",
    ("dpo", "learning_rate: fast"): "recipe.optim.learning_rate='fast'; wanted a valid number, unable to parse string as a number",
    # losses
    ("dpo", "loss_type: sigmod"): f"loss_type: sigmod: choose of {', '.join(trainers.DPO_LOSSES)}; did you mean 'sigmoid'?",
    ("dpo", "loss_type: [{a: 1}]"): f"loss_type: [{{a: 1}}]: choose of {', '.join(trainers.DPO_LOSSES)}",
    ("dpo", "optim: [adamw_torch]"): f"optim: [adamw_torch]: choose one of {', '.join(trainers.OPTIMIZERS)}, or say --optim adamw (--moment_dtype bfloat16 saves memory)",
    ("dpo", "lr_scheduler_type: {}"): "lr_scheduler_type: {}: choose one of linear, cosine, constant, constant_with_warmup, or say --lr_scheduler_type",
    ("dpo", "label_smoothing: some"): "label_smoothing: some: give a number",
    ("cpo", "loss_type: hinge"): "loss_type: hinge: CPO's are taken over as sigmoid, simpo and alphapo; slic is the nearest",
    ("cpo", "alpha: 0.25\nloss_type: simpo"): "alpha: 0.25: AlphaPO is taken over with loss_type simpo, cpo_alpha 0 and label_smoothing 0",
    ("cpo", "beta: 0\nloss_type: simpo"): "beta: 0: give a number, 1e-09 or more",
    ("orpo", "loss_type: orpo"): "loss_type: orpo: ORPO has one loss; leave it out",
    ("kto", "loss_type: bco"): "loss_type: bco: choose kto or apo_zero_unpaired",
    ("sft", "loss_type: dft"): "loss_type: dft: nll is what loss sft is; leave it out",
    ("simpo", "loss_type: ipo"): "loss_type: ipo: choose sigmoid, hinge or repo",
    ("simpo", "gamma: 1\ngamma_beta_ratio: 0.5"): "gamma: 1: gamma_beta_ratio says it, too; leave one out",
    ("repo", "trainer_type: dpo"): "trainer_type: dpo: the released code runs simpo alone; give simpo, or say --trainer dpo",
    # data
    ("sft", "dataset_mixer: [a]"): "dataset_mixer: [a]: give {name: fraction}",
    ("sft", "dataset_mixer: {a: 1}\ndataset_splits: [all]"): "dataset_splits: [all]: name training splits with 'train' in them, and others with 'test'",
    ("sft", "dataset_mixer: {a: 1, b: 1}\ndataset_splits: [train_a, train_b]"): "dataset_splits: [train_a, train_b]: fractions of several data sets with several training splits each are not read; name one",
    ("sft", "dataset_mixer: {a: 1, b: 1}\ndataset_configs: [c, d]"): "dataset_configs: [c, d]: data sets of one mixture have one configuration here",
    ("sft", "datasets: a"): "datasets: a: give a list of data sets, each with its id or path",
    ("sft", "datasets: [{path: a, data_dir: b}]"): "datasets: [{path: a, data_dir: b}]: 'data_dir' in it is not read; leave it out, or give --dataset_name",
    ("sft", "datasets: [{path: a, splits: b}]"): "datasets: [{path: a, splits: b}]: 'splits' in it is not read; leave it out, or give --dataset_name",
    ("sft", "dataset_mixture: {datasets: [{id: a}], test_size: 1}"): "dataset_mixture: {datasets: [{id: a}], test_size: 1}: 'test_size' in it is not read; leave it out, or give --dataset_name",
    ("sft", "datasets: [{name: a}]"): "datasets: [{name: a}]: each data set has an id or path, and shares and sizes are numbers above 0",
    ("sft", "dataset_mixture: {datasets: [{id: a, weight: half}]}"): "dataset_mixture: {datasets: [{id: a, weight: half}]}: each data set has an id or path, and shares and sizes are numbers above 0",
    ("dpo", "loss_weights: [2.0]"): "loss_weights: [2.0]: there is one loss; leave it out",
    ("sft", "datasets: [{path: a, fraction: 1}, {path: b}]"): "datasets: [{path: a, fraction: 1}, {path: b}]: a fraction is a share of the mixture, which depends on sizes; give dataset_mixer, {name: share of it}",
    ("sft", "datasets: [{path: a}, {path: b, split: c}]"): "datasets: [{path: a}, {path: b, split: c}]: data sets of one mixture have one split and one configuration here; give --dataset_name",
    ("sft", "datasets: [{path: a}, {path: b}]\ntest_split_size: 9"): "datasets: [{path: a}, {path: b}]: test_split_size of a part or of several is not taken; give --eval_dataset_name",
    # lengths and tokens
    ("dpo", "truncation_mode: keep_end"): "truncation_mode: keep_end: it cuts away prompts from the front until both answers fit; give --max_prompt_length and --truncation keep_end",
    ("dpo", "truncation_mode: middle"): "truncation_mode: middle: choose keep_start or keep_end",
    ("simpo", "truncation_mode: keep_start"): "truncation_mode: keep_start: cut as the released code does by default, keep_end",
    ("simpo", "auto_insert_empty_system_msg: false"): "auto_insert_empty_system_msg: false: compat: official puts them in; leave it out",
    ("sft", "chat_template_path: folder"): "chat_template_path: folder: a tokenizer's folder; give its template as a .jinja file: --chat_template",
    # the run
    ("dpo", "save_steps: 0.1"): "save_steps: 0.1: a share of the updates; give their number, --save_steps",
    ("dpo", "eval_strategy: steps\neval_steps: 0.1"): "eval_steps: 0.1: a share of the updates; give their number, --eval_steps",
}  # fmt: skip


@pytest.mark.parametrize("trainer, text", MISTAKES)
def test_a_key_that_cannot_be_had_is_answered_in_one_line(refusal, trainer, text):
    assert refusal(text, trainer=trainer) == MISTAKES[trainer, text]


@pytest.mark.parametrize("key", trainers.ONLY)
def test_a_key_with_values_that_ask_for_nothing_refuses_any_other(refusal, key):
    line = trainers.ONLY[key][1]
    said = refusal(f"{key}: other", trainer=owner(key))
    hidden = key in ("hub_token", "env", "model_init_kwargs", "ref_model_init_kwargs")
    assert said == f"{key}: {'...' if hidden else 'other'}: {line}"
    assert "\n" not in line and len(line) < 120


def owner(key: str) -> str:
    return next((name for name, trainer in trainers.TRAINERS.items() if key in trainer.own), "dpo")


# Values for leaves that such a key gives way to.
INSTEAD = {"model.lora_alpha": 64, "model.lora_target_modules": "all-linear", "model.model_revision": "r",
    "loss.label_smoothing": 0.1, "loss.loss_type": "simpo", "run.output_dir": "o"}  # fmt: skip


@pytest.mark.parametrize("key", trainers.ONLY)
def test_what_is_advised_helps(write, key):
    line, *instead = trainers.ONLY[key][1:]
    assert "leave it out" in line or instead
    for target in instead:
        assert f"--{target.split('.')[1]}" in line or "leave it out" in line
        told, flags = [], {target: INSTEAD[target], "model.use_peft": True}
        recipe = load(write(f"{key}: other"), flags, trainer=owner(key), tell=told.append)
        make_loss(**recipe.loss)
        assert f"{key}: other is not looked at, for --{target.split('.')[1]} says otherwise" in told[0]


def test_every_mistake_has_its_line_and_the_files_name(write):
    path = write("rpo_alpha: 1\nlearning_rat: 1\nload_in_4bit: true")
    with pytest.raises(ValueError) as error:
        load(path)
    assert [line.split(": ")[:2] for line in str(error.value).splitlines()] == [
        [f"'{path}'", "learning_rat"],
        [f"'{path}'", "load_in_4bit"],
    ]


# Commands


def test_translate_writes_a_recipe_of_ours(tmp_path, capsys):
    source, target = path_of("llama-3-8b-instruct-repo"), tmp_path / "mine.yaml"
    assert cli.main(["translate", str(source), "--num_processes", "4", "--gamma", "0.5", "--output", str(target)]) == 0
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"'{source}' is a recipe for RePO's run_repo.py, translated:\n")
    assert load_recipe(target) == load(source, {"loss.gamma": 0.5})
    assert cli.main(["translate", str(source), "--num_processes", "4"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["loss"] == {"loss_type": "repo", "reward_scale": 2.5, "gamma": 0.6}


@pytest.fixture
def failure(capsys):
    """The one line, and nothing on stdout, of a command that must fail."""

    def run(*argv):
        try:
            code = cli.main([str(arg) for arg in argv])
        except SystemExit as stopped:
            code = stopped.code
        out, err = capsys.readouterr()
        assert (code, out) == (2, "")
        return err.splitlines()[-1]

    return run


def test_translate_answers_mistakes(failure, write, tmp_path):
    assert failure("translate", ROOT / "configs" / "quickstart.yaml").endswith(
        "has our sections already; there is nothing to translate"
    )
    assert "no recipe at 'nowhere'" in failure("translate", "nowhere")
    assert failure("translate", write("beta: 1")).endswith(
        "add --trainer with one of repo, simpo, cpo, kto, orpo, sft, dpo"
    )
    assert "argument --num_processes: '0' is no number of devices" in failure(
        "translate", write("beta: 1"), "--num_processes", 0
    )
    assert "argument --trainer: invalid choice: 'ppo'" in failure("translate", write("beta: 1"), "--trainer", "ppo")
    assert failure("translate", write("rpo_alpha: 1\nlearning_rate: -1")).startswith(
        "repo-jax: recipe.optim.learning_rate=-1"
    )
    assert "is a directory" in failure("translate", write("rpo_alpha: 1"), "--output", tmp_path).lower()


@pytest.fixture
def trained(monkeypatch):
    """The recipe that train was given, and what the environment says of processes."""
    seen = {}
    monkeypatch.setattr("repo_jax.training.prepare", lambda recipe: seen.update(recipe=recipe))
    monkeypatch.setattr("repo_jax.training.run", lambda setup: None)
    monkeypatch.setattr("repo_jax.distributed.join", lambda: seen.update(joined=dict(cli.os.environ)))
    for name in cli.PROCESS_FLAGS:
        monkeypatch.delenv(f"JAX_{name.upper()}", raising=False)
    return seen


def test_train_takes_num_processes_for_accelerates_unless_processes_are_told(trained, failure, monkeypatch, capsys):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.setenv(name, "")  # what the command puts there goes with this test
        monkeypatch.delenv(name)
    source = str(path_of("llama-3-8b-instruct-simpo"))
    assert cli.main(["train", source, "--num_processes", "8"]) == 0
    assert trained["recipe"].optim.train_batch_size == 256 and "JAX_NUM_PROCESSES" not in trained["joined"]
    assert "optim.train_batch_size 256 = 2 x 16 x 8 devices (--num_processes)" in capsys.readouterr().err
    given = ["--num_processes", "2", "--process_id", "0", "--coordinator_address", "here:1"]
    monkeypatch.setattr("jax.device_count", lambda: 3)
    assert cli.main(["train", source, *given]) == 0
    assert trained["recipe"].optim.train_batch_size == 96 and trained["joined"]["JAX_NUM_PROCESSES"] == "2"
    assert cli.main(["train", str(ROOT / "configs" / "quickstart.yaml"), "--num_processes", "2"]) == 0
    assert trained["joined"]["JAX_NUM_PROCESSES"] == "2"
    assert (
        failure("train", source, "--num_processes", "two")
        == "repo-jax: argument --num_processes: 'two' is no number of devices; give 1 or more"
    )
    assert failure("train", ROOT / "configs" / "quickstart.yaml", "--trainer", "dpo").startswith(
        "repo-jax: trainer=dpo is for recipes of other trainers"
    )


def test_train_help_says_both_meanings_of_num_processes(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert (
        "how many processes there are; with another trainer's recipe and neither of the other two: how many devices that trainer was started on"
        in text
    )


def test_bench_and_plan_and_inspect_take_a_foreign_recipe(monkeypatch):
    seen = []
    monkeypatch.setattr("repo_jax.benchmark.prepare", lambda recipe, **_: seen.append(recipe))
    monkeypatch.setattr("repo_jax.benchmark.bench", lambda setup, **_: {})
    monkeypatch.setattr("repo_jax.benchmark.as_text", lambda found: "")
    monkeypatch.setattr("repo_jax.inspection.inspect", lambda recipe, **_: seen.append(recipe) or {"wrong": []})
    monkeypatch.setattr("repo_jax.inspection.as_text", lambda found, color: "")

    def plan(recipe, topology, *, command, **_):
        seen.extend([recipe, command])
        return {"fits": True}

    monkeypatch.setattr("repo_jax.planning.plan", plan)
    monkeypatch.setattr("repo_jax.planning.as_text", lambda found: "")
    source = str(path_of("llama-3-8b-instruct-simpo"))
    assert cli.main(["bench", source, "--num_processes", "4"]) == 0
    assert cli.main(["inspect", source]) == 0
    assert cli.main(["plan", source, "--topology", "v5e:4x4"]) == 0
    assert cli.main(["plan", source, "--topology", "v5e:4x4", "--num_processes", "4"]) == 0
    bench, looked, planned, _, other, command = seen
    # inspect opens no devices; a plan is for those of its topology.
    assert [one.optim.train_batch_size for one in (bench, looked, planned, other)] == [128, 32, 512, 128]
    assert command == f"train {source} --num_processes 4"


# configs/README.md: what flags of TRL's are here

SAMPLES = {
    "dpo": {
        "model_name_or_path": "m", "model_revision": "abc", "use_peft": True, "lora_r": 8, "gradient_checkpointing": False, "dataset_name": "d",
        "dataset_config": "c", "dataset_train_split": "a", "dataset_test_split": "b", "datasets": [{"path": "d"}], "max_length": 512, "truncation_mode": "keep_start",
        "loss_type": "ipo", "loss_weights": [1.0, 2.0], "beta": 0.2, "label_smoothing": 0.1, "rpo_alpha": 1.0, "use_weighting": True, "ld_alpha": 0.5,
        "discopop_tau": 0.1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_train_epochs": 1, "max_steps": 10, "learning_rate": 1e-5,
        "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "warmup_steps": 0.1, "optim": "lion_32bit", "weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.9,
        "adam_epsilon": 1e-6, "max_grad_norm": 0.5, "seed": 1, "output_dir": "o", "logging_steps": 1, "eval_steps": 1, "save_steps": 1, "save_total_limit": 1,
        "push_to_hub": True, "hub_model_id": "a/b", "hub_revision": "r", "hub_private_repo": True,
    },
    "kto": {"desirable_weight": 2.0, "undesirable_weight": 2.0},
    "cpo": {"simpo_gamma": 1.0, "cpo_alpha": 0.5, "alpha": 0.25},
    "simpo": {"gamma_beta_ratio": 0.4, "gamma": 0.4, "sft_weight": 0.1, "max_prompt_length": 64},
    "sft": {"max_seq_length": 512, "eos_token": "e", "chat_template_path": "c.jinja"},
}  # fmt: skip
# What else must be said for a key to be read.
BESIDE = {
    "lora_r": {"use_peft": True}, "loss_weights": {"loss_type": ["sigmoid", "sft"]}, "discopop_tau": {"loss_type": "discopop"}, "dataset_config": {"dataset_name": "d"},
    "eval_steps": {"eval_strategy": "steps"}, "dataset_test_split": {"dataset_name": "d", "eval_strategy": "steps"}, "dataset_train_split": {"dataset_name": "d"},
    "hub_model_id": {"push_to_hub": True}, "hub_revision": {"push_to_hub": True}, "hub_private_repo": {"push_to_hub": True},
    "simpo_gamma": {"loss_type": "simpo"}, "alpha": {"loss_type": "alphapo"},
}  # fmt: skip


def flag_rows() -> list[tuple[str, ...]]:
    rows = [("theirs", "of", "here")]
    for trainer, samples in SAMPLES.items():
        for key, value in samples.items():
            beside = BESIDE.get(key, {})
            given = {"model_name_or_path": "m"} | beside | {key: value}
            found = foreign.translate(given, overrides={}, num_processes=1, trainer=trainer)
            line = next(line for line in found.lines if line.startswith(f"{key}: ") and ", by default, " not in line)
            targets = re.findall(r"(?:model|data|loss|optim|run)\.([a-z_0-9]+)", line.split(" -> ")[1])
            owners = trainers.TRAINERS[trainer].title if key in trainers.TRAINERS[trainer].own else "all"
            rows.append((f"`{key}`", owners, ", ".join(f"`{name}`" for name in dict.fromkeys(targets))))
    return rows


def test_the_table_of_flags_is_what_becomes_of_them():
    assert part("flags") == table(flag_rows())


def test_the_table_of_metrics_has_names_that_are_logged():
    from loss_pairs import random_pairs

    from repo_jax.metrics import preference_metrics

    ours = {name for row in part("metrics").splitlines()[2:] for name in re.findall(r"`([^`]+)`", row.split("|")[2])}
    source = (ROOT / "repo_jax" / "progress.py").read_text(encoding="utf-8") + (
        ROOT / "repo_jax" / "step.py"
    ).read_text(encoding="utf-8")
    pairs = random_pairs(0, n=2).pairs()
    logged = set(preference_metrics(pairs, pairs, {}))
    assert {name for name in ours - logged if f'"{name}"' not in source} == set()
    assert logged <= ours


def test_the_table_of_data_has_every_schema():
    rows = part("data").splitlines()[2:]
    schemas = set(typing.get_args(leaf_fields()["schema"][1].type)) - {"auto"}
    assert schemas <= {row.split("`")[1] for row in rows}


@pytest.mark.parametrize(
    "given, wanted", [("wandb", ["wandb"]), ("[wandb, azure_ml]", ["wandb"]), ("none", "none"), ("all", "none")]
)
def test_the_trackers_it_names_are_reported_to(write, given, wanted):
    assert load(write(f"loss_type: repo\nreport_to: {given}\n")).run.report_to == wanted
