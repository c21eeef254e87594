import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import STORIES, TINY, one_device, random_params

from repo_jax.logps import token_logps
from repo_jax.models.config import DecoderConfig
from repo_jax.models.decoder import REMAT, Decoder, output_head, param_shapes
from repo_jax.models.hf import from_hf
from repo_jax.sharding import param_shardings


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

    slopes_TD = jax.grad(at_slot)(jnp.asarray(params["embed_VD"])[:T])
    return np.flatnonzero(np.abs(slopes_TD).sum(axis=1)).tolist()


def test_a_token_sees_its_prompt_and_its_own_answer_never_the_rival_or_a_neighbour():
    segments = [1, 1, 2, 2, 3, 3, 4, 4, 5, 0]  # prompt, chosen, rejected, next pair's prompt, its chosen, padding
    prompts = [1, 1, 1, 1, 1, 1, 4, 4, 4, 0]
    assert seen_by(segments, prompts, 1) == [0, 1]
    assert seen_by(segments, prompts, 3) == [0, 1, 2, 3]
    assert seen_by(segments, prompts, 5) == [0, 1, 4, 5]
    assert seen_by(segments, prompts, 8) == [6, 7, 8]


@pytest.mark.parametrize("T", [5, 128, 200])
def test_blocked_attention_equals_dense_in_value_and_gradient(T):
    params, rng = random_params(TINY), np.random.default_rng(0)
    tokens, segments = rng.integers(TINY.V, size=T), np.sort(rng.integers(1, 4, size=T))
    cotangent = jnp.asarray(rng.normal(size=(T, TINY.D)), jnp.float32)

    def of(attention):
        def objective(params):
            out = hidden(TINY, params, tokens, segments, np.minimum(segments, 2), attention=attention)
            return (out * cotangent).sum(), out

        grads, out = jax.grad(objective, has_aux=True)(params)
        return out, jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(grads)])

    (dense, dense_grad), (blocked, blocked_grad) = of("dense"), of("blocked")
    np.testing.assert_allclose(blocked, dense, atol=2e-5)
    assert jnp.linalg.norm(blocked_grad - dense_grad) <= 1e-5 * jnp.linalg.norm(dense_grad)


@pytest.mark.parametrize("remat", [name for name in REMAT if name != "none"])
def test_remat_changes_memory_not_gradients(remat):
    params, tokens = random_params(TINY), np.arange(12)

    def grads(remat):
        return jax.grad(lambda params: hidden(TINY, params, tokens, remat=remat).sum())(params)

    for ours, plain in zip(jax.tree.leaves(grads(remat)), jax.tree.leaves(grads("none")), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-4)


def test_remat_policies_differ_in_what_they_keep():
    params, tokens = random_params(TINY), jnp.arange(12)[None]

    def kept(remat):
        model = Decoder(TINY, jnp.float32, remat)
        _, pullback = jax.vjp(
            lambda p: model.apply({"params": p}, tokens, tokens, tokens * 0 + 1, tokens * 0 + 1), params
        )
        return sum(leaf.size for leaf in jax.tree.leaves(pullback))

    assert kept("full") < kept("dots") < kept("none")


# Every other field sets a shape; these change the function at equal shapes.
@pytest.mark.parametrize("field, value", [("rope_theta", 500.0), ("norm_eps", 1.0)])
def test_every_field_that_sets_no_shape_changes_the_model(field, value):
    params, tokens = random_params(TINY), np.arange(12)
    other = dataclasses.replace(TINY, **{field: value})
    assert np.abs(hidden(TINY, params, tokens) - hidden(other, params, tokens)).max() > 1e-3


def test_a_tied_head_is_the_embedding_and_an_untied_one_its_own():
    params = random_params(TINY)
    assert output_head(params) is params["head_VD"]
    tied = random_params(dataclasses.replace(TINY, tie_embeddings=True))
    assert output_head(tied) is tied["embed_VD"] and "head_VD" not in tied


def config(**changes):
    return {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "vocab_size": 50,
            "num_hidden_layers": 3, "num_key_value_heads": 2, "max_position_embeddings": 64} | changes  # fmt: skip


def read(tmp_path, **changes):
    (tmp_path / "config.json").write_text(json.dumps(config(**changes)))
    return DecoderConfig.from_hf(tmp_path)


def test_config_reads_the_rope_base_where_transformers_4_and_5_write_it(tmp_path):
    assert read(tmp_path, rope_theta=5e5) == read(tmp_path, rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    assert read(tmp_path, rope_theta=5e5).rope_theta == 5e5
    assert read(tmp_path) == TINY


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "mixtral"}, "model_type 'mixtral' of .*config.json is not supported; supported: llama"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' of .* is not supported; supported: 'silu'"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope type 'linear' of .* is not supported; supported: 'default'",
        ),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope type 'llama3' of .* is not supported"),
        ({"attention_bias": True}, "attention_bias True of .* is not supported"),
        ({"mlp_bias": True}, "mlp_bias True of .* is not supported"),
    ],
)
def test_config_refuses_what_the_decoder_does_not_compute(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, **changes)


def test_a_config_that_lacks_a_size_or_is_cut_off_is_answered(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 16}')
    with pytest.raises(
        ValueError, match="does not say intermediate_size, num_attention_heads, num_hidden_layers, vocab_size"
    ):
        DecoderConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "ll')
    with pytest.raises(ValueError, match=r"config.json is not JSON .*; fetch it again"):
        DecoderConfig.from_hf(tmp_path)


def test_a_folder_without_a_config_is_answered(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model_name_or_path='.*' is not a folder with a config.json; give"):
        DecoderConfig.from_hf(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_log_probs_equal_transformers_on_a_random_checkpoint(tmp_path, tied):
    torch = pytest.importorskip("torch", reason="the oracle is transformers' own model, which needs torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**config(rope_theta=500.0, rms_norm_eps=1e-5, tie_word_embeddings=tied)))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3 + (p.ndim == 1))
    model.save_pretrained(tmp_path)
    ids = np.random.default_rng(0).integers(50, size=(2, 20))
    with torch.no_grad():
        logits = model(torch.tensor(ids)).logits
    assert logits.std() >= 1  # else log-probs are near uniform and prove little
    theirs = torch.log_softmax(logits, -1)[:, :-1].gather(-1, torch.tensor(ids)[:, 1:, None])[..., 0].numpy()
    cfg = DecoderConfig.from_hf(tmp_path)
    params = from_hf(tmp_path, cfg, param_shardings(param_shapes(cfg), one_device()))
    ours = [
        token_logps(hidden(cfg, params, row)[None, :-1], output_head(params), jnp.asarray(row[None, 1:]))[0]
        for row in ids
    ]
    np.testing.assert_allclose(np.stack(ours), theirs, atol=2e-5)


def test_the_greedy_story_of_the_real_model_is_reproduced():
    greedy = json.loads((STORIES / "reference.json").read_text())["greedy"]
    cfg = DecoderConfig.from_hf(STORIES)
    params = from_hf(STORIES, cfg, param_shardings(param_shapes(cfg), one_device()))
    out = hidden(cfg, params, greedy["ids"]) @ params["embed_VD"].T
    assert np.argmax(out, axis=-1)[:-1].tolist() == greedy["ids"][1:]
