"""Pairs to ids: what is scored, what is kept, what is cut. What is expected is written out by hand, or comes from
transformers' own apply_chat_template. test_chat_families.py has the templates of eight families, test_official.py compat.
"""

import dataclasses
import itertools

import numpy as np
import pytest
from examples import ASSETS, STORIES, tokenize, tokens
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from repo_jax.data.chat import PairTokenizer, TokenOptions, load_tokenizer, poet
from repo_jax.data.schema import PreferenceExample, read_examples
from repo_jax.data.sources import open_source

BARE = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
WITH_BOS = "{{ bos_token }}" + BARE
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def words(pre_tokenizer=None, **special):
    """A byte-level BPE of a few sentences; special tokens as given, and no post-processor: it adds none of them itself."""
    pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>", "<s>", "</s>"],
        show_progress=False,
    )
    backend.train_from_iterator(["the cat sat on the mat", "a dog ran to the cat", "user", "assistant"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def letters(*merges: str, **special):
    """A BPE over letters with these merges, the first the strongest: "bc" makes one token of b and c."""
    alphabet = "abcdefxyz "
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet, *merges])}
    backend = Tokenizer(models.BPE(vocab, [(merge[:-1], merge[-1]) for merge in merges]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def stories(template=None, **options):
    """A SentencePiece-like tokenizer that adds the BOS <s> itself."""
    return load_tokenizer(str(STORIES), chat_template=template, **options)


def texts(prompt, chosen, rejected):
    return PreferenceExample("7", "pairs.jsonl line 7", prompt, chosen, rejected)


def messages(*prompt, chosen, rejected):
    """User and assistant take turns in the prompt; the answers are the assistant's."""
    turns = [
        {"role": role, "content": content}
        for role, content in zip(itertools.cycle(["user", "assistant"]), prompt, strict=False)
    ]
    return texts(turns, *([{"role": "assistant", "content": answer}] for answer in (chosen, rejected)))


def wholes(pair):
    """The ids of prompt and answer, for both answers."""
    return [np.concatenate([pair.prompt, branch]).tolist() for branch in pair.branches]


def scored(tokenizer, pair):
    """The tokens that are scored, as text."""
    return [tokenizer.decode(branch[mask]) for branch, mask in zip(pair.branches, pair.masks, strict=True)]


def unscored(tokenizer, pair):
    """The tokens of the answers that are not scored."""
    return [tokenizer.convert_ids_to_tokens(ids[~mask]) for ids, mask in zip(pair.branches, pair.masks, strict=True)]


def kept(tokenizer, example, **options):
    """The pair of an example that is not dropped."""
    result = tokenize(tokenizer, example, **options)
    assert result.dropped is None
    return result.pair


def names(tokenizer, pair):
    """Prompt and answers as the tokenizer calls its tokens, without spaces between them."""
    return ["".join(tokenizer.convert_ids_to_tokens(ids)) for ids in (pair.prompt, *pair.branches)]


CATS = messages("the cat", chosen=" sat on the mat", rejected=" ran")


# What apply_chat_template writes


@pytest.mark.parametrize(
    "tokenizer",
    [
        stories(WITH_BOS),
        words(bos_token="<s>", eos_token="</s>", chat_template=WITH_BOS),
        words(eos_token="<|im_end|>", chat_template=CHATML),
        # Llama 2's and Mistral's way: a space before the first word of a text, and none after a BOS.
        words(
            pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
            bos_token="<s>",
            eos_token="</s>",
            chat_template=WITH_BOS,
        ),
    ],
    ids=["adds-bos", "template-bos", "no-bos", "space-first"],
)
def test_prompt_and_answer_are_the_ids_of_apply_chat_template(tokenizer):
    pair = kept(tokenizer, CATS)
    templated = [tokenizer.apply_chat_template(CATS.prompt + answer, return_dict=False) for answer in CATS.answers]
    behind = tokenizer("\n", add_special_tokens=False).input_ids if tokenizer.chat_template == CHATML else []
    assert [whole + behind for whole in wholes(pair)] == templated


def test_real_conversations_keep_their_ids_and_score_their_answers():
    tokenizer = stories(WITH_BOS)
    rows = open_source(str(ASSETS / "preferences" / "train.jsonl"), "train[:50]").rows()
    for example in read_examples(rows):
        pair = kept(tokenizer, example)
        for whole, answer in zip(wholes(pair), example.answers, strict=True):
            assert whole == tokenizer.apply_chat_template(example.prompt + answer, return_dict=False)
        assert scored(tokenizer, pair) == [answer[0]["content"] + "</s>" for answer in example.answers]


# BOS


@pytest.mark.parametrize("written", [0, 1, 2], ids=["template-none", "template-once", "template-twice"])
@pytest.mark.parametrize("added", [False, True], ids=["tokenizer-none", "tokenizer-adds"])
def test_there_is_one_bos_whoever_writes_it(written, added):
    template = "{{ bos_token }}" * written + BARE
    tokenizer = stories(template) if added else words(bos_token="<s>", eos_token="</s>", chat_template=template)
    bare = tokenizer("the cat", add_special_tokens=False).input_ids
    pair = kept(tokenizer, CATS)
    expected = [tokenizer.bos_token_id] if written or added else []
    assert pair.prompt.tolist() == expected + bare
    assert tokenizer.bos_token_id not in np.concatenate(pair.branches)


def test_texts_get_the_bos_that_the_tokenizer_adds():
    tokenizer = stories()
    pair = kept(tokenizer, texts("the cat", " sat", " ran"))
    assert pair.prompt.tolist() == tokenizer("the cat").input_ids
    assert pair.prompt.tolist().count(tokenizer.bos_token_id) == 1


def test_texts_that_begin_with_a_bos_keep_one():
    tokenizer = stories()
    none, one, two = (kept(tokenizer, texts(bos + "the cat", " sat", " ran")) for bos in ("", "<s>", "<s><s>"))
    assert wholes(one) == wholes(two) == wholes(none)


def test_without_a_bos_token_there_is_none():
    tokenizer = words(eos_token="<|im_end|>", chat_template=CHATML)
    pair = kept(tokenizer, CATS)
    assert tokenizer.decode(pair.prompt) == "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"


# The end of an answer


def test_texts_get_one_end_token():
    tokenizer = words(eos_token="</s>")
    pair = kept(tokenizer, texts("the cat", " sat", " ran to"))
    assert scored(tokenizer, pair) == [" sat</s>", " ran to</s>"]


def test_texts_that_end_with_the_end_token_get_no_second():
    tokenizer = words(eos_token="</s>")
    pair = kept(tokenizer, texts("the cat", " sat</s>", " ran to"))
    assert scored(tokenizer, pair) == [" sat</s>", " ran to</s>"]


def test_texts_get_no_end_token_where_the_tokenizer_has_none():
    tokenizer = words()
    assert scored(tokenizer, kept(tokenizer, texts("the cat", " sat", " ran"))) == [" sat", " ran"]


ENDING = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}END{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    ("written", "end", "noticed"),
    [
        ("</s>", "</s>", ()),
        ("<|im_end|>\n", "<|im_end|>", ()),
        (" <|im_end|></s>", " <|im_end|>", ()),
        ("\n", "", ("missing_eos",)),
        ("", "", ("missing_eos",)),
    ],
)
def test_a_message_ends_with_the_first_special_token_that_the_template_writes_behind_it(written, end, noticed):
    tokenizer = words(eos_token="</s>", chat_template=ENDING.replace("END", written))
    result = tokenize(tokenizer, CATS)
    assert scored(tokenizer, result.pair) == [" sat on the mat" + end, " ran" + end]
    assert unscored(tokenizer, result.pair) == [[], []]
    assert result.noticed == noticed


@pytest.mark.parametrize(
    ("append_eos", "written", "end"),
    [
        ("always", "", "</s>"),
        ("always", "</s>", "</s>"),
        ("always", "<|im_end|>\n", "<|im_end|></s>"),
        ("never", "", ""),
        ("never", "</s>", "</s>"),
    ],
)
def test_append_eos_puts_an_end_token_behind_messages_or_leaves_it_to_the_template(append_eos, written, end):
    tokenizer = words(eos_token="</s>", chat_template=ENDING.replace("END", written))
    result = tokenize(tokenizer, CATS, append_eos=append_eos)
    assert scored(tokenizer, result.pair) == [" sat on the mat" + end, " ran" + end]
    assert result.noticed == (() if end else ("missing_eos",))


@pytest.mark.parametrize(("append_eos", "end"), [("always", "</s>"), ("auto", "</s>"), ("never", "")])
def test_append_eos_puts_an_end_token_behind_texts_or_leaves_it_away(append_eos, end):
    tokenizer = words(eos_token="</s>")
    result = tokenize(tokenizer, texts("the cat", " sat", " ran"), append_eos=append_eos)
    assert scored(tokenizer, result.pair) == [" sat" + end, " ran" + end]
    assert result.noticed == (() if end else ("missing_eos",))


def test_one_answer_without_an_end_is_noticed():
    tokenizer = words(eos_token="</s>")
    result = tokenize(tokenizer, texts("the cat", " sat</s>", " ran"), append_eos="never")
    assert (scored(tokenizer, result.pair), result.noticed) == ([" sat</s>", " ran"], ("missing_eos",))


def test_an_end_token_of_the_recipe_replaces_the_tokenizers_own():
    tokenizer = stories(BARE, eos_token="<s>")
    pair = kept(tokenizer, CATS)
    assert [branch[-1] for branch in pair.branches] == [1, 1]
    assert tokenizer("</s>", add_special_tokens=False).input_ids == [2]


# Prompt and answer


def test_only_the_last_answer_of_a_conversation_is_scored():
    tokenizer = words(eos_token="<|im_end|>", chat_template=CHATML)
    pair = kept(tokenizer, messages("the cat", "a dog", "the mat", chosen="sat on\nthe mat", rejected="ran to"))
    assert scored(tokenizer, pair) == ["sat on\nthe mat<|im_end|>", "ran to<|im_end|>"]
    assert tokenizer.decode(pair.prompt).endswith(
        "a dog<|im_end|>\n<|im_start|>user\nthe mat<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_opening_that_two_answers_share_is_scored():
    tokenizer = words(eos_token="</s>")
    pair = kept(tokenizer, texts("the cat", " sat on the mat", " sat on the dog"))
    assert tokenizer.decode(pair.prompt) == "the cat"
    assert pair.chosen[0] == pair.rejected[0]
    assert scored(tokenizer, pair) == [" sat on the mat</s>", " sat on the dog</s>"]
    assert unscored(tokenizer, pair) == [[], []]


def test_one_answer_that_begins_the_other_is_scored_whole():
    tokenizer = words(eos_token="</s>")
    pair = kept(tokenizer, texts("the cat", " sat", " sat on the mat"))
    assert scored(tokenizer, pair) == [" sat</s>", " sat on the mat</s>"]


def test_a_character_of_several_tokens_is_one_sides_whole():
    # In UTF-8 all three letters begin with the same byte, which is a token here.
    tokenizer = words(eos_token="</s>")
    pair = kept(tokenizer, texts("è", "é", "à"))
    assert tokenizer.decode(pair.prompt) == "è"
    assert scored(tokenizer, pair) == ["é</s>", "à</s>"]


def test_a_token_that_straddles_the_boundary_belongs_to_the_answer():
    tokenizer = letters("bc")
    pair = kept(tokenizer, texts("ab", "cd", "ce"))
    assert tokenizer.convert_ids_to_tokens(pair.prompt) == ["a"]
    assert [tokenizer.convert_ids_to_tokens(branch) for branch in pair.branches] == [["bc", "d"], ["bc", "e"]]
    assert unscored(tokenizer, pair) == [[], []]


def test_prompt_tokens_that_the_answers_split_differently_are_not_scored():
    # Before d, "xab" is x ab; before c it is x a, for the stronger merge takes b to bc.
    tokenizer = letters("bc", "ab")
    pair = kept(tokenizer, texts("xab", "cy", "dy"))
    assert tokenizer.convert_ids_to_tokens(pair.prompt) == ["x"]
    assert [tokenizer.convert_ids_to_tokens(branch) for branch in pair.branches] == [["a", "bc", "y"], ["ab", "d", "y"]]
    assert unscored(tokenizer, pair) == [["a"], ["ab"]]
    assert pair.scored == 4


def test_only_the_answer_that_splits_the_prompt_further_has_unscored_tokens():
    # Before c, b goes to bc; before d it stays alone, and is still prompt.
    tokenizer = letters("bc")
    pair = kept(tokenizer, texts("xab", "cy", "dy"))
    assert tokenizer.convert_ids_to_tokens(pair.prompt) == ["x", "a"]
    assert [tokenizer.convert_ids_to_tokens(branch) for branch in pair.branches] == [["bc", "y"], ["b", "d", "y"]]
    assert unscored(tokenizer, pair) == [[], ["b"]]


def test_the_pair_keeps_the_rows_id_and_place():
    pair = kept(words(), texts("the cat", " sat", " ran"))
    assert (pair.id, pair.where) == ("7", "pairs.jsonl line 7")


def test_many_examples_become_what_each_becomes_by_itself():
    tokenizer = words(eos_token="</s>", chat_template=BARE)
    examples = [
        CATS,
        texts("the cat", " sat", " ran"),
        texts("the cat", " ran", " ran"),
        messages("a dog<s>", chosen="ran", rejected="sat"),
        PreferenceExample("8", "there", "the cat", None, " ran"),
        texts("the cat", "", " ran"),
        messages("a dog", "sat", "the cat", chosen="ran to", rejected="the mat"),
    ]
    together = PairTokenizer(tokenizer)(examples)
    assert [result.dropped for result in together] == [None, None, "identical", None, None, "empty", None]
    for result, example in zip(together, examples, strict=True):
        alone = tokenize(tokenizer, example)
        assert (result.dropped, result.noticed) == (alone.dropped, alone.noticed)
        for one, other in zip(result.pair or (), alone.pair or (), strict=True):
            np.testing.assert_array_equal(one, other)


def test_ids_are_int32_and_masks_are_bool():
    for pair in (kept(words(), texts("the cat", " sat", " ran")), kept(words(), texts("the cat", None, " ran"))):
        assert {ids.dtype for ids in (pair.prompt, *pair.branches)} == {np.dtype(np.int32)}
        assert {mask.dtype for mask in pair.masks} == {np.dtype(bool)}
        assert pair.weights is None


# Unpaired


@pytest.mark.parametrize("side", [0, 1])
def test_an_unpaired_row_has_one_branch(side):
    tokenizer = words(eos_token="</s>")
    answers = [None, None]
    answers[side] = " ran to"
    pair = kept(tokenizer, texts("the cat", *answers))
    assert tokenizer.decode(pair.prompt) == "the cat"
    assert scored(tokenizer, pair)[side] == " ran to</s>"
    assert len(pair.branches[1 - side]) == len(pair.masks[1 - side]) == 0


def test_an_unpaired_row_with_nothing_to_say_is_empty():
    assert tokenize(words(), texts("the cat", None, " \n")).dropped == "empty"


def test_an_unpaired_row_is_cut_by_its_own_length():
    tokenizer = letters()
    assert names(tokenizer, kept(tokenizer, texts("abc", "defx", None), max_length=5, truncation="keep_end")) == [
        *("abc", "de", "")
    ]
    assert tokenize(tokenizer, texts("abc", None, "def"), max_length=5).dropped == "over_long"


# Dropped


@pytest.mark.parametrize(
    ("chosen", "rejected"), [("", " ran"), (" ran", ""), (" \n", " ran"), (" ran", "\t"), ("", "")]
)
def test_an_answer_without_words_is_empty(chosen, rejected):
    tokenizer = words(eos_token="</s>", chat_template=BARE)
    assert tokenize(tokenizer, texts("the cat", chosen, rejected)) == (None, "empty", (), "")
    assert tokenize(tokenizer, messages("the cat", chosen=chosen, rejected=rejected)).dropped == "empty"


def test_an_answer_that_only_calls_a_tool_is_not_empty():
    template = "{% for m in messages %}{{ m['content'] }}{% if m['tool_calls'] %}{{ m['tool_calls'][0]['name'] }}{% endif %}{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    tokenizer = words(eos_token="</s>", chat_template=template)

    def call(name):
        return [{"role": "assistant", "content": "", "tool_calls": [{"name": name}]}]

    pair = kept(tokenizer, texts(CATS.prompt, call(" sat"), call(" ran to")))
    assert scored(tokenizer, pair) == [" sat</s>", " ran to</s>"]


def test_a_prompt_without_a_token_is_empty():
    assert tokenize(words(eos_token="</s>"), texts("", " sat", " ran")).dropped == "empty"
    assert kept(stories(), texts("", " sat", " ran")).prompt.tolist() == [1]  # its BOS


def test_the_same_answers_are_identical():
    tokenizer = words(eos_token="</s>")
    assert tokenize(tokenizer, texts("the cat", " ran", " ran")) == (None, "identical", (), "")


def test_different_answers_of_the_same_ids_are_identical():
    tokenizer = words(eos_token="</s>", chat_template="{% for m in messages %}{{ m['content'] | trim }}{% endfor %}")
    assert tokenize(tokenizer, texts("the cat", " ran", " ran</s>")).dropped == "identical"
    assert tokenize(tokenizer, messages("the cat", chosen="ran", rejected=" ran ")).dropped == "identical"


def test_a_template_that_changes_the_prompt_once_an_answer_follows_does_not_match():
    tokenizer = words(chat_template="{{ messages | length }} turns: " + BARE)
    assert tokenize(tokenizer, CATS) == (None, "template_mismatch", (), "")


def test_a_template_that_changes_what_the_assistant_said_once_more_follows_does_not_match():
    shouted = "{% for m in messages %}{{ m['content'] | upper if m['role'] == 'assistant' and not loop.last else m['content'] }}{% endfor %}"
    tokenizer = words(eos_token="</s>", chat_template=shouted)
    call = [{"role": "assistant", "content": " sat"}, {"role": "tool", "content": " on"}, *CATS.rejected]
    assert tokenize(tokenizer, texts(CATS.prompt, call, CATS.rejected)).dropped == "template_mismatch"
    assert tokenize(tokenizer, CATS).dropped is None


def test_a_conversation_that_the_template_refuses_is_dropped_with_its_place():
    template = "{% if messages[0]['role'] == 'user' %}{{ raise_exception('begin with a system message') }}{% endif %}"
    assert tokenize(words(chat_template=template), CATS) == (
        *(None, "template_refused", ()),
        "pairs.jsonl line 7: the chat template cannot write this conversation (begin with a system message)",
    )


@pytest.mark.parametrize(
    "template",
    ["{% for %}", "{{ messages[7]['content'] }}", "{{ 1 // 0 }}", "{{ messages + 1 }}", "{{ messages | unheard_of }}"],
)
def test_whatever_goes_wrong_in_a_template_is_said_of_the_row(template):
    result = tokenize(words(chat_template=template), CATS)
    assert (result.pair, result.dropped) == (None, "template_refused")
    assert result.message.startswith("pairs.jsonl line 7: the chat template cannot write this conversation (")


# Cut


@pytest.mark.parametrize("longer", ["chosen", "rejected"])
def test_max_length_holds_the_prompt_and_the_longer_answer(longer):
    tokenizer, answers = letters(), ("defx", "y") if longer == "chosen" else ("y", "defx")
    assert kept(tokenizer, texts("abc", *answers), max_length=7).lengths in ((3, 4, 1), (3, 1, 4))
    assert tokenize(tokenizer, texts("abc", *answers), max_length=6) == (None, "over_long", (), "")


def test_max_prompt_length_holds_the_prompt():
    tokenizer = letters()
    assert kept(tokenizer, texts("abc", "d", "e"), max_prompt_length=3).lengths == (3, 1, 1)
    assert tokenize(tokenizer, texts("abc", "d", "e"), max_prompt_length=2).dropped == "over_long"


@pytest.mark.parametrize(("truncation", "prompt"), [("keep_end", "ef"), ("keep_start", "ab")])
def test_a_long_prompt_keeps_its_end_or_its_start(truncation, prompt):
    tokenizer = letters()
    result = tokenize(tokenizer, texts("abcdef", "xy", "z"), max_prompt_length=2, truncation=truncation)
    assert names(tokenizer, result.pair) == [prompt, "xy", "z"]
    assert result.noticed == ("missing_eos", "truncated")


@pytest.mark.parametrize(("truncation", "prompt"), [("keep_end", "<s>ef"), ("keep_start", "<s>ab")])
def test_a_prompt_that_is_cut_keeps_its_bos(truncation, prompt):
    tokenizer = letters(bos_token="<s>")
    pair = kept(tokenizer, texts("<s>abcdef", "xy", "z"), max_prompt_length=3, truncation=truncation)
    assert names(tokenizer, pair) == [prompt, "xy", "z"]
    one = kept(tokenizer, texts("<s>abcdef", "xy", "z"), max_prompt_length=1, truncation=truncation)
    assert names(tokenizer, one) == ["<s>", "xy", "z"]


@pytest.mark.parametrize("truncation", ["keep_end", "keep_start"])
def test_each_answer_keeps_its_beginning_in_the_room_that_the_prompt_leaves(truncation):
    tokenizer = letters(eos_token="</s>")
    example = texts("abc", "defx", "y")
    # Only what is cut loses its end token.
    for max_length, chosen, rejected in (
        (8, "defx</s>", "y</s>"),
        (7, "defx", "y</s>"),
        (5, "de", "y</s>"),
        (4, "d", "y"),
    ):
        result = tokenize(tokenizer, example, max_length=max_length, truncation=truncation)
        assert names(tokenizer, result.pair) == ["abc", chosen, rejected]
        assert result.noticed == (("truncated",) if max_length < 8 else ())


def test_prompt_and_answers_are_cut_one_after_the_other():
    tokenizer = letters(eos_token="</s>")
    pair = kept(tokenizer, texts("abcdef", "xyzxyz", "z"), max_length=5, max_prompt_length=2, truncation="keep_end")
    assert names(tokenizer, pair) == ["ef", "xyz", "z</s>"]


def test_a_prompt_that_leaves_no_room_for_an_answer_is_over_long():
    tokenizer = letters()
    for max_length, dropped in ((4, None), (3, "over_long"), (2, "over_long")):
        assert (
            tokenize(tokenizer, texts("abc", "d", "e"), max_length=max_length, truncation="keep_end").dropped == dropped
        )


def test_an_answer_of_which_nothing_scored_is_left_is_empty():
    tokenizer = letters("bc", "ab")  # of the pair x | a bc y | ab d y the prompt's a and ab are not scored
    example = texts("xab", "cy", "dy")
    assert tokenize(tokenizer, example, max_length=2, truncation="keep_end").dropped == "empty"
    assert tokenize(tokenizer, example, max_length=3, truncation="keep_end").dropped is None


def test_answers_that_are_the_same_once_cut_are_dropped():
    tokenizer = letters()
    example = texts("abc", "defx", "defy")
    assert tokenize(tokenizer, example, max_length=6, truncation="keep_end") == (
        *(None, "identical_after_truncation", (), ""),
    )
    assert tokenize(tokenizer, example, max_length=7, truncation="keep_end").dropped is None


@pytest.mark.parametrize("truncation", ["drop", "keep_end", "keep_start"])
def test_whatever_is_cut_fits_and_is_a_piece_of_what_it_was(truncation):
    tokenizer = letters("bc", "ab", bos_token="<s>", eos_token="</s>")
    rng, cuts = np.random.default_rng(0), 0
    for _ in range(300):
        prompt, *answers = ("".join(rng.choice(list("abcdx"), size=rng.integers(1, 9))) for _ in range(3))
        example = texts("<s>" * int(rng.integers(2)) + prompt, *answers)
        max_length = int(rng.integers(3, 14))
        max_prompt_length = int(rng.integers(1, max_length)) if rng.random() < 0.7 else None
        whole = tokenize(tokenizer, example)
        result = tokenize(
            tokenizer, example, max_length=max_length, max_prompt_length=max_prompt_length, truncation=truncation
        )
        fits = whole.pair is None or (
            max(whole.pair.wholes) <= max_length and len(whole.pair.prompt) <= (max_prompt_length or max_length)
        )
        if fits:
            assert (result.dropped, result.noticed) == (whole.dropped, whole.noticed)
            continue
        assert truncation != "drop" or result.dropped == "over_long"
        if result.pair is None:
            continue
        cuts += 1
        assert "truncated" in result.noticed
        assert max(result.pair.wholes) <= max_length
        assert len(result.pair.prompt) <= (max_prompt_length or max_length)
        for was, now, was_mask, now_mask in zip(
            whole.pair.branches, result.pair.branches, whole.pair.masks, result.pair.masks, strict=True
        ):
            np.testing.assert_array_equal(was[: len(now)], now)
            np.testing.assert_array_equal(was_mask[: len(now)], now_mask)
            assert now_mask.any()
    assert cuts > 50 or truncation == "drop"


# POET


def test_poet_cuts_both_answers_to_the_shorter_ones_scored_tokens():
    tokenizer = letters(eos_token="</s>")
    assert names(tokenizer, kept(tokenizer, texts("abc", "defx", "y"), use_poet=True)) == ["abc", "de", "y</s>"]
    assert names(tokenizer, kept(tokenizer, texts("abc", "d", "efx"), use_poet=True)) == ["abc", "d</s>", "ef"]


def test_poet_counts_scored_tokens_only():
    tokenizer = letters("bc", "ab")  # x | a bc y | ab d y z: a and ab are not scored
    pair = kept(tokenizer, texts("xab", "cy", "dyz"), use_poet=True)
    assert names(tokenizer, pair) == ["x", "abcy", "abdy"]
    assert unscored(tokenizer, pair) == [["a"], ["ab"]]


def test_poet_ends_an_answer_with_its_last_scored_token():
    masks = ([True, False, True, False, True, False], [False, True, True, False])
    pair = tokens([1], range(2, 8), range(12, 16), masks)
    short = poet(pair)
    assert short.chosen.tolist() == [2, 3, 4] and short.rejected.tolist() == [12, 13, 14]
    assert [mask.tolist() for mask in short.masks] == [[True, False, True], [False, True, True]]


def test_an_answer_that_begins_the_other_is_the_same_under_poet():
    tokenizer = letters()
    assert tokenize(tokenizer, texts("abc", "de", "def"), use_poet=True).dropped == "identical_after_truncation"


def test_poet_leaves_an_unpaired_row_whole():
    tokenizer = letters()
    assert names(tokenizer, kept(tokenizer, texts("abc", None, "def"), use_poet=True)) == ["abc", "", "def"]


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"max_prompt_length": 2048},
            "max_prompt_length=2048 leaves no room for an answer in max_length=2048; lower max_prompt_length",
        ),
        (
            {"truncation": "official"},
            "truncation='official' (or compat='official') needs max_prompt_length; SimPO's and RePO's recipes have 1800, of max_length 2048",
        ),
        (
            {"compat": "official", "append_eos": "never"},
            "compat='official' decides by itself about the assistant header and the EOS; leave out score_header and append_eos",
        ),
        (
            {"compat": "official", "score_header": True},
            "compat='official' decides by itself about the assistant header and the EOS; leave out score_header and append_eos",
        ),
        (
            {"compat": "official", "truncation": "keep_end"},
            "compat='official' with truncation='keep_end'; choose truncation 'official' or 'drop'",
        ),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ValueError) as refused:
        TokenOptions(**options)
    assert str(refused.value) == message


# Text that looks like special tokens; test_special.py and test_chat_families.py have the rest


def test_in_messages_and_what_a_row_hands_the_template_it_is_text():
    template = "{{ tools[0]['name'] }}" + BARE
    tokenizer = words(bos_token="<s>", eos_token="</s>", chat_template=template)
    special = tokenizer.convert_tokens_to_ids(["<s>", "</s>", "<|im_end|>"])
    for tool, user in (("</s>", "a<s>"), ("<|im_end|>", "cat"), ("cat", "</s>")):
        tools = {"tools": [{"name": tool}]}
        example = dataclasses.replace(messages(user, chosen=" sat", rejected=" ran"), template=tools)
        result = tokenize(tokenizer, example)
        assert result.noticed == ("special_text",)
        assert tokenizer.decode(result.pair.prompt) == f"{tool}{user}"
        assert not {*result.pair.prompt.tolist()} & {*special}
        assert scored(tokenizer, result.pair) == [" sat</s>", " ran</s>"]


@pytest.mark.parametrize(
    ("prompt", "answer", "noticed"),
    [
        ("the cat", " sat", ()),
        ("<s>the cat", " sat</s>", ()),  # these belong there
        ("<|im_start|>the cat", " sat", ("special_tokens",)),
        ("the</s> cat", " sat", ("special_tokens",)),
        ("the cat", " sat<s>", ("special_tokens",)),
        ("the cat", " sat</s></s>", ("special_tokens",)),
    ],
)
def test_in_texts_it_is_special_tokens_and_noticed(prompt, answer, noticed):
    tokenizer = words(bos_token="<s>", eos_token="</s>")
    for example in (texts(prompt, answer, " ran"), texts(prompt, " ran", answer), texts(prompt, None, answer)):
        assert tokenize(tokenizer, example).noticed == noticed


# What is refused


def test_messages_without_a_template_are_refused():
    with pytest.raises(ValueError) as refused:
        kept(words(), CATS)
    assert str(refused.value) == (
        "pairs.jsonl line 7 holds messages but the tokenizer has no chat template; "
        "name one with chat_template (Jinja text or a .jinja file)"
    )


def test_a_template_may_stand_in_a_file(tmp_path):
    (tmp_path / "chat.jinja").write_text(CHATML, encoding="utf-8")
    tokenizer = stories(str(tmp_path / "chat.jinja"))
    assert kept(tokenizer, CATS).prompt.tolist() == kept(stories(CHATML), CATS).prompt.tolist()


def test_a_template_file_that_is_not_there_is_refused():
    with pytest.raises(FileNotFoundError) as refused:
        stories("nowhere/chat.jinja")
    assert str(refused.value) == (
        "chat_template='nowhere/chat.jinja' does not exist; give Jinja text or the path of a .jinja file"
    )


@pytest.mark.parametrize("eos_token", ["<|im_end|>", "once upon a time"])
def test_an_end_token_that_is_not_one_token_is_refused(eos_token):
    with pytest.raises(ValueError) as refused:
        stories(eos_token=eos_token)
    assert str(refused.value) == (
        f"eos_token={eos_token!r} is not one token of the tokenizer in '{STORIES}'; name one of its tokens"
    )


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError) as refused:
        load_tokenizer(str(tmp_path))
    assert str(refused.value).startswith(f"'{tmp_path}' has no tokenizer that loads (")
    assert str(refused.value).endswith("); tokenizer.json is needed")


def test_a_length_in_the_tokenizers_own_file_neither_cuts_nor_pads(tmp_path):
    tokenizer = stories()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=40)
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_bytes((STORIES / "tokenizer_config.json").read_bytes())
    example, loaded = texts("the cat sat", " on the mat", " ran"), load_tokenizer(str(tmp_path))
    assert loaded.backend_tokenizer.truncation is None and loaded.backend_tokenizer.padding is None
    assert wholes(kept(loaded, example)) == wholes(kept(stories(), example))


def test_a_tokenizer_without_offsets_is_refused(tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError) as refused:
        load_tokenizer(str(tmp_path))
    assert str(refused.value) == (
        f"the tokenizer in '{tmp_path}' gives no character offsets; a tokenizer.json is needed"
    )
