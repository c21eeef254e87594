"""Learning from answers alone: the ids, masks and losses of TRL's SFTTrainer, and a run that RePO goes on from."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import transformers
import yaml
from examples import ASSETS, ROOT, STORIES, one_device, stories

from repo_jax.data.chat import PairTokenizer, load_tokenizer
from repo_jax.data.rows import RowShape
from repo_jax.data.schema import PairTokens, read_examples
from repo_jax.data.sources import source_of
from repo_jax.evaluation import evaluate_pairs, summarize
from repo_jax.inspection import decoded
from repo_jax.losses import LOSSES, Loss, make_loss
from repo_jax.models.decoder import Decoder
from repo_jax.report import summary_text
from repo_jax.run_folder import read_metrics
from repo_jax.step import Scorer

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")  # TRL sets it

NEEDED = "is not installed; requirements-test.txt names it, for Python 3.11"
# Zephyr's way of writing, with a BOS, which TRL does not add; it finds the answers by the marks of generation, which write nothing.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content + eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def completions() -> list[dict]:
    """Real answers as texts behind prompts that end in a space, some of which the answers' first tokens take in."""
    rows = []
    for line in (ASSETS / "preferences" / "train.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt, answer = row["prompt"][0]["content"], row["chosen"][0]["content"]
        if len(row["prompt"]) == 1 and len(prompt + answer) < 200:
            rows.append({"prompt": f"{prompt} ", "completion": answer})
    return rows[:8]


def conversations() -> list[dict]:
    """Real conversations of several answers."""
    rows = []
    for line in (ASSETS / "preferences" / "train.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        turns = row["prompt"] + row["chosen"]
        if len(row["prompt"]) >= 3 and sum(len(turn["content"]) for turn in turns) < 350:
            rows.append({"messages": turns})
    return rows[:8]


ROWS = {"completions": completions(), "conversations": conversations()}


def tokenizer_for(kind):
    return load_tokenizer(str(STORIES), chat_template=TEMPLATE if kind == "conversations" else None)


def tokenized(kind) -> list[PairTokens]:
    examples = list(read_examples(source_of(ROWS[kind], kind).rows()))
    return [result.pair for result in PairTokenizer(tokenizer_for(kind))(examples)]


def scorer_of(pairs, loss="sft", **hparams):
    cfg, params = stories()
    T = -(-max(pair.slots for pair in pairs) // 64) * 64
    return Scorer(
        Decoder(cfg, np.dtype("float32")), *make_loss(loss, **hparams), one_device(), RowShape(1, T, T)
    ), params


@pytest.fixture(scope="module", params=ROWS)
def trl(request, tmp_path_factory):
    """The kind of data, a batch as TRL makes it, and its loss of that batch."""
    torch = pytest.importorskip("torch", reason=f"torch {NEEDED}")
    pytest.importorskip("trl", reason=f"trl {NEEDED}")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    kind, tokenizer = request.param, tokenizer_for(request.param)
    tokenizer.pad_token = tokenizer.unk_token
    only = {"assistant_only_loss": True} if kind == "conversations" else {"completion_only_loss": True}
    options = SFTConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")), per_device_eval_batch_size=8, max_length=None, use_cpu=True, bf16=False,
        report_to="none", disable_tqdm=True, gradient_checkpointing=False, **only,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    rows = Dataset.from_list(ROWS[kind])
    trainer = SFTTrainer(model, options, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
    batch = next(iter(trainer.get_eval_dataloader()))
    found = {name: value.numpy().copy() for name, value in batch.items()}
    with torch.no_grad():
        return kind, found, float(trainer.compute_loss(trainer.model.eval(), batch)), float(model(**batch).loss)


def test_ids_and_scored_tokens_are_those_of_trl(trl):
    kind, batch, *_ = trl
    pairs = tokenized(kind)
    assert len(pairs) == len(batch["input_ids"]) == 8
    for pair, ids, labels in zip(pairs, batch["input_ids"], batch["labels"], strict=True):
        whole = np.concatenate([pair.prompt, pair.chosen])
        assert whole.tolist() == ids[: len(whole)].tolist()
        mask = np.concatenate([np.zeros(len(pair.prompt), bool), pair.chosen_mask])
        assert mask.tolist() == (labels[: len(whole)] != -100).tolist() and (labels[len(whole) :] == -100).all()
    if kind == "conversations":
        assert all(np.diff(pair.chosen_mask.astype(int)).any() for pair in pairs)  # a user speaks between answers


def test_the_loss_is_that_of_trl_and_transformers_on_the_same_tokens(trl):
    kind, _, of_trl, of_transformers = trl
    pairs = tokenized(kind)
    scorer, params = scorer_of(pairs)
    ours = evaluate_pairs(scorer, {"params": params}, pairs)
    assert ours.metrics["loss"] == pytest.approx(of_trl, abs=2e-5) == pytest.approx(of_transformers, abs=2e-5)


def test_what_is_reported_of_answers_alone_is_the_loss_and_no_margin():
    pairs = tokenized("conversations")
    scorer, params = scorer_of(pairs, sft_average="answers")
    evaluation = evaluate_pairs(scorer, {"params": params}, pairs)
    found = summarize(evaluation)
    assert found["loss"] == pytest.approx(-found["logps/chosen"], abs=1e-5) and evaluation.margins_B.shape == (0,)
    assert not {"rewards/margins", "rewards/accuracies", "logps/rejected", "mean_margin"} & found.keys()
    assert all(np.isfinite(value) for value in found.values())
    before, after = found, found | {"loss": 1.5}
    told = summary_text(before, after).splitlines()
    assert told[1].split() == ["held-out", "loss", f"{found['loss']:.3f}", "1.500"] and "margin" not in "".join(told)


def test_decoded_shows_all_answers_of_a_conversation_as_scored():
    kind = "conversations"
    pair = tokenized(kind)[0]
    shown = decoded(tokenizer_for(kind), pair)
    assert shown["rejected"] == [] and [scored for _, scored in shown["chosen"]] == [False, True] * (
        len(shown["chosen"]) // 2
    )
    said = [turn["content"] for turn in ROWS[kind][0]["messages"] if turn["role"] == "assistant"]
    assert [text.strip() for text, scored in shown["chosen"] if scored] == [f"{words}</s>" for words in said]


def test_sums_of_losses_with_sft_are_of_pairs():
    assert LOSSES["sft"].layout == "chosen" and make_loss("sft")[0].layout == "chosen"
    assert make_loss(["sft", "repo"])[0].layout == make_loss(["repo", "sft"])[0].layout == "pairs"
    with pytest.raises(
        ValueError, match=r"adds values of pairs to values of answers \(kto of answers, sft of chosen\)"
    ):
        make_loss(["kto", "sft"])
    assert Loss(lambda pairs: pairs.sums_B2[:, 0]).layout == "pairs"


@pytest.mark.slow
def test_a_model_learns_from_conversations_and_repo_goes_on_from_it(tmp_path):
    tree = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text(encoding="utf-8"))
    tree["model"]["model_name_or_path"] = str(STORIES)
    pairs = [
        json.loads(line) for line in (ASSETS / "preferences" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    chats, held_out = (
        [{"messages": row["prompt"] + row["chosen"]} for row in rows] for rows in (pairs[:160], pairs[160:200])
    )
    for name, rows in (("chats/train", chats), ("chats/test", held_out), ("pairs", pairs[200:216])):
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tree["data"] |= {"dataset_name": str(tmp_path / "chats"), "cache_dir": str(tmp_path / "cache")}
    tree["loss"], tree["optim"] = {"loss_type": "sft"}, tree["optim"] | {"num_train_epochs": 1}

    def trained(tree, name):
        recipe, out = tmp_path / f"{name}.yaml", tmp_path / name
        recipe.write_text(yaml.safe_dump(tree | {"run": {"output_dir": str(out)}}), encoding="utf-8")
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "repo_jax", "train", str(recipe)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return out, done.stdout

    run, said = trained(tree, "sft")
    results = json.loads((run / "eval_results.json").read_text())
    assert results["after"]["loss"] < results["before"]["loss"] - 0.2
    losses = [line["loss"] for line in read_metrics(run / "metrics.jsonl")]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.2
    assert "held-out loss" in said and "mean margin" not in said and "held-out loss" in (run / "report.md").read_text()
    card = (run / "hf" / "README.md").read_text()
    assert "trained by `sft` ([arXiv:2404.19733](https://arxiv.org/abs/2404.19733)) on answers of" in card

    tree["model"] = {"model_name_or_path": str(run / "hf")}  # which brings template and end token
    tree["data"] |= {"dataset_name": str(tmp_path / "pairs.jsonl")}
    tree["loss"], tree["optim"] = {"loss_type": "repo", "gamma": 1.0}, tree["optim"] | {"max_steps": 2}
    aligned, _ = trained(tree, "repo")
    assert (aligned / "hf" / "model.safetensors").read_bytes() != (run / "hf" / "model.safetensors").read_bytes()
