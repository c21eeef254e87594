"""Orbax checkpoints of the train state: written in the background, whole or not at all, the newest few kept."""

import pathlib
import re

import jax
import orbax.checkpoint as ocp
from etils import epath

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
        self.folder = pathlib.Path(folder).absolute()
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._manager.close()

    def latest(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState, step: int) -> None:
        """Copies the state aside and writes it while training goes on."""
        self._manager.save(step, args=ocp.args.StandardSave(state))

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
