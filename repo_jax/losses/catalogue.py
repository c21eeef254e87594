"""The objectives as a table for people: what `repo-jax losses` prints, and the table of the README."""

import inspect
import re

from repo_jax.losses import ALIASES, CHOICES, LOSSES, OPTIONS, RANGES, hyperparameters
from repo_jax.losses.types import Loss

MOST_USED = ("repo", "simpo", "dpo", "dpo_norm", "ipo", "kto", "orpo", "cpo")

# How far an objective is vouched for. All are also held to formulas written a second time, in float64.
VOUCHED = {
    "TRL": "equals TRL 1.16, whose own code the tests run",
    "paper's code": "written after the paper's released code",
    "paper": "written after the paper's equations",
    "other code": "written after somebody else's code for the paper",
    "own reading": "own reading of the paper; what is not verified is said there",
}


def names() -> list[str]:
    """All loss types, the most used first."""
    return [*MOST_USED, *(name for name in LOSSES if name not in MOST_USED)]


def papers(loss: Loss) -> list[str]:
    return re.findall(r"arXiv:(\d{4}\.\d{5})", loss.fn.__doc__ or "")


def needs(loss: Loss) -> str:
    """What it takes beside pairs, and their log-probs, in words."""
    words = {"answers": ["answers with labels, or pairs"], "chosen": ["single answers, or pairs"]}.get(loss.layout, [])
    words += [f"column {name}" for name in loss.columns]
    words += [f"columns {name}_chosen, {name}_rejected" for name in loss.answer_columns]
    words += [f"option {name}" for name in loss.data]
    words += [{"kl": "mismatched answers", "rationale": "column rationale"}.get(name, name) for name in loss.groups]
    if "kl_reference" in loss.terms:
        words.append("the reference model beside the policy")
    return ", ".join(words) or "pairs"


def shown(loss: Loss) -> str:
    """Its hyperparameters with their defaults."""
    found = hyperparameters(loss).items()
    return ", ".join(f"{name} {value if isinstance(value, str) else format(value, 'g')}" for name, value in found)


def other_names(name: str) -> list[str]:
    return [alias for alias, of in ALIASES.items() if of == name]


def as_text() -> str:
    rows = [("loss_type", "paper", "reference", "takes", "hyperparameters and defaults", "vouched")]
    for name in names():
        loss = LOSSES[name]
        called = ", ".join([name, *other_names(name)])
        rows.append((called, papers(loss)[0], "yes" if loss.reference else "", needs(loss), shown(loss), loss.vouched))
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += ["", *(f"vouched {name}: {words}" for name, words in VOUCHED.items())]
    lines += ["", "beside any loss:", *(f"  {name}: {words}" for name, words in OPTIONS.items())]
    return "\n".join([*lines, "", "repo-jax losses NAME says all of one."])


def about(name: str) -> str:
    """All that is to say of one. Raises ValueError where there is none of that name."""
    from repo_jax.losses import make_loss

    make_loss(name)
    kind = ALIASES.get(name, name)
    loss = LOSSES[kind]
    lines = [", ".join([kind, *other_names(kind)]), "", *inspect.getdoc(loss.fn).splitlines(), ""]
    lines += [f"reference model: {'yes' if loss.reference else 'no'}", f"takes: {needs(loss)}"]
    if loss.initial_state is not None:
        lines.append("keeps a running state")
    lines.append(f"vouched: {loss.vouched}, {VOUCHED[loss.vouched]}")
    for key, default in hyperparameters(loss).items():
        words = ", ".join(CHOICES[key]) if key in CHOICES else RANGES.get(f"{kind}.{key}", RANGES.get(key))[2]
        lines.append(f"{key}: {words} (default: {default if isinstance(default, str) else format(default, 'g')})")
    return "\n".join(lines)


START, END = "<!-- objectives: `repo-jax losses` -->", "<!-- end of objectives -->"


def in_readme(text: str) -> str:
    """The README with the table between its marks."""
    head, rest = text.split(START)
    _, tail = rest.split(END)
    return f"{head}{START}\n{as_markdown()}\n{END}{tail}"


def as_markdown() -> str:
    """The README's table."""
    lines = [
        "| `loss_type` | paper | reference | takes | hyperparameters | vouched |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in names():
        loss = LOSSES[name]
        called = ", ".join(f"`{one}`" for one in [name, *other_names(name)])
        cited = ", ".join(f"[{paper}](https://arxiv.org/abs/{paper})" for paper in papers(loss)[:1])
        reference = "yes" if loss.reference else ""
        lines.append(f"| {called} | {cited} | {reference} | {needs(loss)} | {shown(loss)} | {loss.vouched} |")
    return "\n".join(lines)
