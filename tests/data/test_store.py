"""The token store: what goes in comes out, once; what is dropped or noticed is counted; what is broken is not read."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
from examples import ROOT, STORIES, tokenize, tokens
from transformers import AutoTokenizer

from repo_jax.data import store
from repo_jax.data.chat import TokenOptions, load_tokenizer
from repo_jax.data.schema import DamagedStoreError, read_examples
from repo_jax.data.sources import open_source
from repo_jax.data.store import NothingLeftError, TokenStore, is_prepared, open_prepared, open_store
from repo_jax.data.weights import temporal_decay

TEMPLATE = "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
PAIRS = [("Once", " upon a time", " there"), ("Lily", " had a ball", " ran away"), ("The dog", " ran", " sat down")]
COLUMNS = ("prompt", "chosen", "rejected")


def said(role, content):
    return [{"role": role, "content": content}]


REFUSED = (said("tool", "4"), said("assistant", "a"), said("assistant", "b"))
TALK = (said("user", "Hello"), said("assistant", "Hi!"), said("assistant", "No."))


@pytest.fixture
def tokenizer():
    return load_tokenizer(str(STORIES), chat_template=TEMPLATE)


@pytest.fixture
def file(tmp_path):
    """Writes rows to pairs.jsonl and returns its path. A triple becomes a pair with an id, row-0, row-1, ...; a text a line."""

    def write(rows=PAIRS, name="pairs.jsonl"):
        lines = []
        for i, row in enumerate(rows):
            if isinstance(row, tuple):
                row = {"id": f"row-{i}"} | dict(zip(COLUMNS, row, strict=True))
            lines.append(row if isinstance(row, str) else json.dumps(row))
        path = tmp_path / name
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    return write


@pytest.fixture
def opened(tmp_path, tokenizer):
    """open_store of one split of a data set, with a cache of the test's own; the options' max_length is 64."""

    def open_it(dataset, split="train", *, tokenizer=tokenizer, schema="auto", on_bad_rows="error", **options):
        source = open_source(dataset if isinstance(dataset, dict) else str(dataset), split)
        options = TokenOptions(**{"max_length": 64} | options)
        rules = {"schema": schema, "on_bad_rows": on_bad_rows}
        return open_store(source, tokenizer, options, cache_dir=str(tmp_path / "cache"), **rules)

    return open_it


def examples_of(path):
    return list(read_examples(open_source(str(path), "train").rows()))


def ids(pairs):
    return [pair.id for pair in pairs]


def assert_same_pair(ours, theirs):
    for name, one, other in zip(ours._fields, ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other, err_msg=name)
    assert {part.dtype for part in (ours.prompt, *ours.branches)} == {np.dtype(np.int32)}
    assert {mask.dtype for mask in ours.masks} == {np.dtype(bool)}


# Contents


def test_pairs_come_back_in_order_as_they_were_tokenized(file, opened, tokenizer, monkeypatch):
    monkeypatch.setattr(store, "CHUNK", 7)
    path = file([(f"Day {i}", " was fun" * (1 + i % 3), " was bad") for i in range(30)])
    pairs = opened(path)
    assert len(pairs) == 30
    for ours, example in zip(pairs, examples_of(path), strict=True):
        assert_same_pair(ours, tokenize(tokenizer, example).pair)


def test_messages_come_back_as_they_were_tokenized(file, opened, tokenizer):
    path = file([(said("user", "Où ?"), said("assistant", "Là."), said("assistant", "Non 🙂"))])
    assert_same_pair(opened(path)[0], tokenize(tokenizer, *examples_of(path)).pair)


def test_answers_that_are_scored_in_pieces_come_back(file, opened, monkeypatch):
    masks = [[True, False, True, False], [False, True, True]]
    result = store.Tokenized(tokens([5, 6], [7, 8, 9, 10], [11, 12, 13], masks, name="row-0", where="somewhere"))
    monkeypatch.setattr(store, "PairTokenizer", lambda *_: lambda examples: [result for _ in examples])
    pairs = opened(file(PAIRS[:1]))
    assert_same_pair(pairs[0], result.pair)
    assert pairs.scored.tolist() == [[2, 2]] and pairs.lengths.tolist() == [[2, 4, 3]]


def test_the_store_knows_the_lengths_without_the_pairs(file, opened):
    pairs = opened(file())
    assert pairs.lengths.tolist() == [list(pair.lengths) for pair in pairs]
    assert pairs.slots.tolist() == [pair.slots for pair in pairs]
    assert pairs.scored.tolist() == [[int(mask.sum()) for mask in pair.masks] for pair in pairs]


def test_a_store_is_a_sequence_that_ends(file, opened):
    pairs = opened(file())
    assert ids(pairs) == ["row-0", "row-1", "row-2"]
    assert pairs[np.int64(2)].id == "row-2"
    for beyond in (3, -1):
        with pytest.raises(IndexError):
            pairs[beyond]


def test_the_store_says_what_it_was_made_of(file, opened):
    path = file([*PAIRS, ("Once", "", " there")])
    pairs = opened(path, "train[1:]")
    assert (pairs.name, pairs.schema, pairs.rows, pairs.unpaired) == (f"{path}[1:]", "explicit, texts", 3, False)
    assert opened(file([TALK])).schema == "explicit, messages"


def test_rows_are_read_by_the_schema_that_is_named(file, opened):
    rows = [("Once", "Once upon", "Once there")]
    by_columns, by_name = opened(file(rows)), opened(file(rows), schema="implicit")
    assert (by_columns.schema, by_name.schema) == ("explicit, texts", "implicit, texts")
    assert by_name.lengths[0, 1] < by_columns.lengths[0, 1]


def test_a_mixture_keeps_the_order_the_schemas_and_the_places_of_its_parts(file, opened):
    first, second = (
        file(PAIRS, "first.jsonl"),
        file([{"chosen": "Once upon", "rejected": "Once there"}], "second.jsonl"),
    )
    pairs = opened({str(first): 0.67, str(second): 1.0})
    assert [pair.where for pair in pairs] == [f"{first} line 1", f"{first} line 2", f"{second} line 1"]
    assert pairs.schema == "explicit, texts + implicit, texts"


def test_the_row_that_a_pair_was_made_of_comes_back(file, opened):
    rows = [
        {"prompt": "Once", "chosen": " upon", "rejected": " there", "source": "é 🙂", "nested": {"a": [1, None, 2.5]}},
        {"prompt": "Once", "chosen": " ", "rejected": " there"},
        {"prompt": "Lily", "chosen": " had", "rejected": " ran", "margin": 0.5},
    ]
    pairs = opened(file(rows))
    assert [pairs.source_row(i) for i in range(2)] == [("pairs.jsonl:1", rows[0]), ("pairs.jsonl:3", rows[2])]


def test_columns_come_back_with_nan_where_a_row_has_none(file, opened):
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in PAIRS]
    rows[0] |= {"margin": 1.5, "score_chosen": None}
    rows[2] |= {"margin": -2, "label_prob": 1}
    dropped = rows[0] | {"chosen": "", "weight": 3.0}
    columns = opened(file([dropped, *rows])).columns
    assert sorted(columns) == ["label_prob", "margin"]
    np.testing.assert_array_equal(columns["margin"], [1.5, math.nan, -2.0])
    np.testing.assert_array_equal(columns["label_prob"], [math.nan, math.nan, 1.0])
    assert {column.dtype for column in columns.values()} == {np.dtype(np.float64)}
    assert opened(file()).columns == {}


def test_a_transform_sees_every_pair_that_is_read(file, opened):
    plain = opened(file())
    pairs = TokenStore(plain.folder, transform=lambda pair: temporal_decay(pair, gamma=0.5))
    for one, other in zip(plain, pairs, strict=True):
        assert one.weights is None and one.id == other.id
        assert [w.tolist() for w in other.weights] == [[0.5 ** (t + 1) for t in range(m.sum())] for m in one.masks]


# Unpaired


def test_unpaired_rows_come_back_with_the_one_answer_they_have(file, opened, tokenizer):
    rows = [
        {"prompt": "Once", "completion": " upon a time", "label": True},
        {"prompt": "The dog", "completion": " ran", "label": False},
    ]
    path = file(rows)
    pairs = opened(path)
    assert (pairs.unpaired, pairs.schema) == (True, "unpaired, texts")
    assert (pairs.lengths[:, 1:] > 0).tolist() == (pairs.scored > 0).tolist() == [[True, False], [False, True]]
    for ours, example in zip(pairs, examples_of(path), strict=True):
        assert_same_pair(ours, tokenize(tokenizer, example).pair)
    assert pairs.source_row(1)[1] == rows[1]


def test_pairs_and_unpaired_rows_do_not_mix(file, opened):
    first = file(PAIRS, "first.jsonl")
    second = file([{"prompt": "Once", "completion": " upon a time", "label": True}], "second.jsonl")
    with pytest.raises(ValueError) as refused:
        opened({str(first): 1.0, str(second): 1.0})
    assert str(refused.value) == (
        f"{first} + {second} mixes pairs with unpaired rows (prompt, completion, label); keep them in separate data sets"
    )


# Counts


def test_what_is_dropped_is_counted_and_named(file, opened):
    rows = [("Once", "", " there"), *PAIRS, ("Once", " upon", " upon"), ("Once", " upon", " \n")]
    pairs = opened(file([*rows, ("Once", " a" * 80, " b")]))
    assert pairs.dropped == {"empty": 2, "identical": 1, "over_long": 1}
    assert pairs.named == {"empty": ["row-0", "row-5"], "identical": ["row-4"], "over_long": ["row-6"]}
    assert (pairs.rows, ids(pairs)) == (7, ["row-1", "row-2", "row-3"])
    assert pairs.noticed == {}


def test_answers_to_different_prompts_are_dropped_and_counted(file, opened):
    different = {
        "id": "apart",
        "chosen": said("user", "a") + said("assistant", "b"),
        "rejected": said("user", "c") + said("assistant", "d"),
    }
    alike = {
        "chosen": said("user", "a") + said("assistant", "b"),
        "rejected": said("user", "a") + said("assistant", "d"),
    }
    pairs = opened(file([alike, different]))
    assert (pairs.dropped, pairs.named) == ({"prompt_mismatch": 1}, {"prompt_mismatch": ["apart"]})


def test_what_is_noticed_of_what_is_kept_is_counted_and_named(file, opened, tokenizer):
    special = (said("user", "Once</s>"), said("assistant", "upon"), said("assistant", "there"))
    pairs = opened(file([TALK, special, special]))
    assert (pairs.noticed, pairs.dropped) == ({"special_text": 2}, {})
    assert pairs.named == {"special_text": ["row-1", "row-2"]}
    open_ended = load_tokenizer(str(STORIES), chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    pairs = opened(file([TALK, special]), tokenizer=open_ended)
    assert pairs.noticed == {"missing_eos": 2, "special_text": 1}
    cut = opened(file([*PAIRS, ("Once", " a" * 80, " b")]), truncation="keep_end")
    assert (cut.noticed, cut.named) == ({"truncated": 1}, {"truncated": ["row-3"]})


def test_every_row_is_counted_and_the_first_five_are_named(file, opened):
    pairs = opened(file([("Once", "", " there")] * 7 + PAIRS))
    assert pairs.dropped == {"empty": 7}
    assert pairs.named == {"empty": ["row-0", "row-1", "row-2", "row-3", "row-4"]}


def test_the_lines_say_how_many_of_which_rows_and_warn_above_one_percent(file, opened):
    rows = [("Once", f" upon {i}", " there") for i in range(195)]
    empty, long = ("Once", "", " there"), ("Once", " a" * 80, " b")
    assert opened(file([rows[0], *[empty] * 3, *rows[1:], *[long] * 2])).counts() == [
        "warning: 3 of 200 rows dropped (1.5%), pairs with an empty answer or an empty prompt: row-1, row-2, row-3",
        "2 of 200 rows dropped (1.0%), pairs over max_length or max_prompt_length: row-198, row-199",
    ]
    assert opened(file([rows[0], *[empty] * 7, *rows[1:]])).counts() == [
        "warning: 7 of 202 rows dropped (3.5%), pairs with an empty answer or an empty prompt: row-1, row-2, row-3, row-4, row-5, ..."
    ]
    assert opened(file()).counts() == []


def test_a_line_says_what_was_noticed(file, opened):
    special = (said("user", "Once</s>"), said("assistant", "upon"), said("assistant", "there"))
    assert opened(file([TALK, special])).counts() == [
        "warning: 1 of 2 rows kept (50.0%), conversations that hold text like a special token, which is encoded as text: row-1"
    ]


def test_all_that_can_become_of_a_row_has_words():
    source = (ROOT / "repo_jax" / "data" / "chat.py").read_text(encoding="utf-8")
    dropped = {*re.findall(r'Tokenized\(None, "(\w+)"', source), "bad_row", "prompt_mismatch"}
    assert dropped == store.DROPPED.keys()
    assert {*re.findall(r'noticed\.add\("(\w+)"', source)} == store.NOTICED.keys()


def test_counts_are_known_when_the_store_is_opened_again(file, opened):
    path = file([("Once", "", " there"), {"margin": 2.0} | dict(zip(COLUMNS, PAIRS[0], strict=True)), "oops"])
    first, second = opened(path, on_bad_rows="skip"), opened(path, on_bad_rows="skip")
    assert second.dropped == first.dropped == {"empty": 1, "bad_row": 1}
    for name in ("named", "noticed", "rows", "schema", "name", "unpaired"):
        assert getattr(second, name) == getattr(first, name)
    assert second.columns["margin"].tolist() == [2.0]
    assert second.counts() == first.counts()


def test_data_of_which_nothing_is_left_are_refused_with_the_reasons(file, opened):
    path = file([("Once", " upon", " upon"), ("Once", "", " there"), ("Once", " there", "")])
    with pytest.raises(NothingLeftError) as refused:
        opened(path)
    assert str(refused.value) == (
        f"no pair of {path} can be used (1 of 3 rows dropped (33.3%), pairs whose answers are the same: row-0; "
        "2 of 3 rows dropped (66.7%), pairs with an empty answer or an empty prompt: row-1, row-2)"
    )
    assert isinstance(refused.value, ValueError)
    assert (refused.value.rows, refused.value.dropped) == (3, {"identical": 1, "empty": 2})
    assert len(refused.value.counts) == 2


def test_data_without_rows_are_refused(file, opened):
    path = file([])
    with pytest.raises(ValueError) as refused:
        opened(path)
    assert str(refused.value) == f"no pair of {path} can be used (it has no rows)"


# Bad rows


def test_a_bad_line_stops_with_its_file_and_line_and_leaves_no_store(file, opened, tmp_path):
    path = file([*PAIRS, "oops"])
    for _ in range(2):
        with pytest.raises(ValueError) as refused:
            opened(path)
        assert str(refused.value).startswith(f"{path} line 4 is not JSON: ")
        assert not any(path.is_file() and path.name != "lock" for path in (tmp_path / "cache").rglob("*"))
    assert len(opened(file())) == 3


def test_a_bad_line_may_be_skipped_and_is_counted_and_named(file, opened):
    path = file([PAIRS[0], "oops", *PAIRS[1:], {"id": "mine", "prompt": "a", "chosen": "b"}])
    pairs = opened(path, on_bad_rows="skip")
    assert ids(pairs) == ["row-0", "row-2", "row-3"]
    assert (pairs.rows, pairs.dropped) == (5, {"bad_row": 2})
    assert pairs.named == {"bad_row": ["pairs.jsonl:2", "mine"]}
    (line,) = pairs.counts()
    assert line.startswith("warning: 2 of 5 rows dropped (40.0%), rows that cannot be read: pairs.jsonl:2, mine (")
    assert f"({path} line 2 is not JSON: " in line


def test_a_conversation_that_the_template_refuses_is_as_bad_as_a_row_that_cannot_be_read(file, opened):
    path = file([TALK, REFUSED])
    message = f"{path} line 2: the chat template cannot write this conversation (no tools here)"
    with pytest.raises(ValueError) as refused:
        opened(path)
    assert str(refused.value) == message
    pairs = opened(path, on_bad_rows="skip")
    assert (ids(pairs), pairs.dropped, pairs.named) == (
        ["row-0"],
        {"template_refused": 1},
        {"template_refused": ["row-1"]},
    )
    assert pairs.first == {"template_refused": message}


def test_a_store_made_with_skipped_rows_is_not_opened_where_these_are_errors(file, opened):
    path = file([PAIRS[0], "oops", "again"])
    opened(path, on_bad_rows="skip")
    with pytest.raises(ValueError) as refused:
        opened(path)
    assert str(refused.value).startswith(f"{path} line 2 is not JSON: ")
    assert opened(file(), on_bad_rows="skip").key == opened(file()).key


def test_rows_that_are_read_may_stand_beside_faults_in_one_chunk(file, opened, monkeypatch):
    monkeypatch.setattr(store, "CHUNK", 2)
    rows = ["oops", PAIRS[0], "oops", "oops", "oops", PAIRS[1], ("Once", "", " there"), PAIRS[2], "oops"]
    pairs = opened(file(rows), on_bad_rows="skip")
    assert ids(pairs) == ["row-1", "row-5", "row-7"]
    assert [pair.where.rpartition(" ")[2] for pair in pairs] == ["2", "6", "8"]
    assert pairs.dropped == {"bad_row": 5, "empty": 1}


# One build


@pytest.fixture
def builds(monkeypatch):
    """The list of preparations that were begun."""
    begun, original = [], store.Build
    monkeypatch.setattr(store, "Build", lambda *args, **kwargs: begun.append(args) or original(*args, **kwargs))
    return begun


def test_a_second_opening_does_not_tokenize_again(file, opened, builds):
    path = file()
    first, second = opened(path), opened(path)
    assert len(builds) == 1
    assert (second.key, second.folder, ids(second)) == (first.key, first.folder, ids(first))
    assert second.lengths.tolist() == first.lengths.tolist()


OTHER_OPTIONS = {
    "max_length": 63,
    "max_prompt_length": 40,
    "truncation": "keep_end",
    "score_header": True,
    "append_eos": "always",
    "compat": "official",
    "use_poet": True,
    "chat_template_kwargs": {"enable_thinking": False},
}


def test_the_key_is_that_of_every_option(file, opened):
    path = file()
    assert OTHER_OPTIONS.keys() == {field.name for field in store.dataclasses.fields(TokenOptions)}
    keys = {opened(path).key, *(opened(path, **{name: value}).key for name, value in OTHER_OPTIONS.items())}
    keys.add(opened(path, chat_template_kwargs={"enable_thinking": True}).key)
    assert len(keys) == 1 + len(OTHER_OPTIONS) + 1


def test_the_key_is_that_of_the_tokenizer_and_its_special_tokens_and_template(file, opened):
    path = file()
    more_tokens, no_bos, no_template = (load_tokenizer(str(STORIES), chat_template=TEMPLATE) for _ in range(3))
    more_tokens.add_tokens(["<more>"])
    no_bos.bos_token = None
    no_template.chat_template = None
    tokenizers = [
        load_tokenizer(str(STORIES), chat_template=TEMPLATE),
        load_tokenizer(str(STORIES), chat_template=TEMPLATE, eos_token="<s>"),
        load_tokenizer(str(STORIES), chat_template=TEMPLATE + "\n"),
        *(more_tokens, no_bos, no_template),
    ]
    assert len({opened(path, tokenizer=tokenizer).key for tokenizer in tokenizers}) == len(tokenizers)


def test_the_key_is_that_of_schema_data_and_slice(file, opened):
    path = file()
    keys = [opened(path).key, opened(path, schema="explicit").key, opened(path, "train[:2]").key]
    keys += [opened(path, "train[1:]").key, opened({str(path): 0.4}).key]
    path = file([*PAIRS[:2], ("The dog", " ran", " sat up")])
    keys += [opened(path).key, opened({str(path): 1.0, str(file(name="other.jsonl")): 1.0}).key]
    assert len(set(keys)) == len(keys)


def test_the_same_data_have_the_same_key_however_they_are_named(file, opened, tmp_path, builds):
    path = file()
    key = opened(path).key
    assert opened({str(path): 1.0}).key == opened(path, "train[0:3]").key == opened(tmp_path, "pairs").key == key
    assert len(builds) == 1


def test_a_file_found_elsewhere_is_not_prepared_again_and_is_named_where_it_lies_now(file, opened, builds):
    path = file()
    before = opened(path)
    moved = path.rename(path.with_name("moved.jsonl"))
    after = opened(moved)
    assert (after.key, len(builds)) == (before.key, 1)
    assert (after[1].where, after.name) == (f"{moved} line 2", str(moved))
    assert TokenStore(after.folder)[1].where == f"{path} line 2"  # by itself it knows no other place


def test_changed_data_are_tokenized_anew(file, opened):
    before = opened(file()).lengths.tolist()
    assert len(opened(file([*PAIRS, PAIRS[0]]))) == 4
    assert opened(file()).lengths.tolist() == before


# Read by others

READER = """
import json, sys
import tensorflow_datasets as tfds
source = tfds.builder_from_directory(sys.argv[1]).as_data_source("pairs")
rows = [{name: value.tolist() if hasattr(value, "tolist") else value.decode() for name, value in row.items()} for row in source]
print(json.dumps([rows, sorted(name for name in sys.modules if name.split(".")[0] in ("repo_jax", "jax", "tensorflow"))]))
"""


def test_tfds_reads_every_field_without_this_project(file, opened):
    path = file()
    pairs = opened(path)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-P", "-c", READER, str(pairs.folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=path.parent)
    rows, modules = json.loads(done.stdout.splitlines()[-1])
    assert modules == []
    assert len(rows) == 3
    for row, pair, source_row in zip(rows, pairs, map(pairs.source_row, range(3)), strict=True):
        assert (row["id"], json.loads(row.pop("row"))) == source_row
        assert row.pop("where") == pair.where.replace(str(path), "0")
        parts = {name: getattr(pair, name) for name in row}
        assert row == {name: part if isinstance(part, str) else part.tolist() for name, part in parts.items()}
        assert row.keys() == {*pair._fields} - {"weights", "where", "columns", "reference_2", "groups"}


# Damage


@pytest.fixture
def damaged(file, opened):
    """A store of 200 pairs, which a function may damage; what is then said of opening it and reading all of it."""
    path = file([(f"Day {i}", " was fun", f" was bad {i}") for i in range(200)])
    pairs = opened(path)

    def said_of(damage):
        damage(pairs)
        with pytest.raises(DamagedStoreError) as refused:
            list(opened(path))
        return pairs.folder, str(refused.value)

    return said_of


def array_record(pairs):
    [path] = pairs.folder.glob("*.array_record*")
    return path


def overwrite(pairs):
    content = bytearray(array_record(pairs).read_bytes())
    content[3000:3050] = b"\xff" * 50
    array_record(pairs).write_bytes(content)


def truncate_to(share):
    def truncate(pairs):
        content = array_record(pairs).read_bytes()
        array_record(pairs).write_bytes(content[: int(share * len(content))])

    return truncate


@pytest.mark.parametrize(
    "damage",
    [overwrite, truncate_to(0), truncate_to(0.3), truncate_to(0.5), truncate_to(0.99)],
    ids=["overwritten", "empty", "truncated-30", "truncated-50", "truncated-99"],
)
def test_a_damaged_array_record_is_named(damaged, damage):
    folder, message = damaged(damage)
    assert message.startswith(f"'{folder}/preference_tokens-pairs.array_record-00000-of-00001' is damaged (")
    assert message.endswith(f"); remove the folder '{folder}' and prepare it anew")


@pytest.mark.parametrize("share", [0, 0.3, 0.5, 0.99])
def test_an_array_record_cut_short_is_found_out_before_its_first_pair_is_asked_for(file, opened, share):
    path = file([(f"Day {i}", " was fun", f" was bad {i}") for i in range(200)])
    truncate_to(share)(opened(path))
    with pytest.raises(DamagedStoreError, match=r"array_record-00000-of-00001' is damaged"):
        opened(path)


@pytest.mark.parametrize("content", [None, b"", b'{"name": "prefer', b"{}"], ids=["gone", "empty", "truncated", "bare"])
@pytest.mark.parametrize("name", ["dataset_info.json", "features.json", "metadata.json", "array_record"])
def test_a_damaged_file_beside_it_is_named_or_its_folder_is(damaged, name, content):
    def damage(pairs):
        path = array_record(pairs) if name == "array_record" else pairs.folder / name
        path.unlink()
        if content is not None:
            path.write_bytes(content)

    folder, message = damaged(damage)
    path = f"{folder}/{'preference_tokens-pairs.array_record-00000-of-00001' if name == 'array_record' else name}"
    assert message.startswith((f"'{path}' is damaged (", f"'{folder}' is damaged ("))
    assert message.endswith(f"); remove the folder '{folder}' and prepare it anew")


def test_after_the_folder_is_removed_as_it_was_told_the_store_is_prepared_anew(file, opened):
    path = file()
    pairs = opened(path)
    overwrite(pairs)
    shutil.rmtree(pairs.folder)
    assert ids(opened(path)) == ["row-0", "row-1", "row-2"]


def test_a_store_moved_under_another_key_is_not_taken_for_that(file, opened):
    path = file()
    one, other = opened(path), opened(path, max_length=63)
    shutil.rmtree(other.folder)
    shutil.copytree(one.folder, other.folder)
    with pytest.raises(DamagedStoreError) as refused:
        opened(path, max_length=63)
    assert str(refused.value) == (
        f"'{other.folder}' holds other tokens than its place says (key {one.key}, wanted {other.key}); "
        f"remove the folder '{other.folder.parents[1]}'"
    )


# By its folder


def test_a_prepared_store_is_opened_by_its_folder(file, opened, tokenizer):
    path = file()
    pairs = opened(path)
    path.unlink()
    prepared = open_prepared(pairs.folder, tokenizer, TokenOptions(max_length=64))
    assert (prepared.key, ids(prepared)) == (pairs.key, ids(pairs))


def test_a_store_prepared_by_other_rules_is_refused_with_what_differs(file, opened, tokenizer):
    folder = opened(file()).folder

    def refusal(tokenizer=tokenizer, **options):
        with pytest.raises(ValueError) as refused:
            open_prepared(folder, tokenizer, TokenOptions(**{"max_length": 64} | options))
        return str(refused.value)

    assert refusal(max_length=100, use_poet=True) == (
        f"'{folder}' was prepared with max_length=64, use_poet=False but the recipe has max_length=100, use_poet=True; prepare it anew"
    )
    for name, value in OTHER_OPTIONS.items():
        assert f" but the recipe has {name}={value!r}; " in refusal(**{name: value})
    said = refusal(load_tokenizer(str(STORIES), chat_template=TEMPLATE, eos_token="<s>"))
    assert "with eos_token='</s>' but the recipe has eos_token='<s>'" in said
    assert "chat_template=" in refusal(load_tokenizer(str(STORIES), chat_template=TEMPLATE + " "))
    more = AutoTokenizer.from_pretrained(STORIES, chat_template=TEMPLATE)
    more.add_tokens(["<more>"])
    assert "with tokenizer=" in refusal(more)


def test_only_a_store_is_prepared(file, opened, tmp_path):
    pairs = opened(file())
    assert is_prepared(pairs.folder)
    for name in ("features.json", array_record(pairs).name):
        (tmp_path / f"only {name}").mkdir()
        shutil.copy(pairs.folder / name, tmp_path / f"only {name}")
        assert not is_prepared(tmp_path / f"only {name}")
    assert not any(map(is_prepared, (tmp_path, pairs.folder.parent, file(), tmp_path / "nowhere", STORIES)))


# Several processes, and ends that come too early


def test_a_preparation_broken_off_is_not_taken_for_whole(file, opened, monkeypatch):
    def break_off(*args, **kwargs):
        yield from list(read_examples(*args, **kwargs))[:2]
        raise KeyboardInterrupt

    path = file()
    with monkeypatch.context() as patch:
        patch.setattr(store, "read_examples", break_off)
        with pytest.raises(KeyboardInterrupt):
            opened(path)
    assert ids(opened(path)) == ["row-0", "row-1", "row-2"]


def test_preparing_leaves_no_temporary_folders(opened, file, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    pairs = opened(file())
    assert list((tmp_path / "temporary").iterdir()) == []
    assert [path.name for path in pairs.folder.parent.iterdir()] == [store.FORMAT]


# Opens a store, slowly: a row at a time, with a line on stdout for each; afterwards says what was imported.
SLOW = """
import sys, time
import repo_jax.data.batches, repo_jax.data.rows
from repo_jax.data import chat, schema, sources, store

def slowly(rows, **options):
    for number, row in enumerate(schema.read_examples(rows, **options)):
        print("row", number, file=sys.__stdout__, flush=True)  # TFDS has the other
        time.sleep(float(sys.argv[4]))
        yield row

store.CHUNK, store.read_examples = 1, slowly
tokenizer = chat.load_tokenizer(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
options = chat.TokenOptions(max_length=64)
pairs = store.open_store(sources.open_source(sys.argv[2], "train"), tokenizer, options, cache_dir=sys.argv[3])
batches = repo_jax.data.rows.row_batches(list(pairs), repo_jax.data.rows.RowShape(1, 128, 128))
print("end", pairs.key, *(pair.id for pair in pairs), flush=True)
print("imported", *sorted({"jax", "flax", "tensorflow"} & sys.modules.keys()), flush=True)
"""


def slow_opening(path, cache, *, seconds_a_row):
    """A process that opens the store once its stdin has a line."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SLOW, str(STORIES), str(path), str(cache), str(seconds_a_row)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, text=True, env=environment, **pipes)


def begin(process):
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("\n")
    process.stdin.flush()


def test_a_killed_preparation_leaves_nothing_that_is_read(file, opened, tmp_path):
    path = file([(f"Day {i}", " was fun", " was bad") for i in range(6)])
    process = slow_opening(path, tmp_path / "cache", seconds_a_row=0.2)
    begin(process)
    for number in range(5):
        assert process.stdout.readline() == f"row {number}\n"  # so four rows have been written or are on their way
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    [place] = (tmp_path / "cache").iterdir()
    [left] = (place / "preference_tokens").iterdir()
    assert left.name.startswith("incomplete")
    started = time.monotonic()
    pairs = opened(path, tokenizer=load_tokenizer(str(STORIES)))
    assert time.monotonic() - started < 20  # the lock died with the process
    assert ids(pairs) == [f"row-{i}" for i in range(6)]
    assert pairs.folder.parents[1] == place
    assert [path.name for path in (place / "preference_tokens").iterdir()] == [store.FORMAT]


@pytest.fixture(scope="module")
def race(tmp_path_factory):
    """What two processes said that prepared the same data at once, and the cache they share."""
    folder = tmp_path_factory.mktemp("race")
    rows = [json.dumps({"id": f"row-{i}"} | dict(zip(COLUMNS, row, strict=True))) for i, row in enumerate(PAIRS)]
    (folder / "pairs.jsonl").write_text("\n".join(rows), encoding="utf-8")
    processes = [slow_opening(folder / "pairs.jsonl", folder / "cache", seconds_a_row=0.2) for _ in range(2)]
    for process in processes:
        begin(process)
    outputs = [process.communicate(timeout=120)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    return outputs, folder / "cache"


def test_two_processes_that_prepare_at_once_make_one_store(race):
    outputs, cache = race
    ends = {line for lines in outputs for line in lines if line.startswith("end ")}
    [end] = ends
    assert end.split()[2:] == ["row-0", "row-1", "row-2"]
    assert sorted(sum(line.startswith("row ") for line in lines) for lines in outputs) == [0, 3]
    [place] = cache.iterdir()
    assert [path.name for path in (place / "preference_tokens").iterdir()] == [store.FORMAT]
    assert ids(TokenStore(place / "preference_tokens" / store.FORMAT)) == ["row-0", "row-1", "row-2"]


def test_data_need_neither_jax_nor_tensorflow(race):
    assert [lines[-1] for lines in race[0]] == ["imported"] * 2


def test_a_store_of_several_files_is_in_order_and_names_the_damaged_one(file, opened, monkeypatch):
    write = store.PreferenceTokens.download_and_prepare
    three = tfds.download.DownloadConfig(num_shards=3)
    monkeypatch.setattr(store.PreferenceTokens, "download_and_prepare", lambda self: write(self, download_config=three))
    path = file([(f"Day {i}", " was fun", f" was bad {i}") for i in range(200)])
    pairs = opened(path)
    shards = sorted(pairs.folder.glob("*.array_record*"))
    assert len(shards) == 3
    assert ids(pairs) == [f"row-{i}" for i in range(200)]
    content = bytearray(shards[1].read_bytes())
    content[:] = b"\xff" * len(content)
    shards[1].write_bytes(content)
    damaged = opened(path)  # its first and last pair lie in the others
    with pytest.raises(DamagedStoreError, match=r"array_record-00001-of-00003' is damaged"):
        list(damaged)
