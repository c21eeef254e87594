"""The pictures of a report, each drawn once and written twice: as a PNG, and as an SVG that takes the page's colours.

Axis letters: B pairs.
"""

import io
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure  # rather than pyplot, which would choose a backend for the whole process
from matplotlib.ticker import MaxNLocator

INK = "#2b2f36"  # lines and letters; in an SVG the colour of the text around it
BLUE, ORANGE, GREY = "#3d7fc4", "#d4692a", "#8d939c"  # seen on white and on black
STYLE = {
    "font.size": 8.5,
    "font.family": "sans-serif",
    "axes.titlesize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "svg.fonttype": "none",  # letters stay letters: small, and in the page's own font
    "svg.hashsalt": "",
}
styled = matplotlib.rc_context(STYLE)  # decorates what draws or writes
SMALL, LARGE = (4.4, 2.6), (5.6, 4.2)  # inches; a page shows three small ones or two large ones side by side
SHOWN = 6  # evaluations whose margins are drawn
DENSE = 1000  # points from which on they are one picture within the plot, for size
DOTS = 5000  # pairs that a scatter shows at most


class Plot(NamedTuple):
    name: str  # of its file
    title: str
    figure: Figure

    @styled
    def write_png(self, folder: pathlib.Path) -> None:
        self.figure.savefig(folder / f"{self.name}.png", dpi=120, facecolor="white")
        self.figure.set_layout_engine("none")  # it is laid out now, which takes longer than to draw it

    @styled
    def svg(self) -> str:
        """An <svg> to stand in a page: no size of its own, no ids that another could have, nothing of elsewhere."""
        buffer = io.StringIO()
        matplotlib.rcParams["svg.hashsalt"] = self.name
        self.figure.savefig(buffer, format="svg", dpi=130, transparent=True)
        text = buffer.getvalue()
        text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
        text = re.sub(r'<g id="[^"]*"', "<g", text)
        text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
        text = re.sub(
            r'<svg\b[^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{self.title}">', text, count=1
        )
        return text.replace(INK, "currentColor")


class Curve(NamedTuple):
    name: str  # of its file
    title: str
    lines: Mapping[str, str]  # metric -> what it is called where there are several
    limits: tuple[float | None, float | None] = (None, None)
    noisy: bool = True  # one update sees few pairs; the mean of some shows the way


CURVES = [
    Curve("loss", "loss", {"loss": ""}),
    Curve("accuracies", "ranking accuracy", {"rewards/accuracies": ""}, (-0.02, 1.02)),
    Curve("rewards_margins", "reward margin", {"rewards/margins": ""}),
    Curve("logps", "mean log-prob per token", {"logps/chosen": "chosen", "logps/rejected": "rejected"}),
    Curve("active_fraction", "active fraction", {"active_fraction": ""}, (-0.02, 1.02)),
    Curve("grad_norm", "gradient norm", {"grad_norm": ""}, (0, None)),
    Curve("learning_rate", "learning rate", {"learning_rate": ""}, (0, None), noisy=False),
    Curve("throughput", "pairs per second", {"pairs_per_second": ""}, (0, None)),
]


@styled
def curves(metrics: Sequence[dict], held_out: Mapping[int, dict]) -> list[Plot]:
    """A plot for every metric that there is, over updates.

    metrics: lines of metrics.jsonl; held_out: the same metrics of held-out pairs after so many updates.
    """
    return [
        _curve(curve, metrics, held_out)
        for curve in CURVES
        if any(name in line for line in metrics for name in curve.lines)
    ]


def _curve(curve: Curve, metrics: Sequence[dict], held_out: Mapping[int, dict]) -> Plot:
    figure, axes = _axes()
    for (name, label), color in zip(curve.lines.items(), (BLUE, ORANGE), strict=False):
        if not any(name in line for line in metrics):
            continue
        x, y = (np.array([line[key] for line in metrics if name in line]) for key in ("step", name))
        window = max(1, len(y) // 12) if curve.noisy else 1
        smooth = np.convolve(y, np.full(window, 1 / window), mode="valid")
        if window > 1:
            axes.plot(x, y, color=color, linewidth=0.6, alpha=0.35, rasterized=len(x) > DENSE)
        which = label or ("training" if window == 1 else f"training, mean of {window}")
        sparse = slice(None, None, -(-len(smooth) // DENSE))
        axes.plot(
            x[window - 1 :][sparse], smooth[sparse], color=color, linewidth=1.6, label=which, marker="o" * (len(x) == 1)
        )
        points = {step: found[name] for step, found in held_out.items() if name in found}
        if points:
            color = color if label else ORANGE
            which = f"{label}, held-out".removeprefix(", ")
            axes.plot(*zip(*points.items(), strict=True), color=color, linestyle="--", linewidth=1, marker="o", markersize=3.5, label=which)  # fmt: skip
    axes.set(xlabel="update", ylim=curve.limits)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid()
    if len(axes.get_legend_handles_labels()[1]) > 1 or window > 1:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=2, borderaxespad=0.2)
    return Plot(curve.name, curve.title, figure)


@styled
def histograms(margins: Mapping[int, np.ndarray], gammas: Mapping[int, float], total: int) -> Plot:
    """Where the margins of the same pairs lie after so many updates, below and above gamma where there is one."""
    updates = sorted(margins)
    if len(updates) > SHOWN:
        updates = [updates[i] for i in np.unique(np.linspace(0, len(updates) - 1, SHOWN).round().astype(int))]
    shown = np.concatenate([margins[update] for update in updates])
    low, high = np.quantile(shown, [0.005, 0.995])
    edges = [low, high, *gammas.values(), 0.0]
    room = 0.04 * (max(edges) - min(edges) or 1.0)
    bins = np.linspace(min(edges) - room, max(edges) + room, 49)
    figure = Figure(figsize=LARGE, layout="constrained")
    rows = figure.subplots(len(updates), sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, update in zip(rows, updates, strict=True):
        margins_B, gamma = np.clip(margins[update], bins[0], bins[-1]), gammas.get(update)
        beyond_B = np.zeros(len(margins_B), bool) if gamma is None else margins_B >= gamma
        axes.hist([margins_B[~beyond_B], margins_B[beyond_B]], bins, stacked=True, color=[BLUE, GREY], alpha=0.85)  # fmt: skip
        axes.axvline(0, color=INK, linewidth=0.6, linestyle=":")
        words = f"{(margins_B > 0).mean():.0%} above 0"
        if gamma is not None:
            axes.axvline(gamma, color=ORANGE, linewidth=1.2, linestyle="--")
            words += f", {beyond_B.mean():.0%} beyond gamma"
        when = {0: "before training", total: f"after {total} updates"}.get(update, f"update {update}")
        axes.set_title(f"{when}: mean {margins[update].mean():.3g}, {words}", loc="left", pad=2, fontsize=7.5)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
    labels = "margin M: mean log-prob per token, chosen - rejected (nats)"
    rows[-1].set_xlabel(labels + (f"; dashed: gamma = {_span(list(gammas.values()))}" if gammas else ""))
    return Plot("margins", "margins", figure)


@styled
def length_scatter(longer_B: np.ndarray, margins_B: np.ndarray) -> Plot:
    """Whether answers are preferred for their length: tokens of the chosen answer less those of the rejected one, against the margin."""
    figure, axes = _axes(LARGE)
    step = -(-len(margins_B) // DOTS)
    axes.scatter(longer_B[::step], margins_B[::step], s=9, color=BLUE, alpha=0.55, linewidths=0, rasterized=len(margins_B) > DENSE)  # fmt: skip
    axes.axhline(0, color=INK, linewidth=0.6, linestyle=":")
    axes.axvline(0, color=INK, linewidth=0.6, linestyle=":")
    axes.set(xlabel="scored tokens, chosen - rejected", ylabel="margin M (nats per token)")
    axes.grid()
    return Plot("length", "length and margin", figure)


def spearman(x_B: np.ndarray, y_B: np.ndarray) -> float | None:
    """Spearman's rank correlation, ties by their mean rank; None where one of the two does not vary."""
    ranks_B = [_ranks(values_B) for values_B in (x_B, y_B)]
    if any(len(np.unique(one_B)) < 2 for one_B in ranks_B):
        return None
    return float(np.corrcoef(*ranks_B)[0, 1])


def _ranks(x_B: np.ndarray) -> np.ndarray:
    _, place_B, counts = np.unique(x_B, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place_B]


def _axes(size: tuple[float, float] = SMALL):
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots()


def _span(values: list[float]) -> str:
    first, last = f"{values[0]:.3g}", f"{values[-1]:.3g}"
    return first if first == last else f"{first} to {last}"
