"""Eight model families in miniature: their special tokens, flags, BOS, normalizer, pre-tokenizer and chat template are those
of the released tokenizers, their vocabulary is that of a few sentences.

`expected` says what ids a conversation is to have and which of them are the answer's. It cuts the rendered conversation at
the special tokens the template writes, encodes what lies between with special tokens switched off, and counts bytes: no
offsets, and nothing of transformers but the tokenizer itself.
"""

import dataclasses
import functools
import json
import re
import unicodedata
from collections.abc import Callable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "the cat sat on the mat",
    "a dog ran to the cat, and the cat ran to the dog.",
    "You are a helpful assistant.",
    "system user assistant model tool INST SYS",
    "[a](b) [c](d) [e](f).\n\n\n\n\n\nthe end\n\nthe end\n\n",
    "<|user|> <|assistant|> </a>",
    "1 2 3 I'll it's don't",
]
# What splits words: Llama 3's takes numbers three digits at a time, Qwen 2's one.
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}NUMBERS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}" + ALTERNATE + ""
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}" + ALTERNATE + ""
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
QWEN_2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}" + ALTERNATE + ""
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
PHI_3 = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# Without its tool declarations and tool calls.
QWEN_3 = r"""{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' }}
        {{- content }}
        {{- '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""


def _as_it_is(content: str) -> str:
    return content


@dataclasses.dataclass(frozen=True, eq=False)  # each is its own key of a cache
class Family:
    """What is known of a family beside its vocabulary."""

    name: str
    template: str
    specials: tuple[str, ...]  # in the order of their ids
    end: str  # the special token that ends an answer
    named: dict[str, str]  # which of them are bos, eos, unk and pad
    kind: str  # "byte_level", or how a SentencePiece-like one begins a text: "prepend", "first", "plain"
    adds_bos: bool = False  # by its post-processor
    system: bool = True  # whether the template takes a system message
    stripped: Callable[[str], str] = _as_it_is  # what the template does to a content
    plain: tuple[str, ...] = ()  # added tokens that are not special
    rstrip: tuple[str, ...] = ()  # added tokens that swallow the whitespace after them
    numbers: str = ""  # how many digits a word has: a quantifier of SPLIT
    nfc: bool = False  # whether characters are composed first
    breaks: bool = False  # whether line breaks are letters, rather than bytes

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return _tokenizer(self)

    @property
    def bos(self) -> str | None:
        return self.named.get("bos")

    def __str__(self) -> str:
        return self.name


S = ("<unk>", "<s>", "</s>")
IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
FAMILIES = {
    family.name: family
    for family in (
        Family(
            name="llama-2",
            template=LLAMA_2,
            specials=S,
            end="</s>",
            named={"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "</s>"},
            kind="prepend",
            adds_bos=True,
            stripped=str.strip,
        ),
        Family(
            name="llama-3",
            template=LLAMA_3,
            specials=(
                "<|begin_of_text|>",
                "<|end_of_text|>",
                "<|reserved_special_token_0|>",
                "<|start_header_id|>",
                "<|end_header_id|>",
                "<|eot_id|>",
            ),
            end="<|eot_id|>",
            named={"bos": "<|begin_of_text|>", "eos": "<|eot_id|>", "pad": "<|end_of_text|>"},
            kind="byte_level",
            adds_bos=True,
            stripped=str.strip,
            numbers="{1,3}",
        ),
        Family(
            name="mistral",
            template=MISTRAL,
            specials=S,
            end="</s>",
            named={"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<unk>"},
            kind="first",
            adds_bos=True,
            system=False,
        ),
        Family(
            name="zephyr",
            template=ZEPHYR,
            specials=S,
            end="</s>",
            named={"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "</s>"},
            kind="prepend",
            adds_bos=True,
        ),
        Family(
            name="qwen-2",
            template=QWEN_2,
            specials=IM,
            end="<|im_end|>",
            named={"eos": "<|im_end|>", "pad": "<|endoftext|>"},
            kind="byte_level",
            nfc=True,
        ),
        Family(
            name="gemma",
            template=GEMMA,
            specials=("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
            end="<end_of_turn>",
            named={"bos": "<bos>", "eos": "<eos>", "unk": "<unk>", "pad": "<pad>"},
            kind="plain",
            adds_bos=True,
            system=False,
            stripped=str.strip,
            breaks=True,
        ),
        Family(
            name="phi-3",
            template=PHI_3,
            specials=(
                "<unk>",
                "<s>",
                "<|endoftext|>",
                "<|assistant|>",
                "<|placeholder1|>",
                "<|system|>",
                "<|end|>",
                "<|user|>",
            ),
            end="<|end|>",
            named={"bos": "<s>", "eos": "<|endoftext|>", "unk": "<unk>", "pad": "<|endoftext|>"},
            kind="prepend",
            rstrip=("<|assistant|>", "<|placeholder1|>", "<|system|>", "<|end|>", "<|user|>", "</s>"),
            plain=("</s>",),
        ),
        Family(
            name="qwen-3",
            template=QWEN_3,
            specials=IM,
            end="<|im_end|>",
            named={"eos": "<|im_end|>", "pad": "<|endoftext|>"},
            kind="byte_level",
            nfc=True,
            plain=("<tool_response>", "</tool_response>", "<think>", "</think>"),
        ),
    )
}


# The tokenizers


@functools.cache
def _tokenizer(family: Family) -> PreTrainedTokenizerFast:
    backend = _byte_level(family) if family.kind == "byte_level" else _sentencepiece(family)
    for special, tokens in ((True, family.specials), (False, family.plain)):
        backend.add_tokens(
            [AddedToken(token, rstrip=token in family.rstrip, normalized=False, special=special) for token in tokens]
        )
    if family.adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A",
            pair=f"{family.bos} $A {family.bos} $B",
            special_tokens=[(family.bos, backend.token_to_id(family.bos))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=family.template,
        extra_special_tokens=[token for token in family.specials if token not in family.named.values()],
        **{f"{name}_token": token for name, token in family.named.items()},
    )


def _byte_level(family: Family) -> Tokenizer:
    backend = Tokenizer(models.BPE(ignore_merges=family.name == "llama-3"))
    if family.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT.replace("NUMBERS", family.numbers)), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(SENTENCES * 3, trainer)
    return backend


def _sentencepiece(family: Family) -> Tokenizer:
    """A space is a letter of its own, and what is not in the vocabulary is written in bytes."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    sentences = SENTENCES if family.breaks else [sentence.replace("\n", " ") for sentence in SENTENCES]
    trained.train_from_iterator(sentences * 3, trainers.BpeTrainer(vocab_size=150, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    leading = [token for token in family.specials if not token.startswith("<|")]
    tokens = [*leading, *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(
        models.BPE(
            vocab, [tuple(merge) for merge in model["merges"]], unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    space = normalizers.Replace(" ", "▁")
    strip = [decoders.Strip(" ", 1, 0)]
    if family.kind == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space])
    elif family.kind == "first":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        backend.normalizer, strip = space, []
        backend.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


# What is expected

# Unicode's, as tokenizers has it: what str.isspace adds to it (the separators from U+001C on) is not in it.
WHITESPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))


def expected(family: Family, prompt: list[dict], answer: dict) -> tuple[list[int], list[bool]]:
    """The ids of a conversation up to the end of its last turn, and which of them are scored: those of the answer's text,
    a token that it shares with the end of the prompt included, and the end token.
    """
    messages = [*prompt, answer]
    marked = [{**message, "content": f"Q{i}Q"} for i, message in enumerate(messages)]
    render = functools.partial(family.tokenizer.apply_chat_template, tokenize=False)
    head, whole = render(marked[:-1], add_generation_prompt=True), render(marked)
    assert whole.startswith(head)
    tail = whole[len(head) :]
    tail = tail[: tail.index(family.end) + len(family.end)]
    contents = _contents(family, messages)
    if family.name == "llama-2" and messages[0]["role"] == "system" and not contents[1]:
        head = head.replace("\n\nQ1Q", "")  # stripped with the user's words, which there are none of

    def fill(text: str) -> str:
        return re.sub(r"Q(\d+)Q", lambda mark: contents[int(mark[1])], text)

    ids, scored = [], []
    if family.adds_bos and not head.startswith(family.bos):
        ids, scored = [family.tokenizer.bos_token_id], [False]
    pieces = [
        *((piece, False) for piece in _split(family.specials, head)),
        *((piece, True) for piece in _split(family.specials, tail)),
    ]
    swallows = False
    while pieces:
        piece, answered = pieces.pop(0)
        if piece in family.specials:
            ids.append(family.tokenizer.convert_tokens_to_ids(piece))
            scored.append(answered)
            swallows = piece in family.rstrip
            continue
        before, after = ("", fill(piece)) if answered else (fill(piece), "")
        if not answered and pieces and pieces[0][1] and pieces[0][0] not in family.specials:
            after = fill(pieces.pop(0)[0])
        for token, holds in _encode(family, before, after, swallows=swallows):
            ids.append(token)
            scored.append(holds)
        swallows = False
    return ids, scored


def text_of(family: Family, ids) -> str:
    """What these tokens write, special tokens included; no space is added or taken away."""
    text = b"".join(_bytes_of(family, token) for token in family.tokenizer.convert_ids_to_tokens(list(map(int, ids))))
    return text.decode("utf-8", "replace").replace("▁", " ")


def _contents(family: Family, messages: list[dict]) -> list[str]:
    """The messages' contents as the template writes them."""
    contents = [family.stripped(message["content"]) for message in messages]
    if family.name == "llama-2" and messages[0]["role"] == "system":
        # The first user turn is stripped together with the system message before it.
        contents[:2] = [messages[0]["content"], messages[1]["content"].rstrip()]
    if family.name == "qwen-3":
        contents[-1] = contents[-1].lstrip("\n")
    return contents


def _split(tokens: tuple[str, ...], text: str) -> list[str]:
    """The text cut before and after each of these tokens."""
    if not tokens:
        return [text]
    either = "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))
    return [piece for piece in re.split(f"({either})", text) if piece]


def _encode(family: Family, before: str, after: str, *, swallows: bool):
    """The ids of a text between two special tokens, each with whether it holds something of `after`."""
    position = 0
    for part in _split(family.plain, before + after):
        boundary, position = max(len(before) - position, 0), position + len(part)
        if part in family.plain:
            yield family.tokenizer.convert_tokens_to_ids(part), boundary < len(part)
            swallows = part in family.rstrip
            continue
        if swallows:
            stripped = part.lstrip(WHITESPACE)
            boundary, part = max(boundary - (len(part) - len(stripped)), 0), stripped
        swallows = swallows and not part
        limit = len(_normal(family, part[:boundary]).encode())
        end = -len("▁".encode()) if family.kind == "prepend" else 0
        for token in _plain(family).encode(part, add_special_tokens=False).ids:
            end += len(_bytes_of(family, family.tokenizer.convert_ids_to_tokens(token)))
            # The letter put before a text is part of the text's first character.
            yield token, max(end, 1) > limit


def _normal(family: Family, text: str) -> str:
    if family.kind == "byte_level":
        return unicodedata.normalize("NFC", text) if family.nfc else text
    return text.replace(" ", "▁")


def _bytes_of(family: Family, token: str) -> bytes:
    if token in family.specials or token in family.plain:
        return token.encode()
    if family.kind == "byte_level":
        return bytes(_byte_letters()[letter] for letter in token)
    byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
    return bytes([int(byte[1], 16)]) if byte else token.encode()


@functools.cache
def _byte_letters() -> dict[str, int]:
    """The letters of byte-level tokens: printable bytes stand for themselves, the others for U+0100 and on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {**{chr(byte): byte for byte in printable}, **{chr(0x100 + i): byte for i, byte in enumerate(others)}}


@functools.cache
def _plain(family: Family) -> Tokenizer:
    """The family's tokenizer for a text in the middle of another, where special tokens are text like any other."""
    backend = Tokenizer.from_str(family.tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    if family.kind == "first":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    return backend
