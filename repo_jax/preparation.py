"""Everything that can be wrong with what a user gave, found before the first device computation."""

import dataclasses
import inspect
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from repo_jax.config import DataSection, ModelSection, OptimSection, Recipe, RunSection
from repo_jax.data.batches import steps_per_epoch
from repo_jax.data.chat import load_tokenizer
from repo_jax.data.groups import GROUPS
from repo_jax.data.rows import BUDGET, RowShape, sizes_of, suggest_shapes, too_long
from repo_jax.data.store import TokenStore
from repo_jax.hardware import visible
from repo_jax.logps import is_live
from repo_jax.losses import DEFAULT_LOSS, Loss, make_loss, title_of
from repo_jax.losses.types import PASSED
from repo_jax.models.config import DecoderConfig
from repo_jax.models.decoder import IN_VIEWS, Decoder, param_shapes
from repo_jax.models.hub import check_push
from repo_jax.models.lora import adapter_shapes
from repo_jax.models.pretrained import Pretrained, open_model
from repo_jax.sharding import batch_ways, make_mesh, param_shardings
from repo_jax.step import check_held, needs_two_passes, takes_two_passes
from repo_jax.stores import held_out_store, model_files, tokenizer_of, train_store

# At the published gamma of 0.4 some 13 % of the pairs have reached it after a fifth of a run.
GAMMA_QUANTILE = 0.9


class Setup(NamedTuple):
    """A recipe whose every value has been looked at."""

    recipe: Recipe  # with the loss's defaults and the dtypes that auto stands for filled in
    loss: Loss
    hparams: dict[str, float | str]  # texts choose between forms
    pretrained: Pretrained
    tokenizer: object
    train: TokenStore | None
    held_out: TokenStore | None
    mesh: Mesh
    shapes: tuple[RowShape, ...]  # the largest, which holds every pair, and a few smaller ones
    total_steps: int
    push_to: str | None = None  # ORG/NAME of the Hub
    # What the loss compares with; None: the model that is trained, before it is.
    reference: Pretrained | None = None
    gamma_quantile: float | None = None  # of the first margins, which gamma is to be; None: gamma is given

    @property
    def cfg(self) -> DecoderConfig:
        return self.pretrained.cfg

    @property
    def model(self) -> Decoder:
        return decoder(self.recipe.model, self.cfg, self.mesh)

    @property
    def trained_shapes(self) -> dict:
        """What an update changes: the model's parameters, or adapters over them."""
        model = self.recipe.model
        if model.use_peft:
            return adapter_shapes(self.cfg, model.lora_r, model.lora_target_modules)
        return param_shapes(self.cfg, model.param_dtype)

    @property
    def live_shapes(self) -> dict | None:
        """The reference model where it stays on the devices beside the one that is trained."""
        if not is_live(self.loss) or (self.recipe.model.use_peft and self.reference is None):
            return None  # under adapters the frozen parameters are the reference, unless another is named
        return (self.reference or self.pretrained).shapes(self.mesh, self.recipe.model.param_dtype)

    @property
    def frozen_shapes(self) -> dict | None:
        """What adapters lie over; None where all parameters are trained."""
        model = self.recipe.model
        return self.pretrained.shapes(self.mesh, model.param_dtype) if model.use_peft else None


def in_its_form(recipe: Recipe, name: str, loss: Loss) -> OptimSection:
    """What a recipe says of updates, in the one mode that is left where adapters have dropout or the loss, of this name, takes two passes.

    Raises ValueError where none is left, or where nothing would read what else is set.
    """
    optim, dropout = recipe.optim, recipe.model.lora_dropout
    if dropout:
        if optim.mode == "two_pass":
            raise ValueError(
                f"lora_dropout={dropout:g} would drop other inputs in each pass of mode two_pass; set it to 0, or mode to direct"
            )
        for option in ("two_pass_below", "keep_layer_inputs"):
            if (value := getattr(optim, option)) is not None:
                raise ValueError(
                    f"lora_dropout={dropout:g} leaves only mode direct, so that nothing would read "
                    f"{option}={json.dumps(value)}; leave one of them out"
                )
        if takes_two_passes(loss):
            raise ValueError(
                f"lora_dropout={dropout:g} needs mode direct, but loss '{name}' takes two passes; set it to 0"
            )
        return dataclasses.replace(optim, mode="direct")
    if not takes_two_passes(loss):
        return optim
    if optim.mode == "direct":
        raise ValueError(needs_two_passes(f"loss '{name}'"))
    if optim.two_pass_below is not None:
        raise ValueError(
            f"loss '{name}' takes two passes always, so that nothing would read two_pass_below={optim.two_pass_below:g}; leave it out"
        )
    return dataclasses.replace(optim, mode="two_pass")


def check_vocabulary(tokenizer, cfg: DecoderConfig) -> None:
    """Raises ValueError where the model embeds less than the tokenizer's own tokens.

    Added ones may be missing (<image_soft_token> of Gemma 3 1B, a pad token of one's own): that harms nobody while no text holds them,
    which is for check_used to see.
    """
    largest, added = len(tokenizer), sum(id >= cfg.V for id in tokenizer.added_tokens_decoder)
    if largest - added > cfg.V:
        raise ValueError(
            f"the tokenizer has {largest} tokens but the model embeds {cfg.V}; give the tokenizer that belongs to the model"
        )


def check_used(tokenizer, cfg: DecoderConfig, ids: Iterable[np.ndarray]) -> None:
    """Raises ValueError where data hold a token that the model does not embed; `ids` are looked at only if the tokenizer has any."""
    if len(tokenizer) <= cfg.V:
        return
    used = max((int(part.max()) for part in ids if len(part)), default=0)
    if used >= cfg.V:
        raise ValueError(
            f"the data hold '{tokenizer.convert_ids_to_tokens(used)}', token {used}, but the model embeds {cfg.V} tokens; give the tokenizer "
            "that belongs to the model, or data without it"
        )


def _ids(store: TokenStore) -> Iterator[np.ndarray]:
    for i in range(len(store)):
        pair = store.plain(i)
        yield from (pair.prompt, *pair.branches)


def decoder(model: ModelSection, cfg: DecoderConfig, mesh: Mesh) -> Decoder:
    """The decoder in the form that is fastest on the devices of the mesh."""
    return Decoder(
        cfg,
        jnp.dtype(model.compute_dtype),
        model.remat,
        attention=kernel_of(model, cfg, mesh),
        # Small pieces stay in a CPU's caches (benchmarks/README.md).
        head_chunks=(128, 256) if _platform(mesh) == "cpu" else (1024, 1024),
        lora_scale=model.lora_scale,
        lora_dropout=model.lora_dropout if model.use_peft else 0.0,
    )


def kernel_of(model: ModelSection, cfg: DecoderConfig, mesh: Mesh) -> str:
    """The form of attention that the section asks for, or that is fastest there."""
    platform, name = _platform(mesh), model.attn_implementation
    if name == "auto":
        name = {"tpu": "splash", "cpu": "blocked" if mesh.size == 1 else "dense"}.get(platform, "flash")
    if cfg.labels and name in IN_VIEWS:  # reward models read whole sequences, which have no views
        return "dense"
    return name


def _platform(mesh: Mesh) -> str:
    return mesh.devices.flat[0].platform


def resolved(model: ModelSection, *, exact: bool) -> ModelSection:
    """The section with a folder's whole path and the dtypes that auto stands for on this machine; `exact` where the parameters must hold small changes:
    they are trained, or an adapter is merged into them."""
    compute = compute_dtype(model.compute_dtype, jax.devices()[0])
    kept = "float32" if exact else compute
    return dataclasses.replace(
        model,
        model_name_or_path=_absolute(model.model_name_or_path),
        reference_model_name_or_path=_absolute(model.reference_model_name_or_path),
        compute_dtype=compute,
        param_dtype=kept if model.param_dtype == "auto" else model.param_dtype,
    )


def compute_dtype(name: str, device) -> str:
    """auto is bfloat16 where the hardware multiplies it fast: TPUs, NVIDIA GPUs from Ampere on, AMD's."""
    if name != "auto":
        return name
    capability = getattr(device, "compute_capability", "0")  # "9.0" on NVIDIA, "gfx90a" on AMD
    fast = device.platform == "tpu" or capability.startswith("gfx") or float(capability) >= 8
    return "bfloat16" if fast else "float32"


def keep_programs(folder: str | None) -> None:
    """Has compiled programs kept for the next process, unless jax is told so already. Those for a CPU belong to one kind of processor,
    and home folders are shared."""
    if folder and jax.config.jax_compilation_cache_dir is None and jax.default_backend() != "cpu":
        jax.config.update("jax_compilation_cache_dir", folder)


def set_up(
    recipe: Recipe,
    *,
    training: bool,
    pretrained: Pretrained | None = None,
    loss: Loss | Callable | None = None,
    unweighed: bool = False,
) -> Setup:
    """Loss, model, tokens, rows and mesh of a recipe; for training also how many updates there are.

    `unweighed`: the answers are only scored, so that what the loss wants of the data is not looked at.
    `pretrained` stands in for the model that the recipe names; `loss`, a Loss or a function of PairLogps, for a loss_type.

    Raises ValueError or FileNotFoundError with a message that says what to change.
    """
    if training:
        _check_backend()
    name = title_of(recipe.loss.get("loss_type", DEFAULT_LOSS)) if loss is None else name_of(loss)
    given, quantile = without_auto(recipe.loss)
    # A loss of one's own stands in for the loss_type.
    kept = recipe.loss if loss is None else {key: value for key, value in recipe.loss.items() if key != "loss_type"}
    loss, hparams = make_loss(**given) if loss is None else own_loss(loss, given)
    if quantile is not None:
        _check_auto(name, loss, hparams, training=training)
    push_to = _push_to(recipe.run) if training else None
    pretrained = pretrained or open_model(model_files(recipe, weights=True))
    cfg = pretrained.cfg
    if cfg.labels and (training or cfg.labels > 1):
        kind = "reward model" if cfg.labels == 1 else f"classification model of {cfg.labels} labels"
        raise ValueError(
            f"'{recipe.model.model_name_or_path}' is a {kind}, which gives tokens no probability; give a language model"
        )
    adapts = training and recipe.model.use_peft
    if adapts and pretrained.adapter is not None:
        raise ValueError(
            f"'{recipe.model.model_name_or_path}' is an adapter, and adapters over an adapter are not supported; merge it into its base "
            "with PEFT (merge_and_unload, then save_pretrained) and give that model, or train all parameters (use_peft: false)"
        )
    optim = in_its_form(recipe, name, loss) if training else recipe.optim
    tokenizer = tokenizer_of(recipe)
    check_vocabulary(tokenizer, cfg)
    train = train_store(recipe, tokenizer) if training else None
    held_out = held_out_store(recipe, tokenizer)
    check_used(tokenizer, cfg, (ids for store in (train, held_out) if store is not None for ids in _ids(store)))
    if held_out is None and not training:
        raise ValueError(
            "there is nothing to evaluate on; give --data a file of preference pairs, or in Python eval_dataset"
        )
    if held_out is None and recipe.run.eval_steps is not None:
        raise ValueError(
            f"eval_steps={recipe.run.eval_steps} but there are no held-out pairs; give eval_dataset_name, or leave eval_steps out"
        )
    if not unweighed:
        train, held_out = (
            store and _with_needs(store, name, loss, recipe.data, tokenizer) for store in (train, held_out)
        )
    given = [one for one in (train, held_out) if one is not None]
    reference = _reference(recipe, name, loss, cfg, tokenizer, given, training=training)
    mesh = make_mesh(recipe.mesh.data, recipe.mesh.fsdp, recipe.mesh.tensor)
    param_shardings(param_shapes(cfg), mesh)
    if training and optim.keep_layer_inputs:
        check_held(cfg, mesh)
    if adapts:
        adapter_shapes(cfg, recipe.model.lora_r, recipe.model.lora_target_modules)
    _check_kernel(recipe.model, mesh)
    stores = [store for store in (train, held_out) if store is not None]
    shapes = _row_shapes(recipe, cfg, stores, mesh, sequences=1 + len(loss.groups))
    total_steps = _total_steps(recipe, train) if training else 0
    recipe = dataclasses.replace(
        recipe,
        optim=optim,
        data=_from_anywhere(recipe.data),
        model=resolved(recipe.model, exact=pretrained.adapter is not None or (training and not adapts)),
        loss={"loss_type": name} | hparams | kept | ({} if quantile is None else {"gamma_quantile": quantile}),
    )
    found = loss, hparams, pretrained, tokenizer, train, held_out, mesh, shapes, total_steps, push_to, reference
    return Setup(recipe, *found, quantile)


def without_auto(loss: dict) -> tuple[dict, float | None]:
    """The section without `gamma: auto`, and which quantile of the first margins that stands for; None where gamma is given."""
    given = dict(loss)
    quantile = given.pop("gamma_quantile", None)
    if given.get("gamma") != "auto":
        if quantile is not None:
            raise ValueError(
                f"gamma_quantile={quantile} but gamma is not auto, so that nothing would read it; leave it out"
            )
        return given, None
    del given["gamma"]
    quantile = GAMMA_QUANTILE if quantile is None else quantile
    if isinstance(quantile, bool) or not isinstance(quantile, int | float) or not 0 <= quantile <= 1:
        raise ValueError(f"gamma_quantile={quantile!r} must be a number from 0 to 1")
    return given, float(quantile)


def _check_auto(name: str, loss: Loss, hparams: dict, *, training: bool) -> None:
    if "gamma" not in hparams:
        raise ValueError(f"gamma=auto but loss '{name}' has no hyperparameter 'gamma'; leave it out")
    if loss.reference or loss.layout != "pairs" or not loss.margin_gamma:
        raise ValueError(
            f"gamma=auto is a margin of log-probs per token, and gamma of loss '{name}' is not known to be one alone; give a number, or "
            "where the loss is your own and its gamma is one, Loss(..., margin_gamma=True)"
        )
    if not training:
        raise ValueError("gamma=auto is found out by training; give the number that the run's recipe.yaml has")


def name_of(loss: Loss | Callable) -> str:
    """What a user's own loss is called."""
    fn = loss.fn if isinstance(loss, Loss) else loss
    return getattr(fn, "__name__", type(fn).__name__)


def own_loss(loss: Loss | Callable, given: dict) -> tuple[Loss, dict[str, float | str]]:
    """A user's own loss, and its hyperparameters with those of the recipe."""
    name = name_of(loss)
    loss = loss if isinstance(loss, Loss) else Loss(loss)
    _, *parameters = inspect.signature(loss.fn).parameters.values()  # the first is the pairs
    if open_ended := [one for one in parameters if one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]:
        raise ValueError(
            f"loss '{name}' takes {open_ended[0]}, which does not say what its hyperparameters are; name them in its signature, "
            "or, for what make_loss made, give the recipe's loss section instead"
        )
    accepted = {one.name: one.default for one in parameters if one.name not in PASSED}
    for key, value in accepted.items():
        if value is not inspect.Parameter.empty and not isinstance(value, str | bool | int | float):
            raise ValueError(f"loss '{name}': the default {key}={value!r} must be a number, a text, true or false")
    for key, value in given.items():
        if key == "loss_type":
            continue
        if key not in accepted:
            takes = f"it takes {', '.join(accepted)}" if accepted else "it takes none"
            raise ValueError(f"loss '{name}' has no hyperparameter '{key}'; {takes}")
        if isinstance(accepted[key], str | bool):
            if type(value) is not type(accepted[key]):
                kind = "a text" if isinstance(accepted[key], str) else "true or false"
                raise ValueError(f"loss '{name}': {key}={value!r} must be {kind}")
        elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"loss '{name}': {key}={value!r} must be a number")
    unset = [key for key, value in accepted.items() if value is inspect.Parameter.empty and key not in given]
    if unset:
        raise ValueError(f"loss '{name}' needs {', '.join(unset)}; give recipe.loss.{unset[0]}")
    chosen = accepted | {key: value for key, value in given.items() if key != "loss_type"}
    return loss, {key: value if isinstance(value, str | bool) else float(value) for key, value in chosen.items()}


def _with_needs(store: TokenStore, name: str, loss: Loss, data: DataSection, tokenizer) -> TokenStore:
    """The store serving what the loss needs of the data. Raises ValueError where the data lack it."""
    if "sft" in store.schemas and loss.layout != "chosen":
        raise ValueError(
            f"'{store.name}' has one answer for each prompt and no label (schema sft), but loss '{name}' learns from preferences; "
            "set loss_type to sft, or give preference data"
        )
    if store.unpaired and loss.layout == "pairs":
        raise ValueError(
            f"'{store.name}' is unpaired (prompt, completion, label) but loss '{name}' compares two answers; give pairs"
        )
    if loss.layout == "chosen" and (bad := int((store.lengths[:, 1] == 0).sum())):
        raise ValueError(
            f"{bad} of the {len(store)} rows of '{store.name}' are labelled bad, which loss '{name}' would learn like the others; leave them out"
        )
    for column in loss.columns:
        _check_column(store, column, f"loss '{name}' needs the column '{column}'")
    for k, side in enumerate(("chosen", "rejected")):
        there = store.lengths[:, 1 + k] > 0
        for column in loss.answer_columns if there.any() else ():
            _check_column(store, f"{column}_{side}", f"loss '{name}' needs the column '{column}_{side}'", there)
    if unset := [option for option in loss.data if getattr(data, option) in (None, False)]:
        raise ValueError(f"loss '{name}' needs {unset[0]}, which is not set; set it in the data section")
    if loss.reference:
        _check_own_reference(store, data)
    for group in loss.groups:
        if group not in GROUPS:
            raise ValueError(
                f"loss '{name}' needs '{group}' sequences, which no data brings; there are {', '.join(GROUPS)}"
            )
    columns = *loss.columns, *loss.answer_columns
    return store.serving(columns=columns, groups={group: GROUPS[group](store, tokenizer) for group in loss.groups})


def _check_column(store: TokenStore, column: str, needs: str, there_B: np.ndarray | None = None) -> None:
    """`there_B`: the pairs that must have it; None: all."""
    values = store.columns.get(column)
    if values is None:
        has = f"it has {', '.join(sorted(store.columns))}" if store.columns else "it has no such numbers"
        raise ValueError(f"{needs}, which '{store.name}' does not have ({has}); add it, or choose another loss")
    without = np.flatnonzero(np.isnan(values) if there_B is None else np.isnan(values) & there_B)
    if len(without):
        raise ValueError(
            f"{needs}, which {len(without)} of the {len(values)} pairs of '{store.name}' lack (the first: {store.plain(int(without[0])).id}); "
            "add it there, or leave these rows out"
        )


def own_reference(store: TokenStore) -> tuple[str, ...]:
    """The columns in which the data bring the log-probs of whole answers under a reference model, under TRL's names; () where they do not."""
    names = ("ref_logps",) if store.unpaired else ("ref_chosen_logps", "ref_rejected_logps")
    return names if any(name in store.columns for name in names) else ()


def _check_own_reference(store: TokenStore, data: DataSection) -> None:
    for column in (names := own_reference(store)):
        _check_column(
            store, column, f"log-probs under the reference model want {' and '.join(names)} whole: '{column}'"
        )
    weighted = [name for name in ("use_poet", "ld_alpha", "temporal_decay") if getattr(data, name) not in (None, False)]
    if names and weighted:
        raise ValueError(
            f"'{store.name}' brings {' and '.join(names)}, which are of whole answers, but {weighted[0]} makes tokens count differently; "
            f"remove these columns, or leave {weighted[0]} out"
        )


def _reference(
    recipe: Recipe, name: str, loss: Loss, cfg: DecoderConfig, tokenizer, stores: list[TokenStore], *, training: bool
) -> Pretrained | None:
    """The reference model where it is another than the one that is trained."""
    model, given = recipe.model, recipe.model.reference_model_name_or_path
    if not loss.reference:
        if given is not None:
            raise ValueError(
                f"reference_model_name_or_path='{given}' but loss '{name}' compares with no reference model; leave it out"
            )
        return None
    if given is None:
        # The data's own columns are of the pairs alone.
        of_pairs = not is_live(loss) and not any(pairs.compared for store in stores for pairs in store.groups.values())
        if not training and not (of_pairs and all(map(own_reference, stores))):
            raise ValueError(
                f"loss '{name}' compares '{model.model_name_or_path}' with a reference model; give reference_model_name_or_path, the model it was trained from"
            )
        return None
    like = dataclasses.replace(model, model_name_or_path=given, model_revision=None)
    files = model_files(dataclasses.replace(recipe, model=like), weights=True)
    found, theirs = open_model(files), load_tokenizer(str(files.tokenizer))
    if found.cfg.labels:
        raise ValueError(f"reference_model_name_or_path='{given}' gives tokens no probability; give a language model")
    if is_live(loss) and found.cfg != cfg:
        raise ValueError(
            f"loss '{name}' compares whole distributions, for which reference_model_name_or_path='{given}' must be of the same architecture as '{model.model_name_or_path}'"
        )
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"reference_model_name_or_path='{given}' has other tokens than '{model.model_name_or_path}'; give a model with the same tokenizer"
        )
    return found


def _absolute(name: str | None) -> str | None:
    return str(pathlib.Path(name).absolute()) if name is not None and pathlib.Path(name).exists() else name


def _from_anywhere(data: DataSection) -> DataSection:
    """The section with what is here named so that it is found from another folder, and never taken for a name on the Hub."""
    mixer = data.dataset_mixer and {_absolute(name): share for name, share in data.dataset_mixer.items()}
    names = {name: _absolute(getattr(data, name)) for name in ("dataset_name", "eval_dataset_name")}
    return dataclasses.replace(data, dataset_mixer=mixer, **names)


def _push_to(run: RunSection) -> str | None:
    """Where the model goes in the end, made sure of before the run begins."""
    if not run.push_to_hub:
        if given := [name for name in ("hub_model_id", "hub_revision", "hub_private_repo") if getattr(run, name)]:
            raise ValueError(
                f"{' and '.join(given)} given without push_to_hub: true, so nothing would be pushed; add it"
            )
        return None
    return check_push(run.hub_model_id or pathlib.Path(run.output_dir).absolute().name)


def _check_backend() -> None:
    """Nobody wants to find out after an hour that the accelerator was idle."""
    if jax.default_backend() == "cpu" and "cpu" not in (jax.config.jax_platforms or "") and (found := visible()):
        kind, line = found
        raise ValueError(
            f"this machine has a {kind} but JAX computes on the CPU; install what is missing with: {line}  "
            "(JAX_PLATFORMS=cpu in the environment trains on the CPU all the same)"
        )


def _check_kernel(model: ModelSection, mesh: Mesh) -> None:
    platform, name = _platform(mesh), model.attn_implementation
    needed = {"splash": "tpu", "triton": "gpu"}.get(name, platform)
    if platform != needed:
        raise ValueError(
            f"attn_implementation={name} runs on {needed.upper()}s but the devices are {platform}s; leave it at auto"
        )
    if name == "blocked" and (platform != "cpu" or mesh.size > 1):
        raise ValueError(
            f"attn_implementation={name} is for one CPU device but there are {mesh.size} of {platform}; leave it at auto"
        )
    if model.remat == "offload" and platform == "cpu":
        raise ValueError(
            "remat=offload moves what is kept to the host's memory, where a CPU has it already; choose full"
        )


def _row_shapes(
    recipe: Recipe, cfg: DecoderConfig, stores: list[TokenStore], mesh: Mesh, *, sequences: int
) -> tuple[RowShape, ...]:
    """`sequences` is how many there are for each pair, itself included."""
    # Sequences that bring no lengths are no longer than the pairs.
    stores = stores + [group for store in stores for group in store.groups.values() if hasattr(group, "lengths")]
    data, table = recipe.data, sizes_of(stores)
    shapes = suggest_shapes(
        *table,
        B=recipe.optim.train_batch_size * sequences,
        ways=batch_ways(mesh),
        row_length=data.row_length,
        scored_length=data.scored_length,
        rows_per_device=data.rows_per_device,
        view_length=kernel_of(recipe.model, cfg, mesh) in IN_VIEWS,
        budget=data.slots_per_device or slots_per_device(_platform(mesh)),
    )
    _, T, S, _ = shapes[0]
    for sizes, room in ((table.slots_B, T), (table.scored_B, S)):
        if sizes.max() > room:
            largest = int(sizes.argmax())
            for store in stores:
                if largest < len(store):
                    raise too_long(store[largest], T, S)
                largest -= len(store)
    return shapes


def slots_per_device(platform: str) -> int:
    """As many as keep the matrix units of an accelerator busy, and as few as a CPU's caches want."""
    return 2048 if platform == "cpu" else BUDGET


def _total_steps(recipe: Recipe, train: TokenStore) -> int:
    steps = steps_per_epoch(len(train), recipe.optim.train_batch_size)
    return recipe.optim.max_steps or max(1, round(steps * recipe.optim.num_train_epochs))
