"""Log-probs under the reference model: scored once, kept for each token, summed as a run weights its tokens.

They are kept in the cache folder under the name of all that decides about them: weights, data, tokens and dtypes.
"""

import functools
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from repo_jax.data.rows import row_batches
from repo_jax.data.schema import DamagedStoreError, PairTokens
from repo_jax.data.store import Pairs
from repo_jax.distributed import on_all, primary
from repo_jax.logps import is_live, scored_tokens
from repo_jax.models.tensors import fingerprint
from repo_jax.preparation import Setup, decoder, own_reference
from repo_jax.step import place

FORMAT = 1  # raise it when what is kept changes
GROUP = 256  # pairs that are packed together


class Kept(NamedTuple):
    """Log-probs of every scored token of a data set."""

    logps: np.ndarray  # float32, answer after answer
    ends: np.ndarray  # of each answer, chosen and rejected in turn

    def sums(self, i: int, pair: PairTokens) -> np.ndarray:
        """[2], of pair i: each token times what it counts for."""
        found = np.zeros(2, np.float32)
        for side in (0, 1):
            k = 2 * i + side
            tokens = np.asarray(self.logps[self.ends[k - 1] if k else 0 : self.ends[k]], np.float64)
            found[side] = tokens.sum() if pair.weights is None else tokens @ pair.weights[side]
        return found


def with_reference(setup: Setup, params: dict | None = None, *, say: Callable[[str], None] = print) -> Setup:
    """The setup with pairs that bring log-probs under the reference model, where its loss asks for them.

    `params` are the reference model's where they are on the devices already; else they are read if something is missing, and let go.
    Several processes call it together.
    """
    if not setup.loss.reference:
        return setup
    found, missing = {}, {}
    for name in ("train", "held_out"):
        store = getattr(setup, name)
        if store is None:
            continue
        compared = {group: pairs for group, pairs in store.groups.items() if pairs.compared}
        for group, pairs in {None: store, **compared}.items():
            if group is None and (columns := own_reference(store)):
                say(f"{store.name}: log-probs under the reference model are the data's own ({', '.join(columns)})")
                found[name, group] = _from_columns(store, columns)
                continue
            folder = _folder(setup, pairs.key)
            kept = read(folder)
            if on_all(kept is not None):
                found[name, group] = kept.sums
            else:
                missing[name, group] = pairs, folder
    if missing:
        params, score = _params(setup) if params is None else params, scoring(setup)
        for (name, group), (pairs, folder) in missing.items():
            kept = score_tokens(score, {"params": params}, pairs, setup, what=f"{name} pairs")
            write(folder, kept)
            found[name, group] = kept.sums
    served = {}
    for name in {name for name, _ in found}:
        store = getattr(setup, name)
        groups = {
            group: pairs.serving(reference=found[name, group]) if pairs.compared else pairs
            for group, pairs in store.groups.items()
        }
        served[name] = store.serving(reference=found[name, None], groups=groups)
    return setup._replace(**served)


def live_reference(setup: Setup, frozen: dict | None) -> dict | None:
    """The variables of the reference model where its whole distribution is wanted; it stays on the devices to the end."""
    if not is_live(setup.loss):
        return None
    if setup.reference is None and frozen is not None:
        return {"params": frozen}
    return {"params": _params(setup)}


def with_any_reference(setup: Setup) -> Setup:
    """The setup with made-up log-probs in their place: an update takes as long with them."""

    def any_numbers(_, pair: PairTokens) -> np.ndarray:
        return np.float32([-3 * np.count_nonzero(mask) for mask in pair.masks])

    if not setup.loss.reference or setup.train is None:
        return setup
    groups = {name: group.serving(reference=any_numbers) for name, group in setup.train.groups.items()}
    return setup._replace(train=setup.train.serving(reference=any_numbers, groups=groups))


def scoring(setup: Setup) -> Callable:
    """The program of the reference model: (variables, batch) -> logps_RS, on every device."""
    model = decoder(setup.recipe.model, (setup.reference or setup.pretrained).cfg, setup.mesh)
    fn = functools.partial(scored_tokens, model)
    return jax.jit(lambda *args: fn(*args)[0][0], out_shardings=NamedSharding(setup.mesh, P()))


def _params(setup: Setup) -> dict:
    return (setup.reference or setup.pretrained).params(setup.mesh, setup.recipe.model.param_dtype)


def _folder(setup: Setup, key: str) -> pathlib.Path:
    model, files = setup.recipe.model, (setup.reference or setup.pretrained).files
    parts = [
        FORMAT,
        key,
        fingerprint(files.weights),
        fingerprint(files.adapter),
        model.compute_dtype,
        model.param_dtype,
    ]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
    return pathlib.Path(setup.recipe.data.cache_dir) / "reference" / digest


def _from_columns(store: Pairs, columns: tuple[str, ...]) -> Callable[[int, PairTokens], np.ndarray]:
    def sums(i: int, pair: PairTokens) -> np.ndarray:
        values = [store.columns[name][i] for name in columns]
        if len(values) == 1:  # of the one answer that is there
            values = [values[0] if len(ids) else 0.0 for ids in pair.branches]
        return np.float32(values)

    return sums


def score_tokens(score: Callable, variables: dict, pairs: Sequence[PairTokens], setup: Setup, *, what: str) -> Kept:
    """On the devices of the setup's mesh; every process gets all of it."""
    parts, lengths = [], []
    starts = tqdm(
        range(0, len(pairs), GROUP),
        desc=f"reference, {what}",
        unit=f" x {GROUP} pairs",
        disable=None if primary() else True,
    )
    for start in starts:
        group = [pairs[i] for i in range(start, min(start + GROUP, len(pairs)))]
        batches = row_batches(group, setup.shapes, B=GROUP)
        with jax.set_mesh(setup.mesh):
            logps = jax.device_get([score(variables, place(batch, setup.mesh)) for batch in batches])
        answers = np.concatenate([batch.answers_RS.ravel() for batch in batches])
        logps = np.concatenate([logps_RS.ravel() for logps_RS in logps])
        # The tokens of an answer stand in one row, in order.
        order = np.argsort(answers, kind="stable")[: np.count_nonzero(answers < 2 * GROUP)]
        parts.append(np.float32(logps[order]))
        lengths.append(np.bincount(answers[order], minlength=2 * GROUP)[: 2 * len(group)])
    return Kept(np.concatenate(parts), np.cumsum(np.concatenate(lengths)))


def read(folder: pathlib.Path) -> Kept | None:
    """What is kept in a folder; None where there is no such folder."""
    if not folder.is_dir():
        return None
    try:
        kept = Kept(np.load(folder / "logps.npy", mmap_mode="r"), np.load(folder / "ends.npy"))
        whole = len(kept.logps) == kept.ends[-1]
    except (OSError, ValueError, EOFError, IndexError):
        whole = False
    if not whole:
        raise DamagedStoreError(f"'{folder}' is damaged; remove the folder, and it is scored anew")
    return kept


def write(folder: pathlib.Path, kept: Kept) -> None:
    """The folder is whole or not there; of several processes that write it the first wins."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = pathlib.Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        np.save(part / "logps.npy", kept.logps)
        np.save(part / "ends.npy", kept.ends)
        os.rename(part, folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
