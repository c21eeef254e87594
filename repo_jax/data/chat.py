"""Conversations to token ids: rendered once, tokenized once, every token known to be prompt, answer or neither."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from repo_jax.data import official
from repo_jax.data.schema import PairTokens, PreferenceExample
from repo_jax.data.special import SpecialTokens
from repo_jax.data.template import RefusedError, Template, TemplateMismatchError, Text


@dataclasses.dataclass(frozen=True)
class TokenOptions:
    """How examples become ids. Every field changes what is stored."""

    max_length: int = 2048  # tokens of the prompt and the longer answer
    max_prompt_length: int | None = None
    # What happens to a pair over these: it is dropped; or its prompt keeps its last (keep_end) or first (keep_start) tokens and
    # then each answer its first; or both are cut as SimPO's and RePO's code does.
    truncation: Literal["drop", "keep_end", "keep_start", "official"] = "drop"
    score_header: bool = False  # whether the assistant header is scored as part of the answer
    append_eos: Literal["auto", "always", "never"] = "auto"  # auto: behind texts; behind messages the template decides
    compat: Literal["none", "official"] = "none"  # official: as SimPO's and RePO's code tokenizes
    use_poet: bool = False  # both answers cut to the shorter one's scored tokens: arXiv:2506.09457
    chat_template_kwargs: dict = dataclasses.field(default_factory=dict)  # a row's own go before these

    def __post_init__(self):
        n = self.max_prompt_length
        if n is None and self.truncation == "official":
            raise ValueError(
                "truncation='official' (or compat='official') needs max_prompt_length; SimPO's and RePO's recipes have 1800, of max_length 2048"
            )
        if n is not None and n >= self.max_length:
            raise ValueError(
                f"max_prompt_length={n} leaves no room for an answer in max_length={self.max_length}; lower max_prompt_length"
            )
        if self.compat == "official":
            if self.score_header or self.append_eos != "auto":
                raise ValueError(
                    "compat='official' decides by itself about the assistant header and the EOS; leave out score_header and append_eos"
                )
            if self.truncation not in ("drop", "official"):
                raise ValueError(
                    f"compat='official' with truncation='{self.truncation}'; choose truncation 'official' or 'drop'"
                )


class Tokenized(NamedTuple):
    """What became of one example."""

    pair: PairTokens | None  # None where the example is dropped
    dropped: str | None = (
        None  # empty, identical, identical_after_truncation, over_long, template_mismatch or template_refused
    )
    noticed: tuple[str, ...] = ()  # of what is kept: truncated, missing_eos, special_text or special_tokens
    message: str = ""  # where and why, where there is more to say


class Branch(NamedTuple):
    """A prompt and one answer as ids."""

    ids: np.ndarray  # int32
    mask: np.ndarray  # bool: what is scored
    inside: int  # how many of the first ids are prompt and nothing else


NO_BRANCH = Branch(np.zeros(0, np.int32), np.zeros(0, bool), 0)


def load_tokenizer(
    folder: str, *, chat_template: str | None = None, eos_token: str | None = None
) -> PreTrainedTokenizerFast:
    """The tokenizer of a Hugging Face folder; a template (Jinja text, or a path ending in .jinja) or end token replaces its own."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"'{folder}' has no tokenizer that loads ({str(error).splitlines()[0]}); tokenizer.json is needed"
        ) from None
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer in '{folder}' gives no character offsets; a tokenizer.json is needed")
    if chat_template is not None:
        if chat_template.endswith(".jinja"):
            path = pathlib.Path(chat_template).expanduser()
            if not path.is_file():
                raise FileNotFoundError(
                    f"chat_template='{chat_template}' does not exist; give Jinja text or the path of a .jinja file"
                )
            chat_template = path.read_text(encoding="utf-8")
        tokenizer.chat_template = chat_template
    if eos_token is not None:
        if tokenizer.convert_tokens_to_ids(eos_token) in (None, tokenizer.unk_token_id):
            raise ValueError(
                f"eos_token={eos_token!r} is not one token of the tokenizer in '{folder}'; name one of its tokens"
            )
        tokenizer.eos_token = eos_token
    # A tokenizer.json may ask to cut or pad every text; what is cut is decided here, and counted.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


class PairTokenizer:
    """Examples to ids, many at a time; the tokenizer's own threads share the work."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, options: TokenOptions | None = None):
        self._tokenizer, self._options = tokenizer, options or TokenOptions()
        self._adds_bos = tokenizer("", add_special_tokens=True).input_ids[:1] == [tokenizer.bos_token_id]
        self._special = SpecialTokens(tokenizer)
        self._template = Template(tokenizer, self._special, self._options.chat_template_kwargs)

    def __call__(self, examples: Sequence[PreferenceExample]) -> list[Tokenized]:
        """What becomes of each example, in order; also of one that the template refuses.

        Raises ValueError for messages without a chat template.
        """
        return self._official(examples) if self._options.compat == "official" else self._exact(examples)

    def _exact(self, examples: Sequence[PreferenceExample]) -> list[Tokenized]:
        read = [self._read(example) for example in examples]
        texts = [text for sides in read if isinstance(sides, list) for text in sides if text is not None]
        encodings = iter(self._special.encode([text.text for text in texts], [text.mark for text in texts]))
        results = []
        for example, sides in zip(examples, read, strict=True):
            if isinstance(sides, Tokenized):
                results.append(sides)
                continue
            branches, noticed = [], set()
            if not example.conversational and self._has_special(example):
                noticed.add("special_tokens")
            for text in sides:
                if text is None:
                    branches.append(NO_BRANCH)
                    continue
                branches.append(self._branch(text, next(encodings), example.conversational))
                if not text.ended and branches[-1].ids[-1:].tolist() != [self._tokenizer.eos_token_id]:
                    noticed.add("missing_eos")
                if text.mark:
                    noticed.add("special_text")
            results.append(self._judge(example, branches, noticed))
        return results

    def _read(self, example: PreferenceExample) -> list[Text | None] | Tokenized:
        """The texts of both answers, or what is wrong with the example."""
        if example.conversational:
            try:
                return self._template.read(example, score_header=self._options.score_header)
            except TemplateMismatchError:
                return Tokenized(None, "template_mismatch")
            except RefusedError as refusal:
                return Tokenized(None, "template_refused", (), str(refusal))
        prompt, bos = example.prompt, self._tokenizer.bos_token
        while bos and prompt.startswith(bos * 2):
            prompt = prompt.removeprefix(bos)
        return [
            None
            if answer is None
            else Text(prompt + answer, len(prompt), ((len(prompt), len(prompt + answer)),), False)
            for answer in example.answers
        ]

    def _has_special(self, example: PreferenceExample) -> bool:
        """Whether texts spell special tokens, but for a BOS at the beginning and an EOS at the end, which belong there."""
        bos, eos = self._tokenizer.bos_token or "", self._tokenizer.eos_token or ""
        texts = [example.prompt.removeprefix(bos), *(answer.removesuffix(eos) for answer in example.answers if answer)]
        return any(self._special.search(text) for text in texts)

    def _branch(self, text: Text, encoding, conversational: bool) -> Branch:
        ids = np.asarray(encoding.ids, np.int32)
        starts, ends = np.asarray(encoding.offsets, np.int64).reshape(-1, 2).T
        mask = np.zeros(len(ids), bool)
        for start, end in text.spans:
            # A special token of the header may swallow the white space that the answer begins with; it is still the header's.
            header = (starts < start) & (ends > start)
            header[header] = [token in self._special.ids for token in ids[header]]
            ends = np.where(header, start, ends)
            mask |= (ends > start) & (starts < end)
        kept = int(np.searchsorted(starts, text.spans[-1][1]))
        ids, mask, ends = ids[:kept], mask[:kept], ends[:kept]
        inside = int(np.argmax(ends > text.boundary)) if (ends > text.boundary).any() else kept
        tokenizer, eos = self._tokenizer, self._tokenizer.eos_token_id
        append = self._options.append_eos == "always" or (self._options.append_eos == "auto" and not conversational)
        if append and eos is not None and ids[-1:].tolist() != [eos]:
            ids, mask = np.append(ids, np.int32(eos)), np.append(mask, True)
        # The template wrote a BOS, or the tokenizer would add one, or neither: there is exactly one, or none. One that is
        # written stays in the text, for what follows it may be split otherwise than the beginning of a text.
        if self._adds_bos and ids[:1].tolist() != [tokenizer.bos_token_id]:
            ids, mask = np.insert(ids, 0, tokenizer.bos_token_id), np.insert(mask, 0, False)
            inside += 1
        return Branch(ids, mask, inside)

    def _official(self, examples: Sequence[PreferenceExample]) -> list[Tokenized]:
        read = [self._read_official(example) for example in examples]
        every = [text for texts in read if isinstance(texts, list) for text in texts]
        encodings = iter(self._special.encode(every, [""] * len(every)))
        results = []
        for example, texts in zip(examples, read, strict=True):
            if isinstance(texts, Tokenized):
                results.append(texts)
                continue
            prompt = next(encodings).ids
            branches = [
                NO_BRANCH if answer is None else self._official_branch(prompt, next(encodings).ids)
                for answer in example.answers
            ]
            special = example.conversational and self._template.mark(example) != ""
            results.append(self._judge(example, branches, {"special_tokens"} if special else set()))
        return results

    def _read_official(self, example: PreferenceExample) -> list[str] | Tokenized:
        tokenizer = self._tokenizer
        if example.schema == "sft":
            raise ValueError(
                f"{example.where} is no preference data, which is all that SimPO's and RePO's code reads; leave out compat='official'"
            )
        render = self._template.renderer(example) if example.conversational else None
        try:
            return official.texts(example, render, chat_template=tokenizer.chat_template, bos=tokenizer.bos_token)
        except RefusedError as refusal:
            said = "compat='official' has an answer written by itself: name a chat_template that can, as SimPO's and RePO's recipes do"
            return Tokenized(None, "template_refused", (), f"{refusal}; {said}")

    def _official_branch(self, prompt: list[int], whole: list[int]) -> Branch:
        start = official.split(prompt, whole)
        before = official.with_bos(whole[:start], self._tokenizer.bos_token_id)
        after = official.with_eos(whole[start:], self._tokenizer.eos_token_id)
        mask = np.arange(len(before) + len(after)) >= max(len(before), 1)  # nothing predicts the very first token
        return Branch(np.asarray(before + after, np.int32), mask, len(before))

    def _judge(self, example: PreferenceExample, branches: list[Branch], noticed: set[str]) -> Tokenized:
        """Whether the pair is kept, and shortened if it is to be. The official code keeps whatever has a scored token."""
        options, paired = self._options, None not in example.answers
        strict = options.compat == "none"
        pair = join(example, branches)
        identical = paired and (example.chosen == example.rejected or same_answers(pair))
        if strict and (not all(map(is_written, example.answers)) or not len(pair.prompt)):
            return Tokenized(None, "empty")
        if identical and strict:
            return Tokenized(None, "identical")
        shortened = self._shorten(pair)
        if shortened is None:
            return Tokenized(None, "over_long")
        if shortened.wholes != pair.wholes:
            noticed.add("truncated")
        pair = shortened
        if options.use_poet and paired:
            pair = poet(pair)
        if any(not mask.any() for answer, mask in zip(example.answers, pair.masks, strict=True) if answer is not None):
            return Tokenized(None, "empty")
        identical = paired and same_answers(pair)
        if identical and strict:
            return Tokenized(None, "identical_after_truncation")
        if identical:
            noticed.add("identical")
        return Tokenized(pair, None, tuple(sorted(noticed)))

    def _shorten(self, pair: PairTokens) -> PairTokens | None:
        """The pair within its lengths, or None where it is dropped or no room is left."""
        options, prompt, most = self._options, pair.prompt, self._options.max_prompt_length
        if options.truncation == "official":
            return official_cut(pair, options.max_length, most)
        long_prompt = most is not None and len(prompt) > most
        if not long_prompt and max(pair.wholes) <= options.max_length:
            return pair
        if options.truncation == "drop":
            return None
        if long_prompt:
            bos = int(prompt[0] == self._tokenizer.bos_token_id)
            rest = prompt[len(prompt) - most + bos :] if options.truncation == "keep_end" else prompt[bos:most]
            prompt = np.concatenate([prompt[:bos], rest])
        room = options.max_length - len(prompt)
        if room <= 0:
            return None
        chosen, rejected, chosen_mask, rejected_mask = (array[:room] for array in (*pair.branches, *pair.masks))
        return PairTokens(pair.id, pair.where, prompt, chosen, rejected, chosen_mask, rejected_mask)


def join(example: PreferenceExample | PairTokens, branches: Sequence[Branch]) -> PairTokens:
    """The two branches with the beginning that their prompts share stored once."""
    present = [branch for branch in branches if len(branch.ids)]
    shared = min((branch.inside for branch in present), default=0)
    if len(present) == 2:
        differ = np.flatnonzero(present[0].ids[:shared] != present[1].ids[:shared])
        shared = int(differ[0]) if len(differ) else shared
    prompt = present[0].ids[:shared] if present else NO_BRANCH.ids
    ids, masks = zip(*((branch.ids[shared:], branch.mask[shared:]) for branch in branches), strict=True)
    return PairTokens(example.id, example.where, prompt, *ids, *masks)


def official_cut(pair: PairTokens, max_length: int, max_prompt_length: int) -> PairTokens:
    """The pair with each branch's prompt and answer cut as SimPO's and RePO's code does."""
    leads = [int(np.argmax(mask)) if mask.any() else len(mask) for mask in pair.masks]
    prompts = [np.concatenate([pair.prompt, ids[:lead]]) for ids, lead in zip(pair.branches, leads, strict=True)]
    answers = [ids[lead:] for ids, lead in zip(pair.branches, leads, strict=True)]
    present = [bool(len(ids)) for ids in pair.branches]
    prompts, answers = official.cut(prompts, answers, max_length=max_length, max_prompt_length=max_prompt_length)
    masks = [mask[lead : lead + len(ids)] for mask, lead, ids in zip(pair.masks, leads, answers, strict=True)]
    branches = [
        Branch(np.concatenate([prompt, ids]), np.concatenate([np.zeros(len(prompt), bool), mask]), len(prompt))
        if there
        else NO_BRANCH
        for prompt, ids, mask, there in zip(prompts, answers, masks, present, strict=True)
    ]
    return join(pair, branches)


def poet(pair: PairTokens) -> PairTokens:
    """Both answers cut to as many scored tokens as the shorter one has: arXiv:2506.09457."""
    k = min(int(mask.sum()) for mask in pair.masks)
    ends = [int(np.searchsorted(np.cumsum(mask), k)) + 1 for mask in pair.masks]
    chosen, rejected = (ids[:end] for ids, end in zip(pair.branches, ends, strict=True))
    masks = (mask[:end] for mask, end in zip(pair.masks, ends, strict=True))
    return PairTokens(pair.id, pair.where, pair.prompt, chosen, rejected, *masks)


def same_answers(pair: PairTokens) -> bool:
    return np.array_equal(pair.chosen, pair.rejected)


def is_written(answer: str | list[dict] | None) -> bool:
    """Whether an answer has words; one that is not there at all has nothing to lack."""
    if answer is None or isinstance(answer, str):
        return answer is None or bool(answer.strip())
    return bool(answer[-1]["content"].strip() or answer[-1].get("tool_calls"))
