"""Preference optimisation for language models in JAX; the commands' functions, imported on first use.

recipe = repo_jax.load_recipe("configs/quickstart.yaml")
folder = repo_jax.train(recipe)  # or train_dataset=rows, where the recipe names no data
repo_jax.evaluate(folder / "hf", eval_dataset=rows)
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "load_recipe": "config",
    "train": "training",
    "evaluate": "evaluation",
    "score": "evaluation",
    "generate": "answers",
    "from_hf": "folders",
    "to_hf": "folders",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'repo_jax' has no attribute '{name}'; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"repo_jax.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
