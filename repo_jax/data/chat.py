"""Conversations to token ids: rendered once, tokenized once, the prompt split off where the rendered prompt ends."""

import pathlib

import jinja2
import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from repo_jax.data.schema import PairTokens, PreferenceExample


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
    return tokenizer


def tokenize_pair(tokenizer: PreTrainedTokenizerFast, example: PreferenceExample) -> PairTokens:
    """The ids of one pair: one BOS if the model has one, the same prompt ids for both answers, and every token scored that
    holds a character of the answer.

    Raises ValueError for a template that changes the prompt once an answer follows.
    """
    prompt, texts = _render(tokenizer, example)
    bos = tokenizer.bos_token
    # The template writes a BOS, or the tokenizer would, or neither: in each case there is to be exactly one, or none.
    # A BOS that is written stays in the text, for what follows it may be split otherwise than the beginning of a text.
    while bos is not None and prompt.startswith(bos + bos):
        prompt, texts = prompt.removeprefix(bos), [text.removeprefix(bos) for text in texts]
    start = [tokenizer.bos_token_id] if bos is not None and not prompt.startswith(bos) and _adds_bos(tokenizer) else []
    ids, ends = zip(*(_encode(tokenizer, text, boundary=len(prompt)) for text in texts), strict=True)
    if not example.conversational and tokenizer.eos_token_id is not None:
        ids = [
            branch if branch and branch[-1] == tokenizer.eos_token_id else [*branch, tokenizer.eos_token_id]
            for branch in ids
        ]
    shared = 0
    while shared < min(ends) and ids[0][shared] == ids[1][shared]:
        shared += 1
    branches = [np.asarray(branch[shared:], np.int32) for branch in ids]
    return PairTokens(
        example.id,
        example.where,
        np.asarray(start + list(ids[0][:shared]), np.int32),
        *branches,
        (ends[0] - shared, ends[1] - shared),
    )


def _render(tokenizer, example: PreferenceExample) -> tuple[str, list[str]]:
    """The prompt as text, and both whole conversations, which begin with it."""
    if not example.conversational:
        return example.prompt, [example.prompt + example.chosen, example.prompt + example.rejected]
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{example.where} holds messages but the tokenizer has no chat template; name one with chat_template (Jinja text or a .jinja file)"
        )

    def render(messages, **options) -> str:
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except jinja2.TemplateError as error:
            raise ValueError(f"{example.where}: the chat template cannot write this conversation ({error})") from None

    prompt = render(example.prompt, add_generation_prompt=True)
    texts = [render(example.prompt + answer) for answer in (example.chosen, example.rejected)]
    for text in texts:
        if not text.startswith(prompt):
            same = next((i for i, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), len(text))
            raise ValueError(
                f"{example.where}: the chat template writes the prompt differently once an answer follows "
                f"({prompt[same : same + 40]!r} becomes {text[same : same + 40]!r}); name a chat_template that does not"
            )
    return prompt, texts


def _adds_bos(tokenizer) -> bool:
    return tokenizer("", add_special_tokens=True).input_ids[:1] == [tokenizer.bos_token_id]


def _encode(tokenizer, text: str, *, boundary: int) -> tuple[list[int], int]:
    """The ids of a text, and how many of the first ones lie wholly before the character `boundary`."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    inside = 0
    for _, end in encoding.offset_mapping:
        if end > boundary:
            break
        inside += 1
    return encoding.input_ids, inside
