"""Every family against transformers' own model on torch: tiny random checkpoints, 40 tokens, windows of 8."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import CHECKPOINTS, V, folder_of, random_ids, torch_logps, torch_scores
from examples import one_device, random_params, tokens
from flax.traverse_util import flatten_dict, unflatten_dict

from repo_jax.data.rows import RowBatch, RowShape, row_batches
from repo_jax.logps import Head, Softmax, exact_matmuls, pair_logps, token_logps
from repo_jax.models.config import DecoderConfig, Rope
from repo_jax.models.decoder import Decoder, output_head, param_shapes
from repo_jax.models.hf import from_hf
from repo_jax.sharding import param_shardings

CAUSAL = [name for name in CHECKPOINTS if not name.endswith("reward")]
# One of each family, with windows where it can have them.
FAMILIES = [
    "llama",
    "mistral-window",
    "qwen2-window",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3-untied",
    "phi3-window",
    "olmo2",
]
CLOSE = 1e-4
FAR = 10 * CLOSE

# One prompt and two answers each. Sequences of the first two are longer than any window, prompts shared, rows shared.
PAIRS = [
    tokens(*np.split(random_ids(58, seed=1), [20, 38]), name="long"),
    tokens(*np.split(random_ids(47, seed=2), [5, 17]), name="uneven"),
    tokens(*np.split(random_ids(9, seed=3), [3, 4]), name="short"),
]
SHAPE = RowShape(R=1, T=120, S=96)
PACKED = row_batches(PAIRS, SHAPE)  # neighbours in one row
ALONE = np.eye(len(PAIRS), dtype=bool)[..., None] & np.ones(2, bool)
PADDED = [
    batch for one in ALONE for batch in row_batches(PAIRS, SHAPE, wanted_B2=one)
]  # a pair per row, padding behind it


@functools.cache
def imported(name: str) -> tuple[DecoderConfig, dict]:
    cfg = DecoderConfig.from_hf(folder_of(name))
    return cfg, from_hf(folder_of(name), cfg, param_shardings(param_shapes(cfg), one_device()))


# Compiling is what takes time here, and optimising is most of that.
quickly = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(quickly, static_argnames=("cfg", "dtype"))
def scored(cfg: DecoderConfig, params, batch: RowBatch, dtype=jnp.float32):
    """The log-prob of every scored token."""
    with exact_matmuls(dtype):
        hidden_RTD = Decoder(cfg, dtype).apply(
            {"params": params}, batch.tokens_RT, batch.positions_RT, batch.segments_RT, batch.prompts_RT
        )
        source_RSD = jnp.take_along_axis(hidden_RTD, batch.sources_RS[..., None], axis=1)
        return token_logps(source_RSD, Head(output_head(params), Softmax(cfg.V, cfg.logit_softcap)), batch.targets_RS)


def ours(cfg, params, batches=PADDED, **options) -> np.ndarray:
    """The log-probs of all answers' tokens, pair by pair."""
    found = {}
    for batch in batches:
        logps_RS = np.asarray(scored(cfg, params, batch, **options))
        for answer in np.unique(batch.answers_RS[batch.answers_RS < 2 * len(PAIRS)]):
            found[answer] = logps_RS[batch.answers_RS == answer]
    return np.concatenate([found[answer] for answer in sorted(found)])


@functools.cache
def theirs(name: str) -> np.ndarray:
    """The same from torch, each answer by itself behind its prompt."""
    return np.concatenate(
        [
            torch_logps(name, np.concatenate([pair.prompt, branch]))[len(pair.prompt) - 1 :]
            for pair in PAIRS
            for branch in pair.branches
        ]
    )


@pytest.mark.parametrize("name", CAUSAL)
def test_log_probs_equal_torchs_in_padded_and_in_packed_rows(name):
    cfg, params = imported(name)
    np.testing.assert_allclose(ours(cfg, params, PADDED), theirs(name), atol=CLOSE, rtol=0)
    np.testing.assert_allclose(ours(cfg, params, PACKED), theirs(name), atol=CLOSE, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_sums_of_pairs_equal_torchs(name):
    cfg, params = imported(name)
    [batch] = PACKED
    pairs = pair_logps(Decoder(cfg, jnp.float32), {"params": params}, batch)
    lengths = [len(branch) for pair in PAIRS for branch in pair.branches]
    sums = [part.sum() for part in np.split(theirs(name), np.cumsum(lengths)[:-1])]
    np.testing.assert_array_equal(pairs.lengths_B2.ravel(), lengths)
    np.testing.assert_allclose(np.divide(pairs.logps_B2.ravel(), lengths), np.divide(sums, lengths), atol=CLOSE, rtol=0)


def test_the_scores_of_a_reward_model_equal_torchs():
    cfg, params = imported("llama-reward")
    ids = random_ids(2, 40)
    ones = np.ones_like(ids)
    hidden_BTD = Decoder(cfg, jnp.float32).apply(
        {"params": params}, ids, np.broadcast_to(np.arange(40), ids.shape), ones, ones
    )
    assert params["score_YD"].shape == (1, cfg.D) and "head_VD" not in params
    np.testing.assert_allclose(
        hidden_BTD[:, -1] @ params["score_YD"].T, torch_scores("llama-reward", ids), atol=CLOSE, rtol=0
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_log_probs_are_near_those_of_float32(name):
    cfg, params = imported(name)
    difference = np.abs(ours(cfg, params, dtype=jnp.bfloat16) - theirs(name))
    assert difference.mean() < 0.2  # a NaN would not be


# What these set is a size, a name or a bound; a wrong one fails at import or changes no number.
NOT_THE_FUNCTION = {"D", "F", "N", "K", "H", "V", "L", "max_positions", "labels", "layout"}
# field: a checkpoint in which it is in use, and a wrong value. Rope's own fields are written rope.theta.
WRONG = [
    ("rope", "llama", Rope()),
    ("rope.theta", "llama", 600.0),
    ("rope.kind", "llama-3.1", "linear"),
    ("rope.kind", "llama-linear", "default"),
    ("rope.factor", "llama-3.1", 6.0),
    ("rope.factor", "llama-linear", 3.0),
    ("rope.low_freq_factor", "llama-3.1", 1.5),
    ("rope.high_freq_factor", "llama-3.1", 3.0),
    ("rope.original_length", "llama-3.1", 40),
    ("local_rope", "gemma3-untied", None),
    ("local_rope.theta", "gemma3-untied", 30.0),
    ("windows", "mistral-window", (None,)),
    ("windows", "mistral-window", (9,)),
    ("windows", "mistral", (35,)),
    ("windows", "phi3-window", (7,)),
    ("windows", "qwen2-window", (None, None, None, 8, 8)),
    ("windows", "gemma2", (None, 8)),
    ("windows", "gemma3-untied", (8, None)),
    ("norm_eps", "llama", 0.04),
    ("query_scale", "gemma2", None),
    ("query_scale", "llama", 0.25),
    ("activation", "llama", "gelu"),
    ("activation", "llama", "gelu_tanh"),
    ("activation", "gemma", "gelu"),
    ("qkv_bias", "qwen2", False),
    ("qkv_bias", "llama-bias", False),
    ("o_bias", "llama-bias", False),
    ("qk_norm", "qwen3", None),
    ("qk_norm", "gemma3-untied", None),
    ("qk_norm", "olmo2", None),
    ("pre_norms", "llama", False),
    ("post_norms", "gemma2", False),
    ("post_norms", "olmo2", False),
    ("unit_offset_norm", "gemma", False),
    ("unit_offset_norm", "qwen3", True),
    ("scale_embeddings", "gemma", False),
    ("scale_embeddings", "llama", True),
    ("tie_embeddings", "gemma3-untied", True),
    ("attn_softcap", "gemma2", None),
    ("attn_softcap", "gemma2", 3.5),
    ("logit_softcap", "gemma2", None),
    ("logit_softcap", "gemma2", 6.5),
]


@pytest.mark.parametrize("field, name, value", WRONG)
def test_a_wrong_field_misses_by_ten_times_what_a_right_one_may(field, name, value):
    right, params = imported(name)
    outer, _, inner = field.partition(".")
    assert (getattr(getattr(right, outer), inner) if inner else getattr(right, outer)) != value
    wrong = dataclasses.replace(
        right, **{outer: dataclasses.replace(getattr(right, outer), **{inner: value}) if inner else value}
    )
    if field == "tie_embeddings":  # decides what is imported
        params = from_hf(folder_of(name), wrong, param_shardings(param_shapes(wrong), one_device()))
    assert np.abs(ours(wrong, fitted(params, right, wrong)) - theirs(name)).max() >= FAR


def fitted(params, cfg: DecoderConfig, other: DecoderConfig):
    """The parameters that the other configuration has too, in its stacks."""
    layers = jax.tree.map(lambda *parts: np.concatenate(parts), *(params[stack] for stack in cfg.stacks))
    start, result = 0, {name: leaf for name, leaf in params.items() if name not in cfg.stacks}
    for stack, length in other.stacks.items():
        result[stack] = jax.tree.map(lambda leaf, at=slice(start, start + length): leaf[at], layers)
        start += length
    given, wanted = (flatten_dict(tree) for tree in (result, param_shapes(other)))
    return unflatten_dict({path: given[path] for path in wanted})


def test_every_field_that_is_part_of_the_function_has_been_got_wrong():
    def names(kind):
        return {field.name for field in dataclasses.fields(kind)}

    tried = {field for field, _, _ in WRONG}
    assert {field for field in tried if "." not in field} == names(DecoderConfig) - NOT_THE_FUNCTION
    assert {field.removeprefix("rope.") for field in tried if field.startswith("rope.")} == names(Rope)


def expected_reach(cfg: DecoderConfig, segments, prompts, positions) -> np.ndarray:
    """reach[i, j]: does slot i of the last layer depend on the embedding in slot j? Layer by layer, token by token."""
    T = len(segments)
    reach = np.eye(T, dtype=bool)
    for layer in range(cfg.L):
        window = cfg.windows[layer % len(cfg.windows)]
        sees = np.zeros((T, T), bool)
        for i in range(T):
            for j in range(i + 1):
                same = segments[j] in (segments[i], prompts[i])
                sees[i, j] = same and (window is None or positions[i] - positions[j] < window)
        reach = (sees | np.eye(T, dtype=bool)) @ reach
    return reach


# The others take their turn with the slow tests.
QUICK = ("llama", "qwen2-window", "gemma3-untied", "olmo2")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES])
def test_a_token_depends_on_what_its_layers_see_never_on_what_follows_a_rival_or_a_neighbour(name):
    right, params = imported(name)
    # Windows of 3 do not reach everything within the layers that there are.
    cfg = dataclasses.replace(right, windows=tuple(window and 3 for window in right.windows))
    pairs = [tokens(range(0, 10), range(10, 18), range(18, 26)), tokens(range(26, 31), range(31, 35), range(35, 39))]
    [batch] = row_batches(pairs, RowShape(R=1, T=41, S=24))
    batch = batch._replace(tokens_RT=np.arange(41, dtype=np.int32)[None])  # every slot another row of the embedding
    row = [getattr(batch, f"{field}_RT")[0] for field in ("segments", "prompts", "positions")]

    @quickly
    def slopes(params):
        def at_slot(embed, slot):
            hidden_RTD = Decoder(cfg, jnp.float32).apply(
                {"params": params | {"embed_VD": embed}},
                *(batch.tokens_RT, batch.positions_RT, batch.segments_RT, batch.prompts_RT),
            )
            return hidden_RTD[0, slot].sum()

        return jax.lax.map(lambda slot: jax.grad(at_slot)(params["embed_VD"], slot), jnp.arange(39))

    depends = np.abs(slopes(params)).sum(axis=-1)[:, :39] > 0
    np.testing.assert_array_equal(depends, expected_reach(cfg, *row)[:39, :39])
    assert not np.triu(depends, 1).any()
    assert not depends[18:26, 10:18].any() and not depends[26:, :26].any()


def test_the_rows_that_pad_the_vocabulary_are_outside_of_every_softmax():
    cfg, params = imported("llama")
    assert params["embed_VD"].shape == params["head_VD"].shape == (256, cfg.D) and cfg.V == V
    assert not params["embed_VD"][V:].any() and not params["head_VD"][V:].any()
    filled = random_params(cfg)["head_VD"]
    other = params | {"head_VD": jnp.concatenate([params["head_VD"][:V], filled[V:]])}
    np.testing.assert_array_equal(ours(cfg, other), ours(cfg, params))
