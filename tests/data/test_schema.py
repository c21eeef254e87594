"""Rows to examples: what each schema means, which schema a part has, and the words for a row that has none."""

import json
import math

import numpy as np
import pytest
from examples import ASSETS
from hypothesis import given, settings
from hypothesis import strategies as st

from repo_jax.data.schema import COLUMNS, SCHEMAS, Fault, PairTokens, PreferenceExample, read_examples
from repo_jax.data.sources import RawRow


def user(content):
    return {"role": "user", "content": content}


def says(content, role="assistant"):
    return {"role": role, "content": content}


TEXTS = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}
MESSAGES = {"prompt": [user("2 + 2?")], "chosen": [says("4")], "rejected": [says("5")]}
WHOLE = {"chosen": [user("2 + 2?"), says("4")], "rejected": [user("2 + 2?"), says("5")]}
HH = {"chosen": "\n\nHuman: 2 + 2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2 + 2?\n\nAssistant: 5"}
UNPAIRED = {"prompt": "2 + 2 =", "completion": " 4", "label": True}
SHAREGPT = {
    "conversations": [{"from": "human", "value": "2 + 2?"}],
    "chosen": {"from": "gpt", "value": "4"},
    "rejected": {"from": "gpt", "value": "5"},
}
PAIR = (MESSAGES["prompt"], MESSAGES["chosen"], MESSAGES["rejected"])


def lines(*rows, part="pairs"):
    """Rows as JSON; bytes are lines as they stand."""
    contents = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    return [RawRow(part, f"pairs.jsonl line {n}", f"pairs.jsonl:{n}", line) for n, line in enumerate(contents, 1)]


def table(*rows):
    return [RawRow("pairs", f"pairs.parquet row {n}", f"pairs.parquet:{n}", row) for n, row in enumerate(rows, 1)]


def read(*rows, schema="auto"):
    return list(read_examples(lines(*rows), schema=schema))


def one(row, schema="auto"):
    """The example of a single row."""
    (example,) = read(row, schema=schema)
    assert isinstance(example, PreferenceExample), example
    return example


def triple(row, schema="auto"):
    example = one(row, schema)
    return example.prompt, *example.answers


def fault(row, schema="explicit", reason="bad_row"):
    """What is said of a row, after its place."""
    (found,) = read(row, schema=schema)
    assert isinstance(found, Fault), found
    assert (found.id, found.where, found.reason) == ("pairs.jsonl:1", "pairs.jsonl line 1", reason)
    assert found.message.startswith("pairs.jsonl line 1 ")
    return found.message.removeprefix("pairs.jsonl line 1 ")


def refusal(*rows, **options):
    """What is said of a whole part."""
    with pytest.raises(ValueError) as refused:
        read(*rows, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# explicit


def test_explicit_texts_are_read_as_they_stand():
    assert one(TEXTS) == PreferenceExample(
        "pairs.jsonl:1", "pairs.jsonl line 1", "2 + 2 =", " 4", " 5", "explicit", {}, {}, TEXTS
    )


def test_explicit_messages_are_read_as_they_stand():
    assert one(MESSAGES) == PreferenceExample(
        "pairs.jsonl:1", "pairs.jsonl line 1", *PAIR, "explicit", {}, {}, MESSAGES
    )


def test_only_rows_of_messages_are_conversational():
    assert [one(row).conversational for row in (TEXTS, MESSAGES)] == [False, True]


def test_text_beyond_ascii_survives():
    assert triple('{"prompt": "où ?", "chosen": "là 🙂", "rejected": "\\u65e5"}'.encode()) == ("où ?", "là 🙂", "日")


def test_an_empty_answer_is_no_fault():
    assert triple(TEXTS | {"rejected": ""})[2] == ""
    assert triple(MESSAGES | {"rejected": [says("")]})[2] == [says("")]


def test_answers_that_repeat_the_prompts_messages_are_read_without_them():
    assert triple({**WHOLE, "prompt": MESSAGES["prompt"]}) == PAIR


def test_a_prompt_repeated_in_one_answer_only_or_in_place_of_answers_is_refused():
    said = 'has role "user" in an answer; an answer holds what the assistant says, move the rest to the prompt'
    assert fault(MESSAGES | {"chosen": WHOLE["chosen"]}) == said
    assert fault({name: MESSAGES["prompt"] for name in MESSAGES}) == said


def test_an_answer_may_call_tools_and_ends_with_the_assistant():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}
    answer = [call, says("4", role="tool"), says("It is 4.")]
    assert one(MESSAGES | {"chosen": answer}).chosen == [call | {"content": ""}, *answer[1:]]
    assert fault(MESSAGES | {"chosen": answer[:2]}) == (
        'has an answer that ends with role "tool"; wanted the assistant\'s words at its end'
    )


def test_missing_and_null_columns_are_named_beside_those_found():
    assert fault({"chosen": "b", "instruction": 3}) == (
        "has no 'prompt'; wanted prompt, chosen, rejected, found chosen (text), instruction (number)"
    )
    assert fault({}) == "has no 'prompt'; wanted prompt, chosen, rejected, found nothing"
    assert fault(TEXTS | {"rejected": None}) == (
        "has null as 'rejected'; wanted prompt, chosen, rejected, found prompt (text), chosen (text), rejected (null)"
    )


def test_columns_of_several_kinds_are_named_with_them():
    assert fault(MESSAGES | {"prompt": "2 + 2?", "rejected": 5}) == (
        "has prompt (text), chosen (list of objects), rejected (number); wanted all texts or all lists of messages"
    )


def test_a_column_name_cannot_break_the_line_of_its_message():
    assert fault({"a\nb": 1, "\ud800": 2}).endswith(r"found 'a\nb' (number), '\ud800' (number)")


# implicit


def test_the_head_of_whole_conversations_is_the_prompt():
    assert triple(WHOLE) == PAIR
    assert one(WHOLE).schema == "implicit"


def test_a_prompt_text_beside_whole_conversations_is_left_to_them():
    """As ultrafeedback_binarized has it."""
    assert triple(WHOLE | {"prompt": "2 + 2?", "prompt_id": "f00", "score_chosen": 8.5}) == PAIR


def test_a_conversation_keeps_all_but_its_last_message_as_the_prompt():
    history = [says("Be brief.", role="system"), user("hi"), says("hello"), user("2 + 2?")]
    row = {name: [*history, *MESSAGES[name]] for name in ("chosen", "rejected")}
    assert triple(row) == (history, *PAIR[1:])


def test_conversations_with_different_heads_have_no_prompt():
    other = [user("2 + 3?"), says("5")]
    assert fault(WHOLE | {"rejected": other}, "implicit", "prompt_mismatch") == (
        "has answers to different prompts ('chosen' and 'rejected' part at message 0 before the answer); "
        "mend or remove the row"
    )
    fault(WHOLE | {"rejected": [*WHOLE["rejected"], user("and?"), says("6")]}, "implicit", "prompt_mismatch")


def test_lone_answers_follow_the_prompt_text():
    assert triple({"prompt": "2 + 2?", "chosen": [says("4")], "rejected": [says("5")]}) == PAIR


@pytest.mark.parametrize("prompt", [{}, {"prompt": None}, {"prompt": " "}], ids=str)
def test_lone_answers_without_a_prompt_text_are_refused(prompt):
    assert fault({"chosen": [says("4")], "rejected": [says("5")], **prompt}, "implicit") == (
        "has nothing before the answers in 'chosen' and 'rejected', and no 'prompt'; add either"
    )


def test_a_conversation_that_ends_with_the_user_is_refused():
    row = {"chosen": [user("hi"), user("4?")], "rejected": [user("hi"), says("5")]}
    assert fault(row, "implicit").startswith('has role "user" in an answer')


def test_a_prompt_that_is_no_text_beside_conversations_is_refused():
    assert fault(WHOLE | {"prompt": MESSAGES["prompt"]}, "implicit") == (
        "has 'prompt' (list of objects) beside answers that hold it; wanted a text, or none"
    )


@pytest.mark.parametrize(
    "chosen, rejected, head",
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("2+2=4", "2+2=5", "2+2="),
        ("Sum:  4", "Sum:  5", "Sum: "),
        ("Yes", "Yes, sir", "Yes"),
    ],
)
def test_the_common_beginning_of_two_texts_is_the_prompt_and_a_space_before_the_answers_is_theirs(
    chosen, rejected, head
):
    row = {"chosen": chosen, "rejected": rejected}
    assert triple(row) == (head, chosen.removeprefix(head), rejected.removeprefix(head))
    assert one(row).schema == "implicit"


def test_texts_without_a_common_beginning_have_no_prompt():
    assert fault({"chosen": "Yes", "rejected": "No"}, "implicit", "prompt_mismatch") == (
        """has answers to different prompts ('chosen' and 'rejected' part at character 0: "Yes" and "No"); """
        "mend or remove the row"
    )
    fault({"chosen": " Yes", "rejected": " No"}, "implicit", "prompt_mismatch")


def test_implicit_takes_a_prompt_text_off_the_texts_that_begin_with_it():
    row = {"prompt": "2 + 2 =", "chosen": "2 + 2 = 4", "rejected": "2 + 2 = 40"}
    assert triple(row, "implicit") == ("2 + 2 =", " 4", " 40")
    assert triple(row | {"prompt": "\n2 + 2 = \n"}, "implicit") == ("2 + 2 =", " 4", " 40")


def test_implicit_refuses_a_prompt_text_that_the_texts_do_not_begin_with():
    assert fault(TEXTS, "implicit", "prompt_mismatch") == (
        "has answers that do not both begin with 'prompt'; mend or remove the row, "
        "or set data.schema to 'explicit' if no answer holds its prompt"
    )


# hh


def test_a_transcript_becomes_turns_cut_at_the_last_answer():
    head = "\n\nHuman: hi \n\nAssistant: hello\n\nHuman: 2 + 2?\n\n\n\nAssistant:"
    example = one({"chosen": head + " 4\n", "rejected": head + " 5:\n\n5"})
    assert example.prompt == [user("hi"), says("hello"), user("2 + 2?")]
    assert example.answers == ([says("4")], [says("5:\n\n5")])
    assert example.schema == "hh"


def test_a_transcript_may_end_with_an_empty_answer():
    assert triple(HH | {"rejected": "\n\nHuman: 2 + 2?\n\nAssistant:"})[2] == [says("")]


def test_turns_of_a_transcript_need_not_alternate():
    head = "\n\nHuman: hi\n\nHuman: there\n\nAssistant:"
    assert triple({"chosen": head + " a", "rejected": head + " b"})[0] == [user("hi"), user("there")]


def test_transcripts_with_different_heads_have_no_prompt():
    row = HH | {"rejected": "\n\nHuman: 2 + 3?\n\nAssistant: 5"}
    assert fault(row, "hh", "prompt_mismatch") == (
        """has answers to different prompts ('chosen' and 'rejected' part at character 13: "2?" and "3?"); """
        "mend or remove the row"
    )


def test_a_transcript_without_an_answer_is_refused():
    said = r"has no '\n\nAssistant:' after the last '\n\nHuman:' of 'rejected'; wanted an answer at its end"
    assert fault(HH | {"rejected": "\n\nHuman: 2 + 2?"}, "hh") == said
    assert fault(HH | {"rejected": HH["rejected"] + "\n\nHuman: thanks"}, "hh") == said


def test_a_text_that_is_no_transcript_is_refused():
    assert fault(HH | {"chosen": "4"}, "hh") == (
        r"""has "4" as 'chosen'; wanted a transcript that begins with '\n\nHuman:'"""
    )
    assert fault(WHOLE, "hh") == ("has chosen (list of objects), rejected (list of objects); wanted all texts")


# unpaired


def test_a_label_says_which_answer_a_completion_is():
    assert triple(UNPAIRED) == ("2 + 2 =", " 4", None)
    assert triple(UNPAIRED | {"label": False}) == ("2 + 2 =", None, " 4")
    assert triple(UNPAIRED | {"label": 0}) == ("2 + 2 =", None, " 4")
    assert one(UNPAIRED).schema == "unpaired"


def test_an_unpaired_row_may_hold_messages():
    row = {"prompt": [user("2 + 2?")], "completion": [says("4")], "label": 1}
    assert triple(row) == ([user("2 + 2?")], [says("4")], None)
    assert triple(row | {"completion": WHOLE["chosen"]}) == triple(row)


@pytest.mark.parametrize("label", ["true", 2, [], None], ids=json.dumps)
def test_a_label_that_is_neither_true_nor_false_is_refused(label):
    assert fault(UNPAIRED | {"label": label}, "unpaired") == (
        f"has {json.dumps(label)} as 'label'; wanted true or false (1 or 0)"
    )


# sft

CHAT = {"messages": [says("Be brief.", "system"), user("2 + 2?"), says("4"), user("And 3 + 3?"), says("6")]}


def test_an_answer_without_a_label_is_one_to_learn():
    row = {"prompt": "2 + 2 =", "completion": " 4"}
    assert triple(row) == triple(row | {"label": None}) == ("2 + 2 =", " 4", None)
    assert triple({"prompt": [user("2 + 2?")], "completion": [says("4")]}) == ([user("2 + 2?")], [says("4")], None)
    assert one(row).schema == "sft"


def test_of_a_conversation_the_prompt_is_what_stands_before_the_first_answer_and_all_up_to_the_last_is_learnt():
    prompt, chosen, rejected = triple(CHAT)
    assert (prompt, chosen, rejected) == (CHAT["messages"][:2], CHAT["messages"][2:], None)
    assert triple({"messages": [*CHAT["messages"], user("Thanks"), says("x", "tool")]}) == (prompt, chosen, None)
    # UltraChat's rows hold the first question a second time.
    assert triple(CHAT | {"prompt": "2 + 2?", "prompt_id": "7"}) == (prompt, chosen, None)
    spoken = {"messages": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}
    assert triple(spoken) == ([user("2 + 2?")], [says("4")], None)


def test_of_preference_data_the_conversation_may_be_learnt():
    row = MESSAGES | {"messages": WHOLE["chosen"]}
    assert one(row).schema == "explicit" and triple(row, "sft") == ([user("2 + 2?")], [says("4")], None)


@pytest.mark.parametrize(
    "row, said",
    [
        ({"messages": [user("2 + 2?")]}, "has no message of the assistant in 'messages', so that there is nothing to learn"),
        ({"messages": [says("4"), user("?"), says("5")]}, "has 'messages' that begin with the assistant's words; wanted what they answer before them"),
        ({"messages": []}, "has an empty list as 'messages'; wanted at least one message"),
        ({"messages": "2 + 2 = 4"}, "has messages (text); wanted all lists of messages"),
        ({"messages": [{"role": "user"}]}, """has {"role": "user"} as message 0 of 'messages'; wanted {'role': text, 'content': text}"""),
        (UNPAIRED, "has a 'label', which schema 'sft' has not; set data.schema to 'unpaired', or remove the column"),
        ({"prompt": "2 + 2 ="}, "has no 'completion'; wanted prompt, completion, found prompt (text)"),
        ({"completion": " 4"}, "has no 'prompt'; wanted prompt, completion, found completion (text)"),
        ({"prompt": [user("2?")], "completion": [says("4"), user("?")]}, 'has role "user" in an answer; an answer holds what the assistant says, move the rest to the prompt'),
    ],
)  # fmt: skip
def test_a_row_with_nothing_to_learn_is_refused(row, said):
    assert fault(row, "sft") == said


# conversations


def test_a_conversation_is_answered_by_a_message_or_a_list_of_them():
    assert triple(SHAREGPT) == PAIR
    assert triple(SHAREGPT | {"chosen": [SHAREGPT["chosen"]]}) == PAIR
    assert one(SHAREGPT).schema == "conversations"


def test_a_conversation_may_be_spelt_as_role_and_content():
    assert triple({**MESSAGES, "conversations": MESSAGES["prompt"], "prompt": None}) == PAIR


def test_a_system_text_leads_the_conversation_unless_it_has_one():
    system = says("Be brief.", role="system")
    assert triple(SHAREGPT | {"system": "Be brief."})[0] == [system, user("2 + 2?")]
    assert triple(SHAREGPT | {"system": ""})[0] == [user("2 + 2?")]
    own = [{"from": "system", "value": "Be long."}, *SHAREGPT["conversations"]]
    assert triple(SHAREGPT | {"system": "Be brief.", "conversations": own})[0][0]["content"] == "Be long."
    assert fault(SHAREGPT | {"system": 7}, "conversations") == "has 7 as 'system'; wanted a text"


# Messages


def test_from_and_value_are_read_as_role_and_content_in_every_schema():
    def spelt(messages):
        names = {"user": "human", "assistant": "gpt"}
        return [{"from": names.get(m["role"], m["role"]), "value": m["content"]} for m in messages]

    system = says("Be brief.", role="system")
    assert triple({name: spelt(messages) for name, messages in MESSAGES.items()}) == PAIR
    assert triple(MESSAGES | {"prompt": spelt([system, *PAIR[0]])})[0] == [system, *PAIR[0]]
    assert triple({name: spelt(messages) for name, messages in WHOLE.items()}) == PAIR
    row = {"prompt": spelt(PAIR[0]), "completion": spelt(PAIR[1]), "label": True}
    assert triple(row) == (*PAIR[:2], None)


def test_content_in_parts_is_their_text():
    parts = [{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?"}]
    assert triple(MESSAGES | {"prompt": [user(parts)]}) == PAIR


def test_what_is_no_text_in_a_content_is_refused():
    image = {"type": "image", "url": "cat.png"}
    assert fault(MESSAGES | {"prompt": [user([image])]}) == (
        """has {"type": "image", "url": "cat.png"} in message 0 of 'prompt'; only text is supported, no images, sound or video"""
    )
    fault(MESSAGES | {"prompt": [user(["2 + 2?"])]})
    fault(MESSAGES | {"prompt": [user([image | {"text": "a cat"}])]})
    fault(MESSAGES | {"prompt": [user([{"type": "text", "text": None}])]})


def test_a_message_keeps_what_templates_read_and_loses_nulls():
    extra = {"name": "Ann", "thinking": "hm", "tool_calls": [{"id": None}], "tool_call_id": "7"}
    message = says("4") | extra
    assert one(MESSAGES | {"chosen": [message | {"audio": None}]}).chosen == [message]


@pytest.mark.parametrize(
    "message",
    [
        "4",
        None,
        {"role": "assistant"},
        {"content": "4"},
        {"role": "assistant", "content": None},
        {"from": [], "value": ""},
    ],
    ids=json.dumps,
)
def test_a_bad_message_is_quoted_with_its_place(message):
    assert fault(MESSAGES | {"chosen": [says("4"), message]}) == (
        f"has {json.dumps(message)} as message 1 of 'chosen'; wanted {{'role': text, 'content': text}}"
    )


def test_a_long_bad_message_is_quoted_in_part():
    said = fault(MESSAGES | {"prompt": [{"role": "user", "text": "x" * 1000}]})
    assert said.startswith('has {"role": "user", "text": "xxx')
    assert len(said) < 200


def test_an_empty_list_of_messages_is_refused():
    assert fault(MESSAGES | {"rejected": []}) == "has an empty list as 'rejected'; wanted at least one message"


def test_tables_fill_what_objects_lack_with_nulls_and_these_are_dropped_at_every_depth():
    tool = {"name": "add", "parameters": {"x": None, "y": {"type": "int"}}}
    row = {
        "prompt": [{"role": "user", "content": "2 + 2?", "name": None}],
        "chosen": [says("4") | {"tool_calls": [{"id": None, "name": "add"}]}],
        "rejected": [says([{"type": "text", "text": "5", "image": None}])],
        "id": None,
        "tools": [tool],
    }
    (example,) = read_examples(table(row))
    assert example.prompt == [user("2 + 2?")]
    assert example.answers == ([says("4") | {"tool_calls": [{"name": "add"}]}], [says("5")])
    assert example.template == {"tools": [{"name": "add", "parameters": {"y": {"type": "int"}}}]}
    assert (example.id, example.where, example.row) == ("pairs.parquet:1", "pairs.parquet row 1", row)


# Ids and optional columns


def test_a_row_keeps_its_own_id_as_text():
    rows = [TEXTS | {"id": id, "prompt_id": "same"} for id in ("math:7", 7, None, "")]
    assert [example.id for example in read(*rows)] == ["math:7", "7", "pairs.jsonl:3", "pairs.jsonl:4"]


def test_a_fault_is_named_by_the_rows_own_id():
    assert [fault.id for fault in read({"id": 7, "prompt": "p"}, schema="explicit")] == ["7"]


def test_optional_columns_are_kept_as_numbers():
    values = {name: 1 for name in COLUMNS}
    columns = one(TEXTS | values | {"reward": 2}).columns
    assert columns == values
    assert all(type(value) is float for value in columns.values())


def test_null_is_no_value_and_a_margin_is_not_made_up():
    assert one(TEXTS | {"score_chosen": 2, "score_rejected": 1, "weight": None}).columns == {
        "score_chosen": 2.0,
        "score_rejected": 1.0,
    }


@pytest.mark.parametrize("value", [True, "1", [1], math.nan, math.inf, 10**400], ids=lambda value: str(value)[:5])
def test_a_column_that_is_no_finite_number_is_refused(value):
    assert fault(TEXTS | {"margin": value}) == (
        f"has {json.dumps(value)[:80]} as 'margin'; wanted a finite number, or null"
    )


def test_a_probability_and_a_weight_keep_to_their_range():
    assert fault(TEXTS | {"label_prob": 1.5}) == "has 1.5 as 'label_prob'; wanted a number from 0 to 1, or null"
    assert fault(TEXTS | {"weight": -1}) == "has -1 as 'weight'; wanted a finite number, 0 or more, or null"
    assert one(TEXTS | {"label_prob": 0, "weight": 0}).columns == {"label_prob": 0.0, "weight": 0.0}


TOOLS = [{"type": "function", "function": {"name": "add"}}]


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)], ids=["list", "json"])
def test_tools_and_template_options_are_handed_to_the_template(tools):
    row = MESSAGES | {"tools": tools, "chat_template_kwargs": {"enable_thinking": False}}
    assert one(row).template == {"tools": TOOLS, "enable_thinking": False}


@pytest.mark.parametrize("tools", [[], "[]", "", None], ids=repr)
def test_a_row_without_tools_hands_over_none(tools):
    assert one(MESSAGES | {"tools": tools}).template == {}


@pytest.mark.parametrize("tools", ["add", "{}", {"name": "add"}, ["add"], 3], ids=str)
def test_tools_that_are_no_list_of_objects_are_refused(tools):
    given = json.loads(tools) if tools == "{}" else tools
    assert fault(MESSAGES | {"tools": tools}) == (
        f"has {json.dumps(given)} as 'tools'; wanted a list of objects, or the JSON text of one"
    )


def test_template_options_that_are_no_object_are_refused():
    assert fault(MESSAGES | {"chat_template_kwargs": []}) == "has [] as 'chat_template_kwargs'; wanted an object"


# Lines that cannot be read


def test_bad_json_names_its_column():
    assert fault(b'{"prompt": "a" "chosen": "b"}') == (
        "is not JSON: Expecting ',' delimiter at column 16; mend or remove the line (one JSON object per line is wanted)"
    )


def test_bytes_that_are_not_utf_8_are_named():
    assert fault(b'{"prompt": "caf\xe9"}') == (
        "is not UTF-8: invalid continuation byte at byte 16; mend or remove the line"
    )


def test_a_line_that_is_no_object_is_refused():
    assert fault(b"[1, 2]") == "is a JSON list; wanted an object with the row's columns"
    assert fault(b"null") == "is a JSON null; wanted an object with the row's columns"


def test_a_line_that_python_will_not_parse_is_refused():
    assert fault(b'{"prompt": ' + b"1" * 5000 + b"}") == (
        "has a number of more than 4300 digits; mend or remove the line"
    )
    assert fault(b'{"prompt": ' + b"[" * 200_000) == "is nested too deeply to be read; mend or remove the line"


def test_what_is_nested_too_deeply_to_be_handled_is_refused():
    deep = {}
    for _ in range(2000):
        deep = {"x": deep}
    (found,) = read_examples(table(MESSAGES | {"tools": [deep]}))
    assert found.message == "pairs.parquet row 1 is nested too deeply to be read; mend or remove the row"


@pytest.mark.parametrize(
    "row, place",
    [
        (TEXTS | {"prompt": "Once \ud83d"}, "'prompt'"),
        (MESSAGES | {"chosen": [says("Once \ud83d")]}, "message 0 of 'chosen'"),
        (MESSAGES | {"chosen": [says("") | {"tool_calls": [{"name": "Once \ud83d"}]}]}, "message 0 of 'chosen'"),
        (MESSAGES | {"tools": [{"Once \ud83d": 1}]}, "'tools' or 'chat_template_kwargs'"),
        (TEXTS | {"id": "Once \ud83d"}, "'id'"),
    ],
)
def test_half_a_character_is_named_by_its_place(row, place):
    assert fault(row) == rf"has half a character ('\ud83d') at position 5 of {place}; mend or remove the row"


# Many rows


def test_a_fault_does_not_stop_the_rows_after_it():
    found = read(TEXTS, b"oops", TEXTS)
    assert [type(row).__name__ for row in found] == ["PreferenceExample", "Fault", "PreferenceExample"]
    assert [row.where for row in found] == [f"pairs.jsonl line {n}" for n in (1, 2, 3)]


def test_a_part_holds_one_kind_of_row():
    _, _, found, last = read(b"oops", TEXTS, MESSAGES, TEXTS, schema="explicit")
    assert found.message == (
        "pairs.jsonl line 3 holds lists of messages but the rows before it hold texts; keep them in separate files"
    )
    assert last.prompt == TEXTS["prompt"]
    _, found = read(MESSAGES, TEXTS, schema="explicit")
    assert found.message == (
        "pairs.jsonl line 2 holds texts but the rows before it hold lists of messages; keep them in separate files"
    )


def test_each_part_has_its_own_schema():
    rows = lines(TEXTS, TEXTS) + lines(WHOLE, part="more") + lines(UNPAIRED, part="feedback")
    assert [example.schema for example in read_examples(rows)] == ["explicit", "explicit", "implicit", "unpaired"]


@pytest.mark.parametrize(
    "name, row",
    [
        ("explicit", TEXTS),
        ("explicit", MESSAGES),
        ("explicit", MESSAGES | {"conversations": MESSAGES["prompt"]}),
        ("implicit", WHOLE),
        ("implicit", WHOLE | {"prompt": "2 + 2?", "messages": WHOLE["chosen"]}),
        ("implicit", WHOLE | {"prompt": None}),
        ("implicit", {"chosen": "2 + 2 = 4", "rejected": "2 + 2 = 5"}),
        ("hh", HH),
        ("unpaired", UNPAIRED),
        ("unpaired", UNPAIRED | TEXTS),
        ("sft", {"prompt": "2 + 2 =", "completion": " 4"}),
        ("sft", {"messages": WHOLE["chosen"]}),
        ("conversations", SHAREGPT),
        ("conversations", SHAREGPT | {"chosen": [SHAREGPT["chosen"]], "rejected": [SHAREGPT["rejected"]]}),
    ],
)
def test_a_schema_is_found_from_the_columns_and_their_kinds(name, row):
    assert one(row).schema == name
    assert one(row, schema=name) == one(row)


def test_most_of_the_first_rows_decide():
    found = read(b"oops", TEXTS | {"prompt": None}, MESSAGES, MESSAGES)
    assert [type(row).__name__ for row in found] == ["Fault", "Fault", "PreferenceExample", "PreferenceExample"]


def test_a_schema_given_by_name_is_taken_whatever_the_rows_look_like():
    assert fault(TEXTS, "unpaired") == "has null as 'label'; wanted true or false (1 or 0)"
    assert triple({**MESSAGES, **UNPAIRED, "prompt": PAIR[0]}, "explicit") == PAIR


def test_an_unknown_schema_is_answered_with_those_there_are():
    assert refusal(TEXTS, schema="dpo") == (
        "data.schema='dpo' is not known; choose one of auto, explicit, implicit, hh, unpaired, conversations, sft"
    )


def test_rows_of_no_known_schema_are_refused_with_what_was_found_and_what_is_wanted():
    assert refusal({"instruction": "2 + 2?", "completions": [{"response": "4"}], "score": 1.5}) == (
        "'pairs' has rows of no known schema: found instruction (text), completions (list of objects), score (number); "
        "rename its columns to one of: "
        "prompt, chosen, rejected: texts or lists of messages (explicit); "
        "chosen, rejected: texts or lists of messages, the prompt inside both (implicit); "
        r"chosen, rejected: transcripts that begin with '\n\nHuman:' (hh); "
        "prompt, completion, label: texts or lists of messages, and true or false (unpaired); "
        "conversations, chosen, rejected: a list of messages, and two answers to it (conversations); "
        "messages: a conversation, or prompt, completion: texts or lists of messages, without label (sft)"
    )


def test_a_part_without_a_readable_row_is_refused_with_the_first_rows_message():
    assert refusal(b"oops", b"{") == (
        "pairs.jsonl line 1 is not JSON: Expecting value at column 1; "
        "mend or remove the line (one JSON object per line is wanted)"
    )


REPEATING = {"prompt": " 2 + 2 = ", "chosen": "2 + 2 = 4", "rejected": "2 + 2 = 5"}


def test_answers_that_begin_with_the_prompt_are_asked_about():
    assert refusal(*[REPEATING] * 9, TEXTS) == (
        "'pairs' has 'chosen' and 'rejected' that begin with 'prompt' (in 9 of the 10 rows looked at); "
        "set data.schema to 'implicit' if that is the prompt inside the answers, "
        "or to 'explicit' if the answers really repeat it"
    )


@pytest.mark.parametrize(
    "rows",
    [
        [REPEATING] * 4,
        [REPEATING] * 8 + [TEXTS] * 2,
        [REPEATING | {"rejected": "5"}] * 9,
        [REPEATING | {"prompt": " "}] * 9,
        [{**WHOLE, "prompt": MESSAGES["prompt"]}] * 9,
    ],
    ids=["few rows", "too few of them", "one answer only", "no prompt", "messages"],
)
def test_answers_that_begin_with_the_prompt_by_chance_are_not_asked_about(rows):
    assert {example.schema for example in read(*rows)} == {"explicit"}


def test_either_answer_to_that_question_is_followed():
    for schema, pair in [("explicit", tuple(REPEATING.values())), ("implicit", ("2 + 2 =", " 4", " 5"))]:
        assert [(e.prompt, *e.answers) for e in read(*[REPEATING] * 5, schema=schema)] == [pair] * 5


def test_no_more_than_a_hundred_rows_are_held():
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield RawRow("pairs", "pairs.jsonl line", "pairs.jsonl", json.dumps(TEXTS).encode())

    examples = read_examples(endless())
    next(examples)
    assert taken == 100
    taken = 0
    next(read_examples(endless(), schema="explicit"))
    assert taken == 1


# What no row can do, and the project's own rows

WORDS = st.sampled_from(["", "a", " ", "2 + 2 = 4", "\n\nHuman: a\n\nAssistant: b", "user", "gpt", "assistant", "text"])
KEYS = ["role", "content", "from", "value", "type", "text", "tool_calls"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text(st.characters(), max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries({"role": WORDS | VALUES, "content": WORDS | VALUES})
NAMES = ["prompt", "chosen", "rejected", "completion", "label", "conversations", "messages", "system", "id", "tools"]
NAMES += ["chat_template_kwargs", *COLUMNS]
ROWS = st.dictionaries(st.sampled_from(NAMES), WORDS | st.lists(MESSAGE, max_size=3) | VALUES, max_size=2)


GOOD = [("explicit", TEXTS), ("explicit", MESSAGES), ("implicit", WHOLE), ("hh", HH)]
GOOD += [("unpaired", UNPAIRED), ("conversations", SHAREGPT), ("sft", CHAT)]


@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(ROWS, st.sampled_from(GOOD + [(schema, {}) for schema in SCHEMAS]))
def test_whatever_a_row_holds_it_gives_an_example_or_a_fault(row, start):
    schema, row = start[0], start[1] | row
    for rows in (lines(row), table(row)):
        (found,) = read_examples(rows, schema=schema)
        if isinstance(found, Fault):
            assert found.reason in ("bad_row", "prompt_mismatch")
            assert found.message.startswith(f"{found.where} ")
            assert found.message.isprintable()  # and so on one line
        else:
            kind = list if found.conversational else str
            given = [side for side in found.answers if side is not None]
            assert len(given) == (1 if schema in ("unpaired", "sft") else 2)
            assert all(isinstance(side, kind) for side in (found.prompt, *given))
            assert all(math.isfinite(value) for value in found.columns.values())


@settings(max_examples=100, deadline=None, database=None, derandomize=True)
@given(st.binary(max_size=20) | ROWS.map(lambda row: json.dumps(row).encode()))
def test_whatever_a_line_holds_the_rows_around_it_are_read(line):
    *before, _, after = read(TEXTS, TEXTS, line, TEXTS)
    assert [example.chosen for example in (*before, after)] == [" 4"] * 3


@pytest.mark.parametrize("path", sorted((ASSETS / "preferences").glob("*.jsonl")), ids=lambda path: path.stem)
def test_every_row_that_is_shipped_is_read_as_explicit_messages(path):
    rows = path.read_bytes().splitlines()
    examples = read(*rows)
    assert len(examples) == len(rows) > 0
    assert {(example.schema, example.conversational) for example in examples} == {("explicit", True)}
    assert all((e.prompt, *e.answers) == tuple(e.row[name] for name in MESSAGES) for e in examples)


def test_a_pair_of_ids_counts_its_tokens():
    masks = [np.array([False, True, True]), np.array([True, False, False, False, False])]
    pair = PairTokens("", "", *(np.zeros(n, np.int32) for n in (2, 3, 5)), *masks)
    assert [branch.size for branch in pair.branches] == [mask.size for mask in pair.masks] == [3, 5]
    assert (pair.lengths, pair.slots, pair.scored) == ((2, 3, 5), 10, 3)


@pytest.mark.parametrize("column", ["question", "instruction", "input", "query", "messages", "context"])
def test_texts_beside_a_column_that_sounds_like_a_prompt_are_asked_about(column):
    row = {column: "How much?", "chosen": "The answer is 20.", "rejected": "The answer is 10."}
    with pytest.raises(ValueError) as asked:
        read(row, row)
    assert str(asked.value) == (
        f"'pairs' has no 'prompt' but '{column}'; rename '{column}' to 'prompt', or set data.schema to 'implicit' "
        "if 'chosen' and 'rejected' begin with the prompt"
    )
    assert triple(row, schema="implicit") == ("The answer is", " 20.", " 10.")
    assert triple(row | {"prompt": "How much?"})[0] == "How much?"
    assert triple(WHOLE | {"messages": WHOLE["chosen"]}) == PAIR  # as ultrafeedback_binarized has it
