"""benchmarks/small_scale_study.py: the arithmetic of its tables on invented results, and that its one program has the package's objectives."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
REPO, SIMPO = {"loss_type": "repo", "gamma": 1.0}, {"loss_type": "simpo", "beta": 3.0, "gamma": 1.0}


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from study import tables

    return tables


def run(margins, *, seed=1, loss=REPO, active=(8, 8, 4, 4, 0), rate=1e-3, model="stories260K") -> dict:
    held_out = {
        "accuracy": float(np.mean(np.array(margins) > 0)),
        "ratio_accuracy": 0.5,
        "mean_margin": np.mean(margins),
    }
    held_out |= {"logp_chosen": -2.0, "logp_rejected": -3.0, "margins": list(margins)}
    numbers = {"active_pairs": list(active), "margin": [0.1] * len(active), "held_out": held_out, "cpu_s": 60.0}
    return {"model": model, "loss": loss, "learning_rate": rate, "seed": seed} | numbers


def test_a_difference_is_supported_where_every_seed_and_most_pairs_say_so(tables):
    right, wrong = [0.5] * 30, [-0.5] * 20 + [0.5] * 10
    ones, others = ([run(margins, seed=seed) for seed in (1, 2, 3)] for margins in (right, wrong))
    found = tables.difference(ones, others)
    assert found["mean"] == pytest.approx(2 / 3)
    assert found["interval"][0] < 2 / 3 < found["interval"][1]
    assert found["supported"]
    assert tables.difference(others, ones)["mean"] == pytest.approx(-2 / 3)


def test_a_difference_that_one_seed_contradicts_is_not_supported(tables):
    right, wrong = [0.5] * 30, [-0.5] * 20 + [0.5] * 10
    ones = [run(right, seed=1), run(right, seed=2), run(wrong, seed=3)]
    others = [run(wrong, seed=1), run(wrong, seed=2), run(right, seed=3)]
    assert not tables.difference(ones, others)["supported"]


def test_a_difference_of_few_pairs_is_not_supported(tables):
    ones, others = (
        [run(margins, seed=seed) for seed in (1, 2, 3)] for margins in ([1.0] * 29 + [0.1], [1.0] * 29 + [-0.1])
    )
    assert not tables.difference(ones, others)["supported"]


def test_a_difference_compares_seeds_that_both_have(tables):
    ones, others = (
        [run([1.0, 1.0], seed=1), run([-1.0, -1.0], seed=4)],
        [run([-1.0, 1.0], seed=1), run([1.0, 1.0], seed=2)],
    )
    assert tables.difference(ones, others)["by_seed"] == [0.5]
    assert tables.difference(ones[1:], others) is None


def test_filtered_pairs_are_counted_by_part_of_training(tables):
    runs = [
        run([0.1], active=[8, 8, 4, 4, 2, 2, 0, 0, 0, 8]),
        run([0.1], seed=2, active=[8, 8, 4, 4, 6, 6, 0, 0, 0, 8]),
    ]
    np.testing.assert_allclose(tables.filtered(runs, 8), [0, 0.5, 0.5, 1, 0.5])


def test_the_limit_counts_pairs_on_the_same_side_and_margins_apart(tables):
    found = tables.of_limit(
        run([1.0, -1.0, 0.5, 0.2]), run([0.5, -1.5, -0.5, 0.2], loss=SIMPO), {"distance": 0.3, "cosine": 0.9}
    )
    assert found["same_side"] == 0.75
    assert found["margins_apart"] == pytest.approx((0.5 + 0.5 + 1 + 0) / 4)
    assert (found["distance"], found["loss"], found["seed"]) == (0.3, SIMPO, 1)


def test_pairs_of_which_the_longer_answer_is_higher_are_counted_without_those_of_equal_length(tables):
    start = {"held_out_lengths": [[9, 3], [3, 9], [5, 5], [8, 2]], "held_out": {"margins": [0.0, 0.5, 0.5, -2.0]}}
    runs = [run([1.0, 1.0, 1.0, -1.0])]
    assert tables.goes_by_length(runs, start) == pytest.approx([1 / 3])
    assert tables.grown(runs, start) == pytest.approx([1.0])
    assert tables.goes_by_length([], start).size == 0


def test_spread_says_mean_and_range(tables):
    assert tables.spread([0.5, 0.6, 0.7]) == "0.600 (0.500 to 0.700)"
    assert tables.spread([0.5], 2) == "0.50"
    assert tables.spread([]) == "not run"


def study_of(runs) -> dict:
    model, methods = "stories260K", {"RePO": REPO, "SimPO": SIMPO}
    start = {"parameters": 260032, "vocabulary": 512, "train_margins": [-1.0, 0.0, 0.5, 2.0]}
    start |= {"train_lengths": [[3, 2]], "held_out_lengths": [[9, 3], [3, 9]], "cpu_s": 1.0}
    start["held_out"] = {
        "accuracy": 0.4,
        "mean_margin": -0.2,
        "logp_chosen": -3.0,
        "logp_rejected": -2.8,
        "margins": [-1.0, 2.0],
    }
    plan = {"models": [model], "methods": {model: methods}, "rates": [1e-3, 3e-3], "gammas": [0.5, 1.0], "betas": [3.0]}
    plan |= {
        "dpo_betas": [{"loss_type": "dpo", "beta": 0.1}],
        "schedules": [REPO | {"gamma_end": 0.2}],
        "seeds": [1, 2],
    }
    plan |= {"chosen": {model: {"RePO": 1e-3, "SimPO": 3e-3}}, "updates": 5, "train_batch_size": 8}
    about = {"finished": len(runs), "planned": 9, "cpu_minutes": 3.0, "jax": "0", "workers": 2}
    return {"about": about, "plan": plan, "starts": {model: start}, "runs": runs, "limit": []}


def test_tables_report_the_chosen_rate_without_the_seed_that_chose_it(tables):
    runs = [
        run([1.0, -1.0], seed=0),
        run([1.0, 1.0], seed=1),
        run([1.0, 1.0], seed=2),
        run([-1.0, -1.0], seed=1, rate=3e-3),
    ]
    text = tables.as_markdown(study_of(runs))
    assert "| RePO (gamma 1) | 0.001 | 2 | 1.000 (1.000 to 1.000) |" in text
    assert "| RePO | 0.500, 0.00 | not run | 0.001 |" in text
    assert "| 1 | 0.75 | 2 |" in text  # three of the four first margins are below 1
    assert "RePO (gamma 1 -> 0.2) | 0 | not run" in text


def test_tables_go_between_their_marks_and_the_rest_stays(tables):
    once = tables.put_in("# Study\n\nConclusions.\n", "old")
    again = tables.put_in(once + "\nMore.\n", "new")
    assert "Conclusions." in again
    assert "More." in again
    assert "new" in again
    assert "old" not in again


def test_the_rate_taken_is_the_lowest_of_those_that_rank_about_as_well_as_the_best(tables):
    import small_scale_study

    right, worse = [1.0] * 100, [1.0] * 90 + [-1.0] * 10
    runs = [run(worse, seed=0, rate=3e-4), run([*right[:-1], -1.0], seed=0, rate=1e-3), run(right, seed=0, rate=3e-3)]
    assert small_scale_study.best_rate(runs, "stories260K", REPO) == 1e-3
    assert small_scale_study.best_rate(runs, "stories260K", SIMPO) is None


@pytest.mark.parametrize(
    "given",
    [REPO, SIMPO, REPO | {"gamma_end": 0.2}, {"loss_type": "repo++"}, {"loss_type": "dpo"}, {"loss_type": "sft"}],
    ids=str,
)
def test_the_one_program_of_all_runs_has_the_objective_of_the_package(tables, given):
    from study.runs import numbers_of, one_of_them

    from repo_jax.losses import PairLogps, make_loss

    rng = np.random.default_rng(0)
    lengths_B2 = rng.integers(3, 9, (4, 2)).astype(np.float32)
    pairs = PairLogps(-rng.uniform(1, 3, (4, 2)).astype(np.float32) * lengths_B2, lengths_B2, -2 * lengths_B2)
    loss, hparams = make_loss(**given)
    numbers = {name: x for name, x in hparams.items() if not isinstance(x, str)}
    np.testing.assert_allclose(
        one_of_them(pairs, progress=0.3, **numbers_of(given)), loss(pairs, progress=0.3, **numbers).values, rtol=1e-6
    )


@pytest.mark.slow
def test_the_quick_study_runs_to_its_tables_and_goes_on_from_what_is_finished(tmp_path):
    command = [sys.executable, "benchmarks/small_scale_study.py", "--quick", "--cache", str(tmp_path)]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    study = json.loads((tmp_path / "quick" / "small-scale-study.json").read_text(encoding="utf-8"))
    assert study["about"]["finished"] == study["about"]["planned"]
    assert "not run" not in (tmp_path / "quick" / "small_scale_study.md").read_text(encoding="utf-8")
    assert (tmp_path / "quick" / "small-scale-study" / "grid.png").is_file()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert " seed 1" in first.stdout
    assert " seed 1" not in again.stdout
