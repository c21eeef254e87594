"""Data, checkpoints, metrics and exports at URLs: in a store in memory that counts, breaks off and refuses."""

import json
import os
import shutil
import subprocess
import sys

import fsspec
import jax
import numpy as np
import pytest
import yaml
from examples import ASSETS, ROOT, STORIES, one_device, stories
from fsspec.implementations.memory import MemoryFileSystem
from processes import free_port

from repo_jax import checkpoint, export, stores, training, urls
from repo_jax.checkpoint import WHOLE, Checkpoints, holds_checkpoints
from repo_jax.config import InterruptedRunError, StoppedError, load_recipe, to_recipe
from repo_jax.distributed import Interruption
from repo_jax.export import export_checkpoint, open_checkpoint
from repo_jax.run_folder import RunFolder, read_metrics
from repo_jax.stores import held_out_store, tokenizer_of, train_store


class Store(MemoryFileSystem):
    """Objects in memory. Paths that hold `refused` cannot be written; what was written and fetched is remembered in order."""

    protocol = "store"
    store, pseudo_dirs = {}, [""]  # of this class, not of memory://
    written, got, refused = [], [], None

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("store://", "memory://"))

    def put_file(self, lpath, rpath, **kwargs):
        if self.refused is not None and self.refused in rpath:
            raise RuntimeError(f"no rights at https://me:hidden@host{rpath}?signature=hidden")
        self.written.append(rpath)
        super().put_file(lpath, rpath, **kwargs)

    def get_file(self, rpath, lpath, **kwargs):
        self.got.append(rpath)
        super().get_file(rpath, lpath, **kwargs)


@pytest.fixture
def store(monkeypatch):
    fsspec.register_implementation("store", Store, clobber=True)
    for name, value in {"store": {}, "pseudo_dirs": [""], "written": [], "got": [], "refused": None}.items():
        monkeypatch.setattr(Store, name, value)
    monkeypatch.setattr(stores, "COPIED", {})
    files = Store()
    for name in ("train", "test"):
        rows = (ASSETS / "preferences" / f"{name}.jsonl").read_bytes().splitlines(keepends=True)
        files.pipe_file(f"/bucket/pairs/{name}.jsonl", b"".join([row for row in rows if len(row) < 600][:16]))
    return files


@pytest.fixture
def recipe(tmp_path):
    """The quickstart on pairs in the store, with these fields."""
    fields = {"model.model_name_or_path": str(STORIES), "data.dataset_name": "store://bucket/pairs"}
    fields |= {"data.row_length": 384, "data.cache_dir": str(tmp_path / "cache"), "optim.max_steps": 4}
    fields |= {"run.save_steps": 2, "run.output_dir": "store://bucket/run", "mesh.data": 8, "mesh.fsdp": 1}
    return lambda **given: load_recipe(
        ROOT / "configs" / "quickstart.yaml", fields | {name.replace("__", "."): given[name] for name in given}
    )


# Data


def test_data_at_a_url_are_copied_once_and_are_those_that_lie_there(store, recipe, tmp_path, monkeypatch):
    tokenizer = tokenizer_of(recipe())
    train, held_out = train_store(recipe(), tokenizer), held_out_store(recipe(), tokenizer)
    assert sorted(store.got) == ["/bucket/pairs/test.jsonl", "/bucket/pairs/train.jsonl"]
    assert train.name == "store://bucket/pairs/train.jsonl" and held_out.name == "store://bucket/pairs/test.jsonl"
    monkeypatch.setattr(stores, "COPIED", {})  # as in the next command
    assert train_store(recipe(), tokenizer).key == train.key and len(store.got) == 2
    for name in ("train", "test"):
        (tmp_path / "pairs").mkdir(exist_ok=True)
        (tmp_path / "pairs" / f"{name}.jsonl").write_bytes(store.cat_file(f"/bucket/pairs/{name}.jsonl"))
    here = train_store(recipe(data__dataset_name=str(tmp_path / "pairs")), tokenizer)
    assert here.key == train.key and [pair.id for pair in here] == [pair.id for pair in train]


def test_a_url_of_one_file_and_mixtures_of_urls_are_data_too(store, recipe, tmp_path):
    tokenizer = tokenizer_of(recipe())
    whole = train_store(recipe(data__dataset_name="store://bucket/pairs/train.jsonl"), tokenizer)
    assert whole.name == "store://bucket/pairs/train.jsonl" and whole.rows == 16
    mixer = {"store://bucket/pairs": 0.5, "store://bucket/pairs/test.jsonl": 0.25}
    mixed = train_store(recipe(data__dataset_name=None, data__dataset_mixer=mixer), tokenizer)
    assert mixed.rows == 12 and mixed.name == "store://bucket/pairs/train.jsonl + store://bucket/pairs/test.jsonl"
    assert held_out_store(recipe(data__dataset_name="store://bucket/pairs/train.jsonl"), tokenizer) is None
    assert held_out_store(recipe(data__eval_dataset_name="store://bucket/pairs/test.jsonl"), tokenizer).rows == 16


def test_data_that_changed_at_their_url_make_another_copy(store, tmp_path):
    first = urls.fetched("store://bucket/pairs", tmp_path)
    store.pipe_file("/bucket/pairs/train.jsonl", b"{}\n")
    second = urls.fetched("store://bucket/pairs", tmp_path)
    assert first != second and first.name == second.name == "pairs"
    assert (second / "train.jsonl").read_bytes() == b"{}\n" != (first / "train.jsonl").read_bytes()


def test_what_is_wrong_with_data_at_a_url_is_told_by_the_url(store, recipe):
    def refused(**given):
        with pytest.raises((ValueError, OSError)) as error:
            train_store(recipe(**given), tokenizer_of(recipe()))
        return str(error.value)

    assert refused(data__dataset_name="store://bucket/nothing") == (
        "there is no file or folder 'store://bucket/nothing', or none that you may see; check the URL"
    )
    said = refused(data__dataset_train_split="validation")
    assert said.startswith("'store://bucket/pairs' has no split 'validation'")
    said = refused(data__dataset_name="store://me:hidden@bucket/pairs?signature=hidden")
    assert "'store://bucket/pairs' is given with a user, a password or a query" in said and "hidden" not in said


def test_the_extra_that_a_url_needs_is_named(monkeypatch):
    for module in ("gcsfs", "s3fs"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    for extra in ("gs", "s3"):
        with pytest.raises(ValueError) as refused:
            urls.names(f"{extra}://me:hidden@bucket/run")
        assert str(refused.value) == (
            f"'{extra}://bucket/run' needs a package that is not installed; pip install 'repo_jax[{extra}]'"
        )


# A folder at a URL


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "new" / "sub").mkdir(parents=True)
    for name in ("README.md", "config.json", "a.safetensors", "sub/b.json"):
        (tmp_path / "new" / name).write_text(name)
    return tmp_path / "new"


def test_a_replaced_folder_is_never_taken_for_whole_before_it_is(store, folder):
    for name in ("config.json", "stale.safetensors", "a.safetensors"):
        store.pipe_file(f"/bucket/out/{name}", b"earlier")
    urls.replace_folder(folder, "store://bucket/out", first="README.md", last="config.json")
    names = [path.removeprefix("/bucket/out/") for path in store.written]
    assert names[0] == "README.md" and names[-1] == "config.json" and len(names) == 4
    assert urls.names("store://bucket/out") == ["README.md", "a.safetensors", "config.json", "sub/b.json"]
    Store.refused = "a.safetensors"
    with pytest.raises(OSError) as error:
        urls.replace_folder(folder, "store://bucket/out", first="README.md", last="config.json")
    assert "'store://bucket/out' could not be written (no rights at https://host/" in str(error.value)
    assert "hidden" not in str(error.value) and "config.json" not in urls.names("store://bucket/out")


def test_another_persons_folder_at_a_url_is_not_replaced(store, folder):
    export.check_output("store://bucket/nothing")
    store.pipe_file("/bucket/theirs/README.md", b"mine")
    with pytest.raises(ValueError, match="'store://bucket/theirs' exists and is not an export of repo-jax"):
        export.check_output("store://bucket/theirs")
    store.pipe_file("/bucket/theirs/README.md", export.HEADING.encode())
    export.check_output("store://bucket/theirs")


def test_small_files_that_cannot_be_copied_are_tried_again_and_in_the_end_named(store, recipe, capsys):
    run = RunFolder(recipe())
    run.here.mkdir(parents=True)
    (run.here / "metrics.jsonl").write_text("1\n")
    Store.refused = "metrics"
    run.keep()
    assert "'store://bucket/run' could not be written" in capsys.readouterr().err
    with pytest.raises(StoppedError, match=f"the run's files are in '{run.here}'"):
        run.keep(last=True)
    Store.refused = None
    run.keep()
    run.keep()  # nothing is new
    assert store.written == ["/bucket/run/metrics.jsonl"]
    (run.here / "metrics.jsonl").write_text("1\n2\n")
    run.keep()
    assert store.cat_file("/bucket/run/metrics.jsonl") == b"1\n2\n"


def test_processes_with_folders_of_their_own_get_each_others_parts(store, tmp_path, monkeypatch):
    (tmp_path / "mine.safetensors").write_text("mine")

    def other(name):
        if name == "all parts are at the URL":
            assert urls.names("store://bucket/hf.part") == ["mine.safetensors"]
            store.pipe_file("/bucket/hf.part/theirs.safetensors", b"theirs")

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(export, "wait_for_all", other)
    store.pipe_file("/bucket/hf.part/old.safetensors", b"of a run that was killed")
    export.exchange(tmp_path, "store://bucket/hf")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "mine.safetensors": "mine",
        "theirs.safetensors": "theirs",
    }
    assert urls.names("store://bucket/hf.part") == []


# Checkpoints


def saved(url, here, steps, **options):
    params = stories(one_device())[1]
    with Checkpoints(url, keep=2, here=here) as checkpoints:
        for step in steps:
            checkpoints.save(jax.tree.map(lambda leaf, step=step: leaf + step, params), step, **options)
        return checkpoints.latest()


def restored(url, here):
    params = stories(one_device())[1]
    with Checkpoints(url, keep=2, here=here) as checkpoints:
        found = checkpoints.restore(checkpoints.latest(), params, jax.tree.map(lambda leaf: leaf.sharding, params))
        return checkpoints.latest(), np.asarray(found["embed_VD"] - params["embed_VD"])


def test_checkpoints_are_copied_where_orbax_cannot_write_and_come_back_to_a_new_machine(store, tmp_path):
    assert saved("store://bucket/run", tmp_path / "one", [1, 2, 3]) == 3
    assert {name.split("/")[0] for name in urls.names("store://bucket/run")} == {"checkpoint-2", "checkpoint-3"}
    # One whose copying was cut off, and one of another program.
    store.pipe_file("/bucket/run/checkpoint-4/default/_METADATA", b"{}")
    store.pipe_file(f"/bucket/run/step-9/{WHOLE}", b"")
    step, moved = restored("store://bucket/run", tmp_path / "two")
    assert step == 3 and np.allclose(moved, 3, atol=1e-5)
    assert {path.name for path in (tmp_path / "two").iterdir()} == {"checkpoint-3"}
    assert holds_checkpoints("store://bucket/run") and not holds_checkpoints("store://bucket/other")


def test_a_checkpoint_that_a_store_refuses_is_said_and_the_one_before_stays(store, tmp_path, capsys):
    saved("store://bucket/run", tmp_path / "one", [1])
    Store.refused = "checkpoint-2/"
    assert saved("store://bucket/run", tmp_path / "one", [2]) == 1
    said = capsys.readouterr().err
    assert "checkpoint-2 could not be written ('store://bucket/run/checkpoint-2' could not be written (" in said
    assert "checkpoint-1 stays the newest; training goes on" in said and "hidden" not in said
    with pytest.raises(StoppedError, match=r"checkpoint-2 could not be written; .* make room in 'store://bucket/run'"):
        saved("store://bucket/run", tmp_path / "one", [2], last=True)
    assert restored("store://bucket/run", tmp_path / "two")[0] == 1


def test_on_a_store_without_renaming_a_checkpoint_counts_by_its_mark(tmp_path, monkeypatch):
    # gs:// as Orbax writes it, stood in for by a folder.
    for step, mark in ((5, True), (10, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if mark:
            (tmp_path / f"checkpoint-{step}" / WHOLE).touch()
    found = [one.step for one in checkpoint._Names().find_all(tmp_path)]
    assert sorted(found) == [5, 10]  # a folder is renamed when it is whole
    monkeypatch.setattr(checkpoint.urls, "is_url", lambda name: True)
    assert [one.step for one in checkpoint._Names().find_all(tmp_path)] == [5]


# Runs


@pytest.mark.slow
def test_a_run_at_a_url_goes_on_from_another_machine_to_the_same_model(store, recipe, tmp_path, monkeypatch, capsys):
    plain = training.train(recipe(run__output_dir=str(tmp_path / "plain")))
    monkeypatch.setattr(Interruption, "due", lambda self, step: step == 3)
    with pytest.raises(InterruptedRunError, match="store://bucket/run/checkpoint-3 of 4 is saved"):
        training.train(recipe())
    there = urls.names("store://bucket/run")
    assert {"recipe.yaml", "identity.yaml", "base/config.json", "metrics.jsonl", "margins_before.npy"} <= set(there)
    steps = [json.loads(line)["step"] for line in store.cat_file("/bucket/run/metrics.jsonl").splitlines()]
    assert steps == [1, 2, 3] and not any(name.startswith("hf/") for name in there)
    monkeypatch.setattr(Interruption, "due", lambda self, step: False)
    shutil.rmtree(tmp_path / "cache")  # another machine
    monkeypatch.setattr(stores, "COPIED", {})
    run = training.train(recipe())
    said = capsys.readouterr().out
    assert "going on from store://bucket/run/checkpoint-3: 1 of 4 updates are left" in said
    assert "model   store://bucket/run/hf  (" in said and "report  store://bucket/run/report.html" in said
    for name in ("hf/model.safetensors", "hf/config.json"):
        assert store.cat_file(f"/bucket/run/{name}") == (plain / name).read_bytes() == (run / name).read_bytes()
    assert {"report.html", "report.md", "loss.png", "eval_results.json", "hf/README.md"} <= set(
        urls.names("store://bucket/run")
    )
    (tmp_path / "metrics.jsonl").write_bytes(store.cat_file("/bucket/run/metrics.jsonl"))
    for ours, theirs in zip(
        read_metrics(tmp_path / "metrics.jsonl"), read_metrics(plain / "metrics.jsonl"), strict=True
    ):
        assert ours["step"] == theirs["step"] and ours["loss"] == theirs["loss"]
    with pytest.raises(ValueError, match=r"output_dir='store://bucket/run' holds another run \(optim.learning_rate"):
        training.prepare(recipe(optim__learning_rate=1e-4))

    # Any of its checkpoints becomes a model at a URL.
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    opened = open_checkpoint("store://bucket/run/checkpoint-4", adapter=False)
    assert export_checkpoint(opened, "store://bucket/out") <= 1e-4
    weights = store.cat_file("/bucket/out/model.safetensors")
    assert weights == (plain / "hf" / "model.safetensors").read_bytes()
    assert not list((tmp_path / "cache" / "exports").iterdir())
    with pytest.raises(FileNotFoundError, match="'store://bucket/run/checkpoint-5' is not a whole checkpoint-N"):
        open_checkpoint("store://bucket/run/checkpoint-5", adapter=False)

    # A model that the store refuses stays here.
    Store.refused = "out/model.safetensors"
    with pytest.raises(
        StoppedError, match=r"'store://bucket/out' could not be written .*; the export is whole in '"
    ) as e:
        export_checkpoint(opened, "store://bucket/out")
    assert os.path.isfile(os.path.join(str(e.value).split("whole in '")[1].split("'")[0], "model.safetensors"))


def test_a_run_that_cannot_be_kept_at_its_url_stops_before_it_begins(store, recipe):
    Store.refused = "recipe.yaml"
    with pytest.raises(OSError, match="'store://bucket/run' could not be written"):
        training.prepare(recipe())
    Store.refused = None
    with pytest.raises(ValueError, match="output_dir='store://bucket/run' is given with a user") as refused:
        training.prepare(recipe(run__output_dir="store://me:hidden@bucket/run"))
    assert "hidden" not in str(refused.value)


@pytest.mark.slow
def test_processes_that_see_different_folders_under_one_name_are_told(tmp_path):
    tree = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text(encoding="utf-8"))
    tree["model"]["model_name_or_path"] = str(STORIES)
    tree["data"] |= {"dataset_name": str(ASSETS / "preferences"), "cache_dir": str(tmp_path / "cache")}
    tree["run"]["output_dir"] = "run"
    to_recipe(tree)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    env = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}"}
    started = []
    for i in range(2):
        (tmp_path / f"host{i}").mkdir()
        own = os.environ | env | {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(i)}
        command = [sys.executable, "-m", "repo_jax", "train", str(tmp_path / "recipe.yaml")]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, env=own, cwd=tmp_path / f"host{i}", **pipes))
    for process in started:
        said, _ = process.communicate(timeout=240)
        assert process.returncode == 2 and "output_dir='run' is not one folder for all processes" in said, said
