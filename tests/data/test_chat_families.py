"""Pairs to ids under the chat templates of eight model families, token for token.

What is expected is written out by hand, comes from transformers' apply_chat_template, or from `families.expected`.
"""

import itertools

import numpy as np
import pytest
from families import FAMILIES, Family, expected, text_of
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from repo_jax.data.chat import PairTokenizer, TokenOptions
from repo_jax.data.schema import PreferenceExample, read_examples
from repo_jax.data.sources import RawRow

FAMILY = pytest.mark.parametrize("family", FAMILIES.values(), ids=str)

# What an answer's tokens write. A letter before a text is SentencePiece's: Phi 3's answers begin behind a special token.
SCORED = {
    "llama-2": " {} </s>",
    "llama-3": "{}<|eot_id|>",
    "mistral": "{}</s>",
    "zephyr": "{}</s>",
    "qwen-2": "{}<|im_end|>",
    "gemma": "{}<end_of_turn>",
    "phi-3": " {}<|end|>",
    "qwen-3": "<think>\n\n</think>\n\n{}<|im_end|>",
}
# What the assistant header's tokens write, where there is one. Phi 3's swallows the line break behind it.
HEADERS = {
    "llama-2": "",
    "llama-3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "",
    "zephyr": "<|assistant|>\n",
    "qwen-2": "<|im_start|>assistant\n",
    "gemma": "<start_of_turn>model\n",
    "phi-3": "<|assistant|>",
    "qwen-3": "<|im_start|>assistant\n",
}
# What a template writes behind the end of the last turn.
LEFT_OUT = {"zephyr": " \n", "qwen-2": "\n", "gemma": "\n", "phi-3": "<|endoftext|>", "qwen-3": "\n"}
ADDED_BOS = ["zephyr"]  # its tokenizer adds a BOS that its template does not write

PROMPTS = {
    "one-turn": [("user", "the cat\n\nran")],
    "turns": [("user", "a dog"), ("assistant", "sat"), ("user", "the cat"), ("assistant", "ran\n"), ("user", "a mat?")],
    "system": [("system", "You are a dog."), ("user", "the cat")],
    "system-turns": [("system", "sit"), ("user", "a dog"), ("assistant", "sat"), ("user", "the cat")],
}


def messages(*turns: tuple[str, str]) -> list[dict]:
    return [{"role": role, "content": content} for role, content in turns]


def says(content: str) -> list[dict]:
    return messages(("assistant", content))


def example(prompt, chosen, rejected) -> PreferenceExample:
    return PreferenceExample("7", "pairs.jsonl line 7", prompt, chosen, rejected)


def pair_example(*turns, chosen="sat on the mat", rejected="ran") -> PreferenceExample:
    return example(messages(*turns), says(chosen), says(rejected))


def tokenized(family: Family | PreTrainedTokenizerFast, *examples, **options):
    """The results, in which nothing is too long unless the options say so."""
    tokenizer = family.tokenizer if isinstance(family, Family) else family
    return PairTokenizer(tokenizer, TokenOptions(**{"max_length": 10**7, **options}))(examples)


def kept(family, one: PreferenceExample, **options):
    [result] = tokenized(family, one, **options)
    assert result.dropped is None
    return result.pair


def wholes(pair) -> list[list[int]]:
    return [[*pair.prompt.tolist(), *branch.tolist()] for branch in pair.branches]


def whole_masks(pair) -> list[list[bool]]:
    return [[False] * len(pair.prompt) + mask.tolist() for mask in pair.masks]


def scored(family: Family, pair) -> list[str]:
    return [text_of(family, branch[mask]) for branch, mask in zip(pair.branches, pair.masks, strict=True)]


def templated(family: Family, conversation: list[dict], **options) -> list[int]:
    """transformers' ids, and the BOS in front that its caller would have to see to."""
    bos = [family.tokenizer.bos_token_id] if family.name in ADDED_BOS else []
    return bos + family.tokenizer.apply_chat_template(conversation, return_dict=False, **options)


def prompts(family: Family) -> list[list[tuple[str, str]]]:
    return [prompt for prompt in PROMPTS.values() if family.system or prompt[0][0] != "system"]


# What apply_chat_template writes


@FAMILY
def test_prompt_and_answer_are_the_ids_of_apply_chat_template_up_to_the_end_of_the_turn(family):
    for prompt in prompts(family):
        one = pair_example(*prompt)
        for whole, answer in zip(wholes(kept(family, one)), one.answers, strict=True):
            full = templated(family, one.prompt + answer)
            assert whole == full[: len(whole)]
            assert family.tokenizer.convert_ids_to_tokens(whole[-1]) == family.end
            assert text_of(family, full[len(whole) :]) == LEFT_OUT.get(family.name, "")


@FAMILY
def test_the_answer_and_its_end_token_are_scored_and_nothing_else(family):
    for prompt in prompts(family):
        pair = kept(family, pair_example(*prompt, chosen="sat on\n\nthe mat", rejected="ran (to)"))
        assert scored(family, pair) == [
            SCORED[family.name].format(answer) for answer in ("sat on\n\nthe mat", "ran (to)")
        ]


@FAMILY
def test_what_is_not_scored_is_the_generation_prompt(family):
    for prompt in prompts(family):
        pair = kept(family, pair_example(*prompt))
        assert pair.prompt.tolist() == templated(family, messages(*prompt), add_generation_prompt=True)
        assert all(mask.all() for mask in pair.masks)


@FAMILY
def test_score_header_scores_the_assistant_header_too_and_nothing_else(family):
    for prompt in prompts(family):
        bare, pair = (kept(family, pair_example(*prompt), score_header=choice) for choice in (False, True))
        assert wholes(pair) == wholes(bare)
        assert scored(family, pair) == [HEADERS[family.name] + text for text in scored(family, bare)]


@FAMILY
def test_the_opening_that_two_answers_share_is_scored(family):
    one = pair_example(("user", "the cat"), chosen="a dog sat", rejected="a dog ran")
    pair = kept(family, one)
    assert pair.prompt.tolist() == templated(family, one.prompt, add_generation_prompt=True)
    assert pair.chosen[:2].tolist() == pair.rejected[:2].tolist()
    assert scored(family, pair) == [SCORED[family.name].format(answer) for answer in ("a dog sat", "a dog ran")]


@FAMILY
def test_an_answer_is_stripped_where_the_template_strips_it(family):
    pair = kept(family, pair_example(("user", "the cat"), chosen="ran \n ", rejected="sat\t"))
    strips = family.name in ("llama-2", "llama-3", "gemma")
    answers = ["ran", "sat"] if strips else ["ran \n ", "sat\t"]
    assert scored(family, pair) == [SCORED[family.name].format(answer) for answer in answers]


@pytest.mark.parametrize(
    "space", [" ", "\n", "\u3000", " \n\t "], ids=["space", "line-break", "ideographic", "several"]
)
def test_a_header_that_swallows_the_whitespace_an_answer_begins_with_is_not_scored(space):
    family = FAMILIES["phi-3"]
    one = pair_example(("user", "the cat"), chosen=space + "sat", rejected="ran")
    pair = kept(family, one)
    assert scored(family, pair) == [" sat<|end|>", " ran<|end|>"]
    assert pair.prompt.tolist() == templated(family, one.prompt, add_generation_prompt=True)


def test_such_a_header_within_an_answer_is_not_scored_either():
    family = FAMILIES["phi-3"]
    chosen = messages(("assistant", "sat"), ("user", "the dog"), ("assistant", " ran"))
    pair = kept(family, example(messages(("user", "the cat")), chosen, says("ran")))
    assert scored(family, pair) == [" sat<|end|> ran<|end|>", " ran<|end|>"]


@FAMILY
def test_an_answer_has_the_ids_it_has_in_a_pair_where_the_other_one_is_missing(family):
    prompt = messages(("user", "the cat"))
    both = kept(family, example(prompt, says("sat on"), says("ran")))
    chosen, rejected = (
        kept(family, example(prompt, *answers)) for answers in [(says("sat on"), None), (None, says("ran"))]
    )
    assert [wholes(chosen)[0], wholes(rejected)[1]] == wholes(both)
    assert [whole_masks(chosen)[0], whole_masks(rejected)[1]] == whole_masks(both)
    assert len(chosen.rejected) == len(chosen.rejected_mask) == len(rejected.chosen) == len(rejected.chosen_mask) == 0


@pytest.mark.parametrize("family", [f for f in FAMILIES.values() if not f.system], ids=str)
def test_a_conversation_that_the_template_refuses_is_dropped_and_named_and_its_neighbours_are_not(family):
    fine, refused = (pair_example(*turns, ("user", "the cat")) for turns in [[], [("system", "sit")]])
    first, bad, last = tokenized(family, fine, refused, fine)
    assert bad[:3] == (None, "template_refused", ())
    assert bad.message.startswith("pairs.jsonl line 7: ")
    assert wholes(first.pair) == wholes(last.pair) == wholes(kept(family, fine))


# One token of prompt and answer


@pytest.mark.parametrize(
    ("family", "answer", "first"),
    [("mistral", "(a) dog", "]("), ("qwen-2", "\nthe cat", "\n\n")],
    ids=["mistral", "qwen-2"],
)
def test_a_token_of_the_prompts_last_character_and_the_answers_first_is_scored(family, answer, first):
    family = FAMILIES[family]
    one = pair_example(("user", "the cat"), chosen=answer, rejected="ran")
    pair = kept(family, one)
    assert scored(family, pair) == [first[0] + SCORED[family.name].format(answer), SCORED[family.name].format("ran")]
    assert text_of(family, pair.chosen[:1]) == first
    # The other answer has that character as a token of its own, which is prompt and not scored.
    assert text_of(family, pair.rejected[~pair.rejected_mask]) == first[0]
    for whole, said in zip(wholes(pair), one.answers, strict=True):
        assert whole == templated(family, one.prompt + said)[: len(whole)]


# Answers of several messages, and thinking


def test_of_several_messages_only_what_the_assistant_says_is_scored():
    family = FAMILIES["qwen-2"]
    chosen = messages(("assistant", "the cat?"), ("tool", "a dog"), ("assistant", "ran"))
    rejected = messages(("assistant", "sat"), ("user", "the mat?"), ("user", "the dog"), ("assistant", "the end"))
    one = example(messages(("user", "the cat")), chosen, rejected)
    pair = kept(family, one)
    assert scored(family, pair) == ["the cat?<|im_end|>ran<|im_end|>", "sat<|im_end|>the end<|im_end|>"]
    assert (
        text_of(family, pair.chosen[~pair.chosen_mask])
        == "\n<|im_start|>tool\na dog<|im_end|>\n<|im_start|>assistant\n"
    )
    for whole, answer in zip(wholes(pair), one.answers, strict=True):
        assert whole == templated(family, one.prompt + answer)[:-1]


def test_with_score_header_every_assistant_header_of_an_answer_is_scored():
    family = FAMILIES["qwen-2"]
    chosen = messages(("assistant", "the cat?"), ("tool", "a dog"), ("assistant", "ran"))
    pair = kept(family, example(messages(("user", "the cat")), chosen, says("sat")), score_header=True)
    header = "<|im_start|>assistant\n"
    assert scored(family, pair) == [f"{header}the cat?<|im_end|>{header}ran<|im_end|>", f"{header}sat<|im_end|>"]


def test_what_a_tool_says_behind_the_last_answer_is_left_out():
    family = FAMILIES["qwen-2"]
    chosen = messages(("assistant", "the cat?"), ("tool", "a dog"))
    pair = kept(family, example(messages(("user", "the cat")), chosen, says("sat")))
    assert text_of(family, pair.chosen) == "the cat?<|im_end|>"


def test_special_token_text_in_an_answer_of_several_messages_is_text():
    family = FAMILIES["qwen-2"]
    chosen = messages(("assistant", "<|im_end|>"), ("tool", "<|im_start|>assistant\nx"), ("assistant", "<|im_end|>\n"))
    [result] = tokenized(family, example(messages(("user", "the cat")), chosen, says("sat")))
    assert result.noticed == ("special_text",)
    assert scored(family, result.pair)[0] == "<|im_end|><|im_end|><|im_end|>\n<|im_end|>"
    assert special_ids(family, wholes(result.pair)[0]) == ["<|im_start|>", "<|im_end|>"] * 5


def test_thinking_is_scored_in_the_last_turn_and_left_out_of_earlier_ones_as_the_template_does():
    family = FAMILIES["qwen-3"]
    prompt = messages(("user", "a dog"), ("assistant", "<think>\nwhy\n</think>\n\nsat"), ("user", "the cat"))
    one = example(prompt, says("<think>\nthe mat\n</think>\n\nran"), says("sat"))
    pair = kept(family, one)
    assert "why" not in text_of(family, pair.prompt)
    assert scored(family, pair) == [
        "<think>\nthe mat\n</think>\n\nran<|im_end|>",
        "<think>\n\n</think>\n\nsat<|im_end|>",
    ]
    assert wholes(pair) == [templated(family, prompt + answer)[:-1] for answer in one.answers]


def test_what_the_row_or_the_options_hand_the_template_reaches_it():
    family, kwargs = FAMILIES["qwen-3"], {"enable_thinking": False}
    one = pair_example(("user", "the cat"))
    by_row = PreferenceExample(*("7", "there", one.prompt, one.chosen, one.rejected), template=kwargs)
    against = PreferenceExample(
        *("7", "there", one.prompt, one.chosen, one.rejected), template={"enable_thinking": True}
    )
    results = tokenized(family, one, by_row, against, chat_template_kwargs=kwargs)
    bare, thinking = [kept(family, row) for row in (by_row, one)]
    assert scored(family, bare) == ["sat on the mat<|im_end|>", "ran<|im_end|>"]
    assert bare.prompt.tolist() == templated(family, one.prompt, add_generation_prompt=True, enable_thinking=False)
    assert [wholes(result.pair) for result in results] == [wholes(bare), wholes(bare), wholes(thinking)]
    # The thinking that is left out is written all the same: in the prompt, where nothing is scored.
    assert [scored(family, result.pair) for result in results] == [
        scored(family, pair) for pair in (bare, bare, thinking)
    ]


def test_an_earlier_turn_that_the_template_writes_otherwise_once_more_follows_is_a_mismatch():
    family = FAMILIES["qwen-3"]  # its template writes a block of thinking, empty here, in the last turn only
    chosen = messages(("assistant", "the call"), ("tool", "4"), ("assistant", "the end"))
    [result] = tokenized(family, example(messages(("user", "the cat")), chosen, says("ran")))
    assert (result.pair, result.dropped) == (None, "template_mismatch")


def test_thinking_in_an_answer_that_the_prompt_rules_out_is_a_mismatch():
    one = pair_example(("user", "the cat"), chosen="<think>\nthe mat\n</think>\n\nran", rejected="sat")
    [result] = tokenized(FAMILIES["qwen-3"], one, chat_template_kwargs={"enable_thinking": False})
    assert (result.pair, result.dropped) == (None, "template_mismatch")


# Conversations of which all answers are learnt

CHAT = messages(
    ("system", "sit"), ("user", "the cat"), ("assistant", "ran"), ("user", "a dog"), ("assistant", "sat on")
)


def conversation(turns: list[dict]) -> PreferenceExample:
    return next(read_examples([RawRow("chats", "chats.jsonl line 1", "1", {"messages": turns})]))


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        # What is scored stands at the odd places.
        ("llama-3", ["<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nsit<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nthe cat<|eot_id|>"
                     "<|start_header_id|>assistant<|end_header_id|>\n\n", "ran<|eot_id|>",
                     "<|start_header_id|>user<|end_header_id|>\n\na dog<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", "sat on<|eot_id|>"]),
        ("zephyr", ["<s> <|system|>\nsit</s> \n<|user|>\nthe cat</s> \n<|assistant|>\n", "ran</s>", " \n<|user|>\na dog</s> \n<|assistant|>\n", "sat on</s>"]),
        ("qwen-2", ["<|im_start|>system\nsit<|im_end|>\n<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n", "ran<|im_end|>",
                    "\n<|im_start|>user\na dog<|im_end|>\n<|im_start|>assistant\n", "sat on<|im_end|>"]),
    ],
)  # fmt: skip
def test_of_a_conversation_every_answer_and_its_end_token_are_scored_and_nothing_else(name, pieces):
    family = FAMILIES[name]
    pair = kept(family, conversation(CHAT))
    assert text_of(family, pair.prompt) == pieces[0] and len(pair.rejected) == 0
    cuts = [0, *(np.flatnonzero(np.diff(pair.chosen_mask)) + 1), len(pair.chosen)]
    runs = [text_of(family, pair.chosen[start:end]) for start, end in itertools.pairwise(cuts)]
    assert runs == pieces[1:] and pair.chosen_mask[0]
    whole = templated(family, CHAT)
    assert wholes(pair)[0] == whole[: len(wholes(pair)[0])]


@FAMILY
def test_a_conversation_has_the_ids_that_apply_chat_template_gives_it_and_what_follows_its_last_answer_is_left_out(
    family,
):
    turns = CHAT if family.system else CHAT[1:]
    more = conversation([*turns, *messages(("user", "the mat?"))])
    results = tokenized(family, conversation(turns), more)
    if family.name == "qwen-3":  # it writes the last turn otherwise than earlier ones
        assert [result.dropped for result in results] == ["template_mismatch"] * 2
        return
    whole = templated(family, turns)
    for result in results:
        ids = wholes(result.pair)[0]
        assert ids == whole[: len(ids)] and family.tokenizer.convert_ids_to_tokens(ids[-1]) == family.end
        assert scored(family, result.pair)[0] == "".join(SCORED[family.name].format(said) for said in ("ran", "sat on"))


def test_a_conversation_of_one_answer_is_that_answer_to_its_prompt():
    for name in ("llama-2", "mistral", "qwen-3"):
        turns = messages(("user", "the cat"), ("assistant", "ran"))
        alone = kept(FAMILIES[name], conversation(turns))
        pair = kept(FAMILIES[name], example(turns[:1], turns[1:], says("sat")))
        assert wholes(alone)[0] == wholes(pair)[0] and whole_masks(alone)[0] == whole_masks(pair)[0]


def test_special_token_text_in_a_conversation_is_text():
    family = FAMILIES["qwen-2"]
    turns = messages(
        ("user", "a<|im_end|>"), ("assistant", "<|im_end|>b"), ("user", "<|im_start|>"), ("assistant", "c")
    )
    [result] = tokenized(family, conversation(turns))
    assert result.noticed == ("special_text",) and scored(family, result.pair)[0] == "<|im_end|>b<|im_end|>c<|im_end|>"
    # A user's two, the assistant's two, and the system message that the template writes by itself.
    assert special_ids(family, wholes(result.pair)[0]) == ["<|im_start|>", "<|im_end|>"] * 5


def test_a_long_conversation_keeps_its_first_answers_where_it_is_cut():
    family = FAMILIES["qwen-2"]
    whole = kept(family, conversation(CHAT))
    [dropped] = tokenized(family, conversation(CHAT), max_length=len(wholes(whole)[0]) - 1)
    assert dropped.dropped == "over_long"
    short = kept(family, conversation(CHAT), max_length=len(whole.prompt) + 4, truncation="keep_start")
    assert short.chosen.tolist() == whole.chosen[:4].tolist() and short.chosen_mask.any()


def test_the_code_of_simpo_and_repo_reads_no_conversations():
    options = {"compat": "official", "truncation": "official", "max_prompt_length": 10}
    with pytest.raises(ValueError, match=r"chats.jsonl line 1 is no preference data, .*; leave out compat='official'"):
        tokenized(FAMILIES["qwen-2"], conversation(CHAT), **options)


# Text that looks like a special token

SHAPES = {
    "alone": "{0}",
    "start": "{0}the cat",
    "end": "the cat {0}",
    "inside": "the{0}cat",
    "spaced": "the {0} cat\n{0}\n",
    "adjacent": "{0}{0}{1}{0}",
    "nested": "<|im_{0}end|></{0}s><{0}",
    "a-turn": "ran{0}\n{1}user\nthe cat{0}{1}{2}",
}


def special_ids(family: Family, ids: list[int]) -> list[str]:
    return [token for token in family.tokenizer.convert_ids_to_tokens(ids) if token in family.specials]


def up_to_the_end(family: Family, ids: list[int]) -> list[int]:
    """The ids without what stands behind the last end token."""
    end = family.tokenizer.convert_tokens_to_ids(family.end)
    return ids[: len(ids) - ids[::-1].index(end)]


@FAMILY
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_special_token_text_in_a_message_is_text(family, shape):
    """In every message at once: there are only the special tokens of the same conversation without it, and no text is lost."""
    tokenizer = PairTokenizer(family.tokenizer, TokenOptions(max_length=10**5))
    roles = ["system", "user", "assistant", "user"] if family.system else ["user", "assistant", "user"]
    harmless = shape.format("a", "b", "c")
    without = templated(family, messages(*((role, harmless) for role in roles)) + says(harmless))
    template_writes = special_ids(family, up_to_the_end(family, without))
    for i, special in enumerate(family.specials):
        text = shape.format(special, family.specials[i - 1], family.specials[i - 2])
        prompt, answers = messages(*((role, text) for role in roles)), (text, "the dog" + text)
        [result] = tokenizer([example(prompt, *map(says, answers))])
        assert result.noticed == ("special_text",)
        assert scored(family, result.pair) == [SCORED[family.name].format(family.stripped(a)) for a in answers]
        for answer, whole, mask in zip(answers, wholes(result.pair), whole_masks(result.pair), strict=True):
            assert special_ids(family, whole) == template_writes
            assert (whole, mask) == expected(family, prompt, says(answer)[0])


@FAMILY
def test_special_token_text_leaves_the_tokenizer_and_its_neighbours_as_they_were(family):
    harmless = pair_example(("user", "the cat"))
    harmful = pair_example(("user", family.end), chosen=family.specials[0])
    before, special, after = tokenized(family, harmless, harmful, harmless)
    assert (before.noticed, special.noticed, after.noticed) == ((), ("special_text",), ())
    assert wholes(before.pair) == wholes(after.pair) == wholes(kept(family, harmless))
    for token in family.specials:
        ids = family.tokenizer(token, add_special_tokens=False).input_ids
        assert family.tokenizer.convert_ids_to_tokens(ids) == [token]


def test_special_token_text_in_what_else_a_message_holds_is_text():
    family, thought = FAMILIES["qwen-3"], "why<|im_end|>\n<|im_start|>user\nthe cat"
    [thinking] = says("ran")
    [result] = tokenized(
        family, example(messages(("user", "the cat")), [{**thinking, "reasoning_content": thought}], says("sat"))
    )
    assert result.noticed == ("special_text",)
    assert scored(family, result.pair)[0] == f"<think>\n{thought}\n</think>\n\nran<|im_end|>"
    assert special_ids(family, result.pair.chosen.tolist()) == ["<|im_end|>"]


@pytest.mark.parametrize(("family", "token"), [("phi-3", "</s>"), ("qwen-3", "<tool_response>")])
def test_added_tokens_that_are_not_special_stay_tokens(family, token):
    family = FAMILIES[family]
    one = pair_example(("user", f"the cat {token} ran"), chosen=f"sat {token} on", rejected="ran")
    [result] = tokenized(family, one)
    assert result.noticed == ()
    whole, _ = wholes(result.pair)
    assert whole.count(family.tokenizer.convert_tokens_to_ids(token)) == 2
    assert whole == up_to_the_end(family, templated(family, one.prompt + one.chosen))


@FAMILY
def test_texts_are_taken_as_they_are_special_tokens_included(family):
    """They may be templated already."""
    conversation = messages(("user", "the cat"))
    prompt = family.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    one = example(prompt, f"ran{family.end}", f"sat{family.end}")
    [result] = tokenized(family, one, append_eos="never")
    assert "special_text" not in result.noticed
    for whole, answer in zip(wholes(result.pair), one.answers, strict=True):
        assert whole == family.tokenizer(prompt + answer, add_special_tokens=family.name in ADDED_BOS).input_ids


# Any text

PIECES = [
    *("the cat", "ran", " ", "  ", "\n", "\n\n", "\t", "\r\n", "(b)", "]", "12345", "'s", "", "a"),
    *("é", "e\u0301", "\u0301", "\u0338", "\u1100\u1161", "ﬁ", "👩‍👩‍👧", "👍🏽", "\U0001f1e9\U0001f1ea", "नि", "日本"),
    *("\u3000", "\u2003", "\u200b", "\ufeff", "\u2028", "\xa0", "\x85", "\u202e"),
    *("\x00", "\x1f", "\x7f", "\ue000", "\uf8ff", "\U000f0000", "\U0010fffd", "\ufffd", "\uffff"),
    *("\ue0001\ue000", "\U000f00000\U000f0000", "▁", "Ġ", "Ċ", "<0x0A>", "<", "|>", "</", "s>", "<|", "\\n"),
    *("[INST]", "<<SYS>>", "{{ bos_token }}", "{% endfor %}"),
]


def contents(family: Family) -> st.SearchStrategy[str]:
    pieces = st.sampled_from([*PIECES, *family.specials, *(token for token in family.plain if "think" not in token)])
    return st.one_of(st.lists(pieces, max_size=6).map("".join), st.text(max_size=12))


@st.composite
def examples(draw, family: Family) -> PreferenceExample:
    content = contents(family)
    turns = [("user", draw(content)) for _ in range(draw(st.integers(1, 2)))]
    turns = [turn for user in turns for turn in (("assistant", draw(content)), user)][1:]
    if family.system and draw(st.booleans()):
        turns.insert(0, ("system", draw(content)))
    return pair_example(*turns, chosen=draw(content), rejected=draw(content))


def holds(family: Family, rows: list[PreferenceExample]) -> None:
    """What is to be true of any rows."""
    tokenizer = PairTokenizer(family.tokenizer, TokenOptions(max_length=10**7))
    results = tokenizer(rows)
    for one, result in zip(rows, results, strict=True):
        [alone] = tokenizer([one])
        assert (alone.dropped, alone.noticed) == (result.dropped, result.noticed)
        answers = [answer[0]["content"] for answer in one.answers]
        known = [expected(family, one.prompt, answer[0]) for answer in one.answers]
        if not all(answer.strip() for answer in answers):
            assert result[:3] == (None, "empty", ())
            continue
        if known[0][0] == known[1][0]:
            assert result[:3] == (None, "identical", ())
            continue
        pair = result.pair
        assert wholes(pair) == wholes(alone.pair) == [ids for ids, _ in known]
        assert whole_masks(pair) == whole_masks(alone.pair) == [mask for _, mask in known]
        special = any(
            token in message["content"]
            for token in family.specials
            for message in [*one.prompt, *one.chosen, *one.rejected]
        )
        assert result.noticed == (("special_text",) if special else ())
        users = sum(message["role"] == "user" for message in one.prompt)
        for whole, branch, mask, answer in zip(wholes(pair), pair.branches, pair.masks, answers, strict=True):
            if family.bos is not None:
                written = {"llama-2": users, "phi-3": 0}.get(family.name, 1)
                assert whole.count(family.tokenizer.bos_token_id) == written
                assert written == 0 or whole[0] == family.tokenizer.bos_token_id
            assert mask.any()
            text = text_of(family, branch[mask])
            assert text.endswith(family.end)
            if not family.nfc and family.name != "phi-3":  # its header swallows whitespace
                assert (
                    text.removesuffix(family.end).rstrip().endswith(family.stripped(answer).replace("▁", " ").rstrip())
                )
        if not special:
            for whole, answer in zip(wholes(pair), one.answers, strict=True):
                assert whole == up_to_the_end(family, templated(family, one.prompt + answer))


CALM = settings(deadline=None, derandomize=True, database=None, phases=[Phase.generate, Phase.shrink])


@FAMILY
def test_any_text_becomes_what_is_expected_whatever_stands_beside_it(family):
    @settings(CALM, max_examples=80)
    @given(st.lists(examples(family), min_size=1, max_size=3))
    def run(rows):
        holds(family, rows)

    run()


@pytest.mark.slow
@FAMILY
def test_any_text_becomes_what_is_expected_in_many_trials(family):
    @settings(CALM, max_examples=1000)
    @given(st.lists(examples(family), min_size=1, max_size=3))
    def run(rows):
        holds(family, rows)

    run()


@FAMILY
def test_each_hard_text_becomes_what_is_expected(family):
    """In the prompt, as an answer, and on both sides of a word of one; beside another hard text, and beside a special token's."""
    tokens = itertools.cycle(family.specials)
    pairs = [*itertools.pairwise(PIECES), *((next(tokens), piece) for piece in PIECES)]
    holds(family, [pair_example(("user", a), chosen=b, rejected=f"{a}cat{b}") for a, b in pairs])
    holds(family, [pair_example(("user", "the cat"), chosen=f"{b}cat{a}", rejected=f"{b}{a}cat") for a, b in pairs])


LONG = {
    "words": "the cat sat on the mat. " * 4200,
    "special": "the cat {0}{1}" * 4000,
    "one-word": "a" * 100_000,
    "line-breaks": "x" + "\n" * 100_000 + "x",
    "emoji": "👍🏽" * 50_000,
}


@FAMILY
@pytest.mark.parametrize(
    "text",
    [text if kind == "words" else pytest.param(text, marks=pytest.mark.slow) for kind, text in LONG.items()],
    ids=LONG,
)
def test_a_message_of_100_000_characters_becomes_what_is_expected(family, text):
    text = text.format(*family.specials[-2:])
    one = pair_example(("user", text[:10_000]), chosen=text, rejected=text[:50_000])
    [result] = tokenized(family, one)
    for whole, mask, answer in zip(wholes(result.pair), whole_masks(result.pair), one.answers, strict=True):
        assert (whole, mask) == expected(family, one.prompt, answer[0])


def test_thousands_of_special_tokens_in_one_message_are_text():
    family = FAMILIES["qwen-2"]
    one = pair_example(("user", "the cat"), chosen="<|im_end|><|im_start|>" * 5000, rejected="ran")
    [result] = tokenized(family, one)
    assert scored(family, result.pair)[0] == "<|im_end|><|im_start|>" * 5000 + "<|im_end|>"
    assert len(special_ids(family, wholes(result.pair)[0])) == 6


def test_a_tokenizer_whose_offsets_leave_out_the_space_around_a_word_gives_the_same():
    family = FAMILIES["qwen-2"]
    backend = Tokenizer.from_str(family.tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    trimming = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=family.end, chat_template=family.template)
    spaced = ["sat ", " sat", "sat\n\n", "\n\nsat", " \n sat on \n ", "\tsat  on\t", "sat"]
    rows = [pair_example(("user", a), chosen=a, rejected=b) for a, b in itertools.pairwise(spaced)]
    rows += [example(a, b, a) for a, b in itertools.pairwise(spaced)]
    for whole, trimmed in zip(tokenized(family, *rows), tokenized(trimming, *rows), strict=True):
        assert wholes(trimmed.pair) == wholes(whole.pair)
        assert whole_masks(trimmed.pair) == whole_masks(whole.pair)


# Lengths. One letter is one token here, and so are the BOS < and the EOS >.


def letters(template: str | None = None, *, bos: str | None = "<", eos: str | None = ">") -> PreTrainedTokenizerFast:
    """A tokenizer that adds its BOS itself, if it has one."""
    backend = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate("<>abcdefuvwxyz\n")}, unk_token="u"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.add_special_tokens([token for token in (bos, eos) if token])
    if bos:
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
    named = {name: token for name, token in [("bos_token", bos), ("eos_token", eos)] if token}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **named)


def spelt(pair) -> tuple[str, str, str]:
    """Prompt, chosen and rejected; what is not scored of an answer is in brackets."""
    tokens = letters().convert_ids_to_tokens
    answers = (
        "".join(token if scored else f"({token})" for token, scored in zip(tokens(branch.tolist()), mask, strict=True))
        for branch, mask in zip(pair.branches, pair.masks, strict=True)
    )
    return "".join(tokens(pair.prompt.tolist())), *answers


def cut(prompt, chosen, rejected, *, tokenizer=None, **options):
    """What is left of an example of texts or messages: spelt, or why it is dropped; and what was noticed."""
    [result] = tokenized(tokenizer or letters(), example(prompt, chosen, rejected), **options)
    return (spelt(result.pair) if result.pair else result.dropped), result.noticed


CUTS = pytest.mark.parametrize("truncation", ["keep_end", "keep_start"])
WRITES_END = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}\n{% endif %}{% endfor %}"
)
NO_END = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"


@pytest.mark.parametrize(
    ("chosen", "rejected"), [("wxyz", "x"), ("x", "wxyz")], ids=["chosen-longer", "rejected-longer"]
)
@pytest.mark.parametrize("truncation", ["drop", "keep_end", "keep_start"])
def test_a_pair_that_just_fits_is_kept_whole(chosen, rejected, truncation):
    # A BOS, two letters of prompt, and four letters and an EOS for the longer answer.
    fits = cut("ab", chosen, rejected, truncation=truncation, max_length=8, max_prompt_length=3)
    assert fits == (("<ab", f"{chosen}>", f"{rejected}>"), ())


@pytest.mark.parametrize(
    ("chosen", "rejected"), [("wxyz", "x"), ("x", "wxyz")], ids=["chosen-longer", "rejected-longer"]
)
def test_a_pair_one_token_too_long_is_dropped_where_nothing_is_to_be_cut(chosen, rejected):
    assert cut("ab", chosen, rejected, max_length=7) == ("over_long", ())
    assert cut("ab", chosen, rejected, max_length=8, max_prompt_length=2) == ("over_long", ())


@CUTS
def test_a_long_prompt_keeps_its_bos_and_one_end_and_the_answers_stay_whole(truncation):
    left = {"keep_end": "<def", "keep_start": "<abc"}[truncation]
    result = cut("abcdef", "xy", "z", truncation=truncation, max_length=100, max_prompt_length=4)
    assert result == ((left, "xy>", "z>"), ("truncated",))


@CUTS
def test_a_long_prompt_without_bos_keeps_as_many_tokens(truncation):
    left = {"keep_end": "cdef", "keep_start": "abcd"}[truncation]
    options = {"truncation": truncation, "max_length": 100, "max_prompt_length": 4}
    assert cut("abcdef", "xy", "z", tokenizer=letters(bos=None), **options) == ((left, "xy>", "z>"), ("truncated",))


@CUTS
def test_an_answer_is_cut_by_its_own_length_and_gets_no_eos_in_place_of_its_own(truncation):
    options = {"truncation": truncation, "max_length": 5}
    assert cut("ab", "vwxyz", "z", **options) == (("<ab", "vw", "z>"), ("truncated",))
    assert cut("ab", "z", "vwxyz", **options) == (("<ab", "z>", "vw"), ("truncated",))
    assert cut("ab", "z", "vwxyz", append_eos="always", **options) == (("<ab", "z>", "vw"), ("truncated",))


@CUTS
def test_a_prompt_within_max_prompt_length_is_not_cut_for_a_long_answer(truncation):
    result = cut("abcd", "vwxyz", "z", truncation=truncation, max_length=7, max_prompt_length=5)
    assert result == (("<abcd", "vw", "z>"), ("truncated",))


@CUTS
def test_what_a_cut_prompt_leaves_is_the_answers_room(truncation):
    left = {"keep_end": "<f", "keep_start": "<a"}[truncation]
    result = cut("abcdef", "vwxyz", "z", truncation=truncation, max_length=5, max_prompt_length=2)
    assert result == ((left, "vwx", "z>"), ("truncated",))


@CUTS
def test_messages_are_cut_like_texts(truncation):
    tokenizer = letters("{{ bos_token }}" + WRITES_END)
    left = {"keep_end": "<def", "keep_start": "<abc"}[truncation]
    options = {"truncation": truncation, "max_length": 7, "max_prompt_length": 4}
    result = cut(messages(("user", "abcdef")), says("vwxyz"), says("z"), tokenizer=tokenizer, **options)
    assert result == ((left, "vwx", "z>"), ("truncated",))


@CUTS
def test_a_prompt_that_leaves_no_room_is_over_long_and_room_for_one_token_is_enough(truncation):
    assert cut("abcdef", "xy", "z", truncation=truncation, max_length=7) == ("over_long", ())
    assert cut("abcdef", "xy", "z", truncation=truncation, max_length=8) == (("<abcdef", "x", "z"), ("truncated",))


@CUTS
def test_answers_that_are_equal_after_the_cut_are_dropped(truncation):
    assert cut("ab", "xyv", "xyw", truncation=truncation, max_length=5) == ("identical_after_truncation", ())
    assert cut("ab", "xyv", "xyw", truncation=truncation, max_length=6) == (("<ab", "xyv", "xyw"), ("truncated",))
    assert cut("ab", "xy", "xy", truncation=truncation, max_length=5) == ("identical", ())


@CUTS
def test_an_answer_without_scored_tokens_after_the_cut_is_empty(truncation):
    late = messages(("tool", "abc"), ("assistant", "x"))
    options = {"tokenizer": letters(WRITES_END), "truncation": truncation}
    assert cut(messages(("user", "ab")), late, says("z"), max_length=6, **options) == ("empty", ())
    kept_one = cut(messages(("user", "ab")), late, says("z"), max_length=7, **options)
    assert kept_one == (("<ab", "(a)(b)(c)x", "z>"), ("truncated",))


@CUTS
def test_only_the_pair_that_is_too_long_is_cut(truncation):
    rows = [example("ab", "x", "y"), example("ab", "vwxyz", "y"), example("ab", "x", "y")]
    results = tokenized(letters(), *rows, truncation=truncation, max_length=5)
    assert [result.noticed for result in results] == [(), ("truncated",), ()]
    assert [spelt(result.pair) for result in results] == [("<ab", "x>", "y>"), ("<ab", "vw", "y>"), ("<ab", "x>", "y>")]


# POET


def test_poet_cuts_both_answers_to_the_shorter_ones_scored_tokens():
    assert cut("ab", "vwxyz", "vw", use_poet=True)[0] == ("<ab", "vwx", "vw>")
    assert cut("ab", "z", "vwxyz", use_poet=True)[0] == ("<ab", "z>", "vw")
    assert cut("ab", "xy", "yz", use_poet=True)[0] == ("<ab", "xy>", "yz>")


def test_poet_counts_scored_tokens_only():
    late = messages(("assistant", "v"), ("tool", "abc"), ("assistant", "wx"))
    result, _ = cut(messages(("user", "ab")), late, says("yz"), tokenizer=letters(WRITES_END), use_poet=True)
    assert result == ("<ab", "v>(\n)(a)(b)(c)w", "yz>")
    short = messages(("tool", "abcdef"), ("assistant", "x"))
    result, _ = cut(messages(("user", "ab")), short, says("vwxyz"), tokenizer=letters(WRITES_END), use_poet=True)
    assert result == ("<ab", "(a)(b)(c)(d)(e)(f)x>", "vw")


def test_poet_counts_what_truncation_leaves():
    options = {"truncation": "keep_end", "max_length": 5, "use_poet": True}
    assert cut("ab", "vwxyz", "z", **options)[0] == ("<ab", "vw", "z>")
    assert cut("a", "vwxyz", "zy", **options)[0] == ("<a", "vwx", "zy>")
    assert cut("ab", "xyv", "xy", append_eos="never", use_poet=True)[0] == "identical_after_truncation"


# The end of an answer


@pytest.mark.parametrize(("append_eos", "end"), [("auto", ">"), ("always", ">"), ("never", "")])
def test_texts_end_with_one_eos_unless_there_is_to_be_none(append_eos, end):
    assert cut("ab", "xy", "z", append_eos=append_eos)[0] == ("<ab", f"xy{end}", f"z{end}")
    assert cut("ab", "xy>", "z", append_eos=append_eos)[0] == ("<ab", "xy>", f"z{end}")


def test_texts_end_without_eos_where_the_tokenizer_has_none():
    assert cut("ab", "xy", "z", tokenizer=letters(eos=None), append_eos="always")[0] == ("<ab", "xy", "z")


@pytest.mark.parametrize("append_eos", ["auto", "always", "never"])
def test_messages_end_with_the_templates_eos_and_no_second_one(append_eos):
    result = cut(messages(("user", "ab")), says("xy"), says("z"), tokenizer=letters(WRITES_END), append_eos=append_eos)
    assert result == (("<ab", "xy>", "z>"), ())


@pytest.mark.parametrize(("append_eos", "end"), [("auto", ""), ("always", ">"), ("never", "")])
def test_messages_that_the_template_leaves_open_end_with_their_words_and_the_missing_eos_is_noticed(append_eos, end):
    result = cut(messages(("user", "ab")), says("xy"), says("z"), tokenizer=letters(NO_END), append_eos=append_eos)
    assert result == (("<ab\n", f"xy{end}", f"z{end}"), () if end else ("missing_eos",))


# BOS


@pytest.mark.parametrize(
    "written", ["", "{{ bos_token }}", "{{ bos_token }}{{ bos_token }}"], ids=["none", "one", "two"]
)
@pytest.mark.parametrize("score_header", [False, True], ids=["bare", "score-header"])
def test_there_is_one_bos_however_many_are_written_and_the_mask_keeps_its_place(written, score_header):
    tokenizer = letters(written + WRITES_END)
    result, _ = cut(messages(("user", "ab")), says("xy"), says("z"), tokenizer=tokenizer, score_header=score_header)
    assert result == ("<ab", "xy>", "z>")
