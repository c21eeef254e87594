"""Prints the row shapes suggested for real pairs, and how much of their rows stays empty.

python benchmarks/padding.py [--pairs 128] [--batches 40] [--devices 1 8 16 32] [--views]

The pairs are the UltraFeedback ones in benchmarks/data, in GPT-2's tokens and the conversation template of benchmarks/prepare.py, at
max_length 2048. Updates of `--pairs` pairs are drawn at random. A second pass has the pairs with a gradient only: it is shown for several
shares of them, with the slots it takes beside those of the whole update (its ideal is the share of the real slots).
"""

import argparse
import pathlib
import tempfile
import time

import numpy as np
from prepare import DATA, write_tokenizer

from repo_jax.data.chat import PairTokenizer, TokenOptions, load_tokenizer
from repo_jax.data.rows import Sizes, packed, row_batches, suggest_shapes
from repo_jax.data.schema import PairTokens, read_examples
from repo_jax.data.sources import open_source

SHARES = (1.0, 0.6, 0.4, 0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=128, help="per update")
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8, 16, 32], help="over which rows are spread")
    parser.add_argument("--views", action="store_true", help="rows with room for views")
    parser.add_argument("--budget", type=int, default=8192, help="slots a device works on at a time")
    arguments = parser.parse_args()
    pairs = read_pairs()
    lengths_B3 = np.array([pair.lengths for pair in pairs])
    scored_B = np.array([pair.scored for pair in pairs])
    table = Sizes(lengths_B3.sum(axis=1), scored_B, lengths_B3[:, :1] + lengths_B3[:, 1:])
    print(
        f"{len(pairs)} pairs of UltraFeedback, GPT-2's tokens, ChatML-like template, max_length 2048: "
        f"slots mean {table.slots_B.mean():.0f}, median {np.median(table.slots_B):.0f}, longest {table.slots_B.max()}"
    )
    print(f"{arguments.pairs} pairs per update, {arguments.batches} random updates, budget {arguments.budget} slots\n")
    rng = np.random.default_rng(1)
    updates = [rng.choice(len(pairs), arguments.pairs, replace=False) for _ in range(arguments.batches)]
    for ways in arguments.devices:
        begin = time.perf_counter()
        shapes = suggest_shapes(
            *table, B=arguments.pairs, ways=ways, view_length=arguments.views, budget=arguments.budget
        )
        seconds = time.perf_counter() - begin
        print(f"{ways} devices: {', '.join(map(describe, shapes))} (found in {seconds:.2f} s)")
        show_padding(table, shapes, updates)
        begin = time.perf_counter()
        for update in updates:
            row_batches([pairs[i] for i in update], shapes)
        print(f"  rows of an update are built in {(time.perf_counter() - begin) / len(updates) * 1e3:.1f} ms\n")


def read_pairs() -> list[PairTokens]:
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(pathlib.Path(folder) / "model")
        tokenizer = load_tokenizer(str(pathlib.Path(folder) / "model"))
    source = open_source(str(DATA / "ultrafeedback.jsonl.gz"), "train")
    tokenized = PairTokenizer(tokenizer, TokenOptions(max_length=2048))(list(read_examples(source.rows())))
    return [result.pair for result in tokenized if result.pair is not None]


def describe(shape) -> str:
    return f"{shape.R} x {shape.T} (S {shape.S}" + (f", Y {shape.Y})" if shape.Y else ")")


def show_padding(table: Sizes, shapes, updates) -> None:
    print("  share  padding mean  worst  row batches  slots of whole  ideal  fullest row  scored room unused")
    whole = None
    for share in SHARES:
        real, taken, batches, fullest, unscored = (np.zeros(len(updates)) for _ in range(5))
        for k, update in enumerate(updates):
            part = table.of(update[: round(share * len(update))])
            shape, rows = packed(part, shapes)
            loads = [part.slots_B[row].sum() for row in rows]
            real[k], taken[k], batches[k] = sum(loads), len(rows) * shape.T, len(rows) / shape.R
            fullest[k] = max(loads) / np.mean(loads)
            unscored[k] = 1 - part.scored_B.sum() / (len(rows) * shape.S)
        whole = (taken.mean(), real.mean()) if whole is None else whole
        padding = 1 - real / taken
        print(
            f"  {share:5.1f} {padding.mean():13.1%} {padding.max():6.1%} {batches.mean():12.1f} {taken.mean() / whole[0]:15.2f} "
            f"{real.mean() / whole[1]:6.2f} {fullest.mean():12.2f} {unscored.mean():19.1%}"
        )


if __name__ == "__main__":
    main()
