"""Preference pairs as text and as ids, the files that hold them, and a plain answer to a row that is none.

A row is TRL's preference form with an explicit prompt: `prompt`, `chosen` and `rejected` are either three texts, or three
lists of {"role", "content"} messages.
"""

import codecs
import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

COLUMNS = ("prompt", "chosen", "rejected")


@dataclasses.dataclass(frozen=True)
class PreferenceExample:
    """One pair as the file has it: texts, or lists of messages."""

    id: str  # the row's own id, or file:line
    where: str  # file and line, for messages
    prompt: str | list[dict]
    chosen: str | list[dict]
    rejected: str | list[dict]

    @property
    def conversational(self) -> bool:
        return isinstance(self.prompt, list)


class PairTokens(NamedTuple):
    """One pair as ids. A branch is what follows the shared prompt; its first `skip` tokens are still prompt text.

    skip is 0 but where the two answers make the tokenizer split the end of the prompt differently.
    """

    id: str
    where: str
    prompt: np.ndarray  # int32
    chosen: np.ndarray
    rejected: np.ndarray
    skips: tuple[int, int] = (0, 0)  # (chosen, rejected)

    @property
    def branches(self) -> tuple[np.ndarray, np.ndarray]:
        return self.chosen, self.rejected

    @property
    def lengths(self) -> tuple[int, int, int]:
        return len(self.prompt), len(self.chosen), len(self.rejected)

    @property
    def slots(self) -> int:
        """How many slots of a row the pair takes."""
        return sum(self.lengths)

    @property
    def scored(self) -> int:
        return len(self.chosen) + len(self.rejected) - sum(self.skips)


def resolve_split(dataset: str, split: str) -> pathlib.Path:
    """The JSONL file that holds a split: `dataset` itself, or SPLIT.jsonl in the folder `dataset`."""
    path = pathlib.Path(dataset)
    if path.is_dir():
        file = path / f"{split}.jsonl"
        if not file.is_file():
            present = ", ".join(sorted(p.stem for p in path.glob("*.jsonl"))) or "none"
            raise FileNotFoundError(
                f"'{dataset}' has no split '{split}' ({split}.jsonl); splits present: {present}; name a split, or give a file itself"
            )
        return file
    if not path.is_file():
        raise FileNotFoundError(f"'{dataset}' is neither a .jsonl file nor a folder of them; give the path of one")
    if path.suffix not in (".jsonl", ".json"):
        raise ValueError(f"'{dataset}' is not a .jsonl file; write the pairs as one JSON object per line")
    return path


def read_preferences(path: pathlib.Path) -> Iterator[PreferenceExample]:
    """The pairs of a JSONL file in order. Raises ValueError naming the line of the first row that is not a pair."""
    kind = None
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                row = json.loads((line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).decode("utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{where} is not UTF-8: {error.reason} at byte {error.start + 1}; mend or remove the line"
                ) from None
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{where} is not JSON: {error.msg} at column {error.colno}; mend or remove the line (one JSON object per line is wanted)"
                ) from None
            example = _to_example(row, where, default_id=f"{path.name}:{number}")
            kind = example.conversational if kind is None else kind
            if example.conversational != kind:
                raise ValueError(
                    f"{where} holds {_kind(not kind)} but the lines before it hold {_kind(kind)}; keep them in separate files"
                )
            yield example


def _kind(conversational: bool) -> str:
    return "lists of messages" if conversational else "texts"


def _to_example(row, where: str, default_id: str) -> PreferenceExample:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is a JSON {type(row).__name__}; wanted an object with {', '.join(COLUMNS)}")
    for column in COLUMNS:
        if column not in row:
            raise ValueError(
                f"{where} has no '{column}'; wanted {', '.join(COLUMNS)}, found {', '.join(row) or 'nothing'}"
            )
    if all(isinstance(row[column], str) for column in COLUMNS):
        for column in COLUMNS:
            _check_text(row[column], f"{where}: '{column}'")
    elif all(isinstance(row[column], list) for column in COLUMNS):
        for column in COLUMNS:
            _check_messages(row[column], f"{where}: '{column}'", answer=column != "prompt")
    else:
        kinds = ", ".join(f"{column} a {type(row[column]).__name__}" for column in COLUMNS)
        raise ValueError(f"{where} has {kinds}; wanted three texts or three lists of messages")
    return PreferenceExample(str(row.get("id", default_id)), where, row["prompt"], row["chosen"], row["rejected"])


def _check_text(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} has half a character ({text[error.start]!r}) at position {error.start}; mend or remove the line"
        ) from None


def _check_messages(messages: list, where: str, *, answer: bool) -> None:
    if not messages:
        raise ValueError(f"{where} is an empty list; wanted at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(
                f"{where}, message {i} is {json.dumps(message)[:80]}; wanted {{'role': text, 'content': text}}"
            )
        _check_text(message["content"], f"{where}, message {i}")
        if answer and message["role"] not in ("assistant", "tool"):
            raise ValueError(
                f"{where}, message {i} has role '{message['role']}'; an answer holds what the assistant says, move the rest to 'prompt'"
            )
