"""The notebooks run from a clean kernel in their small sizes, and what is committed of them is whole, clean and has figures."""

import os
import re
import tomllib

import nbclient
import nbformat
import pytest
from examples import ROOT

NAMES = ["01_align_a_small_model", "02_margins_and_gammas", "03_to_hugging_face_and_back", "04_plan_a_pod"]
FIGURES = {NAMES[0]: 1, NAMES[1]: 5, NAMES[2]: 1, NAMES[3]: 2}  # at least; one of 03's needs torch
USED = ["repo_jax", "assets", "configs", "benchmarks"]  # of the checkout
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs_of(notebook) -> list:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def figures_in(notebook) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs_of(notebook))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """What a clone has, in a folder of its own; runs of one notebook find the programs that another has compiled."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "notebooks").mkdir()
    for name in USED:
        (folder / name).symlink_to(ROOT / name)
    return folder


def test_every_notebook_is_tested():
    assert sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", [NAMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])])
def test_it_runs_from_a_clean_kernel_and_draws_its_figures(name, checkout):
    notebook = read(name)
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    environment = os.environ | {
        "REPO_JAX_NOTEBOOK": "ci",
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "IPYTHONDIR": str(checkout / "ipython"),
    }
    for option in ("MPLBACKEND", "JAX_NUM_CPU_DEVICES", "XLA_FLAGS"):  # a kernel starts with its own
        environment.pop(option, None)
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(checkout / "notebooks")}}
    )
    client.execute(env=environment)  # raises CellExecutionError, with the cell, where one fails
    assert figures_in(notebook) >= FIGURES[name]
    assert "the sizes of the tests" in "".join(o.get("text", "") for o in outputs_of(notebook))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_committed_was_run_to_its_end_and_shows_figures(name):
    notebook = read(name)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert cells[0].outputs and not [output for output in outputs_of(notebook) if output.output_type == "error"]
    assert figures_in(notebook) >= FIGURES[name]
    assert not [output for output in outputs_of(notebook) if output.get("name") == "stderr"]
    assert "the sizes of the tests" not in str(outputs_of(notebook))  # a reader's


@pytest.mark.parametrize("name", NAMES)
def test_what_is_committed_says_nothing_of_the_machine_it_ran_on(name):
    text = (ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8")
    assert len(text) < 400_000
    notebook = read(name)
    for output in outputs_of(notebook):
        words = output.get("text", "") + "".join(
            body for kind, body in output.get("data", {}).items() if kind.startswith("text/")
        )
        assert not re.search(r"(?<![\w.:/])/(home|root|work|tmp|usr|Users|content|opt)/", words), words
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec == {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert notebook.metadata.language_info == {"name": "python"}
    assert not [cell for cell in notebook.cells if cell.metadata]


@pytest.mark.parametrize("name", NAMES)
def test_badges_and_first_cell_lead_to_the_repository_that_pyproject_names(name):
    notebook = read(name)
    path = REPOSITORY.removeprefix("https://github.com/")
    at = f"{path}/blob/main/notebooks/{name}.ipynb"
    assert f"(https://colab.research.google.com/github/{at})" in notebook.cells[0].source
    assert f"(https://kaggle.com/kernels/welcome?src=https://github.com/{at})" in notebook.cells[0].source
    assert f'REPOSITORY = "{REPOSITORY}"\n' in code_cells(notebook)[0].source
    assert set(re.findall(r"github\.com/([\w.-]+/[\w.-]+)", str(notebook.cells))) <= {path}


def test_the_first_cell_is_the_same_everywhere_but_for_the_devices_that_a_cpu_plays():
    first = {
        code_cells(read(name))[0].source.replace('os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")\n', "")
        for name in NAMES
    }
    assert len(first) == 1


def test_links_between_notebooks_lead_somewhere():
    for name in NAMES:
        source = "\n".join(cell.source for cell in read(name).cells)
        for target in re.findall(r"\]\((\w+\.ipynb)\)", source):
            assert (ROOT / "notebooks" / target).is_file(), f"{name} links to {target}"
