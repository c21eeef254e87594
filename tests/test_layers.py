"""The shape of the house: a file imports from lower layers only, and what must stay light stays light."""

import ast
import re
import subprocess
import sys

import pytest
from examples import ROOT

# Within a layer a file may import those named before it.
LAYERS = [
    ["losses.types", "losses.parts", "losses.reference_free", "losses.with_reference", "losses.batch", "losses.unpaired", "losses.combine", "losses",
     "losses.catalogue", "sharding", "hardware", "hlo", "topology", "urls", "terminal", "models.config", "models.hub", "models.tensors", "data.sources", "data.schema", "data.special",
     "data.template", "data.official", "data.weights", "data.chat", "data.store", "data.groups"],
    ["trainers", "foreign", "config", "card", "distributed", "models.attention", "models.blocked", "models.views", "models.splash", "models.triton", "models.flash", "models.hf",
     "data.rows", "data.batches"],
    ["models.decoder", "models.lora", "models.pretrained", "optimizer", "stores", "flops"],
    ["logps", "state", "metrics"],
    ["step", "checkpoint", "preparation", "memory", "programs", "generation", "rewards"],
    ["reference", "evaluation", "inspection", "export", "folders", "plots", "planning"],
    ["run_folder", "progress", "report", "trackers"],
    ["training", "answers", "benchmark"],
    ["cli"],
    ["__main__", "__init__"],
]  # fmt: skip
# What jax has nowhere else: its TPU kernels, the language of our GPU kernels, and devices that are not there.
EXPERIMENTAL = {
    "jax.experimental.pallas",
    "jax.experimental.pallas.ops.tpu",
    "jax.experimental.pallas.triton",
    "jax.experimental.topologies",
    "jax.experimental.multihost_utils",
}
ORDER = [name for layer in LAYERS for name in layer]
FILES = sorted(path for path in (ROOT / "repo_jax").rglob("*.py") if path.read_text().strip())


def name_of(path) -> str:
    parts = path.relative_to(ROOT / "repo_jax").with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def imports_of(path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("repo_jax"):
            module = node.module.removeprefix("repo_jax").lstrip(".")
            inner = {f"{module}.{alias.name}".lstrip(".") for alias in node.names}
            found |= (inner & set(ORDER)) or {module}
    return found


def test_every_file_has_a_layer():
    assert {name_of(path) for path in FILES} <= set(ORDER)
    assert {name for name in ORDER if name != "__init__"} <= {name_of(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_imports_only_what_stands_below_it(path):
    below = ORDER[: ORDER.index(name_of(path))]
    assert imports_of(path) <= set(below)


@pytest.mark.parametrize(
    "module, heavy",
    [
        ("repo_jax", ["jax", "transformers", "tensorflow_datasets"]),
        ("repo_jax.data.sources", ["jax", "transformers", "datasets", "pyarrow"]),
        ("repo_jax.data.rows", ["jax", "transformers"]),
        ("repo_jax.data.store", ["jax", "tensorflow", "datasets"]),
        ("repo_jax.inspection", ["jax", "tensorflow", "datasets"]),
        ("repo_jax.config", ["jax"]),
        ("repo_jax.training", ["tensorflow"]),
    ],
)
def test_importing_one_thing_does_not_drag_in_another(module, heavy):
    code = f"import {module}, sys; print([name for name in {heavy} if name in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_no_file_reaches_into_private_or_deprecated_jax():
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        for forbidden in ("jax._src", "with mesh:", "import torch", "import tensorflow\n"):
            assert forbidden not in text, f"{path} has {forbidden}"
        assert set(re.findall(r"jax\.experimental[\w.]*", text)) <= EXPERIMENTAL, path
