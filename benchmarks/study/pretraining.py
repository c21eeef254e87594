"""A small Llama pretrained on plain text, written as a Hugging Face folder.

Axis letters: B sequences, T tokens of one.
"""

import functools
import gzip
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from repo_jax.logps import exact_matmuls, head_of, token_logps
from repo_jax.models.config import DecoderConfig
from repo_jax.models.decoder import Decoder
from repo_jax.models.hf import to_hf

ROOT = pathlib.Path(__file__).parents[2]
CORPUS = ROOT / "benchmarks" / "data" / "corpus.txt.gz"
NAME = "small-llama"
V, B, T = 2048, 8, 256
PEAK = 3e-3
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "vocab_size": V,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "dtype": "float32",
}
# The corpus writes a dialogue so: turns between empty lines, a document after <s>.
CHAT_TEMPLATE = (
    "{{ bos_token }}{%- for message in messages -%}"
    "{{ ('' if loop.first else '\\n\\n') + message['content'] }}"
    "{%- if message['role'] == 'assistant' -%}{{ eos_token }}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '\\n\\n' }}{%- endif -%}"
)


def folder_of(cache: pathlib.Path, updates: int) -> pathlib.Path:
    return cache / f"{NAME}-{updates}"


def documents() -> tuple[list[str], int]:
    """The corpus without the dialogues of the study's own pairs, and how many those were: the model shall not have seen their answers."""
    every = gzip.decompress(CORPUS.read_bytes()).decode().split("\n<|endoftext|>\n")
    begins = set()
    for split in ("train", "test"):
        for line in (ROOT / "assets" / "preferences" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
            begins.add(json.loads(line)["prompt"][0]["content"].strip()[:40])
    kept = [text for text in every if not text.startswith(tuple(begins))]
    return kept, len(every) - len(kept)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=V,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def pretrain(cache: pathlib.Path, updates: int) -> dict:
    """Trains tokenizer and model and writes their folder; returns what is to be told of it."""
    began = time.perf_counter()
    texts, left_out = documents()
    tokenizer = train_tokenizer(texts)
    ids = [np.int32([1, *encoding.ids]) for encoding in tokenizer.encode_batch_fast(texts)]
    order = np.random.default_rng(0).permutation(len(ids))
    stream = np.concatenate([ids[i] for i in order])
    held_out, stream = stream[: 16 * (T + 1)], stream[16 * (T + 1) :]
    folder = folder_of(cache, updates)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
    cfg = DecoderConfig.from_hf(folder)
    params, losses, last = train(cfg, stream, held_out, updates)
    for old in folder.glob("model*.safetensors"):
        old.unlink()
    to_hf(params, cfg, folder, dtypes="float32")
    tokenizer.save(str(folder / "tokenizer.json"))
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    return {
        "updates": updates,
        "tokens_per_update": B * T,
        "corpus_tokens": len(stream),
        "documents": len(texts),
        "documents_left_out": left_out,
        "held_out_loss": last,
        "losses": [[k, round(loss, 4)] for k, loss in losses],
        "seconds": round(time.perf_counter() - began, 1),
    }


def train(cfg: DecoderConfig, stream: np.ndarray, held_out: np.ndarray, updates: int):
    """The parameters, some training losses, and the loss of held-out text, in nats per token."""
    model = Decoder(cfg, jnp.float32, "none", attention="blocked", head_chunks=(256, 256))
    zeros_BT = jnp.zeros((B, T), jnp.int32)
    optimizer = optax.adamw(
        optax.warmup_cosine_decay_schedule(0, PEAK, updates // 20 + 1, updates, PEAK / 10), b2=0.99, weight_decay=0.01
    )

    def nll(params, tokens_BT1):
        rows, T_ = tokens_BT1.shape[0], tokens_BT1.shape[1] - 1
        positions_BT = jnp.tile(jnp.arange(T_), (rows, 1))
        one_BT = jnp.ones((rows, T_), jnp.int32)
        with exact_matmuls(model.dtype):
            hidden_BTD = model.apply({"params": params}, tokens_BT1[:, :-1], positions_BT, one_BT, one_BT, None)
        return -token_logps(hidden_BTD, head_of(model, {"params": params}), tokens_BT1[:, 1:]).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, state, tokens_BT1):
        loss, grads = jax.value_and_grad(nll)(params, tokens_BT1)
        updates_, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates_), state, loss

    params = jax.jit(model.init)(jax.random.key(0), *[zeros_BT] * 4, None)["params"]
    state, losses = optimizer.init(params), []
    starts = np.random.default_rng(1).permutation(len(stream) // (T + 1))
    for k in range(updates):
        taken = [starts[i % len(starts)] * (T + 1) for i in range(k * B, k * B + B)]
        params, state, loss = update(params, state, np.stack([stream[at : at + T + 1] for at in taken]))
        if k % 50 == 0 or k == updates - 1:
            losses.append((k, float(loss)))
            print(f"pretraining {k}/{updates}: loss {losses[-1][1]:.3f}", flush=True)
    return params, losses, float(jax.jit(nll)(params, held_out.reshape(16, T + 1)))
