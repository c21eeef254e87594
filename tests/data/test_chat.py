"""Pairs to ids. What is expected is written out by hand, or comes from transformers' own apply_chat_template."""

import itertools

import numpy as np
import pytest
from examples import ASSETS, STORIES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from repo_jax.data.chat import load_tokenizer, tokenize_pair
from repo_jax.data.schema import PreferenceExample, read_preferences

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


def letters(*merges: str):
    """A BPE over letters with these merges, the first the strongest: "bc" makes one token of b and c."""
    alphabet = "abcdefxyz "
    vocab = {token: i for i, token in enumerate([*alphabet, *merges])}
    backend = Tokenizer(models.BPE(vocab, [(merge[:-1], merge[-1]) for merge in merges]))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


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
    return [tokenizer.decode(branch[skip:]) for branch, skip in zip(pair.branches, pair.skips, strict=True)]


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
    pair = tokenize_pair(tokenizer, CATS)
    assert wholes(pair) == [
        tokenizer.apply_chat_template(CATS.prompt + answer, return_dict=False)
        for answer in (CATS.chosen, CATS.rejected)
    ]


def test_real_conversations_keep_their_ids_and_score_their_answers():
    tokenizer = stories(CHATML, eos_token="</s>")
    for example in itertools.islice(read_preferences(ASSETS / "preferences" / "train.jsonl"), 50):
        pair = tokenize_pair(tokenizer, example)
        answers = (example.chosen, example.rejected)
        for whole, answer in zip(wholes(pair), answers, strict=True):
            assert whole == [1, *tokenizer.apply_chat_template(example.prompt + answer, return_dict=False)]
        assert scored(tokenizer, pair) == [answer[0]["content"] + "<|im_end|>\n" for answer in answers]


# BOS


@pytest.mark.parametrize("written", [0, 1, 2], ids=["template-none", "template-once", "template-twice"])
@pytest.mark.parametrize("added", [False, True], ids=["tokenizer-none", "tokenizer-adds"])
def test_there_is_one_bos_whoever_writes_it(written, added):
    template = "{{ bos_token }}" * written + BARE
    tokenizer = stories(template) if added else words(bos_token="<s>", eos_token="</s>", chat_template=template)
    bare = tokenizer("the cat", add_special_tokens=False).input_ids
    pair = tokenize_pair(tokenizer, CATS)
    expected = [tokenizer.bos_token_id] if written or added else []
    assert pair.prompt.tolist() == expected + bare
    assert tokenizer.bos_token_id not in np.concatenate(pair.branches)


def test_texts_get_the_bos_that_the_tokenizer_adds():
    tokenizer = stories()
    pair = tokenize_pair(tokenizer, texts("the cat", " sat", " ran"))
    assert pair.prompt.tolist() == tokenizer("the cat").input_ids
    assert pair.prompt.tolist().count(tokenizer.bos_token_id) == 1


def test_texts_that_begin_with_a_bos_keep_one():
    tokenizer = stories()
    one, none = (tokenize_pair(tokenizer, texts(bos + "the cat", " sat", " ran")) for bos in ("<s>", ""))
    assert wholes(one) == wholes(none)


def test_without_a_bos_token_there_is_none():
    tokenizer = words(eos_token="<|im_end|>", chat_template=CHATML)
    pair = tokenize_pair(tokenizer, CATS)
    assert tokenizer.decode(pair.prompt) == "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"


# The end of an answer


def test_texts_get_one_end_token():
    tokenizer = words(eos_token="</s>")
    pair = tokenize_pair(tokenizer, texts("the cat", " sat", " ran to"))
    assert scored(tokenizer, pair) == [" sat</s>", " ran to</s>"]


def test_texts_that_end_with_the_end_token_get_no_second():
    tokenizer = words(eos_token="</s>")
    pair = tokenize_pair(tokenizer, texts("the cat", " sat</s>", " ran to"))
    assert scored(tokenizer, pair) == [" sat</s>", " ran to</s>"]


def test_texts_get_no_end_token_where_the_tokenizer_has_none():
    tokenizer = words()
    assert scored(tokenizer, tokenize_pair(tokenizer, texts("the cat", " sat", " ran"))) == [" sat", " ran"]


@pytest.mark.parametrize(
    "end", ["</s>", "<|im_end|>\n", ""], ids=["end-token", "end-token-and-newline", "no-end-token"]
)
def test_messages_end_as_the_template_ends_them(end):
    template = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}END{% endif %}{% endfor %}"
    tokenizer = words(eos_token="</s>", chat_template=template.replace("END", end))
    pair = tokenize_pair(tokenizer, CATS)
    assert scored(tokenizer, pair) == [" sat on the mat" + end, " ran" + end]


def test_an_end_token_of_the_recipe_replaces_the_tokenizers_own():
    tokenizer = stories(BARE, eos_token="<s>")
    pair = tokenize_pair(tokenizer, CATS)
    assert [branch[-1] for branch in pair.branches] == [1, 1]
    assert tokenizer("</s>", add_special_tokens=False).input_ids == [2]


# Prompt and answer


def test_only_the_last_answer_of_a_conversation_is_scored():
    tokenizer = words(eos_token="<|im_end|>", chat_template=CHATML)
    pair = tokenize_pair(
        tokenizer, messages("the cat", "a dog", "the mat", chosen="sat on\nthe mat", rejected="ran to")
    )
    assert scored(tokenizer, pair) == ["sat on\nthe mat<|im_end|>\n", "ran to<|im_end|>\n"]
    assert tokenizer.decode(pair.prompt).endswith(
        "a dog<|im_end|>\n<|im_start|>user\nthe mat<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_opening_that_two_answers_share_is_scored():
    tokenizer = words(eos_token="</s>")
    pair = tokenize_pair(tokenizer, texts("the cat", " sat on the mat", " sat on the dog"))
    assert tokenizer.decode(pair.prompt) == "the cat"
    assert pair.chosen[0] == pair.rejected[0]
    assert scored(tokenizer, pair) == [" sat on the mat</s>", " sat on the dog</s>"]
    assert pair.skips == (0, 0)


def test_one_answer_that_begins_the_other_is_scored_whole():
    tokenizer = words(eos_token="</s>")
    pair = tokenize_pair(tokenizer, texts("the cat", " sat", " sat on the mat"))
    assert scored(tokenizer, pair) == [" sat</s>", " sat on the mat</s>"]


def test_a_character_of_several_tokens_is_one_sides_whole():
    # In UTF-8 all three letters begin with the same byte, which is a token here.
    tokenizer = words(eos_token="</s>")
    pair = tokenize_pair(tokenizer, texts("è", "é", "à"))
    assert tokenizer.decode(pair.prompt) == "è"
    assert scored(tokenizer, pair) == ["é</s>", "à</s>"]


def test_a_token_that_straddles_the_boundary_belongs_to_the_answer():
    tokenizer = letters("bc")
    pair = tokenize_pair(tokenizer, texts("ab", "cd", "ce"))
    assert tokenizer.convert_ids_to_tokens(pair.prompt) == ["a"]
    assert [tokenizer.convert_ids_to_tokens(branch) for branch in pair.branches] == [["bc", "d"], ["bc", "e"]]
    assert pair.skips == (0, 0)


def test_prompt_tokens_that_the_answers_split_differently_are_skipped():
    # Before d, "xab" is x ab; before c it is x a, for the stronger merge takes b to bc.
    tokenizer = letters("bc", "ab")
    pair = tokenize_pair(tokenizer, texts("xab", "cy", "dy"))
    assert tokenizer.convert_ids_to_tokens(pair.prompt) == ["x"]
    assert [tokenizer.convert_ids_to_tokens(branch) for branch in pair.branches] == [["a", "bc", "y"], ["ab", "d", "y"]]
    assert pair.skips == (1, 1)
    assert pair.scored == 4


def test_only_the_answer_that_splits_the_prompt_further_skips():
    # Before c, b goes to bc; before d it stays alone, and is still prompt.
    tokenizer = letters("bc")
    pair = tokenize_pair(tokenizer, texts("xab", "cy", "dy"))
    assert tokenizer.convert_ids_to_tokens(pair.prompt) == ["x", "a"]
    assert [tokenizer.convert_ids_to_tokens(branch) for branch in pair.branches] == [["bc", "y"], ["b", "d", "y"]]
    assert pair.skips == (0, 1)


def test_the_pair_keeps_the_rows_id_and_place():
    pair = tokenize_pair(words(), texts("the cat", " sat", " ran"))
    assert (pair.id, pair.where) == ("7", "pairs.jsonl line 7")


# What is refused


def test_a_template_that_changes_the_prompt_once_an_answer_follows_is_refused():
    tokenizer = words(chat_template="{{ messages | length }} turns: " + BARE)
    with pytest.raises(ValueError) as refused:
        tokenize_pair(tokenizer, CATS)
    assert str(refused.value) == (
        "pairs.jsonl line 7: the chat template writes the prompt differently once an answer follows "
        "('1 turns: the cat' becomes '2 turns: the cat sat on the mat'); name a chat_template that does not"
    )


def test_a_conversation_that_the_template_refuses_is_named():
    template = "{% if messages[0]['role'] == 'user' %}{{ raise_exception('begin with a system message') }}{% endif %}"
    tokenizer = words(chat_template=template)
    with pytest.raises(ValueError, match=r"^pairs\.jsonl line 7: .*begin with a system message"):
        tokenize_pair(tokenizer, CATS)


def test_a_template_that_is_not_jinja_is_refused():
    tokenizer = words(chat_template="{% for %}")
    with pytest.raises(ValueError, match="chat template"):
        tokenize_pair(tokenizer, CATS)


def test_messages_without_a_template_are_refused():
    with pytest.raises(ValueError) as refused:
        tokenize_pair(words(), CATS)
    assert str(refused.value) == (
        "pairs.jsonl line 7 holds messages but the tokenizer has no chat template; "
        "name one with chat_template (Jinja text or a .jinja file)"
    )


def test_a_template_may_stand_in_a_file(tmp_path):
    (tmp_path / "chat.jinja").write_text(CHATML, encoding="utf-8")
    tokenizer = stories(str(tmp_path / "chat.jinja"))
    assert tokenize_pair(tokenizer, CATS).prompt.tolist() == tokenize_pair(stories(CHATML), CATS).prompt.tolist()


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


def test_a_tokenizer_without_offsets_is_refused(tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError) as refused:
        load_tokenizer(str(tmp_path))
    assert str(refused.value) == (
        f"the tokenizer in '{tmp_path}' gives no character offsets; a tokenizer.json is needed"
    )
