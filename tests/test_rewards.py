"""Reward models: transformers' scores, through the command."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
from examples import STORIES

from repo_jax.cli import main

PAIRS = [
    {"prompt": "Once upon a time", "chosen": " there was a cat.", "rejected": " the end"},
    {"prompt": "Lily", "chosen": " ran to the big red house and saw a dog", "rejected": " ran"},
    {"prompt": "A frog said", "chosen": " hello", "rejected": " goodbye, my friend, I am going home now"},
]


@pytest.fixture
def reward_model(tmp_path):
    """The small real model with a head of one label, from random numbers."""
    folder = shutil.copytree(STORIES, tmp_path / "reward")
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    (folder / "config.json").write_text(json.dumps(config | {"label2id": {"LABEL_0": 0}, "pad_token_id": 0}))
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    weights["score.weight"] = np.random.default_rng(0).normal(size=(1, 64)).astype(np.float32)
    safetensors.numpy.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return ["--data", str(tmp_path / "pairs.jsonl"), "--cache_dir", str(tmp_path / "cache"), "--append_eos", "never"]


@pytest.mark.parametrize("rows", [1, 4])
def test_pairs_are_ranked_by_the_scores_of_transformers(reward_model, tmp_path, capsys, rows):
    torch = pytest.importorskip("torch", reason="the oracle is transformers' own model, which needs torch")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    flags = [*write(tmp_path), "--rows_per_device", str(rows)]
    assert main(["evaluate", "--model", str(reward_model), *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    model = AutoModelForSequenceClassification.from_pretrained(reward_model)
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    with torch.no_grad():
        scores = [
            [model(**tokenizer(pair["prompt"] + pair[side], return_tensors="pt", return_token_type_ids=False)).logits.item()
             for side in ("chosen", "rejected")]
            for pair in PAIRS
        ]  # fmt: skip
    chosen, rejected = np.transpose(scores)
    assert 0 < (chosen > rejected).sum() < len(PAIRS)
    assert found == {
        "rewards/chosen": pytest.approx(chosen.mean(), abs=1e-4),
        "rewards/rejected": pytest.approx(rejected.mean(), abs=1e-4),
        "rewards/margins": pytest.approx((chosen - rejected).mean(), abs=1e-4),
        "rewards/accuracies": (chosen > rejected).mean(),
        "pairs": len(PAIRS),
    }


def test_a_reward_model_neither_trains_nor_answers(reward_model, tmp_path, capsys):
    flags = write(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {{model_name_or_path: {reward_model}}}\ndata: {{dataset_name: {flags[1]}}}\n")
    assert main(["train", str(recipe), "--output_dir", str(tmp_path / "run")]) == 2
    assert "is a reward model, which gives tokens no probability; give a language model" in capsys.readouterr().err
    assert main(["generate", "--model", str(reward_model), "--data", flags[1], "--output", str(tmp_path / "out")]) == 2
    assert "is a classification or reward model, which writes nothing" in capsys.readouterr().err
