"""What `inspect` says, against numbers worked out by hand or in another way."""

import json

import numpy as np
import pytest
from examples import ASSETS, ROOT, STORIES

from repo_jax.cli import main
from repo_jax.config import load_recipe
from repo_jax.data.batches import batch_indices
from repo_jax.data.chat import load_tokenizer
from repo_jax.data.rows import RowShape, row_batches
from repo_jax.data.schema import PairTokens
from repo_jax.data.sources import open_source
from repo_jax.data.store import TokenStore
from repo_jax.inspection import as_text, inspect, length_balance, near_duplicates, pieces
from repo_jax.stores import held_out_store, tokenizer_of, train_store

QUICKSTART = ROOT / "configs" / "quickstart.yaml"
EDGE = ASSETS / "preferences" / "edge.jsonl"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def recipe(cache):
    def load(**overrides):
        fixed = {"model.model_name_or_path": str(STORIES), "data.dataset_name": str(ASSETS / "preferences")}
        return load_recipe(QUICKSTART, fixed | {"data.cache_dir": cache} | overrides)

    return load


def command(cache, *flags):
    return ["inspect", str(QUICKSTART), "--model", str(STORIES), "--cache_dir", cache, *map(str, flags)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def said(role, content):
    return [{"role": role, "content": content}]


# The whole


def test_the_shipped_pairs_are_described_and_nothing_is_wrong_with_them(recipe):
    found = inspect(recipe(), show=1)
    assert {split: (found[split]["rows"], found[split]["pairs"]) for split in ("train", "held_out")} == {
        "train": (600, 600),
        "held_out": (200, 200),
    }
    assert found["train"]["schema"] == "explicit, messages"
    assert found["train"]["columns"] == []
    assert found["near_duplicates"]["near_duplicates"] == 0
    assert found["wrong"] == []


def test_lengths_are_those_of_the_pairs(recipe):
    found = inspect(recipe(), show=0)
    store = train_store(recipe(), tokenizer_of(recipe()))
    pairs = [store[i] for i in range(len(store))]
    scored = sorted(int(pair.chosen_mask.sum()) for pair in pairs)
    longest = max(max(pair.wholes) for pair in pairs)
    lengths = found["train"]["lengths"]
    assert lengths["chosen"]["p50"] == (scored[299] + scored[300]) / 2
    assert lengths["chosen"]["mean"] == pytest.approx(sum(scored) / 600)
    assert lengths["prompt + longer answer"]["max"] == longest


def test_packing_is_what_rows_do_with_the_first_updates(recipe):
    chosen = recipe(**{"optim.train_batch_size": 600, "data.row_length": None})
    packing = inspect(chosen, show=0)["packing"]
    store = train_store(chosen, tokenizer_of(chosen))
    pairs = [store[i] for i in batch_indices(0, pairs=600, train_batch_size=600, seed=chosen.run.seed)]
    filled = sum(pair.slots for pair in pairs)
    for found in packing["on_devices"].values():
        batches = row_batches(pairs, [RowShape(**shape) for shape in found["shapes"]])
        slots = sum(batch.tokens_RT.size for batch in batches)
        assert found["padding"] == pytest.approx(1 - filled / slots)
    assert packing["padding_one_pair_per_row"] == pytest.approx(1 - filled / (600 * packing["longest_pair"]))
    unshared = sum(sum(pair.wholes) for pair in pairs)
    assert packing["shared_prompts_save"] == pytest.approx(1 - filled / unshared)


def test_rows_are_spread_over_the_devices_and_fixed_where_the_recipe_fixes_them(recipe):
    packing = inspect(recipe(**{"data.row_length": 1024, "data.rows_per_device": 2}), show=0)["packing"]
    shapes = {
        devices: [(shape["R"], shape["T"]) for shape in found["shapes"]]
        for devices, found in packing["on_devices"].items()
    }
    assert shapes == {1: [(2, 1024)], 8: [(16, 1024)], 16: [(32, 1024)]}


def test_a_row_length_that_does_not_hold_the_longest_pair_is_wrong(recipe):
    found = inspect(recipe(**{"data.row_length": 64}), show=0)
    longest = int(train_store(recipe(), tokenizer_of(recipe())).slots.max())
    assert found["wrong"] == [f"row_length=64 does not hold the longest pair ({longest} slots)"]
    assert all(on["shapes"][0]["T"] >= longest for on in found["packing"]["on_devices"].values())


# What is wrong


def test_the_rows_that_nobody_should_train_on_are_all_caught(recipe):
    found = inspect(recipe(**{"data.dataset_name": str(EDGE)}))
    assert found["train"]["rows"] == 7
    assert found["train"]["pairs"] == 0
    assert found["train"]["dropped"] == {"identical": 5, "empty": 2}
    assert "train: nothing is left" in found["wrong"]
    named = " ".join(found["train"]["counts"])
    for number in (35635, 7618, 14571, 28230, 16242, 44516, 1039):
        assert f"ultrafeedback:{number}" in named


def test_strict_exits_with_1_when_something_is_wrong(cache, tmp_path, capsys):
    assert main(command(cache, "--data", EDGE)) == 0
    assert main(command(cache, "--data", EDGE, "--strict")) == 1
    assert "wrong: train: nothing is left" in capsys.readouterr().out
    good = ASSETS / "preferences" / "test.jsonl"
    assert main(command(cache, "--data", good, "--strict", "--show", 0, "--row_length", "null")) == 0
    assert capsys.readouterr().out.rstrip().endswith("nothing is wrong")


def test_rows_that_cannot_be_read_are_counted_rather_than_fatal(cache, tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    path.write_text((ASSETS / "preferences" / "test.jsonl").read_text(encoding="utf-8") + "oops\n", encoding="utf-8")
    assert main(command(cache, "--data", path, "--show", 0, "--strict")) == 1
    assert "1 of 201 rows dropped (0.5%), rows that cannot be read: pairs.jsonl:201" in capsys.readouterr().out


def test_a_template_that_ends_no_turn_is_wrong(recipe):
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    found = inspect(recipe(**{"model.chat_template": template, "data.dataset_test_split": None}), show=0)
    assert found["train"]["noticed"] == {"missing_eos": 600}
    assert found["wrong"] == ["train: 600 pairs with an answer that no end token follows"]


# Length and label


def test_length_balance_counts_whose_longer_answer_is_chosen():
    store = object.__new__(TokenStore)
    store.scored = np.array([[5, 1], [4, 4], [2, 3], [30, 10], [1, 2]])
    assert length_balance(store) == {
        "longer_is_chosen": 0.5,
        "longer_is_chosen_where_it_differs_most": 1.0,
        "mean_difference": pytest.approx((4 + 0 - 1 + 20 - 1) / 5),
    }


def test_answers_of_equal_length_say_nothing_of_length():
    store = object.__new__(TokenStore)
    store.scored = np.array([[5, 5], [4, 4]])
    assert length_balance(store) is None


def test_no_rows_are_wrong(recipe, tmp_path):
    found = inspect(recipe(**{"data.dataset_name": str(write(tmp_path / "none.jsonl", []))}))
    assert found["wrong"] == ["train: nothing is left"]
    assert "train: 0 pairs of 0 rows" in as_text(found, color=False)


def test_of_a_held_out_split_nothing_may_be_left(recipe, tmp_path):
    row = {"prompt": said("user", "Why?"), "chosen": said("assistant", "Yes"), "rejected": said("assistant", "No")}
    write(tmp_path / "train.jsonl", [row])
    write(tmp_path / "test.jsonl", [row | {"chosen": row["rejected"]}])
    found = inspect(recipe(**{"data.dataset_name": str(tmp_path), "optim.train_batch_size": 1}), show=0)
    assert found["wrong"] == ["held_out: 1 rows dropped as identical", "held_out: nothing is left"]
    assert found["packing"]["on_devices"][1]["padding"] < 1


def test_rows_hold_the_held_out_pairs_too(recipe, tmp_path):
    row = {"prompt": said("user", "Why?"), "chosen": said("assistant", "Yes"), "rejected": said("assistant", "No")}
    write(tmp_path / "train.jsonl", [row])
    write(tmp_path / "test.jsonl", [row | {"chosen": said("assistant", "Because it is so. " * 15)}])
    chosen = recipe(**{"data.dataset_name": str(tmp_path), "optim.train_batch_size": 1, "data.row_length": 128})
    found = inspect(chosen, show=0)
    longest = int(held_out_store(chosen, tokenizer_of(chosen)).slots.max())
    assert longest > 128
    assert found["packing"]["on_devices"][1]["shapes"][0]["T"] >= found["packing"]["longest_pair"] == longest
    assert f"row_length=128 does not hold the longest pair ({longest} slots)" in found["wrong"]


def test_a_row_that_looks_like_another_schema_is_read_as_its_store_was(recipe, tmp_path):
    rows = [{"prompt": f"Day {i}", "chosen": " was fun", "rejected": " was bad"} for i in range(9)]
    rows.append({"prompt": "Go", "chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"})
    for split in ("train", "test"):
        write(tmp_path / f"{split}.jsonl", [row | {"split": split} for row in rows])
    found = inspect(recipe(**{"data.dataset_name": str(tmp_path), "optim.train_batch_size": 1}), show=0)
    assert found["near_duplicates"] == {
        "held_out": 10,
        "near_duplicates": 10,
        "pairs": [{"held_out": f"test.jsonl:{i}", "train": f"train.jsonl:{i}"} for i in range(1, 6)],
    }


def test_why_the_first_row_was_refused_is_said(recipe):
    broken = recipe(**{"model.chat_template": "{{ 1 / 0 }}", "data.on_bad_rows": "skip"})
    (line,) = inspect(broken, show=0)["train"]["counts"]
    assert line.startswith(
        "warning: 600 of 600 rows dropped (100.0%), conversations that the chat template refuses to write: "
    )
    assert line.endswith("line 1: the chat template cannot write this conversation (division by zero))")


# Prompts in both splits

LONG = "the quick brown fox jumps over the lazy dog while nine more foxes look on and wonder what all of this is for"


@pytest.mark.parametrize(
    "held_out, alike",
    [
        (LONG, True),
        (LONG.upper() + " !!", True),
        ("well, " + LONG, True),
        ("What is two plus two?", True),
        ("What is two plus three?", False),
        (LONG[:40] + " and so to bed " + LONG[40:], False),
        ("😀😀", True),
        ("", False),
    ],
)
def test_near_duplicates_share_most_of_their_runs_of_words(held_out, alike):
    train = [
        ("a", "Something else entirely, of more than eight words, to be sure"),
        ("b", LONG),
        ("c", "what is two plus two"),
        ("d", " 😀😀 "),
    ]
    found = near_duplicates(train, [("h", held_out)])
    assert found["near_duplicates"] == int(alike)
    assert [pair["held_out"] for pair in found["pairs"]] == ["h"] * alike


def test_words_around_every_prompt_make_no_duplicates():
    around = (
        "Below is an instruction that describes a task. Write a response that completes the request. Instruction: {}"
    )
    train = [(f"t{i}", around.format(f"number {i}")) for i in range(300)]
    held_out = [(f"h{i}", around.format(f"letter {i}")) for i in range(100)] + [("again", around.format("number 7"))]
    found = near_duplicates(train, held_out)
    assert found["pairs"] == [{"held_out": "again", "train": "t7"}]


def test_near_duplicates_between_the_splits_of_a_folder_are_wrong(recipe, tmp_path):
    rows = [
        {
            "id": f"{i}",
            "prompt": said("user", f"Question {i}: {LONG}"),
            "chosen": said("assistant", "Yes"),
            "rejected": said("assistant", "No"),
        }
        for i in range(3)
    ]
    write(tmp_path / "train.jsonl", rows)
    other = [rows[0] | {"id": "new", "prompt": said("user", "Why?")}]
    write(tmp_path / "test.jsonl", rows[1:2] + other)
    found = inspect(recipe(**{"data.dataset_name": str(tmp_path), "optim.train_batch_size": 2}), show=0)
    assert found["near_duplicates"] == {
        "held_out": 2,
        "near_duplicates": 1,
        "pairs": [{"held_out": "1", "train": "0"}],
    }
    assert found["wrong"] == ["1 held-out prompts are in the training data, or nearly"]


# Pairs as text


def test_the_pieces_of_a_pair_are_its_text_and_the_scored_one_is_the_answer(recipe):
    found = inspect(recipe(), show=5)
    rows = [
        json.loads(line)
        for line in (ASSETS / "preferences" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:5]
    ]
    for example, row in zip(found["examples"], rows, strict=True):
        assert example["id"] == row["id"]
        for side in ("chosen", "rejected"):
            (prompt, unscored), (answer, scored) = example[side]
            assert (unscored, scored) == (False, True)
            assert prompt.endswith("\nAssistant:")
            assert row["prompt"][-1]["content"] in prompt
            assert answer.strip() == row[side][0]["content"].strip() + "<s>"


def test_pieces_of_a_mask_with_holes():
    tokenizer = load_tokenizer(str(STORIES))
    ids = tokenizer("Once upon a time there was", add_special_tokens=False).input_ids
    prompt, branch = np.array(ids[:2]), np.array(ids[2:])
    mask = np.zeros(len(branch), bool)
    mask[[0, 2]] = True
    found = pieces(tokenizer, prompt, branch, mask)
    assert [scored for _, scored in found] == [False, True, False, True, False]
    assert "".join(text for text, _ in found) == tokenizer.decode(ids)
    assert pieces(tokenizer, prompt, branch[:0], mask[:0]) == []


def test_scored_text_is_marked_for_people(recipe):
    found = inspect(recipe(), show=1)
    answer = found["examples"][0]["chosen"][1][0]
    assert f"[[{answer}]]" in as_text(found, color=False)
    assert f"\x1b[32m{answer}\x1b[0m" in as_text(found, color=True)


def test_json_is_what_inspect_returns(cache, recipe, capsys):
    assert (
        main([*command(cache, "--data", ASSETS / "preferences", "--json", "--compare", "official"), "--show", "2"]) == 0
    )
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(json.dumps(inspect(recipe(), show=2, compare="official")))


# The official code's way


def test_the_official_way_scores_the_header_too(recipe):
    official = inspect(recipe(), show=2, compare="official")["official"]
    assert (official["rows"], official["kept"], official["truncated"]) == (600, [600, 600], [0, 0])
    here, there = official["scored_per_answer"]
    tokenizer = tokenizer_of(recipe())
    # Rendered by itself, the answer begins a conversation: this template then writes no line break before the header.
    header = len(tokenizer("\nAssistant:", add_special_tokens=False).input_ids)
    assert header - 3 <= there - here < header
    assert official["same"] == 0
    assert official["examples"][0]["chosen"][-1][0].lstrip("\n").startswith("Assistant:")


def test_the_official_way_counts_what_it_cuts_where_ours_drops(recipe):
    official = inspect(recipe(**{"data.max_length": 200}), show=0, compare="official")["official"]
    kept, there = official["kept"]
    assert there == 600
    assert official["truncated"][0] == 0
    assert official["truncated"][1] == pytest.approx(600 - kept, abs=5)  # the line break before the header is not there
    assert 0 < kept < 600
    assert official["max_prompt_length"] == round(200 * 1800 / 2048)


# The same pairs in other forms and files


def transcript(messages):
    names = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
    return "".join(names[message["role"]] + message["content"] for message in messages)


def test_transcripts_and_conversations_of_the_same_pairs_give_the_same_ids(recipe, tmp_path):
    lines = (ASSETS / "preferences" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    # A transcript knows no system message, and no white space around what is said.
    conversations = [[*row["prompt"], *row["chosen"], *row["rejected"]] for row in rows]
    rows = [
        row
        for row, messages in zip(rows, conversations, strict=True)
        if all(m["role"] != "system" and m["content"] == m["content"].strip() for m in messages)
    ]
    assert len(rows) > 150
    forms = {
        "conversational": [
            {"id": row["id"]} | {name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows
        ],
        "transcripts": [
            {
                "id": row["id"],
                "chosen": transcript(row["prompt"] + row["chosen"]),
                "rejected": transcript(row["prompt"] + row["rejected"]),
            }
            for row in rows
        ],
        "whole": [
            {
                "id": row["id"],
                "prompt": row["prompt"][-1]["content"],
                "chosen": row["prompt"] + row["chosen"],
                "rejected": row["prompt"] + row["rejected"],
            }
            for row in rows
        ],
    }
    stores = {}
    for name, form in forms.items():
        chosen = recipe(**{"data.dataset_name": str(write(tmp_path / f"{name}.jsonl", form))})
        stores[name] = train_store(chosen, tokenizer_of(chosen))
    assert [store.schema for store in stores.values()] == ["explicit, messages", "hh, messages", "implicit, messages"]
    for name in ("transcripts", "whole"):
        assert len(stores[name]) == len(stores["conversational"]) == len(rows)
        for one, other in zip(stores["conversational"], stores[name], strict=True):
            assert one.id == other.id
            for field in PairTokens._fields[2:7]:
                np.testing.assert_array_equal(getattr(one, field), getattr(other, field))


def test_every_row_of_real_ultrafeedback_is_kept_or_counted(recipe):
    data = ROOT / "benchmarks" / "data" / "ultrafeedback.jsonl.gz"
    chosen = recipe(**{"data.dataset_name": str(data)})
    store = train_store(chosen, tokenizer_of(chosen))
    assert held_out_store(chosen, tokenizer_of(chosen)) is None
    assert store.rows == len(open_source(str(data), "train")) == 909
    assert len(store) + sum(store.dropped.values()) == 909
    assert set(store.dropped) == {"over_long"}  # 512 tokens are few


def test_prepare_says_what_it_made_and_where(cache, capsys):
    assert main(["prepare", *command(cache, "--data", ASSETS / "preferences")[1:]]) == 0
    train, held_out = capsys.readouterr().out.splitlines()
    assert train.startswith(
        f"train: 600 pairs of {ASSETS / 'preferences' / 'train.jsonl'} (explicit, messages) in {cache}"
    )
    assert held_out.startswith("held-out: 200 pairs of ")
    folder = train.rpartition(" in ")[2]
    assert main(command(cache, "--data", folder, "--show", 0)) == 0
    assert "train: 600 pairs of 600 rows" in capsys.readouterr().out


@pytest.mark.parametrize("data", ["nowhere.jsonl", str(ROOT / "README.md")])
def test_data_that_is_none_is_answered_in_one_line(cache, data, capsys):
    for name in ("inspect", "prepare"):
        assert main([name, *command(cache, "--data", data)[1:]]) == 2
        assert capsys.readouterr().err.count("\n") == 1
