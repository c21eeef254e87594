"""What a run keeps in its folder, and whose folder it is."""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterator

import jax
import numpy as np
import yaml

from repo_jax.checkpoint import holds_checkpoints
from repo_jax.config import Recipe, dump_recipe
from repo_jax.distributed import primary, wait_for_all
from repo_jax.evaluation import Evaluation, summarize
from repo_jax.export import check_output, write_base
from repo_jax.models.tensors import fingerprint
from repo_jax.preparation import Setup

# What may change when a run goes on: where and how it computes, not what.
FREE = {
    "data": {"row_length", "scored_length", "rows_per_device", "slots_per_device", "cache_dir", "on_bad_rows"},
    "optim": {"mode", "two_pass_below", "max_skipped_updates"},
    "model": {"remat", "attn_implementation"},
    "mesh": {"data", "fsdp", "tensor"},
    "run": {"output_dir", "logging_steps", "eval_steps", "save_steps", "save_total_limit"}
    | {"profile_steps", "compile_cache_dir"}
    | {"push_to_hub", "hub_model_id", "hub_revision", "hub_private_repo"},
}


def identity(setup: Setup) -> dict:
    """What makes a run the run that it is: the recipe but for where it computes, the data, and the weights it starts from."""
    return {
        "recipe": _fixed(setup.recipe),
        "data": {"train": setup.train.key, "held_out": setup.held_out and setup.held_out.key},
        # A checkpoint of adapters holds them alone: what they lie over must stay what it was.
        "base": {"weights": fingerprint(setup.pretrained.files.weights)},
    }


# Where a host keeps what it has worked out is its own affair.
OWN = ("recipe.data.cache_dir", "recipe.run.compile_cache_dir")


def what_runs(setup: Setup) -> dict[str, str]:
    """All that has to be the same on every host, {what it is: its name}."""
    sources = hashlib.sha256()
    package = pathlib.Path(__file__).parent
    for path in sorted(package.rglob("*.py")):
        sources.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    found = {
        "repo_jax": sources.hexdigest()[:12],
        "jax": jax.__version__,
        "device": setup.mesh.devices.flat[0].device_kind,
    }
    tree = identity(setup) | {"recipe": yaml.safe_load(dump_recipe(setup.recipe))}
    return found | {name: value for name, value in _leaves(tree) if name not in OWN}


def _leaves(tree: dict, path: str = "") -> Iterator[tuple[str, str]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}{name}.")
        else:
            text = str(value)
            yield f"{path}{name}", text if len(text) < 100 else hashlib.sha256(text.encode()).hexdigest()[:12]


def claim(setup: Setup) -> None:
    """Makes the output folder this run's, or finds that it is: a folder holds one run.

    Several processes call it together; process 0 writes. Raises ValueError naming what differs when the folder holds a run of another
    recipe or other data.
    """
    recipe, folder, own = setup.recipe, pathlib.Path(setup.recipe.run.output_dir), identity(setup)
    for name in ("hf", "adapter"):
        check_output(folder / name)
    claimed = folder / "identity.yaml"
    if claimed.exists() and holds_checkpoints(folder):  # before the first there is nothing to lose
        changes = _differences(yaml.safe_load(claimed.read_text(encoding="utf-8")), own)
        if changes:
            raise ValueError(
                f"output_dir='{folder}' holds another run ({'; '.join(changes)}); name a new output_dir, or remove that folder"
            )
    elif not claimed.exists() and (holds_checkpoints(folder) or (folder / "recipe.yaml").exists()):
        raise ValueError(
            f"output_dir='{folder}' holds files that are not from a run of repo-jax; name a new output_dir"
        )
    wait_for_all("looked at output_dir")
    if primary():
        folder.mkdir(parents=True, exist_ok=True)
        if not holds_checkpoints(folder):
            write_base(setup.pretrained.files, setup.cfg, setup.tokenizer, folder / "base")
            write_whole(claimed, yaml.safe_dump(own, sort_keys=False, allow_unicode=True))
        write_whole(folder / "recipe.yaml", dump_recipe(recipe))
    wait_for_all("claimed output_dir")


def _fixed(recipe: Recipe) -> dict:
    tree = yaml.safe_load(dump_recipe(recipe))
    return {
        section: {name: _moved(value) for name, value in fields.items() if name not in FREE.get(section, ())}
        for section, fields in tree.items()
    }


def _moved(value):
    """A file or folder by its last name, so that a run goes on where everything was moved; what they hold is compared itself."""
    if isinstance(value, dict):
        return {_moved(name): one for name, one in value.items()}
    return os.path.basename(value) if isinstance(value, str) and os.path.isabs(value) else value


def _differences(before: dict, now: dict, path: str = "") -> list[str]:
    found = []
    for name in before.keys() | now.keys():
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, name)
        elif old != new:
            found.append(f"{path}.{name} {old!r} there, {new!r} here")
    return sorted(found)


def save_evaluation(folder: pathlib.Path, when: str, evaluation: Evaluation) -> None:
    """Adds one side, before or after, to eval_results.json; process 0 writes."""
    if not primary():
        return
    margins_B = evaluation.margins_B
    np.save(folder / f"margins_{when}.npy", margins_B)
    results = (read_results(folder) or {}) | {"pairs": len(margins_B)}
    results[when] = summarize(evaluation)
    write_whole(folder / "eval_results.json", json.dumps(results, indent=2) + "\n")


def read_results(folder: pathlib.Path) -> dict | None:
    path = folder / "eval_results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def read_metrics(path: pathlib.Path) -> list[dict]:
    """The lines of a metrics.jsonl; a last line that was cut off in the middle is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]  # what follows the last newline was never finished


def write_whole(path: pathlib.Path, text: str) -> None:
    """A file that is either the old one or the new one, whatever happens meanwhile."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
