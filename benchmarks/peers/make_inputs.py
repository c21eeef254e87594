"""Writes what both sides of a comparison read: a model of random weights, real pairs, and the updates they make up.

python benchmarks/peers/make_inputs.py FOLDER [--shape 24m] [--max_length 2048] [--pairs_per_update 32]

FOLDER/model          a Hugging Face folder: a Llama of this shape, GPT-2's tokenizer, a chat template
FOLDER/pairs.jsonl    the pairs of benchmarks/data that fit into max_length, for repo-jax
FOLDER/updates.jsonl  one epoch of them in the order of repo-jax's updates, with their token ids, for the others
FOLDER/recipe.yaml    repo-jax's recipe: SimPO, AdamW, a constant learning rate
FOLDER/inputs.json    the numbers that both sides keep to
"""

import argparse
import gzip
import json
import pathlib
from collections.abc import Iterator

import numpy as np
import yaml

from repo_jax.data.batches import batch_indices, steps_per_epoch
from repo_jax.data.chat import PairTokenizer, TokenOptions, load_tokenizer
from repo_jax.data.schema import PreferenceExample
from repo_jax.models.config import DecoderConfig
from repo_jax.models.hf import expected_tensors
from repo_jax.models.tensors import DTYPES, write_file

DATA = pathlib.Path(__file__).parents[1] / "data"
# hidden width, layers, query heads, key/value heads, MLP width, vocabulary, tied, dtype of the weights
SHAPES = {
    "tiny": (64, 2, 2, 1, 128, 50_304, True, "float32"),  # to try the scripts
    "24m": (320, 6, 5, 5, 896, 50_304, True, "float32"),
    "1b": (2048, 16, 32, 8, 8192, 128_256, True, "bfloat16"),  # Llama 3.2 1B
    "3b": (3072, 28, 24, 8, 8192, 128_256, True, "bfloat16"),  # Llama 3.2 3B
    "8b": (4096, 32, 32, 8, 14_336, 128_256, False, "bfloat16"),  # Llama 3 8B
}
HEAD_DIM = {"tiny": 32, "24m": 64, "1b": 64, "3b": 128, "8b": 128}
# ChatML, but the line break stands before a message: an answer ends with the end token, to which no side adds anything.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '' if loop.first else '\n' }}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}{% endif %}"
)
BETA, GAMMA = 2.0, 0.25  # gamma in nats per token; TRL's simpo_gamma is beta times that


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--shape", choices=SHAPES, default="24m")
    parser.add_argument("--max_length", type=int, default=2048)
    parser.add_argument("--pairs_per_update", type=int, default=32)
    parser.add_argument("--loss_type", choices=("simpo", "repo"), default="simpo")
    parser.add_argument("--seed", type=int, default=42)
    options = vars(parser.parse_args())
    print(json.dumps(make(options.pop("folder"), **options)))


def make(
    folder: pathlib.Path, *, shape: str, max_length: int, pairs_per_update: int, loss_type="simpo", seed=42
) -> dict:
    """Writes all of it and returns what there is to say about the pairs."""
    folder = folder.resolve()
    write_model(folder / "model", shape)
    rows, pairs = fitting(load_tokenizer(str(folder / "model")), max_length)
    write_lines(folder / "pairs.jsonl", rows)
    updates = steps_per_epoch(len(pairs), pairs_per_update)
    order = [
        i
        for step in range(updates)
        for i in batch_indices(step, pairs=len(pairs), train_batch_size=pairs_per_update, seed=seed)
    ]
    ids = ({"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in (pairs[i] for i in order))
    ids = ({f"{side}_ids": array.tolist() for side, array in arrays.items()} for arrays in ids)
    write_lines(folder / "updates.jsonl", (rows[i] | more for i, more in zip(order, ids, strict=True)))
    loss = {"loss_type": loss_type, "gamma": GAMMA} | ({"beta": BETA} if loss_type == "simpo" else {})
    recipe = {
        "model": {"model_name_or_path": str(folder / "model")},
        "data": {"dataset_name": str(folder / "pairs.jsonl"), "max_length": max_length, "cache_dir": str(folder)},
        "loss": loss,
        "optim": {"train_batch_size": pairs_per_update, "lr_scheduler_type": "constant", "warmup_ratio": 0.0},
        "run": {"seed": seed, "output_dir": str(folder / "run")},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    inputs = {
        "shape": shape,
        "max_length": max_length,
        "pairs_per_update": pairs_per_update,
        "updates": updates,
        "pairs": len(pairs),
        "mean_tokens_of_a_sequence": round(float(np.mean([pair.wholes for pair in pairs])), 1),
    }
    (folder / "inputs.json").write_text(json.dumps(inputs))
    return inputs


def write_model(folder: pathlib.Path, shape: str, *, seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    D, L, N, K, F, V, tied, dtype = SHAPES[shape]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": D,
        "num_hidden_layers": L,
        "num_attention_heads": N,
        "num_key_value_heads": K,
        "head_dim": HEAD_DIM[shape],
        "intermediate_size": F,
        "vocab_size": V,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0 if V < 100_000 else 500_000.0,
        "max_position_embeddings": 8192,
        "bos_token_id": 50_256,
        "eos_token_id": 50_258,
        "dtype": dtype,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "tokenizer.json").write_bytes(gzip.decompress((DATA / "gpt2-tokenizer.json.gz").read_bytes()))
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE} | special
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    shapes = expected_tensors(DecoderConfig.from_hf(folder))
    rng = np.random.default_rng(seed)

    def drawn() -> Iterator[tuple[str, np.ndarray]]:
        for name, size in shapes.items():
            if len(size) == 1:
                yield name, np.ones(size, DTYPES[dtype])  # norms
            else:
                yield name, (0.02 * rng.standard_normal(size, np.float32)).astype(DTYPES[dtype])

    write_file(folder / "model.safetensors", {name: (dtype, size) for name, size in shapes.items()}, drawn())


def fitting(tokenizer, max_length: int) -> tuple[list[dict], list]:
    """The rows whose prompt and longer answer fit, and their ids."""
    with gzip.open(DATA / "ultrafeedback.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    examples = [PreferenceExample(r["id"], r["id"], r["prompt"], r["chosen"], r["rejected"]) for r in rows]
    results = PairTokenizer(tokenizer, TokenOptions(max_length=max_length))(examples)
    kept = [(row, result.pair) for row, result in zip(rows, results, strict=True) if result.pair is not None]
    columns = ("id", "prompt", "chosen", "rejected")
    return [{name: row[name] for name in columns} for row, _ in kept], [pair for _, pair in kept]


def write_lines(path: pathlib.Path, rows) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
