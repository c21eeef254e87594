"""A made-up run's facts, as reports are written of."""

import numpy as np

from repo_jax.report import Facts, Margins, Pair, Split

BEFORE = {"rewards/accuracies": 0.4, "mean_margin": -0.23, "active_fraction": 0.81, "loss": 1.2}
AFTER = {"rewards/accuracies": 0.56, "mean_margin": 0.14, "active_fraction": 0.805, "loss": 0.9}
PAIRED = {"rewards/margins": 0.1, "rewards/accuracies": 0.5, "logps/chosen": -2.0, "logps/rejected": -2.5}
METRICS = [
    {"step": k, "loss": 1 / k, "active_fraction": 0.9 - 0.1 * k, "grad_norm": 2.0, "learning_rate": 1e-3 * k, "pairs_per_second": 9.0}
    | PAIRED
    for k in range(1, 5)
]  # fmt: skip
METRICS[1] |= {"eval_loss": 1.0, "eval_rewards/accuracies": 0.45}


def pair(name, before, after, text="once"):
    return Pair(name, f"Say {text}", f"{text} chosen", f"{text} rejected", (3, 5), before, after)


def margins(**changed):
    rng = np.random.default_rng(0)
    after = {0: rng.normal(-0.2, 1, 40), 2: rng.normal(0, 1, 40), 4: rng.normal(0.3, 1, 40)}
    known = {
        "of": "held-out pairs",
        "after": after,
        "gammas": dict.fromkeys(after, 0.5),
        "longer_B": np.arange(40) - 20,
    }
    pairs = {"worst": [pair("the-worst", 0.1, -2.0)], "best": [pair("the-best", -0.1, 3.0)]}
    return Margins(**known | pairs | changed)


def facts(**changed):
    counts = [("pairs with an empty answer or an empty prompt", 2, "dropped"), ("pairs that were cut to max_length or max_prompt_length", 7, "kept")]  # fmt: skip
    known = {
        "title": "repo (gamma 0.5) on a model",
        "about": ["repo on a model", "training: 3 pairs", "  1 of 4 rows dropped", "held-out: 2 pairs"],
        "total": 4,
        "metrics": METRICS,
        "results": {"pairs": 40, "before": BEFORE, "after": AFTER},
        "margins": margins(),
        "splits": [Split("training", "train.jsonl", 52, 50, "pairs", counts)],
        "recipe": "loss:\n  gamma: 0.5\n",
        "versions": {"jax": "0.10.2", "devices": "8 x TPU v5e"},
        "command": "repo-jax train run/recipe.yaml --output_dir run-again",
    }
    return Facts(**known | changed)
