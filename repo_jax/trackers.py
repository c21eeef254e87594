"""Metrics to TensorBoard, Weights & Biases and trackio, under the names that Hugging Face's Trainer gives them there."""

import importlib.util
import json
import os
import pathlib
import secrets
import time

import yaml

from repo_jax.config import RunSection, StoppedError, dump_recipe
from repo_jax.distributed import primary
from repo_jax.preparation import Setup
from repo_jax.progress import say
from repo_jax.run_folder import RunFolder, write_whole

PACKAGES = {
    # report_to     the package that writes there
    "tensorboard": "tensorboardX",
    "wandb":       "wandb",
    "trackio":     "trackio",
}  # fmt: skip
PROJECT = "repo_jax"


def check_trackers(run: RunSection) -> None:
    """Raises ValueError where a package that `report_to` needs is not there."""
    missing = [PACKAGES[name] for name in run.trackers if importlib.util.find_spec(PACKAGES[name]) is None]
    if missing:
        raise ValueError(
            f"report_to={', '.join(run.trackers)} needs what is not installed; pip install {' '.join(missing)}, or leave it out of report_to"
        )


def as_trainer(line: dict) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl as Hugging Face's Trainer names them: train/loss, eval/rewards/accuracies."""
    return {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
        for name, value in line.items()
        if name != "step" and isinstance(value, int | float)
    }


class TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, folder: pathlib.Path, config: dict, start: int):
        from tensorboardX import SummaryWriter

        # What an earlier start has written beyond its checkpoint, all of it where it had none, is done again, and dropped by TensorBoard.
        purge = start + 1 if start else 0
        # Files are named by the second; a finer suffix keeps one start from writing over another.
        self._writer = SummaryWriter(str(folder), filename_suffix=f".{time.time_ns()}", purge_step=purge)
        if not start:
            text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
            self._writer.add_text("recipe", "".join(f"    {line}\n" for line in text.splitlines()), 0)

    def log(self, step: int, values: dict[str, float], *, last: bool) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases; which account, project and mode its own environment variables say."""

    def __init__(self, folder: pathlib.Path, config: dict, name: str, own_id: str):
        import wandb

        # What is given here would go before these variables.
        given = {} if os.environ.get("WANDB_NAME") else {"name": name}
        given |= {} if os.environ.get("WANDB_DIR") else {"dir": str(folder)}
        project = os.environ.get("WANDB_PROJECT") or PROJECT
        self._run = wandb.init(project=project, id=own_id, resume="allow", **given)
        self._run.config.update(config, allow_val_change=True)
        self._run.define_metric("train/global_step")
        self._run.define_metric("*", step_metric="train/global_step", step_sync=True)

    def log(self, step: int, values: dict[str, float], *, last: bool) -> None:
        # It drops what comes before its own step, which has gone on where the last evaluation is of a later start.
        if last or step >= self._run.step:
            self._run.log(values | {"train/global_step": step}, step=max(step, self._run.step))

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Trackio:
    """A run of trackio, which knows runs by their names."""

    def __init__(self, config: dict, name: str, own_id: str):
        import trackio

        project = os.environ.get("TRACKIO_PROJECT") or PROJECT
        self._trackio = trackio
        trackio.init(project=project, name=f"{name}-{own_id}", config=config, resume="allow")

    def log(self, step: int, values: dict[str, float], *, last: bool) -> None:
        self._trackio.log(values | {"train/global_step": step}, step=step)

    def close(self, *, failed: bool) -> None:
        self._trackio.finish()


class Trackers:
    """All that `report_to` names, in a with statement; process 0 reports. One that fails later on is given up, and training goes on.

    What each was sent last stands in the folder's tracker_sent.json, as [step, whether it was the last evaluation]: a run that goes on from
    its checkpoint does some updates again, and sends none twice.
    """

    def __init__(self):
        self._open, self._sent, self._record = {}, {}, None

    def start(self, setup: Setup, place: RunFolder, start: int) -> None:
        """Goes on in the runs that the folder's run has there, or begins new ones; a run that is over has nothing to report.

        Raises StoppedError where one cannot.
        """
        names = setup.recipe.run.trackers
        over = start == setup.total_steps and (place.here / "report.html").exists()  # the last that a run writes
        if not names or not primary() or over:
            return
        self._record = place.here / "tracker_sent.json"
        if start and self._record.exists():
            self._sent = json.loads(self._record.read_text(encoding="utf-8"))
        if "tensorboard" in self._sent:  # it drops what is beyond the checkpoint
            self._sent["tensorboard"] = min(self._sent["tensorboard"], [start, True])
        config = yaml.safe_load(dump_recipe(setup.recipe))
        own_id = "" if names == ("tensorboard",) else _own_id(place.here, start)
        name = str(place).rstrip("/").rpartition("/")[2]
        how = {
            "tensorboard": lambda: TensorBoard(place.here, config, start),
            "wandb": lambda: WandB(place.here, config, name, own_id),
            "trackio": lambda: Trackio(config, name, own_id),
        }
        for tracker in names:
            try:
                self._open[tracker] = how[tracker]()
            except Exception as error:  # whatever somebody else's program raises
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise StoppedError(f"report_to {tracker}: {reason}; put that right, or leave {tracker} out") from error

    def log(self, line: dict, *, last: bool = False) -> None:
        """A line of metrics.jsonl, or the evaluation after the last update, which comes after the line of that update."""
        values, at = as_trainer(line), [line["step"], last]
        new = {name: there for name, there in self._open.items() if values and at > self._sent.get(name, [-1, False])}
        for tracker, there in new.items():
            try:
                there.log(line["step"], values, last=last)
                self._sent[tracker] = at
            except Exception as error:
                del self._open[tracker]
                say(f"warning: {tracker} fails ({error}); from update {line['step']} on nothing is reported there")
        if new:
            write_whole(self._record, json.dumps(self._sent) + "\n")

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        for tracker, there in self._open.items():
            try:
                there.close(failed=kind is not None)
            except Exception as error:
                say(f"warning: {tracker} fails at the end ({error})")


def _own_id(folder: pathlib.Path, start: int) -> str:
    """By which trackers know the run of the folder; a run that begins is a new one."""
    path = folder / "tracker_id.txt"
    if start and path.exists():
        return path.read_text(encoding="utf-8").strip()
    write_whole(path, f"{(new := secrets.token_hex(4))}\n")
    return new
