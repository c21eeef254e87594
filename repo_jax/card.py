"""The model card of an export: where the model came from, the recipe, and what was measured."""

import pathlib
import re
from typing import Literal

import huggingface_hub
import yaml

from repo_jax.losses import ALIASES, DEFAULT_LOSS, LOSSES
from repo_jax.models.hub import is_hub_name

HEADING = "# Aligned with repo_jax"  # by which an earlier export is known
FILES = (".jsonl", ".json", ".gz", ".parquet", ".arrow")  # of data; no data set on the Hub is called so


def model_card(
    recipe_yaml: str,
    *,
    base: str,
    results: dict | None,
    folder: pathlib.Path | None = None,
    library_name: Literal["transformers", "peft"] = "transformers",
) -> str:
    """README.md of an exported model, as the Hub reads it: where it came from, the recipe, and what was measured.

    `base` is the model it started from, by the name in the recipe; `folder` holds that model's own card, which says its licence.
    Folders of this machine are left out: a card may be published.
    """
    recipe = _public(yaml.safe_load(recipe_yaml) or {})
    loss_type, data = recipe.get("loss", {}).get("loss_type", DEFAULT_LOSS), recipe.get("data", {})
    datasets = [name for name in (data.get("dataset_name"), *(data.get("dataset_mixer") or ())) if name]
    metadata = {"library_name": library_name, "pipeline_tag": "text-generation"} | _licence(folder, base)
    if _on_hub(base):
        relation = "adapter" if library_name == "peft" else "finetune"
        metadata |= {"base_model": base, "base_model_relation": relation}
    if any(map(_on_hub, datasets)):
        metadata["datasets"] = [name for name in datasets if _on_hub(name)]
    losses = loss_type if isinstance(loss_type, list) else [loss_type]
    alone = losses == ["sft"]  # which learns no preferences
    metadata["tags"] = [*([] if alone else ["preference-optimization"]), *losses, "repo_jax"]
    revision = recipe.get("model", {}).get("model_revision")
    start = f"`{_public(base)}`" + (f" (revision `{revision}`)" if revision else "")
    by = " + ".join(map(_cited, losses))
    pairs = f"on {'answers' if alone else 'preference pairs'}" + (
        f" of {' and '.join(f'`{name}`' for name in datasets)}" if datasets else ""
    )
    lines = ["---", _dump(metadata), "---", "", HEADING, "", f"Started from {start} and trained by {by} {pairs}.", ""]
    if results is not None and {"before", "after"} <= results.keys():
        lines += [f"On {results['pairs']} held-out pairs:", "", "| | before | after |", "| --- | --- | --- |"]
        for name in results["after"]:
            lines.append(f"| {name} | {results['before'][name]:.4f} | {results['after'][name]:.4f} |")
        lines.append("")
    shown = _dump(recipe)
    fence = "````" if "```" in shown else "```"  # a chat template may hold some
    return "\n".join([*lines, "## Recipe", "", f"{fence}yaml", shown, fence, ""])


def _cited(loss_type: str) -> str:
    loss = LOSSES.get(ALIASES.get(loss_type, loss_type))  # none: a loss of the user's own
    paper = re.search(r"arXiv:([\d.]+\d)", (loss.fn.__doc__ if loss else None) or "")
    return f"`{loss_type}`" + (f" ([arXiv:{paper[1]}](https://arxiv.org/abs/{paper[1]}))" if paper else "")


def _dump(tree: dict) -> str:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).rstrip() if tree else ""


def _public(value):
    """A part of a recipe without what is only where it ran: the run's folders, and the way to other files but for its end."""
    if isinstance(value, dict):
        found = {}
        for name, part in value.items():
            shown = _public(name)
            if name not in ("output_dir", "cache_dir", "compile_cache_dir"):
                found[f"{shown} ({len(found) + 1})" if shown in found else shown] = _public(part)
        return found
    if isinstance(value, str) and re.fullmatch(r"(/|\w[\w+.-]*://).+", value):
        return pathlib.PurePosixPath(value).name
    return value


def _on_hub(name: str) -> bool:
    """Whether a name can only be one on the Hub."""
    return is_hub_name(name) and not pathlib.Path(name).exists() and pathlib.Path(name).suffix not in FILES


def _licence(folder: pathlib.Path | None, base: str) -> dict:
    """What a base model's card says of its licence; a card that cannot be read says nothing."""
    try:
        stored = {} if folder is None else huggingface_hub.metadata_load(folder / "README.md") or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    found = {name: stored[name] for name in ("license", "license_name", "license_link") if stored.get(name)}
    if "://" not in (link := found.get("license_link", "://")):  # a file of the base's repository
        found.pop("license_link")
        if _on_hub(base):
            found["license_link"] = f"https://huggingface.co/{base}/blob/main/{link}"
    return found
