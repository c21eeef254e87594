"""The commands: repo-jax train | evaluate | generate | inspect | prepare | export | bench | plan | translate | losses."""

import argparse
import contextlib
import difflib
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import sys

import yaml

import repo_jax
from repo_jax.config import (
    SECTIONS,
    StoppedError,
    is_foreign,
    leaf_fields,
    load_recipe,
    read_tree,
    read_yaml,
    takes_text,
    to_recipe,
)
from repo_jax.data.schema import DamagedStoreError
from repo_jax.terminal import colorful, paint
from repo_jax.trainers import TRAINERS

# What `generate` takes besides a recipe: answers.prepare has them under the same names, and their defaults.
OWN = "default: the model's generation_config.json, else"
GENERATE_FLAGS = {
    "max_new_tokens": (int, "tokens of an answer at most (default: 512)"),
    "temperature": (
        float,
        f"what logits are divided by; 0: always the likeliest token ({OWN} 0, or 1 beside the next two)",
    ),
    "top_k": (int, f"draw from so many of the likeliest tokens; 0: from all ({OWN} 50, as in transformers)"),
    "top_p": (float, f"draw from the fewest likeliest tokens that have this probability together ({OWN} 1)"),
    "batch_size": (int, "prompts taken at a time, over all devices (default: 16)"),
    "generator": (str, "the model's name in the output (default: model_name_or_path)"),
}


# Leaves of the recipe that concern pairs, and are nothing to `generate`.
NOT_FOR_PROMPTS = {
    f"data.{name}" for name in ("schema", "on_bad_rows", "truncation", "max_length", "max_prompt_length")
}


# Of a run of several processes; the same as the environment's JAX_COORDINATOR_ADDRESS and so on.
PROCESS_FLAGS = {
    "coordinator_address": ("HOST:PORT", "where process 0 listens, where JAX does not find it by itself (TPU, Slurm)"),
    "num_processes": (
        "N",
        "how many processes there are; with another trainer's recipe and neither of the other two: how many devices that trainer was started on, as accelerate's flag (default: as many as are here)",
    ),
    "process_id": ("K", "which of them this is, from 0"),
}


def device_count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"'{text}' is no number of devices; give 1 or more")
    return int(text)


# Of recipes for other trainers (foreign.py).
TRAINER_FLAGS = {
    "trainer": (str, list(TRAINERS), f"which one it was written for, where its keys do not say: {', '.join(TRAINERS)}"),
    "num_processes": (
        device_count,
        None,
        "how many devices it was started on, as accelerate's flag, for it says what each of them takes",
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns 0, 2 after one line on what to change, 1 after one line on what went wrong meanwhile, or 75 where
    training was told to stop, has saved its state and wants the same command again."""
    # transformers would announce that there is no torch; none is needed.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    arguments, command, overrides = parse(sys.argv[1:] if argv is None else argv)
    try:
        return command(arguments, overrides)
    except UsageError as error:
        complain(error)
        return 2
    except KeyboardInterrupt:
        complain("interrupted; the same command starts again, from the newest checkpoint where there is one")
        return 130
    except BrokenPipeError:  # whoever read what is printed has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (FloatingPointError, DamagedStoreError, StoppedError) as error:
        complain(error)
        return getattr(error, "code", 1)


def complain(what) -> None:
    print(f"{paint('repo-jax:', 'red', sys.stderr)} {what}", file=sys.stderr)


class UsageError(Exception):
    """Something the user gave cannot be used; the message says what to change."""

    code = 2


def checked(function, *args, **kwargs):
    """Calls what looks at the user's values; what it refuses becomes a UsageError. Faults of the work itself keep their traceback."""
    try:
        return function(*args, **kwargs)
    except (ValueError, OSError) as error:
        raise UsageError(error) from error


def train_command(arguments, overrides) -> int:
    given = {name: getattr(arguments, name) for name in PROCESS_FLAGS if getattr(arguments, name) is not None}
    count, told = devices_joined, []
    if given.keys() == {"num_processes"} and checked(is_foreign, arguments.config):
        try:
            count = device_count(given.pop("num_processes"))
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"argument --num_processes: {error}") from None
    # Before the recipe, for which devices may be counted.
    os.environ |= {f"JAX_{name.upper()}": value for name, value in given.items()}
    whose = {"trainer": arguments.trainer, "num_processes": count, "tell": told.append}
    recipe = checked(load_recipe, arguments.config, overrides, **whose)
    import jax

    from repo_jax.distributed import join, stopping_at_once, together
    from repo_jax.training import prepare, run

    checked(join)
    if jax.process_index() == 0:
        for text in told:
            print(text, file=sys.stderr, flush=True)
    alone = jax.process_count() == 1  # several processes leave SIGTERM to JAX's service
    with together(), stopping_at_once() if alone else contextlib.nullcontext():
        run(checked(prepare, recipe))
    return 0


def devices_joined() -> int:
    """How many devices this run has, of all its processes."""
    import jax

    from repo_jax.distributed import join

    join()
    return jax.device_count()


def of_trainer(arguments, count: int | None = None) -> dict:
    """What is said of another trainer's recipe; `count`: how many devices it is for where that is not said (None: as many as are here)."""
    given = arguments.num_processes
    return {"trainer": arguments.trainer, "num_processes": (lambda: count) if given is None and count else given}


def evaluate_command(arguments, overrides) -> int:
    recipe = recipe_with_data(arguments, overrides, "data.eval_dataset_name", count=None)
    from repo_jax.evaluation import evaluate_setup
    from repo_jax.preparation import set_up

    if arguments.output and not pathlib.Path(arguments.output).absolute().parent.is_dir():
        raise UsageError(f"--output '{arguments.output}' lies in a folder that does not exist; make it first")
    if arguments.output and pathlib.Path(arguments.output).is_dir():
        raise UsageError(f"--output '{arguments.output}' is a folder; name a file")
    results = evaluate_setup(checked(set_up, recipe, training=False))
    text = json.dumps(results, indent=2)
    print(text)
    if arguments.output:
        pathlib.Path(arguments.output).write_text(text + "\n", encoding="utf-8")
    return 0


def generate_command(arguments, overrides) -> int:
    if unread := [name for name in overrides if name.startswith(("optim.", "loss.")) or name in NOT_FOR_PROMPTS]:
        raise UsageError(f"generate does not read {', '.join(name.split('.')[1] for name in unread)}; leave it out")
    recipe = recipe_with_data(arguments, overrides, "data.eval_dataset_name")
    from repo_jax.answers import prepare, run

    given = {name: value for name, value in vars(arguments).items() if name in GENERATE_FLAGS}
    run(checked(prepare, recipe, arguments.output, **given))
    return 0


def inspect_command(arguments, overrides) -> int:
    # A row that cannot be read is one of the things to be told.
    skip = {"data.on_bad_rows": "skip"}
    recipe = recipe_with_data(arguments, skip | overrides, "data.dataset_name")
    from repo_jax.inspection import as_text, inspect

    found = checked(inspect, recipe, show=arguments.show, compare=arguments.compare)
    if arguments.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        print(as_text(found, color=colorful(sys.stdout)))
    return int(bool(arguments.strict and found["wrong"]))


def prepare_command(arguments, overrides) -> int:
    recipe = recipe_with_data(arguments, overrides, "data.dataset_name")
    from repo_jax.stores import held_out_store, tokenizer_of, train_store

    tokenizer = checked(tokenizer_of, recipe)
    for split, open_it in (("train", train_store), ("held-out", held_out_store)):
        store = checked(open_it, recipe, tokenizer)
        if store is not None:
            print(f"{split}: {len(store)} pairs of {store.name} ({store.schema}) in {store.folder}")
            for line in store.counts():
                print(f"  {line}")
    return 0


def recipe_with_data(arguments, overrides: dict, data: str, *, count: int | None = 1):
    """The recipe of a command that takes --model and --data; what --data stands for differs. Most open no devices: see of_trainer."""
    given = {
        name: value
        for name, value in {"model.model_name_or_path": arguments.model, data: arguments.data}.items()
        if value
    }
    if arguments.model:
        given["model.model_revision"] = None  # a recipe's belongs to its own model
    return checked(load_recipe, arguments.config, given | overrides, **of_trainer(arguments, count))


def export_command(arguments, overrides) -> int:
    from repo_jax.export import check_output, export_checkpoint, open_checkpoint, push_export
    from repo_jax.models.hub import check_push
    from repo_jax.urls import is_url

    output, push_to = arguments.output, None
    if not is_url(output):
        output = pathlib.Path(output)
    elif arguments.push_to_hub:
        raise UsageError(
            f"--push_to_hub pushes a folder of this machine, and --output '{output}' is a URL; give a path"
        )
    checked(check_output, output)
    if arguments.push_to_hub:
        push_to = checked(check_push, arguments.hub_model_id or output.absolute().name)
    if arguments.adapter and (arguments.dtype or arguments.max_shard_size):
        raise UsageError("an adapter is written in float32 and in one file; leave out --dtype and --max_shard_size")
    if not arguments.push_to_hub and (arguments.hub_model_id or arguments.hub_revision or arguments.hub_private_repo):
        raise UsageError("--hub_... is given without --push_to_hub, so nothing would be pushed; add it")
    opened = checked(open_checkpoint, arguments.checkpoint, adapter=arguments.adapter)
    options = {"max_shard_bytes": arguments.max_shard_size} if arguments.max_shard_size else {}
    difference = export_checkpoint(opened, output, dtype=arguments.dtype, **options)
    if difference is None:
        print(f"adapter {output}  (for PEFT)")
    else:
        print(f"model   {output}  (reloaded; log-probs within {difference:.1g} of the checkpoint's)")
    if push_to is not None:
        private, revision = arguments.hub_private_repo, arguments.hub_revision
        print(f"hub     {push_export(output, push_to, private=private, revision=revision)}")
    return 0


def bench_command(arguments, overrides) -> int:
    given = [path for path in (arguments.config, arguments.recipe) if path is not None]
    if len(given) != 1:
        raise UsageError("bench takes one recipe, as in: repo-jax bench RECIPE")
    recipe = checked(load_recipe, given[0], overrides, **of_trainer(arguments))
    from repo_jax.benchmark import as_text, bench, prepare

    setup = checked(prepare, recipe, weights="random" if arguments.random_weights else "read")
    found = bench(setup, steps=arguments.steps, warmup=arguments.warmup, split_steps=arguments.split_steps)
    print(json.dumps(found, indent=2, allow_nan=False) if arguments.json else as_text(found))
    return 0


def plan_command(arguments, overrides) -> int:
    given = dict(overrides)
    if arguments.config is None and arguments.model_config is not None:
        given = {"model.model_name_or_path": arguments.model_config} | given
    from repo_jax.planning import as_text, command_of, plan
    from repo_jax.topology import parse_topology

    there = checked(parse_topology, arguments.topology, arguments.slices)
    recipe = checked(load_recipe, arguments.config, given, **of_trainer(arguments, there.devices))
    whose = {name: getattr(arguments, name) for name in TRAINER_FLAGS if getattr(arguments, name) is not None}
    command = command_of(arguments.config, overrides | {f"trainer.{name}": value for name, value in whose.items()})
    options = {"slices": arguments.slices, "model_config": arguments.model_config, "searching": arguments.search}
    found = checked(plan, recipe, arguments.topology, command=command, **options)
    if arguments.json:
        checked(pathlib.Path(arguments.json).write_text, json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(as_text(found))
    return 0 if found["fits"] else 1


def translate_command(arguments, overrides) -> int:
    if not checked(is_foreign, arguments.config):
        raise UsageError(f"'{arguments.config}' has our sections already; there is nothing to translate")
    tree = checked(read_tree, arguments.config, overrides, **of_trainer(arguments, 1))
    checked(to_recipe, tree)
    text = f"# Translated from {arguments.config}\n" + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    if arguments.output is None:
        print(text, end="")
    else:
        checked(pathlib.Path(arguments.output).write_text, text, encoding="utf-8")
    return 0


def losses_command(arguments, overrides) -> int:
    from repo_jax.losses import catalogue

    if arguments.name is None:
        print(catalogue.as_text())
    else:
        print(checked(catalogue.about, arguments.name))
    return 0


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is answered with one line rather than with every flag there is."""

    def error(self, message):
        self.exit(2, f"repo-jax: {message} (repo-jax --help and repo-jax COMMAND --help list what there is)\n")


def parse(argv: list[str]):
    """The parsed arguments, the command to call, and the recipe overrides {'section.leaf': value}."""
    parser = Parser(prog="repo-jax", description="Aligns language models with preference pairs.")
    versions = (
        f"repo-jax {repo_jax.__version__} (jax {importlib.metadata.version('jax')}, Python {platform.python_version()})"
    )
    parser.add_argument("--version", action="version", version=versions)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name, function, words):
        command = commands.add_parser(name, help=words, description=words, allow_abbrev=False)
        command.set_defaults(function=function)
        return command

    train = add(
        "train", train_command, "train by a recipe, evaluate, export and report; goes on from the newest checkpoint"
    )
    train.add_argument("config", help="the recipe, a YAML file")
    processes = train.add_argument_group(
        "processes", "of one run on several hosts, where JAX does not find them by itself"
    )
    for name, (metavar, words) in PROCESS_FLAGS.items():
        processes.add_argument(f"--{name}", metavar=metavar, help=words)
    add_recipe_flags(train)
    evaluate = add("evaluate", evaluate_command, "score held-out pairs with a model and print the metrics as JSON")
    add_data_flags(evaluate, "held-out preference data (data.eval_dataset_name)")
    evaluate.add_argument("--output", metavar="FILE", help="where to write the JSON as well")
    generate = add(
        "generate", generate_command, "write a model's answers to prompts, as JSON lines with AlpacaEval's columns"
    )
    add_data_flags(generate, "prompts: rows with prompt, instruction or messages (data.eval_dataset_name)")
    generate.add_argument(
        "--output", required=True, metavar="FILE", help="the file to write; one that is not finished is gone on with"
    )
    for name, (kind, words) in GENERATE_FLAGS.items():
        generate.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, metavar="X", help=words)
    inspect = add(
        "inspect", inspect_command, "say what a data set holds, what of it would be scored, and what is wrong"
    )
    add_data_flags(inspect, "preference data (data.dataset_name)")
    inspect.add_argument("--show", type=count, default=3, metavar="N", help="pairs to print decoded (default: 3)")
    inspect.add_argument(
        "--compare", choices=["official"], help="what the code released with SimPO and RePO would score instead"
    )
    inspect.add_argument("--json", action="store_true", help="print everything as JSON")
    inspect.add_argument("--strict", action="store_true", help="exit with 1 when something is wrong")
    prepare = add("prepare", prepare_command, "tokenize a recipe's data into its store, where training finds it")
    add_data_flags(prepare, "preference data (data.dataset_name)")
    export = add("export", export_command, "write a checkpoint as a Hugging Face folder")
    export.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="a checkpoint-N folder in a run's folder, or its URL"
    )
    export.add_argument("--output", required=True, metavar="DIR", help="the folder to write, or a URL")
    export.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of all weights (default: as they were before training)",
    )
    export.add_argument("--max_shard_size", type=size, metavar="SIZE", help="of a weight file at most (default: 5GB)")
    export.add_argument("--push_to_hub", action="store_true", help="push it to the Hugging Face Hub, too")
    export.add_argument(
        "--hub_model_id", metavar="ORG/NAME", help="where to (default: under OUTPUT's name, to your account)"
    )
    export.add_argument("--hub_revision", metavar="BRANCH", help="branch to push to, made if missing")
    export.add_argument("--hub_private_repo", action="store_true", default=None, help="make a new repository private")
    export.add_argument("--adapter", action="store_true", help="write the adapters of a use_peft run, for PEFT")
    bench = add("bench", bench_command, "measure how fast a recipe's updates are; nothing is written")
    bench.add_argument("config", nargs="?", help="the recipe, a YAML file")
    bench.add_argument("--config", dest="recipe", metavar="RECIPE", help="the recipe, likewise")
    bench.add_argument("--steps", type=updates, default=10, metavar="N", help="updates to measure (default: 10)")
    bench.add_argument(
        "--warmup",
        type=functools.partial(updates, least=0),
        default=2,
        metavar="N",
        help="updates before those (default: 2)",
    )
    bench.add_argument(
        "--random_weights", action="store_true", help="of the model, config.json and tokenizer are enough"
    )
    bench.add_argument(
        "--split_steps",
        type=functools.partial(updates, least=0),
        default=2,
        metavar="N",
        help="updates to take apart then; 0: none (default: 2)",
    )
    bench.add_argument("--json", action="store_true", help="print everything as JSON")
    add_recipe_flags(bench)
    plan = add(
        "plan", plan_command, "say what a recipe would need on accelerators that are not here; exits with 1 if too much"
    )
    plan.add_argument(
        "config", nargs="?", help="the recipe, a YAML file; its model's weights and its data are not read"
    )
    plan.add_argument(
        "--topology",
        required=True,
        metavar="NAME",
        help="v5e:4x4, v5p:2x2x2, v6e:16x16, tpu7x:2x2x1 (chips); v5litepod-16, v5p-16 (cores); h200:1x2x8 (slices x hosts x GPUs)",
    )
    plan.add_argument("--slices", type=int, default=1, metavar="N", help="of TPUs, side by side (default: 1)")
    plan.add_argument("--model_config", metavar="FILE", help="a config.json to take in place of the model's own")
    plan.add_argument("--search", action="store_true", help="try meshes, rows per device and remat policies")
    plan.add_argument("--json", metavar="FILE", help="where to write everything as JSON")
    add_recipe_flags(plan)
    translate = add(
        "translate", translate_command, "write another trainer's recipe as one of ours, and say what became of its keys"
    )
    translate.add_argument("config", help="a YAML file for TRL, alignment-handbook, SimPO's or RePO's scripts")
    translate.add_argument("--output", metavar="FILE", help="where to write it (default: it is printed)")
    add_recipe_flags(translate)
    for command in (train, evaluate, generate, inspect, prepare, bench, plan, translate):
        add_trainer_flags(command, taken={"num_processes"} if command is train else set())
    losses = add("losses", losses_command, "list the objectives, or say all of one")
    losses.add_argument("name", nargs="?", help="a loss_type")
    if not argv:
        parser.print_help()
        parser.exit()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        close = difflib.get_close_matches(unknown[0], [f"--{name.split('.')[1]}" for name in recipe_flags()], n=1)
        parser.error(f"unknown argument {unknown[0]}" + (f"; did you mean {close[0]}?" if close else ""))
    overrides = {name: value for name, value in vars(arguments).items() if "." in name}
    return arguments, arguments.function, overrides


def add_trainer_flags(parser: argparse.ArgumentParser, taken: set[str]) -> None:
    group = parser.add_argument_group(
        "another trainer's recipe", "which is translated first, and may be given as it is"
    )
    for name, (kind, choices, words) in TRAINER_FLAGS.items():
        if name not in taken:
            group.add_argument(f"--{name}", type=kind, choices=choices, metavar="X", help=words)


def add_data_flags(parser: argparse.ArgumentParser, data: str) -> None:
    parser.add_argument("config", nargs="?", help="a recipe, where one is wanted")
    parser.add_argument(
        "--model", metavar="NAME", help="a Hugging Face model: its folder or ORG/NAME (model.model_name_or_path)"
    )
    parser.add_argument("--data", metavar="NAME", help=data)
    add_recipe_flags(parser, taken=frozenset({"data"}))


def recipe_flags() -> dict[str, str]:
    """'section.leaf' -> what to say of it, for every leaf of the recipe."""
    from repo_jax.losses import DEFAULT_LOSS, LOSSES, OPTIONS, hyperparameters

    flags = {
        f"{section}.{name}": f"{field.default.description} (default: {default_of(field)})"
        for name, (section, field) in leaf_fields().items()
    }
    flags["loss.loss_type"] = f"the objective, of those that `repo-jax losses` lists (default: {DEFAULT_LOSS})"
    for kind, loss in LOSSES.items():
        for name, default in hyperparameters(loss).items():
            words = flags.get(f"loss.{name}", "hyperparameter; default")
            shown = default if isinstance(default, str) else format(default, "g")
            flags[f"loss.{name}"] = f"{words} {shown} for {kind},"
    for name, words in OPTIONS.items():
        flags.setdefault(f"loss.{name}", f"beside any loss: {words}")
    flags["loss.gamma_quantile"] = (
        "with --gamma auto: gamma is what this share of the training pairs' margins are below at the start (default: 0.9)"
    )
    return {name: words.rstrip(",") for name, words in flags.items()}


def add_recipe_flags(parser: argparse.ArgumentParser, taken: frozenset[str] = frozenset()) -> None:
    """A flag for every leaf of the recipe, under its own name and under section.name; values are read as YAML reads them."""
    leaves = leaf_fields()
    groups = {section: parser.add_argument_group(section) for section in SECTIONS}
    for name, words in recipe_flags().items():
        section, leaf = name.split(".")
        flags = [f"--{name}"] if leaf in taken else [f"--{leaf}", f"--{name}"]
        text = name == "loss.loss_type" or (leaf in leaves and takes_text(leaves[leaf][1]))
        options = {
            "default": argparse.SUPPRESS,
            "type": text_value if text else yaml_value,
            "metavar": "X",
            "help": words.replace("%", "%%"),
        }
        groups[section].add_argument(*flags, dest=name, **options)


def default_of(field) -> str:
    return "none, it must be set" if field.default.is_required() else json.dumps(field.default.default)


def count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is no number of pairs; give 0 or more")
    return int(text)


def updates(text: str, least: int = 1) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"'{text}' is no number of updates; give {least} or more")
    return int(text)


def size(text: str) -> int:
    """Bytes in '500MB', '5GB' or '2GiB'."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text, re.IGNORECASE)
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"'{text}' is no size; give one such as 500MB, 5GB or 2GiB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))


def text_value(text: str) -> str | None:
    return None if text == "null" else text


def yaml_value(text: str):
    try:
        return read_yaml(text)
    except ValueError:
        return text
