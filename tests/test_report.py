import numpy as np

from repo_jax.report import summary_text, write_report

BEFORE = {"rewards/accuracies": 0.4, "mean_margin": -0.23, "active_fraction": 0.81}
AFTER = {"rewards/accuracies": 0.56, "mean_margin": 0.14, "active_fraction": 0.805}
METRICS = [{"step": k, "loss": 1 / k, "active_fraction": 0.9 - 0.1 * k, "grad_norm": 2.0} for k in range(1, 5)]


def test_the_report_shows_the_numbers_and_every_plot_it_names(tmp_path):
    results = {"pairs": 3, "before": BEFORE, "after": AFTER}
    margins = (np.array([-0.5, 0.0, 0.1]), np.array([0.0, 0.3, 0.6]))
    path = write_report(
        tmp_path, metrics=METRICS, margins=margins, results=results, gamma=0.5, about=["repo on a model"]
    )
    text = path.read_text()
    assert (
        "| held-out ranking accuracy | 0.4000 | 0.5600 |" in text
        and "| mean margin (nats per token) | -0.2300 | 0.1400 |" in text
    )
    assert "repo on a model" in text and "| loss | 0.25 |" in text
    for plot in ("loss.png", "margins.png", "active_fraction.png"):
        assert f"({plot})" in text
        assert (tmp_path / plot).read_bytes().startswith(b"\x89PNG")


def test_without_held_out_pairs_there_is_no_histogram_and_no_table(tmp_path):
    text = write_report(tmp_path, metrics=METRICS, margins=None, results=None, gamma=0.5, about=["x"]).read_text()
    assert "margins.png" not in text and "before" not in text and "loss.png" in text
    assert not (tmp_path / "margins.png").exists()


def test_the_summary_lines_up():
    lines = summary_text(BEFORE, AFTER).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2].split()[-2:] == ["-0.230", "0.140"]


def test_what_belongs_to_a_line_about_the_run_stands_below_it(tmp_path):
    about = ["training: 3 pairs", "  1 of 4 rows dropped", "  warning: 2 of 4 rows kept", "held-out: 2 pairs"]
    text = write_report(tmp_path, metrics=METRICS, margins=None, results=None, gamma=0.5, about=about).read_text()
    assert "- training: 3 pairs\n  - 1 of 4 rows dropped\n  - warning: 2 of 4 rows kept\n- held-out: 2 pairs\n" in text
