"""What each measure against wasted work gains, one after another, on the same real pairs in alternating runs, and that none changes the gradient.

python benchmarks/peers/make_inputs.py FOLDER --shape 24m
python benchmarks/ablation.py FOLDER [--pairs 32] [--rounds 3] [--padded_pairs 8] [--remat full] [--bf16] [--output FILE.json]

padded          every answer behind a copy of its prompt in a row of its own; `padded_pairs` pairs at a time, rows as long as the longest
                of these answers, in multiples of 128; the output head on every slot
packed          several pairs share a row of suggested length, still with two copies of each prompt (but for its first token)
shared prompt   a pair's prompt is stored once
scored slots    the output head on scored tokens only: the direct form of an update
two-pass        RePO at several active fractions (of scored tokens, by choice of gamma) beside RePO's direct form
kept            two-pass, with what each layer was given kept from the first pass for the second

What is timed is the whole gradient of one update, its row batches one after another, as training does it; the rows of first passes are
built before. The ideal gain is a ratio of operations, each rung with no padding in its rows (the padded rung: with its own). An operation
counts as often as it is done: a forward pass once, a direct pass 3 + r times (r: what remat computes again), a second pass with kept inputs 3 times, the
head 4 times in a direct pass and 3 times in a second one. Attention counts what is visible, and in all rungs skips what is not.

Gradients are compared with the padded rung's, those of two passes with the direct form's at the same gamma. With --bf16 the slopes of the
log-probs (c) are computed once and the same everywhere; `noise` is then how far bfloat16 is from float32 in the padded rung.

Axis letters: R rows, T token slots, S slots the head is applied to, B pairs; 2 is (chosen, rejected).
"""

import argparse
import datetime
import functools
import json
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from repo_jax.benchmark import about, prepare
from repo_jax.config import load_recipe
from repo_jax.data.batches import batch_indices
from repo_jax.data.rows import Known, RowBatch, RowShape, round_up, row_batches, slots_before, suggest_shapes
from repo_jax.data.schema import PairTokens
from repo_jax.flops import Lengths, lengths_of, visible_keys
from repo_jax.losses import make_loss
from repo_jax.models.config import DecoderConfig
from repo_jax.preparation import Setup, slots_per_device
from repo_jax.sharding import batch_ways
from repo_jax.state import state_shapes, state_shardings
from repo_jax.step import Scorer, Slopes, TrainStep, add_weighted, place, recomputed, take

FRACTIONS = (0.9, 0.6, 0.4, 0.2)
DIRECT = "scored slots, RePO"


class Rung(NamedTuple):
    """A way to the gradient of an update."""

    name: str
    before: str | None  # the rung that it is measured against
    step: TrainStep
    scorer: Scorer
    rows: list[RowBatch]
    operations: float  # that it cannot do without
    gamma: float | None = None  # of RePO
    again: tuple[RowBatch, ...] | None = None  # the rows of a second pass
    keeps: bool = False

    @property
    def form(self) -> str:
        return "direct" if self.again is None else "two_pass"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, help="what benchmarks/peers/make_inputs.py wrote")
    parser.add_argument("--pairs", type=int, default=32, help="of the update")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--padded_pairs", type=int, default=8, help="that the padded rung takes at a time")
    parser.add_argument("--remat", help="left out: the recipe's")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16; else float32")
    parser.add_argument("--output", type=pathlib.Path)
    a = parser.parse_args()
    if a.pairs % a.padded_pairs:
        parser.error(f"--padded_pairs {a.padded_pairs} does not divide --pairs {a.pairs}")
    changes = {"optim.train_batch_size": a.pairs, "model.compute_dtype": "bfloat16" if a.bf16 else "float32"}
    changes |= {"model.remat": a.remat} if a.remat else {}
    setup = prepare(load_recipe(a.folder / "recipe.yaml", changes))
    params = setup.pretrained.params(setup.mesh, setup.recipe.model.param_dtype)
    first = batch_indices(0, pairs=len(setup.train), train_batch_size=a.pairs, seed=setup.recipe.run.seed)
    pairs = [setup.train[i] for i in first]
    rungs = one_answer_rungs(setup, pairs, a.padded_pairs) + two_pass_rungs(setup, params, pairs)
    differences, noise = compared(setup, params, pairs, rungs, same_slopes=a.bf16)
    found = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "pairs": a.pairs,
        "padded_pairs": a.padded_pairs,
        "scored_tokens": sum(pair.scored for pair in pairs),
        "loads": [os.getloadavg()[0]],
        "noise": noise,
        **about(setup),
    }
    seconds = timed(params, pairs, rungs, a.rounds)
    found["loads"].append(os.getloadavg()[0])
    found["rungs"] = [described(rung, rungs, seconds, differences, pairs) for rung in rungs]
    show(found, setup)
    if a.output:
        a.output.write_text(json.dumps(found, indent=1))


# The rungs


def one_answer_rungs(setup: Setup, pairs: list[PairTokens], padded_pairs: int) -> list[Rung]:
    """SimPO's, from padded rows to the package's direct form."""
    step, scorer = stepper(setup, *make_loss("simpo"))
    views, copies = setup.shapes[0].Y > 0, [apart(pair) for pair in pairs]
    padded, shared = padded_rows(pairs, padded_pairs, views=views), row_batches(pairs, setup.shapes)
    packed = row_batches(copies, shapes_apart(setup))
    cfg, remat, once, twice = setup.cfg, setup.recipe.model.remat, lengths_of(pairs), lengths_of(copies)
    slots = {
        "padded": sum(batch.tokens_RT.size for batch in padded),
        "packed": sum(pair.slots for pair in copies),
        "shared prompt": sum(pair.slots for pair in pairs),
    }
    # The head's slots: a shared prompt's last one predicts two tokens.
    work = {
        "padded": forward(cfg, twice, slots["padded"], head=slots["padded"]),
        "packed": forward(cfg, twice, slots["packed"], head=slots["packed"]),
        "shared prompt": forward(cfg, once, slots["shared prompt"], head=slots["shared prompt"] + len(pairs)),
        "scored slots": forward(cfg, once, slots["shared prompt"], head=int(once.scored_B2.sum())),
    }
    rows = [every_slot(padded), every_slot(packed), every_slot(shared), shared]
    before = [None, *work]
    return [Rung(name, before[k], step, scorer, rows[k], direct(work[name], remat)) for k, name in enumerate(work)]


def two_pass_rungs(setup: Setup, params: dict, pairs: list[PairTokens]) -> list[Rung]:
    """RePO's: the direct form, and two passes at each active fraction, without and with kept inputs."""
    step, scorer = stepper(setup, *make_loss("repo"))
    keeping, _ = stepper(setup, *make_loss("repo"), scorer, keeps=True)
    rows, lengths = row_batches(pairs, setup.shapes), lengths_of(pairs)
    margins_B = np.asarray(scorer({"params": params}, rows).mean_margin_B)
    cfg, remat = setup.cfg, setup.recipe.model.remat
    whole = forward(cfg, lengths, sum(pair.slots for pair in pairs), head=int(lengths.scored_B2.sum()))
    rungs = [Rung(DIRECT, "scored slots", step, scorer, rows, direct(whole, remat), gamma=0.0)]
    for fraction in FRACTIONS:
        gamma = gamma_for(fraction, margins_B, lengths.scored_B2.sum(axis=1))
        active_B2 = np.repeat((margins_B < gamma)[:, None], 2, axis=1)
        some = lengths.only(active_B2)
        slots = int(some.prompt_B.sum() + some.branches_B2.sum())
        part = forward(cfg, some, slots, head=int(some.scored_B2.sum()))
        again = tuple(row_batches(pairs, setup.shapes, wanted_B2=active_B2))
        name, first = f"two-pass, {fraction:g}", whole.layers + whole.head
        second, kept = direct(part, remat, head=3), 3 * part.layers + 3 * part.head
        rungs.append(Rung(name, DIRECT, step, scorer, rows, first + second, gamma, again))
        rungs.append(Rung(f"{name}, kept", name, keeping, scorer, rows, first + kept, gamma, again, True))
    return rungs


def stepper(
    setup: Setup, loss, hparams: dict, scorer: Scorer | None = None, *, keeps: bool = False
) -> tuple[TrainStep, Scorer]:
    """Of a loss; the optimizer is never run."""
    optimizer = optax.sgd(0.0)
    shardings = state_shardings(state_shapes(setup.trained_shapes, optimizer), optimizer, setup.mesh)
    scorer = scorer or Scorer(setup.model, loss, hparams, setup.mesh, setup.shapes)
    return TrainStep(scorer, setup.model, loss, optimizer, shardings, mode="direct", keeps=keeps), scorer


def gamma_for(fraction: float, margins_B: np.ndarray, tokens_B: np.ndarray) -> float:
    """Halfway between two margins, so that pairs of about this share of the tokens lie below it."""
    order = np.argsort(margins_B)
    shares = np.cumsum(tokens_B[order]) / tokens_B.sum()
    last = np.abs(shares[:-1] - fraction).argmin()
    return float(margins_B[order[last : last + 2]].mean())


# Their rows


def padded_rows(pairs: list[PairTokens], at_a_time: int, *, views: bool) -> list[RowBatch]:
    """One answer in each row, as long as the longest of those at a time."""
    batches = []
    for start in range(0, len(pairs), at_a_time):
        numbers = range(start, start + at_a_time)
        T = round_up(max(max(pairs[number].wholes) for number in numbers), 128)
        shape, rows = RowShape(1, T, T, T if views else 0), []
        for number in numbers:
            for side in (0, 1):
                alone_B2 = np.zeros((len(pairs), 2), bool)
                alone_B2[number, side] = True
                rows += row_batches(pairs, shape, wanted_B2=alone_B2)
        fields = (
            None if parts[0] is None else np.concatenate(parts)
            for parts in zip(*(row._replace(known=None, starts_B3=None) for row in rows), strict=True)
        )
        filled_B = np.any([row.filled_B for row in rows], axis=0)
        batches.append(RowBatch(*fields)._replace(filled_B=filled_B, known=rows[0].known))
    return batches


def apart(pair: PairTokens) -> PairTokens:
    """The pair as one whose answers share only the first token of their prompt: the rest stands before each."""
    head, rest = pair.prompt[:1], pair.prompt[1:]
    unscored = np.zeros(len(rest), bool)
    answers = (np.concatenate([rest, ids]) for ids in pair.branches)
    masks = (np.concatenate([unscored, mask]) for mask in pair.masks)
    return PairTokens(pair.id, pair.where, head, *answers, *masks, pair.weights)


def shapes_apart(setup: Setup) -> tuple[RowShape, ...]:
    """What the package suggests for all the recipe's pairs when each is apart."""
    store, platform = setup.train, setup.mesh.devices.flat[0].platform
    views_B2 = store.lengths[:, :1] + store.lengths[:, 1:]
    return suggest_shapes(
        views_B2.sum(axis=1) - 1,
        store.scored.sum(axis=1),
        views_B2,
        B=setup.recipe.optim.train_batch_size,
        ways=batch_ways(setup.mesh),
        view_length=setup.shapes[0].Y > 0,
        budget=slots_per_device(platform),
    )


def every_slot(batches: list[RowBatch]) -> list[RowBatch]:
    """The same rows with the head on every slot: where nothing is scored, on a token of a pair more that is not there, because the head
    stops behind the last token of an answer."""

    def sources(batch, row):
        return batch.sources_RS[row, batch.answers_RS[row] < 2 * len(batch.filled_B)]

    twice = max(
        len(s) - len(np.unique(s)) for b in batches for s in (sources(b, row) for row in range(len(b.tokens_RT)))
    )
    done = []
    for batch in batches:
        (R, T), nobody = batch.tokens_RT.shape, 2 * len(batch.filled_B)
        S, more = T + twice, nobody  # the chosen answer of the pair more
        wide = {name: np.zeros((R, S), np.int32) for name in ("targets_RS", "sources_RS")}
        wide["answers_RS"] = np.full((R, S), nobody + 2, np.int32)
        for row in range(R):
            scored = batch.answers_RS[row] < nobody
            for name, array_RS in wide.items():
                array_RS[row, : scored.sum()] = getattr(batch, name)[row, scored]
            others = np.setdiff1d(np.arange(T), sources(batch, row))
            here = slice(scored.sum(), scored.sum() + len(others))
            wide["sources_RS"][row, here], wide["answers_RS"][row, here] = others, more
        done.append(batch._replace(**wide, filled_B=np.append(batch.filled_B, False), known=with_one_more(batch.known)))
    return done


def with_one_more(known: Known | None) -> Known | None:
    """With a pair that is not there; None, in all row batches but the first, stays None."""
    if known is None:
        return None
    return known._replace(lengths_B2=np.concatenate([known.lengths_B2, np.zeros((1, 2), known.lengths_B2.dtype)]))


# Their ideals


class Work(NamedTuple):
    """Operations of one forward pass."""

    layers: float
    head: float


def forward(cfg: DecoderConfig, lengths: Lengths, slots: int, *, head: int) -> Work:
    """Of the layers on so many slots, attention on what these lengths make visible, the head on so many slots."""
    weights = cfg.D * cfg.H * (2 * cfg.N + 2 * cfg.K) + 3 * cfg.D * cfg.F
    keys = sum(visible_keys(lengths, cfg.windows[i % len(cfg.windows)]) for i in range(cfg.L))
    return Work(2.0 * slots * weights * cfg.L + 4.0 * cfg.N * cfg.H * keys, 2.0 * head * cfg.D * cfg.V)


def direct(work: Work, remat: str, *, head: int = 4) -> float:
    """Of forward and backward; `head` is how many products with the head there are."""
    return (3 + recomputed(remat)) * work.layers + head * work.head


# What is measured


def compared(
    setup: Setup, params: dict, pairs: list[PairTokens], rungs: list[Rung], *, same_slopes: bool
) -> tuple[dict[str, float], float | None]:
    """How far each rung's gradient is from that of the padded rung, or of RePO's direct form, as a share of its norm; every
    program is compiled on the way. With `same_slopes` also the noise of the dtype."""
    far = jax.jit(lambda one, other: optax.tree.norm(jax.tree.map(jnp.subtract, one, other)) / optax.tree.norm(other))
    differences, noise, reference, slopes = {}, None, None, None
    for rung in rungs:
        grads, _ = gradient(rung, params, pairs)
        if rung.name == DIRECT:
            del grads
            continue  # the reference depends on gamma
        if rung.before in (None, DIRECT):  # the first of those with the same slopes
            if same_slopes:
                slopes = rung.scorer.weigh(rung.scorer({"params": params}, rung.rows)).slopes
                reference = weighted_grads(rung._replace(again=None), params, pairs, slopes)
            else:
                reference = gradient(rung._replace(again=None), params, pairs)[0]
        if same_slopes:
            if rung.before is None:
                exact = weighted_grads(rung, params, pairs, slopes, dtype=jnp.float32)
                noise = float(far(reference, exact))
                del exact
            grads = weighted_grads(rung, params, pairs, slopes)
        differences[rung.name] = float(far(grads, reference))
    return differences, noise


def gradient(rung: Rung, params: dict, pairs: list[PairTokens]) -> tuple[dict, dict]:
    if rung.gamma is not None:
        old = rung.scorer.hparams["gamma"]
        rung.scorer.hparams["gamma"] = jax.device_put(np.float32(rung.gamma), old.sharding)
    return jax.block_until_ready(rung.step.mean_grads(params, pairs, rows=rung.rows, form=rung.form))


def weighted_grads(rung: Rung, params: dict, pairs: list[PairTokens], slopes: Slopes, *, dtype=None) -> dict:
    """Of the log-likelihood weighted by these slopes, with what the rung computes and keeps."""
    scorer = rung.scorer
    held = scorer.and_keep({"params": params}, rung.rows, 1)[1] if rung.keeps and rung.again else None
    model = scorer.model if dtype is None else scorer.model.clone(dtype=dtype)
    push, pick = jax.jit(functools.partial(add_weighted, model=model), donate_argnums=0), jax.jit(take)
    grads = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.float32), params)
    with jax.set_mesh(scorer.mesh):
        for batch in rung.again or rung.rows:
            kept = None if held is None else pick(held, slots_before(pairs, rung.rows, batch))
            grads = push(grads, params, None, None, place(batch, scorer.mesh), slopes, kept)
    return grads


def timed(params: dict, pairs: list[PairTokens], rungs: list[Rung], rounds: int) -> dict[str, list[float]]:
    """Seconds of each rung's gradient in every round."""
    seconds = {rung.name: [] for rung in rungs}
    for number in range(rounds):
        # The order changes, so that a machine that slows down slows all.
        for rung in rungs[:: -1 if number % 2 else 1]:
            started = time.perf_counter()
            gradient(rung, params, pairs)
            seconds[rung.name].append(time.perf_counter() - started)
    return seconds


def described(rung: Rung, rungs: list[Rung], seconds: dict, differences: dict, pairs: list[PairTokens]) -> dict:
    """What was found about a rung, ready for JSON."""
    batches, own = [*rung.rows, *(rung.again or ())], seconds[rung.name]
    found = {
        "rung": rung.name,
        "seconds": own,
        "slots": sum(batch.tokens_RT.size for batch in batches),
        "empty_slots": sum(int((batch.segments_RT == 0).sum()) for batch in batches),
        "head_slots": sum(batch.targets_RS.size for batch in batches),
        "row_batches": len(batches),
        "operations": rung.operations,
        "gradient_differs": differences.get(rung.name),
    }
    if rung.before is not None:
        before = next(one for one in rungs if one.name == rung.before)
        gains = [slow / fast for slow, fast in zip(seconds[before.name], own, strict=True)]
        found |= {"against": before.name, "gains": gains, "ideal_gain": before.operations / rung.operations}
        found["gain_over_padded"] = statistics.median(a / b for a, b in zip(seconds["padded"], own, strict=True))
    if rung.again is not None:
        active = sum(int((batch.answers_RS < 2 * len(pairs)).sum()) for batch in rung.again)
        found |= {"gamma": rung.gamma, "active_token_fraction": active / sum(pair.scored for pair in pairs)}
    return found


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=pathlib.Path(__file__).parent, capture_output=True, text=True).stdout.strip()


def show(found: dict, setup: Setup) -> None:
    model, device = setup.recipe.model, f"{found['devices']} x {found['device_kind']}"
    print(f"\n{found['date']}  {found['command']}  (commit {found['commit']})")
    print(
        f"{device}, jax {found['versions']['jax']}, {found['parameters']:,} parameters, {model.compute_dtype}, remat {model.remat}, "
        f"attention {setup.model.attention}, {found['pairs']} pairs, load {found['loads'][0]:.1f} to {found['loads'][1]:.1f}"
    )
    print(
        f"{'rung':<20} {'active':>6} {'seconds':>8} {'range':>15} {'gain':>6} {'range':>12} {'ideal':>6} {'over padded':>11} "
        f"{'slots':>7} {'empty':>6} {'head slots':>10} {'gradient differs':>16}"
    )
    for one in found["rungs"]:
        times, gains, differs = one["seconds"], one.get("gains"), one["gradient_differs"]
        gain = f"{statistics.median(gains):6.2f} {f'{min(gains):.2f}-{max(gains):.2f}':>12}" if gains else " " * 19
        ideal = f"{one['ideal_gain']:6.2f} {one['gain_over_padded']:11.2f}" if gains else " " * 18
        active = f"{one['active_token_fraction']:.2f}" if "active_token_fraction" in one else ""
        print(
            f"{one['rung']:<20} {active:>6} {statistics.median(times):8.3f} {f'{min(times):.3f}-{max(times):.3f}':>15} {gain} {ideal} "
            f"{one['slots']:7} {one['empty_slots'] / one['slots']:6.1%} {one['head_slots']:10} "
            f"{'' if differs is None else f'{differs:.1e}':>16}"
        )
    if found["noise"] is not None:
        print(f"noise: bfloat16 is {found['noise']:.1e} of the gradient's norm away from float32")


if __name__ == "__main__":
    main()
