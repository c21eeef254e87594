"""Tiny random checkpoints of every family, made and judged by transformers on torch: what imported weights are held against.

    folder = folder_of("gemma2")                    # made once, whoever asks
    theirs = torch_logps("gemma2", ids)             # one fewer than ids
    make("llama", tmp_path, dtype="bfloat16", tied=True, shard_bytes=20_000)

Every number that a config can state is chosen so that it is in use: sequences of 40 tokens are longer than the windows, caps
and epsilons are large enough to be seen, norms and biases are not at their initial values, and logits have a standard
deviation of at least 1.
"""

import atexit
import functools
import pathlib
import shutil
import tempfile
import zlib

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the oracle is transformers' own models, which need torch")
transformers = pytest.importorskip(
    "transformers", minversion="5", reason="the checkpoints are written by transformers 5"
)

transformers.utils.logging.disable_progress_bar()

V = 150  # no multiple of 128
LENGTH = 40  # tokens of a sequence that no window holds

SHAPE = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=0.05, tie_word_embeddings=False,
             bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip
# A base this small leaves no frequency without a visible angle in 40 tokens.
THETA = 500.0
ROPE = dict(rope_parameters={"rope_type": "default", "rope_theta": THETA})
LLAMA3 = {"rope_type": "llama3", "rope_theta": THETA, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": THETA, "factor": 4.0}
GEMMA = SHAPE | dict(head_dim=12, tie_word_embeddings=True, attention_bias=False)
GEMMA2 = GEMMA | dict(query_pre_attn_scalar=20, attn_logit_softcapping=3.0, final_logit_softcapping=6.0, sliding_window=8,
                      num_hidden_layers=4)  # fmt: skip
GEMMA3 = GEMMA | dict(
    query_pre_attn_scalar=20,
    sliding_window=8,
    num_hidden_layers=8,  # five with a window and one without, then two more
    rope_parameters={
        "full_attention": LINEAR,
        "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
    },
)

SHORT_PATTERN = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]

# name: (transformers' config class, its model class, its settings)
CHECKPOINTS = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", SHAPE | ROPE | dict(head_dim=12)),
    "llama-tied": ("LlamaConfig", "LlamaForCausalLM", SHAPE | ROPE | dict(tie_word_embeddings=True)),
    "llama-bias": ("LlamaConfig", "LlamaForCausalLM", SHAPE | ROPE | dict(attention_bias=True, hidden_act="gelu")),
    "llama-3.1": ("LlamaConfig", "LlamaForCausalLM", SHAPE | dict(rope_parameters=LLAMA3)),
    "llama-linear": ("LlamaConfig", "LlamaForCausalLM", SHAPE | dict(rope_parameters=LINEAR)),
    "llama-reward": ("LlamaConfig", "LlamaForSequenceClassification", SHAPE | ROPE | dict(num_labels=1)),
    "mistral": ("MistralConfig", "MistralForCausalLM", SHAPE | ROPE | dict(sliding_window=None, head_dim=12)),
    "mistral-window": ("MistralConfig", "MistralForCausalLM", SHAPE | ROPE | dict(sliding_window=8)),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", SHAPE | ROPE),
    "qwen2-window": ("Qwen2Config", "Qwen2ForCausalLM", SHAPE | ROPE
                     | dict(use_sliding_window=True, sliding_window=8, max_window_layers=2, num_hidden_layers=5)),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", SHAPE | ROPE | dict(head_dim=12)),
    "qwen3-bias": ("Qwen3Config", "Qwen3ForCausalLM", SHAPE | ROPE | dict(head_dim=12, attention_bias=True)),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", GEMMA | ROPE),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", GEMMA2 | ROPE),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", GEMMA3),
    "gemma3-untied": ("Gemma3TextConfig", "Gemma3ForCausalLM", GEMMA3
                      | dict(tie_word_embeddings=False, num_hidden_layers=5, layer_types=SHORT_PATTERN)),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", SHAPE | ROPE),
    "phi3-window": ("Phi3Config", "Phi3ForCausalLM", SHAPE | ROPE | dict(sliding_window=8)),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", SHAPE | ROPE),
    "olmo2-bias": ("Olmo2Config", "Olmo2ForCausalLM", SHAPE | ROPE | dict(attention_bias=True)),
}  # fmt: skip


def randomize(model, *, seed: int) -> None:
    """Every parameter drawn anew: matrices keep the size of what they are given, norms and biases leave their initial values."""
    # Gemma's norms multiply by 1 + weight.
    norm_mean = 0.0 if model.config.model_type.startswith("gemma") else 1.0
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                mean, scale = norm_mean, 0.3
            elif p.ndim == 1:
                mean, scale = 0.0, 0.4
            else:
                mean, scale = 0.0, 2 * p.shape[1] ** -0.5
            p.copy_(mean + scale * torch.randn(p.shape, generator=generator))


def make(
    name: str,
    folder: str | pathlib.Path,
    *,
    dtype: str = "float32",
    tied: bool | None = None,
    shard_bytes: int | None = None,
    **changes,
):
    """Writes the checkpoint as a Hugging Face folder and returns the torch model, in eval mode and with plain attention.

    `tied` and `changes` differ from the table: make("gemma2", folder, sliding_window=4).
    """
    config_class, model_class, settings = CHECKPOINTS[name]
    settings = settings | changes | ({} if tied is None else {"tie_word_embeddings": tied})
    config = getattr(transformers, config_class)(**settings, attn_implementation="eager")
    model = getattr(transformers, model_class)(config).eval()
    randomize(model, seed=zlib.crc32(name.encode()))
    if model_class.endswith("CausalLM"):
        with torch.no_grad():
            logits = model(torch.tensor(random_ids()[None])).logits
        assert logits.std() >= 1, f"{name}: log-probs near uniform prove little"
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(folder, **({} if shard_bytes is None else {"max_shard_size": shard_bytes}))
    return model


@functools.cache
def _made(name: str):
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f"repo-jax-{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder, make(name, folder)


def folder_of(name: str) -> pathlib.Path:
    """The checkpoint's folder, made on first use; not to be written to."""
    return _made(name)[0]


def torch_model(name: str):
    """The torch model in that folder, in float32; not to be changed."""
    return _made(name)[1]


def random_ids(*shape: int, seed: int = 0) -> np.ndarray:
    """Token ids, 40 without a shape."""
    return np.random.default_rng(seed).integers(V, size=shape or (LENGTH,))


def torch_logps(model, ids) -> np.ndarray:
    """log p(ids[..., i + 1] | ids[..., : i + 1]) for every i, from a name of CHECKPOINTS, a folder or a torch model."""
    ids = np.asarray(ids)
    rows = torch.tensor(np.atleast_2d(ids))
    with torch.no_grad():
        logps = torch.log_softmax(loaded(model)(rows).logits.float(), -1)
    of_ids = logps[:, :-1].gather(-1, rows[:, 1:, None])[..., 0]
    return of_ids.numpy().reshape(*ids.shape[:-1], -1)


def torch_scores(model, ids) -> np.ndarray:
    """What a *ForSequenceClassification says at the last token of each sequence of ids: [sequences, labels]."""
    model = loaded(model)
    with torch.no_grad():
        hidden = model.model(torch.tensor(np.atleast_2d(ids))).last_hidden_state
        return model.score(hidden[:, -1]).numpy()


def loaded(model):
    """A torch model from a name of CHECKPOINTS or a folder; a torch model as it is."""
    if isinstance(model, str) and model in CHECKPOINTS:
        return torch_model(model)
    if isinstance(model, str | pathlib.Path):
        return transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="eager"
        ).eval()
    return model
