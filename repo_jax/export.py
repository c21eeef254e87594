"""Parameters back to a Hugging Face folder that loads anywhere, verified before it is called done."""

import functools
import json
import math
import pathlib
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from repo_jax.checkpoint import NAME, restore_params
from repo_jax.config import dump_recipe, load_recipe
from repo_jax.data.rows import RowShape, row_batches
from repo_jax.data.schema import PairTokens
from repo_jax.logps import pair_logps
from repo_jax.models import hf
from repo_jax.models.config import DecoderConfig
from repo_jax.models.decoder import Decoder, param_shapes
from repo_jax.sharding import batch_ways, make_mesh, param_shardings
from repo_jax.step import place

TOLERANCE = (
    1e-4  # nats per token by which a reloaded model's mean log-probs may differ from those of the rounded parameters
)
ROUNDING = {"float32": (8, 23), "float16": (5, 10), "bfloat16": (8, 7)}  # bits of exponent and mantissa
HEADING = "# Aligned with repo_jax"  # of the model card, by which an earlier export is known


def export_model(
    params: dict, cfg: DecoderConfig, mesh: Mesh, *, base: pathlib.Path, output: pathlib.Path, card: str
) -> float:
    """Writes a Hugging Face folder (weights, config, generation config, tokenizer, model card) and proves that it reads back.

    `base` holds all of that but weights and card (write_base). Everything is written to a temporary folder, reloaded, its
    log-probs compared, and only then moved to `output`, where it replaces an earlier export. Returns the largest difference
    of a mean log-prob, in nats per token.
    """
    check_output(output)
    output = output.absolute()
    dtype = json.loads((base / "config.json").read_text())["dtype"]
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as temporary:
        folder = pathlib.Path(temporary) / "model"
        shutil.copytree(base, folder)
        hf.to_hf(params, cfg, folder, dtype=dtype)
        (folder / "README.md").write_text(card, encoding="utf-8")
        reloaded = hf.from_hf(folder, DecoderConfig.from_hf(folder), jax.tree.map(lambda leaf: leaf.sharding, params))
        difference = float(np.abs(probe(reloaded, cfg, mesh, dtype) - probe(params, cfg, mesh, dtype)).max())
        if not difference <= TOLERANCE:
            raise RuntimeError(
                f"the exported model's log-probs differ by {difference:.2g} nats per token from the trained one's; nothing was written"
            )
        if output.exists():
            output.rename(pathlib.Path(temporary) / "earlier")
        folder.rename(output)
    return difference


def check_output(output: pathlib.Path) -> None:
    """Refuses to replace anything but an empty folder or an earlier export, which its model card tells."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    card = output / "README.md"
    if not card.is_file() or HEADING not in card.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(f"output '{output}' exists and is not an export of repo-jax; name a new folder")


def write_base(model: str, tokenizer, folder: pathlib.Path) -> None:
    """Everything of a model folder but the weights: config, generation config, and the tokenizer with the run's template and
    end token. A run keeps it, so that its checkpoints can be exported when the model they started from is gone."""
    folder.mkdir(parents=True, exist_ok=True)
    source, eos = pathlib.Path(model), tokenizer.eos_token_id
    config = json.loads((source / "config.json").read_text()) | {
        "eos_token_id": eos,
        "dtype": hf.TensorFiles(source).dtype(DecoderConfig.from_hf(source)),
    }
    config.pop("torch_dtype", None)  # transformers 4's name of dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    stored = source / "generation_config.json"
    generation = json.loads(stored.read_text()) if stored.is_file() else {"bos_token_id": config.get("bos_token_id")}
    ends = generation.get("eos_token_id")
    # A chat model may stop at several tokens; the list is kept if the run's end token is among them.
    generation["eos_token_id"] = ends if isinstance(ends, list) and eos in ends else eos
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tokenizer.save_pretrained(folder)


def probe(params: dict, cfg: DecoderConfig, mesh: Mesh, dtype: str) -> np.ndarray:
    """Mean log-probs, computed in float32, of a few fixed answers of random tokens: a fingerprint of the parameters as they
    are once rounded to dtype."""
    rng = np.random.default_rng(0)
    length = min(16, cfg.max_positions // 3)
    R = batch_ways(mesh)
    scored = np.ones(length, bool)
    pairs = [
        PairTokens(f"probe {i}", "", *rng.integers(cfg.V, size=(3, length), dtype=np.int32), scored, scored)
        for i in range(R)
    ]
    batch = row_batches(pairs, RowShape(R, 3 * length, 2 * length))[0]
    with jax.set_mesh(mesh):
        means_B2 = _fingerprint(params, place(batch, mesh), model=Decoder(cfg, jnp.float32), bits=ROUNDING[dtype])
    return np.asarray(jax.device_get(means_B2))


@functools.partial(jax.jit, static_argnames=("model", "bits"))
def _fingerprint(params, batch, *, model: Decoder, bits: tuple[int, int]):
    # reduce_precision, for XLA may drop a cast there and back.
    return pair_logps(model, jax.tree.map(lambda leaf: jax.lax.reduce_precision(leaf, *bits), params), batch).mean_B2


def model_card(recipe_yaml: str, *, base: str, results: dict | None) -> str:
    """README.md of an exported model: where it came from, the recipe, and what was measured."""
    lines = [
        "---",
        "library_name: transformers",
        "tags: [preference-optimization, repo_jax]",
        "---",
        "",
        HEADING,
        "",
    ]
    lines += [f"Started from `{base}`.", ""]
    if results is not None:
        lines += [f"On {results['pairs']} held-out pairs:", "", "| | before | after |", "| --- | --- | --- |"]
        for name in results["after"]:
            lines.append(f"| {name} | {results['before'][name]:.4f} | {results['after'][name]:.4f} |")
        lines.append("")
    return "\n".join([*lines, "## Recipe", "", "```yaml", recipe_yaml.rstrip(), "```", ""])


def run_of(checkpoint: str) -> pathlib.Path:
    """The run's folder around a checkpoint. Raises FileNotFoundError for what is not a checkpoint of a run."""
    path = pathlib.Path(checkpoint).absolute()
    if not NAME.fullmatch(path.name) or not path.is_dir() or not (path.parent / "base" / "config.json").is_file():
        raise FileNotFoundError(
            f"'{checkpoint}' is not a checkpoint-N folder in the folder of a run; give the path of one"
        )
    return path.parent


def export_checkpoint(checkpoint: pathlib.Path, run: pathlib.Path, output: pathlib.Path) -> float:
    """A checkpoint of any mesh as a Hugging Face folder; the model the run started from is not needed.

    The parameters are spread over as many of this machine's devices as divide the model's width.
    """
    cfg = DecoderConfig.from_hf(run / "base")
    ways = math.gcd(cfg.D, jax.device_count())
    mesh = make_mesh(1, ways, 1, devices=jax.devices()[:ways])
    shapes = param_shapes(cfg)
    params = restore_params(checkpoint, shapes, param_shardings(shapes, mesh))
    recipe = load_recipe(run / "recipe.yaml")
    card = model_card(dump_recipe(recipe), base=recipe.model.model_name_or_path, results=None)
    return export_model(params, cfg, mesh, base=run / "base", output=output, card=card)
