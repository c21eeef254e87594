"""metrics.jsonl and what people see while a run goes on."""

import functools
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import repo_jax
from repo_jax.config import DataSection
from repo_jax.data.batches import steps_per_epoch
from repo_jax.data.schema import PairTokens
from repo_jax.distributed import primary
from repo_jax.evaluation import Evaluation
from repo_jax.flops import flops_of, lengths_of
from repo_jax.hardware import chip_of, peak_memory
from repo_jax.losses import title_of
from repo_jax.memory import room
from repo_jax.metrics import as_numbers
from repo_jax.models.decoder import param_shapes
from repo_jax.optimizer import learning_rate
from repo_jax.preparation import Setup
from repo_jax.run_folder import read_metrics, write_whole
from repo_jax.terminal import paint, size_words, time_words

# The data options that decide what is scored, and so what a number means.
TOKEN_OPTIONS = (
    *("compat", "score_header", "append_eos", "truncation", "max_length", "max_prompt_length"),
    *("use_poet", "ld_alpha", "temporal_decay", "chat_template_kwargs"),
)


SHOWN = {
    # metric             what people see
    "loss":               "loss",
    "margin":             "margin",  # mean log-prob per token of chosen answers less that of rejected ones
    "rewards/accuracies": "accuracy",
    "active_fraction":    "active",
    "pairs_per_second":   "pairs/s",
    "mfu":                "mfu",
    "eval_loss":          "held-out loss",
    "eval_rewards/accuracies": "held-out accuracy",
}  # fmt: skip


class Compiled(NamedTuple):
    """Programs that XLA has compiled or read from its cache, and how long that took."""

    programs: int
    seconds: float

    def since(self, earlier: "Compiled") -> "Compiled":
        return Compiled(self.programs - earlier.programs, self.seconds - earlier.seconds)

    def __str__(self):
        plural = "" if self.programs == 1 else "s"
        return f"{self.programs} program{plural} in {self.seconds:.1f} s"


@functools.cache
def _durations() -> list[float]:
    """Seconds that each program took, of those this process compiles from the first call on."""
    durations = []

    def listen(event: str, seconds: float, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            durations.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return durations


def compiled() -> Compiled:
    """What this process has compiled since this was first called; two of them tell what came between."""
    durations = _durations()
    return Compiled(len(durations), sum(durations))


class Log:
    """metrics.jsonl, one JSON object per line and each step once, and the progress that people see.

    Stays one update behind, so that the device is never waited for while it has nothing else to do.

    Rates are those of the updates since the last line: of wall time, checkpoints in it, without evaluations and without what XLA
    took to compile. mfu is the share of the chips' published peak that useful operations (flops.py) make up: all pairs scored,
    those pushed back whose gradient is not 0, without padding and without anything computed twice.
    """

    FIRST = 2  # updates in which programs are compiled as a matter of course
    TIMED = 3  # updates after those, from which the time that is left is told
    LINES = 40  # where there is no terminal a whole run says about so many

    def __init__(
        self,
        setup: Setup,
        path: pathlib.Path,
        start: int,
        *,
        began: Compiled | None = None,
        report: Callable[[dict], None] = lambda line: None,
    ):
        """began: compiled() from before what is to be counted, None from now on; report: is given every line that is written."""
        self._report = report
        self._every, self._start, self._total = setup.recipe.run.logging_steps, start, setup.total_steps
        model, self._cfg = setup.recipe.model, setup.cfg
        self._trained = "adapters" if model.use_peft else "all"
        self._chips, self._devices = setup.mesh.size, setup.mesh.local_devices
        chip = chip_of(self._devices[0].device_kind)
        self._peak = chip and chip.peak(model.compute_dtype)
        # All rates now, on the host: a computation here would queue behind the update that runs.
        rates = jax.vmap(learning_rate(setup.recipe.optim, setup.total_steps))(jnp.arange(setup.total_steps))
        self._rates = np.asarray(jax.device_get(rates))
        self._epoch_steps = steps_per_epoch(len(setup.train), setup.recipe.optim.train_batch_size)
        if primary():
            # Lines beyond the checkpoint belong to updates that will be done again.
            kept = [line for line in read_metrics(path) if line["step"] <= start]
            write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(path if primary() else os.devnull, "a", encoding="utf-8")  # noqa: SIM115 - open for as long as the run
        hidden = None if primary() else True
        shape = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        self._bar = tqdm(total=self._total, initial=start, desc="training", bar_format=shape, dynamic_ncols=True, disable=hidden)  # fmt: skip
        self._spacing = -(-(self._total - start) // self.LINES)  # updates between lines that are said
        self._said = {"update": -math.inf, "evaluation": -math.inf}
        self._timed = None  # an update, and when it ended, from which on updates are timed
        self._pending = None  # (step, metrics, flops, ids of its pairs) of an update that may still run
        self._most_skipped, self._skipped = setup.recipe.optim.max_skipped_updates, 0  # in a row
        self._began = compiled() if began is None else began
        self._before = compiled()  # the update that is started next
        self._start_line()

    def update(self, step: int, metrics: dict, pairs: list[PairTokens]) -> None:
        """Takes the metrics of an update just started; writes those of the one before."""
        new = compiled().since(self._before)
        if self._pending is not None:  # it ran meanwhile: no time to take off
            self._compile_clock += new.seconds
        if new.programs and step > self._start + self.FIRST:
            say(f"update {step} compiled {new}")
        self.flush()
        flops = flops_of(self._cfg, lengths_of(pairs), trained=self._trained)
        self._pending = (step, metrics, flops, [pair.id for pair in pairs])
        self._pairs += len(pairs)
        self._tokens += sum(pair.slots for pair in pairs)
        self._bar.update()
        self._before = compiled()

    def evaluated(self, evaluate: Callable[[], Evaluation]) -> Evaluation:
        """Adds an evaluation, which it returns, to the line of the pending update; its time is not counted as training."""
        step, metrics, *others = self._pending
        jax.block_until_ready(metrics)
        started, before = time.perf_counter(), compiled()
        evaluation = evaluate()
        metrics |= as_held_out(evaluation.metrics)
        took, compiling = time.perf_counter() - started, compiled().since(before).seconds
        self._clock += took
        self._compile_clock += compiling
        if self._timed is not None:
            self._timed[1] += took - compiling
        self._pending = (step, metrics, *others)
        return evaluation

    def before_update(self) -> None:
        """On CPU, where running ahead gains nothing, the pending line is written now: its time is then its own."""
        if jax.default_backend() == "cpu":
            self.flush()
        self._before = compiled()

    def flush(self) -> None:
        """Waits for the pending update and writes its line if one is due."""
        if self._pending is None:
            return
        (step, metrics, flops, ids), self._pending = self._pending, None
        metrics = as_numbers(metrics)
        skipped = not math.isfinite(metrics["loss"] + metrics["grad_norm"])
        self._skipped = self._skipped + 1 if skipped else 0
        if skipped:
            evaluated = {name: value for name, value in metrics.items() if name.startswith("eval_")}
            self._write({"step": step, "skipped": "its loss or gradient is not finite", "pairs": ids} | evaluated)
            say(
                f"update {step} has loss {metrics['loss']} and gradient norm {metrics['grad_norm']}: it is skipped; its pairs: {', '.join(ids)}"
            )
            if self._skipped >= self._most_skipped:
                # Raised before a checkpoint that has nothing new.
                raise FloatingPointError(
                    f"{self._skipped} updates in a row, the last of them {step}, had a loss or gradient that is not finite: training has "
                    "diverged and stops; start again with a lower learning_rate and a new output_dir, or look at the pairs named above"
                )
            return
        self._time(step)
        self._updates += 1
        self._flops += flops.forward + flops.backward * metrics.get("active_token_fraction", 1.0)
        if step % self._every and step != self._total and "eval_loss" not in metrics:
            return
        line = {
            "step": step,
            "epoch": round(step / self._epoch_steps, 4),
            "learning_rate": float(self._rates[step - 1]),
        }
        line |= metrics | self._rates_since_last_line()
        self._start_line()
        self._write(line)
        self._show(step, line)

    def _show(self, step: int, line: dict) -> None:
        """What of a line people see: in the bar, or as text where there is none or held-out pairs were scored."""
        if {"logps/chosen", "logps/rejected"} <= line.keys():
            line = line | {"margin": line["logps/chosen"] - line["logps/rejected"]}
        shown = {words: f"{line[name]:.3g}" for name, words in SHOWN.items() if name in line}
        if not self._bar.disable:
            self._bar.set_postfix({words: text for words, text in shown.items() if not words.startswith("held-out")})
        kind = "evaluation" if "eval_loss" in line else "update"
        early = step <= self._start + self.FIRST + self.TIMED
        due = early or step - self._said[kind] >= self._spacing or step == self._total
        if due and (self._bar.disable or kind == "evaluation"):
            self._said[kind] = step
            left = ""
            if self._bar.disable and self._timed is not None and self._timed[0] < step < self._total:
                left = f"  left {time_words(self._seconds_left(step))}"
            say(f"update {step}/{self._total}  " + "  ".join(f"{words} {text}" for words, text in shown.items()) + left)

    def _time(self, step: int) -> None:
        """Tells, once, how long the run will take, when a few updates after those that compile are timed."""
        if self._timed is None and step >= self._start + self.FIRST:
            self._timed = [step, time.perf_counter() - compiled().seconds]
        elif self._timed is not None and step == self._timed[0] + self.TIMED and step < self._total:
            left, seconds = self._total - step, self._seconds_left(step)
            say(f"about {time_words(seconds)} for the {left} updates that are left, {seconds / left:.3g} s each")

    def _seconds_left(self, step: int) -> float:
        since, clock = self._timed
        return (time.perf_counter() - compiled().seconds - clock) / (step - since) * (self._total - step)

    def _write(self, line: dict) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._report(line)

    def _start_line(self) -> None:
        self._clock, self._compile_clock = time.perf_counter(), compiled().seconds
        self._updates, self._pairs, self._tokens, self._flops = 0, 0, 0, 0.0

    def _rates_since_last_line(self) -> dict[str, float]:
        """How fast it goes, and what it has taken so far."""
        elapsed, so_far = time.perf_counter() - self._clock, compiled()
        seconds = elapsed - (so_far.seconds - self._compile_clock)
        seconds = seconds if seconds > 0 else elapsed
        rates = {
            "step_time": seconds / self._updates,
            "pairs_per_second": self._pairs / seconds,
            "tokens_per_second": self._tokens / seconds,
            "tokens_per_second_per_chip": self._tokens / seconds / self._chips,
        }
        if self._peak is not None:
            rates["mfu"] = self._flops / seconds / (self._chips * self._peak)
        total = so_far.since(self._began)
        return rates | peak_memory(self._devices) | {"compilations": total.programs, "compile_seconds": total.seconds}

    @property
    def skipping(self) -> bool:
        """Whether the last update that was looked at was skipped."""
        return self._skipped > 0

    def close(self) -> None:
        self.flush()
        self._bar.close()
        self._file.close()
        say(f"compiled {compiled().since(self._began)}")


def as_held_out(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics under the names that they have in a line of metrics.jsonl where they are of held-out pairs."""
    return {f"eval_{name}": value for name, value in metrics.items()}


def objective_of(setup: Setup) -> str:
    """The objective with its hyperparameters, as in: simpo (beta 2, gamma 0.25)."""
    loss = setup.recipe.loss
    chosen = {name: loss.get(name, value) for name, value in setup.hparams.items()}
    given = ", ".join(
        f"{name} {value if isinstance(value, str) else format(value, 'g')}" for name, value in chosen.items()
    )
    return f"{title_of(loss['loss_type'])} ({given})"


def banner(setup: Setup, held: dict[str, int], kept: dict[str, int]) -> str:
    """What a run begins with: where it runs, what it is, and what it holds on each device (bytes by kind), in two passes beside it."""
    devices = setup.mesh.devices
    limit = room(setup.mesh.local_devices[0])
    kinds = ", ".join(f"{name} {size_words(size)}" for name, size in held.items())
    parameters = sum(leaf.size for leaf in jax.tree.leaves(param_shapes(setup.cfg)))
    return "\n".join(
        [
            paint(
                f"repo_jax {repo_jax.__version__} on {devices.size} x {devices.flat[0].device_kind}", "bold", sys.stdout
            ),
            describe(setup),
            f"{parameters:,} parameters; held on each device: {size_words(sum(held.values()))}"
            + (f" of {size_words(limit)}" if limit else "")
            + f" ({kinds})"
            + "".join(f"; two passes keep {size_words(size)} of {name}" for name, size in kept.items()),
        ]
    )


def describe(setup: Setup) -> str:
    """What a run is, in a few lines."""
    recipe = setup.recipe
    lines = [f"{objective_of(setup)} on {recipe.model.model_name_or_path}, in {recipe.model.compute_dtype}"]
    if setup.loss.reference:
        lines.append(
            f"compared with {recipe.model.reference_model_name_or_path or recipe.model.model_name_or_path + ' as it is'}"
        )
    if recipe.model.use_peft:
        trained, whole = (
            sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (setup.trained_shapes, param_shapes(setup.cfg))
        )
        lines.append(
            f"adapters: rank {recipe.model.lora_r}, alpha {recipe.model.lora_alpha:g}; {trained:,} parameters are trained over {whole:,}"
        )
    for name, store in (("training", setup.train), ("held-out", setup.held_out)):
        if store is not None:
            kind = "rows" if store.unpaired else "pairs"
            lines.append(f"{name}: {len(store)} {kind} of {store.name} ({store.schema})")
            lines += [f"  {line}" for line in store.counts()]
    data, usual = recipe.data, DataSection()
    options = [f"{name} {getattr(data, name)}" for name in TOKEN_OPTIONS if getattr(data, name) != getattr(usual, name)]
    if options:
        lines.append(f"tokens: {', '.join(options)}")
    shapes = " or ".join(f"{R} x {T} slots ({S} scored)" for R, T, S, _ in setup.shapes)
    mesh = " x ".join(f"{axis} {size}" for axis, size in setup.mesh.shape.items())
    lines.append(
        f"{setup.total_steps} updates of {recipe.optim.train_batch_size} pairs, mode {recipe.optim.mode}, in rows of {shapes} at a time, on {mesh}"
    )
    return "\n".join(lines)


def say(text: str) -> None:
    """A line for whoever watches, above a progress bar if there is one; of several processes the first one speaks."""
    if primary():
        lines = (
            paint(one, "yellow", sys.stdout) if one.lstrip().startswith("warning:") else one for one in text.split("\n")
        )
        tqdm.write("\n".join(lines), file=sys.stdout)
        sys.stdout.flush()
