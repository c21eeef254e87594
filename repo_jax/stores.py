"""The model files, tokenizer and token stores a recipe asks for; no jax, so that looking at data opens no devices."""

import dataclasses
import functools
import json
import os
import pathlib

from repo_jax import urls
from repo_jax.config import DataSection, Recipe
from repo_jax.data import weights
from repo_jax.data.chat import TokenOptions, load_tokenizer
from repo_jax.data.sources import Source, has_splits, open_source, source_of
from repo_jax.data.store import TokenStore, is_prepared, open_prepared, open_store
from repo_jax.models.hub import ModelFiles, find_model

FETCHED: dict[tuple, ModelFiles] = {}  # by this process: (name, revision, cache_dir, weights) -> where it is
COPIED: dict[tuple[str, str], str] = {}  # by this process: (URL of data, cache_dir) -> the path of its copy
GIVEN: dict[str, Source] = {}  # to this process, as rows: the name that a recipe has for them -> the rows
FROM_PYTHON = "from Python: "  # how such a name begins
# What rows are called where they are given, and the fields of the data section in whose place they stand, the first of which gets the name.
ROWS = {
    "train_dataset": ("dataset_name", "dataset_mixer"),
    "eval_dataset": ("eval_dataset_name",),
    "dataset": ("eval_dataset_name",),
    "prompts": ("eval_dataset_name",),
}


def model_files(recipe: Recipe, *, weights: bool = False) -> ModelFiles:
    """Where the recipe's model lies, fetched if it is not here; without `weights` configuration and tokenizer are enough."""
    model = recipe.model
    given = (model.model_name_or_path, model.model_revision, recipe.data.cache_dir)
    # What is fetched is fetched once, so that a command sees one version of it.
    fetched = FETCHED.get((*given, True)) or FETCHED.get((*given, weights))
    if fetched is None or pathlib.Path(model.model_name_or_path).is_dir():
        fetched = find_model(given[0], revision=given[1], cache_dir=given[2], weights=weights)
        FETCHED[*given, weights] = fetched
    return fetched


def tokenizer_of(recipe: Recipe):
    """The tokenizer of the recipe's model, with the recipe's chat template and end token."""
    model, folder = recipe.model, model_files(recipe).tokenizer
    return load_tokenizer(str(folder), chat_template=model.chat_template, eos_token=model.eos_token)


def token_options(recipe: Recipe, *, training: bool) -> TokenOptions:
    """How the recipe wants its data tokenized; its model says how long a pair may be at most."""
    data, positions = recipe.data, model_positions(model_files(recipe).weights)
    max_length = data.max_length or positions
    if max_length is None:
        raise ValueError(f"'{recipe.model.model_name_or_path}' does not say how many positions it has; give max_length")
    if positions is not None and max_length > positions:
        raise ValueError(
            f"max_length={max_length} but the model has {positions} positions; lower max_length to at most that"
        )
    return TokenOptions(
        max_length=max_length,
        max_prompt_length=data.max_prompt_length,
        truncation=data.truncation or ("official" if data.compat == "official" else "drop"),
        score_header=data.score_header,
        append_eos=data.append_eos,
        compat=data.compat,
        # What a loss is to look at is not what a model is measured by: held-out answers are scored whole.
        use_poet=data.use_poet and training,
        chat_template_kwargs=data.chat_template_kwargs or {},
    )


def model_positions(folder: pathlib.Path) -> int | None:
    """The longest sequence a checkpoint was built for; None for a folder that holds a tokenizer alone."""
    file = folder / "config.json"
    return json.loads(file.read_text(encoding="utf-8")).get("max_position_embeddings") if file.is_file() else None


def with_rows(recipe: Recipe, **given) -> Recipe:
    """The recipe with rows that a program holds (sources.source_of) in place of the data it names: train_dataset=rows and so on, as in ROWS;
    None leaves it as it is.

    Rows are named by their content, so that a run goes on with the same ones only. Raises ValueError where the recipe names such data too.
    """
    changes = {}
    for argument, rows in given.items():
        if rows is None:
            continue
        for field in ROWS[argument]:
            named = getattr(recipe.data, field)
            if named is not None and not is_from_python(named):
                raise ValueError(
                    f"{argument} is given, but the recipe has {field}={named!r} too; leave one of them out"
                )
        source = source_of(rows, argument)
        name = f"{FROM_PYTHON}{argument}, {len(source)} rows, sha256 {source.digest()[:16]}"
        GIVEN[name], changes[ROWS[argument][0]] = source, name
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, **changes))


def let_go(recipe: Recipe) -> None:
    """Forgets the rows that with_rows keeps for a recipe that has done its work."""
    for name in (recipe.data.dataset_name, recipe.data.eval_dataset_name):
        GIVEN.pop(name, None)


def is_from_python(dataset) -> bool:
    """Whether a name in a recipe stands for rows that a program held."""
    return isinstance(dataset, str) and dataset.startswith(FROM_PYTHON)


def open_data(data: DataSection, dataset: str | dict[str, float], split: str) -> Source:
    """The rows of data that a recipe names, wherever they lie. Raises ValueError or FileNotFoundError."""
    if not is_from_python(dataset):
        paths = {name: data_path(name, data.cache_dir) for name in ([dataset] if isinstance(dataset, str) else dataset)}
        return _source(dataset, paths, split, config=data.dataset_config)
    argument = dataset.removeprefix(FROM_PYTHON).partition(",")[0]
    if dataset not in GIVEN:
        raise ValueError(
            f"the recipe's data '{dataset}' were rows of a Python program; give them again: repo_jax.train(recipe, {argument}=rows)"
        )
    if "[" in split:
        raise ValueError(f"{argument} is taken whole; slice it in Python, and leave '{split}' out of the recipe")
    return GIVEN[dataset]


def train_store(recipe: Recipe, tokenizer) -> TokenStore:
    """The data to train on, prepared on first use. Raises ValueError or FileNotFoundError for what cannot be used."""
    dataset = recipe.data.dataset_name or recipe.data.dataset_mixer
    if dataset is None:
        raise ValueError(
            "recipe.data.dataset_name is not set; give a file of preference pairs, a data set's name, or in Python train_dataset"
        )
    store = _open(recipe, tokenizer, dataset, recipe.data.dataset_train_split, training=True)
    if store.unpaired and recipe.data.ld_alpha is not None:
        raise ValueError(
            f"ld_alpha={recipe.data.ld_alpha:g} compares two answers, but '{store.name}' is unpaired; leave it out"
        )
    return store


def held_out_store(recipe: Recipe, tokenizer) -> TokenStore | None:
    """The data to evaluate on: eval_dataset_name, or the test split of what is trained on; None where there is none.

    Its tokens count as they are, whatever use_poet, ld_alpha or temporal_decay make of those that are trained on.
    """
    data, split = recipe.data, recipe.data.dataset_test_split
    if data.eval_dataset_name is not None:
        return _open(recipe, tokenizer, data.eval_dataset_name, split or "test", training=False)
    splitless = data.dataset_name is None or is_from_python(data.dataset_name)
    given = data.dataset_mixer or ([] if splitless else [data.dataset_name])
    here = {name: data_path(name, data.cache_dir) for name in given} if split is not None else {}
    names = [name for name, path in here.items() if has_splits(path) and not is_prepared(pathlib.Path(path))]
    if split is None or not names:
        return None
    whole = dict.fromkeys(names, 1.0) if data.dataset_mixer else names[0]
    try:
        return _open(recipe, tokenizer, whole, split, training=False)
    except FileNotFoundError as error:
        said = "or set dataset_test_split to the split to evaluate on, or to null for none"
        raise FileNotFoundError(f"{error}; {said}") from None


def _open(recipe: Recipe, tokenizer, dataset: str | dict[str, float], split: str, *, training: bool) -> TokenStore:
    data, options = recipe.data, token_options(recipe, training=training)
    transform = _token_weights(data) if training else None
    paths = {name: data_path(name, data.cache_dir) for name in ([dataset] if isinstance(dataset, str) else dataset)}
    prepared = [name for name, path in paths.items() if is_prepared(pathlib.Path(path))]
    if not prepared:
        source = open_data(data, dataset, split)
        rules = {"schema": data.schema, "on_bad_rows": data.on_bad_rows, "cache_dir": data.cache_dir}
        return open_store(source, tokenizer, options, transform=transform, **rules)
    given = {
        "a slice": "[" in split,
        "schema": data.schema != "auto",
        "dataset_config": data.dataset_config is not None,
    }
    given["dataset_mixer"] = not isinstance(dataset, str)
    if any(given.values()):
        refused = ", ".join(name for name in given if given[name])
        raise ValueError(f"'{prepared[0]}' is prepared already, whole and by itself; leave out {refused}")
    return open_prepared(pathlib.Path(paths[dataset]), tokenizer, options, transform=transform)


def data_path(name: str, cache_dir: str) -> str:
    """Where data lie that a recipe names: a URL is copied here, once for all commands, and looked up once by each."""
    if not urls.is_url(name):
        return name
    if (name, cache_dir) not in COPIED:
        place = pathlib.Path(os.path.expanduser(cache_dir)) / "data"
        COPIED[name, cache_dir] = str(urls.fetched(urls.without_secrets("dataset_name", name), place))
    return COPIED[name, cache_dir]


def _source(dataset: str | dict[str, float], paths: dict[str, str], split: str, *, config: str | None) -> Source:
    """open_source of the copies; for people the data bear the names that they were given."""
    if paths == {name: name for name in paths}:
        return open_source(dataset, split, config=config)
    here = paths[dataset] if isinstance(dataset, str) else {paths[name]: share for name, share in dataset.items()}
    try:
        source = open_source(here, split, config=config)
    except FileNotFoundError as error:
        raise FileNotFoundError(_named(str(error), paths)) from None
    except ValueError as error:
        raise ValueError(_named(str(error), paths)) from None
    return dataclasses.replace(source, name=_named(source.name, paths))


def _named(text: str, paths: dict[str, str]) -> str:
    for name, path in paths.items():
        text = text.replace(path, name)
    return text


def _token_weights(data: DataSection):
    """What makes single tokens count differently in training, or None."""
    if data.ld_alpha is not None:
        return functools.partial(weights.ld, alpha=data.ld_alpha)
    if data.temporal_decay is not None:
        return functools.partial(weights.temporal_decay, gamma=data.temporal_decay)
    return None
