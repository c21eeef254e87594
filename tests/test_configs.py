"""The recipes in configs/: each loads and is whole, without weights and without a network."""

import re

import jinja2
import pytest
from examples import ROOT

from repo_jax.config import load_recipe
from repo_jax.data.chat import TokenOptions
from repo_jax.foreign import MISTRAL_TEMPLATE
from repo_jax.losses import make_loss
from repo_jax.optimizer import learning_rate

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
PUBLISHED = [
    path for path in CONFIGS if re.search("-(simpo|repo|dpo)(-v2)?$", path.stem) and "base-sft" not in path.stem
]
STEPS = 467  # of 59,876 pairs, 128 at a time


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def path(request):
    return request.param


def test_a_recipe_loads_and_its_loss_and_schedule_can_be_made(path):
    recipe = load_recipe(path)
    loss, hparams = make_loss(**recipe.loss)
    assert callable(loss.fn) and set(recipe.loss) - {"loss_type"} <= set(hparams)
    rate = learning_rate(recipe.optim, STEPS)
    assert rate(0) == 0 and rate(STEPS) == 0 and rate(47) == pytest.approx(recipe.optim.learning_rate)
    assert 0 < recipe.optim.learning_rate <= (1e-3 if path.stem == "quickstart" else 2e-5)


def test_a_recipe_opens_with_its_command_and_what_to_expect(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[1].startswith(f"#   repo-jax train configs/{path.name}")
    head = "\n".join(line for line in lines[:6] if line.startswith("#"))
    assert "\n# Expect: " in head and (path.stem == "quickstart" or "\n# Machine: " in head)


def test_a_recipe_has_a_run_folder_of_its_own(path):
    assert load_recipe(path).run.output_dir == f"runs/{path.stem}"


def test_lengths_fit_each_other(path):
    data = load_recipe(path).data
    truncation = data.truncation or ("official" if data.compat == "official" else "drop")
    lengths = {"max_length": data.max_length or 2048, "max_prompt_length": data.max_prompt_length}
    assert TokenOptions(**lengths, truncation=truncation, compat=data.compat)


def test_published_recipes_take_128_pairs_an_update_once():
    for path in PUBLISHED:
        optim = load_recipe(path).optim
        assert (optim.train_batch_size, optim.num_train_epochs, optim.lr_scheduler_type) == (128, 1, "cosine"), path
        assert (optim.warmup_ratio, optim.max_grad_norm, optim.weight_decay) == (0.1, 1.0, 0.0), path


# The chat templates

TALK = [("system", " Be brief.\n"), ("user", " Hi. "), ("assistant", " Yes? "), ("user", "Go\n")]
RENDERED = {
    "mistral-7b-instruct": "[INST] Be brief.\n\n Hi. [/INST] Yes? </s>[INST] Go [/INST]",
    "gemma-2-9b-it": (
        "<s><start_of_turn>user\nBe brief.\n\n Hi.<end_of_turn>\n<start_of_turn>model\nYes?<end_of_turn>\n"
        "<start_of_turn>user\nGo<end_of_turn>\n"
    ),
    "llama-3-8b-base-sft": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nYes?<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nGo<|eot_id|>"
    ),
    "mistral-7b-base-sft": "<|system|>\n Be brief.\n</s>\n<|user|>\n Hi. </s>\n<|assistant|>\n Yes? </s>\n<|user|>\nGo\n</s>\n",
}
HEADERS = {
    "mistral-7b-instruct": "",
    "gemma-2-9b-it": "<start_of_turn>model\n",
    "llama-3-8b-base-sft": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral-7b-base-sft": "<|assistant|>\n",
}


def rendered(template: str, talk, **options) -> str:
    """As transformers renders templates."""
    there = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    messages = [{"role": role, "content": content} for role, content in talk]
    return there.from_string(template).render(messages=messages, bos_token="<s>", eos_token="</s>", **options)


def templated() -> list:
    return [path for path in CONFIGS if path.stem != "quickstart" and load_recipe(path).model.chat_template]


@pytest.mark.parametrize("path", templated(), ids=lambda path: path.stem)
def test_a_template_writes_what_the_published_one_does(path):
    template = load_recipe(path).model.chat_template
    name = next(name for name in RENDERED if path.stem.startswith(name))
    assert rendered(template, TALK) == RENDERED[name]
    assert rendered(template, TALK, add_generation_prompt=True) == RENDERED[name] + HEADERS[name]


def test_an_answer_can_stand_by_itself():
    """compat: official has it written so."""
    by_itself = {
        "mistral-7b-instruct-repo": " Yes. </s>",
        "gemma-2-9b-it-repo": "<s><start_of_turn>model\nYes.<end_of_turn>\n",
    }
    for name, text in by_itself.items():
        template = load_recipe(ROOT / "configs" / f"{name}.yaml").model.chat_template
        assert rendered(template, [("assistant", "Yes. ")]) == text


def test_the_template_of_translated_mistral_recipes_is_that_of_ours():
    for name in ("mistral-7b-instruct-repo", "mistral-7b-instruct-simpo"):
        assert load_recipe(ROOT / "configs" / f"{name}.yaml").model.chat_template == MISTRAL_TEMPLATE


# configs/README.md


def table(rows: list[tuple[str, ...]]) -> str:
    first, *rest = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([first, "| " + " | ".join(["---"] * len(rows[0])) + " |", *rest])


def part(name: str) -> str:
    """What stands between two marks of configs/README.md."""
    text = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
    return text.split(f"<!-- {name} -->\n")[1].split(f"\n<!-- end of {name} -->")[0]


def recipe_rows() -> list[tuple[str, ...]]:
    rows = [("recipe", "model", "data", "objective", "learning rate", "machine")]
    for path in CONFIGS:
        recipe, text = load_recipe(path), path.read_text(encoding="utf-8")
        names = [
            f"{name} {value:g}" for name, value in recipe.loss.items() if name not in ("loss_type", "reward_scale")
        ]
        machine = re.search(r"^# Machine: (.*?); everything in", text, re.MULTILINE)
        objective = " ".join([recipe.loss["loss_type"], ", ".join(names)]).strip() + ", LoRA" * recipe.model.use_peft
        rate = f"{recipe.optim.learning_rate:g}"
        there = re.sub(r" \([^)]*\)", "", machine[1]) if machine else "a CPU"
        rows.append(
            (f"`{path.stem}`", recipe.model.model_name_or_path, recipe.data.dataset_name, objective, rate, there)
        )
    return rows


def test_the_table_of_recipes_is_of_these_recipes():
    assert part("recipes") == table(recipe_rows())
