"""One pair as the released RePO and SimPO code tokenizes it: TRL 0.9.2's CPO rows over alignment-handbook's chat text."""

import itertools

UNSCORED = -100


def official_ids(
    tokenizer,
    prompt_messages: list[dict],
    chosen_messages: list[dict],
    rejected_messages: list[dict],
    *,
    max_length: int,
    max_prompt_length: int,
    truncation_mode: str = "keep_end",
) -> dict[str, list[int]]:
    """Ids and labels of both answers. Raises ValueError for the pairs at which that code stops."""
    prompt_text = tokenizer.apply_chat_template(with_system_message(tokenizer, prompt_messages), tokenize=False)
    answer_texts = [answer_text(tokenizer, messages) for messages in (chosen_messages, rejected_messages)]

    prompts, responses = [], []
    for text in answer_texts:
        prompt, response = split_ids(tokenizer, prompt_text, text)
        prompts.append(prompt)
        responses.append(response)
    # Where a prompt is longer than the other by a token, that token is compared with nothing.
    if sum(a != b for a, b in zip(*prompts, strict=False)) > 1:
        raise ValueError("the prompts of the two answers differ in more than one token")

    for i in range(2):
        if prompts[i][:1] != [tokenizer.bos_token_id]:
            prompts[i] = [tokenizer.bos_token_id, *prompts[i]]
        if responses[i][-1:] != [tokenizer.eos_token_id]:
            responses[i] = [*responses[i], tokenizer.eos_token_id]

    # The longer response decides for both, and is not measured again once it is cut.
    longer = max(len(response) for response in responses)
    for i in range(2):
        if len(prompts[i]) + longer > max_length:
            if truncation_mode == "keep_end":
                prompts[i] = prompts[i][-max_prompt_length:]
            elif truncation_mode == "keep_start":
                prompts[i] = prompts[i][:max_prompt_length]
            else:
                raise ValueError(f"truncation_mode={truncation_mode!r}; choose keep_end or keep_start")
    for i in range(2):
        if len(prompts[i]) + longer > max_length:
            responses[i] = responses[i][: max_length - max_prompt_length]

    row = {}
    for name, prompt, response in zip(("chosen", "rejected"), prompts, responses, strict=True):
        row[f"{name}_input_ids"] = [*prompt, *response]
        row[f"{name}_labels"] = [*itertools.repeat(UNSCORED, len(prompt)), *response]
    return row


def with_system_message(tokenizer, messages: list[dict]) -> list[dict]:
    """An empty system message comes first where there is none and the template's text has a word for it."""
    template = tokenizer.chat_template
    if messages[0]["role"] != "system" and ("system" in template or "<|im_start|>" in template):
        return [{"role": "system", "content": ""}, *messages]
    return messages


def answer_text(tokenizer, messages: list[dict]) -> str:
    """The answer as a conversation of its own: no system message is put before it, and one leading BOS is taken off."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    if text.startswith(tokenizer.bos_token):
        text = text[len(tokenizer.bos_token) :]
    return text


def split_ids(tokenizer, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """The ids of both texts together, split where the prompt's own ids end, or one earlier if these are others."""
    alone = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    together = tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]
    if len(together) < len(alone):
        raise ValueError("prompt and answer together have fewer tokens than the prompt alone")
    start = len(alone)
    if together[:start] != alone:
        start -= 1
    return together[:start], together[start:]
