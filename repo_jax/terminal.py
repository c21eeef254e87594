"""What is only for the eyes: colours where somebody looks, sizes and times in words."""

import os
from typing import TextIO

CODES = {"bold": "1", "red": "31", "green": "32", "yellow": "33"}


def colorful(stream: TextIO) -> bool:
    """Whether text there may have colours: it is a terminal that can, and NO_COLOR (no-color.org) is not set."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, color: str, stream: TextIO) -> str:
    """The text in a colour, or as it is where the stream has none."""
    return f"\x1b[{CODES[color]}m{text}\x1b[0m" if colorful(stream) else text


def size_words(size: float) -> str:
    """Bytes, as in 15.4 GiB or 3.5 MiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def time_words(seconds: float) -> str:
    """As in 45 s, 3 min 20 s, 5 h 10 min or 2 d 4 h."""
    for large, small, unit in (("d", "h", 3600), ("h", "min", 60), ("min", "s", 1)):
        per = 24 if large == "d" else 60
        many, rest = divmod(round(seconds / unit), per)
        if many:
            return f"{many} {large} {rest} {small}"
    return f"{round(seconds)} s"
