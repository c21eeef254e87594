"""config.json in, DecoderConfig out: held against transformers' own configurations and models, and refusals by name."""

import json

import numpy as np
import pytest
from examples import TINY
from transformers import AutoConfig

from repo_jax.models.attention import frequencies
from repo_jax.models.config import DecoderConfig, Rope

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "vocab_size": 50, "num_hidden_layers": 3}

# What decides the function in the config.json of published models, in the form in which transformers 4 wrote them.
PUBLISHED = {
    "Llama-3.1-8B": dict(
        architectures=["LlamaForCausalLM"], attention_bias=False, hidden_act="silu", hidden_size=4096, intermediate_size=14336,
        max_position_embeddings=131072, mlp_bias=False, model_type="llama", num_attention_heads=32, num_hidden_layers=32,
        num_key_value_heads=8, pretraining_tp=1, rms_norm_eps=1e-05, rope_theta=500000.0, tie_word_embeddings=False,
        rope_scaling={"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                      "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        torch_dtype="bfloat16", transformers_version="4.43.0.dev0", vocab_size=128256,
    ),
    "TinyLlama-1.1B": dict(
        architectures=["LlamaForCausalLM"], hidden_act="silu", hidden_size=2048, intermediate_size=5632,
        max_position_embeddings=2048, model_type="llama", num_attention_heads=32, num_hidden_layers=22, num_key_value_heads=4,
        pretraining_tp=1, rms_norm_eps=1e-05, rope_scaling=None, rope_theta=10000.0, tie_word_embeddings=False,
        transformers_version="4.31.0.dev0", vocab_size=32000,
    ),
    "SmolLM2-135M": dict(
        architectures=["LlamaForCausalLM"], attention_bias=False, hidden_act="silu", hidden_size=576, intermediate_size=1536,
        is_llama_config=True, max_position_embeddings=8192, mlp_bias=False, model_type="llama", num_attention_heads=9,
        num_hidden_layers=30, num_key_value_heads=3, rms_norm_eps=1e-05, rope_interleaved=False, rope_scaling=None,
        rope_theta=100000, tie_word_embeddings=True, transformers_version="4.40.1", vocab_size=49152,
    ),
    "a Llama stretched in the first form": dict(  # what fine-tunes of Llama 2 say, before rope_type was called so
        hidden_size=4096, intermediate_size=11008, max_position_embeddings=16384, model_type="llama", num_attention_heads=32,
        num_hidden_layers=32, rms_norm_eps=1e-05, rope_scaling={"type": "linear", "factor": 4.0}, vocab_size=32000,
    ),
    "Mistral-7B-v0.1": dict(
        architectures=["MistralForCausalLM"], hidden_act="silu", hidden_size=4096, intermediate_size=14336,
        max_position_embeddings=32768, model_type="mistral", num_attention_heads=32, num_hidden_layers=32,
        num_key_value_heads=8, rms_norm_eps=1e-05, rope_theta=10000.0, sliding_window=4096, tie_word_embeddings=False,
        transformers_version="4.34.0.dev0", vocab_size=32000,
    ),
    "Mistral-7B-Instruct-v0.3": dict(
        architectures=["MistralForCausalLM"], hidden_act="silu", hidden_size=4096, intermediate_size=14336,
        max_position_embeddings=32768, model_type="mistral", num_attention_heads=32, num_hidden_layers=32,
        num_key_value_heads=8, rms_norm_eps=1e-05, rope_theta=1000000.0, sliding_window=None, tie_word_embeddings=False,
        transformers_version="4.42.0.dev0", vocab_size=32768,
    ),
    "Qwen2.5-0.5B": dict(
        architectures=["Qwen2ForCausalLM"], hidden_act="silu", hidden_size=896, intermediate_size=4864,
        max_position_embeddings=32768, max_window_layers=24, model_type="qwen2", num_attention_heads=14, num_hidden_layers=24,
        num_key_value_heads=2, rms_norm_eps=1e-06, rope_theta=1000000.0, sliding_window=32768, tie_word_embeddings=True,
        transformers_version="4.40.1", use_mrope=False, use_sliding_window=False, vocab_size=151936,
    ),
    "Qwen3-0.6B": dict(
        architectures=["Qwen3ForCausalLM"], attention_bias=False, head_dim=128, hidden_act="silu", hidden_size=1024,
        intermediate_size=3072, max_position_embeddings=40960, max_window_layers=28, model_type="qwen3",
        num_attention_heads=16, num_hidden_layers=28, num_key_value_heads=8, rms_norm_eps=1e-06, rope_scaling=None,
        rope_theta=1000000, sliding_window=None, tie_word_embeddings=True, transformers_version="4.51.0",
        use_sliding_window=False, vocab_size=151936,
    ),
    "gemma-2b": dict(
        architectures=["GemmaForCausalLM"], attention_bias=False, head_dim=256, hidden_act="gelu",
        hidden_activation="gelu_pytorch_tanh", hidden_size=2048, intermediate_size=16384, max_position_embeddings=8192,
        model_type="gemma", num_attention_heads=8, num_hidden_layers=18, num_key_value_heads=1, rms_norm_eps=1e-06,
        rope_scaling=None, rope_theta=10000.0, transformers_version="4.38.0.dev0", vocab_size=256000,
    ),
    "gemma-2-9b-it": dict(
        architectures=["Gemma2ForCausalLM"], attention_bias=False, attn_logit_softcapping=50.0, cache_implementation="hybrid",
        final_logit_softcapping=30.0, head_dim=256, hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh",
        hidden_size=3584, intermediate_size=14336, max_position_embeddings=8192, model_type="gemma2", num_attention_heads=16,
        num_hidden_layers=42, num_key_value_heads=8, query_pre_attn_scalar=256, rms_norm_eps=1e-06, rope_theta=10000.0,
        sliding_window=4096, sliding_window_size=4096, transformers_version="4.42.0.dev0", vocab_size=256000,
    ),
    "gemma-2-27b": dict(  # its query_pre_attn_scalar is not its head size
        architectures=["Gemma2ForCausalLM"], attn_logit_softcapping=50.0, final_logit_softcapping=30.0, head_dim=128,
        hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh", hidden_size=4608, intermediate_size=36864,
        max_position_embeddings=8192, model_type="gemma2", num_attention_heads=32, num_hidden_layers=46,
        num_key_value_heads=16, query_pre_attn_scalar=144, rms_norm_eps=1e-06, rope_theta=10000.0, sliding_window=4096,
        vocab_size=256000,
    ),
    "gemma-3-1b-it": dict(
        architectures=["Gemma3ForCausalLM"], attention_bias=False, attn_logit_softcapping=None, cache_implementation="hybrid",
        final_logit_softcapping=None, head_dim=256, hidden_activation="gelu_pytorch_tanh", hidden_size=1152,
        intermediate_size=6912, max_position_embeddings=32768, model_type="gemma3_text", num_attention_heads=4,
        num_hidden_layers=26, num_key_value_heads=1, query_pre_attn_scalar=256, rms_norm_eps=1e-06,
        rope_local_base_freq=10000, rope_scaling=None, rope_theta=1000000, sliding_window=512, sliding_window_pattern=6,
        transformers_version="4.50.0.dev0", vocab_size=262144,
    ),
    "the text model of gemma-3-4b": dict(
        architectures=["Gemma3ForCausalLM"], head_dim=256, hidden_activation="gelu_pytorch_tanh", hidden_size=2560,
        intermediate_size=10240, max_position_embeddings=131072, model_type="gemma3_text", num_attention_heads=8,
        num_hidden_layers=34, num_key_value_heads=4, query_pre_attn_scalar=256, rms_norm_eps=1e-06,
        rope_local_base_freq=10000.0, rope_scaling={"factor": 8.0, "rope_type": "linear"}, rope_theta=1000000.0,
        sliding_window=1024, sliding_window_pattern=6, vocab_size=262208,
    ),
    "Phi-3-mini-4k-instruct": dict(
        architectures=["Phi3ForCausalLM"], attention_bias=False, hidden_act="silu", hidden_size=3072, intermediate_size=8192,
        max_position_embeddings=4096, model_type="phi3", num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32,
        original_max_position_embeddings=4096, rms_norm_eps=1e-05, rope_scaling=None, rope_theta=10000.0,
        sliding_window=2047, tie_word_embeddings=False, transformers_version="4.40.2", vocab_size=32064,
    ),
    "phi-4": dict(
        architectures=["Phi3ForCausalLM"], attention_bias=False, hidden_act="silu", hidden_size=5120, intermediate_size=17920,
        max_position_embeddings=16384, model_type="phi3", num_attention_heads=40, num_hidden_layers=40, num_key_value_heads=10,
        original_max_position_embeddings=16384, rms_norm_eps=1e-05, rope_scaling=None, rope_theta=250000,
        sliding_window=None, tie_word_embeddings=False, transformers_version="4.47.0", vocab_size=100352,
    ),
    "OLMo-2-1124-7B": dict(
        architectures=["Olmo2ForCausalLM"], attention_bias=False, hidden_act="silu", hidden_size=4096, intermediate_size=11008,
        max_position_embeddings=4096, model_type="olmo2", num_attention_heads=32, num_hidden_layers=32,
        num_key_value_heads=32, rms_norm_eps=1e-06, rope_scaling=None, rope_theta=500000, tie_word_embeddings=False,
        transformers_version="4.47.0.dev0", vocab_size=100352,
    ),
}  # fmt: skip

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2"]
# Heads enough for every family's default number of key/value heads.
MANY = SIZES | {"hidden_size": 64, "num_attention_heads": 32, "pad_token_id": 0}
# Configurations that say next to nothing, one per family: everything else is transformers' default.
SILENT = {f"a silent {family}": MANY | {"model_type": family} for family in FAMILIES}
SETTINGS = {
    "Qwen2 with windows on its upper layers": MANY
    | dict(model_type="qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "Qwen3 with windows by layer_types": MANY
    | dict(model_type="qwen3", use_sliding_window=True, sliding_window=8,
           layer_types=["full_attention", "sliding_attention", "full_attention"]),
    "Qwen3 with biases": MANY | dict(model_type="qwen3", attention_bias=True),
    "Llama with biases": MANY | dict(model_type="llama", attention_bias=True, num_key_value_heads=None),
    "Gemma with biases and exact gelu": MANY | dict(model_type="gemma2", attention_bias=True, hidden_activation="gelu"),
    "Gemma 3 with another pattern and a cap": MANY
    | dict(model_type="gemma3_text", sliding_window_pattern=2, final_logit_softcapping=20.0, rope_theta=5e5),
    "Gemma 2 without caps": MANY
    | dict(model_type="gemma2", attn_logit_softcapping=None, final_logit_softcapping=None),
    "Qwen2 with as many key/value heads as heads, said by null": MANY | dict(model_type="qwen2", num_key_value_heads=None),
    "Mistral without windows": MANY | dict(model_type="mistral", sliding_window=None),
    "Llama 3 stretched from its own length": MANY
    | dict(model_type="llama", max_position_embeddings=64,
           rope_scaling={"rope_type": "llama3", "factor": 2, "low_freq_factor": 1, "high_freq_factor": 4}),
}  # fmt: skip
CONFIGS = PUBLISHED | SILENT | SETTINGS


def write(folder, config: dict):
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def read(tmp_path, **changes) -> DecoderConfig:
    """A small Llama but for these changes."""
    base = SIZES | dict(model_type="llama", num_key_value_heads=2, max_position_embeddings=64)
    return DecoderConfig.from_hf(write(tmp_path, base | changes))


def windows(cfg: DecoderConfig) -> list[int | None]:
    return [cfg.windows[i % len(cfg.windows)] for i in range(cfg.L)]


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_and_defaults_are_those_of_transformers(tmp_path, name):
    folder = write(tmp_path, CONFIGS[name])
    cfg, theirs = DecoderConfig.from_hf(folder), AutoConfig.from_pretrained(folder)
    heads = theirs.num_attention_heads
    assert (theirs.hidden_size, theirs.intermediate_size, theirs.vocab_size) == (cfg.D, cfg.F, cfg.V)
    assert (heads, theirs.num_key_value_heads, theirs.num_hidden_layers) == (cfg.N, cfg.K, cfg.L)
    assert getattr(theirs, "head_dim", theirs.hidden_size // heads) == cfg.H
    assert cfg.max_positions == theirs.max_position_embeddings
    assert cfg.norm_eps == theirs.rms_norm_eps
    assert cfg.tie_embeddings == theirs.tie_word_embeddings
    assert cfg.logit_softcap == getattr(theirs, "final_logit_softcapping", None)
    window = getattr(theirs, "sliding_window", None)
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * theirs.num_hidden_layers
    assert windows(cfg) == [window if kind == "sliding_attention" else None for kind in kinds]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_form_of_transformers_5_means_what_that_of_4_meant(tmp_path, name):
    before = DecoderConfig.from_hf(write(tmp_path, CONFIGS[name]))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert DecoderConfig.from_hf(tmp_path) == before
    written = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in written and "rope_scaling" not in written  # else this proves nothing


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_describes_the_model_that_transformers_builds(tmp_path, name):
    torch = pytest.importorskip("torch", reason="the oracle is transformers' own model, which needs torch")
    from transformers import AutoModelForCausalLM

    folder = write(tmp_path, CONFIGS[name])
    cfg, config = DecoderConfig.from_hf(folder), AutoConfig.from_pretrained(folder)
    with torch.device("meta"):  # shapes without memory
        model = AutoModelForCausalLM.from_config(config)
    layers = model.model.layers
    assert len(layers) == cfg.L
    assert list(model.model.embed_tokens.weight.shape) == [cfg.V, cfg.D]
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == cfg.tie_embeddings
    own_window = [
        getattr(layer.self_attn, "sliding_window", config.to_dict().get("sliding_window")) for layer in layers
    ]
    assert windows(cfg) == own_window
    layer = layers[0]
    attn, mlp, parts = layer.self_attn, layer.mlp, dict(layer.named_modules())
    query_width, key_width = cfg.N * cfg.H, cfg.K * cfg.H
    if cfg.layout == "phi3":
        assert attn.qkv_proj.weight.shape == (query_width + 2 * key_width, cfg.D)
        assert mlp.gate_up_proj.weight.shape == (2 * cfg.F, cfg.D)
        assert not cfg.qkv_bias and attn.qkv_proj.bias is None
    else:
        assert attn.q_proj.weight.shape == (query_width, cfg.D)
        assert attn.k_proj.weight.shape == attn.v_proj.weight.shape == (key_width, cfg.D)
        assert mlp.gate_proj.weight.shape == (cfg.F, cfg.D)
        assert {cfg.qkv_bias} == {p.bias is not None for p in (attn.q_proj, attn.k_proj, attn.v_proj)}
    assert attn.o_proj.weight.shape == (cfg.D, query_width)
    assert cfg.o_bias == (attn.o_proj.bias is not None)
    assert not any("bias" in name for name, _ in mlp.named_parameters())
    width = {None: None, "head": cfg.H, "whole": query_width}[cfg.qk_norm]
    assert width == (attn.q_norm.weight.numel() if "self_attn.q_norm" in parts else None)
    assert ("input_layernorm" in parts) == cfg.pre_norms
    norms = [name for name in parts if name.endswith("layernorm")]
    assert len(norms) == 2 * (cfg.pre_norms + cfg.post_norms)
    assert {getattr(parts[name], "variance_epsilon", getattr(parts[name], "eps", None)) for name in norms} == {
        cfg.norm_eps
    }
    scale = cfg.H**-0.5 if cfg.query_scale is None else cfg.query_scale
    assert scale == pytest.approx(attn.scaling, rel=1e-12)
    assert cfg.attn_softcap == getattr(attn, "attn_logit_softcapping", None)
    x = torch.linspace(-3, 3, 50)
    ours = {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu,
            "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh")}[cfg.activation]  # fmt: skip
    torch.testing.assert_close(getattr(mlp, "act_fn", getattr(mlp, "activation_fn", None))(x), ours(x))
    rotary = type(model.model.rotary_emb)(config)
    if hasattr(rotary, "inv_freq"):
        ropes = {"": cfg.rope}
        assert cfg.local_rope is None
    else:
        ropes = {"full_attention_": cfg.rope, "sliding_attention_": cfg.local_rope}
        ropes = {kind: rope for kind, rope in ropes.items() if hasattr(rotary, f"{kind}inv_freq")}
    for kind, rope in ropes.items():
        np.testing.assert_allclose(frequencies(rope, cfg.H), getattr(rotary, f"{kind}inv_freq"), rtol=1e-6)
        assert getattr(rotary, f"{kind}attention_scaling") == 1


def test_gemmas_norms_and_embeddings_are_its_own(tmp_path):
    for family in FAMILIES:
        cfg = DecoderConfig.from_hf(write(tmp_path, MANY | {"model_type": family}))
        assert cfg.unit_offset_norm == cfg.scale_embeddings == family.startswith("gemma")


def test_what_a_config_does_not_say_is_tinys_default(tmp_path):
    assert read(tmp_path) == TINY


def test_windows_repeat_with_their_shortest_period(tmp_path):
    def of(layers, **changes):
        return read(tmp_path, num_hidden_layers=layers, sliding_window=8, **changes).windows

    assert of(4, model_type="mistral") == (8,)
    assert of(4, model_type="gemma2") == (8, None)
    assert of(8, model_type="gemma3_text") == (8, 8, 8, 8, 8, None)
    assert of(4, model_type="qwen2", use_sliding_window=True, max_window_layers=1) == (None, 8, 8, 8)
    assert of(4, model_type="qwen2", use_sliding_window=False, max_window_layers=1) == (None,)


def test_layers_beyond_whole_periods_have_a_stack_of_their_own(tmp_path):
    assert read(tmp_path, model_type="gemma3_text", num_hidden_layers=8).stacks == {"layers_L": 6, "rest_L": 2}
    assert read(tmp_path, model_type="gemma3_text", num_hidden_layers=12).stacks == {"layers_L": 12}
    assert read(tmp_path, num_hidden_layers=5).stacks == {"layers_L": 5}


def test_the_vocabulary_is_padded_to_a_multiple_of_128(tmp_path):
    assert [read(tmp_path, vocab_size=V).padded_V for V in (1, 128, 129, 50257)] == [128, 128, 256, 50304]


def test_rope_is_read_where_transformers_4_and_5_write_it(tmp_path):
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0, "original_max_position_embeddings": 32}
    wanted = Rope(5e5, "llama3", 8.0, 1.0, 2.0, 32)
    assert read(tmp_path, rope_theta=5e5, rope_scaling={"rope_type": "llama3"} | llama3).rope == wanted
    assert read(tmp_path, rope_theta=5e5, rope_scaling={"type": "llama3"} | llama3).rope == wanted
    assert read(tmp_path, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5} | llama3).rope == wanted
    linear = Rope(5e5, "linear", 4.0)
    assert read(tmp_path, rope_theta=5e5, rope_scaling={"type": "linear", "factor": 4}).rope == linear
    assert read(tmp_path, rope_theta=5e5, rope_scaling={"rope_type": "default"}).rope == Rope(5e5)


def test_gemma_3_has_one_rope_for_windows_and_one_for_plain_layers_in_both_forms(tmp_path):
    old = read(tmp_path, model_type="gemma3_text", rope_theta=3e5, rope_local_base_freq=2e4,
               rope_scaling={"rope_type": "linear", "factor": 8.0})  # fmt: skip
    new = read(tmp_path, model_type="gemma3_text", rope_parameters={
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 3e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4}})  # fmt: skip
    assert (old.rope, old.local_rope) == (new.rope, new.local_rope) == (Rope(3e5, "linear", 8.0), Rope(2e4))
    silent = read(tmp_path, model_type="gemma3_text")
    assert (silent.rope, silent.local_rope) == (Rope(1e6), Rope(1e4))


def test_gelu_in_gemmas_first_configs_means_its_tanh_form(tmp_path):
    assert read(tmp_path, model_type="gemma", hidden_act="gelu").activation == "gelu_tanh"
    assert read(tmp_path, model_type="gemma").activation == "gelu_tanh"
    assert read(tmp_path, hidden_act="gelu").activation == "gelu"


def test_a_reward_model_has_as_many_labels_as_its_config_names(tmp_path):
    reward = ["LlamaForSequenceClassification"]
    assert read(tmp_path, architectures=reward, id2label={"0": "LABEL_0"}).labels == 1
    assert read(tmp_path, architectures=reward).labels == 2  # transformers' default, which it does not write down
    assert read(tmp_path, architectures=["LlamaForCausalLM"], id2label={"0": "LABEL_0"}).labels == 0


SUPPORTED = ", ".join(FAMILIES)
NONE = "is not supported; supported: none"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "gpt2"}, f"model_type 'gpt2' of PATH is not supported; supported: {SUPPORTED}"),
        ({"model_type": None}, f"model_type None of PATH is not supported; supported: {SUPPORTED}"),
        (
            {"model_type": "mixtral", "num_local_experts": 8},
            f"model_type 'mixtral' of PATH is a mixture of experts, which is not supported; supported: {SUPPORTED}",
        ),
        ({"model_type": "qwen3_moe"}, "model_type 'qwen3_moe' of PATH is a mixture of experts"),
        ({"model_type": "deepseek_v3", "n_routed_experts": 256}, "'deepseek_v3' of PATH is a mixture of experts"),
        (
            {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}, "vision_config": {}},
            f"model_type 'gemma3' of PATH is multimodal, which is not supported; supported: {SUPPORTED}",
        ),
        ({"model_type": "llava", "text_config": {}, "vision_config": {}}, "'llava' of PATH is multimodal"),
        (
            {"architectures": ["LlamaForTokenClassification"]},
            "architecture 'LlamaForTokenClassification' of PATH is not supported; supported: *ForCausalLM, *ForSequenceClassification",
        ),
        ({"architectures": ["LlamaModel"]}, "architecture 'LlamaModel' of PATH is not supported"),
        (
            {"hidden_act": "relu"},
            "hidden_act 'relu' of PATH is not supported; supported: silu, gelu, gelu_pytorch_tanh",
        ),
        ({"mlp_bias": True}, f"mlp_bias True of PATH {NONE}"),
        (
            {"model_type": "gemma", "use_bidirectional_attention": True},
            f"use_bidirectional_attention True of PATH {NONE}",
        ),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 5.0}, f"attn_logit_softcapping 5.0 of PATH {NONE}"),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "quantization_config {'quant_method': 'gptq'} of PATH is not",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
            "rope type 'yarn' of PATH is not supported; supported: default, linear, llama3",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' of PATH is not supported"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope type 'longrope' of PATH is not"),
        (
            {"model_type": "phi3", "rope_scaling": {"type": "su", "short_factor": [1.0]}},
            "rope type 'su' of PATH is not",
        ),
        (
            {"model_type": "gemma3_text", "rope_parameters": {"sliding_attention": {"rope_type": "yarn"}}},
            "rope type 'yarn' of PATH is not supported",
        ),
        (
            {"model_type": "qwen3", "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}},
            "rope_parameters for full_attention of PATH are not supported; supported: one rope for all layers",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "rope type 'llama3' of PATH does not say low_freq_factor, high_freq_factor; give the model's own config.json",
        ),
        (
            {"model_type": "phi3", "partial_rotary_factor": 0.75},
            "partial_rotary_factor 0.75 of PATH is not supported; supported: 1.0",
        ),
        (
            {"model_type": "phi3", "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.75}},
            "partial_rotary_factor 0.75 of PATH is not supported",
        ),
        (
            {"model_type": "gemma2", "layer_types": ["full_attention", "chunked_attention", "full_attention"]},
            "layer_types ['full_attention', 'chunked_attention', 'full_attention'] of PATH is not supported; supported: sliding_attention or full_attention for each of its 3 layers",
        ),
        ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "layer_types ['full_attention'] of PATH is not"),
        ({"num_key_value_heads": 3}, "PATH has 4 attention heads over 3 key/value heads, which do not divide them"),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ValueError) as refusal:
        read(tmp_path, **changes)
    assert message.replace("PATH", str(tmp_path / "config.json")) in str(refusal.value)


GEMMA_2 = {"model_type": "gemma2", "head_dim": 4}


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"hidden_size": "16"}, "hidden_size"),
        ({"hidden_size": 16.5}, "hidden_size"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"vocab_size": None}, "vocab_size"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads"),
        ({"head_dim": -4}, "head_dim"),
        ({"head_dim": 5}, "head_dim"),  # rope turns pairs
        ({"max_position_embeddings": "many"}, "max_position_embeddings"),
        ({"model_type": "mistral", "sliding_window": "4096"}, "sliding_window"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"rms_norm_eps": [1e-6]}, "rms_norm_eps"),
        ({"rope_theta": "large"}, "rope_theta"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_scaling": ["linear", 4]}, "rope_scaling"),
        ({"rope_parameters": "default"}, "rope_parameters"),
        ({"rope_scaling": {"type": "linear", "factor": None}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": "four"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
            "high_freq_factor",
        ),
        ({"model_type": "gemma3_text", "rope_parameters": {"sliding_attention": 1e4}}, "rope_parameters"),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 0}, "sliding_window_pattern"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": "2"}, "max_window_layers"),
        ({"model_type": "qwen2", "use_sliding_window": "no"}, "use_sliding_window"),
        (GEMMA_2 | {"layer_types": "sliding_attention"}, "layer_types"),
        (GEMMA_2 | {"layer_types": [["full_attention"]] * 3}, "layer_types"),
        (GEMMA_2 | {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        (GEMMA_2 | {"query_pre_attn_scalar": "head_dim"}, "query_pre_attn_scalar"),
        (GEMMA_2 | {"attn_logit_softcapping": "50"}, "attn_logit_softcapping"),
        (GEMMA_2 | {"final_logit_softcapping": -30.0}, "final_logit_softcapping"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        ({"attention_bias": "no"}, "attention_bias"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"architectures": ["LlamaForSequenceClassification"], "id2label": 1}, "id2label"),
        ({"architectures": ["LlamaForSequenceClassification"], "num_labels": 0}, "num_labels"),
    ],
)
def test_a_value_of_the_wrong_kind_is_answered_with_its_name_and_file(tmp_path, changes, name):
    with pytest.raises(ValueError) as refusal:
        read(tmp_path, **changes)
    assert name in str(refusal.value) and str(tmp_path / "config.json") in str(refusal.value)


def test_a_config_that_lacks_a_size_or_is_cut_off_is_answered(tmp_path):
    write(tmp_path, {"model_type": "llama", "hidden_size": 16})
    with pytest.raises(
        ValueError, match="does not say intermediate_size, num_attention_heads, num_hidden_layers, vocab_size"
    ):
        DecoderConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "ll')
    with pytest.raises(ValueError, match=r"config.json is not JSON .*; fetch it again"):
        DecoderConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_text('["llama"]')
    with pytest.raises(ValueError, match=r"config.json holds a list, not a configuration; fetch it again"):
        DecoderConfig.from_hf(tmp_path)


def test_a_folder_without_a_config_is_answered(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model_name_or_path='.*' is not a folder with a config.json; give"):
        DecoderConfig.from_hf(tmp_path)
