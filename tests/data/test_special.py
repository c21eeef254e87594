"""Special tokens of what a template wrote, and text that only looks like them, in every kind of tokenizer."""

import itertools

import pytest
from examples import STORIES
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from repo_jax.data.special import SpecialTokens

SENTENCES = ["the cat sat on the mat", "a dog ran to the cat", "user assistant", "< | > [ ] ( ) . * + ? im end s"] * 3
NAMES = ["<|im_start|>", "<|im_end|>", "<s>", "</s>"]


def byte_level(names=NAMES):
    """A BPE that has all bytes and no unk token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=320 + len(names), initial_alphabet=alphabet, special_tokens=names, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=names[-2], eos_token=names[-1])


def word_level():
    """Whole words; what it does not know is its unk token, which is special too."""
    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = ["<unk>", *NAMES]
    backend.train_from_iterator(SENTENCES, trainers.WordLevelTrainer(special_tokens=names, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def unigram():
    """Pieces with scores, as SentencePiece has them."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    names = ["<unk>", *NAMES]
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=names, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def sentence_piece():
    """A BPE with an unk token and byte fallback."""
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    tokenizer.add_special_tokens({"additional_special_tokens": NAMES[:2]})
    return tokenizer


TOKENIZERS = {"byte_level": byte_level, "word_level": word_level, "unigram": unigram, "sentence_piece": sentence_piece}
KINDS = pytest.mark.parametrize("tokenizer", [make() for make in TOKENIZERS.values()], ids=TOKENIZERS)

PIECES = [
    "the cat",
    " ",
    "<s>",
    "",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<",
    "\n",
    "<s",
    ">",
    "|im_end|",
    "\U000f0000",
]


def encoded(special, text, mark=""):
    [encoding] = special.encode([text], [mark])
    return encoding.ids


def revealed(special, written):
    """What a template writes around messages, revealed, and its mark; of each piece is said whether it is a message's."""
    mark = special.mark_for([text for text, message in written if message])
    hidden = "".join(special.hide(text, mark) if message else text for text, message in written)
    return special.reveal(hidden, mark), mark


# The spelling


@KINDS
def test_what_is_hidden_is_revealed(tokenizer):
    special = SpecialTokens(tokenizer)
    for pieces in itertools.product(PIECES, repeat=3):
        text = "".join(pieces)
        mark = special.mark_for([text])
        hidden = special.hide(text, mark)
        assert special.search(hidden) is None
        assert special.reveal(hidden, mark) == text
        assert (mark == "") == (special.search(text) is None)


@KINDS
def test_what_the_template_wrote_and_what_it_was_given_swap_their_spelling(tokenizer):
    special = SpecialTokens(tokenizer)
    text, mark = revealed(special, [("<s>", False), ("</s> the <s>", True), ("</s>", False)])
    before, after = text.split("</s> the <s>")
    assert special.search(before) is None and special.search(after) is None
    assert before.startswith(mark) and after.endswith(mark)


def test_the_first_of_several_special_tokens_is_found():
    special = SpecialTokens(byte_level())
    assert special.search("the cat") is None
    assert special.search("the cat</s><s>").span() == (7, 11)
    assert special.search("<|im_end|>\n").span() == (0, 10)


def test_of_two_names_of_which_one_begins_the_other_the_longer_is_meant():
    special = SpecialTokens(byte_level(["<s", "<s>x", "<s>", "</s>"]))
    assert special.search("<s>x")[0] == "<s>x"
    for text in ("<s>x", "<s>y", "<s<s>x<s>"):
        mark = special.mark_for([text])
        assert special.reveal(special.hide(text, mark), mark) == text


def test_names_may_hold_what_a_pattern_gives_a_meaning_to():
    names = ["[INST]", "(a|b)*", ".+?", "^$", "\\d", "<s>", "</s>"]
    tokenizer = byte_level(names)
    special = SpecialTokens(tokenizer)
    assert special.mark_for(["I a b 7 anything at all"]) == ""
    for name in names:
        text, mark = revealed(special, [(name, False), (f"the {name} cat", True), (name, False)])
        ids = encoded(special, text, mark)
        number = tokenizer.convert_tokens_to_ids(name)
        assert ids[0] == ids[-1] == number and ids.count(number) == 2
        assert tokenizer.decode(ids[1:-1]) == f"the {name} cat"


def test_a_mark_that_a_message_holds_is_not_taken():
    special = SpecialTokens(byte_level())
    first = special.mark_for(["<s>"])
    second = special.mark_for([f"<s>{first}"])
    third = special.mark_for(["<s>", second, first + "0" + first])
    assert len({first, second, third}) == 3
    text = f"<s> {first}0{first} </s>"
    mark = special.mark_for([text])
    assert special.reveal(special.hide(text, mark), mark) == text


def test_text_is_found_and_hidden_however_deep_it_stands():
    special = SpecialTokens(byte_level())
    message = {"role": "assistant", "content": "a", "calls": [{"name": "f", "arguments": {"x": ["</s>", 7, None]}}]}
    mark = special.mark_for([message])
    assert mark and special.mark_for([{"a": [1, None, {"b": "c"}]}]) == ""
    hidden = special.hide([message], mark)
    assert special.search(str(hidden)) is None
    hidden[0]["calls"][0]["arguments"]["x"][0] = special.reveal(hidden[0]["calls"][0]["arguments"]["x"][0], mark)
    assert hidden == [message]
    assert special.mark_for([{"deep": [mark]}, "<s>"]) != mark
    assert special.hide([message], "") == [message]


@pytest.mark.parametrize("given", [[], ["<s>"]], ids=["plain", "marked"])
def test_what_two_texts_begin_with_ends_between_special_tokens(given):
    special = SpecialTokens(byte_level())
    mark = special.mark_for(given)

    def common(one, other):
        one, other = (special.reveal(text, mark) for text in (one, other))
        same = special.common_prefix(one, other, mark)
        assert one.startswith(same) and other.startswith(same)
        return special.reveal(same, mark)

    assert common("<s>the cat</s>", "<s>the dog</s>") == "<s>the "
    assert common("the cat<|im_start|>", "the cat<|im_end|>") == "the cat"  # not <|im_
    assert common("the cat</s>", "the cat<") == "the cat"
    assert common("the</s>\n", "the</s>") == "the</s>"
    assert common("<s>", "<s><s>") == "<s>"
    assert common("", "<s>") == common("a", "b") == ""
    assert common("</s>a</s>", "</s>a</s>") == "</s>a</s>"


def test_without_special_tokens_nothing_is_special():
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate("<s>/ ab")}, []))
    special = SpecialTokens(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert special.search("<s>") is None
    assert special.mark_for(["<s>", "</s>"]) == ""
    assert special.hide("<s>", "") == special.reveal("<s>", "") == "<s>"
    assert encoded(special, "<s>") == [0, 1, 2]


def test_an_added_token_that_is_not_special_is_no_special_token():
    tokenizer = byte_level()
    tokenizer.add_tokens(["<tool>"])
    special = SpecialTokens(tokenizer)
    assert special.search("<tool>") is None and special.mark_for(["<tool>"]) == ""
    text, mark = revealed(special, [("<s>", False), ("<tool><s>", True)])
    ids = encoded(special, text, mark)
    assert ids[:2] == tokenizer.convert_tokens_to_ids(["<s>", "<tool>"])


# The ids


@KINDS
def test_text_without_special_tokens_has_the_same_ids_under_any_mark(tokenizer):
    special = SpecialTokens(tokenizer)
    for text in ("the cat sat", "", " ", "a\ndog < | > ran", "unheard zzz é 🙂"):
        plain = tokenizer(text, add_special_tokens=False).input_ids
        assert (
            encoded(special, text)
            == encoded(special, text, "\U000f0000")
            == encoded(special, text, "\U000f0007")
            == plain
        )


@KINDS
def test_what_the_template_wrote_keeps_its_ids_when_a_message_is_hidden(tokenizer):
    """With a harmless message in place of the special-token text, the rest is what it was."""
    special = SpecialTokens(tokenizer)
    text, mark = revealed(
        special, [("<s>", False), ("</s>", True), ("</s>", False), (" the cat", True), ("<s>", False)]
    )
    ids = encoded(special, text, mark)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert ids[0] == ids[-1] == bos and ids.count(bos) == 2
    assert ids.count(eos) == 1
    behind = ids[ids.index(eos) :]
    assert behind == tokenizer("</s> the cat<s>", add_special_tokens=False).input_ids


@KINDS
def test_special_token_text_in_a_message_gives_no_special_token(tokenizer):
    special = SpecialTokens(tokenizer)
    for name in NAMES:
        text, mark = revealed(special, [(f"a{name}b", True)])
        assert text == f"a{name}b" and mark
        assert not {*encoded(special, text, mark)} & {*tokenizer.convert_tokens_to_ids(NAMES)}
        assert {*tokenizer(text, add_special_tokens=False).input_ids} & {tokenizer.convert_tokens_to_ids(name)}


@KINDS
def test_encodings_come_in_the_order_of_their_texts_whatever_their_marks(tokenizer):
    special = SpecialTokens(tokenizer)
    marks = ["", "\U000f0000", "", "\U000f0001", "\U000f0000", ""]
    texts = ["the cat", "a dog", "", "ran <", "<s>the", "sat"]
    together = [encoding.ids for encoding in special.encode(texts, marks)]
    assert together == [encoded(special, text, mark) for text, mark in zip(texts, marks, strict=True)]
    assert special.encode([], []) == []


@KINDS
def test_offsets_are_those_of_the_revealed_text(tokenizer):
    special = SpecialTokens(tokenizer)
    text, mark = revealed(special, [("<s>", False), ("the <s>", True), ("</s>", False)])
    [encoding] = special.encode([text], [mark])
    assert text[slice(*encoding.offsets[0])] == text[: text.index("the")]
    assert encoding.offsets[-1][1] == len(text)
    assert text[slice(*encoding.offsets[-1])].startswith(mark)


def test_offsets_hold_the_white_space_though_a_post_processor_would_trim_it():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    for mark in ("", "\U000f0000"):
        [encoding] = SpecialTokens(tokenizer).encode(["the cat\n"], [mark])
        assert [end for _, end in encoding.offsets[:-1]] == [start for start, _ in encoding.offsets[1:]]
        assert encoding.offsets[-1][1] == len("the cat\n")


@KINDS
def test_the_tokenizer_itself_stays_as_it_was(tokenizer):
    before = tokenizer.backend_tokenizer.to_str()
    special = SpecialTokens(tokenizer)
    text, mark = revealed(special, [("<s>", False), ("<s>", True)])
    encoded(special, text, mark)
    assert tokenizer.backend_tokenizer.to_str() == before
    assert tokenizer("<s>", add_special_tokens=False).input_ids == [tokenizer.bos_token_id]


def test_merges_may_lead_to_a_special_token():
    vocab = {token: i for i, token in enumerate(["<s>", "<", "s", ">", "a", "<s"])}
    backend = Tokenizer(models.BPE(vocab, [("<", "s"), ("<s", ">")]))
    special = SpecialTokens(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>"))
    text, mark = revealed(special, [("<s>", False), ("a<s>", True)])
    assert encoded(special, text, mark) == [0, 4, 5, 3]  # <s> a <s >


def test_nothing_is_cut_padded_or_put_around_a_text():
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    assert tokenizer("the").input_ids[0] == tokenizer.bos_token_id  # its post-processor's
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    special = SpecialTokens(tokenizer)
    plain = AutoTokenizer.from_pretrained(STORIES)("the cat sat", add_special_tokens=False).input_ids
    assert encoded(special, "the cat sat") == encoded(special, "the cat sat", "\U000f0000") == plain


def test_the_ids_of_special_tokens_are_known():
    tokenizer = byte_level()
    assert SpecialTokens(tokenizer).ids == {*tokenizer.convert_tokens_to_ids(NAMES)}


def test_a_token_that_takes_the_white_space_behind_it_still_does():
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|end|>", rstrip=True, special=True)]})
    special = SpecialTokens(tokenizer)
    text, mark = revealed(special, [("<|end|>\n", False), ("the <s>", True)])
    ids = encoded(special, text, mark)
    assert tokenizer.decode(ids) == "<|end|>the <s>"


def test_a_merge_that_spells_a_special_token_does_not_make_it_one():
    vocab = {token: i for i, token in enumerate(["a", "b", "<", "s", ">", "<s", "<s>"])}
    backend = Tokenizer(models.BPE(vocab, [("<", "s"), ("<s", ">")]))
    special = SpecialTokens(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>"))
    mark = special.mark_for(["a<s>"])
    (encoding,) = special.encode([special.reveal("<s>" + special.hide("a<s>", mark), mark)], [mark])
    assert encoding.ids == [vocab[token] for token in ("<s>", "a", "<s", ">")]
