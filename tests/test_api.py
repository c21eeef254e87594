"""The library from Python: rows in, metrics, log-probs and a model out. The README's example is run as it stands there."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import datasets
import jax
import numpy as np
import pandas
import pytest
import safetensors.numpy
import yaml
from examples import ASSETS, ROOT, STORIES
from readme import EXAMPLE

import repo_jax
from repo_jax import stores, training
from repo_jax.config import as_recipe, load_recipe, recipe_of_model, to_recipe
from repo_jax.data.sources import source_of
from repo_jax.evaluation import Scores
from repo_jax.models.config import DecoderConfig
from repo_jax.models.decoder import param_shapes
from repo_jax.models.hf import hf_tensors
from repo_jax.stores import held_out_store, tokenizer_of, train_store, with_rows


def text_pairs(n: int) -> list[dict]:
    """Short real pairs as texts, which need no chat template."""
    found = []
    for line in (ASSETS / "preferences" / "train.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt, chosen, rejected = (row[name][0]["content"] for name in ("prompt", "chosen", "rejected"))
        if len(row["prompt"]) == 1 and len(prompt + chosen + rejected) < 300:
            found.append({"id": row["id"], "prompt": f"{prompt} ", "chosen": chosen, "rejected": rejected})
    return found[:n]


PAIRS = text_pairs(50)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder in which the README's example was run, on one device, and what it printed."""
    folder = tmp_path_factory.mktemp("example")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS), encoding="utf-8")
    code = EXAMPLE.replace("Qwen/Qwen2.5-0.5B-Instruct", str(STORIES)).replace("1e-6", "1e-3")
    code = code.replace(
        '"run.output_dir"', '"data.row_length": 384, "data.rows_per_device": 1, "run.output_dir"'
    )  # one program
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment |= {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir, "HOME": str(folder)}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_the_readmes_example_aligns_evaluates_scores_and_exports(ran):
    folder, said = ran
    metrics, first = (json.loads(line.replace("'", '"')) for line in said.splitlines() if line.startswith("{"))
    results = json.loads((folder / "runs/python/eval_results.json").read_text())
    assert results["after"]["mean_margin"] != results["before"]["mean_margin"]
    assert metrics["pairs"] == 10 and metrics["loss_type"] == "repo"
    assert metrics["mean_margin"] == pytest.approx(results["after"]["mean_margin"], abs=1e-4)
    margins = np.load(folder / "runs/python/margins_after.npy")
    assert first["id"] == PAIRS[40]["id"] and first["margin"] == pytest.approx(margins[0], abs=1e-4)
    mean = {side: first[f"logps_{side}"] / first[f"tokens_{side}"] for side in ("chosen", "rejected")}
    assert mean["chosen"] - mean["rejected"] == pytest.approx(first["margin"], abs=1e-5)


def test_what_from_hf_reads_to_hf_writes_bit_for_bit_with_all_that_transformers_wants(ran):
    folder, _ = ran
    ours, theirs = folder / "aligned", folder / "runs/python/hf"
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    names = {path.name for path in theirs.iterdir()} - {"README.md"}  # it says of the base what it is
    assert {path.name for path in ours.iterdir()} == names and "tokenizer.json" in names
    for name in names:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()


def test_the_runs_recipe_says_that_its_data_came_from_python_and_is_not_run_without_them(ran):
    folder, _ = ran
    path = folder / "runs/python/recipe.yaml"
    data = yaml.safe_load(path.read_text())["data"]
    assert re.fullmatch(r"from Python: train_dataset, 40 rows, sha256 [0-9a-f]{16}", data["dataset_name"])
    assert re.fullmatch(r"from Python: eval_dataset, 10 rows, sha256 [0-9a-f]{16}", data["eval_dataset_name"])
    recipe = load_recipe(path)
    with pytest.raises(ValueError, match=r"were rows of a Python program; give them again: .*train_dataset=rows"):
        training.prepare(recipe)
    assert "`from Python: train_dataset, 40 rows" in (folder / "runs/python/hf/README.md").read_text()


def test_the_same_rows_go_on_with_the_run_and_others_are_refused(ran, tmp_path):
    folder, _ = ran
    run = shutil.copytree(folder / "runs/python", tmp_path / "run")
    recipe = load_recipe(run / "recipe.yaml", {"run.output_dir": str(run), "data.cache_dir": str(tmp_path / "cache")})

    def looked_at(train_rows):
        return training.prepare(with_rows(recipe, train_dataset=train_rows, eval_dataset=PAIRS[40:]))

    assert len(looked_at(PAIRS[:40]).train) == 40
    changed = [*PAIRS[:39], PAIRS[39] | {"chosen": "other words"}]
    with pytest.raises(ValueError, match=r"holds another run .*data.train .*name a new output_dir"):
        looked_at(changed)


# Rows


def recipe_of(tmp_path, **data):
    return to_recipe(
        {"model": {"model_name_or_path": str(STORIES)}, "data": {"cache_dir": str(tmp_path / "cache")} | data}
    )


def stored(recipe):
    store = train_store(recipe, tokenizer_of(recipe))
    return [(store[i].id, store[i].prompt.tolist(), store[i].chosen.tolist()) for i in range(len(store))]


def test_rows_are_what_they_are_in_a_file_whatever_holds_them(tmp_path):
    pairs = PAIRS[:4]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    wanted = stored(recipe_of(tmp_path, dataset_name=str(file)))
    table = datasets.Dataset.from_list(pairs)
    split = datasets.DatasetDict({"train": table})["train"]
    frame = pandas.DataFrame(pairs)
    for rows in (pairs, tuple(pairs), table, split, table.select([0, 1, 2, 3]), frame):
        assert stored(with_rows(recipe_of(tmp_path), train_dataset=rows)) == wanted


def test_messages_and_numbers_of_numpy_come_through(tmp_path):
    turns = np.array([{"role": "user", "content": "hi"}], dtype=object)  # as pandas reads parquet
    row = {"prompt": turns, "chosen": [{"role": "assistant", "content": "yes"}], "score_chosen": np.float32(0.5)}
    [raw] = source_of([row], "rows").rows()
    assert json.loads(raw.content) == row | {"prompt": turns.tolist(), "score_chosen": 0.5}
    frame = pandas.DataFrame(
        [{"prompt": turns, "margin": float("nan"), "seen": pandas.Timestamp("2024-01-01"), "kind": pandas.NA}]
    )
    [raw] = source_of(frame, "rows").rows()
    wanted = {"prompt": turns.tolist(), "margin": None, "seen": "2024-01-01T00:00:00", "kind": None}
    assert json.loads(raw.content) == wanted


def test_rows_are_those_of_the_moment_they_were_given():
    pairs = [dict(pair) for pair in PAIRS[:2]]
    source = source_of(pairs, "rows")
    before = source.digest()
    pairs[0]["chosen"] = "changed"
    assert source.digest() == before and source_of(pairs, "rows").digest() != before


def test_held_out_rows_stand_beside_a_data_set_and_the_other_way_round(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS[:4]), encoding="utf-8")
    beside = with_rows(recipe_of(tmp_path, dataset_name=str(file)), eval_dataset=PAIRS[4:6])
    other = with_rows(recipe_of(tmp_path, eval_dataset_name=str(file)), train_dataset=PAIRS[4:6])
    alone = with_rows(recipe_of(tmp_path), train_dataset=PAIRS[:3])
    assert [len(held_out_store(r, tokenizer_of(r))) for r in (beside, other)] == [2, 4]
    assert held_out_store(alone, tokenizer_of(alone)) is None


@pytest.mark.parametrize(
    ("rows", "kind", "said"),
    [
        (iter(PAIRS), TypeError, r"train_dataset is a list_iterator; it can be read once only, .* give list\(...\) of it"),
        ((pair for pair in PAIRS), TypeError, r"train_dataset is a generator; it can be read once only"),
        ("pairs.jsonl", TypeError, r"train_dataset is a str; name files and data sets in the recipe: load_recipe.*'pairs.jsonl'"),
        (datasets.DatasetDict({"train": datasets.Dataset.from_list(PAIRS)}), TypeError, r"is a DatasetDict; give one of its splits: data\['train'\]"),
        ({"prompt": ["a"], "chosen": ["b"]}, TypeError, r"is a dict; give a list of dicts, one for each row \(datasets.Dataset.from_dict takes columns"),
        (7, TypeError, "train_dataset is a int; give a list of dicts, a datasets.Dataset or a pandas.DataFrame"),
        ([*PAIRS[:2], "text"], TypeError, "train_dataset row 3 is a str; wanted a dict with the row's columns"),
        ([{"prompt": object()}], TypeError, "train_dataset row 1 cannot be kept: a object is no JSON; give texts, numbers, lists and dicts"),
        ([], ValueError, "train_dataset has no rows; give at least one"),
        (pandas.DataFrame(), ValueError, "train_dataset has no rows"),
    ],
)  # fmt: skip
def test_rows_of_another_kind_are_refused_with_what_to_give(tmp_path, rows, kind, said):
    with pytest.raises(kind, match=said):
        repo_jax.train(recipe_of(tmp_path), train_dataset=rows)


def test_a_row_of_another_schema_is_named(tmp_path):
    other = {"prompt": "a", "completion": "b", "label": True}
    recipe = with_rows(recipe_of(tmp_path), train_dataset=[*PAIRS[:3], other])
    with pytest.raises(ValueError, match=r"train_dataset row 4 has no 'chosen'; wanted prompt, chosen, rejected"):
        stored(recipe)
    with pytest.raises(ValueError, match=r"'train_dataset' has rows of no known schema: found text \(text\)"):
        stored(with_rows(recipe_of(tmp_path), train_dataset=[{"text": "a"}]))


@pytest.mark.parametrize(
    ("data", "given", "said"),
    [
        ({"dataset_name": "pairs"}, "train_dataset", "train_dataset is given, but the recipe has dataset_name='pairs' too; leave one"),
        ({"dataset_mixer": {"pairs": 1.0}}, "train_dataset", "the recipe has dataset_mixer={'pairs': 1.0} too"),
        ({"eval_dataset_name": "pairs"}, "eval_dataset", "eval_dataset is given, but the recipe has eval_dataset_name='pairs' too"),
    ],
)  # fmt: skip
def test_rows_beside_a_name_for_the_same_are_refused(tmp_path, data, given, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        with_rows(recipe_of(tmp_path, **data), **{given: PAIRS})
    if given == "eval_dataset":
        with pytest.raises(ValueError, match=re.escape(said)):
            repo_jax.evaluate(recipe_of(tmp_path, **data), PAIRS)


def test_rows_are_taken_whole(tmp_path):
    recipe = with_rows(recipe_of(tmp_path, dataset_train_split="train[:2]"), train_dataset=PAIRS)
    with pytest.raises(
        ValueError, match=r"train_dataset is taken whole; slice it in Python, and leave 'train\[:2\]' out"
    ):
        stored(recipe)


# Recipes and models


def test_a_recipe_is_a_recipe_or_a_yaml_file_and_a_model_is_a_folder(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: {{model_name_or_path: {STORIES}}}\nloss: {{gamma: 0.3}}\n")
    assert as_recipe(path) == as_recipe(str(path)) == recipe_of_model(path) == as_recipe(load_recipe(path))
    assert as_recipe(path).loss == {"gamma": 0.3}
    assert recipe_of_model(STORIES) == to_recipe({"model": {"model_name_or_path": str(STORIES)}})
    with pytest.raises(TypeError, match=r"recipe is a dict; give the path of a YAML file, or a Recipe: .*load_recipe"):
        repo_jax.train({"model": {}})
    with pytest.raises(FileNotFoundError, match=r"no recipe at 'nowhere\.yaml'"):
        repo_jax.train("nowhere.yaml")
    with pytest.raises(
        ValueError, match=rf"'{tmp_path}' is the folder of a run; give the model in it: '{tmp_path}/hf'"
    ):
        repo_jax.evaluate(tmp_path)
    with pytest.raises(ValueError, match=r"there is nothing to evaluate on; give --data .*, or in Python eval_dataset"):
        repo_jax.evaluate(STORIES)


# Scores


def test_scores_have_no_nan_and_say_only_what_is_there():
    scores = Scores(
        ["a", "b"], np.float32([[-3, -8], [-2, 0]]), np.int32([[3, 4], [2, 0]]), np.float32([1, 0]), {"empty": 1}
    )
    one, other = scores.as_rows()
    assert one == {"id": "a", "logps_chosen": -3, "tokens_chosen": 3, "logps_rejected": -8, "tokens_rejected": 4, "margin": 1}  # fmt: skip
    assert other == {"id": "b", "logps_chosen": -2, "tokens_chosen": 2}
    assert len(pandas.DataFrame(scores.as_rows())) == 2


@pytest.mark.slow
def test_scores_of_rows_with_one_answer_are_those_of_pairs(monkeypatch, tmp_path):
    pairs = PAIRS[:6]
    single = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in pairs
        for side in ("chosen", "rejected")
    ]
    recipe = load_recipe(None, {"model.model_name_or_path": str(STORIES), "data.cache_dir": str(tmp_path)})
    both, one = (
        repo_jax.score(recipe, pairs),
        repo_jax.score(recipe, [*single, pairs[0] | {"completion": "", "label": True}]),
    )
    assert both.ids == [pair["id"] for pair in pairs] and one.ids[:2] == ["dataset:1", "dataset:2"]
    answers = repo_jax.score(recipe, [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs])
    np.testing.assert_allclose(
        answers.logps_B2[:, 0], both.logps_B2[:, 0], atol=1e-3
    )  # of schema sft, which no preference loss would take
    assert not [
        name for name in stores.GIVEN if name.startswith(f"{stores.FROM_PYTHON}dataset,")
    ]  # what was scored is not kept
    assert one.dropped == {"empty": 1} and not one.margins_B.any() and (one.lengths_B2 == 0).sum() == 12
    np.testing.assert_allclose(one.logps_B2[::2, 0], both.logps_B2[:, 0], atol=1e-3)
    np.testing.assert_allclose(one.logps_B2[1::2, 1], both.logps_B2[:, 1], atol=1e-3)
    assert (one.lengths_B2[::2, 0] == both.lengths_B2[:, 0]).all() and both.lengths_B2.dtype == np.int32


@pytest.mark.slow
def test_prompts_in_a_list_are_answered_in_a_list_as_those_of_a_file_are_in_a_file(tmp_path):
    prompts = ["Once upon a time", {"prompt": "The dog", "id": "b"}]
    answered = repo_jax.generate(STORIES, prompts=prompts, max_new_tokens=4)
    assert [row["instruction"] for row in answered] == ["Once upon a time", "The dog"] and answered[1]["id"] == "b"
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": row["instruction"]}) + "\n" for row in answered), encoding="utf-8")
    recipe = load_recipe(None, {"model.model_name_or_path": str(STORIES), "data.eval_dataset_name": str(file)})
    written = repo_jax.generate(recipe, tmp_path / "answers.jsonl", max_new_tokens=4)
    lines = [json.loads(line) for line in written.read_text().splitlines()]
    assert [row["output"] for row in lines] == [row["output"] for row in answered] and all(
        row["output"] for row in lines
    )
    with pytest.raises(
        ValueError, match="there is nothing to answer; give --data a file of prompts, or in Python prompts"
    ):
        repo_jax.generate(STORIES)


# Models in and out


def test_to_hf_changes_the_dtype_where_it_is_asked_to_and_takes_numpy_arrays(tmp_path):
    params, cfg = repo_jax.from_hf(STORIES)
    assert cfg == DecoderConfig.from_hf(STORIES) and jax.tree.structure(params) == jax.tree.structure(param_shapes(cfg))
    out = repo_jax.to_hf(jax.tree.map(np.asarray, params), cfg, tmp_path / "half", base=STORIES, dtype="bfloat16")
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    tensors = safetensors.numpy.load_file(out / "model.safetensors")
    for name, tensor in hf_tensors(params, cfg, dtypes="bfloat16"):
        np.testing.assert_array_equal(tensors[name], tensor)


def test_a_folder_written_by_to_hf_loads_in_transformers(tmp_path):
    torch = pytest.importorskip("torch", reason="transformers' models need torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    params, cfg = repo_jax.from_hf(STORIES)
    params["final_norm_D"] = params["final_norm_D"] * 2
    out = repo_jax.to_hf(params, cfg, tmp_path / "out", base=STORIES)
    changed, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    before = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    ids = torch.tensor([AutoTokenizer.from_pretrained(out)("Once upon a time").input_ids])
    with torch.no_grad():
        torch.testing.assert_close(changed(ids).logits, 2 * before(ids).logits, rtol=1e-4, atol=1e-4)


def test_to_hf_refuses_what_does_not_belong_together_and_leaves_nothing(tmp_path):
    params, cfg = repo_jax.from_hf(STORIES)
    other = dataclasses.replace(cfg, L=cfg.L + 1)
    with pytest.raises(ValueError, match=rf"cfg is not that of base .*: L {cfg.L + 1} and {cfg.L}; name the model"):
        repo_jax.to_hf(params, other, tmp_path / "out", base=STORIES)
    with pytest.raises(ValueError, match="params are not those of cfg: missing final_norm_D"):
        repo_jax.to_hf({k: v for k, v in params.items() if k != "final_norm_D"}, cfg, tmp_path / "out", base=STORIES)
    with pytest.raises(ValueError, match=r"final_norm_D has shape \(3,\), wanted \(64,\)"):
        repo_jax.to_hf(params | {"final_norm_D": np.ones(3)}, cfg, tmp_path / "out", base=STORIES)
    with pytest.raises(ValueError, match="dtype='int8'; choose one of float32, bfloat16, float16"):
        repo_jax.to_hf(params, cfg, tmp_path / "out", base=STORIES, dtype="int8")
    with pytest.raises(ValueError, match="dtype='float16'; choose one of float32, bfloat16"):
        repo_jax.from_hf(STORIES, dtype="float16")
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(ValueError, match="exists and is not an export of repo-jax; name a new folder"):
        repo_jax.to_hf(params, cfg, tmp_path / "out", base=STORIES)


# What the package offers


def test_every_function_that_is_offered_says_what_it_takes():
    for name in repo_jax.__all__:
        assert len(getattr(repo_jax, name).__doc__) > 60
    assert set(repo_jax.__all__) <= set(dir(repo_jax)) and stores.ROWS.keys() >= {"train_dataset", "eval_dataset"}
    with pytest.raises(AttributeError, match="module 'repo_jax' has no attribute 'fit'; it has evaluate, from_hf"):
        repo_jax.fit  # noqa: B018
