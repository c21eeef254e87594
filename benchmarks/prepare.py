"""Times `repo-jax prepare` on many UltraFeedback-like pairs, and reading them back.

python benchmarks/prepare.py [--pairs 60000] [--reads 20000]

The texts are spliced from pieces of real ones, with the real ones' lengths, so that no text comes twice. The preparation runs in a process
of its own, whose peak memory is printed.
"""

import argparse
import gzip
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np

DATA = pathlib.Path(__file__).parent / "data"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=60_000)
    parser.add_argument("--reads", type=int, default=20_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        write_tokenizer(folder / "model")
        write_pairs(folder / "pairs.jsonl", arguments.pairs)
        print(f"{arguments.pairs} pairs, {(folder / 'pairs.jsonl').stat().st_size / 1e6:.0f} MB of JSON")
        command = [sys.executable, "-m", "repo_jax", "prepare", "--model", str(folder / "model")]
        command += ["--data", str(folder / "pairs.jsonl"), "--max_length", "2048", "--cache_dir", str(folder / "cache")]
        begin = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - begin
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        print(f"prepared in {seconds:.1f} s, {arguments.pairs / seconds:.0f} pairs/s, peak memory {memory:.2f} GiB")
        read_back(next((folder / "cache").glob("*/preference_tokens/*")), arguments.reads)


def write_tokenizer(folder: pathlib.Path) -> None:
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(gzip.decompress((DATA / "gpt2-tokenizer.json.gz").read_bytes()))
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE} | special
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_pairs(path: pathlib.Path, pairs: int) -> None:
    with gzip.open(DATA / "ultrafeedback.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    rng = np.random.default_rng(0)
    words = {
        column: [row[column][-1]["content"].split(" ") for row in rows] for column in ("prompt", "chosen", "rejected")
    }

    def spliced(column: str, like: int) -> str:
        """As many words as a real text has, taken in runs from others."""
        wanted, taken = len(words[column][like]), []
        while len(taken) < wanted:
            source = words[column][rng.integers(len(rows))]
            start = rng.integers(len(source))
            taken += source[start : start + int(rng.integers(3, 40))]
        return " ".join(taken[:wanted])

    with open(path, "w", encoding="utf-8") as file:
        for number in range(pairs):
            like = int(rng.integers(len(rows)))
            row = {
                column: [{"role": "user" if column == "prompt" else "assistant", "content": spliced(column, like)}]
                for column in words
            }
            file.write(json.dumps({"id": f"pair {number}"} | row, ensure_ascii=False) + "\n")


def read_back(folder: pathlib.Path, reads: int) -> None:
    from repo_jax.data.store import TokenStore

    store = TokenStore(folder)
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    order = np.random.default_rng(0).permutation(len(store))[:reads]
    begin = time.perf_counter()
    tokens = sum(store[i].slots for i in order)
    seconds = time.perf_counter() - begin
    print(
        f"{len(store)} pairs in {size:.0f} MB; read back in random order: {len(order) / seconds:.0f} pairs/s, {tokens / seconds / 1e6:.1f} M tokens/s"
    )


if __name__ == "__main__":
    main()
