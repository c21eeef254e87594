"""The recipe: everything a run is told, from YAML and flags into frozen dataclasses, with errors one can act on.

Leaf names are unique across sections, so that `--learning_rate 1e-6` and `--optim.learning_rate 1e-6` say the same.
"""

import dataclasses
import difflib
import json
import os
import pathlib
import re
import sys
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import Field
from pydantic.dataclasses import dataclass

from repo_jax import foreign
from repo_jax.trainers import TRACKERS

# A path as the user writes it; ~ is their home folder.
Path = Annotated[str, pydantic.AfterValidator(os.path.expanduser)]


def _separate(value):
    return [name.strip() for name in value.split(",")] if isinstance(value, str) and "," in value else value


# One or several names: a list, or on the command line also a,b.
Names = Annotated[list[str] | str | None, pydantic.BeforeValidator(_separate)]
STRICT = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False, validate_default=True)


@dataclass(frozen=True, config=STRICT)
class ModelSection:
    model_name_or_path: Path = Field(
        description="folder of a Hugging Face model (config.json, safetensors, tokenizer), a gs:// or s3:// URL of one, or ORG/NAME on the Hub"
    )
    model_revision: str | None = Field(None, description="branch, tag or commit of a Hub model; null: its main branch")
    reference_model_name_or_path: Path | None = Field(
        None,
        description="the reference model of losses that have one; null: the model before training, with adapters the one under them",
    )
    chat_template: str | None = Field(
        None, description="Jinja text or the path of a .jinja file; null: the tokenizer's own"
    )
    eos_token: str | None = Field(None, description="the token that ends an answer; null: the tokenizer's own")
    compute_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="what the model computes in; auto: bfloat16 on TPU and recent GPUs, else float32"
    )
    param_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="what parameters are kept in; auto: float32 where they are trained, else compute_dtype; bfloat16 halves their memory, and their updates are rounded up or down at random to its 8 bits",
    )
    attn_implementation: Literal["auto", "dense", "blocked", "splash", "triton", "flash"] = Field(
        "auto",
        description="the form of attention, all equally exact; auto: splash on TPU, flash on GPU, blocked on one CPU device, else dense; triton: kernels for NVIDIA GPUs",
    )
    remat: Literal["none", "dots", "attention", "full", "offload"] = Field(
        "full",
        description="what the backward pass computes again: nothing (none), all but weight matmuls (dots) or but attention, or all of each layer (full; offload: whose input waits in the host's memory, on TPU and GPU)",
    )
    use_peft: bool = Field(False, description="train low-rank adapters (LoRA, arXiv:2106.09685) over frozen parameters")
    lora_r: int = Field(16, ge=1, description="rank of the adapters")
    lora_alpha: float = Field(32, gt=0, description="adapters count for lora_alpha / lora_r")
    lora_dropout: float = Field(
        0.0, ge=0, lt=1, description="share of the adapters' inputs that is dropped in training; needs mode direct"
    )
    lora_target_modules: Names = Field(
        None,
        description="the modules that get adapters, by Hugging Face's names, or all-linear; null: as PEFT has it for the family, queries and values",
    )

    def __post_init__(self):
        lora = [field for field in dataclasses.fields(self) if field.name.startswith("lora_")]
        given = [field.name for field in lora if getattr(self, field.name) != field.default.default]
        if given and not self.use_peft:
            raise ValueError(f"{', '.join(given)} given without use_peft: true, so there are no adapters; add it")

    @property
    def lora_scale(self) -> float:
        return self.lora_alpha / self.lora_r


@dataclass(frozen=True, config=STRICT)
class DataSection:
    dataset_name: Path | None = Field(
        None,
        description="preference data: a .jsonl, .jsonl.gz, .parquet or .arrow file, a folder of splits, a Hugging Face data set (folder or Hub name), a folder that `repo-jax prepare` wrote, or a gs:// or s3:// URL of a file or folder",
    )
    dataset_mixer: dict[str, float] | None = Field(
        None, description="instead of dataset_name: data sets, and the share of each that is taken, {name: fraction}"
    )
    dataset_config: str | None = Field(None, description="the configuration of a Hugging Face data set")
    eval_dataset_name: Path | None = Field(
        None, description="held-out data, likewise; null: the test split of dataset_name if that has splits"
    )
    dataset_train_split: str = Field(
        "train", description="the split to train on, or a part of it: train[:1000], train[10%:]"
    )
    dataset_test_split: str | None = Field("test", description="the split to evaluate on; null: none")
    schema: Literal["auto", "explicit", "implicit", "hh", "unpaired", "conversations", "sft"] = Field(
        "auto",
        description="what the columns hold: explicit (prompt, chosen, rejected), implicit (the prompt inside both answers), hh (transcripts), unpaired (prompt, completion, label), conversations, sft (messages, or prompt and completion); auto: as the first rows look",
    )
    on_bad_rows: Literal["error", "skip"] = Field(
        "error", description="a row that cannot be read stops the preparation, or is counted and left out"
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="what the chat template is given besides the messages; a row's own go first"
    )
    compat: Literal["none", "official"] = Field(
        "none", description="official: token ids and scored tokens as the code released with SimPO and RePO has them"
    )
    score_header: bool = Field(False, description="whether the assistant header is scored as part of the answer")
    append_eos: Literal["auto", "always", "never"] = Field(
        "auto", description="the end token behind an answer; auto: behind texts; behind messages as the template says"
    )
    truncation: Literal["drop", "keep_end", "keep_start", "official"] | None = Field(
        None,
        description="pairs over max_length or max_prompt_length are dropped, or lose the prompt's beginning (keep_end) or end (keep_start) and then the answers' ends, or are cut as SimPO's and RePO's code does; null: drop, or official with compat: official",
    )
    max_length: int | None = Field(
        None, ge=2, description="tokens of the prompt and the longer answer; null: the model's positions"
    )
    max_prompt_length: int | None = Field(None, ge=1, description="tokens of the prompt; null: no limit of its own")
    use_poet: bool = Field(False, description="cut both answers to the shorter one's length (arXiv:2506.09457)")
    ld_alpha: float | None = Field(
        None, ge=0, le=1, description="what tokens beyond the shorter answer's length count for (LD-DPO); null: 1"
    )
    temporal_decay: float | None = Field(
        None, gt=0, le=1, description="the t-th token of an answer counts for this to the power t (D2PO); null: 1"
    )
    row_length: int | None = Field(
        None,
        ge=3,
        description="token slots of a packed row; null: suggested from the lengths of the pairs and the devices",
    )
    scored_length: int | None = Field(
        None, ge=2, description="scored tokens a row has room for; null: suggested from the data"
    )
    rows_per_device: int | None = Field(
        None, ge=1, description="rows a device takes through the model at a time; null: suggested with row_length"
    )
    slots_per_device: int | None = Field(
        None,
        ge=3,
        description="token slots a device takes at a time, as far as its longest pair allows; null: 8192, on CPU 2048",
    )
    cache_dir: Path = Field("~/.cache/repo_jax", description="where tokenized data sets are kept")

    def __post_init__(self):
        options = self.chat_template_kwargs or {}
        for name in ("tokenize", "conversation", "add_generation_prompt", "continue_final_message", "chat_template"):
            if name in options:
                raise ValueError(f"chat_template_kwargs has '{name}', which is decided here; leave it out")
        try:
            json.dumps(options)
        except TypeError as error:
            raise ValueError(
                f"chat_template_kwargs={options!r}: {error}; give texts, numbers, lists and mappings (quote a date)"
            ) from None
        for one, other in (("dataset_name", "dataset_mixer"), ("ld_alpha", "temporal_decay"), ("use_poet", "ld_alpha")):
            given = getattr(self, one)
            if given is not None and given is not False and getattr(self, other) is not None:
                raise ValueError(f"{one} and {other} are both given; choose one of them")


@dataclass(frozen=True, config=STRICT)
class OptimSection:
    train_batch_size: int = Field(128, ge=1, description="pairs per update, over all devices")
    num_train_epochs: float = Field(1.0, gt=0, description="passes over the pairs")
    max_steps: int | None = Field(None, ge=1, description="updates; null: as num_train_epochs says")
    optim: Literal["adamw", "adafactor", "lion"] = Field(
        "adamw",
        description="adamw; adafactor: nearly no memory of its own; lion: one moment, wants a lower learning rate and adam_beta2 0.99",
    )
    learning_rate: float = Field(1e-6, gt=0, description="peak learning rate")
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="after the warm-up: to 0 by half a cosine, to 0 by a line, or flat"
    )
    warmup_ratio: float = Field(
        0.1, ge=0, le=1, description="share of the updates in which the learning rate rises from 0"
    )
    weight_decay: float = Field(0.0, ge=0, description="times the learning rate, on matrices only")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="adamw: decay of the first moment; lion: its first beta")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="adamw: decay of the second moment; lion: its second beta")
    adam_epsilon: float = Field(1e-8, gt=0, description="adamw: added to the root of the second moment")
    moment_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="what the first moment of adamw and lion is kept in; second moments are float32"
    )
    max_grad_norm: float | None = Field(1.0, gt=0, description="gradients are scaled down to this norm; null: never")
    max_skipped_updates: int = Field(
        3,
        ge=1,
        description="an update whose loss or gradient is not finite changes nothing and is counted; after so many in a row training stops",
    )
    mode: Literal["auto", "direct", "two_pass"] = Field(
        "auto",
        description="direct: one forward and backward for every pair; two_pass: score all, then backward only where the gradient is not 0; auto: the cheaper of these two exact forms, by the share of tokens that was active lately",
    )
    two_pass_below: float | None = Field(
        None,
        ge=0,
        le=1,
        description="mode auto takes two passes below this active share; null: where the arithmetic breaks even",
    )
    keep_layer_inputs: bool | None = Field(
        None,
        description="two passes: scoring keeps what each layer is given, which saves backward a forward pass; null: where that takes at most a quarter of the memory that is free and remat keeps no more anyway",
    )

    def __post_init__(self):
        if self.two_pass_below is not None and self.mode != "auto":
            raise ValueError(f"two_pass_below={self.two_pass_below:g} but mode={self.mode}; leave one of them out")
        if self.keep_layer_inputs is not None and self.mode == "direct":
            raise ValueError(
                f"keep_layer_inputs={str(self.keep_layer_inputs).lower()} but mode=direct, which takes one pass; leave one of them out"
            )
        if self.moment_dtype == "float32":
            return
        if self.optim == "adafactor":
            raise ValueError(
                f"moment_dtype={self.moment_dtype} but adafactor keeps no first moment; leave moment_dtype out"
            )
        name = "adam_beta2" if self.optim == "lion" else "adam_beta1"  # the decay of the moment that is kept
        if 1 - getattr(self, name) < 2**-8:
            raise ValueError(
                f"moment_dtype={self.moment_dtype} but {name}={getattr(self, name):g}: a moment that changes by less than 1/256 "
                f"of itself does not change in bfloat16; lower {name} to at most 0.99, or leave moment_dtype out"
            )


@dataclass(frozen=True, config=STRICT)
class MeshSection:
    data: int = Field(
        1,
        description="ways the rows are split, parameters whole; 1 becomes the number of TPU slices; -1: the devices that are left",
    )
    fsdp: int = Field(-1, description="ways rows and parameters are split; -1: the devices that are left")
    tensor: int = Field(1, description="ways each layer is split; -1: the devices that are left")

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for axis, size in sizes.items():
            if size != -1 and size < 1:
                raise ValueError(f"mesh.{axis}={size}; give a number of devices from 1, or -1 for those that are left")
        if list(sizes.values()).count(-1) > 1:
            raise ValueError(
                f"only one mesh axis may be -1, given {' '.join(f'{a}={s}' for a, s in sizes.items())}; name a number for the others"
            )


@dataclass(frozen=True, config=STRICT)
class RunSection:
    output_dir: Path = Field(
        "runs/repo", description="the run's folder, or a gs:// or s3:// URL: recipe, metrics, checkpoints, report, hf/"
    )
    seed: int = Field(42, ge=0, description="decides the order of the pairs")
    logging_steps: int = Field(1, ge=1, description="updates between lines of metrics.jsonl")
    report_to: Names = Field(
        "none", description=f"where metrics go besides metrics.jsonl: {', '.join(TRACKERS)}, several of them, or none"
    )
    eval_steps: int | None = Field(
        None, ge=1, description="updates between evaluations; null: before and after training only"
    )
    save_steps: int = Field(100, ge=1, description="updates between checkpoints; one more is written at the end")
    profile_steps: str | None = Field(
        None,
        description="first and last update to trace, such as 10-12, into output_dir/profile, for XProf; null: none",
    )
    compile_cache_dir: Path | None = Field(
        "~/.cache/repo_jax/xla",
        description="where programs compiled for a TPU or GPU are kept for the next run; null: nowhere",
    )
    save_total_limit: int = Field(2, ge=1, description="checkpoints kept")
    push_to_hub: bool = Field(False, description="whether the exported model is pushed to the Hugging Face Hub")
    hub_model_id: str | None = Field(
        None, description="ORG/NAME to push to; null: the name of output_dir, under your own account"
    )
    hub_revision: str | None = Field(None, description="branch to push to, made if missing; null: the main branch")
    hub_private_repo: bool | None = Field(
        None, description="whether a new repository is private; null: as its owner has set (public, usually)"
    )

    def __post_init__(self):
        for name in self.trackers:
            if name not in TRACKERS:
                raise ValueError(
                    f"recipe.run.report_to={name!r}; choose one or several of {', '.join(TRACKERS)}, or none"
                )
        first, last = self.traced
        if self.profile_steps is not None and not 1 <= first <= last:
            raise ValueError(
                f"profile_steps={self.profile_steps!r}; give the first and the last update to trace, such as 10-12"
            )

    @property
    def trackers(self) -> tuple[str, ...]:
        """What report_to names, none left out."""
        given = [self.report_to] if isinstance(self.report_to, str) else self.report_to or []
        return tuple(dict.fromkeys(name for name in given if [*given] != ["none"]))

    @property
    def traced(self) -> tuple[int, int]:
        """The first and last update to trace, from 1; (0, 0): none."""
        match = re.fullmatch(r"(\d+)-(\d+)", self.profile_steps or "")
        return (int(match[1]), int(match[2])) if match else (0, 0)


@dataclass(frozen=True, config=STRICT)
class Recipe:
    model: ModelSection
    data: DataSection = DataSection()
    loss: dict[str, Any] = Field(default_factory=dict, description="loss_type and its hyperparameters")
    optim: OptimSection = OptimSection()
    mesh: MeshSection = MeshSection()
    run: RunSection = RunSection()


_RECIPE = pydantic.TypeAdapter(Recipe)


class StoppedError(RuntimeError):
    """What ended work that had begun, in a message that says what to do; nothing finished is lost."""

    code = 1  # the command's exit status


class InterruptedRunError(StoppedError):
    """A run was told to stop and has saved its state; the same command goes on from there."""

    code = 75  # EX_TEMPFAIL of sysexits.h: launchers start the same command again

    def __init__(self, message: str, *, by_hand: bool = False):
        super().__init__(message)
        if by_hand:
            self.code = 130  # as shells have it after Ctrl-C; nobody starts it again


SECTIONS = {field.name: field.type for field in dataclasses.fields(Recipe)}


def leaf_fields() -> dict[str, tuple[str, dataclasses.Field]]:
    """leaf name -> (section, field), for every section but `loss`, whose leaves the loss functions define."""
    return {
        field.name: (section, field)
        for section, kind in SECTIONS.items()
        if section != "loss"
        for field in dataclasses.fields(kind)
    }


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but 1e-6 is a number and a key given twice a mistake."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"'{key}' is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), "-+.0123456789"
)


def read_yaml(text: str):
    """What the text says. Raises ValueError, in one line, for what is not YAML."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def takes_text(field: dataclasses.Field) -> bool:
    """Whether a leaf's value is text, which a flag gives as it stands rather than as YAML."""
    return any(kind in (str, Path) for kind in typing.get_args(field.type) or (field.type,))


def load_recipe(path: str | pathlib.Path | None, overrides: dict[str, Any] | None = None, **of_trainer) -> Recipe:
    """The recipe of a YAML file (or none) with overrides {'section.leaf': value} laid over it.

    `of_trainer`: what read_tree wants to know of another trainer's recipe, if the file is one.

    Raises FileNotFoundError, or ValueError with one line per thing that is wrong.
    """
    return to_recipe(read_tree(path, overrides, **of_trainer))


def read_tree(
    path: str | pathlib.Path | None,
    overrides: dict[str, Any] | None = None,
    *,
    trainer: str | None = None,
    num_processes: int | Callable[[], int] | None = None,
    tell: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """The sections of a YAML file, with overrides laid over it.

    Another trainer's recipe is translated, which `tell` is told (None: stderr). `trainer`: whose it is, where its keys do not say;
    `num_processes`: how many devices it was started on (None: as many as are here).
    """
    overrides, tree, text = overrides or {}, {}, ""
    if path is not None:
        tree, text = read_file(path)
    if foreign.is_foreign(tree, SECTIONS):
        count = _devices_here if num_processes is None else num_processes
        try:
            translated = foreign.translate(tree, overrides=overrides, num_processes=count, trainer=trainer, text=text)
        except ValueError as error:
            raise ValueError("\n".join(f"'{path}': {line}" for line in str(error).splitlines())) from None
        (tell or _tell)(f"'{path}' is {translated}")
        tree = translated.tree
    elif trainer is not None or isinstance(num_processes, int):
        name, value = ("num_processes", num_processes) if trainer is None else ("trainer", trainer)
        raise ValueError(
            f"{name}={value} is for recipes of other trainers, and '{path}' is none of these; leave it out"
        )
    for name, value in overrides.items():
        section, leaf = name.split(".")
        fields = tree.get(section) or {}
        if isinstance(fields, dict):  # what is no section is refused below
            tree[section] = fields | {leaf: value}
    return tree


def read_file(path: str | pathlib.Path) -> tuple[dict[str, Any], str]:
    """What a YAML file holds, and its text."""
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"no recipe at '{path}'; give the path of a YAML file")
    text = pathlib.Path(path).read_text(encoding="utf-8")
    try:
        tree = read_yaml(text) or {}
    except ValueError as error:
        raise ValueError(f"'{path}' is not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"'{path}' holds a {type(tree).__name__}; wanted the sections {', '.join(SECTIONS)}")
    return tree, text


def is_foreign(path: str | pathlib.Path) -> bool:
    """Whether a file is a recipe for another trainer."""
    return foreign.is_foreign(read_file(path)[0], SECTIONS)


def _devices_here() -> int:
    import jax

    return jax.device_count()


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def to_recipe(tree: dict[str, Any]) -> Recipe:
    """A validated Recipe from nested dicts. Raises ValueError with one line per thing that is wrong."""
    sections = {name: {} if section is None else section for name, section in tree.items()}
    if "model" not in sections:
        sections["model"] = {}
    try:
        return _RECIPE.validate_python(sections)
    except pydantic.ValidationError as errors:
        found = errors.errors()
        if any(error["type"] == "unexpected_keyword_argument" for error in found):
            # A misspelt name leaves the right one unset: one mistake, not two.
            found = [error for error in found if not error["type"].startswith("missing")]
        raise ValueError("\n".join(map(_explain, found))) from None


def as_recipe(given: Recipe | str | os.PathLike) -> Recipe:
    """A recipe as it is, or that of a YAML file. Raises TypeError for anything else, and what load_recipe raises."""
    if isinstance(given, Recipe):
        return given
    if isinstance(given, str | os.PathLike):
        return load_recipe(os.path.expanduser(given))
    raise TypeError(
        f"recipe is a {type(given).__name__}; give the path of a YAML file, or a Recipe: repo_jax.load_recipe(path, overrides)"
    )


def recipe_of_model(given: Recipe | str | os.PathLike) -> Recipe:
    """as_recipe, or for a model (a folder, a URL, ORG/NAME) the recipe with that model and every default."""
    if not isinstance(given, str | os.PathLike) or pathlib.Path(given).suffix in (".yaml", ".yml"):
        return as_recipe(given)
    folder = pathlib.Path(os.path.expanduser(given))
    if (folder / "recipe.yaml").is_file() and not (folder / "config.json").is_file():
        raise ValueError(f"'{given}' is the folder of a run; give the model in it: '{folder / 'hf'}'")
    return to_recipe({"model": {"model_name_or_path": os.fspath(given)}})


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every default written out; load_recipe reads it back to the same recipe."""
    return yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, allow_unicode=True)


def _explain(error: dict) -> str:
    path = ".".join(str(part) for part in error["loc"] if not str(part).endswith("Section"))
    name = str(error["loc"][-1]) if error["loc"] else ""
    kind, given = error["type"], error["input"]
    if kind == "unexpected_keyword_argument":
        return _unknown(error["loc"])
    if kind == "missing":
        return f"recipe.{path} is not set; it has no default (--{name} on the command line)"
    if kind == "literal_error":
        return f"recipe.{path}={given!r}; choose one of {error['ctx']['expected'].replace(' or ', ', ')}"
    if kind == "value_error":
        return str(error["ctx"]["error"])
    if kind in ("dataclass_type", "dict_type"):
        return f"recipe.{path}={given!r}; wanted a section, `{name}:` with its fields indented below"
    message = error["msg"].removeprefix("Input should be ")
    return f"recipe.{path}={given!r}; wanted {message}"


def _unknown(loc: tuple) -> str:
    *parents, name = (str(part) for part in loc)
    from repo_jax.losses import LOSSES, OPTIONS, hyperparameters

    of_losses = [
        "loss_type",
        "gamma_quantile",
        *OPTIONS,
        *(key for loss in LOSSES.values() for key in hyperparameters(loss)),
    ]
    leaves = {name: ("loss", None) for name in of_losses} | leaf_fields()
    if not parents:
        home = f"; write it as {leaves[name][0]}.{name}" if name in leaves else _nearest(name, SECTIONS)
        return f"recipe has no section '{name}'{home}"
    section = parents[0]
    if name in leaves:
        return f"recipe.{section} has no field '{name}'; it belongs to recipe.{leaves[name][0]}"
    fields = [field.name for field in dataclasses.fields(SECTIONS[section])]
    return f"recipe.{section} has no field '{name}'{_nearest(name, fields)}"


def _nearest(name: str, names) -> str:
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; it has {', '.join(names)}"
