import json
import types

import jax.numpy as jnp
import pytest

from repo_jax.config import OptimSection, RunSection
from repo_jax.progress import Log
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
