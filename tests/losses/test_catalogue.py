"""`repo-jax losses` and the README's table."""

import re

import pytest
from examples import ROOT

from repo_jax import cli
from repo_jax.losses import ALIASES, LOSSES, OPTIONS, hyperparameters
from repo_jax.losses.catalogue import MOST_USED, VOUCHED, in_readme, names


def test_the_table_of_the_readme_is_the_catalogue():
    """python -c 'from repo_jax.losses.catalogue import *; import pathlib; p = pathlib.Path("README.md"); p.write_text(in_readme(p.read_text()))'"""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert in_readme(text) == text


def test_all_losses_are_listed_with_what_they_take_the_most_used_first(capsys):
    assert cli.main(["losses"]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = lines[1 : lines.index("")]
    assert [re.match(r"[^\s,]+", line)[0] for line in table] == names()
    assert len(MOST_USED) == 8 and names()[:8] == list(MOST_USED) and sorted(names()) == sorted(LOSSES)
    for name, line in zip(names(), table, strict=True):
        for key in (*hyperparameters(LOSSES[name]), *LOSSES[name].columns, *LOSSES[name].data, LOSSES[name].vouched):
            assert key in line
        assert ("  yes  " in line) == LOSSES[name].reference
    rest = "\n".join(lines)
    assert all(f"  {name}: " in rest for name in OPTIONS) and all(f"vouched {name}: " in rest for name in VOUCHED)


@pytest.mark.parametrize("name", [*LOSSES, *ALIASES])
def test_one_loss_is_told_whole(capsys, name):
    assert cli.main(["losses", name]) == 0
    text = capsys.readouterr().out
    loss = LOSSES[ALIASES.get(name, name)]
    assert name in text.splitlines()[0] and "arXiv:" in text and VOUCHED[loss.vouched] in text
    assert all(f"\n{key}: " in text for key in hyperparameters(loss))


def test_an_unknown_name_is_answered(capsys):
    assert cli.main(["losses", "dpoo"]) == 2
    said = capsys.readouterr().err
    assert said == "repo-jax: unknown loss_type 'dpoo'; did you mean 'dpo'? `repo-jax losses` lists what there is\n"
