"""What TRL 1.16 leaves to defaults, and every key it has, beside what foreign.py knows of it. Skipped where TRL is not installed."""

import dataclasses

import pytest

from repo_jax import foreign, trainers

NEEDED = "is not installed; requirements-test.txt names it, for Python 3.11"
pytest.importorskip("torch", reason=f"torch {NEEDED}")
pytest.importorskip("trl", reason=f"trl {NEEDED}")

from transformers import TrainingArguments  # noqa: E402
from trl import DPOConfig, KTOConfig, ModelConfig, ScriptArguments, SFTConfig  # noqa: E402
from trl.experimental.cpo import CPOConfig  # noqa: E402
from trl.experimental.orpo import ORPOConfig  # noqa: E402
from trl.scripts.utils import DatasetMixtureConfig  # noqa: E402

CONFIGS = {"dpo": DPOConfig, "cpo": CPOConfig, "orpo": ORPOConfig, "kto": KTOConfig, "sft": SFTConfig}
SCRIPT = (ModelConfig, ScriptArguments, DatasetMixtureConfig)
# Read from TRL of 2024 and alignment-handbook alone, or newer transformers no longer have them.
OLD = {"warmup_ratio"}


def defaults(*kinds) -> dict:
    fields = [field for kind in kinds for field in dataclasses.fields(kind)]
    return {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in fields
    }


def alike(theirs, ours) -> bool:
    return theirs == ours or theirs == [ours]  # DPO's loss_type is a list of one


@pytest.mark.parametrize("name", CONFIGS)
def test_what_a_recipe_leaves_out_is_trls_own(name):
    theirs, ours = defaults(*SCRIPT, CONFIGS[name]), trainers.TRAINERS[name].defaults
    assert set(ours) - set(theirs) <= OLD
    assert {key: theirs[key] for key in ours if key in theirs and not alike(theirs[key], ours[key])} == {}


def test_what_transformers_leaves_out_is_its_own():
    theirs = defaults(TrainingArguments)
    ours = {key: value for key, value in trainers.HUGGING_FACE.items() if key in theirs}
    # The name of AdamW changed meanwhile; both are ours.
    assert {key for key in ours if theirs[key] != ours[key]} == {"optim"}
    assert len(ours) >= 16


@pytest.mark.parametrize("name", CONFIGS)
def test_a_recipe_that_says_all_defaults_is_accepted_and_each_key_has_its_reason(name):
    given = defaults(*SCRIPT, CONFIGS[name]) | {"model_name_or_path": "m", "dataset_name": "d", "datasets": None}
    given = {key: value for key, value in given.items() if key != "datasets"}
    found = foreign.translate(given, overrides={}, num_processes=1, trainer=name)
    assert {line.split(":")[0] for line in found.lines[: len(given)]} == set(given)
    assert "nothing here reads it" not in str(found)
    # And it means what a recipe means that says nothing.
    short = {"model_name_or_path": "m", "dataset_name": "d"}
    assert found.tree == foreign.translate(short, overrides={}, num_processes=1, trainer=name).tree


def test_the_losses_of_dpo_are_all_known():
    docs = DPOConfig.__doc__ + "".join(field.metadata.get("help", "") for field in dataclasses.fields(DPOConfig))
    names = {name for name in trainers.DPO_LOSSES if name != "aot_pair"}  # that name is of 2024
    assert {
        name for name in names if f"`{name}`" not in docs and f"'{name}'" not in docs and f'"{name}"' not in docs
    } == set()
