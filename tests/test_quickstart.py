"""The quickstart does what it says, over seeds, and the other way round on swapped pairs. Minutes: pytest -m slow."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from examples import ASSETS, ROOT, STORIES

pytestmark = pytest.mark.slow


def measured(tmp_path, *, seed: int, swap: bool = False) -> tuple[float, float]:
    """How much held-out ranking accuracy and mean margin rise; with swap the training pairs are the wrong way round."""
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "test"):
        rows = [
            json.loads(row)
            for row in (ASSETS / "preferences" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        if swap and split == "train":
            rows = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    flags = {
        "model_name_or_path": STORIES,
        "dataset_name": data,
        "cache_dir": tmp_path / "cache",
        "output_dir": tmp_path / "run",
    }
    arguments = [f"--{name}={value}" for name, value in (flags | {"seed": seed}).items()]
    # A process of its own, on one device, as a user starts it; the tests have eight.
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "repo_jax", "train", str(ROOT / "configs" / "quickstart.yaml"), *arguments]
    subprocess.run(command, env=environment, check=True)
    folder = tmp_path / "run"
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["run"]["seed"] == seed
    results = json.loads((folder / "eval_results.json").read_text())
    return tuple(results["after"][name] - results["before"][name] for name in ("rewards/accuracies", "mean_margin"))


@pytest.mark.parametrize("seed", [42, 43, 44])
def test_accuracy_and_margin_rise(tmp_path, seed):
    accuracy, margin = measured(tmp_path, seed=seed)
    assert accuracy >= 0.10 and margin >= 0.2


def test_on_swapped_pairs_both_fall(tmp_path):
    accuracy, margin = measured(tmp_path, seed=42, swap=True)
    assert accuracy < 0 and margin < 0
