"""Conversations to text by the tokenizer's chat template, and which characters of it are the answer."""

import functools
import json
from collections.abc import Callable
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from repo_jax.data.schema import PreferenceExample
from repo_jax.data.special import SpecialTokens


class Text(NamedTuple):
    """A prompt and one answer as one text."""

    text: str
    boundary: int  # where the prompt ends
    spans: tuple[tuple[int, int], ...]  # the characters that are scored
    ended: bool  # whether the last of them are a token that ends the turn
    mark: str = ""  # how special tokens are spelt in it (SpecialTokens)


class TemplateMismatchError(Exception):
    """The template writes the prompt, or an earlier turn, differently once more follows."""


class RefusedError(Exception):
    """The template cannot write a conversation; the message names the row."""


class Template:
    """A tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, special: SpecialTokens, kwargs: dict):
        self._tokenizer, self._special, self._kwargs = tokenizer, special, kwargs
        self._tails: dict[str, str] = {}

    def renderer(self, example: PreferenceExample, mark: str = "") -> Callable[..., str]:
        """render(messages, add_generation_prompt=False) with what this row hands the template; special tokens spelt by the mark."""
        if self._tokenizer.chat_template is None:
            raise ValueError(
                f"{example.where} holds messages but the tokenizer has no chat template; name one with chat_template (Jinja text or a .jinja file)"
            )

        def render(messages: list[dict], *, add_generation_prompt: bool = False) -> str:
            hidden = self._special.hide(messages, mark)
            options = self._kwargs | self._special.hide(example.template, mark)
            ours = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
            try:
                text = self._tokenizer.apply_chat_template(hidden, **options | ours)
            except Exception as error:  # a template may do anything
                raise RefusedError(
                    f"{example.where}: the chat template cannot write this conversation ({error})"
                ) from None
            return self._special.reveal(text, mark)

        return render

    def mark(self, example: PreferenceExample) -> str:
        """The mark under which this conversation is rendered: "" unless it holds special-token text."""
        messages = example.prompt + [message for answer in example.answers for message in answer or ()]
        return self._special.mark_for([*messages, example.template])

    def read(self, example: PreferenceExample, *, score_header: bool) -> list[Text | None]:
        """The chosen and the rejected conversation as text, None where the row has none. Raises TemplateMismatchError or
        RefusedError."""
        mark = self.mark(example)
        render = self.renderer(example, mark)
        start_of = functools.partial(self._start, render, mark=mark, score_header=score_header)
        prompt = start_of(example.prompt)
        # The template may write a BOS where the conversation already begins with one.
        bos = self._special.reveal(self._tokenizer.bos_token or "", mark)
        doubled = 0
        while bos and prompt.startswith(bos * 2, doubled):
            doubled += len(bos)

        def text_of(answer: list[dict]) -> Text:
            whole = render(example.prompt + answer)
            tail = self._tail(example, answer)
            found = self._special.search(tail)
            behind = tail[found.end() :] if found else tail
            tail, behind = (self._special.reveal(text, mark) for text in (tail, behind))
            spans = []
            for i, message in enumerate(answer):
                if message["role"] != "assistant":
                    continue
                conversation = example.prompt + answer[:i]
                start = prompt if i == 0 else start_of(conversation)
                turn = whole if i + 1 == len(answer) else render([*conversation, message])
                end = len(turn) - len(behind)
                if not whole.startswith(start) or not whole.startswith(turn[:end]) or not turn.endswith(tail):
                    raise TemplateMismatchError
                spans.append((len(start) - doubled, end - doubled))
            if any(start > end for start, end in spans):
                raise TemplateMismatchError
            return Text(whole[doubled:], len(prompt) - doubled, tuple(spans), found is not None, mark)

        return [None if answer is None else text_of(answer) for answer in example.answers]

    def _start(self, render, conversation: list[dict], mark: str, *, score_header: bool) -> str:
        """What stands before the next answer, or before its header."""
        start = render(conversation, add_generation_prompt=True)
        # What is written either way: where no header is asked for, some templates end the conversation.
        return self._special.common_prefix(start, render(conversation), mark) if score_header else start

    def _tail(self, example: PreferenceExample, answer: list[dict]) -> str:
        """What the template writes after a conversation's last answer; it depends on the template's options alone."""
        options = json.dumps(example.template, sort_keys=True, default=str)
        if options not in self._tails:
            probe = "the answer"
            conversation = [*example.prompt, *answer[:-1], {"role": "assistant", "content": probe}]
            self._tails[options] = self.renderer(example)(conversation).rpartition(probe)[2]
        return self._tails[options]
