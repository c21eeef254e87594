"""Which data a recipe asks for, and by which rules they are tokenized."""

import dataclasses
import json
import shutil

import pytest
from examples import STORIES

from repo_jax import stores
from repo_jax.config import to_recipe
from repo_jax.data.chat import TokenOptions
from repo_jax.stores import held_out_store, token_options, tokenizer_of, train_store

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"


@pytest.fixture
def recipe(tmp_path):
    """A recipe of stories260K with this data section, whose paths are within the test's folder."""

    def make(**data):
        model = {"model_name_or_path": str(STORIES), "chat_template": TEMPLATE}
        return to_recipe({"model": model, "data": {"cache_dir": str(tmp_path / "cache")} | data})

    return make


@pytest.fixture
def write(tmp_path):
    """Writes n pairs with ids NAME-0, NAME-1, ... to a file in the test's folder; returns its path."""

    def write_file(name, n=4, **more):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [
            {"id": f"{path.stem}-{i}", "prompt": f"Day {i}", "chosen": " was fun", "rejected": " was bad at all"} | more
            for i in range(n)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write_file


@pytest.fixture
def splits(write, tmp_path):
    """A folder with a train and a test split."""
    write("pairs/train.jsonl", 4)
    write("pairs/test.jsonl", 2)
    return str(tmp_path / "pairs")


def train(recipe):
    return train_store(recipe, tokenizer_of(recipe))


def options_of(recipe, training=True):
    return token_options(recipe, training=training)


def held_out(recipe):
    return held_out_store(recipe, tokenizer_of(recipe))


def ids(pairs):
    return [pair.id for pair in pairs]


# What is trained on


def test_the_train_split_or_a_part_of_it_is_trained_on(recipe, splits):
    assert ids(train(recipe(dataset_name=splits))) == ["train-0", "train-1", "train-2", "train-3"]
    part = recipe(dataset_name=splits, dataset_train_split="test[:1]+train[2:]")
    assert ids(train(part)) == ["test-0", "train-2", "train-3"]


def test_a_mixture_takes_its_share_of_each_data_set_in_order(recipe, write, splits):
    mixture = {write("a.jsonl", 4): 0.5, splits: 0.25, write("b.jsonl", 2): 1.0}
    store = train(recipe(dataset_mixer=mixture))
    assert ids(store) == ["a-0", "a-1", "train-0", "b-0", "b-1"]
    assert store.name == " + ".join([f"{next(iter(mixture))}", f"{splits}/train.jsonl", list(mixture)[2]])


@pytest.mark.parametrize("fraction", [0, 1.5])
def test_a_share_that_is_none_is_refused(recipe, write, fraction):
    path = write("a.jsonl")
    with pytest.raises(ValueError, match=f"'{path}' has fraction {float(fraction)}; give a share"):
        train(recipe(dataset_mixer={path: fraction}))


def test_data_that_are_not_named_are_asked_for(recipe):
    with pytest.raises(ValueError) as refused:
        train(recipe())
    assert str(refused.value) == (
        "recipe.data.dataset_name is not set; give a file of preference pairs, a data set's name, or in Python train_dataset"
    )


def test_the_configuration_is_handed_on_to_every_data_set(recipe, write, monkeypatch, splits):
    given = []
    original = stores.open_source
    monkeypatch.setattr(
        stores, "open_source", lambda *args, **kwargs: given.append(kwargs) or original(*args, **kwargs)
    )
    one = recipe(dataset_name=splits, dataset_config="short", eval_dataset_name=write("a.jsonl"))
    train(one), held_out(one)
    assert given == [{"config": "short"}] * 2


@pytest.mark.parametrize("config", [None, "long"])
def test_a_configuration_that_is_missing_or_wrong_is_answered_with_those_there_are(recipe, write, tmp_path, config):
    for name in ("plain", "short"):
        write(f"hub/{name}/train.jsonl")
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/train.jsonl\n" for name in ("plain", "short"))
    (tmp_path / "hub" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    with pytest.raises(FileNotFoundError) as refused:
        train(recipe(dataset_name=str(tmp_path / "hub"), dataset_config=config))
    assert all(name in str(refused.value) for name in ("plain", "short")) and "\n" not in str(refused.value)


def test_schema_and_bad_rows_are_as_the_recipe_says(recipe, write, tmp_path):
    path = tmp_path / "mixed.jsonl"
    path.write_text('{"prompt": "Once", "chosen": "Once upon", "rejected": "Once there"}\noops\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"mixed\.jsonl line 2 is not JSON"):
        train(recipe(dataset_name=str(path)))
    store = train(recipe(dataset_name=str(path), schema="implicit", on_bad_rows="skip"))
    assert (store.schema, store.dropped) == ("implicit, texts", {"bad_row": 1})
    with pytest.raises(ValueError, match="has no 'conversations'"):
        train(recipe(dataset_name=str(path), schema="conversations"))


# What is held out


def test_the_test_split_of_what_is_trained_on_is_held_out(recipe, splits):
    assert ids(held_out(recipe(dataset_name=splits))) == ["test-0", "test-1"]
    assert ids(held_out(recipe(dataset_name=splits, dataset_test_split="train[-1:]"))) == ["train-3"]


def test_a_lone_file_has_nothing_to_hold_out(recipe, write):
    assert held_out(recipe(dataset_name=write("a.jsonl"))) is None
    assert held_out(recipe()) is None


def test_a_test_split_of_null_holds_nothing_out(recipe, splits):
    assert held_out(recipe(dataset_name=splits, dataset_test_split=None)) is None
    assert held_out(recipe(dataset_mixer={splits: 0.5}, dataset_test_split=None)) is None


def test_a_folder_without_the_test_split_is_refused(recipe, splits):
    with pytest.raises(FileNotFoundError, match=r"has no split 'dev'.*splits present: test, train"):
        held_out(recipe(dataset_name=splits, dataset_test_split="dev"))


def test_of_a_mixture_the_whole_test_splits_of_those_that_have_any_are_held_out(recipe, write, splits):
    write("other/train.jsonl"), write("other/test.jsonl", 3)
    other = splits.replace("pairs", "other")
    mixture = {write("a.jsonl"): 0.5, splits: 0.25, other: 1.0}
    assert ids(held_out(recipe(dataset_mixer=mixture))) == ["test-0", "test-1", "test-0", "test-1", "test-2"]
    assert held_out(recipe(dataset_mixer={write("a.jsonl"): 0.5, write("b.jsonl"): 1})) is None


def test_what_is_named_for_evaluation_goes_before_the_test_split(recipe, write, splits):
    file = write("mine.jsonl", 1)
    assert ids(held_out(recipe(dataset_name=splits, eval_dataset_name=file))) == ["mine-0"]
    assert ids(held_out(recipe(dataset_name=file, eval_dataset_name=splits))) == ["test-0", "test-1"]
    assert ids(held_out(recipe(eval_dataset_name=splits, dataset_test_split=None))) == ["test-0", "test-1"]
    assert ids(held_out(recipe(eval_dataset_name=splits, dataset_test_split="train[:1]"))) == ["train-0"]


# Prepared before


@pytest.fixture
def prepared(recipe, splits):
    """The folder of a store, whose data and cache are gone."""
    store = train(recipe(dataset_name=splits))
    folder = shutil.copytree(store.folder, f"{splits}-tokens")
    shutil.rmtree(splits)
    shutil.rmtree(recipe().data.cache_dir)
    return str(folder)


def test_a_prepared_folder_is_a_data_set_of_its_own(recipe, prepared):
    assert ids(train(recipe(dataset_name=prepared))) == ["train-0", "train-1", "train-2", "train-3"]
    assert ids(held_out(recipe(eval_dataset_name=prepared))) == ["train-0", "train-1", "train-2", "train-3"]
    assert held_out(recipe(dataset_name=prepared)) is None


def test_a_folder_prepared_by_other_rules_is_refused(recipe, prepared):
    with pytest.raises(ValueError) as refused:
        train(recipe(dataset_name=prepared, max_length=100))
    assert str(refused.value) == (
        f"'{prepared}' was prepared with max_length=512 but the recipe has max_length=100; prepare it anew"
    )


@pytest.mark.parametrize(
    "given, refused",
    [
        ({"dataset_train_split": "train[:1]"}, "a slice"),
        ({"schema": "explicit"}, "schema"),
        ({"dataset_config": "default"}, "dataset_config"),
    ],
)
def test_what_cannot_be_done_to_a_prepared_folder_is_refused(recipe, prepared, given, refused):
    with pytest.raises(ValueError) as said:
        train(recipe(dataset_name=prepared, **given))
    assert str(said.value) == f"'{prepared}' is prepared already, whole and by itself; leave out {refused}"


def test_a_prepared_folder_is_no_part_of_a_mixture(recipe, prepared):
    with pytest.raises(ValueError, match=r"is prepared already, whole and by itself; leave out dataset_mixer"):
        train(recipe(dataset_mixer={prepared: 0.5}))


# The rules


def test_what_a_recipe_leaves_out_is_as_the_token_options_have_it(recipe):
    assert options_of(recipe()) == TokenOptions(max_length=512)


def test_every_token_option_is_a_leaf_of_the_recipe(recipe):
    given = {
        "max_length": 100,
        "max_prompt_length": 50,
        "truncation": "keep_start",
        "score_header": True,
        "append_eos": "never",
        "compat": "none",
        "use_poet": True,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    assert given.keys() == {field.name for field in dataclasses.fields(TokenOptions)}
    assert dataclasses.asdict(options_of(recipe(**given))) == given


def test_held_out_answers_are_scored_whole_and_every_token_counts_alike(recipe, splits):
    given = recipe(dataset_name=splits, use_poet=True)
    assert (options_of(given).use_poet, options_of(given, training=False).use_poet) == (True, False)
    assert len(set(train(given)[0].lengths[1:])) == 1
    assert len(set(held_out(given)[0].lengths[1:])) == 2
    assert held_out(recipe(dataset_name=splits, temporal_decay=0.5))[0].weights is None


def test_the_official_way_cuts_officially_unless_told_otherwise(recipe):
    official = {"compat": "official", "max_prompt_length": 100}
    assert options_of(recipe(**official)) == TokenOptions(max_length=512, truncation="official", **official)
    assert options_of(recipe(**official, truncation="drop")).truncation == "drop"
    assert options_of(recipe(compat="none", max_prompt_length=100)).truncation == "drop"


def test_options_that_contradict_each_other_are_refused(recipe):
    with pytest.raises(ValueError, match="max_prompt_length=600 leaves no room for an answer in max_length=512"):
        options_of(recipe(max_prompt_length=600))


def test_a_length_beyond_the_models_positions_is_refused(recipe):
    assert options_of(recipe(max_length=512)).max_length == 512
    with pytest.raises(ValueError) as refused:
        options_of(recipe(max_length=513))
    assert str(refused.value) == "max_length=513 but the model has 512 positions; lower max_length to at most that"


def test_a_folder_that_holds_a_tokenizer_alone_needs_a_length(recipe, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(STORIES / name, tmp_path)
    alone = dataclasses.replace(recipe().model, model_name_or_path=str(tmp_path))
    with pytest.raises(ValueError) as refused:
        options_of(dataclasses.replace(recipe(), model=alone))
    assert str(refused.value) == f"'{tmp_path}' does not say how many positions it has; give max_length"
    given = dataclasses.replace(recipe(max_length=4096), model=alone)
    assert options_of(given).max_length == 4096
    assert tokenizer_of(given).chat_template == TEMPLATE


# What single tokens count for


def test_weights_are_those_of_the_recipe(recipe, splits):
    [plain, *_] = train(recipe(dataset_name=splits))
    lengths = plain.lengths[1:]
    assert plain.weights is None and lengths[0] < lengths[1]
    [ld, *_] = train(recipe(dataset_name=splits, ld_alpha=0.25))
    assert ld.weights[1].tolist() == [1] * lengths[0] + [0.25] * (lengths[1] - lengths[0])
    [decayed, *_] = train(recipe(dataset_name=splits, temporal_decay=0.5))
    assert decayed.weights[0].tolist() == [0.5 ** (t + 1) for t in range(lengths[0])]
    [zero, *_] = train(recipe(dataset_name=splits, ld_alpha=0))
    assert zero.weights[1].tolist() == [1] * lengths[0] + [0] * (lengths[1] - lengths[0])


def test_weights_make_no_other_store(recipe, splits):
    assert train(recipe(dataset_name=splits)).key == train(recipe(dataset_name=splits, ld_alpha=0.25)).key


def test_unpaired_rows_have_no_shorter_answer_for_ld_alpha(recipe, write):
    path = write("unpaired.jsonl", chosen=None, rejected=None, completion=" was fun", label=True)
    assert train(recipe(dataset_name=path)).unpaired
    assert train(recipe(dataset_name=path, temporal_decay=0.5))[0].weights[0][0] == 0.5
    with pytest.raises(ValueError) as refused:
        train(recipe(dataset_name=path, ld_alpha=0.5))
    assert str(refused.value) == f"ld_alpha=0.5 compares two answers, but '{path}' is unpaired; leave it out"
