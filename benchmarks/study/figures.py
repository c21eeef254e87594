"""The figures of the study, from what small-scale-study.json holds."""

import pathlib

import numpy as np
from matplotlib.figure import Figure

from study import tables

BLUE, ORANGE, GREY, GREEN, VIOLET = "#3b6ea5", "#b3541e", "#8a8a8a", "#4c8b5a", "#7a5195"


def draw(study: dict, folder: pathlib.Path) -> None:
    """Every figure whose runs are there."""
    folder.mkdir(parents=True, exist_ok=True)
    for one in (comparison, gammas, grid, course, limit, schedules):
        figure = one(study)
        if figure is not None:
            figure.savefig(folder / f"{one.__name__}.png", dpi=110)


def panel(width: float = 6.4, height: float = 3.6, columns: int = 1, **options):
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, **options)
    for one in np.ravel(axes):
        one.grid(alpha=0.25)
        one.set_axisbelow(True)
    return figure, axes


def dots(axes, x: float, values, color: str) -> None:
    """Every seed, and their mean as a line."""
    axes.plot([x] * len(values), values, "o", color=color, alpha=0.6, markersize=5)
    axes.plot([x - 0.25, x + 0.25], [np.mean(values)] * 2, color=color, linewidth=2)


def comparison(study: dict):
    """Held-out accuracy of every method and seed."""
    models = [model for model in study["plan"]["models"] if model in study["starts"]]
    figure, every = panel(4.2 * max(len(models), 1), 3.6, max(len(models), 1), sharey=True, squeeze=False)
    for axes, model in zip(every[0], models, strict=True):
        methods = list(study["plan"]["methods"][model])
        for x, method in enumerate(methods):
            runs = tables.of_method(study, model, method)
            if runs:
                dots(axes, x, tables.held_out(runs, "accuracy"), ORANGE if method.startswith("RePO") else BLUE)
        before = study["starts"][model]["held_out"]["accuracy"]
        axes.axhline(before, color=GREY, linestyle="--", linewidth=1)
        axes.text(len(methods) - 0.5, before, "before training", color=GREY, va="bottom", ha="right", fontsize=8)
        longer = np.mean(tables.longer_B(study["starts"][model]["held_out_lengths"]) > 0)
        axes.axhline(longer, color=GREY, linestyle=":", linewidth=1)
        axes.text(
            len(methods) - 0.5, longer, "the longer answer, always", color=GREY, va="bottom", ha="right", fontsize=8
        )
        axes.set_xticks(range(len(methods)), methods)
        axes.set_title(f"{model}, {study['starts'][model]['parameters'] / 1e6:.2f} M parameters", fontsize=10)
    every[0][0].set_ylabel("held-out ranking accuracy")
    return figure


def gammas(study: dict):
    """Accuracy, and the mean margin, over RePO's gamma."""
    plan = study["plan"]
    runs = {gamma: tables.of_repo(study, {"loss_type": "repo", "gamma": gamma}) for gamma in plan["gammas"]}
    runs = {gamma: found for gamma, found in runs.items() if found}
    if not runs:
        return None
    figure, (left, right) = panel(8.4, 3.4, 2)
    for axes, name, label in (
        (left, "accuracy", "held-out ranking accuracy"),
        (right, "mean_margin", "held-out mean margin (nats per token)"),
    ):
        values = [tables.held_out(found, name) for found in runs.values()]
        for gamma, one in zip(runs, values, strict=True):
            axes.plot([gamma] * len(one), one, "o", color=ORANGE, alpha=0.5, markersize=5)
        axes.plot(list(runs), [one.mean() for one in values], color=ORANGE, linewidth=1.8)
        axes.set(xlabel="gamma (nats per token)", ylabel=label)
    right.plot([0, max(runs)], [0, max(runs)], color=GREY, linestyle="--", linewidth=1, label="margin = gamma")
    right.legend(frameon=False, fontsize=8)
    return figure


def grid(study: dict):
    """The share of filtered pairs over gamma and training."""
    there, shares = tables.grid_of(study)
    if not there:
        return None
    figure, axes = panel(6.0, 3.6)
    axes.grid(False)
    image = axes.imshow(shares, origin="lower", aspect="auto", cmap="viridis", vmin=0, vmax=1)
    for i in range(len(there)):
        for k in range(shares.shape[1]):
            axes.text(
                k, i, f"{shares[i, k]:.0%}", ha="center", va="center", color="black" if shares[i, k] > 0.6 else "white"
            )
    parts = np.array_split(np.arange(1, study["plan"]["updates"] + 1), shares.shape[1])
    axes.set_xticks(range(len(parts)), [f"{part[0]}-{part[-1]}" for part in parts])
    axes.set_yticks(range(len(there)), [f"{gamma:g}" for gamma in there])
    axes.set(xlabel="updates", ylabel="gamma (nats per token)")
    figure.colorbar(image, ax=axes, label="pairs without gradient")
    return figure


def course(study: dict):
    """Margins of the training pairs as they come, by method."""
    plan = study["plan"]
    model = plan["models"][0]
    figure, axes = panel(6.4, 3.4)
    colors = dict(zip(plan["methods"][model], (ORANGE, VIOLET, BLUE, GREEN, GREY), strict=False))
    for method in plan["methods"][model]:
        runs = tables.of_method(study, model, method)
        if not runs:
            continue
        mean = np.mean([run["margin"] for run in runs], axis=0)
        window = max(1, len(mean) // 8)
        smooth = np.convolve(mean, np.full(window, 1 / window), mode="valid")
        axes.plot(np.arange(window, len(mean) + 1), smooth, color=colors[method], label=method, linewidth=1.8)
    axes.axhline(plan["methods"][model]["RePO"]["gamma"], color=GREY, linestyle="--", linewidth=1, label="gamma")
    axes.set(xlabel="update", ylabel="mean margin of the update's pairs\n(nats per token, running mean)")
    axes.set_ylim(top=axes.get_ylim()[1] + 0.3)
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper left")
    return figure


def limit(study: dict):
    """SimPO's distance from RePO over beta."""
    lines = [line for line in study["limit"] if line["loss"]["loss_type"] == "simpo"]
    if not lines:
        return None
    figure, (left, right) = panel(8.4, 3.4, 2)
    others = [line for line in study["limit"] if line["loss"]["loss_type"] == "repo"]
    marks = {
        "distance": "distance of final parameters / RePO's way",
        "margins_apart": "held-out margins apart (nats per token)",
    }
    for axes, (name, label) in zip((left, right), marks.items(), strict=True):
        betas = sorted({line["loss"]["beta"] for line in lines})
        values = [[line[name] for line in lines if line["loss"]["beta"] == beta] for beta in betas]
        for beta, one in zip(betas, values, strict=True):
            axes.plot([beta] * len(one), one, "o", color=BLUE, alpha=0.5, markersize=5)
        axes.plot(betas, [np.mean(one) for one in values], color=BLUE, linewidth=1.8, label="SimPO, same seed")
        if others:
            axes.axhline(
                np.mean([line[name] for line in others]),
                color=GREY,
                linestyle="--",
                linewidth=1,
                label="RePO, another seed",
            )
        axes.set(xscale="log", xlabel="SimPO's beta", ylabel=label)
        axes.set_ylim(bottom=0)
    left.legend(frameon=False, fontsize=8)
    return figure


def schedules(study: dict):
    """Fixed gammas and schedules side by side."""
    plan = study["plan"]
    fixed = [{"loss_type": "repo", "gamma": gamma} for gamma in plan["gammas"]]
    runs = [(loss, tables.of_repo(study, loss)) for loss in [*fixed, *plan["schedules"]]]
    runs = [(loss, found) for loss, found in runs if found]
    if not any("gamma_end" in loss for loss, _ in runs):
        return None
    figure, axes = panel(7.2, 3.4)
    for x, (loss, found) in enumerate(runs):
        dots(axes, x, tables.held_out(found, "accuracy"), BLUE if "gamma_end" in loss else ORANGE)
    words = [f"{loss['gamma']:g}" + (f" to\n{loss['gamma_end']:g}" if "gamma_end" in loss else "") for loss, _ in runs]
    axes.set_xticks(range(len(runs)), words)
    axes.set(xlabel="gamma: fixed, then from and to (linear)", ylabel="held-out ranking accuracy")
    return figure
