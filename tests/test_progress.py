import dataclasses
import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import STORIES, TINY, one_device, random_pairs

import repo_jax
from repo_jax import progress
from repo_jax.config import DataSection, ModelSection, OptimSection, RunSection, to_recipe
from repo_jax.data.chat import TokenOptions, load_tokenizer
from repo_jax.data.rows import RowShape
from repo_jax.data.sources import open_source
from repo_jax.data.store import open_store
from repo_jax.evaluation import Evaluation
from repo_jax.flops import useful_flops
from repo_jax.hardware import Chip
from repo_jax.losses import Loss, simpo
from repo_jax.progress import Log, banner, compiled, describe
from repo_jax.run_folder import read_metrics


def make_log(path, start=0, *, total=4, every=1, **model):
    optim = OptimSection(train_batch_size=2, learning_rate=0.5, lr_scheduler_type="linear", warmup_ratio=0)
    model = ModelSection(model_name_or_path="some/model", **{"compute_dtype": "float32"} | model)
    recipe = types.SimpleNamespace(model=model, optim=optim, run=RunSection(logging_steps=every))
    setup = {"recipe": recipe, "cfg": TINY, "mesh": one_device(), "total_steps": total, "train": range(4)}
    return Log(types.SimpleNamespace(**setup), path, start)


def metrics(loss, grad_norm=1.0, active=1.0):
    values = {"loss": loss, "grad_norm": grad_norm, "rewards/accuracies": 0.5, "active_fraction": 1.0}
    values["active_token_fraction"] = active
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


BAD = [metrics(float("nan")), metrics(1.0, float("inf"))]


@pytest.mark.parametrize("bad", BAD)
def test_a_skipped_update_is_said_with_its_pairs_and_too_many_in_a_row_end_the_run(tmp_path, capsys, bad):
    log, pairs = make_log(tmp_path / "m", total=9), random_pairs(2, V=50)
    for step, one in enumerate([bad, bad, metrics(1.0), bad, bad], 1):
        log.update(step, dict(one), pairs)
        log.flush()
        assert log.skipping == (one is bad)
    log.update(6, dict(bad), pairs)
    with pytest.raises(FloatingPointError, match=r"3 updates in a row, the last of them 6, .* lower learning_rate"):
        log.flush()
    lines = read_metrics(tmp_path / "m")
    assert [(line["step"], line.get("pairs"), "loss" in line) for line in lines] == [
        (step, None if step == 3 else ["pair 0", "pair 1"], step == 3) for step in range(1, 7)
    ]
    assert "update 2 has loss" in (said := capsys.readouterr().out) and "its pairs: pair 0, pair 1" in said


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on when told, and compile times that are said rather than taken."""
    time = types.SimpleNamespace(now=100.0, durations=[])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: time.now)
    monkeypatch.setattr(progress, "_durations", lambda: time.durations)
    return time


def compile_(clock, seconds):
    clock.now += seconds
    clock.durations.append(seconds)


def test_a_line_says_how_fast_its_updates_were_compilation_apart(tmp_path, clock):
    log, pairs = make_log(tmp_path / "m", every=2), random_pairs(3, V=TINY.V)
    for step in range(1, 5):
        log.before_update()
        if step == 1:
            compile_(clock, 7.0)
        clock.now += 2.0 if step < 3 else 0.5
        log.update(step, metrics(1.0), pairs)
    log.close()
    slots = sum(pair.slots for pair in pairs)
    first, second = read_metrics(tmp_path / "m")
    for line, seconds in ((first, 2.0), (second, 0.5)):
        assert line["step_time"] == seconds
        assert line["pairs_per_second"] == 3 / seconds
        assert line["tokens_per_second"] == line["tokens_per_second_per_chip"] == slots / seconds
        assert (line["compilations"], line["compile_seconds"]) == (1, 7.0)
        assert line["peak_process_memory_gib"] > 0 and "mfu" not in line  # of a CPU no peak is published


def test_an_evaluation_and_what_it_compiles_are_no_part_of_a_step(tmp_path, clock):
    log = make_log(tmp_path / "m")

    def evaluate():
        compile_(clock, 3.0)
        clock.now += 4.0
        return Evaluation({"loss": 0.5}, None, 0)

    log.before_update()
    clock.now += 4.5
    log.update(1, metrics(1.0), random_pairs(2, V=TINY.V))
    log.evaluated(evaluate)
    log.close()
    [line] = read_metrics(tmp_path / "m")
    assert (line["step_time"], line["eval_loss"], line["compilations"]) == (4.5, 0.5, 1)


@pytest.mark.parametrize("active", [1.0, 0.25])
def test_utilisation_is_that_of_operations_whose_result_is_used(tmp_path, clock, monkeypatch, active):
    chip = Chip("made up", 4e9, 1e9, 1.0, 1.0)
    monkeypatch.setattr(progress, "chip_of", lambda kind: chip)
    pairs = random_pairs(4, V=TINY.V)
    log = make_log(tmp_path / "m", every=2, compute_dtype="bfloat16")
    for step in (1, 2):
        clock.now += 0.125
        log.update(step, metrics(1.0, active=active), pairs)
    log.close()
    forward = useful_flops(TINY, pairs) / 3
    [line] = read_metrics(tmp_path / "m")
    assert line["mfu"] == pytest.approx(forward * (1 + 2 * active) / 0.125 / 4e9)


def test_there_is_no_utilisation_where_no_peak_is_published(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "chip_of", lambda kind: Chip("made up", 4e9, None, 1.0, 1.0))
    log = make_log(tmp_path / "m")
    log.update(1, metrics(1.0), [])
    log.close()
    assert "mfu" not in read_metrics(tmp_path / "m")[0]


def test_programs_are_counted_as_they_are_compiled():
    before = compiled()
    jax.jit(lambda x: x * 3 + 1)(jnp.zeros(3)).block_until_ready()
    once = compiled().since(before)
    assert once.programs >= 1 and 0 < once.seconds < 60
    assert compiled().since(before) == once  # nothing else compiles them meanwhile


def test_what_compiles_late_is_said_and_what_compiles_outside_updates_is_not(tmp_path, clock, capsys):
    log = make_log(tmp_path / "m", start=10, total=15)
    for step in range(11, 15):
        log.before_update()
        if step in (11, 12, 14):
            compile_(clock, 0.5)
        log.update(step, metrics(1.0), [])
        if step == 13:
            compile_(clock, 0.25)  # a checkpoint's
    log.close()
    said = [line for line in capsys.readouterr().out.splitlines() if "compiled" in line]
    assert said == ["update 14 compiled 1 program in 0.5 s", "compiled 4 programs in 1.8 s"]


def test_without_a_terminal_a_long_run_says_a_bounded_number_of_lines(tmp_path, capsys):
    log = make_log(tmp_path / "m", total=400)
    for step in range(1, 401):
        log.update(step, metrics(1.0), [])
        if step % 2 == 0:
            log.evaluated(lambda: Evaluation({"loss": 0.5}, None, 0))
    log.close()
    said = [int(step) for step in re.findall(r"^update (\d+)/400 ", capsys.readouterr().out, re.MULTILINE)]
    assert said[:5] == [1, 2, 3, 4, 5] and said[-1] == 400 and len(said) < 2 * Log.LINES + 10
    assert len(read_metrics(tmp_path / "m")) == 400


def test_a_line_has_what_people_look_at_and_the_mean_margin_is_in_nats(tmp_path, capsys):
    log = make_log(tmp_path / "m", total=9)
    values = metrics(0.25) | {
        "logps/chosen": jnp.float32(-1.5),
        "logps/rejected": jnp.float32(-2.0),
        "rewards/margins": jnp.float32(9),
    }
    log.update(1, values, random_pairs(2, V=50))
    log.evaluated(lambda: Evaluation({"loss": 0.75, "rewards/accuracies": 1.0}, None, 0))
    log.close()
    said = capsys.readouterr().out
    assert re.match(
        r"update 1/9  loss 0.25  margin 0.5  accuracy 0.5  active 1  pairs/s [\d.e+]+  held-out loss 0.75  held-out accuracy 1\n",
        said,
    )
    assert "margin" not in read_metrics(tmp_path / "m")[0]


def test_how_long_it_will_take_is_said_once_without_evaluations_and_compilation(tmp_path, clock, capsys):
    log = make_log(tmp_path / "m", total=95)

    def evaluate():
        compile_(clock, 3.0)
        clock.now += 100.0
        return Evaluation({"loss": 0.5}, None, 0)

    for step in range(1, 9):
        log.before_update()
        if step < 4:
            compile_(clock, 60.0)
        clock.now += 2.0
        log.update(step, metrics(1.0), [])
        if step == 4:
            log.evaluated(evaluate)
    log.close()
    said = capsys.readouterr().out
    assert re.findall(r"about .*", said) == ["about 3 min 0 s for the 90 updates that are left, 2 s each"]
    assert re.findall(r"update (\d+)/95 .*  left (.*)", said)[:2] == [("3", "3 min 4 s"), ("4", "3 min 2 s")]


def test_a_skipped_update_does_not_keep_the_time_from_being_told(tmp_path, clock, capsys):
    log = make_log(tmp_path / "m", total=9)
    for step in range(1, 8):
        clock.now += 1.0
        log.before_update()
        log.update(step, metrics(float("nan") if step == 2 else 1.0), random_pairs(1, V=50))
    clock.now += 1.0
    log.close()
    assert re.findall(r"about .*", capsys.readouterr().out) == ["about 3 s for the 3 updates that are left, 1 s each"]


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
        loss=Loss(simpo),
        hparams={"beta": 2.0, "gamma": 0.25},
        train=store("train.jsonl", rows, truncation="keep_end"),
        held_out=store("test.jsonl", rows[4:]),
        shapes=(RowShape(4, 256, 128), RowShape(4, 128, 64)),
        mesh=types.SimpleNamespace(shape={"data": 1, "fsdp": 8}),
        total_steps=3,
    )
    assert describe(setup).splitlines() == [
        "simpo (beta 2, gamma 0.25) on some/model, in float32",
        f"training: 4 pairs of {tmp_path / 'train.jsonl'} (explicit, texts)",
        "  warning: 1 of 5 rows dropped (20.0%), pairs with an empty answer or an empty prompt: row-1",
        "  warning: 1 of 5 rows kept (20.0%), pairs that were cut to max_length or max_prompt_length: row-3",
        f"held-out: 1 pairs of {tmp_path / 'test.jsonl'} (explicit, texts)",
        "3 updates of 2 pairs, mode auto, in rows of 4 x 256 slots (128 scored) or 4 x 128 slots (64 scored) at a time, on data 1 x fsdp 8",
    ]
    data = DataSection(truncation="keep_end", max_length=64, use_poet=True, dataset_name="a.jsonl", row_length=128)
    setup.recipe = dataclasses.replace(setup.recipe, data=data)
    assert describe(setup).splitlines()[-2] == "tokens: truncation keep_end, max_length 64, use_poet True"
    setup.loss = Loss(simpo, reference=True)
    assert describe(setup).splitlines()[1] == "compared with some/model as it is"
    setup.recipe = dataclasses.replace(setup.recipe, loss={"loss_type": ["dpo", "sft"], "loss_weights": [1, 0.1]})
    assert describe(setup).startswith("dpo + sft (beta 2, ")
    mesh = types.SimpleNamespace(
        devices=np.array(jax.devices()[:2]), local_devices=jax.devices()[:2], shape={"data": 1, "fsdp": 2}
    )
    whole = types.SimpleNamespace(**vars(setup) | {"mesh": mesh, "cfg": TINY})
    first, *_, last = banner(whole, {"parameters": 2**20, "moments": 3 * 2**29}, {"layer inputs": 2**21}).splitlines()
    assert first == f"repo_jax {repo_jax.__version__} on 2 x cpu"
    assert re.fullmatch(
        r"[\d,]+ parameters; held on each device: 1.5 GiB \(parameters 1.0 MiB, moments 1.5 GiB\); "
        "two passes keep 2.0 MiB of layer inputs",
        last,
    )
    setup.held_out = None
    assert not any(line.startswith("held-out") for line in describe(setup).splitlines())
