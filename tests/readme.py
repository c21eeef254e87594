"""The README's indented blocks."""

import re

from examples import ROOT

PAGE = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(page: str) -> list[str]:
    """The indented blocks of a page, without their indent."""
    found = re.findall(r"(?:^|\n)\n((?:(?:    .*)?\n)+)", page)
    return [re.sub("^    ", "", block, flags=re.M).strip("\n") for block in found if block.strip()]


BLOCKS = blocks(PAGE)
[EXAMPLE] = [block for block in BLOCKS if block.startswith("import json, repo_jax")]
