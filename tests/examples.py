"""What several tests work on: the small real model, and pairs of tokens with known lengths."""

import pathlib

import jax
import numpy as np

from repo_jax.data.chat import PairTokenizer, Tokenized, TokenOptions
from repo_jax.data.schema import PairTokens, PreferenceExample
from repo_jax.models.config import DecoderConfig
from repo_jax.models.decoder import param_shapes
from repo_jax.models.hf import from_hf
from repo_jax.sharding import make_mesh, param_shardings

ROOT = pathlib.Path(__file__).parents[1]
ASSETS = ROOT / "assets"
STORIES = ASSETS / "stories260K"

TINY = DecoderConfig(D=16, F=24, N=4, K=2, H=4, V=50, L=3, max_positions=64)


def short_pairs(folder: pathlib.Path) -> pathlib.Path:
    """data/ in the folder: 32 short real pairs to train on and 16 held out."""
    rows = (ASSETS / "preferences" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    short = [row for row in rows if len(row) < 600][:48]
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text("\n".join(short[:32]) + "\n", encoding="utf-8")
    (folder / "data" / "test.jsonl").write_text("\n".join(short[32:]) + "\n", encoding="utf-8")
    return folder / "data"


def one_device():
    return make_mesh(1, 1, 1, devices=jax.devices()[:1])


def stories(mesh=None) -> tuple[DecoderConfig, dict]:
    """assets/stories260K and its parameters on a mesh."""
    cfg = DecoderConfig.from_hf(STORIES)
    return cfg, from_hf(STORIES, cfg, param_shardings(param_shapes(cfg), mesh or one_device()))


def random_params(cfg: DecoderConfig, seed: int = 0) -> dict:
    """Random parameters, norms included, large enough that logits have a standard deviation above 1."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: np.float32(rng.normal(scale=0.3, size=leaf.shape) + (leaf.ndim <= 1)), param_shapes(cfg)
    )


def tokenize(tokenizer, example: PreferenceExample, **options) -> Tokenized:
    """What becomes of one example, by itself."""
    [result] = PairTokenizer(tokenizer, TokenOptions(**options))([example])
    return result


def tokens(prompt, chosen, rejected, masks=None, *, name: str = "pair", where: str | None = None) -> PairTokens:
    """A pair of these ids; without masks every token of the answers is scored."""
    ids = [np.asarray(part, np.int32) for part in (prompt, chosen, rejected)]
    masks = (
        [np.ones(len(part), bool) for part in ids[1:]] if masks is None else [np.array(mask, bool) for mask in masks]
    )
    return PairTokens(name, name if where is None else where, *ids, *masks)


def pair_of(
    rng: np.random.Generator, lengths: tuple[int, int, int], *, V: int, masks=None, name: str = "pair"
) -> PairTokens:
    return tokens(*(rng.integers(1, V, size=n, dtype=np.int32) for n in lengths), masks, name=name)


def random_pairs(n: int, *, V: int, seed: int = 0, most: int = 20) -> list[PairTokens]:
    """n pairs whose prompt and answers have 1 to `most` tokens each."""
    rng = np.random.default_rng(seed)
    return [pair_of(rng, tuple(rng.integers(1, most + 1, size=3)), V=V, name=f"pair {i}") for i in range(n)]


def equations_of(jaxpr):
    """Everything a program does, loops and calls included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations_of(inner)
