"""RePO's forms of an update beside SimPO's, on the same updates in turn: direct, two passes, two passes with kept layer inputs.

python benchmarks/peers/make_inputs.py FOLDER --shape 24m
python benchmarks/forms.py FOLDER [--updates 2] [--rounds 1] [--gamma -0.0175] [--remat attention] [--output FILE.json]

What is timed is the whole gradient of an update, its second rows among it, without the optimizer. `--gamma` decides how many of RePO's
tokens are active; parameters stay as they are, so that every form sees the same update. The first round of all, which compiles, does not count.
"""

import argparse
import datetime
import json
import pathlib
import shlex
import statistics
import sys
import time

import jax
from ablation import commit, stepper

from repo_jax.benchmark import about, prepare
from repo_jax.config import load_recipe
from repo_jax.data.batches import batch_indices
from repo_jax.losses import make_loss
from repo_jax.step import TrainStep

SIMPO, KEPT = "SimPO, direct", "RePO, layer inputs kept"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, help="what benchmarks/peers/make_inputs.py wrote")
    parser.add_argument("--updates", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--gamma", type=float, default=-0.0175)
    parser.add_argument("--remat", default="attention")
    parser.add_argument("--output", type=pathlib.Path)
    a = parser.parse_args()
    setup = prepare(load_recipe(a.folder / "recipe.yaml", {"model.remat": a.remat}))
    params = setup.pretrained.params(setup.mesh, setup.recipe.model.param_dtype)
    repo = make_loss("repo", gamma=a.gamma)
    two_pass, scorer = stepper(setup, *repo)
    forms = {
        SIMPO: (stepper(setup, *make_loss("simpo"))[0], "direct"),
        "RePO, two passes": (two_pass, "two_pass"),
        KEPT: (stepper(setup, *repo, scorer, keeps=True)[0], "two_pass"),
    }

    def seconds(step: TrainStep, form: str, pairs) -> tuple[float, float]:
        """And the share of scored tokens that were active."""
        rows, started = step.rows(pairs), time.perf_counter()
        grads, metrics = step.mean_grads(params, pairs, rows=rows, form=form)
        jax.block_until_ready(grads)
        return time.perf_counter() - started, float(metrics["active_token_fraction"])

    B, found = setup.recipe.optim.train_batch_size, []
    for number in range(a.updates):
        indices = batch_indices(number, pairs=len(setup.train), train_batch_size=B, seed=setup.recipe.run.seed)
        pairs, times, active = [setup.train[i] for i in indices], {name: [] for name in forms}, {}
        for turn in range(-1 if number == 0 else 0, a.rounds):
            # The order changes, so that a machine that slows down slows all.
            for name, (step, form) in list(forms.items())[:: -1 if turn % 2 else 1]:
                spent, active[name] = seconds(step, form, pairs)
                times[name] += [spent] if turn >= 0 else []
        ratio = statistics.median(times[SIMPO]) / statistics.median(times[KEPT])
        found.append({"update": number + 1, "active": active[KEPT], "seconds": times, "ratio": ratio})
        shown = ", ".join(f"{name} {statistics.median(spent):.1f} s" for name, spent in times.items())
        print(
            f"update {number + 1}, active {active[KEPT]:.2f}: {shown}; SimPO / RePO with kept inputs {ratio:.2f}",
            flush=True,
        )
    if a.output:
        told = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "commit": commit()}
        told |= {"command": shlex.join(["python", *sys.argv]), **about(setup), "remat": a.remat, "gamma": a.gamma}
        a.output.write_text(json.dumps(told | {"updates": found}, indent=1))


if __name__ == "__main__":
    main()
