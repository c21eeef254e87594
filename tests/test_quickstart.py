"""The quickstart does what it says, over seeds, and the other way round on swapped pairs. Minutes: pytest -m slow."""

import json

import pytest
import yaml
from examples import ASSETS, ROOT, STORIES

from repo_jax import load_recipe, train

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
    changes = {
        "model.model_name_or_path": str(STORIES),
        "data.dataset_name": str(data),
        "data.cache_dir": str(tmp_path / "cache"),
        "run.output_dir": str(tmp_path / "run"),
        "run.seed": seed,
        "mesh.data": 8,  # the tests have eight devices
        "mesh.fsdp": 1,
        "data.rows_per_device": 1,
    }
    folder = train(load_recipe(ROOT / "configs" / "quickstart.yaml", changes))
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
