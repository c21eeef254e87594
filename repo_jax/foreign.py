"""Recipes of other trainers, run as they are: TRL's scripts, alignment-handbook, SimPO's and RePO's training_configs.

Such a file is flat, without our sections. Each of its keys is taken over, said to be unneeded, or refused; what it leaves to the
defaults of the trainer it was written for is taken from there, not from ours.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import yaml

# What the code released with SimPO and RePO gives any model with "mistral" in its name, whatever the tokenizer has.
MISTRAL_TEMPLATE = """\
{%- set lead = namespace(text='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{%- set lead.text = message['content'] | trim + '\\n\\n' -%}
{%- elif message['role'] == 'user' -%}
{{ '[INST] ' + (lead.text + message['content']) | trim + ' [/INST]' }}{%- set lead.text = '' -%}
{%- else -%}
{{ ' ' + message['content'] | trim + ' ' + eos_token }}
{%- endif -%}
{%- endfor -%}"""

# Defaults, under the trainers' own names. transformers.TrainingArguments:
HUGGING_FACE = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 3.0,
    "max_steps": -1,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "warmup_ratio": 0.0,
    "optim": "adamw_torch",
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "seed": 42,
    "logging_steps": 500,
    "save_steps": 500,
    "eval_strategy": "no",
    "dataset_train_split": "train",
    "dataset_test_split": "test",
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
}
# TRL 1.16's own, which all its preference trainers share (tests/test_foreign.py reads them there).
TRL = HUGGING_FACE | {
    "optim": "adamw_torch_fused",
    "learning_rate": 1e-6,
    "logging_steps": 10,
    "gradient_checkpointing": True,
    "max_length": 1024,
}
# Those of 2024, from which alignment-handbook, SimPO and RePO were made: lengths that are not given become these.
OF_2024 = HUGGING_FACE | {"max_length": 512, "max_prompt_length": 128}
PREFERENCE = {"beta": 0.1, "label_smoothing": 0.0, "loss_type": "sigmoid"}


class Trainer(NamedTuple):
    """Something that others write recipes for."""

    title: str
    defaults: dict[str, Any]
    own: tuple[str, ...]  # keys that only some trainers have, this one among them
    telling: tuple[str, ...]  # keys that no other has
    losses: tuple[str, ...]  # values of loss_type that no other has
    loss: Callable[["_Sheet"], None]
    official: bool = False  # tokens as SimPO's and RePO's code has them


class Translation(NamedTuple):
    """Another trainer's recipe as ours."""

    trainer: Trainer
    tree: dict[str, dict[str, Any]]  # sections
    lines: list[str]  # what became of each key

    def __str__(self):
        return "\n".join([f"a recipe for {self.trainer.title}, translated:", *(f"  {line}" for line in self.lines)])


def _of_2024(trainer: Trainer) -> Trainer:
    """alignment-handbook with dataset_mixer, whose tokens SimPO's code took over from the TRL of then."""
    optim = {"optim": "rmsprop"} if trainer.loss is _dpo else {}
    official = trainer.loss is not _sft
    lengths = OF_2024 if official else HUGGING_FACE
    title = f"alignment-handbook of 2024 ({trainer.title} of then)"
    return trainer._replace(title=title, defaults=trainer.defaults | lengths | optim, official=official)


def is_foreign(tree: Mapping[str, Any], sections) -> bool:
    """Whether a YAML file is flat, and speaks of what trainers are told."""
    return not any(isinstance(tree.get(name), dict) for name in sections) and any(name in KNOWN for name in tree)


def translate(
    given: Mapping[str, Any],
    *,
    overrides: Mapping[str, Any],
    num_processes: int | Callable[[], int],
    trainer: str | None = None,
    text: str = "",
) -> Translation:
    """Our sections from another trainer's keys.

    `overrides` {'section.leaf': value} are what the user says instead: keys that they answer are not looked at. `num_processes`: how many
    devices the trainer was started on, for which per_device_train_batch_size is. `text` is the file itself, whose comments may name the trainer.

    Raises ValueError with one line per key that cannot be honoured.
    """
    name = trainer or _trainer_of(given, text)
    if name not in TRAINERS:
        raise ValueError(f"trainer={name!r}; choose one of {', '.join(TRAINERS)}")
    found = TRAINERS[name]
    if "dataset_mixer" in given and name not in ("repo", "simpo"):
        found = _of_2024(found)
    sheet = _Sheet(dict(given), found, dict(overrides))
    _check_names(sheet, name)
    _model(sheet)
    _data(sheet)
    if "loss.loss_type" in overrides:
        for key in LOSS_KEYS & given.keys():
            sheet.told[key] = "is not looked at, for --loss_type says otherwise"
    else:
        found.loss(sheet)
    _optim(sheet, num_processes)
    _run(sheet)
    for key in [key for key in given if key not in sheet.told]:
        sheet.explain(key)
    if sheet.errors:
        raise ValueError("\n".join(sheet.errors))
    order = list(given)
    told = sorted(sheet.told.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order))
    lines = [f"{_shown(key, given[key])} {line}" for key, line in told if key in given]
    lines += [f"{_shown(key, found.defaults.get(key))}, by default, {line}" for key, line in told if key not in given]
    return Translation(found, sheet.tree, lines + sheet.notes)


# Which trainer


def _trainer_of(given: Mapping[str, Any], text: str) -> str:
    """By keys that only one has; failing that by the heading that these files have, such as `# DPOTrainer arguments`."""
    loss_types = given.get("loss_type")
    loss_types = loss_types if isinstance(loss_types, list) else [loss_types]
    for name, trainer in TRAINERS.items():
        if any(key in given for key in trainer.telling) or any(loss in trainer.losses for loss in loss_types):
            return name
    headings = {match.lower() for match in re.findall(r"^#\s*(\w+?) ?[Tt]rainer ", text, re.MULTILINE)}
    if len(named := [name for name in TRAINERS if name in headings]) == 1:
        return named[0]
    raise ValueError(
        f"this recipe has no sections, and its keys do not say which trainer it was written for; add --trainer with one of {', '.join(TRAINERS)}"
    )


def _check_names(sheet: "_Sheet", name: str) -> None:
    """Every key must be known, and be one that this trainer reads."""
    others = {key: trainer for trainer in TRAINERS.values() for key in trainer.own}
    known = {key for key in KNOWN if key not in others} | set(sheet.trainer.own)
    for key in list(sheet.given):
        if key in known:
            continue
        if key in others:
            reason = f"it is of {others[key].title}, and this recipe is for {sheet.trainer.title}; leave it out, or say --trainer"
        else:
            close = difflib.get_close_matches(key, sorted(known), n=1)
            reason = f"no such key is known of {sheet.trainer.title}" + (
                f"; did you mean '{close[0]}'?" if close else "; leave it out"
            )
        sheet.refuse(key, reason)


@dataclasses.dataclass
class _Sheet:
    """A foreign recipe while it is read: what was given, what it becomes, what is said of it."""

    given: dict[str, Any]
    trainer: Trainer
    overrides: dict[str, Any]
    tree: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    told: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    errors: list[str] = dataclasses.field(default_factory=list)

    def get(self, key: str) -> Any:
        """A key's value, or what the trainer takes where the key is left out."""
        return self.given[key] if key in self.given else self.trainer.defaults.get(key)

    def put(self, key: str, target: str, value: Any, why: str = "") -> None:
        """What the key becomes; `why` where that surprises."""
        section, leaf = target.split(".")
        if target in self.overrides:
            self.told[key] = f"is not looked at, for --{leaf} says otherwise"
            return
        self.tree.setdefault(section, {})[leaf] = value
        changed = "" if value == self.get(key) else f" {_value(value)}"
        self.told[key] = f"-> {target}{changed}" + (f" ({why})" if why else "")

    def say(self, key: str, line: str) -> None:
        self.told.setdefault(key, f"is not needed: {line}")

    def refuse(self, key: str, line: str, instead: str | None = None) -> None:
        """One line on why not; unless `instead`, a leaf of ours, is what the user says anyway."""
        if instead in self.overrides:
            self.told[key] = f"is not looked at, for --{instead.split('.')[1]} says otherwise"
        elif self.told.get(key) != "":  # refused already
            self.told[key] = ""
            self.errors.append(f"{_shown(key, self.get(key))}: {line}")

    def explain(self, key: str) -> None:
        """What a key is that changes nothing here, or why its value cannot be had."""
        value = self.given[key]
        if value is None:
            return self.say(key, "null leaves it to the default")
        if key in ONLY:
            harmless, line = ONLY[key]
            return self.say(key, "it is so here") if value in harmless else self.refuse(key, line)
        return self.say(
            key,
            UNNEEDED.get(key)
            or next((line for start, line in FAMILIES.items() if key.startswith(start)), "nothing here reads it"),
        )

    def number(self, key: str, least: float = -math.inf, instead: str | None = None) -> float:
        """A number that something is computed from; where it is none, `least` or 1 stands in for it."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= least:
            self.refuse(key, "give a number" + ("" if least == -math.inf else f", {least:g} or more"), instead)
            return max(least, 1)
        return value

    def whole(self, key: str) -> int:
        """A number of things."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.refuse(key, "give a whole number, 1 or more")
            return 1
        return value


def _value(value: Any) -> str:
    if isinstance(value, str):
        first = value.split("\n")[0]
        return first if first == value and len(value) < 60 else f"{first[:56]} ..."
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, sort_keys=False).removesuffix("\n...\n")
    return text.strip() if len(text) < 60 else text.strip()[:56] + " ..."


def _shown(key: str, value: Any) -> str:
    return f"{key}: {_value(value)}"


# Model and adapters


def _model(sheet: _Sheet) -> None:
    given, name = sheet.given, sheet.get("model_name_or_path")
    if name is not None:
        sheet.put("model_name_or_path", "model.model_name_or_path", name)
    if given.get("model_revision") not in (None, "main"):
        sheet.put("model_revision", "model.model_revision", given["model_revision"])
    if (template := given.get("chat_template")) is not None:
        sheet.put("chat_template", "model.chat_template", template)
    if (template := given.get("chat_template_path")) is not None:
        if str(template).endswith(".jinja"):
            sheet.put("chat_template_path", "model.chat_template", template)
        else:
            sheet.refuse(
                "chat_template_path",
                "a tokenizer's folder; give its template as a .jinja file: --chat_template",
                "model.chat_template",
            )
    if sheet.trainer.loss is _simpo and "mistral" in str(name).lower():
        _set(sheet, "model.chat_template", MISTRAL_TEMPLATE, "of every model with 'mistral' in its name")
        if "chat_template" in given and "model.chat_template" not in sheet.overrides:
            sheet.told["chat_template"] = (
                "is replaced, as the released code does for every model with 'mistral' in its name"
            )
    if given.get("eos_token") is not None:
        sheet.put("eos_token", "model.eos_token", given["eos_token"])
    if (keep := sheet.get("gradient_checkpointing")) is not None:
        sheet.put("gradient_checkpointing", "model.remat", "full" if keep else "none")
    adapters = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
    if sheet.get("use_peft"):
        sheet.put("use_peft", "model.use_peft", True)
        for key in adapters:
            if (value := sheet.get(key)) is not None:
                sheet.put(key, f"model.{key}", value)
    else:
        for key in (key for key in ("use_peft", *adapters) if key in given):
            sheet.say(key, "without use_peft all parameters are trained")


# Data


def _data(sheet: _Sheet) -> None:
    given = sheet.given
    if "dataset_mixer" in given:
        _mixer(sheet)
    elif "dataset_mixture" in given or "datasets" in given:
        _mixture(sheet)
    elif sheet.get("dataset_name") is not None:
        sheet.put("dataset_name", "data.dataset_name", sheet.get("dataset_name"))
        if given.get("dataset_config") is not None:
            sheet.put("dataset_config", "data.dataset_config", given["dataset_config"])
        sheet.put("dataset_train_split", "data.dataset_train_split", sheet.get("dataset_train_split"))
        if _evaluates(sheet):
            sheet.put("dataset_test_split", "data.dataset_test_split", sheet.get("dataset_test_split"))
        else:
            sheet.put("dataset_test_split", "data.dataset_test_split", None, "eval_strategy is no")
    _lengths(sheet)


def _evaluates(sheet: _Sheet) -> bool:
    return _strategy(sheet, "eval_strategy", "evaluation_strategy") != "no" or bool(sheet.get("do_eval"))


def _strategy(sheet: _Sheet, *names: str) -> str:
    given = [str(sheet.given[name]).lower() for name in names if sheet.given.get(name) is not None]
    found = given[0] if given else str(sheet.trainer.defaults.get(names[0], "steps"))
    return "no" if found == "false" else found  # YAML 1.1 reads a bare no as false


def _mixer(sheet: _Sheet) -> None:
    """alignment-handbook's {name: fraction of its training split}, its splits apart by what their names hold."""
    mixer, splits = sheet.given["dataset_mixer"], sheet.given.get("dataset_splits", ["train", "test"])
    if not isinstance(mixer, dict) or not mixer:
        return sheet.refuse("dataset_mixer", "give {name: fraction}", "data.dataset_name")
    splits = splits if isinstance(splits, list) else [splits]
    if list(mixer.values()) == [1.0]:
        sheet.put("dataset_mixer", "data.dataset_name", next(iter(mixer)))
    else:
        sheet.put("dataset_mixer", "data.dataset_mixer", mixer)
    key = "dataset_splits"
    train = [split for split in splits if "train" in str(split)]
    test = [split for split in splits if "test" in str(split) and split not in train]
    if len(train) + len(test) < len(splits) or not train:
        return sheet.refuse(key, "name training splits with 'train' in them, and others with 'test'")
    if len(train) > 1 and len(mixer) > 1:
        return sheet.refuse(
            key, "fractions of several data sets with several training splits each are not read; name one"
        )
    sheet.put(key, "data.dataset_train_split", "+".join(train))
    sheet.put(key, "data.dataset_test_split", "+".join(test) or None)
    sheet.told[key] = (
        f"-> data.dataset_train_split {'+'.join(train)}, data.dataset_test_split {'+'.join(test) or 'null'}"
    )
    configs = sheet.given.get("dataset_configs")
    if configs:
        if len(set(configs)) > 1:
            sheet.refuse("dataset_configs", "data sets of one mixture have one configuration here")
        else:
            sheet.put("dataset_configs", "data.dataset_config", configs[0])
    return None


def _mixture(sheet: _Sheet) -> None:
    """A list of data sets: alignment-handbook's of 2025 (id, weight), or TRL's (path, fraction)."""
    key = "dataset_mixture" if "dataset_mixture" in sheet.given else "datasets"
    whole = sheet.given[key] if key == "dataset_mixture" else {"datasets": sheet.given[key]}
    entries = whole.get("datasets") if isinstance(whole, dict) else None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        return sheet.refuse(key, "give a list of data sets, each with its id or path", "data.dataset_name")
    extra = [name for entry in entries for name in ("revision", "data_dir", "data_files") if entry.get(name)]
    if extra:
        return sheet.refuse(key, f"{extra[0]} of a data set is not read; give --dataset_name", "data.dataset_name")
    names = [entry.get("id", entry.get("path")) for entry in entries]
    configs = {entry.get("config", entry.get("name")) for entry in entries}
    splits = [entry.get("split", "train") for entry in entries]
    shares = [entry.get("weight", entry.get("fraction")) for entry in entries]
    if any(entry.get("fraction") is not None for entry in entries) and len(entries) > 1:
        return sheet.refuse(
            key,
            "a fraction is a share of the mixture, which depends on sizes; give dataset_mixer, {name: share of it}",
            "data.dataset_name",
        )
    shares = [1.0 if share is None else share for share in shares]
    if len(configs) > 1 or (len(set(names)) > 1 and len(set(splits)) > 1):
        return sheet.refuse(
            key,
            "data sets of one mixture have one split and one configuration here; give --dataset_name",
            "data.dataset_name",
        )
    held = sheet.given.get("test_split_size") if key == "datasets" else whole.get("test_split_size")
    if len(set(names)) == 1:
        terms = [
            split if share == 1 else f"{split}[:{share * 100:g}%]" for split, share in zip(splits, shares, strict=True)
        ]
        sheet.put(key, "data.dataset_name", names[0])
    else:
        terms = splits[:1]
        sheet.put(key, "data.dataset_mixer", dict(zip(names, shares, strict=True)))
    if configs != {None}:
        sheet.put(key, "data.dataset_config", configs.pop())
    train, test = "+".join(terms), None
    if held is not None:
        if terms[0] != splits[0] or len(set(names)) > 1:
            return sheet.refuse(key, "test_split_size of a part or of several is not taken; give --eval_dataset_name")
        tail = f"-{held}" if held >= 1 else f"-{held * 100:g}%"
        train, test = "+".join([f"{terms[0]}[:{tail}]", *terms[1:]]), f"{terms[0]}[{tail}:]"
        sheet.notes.append(f"differs: what is held out is the end of {terms[0]}, where the trainer draws at random")
    sheet.put(key, "data.dataset_train_split", train)
    sheet.put(key, "data.dataset_test_split", test if _evaluates(sheet) else None)
    data = sheet.tree.get("data", {})
    sheet.told[key] = "-> " + ", ".join(
        f"data.{leaf} {_value(data[leaf])}"
        for leaf in ("dataset_name", "dataset_mixer", "dataset_config", "dataset_train_split", "dataset_test_split")
        if leaf in data
    )
    if "test_split_size" in sheet.given:
        sheet.told["test_split_size"] = f"-> data.dataset_test_split {test}"
    return None


def _lengths(sheet: _Sheet) -> None:
    given = sheet.given
    length = "max_seq_length" if given.get("max_seq_length") is not None else "max_length"
    most, prompt = sheet.get(length), sheet.get("max_prompt_length")
    if sheet.trainer.official:  # where null is what is left out
        most = sheet.trainer.defaults["max_length"] if most is None else most
        prompt = sheet.trainer.defaults["max_prompt_length"] if prompt is None else prompt
    sheet.put(length, "data.max_length", most)
    if length == "max_seq_length" and "max_length" in given:
        sheet.say("max_length", "max_seq_length goes before it")
    if prompt is not None:
        sheet.put("max_prompt_length", "data.max_prompt_length", prompt)
    mode = given.get("truncation_mode", "keep_end" if sheet.trainer.official else "keep_start")
    if sheet.trainer.official:
        _set(
            sheet,
            "data.compat",
            "official",
            "header and end token are scored, and pairs are cut, as the code of that time does",
        )
        if mode != "keep_end":
            sheet.refuse("truncation_mode", "cut as the released code does by default, keep_end", "data.truncation")
        elif "truncation_mode" in given:
            sheet.say("truncation_mode", "compat: official cuts so")
        if given.get("auto_insert_empty_system_msg") is False:
            sheet.refuse("auto_insert_empty_system_msg", "compat: official puts them in; leave it out", "data.compat")
        return
    if mode not in ("keep_start", "keep_end"):
        sheet.refuse("truncation_mode", "choose keep_start or keep_end", "data.truncation")
    elif prompt is not None:
        _set(
            sheet,
            "data.truncation",
            "keep_end",
            "a prompt over max_prompt_length keeps its end, then answers are cut at max_length",
        )
    elif mode == "keep_end" and "truncation_mode" in given:
        sheet.refuse(
            "truncation_mode",
            "it cuts away prompts from the front until both answers fit; give --max_prompt_length and --truncation keep_end",
            "data.truncation",
        )
    else:
        key = "truncation_mode" if "truncation_mode" in given else length
        _set(
            sheet,
            "data.truncation",
            "keep_start",
            "answers are cut at max_length; a prompt that fills it drops the pair",
        )
        if key == "truncation_mode":
            sheet.told[key] = "-> data.truncation"


def _set(sheet: _Sheet, target: str, value: Any, why: str) -> None:
    """A leaf that the trainer itself decides."""
    section, leaf = target.split(".")
    if target not in sheet.overrides:
        sheet.tree.setdefault(section, {})[leaf] = value
        sheet.notes.append(f"{sheet.trainer.title} -> {target} {_value(value)} ({why})")


# Losses


def _dpo(sheet: _Sheet) -> None:
    given = sheet.get("loss_type")
    names = given if isinstance(given, list) else [given]
    weights, smoothing = sheet.given.get("loss_weights"), sheet.number("label_smoothing")
    smoothed = any(name in ("robust", "exo_pair", "aot", "aot_pair", "aot_unpaired") for name in names)
    smoothed |= bool(smoothing) and "sigmoid" in names
    if unknown := [name for name in names if name not in DPO_LOSSES]:
        close = difflib.get_close_matches(str(unknown[0]), DPO_LOSSES, n=1)
        return sheet.refuse(
            "loss_type",
            f"choose of {', '.join(DPO_LOSSES)}" + (f"; did you mean '{close[0]}'?" if close else ""),
            "loss.loss_type",
        )
    ours = [DPO_LOSSES[name] for name in names]
    ours = ["cdpo" if name == "dpo" and smoothing else name for name in ours]
    sheet.put("loss_type", "loss.loss_type", ours[0] if len(ours) == 1 else ours)
    if weights is not None and len(ours) > 1:
        sheet.put("loss_weights", "loss.loss_weights", weights)
    elif weights is not None:
        sheet.say("loss_weights", "there is one loss")
    if names != ["sft"]:
        sheet.put("beta", "loss.beta", sheet.get("beta"))
    if smoothed:
        sheet.put("label_smoothing", "loss.label_smoothing", smoothing)
    elif "label_smoothing" in sheet.given:
        sheet.say("label_smoothing", "this loss does not read it" if smoothing else "it is 0")
    if "discopop" in names:
        sheet.put("discopop_tau", "loss.discopop_tau", sheet.get("discopop_tau"))
    elif "discopop_tau" in sheet.given:
        sheet.say("discopop_tau", "this loss does not read it")
    for key, target in (
        ("rpo_alpha", "loss.sft_weight"),
        ("use_weighting", "loss.use_weighting"),
        ("ld_alpha", "data.ld_alpha"),
    ):
        if (value := sheet.given.get(key)) not in (None, False):
            sheet.put(key, target, value)
    return None


def _cpo(sheet: _Sheet) -> None:
    name, beta = sheet.get("loss_type"), sheet.number("beta", LEAST_BETA)
    gamma, weight, alpha, smoothing = (
        sheet.number(key) for key in ("simpo_gamma", "cpo_alpha", "alpha", "label_smoothing")
    )
    if name == "alphapo":
        name, weight = "simpo", 0.0
        sheet.say("cpo_alpha", "alphapo takes 0")
    if name not in ("sigmoid", "simpo"):
        return sheet.refuse(
            "loss_type", "CPO's are taken over as sigmoid, simpo and alphapo; slic is the nearest", "loss.loss_type"
        )
    if alpha and (name == "sigmoid" or weight or smoothing):
        return sheet.refuse(
            "alpha", "AlphaPO is taken over with loss_type simpo, cpo_alpha 0 and label_smoothing 0", "loss.loss_type"
        )
    ours = "cpo" if name == "sigmoid" else "alphapo" if alpha else "cpo_simpo" if weight else "simpo"
    sheet.put("loss_type", "loss.loss_type", ours)
    sheet.put("beta", "loss.beta", beta)
    if name == "simpo":
        sheet.put("simpo_gamma", "loss.gamma", gamma / beta, "per token: simpo_gamma / beta")
    elif "simpo_gamma" in sheet.given:
        sheet.say("simpo_gamma", "this loss does not read it")
    if ours in ("cpo", "cpo_simpo"):
        sheet.put("cpo_alpha", "loss.cpo_alpha", weight)
    elif "cpo_alpha" in sheet.given:
        sheet.say("cpo_alpha", "it is 0")
    if alpha:
        sheet.put("alpha", "loss.alpha", alpha)
    elif "alpha" in sheet.given:
        sheet.say("alpha", "it is 0")
    if smoothing:
        sheet.put("label_smoothing", "loss.label_smoothing", smoothing)
    elif "label_smoothing" in sheet.given:
        sheet.say("label_smoothing", "it is 0")
    return _ends(sheet)


def _orpo(sheet: _Sheet) -> None:
    if sheet.given.get("loss_type") is not None:
        sheet.refuse("loss_type", "ORPO has one loss; leave it out", "loss.loss_type")
    sheet.tree["loss"] = {"loss_type": "orpo"}
    sheet.put("beta", "loss.beta", sheet.get("beta"))
    sheet.notes.append("differs: the NLL is of the answer's tokens, in TRL of the prompt's, too")
    _ends(sheet)


def _ends(sheet: _Sheet) -> None:
    if not sheet.trainer.official:
        _set(sheet, "data.append_eos", "always", "behind every answer")


def _kto(sheet: _Sheet) -> None:
    name = sheet.get("loss_type")
    if name not in ("kto", "apo_zero_unpaired"):
        return sheet.refuse("loss_type", "choose kto or apo_zero_unpaired", "loss.loss_type")
    sheet.put("loss_type", "loss.loss_type", name)
    for key in ("beta", "desirable_weight", "undesirable_weight"):
        sheet.put(key, f"loss.{key}", sheet.get(key))
    return None


def _sft(sheet: _Sheet) -> None:
    if sheet.get("loss_type") != "nll":
        sheet.refuse("loss_type", "nll is what loss sft is; leave it out", "loss.loss_type")
    else:
        sheet.put("loss_type", "loss.loss_type", "sft")
    if not (sheet.given.get("assistant_only_loss") or sheet.given.get("completion_only_loss")):
        sheet.notes.append("differs: answers alone are scored; the trainer scores the prompts of `messages`, too")
    sheet.notes.append("differs: rows are packed without one conversation seeing another, whatever packing says")


def _simpo(sheet: _Sheet) -> None:
    name, beta = sheet.get("loss_type"), sheet.number("beta", LEAST_BETA)
    if name not in ("sigmoid", "hinge", "repo"):
        return sheet.refuse("loss_type", "choose sigmoid, hinge or repo", "loss.loss_type")
    if sheet.given.get("trainer_type", "simpo") != "simpo":
        return sheet.refuse("trainer_type", "the released code runs simpo alone; give simpo, or say --trainer dpo")
    sheet.put("loss_type", "loss.loss_type", {"sigmoid": "simpo", "hinge": "simpo_hinge", "repo": "repo"}[name])
    if name == "repo":
        sheet.put("beta", "loss.reward_scale", beta, "it only scales logged rewards")
    else:
        sheet.put("beta", "loss.beta", beta)
    if sheet.given.get("gamma") is None:
        sheet.put("gamma_beta_ratio", "loss.gamma", sheet.number("gamma_beta_ratio"))
    elif sheet.given.get("gamma_beta_ratio") is None:
        sheet.put("gamma", "loss.gamma", sheet.number("gamma") / beta, "per token: gamma / beta, as before July 2024")
    else:
        sheet.refuse("gamma", "gamma_beta_ratio says it, too; leave one out", "loss.gamma")
    if (weight := sheet.get("sft_weight")) or "sft_weight" in sheet.given:
        if weight:
            sheet.put("sft_weight", "loss.sft_weight", weight)
        else:
            sheet.say("sft_weight", "it is 0")
    if (smoothing := sheet.get("label_smoothing")) and name == "sigmoid":
        sheet.put("label_smoothing", "loss.label_smoothing", smoothing)
    elif "label_smoothing" in sheet.given:
        sheet.say("label_smoothing", "this loss does not read it" if smoothing else "it is 0")
    if "trainer_type" not in sheet.given and "optim.max_grad_norm" not in sheet.overrides:
        sheet.notes.append(
            "max_grad_norm: with accelerate below 0.30 and DeepSpeed, as SimPO's environment pins, nothing was clipped (--max_grad_norm null)"
        )
    return None


# Optimizer and schedule


def _optim(sheet: _Sheet, num_processes: int | Callable[[], int]) -> None:
    given = sheet.given
    _batch(sheet, num_processes)
    for key in ("learning_rate", "num_train_epochs", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"):
        sheet.put(key, f"optim.{key}", sheet.get(key))
    steps = sheet.get("max_steps")
    if steps != -1:
        sheet.put("max_steps", "optim.max_steps", steps)
    elif "max_steps" in given:
        sheet.say("max_steps", "-1 leaves it to num_train_epochs")
    norm = sheet.get("max_grad_norm")
    sheet.put("max_grad_norm", "optim.max_grad_norm", norm or None)
    name = sheet.get("optim")
    if name in OPTIMIZERS:
        sheet.put("optim", "optim.optim", OPTIMIZERS[name])
    else:
        sheet.refuse(
            "optim",
            f"choose one of {', '.join(OPTIMIZERS)}, or say --optim adamw (--moment_dtype bfloat16 saves memory)",
            "optim.optim",
        )
    schedule, warmup = sheet.get("lr_scheduler_type"), True
    if schedule == "constant":
        warmup = False
    if schedule not in SCHEDULES:
        sheet.refuse(
            "lr_scheduler_type",
            f"choose one of {', '.join(SCHEDULES)}, or say --lr_scheduler_type",
            "optim.lr_scheduler_type",
        )
    else:
        sheet.put("lr_scheduler_type", "optim.lr_scheduler_type", SCHEDULES[schedule])
    _warmup(sheet, steps, warmup)


def _batch(sheet: _Sheet, num_processes: int | Callable[[], int]) -> None:
    """Pairs per update, over all devices."""
    parts = ("per_device_train_batch_size", "gradient_accumulation_steps")
    if "optim.train_batch_size" in sheet.overrides:
        for key in parts:
            sheet.put(key, "optim.train_batch_size", None)
        return
    each, times = (sheet.whole(key) for key in parts)
    count = num_processes() if callable(num_processes) else num_processes
    product = f"{each} x {times} x {count} devices (--num_processes)"
    for key in parts:
        sheet.put(key, "optim.train_batch_size", each * times * count)
        sheet.told[key] = f"-> optim.train_batch_size {each * times * count} = {product}"


def _warmup(sheet: _Sheet, total: int, warmup: bool) -> None:
    key = "warmup_steps" if sheet.get("warmup_steps") else "warmup_ratio"
    steps = 0 if sheet.get(key) is None else sheet.number(key, 0, "optim.warmup_ratio")
    if "warmup_steps" in sheet.given and key != "warmup_steps":
        sheet.say("warmup_steps", "0 leaves it to warmup_ratio")
    if "warmup_ratio" in sheet.given and key != "warmup_ratio":
        sheet.say("warmup_ratio", "warmup_steps goes before it")
    if not warmup:
        sheet.put(key, "optim.warmup_ratio", 0.0, "lr_scheduler_type constant has none; constant_with_warmup has")
    elif steps < 1:
        sheet.put(key, "optim.warmup_ratio", float(steps))
    elif isinstance(total, int) and total >= steps:
        # So that its share of the updates, rounded up, is that number again.
        sheet.put(key, "optim.warmup_ratio", (steps - 0.5) / total)
    else:
        sheet.refuse(
            key,
            "a number of updates, of as many as the data make; give a share of them, --warmup_ratio",
            "optim.warmup_ratio",
        )


# The run


def _run(sheet: _Sheet) -> None:
    given = sheet.given
    sheet.put("seed", "run.seed", sheet.get("seed"))
    if given.get("output_dir") is not None:
        sheet.put("output_dir", "run.output_dir", given["output_dir"])
    _cadence(sheet, "logging_steps", "run.logging_steps", _strategy(sheet, "logging_strategy"))
    _cadence(sheet, "save_steps", "run.save_steps", _strategy(sheet, "save_strategy"))
    strategy = _strategy(sheet, "eval_strategy", "evaluation_strategy")
    for key in ("eval_strategy", "evaluation_strategy", "logging_strategy", "save_strategy"):
        if key in given:
            sheet.say(key, "the number of updates between two says it" if strategy == "steps" else CADENCE)
    if strategy == "steps":
        key = "eval_steps" if given.get("eval_steps") is not None else "logging_steps"
        if key == "logging_steps":
            sheet.notes.append("eval_steps, by default, is logging_steps")
            sheet.tree.setdefault("run", {}).setdefault("eval_steps", sheet.get(key))
        else:
            _cadence(sheet, key, "run.eval_steps", "steps")
    if given.get("save_total_limit") is not None:
        sheet.put("save_total_limit", "run.save_total_limit", given["save_total_limit"])
    push = bool(given.get("push_to_hub"))
    if push:
        sheet.put("push_to_hub", "run.push_to_hub", True)
    for key, leaf in HUB.items():
        if given.get(key) in (None, "main"):
            continue
        if push:
            sheet.put(key, f"run.{leaf}", given[key])
        else:
            sheet.say(key, "nothing is pushed")
    if given.get("data_seed") not in (None, sheet.get("seed")):
        sheet.refuse("data_seed", "seed decides the order of the data here; leave it out", "run.seed")


def _cadence(sheet: _Sheet, key: str, target: str, strategy: str) -> None:
    value = sheet.get(key)
    if strategy != "steps":
        if key in sheet.given:
            sheet.say(key, CADENCE)
    elif isinstance(value, float) and value < 1:
        sheet.refuse(key, f"a share of the updates; give their number, --{target.split('.')[1]}", target)
    else:
        sheet.put(key, target, value)


LEAST_BETA = 1e-9
CADENCE = "a run is evaluated before and after training, and keeps a checkpoint at its end, besides what run.eval_steps and save_steps say"
HUB = {
    "hub_model_id": "hub_model_id",
    "hub_revision": "hub_revision",
    "hub_model_revision": "hub_revision",
    "hub_private_repo": "hub_private_repo",
}
OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw_torch_xla": "adamw",
    "adamw_apex_fused": "adamw",
    "paged_adamw": "adamw",
    "paged_adamw_32bit": "adamw",
    "adafactor": "adafactor",
    "lion_32bit": "lion",
    "paged_lion_32bit": "lion",
}
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"}
# TRL's DPO losses under our names; README says the same the other way round.
DPO_LOSSES = {
    "sigmoid": "dpo",
    "sigmoid_norm": "dpo_norm",
    "hinge": "hinge",
    "ipo": "ipo",
    "exo_pair": "exo_pair",
    "nca_pair": "nca_pair",
    "robust": "robust",
    "bco_pair": "bco_pair",
    "sppo_hard": "sppo_hard",
    "aot": "aot",
    "aot_pair": "aot",
    "aot_unpaired": "aot_unpaired",
    "apo_zero": "apo_zero",
    "apo_down": "apo_down",
    "discopop": "discopop",
    "sft": "sft",
}

LOSS_KEYS = {
    *(
        "loss_type",
        "loss_weights",
        "beta",
        "gamma",
        "gamma_beta_ratio",
        "simpo_gamma",
        "cpo_alpha",
        "alpha",
        "rpo_alpha",
    ),
    *("label_smoothing", "sft_weight", "discopop_tau", "use_weighting", "desirable_weight", "undesirable_weight"),
}
DPO_KEYS = (
    *("loss_weights", "discopop_tau", "rpo_alpha", "use_weighting", "ld_alpha", "f_divergence_type", "reference_free"),
    *("f_alpha_divergence_coef", "truncation_mode", "label_smoothing", "precompute_ref_log_probs", "pad_token"),
    *("precompute_ref_batch_size", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps", "loss_type"),
    *("beta", "max_prompt_length", "padding_free", "activation_offloading"),
)
CPO_KEYS = ("simpo_gamma", "cpo_alpha", "alpha", "label_smoothing", "loss_type", "beta", "max_prompt_length")
ORPO_KEYS = ("beta", "max_prompt_length", "loss_type")
KTO_KEYS = (
    *("desirable_weight", "undesirable_weight", "loss_type", "beta", "precompute_ref_log_probs", "max_prompt_length"),
    *("precompute_ref_batch_size", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
    *("activation_offloading",),
)
SFT_KEYS = (
    *("max_seq_length", "packing", "packing_strategy", "dataset_text_field", "dataset_kwargs", "completion_only_loss"),
    *("assistant_only_loss", "eval_packing", "shuffle_dataset", "chat_template_path"),
    *("loss_type", "truncation_mode", "eos_token", "pad_token", "padding_free", "activation_offloading"),
)
SIMPO_KEYS = (
    *("gamma_beta_ratio", "gamma", "sft_weight", "label_smoothing", "loss_type", "beta", "truncation_mode"),
    *("trainer_type", "ln", "alpha", "max_prompt_length", "max_target_length"),
)
SIMPO = OF_2024 | {
    "beta": 2.0,
    "gamma_beta_ratio": 0.25,
    "sft_weight": 0.0,
    "label_smoothing": 0.0,
    "loss_type": "sigmoid",
}
KTO = {"beta": 0.1, "loss_type": "kto", "desirable_weight": 1.0, "undesirable_weight": 1.0}
CPO = PREFERENCE | {"simpo_gamma": 0.5, "cpo_alpha": 1.0, "alpha": 0.0}
TRAINERS = {
    #                title                defaults                   keys        of it alone                           its losses
    "repo":  Trainer("RePO's run_repo.py", SIMPO, SIMPO_KEYS, ("trainer_type", "ln"), ("repo",), _simpo, True),
    "simpo": Trainer("SimPO's run_simpo.py", SIMPO, SIMPO_KEYS, ("gamma_beta_ratio", "gamma", "sft_weight"), (), _simpo, True),
    "cpo":   Trainer("TRL's CPOConfig", TRL | CPO, CPO_KEYS, ("simpo_gamma", "cpo_alpha"), ("simpo", "alphapo"), _cpo),
    "kto":   Trainer("TRL's KTOConfig", TRL | KTO, KTO_KEYS, ("desirable_weight", "undesirable_weight"), ("kto", "apo_zero_unpaired"), _kto),
    "orpo":  Trainer("TRL's ORPOConfig", TRL | {"beta": 0.1}, ORPO_KEYS, (), (), _orpo),
    "sft":   Trainer(
        "TRL's SFTConfig", TRL | {"learning_rate": 2e-5, "loss_type": "nll"}, SFT_KEYS,
        ("max_seq_length", "packing", "packing_strategy", "dataset_text_field", "completion_only_loss", "assistant_only_loss"), ("nll",), _sft,
    ),
    "dpo":   Trainer(
        "TRL's DPOConfig", TRL | PREFERENCE | {"discopop_tau": 0.05}, DPO_KEYS,
        ("loss_weights", "discopop_tau", "rpo_alpha", "use_weighting", "ld_alpha", "f_divergence_type", "reference_free"),
        tuple(name for name in DPO_LOSSES if name not in ("sigmoid", "hinge", "ipo")), _dpo,
    ),
}  # fmt: skip

READ = {
    *HUGGING_FACE, *HUB, "max_length", "model_name_or_path", "model_revision", "chat_template", "gradient_checkpointing", "use_peft",
    "lora_target_modules", "dataset_name", "dataset_config", "dataset_mixer", "dataset_splits", "dataset_configs", "dataset_mixture",
    "datasets", "test_split_size", "do_eval", "evaluation_strategy", "logging_strategy", "save_strategy", "eval_steps", "output_dir",
    "save_total_limit", "push_to_hub", "data_seed", "auto_insert_empty_system_msg",
}  # fmt: skip

# Keys with values that ask for nothing, and what to say of any other.
NOT_QUANTISED = "quantised models are not trained here; leave it out for LoRA over weights as they are"
ONLY = {
    "load_in_4bit": ((False,), NOT_QUANTISED),
    "load_in_8bit": ((False,), NOT_QUANTISED),
    "use_dora": ((False,), "of adapters only plain LoRA is here; leave it out"),
    "use_rslora": ((False,), "adapters count for lora_alpha / lora_r; give lora_alpha times the root of lora_r"),
    "lora_modules_to_save": (([],), "beside adapters nothing is trained; leave it out"),
    "lora_target_parameters": (([],), "name modules: lora_target_modules"),
    "lora_task_type": (("CAUSAL_LM",), "language models are CAUSAL_LM"),
    "label_smoothing_factor": ((0,), "the losses have label_smoothing"),
    "neftune_noise_alpha": ((0,), "no noise is put on embeddings; leave it out"),
    "lr_scheduler_kwargs": (({},), "schedules have no more than lr_scheduler_type and warmup_ratio; leave it out"),
    "optim_args": (("",), "optimizers have no more than adam_beta1, adam_beta2 and adam_epsilon; leave it out"),
    "optim_target_modules": (([],), "every trained parameter has the same optimizer; leave it out"),
    "load_best_model_at_end": ((False,), "what is exported is the last; `repo-jax export` takes any checkpoint"),
    "auto_find_batch_size": ((False,), "pairs per update stay what they are; rows_per_device decides what fits"),
    "f_divergence_type": (("reverse_kl",), "of divergences only reverse_kl is here"),
    "reference_free": ((False,), "losses without a reference model have names of their own; give --loss_type"),
    "sync_ref_model": ((False,), "the reference model stays what it is; leave it out"),
    "generate_during_eval": ((False,), "`repo-jax generate` writes answers; leave it out"),
    "is_encoder_decoder": ((False,), "decoders alone are here"),
    "hub_token": ((), "credentials are no part of a recipe; set HF_TOKEN in the environment"),
    "model_init_kwargs": (({},), "name what you want of it: --compute_dtype, --param_dtype, --attn_implementation"),
    "ref_model_init_kwargs": (({},), "the reference model is read as the model is; leave it out"),
    "model_adapter_name": (("default",), "one set of adapters is trained; leave it out"),
    "ref_adapter_name": ((), "the reference is the model under the adapters; leave it out"),
    "base_model_revision": (("main",), "give the model that is trained, with model_revision"),
    "tokenizer_name_or_path": ((), "a model comes with its tokenizer; put that one into its folder"),
    "use_cpu": ((False,), "set JAX_PLATFORMS=cpu in the environment"),
    "no_cuda": ((False,), "set JAX_PLATFORMS=cpu in the environment"),
    "dataset_kwargs": (({},), "there is none of it here; leave it out"),
    "env": (({},), "set these variables in the environment"),
    "text_column": (("text",), "texts without an answer are not trained on"),
    "resume_from_checkpoint": ((True, False), "a run goes on from the newest checkpoint of its output_dir"),
}  # fmt: skip
PACKED = "rows are packed, and no pair sees another"
UNNEEDED = {
    "bf16": "compute_dtype auto is bfloat16 where hardware has it, and parameters stay float32",
    "fp16": "compute_dtype auto is bfloat16 where hardware has it, else float32",
    "tf32": "compute_dtype says what is computed in",
    "dtype": "param_dtype auto keeps what is trained in float32",
    "torch_dtype": "param_dtype auto keeps what is trained in float32",
    "half_precision_backend": "compute_dtype says what is computed in",
    "attn_implementation": "auto takes the form of attention that is fastest there",
    "use_flash_attention_2": "auto takes the form of attention that is fastest there",
    "use_cache": "training keeps no cache",
    "trust_remote_code": "no code of a model's is run",
    "disable_dropout": "these models have none in training; lora_dropout is its own",
    "gradient_checkpointing_kwargs": "remat says what is computed again",
    "activation_checkpointing_kwargs": "remat says what is computed again",
    "activation_checkpointing": "remat says what is computed again",
    "activation_offloading": "remat: offload does so",
    "use_liger_kernel": "the output head runs in chunks anyway",
    "use_liger_loss": "the output head runs in chunks anyway",
    "liger_kernel_config": "the output head runs in chunks anyway",
    "padding_free": PACKED,
    "packing": PACKED,
    "packing_strategy": PACKED,
    "group_by_length": PACKED,
    "length_column_name": PACKED,
    "pad_to_multiple_of": PACKED,
    "padding_value": PACKED,
    "label_pad_token_id": PACKED,
    "pad_token": PACKED,
    "train_sampling_strategy": "pairs come in the random order that seed decides",
    "shuffle_dataset": "pairs come in the random order that seed decides",
    "full_determinism": "the same seed gives the same run",
    "average_tokens_across_devices": "means are over the whole batch on any number of devices",
    "per_device_eval_batch_size": "evaluation is over pairs, whatever the batch",
    "batch_eval_metrics": "evaluation is over pairs, whatever the batch",
    "precompute_ref_log_probs": "reference log-probs are always computed once and kept",
    "precompute_ref_batch_size": "reference log-probs are always computed once and kept",
    "ref_model_mixup_alpha": "sync_ref_model is false",
    "ref_model_sync_steps": "sync_ref_model is false",
    "f_alpha_divergence_coef": "of divergences only reverse_kl is here",
    "force_use_ref_model": "adapters compare with the model under them",
    "router_aux_loss_coef": "no mixture of experts is here",
    "auto_insert_empty_system_msg": "compat: official puts them in; otherwise the template decides",
    "ln": "the released code does not read it",
    "alpha": "the released code does not read it",
    "trainer_type": "it is what it is translated by",
    "max_completion_length": "of encoder-decoders",
    "max_target_length": "of encoder-decoders",
    "remove_unused_columns": "columns that no objective asks for stay where they are",
    "dataset_text_field": "rows are recognised by their columns (schema)",
    "completion_only_loss": "answers alone are scored",
    "assistant_only_loss": "answers alone are scored",
    "eval_packing": PACKED,
    "dataset_num_proc": "the tokenizer's threads share the work",
    "preprocessing_num_workers": "the tokenizer's threads share the work",
    "dataset_streaming": "data are prepared once, into a store",
    "streaming": "data are prepared once, into a store",
    "truncation_side": "truncation says what stays",
    "ignore_bias_buffers": "of PyTorch's processes",
    "report_to": "metrics.jsonl and report.md hold all; nothing is sent anywhere",
    "run_name": "output_dir names a run",
    "project": "nothing is sent anywhere",
    "logging_dir": "output_dir holds everything",
    "logging_first_step": "every logged update has its line",
    "overwrite_output_dir": "a run goes on from the newest checkpoint; another output_dir begins anew",
    "ignore_data_skip": "a run goes on with the pairs that come next",
    "save_only_model": "a checkpoint is whole; hf/ holds the model alone",
    "hub_strategy": "the model is pushed at the end",
    "hub_always_push": "the model is pushed at the end",
    "hub_model_id": "nothing is pushed",
    "hub_revision": "the main branch",
    "hub_model_revision": "the main branch",
    "hub_private_repo": "as its owner has set",
    "push_to_hub": "nothing is pushed",
    "model_revision": "the main branch",
    **dict.fromkeys(
        ("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "dataset_splits", "dataset_configs", "datasets"),
        "data are named otherwise",
    ),
    "do_train": "the command says it",
    "do_eval": "held-out pairs are scored before and after training",
    "do_predict": "`repo-jax generate` writes answers",
    "prediction_loss_only": "all metrics are computed",
    "metric_for_best_model": "the last one is exported",
    "greater_is_better": "the last one is exported",
    "torch_empty_cache_steps": "of PyTorch's memory",
    "skip_memory_metrics": "peak memory is in metrics.jsonl",
    "label_names": "losses know their columns",
    "local_rank": "of PyTorch's processes",
    "debug": "of PyTorch's processes",
    "disable_tqdm": "a terminal gets a progress bar, a file plain lines",
    "parallelism_config": "the mesh says how",
    "accelerator_config": "the mesh says how",
    "enable_jit_checkpoint": "a run that is told to stop writes a checkpoint",
    "restore_callback_states_from_checkpoint": "there are no callbacks",
    "model_code_revision": "no code of a model's is run",
    "data_seed": "it is seed's",
    "eval_steps": "eval_strategy is not steps",
    "use_weighting": "all pairs count 1",
}  # fmt: skip
# Likewise, by how keys begin.
FAMILIES = {
    "dataloader_": "a thread reads and packs ahead",
    "ddp_": "the mesh says how",
    "fsdp": "the mesh says how",
    "deepspeed": "the mesh says how",
    "torch_compile": "XLA compiles",
    "eval_": "held-out pairs are scored whole",
    "include_": "metrics.jsonl has what there is",
    "log": "nothing of the computation",
    "save_on_": "one copy is written",
    "trackio_": "nothing is sent anywhere",
    "bf16_": "compute_dtype says what is computed in",
    "fp16_": "compute_dtype says what is computed in",
    "bnb_4bit_": "quantised models are not trained here",
    "use_bnb_": "quantised models are not trained here",
    "lora_": "without use_peft all parameters are trained",
}
OF_FAMILIES = {
    *("dataloader_drop_last", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order", "deepspeed"),
    *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend"),
    *("ddp_timeout", "fsdp", "fsdp_config", "fsdp_min_num_params", "fsdp_transformer_layer_cls_to_wrap"),
    *("torch_compile", "torch_compile_backend", "torch_compile_mode", "eval_delay", "eval_on_start"),
    *("eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps", "include_for_metrics"),
    *("include_num_input_tokens_seen", "include_tokens_per_second", "log_on_each_node", "logging_nan_inf_filter"),
    *("log_level", "log_level_replica", "save_on_each_node", "trackio_space_id", "trackio_bucket_id"),
    *("trackio_static_space_id", "bf16_full_eval", "fp16_full_eval", "fp16_opt_level", "fp16_backend"),
    *("bnb_4bit_quant_type", "bnb_4bit_quant_storage", "use_bnb_nested_quant"),
}
KNOWN = {*READ, *ONLY, *UNNEEDED, *OF_FAMILIES, *(key for trainer in TRAINERS.values() for key in trainer.own)}
