"""What people would rather look at than read: report.html, which is one file, and report.md with its plots beside it."""

import datetime
import functools
import importlib.metadata
import pathlib
import platform
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jinja2
import numpy as np
from markupsafe import Markup

import repo_jax
from repo_jax import plots
from repo_jax.config import dump_recipe
from repo_jax.data.schema import PairTokens
from repo_jax.data.store import DROPPED, NOTICED, TokenStore
from repo_jax.losses import ALIASES, LOSSES, title_of
from repo_jax.preparation import Setup
from repo_jax.progress import describe, objective_of
from repo_jax.run_folder import RunFolder, read_margins, read_metrics, read_results
from repo_jax.stores import is_from_python

SUMMARY = {
    # metric                 what it is called
    "rewards/accuracies": "held-out ranking accuracy",
    "mean_margin":        "mean margin (nats per token)",
    "active_fraction":    "active fraction",
}  # fmt: skip
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers", "numpy")
SAMPLE = 256  # training pairs that are scored before and after where nothing is held out
PAIRS = 4  # that are shown from each end
LETTERS = 900  # of a text that are shown at most
# What stands for rows of a Python program in a call of train.
ROWS = {"dataset_name": "train_dataset=rows", "eval_dataset_name": "eval_dataset=held_out_rows"}
# What reading, drawing and writing raise where a run's numbers, files or fonts are odd.
FAULTS = (ArithmeticError, EOFError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)
FAULTS += (jinja2.TemplateError,)
# Characters that would do something rather than be seen.
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class Pair(NamedTuple):
    """A pair as people read it, with its margin before and after training."""

    id: str
    prompt: str
    chosen: str
    rejected: str
    tokens: tuple[int, int]  # scored, of the two answers
    before: float
    after: float


class Margins(NamedTuple):
    """Margins of the same pairs as training goes on."""

    of: str  # which pairs these are
    after: Mapping[int, np.ndarray]  # so many updates: [B]
    gammas: Mapping[int, float]  # at these updates; none where the objective has none that is a margin
    longer_B: np.ndarray  # scored tokens of the chosen answer less those of the rejected one
    worst: Sequence[Pair]
    best: Sequence[Pair]


class Split(NamedTuple):
    """What became of the rows of one data set."""

    name: str
    source: str
    rows: int
    kept: int
    kind: str  # pairs or rows
    reasons: Sequence[tuple[str, int, str]]  # words, rows, dropped or kept


class Facts(NamedTuple):
    """Everything that a report says."""

    title: str
    about: Sequence[str]  # what the run was; a line that begins with a space belongs to the one before
    total: int  # updates
    metrics: Sequence[dict]  # the lines of metrics.jsonl
    results: dict | None  # eval_results.json
    margins: Margins | None
    splits: Sequence[Split]
    recipe: str
    versions: Mapping[str, str]
    command: str


def summary_rows(before: dict, after: dict) -> list[tuple[str, float, float]]:
    """(what, before, after) for the three numbers that matter; of answers by themselves, which have no margins, also for the loss."""
    names = SUMMARY if "mean_margin" in before else {"loss": "held-out loss"} | SUMMARY
    return [(words, before[name], after[name]) for name, words in names.items() if name in before]


def summary_text(before: dict, after: dict) -> str:
    """The three numbers as an aligned table for a terminal."""
    rows = [("", "before", "after")] + [(what, f"{b:.3f}", f"{a:.3f}") for what, b, a in summary_rows(before, after)]
    return "\n".join(f"  {what:<30}{b:>9}{a:>9}" for what, b, a in rows)


# What a run leaves, as facts


def facts_of(setup: Setup, place: RunFolder) -> Facts:
    """The facts of a run that has ended, from its folder and its data."""
    recipe, folder = setup.recipe, place.here
    metrics = read_metrics(folder / "metrics.jsonl")
    named = (("training", setup.train), ("held-out", setup.held_out))
    model = re.split(r"[/\\]", recipe.model.model_name_or_path.rstrip("/\\"))[-1]
    return Facts(
        title=f"{objective_of(setup)} on {model}",
        about=describe(setup).splitlines(),
        total=setup.total_steps,
        metrics=metrics,
        results=read_results(folder),
        margins=_margins(setup, folder, metrics),
        splits=[_split(name, store) for name, store in named if store is not None],
        recipe=dump_recipe(recipe),
        versions=_versions(setup),
        command=_command(setup, place),
    )


def watched(setup: Setup) -> tuple[str, TokenStore, np.ndarray]:
    """The pairs whose margins are kept: all that are held out, or else a sample of those trained on. What they are, their store, and
    which of its pairs."""
    store = setup.train if setup.held_out is None else setup.held_out
    both = np.flatnonzero((store.scored > 0).all(axis=1))
    if setup.held_out is not None:
        return "held-out pairs", store, both
    rng = np.random.default_rng(setup.recipe.run.seed)
    return "training pairs", store, np.sort(rng.permutation(both)[:SAMPLE])


def _margins(setup: Setup, folder: pathlib.Path, metrics: list[dict]) -> Margins | None:
    evaluated = {line["step"]: line for line in metrics if "eval_loss" in line}
    after = read_margins(folder, steps=evaluated, total=setup.total_steps)
    of, store, which = watched(setup)
    if not len(which) or not {0, setup.total_steps} <= after.keys():
        return None
    finite = np.all([np.isfinite(margins_B) for margins_B in after.values()], axis=0)
    if not finite.any():
        return None
    which, after = which[finite], {step: margins_B[finite] for step, margins_B in after.items()}
    first, last = after[0], after[setup.total_steps]
    gamma = setup.hparams.get("gamma") if setup.loss.margin_gamma else None
    ends = {0: gamma, setup.total_steps: setup.hparams.get("gamma_end", gamma)}
    gammas = {step: evaluated.get(step, {}).get("eval_gamma", ends.get(step, gamma)) for step in after}
    order = np.argsort(last, kind="stable")
    shown = min(PAIRS, len(order) // 2)

    def pair(place: int) -> Pair:
        return readable(store.plain(int(which[place])), setup.tokenizer, first[place], last[place])

    return Margins(
        of=of,
        after=after,
        gammas={} if gamma is None else gammas,
        longer_B=store.scored[which, 0] - store.scored[which, 1],
        worst=[pair(i) for i in order[:shown]],
        best=[pair(i) for i in order[::-1][:shown]],
    )


def readable(pair: PairTokens, tokenizer, before: float, after: float) -> Pair:
    """A pair as text, cut where it is long."""
    texts = (cut(tokenizer.decode(ids).strip()) for ids in (pair.prompt, pair.chosen, pair.rejected))
    tokens = tuple(int(mask.sum()) for mask in pair.masks)
    return Pair(pair.id, *texts, tokens, float(before), float(after))


def cut(text: str, most: int = LETTERS) -> str:
    """The text, or its two ends with the number of letters between them."""
    if len(text) <= most:
        return text
    tail = most // 3
    return f"{text[: most - tail]} [... {len(text) - most:,} letters ...] {text[len(text) - tail :]}"


def _split(name: str, store: TokenStore) -> Split:
    reasons = [(DROPPED[reason], n, "dropped") for reason, n in store.dropped.items()]
    reasons += [(NOTICED[reason], n, "kept") for reason, n in store.noticed.items()]
    return Split(name, store.name, store.rows, len(store), "rows" if store.unpaired else "pairs", reasons)


def _versions(setup: Setup) -> dict[str, str]:
    devices, processes = setup.mesh.devices, jax.process_count()
    where = f"{devices.size} x {devices.flat[0].device_kind}" + (f", {processes} processes" if processes > 1 else "")
    return (
        {"repo_jax": repo_jax.__version__, "Python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES}
        | {"devices": where, "system": platform.platform()}
    )


def _command(setup: Setup, place: RunFolder) -> str:
    """What runs the same again: a line of Python where the objective is one's own or rows were given there, for which there is no command."""
    recipe, again, data = place.shown("recipe.yaml"), f"{place}-again", setup.recipe.data
    kinds = setup.recipe.loss["loss_type"]
    given = [argument for field, argument in ROWS.items() if is_from_python(getattr(data, field))]
    if any(ALIASES.get(kind, kind) not in LOSSES for kind in ([kinds] if isinstance(kinds, str) else kinds)):
        given.append(f"loss={title_of(kinds)}")
    if given:
        overrides = {"run.output_dir": again}
        return f"repo_jax.train(repo_jax.load_recipe({recipe!r}, {overrides!r}), {', '.join(given)})"
    return shlex.join(["repo-jax", "train", recipe, "--output_dir", again])


# Facts, written


def write_report(folder: pathlib.Path, facts: Facts) -> pathlib.Path:
    """report.html, and report.md with its plots, in FOLDER; returns the path of the former."""
    trained = [line for line in facts.metrics if "loss" in line]
    results = facts.results or {}
    margins, drawn = facts.margins, {}
    if margins is not None:
        last_B = margins.after[facts.total]
        drawn["margins"] = plots.histograms(margins.after, margins.gammas, facts.total)
        drawn["length"] = plots.length_scatter(margins.longer_B, last_B)
    curves = plots.curves(trained, _held_out(facts))
    for plot in (*drawn.values(), *curves):
        plot.write_png(folder)
    known = {
        "facts": facts,
        "summary": summary_rows(results["before"], results["after"]) if {"before", "after"} <= results.keys() else [],
        "about": _nested(facts.about),
        "plots": drawn,
        "curves": curves,
        "correlation": margins and plots.spearman(margins.longer_B, last_B),
        "ends": margins and [("lowest", margins.worst), ("highest", margins.best)],
        "last": {name: value for name, value in trained[-1].items() if isinstance(value, float)} if trained else {},
        "skipped": [line["step"] for line in facts.metrics if "skipped" in line],
        "now": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    }
    for name in ("report.md", "report.html"):
        path = folder / name
        text = _environment().get_template(f"{name}.j2").render(known)
        path.write_text(CONTROLS.sub("\ufffd", text), encoding="utf-8")
    return path


def _held_out(facts: Facts) -> dict[int, dict]:
    """Metrics of held-out pairs after so many updates."""
    found = {
        line["step"]: {name.removeprefix("eval_"): value for name, value in line.items() if name.startswith("eval_")}
        for line in facts.metrics
        if "eval_loss" in line
    }
    results = facts.results or {}
    first, last = (
        {step: results[when]} if when in results else {} for step, when in ((0, "before"), (facts.total, "after"))
    )
    return first | found | last


def _nested(lines: Sequence[str]) -> list[tuple[str, list[str]]]:
    found = []
    for line in lines:
        if line.startswith(" ") and found:
            found[-1][1].append(line.strip())
        else:
            found.append((line.strip(), []))
    return found


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("repo_jax"),
        autoescape=lambda name: name.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = lambda plot: Markup(plot.svg())
    environment.filters["fenced"] = _fenced
    return environment


def _fenced(text: str) -> str:
    """A Markdown block that holds any text as it is."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
