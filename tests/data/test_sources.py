"""Sources: one data set gives the same rows however it is stored, a split means the same everywhere, and refusals say what to do."""

import gzip
import itertools
import json
import pathlib
import random
import subprocess
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.arrow_reader import ReadInstruction

from repo_jax.data import sources
from repo_jax.data.sources import RawRow, open_source

ROWS = [
    {
        "prompt": f"où {i}?\nça",
        "chosen": [{"role": "assistant", "content": "x" * i}],
        "rejected": [{"role": "assistant", "content": "🙂"}],
        "score": None if i == 2 else i / 2,
    }
    for i in range(7)
]
REMEDY = "write names with or without a slice, such as train, train[:1000], train[10%:20%] or train+test[-500:]"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """What `datasets` prepares stays in the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def hub(monkeypatch):
    """Puts local folders in the Hub's place, by name."""
    folders, load = {}, sources._load_dataset
    monkeypatch.setattr(
        sources, "_load_dataset", lambda name, config, split: load(str(folders.get(name, name)), config, split)
    )
    return folders


def contents(source):
    return [json.loads(row.content) if isinstance(row.content, bytes) else row.content for row in source.rows()]


def prompts(source):
    return [row["prompt"] for row in contents(source)]


def refusal(kind, *given, **options):
    with pytest.raises(kind) as refused:
        open_source(*given, **options)
    message = str(refused.value)
    assert "\n" not in message
    return message


# The same rows, however they are stored


def write_jsonl(path, rows=ROWS):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_gzip(path, rows=ROWS):
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


def write_array(path, rows=ROWS):
    path.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    return path


def write_parquet(path, rows=ROWS):
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    return path


def write_arrow(path, rows=ROWS, writer=pa.ipc.new_file):
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, writer(sink, table.schema) as file:
        file.write_table(table, max_chunksize=3)
    return path


def write_stream(path, rows=ROWS):
    return write_arrow(path, rows, pa.ipc.new_stream)


def save_dict(folder, **splits):
    datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}).save_to_disk(folder)
    return folder


def save_lone(folder, rows=ROWS):
    datasets.Dataset.from_list(rows).save_to_disk(folder)
    return folder


def lay_out(folder, rows=ROWS):
    """As on the Hub: a train split in two shards, and a README.md that names two configurations."""
    for config, kept in (("plain", rows), ("short", rows[:2])):
        (folder / config).mkdir(parents=True)
        for shard, part in enumerate((kept[:1], kept[1:])):
            write_parquet(folder / config / f"train-0000{shard}-of-00002.parquet", part)
    configs = "".join(
        f"- config_name: {config}\n  data_files:\n  - split: train\n    path: {config}/train-*\n"
        for config in ("plain", "short")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return folder


KINDS = {
    "jsonl": lambda folder: (write_jsonl(folder / "pairs.jsonl"), "line"),
    "jsonl.gz": lambda folder: (write_gzip(folder / "pairs.jsonl.gz"), "line"),
    "json lines": lambda folder: (write_jsonl(folder / "pairs.json"), "line"),
    "json.gz": lambda folder: (write_gzip(folder / "pairs.json.gz"), "line"),
    "json array": lambda folder: (write_array(folder / "pairs.json"), "row"),
    "parquet": lambda folder: (write_parquet(folder / "pairs.parquet"), "row"),
    "arrow file": lambda folder: (write_arrow(folder / "pairs.arrow"), "row"),
    "arrow stream": lambda folder: (write_stream(folder / "pairs.arrow"), "row"),
    "saved alone": lambda folder: (save_lone(folder / "pairs"), "row"),
}
SPLIT_KINDS = {
    "saved with splits": lambda folder, hub: save_dict(folder / "pairs", train=ROWS, test=ROWS[:1]),
    "laid out as on the Hub": lambda folder, hub: lay_out(folder / "pairs"),
    "on the Hub": lambda folder, hub: hub.update({"owner/pairs": lay_out(folder / "there")}) or "owner/pairs",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_gives_its_rows_with_their_places(kind, tmp_path):
    path, unit = KINDS[kind](tmp_path)
    source = open_source(str(path), "train")
    assert contents(source) == ROWS
    assert len(source) == 7
    assert source.name == str(path)
    rows = list(source.rows())
    assert {row.part for row in rows} == {str(path)}
    assert [row.where for row in rows] == [f"{path} {unit} {number}" for number in range(1, 8)]
    assert [row.id for row in rows] == [f"{path.name}:{number}" for number in range(1, 8)]


@pytest.mark.parametrize("kind", SPLIT_KINDS)
def test_a_split_gives_its_rows_with_their_places(kind, tmp_path, hub):
    dataset = str(SPLIT_KINDS[kind](tmp_path, hub))
    source = open_source(dataset, "train", config="plain")
    assert contents(source) == ROWS
    assert len(source) == 7
    assert source.name == f"{dataset}[train]"
    *_, last = source.rows()
    label = "owner/pairs[train]:7" if kind == "on the Hub" else "pairs[train]:7"
    assert last == RawRow(dataset, f"{dataset}[train] row 7", label, ROWS[6])


@pytest.mark.parametrize("kind", [*KINDS, *SPLIT_KINDS])
def test_a_slice_is_the_same_rows_of_every_kind_with_the_places_they_have_there(kind, tmp_path, hub):
    dataset, unit = KINDS[kind](tmp_path) if kind in KINDS else (SPLIT_KINDS[kind](tmp_path, hub), "row")
    source = open_source(str(dataset), "train[-2:] + train[:30%]", config="plain")
    assert contents(source) == ROWS[5:] + ROWS[:2]
    assert len(source) == 4
    assert [row.where.split("] ")[-1].removeprefix(f"{dataset} ") for row in source.rows()] == [
        f"{unit} {number}" for number in (6, 7, 1, 2)
    ]
    assert source.name.count("[-2:] + ") == 1 and source.name.endswith("[:30%]")


def test_rows_can_be_read_again(tmp_path):
    source = open_source(str(write_parquet(tmp_path / "pairs.parquet")), "train")
    assert contents(source) == contents(source) == ROWS


@pytest.mark.parametrize("config, count", [("plain", 7), ("short", 2)])
def test_the_config_chooses_among_configurations(config, count, tmp_path, hub):
    hub["pairs"] = lay_out(tmp_path / "there")
    assert len(open_source("pairs", "train", config=config)) == count
    assert len(open_source(str(hub["pairs"]), "train", config=config)) == count


def test_a_folder_without_a_readme_is_read_by_the_names_of_its_files(tmp_path):
    (tmp_path / "data").mkdir()
    write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", ROWS[:1])
    assert contents(open_source(str(tmp_path), "train+test")) == ROWS + ROWS[:1]


@pytest.mark.parametrize("suffix, write", [(".jsonl", write_jsonl), (".parquet", write_parquet)])
def test_rows_are_streamed(suffix, write, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "TABLE_ROWS", 2)
    path = write(tmp_path / f"pairs{suffix}")
    read, original = [], sources._table_rows

    def watched(tables):
        return original(read.append(table.num_rows) or table for table in tables)

    monkeypatch.setattr(sources, "_table_rows", watched)
    rows = open_source(str(path), "train").rows()
    next(rows)
    assert read == ([2] if suffix == ".parquet" else [])
    assert len(list(rows)) == 6


def test_a_table_in_one_batch_is_turned_into_python_a_part_at_a_time(monkeypatch):
    class Watched:
        schema, num_rows, asked = "", 7, []

        def slice(self, start, length):
            self.asked.append((start, length))
            return pa.Table.from_pylist(ROWS[start : start + length])

    monkeypatch.setattr(sources, "TABLE_ROWS", 3)
    rows = sources._table_rows([Watched()])
    assert [row for _, _, row in itertools.islice(rows, 4)] == ROWS[:4]
    assert Watched.asked == [(0, 3), (3, 3)]
    assert list(rows) == [("row", number, ROWS[number - 1]) for number in (5, 6, 7)]


def test_columns_of_mixed_types_come_back_as_they_were(tmp_path):
    rows = [{"chosen": [{"role": "user", "content": content}]} for content in ("text", ["parts", 1], {"a": None})]
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    loaded = datasets.load_dataset("json", data_files=str(path), split="train")
    assert "arrow.json" in str(loaded.data.schema)
    loaded.to_parquet(tmp_path / "pairs.parquet")
    loaded.save_to_disk(tmp_path / "saved")
    for stored in ("pairs.parquet", "saved"):
        assert contents(open_source(str(tmp_path / stored), "train")) == rows


def test_rows_of_a_reordered_data_set_come_in_its_order(tmp_path):
    order = [4, 0, 6]
    datasets.Dataset.from_list(ROWS).select(order).save_to_disk(tmp_path / "pairs")
    assert contents(open_source(str(tmp_path / "pairs"), "train")) == [ROWS[i] for i in order]


@pytest.mark.parametrize("kind", SPLIT_KINDS)
def test_datasets_draws_no_progress_bars(kind, tmp_path, hub):
    datasets.enable_progress_bars()
    dataset = str(SPLIT_KINDS[kind](tmp_path, hub))
    open_source(dataset, "train", config="plain")
    assert datasets.are_progress_bars_disabled()


# Lines of JSON


def test_blank_lines_are_skipped_but_counted(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b'\n{"a": 1}\r\n  \t\n\r\n{"a": 2}')
    source = open_source(str(path), "train")
    assert [(row.where, row.id, row.content) for row in source.rows()] == [
        (f"{path} line 2", "pairs.jsonl:2", b'{"a": 1}'),
        (f"{path} line 5", "pairs.jsonl:5", b'{"a": 2}'),
    ]
    assert len(source) == 2
    assert [row.id for row in open_source(str(path), "train[1:]").rows()] == ["pairs.jsonl:5"]


def test_lines_are_handed_on_unparsed(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b'oops\n[1]\n  {"caf\xe9": 1e999}\n')
    source = open_source(str(path), "train")
    assert [row.content for row in source.rows()] == [b"oops", b"[1]", b'  {"caf\xe9": 1e999}']


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
def test_a_byte_order_mark_is_no_part_of_the_first_row(name, tmp_path):
    raw = b'\xef\xbb\xbf{"a": 1}\n\xef\xbb\xbf{"a": 2}\n'
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    rows = open_source(str(tmp_path / name), "train").rows()
    assert [row.content for row in rows] == [b'{"a": 1}', b'\xef\xbb\xbf{"a": 2}']


def test_a_byte_order_mark_before_an_array_is_no_part_of_it(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf\n [{"a": 1}, 2]')
    rows = list(open_source(str(tmp_path / "a.json"), "train").rows())
    assert [(row.where.split("a.json ")[1], row.content) for row in rows] == [("row 1", b'{"a": 1}'), ("row 2", b"2")]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
def test_an_empty_file_has_no_rows(name, tmp_path):
    (tmp_path / name).write_bytes(gzip.compress(b"") if name.endswith(".gz") else b"")
    source = open_source(str(tmp_path / name), "train[:50%]")
    assert (len(source), list(source.rows())) == (0, [])


def test_jsonl_is_light(tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl")
    code = (
        "import sys, repo_jax.data.sources as s; source = s.open_source(sys.argv[1], 'train[:50%]');"
        "print(len(list(source.rows())), [m for m in ('datasets', 'pyarrow', 'pandas', 'jax') if m in sys.modules])"
    )
    for dataset in (path, path.parent):
        said = subprocess.run([sys.executable, "-c", code, dataset], capture_output=True, text=True, check=True).stdout
        assert said.strip() == "4 []"


# Splits


def taken(count, split):
    """The rows that a split takes of `count`, by number from 0."""
    return [row for term in sources._parse_split(split) for row in term.of(count)]


BOUNDS = [None, 0, 1, 3, 6, 7, 8, 100, -1, -3, -7, -8, -100]


@pytest.mark.parametrize("count", [0, 1, 7])
def test_a_slice_of_rows_is_pythons(count):
    for first, last in itertools.product(BOUNDS, BOUNDS):
        text = f"{'' if first is None else first}:{'' if last is None else last}"
        assert taken(count, f"train[{text}]") == list(range(count))[first:last], text


def theirs(count, split):
    """The rows that `datasets` takes."""
    return [
        row
        for term in ReadInstruction.from_spec(split).to_absolute({"train": count, "test": count})
        for row in range(term.from_, term.to)
    ]


def rounds_to_none(bound, count):
    return bound is not None and bound < 0 and round(bound * count / 100) == 0


@pytest.mark.parametrize("seed", range(4))
def test_percents_round_as_in_datasets(seed):
    rng = random.Random(seed)
    for _ in range(500):
        count = rng.choice([1, 5, 7, 40, 50, 99, 100, 150, 1001])
        first, last = (rng.choice([None, rng.randint(-100, 100), rng.randint(0, 20) * 5]) for _ in range(2))
        if rounds_to_none(first, count) or rounds_to_none(last, count):
            continue  # the next test
        bounds = ["" if bound is None else f"{bound}%" for bound in (first, last)]
        split = f"train[{bounds[0]}:{bounds[1]}]"
        assert taken(count, split) == theirs(count, split), (count, split)


def test_a_negative_percent_that_rounds_to_no_row_still_counts_from_the_end():
    assert taken(7, "train[-1%:]") == []
    assert taken(7, "train[:-1%]") == list(range(7))
    # datasets takes -0 rows for the start.
    assert theirs(7, "train[-1%:]") == list(range(7))


@pytest.mark.parametrize(
    "split",
    [
        "train",
        "train[:]",
        "train[2:5]",
        "train[1_0:2_0]",
        "train[10%:20%]",
        "train[10:20%]",
        "train[10%:20]",
        "train[:10%]+train[90%:]",
        "train[-5:] + test[:5]",
        "train+train",
        "train[-0:]",
        "train[:-0%]",
    ],
)
def test_a_split_is_read_as_datasets_reads_it(split):
    assert taken(40, split) == theirs(40, split)


def test_percents_may_have_decimals():
    assert taken(1000, "train[0.5%:1.25%]") == list(range(5, 12))


@pytest.mark.parametrize("name", ["train_prefs", "train-2", "dev.clean", "valid2"])
def test_a_split_has_the_name_its_owner_gave_it(name, tmp_path):
    write_jsonl(tmp_path / f"{name}.jsonl")
    assert contents(open_source(str(tmp_path), f"{name}[1:3]")) == ROWS[1:3]


@pytest.mark.parametrize(
    "split",
    ["", "train[", "train[5]", "train[a:b]", "train[1:2:3]", "train[:1.5]", "train[:5%%]", "train++test", "../train", "train[:1][:1]", "train[1__0:]", "train,test"],
)  # fmt: skip
def test_a_split_that_cannot_be_read_is_answered_with_examples(split, tmp_path):
    path = write_jsonl(tmp_path / "pairs.jsonl")
    assert refusal(ValueError, str(path), split) == f"split '{split}' is not understood; {REMEDY}"


@pytest.mark.parametrize("split", ["train[:101%]", "train[-100.5%:]", "test+train[200:10%]"])
def test_no_percent_goes_beyond_a_hundred(split, tmp_path):
    path = write_jsonl(tmp_path / "pairs.jsonl")
    assert refusal(ValueError, str(path), split) == f"split '{split}' goes beyond 100%; {REMEDY}"


def test_a_slice_that_takes_nothing_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "pairs.jsonl")
    for text in ("[7:]", "[5:2]", "[:1%]"):
        assert (
            refusal(ValueError, str(path), f"train+train{text}")
            == f"{text} takes none of the 7 rows of '{path}'; widen the slice"
        )


@pytest.mark.parametrize("kind", ["jsonl", "saved alone"])
def test_splits_are_not_summed_where_there_are_none(kind, tmp_path):
    dataset, _ = KINDS[kind](tmp_path)
    assert (
        refusal(ValueError, str(dataset), "train[:2]+test")
        == f"'{dataset}' has no splits, so test+train would repeat its rows; name one split"
    )
    assert len(open_source(str(dataset), "any[:2]+any[5:]")) == 4


def test_a_sum_takes_its_terms_in_order_from_their_splits(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS[:4])
    write_parquet(tmp_path / "test.parquet", ROWS[4:])
    source = open_source(str(tmp_path), "test+train[1:3]+test[:1]")
    assert contents(source) == ROWS[4:] + ROWS[1:3] + ROWS[4:5]
    test, train = tmp_path / "test.parquet", tmp_path / "train.jsonl"
    assert source.name == f"{test} + {train}[1:3] + {test}[:1]"
    assert {row.part for row in source.rows()} == {str(tmp_path)}


# Folders


def test_of_several_files_of_a_split_the_first_kind_is_read(tmp_path):
    writers = {
        "jsonl": write_jsonl,
        "jsonl.gz": write_gzip,
        "json": write_jsonl,
        "json.gz": write_gzip,
        "parquet": write_parquet,
        "arrow": write_stream,
    }
    for i, (suffix, write) in enumerate(writers.items()):
        write(tmp_path / f"train.{suffix}", ROWS[i : i + 1])
    lay_out(tmp_path, ROWS)
    for i, suffix in enumerate(writers):
        assert contents(open_source(str(tmp_path), "train")) == ROWS[i : i + 1]
        (tmp_path / f"train.{suffix}").unlink()
    assert contents(open_source(str(tmp_path), "train", config="plain")) == ROWS


@pytest.mark.parametrize(
    "fill, present",
    [
        (lambda folder: None, "none"),
        (lambda folder: (folder / "README.md").write_text("# Pairs"), "none"),
        (lambda folder: write_jsonl(folder / "test.jsonl"), "test"),
        (
            lambda folder: (write_gzip(folder / "dev.jsonl.gz"), write_jsonl(folder / "test.jsonl")),
            "dev, test, validation",
        ),
        (lambda folder: save_dict(folder, test=ROWS, dev=ROWS), "dev, test"),
    ],
    ids=["empty", "no data", "a file", "two files", "saved"],
)
def test_a_split_that_a_folder_lacks_is_answered_with_those_it_has(fill, present, tmp_path):
    folder = tmp_path / "pairs"
    folder.mkdir()
    fill(folder)
    assert refusal(FileNotFoundError, str(folder), "train_prefs[:2]") == (
        f"'{folder}' has no split 'train_prefs'; splits present: {present}; name a split, or give a file itself"
    )


def test_a_split_that_a_folder_laid_out_as_on_the_hub_lacks_is_answered_with_those_it_has(tmp_path):
    folder = lay_out(tmp_path / "pairs")
    assert refusal(FileNotFoundError, str(folder), "test", config="plain") == (
        f"'{folder}' has no split 'test'; splits present: train; name a split, or give a file itself"
    )


def test_a_configuration_that_is_missing_or_wrong_is_answered_with_those_there_are(tmp_path):
    folder = lay_out(tmp_path / "pairs")
    for config in (None, "long"):
        said = refusal(FileNotFoundError, str(folder), "train", config=config)
        assert said.startswith(f"'{folder}' has no split 'train' that loads (")
        assert "['plain', 'short']" in said


def test_what_datasets_cannot_load_is_answered_with_its_reason(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.parquet").write_bytes(b"PAR1")
    said = refusal(FileNotFoundError, str(tmp_path), "train")
    assert said.startswith(f"'{tmp_path}' has no split 'train' that loads (") and "file size is 4 bytes" in said


def test_a_reason_without_words_is_left_out(tmp_path):
    (tmp_path / "test.jsonl").touch()
    assert refusal(FileNotFoundError, str(tmp_path), "train") == (
        f"'{tmp_path}' has no split 'train' that loads (The split names could not be parsed from the dataset config); splits present: test; name a split, or give a file itself"
    )


# The Hub


def test_a_name_that_does_not_load_is_answered_in_one_line(monkeypatch):
    def fail(name, config, split):
        raise ConnectionError(f"Couldn't reach\n\t{name} " + "x " * 150)

    monkeypatch.setattr(sources, "_load_dataset", fail)
    for name in ("owner/pairs", "pairs", "owner/pairs-v1.5"):
        said = refusal(FileNotFoundError, name, "train")
        assert said.startswith(
            f"'{name}' is neither a file nor a folder nor a data set that loads from the Hub (Couldn't reach {name} x"
        )
        assert said.endswith("; check name, split, config and network, or give a path")
        assert len(said) < 400


def test_a_split_that_a_name_lacks_is_answered_with_those_it_has(tmp_path, hub):
    hub["owner/pairs"] = lay_out(tmp_path / "there")
    said = refusal(FileNotFoundError, "owner/pairs", "test", config="plain")
    assert """(Unknown split "test". Should be one of ['train'])""" in said


@pytest.mark.parametrize(
    "name", ["./pairs", "../pairs", "/nowhere/pairs", "~/nowhere-at-all", "a/b/c", "pairs.jsonl", "owner/pairs.parquet", "pairs.JSON.GZ"]
)  # fmt: skip
def test_a_path_that_is_not_there_is_not_sought_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "_load_dataset", lambda *given: pytest.fail("asked the Hub"))
    assert refusal(FileNotFoundError, name, "train") == (
        f"'{name}' is neither a file nor a folder; give the path of a .jsonl, .jsonl.gz, .json, .json.gz, .parquet, .arrow file, the path of a folder, or a name on the Hub"
    )


def test_a_folder_goes_before_a_name_on_the_hub(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    hub["pairs"] = lay_out(tmp_path / "there")
    (tmp_path / "pairs").mkdir()
    write_jsonl(tmp_path / "pairs" / "train.jsonl", ROWS[:1])
    assert contents(open_source("pairs", "train")) == ROWS[:1]


def test_a_tilde_is_the_users_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_jsonl(tmp_path / "pairs.jsonl")
    (first, *_) = open_source("~/pairs.jsonl", "train").rows()
    assert (first.part, first.where) == ("~/pairs.jsonl", f"{tmp_path}/pairs.jsonl line 1")


def test_suffixes_may_be_capitals(tmp_path):
    assert contents(open_source(str(write_gzip(tmp_path / "PAIRS.JSONL.GZ")), "train")) == ROWS


# Files that cannot be read


def damaged_gzip(path):
    raw = write_gzip(path).read_bytes()
    path.write_bytes(raw[:20] + b"\xff" * 20 + raw[40:])


def cut(write, keep):
    def write_and_cut(path):
        path.write_bytes(write(path).read_bytes()[:keep])

    return write_and_cut


@pytest.mark.parametrize(
    "name, damage",
    [
        ("a.jsonl.gz", lambda path: path.write_bytes(b'{"prompt": 1}\n')),
        ("a.jsonl.gz", cut(write_gzip, -15)),
        ("a.jsonl.gz", damaged_gzip),
        ("a.json", lambda path: path.write_bytes(b'[{"a": 1}, {"a"]')),
        ("a.json", lambda path: path.write_bytes(b"[1]\n[2]\n")),
        ("a.json", lambda path: path.write_bytes(b'["caf\xe9"]')),
        ("a.parquet", lambda path: path.write_bytes(b"")),
        ("a.parquet", lambda path: path.write_bytes(b"PAR1 and no more")),
        ("a.parquet", cut(write_parquet, -100)),
        ("a.arrow", lambda path: path.write_bytes(b"")),
        ("a.arrow", lambda path: path.write_bytes(b'{"prompt": "a", "chosen": "b"}\n')),
        ("a.arrow", cut(write_arrow, -30)),
        ("a.arrow", cut(write_stream, -100)),
    ],
)
def test_a_damaged_file_is_named_in_one_line(name, damage, tmp_path):
    damage(tmp_path / name)
    said = refusal(ValueError, str(tmp_path / name), "train")
    suffix = name.removeprefix("a")
    assert said.startswith(f"{tmp_path / name} cannot be read as {suffix} (")
    assert said.endswith("); write or fetch it again")


def test_a_file_damaged_after_it_was_opened_is_named_too(tmp_path):
    path = write_gzip(tmp_path / "pairs.jsonl.gz")
    source = open_source(str(path), "train")
    path.write_bytes(b"oops")
    with pytest.raises(ValueError, match=r"pairs.jsonl.gz cannot be read as .jsonl.gz \(Not a gzipped file"):
        next(source.rows())


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "pairs.csv"
    path.touch()
    assert refusal(ValueError, str(path), "train") == (
        f"'{path}' is no kind of file that is read here; give one of .jsonl, .jsonl.gz, .json, .json.gz, .parquet, .arrow"
    )


# Mixtures


def test_a_mixture_takes_the_head_of_each_part_in_order(tmp_path, hub):
    files = {"b": write_jsonl(tmp_path / "b.jsonl"), "a": write_parquet(tmp_path / "a.parquet")}
    hub["owner/pairs"] = lay_out(tmp_path / "there")
    mixture = {str(files["b"]): 0.5, str(files["a"]): 1.0, "owner/pairs": 0.3}
    source = open_source(mixture, "train", config="plain")
    assert contents(source) == ROWS[:3] + ROWS + ROWS[:2]
    assert len(source) == 12
    assert source.name == f"{files['b']} + {files['a']} + owner/pairs[train]"
    assert [row.part for row in source.rows()] == [*[str(files["b"])] * 3, *[str(files["a"])] * 7, *["owner/pairs"] * 2]


@pytest.mark.parametrize(
    "split, fraction, rows",
    [("train[2:]", 0.5, [2, 3]), ("train[5:]+train[:4]", 0.5, [5, 6, 0]), ("train[5:]+train[:4]", 0.2, [5])],
)
def test_a_fraction_is_of_what_the_split_takes(split, fraction, rows, tmp_path):
    path = write_jsonl(tmp_path / "pairs.jsonl")
    source = open_source({str(path): fraction}, split)
    assert contents(source) == [ROWS[i] for i in rows]
    assert len(source) == len(rows)


@pytest.mark.parametrize("fraction", [0, 0.0, -0.5, 1.5, float("nan")])
def test_a_fraction_lies_above_0_and_at_most_at_1(fraction, tmp_path):
    path = write_jsonl(tmp_path / "pairs.jsonl")
    assert (
        refusal(ValueError, {str(path): fraction}, "train")
        == f"'{path}' has fraction {fraction}; give a share of its rows above 0 and at most 1"
    )


def test_a_fraction_that_takes_nothing_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "pairs.jsonl")
    assert (
        refusal(ValueError, {str(path): 0.1}, "train") == f"fraction 0.1 of the 7 rows of '{path}' is no row; raise it"
    )


def test_a_mixture_of_nothing_is_refused():
    assert refusal(ValueError, {}, "train") == (
        "the mixture names no data set; give {data set: fraction}, such as {pairs.jsonl: 1.0}"
    )


# Digests


def writers():
    lone = {kind: write for kind, write in KINDS.items() if kind != "json array"}
    return {
        **{kind: lambda folder, hub, write=write: write(folder)[0] for kind, write in lone.items()},
        **SPLIT_KINDS,
    }


def digest(dataset, split="train"):
    return open_source(dataset if isinstance(dataset, dict) else str(dataset), split, config="plain").digest()


@pytest.mark.parametrize("kind", writers())
def test_a_digest_is_of_the_content_and_of_what_is_taken_not_of_the_place(kind, tmp_path, hub):
    for place in ("here", "elsewhere"):
        (tmp_path / place).mkdir()
    here = writers()[kind](tmp_path / "here", hub)
    whole, part = digest(here), digest(here, "train[1:3]")
    elsewhere = writers()[kind](tmp_path / "elsewhere", hub)
    assert (digest(elsewhere), digest(elsewhere, "train[1:3]")) == (whole, part)
    others = [digest(here, split) for split in ("train[1:4]", "train[:3]", "train+train", "train[1:3]+train[4:]")]
    assert len({whole, part, *others}) == 6
    assert digest({str(here): 0.5}) == digest(here, "train[:3]")
    assert digest(here, "train[:100%]") == whole
    assert all(len(each) == 64 for each in (whole, part))


CHANGED = [*ROWS[:6], ROWS[6] | {"prompt": "où 6?\nÇa"}]


@pytest.mark.parametrize(
    "write",
    [
        lambda path, rows: write_jsonl(path.with_suffix(".jsonl"), rows),
        lambda path, rows: write_parquet(path.with_suffix(".parquet"), rows),
        lambda path, rows: save_lone(path, rows),
        lambda path, rows: lay_out(path, rows),
    ],
    ids=["jsonl", "parquet", "saved", "laid out"],
)
def test_one_other_character_is_another_digest(write, tmp_path):
    assert digest(write(tmp_path / "a", ROWS)) != digest(write(tmp_path / "b", CHANGED))


def test_other_column_names_are_another_digest(tmp_path):
    renamed = [{("answer" if key == "chosen" else key): value for key, value in row.items()} for row in ROWS]
    assert digest(save_lone(tmp_path / "a")) != digest(save_lone(tmp_path / "b", renamed))


def test_the_order_of_a_mixture_is_part_of_its_digest(tmp_path):
    a, b = write_jsonl(tmp_path / "a.jsonl"), write_jsonl(tmp_path / "b.jsonl", CHANGED)
    assert digest({str(a): 1.0, str(b): 1.0}) != digest({str(b): 1.0, str(a): 1.0})


def test_the_digest_of_a_data_set_does_not_depend_on_how_its_rows_are_batched_or_selected():
    def of(dataset):
        return sources._dataset_part("", "", dataset).digest()

    whole = datasets.Dataset.from_list(ROWS)
    pieces = datasets.concatenate_datasets([datasets.Dataset.from_list(ROWS[:2]), datasets.Dataset.from_list(ROWS[2:])])
    padded = datasets.concatenate_datasets([whole.select([3]), whole])
    selected = whole.select([6, 5, 4, 3, 2, 1, 0]).select([6, 5, 4, 3, 2, 1, 0])
    assert of(whole) == of(pieces) == of(padded.select(range(1, 8))) == of(selected)
    assert of(whole) != of(whole.select([1, 0, 2, 3, 4, 5, 6]))


def test_a_path_may_be_a_path(tmp_path):
    path = write_jsonl(tmp_path / "pairs.jsonl")
    assert isinstance(path, pathlib.Path)
    assert next(open_source(path, "train").rows()).part == str(path)
