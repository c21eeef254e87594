"""What a run keeps in its folder, and whose folder it is."""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Iterable, Iterator

import jax
import numpy as np
import yaml

from repo_jax import urls
from repo_jax.checkpoint import Checkpoints, holds_checkpoints, written_directly
from repo_jax.config import Recipe, StoppedError, dump_recipe
from repo_jax.distributed import agree, primary, text_from_primary, wait_for_all
from repo_jax.evaluation import Evaluation, summarize
from repo_jax.export import cache_of, check_output, shared_folder, write_base
from repo_jax.models.pretrained import Pretrained
from repo_jax.models.tensors import fingerprint
from repo_jax.preparation import Setup

EXPORTS = ("hf", "adapter")


class RunFolder:
    """Where a run's files lie: in output_dir or, where that is a URL, small ones in a folder here whose files process 0 copies there.

    Checkpoints go straight to a URL where Orbax can write there. Every process has a folder `here` of its own with a URL, and with a
    path the one of all.
    """

    BASE, TRACES = "base", "profile"

    def __init__(self, recipe: Recipe):
        given = recipe.run.output_dir.removeprefix("file://")
        self.url = given.rstrip("/") if urls.is_url(given) else None
        self.here = pathlib.Path(given) if self.url is None else cache_of(self.url, recipe.data.cache_dir, "runs")
        self._sent = {}  # name -> its state when it was copied to the URL

    def __str__(self):
        return self.url or str(self.here)

    def shown(self, name: str) -> str:
        """Where people find a file of the run."""
        return f"{self}/{name}"

    def url_of(self, name: str) -> str | None:
        return self.url and f"{self.url}/{name}"

    def checkpoints(self, keep: int) -> Checkpoints:
        return Checkpoints(self.url or self.here, keep=keep, here=self.here / "checkpoints")

    def fetch(self) -> None:
        """Makes the folder here what the URL has, but for checkpoints, exports and traces."""
        shutil.rmtree(self.here, ignore_errors=True)
        self.here.mkdir(parents=True)
        urls.download(self.url, self.here, lambda name: "/" not in name or name.startswith(f"{self.BASE}/"))

    def keep(self, *, last: bool = False) -> None:
        """Brings what is new here to the URL, if there is one. What fails is said, and tried again the next time.

        Raises StoppedError where this was the last.
        """
        if self.url is None or not primary():
            return
        try:
            self.send(path for path in self.here.iterdir() if path.is_file() and not path.name.startswith("."))
        except (OSError, ValueError) as error:
            if last:
                raise StoppedError(f"{error}; the run's files are in '{self.here}': copy them from there") from None
            print(f"{error}; training goes on, with its files in '{self.here}'", file=sys.stderr)

    def send(self, paths: Iterable[pathlib.Path]) -> None:
        """Copies those of these files here that have changed to the URL."""
        states = {path.relative_to(self.here).as_posix(): path.stat() for path in paths}
        states = {name: (stat.st_mtime_ns, stat.st_size) for name, stat in states.items()}
        urls.upload(self.here, self.url, [name for name in states if self._sent.get(name) != states[name]])
        self._sent |= states

    def keep_traces(self) -> None:
        """Brings what this process has traced to the URL, if there is one."""
        if self.url is None:
            return
        try:
            self.send(path for path in (self.here / self.TRACES).rglob("*") if path.is_file())
        except (OSError, ValueError) as error:
            print(f"{error}; the traces stay in '{self.here / self.TRACES}'", file=sys.stderr)


# What may change when a run goes on: where and how it computes, not what.
FREE = {
    "data": {"row_length", "scored_length", "rows_per_device", "slots_per_device", "cache_dir", "on_bad_rows"},
    "optim": {"mode", "two_pass_below", "keep_layer_inputs", "max_skipped_updates"},
    "model": {"remat", "attn_implementation"},
    "mesh": {"data", "fsdp", "tensor"},
    "run": {"output_dir", "logging_steps", "eval_steps", "save_steps", "save_total_limit"}
    | {"profile_steps", "compile_cache_dir", "report_to"}
    | {"push_to_hub", "hub_model_id", "hub_revision", "hub_private_repo"},
}


def identity(setup: Setup) -> dict:
    """What makes a run the run that it is: the recipe but for where it computes, the data, and the weights it starts from."""
    return {
        "recipe": _fixed(setup.recipe),
        "data": {"train": setup.train.key, "held_out": setup.held_out and setup.held_out.key},
        # A checkpoint of adapters holds them alone: what they lie over must stay what it was.
        "base": _weights(setup.pretrained),
    } | ({} if setup.reference is None else {"reference": _weights(setup.reference)})


def _weights(model: Pretrained) -> dict:
    return {"weights": fingerprint(model.files.weights, model.files.adapter)}


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
        "device": setup.mesh.local_devices[0].device_kind,
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

    Several processes call it together; process 0 writes. What a run left that got to no checkpoint is removed. Raises ValueError naming what
    differs when the folder holds a run of another recipe or other data, or where a finished run's checkpoints are gone, and OSError where
    a URL cannot be written to.
    """
    recipe, run, own = setup.recipe, RunFolder(setup.recipe), identity(setup)
    folder = run.here
    if run.url is None:
        for name in EXPORTS:
            check_output(folder / name)
        _check_shared(folder)
    else:
        _check_url(run.url)
        run.fetch()
    claimed, trained = folder / "identity.yaml", holds_checkpoints(run.url or folder)
    finished = any((folder / name).exists() for name in ("report.html", *EXPORTS))
    if claimed.exists() and finished and not trained:
        raise ValueError(
            f"output_dir='{run}' holds a finished run without its checkpoints, over which nothing is written; name a new output_dir, or remove that folder"
        )
    if claimed.exists() and trained:  # before the first there is nothing to lose
        changes = _differences(yaml.safe_load(claimed.read_text(encoding="utf-8")), own)
        if changes:
            raise ValueError(
                f"output_dir='{run}' holds another run ({'; '.join(changes)}); name a new output_dir, or remove that folder"
            )
    elif not claimed.exists() and (trained or (folder / "recipe.yaml").exists()):
        raise ValueError(f"output_dir='{run}' holds files that are not from a run of repo-jax; name a new output_dir")
    wait_for_all("looked at output_dir")
    removed = []
    if primary() or run.url:
        folder.mkdir(parents=True, exist_ok=True)
        if not trained:
            removed = _remove_results(run.here)
            write_base(setup.pretrained.files, setup.cfg, setup.tokenizer, folder / "base")
            write_whole(claimed, yaml.safe_dump(own, sort_keys=False, allow_unicode=True))
        if setup.gamma_quantile is not None and trained and (gamma := found_gamma(folder)) is not None:
            recipe = with_found_gamma(recipe, gamma)
        write_whole(folder / "recipe.yaml", dump_recipe(recipe))
    if run.url is not None:
        _send_all(run, removed)
    wait_for_all("claimed output_dir")


def _remove_results(folder: pathlib.Path) -> list[str]:
    """Takes away what was evaluated before a run had a checkpoint, and names it: the next run may have other held-out pairs, or none."""
    names = [path.name for path in (folder / "eval_results.json", *folder.glob("margins_*.npy")) if path.exists()]
    for name in names:
        (folder / name).unlink(missing_ok=True)
    return names


def with_found_gamma(recipe: Recipe, gamma: float) -> Recipe:
    """The recipe with the number that its `gamma: auto` has come to, as one may run it again."""
    loss = {name: value for name, value in recipe.loss.items() if name != "gamma_quantile"}
    return dataclasses.replace(recipe, loss=loss | {"gamma": gamma})


def found_gamma(folder: pathlib.Path) -> float | None:
    """What the run of the folder has found gamma to be, where that is auto."""
    path = folder / "recipe.yaml"
    gamma = yaml.safe_load(path.read_text(encoding="utf-8"))["loss"].get("gamma") if path.exists() else None
    return gamma if isinstance(gamma, float) else None


def _check_url(url: str) -> None:
    """Whether a run can be kept at a URL. Raises ValueError or OSError."""
    urls.without_secrets("output_dir", url)
    if jax.process_count() > 1 and not written_directly(url):
        raise ValueError(
            f"output_dir='{url}' is for one process, and there are {jax.process_count()}: several write their checkpoints together to gs:// or "
            "to a folder that all of them see; name one of these, such as where the bucket is mounted"
        )
    for name in EXPORTS:
        check_output(f"{url}/{name}")


def _check_shared(folder: pathlib.Path) -> None:
    """Raises ValueError, on all processes, where what process 0 writes is not seen by all."""
    if jax.process_count() == 1:
        return
    with shared_folder(folder, ".seen-") as mark:
        try:
            agree({"output_dir": str(mark.is_dir())})
        except ValueError:
            raise ValueError(
                f"output_dir='{folder}' is not one folder for all processes: what the first writes there, others do not see; name one on a "
                "disk that all hosts share, or a gs:// URL"
            ) from None


def _send_all(run: RunFolder, removed: list[str]) -> None:
    """The first copy to the URL, where what was removed here goes too. Raises OSError, on all processes, where it cannot be written to."""
    reason = ""
    if primary():
        try:
            urls.remove(run.url, removed)
            run.send(path for path in run.here.rglob("*") if path.is_file())
        except (OSError, ValueError) as error:
            reason = str(error)
    if reason := text_from_primary(reason):
        raise OSError(reason)


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
    save_margins(folder, when, evaluation.margins_B)
    results = (read_results(folder) or {}) | {"pairs": evaluation.pairs}
    results[when] = summarize(evaluation)
    write_whole(folder / "eval_results.json", json.dumps(results, indent=2) + "\n")


def save_margins(folder: pathlib.Path, when: str | int, margins_B: np.ndarray) -> None:
    """Keeps the margins before or after training, or after so many updates, for the report; process 0 writes."""
    if primary():
        np.save(folder / f"margins_{when}.npy", margins_B)


def read_margins(folder: pathlib.Path, *, steps: Iterable[int], total: int) -> dict[int, np.ndarray]:
    """The margins that were kept, by the number of updates before them; `steps` are those with an evaluation."""
    names = {step: str(step) for step in steps} | {0: "before", total: "after"}
    paths = {step: folder / f"margins_{name}.npy" for step, name in sorted(names.items())}
    return {step: np.load(path) for step, path in paths.items() if path.exists()}


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
