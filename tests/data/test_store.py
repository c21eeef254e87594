"""The token store: what goes in comes out, once, and what is dropped is counted."""

import json
import subprocess
import sys

import numpy as np
import pytest
from examples import ROOT, STORIES

from repo_jax.data import store
from repo_jax.data.chat import load_tokenizer, tokenize_pair
from repo_jax.data.schema import read_preferences
from repo_jax.data.store import open_store

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
PAIRS = [("Once", " upon a time", " there"), ("Lily", " had a ball", " ran away"), ("The dog", " ran", " sat down")]


@pytest.fixture
def tokenizer():
    return load_tokenizer(str(STORIES), chat_template=TEMPLATE)


@pytest.fixture
def file(tmp_path):
    """Writes (prompt, chosen, rejected) rows, with ids row-0, row-1, ..., to pairs.jsonl and returns its path."""

    def write(rows=PAIRS):
        path = tmp_path / "pairs.jsonl"
        columns = ("prompt", "chosen", "rejected")
        lines = [
            json.dumps({"id": f"row-{i}"} | dict(zip(columns, row, strict=True))) + "\n" for i, row in enumerate(rows)
        ]
        path.write_text("".join(lines), encoding="utf-8")
        return path

    return write


@pytest.fixture
def opened(tmp_path, tokenizer):
    """open_store with a cache of the test's own."""

    def open_it(path, *, tokenizer=tokenizer, max_length=64):
        return open_store(path, tokenizer, max_length=max_length, cache_dir=str(tmp_path / "cache"))

    return open_it


def all_of(pairs):
    return [pairs[i] for i in range(len(pairs))]


def ids(pairs):
    return [pair.id for pair in all_of(pairs)]


def assert_same_pair(ours, theirs):
    assert (ours.id, ours.where, ours.skips) == (theirs.id, theirs.where, theirs.skips)
    for mine, other in zip(ours[2:5], theirs[2:5], strict=True):
        assert mine.dtype == other.dtype == np.int32
        np.testing.assert_array_equal(mine, other)


# Contents


def test_pairs_come_back_in_order_as_they_were_tokenized(file, opened, tokenizer):
    path = file([(f"Day {i}", " was fun" * (1 + i % 3), " was bad") for i in range(30)])
    pairs = opened(path)
    assert len(pairs) == 30
    for ours, example in zip(all_of(pairs), read_preferences(path), strict=True):
        assert_same_pair(ours, tokenize_pair(tokenizer, example))


def test_messages_come_back_as_they_were_tokenized(file, opened, tokenizer):
    def said(role, content):
        return [{"role": role, "content": content}]

    path = file([(said("user", "Où ?"), said("assistant", "Là."), said("assistant", "Non 🙂"))])
    (example,) = read_preferences(path)
    assert_same_pair(opened(path)[0], tokenize_pair(tokenizer, example))


def test_skips_come_back(file, opened, monkeypatch):
    monkeypatch.setattr(store, "tokenize_pair", lambda *given: tokenize_pair(*given)._replace(skips=(2, 1)))
    pairs = opened(file())
    assert pairs[0].skips == (2, 1)
    assert pairs.scored[0] == len(pairs[0].chosen) + len(pairs[0].rejected) - 3


def test_the_store_knows_the_lengths_without_the_pairs(file, opened):
    pairs = opened(file())
    assert pairs.lengths.tolist() == [list(pair.lengths) for pair in all_of(pairs)]
    assert pairs.slots.tolist() == [pair.slots for pair in all_of(pairs)]
    assert pairs.scored.tolist() == [pair.scored for pair in all_of(pairs)]


def test_a_store_is_a_sequence_that_ends(file, opened):
    pairs = opened(file())
    assert [pair.id for pair in pairs] == ["row-0", "row-1", "row-2"]
    with pytest.raises(IndexError):
        pairs[3]


# Drops


def test_empty_answers_are_dropped(file, opened):
    pairs = opened(file([("Once", "", " there"), ("Once", " upon", " \n"), *PAIRS]))
    assert (pairs.dropped, pairs.dropped_ids) == ({"empty": 2}, {"empty": ["row-0", "row-1"]})
    assert ids(pairs) == ["row-2", "row-3", "row-4"]


def test_identical_answers_are_dropped(file, opened):
    pairs = opened(file([PAIRS[0], ("Once", " upon", " upon"), ("Once", " upon", " upon</s>")]))
    assert (pairs.dropped, pairs.dropped_ids) == ({"identical": 2}, {"identical": ["row-1", "row-2"]})
    assert ids(pairs) == ["row-0"]


@pytest.mark.parametrize("longer", ["chosen", "rejected"])
def test_max_length_holds_the_prompt_and_the_longer_answer(file, opened, tokenizer, longer):
    answers = (" ran and ran", " sat") if longer == "chosen" else (" sat", " ran and ran")
    path = file([("The dog", *answers), ("A", " b", " c")])
    pair = tokenize_pair(tokenizer, next(read_preferences(path)))
    length = len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))
    assert opened(path, max_length=length).dropped == {}
    over = opened(path, max_length=length - 1)
    assert (over.dropped, over.dropped_ids, ids(over)) == ({"over_long": 1}, {"over_long": ["row-0"]}, ["row-1"])


def test_every_dropped_row_is_counted_and_the_first_five_are_named(file, opened):
    pairs = opened(file([("Once", "", " there")] * 7 + PAIRS))
    assert pairs.dropped == {"empty": 7}
    assert pairs.dropped_ids == {"empty": ["row-0", "row-1", "row-2", "row-3", "row-4"]}


def test_drops_are_known_when_the_store_is_opened_again(file, opened):
    path = file([("Once", "", " there"), *PAIRS])
    first, second = opened(path), opened(path)
    assert second.dropped == first.dropped == {"empty": 1}
    assert second.dropped_ids == first.dropped_ids


def test_a_file_of_which_nothing_is_left_is_refused_with_the_reasons(file, opened):
    path = file([("Once", " upon", " upon"), ("Once", "", " there"), ("Once", " there", "")])
    with pytest.raises(
        ValueError, match=r"no pair of .*pairs\.jsonl can be used \(1 identical, 2 empty at max_length=64"
    ):
        opened(path)


def test_a_file_without_rows_is_refused(file, opened):
    with pytest.raises(ValueError, match=r"no pair of .*pairs\.jsonl can be used \(the file has no rows"):
        opened(file([]))


# One build


def refuse(*_):
    raise AssertionError("tokenized again")


def test_a_second_opening_does_not_tokenize_again(file, opened, monkeypatch):
    path = file()
    first = opened(path)
    monkeypatch.setattr(store, "tokenize_pair", refuse)
    second = opened(path)
    assert second.key == first.key
    assert ids(second) == ids(first)
    assert second.lengths.tolist() == first.lengths.tolist()


def test_the_key_is_that_of_data_tokenizer_and_options(file, opened):
    path = file()
    other_eos = load_tokenizer(str(STORIES), chat_template=TEMPLATE, eos_token="<s>")
    other_template = load_tokenizer(str(STORIES), chat_template=TEMPLATE + "\n")
    no_bos = load_tokenizer(str(STORIES), chat_template=TEMPLATE)
    no_bos.bos_token = None
    keys = {
        "as it was": opened(path).key,
        "max_length": opened(path, max_length=63).key,
        "eos_token": opened(path, tokenizer=other_eos).key,
        "chat_template": opened(path, tokenizer=other_template).key,
        "bos_token": opened(path, tokenizer=no_bos).key,
        "data": opened(file([*PAIRS[:2], ("The dog", " ran", " sat up")])).key,
    }
    assert len(set(keys.values())) == len(keys)


def test_a_file_found_elsewhere_is_the_same_data_in_its_new_place(file, opened, monkeypatch):
    path = file()
    before = opened(path)
    moved = path.rename(path.with_name("moved.jsonl"))
    monkeypatch.setattr(store, "tokenize_pair", refuse)
    after = opened(moved)
    assert after.key == before.key
    assert after[1].where == f"{moved} line 2"


def test_changed_data_is_tokenized_anew(file, opened):
    before = opened(file()).lengths.tolist()
    assert len(opened(file([*PAIRS, PAIRS[0]]))) == 4
    assert opened(file()).lengths.tolist() == before


@pytest.fixture
def breaks_off(monkeypatch):
    """Makes tokenizing fail at the third pair, until the patch is undone."""
    count = 0

    def tokenize_two(*given):
        nonlocal count
        count += 1
        if count > 2:
            raise KeyboardInterrupt
        return tokenize_pair(*given)

    monkeypatch.setattr(store, "tokenize_pair", tokenize_two)
    return monkeypatch


def test_a_build_broken_off_is_not_taken_for_whole(file, opened, breaks_off):
    path = file()
    with pytest.raises(KeyboardInterrupt):
        opened(path)
    breaks_off.undo()
    assert ids(opened(path)) == ["row-0", "row-1", "row-2"]


KILLED = """
import os, sys
from repo_jax.data import chat, store
tokenizer = chat.load_tokenizer(sys.argv[1])
rest = iter([False, False, True])
store.tokenize_pair = lambda *given: os._exit(9) if next(rest) else chat.tokenize_pair(*given)
store.open_store(store.pathlib.Path(sys.argv[2]), tokenizer, max_length=64, cache_dir=sys.argv[3])
"""


def test_a_build_killed_midway_is_not_taken_for_whole(file, opened, tmp_path):
    path = file()
    killed = subprocess.run([sys.executable, "-c", KILLED, STORIES, path, tmp_path / "cache"], cwd=ROOT)
    assert killed.returncode == 9
    tokenizer = load_tokenizer(str(STORIES))
    assert ids(opened(path, tokenizer=tokenizer)) == ["row-0", "row-1", "row-2"]


def test_a_bad_line_is_named_and_leaves_no_store(file, opened):
    path = file()
    good = path.read_text()
    path.write_text(good + "oops\n")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"pairs\.jsonl line 4 is not JSON"):
            opened(path)
    path.write_text(good)
    assert len(opened(path)) == 3


# A loader process opens no devices

LOADER = """
import sys
import repo_jax.data.batches, repo_jax.data.chat, repo_jax.data.rows, repo_jax.data.schema, repo_jax.data.store as store
tokenizer = repo_jax.data.chat.load_tokenizer(sys.argv[1])
pairs = store.open_store(store.pathlib.Path(sys.argv[2]), tokenizer, max_length=64, cache_dir=sys.argv[3])
repo_jax.data.rows.row_batches([pairs[i] for i in range(len(pairs))], repo_jax.data.rows.RowShape(1, 128, 128))
print(*sorted({"jax", "flax", "tensorflow"} & sys.modules.keys()))
"""


def test_data_needs_neither_jax_nor_tensorflow(file, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", LOADER, STORIES, file(), tmp_path / "cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == []


def test_two_processes_may_prepare_the_same_data_at_once(opened, file, monkeypatch):
    original = store._PreferenceTokens.download_and_prepare

    def beaten_to_it(self):
        original(self)  # the other process, which comes to its end first
        raise FileExistsError("Cannot rename incomplete: it already exists")

    monkeypatch.setattr(store._PreferenceTokens, "download_and_prepare", beaten_to_it)
    assert ids(opened(file())) == ["row-0", "row-1", "row-2"]


def test_preparing_leaves_no_temporary_folders(opened, file, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    opened(file())
    assert list((tmp_path / "temporary").iterdir()) == []
