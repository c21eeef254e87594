"""compat="official" against oracles/official.py, which follows the released code step by step: the same ids, the same labels."""

import collections
import dataclasses
import itertools
import json

import numpy as np
import pytest
from examples import ASSETS, STORIES
from oracles.official import UNSCORED, official_ids
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from repo_jax.data.chat import PairTokenizer, TokenOptions
from repo_jax.data.schema import PreferenceExample

LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# As Llama 3.1 and Qwen 2.5: a conversation without a system message is given one, and so is an answer by itself.
DEFAULT_SYSTEM = (
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}"
    "<|start_header_id|>system<|end_header_id|>\n\nBe helpful.<|eot_id|>{% endif %}"
) + LLAMA3.replace("{{ bos_token }}", "")
ZEPHYR = (
    "{% for m in messages %}\n{% if m['role'] in ['user', 'system', 'assistant'] %}\n"
    "{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
# What the released code puts in the place of a Mistral model's own.
MISTRAL = (
    "{% set lead = namespace(text='') %}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{% set lead.text = m['content'].strip() + '\n\n' %}"
    "{% elif m['role'] == 'user' %}{{ '[INST] ' + (lead.text + m['content']).strip() + ' [/INST]' }}{% set lead.text = '' %}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# What the released Gemma recipes give: an answer may come first, and a system message goes into the first turn.
GEMMA = (
    "{{ bos_token }}{% set lead = namespace(text='') %}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{% set lead.text = m['content'] | trim + '\n\n' %}{% else %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ (lead.text + m['content']) | trim }}<end_of_turn>\n{% set lead.text = '' %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BARE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"

# name: template, the special tokens that it needs, the EOS
TEMPLATES = {
    "llama3": (LLAMA3, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "</s>"),
    "llama3-eot": (LLAMA3, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|eot_id|>"),
    "default-system": (DEFAULT_SYSTEM, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|eot_id|>"),
    "zephyr": (ZEPHYR, [], "</s>"),
    "mistral": (MISTRAL, [], "</s>"),
    "gemma": (GEMMA, ["<start_of_turn>", "<end_of_turn>"], "</s>"),
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
}


def stories(template: str, special=(), eos_token: str = "</s>"):
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template, tokenizer.eos_token = template, eos_token
    return tokenizer


def letters(*merges: str):
    """A BPE over letters with these merges, the first the strongest; the template writes contents and nothing else."""
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *"abcdefgxyz", *merges])}
    parts = [next((m[:i], m[i:]) for i in range(1, len(m)) if {m[:i], m[i:]} <= vocab.keys()) for m in merges]
    backend = Tokenizer(models.BPE(vocab, parts))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=BARE)


def pair(*prompt: str, chosen: str, rejected: str, name: str = "pair") -> PreferenceExample:
    """User and assistant take turns in the prompt; the answers are the assistant's."""
    roles = itertools.cycle(["user", "assistant"])
    messages = [{"role": role, "content": content} for role, content in zip(roles, prompt, strict=False)]
    answers = ([{"role": "assistant", "content": content}] for content in (chosen, rejected))
    return PreferenceExample(name, name, messages, *answers)


@pytest.fixture(scope="module")
def real_pairs() -> list[PreferenceExample]:
    with open(ASSETS / "preferences" / "train.jsonl", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in itertools.islice(lines, 500)]
    assert len(rows) == 500
    assert any(row["prompt"][0]["role"] == "system" for row in rows)
    assert any(len(row["prompt"]) > 5 for row in rows)
    return [PreferenceExample(row["id"], row["id"], row["prompt"], row["chosen"], row["rejected"]) for row in rows]


def expected_of(tokenizer, example: PreferenceExample, **lengths) -> dict[str, list[int]]:
    return official_ids(tokenizer, example.prompt, example.chosen, example.rejected, **lengths)


def tokenized(tokenizer, examples: list[PreferenceExample], **lengths) -> list:
    options = TokenOptions(compat="official", truncation="official", **lengths)
    return PairTokenizer(tokenizer, options)(examples)


def assert_official(tokenizer, examples: list[PreferenceExample], **lengths) -> list[dict[str, list[int]]]:
    """Every pair is kept and has the oracle's ids and labels; returns these."""
    results = tokenized(tokenizer, examples, **lengths)
    assert len(results) == len(examples)
    expected = [expected_of(tokenizer, example, **lengths) for example in examples]
    for example, result, row in zip(examples, results, expected, strict=True):
        assert result.dropped is None, example.id
        tokens = result.pair
        assert tokens.id == example.id
        if tokens.chosen[0] == tokens.rejected[0]:  # what the prompts share is stored once
            assert tokens.chosen_mask[0] or tokens.rejected_mask[0], example.id
        for name, branch, mask in (
            ("chosen", tokens.chosen, tokens.chosen_mask),
            ("rejected", tokens.rejected, tokens.rejected_mask),
        ):
            scored = np.concatenate([np.zeros(len(tokens.prompt), bool), mask]).tolist()
            assert np.concatenate([tokens.prompt, branch]).tolist() == row[f"{name}_input_ids"], (example.id, name)
            assert scored == [label != UNSCORED for label in row[f"{name}_labels"]], (example.id, name)
    return expected


def parts(tokenizer, row: dict[str, list[int]], name: str) -> tuple[list[str], list[str]]:
    """The tokens of prompt and response, as text, in the oracle's row."""
    tokens = tokenizer.convert_ids_to_tokens(row[f"{name}_input_ids"])
    start = row[f"{name}_labels"].count(UNSCORED)
    assert row[f"{name}_labels"] == [UNSCORED] * start + row[f"{name}_input_ids"][start:]
    return tokens[:start], tokens[start:]


# Real pairs


@pytest.mark.parametrize("name", ["llama3", "zephyr", "mistral", "gemma", "chatml"])
def test_real_pairs_have_the_official_ids_however_they_are_cut(name, real_pairs):
    tokenizer = stories(*TEMPLATES[name])
    rows = assert_official(tokenizer, real_pairs, max_length=300, max_prompt_length=200)
    cases = collections.Counter()
    for row in rows:
        # A prompt that is cut has lost its BOS, a response that is cut its EOS.
        prompt = row["chosen_input_ids"][0] != tokenizer.bos_token_id
        responses = [row[f"{name}_input_ids"][-1] != tokenizer.eos_token_id for name in ("chosen", "rejected")]
        cases["prompt cut" if prompt else "whole prompt", "responses cut" if any(responses) else "whole responses"] += 1
        cases["of two responses, cut", sum(responses)] += 1
    assert len(cases) == 7
    assert min(cases.values()) >= 5, cases


def test_at_the_published_lengths_nothing_of_the_real_pairs_is_cut(real_pairs):
    tokenizer = stories(*TEMPLATES["llama3-eot"])
    rows = assert_official(tokenizer, real_pairs, max_length=2048, max_prompt_length=1800)
    assert all(row[f"{name}_labels"][-1] == tokenizer.eos_token_id for row in rows for name in ("chosen", "rejected"))


# Begin and end

CATS = pair("the cat", chosen="sat on the mat", rejected="ran")
ROOMY = {"max_length": 10_000, "max_prompt_length": 5000}


@pytest.mark.parametrize("written", [0, 1, 2])
def test_a_bos_is_added_only_where_the_prompt_does_not_begin_with_one(written):
    tokenizer = stories("{{ bos_token }}" * written + BARE)
    (row,) = assert_official(tokenizer, [CATS], **ROOMY)
    prompt, response = parts(tokenizer, row, "chosen")
    assert prompt.count("<s>") == max(written, 1)
    assert response.count("<s>") == max(written - 1, 0)  # one is taken off the answer's own text


def test_a_prompt_that_is_cut_loses_its_bos():
    for template in (BARE, "{{ bos_token }}" + BARE):
        tokenizer = stories(template)
        (row,) = assert_official(tokenizer, [CATS], max_length=8, max_prompt_length=3)
        prompt, _ = parts(tokenizer, row, "chosen")
        assert len(prompt) == 3
        assert "<s>" not in prompt


def test_the_added_bos_counts_towards_the_length():
    tokenizer = letters()
    example = pair("xyz", chosen="ab", rejected="a")  # <s> x y z, a b </s>
    for max_length, kept in ((7, ["<s>", "x", "y", "z"]), (6, ["y", "z"])):
        (row,) = assert_official(tokenizer, [example], max_length=max_length, max_prompt_length=2)
        assert parts(tokenizer, row, "chosen") == (kept, ["a", "b", "</s>"])
        assert parts(tokenizer, row, "rejected") == (kept, ["a", "</s>"])


# name: the prompt and the response as text
WRITTEN = {
    "llama3": (
        "<s><|start_header_id|>user<|end_header_id|>\n\nthe cat<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\nran<|eot_id|></s>",
    ),
    "llama3-eot": (
        "<s><|start_header_id|>user<|end_header_id|>\n\nthe cat<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\nran<|eot_id|>",
    ),
    "default-system": (
        "<s><|start_header_id|>system<|end_header_id|>\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nthe cat<|eot_id|>",
        "<|start_header_id|>system<|end_header_id|>\n\nBe helpful.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nran<|eot_id|>",
    ),
    "zephyr": ("<s><|system|>\n</s>\n<|user|>\nthe cat</s>\n", "<|assistant|>\nran</s>\n</s>"),
    "mistral": ("<s>[INST] the cat [/INST]", " ran </s>"),
    "gemma": ("<s><start_of_turn>user\nthe cat<end_of_turn>\n", "<start_of_turn>model\nran<end_of_turn>\n</s>"),
    "chatml": (
        "<s><|im_start|>system\n<|im_end|>\n<|im_start|>user\nthe cat<|im_end|>\n",
        "<|im_start|>assistant\nran<|im_end|>\n<|im_end|>",
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_header_and_all_that_the_template_writes_are_scored_and_an_eos_behind_them(name):
    tokenizer = stories(*TEMPLATES[name])
    (row,) = assert_official(tokenizer, [CATS], **ROOMY)
    ids, start = row["rejected_input_ids"], row["rejected_labels"].count(UNSCORED)
    # Spaces aside: this tokenizer puts one behind every special token.
    written = [tokenizer.decode(part).replace(" ", "") for part in (ids[:start], ids[start:])]
    assert written == [text.replace(" ", "") for text in WRITTEN[name]]


def test_a_system_message_of_the_prompt_stays_the_only_one():
    tokenizer = letters()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}y{% endfor %}{# system #}"
    prompt = [{"role": "system", "content": "z"}, {"role": "user", "content": "x"}]
    example = pair("x", chosen="a", rejected="b")
    (one, two) = assert_official(tokenizer, [example, dataclasses.replace(example, prompt=prompt)], **ROOMY)
    assert parts(tokenizer, one, "chosen") == (["<s>", "y", "x", "y"], ["a", "y", "</s>"])
    assert parts(tokenizer, two, "chosen") == (["<s>", "z", "y", "x", "y"], ["a", "y", "</s>"])


def test_of_several_templates_the_names_are_searched_for_system():
    tokenizer = stories(ZEPHYR)
    tokenizer.chat_template = {"default": ZEPHYR, "tool_use": BARE}
    (row,) = assert_official(tokenizer, [CATS], **ROOMY)
    prompt = row["chosen_input_ids"][: row["chosen_labels"].count(UNSCORED)]
    assert "system" not in tokenizer.decode(prompt)


def test_an_answer_of_several_messages_is_scored_whole():
    def assistant(content):
        return {"role": "assistant", "content": content}

    tokenizer = letters()
    example = dataclasses.replace(
        pair("x", chosen="a", rejected="b"),
        chosen=[assistant("a"), {"role": "tool", "content": "z"}, assistant("c")],
        rejected=[assistant("a"), assistant("d")],
    )
    (row,) = assert_official(tokenizer, [example], **ROOMY)
    assert parts(tokenizer, row, "chosen") == (["<s>", "x"], ["a", "z", "c", "</s>"])
    assert parts(tokenizer, row, "rejected") == (["<s>", "x"], ["a", "d", "</s>"])


def test_a_length_in_the_tokenizers_own_file_cuts_nothing():
    tokenizer = letters()
    tokenizer.backend_tokenizer.enable_truncation(2)
    example = pair("xyz", chosen="abc", rejected="ab")
    results = tokenized(tokenizer, [example], **ROOMY)
    assert len(results[0].pair.prompt) == 4
    assert_official(tokenizer, [example], **ROOMY)


def test_special_tokens_inside_messages_are_special_tokens():
    tokenizer = stories(*TEMPLATES["llama3-eot"])
    example = pair("a <|eot_id|> b </s> c <s>", chosen="so<|eot_id|>it is", rejected="<s>is<|eot_id|>")
    (row,) = assert_official(tokenizer, [example], **ROOMY)
    prompt, chosen = parts(tokenizer, row, "chosen")
    assert [prompt.count(token) for token in ("<|eot_id|>", "</s>", "<s>")] == [2, 1, 2]
    assert chosen.count("<|eot_id|>") == 2
    _, rejected = parts(tokenizer, row, "rejected")
    assert rejected.count("<s>") == 1
    assert rejected.count("<|eot_id|>") == 2


def test_an_answer_that_ends_with_the_eos_gets_no_second():
    tokenizer = letters()
    (row,) = assert_official(tokenizer, [pair("x", chosen="a</s>", rejected="b")], **ROOMY)
    assert parts(tokenizer, row, "chosen") == (["<s>", "x"], ["a", "</s>"])
    assert parts(tokenizer, row, "rejected") == (["<s>", "x"], ["b", "</s>"])


def test_an_answer_that_begins_with_the_bos_loses_it():
    tokenizer = letters()
    (row,) = assert_official(tokenizer, [pair("x", chosen="<s>a", rejected="<s><s>b")], **ROOMY)
    assert parts(tokenizer, row, "chosen") == (["<s>", "x"], ["a", "</s>"])
    assert parts(tokenizer, row, "rejected") == (["<s>", "x"], ["<s>", "b", "</s>"])


def test_an_empty_answer_is_its_eos():
    tokenizer = letters()
    (row,) = assert_official(tokenizer, [pair("x</s>", chosen="", rejected="a")], **ROOMY)
    assert parts(tokenizer, row, "chosen") == (["<s>", "x", "</s>"], ["</s>"])


def test_pairs_with_equal_answers_are_kept():
    assert_official(letters(), [pair("x", chosen="a", rejected="a")], **ROOMY)
    assert_official(letters(), [pair("x", chosen="abc", rejected="abd")], max_length=4, max_prompt_length=2)


# How much is cut


def test_a_short_prompt_does_not_give_its_room_to_the_answers():
    tokenizer = letters()
    (row,) = assert_official(tokenizer, [pair("x", chosen="abcdefg", rejected="ab")], max_length=9, max_prompt_length=6)
    assert parts(tokenizer, row, "chosen") == (["<s>", "x"], ["a", "b", "c"])
    assert parts(tokenizer, row, "rejected") == (["<s>", "x"], ["a", "b", "</s>"])


def test_the_prompt_of_a_short_answer_is_cut_for_the_longer_one():
    tokenizer = letters()
    (row,) = assert_official(tokenizer, [pair("xyxyz", chosen="a", rejected="abc")], max_length=8, max_prompt_length=3)
    assert parts(tokenizer, row, "chosen") == (["x", "y", "z"], ["a", "</s>"])
    assert parts(tokenizer, row, "rejected") == (["x", "y", "z"], ["a", "b", "c", "</s>"])


def test_a_cut_that_is_enough_leaves_the_answers_whole():
    tokenizer = letters()
    example = pair("xyxyz", chosen="abc", rejected="ab")  # 6 and 4
    for max_prompt_length, response in ((4, ["a", "b", "c", "</s>"]), (5, ["a", "b", "c"])):
        (row,) = assert_official(tokenizer, [example], max_length=8, max_prompt_length=max_prompt_length)
        assert parts(tokenizer, row, "chosen")[1] == response


# Tokens that hold both prompt and answer


def test_a_token_that_swallows_the_prompts_last_is_scored():
    tokenizer = letters("bc")
    (row,) = assert_official(tokenizer, [pair("xab", chosen="cd", rejected="ce")], **ROOMY)
    assert parts(tokenizer, row, "chosen") == (["<s>", "x", "a"], ["bc", "d", "</s>"])
    assert parts(tokenizer, row, "rejected") == (["<s>", "x", "a"], ["bc", "e", "</s>"])


@pytest.mark.parametrize("first", [True, False], ids=["chosen", "rejected"])
def test_only_the_answer_that_merges_takes_the_prompts_last_token(first):
    tokenizer = letters("bc")
    merged, other = ("chosen", "rejected") if first else ("rejected", "chosen")
    (row,) = assert_official(tokenizer, [pair("xab", **{merged: "c", other: "dy"})], **ROOMY)
    assert parts(tokenizer, row, merged) == (["<s>", "x", "a"], ["bc", "</s>"])
    assert parts(tokenizer, row, other) == (["<s>", "x", "a", "b"], ["d", "y", "</s>"])


def test_a_prompt_token_that_is_split_again_is_scored_whole():
    # Before d, "xab" is x ab; before c it is x a, for the stronger merge takes b to bc.
    tokenizer = letters("bc", "ab")
    (row,) = assert_official(tokenizer, [pair("xab", chosen="cy", rejected="dy")], **ROOMY)
    assert parts(tokenizer, row, "chosen") == (["<s>", "x"], ["a", "bc", "y", "</s>"])
    assert parts(tokenizer, row, "rejected") == (["<s>", "x", "ab"], ["d", "y", "</s>"])


def test_the_split_steps_back_by_one_token_and_no_further():
    # abc holds two prompt tokens and the answer's first: one step back leaves it in the prompt.
    tokenizer = letters("bc", "abc")
    (row,) = assert_official(tokenizer, [pair("xab", chosen="cde", rejected="dy")], **ROOMY)
    assert parts(tokenizer, row, "chosen") == (["<s>", "x", "abc"], ["d", "e", "</s>"])
    assert parts(tokenizer, row, "rejected") == (["<s>", "x", "a", "b"], ["d", "y", "</s>"])


def test_a_prompt_of_one_token_that_merges_is_a_bos():
    tokenizer = letters("bc")
    (row,) = assert_official(tokenizer, [pair("b", chosen="c", rejected="d")], **ROOMY)
    assert parts(tokenizer, row, "chosen") == (["<s>"], ["bc", "</s>"])
    assert parts(tokenizer, row, "rejected") == (["<s>", "b"], ["d", "</s>"])


def test_each_answers_own_prompt_decides_whether_anything_is_cut():
    # <s> x a b with d y z </s> is one too long; <s> x a with bc y z </s> is not.
    tokenizer = letters("bc")
    example = pair("xab", chosen="cyz", rejected="dyz")
    for max_prompt_length, rejected in ((2, (["a", "b"], ["d", "y", "z", "</s>"])), (4, (["<s>", *"xab"], [*"dyz"]))):
        (row,) = assert_official(tokenizer, [example], max_length=7, max_prompt_length=max_prompt_length)
        assert parts(tokenizer, row, "chosen") == (["<s>", "x", "a"], ["bc", "y", "z", "</s>"])
        assert parts(tokenizer, row, "rejected") == rejected


# Where the released code stops


def test_the_oracle_stops_where_the_released_code_does():
    def row(tokenizer, example):
        return expected_of(tokenizer, example, **ROOMY)

    with pytest.raises(ValueError, match="more than one token"):
        row(letters("fg", "ef", "de", "cd", "bc", "ab"), pair("abcdef", chosen="g", rejected="x"))
    with pytest.raises(ValueError, match="fewer tokens"):
        row(letters("bc", "abc"), pair("xab", chosen="c", rejected="d"))
