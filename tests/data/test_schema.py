"""Rows of a preference file: what is read, and the words for what is not a pair."""

import json

import numpy as np
import pytest

from repo_jax.data.schema import PairTokens, PreferenceExample, read_preferences, resolve_split

TEXTS = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}
MESSAGES = {
    "prompt": [{"role": "user", "content": "2 + 2?"}],
    "chosen": [{"role": "assistant", "content": "4"}],
    "rejected": [{"role": "assistant", "content": "5"}],
}


@pytest.fixture
def file(tmp_path):
    """Writes lines, each a row or raw text, to pairs.jsonl and returns its path."""

    def write(*lines):
        path = tmp_path / "pairs.jsonl"
        text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refusal(path):
    """What is said of the file, after its path."""
    with pytest.raises(ValueError) as refused:
        list(read_preferences(path))
    message = str(refused.value)
    assert message.startswith(f"{path} ")
    return message.removeprefix(f"{path} ")


def test_a_row_of_texts_is_read_as_it_stands(file):
    path = file(TEXTS)
    assert list(read_preferences(path)) == [
        PreferenceExample("pairs.jsonl:1", f"{path} line 1", "2 + 2 =", " 4", " 5"),
    ]


def test_a_row_of_messages_is_read_as_it_stands(file):
    (example,) = read_preferences(file(MESSAGES))
    assert (example.prompt, example.chosen, example.rejected) == tuple(MESSAGES.values())


def test_only_rows_of_messages_are_conversational(file):
    assert [example.conversational for example in read_preferences(file(TEXTS))] == [False]
    assert [example.conversational for example in read_preferences(file(MESSAGES))] == [True]


def test_a_row_keeps_its_own_id_as_text(file):
    rows = [TEXTS | {"id": "math:7"}, TEXTS | {"id": 7}, TEXTS]
    assert [example.id for example in read_preferences(file(*rows))] == ["math:7", "7", "pairs.jsonl:3"]


def test_other_columns_are_ignored(file):
    (example,) = read_preferences(file(TEXTS | {"source": "arithmetic"}))
    assert example.prompt == "2 + 2 ="


def test_blank_lines_are_skipped_but_counted(file):
    path = file("", TEXTS, "   ", TEXTS)
    assert [example.where for example in read_preferences(path)] == [f"{path} line 2", f"{path} line 4"]


def test_text_beyond_ascii_survives(file):
    path = file('{"prompt": "où ?", "chosen": "là 🙂", "rejected": "\\u65e5"}')
    (example,) = read_preferences(path)
    assert (example.prompt, example.chosen, example.rejected) == ("où ?", "là 🙂", "日")


def test_the_rows_before_a_bad_line_are_read(file):
    examples = read_preferences(file(TEXTS, "oops"))
    assert next(examples).chosen == " 4"
    with pytest.raises(ValueError, match="line 2"):
        next(examples)


def test_bad_json_names_line_and_column(file):
    path = file(TEXTS, '{"prompt": "a" "chosen": "b"}')
    assert (
        refusal(path)
        == "line 2 is not JSON: Expecting ',' delimiter at column 16; mend or remove the line (one JSON object per line is wanted)"
    )


def test_bytes_that_are_not_utf_8_name_the_file_and_line(file):
    path = file(TEXTS)
    path.write_bytes(path.read_bytes() + b'{"prompt": "caf\xe9"}\n')
    assert refusal(path).startswith("line 2 is not UTF-8")


def test_a_row_that_is_no_object_is_refused(file):
    assert refusal(file([1, 2])) == "line 1 is a JSON list; wanted an object with prompt, chosen, rejected"


def test_a_missing_column_is_named_beside_those_found(file):
    path = file(TEXTS, {"chosen": "b", "instruction": "a"})
    assert refusal(path) == "line 2 has no 'prompt'; wanted prompt, chosen, rejected, found chosen, instruction"
    assert refusal(file({})) == "line 1 has no 'prompt'; wanted prompt, chosen, rejected, found nothing"


def test_columns_that_are_neither_texts_nor_messages_are_named_with_their_types(file):
    wanted = "wanted three texts or three lists of messages"
    assert refusal(file(TEXTS | {"rejected": None})) == (
        f"line 1 has prompt a str, chosen a str, rejected a NoneType; {wanted}"
    )
    assert refusal(file(MESSAGES | {"prompt": "2 + 2?"})) == (
        f"line 1 has prompt a str, chosen a list, rejected a list; {wanted}"
    )


def test_a_file_holds_one_kind_of_row(file):
    assert refusal(file(TEXTS, TEXTS, MESSAGES)) == (
        "line 3 holds lists of messages but the lines before it hold texts; keep them in separate files"
    )
    assert refusal(file(MESSAGES, TEXTS)) == (
        "line 2 holds texts but the lines before it hold lists of messages; keep them in separate files"
    )


@pytest.mark.parametrize(
    "message", ["4", {"role": "assistant"}, {"content": "4"}, {"role": "assistant", "content": None}], ids=json.dumps
)
def test_a_bad_message_is_quoted_with_its_place(file, message):
    path = file(MESSAGES | {"chosen": [MESSAGES["chosen"][0], message]})
    assert refusal(path) == (
        f"line 1: 'chosen', message 1 is {json.dumps(message)}; wanted {{'role': text, 'content': text}}"
    )


def test_a_long_bad_message_is_quoted_in_part(file):
    said = refusal(file(MESSAGES | {"prompt": [{"role": "user", "text": "x" * 1000}]}))
    assert said.startswith("""line 1: 'prompt', message 0 is {"role": "user", "text": "xxx""")
    assert len(said) < 200


def test_an_empty_list_of_messages_is_refused(file):
    assert refusal(file(MESSAGES | {"rejected": []})) == (
        "line 1: 'rejected' is an empty list; wanted at least one message"
    )


def test_a_pair_of_ids_counts_its_tokens():
    pair = PairTokens("", "", *(np.zeros(n, np.int32) for n in (2, 3, 5)), skips=(1, 2))
    assert [branch.size for branch in pair.branches] == [3, 5]
    assert (pair.lengths, pair.slots, pair.scored) == ((2, 3, 5), 10, 5)


def test_a_file_is_its_own_split(file):
    path = file(TEXTS)
    assert resolve_split(str(path), "train") == resolve_split(str(path), "test") == path


def test_a_folder_holds_a_file_per_split(tmp_path):
    (tmp_path / "train.jsonl").touch()
    assert resolve_split(str(tmp_path), "train") == tmp_path / "train.jsonl"


def test_a_split_that_a_folder_lacks_is_answered_with_those_it_has(tmp_path):
    with pytest.raises(FileNotFoundError) as refused:
        resolve_split(str(tmp_path), "train")
    assert (
        str(refused.value)
        == f"'{tmp_path}' has no split 'train' (train.jsonl); splits present: none; name a split, or give a file itself"
    )
    for name in ("test.jsonl", "dev.jsonl", "README.md"):
        (tmp_path / name).touch()
    with pytest.raises(FileNotFoundError) as refused:
        resolve_split(str(tmp_path), "train")
    assert (
        str(refused.value)
        == f"'{tmp_path}' has no split 'train' (train.jsonl); splits present: dev, test; name a split, or give a file itself"
    )


def test_a_data_set_that_is_not_there_is_refused(tmp_path):
    missing = tmp_path / "nowhere"
    with pytest.raises(FileNotFoundError) as refused:
        resolve_split(str(missing), "train")
    assert str(refused.value) == f"'{missing}' is neither a .jsonl file nor a folder of them; give the path of one"


def test_half_a_character_is_named_by_line_and_place(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        '{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prompt": "Once \\ud83d", "chosen": "a", "rejected": "b"}\n'
    )
    with pytest.raises(
        ValueError, match=r"line 2: 'prompt' has half a character \('\\ud83d'\) at position 5; mend or remove"
    ):
        list(read_preferences(path))


def test_what_the_user_says_inside_an_answer_is_refused(tmp_path):
    user, said = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": [user], "chosen": [user, said], "rejected": [said]}) + "\n")
    with pytest.raises(
        ValueError, match="line 1: 'chosen', message 0 has role 'user'; an answer holds what the assistant says"
    ):
        list(read_preferences(path))


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n', encoding="utf-8-sig")
    assert [example.prompt for example in read_preferences(path)] == ["p"]


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "pairs.parquet").write_bytes(b"PAR1")
    with pytest.raises(
        ValueError, match=r"pairs.parquet' is not a .jsonl file; write the pairs as one JSON object per line"
    ):
        resolve_split(str(tmp_path / "pairs.parquet"), "train")
