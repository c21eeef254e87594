"""Tokenization as the code released with SimPO and RePO does it, id for id, so that published runs can be repeated.

princeton-nlp/SimPO@1b3e8f3 and junkangwu/RePO@79cdf5b. It differs from ours in what it scores (the assistant header, an EOS
behind the template's own end of turn) and in how it cuts (see cut).
"""

from collections.abc import Sequence

import numpy as np

from repo_jax.data.schema import PreferenceExample


def conversation(example: PreferenceExample, chat_template: str) -> list[dict]:
    """The prompt, with an empty system message in front where the template seems to know of system messages."""
    system = "system" in chat_template or "<|im_start|>" in chat_template
    if system and example.prompt[0]["role"] != "system":
        return [{"role": "system", "content": ""}, *example.prompt]
    return example.prompt


def texts(example: PreferenceExample, render, *, chat_template: str, bos: str | None) -> list[str]:
    """The prompt's text, and behind it each answer's: an answer is rendered by itself, header and all."""
    if not example.conversational:
        return [example.prompt] + [example.prompt + answer for answer in example.answers if answer is not None]
    prompt = render(conversation(example, chat_template), add_generation_prompt=False)
    answers = [render(answer) for answer in example.answers if answer is not None]
    return [prompt] + [prompt + (answer.removeprefix(bos) if bos else answer) for answer in answers]


def split(prompt: list[int], whole: list[int]) -> int:
    """Where the answer begins in the ids of prompt + answer: one token earlier if the prompt's last token changed."""
    return len(prompt) - (prompt != whole[: len(prompt)])


def with_bos(ids: list[int], bos: int | None) -> list[int]:
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def with_eos(ids: list[int], eos: int | None) -> list[int]:
    return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]


def cut(
    prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray], *, max_length: int, max_prompt_length: int
) -> tuple[list, list]:
    """Each branch's prompt and answer, shortened as officially.

    Over max_length with the longer answer, a prompt keeps its last max_prompt_length tokens (not its BOS); if that is not enough
    both answers keep max_length - max_prompt_length, however short the prompt is.
    """
    longer = max(map(len, answers))
    prompts = [prompt[-max_prompt_length:] if len(prompt) + longer > max_length else prompt for prompt in prompts]
    room = max_length - max_prompt_length
    answers = [
        answer[:room] if len(prompt) + longer > max_length else answer
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return prompts, answers
