"""New tokens: transformers' for greedy decoding, transformers' filters for sampling, and for a row the same wherever it stands."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import STORIES, TINY, one_device, random_params, stories

from repo_jax import generation
from repo_jax.data.chat import load_tokenizer
from repo_jax.generation import Generator, Sampling, choose, slots, warp
from repo_jax.models.config import DecoderConfig
from repo_jax.models.decoder import Decoder, param_shapes
from repo_jax.models.hf import from_hf
from repo_jax.sharding import make_mesh, param_shardings

FAMILIES = [
    "llama",
    "mistral-window",
    "qwen2-window",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3",
    "phi3-window",
    "olmo2",
]
NEW = 24  # tokens; with the prompts beyond every window
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(1, TINY.V, size=n, dtype=np.int32) for n in (4, 11, 1, 33, 8, 20)]
SAMPLED = Sampling(20, temperature=0.9, top_k=30, top_p=0.95)


def decoder(cfg, **options) -> Decoder:
    return Decoder(cfg, np.dtype("float32"), **options)


@functools.cache
def tiny(mesh=None, sampling=SAMPLED, **options):
    """generate(which, rows=None, seed=0): what follows those of PROMPTS, as lists."""
    mesh = mesh or one_device()
    params = random_params(TINY)
    variables = {"params": jax.device_put(params, param_shardings(params, mesh))}
    generator = Generator(decoder(TINY), mesh, sampling, **options)

    def generate(which, rows=None, seed=0):
        found = generator(variables, [PROMPTS[i] for i in which], which if rows is None else rows, seed)
        return [ids.tolist() for ids in found]

    return generate


# Greedy decoding


def torch_greedy(model, prompts):
    """What transformers writes after each prompt, all in one batch padded on the left, and how far its two best logits lie apart."""
    import torch

    T = max(map(len, prompts))
    ids = torch.tensor(np.stack([np.pad(prompt, (T - len(prompt), 0)) for prompt in prompts]), dtype=torch.long)
    mask = torch.tensor(np.stack([np.arange(T) >= T - len(prompt) for prompt in prompts]), dtype=torch.long)
    options = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0, "eos_token_id": -1}
    out = model.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **options)
    top_MB2 = torch.stack(out.logits).topk(2).values.numpy()
    return out.sequences[:, T:].numpy(), (top_MB2[..., 0] - top_MB2[..., 1]).T


QUICK = ("llama", "gemma3", "phi3-window", "olmo2")  # the others take their turn with the slow tests


@pytest.mark.parametrize(
    "family", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_greedy_tokens_are_those_of_transformers(family):
    pytest.importorskip("torch", reason="the oracle is transformers' own generate, which needs torch")
    from checkpoints import folder_of, random_ids, torch_model

    prompts = [random_ids(n, seed=n).astype(np.int32) for n in (3, 21, 40, 12)]
    theirs_BM, gaps_BM = torch_greedy(torch_model(family), prompts)
    # Two end tokens, each of which one row alone writes, as its third token or later.
    alone = [token for row in theirs_BM for token in row[2:] if (theirs_BM == token).any(axis=1).sum() == 1]
    eos = int(alone[0]), int(alone[-1])
    mesh, cfg = one_device(), DecoderConfig.from_hf(folder_of(family))
    variables = {"params": from_hf(folder_of(family), cfg, param_shardings(param_shapes(cfg), mesh))}
    ours = Generator(decoder(cfg), mesh, Sampling(NEW, eos_ids=eos))(variables, prompts, range(4), 0)
    compared = 0
    for ids, theirs_M, gaps_M in zip(ours, theirs_BM, gaps_BM, strict=True):
        length = min(first(np.isin(theirs_M, eos)) + 1, NEW)
        # Behind a choice that rounding may decide, the two go different ways.
        clear = min(length, first(gaps_M <= 1e-3))
        np.testing.assert_array_equal(ids[:clear], theirs_M[:clear])
        assert clear < length or len(ids) == length
        compared += clear
    assert 1 <= sum(len(ids) < NEW for ids in ours) <= 2
    assert compared > 2 * NEW


def first(where_M) -> int:
    """The place of the first True, or the length without one."""
    return int(np.argmax(where_M)) if where_M.any() else len(where_M)


def test_the_published_sample_of_stories260K_is_reproduced_word_for_word():
    cfg, params = stories()
    reference = json.loads((STORIES / "reference.json").read_text(encoding="utf-8"))["greedy"]
    prompt, ids = np.int32(reference["prompt_ids"]), reference["ids"]
    generator = Generator(decoder(cfg), one_device(), Sampling(len(ids) - len(prompt)))
    [found] = generator({"params": params}, [prompt], [0], 0)
    assert [*prompt, *found] == ids
    assert load_tokenizer(str(STORIES)).decode(found, skip_special_tokens=True) == reference["text"]


# Where a row stands


def test_a_sampled_row_is_the_same_alone_in_other_batches_and_in_other_order():
    generate, everyone = tiny(), [*range(len(PROMPTS))]
    together = generate(everyone)
    assert generate(everyone[::-1]) == together[::-1]
    assert generate([0]) == [together[0]]  # in 32 slots; row 3 gives the whole batch 64
    assert generate([4, 1]) == [together[4], together[1]]


@pytest.mark.parametrize(
    "axes", [(2, 2, 2), *(pytest.param(a, marks=pytest.mark.slow) for a in [(1, 4, 2), (1, 2, 4)])]
)
def test_a_sampled_row_is_the_same_on_every_mesh(axes):
    everyone = [*range(len(PROMPTS))]  # fewer than a multiple of the devices
    assert tiny(make_mesh(*axes))(everyone) == tiny()(everyone)


def test_rows_and_seeds_and_tokens_have_draws_of_their_own():
    generate = tiny()
    one, two = generate([0, 0], rows=[0, 1])
    assert one != two
    assert generate([0], rows=[0], seed=1) != [one]
    assert generate([0], rows=[0], seed=2**32 - 1) != [one]
    # Without weights every token is as likely as any other: nothing but the keys decides.
    cfg = dataclasses.replace(TINY, max_positions=1024)
    params = jax.tree.map(np.zeros_like, random_params(cfg))
    generator = Generator(decoder(cfg), one_device(), Sampling(500, temperature=1.0))
    drawn = np.stack(generator({"params": params}, [np.int32([1])] * 4, range(4), 0))
    assert (
        chi_square(drawn.ravel(), np.full(cfg.V, 1 / cfg.V)) < 93
    )  # 49 degrees of freedom: one in ten thousand is above
    pairs = [(a, b) for a in range(4) for b in range(a)]
    assert all(np.mean(drawn[a] == drawn[b]) < 0.06 for a, b in pairs)  # 0.02 is expected
    assert np.mean(drawn[:, 1:] == drawn[:, :-1]) < 0.06


# Which tokens are drawn


def chi_square(drawn, probs_V) -> float:
    counts_V = np.bincount(drawn, minlength=len(probs_V))
    assert not counts_V[probs_V == 0].any()
    expected_V = len(drawn) * probs_V[probs_V > 0]
    return float((((counts_V[probs_V > 0] - expected_V) ** 2) / expected_V).sum())


def draw(logits_V, sampling, n=20_000):
    logits_BV = jnp.tile(jnp.asarray(logits_V, jnp.float32), (n, 1))
    return np.asarray(jax.jit(choose, static_argnums=2)(logits_BV, jax.random.split(jax.random.key(3), n), sampling))


LOGITS = np.array([1.0, 0.3, -0.5, 2.0, 0.0, -3.0, 1.5, 0.9])


@pytest.mark.parametrize(
    "sampling, left",
    [
        (Sampling(1, temperature=1.0), [0, 1, 2, 3, 4, 5, 6, 7]),
        (Sampling(1, temperature=0.6), [0, 1, 2, 3, 4, 5, 6, 7]),
        (Sampling(1, temperature=1.7, top_k=3), [0, 3, 6]),
        (Sampling(1, temperature=1.0, top_p=0.55), [3, 6]),  # 0.37 + 0.22, then 0.14
        (Sampling(1, temperature=1.0, top_k=4, top_p=0.8), [0, 3, 6]),  # 0.43 + 0.26 + 0.16, then 0.14
    ],
)
def test_tokens_come_up_as_often_as_their_probability(sampling, left):
    weights_V = np.where(np.isin(np.arange(8), left), np.exp(LOGITS / sampling.temperature), 0)
    # 24 is passed by chance once in a thousand with 7 degrees of freedom; the draws are always the same.
    assert chi_square(draw(LOGITS, sampling), weights_V / weights_V.sum()) < 24


def test_at_temperature_0_the_likeliest_token_is_taken_and_the_first_of_equals():
    assert set(draw(LOGITS, Sampling(1), n=3)) == {3}
    assert set(draw([0.0, 1.0, 1.0], Sampling(1), n=3)) == {1}


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 7, 200, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 0.1, 1e-6])
def test_filters_keep_what_those_of_transformers_keep(temperature, top_k, top_p):
    torch = pytest.importorskip("torch", reason="the oracle is transformers' logits processors, which need torch")
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    rng = np.random.default_rng(1)
    logits_BV = rng.normal(scale=3, size=(20, 300)).astype(np.float32)
    logits_BV[10:] = logits_BV[10:].round()  # with many equals
    theirs = TemperatureLogitsWarper(temperature)(None, torch.tensor(logits_BV))
    theirs = TopKLogitsWarper(top_k)(None, theirs) if top_k else theirs
    theirs = TopPLogitsWarper(top_p)(None, theirs).numpy() if top_p < 1 else theirs.numpy()
    ours = np.asarray(warp(jnp.asarray(logits_BV), Sampling(1, temperature, top_k, top_p)))
    # Which of equals goes is the sort's choice there, so that only their values are compared.
    np.testing.assert_array_equal(np.isinf(ours[:10]), np.isinf(theirs[:10]))
    np.testing.assert_allclose(np.sort(ours), np.sort(theirs), rtol=1e-6)
    assert np.isfinite(ours).any(axis=1).all()


@pytest.mark.parametrize("top_p", [0.99, 0.9, 0.5, 0.01])
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p):
    logits_BV = np.random.default_rng(2).normal(scale=2, size=(50, 40))
    ours = np.asarray(warp(jnp.asarray(logits_BV, jnp.float32), Sampling(1, 1.0, 0, top_p)))
    for logits_V, ours_V in zip(logits_BV, ours, strict=True):
        probs = np.sort(np.exp(logits_V) / np.exp(logits_V).sum())[::-1]
        kept = next(n for n in range(1, 41) if probs[:n].sum() >= top_p)
        assert set(np.flatnonzero(np.isfinite(ours_V))) == set(np.argsort(-logits_V)[:kept])


def test_a_row_ends_at_the_last_position_of_the_model():
    prompts = [np.arange(1, n + 1, dtype=np.int32) % TINY.V for n in (63, 60, 34)]  # of 64 positions
    generator = Generator(decoder(TINY), one_device(), Sampling(20), batch_size=4)
    found = generator({"params": random_params(TINY)}, prompts, range(3), 0)
    assert [len(ids) for ids in found] == [1, 4, 20]
    for length in (0, 64):
        with pytest.raises(ValueError, match=rf"prompt 7 has {length} tokens; wanted 1 to 63"):
            generator({}, [np.ones(length, np.int32)], [7], 0)


def test_prompts_may_go_through_the_model_in_parts(monkeypatch):
    everyone = [*range(len(PROMPTS))]
    whole = tiny()(everyone)
    monkeypatch.setattr(generation, "CHUNK", 16)  # of 64 slots; row 2 has its only token in the last
    generator = Generator(decoder(TINY), one_device(), SAMPLED)
    found = generator({"params": random_params(TINY)}, PROMPTS, everyone, 0)
    assert [ids.tolist() for ids in found] == whole


def test_a_program_is_compiled_once_for_each_size(monkeypatch):
    traced, original = [], generation.choose

    def counted(logits_BV, *rest):
        traced.append(logits_BV.shape)
        return original(logits_BV, *rest)

    monkeypatch.setattr(generation, "choose", counted)
    generator = Generator(decoder(TINY), one_device(), Sampling(20), batch_size=4)
    variables = {"params": random_params(TINY)}
    for lengths in ([33, 9], [60, 1, 2], [44], [50] * 4):
        found = generator(variables, [np.ones(n, np.int32) for n in lengths], range(len(lengths)), 0)
        assert len(found) == len(lengths)
    assert traced == [(4, TINY.V)] * 2  # the first token, and the loop
    generator(variables, [np.ones(9, np.int32)], [0], 0)
    assert len(traced) == 4


def test_slots_are_few_and_waste_little():
    found = [slots(n) for n in range(1, 8193)]
    assert all(n <= size <= max(32, n + 31, 3 * n / 2) for n, size in enumerate(found, 1))
    assert found == sorted(found) and len(set(found)) <= 18


def test_adapters_count():
    rng, (D, N, H, L, r) = np.random.default_rng(5), (TINY.D, TINY.N, TINY.H, TINY.L, 2)
    params = random_params(TINY)
    a_LDr, b_LrNH = (rng.normal(size=shape).astype(np.float32) for shape in ((L, D, r), (L, r, N, H)))
    merged = jax.tree.map(np.copy, params)
    merged["layers_L"]["attn"]["q_DNH"] += 0.5 * np.einsum("LDr,LrNH->LDNH", a_LDr, b_LrNH)
    adapters = {"layers_L": {"attn": {"q_DNH": {"a_Dr": a_LDr, "b_rNH": b_LrNH}}}}
    adapted = Generator(decoder(TINY, lora_scale=0.5), one_device(), SAMPLED)
    plain = Generator(decoder(TINY), one_device(), SAMPLED)
    rows = range(len(PROMPTS))
    ours = [ids.tolist() for ids in adapted({"params": params, "lora": adapters}, PROMPTS, rows, 0)]
    assert ours == [ids.tolist() for ids in plain({"params": merged}, PROMPTS, rows, 0)]
    assert ours != tiny()([*rows])
