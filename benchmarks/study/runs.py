"""One run of the study: a model, an objective, a learning rate and a seed in; held-out margins and the course of training out.

Axis letters: B pairs; 2 is (chosen, rejected).
"""

import dataclasses
import functools
import json
import os
import pathlib
import resource
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from repo_jax.config import OptimSection, load_recipe
from repo_jax.data.batches import batch_indices
from repo_jax.losses import LOSSES, Loss, PairLogps, make_loss
from repo_jax.losses.combine import SCHEDULES
from repo_jax.optimizer import learning_rate
from repo_jax.preparation import set_up
from repo_jax.reference import with_reference
from repo_jax.state import initial_state, state_shapes, state_shardings
from repo_jax.step import Scorer, TrainStep
from study import pretraining

ROOT = pathlib.Path(__file__).parents[2]
STORIES = "stories260K"
B = 8  # pairs per update
ROW = 1024  # slots: an update's pairs take three rows or so


class Size(NamedTuple):
    """How much of everything; the same for all runs of a study."""

    updates: int  # of each run
    train: int  # pairs to train on, of 600
    held_out: int  # pairs held out, of 200
    pretraining: int  # updates of the small model's pretraining


class Run(NamedTuple):
    """What decides about the numbers of one run."""

    model: str
    loss: dict
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        loss = "-".join(f"{key}{value}" if key != "loss_type" else str(value) for key, value in self.loss.items())
        return f"{self.model}_{loss}_lr{self.learning_rate:g}_seed{self.seed}".replace("/", "-")


class Bench:
    """A model and its pairs, with the programs that all runs share."""

    def __init__(self, model: str, cache: pathlib.Path, size: Size):
        given = {"data.dataset_name": str(ROOT / "assets" / "preferences"), "data.cache_dir": str(cache / "data")}
        given |= {"model.remat": "none", "data.row_length": ROW, "data.rows_per_device": 1, "optim.train_batch_size": B}
        if model == STORIES:
            given["model.model_name_or_path"] = str(ROOT / "assets" / STORIES)
        else:
            given["model.model_name_or_path"] = str(pretraining.folder_of(cache, size.pretraining))
            given["model.chat_template"] = pretraining.CHAT_TEMPLATE
        recipe = load_recipe(ROOT / "configs" / "quickstart.yaml", given)
        compared = Loss(lambda pairs: pairs.ratio_margin_B, reference=True)
        setup = set_up(dataclasses.replace(recipe, loss={}), training=True, loss=compared)
        setup = with_reference(setup, say=lambda _: None)
        self._size, self._setup = size, setup
        self._train = [setup.train[i] for i in range(size.train)]
        held_out = [setup.held_out[i] for i in range(size.held_out)]
        self.first = setup.pretrained.params(setup.mesh, "float32")
        self._optimizer = scale_free(size.updates)
        shapes = state_shapes(setup.trained_shapes, self._optimizer)
        self._shardings = state_shardings(shapes, self._optimizer, setup.mesh)
        loss = Loss(one_of_them, reference=True)
        self._scorer = Scorer(setup.model, loss, numbers_of({"loss_type": "repo"}), setup.mesh, setup.shapes)
        self._held_out = self._scorer.rows(held_out)
        self._step = TrainStep(
            *(self._scorer, setup.model, loss, self._optimizer, self._shardings),
            mode="direct",
            total_steps=size.updates,
        )

    def start(self) -> dict:
        """The model before training: its size, its held-out numbers, and its margins of the training pairs."""
        variables = {"params": self.first}
        train, held_out = (
            jax.device_get(self._scorer(variables, rows)) for rows in (self._scorer.rows(self._train), self._held_out)
        )
        return {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(self.first)),
            "vocabulary": self._setup.cfg.V,
            "train_margins": [round(float(margin), 4) for margin in train.mean_margin_B],
            "train_lengths": train.lengths_B2.astype(int).tolist(),
            "held_out_lengths": held_out.lengths_B2.astype(int).tolist(),
            "held_out": of_pairs(held_out),
        }

    def run(self, run: Run) -> tuple[dict, np.ndarray]:
        """The record of a run, and its final parameters end to end."""
        self._scorer.hparams = jax.device_put(numbers_of(run.loss), self._shardings.step)
        state = initial_state(jax.tree.map(jnp.copy, self.first), self._optimizer, self._shardings)
        peak = jax.device_put(np.float32(run.learning_rate), self._shardings.step)
        state = state._replace(opt_state=state.opt_state._replace(hyperparams={"peak": peak}))
        log = []
        for k in range(self._size.updates):
            pairs, rows = self.batch(run.seed, k)
            state, metrics = self._step(state, pairs, rows)
            log.append({name: metrics[name] for name in ("loss", "active_fraction", "grad_norm", *LOGPS)})
        log = jax.device_get(log)
        last, first = flat(state.params), flat(self.first)
        return {
            "active_pairs": [round(float(line["active_fraction"]) * B) for line in log],
            "margin": [round(float(line["logps/chosen"] - line["logps/rejected"]), 4) for line in log],
            "loss_values": [round(float(line["loss"]), 5) for line in log],
            "grad_norm": [float(f"{line['grad_norm']:.4g}") for line in log],
            "moved": float(np.linalg.norm(last - first)),
            "held_out": of_pairs(jax.device_get(self._scorer({"params": state.params}, self._held_out))),
        }, last

    @functools.cache  # noqa: B019 - lives as long as the process
    def batch(self, seed: int, k: int):
        """The pairs of an update and their rows, the same for every objective."""
        order = batch_indices(k, pairs=len(self._train), train_batch_size=B, seed=seed)
        pairs = [self._train[i] for i in order]
        return pairs, self._scorer.rows(pairs)


FORMS = ("repo", "repo++", "simpo", "dpo", "sft")


def one_of_them(pairs: PairLogps, *, form, gamma, gamma_end, beta, progress=0.0) -> jax.Array:
    """The objective that a number says, with hyperparameters that are numbers: one program does for all runs."""
    free = {"gamma": SCHEDULES["linear"](gamma, gamma_end, progress)}
    given = {
        "repo": free,
        "repo++": free | {"beta": beta},
        "simpo": free | {"beta": beta},
        "dpo": {"beta": beta},
        "sft": {},
    }
    branches = [functools.partial(LOSSES[name].fn, pairs, **given[name]) for name in FORMS]
    return jax.lax.switch(form.astype(jnp.int32), branches)


def numbers_of(given: dict) -> dict[str, np.float32]:
    """What one_of_them takes, of a recipe's loss section."""
    _, hparams = make_loss(**given)
    gamma = hparams.get("gamma", 0.0)
    numbers = {"gamma": gamma, "gamma_end": hparams.get("gamma_end", gamma), "beta": hparams.get("beta", 1.0)}
    return {"form": np.float32(FORMS.index(given["loss_type"]))} | {name: np.float32(x) for name, x in numbers.items()}


LOGPS = ("logps/chosen", "logps/rejected")


def scale_free(updates: int) -> optax.GradientTransformation:
    """AdamW without decay and without clipping: the size of the gradient has no part in the update. The peak learning rate is a number of
    the state, so that one program does for all of them; the schedule is the quickstart's."""
    schedule = learning_rate(OptimSection(learning_rate=1.0), updates)

    def build(peak):
        return optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(schedule), optax.scale(-peak))

    return optax.inject_hyperparams(build)(peak=1e-3)


def of_pairs(scored: PairLogps) -> dict:
    """What is kept of scored pairs: margins per token, log-probs per token, and the ranking by log-ratios to the first model."""
    margins_B, mean_B2 = np.asarray(scored.mean_margin_B), np.asarray(scored.mean_B2)
    ratios_B = np.asarray(scored.ratio_margin_B)
    return {
        "accuracy": float((margins_B > 0).mean()),
        "ratio_accuracy": float((ratios_B > 0).mean()),
        "mean_margin": float(margins_B.mean()),
        "logp_chosen": float(mean_B2[:, 0].mean()),
        "logp_rejected": float(mean_B2[:, 1].mean()),
        "margins": [round(float(margin), 4) for margin in margins_B],
    }


def flat(params: dict) -> np.ndarray:
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(params)])


class Worker:
    """A process that does one job after the other, on one thread; what is finished lies in the cache folder."""

    def __init__(self, cache: pathlib.Path, size: Size):
        self._cache, self._size = cache, size

    @functools.cache  # noqa: B019 - lives as long as the process
    def bench(self, model: str) -> Bench:
        return Bench(model, self._cache, self._size)

    def __call__(self, job: str | Run) -> dict:
        path = path_of(self._cache, job)
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
        began, used = time.perf_counter(), cpu_seconds()
        if isinstance(job, Run):
            found, params = self.bench(job.model).run(job)
            np.save(path.with_suffix(".npy"), params)
            found = job._asdict() | found
        elif job == "pretraining":
            found = pretraining.pretrain(self._cache, self._size.pretraining)
        else:
            bench = self.bench(job)
            np.save(path.with_suffix(".npy"), flat(bench.first))
            found = {"model": job} | bench.start()
        found |= {"cpu_s": round(cpu_seconds() - used, 1), "wall_s": round(time.perf_counter() - began, 1)}
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(found), encoding="utf-8")
        part.replace(path)
        return found


def path_of(cache: pathlib.Path, job: str | Run) -> pathlib.Path:
    return cache / f"{job if isinstance(job, str) else job.name}.json"


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
