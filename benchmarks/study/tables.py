"""The arithmetic of the study, and its tables. Works on what small-scale-study.json holds; needs no jax.

Axis letters: N seeds, B held-out pairs.
"""

from collections.abc import Callable, Sequence

import numpy as np

START, END = "<!-- tables: written by small_scale_study.py -->", "<!-- end of tables -->"
WINDOWS = 5  # of a run's updates, in the grid of filtered pairs
DRAWS = 4000  # of the bootstrap


def select(runs: Sequence[dict], **wanted) -> list[dict]:
    """The runs with these values, in the order of their seeds."""
    found = [run for run in runs if all(run[name] == value for name, value in wanted.items())]
    return sorted(found, key=lambda run: run["seed"])


def held_out(runs: Sequence[dict], name: str) -> np.ndarray:
    return np.array([run["held_out"][name] for run in runs])


def spread(values: Sequence[float], digits: int = 3) -> str:
    """mean (lowest to highest)"""
    if not len(values):
        return "not run"
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def deviation(values: Sequence[float]) -> str:
    return f"{np.std(values, ddof=1):.3f}" if len(values) > 1 else ""


def ranked_right(runs: Sequence[dict]) -> np.ndarray:
    """right_NB: whether a run of a seed ranks a pair as its label does."""
    return np.array([np.array(run["held_out"]["margins"]) > 0 for run in runs], dtype=float)


def difference(ones: Sequence[dict], others: Sequence[dict], values: Callable = ranked_right) -> dict | None:
    """Mean of `values` of the first less that of the second, seed by seed and pair by pair. The interval is that of a bootstrap over both:
    seeds are drawn anew, and so are held-out pairs. None without a common seed."""
    seeds = sorted({run["seed"] for run in ones} & {run["seed"] for run in others})
    if not seeds:
        return None
    first, second = ([run for run in runs if run["seed"] in seeds] for runs in (ones, others))
    gap_NB = values(select(first)) - values(select(second))
    N, B = gap_NB.shape
    rng = np.random.default_rng(0)
    drawn = [
        gap_NB[np.ix_(rng.integers(N, size=N), rng.integers(B, size=B))].mean() for _ in range(DRAWS if B > 1 else 1)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    by_seed = gap_NB.mean(axis=1)
    same_sign = bool((by_seed > 0).all() or (by_seed < 0).all())
    return {
        "mean": float(gap_NB.mean()),
        "by_seed": by_seed.tolist(),
        "interval": [float(low), float(high)],
        "supported": same_sign and N > 1 and not low <= 0 <= high,
    }


def longer_B(lengths_B2: Sequence[Sequence[int]]) -> np.ndarray:
    """1 where the chosen answer is the longer one, -1 where it is the shorter one."""
    return np.sign(np.array(lengths_B2)[:, 0] - np.array(lengths_B2)[:, 1])


def goes_by_length(runs: Sequence[dict], start: dict) -> np.ndarray:
    """[N]: the share of held-out pairs, those of equal length apart, of which the longer answer is ranked higher."""
    longer = longer_B(start["held_out_lengths"])
    signs = [np.sign(run["held_out"]["margins"]) for run in runs]
    return np.array([(one == longer)[longer != 0].mean() for one in signs])


def grown(runs: Sequence[dict], start: dict) -> np.ndarray:
    """[N]: the share of held-out pairs whose margin is larger than before training."""
    return np.array([np.mean(np.array(run["held_out"]["margins"]) > start["held_out"]["margins"]) for run in runs])


def filtered(runs: Sequence[dict], pairs: int, windows: int = WINDOWS) -> np.ndarray:
    """[windows]: the share of pairs without gradient in each part of training, over all seeds."""
    shares = [1 - np.array(run["active_pairs"]) / pairs for run in runs]
    return np.array(
        [np.mean([part.mean() for part in parts]) for parts in zip(*map(_parts(windows), shares), strict=True)]
    )


def _parts(windows: int) -> Callable:
    return lambda values: np.array_split(values, windows)


def share_below(margins: Sequence[float], gamma: float) -> float:
    return float((np.array(margins) < gamma).mean())


def of_limit(repo: dict, other: dict, apart: dict) -> dict:
    """How far a run ends from RePO's of the same seed; `apart` holds the distances of their parameters."""
    mine, theirs = (np.array(run["held_out"]["margins"]) for run in (repo, other))
    return apart | {
        "loss": other["loss"],
        "seed": other["seed"],
        "margins_apart": float(np.abs(mine - theirs).mean()),
        "same_side": float(((mine > 0) == (theirs > 0)).mean()),
        "correlation": float(np.corrcoef(mine, theirs)[0, 1]) if len(mine) > 1 else 1.0,
    }


def table(heads: Sequence[str], rows: Sequence[Sequence]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines] + [""]


def named(loss: dict) -> str:
    """An objective in words."""
    rest = {name: value for name, value in loss.items() if name != "loss_type"}
    if "gamma_end" in rest:
        rest["gamma"] = f"{rest['gamma']:g} -> {rest.pop('gamma_end'):g}"
    names = {"repo": "RePO", "repo++": "RePO++", "simpo": "SimPO", "dpo": "DPO", "sft": "SFT"}
    words = ", ".join(
        f"{name} {value if isinstance(value, str) else format(value, 'g')}" for name, value in rest.items()
    )
    return names[loss["loss_type"]] + (f" ({words})" if words else "")


def as_markdown(study: dict) -> str:
    """All tables. What was not run is said."""
    lines = [*_models(study)]
    for model in study["plan"]["models"]:
        lines += [*_rates(study, model), *_comparison(study, model)]
    lines += [*_gammas(study), *_grid(study), *_limit(study), *_schedules(study), *_betas(study), *_cost(study)]
    return "\n".join(lines).rstrip() + "\n"


def _models(study: dict) -> list[str]:
    rows = []
    for name, start in study["starts"].items():
        quantiles = np.quantile(start["train_margins"], [0.1, 0.5, 0.9])
        rows.append(
            [
                *(name, f"{start['parameters']:,}", start["vocabulary"], f"{np.mean(start['held_out_lengths']):.0f}"),
                *(f"{start['held_out']['accuracy']:.3f}", f"{start['held_out']['mean_margin']:.3f}"),
                *(f"{np.mean(longer_B(start[name]) > 0):.3f}" for name in ("train_lengths", "held_out_lengths")),
                " / ".join(f"{quantile:.2f}" for quantile in quantiles),
            ]
        )
    heads = ["model", "parameters", "vocabulary", "tokens an answer", "held-out accuracy", "mean margin"]
    heads += ["chosen is the longer one, training", "held out"]
    lines = ["### Before training", "", *table([*heads, "training margins, 10 / 50 / 90 %"], rows)]
    if told := study.get("pretraining"):
        lines += [
            f"The small Llama was pretrained for {told['updates']} updates of {told['tokens_per_update']:,} tokens on {told['documents']:,} documents "
            f"({told['corpus_tokens']:,} tokens; {told['documents_left_out']} documents that begin like a prompt of the pairs were left out): "
            f"{told['held_out_loss']:.3f} nats per token on held-out text.",
            "",
        ]
    return lines


def _rates(study: dict, model: str) -> list[str]:
    plan, rows = study["plan"], []
    for method, loss in plan["methods"][model].items():
        found = [select(study["runs"], model=model, loss=loss, learning_rate=rate, seed=0) for rate in plan["rates"]]
        shown = ((spread(held_out(runs, "accuracy")), spread(held_out(runs, "mean_margin"), 2)) for runs in found)
        cells = [", ".join(dict.fromkeys(pair)) for pair in shown]
        rows.append([method, *cells, taken(plan, model, method)])
    heads = ["", *(f"{rate:g}" for rate in plan["rates"]), "taken"]
    return [f"### Learning rates, {model}", "", "Held-out accuracy and mean margin of seed 0.", "", *table(heads, rows)]


def taken(plan: dict, model: str, method: str) -> str:
    rate = plan["chosen"][model].get(method)
    return "" if rate is None else f"{rate:g}"


def _comparison(study: dict, model: str) -> list[str]:
    plan, rows, gaps = study["plan"], [], []
    start = study["starts"].get(model)
    if start is None:
        return [f"### Comparison, {model}", "", "not run", ""]
    own = {method: of_method(study, model, method) for method in plan["methods"][model]}
    for method, runs in own.items():
        accuracy = held_out(runs, "accuracy")
        rows.append(
            [
                *(
                    named(plan["methods"][model][method]),
                    taken(plan, model, method),
                    len(runs),
                ),
                *(
                    spread(accuracy),
                    deviation(accuracy),
                    spread(grown(runs, start)),
                    spread(held_out(runs, "ratio_accuracy")),
                ),
                spread(goes_by_length(runs, start)),
                *(spread(held_out(runs, name), 2) for name in ("mean_margin", "logp_chosen", "logp_rejected")),
            ]
        )
        if method != "RePO" and (gap := difference(own["RePO"], runs)):
            low, high = gap["interval"]
            by_seed = ", ".join(f"{one:+.3f}" for one in gap["by_seed"])
            gaps.append(
                [
                    *(f"RePO - {method}", f"{gap['mean']:+.3f}", f"{low:+.3f} to {high:+.3f}", by_seed),
                    "yes" if gap["supported"] else "no",
                ]
            )
    before = start["held_out"]
    numbers = [f"{before[name]:.2f}" for name in ("mean_margin", "logp_chosen", "logp_rejected")]
    by_length = spread(goes_by_length([start], start))
    rows.insert(0, ["before training", "", "", f"{before['accuracy']:.3f}", "", "", "", by_length, *numbers])
    heads = ["", "rate", "seeds", "accuracy", "sd", "margin grew", "accuracy by log-ratios", "longer one is higher"]
    heads += ["mean margin", "log-prob chosen", "rejected"]
    lines = [f"### Comparison, {model}", "", *table(heads, rows)]
    return lines + table(["accuracy", "mean", "95 % interval", "seed by seed", "supported"], gaps)


def of_method(study: dict, model: str, method: str) -> list[dict]:
    """The runs of the seeds that are reported, at the rate that was taken."""
    plan = study["plan"]
    loss, rate = plan["methods"][model][method], plan["chosen"][model].get(method)
    return [
        run for run in select(study["runs"], model=model, loss=loss, learning_rate=rate) if run["seed"] in plan["seeds"]
    ]


def of_repo(study: dict, loss: dict) -> list[dict]:
    """The runs of the first model with another loss at RePO's learning rate, those of the reported seeds."""
    plan = study["plan"]
    model = plan["models"][0]
    found = select(study["runs"], model=model, loss=loss, learning_rate=plan["chosen"][model].get("RePO"))
    return [run for run in found if run["seed"] in plan["seeds"]]


def _gammas(study: dict) -> list[str]:
    plan, rows = study["plan"], []
    model = plan["models"][0]
    base = of_repo(study, plan["methods"][model]["RePO"])
    for gamma in plan["gammas"]:
        runs = of_repo(study, {"loss_type": "repo", "gamma": gamma})
        start = study["starts"].get(model)
        below = f"{share_below(start['train_margins'], gamma):.2f}" if start else ""
        gap = difference(runs, base) if runs and runs != base else None
        rows.append(
            [
                *(
                    f"{gamma:g}",
                    below,
                    len(runs),
                    spread(held_out(runs, "accuracy")),
                    deviation(held_out(runs, "accuracy")),
                ),
                *(spread(held_out(runs, "mean_margin"), 2), spread(held_out(runs, "logp_chosen"), 2)),
                f"{gap['mean']:+.3f} ({gap['interval'][0]:+.3f} to {gap['interval'][1]:+.3f})" if gap else "",
            ]
        )
    heads = ["gamma", "training margins below it at first", "seeds", "accuracy", "sd", "mean margin", "log-prob chosen"]
    heads.append("accuracy less that of the compared gamma (95 % interval)")
    return [f"### RePO's gamma, {model}", "", *table(heads, rows)]


def grid_of(study: dict) -> tuple[list[float], np.ndarray]:
    """The gammas that were run, and the share of filtered pairs over gamma and training."""
    plan = study["plan"]
    runs = {gamma: of_repo(study, {"loss_type": "repo", "gamma": gamma}) for gamma in plan["gammas"]}
    there = [gamma for gamma, found in runs.items() if found]
    return there, np.array([filtered(runs[gamma], plan["train_batch_size"]) for gamma in there])


def _grid(study: dict) -> list[str]:
    there, grid = grid_of(study)
    edges = np.array_split(np.arange(1, study["plan"]["updates"] + 1), WINDOWS)
    heads = ["gamma", *(f"updates {part[0]} to {part[-1]}" for part in edges)]
    rows = [[f"{gamma:g}", *(f"{share:.2f}" for share in shares)] for gamma, shares in zip(there, grid, strict=True)]
    return [
        "### Filtered pairs over gamma and training",
        "",
        "Share of an update's pairs without gradient.",
        "",
        *table(heads, rows),
    ]


def _limit(study: dict) -> list[str]:
    rows = []
    losses = []
    for line in study["limit"]:
        if line["loss"] not in losses:
            losses.append(line["loss"])
    for loss in losses:
        lines = [line for line in study["limit"] if line["loss"] == loss]
        name = "RePO, next seed" if loss["loss_type"] == "repo" else named(loss)
        accuracy = held_out(of_repo(study, loss), "accuracy")
        rows.append(
            [
                *(name, len(lines), spread([line["distance"] for line in lines], 2)),
                *(spread([line["cosine"] for line in lines]), spread([line["margins_apart"] for line in lines])),
                *(
                    spread([line["correlation"] for line in lines]),
                    spread([line["same_side"] for line in lines]),
                    spread(accuracy),
                ),
            ]
        )
    heads = [
        "",
        "seeds",
        "distance / way of RePO",
        "cosine",
        "held-out margins apart",
        "correlation",
        "same side of 0",
        "accuracy",
    ]
    return ["### SimPO at large beta against RePO", "", *table(heads, rows)]


def _schedules(study: dict) -> list[str]:
    plan, rows = study["plan"], []
    base = of_repo(study, plan["methods"][plan["models"][0]]["RePO"])
    for loss in plan["schedules"]:
        runs = of_repo(study, loss)
        gap = difference(runs, base) if runs and runs != base else None
        rows.append(
            [
                *(named(loss), len(runs), spread(held_out(runs, "accuracy")), deviation(held_out(runs, "accuracy"))),
                spread(held_out(runs, "mean_margin"), 2),
                f"{gap['mean']:+.3f} ({gap['interval'][0]:+.3f} to {gap['interval'][1]:+.3f})" if gap else "",
                ("yes" if gap["supported"] else "no") if gap else "",
            ]
        )
    heads = [
        "",
        "seeds",
        "accuracy",
        "sd",
        "mean margin",
        "accuracy less that of the compared gamma (95 % interval)",
        "supported",
    ]
    return ["### Schedules of gamma", "", *table(heads, rows)]


def _betas(study: dict) -> list[str]:
    plan, rows = study["plan"], []
    model = plan["models"][0]
    for loss in plan["dpo_betas"]:
        runs = select(study["runs"], model=model, loss=loss, learning_rate=plan["chosen"][model].get("DPO"))
        runs = [run for run in runs if run["seed"] in plan["seeds"]]
        values = [spread(held_out(runs, name)) for name in ("accuracy", "ratio_accuracy")]
        rows.append([named(loss), len(runs), *values, spread(held_out(runs, "mean_margin"), 2)])
    return ["### DPO's beta", "", *table(["", "seeds", "accuracy", "accuracy by log-ratios", "mean margin"], rows)]


def _cost(study: dict) -> list[str]:
    about = study["about"]
    return [
        f"{about['finished']} of {about['planned']} jobs are done; they took {about['cpu_minutes']:.1f} minutes of CPU time in all "
        f"(jax {about['jax']}, {about['workers']} processes of one thread).",
        "",
    ]


def put_in(text: str, tables: str) -> str:
    """The text with the tables between their marks; what stands outside of them is left alone."""
    if START not in text or END not in text:
        return f"{text.rstrip()}\n\n{START}\n\n{tables}\n{END}\n".lstrip()
    head, rest = text.split(START, 1)
    _, tail = rest.split(END, 1)
    return f"{head}{START}\n\n{tables}\n{END}{tail}"
