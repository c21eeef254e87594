"""Rows understood: the schemas that preference data comes in, one form for what they hold, and a plain answer to a row that has none.

`SCHEMAS` is the index. A row becomes a PreferenceExample, or a Fault that says what is wrong with it; no row raises.
"""

import collections
import contextlib
import dataclasses
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from repo_jax.data.sources import RawRow

PEEKED = 100  # how many rows of a part decide its schema
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # how the turns of an HH-RLHF transcript begin
SPOKEN = {"human": "user", "gpt": "assistant"}  # what `from` says, and the role it means
PROMPTLIKE = ("question", "instruction", "input", "query", "messages", "context")  # how others call a prompt
TEXT, LIST, NULL = "text", "list of objects", "null"  # what a column holds, where it matters

MOST = sys.float_info.max
FINITE = (-MOST, MOST, "a finite number")
COLUMNS = {  # the optional columns that are kept: least value, greatest value, and these in words; NAME_chosen, NAME_rejected: of answers
    "score_chosen": FINITE,
    "score_rejected": FINITE,
    "margin": FINITE,
    "label_prob": (0, 1, "a number from 0 to 1"),
    "weight": (0, MOST, "a finite number, 0 or more"),
    "win_probability_chosen": (0, 1, "a number from 0 to 1"),
    "win_probability_rejected": (0, 1, "a number from 0 to 1"),
    "previous_logps_chosen": FINITE,
    "previous_logps_rejected": FINITE,
    "uncertainty_chosen": (0, MOST, "a finite number, 0 or more"),
    "uncertainty_rejected": (0, MOST, "a finite number, 0 or more"),
    "ref_chosen_logps": FINITE,
    "ref_rejected_logps": FINITE,
    "ref_logps": FINITE,
}


@dataclasses.dataclass(frozen=True)
class PreferenceExample:
    """One row, understood: texts, or lists of {"role", "content"} messages."""

    id: str  # the row's own id, or its file and line
    where: str  # file and line, for messages
    prompt: str | list[dict]
    chosen: str | list[dict] | None  # None in an unpaired row whose completion is labelled bad
    rejected: (
        str | list[dict] | None
    )  # None in an unpaired row whose completion is labelled good, and in a row of schema sft
    schema: str = "explicit"  # the name of the schema it was read by
    columns: dict[str, float] = dataclasses.field(default_factory=dict)  # those of COLUMNS that it has
    template: dict = dataclasses.field(default_factory=dict)  # what it hands the chat template
    row: dict = dataclasses.field(default_factory=dict)  # the source row, as parsed

    @property
    def conversational(self) -> bool:
        return isinstance(self.prompt, list)

    @property
    def answers(self) -> tuple:
        return self.chosen, self.rejected


class Fault(NamedTuple):
    """A row that gives no example, and why."""

    id: str
    where: str
    reason: str  # bad_row: it does not have the part's schema; prompt_mismatch: its answers do not follow one prompt
    message: str  # one line for people


class PairTokens(NamedTuple):
    """One row as ids. A branch is what follows the shared prompt; only its masked tokens are scored."""

    id: str
    where: str
    prompt: np.ndarray  # int32
    chosen: np.ndarray  # empty where an unpaired row has none
    rejected: np.ndarray
    chosen_mask: np.ndarray  # bool, one per token of the branch: True is scored
    rejected_mask: np.ndarray
    weights: tuple[np.ndarray, np.ndarray] | None = None  # float32, one per scored token of each; None: all are 1
    columns: Mapping[str, float | tuple[float, float]] = {}  # of the data, that the loss asks for
    reference_2: np.ndarray | None = None  # float32: log-probs under the reference model, summed with the weights
    groups: Mapping[str, "PairTokens"] = {}  # further sequences that the loss asks for

    @property
    def branches(self) -> tuple[np.ndarray, np.ndarray]:
        return self.chosen, self.rejected

    @property
    def masks(self) -> tuple[np.ndarray, np.ndarray]:
        return self.chosen_mask, self.rejected_mask

    @property
    def lengths(self) -> tuple[int, int, int]:
        return len(self.prompt), len(self.chosen), len(self.rejected)

    @property
    def wholes(self) -> tuple[int, int]:
        """The tokens of prompt and answer, for both answers."""
        return len(self.prompt) + len(self.chosen), len(self.prompt) + len(self.rejected)

    @property
    def slots(self) -> int:
        """How many slots of a row the pair takes."""
        return sum(self.lengths)

    @property
    def scored(self) -> int:
        return int(sum(mask.sum() for mask in self.masks))


class DamagedStoreError(Exception):
    """A prepared store that cannot be read; the message names the file and says what to do."""


def read_examples(rows: Iterable[RawRow], *, schema: str = "auto") -> Iterator[PreferenceExample | Fault]:
    """An example or a fault for each row, in order.

    With "auto" the first rows of each part decide its schema. Raises ValueError for a part whose schema they leave open.
    """
    if schema not in ("auto", *SCHEMAS):
        raise ValueError(f"data.schema='{schema}' is not known; choose one of auto, {', '.join(SCHEMAS)}")
    for part, group in itertools.groupby(rows, key=lambda raw: raw.part):
        parsed, name = ((raw, _parse(raw)) for raw in group), schema
        if schema == "auto":
            first = list(itertools.islice(parsed, PEEKED))
            name = _detect(part, [row for _, row in first])
            parsed = itertools.chain(first, parsed)
        conversational = None  # as the part's first example is
        for raw, row in parsed:
            result = row if isinstance(row, Fault) else _understand(raw, row, name, conversational)
            if isinstance(result, PreferenceExample):
                conversational = result.conversational
            yield result


class _RowError(Exception):
    """What is wrong with a row, in words that go on from its place."""

    def __init__(self, said: str, reason: str = "bad_row"):
        super().__init__(said)
        self.reason = reason


def _parse(raw: RawRow) -> dict | Fault:
    if isinstance(raw.content, dict):
        return raw.content
    try:
        row = json.loads(raw.content.decode("utf-8"))
        if isinstance(row, dict):
            return row
        said = f"is a JSON {_kind(row)}; wanted an object with the row's columns"
    except UnicodeDecodeError as error:
        said = f"is not UTF-8: {error.reason} at byte {error.start + 1}; mend or remove the line"
    except json.JSONDecodeError as error:
        said = f"is not JSON: {error.msg} at column {error.colno}; mend or remove the line (one JSON object per line is wanted)"
    except ValueError:  # Python's own limit
        said = f"has a number of more than {sys.get_int_max_str_digits()} digits; mend or remove the line"
    except RecursionError:
        said = "is nested too deeply to be read; mend or remove the line"
    return Fault(raw.id, raw.where, "bad_row", f"{raw.where} {said}")


def _understand(raw: RawRow, row: dict, schema: str, conversational: bool | None) -> PreferenceExample | Fault:
    id = raw.id
    try:
        # A table fills the keys that an object lacks with null.
        full = {key: _without_nulls(value) for key, value in row.items()} if row is raw.content else row
        if full.get("id") not in (None, ""):
            id = str(_whole_text(full["id"], "'id'"))
        _, read = SCHEMAS[schema]
        example = PreferenceExample(id, raw.where, *read(full), schema, _columns(full), _template(full), row)
        if conversational not in (None, example.conversational):
            kinds = ("lists of messages", "texts") if example.conversational else ("texts", "lists of messages")
            raise _RowError("holds {} but the rows before it hold {}; keep them in separate files".format(*kinds))
        return example
    except _RowError as error:
        return Fault(id, raw.where, error.reason, f"{raw.where} {error}")
    except RecursionError:
        return Fault(id, raw.where, "bad_row", f"{raw.where} is nested too deeply to be read; mend or remove the row")


# Which schema a part has


def _detect(part: str, peeked: list[dict | Fault]) -> str:
    """The schema that most of these rows look like."""
    rows = [row for row in peeked if not isinstance(row, Fault)]
    if not rows:
        raise ValueError(peeked[0].message)
    counts = collections.Counter(name for row in rows if (name := _looks_like(row)))
    if not counts:
        wanted = "; ".join(f"{columns} ({name})" for name, (columns, _) in SCHEMAS.items())
        raise ValueError(
            f"'{part}' has rows of no known schema: found {_found(rows[0])}; rename its columns to one of: {wanted}"
        )
    name = counts.most_common(1)[0][0]
    _ask_about_other_prompts(part, name, rows[0])
    texts = [row for row in rows if name == _looks_like(row) == "explicit" and isinstance(row["prompt"], str)]
    repeated = sum(map(_repeats_prompt, texts))
    if len(texts) >= 5 and repeated >= 0.9 * len(texts):
        raise ValueError(
            f"'{part}' has 'chosen' and 'rejected' that begin with 'prompt' (in {repeated} of the {len(texts)} rows looked at); "
            "set data.schema to 'implicit' if that is the prompt inside the answers, or to 'explicit' if the answers really repeat it"
        )
    return name


def _ask_about_other_prompts(part: str, name: str, row: dict) -> None:
    """Answers in texts without a prompt may hold it; but where a column is there that sounds like one, they do not."""
    others = [column for column in PROMPTLIKE if row.get(column) and row.get("prompt") is None]
    if name == "implicit" and isinstance(row.get("chosen"), str) and others:
        raise ValueError(
            f"'{part}' has no 'prompt' but '{others[0]}'; rename '{others[0]}' to 'prompt', or set data.schema to 'implicit' "
            "if 'chosen' and 'rejected' begin with the prompt"
        )


def _looks_like(row: dict) -> str | None:
    prompt, chosen, rejected, listed = (
        _kind(row.get(key)) for key in ("prompt", "chosen", "rejected", "conversations")
    )
    if row.get("completion") is not None and row.get("label") is not None:
        return "unpaired"
    if chosen == rejected == NULL and (row.get("completion") is not None or _kind(row.get("messages")) == LIST):
        return "sft"
    if (prompt, listed) == (NULL, LIST) and {chosen, rejected} <= {LIST, "object"}:
        return "conversations"
    if chosen == rejected == LIST:
        return {LIST: "explicit", TEXT: "implicit", NULL: "implicit"}.get(prompt)
    if chosen == rejected == TEXT:
        if row["chosen"].startswith(HUMAN) and row["rejected"].startswith(HUMAN):
            return "hh"
        return {TEXT: "explicit", NULL: "implicit"}.get(prompt)
    return None


def _repeats_prompt(row: dict) -> bool:
    head = row["prompt"].strip()
    return bool(head) and row["chosen"].startswith(head) and row["rejected"].startswith(head)


# How each schema is read: a row to prompt, chosen and rejected


def _explicit(row: dict) -> tuple:
    return _follow(*_take(row, "prompt", "chosen", "rejected"))


def _implicit(row: dict) -> tuple:
    prompt = row.get("prompt") or ""
    if not isinstance(prompt, str):
        raise _RowError(f"has 'prompt' ({_kind(prompt)}) beside answers that hold it; wanted a text, or none")
    prompt = _whole_text(prompt, "'prompt'")
    chosen, rejected = _take(row, "chosen", "rejected")
    if isinstance(chosen, str):
        head = _head_of_texts(prompt, chosen, rejected)
        return head, chosen[len(head) :], rejected[len(head) :]
    if chosen[:-1] != rejected[:-1]:
        raise _mismatch(chosen[:-1], rejected[:-1])
    if not prompt.strip() and not chosen[:-1]:
        raise _RowError("has nothing before the answers in 'chosen' and 'rejected', and no 'prompt'; add either")
    return _follow(chosen[:-1] or [{"role": "user", "content": prompt}], chosen[-1:], rejected[-1:])


def _head_of_texts(prompt: str, chosen: str, rejected: str) -> str:
    if not prompt.strip():
        head = chosen[: _parting(chosen, rejected)].removesuffix(" ")  # as TRL does: the space is the answers'
        if not head:
            raise _mismatch(chosen, rejected)
        return head
    for head in (prompt, prompt.strip()):  # the answers may lack the white space around it
        if chosen.startswith(head) and rejected.startswith(head):
            return head
    said = "has answers that do not both begin with 'prompt'; mend or remove the row"
    raise _RowError(f"{said}, or set data.schema to 'explicit' if no answer holds its prompt", "prompt_mismatch")


def _hh(row: dict) -> tuple:
    texts = _take(row, "chosen", "rejected", kinds=(str,))
    for name, text in zip(("chosen", "rejected"), texts, strict=True):
        if not text.startswith(HUMAN):
            raise _RowError(f"has {_quote(text)} as '{name}'; wanted a transcript that begins with {HUMAN!r}")
        if text.rfind(ASSISTANT) < text.rfind(HUMAN):
            raise _RowError(f"has no {ASSISTANT!r} after the last {HUMAN!r} of '{name}'; wanted an answer at its end")
    heads, _, answers = zip(*(text.rpartition(ASSISTANT) for text in texts), strict=True)
    if heads[0] != heads[1]:
        raise _mismatch(*heads)
    _, *turns = re.split(f"({HUMAN}|{ASSISTANT})", heads[0])
    roles = ["user" if who == HUMAN else "assistant" for who in turns[::2]]
    prompt = [{"role": role, "content": said.strip()} for role, said in zip(roles, turns[1::2], strict=True)]
    return prompt, *([{"role": "assistant", "content": answer.strip()}] for answer in answers)


def _unpaired(row: dict) -> tuple:
    label = row.get("label")
    if label not in (0, 1):
        raise _RowError(f"has {_quote(label)} as 'label'; wanted true or false (1 or 0)")
    prompt, completion = _follow(*_take(row, "prompt", "completion"))
    return (prompt, completion, None) if label else (prompt, None, completion)


def _sft(row: dict) -> tuple:
    if row.get("label") is not None:
        raise _RowError(
            "has a 'label', which schema 'sft' has not; set data.schema to 'unpaired', or remove the column"
        )
    if row.get("completion") is not None or row.get("messages") is None:
        return (*_follow(*_take(row, "prompt", "completion")), None)
    [messages] = _take(row, "messages", kinds=(list,))
    spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not spoken:
        raise _RowError("has no message of the assistant in 'messages', so that there is nothing to learn")
    if spoken[0] == 0:
        raise _RowError("has 'messages' that begin with the assistant's words; wanted what they answer before them")
    # What follows the last answer is nobody's to learn.
    return messages[: spoken[0]], messages[spoken[0] : spoken[-1] + 1], None


def _conversations(row: dict) -> tuple:
    single = {name: [row[name]] for name in ("chosen", "rejected") if isinstance(row.get(name), dict)}
    prompt, *answers = _take(row | single, "conversations", "chosen", "rejected", kinds=(list,))
    system = row.get("system") or ""
    if not isinstance(system, str):
        raise _RowError(f"has {_quote(system)} as 'system'; wanted a text")
    if system and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": _whole_text(system, "'system'")}, *prompt]
    return _follow(prompt, *answers)


SCHEMAS: dict[str, tuple[str, Callable[[dict], tuple]]] = {
    "explicit": ("prompt, chosen, rejected: texts or lists of messages", _explicit),
    "implicit": ("chosen, rejected: texts or lists of messages, the prompt inside both", _implicit),
    "hh": (f"chosen, rejected: transcripts that begin with {HUMAN!r}", _hh),
    "unpaired": ("prompt, completion, label: texts or lists of messages, and true or false", _unpaired),
    "conversations": ("conversations, chosen, rejected: a list of messages, and two answers to it", _conversations),
    "sft": ("messages: a conversation, or prompt, completion: texts or lists of messages, without label", _sft),
}


# What they read: texts, messages, optional columns


def _take(row: dict, *names: str, kinds: tuple[type, ...] = (str, list)) -> list:
    """These columns, all as texts or all as lists of messages."""
    for name in names:
        if row.get(name) is None:
            given = f"null as '{name}'" if name in row else f"no '{name}'"
            raise _RowError(f"has {given}; wanted {', '.join(names)}, found {_found(row)}")
    for kind in kinds:
        if all(isinstance(row[name], kind) for name in names):
            return [(_whole_text if kind is str else _messages)(row[name], f"'{name}'") for name in names]
    wanted = " or ".join({str: "all texts", list: "all lists of messages"}[kind] for kind in kinds)
    raise _RowError(f"has {_found({name: row[name] for name in names})}; wanted {wanted}")


def _messages(messages: list, place: str) -> list[dict]:
    if not messages:
        raise _RowError(f"has an empty list as {place}; wanted at least one message")
    return [_message(message, f"message {i} of {place}") for i, message in enumerate(messages)]


def _message(given, place: str) -> dict:
    """A message as role and content, with all else that a template may read."""
    message = {key: value for key, value in given.items() if value is not None} if isinstance(given, dict) else {}
    if "from" in message and "role" not in message:
        role, content = message.pop("from"), message.pop("value", None)
        message |= {"role": SPOKEN.get(role, role) if isinstance(role, str) else role, "content": content}
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, place) for part in content)
    elif content is None and message.get("tool_calls"):
        content = ""
    if not isinstance(message.get("role"), str) or not isinstance(content, str):
        raise _RowError(f"has {_quote(given)} as {place}; wanted {{'role': text, 'content': text}}")
    return _whole_text(message | {"content": content}, place)


def _part(part, place: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise _RowError(f"has {_quote(part)} in {place}; only text is supported, no images, sound or video")


def _follow(prompt, *answers) -> tuple:
    """Prompt and answers, these without the prompt's messages where all of them repeat it."""
    if isinstance(prompt, str):
        return prompt, *answers
    n = len(prompt)
    if all(len(answer) > n and answer[:n] == prompt for answer in answers):
        answers = [answer[n:] for answer in answers]
    for role in (message["role"] for answer in answers for message in answer):
        if role not in ("assistant", "tool"):
            said = "an answer holds what the assistant says, move the rest to the prompt"
            raise _RowError(f"has role {_quote(role)} in an answer; {said}")
    if any(answer[-1]["role"] != "assistant" for answer in answers):
        raise _RowError('has an answer that ends with role "tool"; wanted the assistant\'s words at its end')
    return prompt, *answers


def _columns(row: dict) -> dict[str, float]:
    columns = {name: row[name] for name in COLUMNS if row.get(name) is not None}
    for name, value in columns.items():
        least, most, words = COLUMNS[name]
        if _kind(value) != "number" or not least <= value <= most:
            raise _RowError(f"has {_quote(value)} as '{name}'; wanted {words}, or null")
    return {name: float(value) for name, value in columns.items()}


def _template(row: dict) -> dict:
    tools, options = row.get("tools"), row.get("chat_template_kwargs")
    if isinstance(tools, str):
        with contextlib.suppress(ValueError):  # what is no JSON stays a text, and is refused
            tools = json.loads(tools or "null")
    if _kind(tools) not in (LIST, NULL):
        raise _RowError(f"has {_quote(tools)} as 'tools'; wanted a list of objects, or the JSON text of one")
    if _kind(options) not in ("object", NULL):
        raise _RowError(f"has {_quote(options)} as 'chat_template_kwargs'; wanted an object")
    return _whole_text(({"tools": tools} if tools else {}) | (options or {}), "'tools' or 'chat_template_kwargs'")


# What is said of them


def _kind(value) -> str:
    if isinstance(value, list):
        return LIST if all(isinstance(item, dict) for item in value) else "list"
    kinds = {str: TEXT, dict: "object", bool: "boolean", int: "number", float: "number", type(None): NULL}
    return kinds.get(type(value), type(value).__name__)


def _found(row: dict) -> str:
    """The columns of a row and what they hold, on one line."""
    said = (f"{key if key.isprintable() else ascii(key)} ({_kind(value)})" for key, value in row.items())
    return ", ".join(said)[:400] or "nothing"


def _quote(value) -> str:
    return json.dumps(value, default=repr)[:80]


def _parting(one, other) -> int:
    """Where two texts, or two lists, begin to differ."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _mismatch(one, other) -> _RowError:
    at = _parting(one, other)
    here = f"message {at} before the answer"
    if isinstance(one, str):
        here = f"character {at}: {_quote(one[at : at + 40])} and {_quote(other[at : at + 40])}"
    said = f"has answers to different prompts ('chosen' and 'rejected' part at {here}); mend or remove the row"
    return _RowError(said, "prompt_mismatch")


def _whole_text(value, place: str):
    """The value itself. Refuses half characters at any depth: no tokenizer takes them."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            half = f"half a character ({value[error.start]!r}) at position {error.start} of {place}"
            raise _RowError(f"has {half}; mend or remove the row") from None
    elif isinstance(value, list | dict):
        for inner in [*value, *value.values()] if isinstance(value, dict) else value:
            _whole_text(inner, place)
    return value


def _without_nulls(value):
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
