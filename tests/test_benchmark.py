"""What `bench` says of an update, on the quickstart's recipe and on a made-up chip."""

import dataclasses
import json
import shutil
import types

import jax
import numpy as np
import pytest
from examples import ASSETS, ROOT, STORIES, TINY, one_device, random_pairs

from repo_jax import benchmark, progress
from repo_jax.benchmark import Measured, Untrained, as_text, bench, measure, prepare, roofline, speed
from repo_jax.config import load_recipe
from repo_jax.data.batches import batch_indices
from repo_jax.flops import useful_flops
from repo_jax.hardware import Chip
from repo_jax.models.config import DecoderConfig
from repo_jax.models.decoder import param_shapes

STEPS, WARMUP = 2, 1


def quickstart(folder, weights="read", **overrides):
    """The quickstart's recipe on one device."""
    overrides = {name.replace("__", "."): value for name, value in overrides.items()}
    given = {
        "model.model_name_or_path": str(STORIES),
        "data.dataset_name": str(ASSETS / "preferences"),
        "data.cache_dir": str(folder / "cache"),
        "run.output_dir": str(folder / "run"),
    }
    setup = prepare(load_recipe(ROOT / "configs" / "quickstart.yaml", given | overrides), weights=weights)
    return setup._replace(mesh=one_device(), shapes=tuple(shape._replace(R=2) for shape in setup.shapes))


@pytest.fixture(scope="module")
def two_pass(tmp_path_factory):
    """A setup in mode two_pass, and what bench found of it."""
    folder = tmp_path_factory.mktemp("two_pass")
    # A gamma at which some pairs are active and some are not, and a rate that keeps it so.
    setup = quickstart(folder, optim__mode="two_pass", loss__gamma=0.2, optim__learning_rate=1e-9)
    found = bench(setup, steps=STEPS, warmup=WARMUP, split_steps=1)
    assert not (folder / "run").exists()  # nothing is written
    return setup, found


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A setup in mode direct of a folder that holds a small configuration and a tokenizer, and what bench found of it."""
    folder = tmp_path_factory.mktemp("untrained")
    shutil.copytree(STORIES, folder / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((STORIES / "config.json").read_text())
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    (folder / "model" / "config.json").write_text(json.dumps(config | small))
    setup = quickstart(folder, "random", model__model_name_or_path=str(folder / "model"), optim__mode="direct")
    return setup, bench(setup, steps=STEPS, warmup=WARMUP, split_steps=1)


def measured_pairs(setup):
    """The pairs of the updates that are measured."""
    size, seed = setup.recipe.optim.train_batch_size, setup.recipe.run.seed
    updates = [
        batch_indices(k, pairs=len(setup.train), train_batch_size=size, seed=seed)
        for k in range(WARMUP, WARMUP + STEPS)
    ]
    return [setup.train[i] for indices in updates for i in indices]


def test_the_measured_updates_are_those_that_training_does_after_the_warm_up(two_pass):
    setup, found = two_pass
    pairs = measured_pairs(setup)
    per_pair = sum(pair.slots for pair in pairs) / len(pairs)
    assert found["tokens_per_second"] / found["pairs_per_second"] == pytest.approx(per_pair)
    seconds = len(pairs) / found["pairs_per_second"]
    times = found["step_time"]
    assert times["shortest"] <= times["median"] <= times["longest"]
    assert times["shortest"] + times["longest"] == pytest.approx(seconds)  # of two updates


def test_useful_work_leaves_out_the_backward_pass_of_pairs_with_no_gradient(two_pass):
    setup, found = two_pass
    pairs = measured_pairs(setup)
    whole = useful_flops(setup.cfg, pairs) / len(pairs) * found["pairs_per_second"]
    peak = found["peak_tflops_per_second"] * 1e12
    assert found["mfu_without_skipping"] == pytest.approx(whole / peak)
    assert found["mfu"] == pytest.approx(found["useful_tflops_per_second"] * 1e12 / peak)
    active = found["active_token_fraction"]
    assert 0 < active < 1 and 0 < found["active_fraction"] < 1
    # Means over updates of unequal pairs, so no more than about:
    assert found["mfu"] / found["mfu_without_skipping"] == pytest.approx((1 + 2 * active) / 3, rel=0.1)
    assert "matmul" in found["peak_is"] and found["roofline"] is None  # a CPU is no known chip


def test_an_update_is_split_into_parts_in_either_mode(two_pass, untrained):
    for (_, found), scores in ((two_pass, True), (untrained, False)):
        parts = found["split"]
        assert all(parts[name] > 0 for name in ("input", "backward", "optimizer", "scoring_pass"))
        assert parts["score"] == (parts["scoring_pass"] if scores else 0)


def test_what_was_compiled_was_compiled_in_the_warm_up(two_pass):
    _, found = two_pass
    assert found["compilations"]["programs"] >= 4 and found["compilations"]["seconds"] > 0
    assert found["compilations"]["while_measured"] == 0


def test_what_is_found_is_strict_json_and_can_be_read(two_pass, untrained):
    for _, found in (two_pass, untrained):
        assert json.loads(json.dumps(found, allow_nan=False)) == found
        text = as_text(found)
        for name in ("pairs_per_second", "tokens_per_second", "useful_tflops_per_second"):
            assert f"{found[name]:.4g}" in text
        assert f"padding            {found['padding_fraction']:.1%}" in text and "GiB of the process" in text


def test_a_model_of_which_there_is_no_weight_can_be_measured(untrained):
    setup, found = untrained
    assert (found["weights"], setup.cfg.D) == ("random", 16)
    assert (
        found["parameters"]
        == found["trained_parameters"]
        == sum(map(np.size, jax.tree.leaves(param_shapes(setup.cfg))))
    )
    # All rewards are about equal in a model that knows nothing, so that gamma is out of every pair's reach.
    assert found["active_fraction"] == found["active_token_fraction"] == 1.0


@pytest.mark.slow
def test_random_weights_have_the_size_of_a_fresh_models(untrained):
    cfg = dataclasses.replace(TINY, unit_offset_norm=True, qkv_bias=True)
    params = Untrained(None, cfg, None).params(one_device(), "bfloat16")
    shapes = param_shapes(cfg, "bfloat16")
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), shapes
    )
    attn = params["layers_L"]["attn"]
    assert float(np.std(np.float32(attn["q_DNH"]))) == pytest.approx(0.02, rel=0.1)
    assert not np.array_equal(attn["k_DKH"], attn["v_DKH"])
    assert not np.float32(params["final_norm_D"]).any() and not np.float32(attn["q_bias_NH"]).any()
    plain = untrained[0].pretrained.params(one_device(), "float32")  # its norms do not add 1
    assert np.all(plain["final_norm_D"] == 1)


@pytest.mark.parametrize("backend, order", [("cpu", "sesese"), ("gpu", "ssesee")])
def test_accelerators_have_the_next_update_before_one_is_waited_for(monkeypatch, backend, order):
    happened, clock = [], types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(benchmark.jax, "default_backend", lambda: backend)
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock.now)
    durations = []
    monkeypatch.setattr(progress, "_durations", lambda: durations)

    def step(state, pairs):
        happened.append("s")
        if state == 0:  # the first one compiles
            durations.append(5.0)
            clock.now += 5.0
        return state + 1, {"loss": np.float32(pairs)}

    def get(metrics):
        happened.append("e")
        clock.now += 2.0
        return metrics

    monkeypatch.setattr(benchmark.jax, "device_get", get)
    state, measured = measure(step, 0, iter([7, 8, 9, 10]), 3)
    assert "".join(happened) == order and state == 3
    assert measured == [Measured(2.0, pairs, {"loss": pairs}) for pairs in (7, 8, 9)]


def made_up(monkeypatch, *, use_peft=False):
    """What speed and roofline read of a setup, of four chips of 1 TFLOP/s and 100 bytes a second."""
    chip = Chip("made up", 1e12, None, 100.0, 1.0)
    monkeypatch.setattr(benchmark, "chip_of", lambda kind: chip)
    model = types.SimpleNamespace(compute_dtype="bfloat16", use_peft=use_peft)
    device = types.SimpleNamespace(platform="gpu", device_kind="made up")
    mesh = types.SimpleNamespace(size=4, local_devices=[device])
    return types.SimpleNamespace(recipe=types.SimpleNamespace(model=model), mesh=mesh, cfg=TINY)


def test_a_roofline_is_work_over_peak_and_traffic_over_bandwidth(monkeypatch):
    setup = made_up(monkeypatch)
    held = {"parameters": 10, "gradients": 20, "moments": 40}
    assert roofline(setup, 8e12, held) == {"useful_operations": 2.0, "optimizer_memory": 1.2}
    adapters = {"frozen parameters": 10_000, "adapters": 10, "gradients": 20, "moments": 40}
    assert roofline(setup, 8e12, adapters) == roofline(setup, 8e12, held)


def test_utilisation_is_of_all_chips(monkeypatch):
    setup, pairs = made_up(monkeypatch), random_pairs(3, V=TINY.V)
    measured = [
        Measured(seconds, pairs, {"active_token_fraction": active}) for seconds, active in ((1.0, 1.0), (3.0, 0.0))
    ]
    found = speed(setup, measured, {"parameters": 1, "gradients": 1, "moments": 1})
    whole = useful_flops(TINY, pairs)
    assert found["pairs_per_second"] == 1.5
    assert found["tokens_per_second_per_chip"] == found["tokens_per_second"] / 4
    assert found["mfu"] == pytest.approx((whole + whole / 3) / 4 / 4e12)
    assert found["mfu_without_skipping"] == pytest.approx(2 * whole / 4 / 4e12)
    assert found["step_time"] == {"median": 2.0, "shortest": 1.0, "longest": 3.0}
    assert found["peak_is"] == "4 x made up as published, bfloat16"


def test_frozen_weights_count_no_gradient_of_theirs(monkeypatch):
    pairs = random_pairs(3, V=TINY.V)
    measured = [Measured(1.0, pairs, {"active_token_fraction": 1.0})]
    held = {"adapters": 1, "gradients": 1, "moments": 1}
    found = speed(made_up(monkeypatch, use_peft=True), measured, held)
    assert found["useful_tflops_per_second"] * 1e12 == pytest.approx(useful_flops(TINY, pairs, trained="adapters"))


def test_a_chip_with_no_published_peak_has_no_utilisation(monkeypatch):
    setup = made_up(monkeypatch)
    monkeypatch.setattr(benchmark, "chip_of", lambda kind: None)
    measured = [Measured(1.0, random_pairs(2, V=TINY.V), {"active_token_fraction": 1.0})]
    found = speed(setup, measured, {"parameters": 1, "gradients": 1, "moments": 1})
    assert [found[name] for name in ("mfu", "mfu_without_skipping", "peak_is", "roofline")] == [None] * 4


def test_a_recipe_that_pushes_to_the_hub_is_measured_without_that(tmp_path):
    setup = quickstart(tmp_path, run__push_to_hub=True, run__hub_model_id="ORG/NAME")
    assert setup.push_to is None and not (tmp_path / "run").exists()
    assert setup.cfg == DecoderConfig.from_hf(STORIES)


@pytest.mark.slow
def test_a_loss_with_the_reference_model_beside_it_is_measured(tmp_path):
    own = {"loss": {"loss_type": "tdpo2"}, "model.model_name_or_path": str(STORIES), "optim.mode": "direct"}
    recipe = load_recipe(ROOT / "configs" / "quickstart.yaml", {k: v for k, v in own.items() if k != "loss"})
    recipe = dataclasses.replace(
        recipe,
        loss=own["loss"],
        data=dataclasses.replace(recipe.data, dataset_name=str(ASSETS / "preferences"), cache_dir=str(tmp_path)),
    )
    setup = prepare(recipe)
    setup = setup._replace(mesh=one_device(), shapes=tuple(shape._replace(R=2) for shape in setup.shapes))
    assert bench(setup, steps=1, warmup=1, split_steps=1)["pairs_per_second"] > 0
