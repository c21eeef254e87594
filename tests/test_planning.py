"""Plans: by formula here, and compiled for a TPU that is not there where its compiler is."""

import importlib.util
import json
import math
import os
import re
import resource
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from examples import ROOT, STORIES, TINY

from repo_jax import planning
from repo_jax.cli import main
from repo_jax.config import to_recipe
from repo_jax.hlo import work_of
from repo_jax.planning import (
    GIB,
    as_text,
    candidates,
    changed,
    compiled,
    estimate,
    goes_far,
    launch_commands,
    make_plan,
    mesh_sizes,
    programs_for,
    read_model_config,
    rows_for,
    what_would_fit,
)
from repo_jax.programs import PROGRAMS, Held, Programs, with_dtypes
from repo_jax.sharding import make_mesh
from repo_jax.step import check_held
from repo_jax.topology import NoCompilerError, parse_topology

CONFIGS = ROOT / "benchmarks" / "data" / "model_configs"
PLANS = sorted((ROOT / "benchmarks" / "results" / "plans").glob("*.json"))
LIBTPU = importlib.util.find_spec("libtpu") is not None and sys.platform == "linux"
needs_libtpu = pytest.mark.skipif(not LIBTPU, reason="the compiler for TPUs is not installed: pip install 'jax[tpu]'")


def recipe_of(**leaves):
    """A recipe from leaves with the section in front: data__max_length=512."""
    sections = {"model": {"model_name_or_path": "none"}}
    for name, value in leaves.items():
        section, leaf = name.split("__")
        sections.setdefault(section, {})[leaf] = value
    return to_recipe(sections)


LLAMA = read_model_config(str(CONFIGS / "llama-3-8b.json"))
RECIPE = recipe_of(data__max_length=2048)


@pytest.fixture
def no_compiler(monkeypatch):
    def missing(topology):
        raise NoCompilerError("the compiler for TPUs, libtpu, is not installed")

    monkeypatch.setattr(planning, "topology_devices", missing)
    monkeypatch.setattr(planning, "without_accelerators", lambda: None)  # it would turn off the tests' own cache


def run(*words) -> subprocess.CompletedProcess:
    """The command in a process of its own, which has not touched a device yet."""
    command = [sys.executable, "-m", "repo_jax", "plan", *words]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)


@needs_libtpu
def test_a_small_model_is_planned_for_v5e_in_under_a_minute(tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run("configs/quickstart.yaml", "--topology", "v5e:4x4", "--json", str(tmp_path / "plan.json"))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    # Of a processor's time: other work on the machine is none of the plan's.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 60
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["fits"] and plan["verified"] == "compiled"
    assert plan["hbm_gib"] == 15.75 and 0 < plan["peak_gib"] < 1
    assert set(plan["programs"]) == {"score", "hold", "take", "add_direct", "add_weighted", "update"}
    assert plan["mesh"] == {"data": 1, "fsdp": 16, "tensor": 1}
    assert plan["flops_per_update"]["executed"] > plan["flops_per_update"]["model"] > 0
    assert any(what.endswith(" over fsdp") for what in plan["sent_gib_per_device_and_update"])
    assert "fits (peak" in done.stdout and "--type v5litepod-16" in done.stdout


def too_large(folder) -> str:
    """Four layers of Llama-3-70B: a config.json whose model is too large for four v5e."""
    config = json.loads((CONFIGS / "llama-3-70b.json").read_text()) | {"num_hidden_layers": 4}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@needs_libtpu
def test_what_the_compiler_refuses_does_not_fit_by_as_much_as_it_says(tmp_path):
    code = f"""
import json
from repo_jax.config import to_recipe
from repo_jax.planning import make_plan, read_model_config
from repo_jax.topology import parse_topology, without_accelerators
without_accelerators()
recipe = to_recipe({{"model": {{"model_name_or_path": "none"}}, "data": {{"max_length": 2048}}}})
print(json.dumps(make_plan(recipe, read_model_config({too_large(tmp_path)!r}), parse_topology("v5e:2x2"), explain=False)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    plan = json.loads(done.stdout)
    [refused] = plan["programs"].values()  # the others need not be looked at
    needed = float(re.search(r"\(([\d.]+)G\) exceeds available HBM \(15.75G\)", refused["failed"])[1])
    assert not plan["fits"] and plan["hbm_gib"] == 15.75
    # The moments wait beside the program that the compiler saw.
    assert plan["peak_gib"] == pytest.approx(needed + plan["memory_gib"]["moments"], abs=0.01)
    assert plan["missing_gib"] == pytest.approx(plan["peak_gib"] - 15.75, abs=2e-3)


@pytest.mark.slow
@needs_libtpu
def test_what_does_not_fit_exits_with_1_and_says_how_much_is_missing_and_what_would(tmp_path):
    config, out = too_large(tmp_path), tmp_path / "plan.json"
    done = run("--model_config", config, "--topology", "v5e:2x2", "--max_length", "2048", "--json", str(out))
    assert done.returncode == 1, done.stderr
    plan = json.loads(out.read_text())
    assert "DOES NOT FIT" in done.stdout and "GiB per device are missing" in done.stdout
    [lora] = [one for one in plan["would_fit"] if "--use_peft true" in one["changes"]]
    assert lora["fits"] and lora["verified"] == "compiled"


# By formula


def test_without_a_compiler_the_plan_says_so_and_estimates(no_compiler):
    plan = make_plan(RECIPE, LLAMA, parse_topology("v5e:4x4"))
    assert plan["verified"] == "estimated" and plan["fits"]
    text = as_text(plan)
    assert "NOT COMPILED: the compiler for TPUs, libtpu, is not installed" in text
    assert "a formula's estimate" in text


def test_a_plan_needs_no_weights_and_no_data_and_exits_with_what_it_found(no_compiler, tmp_path, capsys):
    config = str(CONFIGS / "llama-3-8b.json")
    out = tmp_path / "plan.json"
    assert main(["plan", "--model_config", config, "--topology", "v5e:4x4", "--json", str(out)]) == 0
    assert json.loads(out.read_text())["parameters"] == 8_030_261_248
    assert main(["plan", "--model_config", config, "--topology", "v5e:2x2"]) == 1
    assert "GiB per device are missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, said",
    [
        (["--topology", "v5e:9"], "--topology 'v5e:9' has 1 sizes"),
        (["--topology", "v5e:4x4", "--mesh.fsdp", "3"], "make the axes multiply to 16"),
        (["--topology", "v5e:4x4", "--tensor", "16"], "mesh.tensor"),
        (["--topology", "v5e:4x4", "--loss_type", "simp"], "unknown loss_type 'simp'"),
        (["--topology", "v5e:4x4", "--row_length", "40"], "leave no pair of usual length"),
        (["--topology", "v5e:4x4", "--model_config", "nowhere.json"], "'nowhere.json' is not there"),
    ],
)
def test_what_cannot_be_planned_exits_with_2_and_says_what_to_change(words, said, no_compiler, capsys):
    assert main(["plan", "--model_config", str(STORIES), *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_the_formula_stays_near_what_was_compiled(path):
    plan = json.loads(path.read_text())
    model = next(file for file in CONFIGS.glob("*.json") if path.name.startswith(file.stem))
    cfg, topology = read_model_config(str(model)), parse_topology(plan["topology"], plan["slices"])
    recipe = with_dtypes(RECIPE)
    sizes = mesh_sizes(recipe, topology)
    assert dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)) == plan["mesh"]
    guess = estimate(recipe, cfg, topology, sizes, rows_for(recipe, cfg, sizes[0] * sizes[1]))
    assert guess.peak / GIB == pytest.approx(plan["peak_gib"], rel=0.35)
    if "flops_per_update" in plan:
        assert guess.flops * topology.devices == pytest.approx(plan["flops_per_update"]["executed"], rel=0.15)


def test_parameters_gradients_and_moments_are_split_over_fsdp_and_tensor():
    recipe, topology = with_dtypes(RECIPE), parse_topology("v5p:2x2x2")
    held = {
        sizes: estimate(recipe, LLAMA, topology, sizes, rows_for(recipe, LLAMA, sizes[0] * sizes[1])).held
        for sizes in [(1, 8, 1), (1, 4, 2), (8, 1, 1)]
    }
    whole = 8_030_261_248 * 4
    assert held[8, 1, 1]["parameters"] == whole
    assert held[1, 8, 1]["parameters"] == held[1, 8, 1]["gradients"] == whole // 8
    assert held[1, 4, 2]["parameters"] == pytest.approx(whole / 8, rel=1e-3)  # norms are whole over tensor
    assert held[1, 8, 1]["moments"] == pytest.approx(2 * whole / 8, rel=1e-3)


def test_adapters_hold_no_gradients_of_what_is_frozen():
    recipe, topology = with_dtypes(changed(RECIPE, {"model.use_peft": True})), parse_topology("v5e:2x2")
    held = estimate(recipe, LLAMA, topology, (1, 4, 1), rows_for(recipe, LLAMA, 4)).held
    assert held["frozen parameters"] == 8_030_261_248 * 2 // 4
    assert held["gradients"] + held["moments"] + held["adapters"] < 0.02 * held["frozen parameters"]


# Rows and meshes


def test_rows_hold_the_longest_pair_and_an_update_holds_its_pairs():
    rows = rows_for(with_dtypes(RECIPE), LLAMA, 16)
    slots_B = rows.lengths.prompt_B + rows.lengths.branches_B2.sum(axis=1)
    assert len(slots_B) == 128 and slots_B.max() <= rows.shape.T
    assert rows.batches * rows.shape.R * rows.shape.T * (1 - rows.padding) == pytest.approx(slots_B.sum())


def test_pairs_over_max_length_are_left_out_and_a_given_row_length_is_kept():
    rows = rows_for(with_dtypes(recipe_of(data__max_length=512, data__row_length=1024)), LLAMA, 8)
    lengths = rows.lengths
    assert (lengths.prompt_B + lengths.branches_B2.max(axis=1)).max() <= 512
    assert rows.shape.T == 1024
    fixed = rows_for(with_dtypes(recipe_of(data__row_length=1024, data__rows_per_device=3)), LLAMA, 8)
    assert fixed.shape.R == 24


def test_slices_are_spanned_by_data_and_minus_1_takes_what_is_left():
    assert mesh_sizes(RECIPE, parse_topology("v6e:4x4", 2)) == (2, 16, 1)
    assert mesh_sizes(recipe_of(mesh__tensor=4), parse_topology("v5e:4x4")) == (1, 4, 4)
    assert mesh_sizes(RECIPE, parse_topology("h200:1x2x8")) == (1, 16, 1)


def test_what_goes_between_slices_or_hosts_takes_the_network():
    slices, sizes = parse_topology("v6e:4x4", 2), {"data": 2, "fsdp": 16, "tensor": 1}
    assert goes_far(slices, sizes, "data") and not goes_far(slices, sizes, "fsdp")
    hosts = parse_topology("h200:1x2x8")
    assert goes_far(hosts, {"data": 1, "fsdp": 16, "tensor": 1}, "fsdp")
    assert not goes_far(hosts, {"data": 2, "fsdp": 4, "tensor": 2}, "fsdp+tensor")


# What is offered


def test_what_would_fit_has_bfloat16_adapters_and_a_larger_slice(monkeypatch):
    asked = []

    def tried(recipe, cfg, topology, changes):
        asked.append((str(topology), changes))
        return {"fits": str(topology) == "v5e:4x4" or "model.use_peft" in changes}

    monkeypatch.setattr(planning, "tried", tried)
    found = what_would_fit(recipe_of(data__rows_per_device=1), LLAMA, parse_topology("v5e:2x2"))
    assert asked == [
        ("v5e:2x2", {"model.param_dtype": "bfloat16", "optim.moment_dtype": "bfloat16"}),
        ("v5e:2x2", {"model.param_dtype": "bfloat16", "optim.optim": "adafactor", "optim.moment_dtype": "float32"}),
        ("v5e:2x2", {"model.use_peft": True}),
        ("v5e:2x4", {}),
        ("v5e:4x4", {}),
    ]
    assert [one["fits"] for one in found] == [False, False, True, False, True]
    for remat, offered in (("dots", "full"), ("offload", None)):  # which needs less than full
        asked.clear()
        what_would_fit(recipe_of(model__remat=remat), LLAMA, parse_topology("v5e:2x2"))
        assert {changes.get("model.remat") for _, changes in asked if changes} == {offered}


@pytest.mark.slow
def test_a_search_tries_meshes_rows_and_remat_and_no_mesh_that_the_model_refuses():
    tried = list(candidates(RECIPE, LLAMA, parse_topology("v6e:2x2", 2)))
    assert {changes["mesh.data"] for changes, _ in tried} == {2, 4, 8}  # slices are spanned by data
    assert {changes["mesh.tensor"] for changes, _ in tried} == {1, 2, 4}
    assert {changes["model.remat"] for changes, _ in tried} == {"none", "dots", "attention", "full"}
    assert {changes["data.rows_per_device"] for changes, _ in tried} == {1, 2, 4, 8}
    peaks = {
        changes["model.remat"]: one.peak
        for changes, one in tried
        if (changes["mesh.data"], changes["mesh.tensor"], changes["data.rows_per_device"]) == (2, 1, 4)
    }
    assert peaks["full"] < peaks["attention"] < peaks["dots"] < peaks["none"]


@pytest.mark.parametrize(
    "name, slices, command",
    [
        ("v5e:4x4", 1, "bash launch/tpu_vm.sh resume NAME --zone ZONE --type v5litepod-16 -- train c.yaml"),
        ("v6e:4x4", 2, "bash launch/tpu_vm.sh resume NAME --zone ZONE --type v6e-16 --slices 2 -- train c.yaml"),
        (
            "tpu7x:2x2x1",
            1,
            "bash launch/gke.sh create NAME --image IMAGE --accelerator tpu7x --topology 2x2x1 -- train",
        ),
        ("h200:1x2x8", 1, "bash launch/slurm_gpu.sh --nodes=2 --gpus-per-node=8 -- train c.yaml"),
        ("h200:1x1x8", 1, "bash launch/local.sh c.yaml"),
    ],
)
def test_the_launch_command_is_the_one_of_these_machines(name, slices, command):
    topology = parse_topology(name, slices)
    [line] = launch_commands(topology, mesh_sizes(RECIPE, topology), "train c.yaml")
    assert line.startswith(command)
    assert ("--mesh.data 2" in line) == (slices == 2)
    script = line.split()[1]
    assert (ROOT / script).exists()


# The programs themselves


@pytest.fixture(scope="module")
def programs():
    recipe = with_dtypes(
        recipe_of(
            optim__train_batch_size=8,
            data__row_length=48,
            data__rows_per_device=1,
            data__max_length=40,
            model__compute_dtype="float32",
        )
    )
    mesh = make_mesh(2, 2, 2, jax.devices())
    pairs_B3 = np.array([[8, 9, 10]] * 8)
    shape = planning.RowShape(4, 48, 40, 0)
    lengths = planning.Lengths(pairs_B3[:, 0], pairs_B3[:, 1:], pairs_B3[:, 1:])
    return Programs(recipe, TINY, mesh, shape), planning.Rows(shape, 2, lengths, 0.0)


@pytest.mark.parametrize("name", ["score", "add_direct", "add_weighted", "update"])
def test_every_program_of_an_update_compiles_from_shapes_alone(name, programs):
    programs, rows = programs
    part = compiled(programs, name, rows)
    assert part["peak"] >= part["beside"] and part["temporaries"] >= 0
    # Whatever an update's program is not given waits beside it.
    assert part["beside"] == (0 if name == "update" else programs.held["moments"])
    # Losses stay apart from the number of devices: every product is there, and padding too.
    matmuls = part["work"].matmul_flops
    if name == "update":
        assert matmuls == 0
    else:
        tokens, weights = 2 * 48 / 2, TINY.D * TINY.H * (2 * TINY.N + 2 * TINY.K) + 3 * TINY.D * TINY.F
        assert matmuls > {"score": 1, "add_direct": 3, "add_weighted": 3}[name] * 2 * tokens * weights * TINY.L / 2


def test_collectives_of_the_real_step_go_over_the_axes_they_should(programs):
    programs, _ = programs
    work = work_of(programs("add_direct").as_text(), programs.mesh.shape)
    axes = {one.axes for one in work.collectives if one.loop == "layers"}
    assert any("tensor" in name for name in axes) and any("fsdp" in name for name in axes)


@pytest.mark.parametrize(
    "loss", [{"loss_type": name} for name in ("kto", "bco", "amapo", "tdpo2", "rationale_dpo")] + [{"lcpo_alpha": 0.1}]
)
def test_programs_of_losses_that_need_more_than_pairs_are_those_of_training(loss):
    recipe = with_dtypes(
        to_recipe({"model": {"model_name_or_path": "m"}, "loss": loss, "optim": {"train_batch_size": 8}})
    )
    programs = Programs(recipe, TINY, make_mesh(1, 1, 1, jax.devices()[:1]), planning.RowShape(4, 48, 40, 0))
    assert ("add_direct" in programs.names) == (loss == {"loss_type": "tdpo2"})
    for name in programs.names:
        fn, args, _ = PROGRAMS[name](programs)
        jax.eval_shape(fn, *args)


def test_a_plan_has_the_form_that_training_takes_and_is_refused_where_training_is(monkeypatch):
    monkeypatch.setattr(planning, "without_accelerators", lambda: None)
    monkeypatch.setattr(planning, "make_plan", lambda recipe, *_, **__: recipe)

    def planned(adapters=None, **sections):
        model = {"model_name_or_path": "m"} | (adapters or {})
        recipe = to_recipe({"model": model, "optim": {"train_batch_size": 8}} | sections)
        return planning.plan(recipe, "v5e:2x2", model_config=str(CONFIGS / "llama-3-8b.json")).optim.mode

    kto, dropping = {"loss_type": "kto"}, {"use_peft": True, "lora_dropout": 0.1}
    assert planned() == "auto"
    assert planned(loss=kto) == "two_pass"
    assert planned(dropping) == "direct"
    with pytest.raises(ValueError, match="mode=direct but loss 'kto' mixes"):
        planned(loss=kto, optim={"mode": "direct"})
    with pytest.raises(ValueError, match=r"lora_dropout=0\.1 needs mode direct, but loss 'kto' takes two passes"):
        planned(dropping, loss=kto)
    with pytest.raises(ValueError, match=r"lora_dropout=0\.1 would drop other inputs in each pass of mode two_pass"):
        planned(dropping, optim={"mode": "two_pass"})
    with pytest.raises(ValueError, match="so that nothing would read keep_layer_inputs=true"):
        planned(dropping, optim={"keep_layer_inputs": True})


def test_sequences_beside_the_pairs_take_rows_too():
    dpo, kto = (
        rows_for(to_recipe({"model": {"model_name_or_path": "m"}, "loss": {"loss_type": name}}), LLAMA, 8)
        for name in ("dpo", "kto")
    )
    assert kto.batches * kto.shape.R * kto.shape.T >= 1.8 * dpo.batches * dpo.shape.R * dpo.shape.T
    assert len(kto.lengths.prompt_B) == len(dpo.lengths.prompt_B) == 128 and 0 <= kto.padding < 0.3


def test_a_reference_model_of_its_own_lies_beside_adapters():
    def held(**model):
        model = {"model_name_or_path": "m", "use_peft": True} | model
        recipe = with_dtypes(to_recipe({"model": model, "loss": {"loss_type": "tdpo2"}}))
        return Held(recipe, TINY, make_mesh(1, 1, 1, jax.devices()[:1])).bytes

    assert "reference parameters" not in held()
    other = held(reference_model_name_or_path="other")
    assert other["reference parameters"] == other["frozen parameters"]


@pytest.mark.parametrize(
    "mode, wanted",
    [
        ("auto", ("add_direct", "add_weighted", "score", "update")),
        ("direct", ("add_direct", "score", "update")),
        ("two_pass", ("add_weighted", "score", "update")),
    ],
)
def test_a_plan_compiles_what_the_mode_runs(mode, wanted):
    recipe = with_dtypes(recipe_of(optim__mode=mode, optim__train_batch_size=8))
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    assert Programs(recipe, TINY, mesh, planning.RowShape(4, 48, 40, 0)).names == wanted


@pytest.mark.parametrize("axes", [pytest.param((1, 1, 1), marks=pytest.mark.slow), (2, 2, 2)], ids=str)
def test_a_plan_keeps_layer_inputs_where_training_would_and_counts_them(axes):
    recipe = with_dtypes(recipe_of(optim__mode="two_pass", optim__train_batch_size=8, data__max_length=128))
    mesh = make_mesh(*axes, jax.devices()[: math.prod(axes)])
    rows = rows_for(recipe, TINY, mesh.shape["data"] * mesh.shape["fsdp"])
    programs = programs_for(recipe, TINY, mesh, rows, GIB)
    assert programs.names == ("add_weighted", "score", "hold", "take", "update")
    parts = {name: compiled(programs, name, rows) for name in programs.names}
    assert parts["add_weighted"]["beside"] == programs.waiting + programs.held["moments"]
    assert parts["take"]["beside"] == parts["hold"]["beside"] == sum(programs.held.values())
    kinds = {one.kind for name in ("hold", "take") for one in parts[name]["work"].collectives}
    assert kinds <= {"all-to-all", "all-gather"} and ("all-to-all" in kinds) == (mesh.size > 1)
    loops = {one.loop for one in parts["add_weighted"]["work"].collectives}
    assert mesh.size == 1 or "layers" in loops  # weights are gathered inside, a layer at a time
    with pytest.raises(ValueError, match="keep_layer_inputs=true spreads the model's width of 16 over all 7 devices"):
        check_held(TINY, types.SimpleNamespace(size=7))
    without = programs_for(recipe, TINY, mesh, rows, sum(programs.held.values()))
    assert without.names == ("add_weighted", "score", "update") and without.waiting == 0
    plain = compiled(without, "add_weighted", rows)
    assert parts["add_weighted"]["work"].matmul_flops < 0.9 * plain["work"].matmul_flops
