"""The card as the Hub reads it, and what of a run it tells."""

import huggingface_hub
import pytest
import yaml

from repo_jax.card import HEADING, model_card
from repo_jax.config import dump_recipe, load_recipe, to_recipe

LLAMA = "meta-llama/Llama-3.2-1B"
LICENCE = "---\nlanguage: en\nlicense: other\nlicense_name: llama3.2\nlicense_link: LICENSE.txt\n---\n# Llama\n"


def card_of(base: str, *, overrides=None, **kwargs) -> str:
    recipe = load_recipe(None, {"model.model_name_or_path": base, **(overrides or {})})
    return model_card(dump_recipe(recipe), base=base, results=None, **kwargs)


def front(card: str) -> dict:
    """What the Hub takes from a card."""
    return huggingface_hub.ModelCard(card, ignore_metadata_errors=False).data.to_dict()


def recipe_in(card: str) -> dict:
    return yaml.safe_load(card.split("```yaml\n")[1].split("\n```")[0])


def test_the_card_says_where_the_model_came_from_and_what_was_measured():
    results = {"pairs": 7, "before": {"loss": 0.5}, "after": {"loss": 0.25}}
    card = model_card("loss:\n  gamma: 0.5\n", base="some/model", results=results)
    assert HEADING in card.splitlines()
    assert "`some/model`" in card and "7 held-out pairs" in card and "gamma: 0.5" in card
    assert "| loss | 0.5000 | 0.2500 |" in card.splitlines()


def test_what_was_not_measured_before_has_no_table():
    for when in ("before", "after"):  # half of a table is none
        assert "held-out" not in model_card("", base="some/model", results={"pairs": 7, when: {"loss": 0.25}})


def test_the_hub_learns_base_data_licence_and_objective(tmp_path):
    (tmp_path / "README.md").write_text(LICENCE)
    mixture = {"HuggingFaceH4/ultrafeedback_binarized": 1.0, str(tmp_path / "mine.jsonl"): 0.5, "data/more.jsonl": 1.0}
    changes = {"data.dataset_mixer": mixture, "loss.loss_type": "simpo", "model.model_revision": "v2"}
    card = card_of(LLAMA, overrides=changes, folder=tmp_path)
    assert front(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "other",
        "license_name": "llama3.2",
        "license_link": f"https://huggingface.co/{LLAMA}/blob/main/LICENSE.txt",
        "base_model": LLAMA,
        "base_model_relation": "finetune",
        "datasets": ["HuggingFaceH4/ultrafeedback_binarized"],
        "tags": ["preference-optimization", "simpo", "repo_jax"],
    }
    assert (
        f"Started from `{LLAMA}` (revision `v2`) and trained by `simpo` ([arXiv:2405.14734](https://arxiv.org/abs/2405.14734)) on "
        "preference pairs of `HuggingFaceH4/ultrafeedback_binarized` and `mine.jsonl` and `data/more.jsonl`."
    ) in card


def test_an_adapter_is_known_as_one():
    told = front(card_of(LLAMA, library_name="peft"))
    assert told["library_name"] == "peft" and told["base_model_relation"] == "adapter" and told["base_model"] == LLAMA


@pytest.mark.parametrize("base", ["models/llama", "/data/org/llama", "gs://bucket/llama", "./org/llama"])
def test_a_model_that_lies_here_is_not_taken_for_one_on_the_hub(base, tmp_path, monkeypatch):
    (tmp_path / "models" / "llama").mkdir(parents=True)
    (tmp_path / "README.md").write_text(LICENCE)
    monkeypatch.chdir(tmp_path)
    told = front(card_of(base, overrides={"data.dataset_name": "models/llama"}, folder=tmp_path))
    assert not told.keys() & {"base_model", "base_model_relation", "datasets", "license_link"}
    assert told["license_name"] == "llama3.2"


@pytest.mark.parametrize(
    "text", [None, "# No front matter", "---\nlicense: [\n---\n", "---\n- mit\n---\n", "---\nlicense:\n---\n"]
)
def test_a_base_without_a_readable_licence_has_none(text, tmp_path):
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert "license" not in front(card_of(LLAMA, folder=tmp_path))


def test_the_recipe_is_whole_but_for_the_folders_of_the_machine():
    template = "{% for m in messages %}https://x.org/```{{ m }}\n{% endfor %}"
    private = {
        "data.dataset_mixer": {"/home/me/a/train.jsonl": 1.0, "/home/me/b/train.jsonl": 0.5},
        "data.eval_dataset_name": "s3://my-bucket/test.jsonl",
        "data.cache_dir": "/home/me/cache",
        "run.output_dir": "/home/me/runs/1",
        "run.compile_cache_dir": "/home/me/programs",
    }
    kept = {"model.chat_template": template, "optim.learning_rate": 2.5e-7, "run.hub_model_id": "lab/model"}
    card = card_of("/home/me/llama", overrides=private | kept)
    assert "/home/me" not in card and "my-bucket" not in card and "Started from `llama`" in card
    shown = yaml.safe_load(card.split("````yaml\n")[1].split("\n````")[0])
    public = {
        "data.dataset_mixer": {"train.jsonl": 1.0, "train.jsonl (2)": 0.5},
        "data.eval_dataset_name": "test.jsonl",
        "model.model_name_or_path": "llama",
    }
    assert to_recipe(shown) == load_recipe(None, public | kept)


def test_a_card_that_can_be_read_holds_a_recipe_that_can_be_run():
    changes = {"data.dataset_name": "org/pairs", "loss.gamma": 0.3}
    card = card_of(LLAMA, overrides=changes)
    assert to_recipe(recipe_in(card)) == load_recipe(None, {"model.model_name_or_path": LLAMA, **changes})
