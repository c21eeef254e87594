import html.parser
import json
import re
import time
import types

import jax
import numpy as np
import pytest
from examples import STORIES, one_device, tokens
from report_facts import AFTER, BEFORE, METRICS, facts, margins

import repo_jax
from repo_jax import plots
from repo_jax.config import dump_recipe, to_recipe
from repo_jax.data.chat import TokenOptions, load_tokenizer
from repo_jax.data.rows import RowShape
from repo_jax.data.sources import open_source
from repo_jax.data.store import open_store
from repo_jax.losses import make_loss
from repo_jax.plots import spearman
from repo_jax.report import CONTROLS, cut, facts_of, readable, summary_text, watched, write_report
from repo_jax.run_folder import RunFolder
from repo_jax.stores import with_rows

NASTY = "<script>alert('x')</script> & \"quoted\" \x00\x1b[31m ```` [link](http://example.org)"


def report(folder, **changed) -> tuple[str, str]:
    """report.html and report.md."""
    path = write_report(folder, facts(**changed))
    assert path.name == "report.html"
    return path.read_text(encoding="utf-8"), (folder / "report.md").read_text(encoding="utf-8")


EMPTY = {"meta", "br", "img", "link", "path", "use", "rect", "image"}


class Page(html.parser.HTMLParser):
    """What a browser would find: the elements, whether they are closed in order, their addresses, and the text."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.seen, self.addresses, self.ids, self.text = [], [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in EMPTY:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    folder = tmp_path_factory.mktemp("usual")
    return folder, *report(folder)


def test_the_page_is_one_well_formed_file_that_asks_for_nothing_from_elsewhere(usual):
    _, text, _ = usual
    page = Page(text)
    assert page.seen.count("svg") == 10 and "script" not in page.seen and "link" not in page.seen
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert "http" not in text and "url(" not in re.sub(r"url\(#\w+\)", "", text)
    assert len(page.ids) == len(set(page.ids))
    used = {address[1:] for address in page.addresses if address.startswith("#")} | set(re.findall(r"url\(#(\w+)\)", text))  # fmt: skip
    assert used and used <= set(page.ids)
    assert plots.INK not in text and "currentColor" in text and "prefers-color-scheme: dark" in text


def test_both_reports_say_what_the_run_was_and_what_came_of_it(usual):
    folder, page, text = usual
    shown = Page(page).text
    assert "| held-out ranking accuracy | 0.4000 | 0.5600 |" in text and "| loss | 0.25 |" in text
    assert "- training: 3 pairs\n  - 1 of 4 rows dropped\n- held-out: 2 pairs\n" in text
    assert "held-out ranking accuracy0.560\n0.400 before" in shown
    for said in (shown, text):
        for words in (
            *(
                "repo (gamma 0.5) on a model",
                "1 of 4 rows dropped",
                "dropped: pairs with an empty answer",
                "gamma: 0.5",
            ),
            *("kept: pairs that were cut to max_length", "52", "8 x TPU v5e", "0.10.2", "train run/recipe.yaml"),
            *("the-worst", "+0.100", "-2.000", "the-best", "+3.000", "once chosen", "once rejected", "Say once"),
        ):
            assert words in said, words
    for plot in re.findall(r"!\[.*\]\((.*)\)", text):
        assert (folder / plot).read_bytes().startswith(b"\x89PNG")
    assert text.count("![") == 10


def test_each_evaluation_stands_among_the_margins_with_its_share_beyond_gamma(tmp_path):
    after = {0: np.array([-1.0, 0.2, 0.4, 0.6]), 2: np.array([-1.0, 0.2, 0.6, 0.7]), 4: np.array([0.1, 0.7, 0.8, 0.9])}
    page, _ = report(
        tmp_path, metrics=[], margins=margins(after=after, gammas={0: 0.5, 2: 0.5, 4: 0.25}, longer_B=np.arange(4))
    )
    shown = Page(page).text
    assert "before training: mean 0.05, 75% above 0, 25% beyond gamma" in shown
    assert "update 2: mean 0.125, 75% above 0, 50% beyond gamma" in shown
    assert "after 4 updates: mean 0.625, 100% above 0, 75% beyond gamma" in shown
    assert "gamma = 0.5 to 0.25" in shown and "correlation +1.000" in shown


def test_of_many_evaluations_a_few_are_drawn_with_the_first_and_the_last():
    after = {step: np.random.default_rng(step).normal(size=20) for step in range(0, 101, 5)}
    titles = re.findall(r"(before|after|update \d+)", plots.histograms(after, {}, 100).svg())
    assert titles[0] == "before" and titles[-1] == "after" and len(titles) == plots.SHOWN


def test_without_held_out_pairs_training_pairs_are_looked_at_and_said_to_be(tmp_path):
    page, text = report(tmp_path, metrics=[], results=None, margins=margins(of="training pairs"))
    for said in (page, text):
        assert "Margins of 40 training pairs" in said and "Training pairs with the lowest margins" in said
        assert "held-out ranking accuracy" not in said and "Held-out" not in said


def test_an_objective_without_gamma_has_margins_without_it(tmp_path):
    page, _ = report(tmp_path, metrics=[], margins=margins(gammas={}))
    assert "beyond gamma" not in page and "dashed" not in page and "Margins as training goes on" in page


def test_rows_with_one_answer_have_no_margins_and_what_is_not_measured_has_no_curve(tmp_path):
    lines = [{"step": k, "loss": 1.0, "grad_norm": 1.0, "logps/chosen": -2.0} for k in (1, 2)]
    results = {"pairs": 3, "before": {"active_fraction": 1.0}, "after": {"active_fraction": 1.0}}
    page, text = report(tmp_path, metrics=lines, margins=None, results=results)
    assert re.findall(r"!\[.*\]\((.*)\)", text) == ["loss.png", "logps.png", "grad_norm.png"]
    assert "margins" not in Page(page).text and not (tmp_path / "margins.png").exists()
    assert Page(page).seen.count("svg") == 3


@pytest.mark.parametrize("lines", [[], [{"step": 1, "skipped": "its loss is not finite", "pairs": ["a"]}]])
def test_a_run_without_a_single_good_update_has_a_report_too(tmp_path, lines):
    page, text = report(tmp_path, metrics=lines, margins=None)
    assert ("Skipped" in page) == ("Skipped" in text) == bool(lines)
    assert "last logged update" not in page


def test_what_people_wrote_is_shown_and_never_obeyed(tmp_path):
    shown = readable(tokens([1], [2], [3], name=NASTY), Decoding(), 0.0, 1.0)
    page, text = report(tmp_path, metrics=[], margins=margins(worst=[shown]), about=[NASTY])
    assert "script" not in Page(page).seen and "&lt;script&gt;alert(&#39;x&#39;)" in page
    assert not set("\x00\x1b") & set(page + text) and "\ufffd" in page
    assert f"`````text\n{CONTROLS.sub(chr(0xFFFD), shown.chosen)}\n`````" in text
    assert not any("http" in address for address in Page(page).addresses)


class Decoding:
    def decode(self, ids):
        return NASTY


def test_a_pair_is_shown_as_the_model_reads_it_and_cut_where_it_is_long():
    tokenizer = load_tokenizer(str(STORIES))
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in ("Once upon", " a time", " a cat " * 400)]
    shown = readable(tokens(*ids, name="a"), tokenizer, -1.0, 1.0)
    assert (shown.prompt, shown.chosen) == ("Once upon", "a time") and shown.tokens == (len(ids[1]), len(ids[2]))
    assert len(shown.rejected) < 1000 and shown.rejected.startswith("a cat") and " letters ...] " in shown.rejected
    assert cut("abcdefghijkl", 9) == "abcdef [... 3 letters ...] jkl" and cut("abc", 3) == "abc"


# What a run's folder holds, as facts

ROWS = [
    {"id": f"row-{i}", "prompt": f"Once {i}", "chosen": " upon a time" * (i + 1), "rejected": " a cat"}
    for i in range(6)
]


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Data sets by name: of pairs, one of them empty, and of rows with one answer."""
    folder = tmp_path_factory.mktemp("stores")
    rows = {"pairs": ROWS, "other": ROWS[2:], "unpaired": [{"prompt": "Once", "completion": " upon", "label": True}]}
    rows["pairs"] = [*ROWS, {"prompt": "Once", "chosen": "", "rejected": " x"}]

    def store(name):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[name]), encoding="utf-8")
        tokenizer, options = load_tokenizer(str(STORIES)), TokenOptions(max_length=256)
        return open_store(open_source(str(path), "train"), tokenizer, options, cache_dir=str(folder / "cache"))

    return {name: store(name) for name in rows}


def run_of(folder, train, held_out=None, *, loss=None, reference=False, **hparams):
    """A run of 4 updates that has ended, with what facts_of looks at."""
    section = loss or {"loss_type": "repo", "gamma": 1.0}
    recipe = {"model": {"model_name_or_path": "some/model"}, "loss": section, "run": {"output_dir": str(folder)}}
    known = {
        "recipe": to_recipe(recipe),
        "loss": types.SimpleNamespace(reference=reference, margin_gamma=not reference),
        "hparams": hparams or {"gamma": 1.0},
    }
    known |= {"train": train, "held_out": held_out, "tokenizer": load_tokenizer(str(STORIES)), "total_steps": 4}
    known |= {"mesh": one_device(), "shapes": [RowShape(1, 64, 32)], "gamma_quantile": None}
    return types.SimpleNamespace(**known)


def kept(folder, name, margins):
    np.save(folder / f"margins_{name}.npy", np.float32(margins))


def test_the_facts_are_those_of_the_folder_and_the_data(stores, tmp_path):
    setup = run_of(tmp_path, stores["other"], stores["pairs"], gamma=1.0, gamma_end=0.25)
    for name, values in {
        "before": [5, 4, 3, 2, 1, 0],
        "2": [0, 0, 0, 0, 0, 0],
        "after": [3, np.nan, 5, -1, 4, 1],
        "3": [9] * 6,
    }.items():
        kept(tmp_path, name, values)
    lines = [{"step": 2, "loss": 1.0, "eval_loss": 1.0, "eval_gamma": 0.5}, {"step": 4, "loss": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = facts_of(setup, RunFolder(setup.recipe))
    assert found.title == "repo (gamma 1, gamma_end 0.25) on model" and found.metrics == lines and found.results is None
    # margins_3.npy is of another run: no line tells of it. A pair without a number is left out.
    assert {step: margins_B.tolist() for step, margins_B in found.margins.after.items()} == {
        0: [5, 3, 2, 1, 0],
        2: [0] * 5,
        4: [3, 5, -1, 4, 1],
    }
    assert found.margins.of == "held-out pairs" and found.margins.gammas == {0: 1.0, 2: 0.5, 4: 0.25}
    assert [(one.id, one.before, one.after) for one in found.margins.worst] == [("row-3", 2, -1), ("row-5", 0, 1)]
    assert [(one.id, one.prompt) for one in found.margins.best] == [("row-2", "<s> Once 2"), ("row-4", "<s> Once 4")]
    lengths = stores["pairs"].scored
    np.testing.assert_array_equal(found.margins.longer_B, (lengths[:, 0] - lengths[:, 1])[[0, 2, 3, 4, 5]])
    held_out = found.splits[1]
    assert (held_out.name, held_out.rows, held_out.kept) == ("held-out", 7, 6)
    assert ("pairs with an empty answer or an empty prompt", 1, "dropped") in held_out.reasons
    assert found.versions["jax"] == jax.__version__ and found.versions["devices"] == "1 x cpu"
    assert found.command == f"repo-jax train {tmp_path}/recipe.yaml --output_dir {tmp_path}-again"


def test_without_held_out_data_a_sample_of_the_training_pairs_is_watched(stores, tmp_path, monkeypatch):
    monkeypatch.setattr("repo_jax.report.SAMPLE", 3)
    setup = run_of(tmp_path, stores["pairs"])
    of, store, which = watched(setup)
    assert of == "training pairs" and store is stores["pairs"] and len(which) == 3
    assert facts_of(setup, RunFolder(setup.recipe)).margins is None  # nothing was kept: a run of before
    kept(tmp_path, "before", [0, 1, 2])
    kept(tmp_path, "after", [2, 1, 0])
    [worst] = facts_of(setup, RunFolder(setup.recipe)).margins.worst
    assert worst.id == f"row-{which[2]}"


def test_objectives_without_margins_or_gamma_have_none_and_of_ones_own_there_is_no_command(stores, tmp_path):
    setup = run_of(tmp_path, stores["unpaired"], loss={"loss_type": "kto"}, reference=True, beta=0.1)
    found = facts_of(setup, RunFolder(setup.recipe))
    assert found.margins is None and found.splits[0].kind == "rows"
    setup = run_of(tmp_path, stores["pairs"], loss={"loss_type": "my_loss"}, reference=True, gamma=0.5)
    for when in ("before", "after"):
        kept(tmp_path, when, range(6))
    found = facts_of(setup, RunFolder(setup.recipe))
    assert found.margins.gammas == {} and found.command.startswith("repo_jax.train(repo_jax.load_recipe('")
    assert found.command.endswith(", loss=my_loss)")
    setup = run_of(tmp_path, stores["pairs"], loss={"loss_type": "sigmoid"}, reference=True, beta=0.1)
    assert facts_of(setup, RunFolder(setup.recipe)).command.startswith("repo-jax train ")


@pytest.mark.parametrize("kind, drawn", [("simpo", True), ("alphapo", False), ("repo++_dpo", False)])
def test_gamma_is_drawn_where_it_is_a_margin(stores, tmp_path, kind, drawn):
    setup = run_of(tmp_path, stores["pairs"], loss={"loss_type": kind})
    setup.loss, setup.hparams = make_loss(kind)
    for when in ("before", "after"):
        kept(tmp_path, when, range(6))
    assert bool(facts_of(setup, RunFolder(setup.recipe)).margins.gammas) == drawn


@pytest.mark.parametrize("train, held_out, rows", [
    (ROWS, None, "train_dataset=rows"), (None, ROWS, "eval_dataset=held_out_rows"),
    (ROWS, ROWS[2:], "train_dataset=rows, eval_dataset=held_out_rows"),
])  # fmt: skip
def test_what_was_given_in_python_is_given_again_there(stores, tmp_path, train, held_out, rows):
    setup = run_of(tmp_path, stores["pairs"], loss={"loss_type": "my_loss"})
    setup.recipe = with_rows(setup.recipe, train_dataset=train, eval_dataset=held_out)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(setup.recipe), encoding="utf-8")
    for kind, more in (("my_loss", ", loss=my_loss"), ("repo", "")):
        setup.recipe.loss["loss_type"] = kind
        command = facts_of(setup, RunFolder(setup.recipe)).command
        assert command.startswith("repo_jax.train(repo_jax.load_recipe('") and command.endswith(f", {rows}{more})")
        given = eval(command.removeprefix("repo_jax.train(").partition("), ")[0] + ")", {"repo_jax": repo_jax})
        assert given.run.output_dir == f"{tmp_path}-again"


def test_margins_of_which_none_is_a_number_are_left_out(stores, tmp_path):
    setup = run_of(tmp_path, stores["pairs"])
    kept(tmp_path, "before", [1, 2, 3, np.nan, np.inf, np.nan])
    kept(tmp_path, "after", [np.nan, np.nan, -np.inf, 1, 2, 3])
    found = facts_of(setup, RunFolder(setup.recipe))
    assert found.margins is None
    write_report(tmp_path, found)
    assert "margins.png" not in (tmp_path / "report.md").read_text()


def test_without_what_was_measured_before_there_is_no_table(tmp_path):
    page, text = report(tmp_path, margins=None, results={"pairs": 40, "after": AFTER})
    for said in (page, text):
        assert "held-out ranking accuracy" not in said and "Training" in page
    assert "held-out" in page  # the curves have what was measured after


# Numbers


def test_spearman_goes_by_ranks_and_ties_share_theirs():
    scipy = pytest.importorskip("scipy.stats", reason="the oracle is scipy's")
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 5, 50), rng.normal(size=50)
    assert spearman(x, y) == pytest.approx(scipy.spearmanr(x, y).statistic)
    assert spearman(np.arange(9), np.exp(np.arange(9))) == pytest.approx(1)
    assert spearman(np.zeros(9), np.arange(9)) is None


def test_a_report_of_the_size_of_the_quickstart_takes_seconds(tmp_path):
    rng, n = np.random.default_rng(0), 150
    lines = [METRICS[0] | {"step": k, "loss": rng.random()} for k in range(1, n + 1)]
    after = {step: rng.normal(size=200) for step in range(0, n + 1, 30)}
    given = facts(metrics=lines, total=n, margins=margins(after=after, gammas=dict.fromkeys(after, 1.0), longer_B=rng.integers(-50, 50, 200)))  # fmt: skip
    started = time.process_time()
    write_report(tmp_path, given)
    assert time.process_time() - started < 5
    assert (tmp_path / "report.html").stat().st_size < 1e6


def test_a_long_run_of_many_pairs_has_a_page_that_a_browser_opens_at_once():
    rng, n = np.random.default_rng(0), 20_000
    lines = [{"step": k, "loss": rng.random()} for k in range(1, n + 1)]
    [curve] = plots.curves(lines, {})
    dots = plots.length_scatter(rng.integers(-50, 50, n), rng.normal(size=n))
    for svg in (curve.svg(), dots.svg()):
        assert len(svg) < 300_000 and "data:image/png;base64," in svg


def test_the_summary_lines_up():
    lines = summary_text(BEFORE, AFTER).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2].split()[-2:] == ["-0.230", "0.140"]
