"""Orbax checkpoints of the train state: written in the background, whole or not at all, the newest few kept."""

import contextlib
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Iterator

import jax
import orbax.checkpoint as ocp
from etils import epath

from repo_jax import urls
from repo_jax.config import StoppedError
from repo_jax.distributed import primary, text_from_primary
from repo_jax.state import TrainState

NAME = re.compile(r"checkpoint-(\d+)")
WHOLE = "commit_success.txt"  # written last where a folder cannot be renamed; the name is Orbax's


class _Names(ocp.path.step.NameFormat):
    """checkpoint-N, as Hugging Face's trainers call them; Orbax's own prefix would write checkpoint_N."""

    def build_name(self, step: int) -> str:
        return f"checkpoint-{step}"

    def find_all(self, base_path):
        # Orbax writes under a temporary name and renames at the end: a folder of this name is a whole checkpoint. A bucket has no
        # renaming, and a mark within instead.
        for path in epath.Path(base_path).iterdir():
            match = NAME.fullmatch(path.name)
            if match and (not urls.is_url(path) or (path / WHOLE).exists()):
                yield ocp.path.step.Metadata(step=int(match[1]), path=path)

    def find_step(self, base_path, step: int):
        path = epath.Path(base_path) / self.build_name(step)
        if not path.exists():
            raise ValueError(f"no checkpoint of step {step} in '{base_path}'")
        return ocp.path.step.Metadata(step=step, path=path)


def holds_checkpoints(folder: str | pathlib.Path) -> bool:
    if urls.is_url(folder):
        return bool(_whole_at(folder))
    return folder.is_dir() and any(NAME.fullmatch(path.name) for path in folder.iterdir())


def _whole_at(url: str) -> list[int]:
    """The steps of the whole checkpoints at a URL, in order."""
    places = (name.split("/") for name in urls.names(url) if name.endswith(f"/{WHOLE}"))
    return sorted(int(match[1]) for place in places if len(place) == 2 and (match := NAME.fullmatch(place[0])))


def written_directly(folder: str | pathlib.Path) -> bool:
    """Whether Orbax writes there by itself: to folders and gs://; to other stores finished checkpoints are copied."""
    return not urls.is_url(folder) or os.fspath(folder).startswith("gs://")


def _path(folder: str | pathlib.Path) -> epath.Path:
    path = epath.Path(folder)
    return path if urls.is_url(folder) else path.absolute()  # which would put a URL below the working directory


class Checkpoints:
    """The checkpoints of one run; close it, or use it in a with statement, to wait for the last write.

    `folder` may be a URL. Where Orbax cannot write there, `here` is a folder for its checkpoints, and save returns when they are copied
    to the URL; that is for one process.
    """

    def __init__(self, folder: str | pathlib.Path, *, keep: int, here: pathlib.Path | None = None):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            step_name_format=_Names(),
            enable_async_checkpointing=True,
        )
        self._url, self._keep = None if written_directly(folder) else os.fspath(folder), keep
        self.folder, self._pending = _path(here if self._url else folder), None
        # tensorstore's errors are ValueErrors, those of stores what they like.
        self._faults = (Exception,) if urls.is_url(folder) else (OSError, ValueError, RuntimeError)
        if self._url is not None:
            self._there = _whole_at(self._url)
            self._fetch()
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._settle()
        self._manager.close()

    def latest(self) -> int | None:
        """The step of the newest whole checkpoint."""
        if self._url is not None:
            return self._there[-1] if self._there else None
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
        if last or self._url is not None:
            self._settle()
        if last and self.latest() != step:
            raise StoppedError(
                f"checkpoint-{step} could not be written; {self._newest()}; make room in '{self._url or self.folder}' or see that it can be written "
                "to, then start the same command again"
            )

    def check(self) -> None:
        """Asks after the write that is under way, without waiting, where several processes wait for each other's."""
        if self._pending is not None and jax.process_count() > 1:
            with self._said():
                self._manager.check_for_errors()

    def _look(self) -> None:
        """Raises OSError where the folder cannot be written to, on all processes; Orbax would find out after minutes."""
        reason = ""
        if primary():
            try:
                (self.folder / ".writable").write_text("")
                (self.folder / ".writable").unlink()
            except self._faults as error:
                reason = str(error) or type(error).__name__
        if reason := text_from_primary(reason):
            raise OSError(reason)

    def _settle(self) -> None:
        """Waits for the write that is under way, if any."""
        if self._pending is not None:
            with self._said():
                self._manager.wait_until_finished()
                if self._url is not None:
                    self._copy(self._pending)
        self._pending = None

    def _copy(self, step: int) -> None:
        """A finished checkpoint to the URL; those that are too many leave there."""
        ours = pathlib.Path(self.folder) / f"checkpoint-{step}"
        (ours / WHOLE).touch()
        urls.replace_folder(ours, f"{self._url}/{ours.name}", last=WHOLE)
        self._there.append(step)
        for old in self._there[: -self._keep]:
            urls.remove_folder(f"{self._url}/checkpoint-{old}", first=WHOLE)
        del self._there[: -self._keep]

    def _fetch(self) -> None:
        """The newest checkpoint from the URL, and nothing else."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for step in self._there[-1:]:
            urls.download(f"{self._url}/checkpoint-{step}", pathlib.Path(self.folder) / f"checkpoint-{step}")

    @contextlib.contextmanager
    def _said(self) -> Iterator[None]:
        try:
            yield
        except jax.errors.JaxRuntimeError:
            raise  # of devices and other hosts, not of the disk
        except self._faults as error:
            step, self._pending = self._pending, None
            part = self.folder / f"checkpoint-{step}.orbax-checkpoint-tmp"
            reason = urls.scrubbed((str(error).strip() or type(error).__name__).splitlines()[0])
            if jax.process_count() == 1:
                with contextlib.suppress(*self._faults):
                    part.rmtree(missing_ok=True)  # of a full disk it may be what fills it
                print(
                    f"checkpoint-{step} could not be written ({reason}); {self._newest()}; training goes on",
                    file=sys.stderr,
                )
            else:  # the others may wait for this one's part of it
                raise StoppedError(
                    f"its part of checkpoint-{step} could not be written ({reason}); {self._newest()}; the same command on all hosts goes on"
                ) from None

    def _newest(self) -> str:
        newest = self.latest()
        return "there is none yet" if newest is None else f"checkpoint-{newest} stays the newest"

    def restore(self, step: int, shapes: TrainState, shardings: TrainState) -> TrainState:
        """The state as saved, placed by `shardings`, which may belong to another mesh than the one that saved it."""
        return self._manager.restore(step, args=ocp.args.StandardRestore(_placed(shapes, shardings)))


def restore_params(checkpoint: str | pathlib.Path, shapes: dict, shardings: dict) -> dict:
    """The parameters alone of a checkpoint-N folder; moments are not read."""
    path = _path(checkpoint)
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
