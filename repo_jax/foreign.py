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

from repo_jax.trainers import (
    CPO_KEYS,
    DPO_KEYS,
    DPO_LOSSES,
    FAMILIES,
    HANDBOOK,
    HUB,
    KNOWN,
    LOSS_KEYS,
    OF_2024,
    ONLY,
    OPTIMIZERS,
    ORPO_KEYS,
    SCHEDULES,
    SFT_KEYS,
    SIMPO_KEYS,
    TRACKERS,
    TRAINERS,
    UNNEEDED,
    Trainer,
)

CADENCE = "a run is evaluated before and after training, and keeps a checkpoint at its end, besides what run.eval_steps and save_steps say"
# Keys whose values are not shown, and those that only sound like them.
SECRET = re.compile(r"token$|(^|_)key$|api_?key|secret|passw|credential|^env$|_init_kwargs$", re.IGNORECASE)
TOKENS_OF_TEXT = re.compile(r"(eos|pad|bos|unk|sep|cls|mask|image)_token$")
# Leaves of which a recipe has one.
ONE_OF = {"data.dataset_name": "data.dataset_mixer", "data.dataset_mixer": "data.dataset_name"}
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


class Translation(NamedTuple):
    """Another trainer's recipe as ours."""

    trainer: Trainer
    tree: dict[str, dict[str, Any]]  # sections
    lines: list[str]  # what became of each key

    def __str__(self):
        return "\n".join([f"a recipe for {self.trainer.title}, translated:", *(f"  {line}" for line in self.lines)])


def _of_2024(trainer: Trainer) -> Trainer:
    """alignment-handbook with dataset_mixer, whose tokens SimPO's code took over from the TRL of then."""
    optim = {"optim": "rmsprop"} if trainer.own is DPO_KEYS else {}
    official = trainer.own is not SFT_KEYS
    lengths = OF_2024 if official else HANDBOOK
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
        LOSSES[name](sheet)
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
            close = difflib.get_close_matches(str(key), sorted(known), n=1)
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

    def now(self, key: str, target: str | None) -> Any:
        """What the run has for a key: what the user says of `target` instead, or what `get` has."""
        return self.overrides.get(target, self.get(key))

    def switch(self, key: str, target: str) -> bool:
        """Whether the user, or else the recipe, switches on what other keys are of."""
        on = bool(self.now(key, target))
        if key in self.given and (on or target in self.overrides):
            self.put(key, target, True)
        return on

    def put(self, key: str, target: str, value: Any, why: str = "") -> None:
        """What the key becomes; `why` where that surprises."""
        section, leaf = target.split(".")
        other = ONE_OF.get(target)
        if target in self.overrides or self.overrides.get(other) is not None:
            said = leaf if target in self.overrides else other.split(".")[1]
            self.told[key] = f"is not looked at, for --{said} says otherwise"
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
            harmless, line, *instead = ONLY[key]
            return self.say(key, "it is so here") if value in harmless else self.refuse(key, line, *instead)
        return self.say(
            key,
            UNNEEDED.get(key)
            or next((line for start, line in FAMILIES.items() if key.startswith(start)), "nothing here reads it"),
        )

    def number(
        self, key: str, least: float = -math.inf, target: str | None = None, instead: str | None = None
    ) -> float:
        """A number that something is computed from, which a flag for `target` says, too, and which one for `instead` makes needless.

        Where it is none, `least` or 1 stands in for it; a flag's value is refused with the recipe.
        """
        value = self.now(key, target)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= least:
            wanted = "give a number" + ("" if least == -math.inf else f", {least:g} or more")
            self.refuse(key, wanted, target or instead)
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
    value = _bare(value)
    if isinstance(value, str):
        first = value.split("\n")[0]
        return first if first == value and len(value) < 60 else f"{first[:56]} ..."
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, sort_keys=False).removesuffix("\n...\n")
    return text.strip() if len(text) < 60 else text.strip()[:56] + " ..."


def _shown(key: str, value: Any) -> str:
    return f"{key}: {'...' if value and _secret({key: value}) else _value(value)}"


def _secret(value: Any) -> bool:
    """Whether a key in it names something that is nobody else's."""
    if isinstance(value, list):
        return any(map(_secret, value))
    return isinstance(value, dict) and any(
        bool(SECRET.search(str(key)) and not TOKENS_OF_TEXT.search(str(key))) or _secret(below)
        for key, below in value.items()
    )


def _bare(value: Any) -> Any:
    """The value without what is secret in its texts: users and passwords in URLs, and tokens."""
    if isinstance(value, dict):
        return {_bare(key): _bare(below) for key, below in value.items()}
    if isinstance(value, list):
        return [_bare(below) for below in value]
    if not isinstance(value, str) or not ("://" in value or "hf_" in value):
        return value
    from repo_jax.urls import scrubbed, shown  # only now, for what they import takes a while

    return scrubbed(shown(value))


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
    trained = sheet.now("model_name_or_path", "model.model_name_or_path")
    if sheet.trainer.own is SIMPO_KEYS and "mistral" in str(trained).lower():
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
    if sheet.switch("use_peft", "model.use_peft"):
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
    if given.get("ld_alpha") is not None:
        sheet.put("ld_alpha", "data.ld_alpha", given["ld_alpha"])
    if sheet.trainer.own in (CPO_KEYS, ORPO_KEYS) and not sheet.trainer.official:
        _set(sheet, "data.append_eos", "always", "behind every answer")
    _lengths(sheet)


def _evaluates(sheet: _Sheet) -> bool:
    named = _strategy(sheet, "eval_strategy", "evaluation_strategy") != "no"
    return named or bool(sheet.get("do_eval")) or sheet.overrides.get("run.eval_steps") is not None


def _strategy(sheet: _Sheet, *names: str) -> str:
    given = [str(sheet.given[name]).lower() for name in names if sheet.given.get(name) is not None]
    found = given[0] if given else str(sheet.trainer.defaults.get(names[0], "steps"))
    return "no" if found == "false" else found  # YAML 1.1 reads a bare no as false


def _mixer(sheet: _Sheet) -> None:
    """alignment-handbook's {name: fraction of its training split}, its splits apart by what their names hold."""
    mixer, splits = sheet.given["dataset_mixer"], sheet.get("dataset_splits")
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
    if configs := sheet.given.get("dataset_configs"):
        configs = configs if isinstance(configs, list) else [configs]
        if len(set(map(str, configs))) > 1:
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
    of_one = ("id", "path", "config", "name", "split", "columns", "weight", "fraction")
    other = [name for entry in entries for name in entry if name not in of_one and entry[name] is not None]
    other += [name for name in whole if name not in ("datasets", "seed", "test_split_size")]
    if other:
        return sheet.refuse(
            key, f"'{other[0]}' in it is not read; leave it out, or give --dataset_name", "data.dataset_name"
        )
    names = [entry.get("id", entry.get("path")) for entry in entries]
    configs = {entry.get("config", entry.get("name")) for entry in entries}
    splits = [entry.get("split", "train") for entry in entries]
    shares = [entry.get("weight", entry.get("fraction")) for entry in entries]
    held = sheet.given.get("test_split_size") if key == "datasets" else whole.get("test_split_size")
    numbers = [number for number in (*shares, held) if number is not None]
    if not all(isinstance(name, str) for name in names) or not all(map(_above_zero, numbers)):
        return sheet.refuse(key, "each data set has an id or path, and shares and sizes are numbers above 0")
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
        tail = f"-{int(held)}" if held >= 1 else f"-{held * 100:g}%"
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


def _above_zero(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


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
    prompt = sheet.overrides.get("data.max_prompt_length", prompt)
    mode = given.get("truncation_mode", "keep_end" if sheet.trainer.official else "keep_start")
    if sheet.trainer.official and sheet.overrides.get("data.compat", "official") == "official":
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
        _set(
            sheet,
            "data.truncation",
            "keep_start",
            "answers are cut at max_length; a prompt that fills it drops the pair",
        )
        if "truncation_mode" in given:
            sheet.told["truncation_mode"] = "-> data.truncation"


def _set(sheet: _Sheet, target: str, value: Any, why: str) -> None:
    """A leaf that the trainer itself decides."""
    section, leaf = target.split(".")
    if target not in sheet.overrides:
        sheet.tree.setdefault(section, {})[leaf] = value
        sheet.notes.append(f"{sheet.trainer.title} -> {target} {_value(value)} ({why})")


# Losses


def _dpo(sheet: _Sheet) -> None:
    given = sheet.get("loss_type")
    names = [str(name) for name in (given if isinstance(given, list) else [given])]
    weights, smoothing = sheet.given.get("loss_weights"), sheet.number("label_smoothing", target="loss.label_smoothing")
    asked = smoothing or "loss.label_smoothing" in sheet.overrides  # 0 as well, which dpo does not take
    smoothed = any(name in ("robust", "exo_pair", "aot", "aot_pair", "aot_unpaired") for name in names)
    smoothed |= bool(asked) and "sigmoid" in names
    if unknown := [name for name in names if name not in DPO_LOSSES]:
        close = difflib.get_close_matches(unknown[0], DPO_LOSSES, n=1)
        return sheet.refuse(
            "loss_type",
            f"choose of {', '.join(DPO_LOSSES)}" + (f"; did you mean '{close[0]}'?" if close else ""),
            "loss.loss_type",
        )
    ours = [DPO_LOSSES[name] for name in names]
    ours = ["cdpo" if name == "dpo" and asked else name for name in ours]
    sheet.put("loss_type", "loss.loss_type", ours[0] if len(ours) == 1 else ours)
    if weights is not None and len(ours) > 1:
        sheet.put("loss_weights", "loss.loss_weights", weights)
    elif weights not in (None, [1]):
        sheet.refuse("loss_weights", "there is one loss; leave it out", "loss.loss_weights")
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
    ):
        if (value := sheet.given.get(key)) not in (None, False):
            sheet.put(key, target, value)
    return None


def _cpo(sheet: _Sheet) -> None:
    name, beta = sheet.get("loss_type"), sheet.number("beta", 1e-9, "loss.beta")
    gamma = sheet.number("simpo_gamma", instead="loss.gamma")
    weight, alpha, smoothing = (
        sheet.number(key, target=f"loss.{key}") for key in ("cpo_alpha", "alpha", "label_smoothing")
    )
    weighted = bool(weight) or "loss.cpo_alpha" in sheet.overrides
    shaped = bool(alpha) or "loss.alpha" in sheet.overrides
    if name == "alphapo":
        name, weight, weighted = "simpo", 0.0, False
        sheet.say("cpo_alpha", "alphapo takes 0")
    if name not in ("sigmoid", "simpo"):
        return sheet.refuse(
            "loss_type", "CPO's are taken over as sigmoid, simpo and alphapo; slic is the nearest", "loss.loss_type"
        )
    if sheet.get("alpha") and (name == "sigmoid" or weighted or smoothing):
        return sheet.refuse(
            "alpha", "AlphaPO is taken over with loss_type simpo, cpo_alpha 0 and label_smoothing 0", "loss.loss_type"
        )
    ours = "cpo" if name == "sigmoid" else "cpo_simpo" if weighted else "alphapo" if shaped else "simpo"
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
    if ours == "alphapo":
        sheet.put("alpha", "loss.alpha", alpha)
    elif "alpha" in sheet.given:
        sheet.say("alpha", "it is 0")
    if smoothing:
        sheet.put("label_smoothing", "loss.label_smoothing", smoothing)
    elif "label_smoothing" in sheet.given:
        sheet.say("label_smoothing", "it is 0")
    return None


def _orpo(sheet: _Sheet) -> None:
    if sheet.given.get("loss_type") is not None:
        sheet.refuse("loss_type", "ORPO has one loss; leave it out", "loss.loss_type")
    sheet.tree["loss"] = {"loss_type": "orpo"}
    sheet.put("beta", "loss.beta", sheet.get("beta"))
    sheet.notes.append("differs: the NLL is of the answer's tokens, in TRL of the prompt's, too")


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
    name = sheet.get("loss_type")
    if name not in ("sigmoid", "hinge", "repo"):
        return sheet.refuse("loss_type", "choose sigmoid, hinge or repo", "loss.loss_type")
    if sheet.given.get("trainer_type", "simpo") != "simpo":
        return sheet.refuse("trainer_type", "the released code runs simpo alone; give simpo, or say --trainer dpo")
    sheet.put("loss_type", "loss.loss_type", {"sigmoid": "simpo", "hinge": "simpo_hinge", "repo": "repo"}[name])
    if name == "repo":
        beta = sheet.number("beta", 1e-9, instead="loss.reward_scale")
        sheet.put("beta", "loss.reward_scale", beta, "it only scales logged rewards")
    else:
        beta = sheet.number("beta", 1e-9, "loss.beta")
        sheet.put("beta", "loss.beta", beta)
    if sheet.given.get("gamma") is None:
        sheet.put("gamma_beta_ratio", "loss.gamma", sheet.number("gamma_beta_ratio", instead="loss.gamma"))
    elif sheet.given.get("gamma_beta_ratio") is None:
        gamma = sheet.number("gamma", instead="loss.gamma") / beta
        sheet.put("gamma", "loss.gamma", gamma, "per token: gamma / beta, as before July 2024")
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


LOSSES = {"repo": _simpo, "simpo": _simpo, "cpo": _cpo, "kto": _kto, "orpo": _orpo, "sft": _sft, "dpo": _dpo}


# Optimizer and schedule


def _optim(sheet: _Sheet, num_processes: int | Callable[[], int]) -> None:
    given = sheet.given
    _batch(sheet, num_processes)
    for key in ("learning_rate", "num_train_epochs", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"):
        sheet.put(key, f"optim.{key}", sheet.get(key))
    if sheet.get("max_steps") != -1 or "optim.max_steps" in sheet.overrides:
        sheet.put("max_steps", "optim.max_steps", sheet.get("max_steps"))
    elif "max_steps" in given:
        sheet.say("max_steps", "-1 leaves it to num_train_epochs")
    norm = sheet.get("max_grad_norm")
    sheet.put("max_grad_norm", "optim.max_grad_norm", norm or None)
    name = str(sheet.get("optim"))
    if name in OPTIMIZERS:
        sheet.put("optim", "optim.optim", OPTIMIZERS[name])
    else:
        sheet.refuse(
            "optim",
            f"choose one of {', '.join(OPTIMIZERS)}, or say --optim adamw (--moment_dtype bfloat16 saves memory)",
            "optim.optim",
        )
    schedule = str(sheet.get("lr_scheduler_type"))
    if schedule not in SCHEDULES:
        sheet.refuse(
            "lr_scheduler_type",
            f"choose one of {', '.join(SCHEDULES)}, or say --lr_scheduler_type",
            "optim.lr_scheduler_type",
        )
    else:
        sheet.put("lr_scheduler_type", "optim.lr_scheduler_type", SCHEDULES[schedule])
    _warmup(sheet, warmup=schedule != "constant" or "optim.lr_scheduler_type" in sheet.overrides)


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


def _warmup(sheet: _Sheet, *, warmup: bool) -> None:
    total = sheet.now("max_steps", "optim.max_steps")
    key = "warmup_steps" if sheet.get("warmup_steps") else "warmup_ratio"
    steps = 0 if sheet.get(key) is None else sheet.number(key, 0, instead="optim.warmup_ratio")
    if "warmup_steps" in sheet.given and key != "warmup_steps":
        sheet.say("warmup_steps", "0 leaves it to warmup_ratio")
    if "warmup_ratio" in sheet.given and key != "warmup_ratio":
        sheet.say("warmup_ratio", "warmup_steps goes before it")
    if not warmup:
        sheet.put(key, "optim.warmup_ratio", 0.0, "lr_scheduler_type constant has none; constant_with_warmup has")
    elif steps < 1:
        sheet.put(key, "optim.warmup_ratio", float(steps))
    elif isinstance(total, int | float) and total >= steps:
        # So that its share of the updates, rounded up, is that number again.
        sheet.put(key, "optim.warmup_ratio", (steps - 0.5) / total)
    else:
        few = isinstance(total, int | float) and total > 0
        made = f"more than the {total} that are made" if few else "a number of updates, of as many as the data make"
        sheet.refuse(key, f"{made}; give a share of them, --warmup_ratio", "optim.warmup_ratio")


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
            sheet.tree.setdefault("run", {}).setdefault("eval_steps", sheet.now(key, "run.logging_steps"))
        else:
            _cadence(sheet, key, "run.eval_steps", "steps")
    named = given.get("report_to") or []
    named = [named] if isinstance(named, str) else list(named)
    if trackers := [name for name in named if name in TRACKERS]:
        sheet.put("report_to", "run.report_to", trackers)
    if given.get("save_total_limit") is not None:
        sheet.put("save_total_limit", "run.save_total_limit", given["save_total_limit"])
    push = sheet.switch("push_to_hub", "run.push_to_hub")
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
