"""TensorBoard is read back by TensorBoard; of W&B and trackio there are stand-ins here, which note what they are told."""

import os
import sys
import types

import pytest

from repo_jax.config import RunSection, StoppedError, to_recipe
from repo_jax.run_folder import RunFolder
from repo_jax.trackers import Trackers, as_trainer, check_trackers

LINE = {"step": 2, "epoch": 0.5, "loss": 0.25, "rewards/accuracies": 1.0, "eval_loss": 0.5, "eval_rewards/margins": 2.0}
NAMES = {"train/epoch", "train/loss", "train/rewards/accuracies", "eval/loss", "eval/rewards/margins"}
SECRETS = {"WANDB_API_KEY": "MyOwnWandBKey", "HF_TOKEN": "hf_MyOwnToken"}


TOTAL = 30  # updates


def setup_of(folder, *names):
    recipe = to_recipe(
        {"model": {"model_name_or_path": "some/model"}, "run": {"output_dir": str(folder), "report_to": list(names)}}
    )
    return types.SimpleNamespace(recipe=recipe, total_steps=TOTAL)


def tracked(folder, *names, start=0, lines=(LINE,), last=None, error=None):
    """What one start of a run reports: lines of metrics.jsonl and, where it gets so far, the last evaluation."""
    folder.mkdir(exist_ok=True)
    setup = setup_of(folder, *names)
    with Trackers() as trackers:
        trackers.start(setup, RunFolder(setup.recipe), start)
        for line in lines:
            trackers.log(line)
        if last is not None:
            trackers.log(last, last=True)
        if error is not None:
            raise error


class BadNumber(int):
    """A number that the stand-in for wandb cannot send."""


class WandBRun:
    """A run of wandb's, which drops what is logged before its step; a server that is asked knows that of an earlier start."""

    def __init__(self, calls, step):
        self.calls, self.step = calls, step
        self.config = types.SimpleNamespace(update=lambda *a, **k: calls.append(("config", a, k)))

    def define_metric(self, *args, **kwargs):
        self.calls.append(("define_metric", args, kwargs))

    def log(self, values, step):
        if any(isinstance(value, BadNumber) for value in values.values()):
            raise OSError("no network")
        assert step >= self.step
        self.step = step
        self.calls.append(("log", values, step))

    def finish(self, exit_code):
        self.calls.append(("finish", exit_code))


@pytest.fixture
def wandb(monkeypatch):
    module = types.SimpleNamespace(calls=[], step=0, __spec__=object())

    def init(**given):
        module.calls.append(("init", given))
        return WandBRun(module.calls, module.step)

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return module


@pytest.fixture
def trackio(monkeypatch):
    module = types.SimpleNamespace(calls=[], __spec__=object())
    module.init = lambda **given: module.calls.append(("init", given))
    module.log = lambda values, step: module.calls.append(("log", values, step))
    module.finish = lambda: module.calls.append(("finish",))
    monkeypatch.setitem(sys.modules, "trackio", module)
    monkeypatch.delenv("TRACKIO_PROJECT", raising=False)
    return module


def of(module, name):
    return [call[1:] for call in module.calls if call[0] == name]


def test_names_are_those_of_hugging_faces_trainer():
    integrations = pytest.importorskip("transformers.integrations.integration_utils")
    numbers = {name: value for name, value in LINE.items() if name != "step"}
    assert as_trainer(LINE) == integrations.rewrite_logs(numbers)
    skipped = {"step": 3, "skipped": "its loss is not finite", "pairs": ["a"], "eval_loss": 1.0}
    assert as_trainer(skipped) == {"eval/loss": 1.0}


def test_wandb_gets_every_line_at_its_update_and_the_recipe(wandb, tmp_path):
    tracked(tmp_path / "mine", "wandb", lines=[LINE | {"step": 0}, LINE, {"step": 3, "skipped": "x", "pairs": []}])
    [[init]] = of(wandb, "init")
    assert (init["project"], init["name"], init["dir"], init["resume"]) == ("repo_jax", "mine", str(tmp_path / "mine"), "allow")  # fmt: skip
    assert [step for _, step in of(wandb, "log")] == [0, 2]
    values, step = of(wandb, "log")[-1]
    assert values.keys() == NAMES | {"train/global_step"} and values["train/global_step"] == step == 2
    assert of(wandb, "define_metric") == [
        (("train/global_step",), {}),
        (("*",), {"step_metric": "train/global_step", "step_sync": True}),
    ]
    [((config,), options)] = of(wandb, "config")
    assert config["model"]["model_name_or_path"] == "some/model" and options == {"allow_val_change": True}
    assert of(wandb, "finish") == [(0,)]


def test_a_run_that_goes_on_does_so_in_the_same_wandb_run_and_says_nothing_twice(wandb, tmp_path):
    tracked(tmp_path, "wandb", lines=[LINE | {"step": k} for k in (1, 2, 3)])
    wandb.step = 4  # what the server knows
    tracked(tmp_path, "wandb", start=2, lines=[LINE | {"step": k} for k in (3, 4, 5)])
    first, second = of(wandb, "init")
    assert first[0]["id"] == second[0]["id"] == (tmp_path / "tracker_id.txt").read_text().strip()
    assert [step for _, step in of(wandb, "log")] == [1, 2, 3, 4, 5]
    tracked(tmp_path, "wandb")  # from the beginning: another run, of another recipe perhaps
    assert of(wandb, "init")[-1][0]["id"] != first[0]["id"]


def test_what_an_offline_wandb_run_was_told_before_a_kill_it_is_not_told_again(wandb, tmp_path):
    tracked(tmp_path, "wandb", lines=numbered(1, 25))  # a step that no server knows: wandb.step stays 0
    tracked(tmp_path, "wandb", start=20, lines=numbered(21, 30))
    assert [step for _, step in of(wandb, "log")] == list(range(1, 31))


def test_the_last_evaluation_comes_after_a_kill_too_once_and_a_run_that_is_over_opens_none(wandb, trackio, tmp_path):
    names, last = ("wandb", "trackio", "tensorboard"), {"step": TOTAL, "eval_loss": 0.125}
    tracked(tmp_path, *names, start=20, lines=numbered(21, TOTAL))
    wandb.step = TOTAL + 1  # with which the server has W&B go on
    for _ in range(2):  # the first is killed before its report
        a_while_ago(tmp_path)
        tracked(tmp_path, *names, start=TOTAL, lines=(), last=last)
    for module in (wandb, trackio):
        told = [values["train/global_step"] for values, _ in of(module, "log") if values.get("eval/loss") == 0.125]
        assert told == [TOTAL] and len(of(module, "finish")) == len(of(module, "init")) == 3
    assert scalars(tmp_path, "eval/loss")[-2:] == [(TOTAL, 0.5), (TOTAL, 0.125)]
    (tmp_path / "report.html").touch()
    before = sorted(tmp_path.iterdir())
    tracked(tmp_path, *names, start=TOTAL, lines=(), last=last)
    assert len(of(wandb, "init")) == len(of(trackio, "init")) == 3 and sorted(tmp_path.iterdir()) == before


def numbered(first, last):
    return [LINE | {"step": k} for k in range(first, last + 1)]


def test_wandbs_own_variables_go_first_and_no_mode_is_forced_on_it(wandb, tmp_path, monkeypatch):
    for name, value in {"WANDB_PROJECT": "p", "WANDB_NAME": "n", "WANDB_DIR": "d", "WANDB_MODE": "offline"}.items():
        monkeypatch.setenv(name, value)
    tracked(tmp_path, "wandb")
    [[init]] = of(wandb, "init")
    assert init.keys() == {"project", "id", "resume"} and init["project"] == "p"
    assert os.environ["WANDB_MODE"] == "offline"


def test_no_key_is_written_or_handed_on(wandb, trackio, tmp_path):
    tracked(tmp_path, "wandb", "trackio")
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    for secret in SECRETS.values():
        assert secret not in written + repr(wandb.calls) + repr(trackio.calls)


def test_trackio_gets_the_same_and_goes_on_under_the_same_name(trackio, tmp_path):
    tracked(tmp_path / "mine", "trackio")
    tracked(tmp_path / "mine", "trackio", start=2, lines=[])
    (first,), (second,) = of(trackio, "init")
    assert first["project"] == "repo_jax" and first["resume"] == "allow" and first["name"].startswith("mine-")
    assert first["name"] == second["name"] and first["config"]["run"]["report_to"] == ["trackio"]
    [(values, step)] = of(trackio, "log")
    assert values.keys() == NAMES | {"train/global_step"} and step == 2
    assert len(of(trackio, "finish")) == 2


def test_updates_done_again_after_a_kill_are_told_trackio_once_and_a_new_beginning_is_another_run(trackio, tmp_path):
    tracked(tmp_path, "trackio", lines=numbered(0, 25))
    tracked(tmp_path, "trackio", start=20, lines=numbered(21, 27))
    assert [step for _, step in of(trackio, "log")] == list(range(28))
    tracked(tmp_path, "trackio", lines=numbered(0, 1))
    assert [step for _, step in of(trackio, "log")] == [*range(28), 0, 1]
    assert len({given["name"] for (given,) in of(trackio, "init")}) == 2


def a_while_ago(folder):
    """Makes event files older, as they are named by the second."""
    for path in folder.glob("*tfevents*"):
        seconds = path.name.split(".")[3]
        path.rename(folder / path.name.replace(seconds, str(int(seconds) - 9)))


def scalars(folder, name):
    """(step, value) as TensorBoard reads the event files of a folder."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder))
    found.Reload()
    return [(event.step, event.value) for event in found.Scalars(name)]


def test_a_run_killed_before_its_first_checkpoint_and_started_again_has_each_curve_once(tmp_path):
    pytest.importorskip("tensorboardX", reason="what writes event files")
    tracked(tmp_path, "tensorboard", lines=[LINE | {"step": k, "loss": float(k)} for k in (0, 1, 2)])
    a_while_ago(tmp_path)
    tracked(tmp_path, "tensorboard", lines=[LINE | {"step": k, "loss": 10.0 * k} for k in (0, 1)])
    assert scalars(tmp_path, "train/loss") == [(0, 0), (1, 10)]


def test_tensorboard_reads_the_run_folder_and_what_is_done_again_counts_once(tmp_path):
    pytest.importorskip("tensorboardX", reason="what writes event files")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracked(tmp_path, "tensorboard", lines=[LINE | {"step": k, "loss": float(k)} for k in (1, 2, 3)])
    tracked(tmp_path, "tensorboard", start=2, lines=[LINE | {"step": k, "loss": 10.0 * k} for k in (3, 4)])
    found = accumulator.EventAccumulator(str(tmp_path))
    found.Reload()
    assert set(found.Tags()["scalars"]) == NAMES
    assert [(event.step, event.value) for event in found.Scalars("train/loss")] == [(1, 1), (2, 2), (3, 30), (4, 40)]
    assert b"some/model" in found.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0]
    # Where a run's small files are copied to its URL from.
    assert {path.name for path in tmp_path.iterdir() if "tfevents" not in path.name} == {"tracker_sent.json"}
    assert all(path.is_file() for path in tmp_path.iterdir())


def test_what_is_not_installed_is_said_before_any_work(monkeypatch):
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)
    check_trackers(RunSection())
    check_trackers(RunSection(report_to="none"))
    with pytest.raises(
        ValueError, match=r"report_to=wandb, trackio needs what is not installed; pip install wandb tra"
    ):
        check_trackers(RunSection(report_to="wandb,trackio"))


def test_a_tracker_that_cannot_start_ends_the_run_and_one_that_fails_later_does_not(wandb, tmp_path, capsys, monkeypatch):  # fmt: skip
    def refuse(**_):
        raise RuntimeError("api_key not configured (no-tty)\nand much more")

    tracked(tmp_path, "wandb", lines=[LINE, {"step": 3, "loss": BadNumber(1)}, LINE | {"step": 4}])
    assert [step for _, step in of(wandb, "log")] == [2]
    assert "wandb fails (no network); from update 3 on nothing is reported there" in capsys.readouterr().out
    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(StoppedError, match=r"^report_to wandb: api_key not configured \(no-tty\); put that right, or"):
        tracked(tmp_path, "wandb")


def test_a_run_that_fails_is_closed_as_one(wandb, tmp_path):
    with pytest.raises(ZeroDivisionError):
        tracked(tmp_path, "wandb", error=ZeroDivisionError())
    assert of(wandb, "finish") == [(1,)]
