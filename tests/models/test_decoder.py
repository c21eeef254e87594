import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import STORIES, TINY, equations_of, one_device, random_params

from repo_jax.models.config import DecoderConfig
from repo_jax.models.decoder import (
    REMAT,
    Decoder,
    empty_cache,
    look_up,
    multiply,
    next_token_logits,
    output_head,
    param_shapes,
)
from repo_jax.models.hf import from_hf
from repo_jax.models.lora import adapter_shapes
from repo_jax.sharding import param_shardings

# Everything that families add to Llama and that attention has to know: windows on some layers, a cap, a scale, norms of heads.
MIXED = dataclasses.replace(TINY, windows=(3, None), attn_softcap=2.0, query_scale=0.4, qk_norm="head")

# Compiling is what takes time here, and optimising is most of that.
quickly = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def hidden(cfg, params, tokens, segments=None, prompts=None, positions=None, **options):
    tokens = jnp.asarray(tokens)[None]
    positions = jnp.arange(tokens.shape[1])[None] if positions is None else jnp.asarray(positions)[None]
    segments = jnp.ones_like(tokens) if segments is None else jnp.asarray(segments)[None]
    prompts = segments if prompts is None else jnp.asarray(prompts)[None]
    return Decoder(cfg, jnp.float32, **options).apply({"params": params}, tokens, positions, segments, prompts)[0]


def seen_by(segments, prompts, slot):
    """The slots whose embedding the hidden state at `slot` depends on."""
    params = random_params(TINY)
    T = len(segments)

    def at_slot(rows):
        embed = jnp.concatenate([rows, jnp.asarray(params["embed_VD"])[T:]])
        return hidden(TINY, params | {"embed_VD": embed}, np.arange(T), segments, prompts)[slot].sum()

    slopes_TD = quickly(jax.grad(at_slot))(jnp.asarray(params["embed_VD"])[:T])
    return np.flatnonzero(np.abs(slopes_TD).sum(axis=1)).tolist()


def test_a_token_sees_its_prompt_and_its_own_answer_never_the_rival_or_a_neighbour():
    segments = [1, 1, 2, 2, 3, 3, 4, 4, 5, 0]  # prompt, chosen, rejected, next pair's prompt, its chosen, padding
    prompts = [1, 1, 1, 1, 1, 1, 4, 4, 4, 0]
    assert seen_by(segments, prompts, 1) == [0, 1]
    assert seen_by(segments, prompts, 3) == [0, 1, 2, 3]
    assert seen_by(segments, prompts, 5) == [0, 1, 4, 5]
    assert seen_by(segments, prompts, 8) == [6, 7, 8]


@pytest.mark.parametrize("cfg, T", [(TINY, 5), (TINY, 128), (MIXED, 200)])
def test_blocked_attention_equals_dense_in_value_and_gradient(cfg, T):
    params, rng = random_params(cfg), np.random.default_rng(0)
    tokens, segments = rng.integers(cfg.V, size=T), np.sort(rng.integers(1, 4, size=T))
    cotangent = jnp.asarray(rng.normal(size=(T, cfg.D)), jnp.float32)

    def of(attention):
        def objective(params):
            out = hidden(cfg, params, tokens, segments, np.minimum(segments, 2), attention=attention)
            return (out * cotangent).sum(), out

        grads, out = quickly(jax.grad(objective, has_aux=True))(params)
        return out, jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(grads)])

    (dense, dense_grad), (blocked, blocked_grad) = of("dense"), of("blocked")
    np.testing.assert_allclose(blocked, dense, atol=2e-5)
    assert jnp.linalg.norm(blocked_grad - dense_grad) <= 1e-5 * jnp.linalg.norm(dense_grad)


@pytest.mark.parametrize(
    "axes", [("D", "NH"), ("D", "KH"), ("NH", "D"), ("D", "F"), ("F", "D")], ids=lambda axes: "->".join(axes)
)
def test_a_product_with_a_weight_has_the_gradients_of_autodiff(axes):
    sizes, rng = {"B": 2, "T": 5, "D": 6, "N": 3, "K": 2, "H": 4, "F": 7}, np.random.default_rng(0)
    inputs, outputs = axes

    def draw(letters):
        return jnp.asarray(rng.normal(size=[sizes[letter] for letter in letters]), jnp.float32)

    x, weight, g = draw(f"BT{inputs}"), draw(inputs + outputs), draw(f"BT{outputs}")
    plain, pull_plain = jax.vjp(
        lambda *args: jnp.einsum(f"BT{inputs},{inputs}{outputs}->BT{outputs}", *args), x, weight
    )
    ours, pull_ours = jax.vjp(lambda *args: multiply(axes, *args), x, weight)
    for mine, theirs in zip((ours, *pull_ours(g)), (plain, *pull_plain(g)), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)


ON_CPU = [name for name in REMAT if name != "offload"]  # a CPU's memory is the host's


@pytest.mark.parametrize("attention", ["dense", "blocked"])
@pytest.mark.parametrize("remat", [name for name in ON_CPU if name != "none"])
def test_remat_changes_memory_not_gradients(remat, attention):
    params, tokens = random_params(TINY), np.arange(12)

    def grads(remat):
        return quickly(jax.grad(lambda p: hidden(TINY, p, tokens, remat=remat, attention=attention).sum()))(params)

    for ours, plain in zip(jax.tree.leaves(grads(remat)), jax.tree.leaves(grads("none")), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(  # with MIXED's windows one period, two, and two with a layer left over
    "L, attention", [(2, "dense"), (4, "flash"), (5, "blocked")]
)
def test_backward_from_kept_inputs_is_the_gradient_and_forward_what_was_kept(L, attention):
    cfg = dataclasses.replace(MIXED, L=L)
    params, tokens = random_params(cfg), jnp.arange(40)[None] % 7
    segments = jnp.ones_like(tokens)
    views = jnp.stack([jnp.arange(40), jnp.full(40, 40)])[None] if attention == "flash" else None
    model = Decoder(cfg, jnp.float32, attention=attention)
    cotangent = jnp.asarray(np.random.default_rng(0).normal(size=(1, 40, cfg.D)), jnp.float32)

    def run(params, **options):
        return model.apply({"params": params}, tokens, jnp.arange(40)[None], segments, segments, views, **options)

    def objective(params, **options):
        out = run(params, **options)
        return (out * cotangent).sum(), out

    @quickly
    def both(params):
        _, kept = run(params, keep=True)
        return jax.grad(objective, has_aux=True)(params), jax.grad(objective, has_aux=True)(params, kept=kept), kept

    (plain, out), (ours, same), kept = both(params)
    assert {name: leaf.shape[0] for name, leaf in kept.items()} == cfg.stacks | {"output": 1}
    np.testing.assert_allclose(same, out, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        assert jnp.linalg.norm(mine - theirs) <= 1e-5 * jnp.linalg.norm(theirs) + 1e-6


def gradient_program(remat, attention="dense"):
    """What a gradient takes, step by step."""
    params, tokens = param_shapes(TINY), np.arange(12)
    gradient = jax.grad(lambda p: hidden(TINY, p, tokens, remat=remat, attention=attention).sum())
    return list(equations_of(jax.make_jaxpr(gradient)(params).jaxpr))


def test_remat_attention_does_not_compute_the_attention_of_a_layer_again():
    def loops(remat):
        return [equation.primitive.name for equation in gradient_program(remat, "blocked")].count("while")

    # The blocked kernel has one loop of unknown length in its forward pass, and one in its backward pass.
    assert {remat: loops(remat) for remat in ON_CPU} == {"none": 2, "attention": 2, "dots": 3, "full": 3}


def test_remat_offload_moves_each_layers_input_to_the_hosts_memory_and_back_and_nothing_else():
    """As far as a CPU tells: it cannot run such a program."""

    def moved(remat):
        program = [equation for equation in gradient_program(remat) if equation.primitive.name == "device_put"]
        return [(str(move.params["devices"]).lower(), move.outvars[0].aval.shape) for move in program]

    (there, size), (back, size_back) = moved("offload")
    assert "host" in there and "device" in back and size == size_back == (1, 12, TINY.D)
    assert not moved("full")


def test_remat_policies_differ_in_what_they_keep():
    params, tokens = random_params(TINY), jnp.arange(12)[None]

    def kept(remat):
        model = Decoder(TINY, jnp.float32, remat)
        _, pullback = jax.vjp(
            lambda p: model.apply({"params": p}, tokens, tokens, tokens * 0 + 1, tokens * 0 + 1), params
        )
        return sum(leaf.size for leaf in jax.tree.leaves(pullback))

    assert kept("full") < kept("dots") < kept("none")


def test_remat_attention_keeps_two_arrays_of_each_layer_more_than_full():
    params, tokens = random_params(TINY), jnp.arange(128)[None]

    def kept(remat):
        model, ones = Decoder(TINY, jnp.float32, remat, "blocked"), jnp.ones_like(tokens)
        _, pullback = jax.vjp(lambda p: model.apply({"params": p}, tokens, tokens, ones, ones), params)
        return sum(leaf.size for leaf in jax.tree.leaves(pullback))

    assert kept("attention") - kept("full") == TINY.L * TINY.N * 128 * (TINY.H + 1)  # outputs, and log-sums


def test_a_tied_head_is_the_embedding_and_an_untied_one_its_own():
    params = random_params(TINY)
    assert output_head(params) is params["head_VD"]
    tied = random_params(dataclasses.replace(TINY, tie_embeddings=True))
    assert output_head(tied) is tied["embed_VD"] and "head_VD" not in tied


def test_a_reward_model_has_scores_in_the_heads_place():
    params = param_shapes(dataclasses.replace(TINY, labels=2))
    assert params["score_YD"].shape == (2, TINY.D) and "head_VD" not in params


def test_layers_that_fill_no_period_of_windows_are_a_stack_of_their_own():
    shapes = param_shapes(MIXED)  # 3 layers, period 2
    assert [shapes[stack]["attn"]["q_DNH"].shape[0] for stack in ("layers_L", "rest_L")] == [2, 1]
    assert "rest_L" not in param_shapes(TINY)


@pytest.mark.parametrize("cfg", [TINY, MIXED], ids=["plain", "mixed"])
def test_tokens_fed_through_a_cache_get_the_hidden_states_of_whole_sequences(cfg):
    params, rng = random_params(cfg), np.random.default_rng(0)
    lengths, T = [9, 4], 9
    ids = [rng.integers(cfg.V, size=n) for n in lengths]
    # The second sequence has its padding in front, in the middle and behind.
    slots = [np.arange(9), np.array([2, 3, 6, 7])]
    tokens_BT, positions_BT = np.zeros((2, T), np.int32), np.full((2, T), -1, np.int32)
    for row, (own, at) in enumerate(zip(ids, slots, strict=True)):
        tokens_BT[row, at], positions_BT[row, at] = own, np.arange(len(own))
    cache, out = empty_cache(cfg, 2, T + 3, jnp.float32), []

    @quickly
    def feed(params, tokens_BT, positions_BT, cache):
        return Decoder(cfg, jnp.float32).apply({"params": params}, tokens_BT, positions_BT, cache=cache)

    for start, end in ((0, 5), (5, 6), (6, 9)):  # several at once, then one, then several
        part, cache = feed(params, tokens_BT[:, start:end], positions_BT[:, start:end], cache)
        out.append(part)
    assert int(cache.length) == T
    for row, (own, at) in enumerate(zip(ids, slots, strict=True)):
        alone = quickly(functools.partial(hidden, cfg))(params, own)
        np.testing.assert_allclose(jnp.concatenate(out, axis=1)[row, at], alone, atol=1e-5, rtol=1e-5)


def test_next_token_logits_are_capped_and_leave_out_the_rows_that_pad_the_vocabulary():
    params, rng = random_params(TINY), np.random.default_rng(0)
    hidden_BD = rng.normal(size=(2, TINY.D)).astype(np.float32)
    plain_BV = hidden_BD @ params["head_VD"][: TINY.V].T
    np.testing.assert_allclose(next_token_logits(TINY, hidden_BD, params["head_VD"]), plain_BV, rtol=1e-5, atol=1e-5)
    capped = dataclasses.replace(TINY, logit_softcap=2.0)
    np.testing.assert_allclose(
        next_token_logits(capped, hidden_BD, params["head_VD"]), 2 * np.tanh(plain_BV / 2), rtol=1e-5, atol=1e-5
    )


# XLA hands reductions over thousands of rows to other kernels than those over few, and these have been wrong before
# (jax-ml/jax#39103: jaxlib 0.10.2, CPU).
@pytest.mark.slow
def test_the_gradient_of_many_tokens_is_the_sum_over_their_rows():
    params, rng = random_params(MIXED), np.random.default_rng(0)
    tokens_RT, cotangent_RTD = rng.integers(MIXED.V, size=(17, 256)), rng.normal(size=(17, 256, MIXED.D))
    cotangent_RTD = np.float32(cotangent_RTD)

    @quickly
    def grads(tokens_RT, cotangent_RTD):
        ones_RT = jnp.ones_like(tokens_RT)
        positions_RT = jnp.cumsum(ones_RT, axis=1) - 1

        def objective(params):
            model = Decoder(MIXED, jnp.float32)
            return (model.apply({"params": params}, tokens_RT, positions_RT, ones_RT, ones_RT) * cotangent_RTD).sum()

        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(jax.grad(objective)(params))])

    whole = grads(tokens_RT, cotangent_RTD)
    summed = sum(grads(tokens_RT[r : r + 1], cotangent_RTD[r : r + 1]) for r in range(17))
    assert jnp.linalg.norm(whole - summed) <= 1e-5 * jnp.linalg.norm(summed)


def test_the_greedy_story_of_the_real_model_is_reproduced():
    greedy = json.loads((STORIES / "reference.json").read_text())["greedy"]
    cfg = DecoderConfig.from_hf(STORIES)
    params = from_hf(STORIES, cfg, param_shardings(param_shapes(cfg), one_device()))
    out = hidden(cfg, params, greedy["ids"]) @ params["embed_VD"].T
    assert np.argmax(out, axis=-1)[:-1].tolist() == greedy["ids"][1:]


@pytest.mark.parametrize("windows", [(None,), (4, None)], ids=["plain", "windowed"])
def test_the_backward_pass_keeps_no_copy_of_the_parameters(windows):
    cfg = DecoderConfig(D=64, F=256, N=4, K=4, H=16, V=128, L=8, max_positions=64, windows=windows)
    model, params, adapters = Decoder(cfg, jnp.float32), param_shapes(cfg), adapter_shapes(cfg, 2, None)
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)

    def objective(adapters, params, ids):
        return model.apply({"params": params, "lora": adapters}, ids, ids, ids, ids).sum()

    memory = jax.jit(jax.grad(objective)).lower(adapters, params, ids).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.5 * sum(4 * leaf.size for leaf in jax.tree.leaves(params))


def test_the_gradient_of_a_token_that_is_everywhere_is_a_float32_sum_also_in_bfloat16():
    tokens, table = jnp.zeros((1, 2000), jnp.int32), jnp.ones((4, 2), jnp.bfloat16)
    grad = jax.grad(lambda table: look_up(table, tokens).astype(jnp.float32).sum())(table)
    assert grad.dtype == jnp.bfloat16 and grad[:, 0].tolist() == [2000, 0, 0, 0]
