"""Parameters back to a Hugging Face folder that loads anywhere, verified before it is called done."""

import collections
import contextlib
import functools
import hashlib
import json
import math
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from repo_jax import urls
from repo_jax.card import HEADING, model_card
from repo_jax.checkpoint import NAME, WHOLE, restore_params, written_directly
from repo_jax.config import DataSection, ModelSection, Recipe, StoppedError, dump_recipe, load_recipe
from repo_jax.data.rows import RowShape, row_batches
from repo_jax.data.schema import PairTokens
from repo_jax.distributed import primary, text_from_primary, wait_for_all
from repo_jax.logps import pair_logps
from repo_jax.memory import bytes_per_device, explained
from repo_jax.models.config import DecoderConfig
from repo_jax.models.decoder import Decoder, param_shapes
from repo_jax.models.hf import expected_tensors, from_hf, places_of, stored_dtypes, to_hf
from repo_jax.models.hub import ModelFiles, push
from repo_jax.models.lora import PeftAdapter, adapter_shapes, save_adapter
from repo_jax.models.pretrained import Pretrained, open_model
from repo_jax.models.tensors import fingerprint
from repo_jax.preparation import resolved
from repo_jax.sharding import batch_ways, make_mesh, param_shardings
from repo_jax.step import place
from repo_jax.stores import model_files

TOLERANCE = (
    1e-4  # nats per token by which a reloaded model's mean log-probs may differ from those of the rounded parameters
)
ROUNDING = {"float32": (8, 23), "float16": (5, 10), "bfloat16": (8, 7)}  # bits of exponent and mantissa
SHARD_BYTES = 5 * 10**9  # of a weight file at most
MIXED = (
    "dtypes.json"  # beside config.json in a run's base: the tensors whose dtype is not the one that config.json says
)


def export_model(
    params: dict,
    cfg: DecoderConfig,
    mesh: Mesh,
    *,
    base: pathlib.Path,
    output: pathlib.Path,
    card: str,
    url: str | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    like: np.ndarray | None = None,
) -> float:
    """Writes a Hugging Face folder (weights, config, generation config, tokenizer, model card) and proves that it reads back.

    `base` holds all of that but weights and card (write_base). Tensors get the dtypes of the model that was started from, or all
    of them `dtype`. Everything is written to a temporary folder, reloaded, its log-probs compared, and only then moved to
    `output`, where it replaces an earlier export, and where there is a `url` copied there. Returns the largest difference of a mean
    log-prob, in nats per token: to the rounded parameters, or to `like`, the fingerprint of what they were made from.
    """
    with replacing(output, url) as folder:
        dtypes = _dtypes(base, cfg, dtype)
        if primary() or url:
            shutil.copytree(base, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MIXED))
            if dtype is not None:
                config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"dtype": dtype}
                (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            (folder / "README.md").write_text(card, encoding="utf-8")
        to_hf(params, cfg, folder, dtypes=dtypes, max_shard_bytes=max_shard_bytes)
        exchange(folder, url)
        kept = _held_in(dtypes)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
        reloaded = {"params": from_hf(folder, DecoderConfig.from_hf(folder), shardings, dtype=kept)}
        rounding, model = _rounding(cfg, dtypes), Decoder(cfg, jnp.float32)
        found = probe(reloaded, model, mesh, rounding)
        difference = float(np.abs(found - probe({"params": params}, model, mesh, rounding)).max())
        if not difference <= TOLERANCE:
            raise RuntimeError(
                f"the exported model's log-probs differ by {difference:.2g} nats per token from the trained one's; nothing was written"
            )
    return difference if like is None else float(np.abs(found - like).max())


def export_adapter(
    adapters: dict,
    cfg: DecoderConfig,
    *,
    model: ModelSection,
    base: pathlib.Path,
    output: pathlib.Path,
    card: str,
    url: str | None = None,
) -> None:
    """Writes adapters as a PEFT folder, with the run's tokenizer; whole or not at all, like export_model."""
    with replacing(output, url) as folder:
        weights = ("config.json", "generation_config.json", MIXED)
        if primary():
            shutil.copytree(base, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*weights))
            (folder / "README.md").write_text(card, encoding="utf-8")
        _save_adapter(adapters, cfg, folder, model)


def _save_adapter(adapters: dict, cfg: DecoderConfig, folder: pathlib.Path, model: ModelSection) -> None:
    save_adapter(
        adapters,
        cfg,
        folder,
        r=model.lora_r,
        alpha=model.lora_alpha,
        dropout=model.lora_dropout,
        target_modules=model.lora_target_modules,
        base=model.model_name_or_path,
        revision=model.model_revision,
    )


@contextlib.contextmanager
def shared_folder(parent: pathlib.Path, prefix: str, *, own: bool = False) -> Iterator[pathlib.Path]:
    """A temporary folder in `parent`, the same for all processes, which enter and leave together; process 0 makes and removes it.

    With `own` each has one of its own.
    """
    with contextlib.ExitStack() as stack:
        name = ""
        if own or primary():
            parent.mkdir(parents=True, exist_ok=True)
            for left in parent.iterdir():  # by a run that was killed; nobody else writes here
                if re.fullmatch(re.escape(prefix) + r"[a-z0-9_]{8}", left.name):
                    shutil.rmtree(left, ignore_errors=True)
            name = stack.enter_context(tempfile.TemporaryDirectory(prefix=prefix, dir=parent))
        yield pathlib.Path(name if own else text_from_primary(name))
        wait_for_all("done with a temporary folder")


@contextlib.contextmanager
def replacing(output: pathlib.Path, url: str | None = None) -> Iterator[pathlib.Path]:
    """A temporary folder that takes the place of `output` at the end; an exception leaves everything as it was.

    With a `url` each process has a folder of its own, and process 0 copies its `output` there at last. Raises StoppedError where that fails.
    """
    check_output(output)
    if url is not None:
        check_output(url)
    output = output.absolute()
    with shared_folder(output.parent, f".{output.name}-", own=url is not None) as temporary:
        folder = temporary / "new"
        if primary() or url:
            folder.mkdir()
        wait_for_all("the folder of an export is there")
        yield folder
        wait_for_all("an export is written")
        if primary():
            if output.exists():
                output.rename(temporary / "earlier")
            folder.rename(output)
            if url is not None:
                _publish(output, url)


def _publish(folder: pathlib.Path, url: str) -> None:
    last = "config.json" if (folder / "config.json").is_file() else "adapter_config.json"
    try:
        urls.replace_folder(folder, url, first="README.md", last=last)
    except (OSError, ValueError) as error:
        raise StoppedError(f"{error}; the export is whole in '{folder}': copy it from there, or try again") from None


def exchange(folder: pathlib.Path, url: str | None) -> None:
    """Gives every process, in a folder of its own, what the others have written into theirs: by way of the URL of the export."""
    if url is None or jax.process_count() == 1:
        return
    between = f"{url}.part"
    if primary():
        urls.remove_folder(between)
    wait_for_all("nothing is left of an earlier exchange")
    written = [path.name for pattern in ("*.safetensors*", "adapter_*.json") for path in folder.glob(pattern)]
    urls.upload(folder, between, written)
    wait_for_all("all parts are at the URL")
    urls.download(between, folder, lambda name: not (folder / name).exists())
    wait_for_all("all parts are everywhere")
    if primary():
        urls.remove_folder(between)


def check_output(output: str | pathlib.Path) -> None:
    """Refuses to replace anything but an empty folder or an earlier export, which its model card tells."""
    if urls.is_url(output):
        card = urls.read(f"{output}/README.md") if "README.md" in (there := urls.names(output)) else b""
        if there and HEADING not in card.decode(errors="replace"):
            raise ValueError(f"output '{urls.shown(output)}' exists and is not an export of repo-jax; name a new one")
        return
    if above := [folder for folder in output.absolute().parents if folder.exists() and not folder.is_dir()]:
        raise ValueError(f"output '{output}' lies in '{above[0]}', which is a file; name a new folder")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    card = output / "README.md"
    if not card.is_file() or HEADING not in card.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(f"output '{output}' exists and is not an export of repo-jax; name a new folder")


def write_base(files: ModelFiles, cfg: DecoderConfig, tokenizer, folder: pathlib.Path) -> None:
    """Everything of a model folder but the weights: config, generation config, and the tokenizer with the run's template and
    end token. A run keeps it, so that its checkpoints can be exported when the model they started from is gone."""
    folder.mkdir(parents=True, exist_ok=True)
    source, eos = files.weights, tokenizer.eos_token_id
    dtypes = stored_dtypes(source, cfg)
    [(usual, _)] = collections.Counter(dtypes.values()).most_common(1)
    config = json.loads((source / "config.json").read_text(encoding="utf-8")) | {"eos_token_id": eos, "dtype": usual}
    config.pop("torch_dtype", None)  # transformers 4's name of dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if others := {name: dtype for name, dtype in dtypes.items() if dtype != usual}:
        (folder / MIXED).write_text(json.dumps(others, indent=2) + "\n", encoding="utf-8")
    stored = source / "generation_config.json"
    generation = (
        json.loads(stored.read_text(encoding="utf-8"))
        if stored.is_file()
        else {"bos_token_id": config.get("bos_token_id")}
    )
    ends = generation.get("eos_token_id")
    # A chat model may stop at several tokens; the list is kept if the run's end token is among them.
    generation["eos_token_id"] = ends if isinstance(ends, list) and eos in ends else eos
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    if (source / "README.md").is_file():
        shutil.copyfile(source / "README.md", folder / "README.md")  # says under which licence the model is
    tokenizer.save_pretrained(folder)


def _dtypes(base: pathlib.Path, cfg: DecoderConfig, dtype: str | None) -> dict[str, str]:
    """Hugging Face name -> dtype of every tensor of an export."""
    usual = dtype or json.loads((base / "config.json").read_text(encoding="utf-8"))["dtype"]
    others = json.loads((base / MIXED).read_text(encoding="utf-8")) if (base / MIXED).is_file() and not dtype else {}
    return {name: others.get(name, usual) for name in expected_tensors(cfg)}


def _held_in(dtypes: dict[str, str]) -> str:
    """The dtype to read tensors of these dtypes in: nothing of them is lost."""
    return "bfloat16" if set(dtypes.values()) == {"bfloat16"} else "float32"


def _rounding(cfg: DecoderConfig, dtypes: dict[str, str]) -> tuple:
    """Our path -> the bits that each of its layers keeps in these dtypes, as a tuple of pairs, which jit can tell apart."""
    return tuple(
        (place.path, tuple(ROUNDING[dtypes[place.weight.hf.format(i=i)]] for i in place.layers or [None]))
        for place in places_of(cfg)
    )


def probe(variables: dict, model: Decoder, mesh: Mesh, rounding: tuple = ()) -> np.ndarray:
    """Mean log-probs of a few fixed answers of random tokens: a fingerprint of a model, its parameters rounded first."""
    rng, cfg = np.random.default_rng(0), model.cfg
    length = min(16, cfg.max_positions // 3)
    R = batch_ways(mesh)
    scored = np.ones(length, bool)
    pairs = [
        PairTokens(f"probe {i}", "", *rng.integers(cfg.V, size=(3, length), dtype=np.int32), scored, scored)
        for i in range(R)
    ]
    batch = row_batches(pairs, RowShape(R, 3 * length, 2 * length))[0]
    with jax.set_mesh(mesh):
        means_B2 = _fingerprint(variables, place(batch, mesh), model=model, rounding=rounding)
    return np.asarray(jax.device_get(means_B2))


@functools.partial(jax.jit, static_argnames=("model", "rounding"))
def _fingerprint(variables, batch, *, model: Decoder, rounding: tuple):
    # reduce_precision, for XLA may drop a cast there and back.
    params = flatten_dict(variables["params"], sep="/")
    for path, bits in rounding:
        leaf = params[path]
        if len(set(bits)) == 1:
            params[path] = jax.lax.reduce_precision(leaf, *bits[0])
        else:
            params[path] = jnp.stack([jax.lax.reduce_precision(leaf[i], *kept) for i, kept in enumerate(bits)])
    return pair_logps(model, variables | {"params": unflatten_dict(params, sep="/")}, batch).mean_B2


def card_of(recipe: Recipe, base: pathlib.Path, *, results: dict | None, adapter: bool) -> str:
    """The card of a run's model, or of its adapters."""
    kind = "peft" if adapter else "transformers"
    name = recipe.model.model_name_or_path
    return model_card(dump_recipe(recipe), base=name, results=results, folder=base, library_name=kind)


def push_export(output: pathlib.Path, repo_id: str, *, private: bool | None, revision: str | None) -> str:
    """Pushes an export to the Hub and returns its page; StoppedError where the Hub refuses what hub.check_push let pass."""
    try:
        return push(output, repo_id, private=private, revision=revision, commit_message="Export of repo_jax")
    except OSError as error:
        raise StoppedError(error) from None


def run_of(checkpoint: str) -> tuple[pathlib.Path, pathlib.Path | str]:
    """The run's folder around a checkpoint, and the checkpoint; of a run at a URL what an export needs of it, copied here.

    Raises FileNotFoundError for what is not a checkpoint of a run.
    """
    if urls.is_url(checkpoint):
        return _run_at(checkpoint.rstrip("/"))
    path = pathlib.Path(checkpoint).absolute()
    whole = (path / "default").is_dir() and (path.parent / "base" / "config.json").is_file()
    if not NAME.fullmatch(path.name) or not whole:
        raise FileNotFoundError(
            f"'{checkpoint}' is not a checkpoint-N folder in the folder of a run; give the path of one"
        )
    return path.parent, path


def _run_at(checkpoint: str) -> tuple[pathlib.Path, pathlib.Path | str]:
    url, _, name = checkpoint.rpartition("/")
    place = pathlib.Path(os.path.expanduser(DataSection().cache_dir)) / "runs"
    if not NAME.fullmatch(name) or WHOLE not in urls.names(checkpoint):
        raise FileNotFoundError(
            f"'{urls.shown(checkpoint)}' is not a whole checkpoint-N of a run; give the URL of one, or the path"
        )
    directly = written_directly(checkpoint)
    parts = (
        ["base/", "recipe.yaml", "identity.yaml"] if directly else ["base/", "recipe.yaml", "identity.yaml", f"{name}/"]
    )
    run = urls.fetched(url, place, lambda path: path.startswith(tuple(parts)))
    if not (run / "base" / "config.json").is_file():
        raise FileNotFoundError(
            f"'{urls.shown(url)}' has no base/config.json; give a checkpoint in the folder of a run"
        )
    return run, checkpoint if directly else run / name


def export_merged(
    adapters: dict,
    frozen: dict,
    pretrained: Pretrained,
    mesh: Mesh,
    *,
    model: ModelSection,
    base: pathlib.Path,
    output: pathlib.Path,
    card: str,
    url: str | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> float:
    """export_model for what adapters make of the model below them, which is read again: added in float32 and rounded once.

    `frozen` is used up, to make room. Returns the largest difference of a mean log-prob to that of the adapters as trained: in
    bfloat16, small changes of weights are lost to the rounding.
    """
    cfg, decoder = pretrained.cfg, Decoder(pretrained.cfg, jnp.float32, lora_scale=model.lora_scale)
    like = probe({"params": frozen, "lora": adapters}, decoder, mesh)
    for leaf in jax.tree.leaves(frozen):
        leaf.delete()
    with shared_folder(output.absolute().parent, f".{output.name}-adapter-", own=url is not None) as temporary:
        _save_adapter(adapters, cfg, temporary, model)
        wait_for_all("an adapter is written")
        exchange(temporary, url)
        adapter = PeftAdapter(temporary)
        params = pretrained._replace(adapter=adapter).params(mesh, _held_in(_dtypes(base, cfg, dtype)))
    options = {"url": url, "dtype": dtype, "max_shard_bytes": max_shard_bytes, "like": like}
    return export_model(params, cfg, mesh, base=base, output=output, card=card, **options)


class CheckpointExport(NamedTuple):
    """A checkpoint of any mesh, looked at and not read yet."""

    checkpoint: pathlib.Path | str
    run: pathlib.Path
    recipe: Recipe
    cfg: DecoderConfig
    pretrained: Pretrained | None  # what adapters are merged into; a full checkpoint does not need it


def open_checkpoint(checkpoint: str, *, adapter: bool) -> CheckpointExport:
    """Raises ValueError or FileNotFoundError for what cannot be exported, as a model or as an adapter alone."""
    run, found = run_of(checkpoint)
    recipe = load_recipe(run / "recipe.yaml")
    if adapter and not recipe.model.use_peft:
        raise ValueError(f"'{checkpoint}' is of a run without use_peft, which has no adapter; leave out --adapter")
    pretrained = None
    if recipe.model.use_peft and not adapter:
        pretrained = open_model(model_files(recipe, weights=True))
        before = yaml.safe_load((run / "identity.yaml").read_text(encoding="utf-8"))["base"]["weights"]
        if (now := fingerprint(pretrained.files.weights)) != before:
            raise ValueError(
                f"the weights of '{recipe.model.model_name_or_path}' are not those that '{checkpoint}' was trained over ({now} here, {before} "
                f"there); bring those back, or export with --adapter"
            )
    return CheckpointExport(found, run, recipe, DecoderConfig.from_hf(run / "base"), pretrained)


def export_checkpoint(
    export: CheckpointExport,
    output: str | pathlib.Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> float | None:
    """A checkpoint as a Hugging Face folder; or its adapters, if those were to be opened, as a PEFT folder, which is not compared.

    An `output` that is a URL is written in the cache first, and leaves there once it is copied to the URL. The parameters are spread over as many of this machine's devices as divide the model's width.
    """
    recipe, cfg = export.recipe, export.cfg
    model = resolved(recipe.model, exact=not recipe.model.use_peft)
    ways = math.gcd(cfg.D, jax.device_count())
    mesh = make_mesh(1, ways, 1, devices=jax.devices()[:ways])
    if model.use_peft:
        shapes = adapter_shapes(cfg, model.lora_r, model.lora_target_modules)
    else:
        shapes = param_shapes(cfg, model.param_dtype)
    shardings = param_shardings(shapes, mesh)
    held = {
        "parameters": bytes_per_device(param_shapes(cfg, model.param_dtype), param_shardings(param_shapes(cfg), mesh))
    }
    with explained(mesh, held, lambda: ["a machine with more memory or more devices; the checkpoint stays as it is"]):
        given = export, model, mesh, shapes, shardings
        if not urls.is_url(output):
            return _export_checkpoint(*given, output, None, dtype, max_shard_bytes)
        here = cache_of(output, recipe.data.cache_dir, "exports")
        difference = _export_checkpoint(*given, here, output, dtype, max_shard_bytes)
        shutil.rmtree(here)
        return difference


def cache_of(url: str, cache_dir: str, kind: str) -> pathlib.Path:
    """The folder here for what belongs to a URL; each process of a run has its own, though several may share a disk."""
    key = hashlib.sha256(url.encode()).hexdigest()[:16]
    process = f"-{jax.process_index()}" if jax.process_index() else ""
    return pathlib.Path(os.path.expanduser(cache_dir)) / kind / f"{urls.last_name(url)}-{key}{process}"


def _export_checkpoint(export, model, mesh, shapes, shardings, output, url, dtype, max_shard_bytes) -> float | None:
    recipe, cfg, base = export.recipe, export.cfg, export.run / "base"
    trained = restore_params(export.checkpoint, shapes, shardings)
    only_adapter = model.use_peft and export.pretrained is None
    card = card_of(recipe, base, results=None, adapter=only_adapter)
    options = {"base": base, "output": output, "url": url, "card": card}
    if only_adapter:
        export_adapter(trained, cfg, model=model, **options)
        return None
    options |= {"dtype": dtype, "max_shard_bytes": max_shard_bytes}
    if model.use_peft:
        frozen = export.pretrained.params(mesh, model.param_dtype)
        return export_merged(trained, frozen, export.pretrained, mesh, model=model, **options)
    return export_model(trained, cfg, mesh, **options)
