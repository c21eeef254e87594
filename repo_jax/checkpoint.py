"""Orbax checkpoints of the train state: written in the background, whole or not at all, the newest few kept."""

import contextlib
import pathlib
import re
import sys
from collections.abc import Iterator

import jax
import orbax.checkpoint as ocp
from etils import epath

from repo_jax.config import StoppedError
from repo_jax.distributed import primary, text_from_primary
from repo_jax.state import TrainState

NAME = re.compile(r"checkpoint-(\d+)")


class _Names(ocp.path.step.NameFormat):
    """checkpoint-N, as Hugging Face's trainers call them; Orbax's own prefix would write checkpoint_N."""

    def build_name(self, step: int) -> str:
        return f"checkpoint-{step}"

    def find_all(self, base_path):
        # Orbax writes under a temporary name and renames at the end: a folder of this name is a whole checkpoint.
        for path in epath.Path(base_path).iterdir():
            if match := NAME.fullmatch(path.name):
                yield ocp.path.step.Metadata(step=int(match[1]), path=path)

    def find_step(self, base_path, step: int):
        path = epath.Path(base_path) / self.build_name(step)
        if not path.exists():
            raise ValueError(f"no checkpoint of step {step} in '{base_path}'")
        return ocp.path.step.Metadata(step=step, path=path)


def holds_checkpoints(folder: pathlib.Path) -> bool:
    return folder.is_dir() and any(NAME.fullmatch(path.name) for path in folder.iterdir())


class Checkpoints:
    """The checkpoints of one run folder; close it, or use it in a with statement, to wait for the last write."""

    def __init__(self, folder: str | pathlib.Path, *, keep: int):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, step_name_format=_Names(), enable_async_checkpointing=True
        )
        self.folder, self._pending = epath.Path(folder).absolute(), None
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._settle()
        self._manager.close()

    def latest(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState, step: int, *, last: bool = False) -> None:
        """Copies the state aside and writes it while training goes on; `last` waits until it is written.

        What cannot be written (the disk is full, a bucket refuses) is said and left out: the checkpoints before stay, and the next save
        tries again. Raises StoppedError where it was the last.
        """
        self._settle()
        self._pending = step
        with self._said():
            self._look()
            self._manager.save(step, args=ocp.args.StandardSave(state))
        if last:
            self._settle()
            if self.latest() != step:
                raise StoppedError(
                    f"checkpoint-{step} could not be written; {self._newest()}; make room in '{self.folder}' or see that it can be written "
                    "to, then start the same command again"
                )

    def _look(self) -> None:
        """Raises OSError where the folder cannot be written to, on all processes; Orbax would find out after minutes."""
        reason = ""
        if primary():
            try:
                (self.folder / ".writable").write_text("")
                (self.folder / ".writable").unlink()
            except OSError as error:
                reason = str(error)
        if reason := text_from_primary(reason):
            raise OSError(reason)

    def _settle(self) -> None:
        """Waits for the write that is under way, if any."""
        if self._pending is not None:
            with self._said():
                self._manager.wait_until_finished()
        self._pending = None

    @contextlib.contextmanager
    def _said(self) -> Iterator[None]:
        try:
            yield
        except jax.errors.JaxRuntimeError:
            raise  # of devices and other hosts, not of the disk
        except (OSError, ValueError, RuntimeError) as error:  # tensorstore's errors are ValueErrors
            step, self._pending = self._pending, None
            part = self.folder / f"checkpoint-{step}.orbax-checkpoint-tmp"
            if primary():
                with contextlib.suppress(OSError):
                    part.rmtree(missing_ok=True)  # of a full disk it may be what fills it
                reason = str(error).strip().splitlines()[0]
                print(
                    f"checkpoint-{step} could not be written ({reason}); {self._newest()}; training goes on",
                    file=sys.stderr,
                )

    def _newest(self) -> str:
        newest = self.latest()
        return "there is none yet" if newest is None else f"checkpoint-{newest} stays the newest"

    def restore(self, step: int, shapes: TrainState, shardings: TrainState) -> TrainState:
        """The state as saved, placed by `shardings`, which may belong to another mesh than the one that saved it."""
        return self._manager.restore(step, args=ocp.args.StandardRestore(_placed(shapes, shardings)))


def restore_params(checkpoint: str | pathlib.Path, shapes: dict, shardings: dict) -> dict:
    """The parameters alone of a checkpoint-N folder; moments are not read."""
    path = pathlib.Path(checkpoint).absolute()
    if not NAME.fullmatch(path.name) or not path.is_dir():
        raise FileNotFoundError(f"'{checkpoint}' is not a checkpoint-N folder of a run; give the path of one")
    with ocp.PyTreeCheckpointer() as checkpointer:
        wanted = {"params": _placed(shapes, shardings)}
        restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
        return checkpointer.restore(
            path / "default", args=ocp.args.PyTreeRestore(wanted, restore_args=restore_args, partial_restore=True)
        )["params"]


def _placed(shapes, shardings):
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )
