"""What a data set holds, what would be trained on, and what is wrong with it; no jax."""

import collections
import itertools
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from tqdm import tqdm

from repo_jax.config import Recipe
from repo_jax.data.batches import batch_indices, steps_per_epoch
from repo_jax.data.chat import PairTokenizer, TokenOptions
from repo_jax.data.rows import BUDGET, packed, sizes_of, suggest_shapes
from repo_jax.data.schema import PairTokens, PreferenceExample, read_examples
from repo_jax.data.sources import RawRow
from repo_jax.data.store import NothingLeftError, TokenStore, is_prepared
from repo_jax.stores import data_path, held_out_store, open_data, token_options, tokenizer_of, train_store

BATCHES = 20  # so many updates are packed to see what their rows look like
DEVICES = (1, 8, 16)  # on so many accelerators
COMPARED = 1000  # so many pairs are tokenized the official way too
SHINGLE = 8  # words in a row that two prompts may share
COMMON, COMMON_SHARE = 20, 0.01  # a shingle of more held-out prompts than either of these is common
ALIKE = 0.8  # a held-out prompt with this share of its shingles in one training prompt is a near-duplicate


def inspect(recipe: Recipe, *, show: int = 3, compare: str | None = None) -> dict:
    """Everything there is to say of a recipe's data, as plain values (JSON); as_text writes it for people.

    show: how many of the first pairs are decoded; compare="official": what the code released with SimPO and RePO would score
    instead. Raises ValueError or FileNotFoundError for what cannot be inspected.
    """
    tokenizer, found, stores = tokenizer_of(recipe), {}, {}
    for split, open_it in (("train", train_store), ("held_out", held_out_store)):
        try:
            store = open_it(recipe, tokenizer)
        except NothingLeftError as nothing:
            found[split] = {"name": nothing.name, "rows": nothing.rows, "pairs": 0, "dropped": nothing.dropped}
            found[split] |= {"noticed": {}, "counts": nothing.counts}
            continue
        if store is not None:
            found[split], stores[split] = describe_store(store), store
    train, held_out = stores.get("train"), stores.get("held_out")
    if train is not None:
        found["packing"] = describe_packing(recipe, train, list(stores.values()))
        if not train.unpaired:
            found["length_balance"] = length_balance(train)
        if held_out is not None:
            found["near_duplicates"] = near_duplicates(prompt_texts(train), prompt_texts(held_out))
        found["examples"] = [decoded(tokenizer, train[i]) for i in range(min(show, len(train)))]
        if compare == "official":
            found["official"] = compare_official(recipe, tokenizer, train, show)
    found["wrong"] = what_is_wrong(found)
    return found


def describe_store(store: TokenStore) -> dict:
    """Schema, counts and lengths in tokens of one split."""
    whole = store.lengths[:, :1] + store.lengths[:, 1:]
    columns = {"prompt": store.lengths[:, 0], "chosen": store.scored[:, 0], "rejected": store.scored[:, 1]}
    columns["prompt + longer answer"] = whole.max(axis=1)
    return {
        "name": store.name,
        "folder": str(store.folder),
        "schema": store.schema,
        "rows": store.rows,
        "pairs": len(store),
        "dropped": store.dropped,
        "noticed": store.noticed,
        "named": store.named,
        "counts": store.counts(),
        "columns": sorted(store.columns),
        "max_length": store.tokens["max_length"],
        "over_length_share": (store.noticed.get("truncated", 0) + store.dropped.get("over_long", 0)) / store.rows,
        "lengths": {name: quantiles(tokens[tokens > 0]) for name, tokens in columns.items() if (tokens > 0).any()},
    }


def quantiles(tokens: np.ndarray) -> dict[str, float]:
    p50, p90 = np.quantile(tokens, [0.5, 0.9])
    return {"mean": float(tokens.mean()), "p50": float(p50), "p90": float(p90), "max": int(tokens.max())}


def describe_packing(recipe: Recipe, store: TokenStore, stores: list[TokenStore]) -> dict:
    """Row shapes that hold every pair of all stores, and what packing and shared prompts save on the one trained on."""
    B, data = min(recipe.optim.train_batch_size, len(store)), recipe.data
    every, own = sizes_of(stores), sizes_of([store])
    longest = int(every.slots_B.max())
    fixed = {"row_length": data.row_length, "scored_length": data.scored_length}
    if data.row_length is not None and data.row_length < longest:
        fixed = {}  # what is wrong is said elsewhere; here stands what would do
    updates = [
        own.of(batch_indices(step, pairs=len(store), train_batch_size=B, seed=recipe.run.seed))
        for step in range(min(BATCHES, steps_per_epoch(len(store), B)))
    ]
    used, on_devices = sum(int(sizes.slots_B.sum()) for sizes in updates), {}
    for devices in DEVICES:
        shapes = suggest_shapes(
            *every,
            B=B,
            ways=devices,
            rows_per_device=data.rows_per_device,
            budget=data.slots_per_device or BUDGET,
            **fixed,
        )
        taken = 0
        for sizes in updates:
            shape, rows = packed(sizes, shapes)
            taken += len(rows) * shape.T
        on_devices[devices] = {"shapes": [shape._asdict() for shape in shapes], "padding": 1 - used / taken}
    wholes = own.views_B2[own.views_B2 > 0]
    return {
        "longest_pair": longest,
        "recipe_row_length": data.row_length,
        "train_batch_size": B,
        "on_devices": on_devices,
        "padding_one_pair_per_row": 1 - used / (len(updates) * B * longest),
        "tokens": int(store.slots.sum()),
        "shared_prompts_save": 1 - float(store.slots.sum() / wholes.sum()),
    }


def length_balance(store: TokenStore) -> dict[str, float] | None:
    """How far the labels follow length: the share of pairs, of those that differ, whose longer answer is the chosen one."""
    longer = store.scored[:, 0] - store.scored[:, 1]
    differ = longer[longer != 0]
    if not len(differ):
        return None
    most = differ[np.abs(differ) >= np.quantile(np.abs(differ), 0.75)]
    return {
        "longer_is_chosen": float((differ > 0).mean()),
        "longer_is_chosen_where_it_differs_most": float((most > 0).mean()),  # the quarter with the largest difference
        "mean_difference": float(longer.mean()),  # tokens
    }


def near_duplicates(train_prompts: Iterable[tuple[str, str]], held_out_prompts: Iterable[tuple[str, str]]) -> dict:
    """Held-out prompts that are in the training data too, or nearly. Prompts are (id, text).

    Runs of words that many held-out prompts share, such as an instruction around each, tell nothing and are left out.
    """
    ids, exact, wanted = [], collections.defaultdict(list), collections.defaultdict(list)  # text, or shingle -> prompts
    for k, (name, text) in enumerate(held_out_prompts):
        ids.append(name)
        exact[normal(text)].append(k)
        for shingle in shingles_of(text):
            wanted[shingle].append(k)
    common = max(COMMON, COMMON_SHARE * len(ids))
    wanted = {shingle: prompts for shingle, prompts in wanted.items() if len(prompts) <= common}
    sizes = collections.Counter(k for prompts in wanted.values() for k in prompts)
    alike = {}
    for name, text in train_prompts:
        hits = collections.Counter(k for shingle in shingles_of(text) for k in wanted.get(shingle, ()))
        near = [k for k, n in hits.items() if n >= ALIKE * sizes[k]]
        for k in [*near, *exact.get(normal(text), ())]:
            alike.setdefault(k, name)
    return {
        "held_out": len(ids),
        "near_duplicates": len(alike),
        "pairs": [{"held_out": ids[k], "train": name} for k, name in sorted(alike.items())[:5]],
    }


def normal(text: str) -> str:
    return " ".join(text.casefold().split())


def shingles_of(text: str) -> set[int]:
    """Every run of SHINGLE words, in lower case, as a number; of a shorter text, the text."""
    words = re.findall(r"\w+", text.lower())
    return {hash(tuple(words[i : i + SHINGLE])) for i in range(max(1, len(words) - SHINGLE + 1))} if words else set()


def example_of(store: TokenStore, i: int) -> PreferenceExample:
    """The example that pair i was made of."""
    name, row = store.source_row(i)
    for schema in store.schemas:  # of a mixture, the first that fits
        (example,) = read_examples([RawRow(store.name, f"{store.name} pair {i}", name, row)], schema=schema)
        if isinstance(example, PreferenceExample):
            break
    return example


def prompt_texts(store: TokenStore) -> Iterator[tuple[str, str]]:
    """(id, what the user says) of every pair."""
    for i in tqdm(range(len(store)), desc="reading prompts", unit=" pairs", disable=None, leave=False):
        example = example_of(store, i)
        said = example.prompt
        if example.conversational:
            said = "\n".join(message["content"] for message in said if message["role"] == "user")
        yield example.id, said


def decoded(tokenizer, pair: PairTokens) -> dict:
    """A pair as text, in pieces: [text, whether it is scored]."""
    return {
        "id": pair.id,
        "chosen": pieces(tokenizer, pair.prompt, pair.chosen, pair.chosen_mask),
        "rejected": pieces(tokenizer, pair.prompt, pair.rejected, pair.rejected_mask),
    }


def pieces(tokenizer, prompt: np.ndarray, branch: np.ndarray, mask: np.ndarray) -> list[list]:
    ids = np.concatenate([prompt, branch])
    scored = np.concatenate([np.zeros(len(prompt), bool), mask])
    ends = [*(np.flatnonzero(scored[1:] != scored[:-1]) + 1), len(ids)] if len(branch) else []
    found, before = [], 0
    for start, end in zip([0, *ends], ends, strict=False):
        # Decoded from the beginning: a piece by itself would lose the space before its first word.
        text = tokenizer.decode(ids[:end])
        found.append([text[before:], bool(scored[start])])
        before = len(text)
    return found


def compare_official(recipe: Recipe, tokenizer, store: TokenStore, show: int) -> dict:
    """What SimPO's and RePO's code would make of the first rows, beside what is made of them here."""
    ours = token_options(recipe, training=True)
    most = recipe.data.max_prompt_length or round(ours.max_length * 1800 / 2048)  # the recipes' share
    lengths = {"max_length": ours.max_length, "max_prompt_length": most}
    official = TokenOptions(
        **lengths, truncation="official", compat="official", chat_template_kwargs=ours.chat_template_kwargs
    )
    examples = first_examples(recipe, store, COMPARED)
    here, there = (PairTokenizer(tokenizer, options)(examples) for options in (ours, official))
    both = [(a.pair, b.pair) for a, b in zip(here, there, strict=True) if a.pair is not None and b.pair is not None]
    refused = [result.message for result in there if result.message]
    return lengths | {
        "rows": len(examples),
        "kept": [sum(result.pair is not None for result in results) for results in (here, there)],
        "truncated": [sum("truncated" in result.noticed for result in results) for results in (here, there)],
        "scored_per_answer": [
            float(np.mean([mask.sum() for pair in side for mask in pair.masks if len(mask)]))
            for side in zip(*both, strict=True)
        ],
        "same": sum(_same(*pairs) for pairs in both),
        "refused": len(refused),
        "first_refusal": refused[0] if refused else None,
        "examples": [decoded(tokenizer, result.pair) for result in there if result.pair is not None][:show],
    }


def first_examples(recipe: Recipe, store: TokenStore, n: int) -> list[PreferenceExample]:
    """The first rows of the training data that can be read; of a store that was given by its folder, those it kept."""
    dataset = recipe.data.dataset_name or recipe.data.dataset_mixer
    if isinstance(dataset, str) and is_prepared(pathlib.Path(data_path(dataset, recipe.data.cache_dir))):
        return [example_of(store, i) for i in range(min(n, len(store)))]
    source = open_data(recipe.data, dataset, recipe.data.dataset_train_split)
    rows = read_examples(itertools.islice(source.rows(), n), schema=recipe.data.schema)
    return [row for row in rows if isinstance(row, PreferenceExample)]


def _same(pair: PairTokens, other: PairTokens) -> bool:
    """Whether both have the same ids and score the same of them, wherever the shared prompt ends."""

    def whole(pair: PairTokens) -> list:
        masks = (np.concatenate([np.zeros(len(pair.prompt), bool), mask]) for mask in pair.masks)
        return [
            (np.concatenate([pair.prompt, ids]).tolist(), mask.tolist())
            for ids, mask in zip(pair.branches, masks, strict=True)
        ]

    return whole(pair) == whole(other)


def what_is_wrong(found: dict) -> list[str]:
    """What should be mended before training; empty if nothing."""
    wrong = []
    for split in ("train", "held_out"):
        store = found.get(split)
        if store is None:
            continue
        wrong += [f"{split}: {n} rows dropped as {reason}" for reason, n in store["dropped"].items()]
        if n := store["noticed"].get("missing_eos"):
            wrong.append(f"{split}: {n} pairs with an answer that no end token follows")
        if not store["pairs"]:
            wrong.append(f"{split}: nothing is left")
    if n := found.get("near_duplicates", {}).get("near_duplicates"):
        wrong.append(f"{n} held-out prompts are in the training data, or nearly")
    packing = found.get("packing", {"recipe_row_length": None})
    if packing["recipe_row_length"] is not None and packing["recipe_row_length"] < packing["longest_pair"]:
        wrong.append(
            f"row_length={packing['recipe_row_length']} does not hold the longest pair ({packing['longest_pair']} slots)"
        )
    return wrong


def as_text(found: dict, *, color: bool) -> str:
    """The inspection for people; scored text is green where color, else in [[ ]]."""
    lines = []
    for split in ("train", "held_out"):
        if split in found:
            lines += _store_lines(split, found[split])
    if "packing" in found:
        lines += _packing_lines(found["packing"])
    if found.get("length_balance"):
        b = found["length_balance"]
        lines += ["", "length and label"]
        lines.append(
            f"  the longer answer is the chosen one in {b['longer_is_chosen']:.0%} of the pairs, in "
            f"{b['longer_is_chosen_where_it_differs_most']:.0%} of the quarter whose lengths differ most; chosen - rejected is "
            f"{b['mean_difference']:+.1f} tokens on average"
        )
    if "near_duplicates" in found:
        n = found["near_duplicates"]
        lines += ["", "prompts in both splits", f"  {n['near_duplicates']} of {n['held_out']} held-out prompts"]
        lines += [f"    {pair['held_out']} is like {pair['train']}" for pair in n["pairs"]]
    for title, examples in (
        ("ours", found.get("examples", [])),
        ("official", found.get("official", {}).get("examples", [])),
    ):
        for example in examples:
            lines += ["", f"{example['id']}, {title}; scored text is {'green' if color else 'in [[ ]]'}"]
            for side in ("chosen", "rejected"):
                lines += [f"{side}:", _highlighted(example[side], color)] if example[side] else []
    if "official" in found:
        lines += _official_lines(found["official"])
    lines += ["", *(f"wrong: {line}" for line in found["wrong"])] if found["wrong"] else ["", "nothing is wrong"]
    return "\n".join(lines)


def _packing_lines(p: dict) -> list[str]:
    lines = [
        "",
        f"rows for updates of {p['train_batch_size']} pairs (the longest takes {p['longest_pair']} slots)",
        f"  prompts stored once save {p['shared_prompts_save']:.0%} of the tokens ({p['tokens']:,} are left)",
        f"  one pair per row: padding {p['padding_one_pair_per_row']:.1%}",
    ]
    for devices, found in p["on_devices"].items():
        shapes = " or ".join(f"{shape['R']} x {shape['T']}" for shape in found["shapes"])
        lines.append(
            f"  packed on {devices:2} device{'s' * (devices > 1)}: padding {found['padding']:.1%}, rows x slots {shapes}"
        )
    return lines


def _store_lines(split: str, store: dict) -> list[str]:
    lines = [f"{split}: {store['pairs']} pairs of {store['rows']} rows of {store['name']}"]
    if "schema" in store:
        columns = f"; optional columns {', '.join(store['columns'])}" if store["columns"] else ""
        lines.append(f"  schema {store['schema']}{columns}")
    lines += [f"  {line}" for line in store["counts"]]
    if "lengths" in store:
        lines.append(f"  over max_length={store['max_length']} or max_prompt_length: {store['over_length_share']:.1%}")
        lines.append(f"  {'tokens':<24}{'mean':>9}{'p50':>9}{'p90':>9}{'max':>9}")
        for name, q in store["lengths"].items():
            lines.append(f"  {name:<24}{q['mean']:>9.1f}{q['p50']:>9.0f}{q['p90']:>9.0f}{q['max']:>9}")
    return lines


def _official_lines(o: dict) -> list[str]:
    lines = [
        "",
        f"the first {o['rows']} rows{'':<8}{'here':>9}{'official':>10}  (max_prompt_length {o['max_prompt_length']})",
    ]
    lines += [f"  {name:<24}{o[name][0]:>9}{o[name][1]:>10}" for name in ("kept", "truncated")]
    if o["scored_per_answer"]:
        lines.append("  {:<24}{:>9.1f}{:>10.1f}".format("scored per answer", *o["scored_per_answer"]))
    lines.append(f"  {o['same']} rows have the same ids and the same scored tokens")
    if o["refused"]:
        lines.append(f"  {o['refused']} cannot be written the official way: {o['first_refusal']}")
    return lines


def _highlighted(found: Sequence[list], color: bool) -> str:
    start, end = ("\x1b[32m", "\x1b[0m") if color else ("[[", "]]")
    return "".join(f"{start}{text}{end}" if scored else text for text, scored in found)
