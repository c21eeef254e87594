import dataclasses
import json
import types

import jax.numpy as jnp
import pytest
from examples import STORIES

from repo_jax.config import DataSection, OptimSection, RunSection, to_recipe
from repo_jax.data.chat import TokenOptions, load_tokenizer
from repo_jax.data.rows import RowShape
from repo_jax.data.sources import open_source
from repo_jax.data.store import open_store
from repo_jax.progress import Log, describe
from repo_jax.run_folder import read_metrics


def make_log(path, start=0, *, total=4, every=1):
    optim = OptimSection(train_batch_size=2, learning_rate=0.5, lr_scheduler_type="linear", warmup_ratio=0)
    recipe = types.SimpleNamespace(optim=optim, run=RunSection(logging_steps=every))
    return Log(types.SimpleNamespace(recipe=recipe, total_steps=total, train=range(4)), path, start)


def metrics(loss, grad_norm=1.0):
    values = {"loss": loss, "grad_norm": grad_norm, "rewards/accuracies": 0.5, "active_fraction": 1.0}
    return {name: jnp.float32(value) for name, value in values.items()}


def test_lines_past_the_checkpoint_are_dropped_and_written_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": 9.0}) + "\n" for step in (1, 2, 3)) + '{"step": 4, "lo')
    log = make_log(path, start=2)
    log.update(3, metrics(0.25), [])
    log.update(4, metrics(0.125), [])
    log.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(path)] == [(1, 9.0), (2, 9.0), (3, 0.25), (4, 0.125)]


def test_a_line_says_rate_and_epoch_and_comes_when_it_is_due(tmp_path):
    log = make_log(tmp_path / "m", every=3)
    for step in range(1, 5):
        log.update(step, metrics(1.0), [])
    log.close()
    lines = read_metrics(tmp_path / "m")
    assert [(line["step"], line["learning_rate"], line["epoch"]) for line in lines] == [(3, 0.25, 1.5), (4, 0.125, 2.0)]


@pytest.mark.parametrize("bad", [metrics(float("nan")), metrics(1.0, float("inf"))])
def test_a_run_that_has_diverged_stops_before_it_saves(tmp_path, bad):
    log = make_log(tmp_path / "m", every=100)
    log.update(1, bad, [])
    with pytest.raises(FloatingPointError, match=r"update 1 has loss .* lower learning_rate"):
        log.flush()
    assert read_metrics(tmp_path / "m") == []


def test_there_are_no_lines_before_there_is_a_file(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_run_is_described_with_what_became_of_every_row(tmp_path):
    rows = [{"id": f"row-{i}", "prompt": "Once", "chosen": f" upon {i}", "rejected": " there"} for i in range(5)]
    rows[1] |= {"chosen": ""}
    rows[3] |= {"rejected": " a" * 80}

    def store(name, rows, **options):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        options = TokenOptions(max_length=64, **options)
        tokenizer = load_tokenizer(str(STORIES))
        return open_store(open_source(str(path), "train"), tokenizer, options, cache_dir=str(tmp_path / "cache"))

    setup = types.SimpleNamespace(
        recipe=to_recipe(
            {
                "model": {"model_name_or_path": "some/model", "compute_dtype": "float32"},
                "loss": {"loss_type": "simpo"},
                "optim": {"train_batch_size": 2},
            }
        ),
        hparams={"beta": 2.0, "gamma": 0.25},
        train=store("train.jsonl", rows, truncation="keep_end"),
        held_out=store("test.jsonl", rows[4:]),
        shape=RowShape(4, 128, 64),
        mesh=types.SimpleNamespace(shape={"data": 1, "fsdp": 8}),
        total_steps=3,
    )
    assert describe(setup).splitlines() == [
        "simpo (beta 2, gamma 0.25) on some/model, in float32",
        f"training: 4 pairs of {tmp_path / 'train.jsonl'} (explicit, texts)",
        "  warning: 1 of 5 rows dropped (20.0%), pairs with an empty answer or an empty prompt: row-1",
        "  warning: 1 of 5 rows kept (20.0%), pairs that were cut to max_length or max_prompt_length: row-3",
        f"held-out: 1 pairs of {tmp_path / 'test.jsonl'} (explicit, texts)",
        "3 updates of 2 pairs, 4 rows of 128 slots (64 scored) at a time, on data 1 x fsdp 8",
    ]
    data = DataSection(truncation="keep_end", max_length=64, use_poet=True, dataset_name="a.jsonl", row_length=128)
    setup.recipe = dataclasses.replace(setup.recipe, data=data)
    assert describe(setup).splitlines()[-2] == "tokens: truncation keep_end, max_length 64, use_poet True"
    setup.held_out = None
    assert not any(line.startswith("held-out") for line in describe(setup).splitlines())
