"""Every objective for 20 updates on the quickstart's pairs: does its own value fall, and does the margin follow the labels?

python benchmarks/objectives.py [--only dpo,kto] [--updates 20] [--json benchmarks/results/objectives.json]

Each trains twice from the same small model: on the pairs, and on the pairs with chosen and rejected swapped. Its value over all of these
pairs has to be lower after the first run than before, and the mean margin over them higher after the first and lower after the second.
One that fails so is tried again at a tenth of the learning rate, which is then said: squares of sums of log-probs overshoot. All share the
programs that score and push back. Data columns, which the quickstart's pairs lack, are made up. Ends with 1 where one fails.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from repo_jax.config import load_recipe
from repo_jax.data.schema import PairTokens
from repo_jax.losses import LOSSES, Loss, PairLogps, make_loss
from repo_jax.preparation import Setup, set_up
from repo_jax.reference import with_reference
from repo_jax.state import initial_loss_state, initial_state, state_shapes, state_shardings, variables_of
from repo_jax.step import Scorer, TrainStep

ROOT = pathlib.Path(__file__).parents[1]
SHORT, PAIRS, B = 600, 32, 8  # characters of a row, pairs, and pairs per update
# What a loss may want of the data section, and what it gets.
OPTIONS = {"use_poet": True, "ld_alpha": 0.5, "temporal_decay": 0.98}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="loss types, with commas; default: all")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(LOSSES)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        sweep = Sweep(pathlib.Path(folder), arguments.updates, arguments.learning_rate)
        found = []
        for name in names:
            found.append(sweep(name))
            print(line_of(found[-1]), flush=True)
    wrong = [one["loss_type"] for one in found if not one["right"]]
    told = {
        "updates": arguments.updates,
        "pairs": PAIRS,
        "train_batch_size": B,
        "learning_rate": arguments.learning_rate,
    }
    told |= {"jax": jax.__version__, "seconds": round(time.perf_counter() - began, 1), "objectives": found}
    print(
        f"{len(found)} objectives in {told['seconds']:.0f} s; "
        + (f"wrong: {', '.join(wrong)}" if wrong else "all right")
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    sys.exit(bool(wrong))


def line_of(one: dict) -> str:
    value, margin = one["value"], one["margin"]
    return (
        f"{one['loss_type']:<20} value {value[0]:>10.4f} -> {value[1]:>10.4f}   margin {margin['before']:>8.3f} -> {margin['after']:>8.3f}, "
        f"swapped {margin['swapped']:>8.3f}   rate {one['learning_rate']:.0e} {one['seconds']:>5.1f} s   {'right' if one['right'] else 'WRONG'}"
    )


class Sweep:
    """What all objectives share: the model, the pairs, and the programs."""

    def __init__(self, folder: pathlib.Path, updates: int, learning_rate: float):
        self._folder, self._updates = folder, updates
        rows = (ROOT / "assets" / "preferences" / "train.jsonl").read_text(encoding="utf-8").splitlines()
        short = [row for row in rows if len(row) < SHORT][:PAIRS]
        (folder / "train.jsonl").write_text("\n".join(short) + "\n", encoding="utf-8")
        setup = self.setup(())
        self._params, self._rate = setup.pretrained.params(setup.mesh, "float32"), learning_rate
        optimizer = optax.inject_hyperparams(optax.adam)(
            learning_rate
        )  # a number of the state: one program for all rates
        self._optimizer, shapes = optimizer, state_shapes(setup.trained_shapes, optimizer)
        self._shardings = state_shardings(shapes, optimizer, setup.mesh)
        self._scorer = Scorer(setup.model, *make_loss("repo"), setup.mesh, setup.shapes)
        self._step = TrainStep(
            *(self._scorer, setup.model, self._scorer.loss, optimizer, self._shardings),
            mode="two_pass",
            live={"params": self._params},
            total_steps=updates,
        )

    @functools.cache  # noqa: B019 - lives as long as the process
    def setup(self, options: tuple[str, ...]) -> Setup:
        """The quickstart's recipe with these options of the data section, pairs with all that any loss asks for."""
        given = {"data.dataset_name": str(self._folder / "train.jsonl"), "data.cache_dir": str(self._folder / "cache")}
        given |= {"model.model_name_or_path": str(ROOT / "assets" / "stories260K"), "data.row_length": None}
        given |= {"optim.train_batch_size": B} | {f"data.{name}": OPTIONS[name] for name in options}
        recipe = load_recipe(ROOT / "configs" / "quickstart.yaml", given)
        everything = Loss(lambda pairs: pairs.ratio_margin_B, reference=True, groups=("kl",), layout="answers")
        setup = set_up(dataclasses.replace(recipe, loss={}), training=True, loss=everything)
        return with_reference(setup, say=lambda _: None)

    def pairs(self, loss: Loss, options: tuple[str, ...], *, swapped: bool) -> list[PairTokens]:
        store = self.setup(options).train
        pairs = [store[i] for i in range(len(store))]
        return [given(turned(pair) if swapped else pair, loss, i) for i, pair in enumerate(pairs)]

    def __call__(self, name: str) -> dict:
        found = self.once(name, self._rate)
        return found if found["right"] else self.once(name, self._rate / 10)

    def once(self, name: str, rate: float) -> dict:
        began, (loss, hparams) = time.perf_counter(), make_loss(name)
        options = tuple(loss.data)
        scorer = self._scorer.of(loss, hparams)
        step, every = self._step.of(scorer, "two_pass"), self.pairs(loss, options, swapped=False)
        params, state = self._train(step, loss, every, rate)
        swapped, _ = self._train(step, loss, self.pairs(loss, options, swapped=True), rate)
        scored = [self._scored(scorer, one, every) for one in (self._params, params, swapped)]
        # A running state says what the value is: of both models that of the end.
        values = [float(scorer.weigh(one, state, np.float32(1)).metrics["loss"]) for one in scored[:2]]
        before, after, other = (margin_of(one, loss) for one in scored)
        right = values[1] < values[0] and other < before < after
        return {
            "loss_type": name,
            "hyperparameters": hparams,
            "learning_rate": rate,
            "value": values,
            "margin": {"before": before, "after": after, "swapped": other},
            "seconds": round(time.perf_counter() - began, 1),
            "right": bool(right),
        }

    def _train(self, step: TrainStep, loss: Loss, pairs: list[PairTokens], rate: float) -> tuple[dict, object]:
        everywhere = self._shardings.step
        shardings = self._shardings._replace(loss_state=jax.tree.map(lambda _: everywhere, initial_loss_state(loss)))
        state = initial_state(jax.tree.map(jnp.copy, self._params), self._optimizer, shardings, loss)
        rates = state.opt_state.hyperparams | {"learning_rate": jax.device_put(np.float32(rate), everywhere)}
        state = state._replace(opt_state=state.opt_state._replace(hyperparams=rates))
        rng = np.random.default_rng(0)
        for k in range(self._updates):
            if k * B % PAIRS == 0:
                order = rng.permutation(len(pairs))
            state, _ = step(state, [pairs[i] for i in order[k * B % PAIRS :][:B]])
        return state.params, state.loss_state

    def _scored(self, scorer: Scorer, params: dict, pairs: list[PairTokens]) -> PairLogps:
        return scorer(variables_of(params, None, {"params": self._params}), scorer.rows(pairs))


def margin_of(scored: PairLogps, loss: Loss) -> float:
    """The mean margin in the objective's own terms: of log-ratios where it has a reference, else of log-probs per token."""
    return float((scored.ratio_margin_B if loss.reference else scored.mean_margin_B).mean())


def turned(pair: PairTokens) -> PairTokens:
    """The rejected answer as the chosen one."""
    return pair._replace(
        chosen=pair.rejected,
        rejected=pair.chosen,
        chosen_mask=pair.rejected_mask,
        rejected_mask=pair.chosen_mask,
        weights=pair.weights and pair.weights[::-1],
        reference_2=pair.reference_2[::-1],
    )


def given(pair: PairTokens, loss: Loss, i: int) -> PairTokens:
    """The pair with what the loss asks for, numbers of the data made up."""
    rng = np.random.default_rng(i)
    numbers = {"margin": rng.uniform(0, 0.4), "label_prob": rng.uniform(0.7, 0.95), "weight": rng.uniform(0.5, 1)}
    high, low = rng.uniform(0.6, 0.9), rng.uniform(0.1, 0.4)
    numbers |= {"score_chosen": high, "score_rejected": low}
    # A policy on the way from the reference to one that tells the answers apart.
    previous = tuple(float(x) for x in pair.reference_2 + rng.uniform(0, 1, 2) * [1, -1])
    columns = {name: numbers.get(name, high) for name in loss.columns}
    columns |= {name: previous if name == "previous_logps" else (high, low) for name in loss.answer_columns}
    stand_ins = {
        "rationale": pair._replace(rejected=pair.rejected[:0], rejected_mask=pair.rejected_mask[:0], weights=None)
    }
    groups = {name: pair.groups.get(name) or stand_ins[name] for name in loss.groups}
    if not loss.reference:
        groups = {name: group._replace(reference_2=None) for name, group in groups.items()}
    return pair._replace(columns=columns, groups=groups, reference_2=pair.reference_2 if loss.reference else None)


if __name__ == "__main__":
    main()
