"""What people would rather look at than read: report.md and its plots."""

import pathlib

import numpy as np
from matplotlib.figure import Figure  # rather than pyplot, which would choose a backend for the whole process

SUMMARY = {
    # metric                 what it is called
    "rewards/accuracies": "held-out ranking accuracy",
    "mean_margin":        "mean margin (nats per token)",
    "active_fraction":    "active fraction",
}  # fmt: skip


def summary_rows(before: dict, after: dict) -> list[tuple[str, float, float]]:
    """(what, before, after) for the three numbers that matter; of answers by themselves, which have no margins, for the loss."""
    if "mean_margin" not in before:
        return [("held-out loss", before["loss"], after["loss"])]
    return [(words, before[name], after[name]) for name, words in SUMMARY.items() if name in before]


def summary_text(before: dict, after: dict) -> str:
    """The three numbers as an aligned table for a terminal."""
    rows = [("", "before", "after")] + [(what, f"{b:.3f}", f"{a:.3f}") for what, b, a in summary_rows(before, after)]
    return "\n".join(f"  {what:<30}{b:>9}{a:>9}" for what, b, a in rows)


def write_report(
    folder: pathlib.Path,
    *,
    metrics: list[dict],
    margins: tuple[np.ndarray, np.ndarray] | None,
    results: dict | None,
    gamma: float | None,
    about: list[str],
) -> pathlib.Path:
    """report.md in FOLDER with three plots beside it; returns its path.

    metrics: the lines of metrics.jsonl; margins: held-out margins before and after; results: eval_results.json; about: lines
    that say what the run was, those that begin with a space being of the one before.
    """
    lines = ["# Report", "", *(f"{'  ' * line.startswith(' ')}- {line.strip()}" for line in about), ""]
    if results is not None:
        lines += ["| held-out pairs | before | after |", "| --- | --- | --- |"]
        lines += [f"| {what} | {b:.4f} | {a:.4f} |" for what, b, a in summary_rows(results["before"], results["after"])]
        lines += [
            "",
            f"{results['pairs']} pairs. Accuracy counts pairs with margin above 0; a pair is active while its gradient is not 0."
            if "mean_margin" in results["before"]
            else f"{results['pairs']} rows, each with one answer.",
            "",
        ]
    metrics, skipped = [line for line in metrics if "loss" in line], [line for line in metrics if "skipped" in line]
    _curve(folder / "loss.png", metrics, "loss", "loss", color="#3b6ea5")
    lines += ["![loss](loss.png)", ""]
    if margins is not None:
        _histogram(folder / "margins.png", *margins, gamma=gamma)
        lines += ["![margins](margins.png)", ""]
    _curve(
        folder / "active_fraction.png", metrics, "active_fraction", "active fraction", color="#b3541e", limits=(0, 1.02)
    )
    lines += ["![active fraction](active_fraction.png)", ""]
    if skipped:
        updates = ", ".join(str(line["step"]) for line in skipped)
        lines += [
            f"**Skipped** because the loss or the gradient was not finite: {updates} (their pairs stand in metrics.jsonl).",
            "",
        ]
    if metrics:
        last = metrics[-1]
        lines += ["## The last logged update", "", "| metric | value |", "| --- | --- |"]
        lines += [f"| {name} | {last[name]:.6g} |" for name in last] + [""]
    path = folder / "report.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _curve(path, metrics, name, label, *, color, limits=None):
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    x, y = ([line[key] for line in metrics] for key in ("step", name))
    axes.plot(x, y, color=color, linewidth=0.8, alpha=0.35)
    window = max(1, len(y) // 12)  # one update sees few pairs; the mean of some shows the way
    if window > 1:
        mean = np.convolve(y, np.full(window, 1 / window), mode="valid")
        axes.plot(x[window - 1 :], mean, color=color, linewidth=1.8, label=f"mean of {window} logged updates")
        axes.legend(frameon=False)
    axes.set(xlabel="update", ylabel=label)
    if limits:
        axes.set_ylim(*limits)
    axes.grid(alpha=0.25)
    figure.savefig(path, dpi=120)


def _histogram(path, before_B, after_B, *, gamma):
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    low, high = np.quantile(np.concatenate([before_B, after_B]), [0.005, 0.995])
    bins = np.linspace(low, high, 41)
    axes.hist(before_B, bins, alpha=0.55, label="before", color="#8a8a8a")
    axes.hist(after_B, bins, alpha=0.55, label="after", color="#3b6ea5")
    if gamma is not None:
        axes.axvline(gamma, color="#b3541e", linestyle="--", label=f"gamma = {gamma:g}")
    axes.set(xlabel="margin M: mean log-prob chosen - rejected (nats per token)", ylabel="held-out pairs")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
