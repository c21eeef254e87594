"""Log-probs under the reference model: what they are, what they are kept under, and what a run makes of them."""

import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from examples import STORIES, one_device, short_pairs

from repo_jax import reference
from repo_jax.config import load_recipe, to_recipe
from repo_jax.data.groups import Mismatched
from repo_jax.data.schema import DamagedStoreError
from repo_jax.evaluation import evaluate_setup
from repo_jax.losses import Loss, LossOut
from repo_jax.models.decoder import Decoder
from repo_jax.preparation import set_up
from repo_jax.reference import with_reference
from repo_jax.run_folder import read_metrics
from repo_jax.step import Scorer
from repo_jax.training import prepare, run

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"


def dpo(pairs, *, beta=0.1):
    return jax.nn.softplus(-beta * pairs.ratio_margin_B)


def divergence(pairs, *, beta=0.1):
    return jax.nn.softplus(beta * pairs.ratios_B2) + pairs.groups["kl"].ratios_B2


DPO = Loss(dpo, reference=True)


def train(recipe, loss=None):
    """A whole run on one device in rows of one shape: few programs to compile."""
    setup = prepare(recipe, loss)
    return run(setup._replace(mesh=one_device(), shapes=(setup.shapes[0]._replace(R=1),)))


def recipe_in(folder, model=None, run=None, optim=None, **data):
    sections = {"model": {"model_name_or_path": str(STORIES), "chat_template": TEMPLATE} | (model or {})}
    sections["data"] = {
        "dataset_name": str(folder / "data"),
        "cache_dir": str(folder / "cache"),
        "max_length": 512,
    } | data
    sections["optim"] = {"train_batch_size": 8, "max_steps": 3, "learning_rate": 1e-4, "warmup_ratio": 0} | (
        optim or {}
    )
    sections["run"] = {"output_dir": str(folder / "run"), "save_steps": 2} | (run or {})
    return to_recipe(sections)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    short_pairs(folder)
    return folder


def quietly(setup, **options):
    return with_reference(setup, say=lambda _: None, **options)


def scored(setup, store):
    """By the form of the model that evaluates."""
    scorer = Scorer(
        Decoder(setup.cfg, np.dtype("float32")), DPO._replace(reference=False), {}, setup.mesh, setup.shapes
    )
    params = setup.pretrained.params(setup.mesh, "float32")
    pairs = [store[i] for i in range(len(store))]
    return jax.device_get(scorer({"params": params}, scorer.rows(pairs)).logps_B2)


def test_they_are_those_of_the_model_scored_once_whatever_tokens_count_for(folder, monkeypatch):
    setup = quietly(set_up(recipe_in(folder), training=True, loss=DPO))
    for store in (setup.train, setup.held_out):
        ours = np.stack([store[i].reference_2 for i in range(len(store))])
        np.testing.assert_allclose(ours, scored(setup, store), rtol=1e-5)
    monkeypatch.setattr(reference, "score_tokens", None)  # nothing is scored from here on
    again = quietly(set_up(recipe_in(folder), training=True, loss=DPO))
    assert again.train[3].reference_2.tobytes() == setup.train[3].reference_2.tobytes()
    weighted = quietly(set_up(recipe_in(folder, temporal_decay=0.9), training=True, loss=DPO))
    ours = np.stack([weighted.train[i].reference_2 for i in range(len(weighted.train))])
    np.testing.assert_allclose(ours, scored(weighted, weighted.train), rtol=1e-5)
    assert np.abs(ours).max() < np.abs(scored(setup, setup.train)).max()


def test_other_weights_tokens_or_dtypes_are_scored_apart(folder, tmp_path):
    def places(**model):
        setup = set_up(recipe_in(folder, model), training=True, loss=DPO)
        return reference._folder(setup, setup.train.key)

    model = shutil.copytree(STORIES, tmp_path / "model")
    copied = places(model_name_or_path=str(model))
    weights = safetensors.numpy.load_file(model / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * np.float32(1.01)
    safetensors.numpy.save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    found = [places(), places(model_name_or_path=str(model)), places(compute_dtype="bfloat16")]
    found += [places(chat_template="{{ bos_token }}" + TEMPLATE), places(reference_model_name_or_path=str(model))]
    assert copied == found[0] and len({*found[:4]}) == 4 and found[4] == found[1]


def test_what_is_damaged_is_said_to_be(folder, tmp_path):
    cache = tmp_path / "cache"
    shutil.copytree(folder / "cache", cache)
    setup = set_up(recipe_in(folder, cache_dir=str(cache)), training=True, loss=DPO)
    place = reference._folder(setup, setup.train.key)
    (place / "logps.npy").write_bytes((place / "logps.npy").read_bytes()[:-4])
    with pytest.raises(DamagedStoreError, match=r"is damaged; remove the folder, and it is scored anew"):
        quietly(setup)
    shutil.rmtree(place)
    quietly(setup)
    assert (place / "logps.npy").exists() and len(list(place.parent.iterdir())) == len(set(place.parent.iterdir()))


def test_data_may_bring_their_own(folder, tmp_path, monkeypatch):
    rows = [json.loads(line) for line in (folder / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    for i, row in enumerate(rows):
        row |= {"ref_chosen_logps": -100.0 - i, "ref_rejected_logps": -50.0 - i}
    file = tmp_path / "own.jsonl"

    def setup(rows=rows, **data):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return set_up(recipe_in(folder, dataset_name=str(file), **data), training=True, loss=DPO)

    monkeypatch.setattr(reference, "score_tokens", None)
    said = []
    found = with_reference(setup(), say=said.append)
    assert said == [
        f"{file}: log-probs under the reference model are the data's own (ref_chosen_logps, ref_rejected_logps)"
    ]
    assert found.train[4].reference_2.tolist() == [-104, -54]
    with pytest.raises(ValueError, match="which are of whole answers, but ld_alpha makes tokens count differently"):
        setup(ld_alpha=0.5)
    del rows[7]["ref_rejected_logps"]
    with pytest.raises(
        ValueError, match=r"want ref_chosen_logps and ref_rejected_logps whole: .* which 1 of the 32 pairs"
    ):
        setup(rows)


def test_mismatched_sequences_have_theirs(folder):
    loss = Loss(divergence, reference=True, groups=("kl",), layout="answers")
    setup = quietly(set_up(recipe_in(folder), training=True, loss=loss))
    assert setup.recipe.optim.mode == "two_pass"
    pairs = Mismatched(setup.train, None)
    for i in range(len(pairs)):
        kl = setup.train[i].groups["kl"]
        assert kl.prompt.tolist() == setup.train[i].prompt.tolist() and kl.chosen.tolist() == pairs[i].chosen.tolist()
    ours = np.stack([setup.train[i].groups["kl"].reference_2 for i in range(len(setup.train))])
    np.testing.assert_allclose(ours, scored(setup, pairs), rtol=1e-5)


@pytest.mark.parametrize(
    "model",
    [pytest.param({}, id="all"), pytest.param({"use_peft": True, "lora_r": 2}, id="adapters", marks=pytest.mark.slow)],
)
def test_a_run_begins_with_margins_of_zero_and_goes_on_without_what_was_kept(folder, tmp_path, model):
    output = tmp_path / "run"
    recipe = recipe_in(folder, model, {"output_dir": str(output)})
    train(recipe, loss=DPO)
    logged = read_metrics(output / "metrics.jsonl")
    assert logged[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(logged[0]["rewards/margins"]) < 1e-5 < abs(logged[2]["rewards/margins"])
    results = json.loads((output / "eval_results.json").read_text())
    assert results["before"]["loss"] == pytest.approx(math.log(2), abs=1e-5) != results["after"]["loss"]
    wanted = safetensors.numpy.load_file(output / "hf" / "model.safetensors")
    for name in ("checkpoint-3", "hf", "adapter"):
        shutil.rmtree(output / name, ignore_errors=True)
    shutil.rmtree(folder / "cache" / "reference")
    train(recipe, loss=DPO)
    found = safetensors.numpy.load_file(output / "hf" / "model.safetensors")
    assert all(np.allclose(found[name], wanted[name], atol=1e-6) for name in wanted)
    assert "loss_type: dpo" in (output / "recipe.yaml").read_text()


def test_another_model_may_be_the_reference(folder, tmp_path):
    model = shutil.copytree(STORIES, tmp_path / "model")
    weights = safetensors.numpy.load_file(model / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * np.float32(1.1)
    safetensors.numpy.save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    setup = quietly(set_up(recipe_in(folder, {"reference_model_name_or_path": str(model)}), training=True, loss=DPO))
    plain = quietly(set_up(recipe_in(folder), training=True, loss=DPO))
    assert not np.allclose(setup.train[0].reference_2, plain.train[0].reference_2, rtol=1e-3)
    other = setup._replace(pretrained=setup.reference)
    np.testing.assert_allclose(setup.train[0].reference_2, scored(other, plain.train)[0], rtol=1e-5)


def test_what_is_missing_stops_at_the_start_in_one_line(folder):
    recipe = recipe_in(folder)
    given = dataclasses.replace(recipe.model, reference_model_name_or_path=str(STORIES))
    with pytest.raises(ValueError) as refused:
        set_up(dataclasses.replace(recipe, model=given), training=True)
    assert str(refused.value) == (
        f"reference_model_name_or_path='{STORIES}' but loss 'repo' compares with no reference model; leave it out"
    )
    with pytest.raises(ValueError) as refused:
        set_up(recipe, training=False, loss=DPO)
    assert str(refused.value) == (
        f"loss 'dpo' compares '{STORIES}' with a reference model; give reference_model_name_or_path, the model it was trained from"
    )


def test_rows_with_one_answer_train(folder, tmp_path):
    """KTO's way: answers by themselves, against a divergence estimated from mismatched sequences, in a whole run."""

    def kto(pairs, *, beta=0.1):
        kl = pairs.groups["kl"]
        shift = jnp.maximum(jax.lax.stop_gradient(jnp.sum(kl.ratios_B2, where=kl.there_B2) / kl.there_B2.sum()), 0)
        return 1 - jax.nn.sigmoid(beta * jnp.array([[1.0, -1.0]]) * (pairs.ratios_B2 - shift))

    for split in ("train", "test"):
        pairs = [
            json.loads(line) for line in (folder / "data" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        rows = [
            {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
            for pair in pairs
            for side in ("chosen", "rejected")
        ]
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    output = tmp_path / "run"
    recipe = recipe_in(tmp_path, None, {"output_dir": str(output)}, {"max_steps": 4, "learning_rate": 1e-3})
    train(recipe, loss=Loss(kto, reference=True, coupled=True, groups=("kl",), layout="answers"))
    logged = read_metrics(output / "metrics.jsonl")
    assert logged[0]["loss"] == pytest.approx(0.5, abs=1e-5) and all(line["two_pass"] == 1 for line in logged)
    results = json.loads((output / "eval_results.json").read_text())
    assert results["pairs"] == 32 and results["after"]["loss"] < results["before"]["loss"]
    assert results["after"]["rewards/margins"] > 0 and (output / "report.md").exists()


@pytest.mark.slow
def test_gamma_comes_from_the_first_margins_and_stays(folder, tmp_path, capsys):
    output = tmp_path / "run"
    recipe = recipe_in(folder, None, {"output_dir": str(output)}, {"learning_rate": 1e-3})
    recipe = dataclasses.replace(recipe, loss={"gamma": "auto", "gamma_quantile": 0.75})
    setup = set_up(recipe, training=True)
    margins = scored(setup, setup.train) / [
        [mask.sum() for mask in setup.train[i].masks] for i in range(len(setup.train))
    ]
    wanted = np.quantile(margins[:, 0] - margins[:, 1], 0.75)
    train(recipe)
    assert f"gamma is {wanted:.4g}, which 75% of 32 training pairs have not reached yet" in capsys.readouterr().out
    loss = load_recipe(output / "recipe.yaml").loss
    assert loss == {"loss_type": "repo", "gamma": pytest.approx(wanted, abs=1e-5)}
    assert set_up(load_recipe(output / "recipe.yaml"), training=True).gamma_quantile is None  # it runs as it stands
    first = read_metrics(output / "metrics.jsonl")
    for name in ("checkpoint-3", "hf"):
        shutil.rmtree(output / name)
    train(recipe)
    assert "gamma is" not in capsys.readouterr().out  # of weights that have been trained it would be another
    assert load_recipe(output / "recipe.yaml").loss == loss
    assert read_metrics(output / "metrics.jsonl")[2]["loss"] == pytest.approx(first[2]["loss"], abs=1e-6)


@pytest.mark.parametrize(
    "loss, message",
    [
        (
            {"gamma": 0.5, "gamma_quantile": 0.5},
            "gamma_quantile=0.5 but gamma is not auto, so that nothing would read it; leave it out",
        ),
        ({"gamma": "auto", "gamma_quantile": 2}, "gamma_quantile=2 must be a number from 0 to 1"),
    ],
    ids=str,
)
def test_gamma_auto_is_answered_where_it_cannot_be(folder, loss, message):
    with pytest.raises(ValueError) as refused:
        set_up(dataclasses.replace(recipe_in(folder), loss=loss), training=True)
    assert str(refused.value) == message
    with pytest.raises(ValueError, match="found out by training; give the number that the run's recipe"):
        set_up(dataclasses.replace(recipe_in(folder), loss={"gamma": "auto"}), training=False)
    with pytest.raises(ValueError, match="gamma=auto but loss 'dpo' has no hyperparameter 'gamma'"):
        set_up(dataclasses.replace(recipe_in(folder), loss={"gamma": "auto"}), training=True, loss=DPO)


@pytest.mark.slow
def test_a_rationale_of_the_data_is_trained_on(folder, tmp_path):
    def with_reasons(pairs, *, gamma=0.1):
        return jax.nn.softplus(-pairs.mean_margin_B) - jax.nn.log_sigmoid(
            gamma * pairs.groups["rationale"].logps_B2[:, 0]
        )

    loss, rows = Loss(with_reasons, groups=("rationale",)), []
    for line in (folder / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:16]:
        rows.append(json.loads(line) | {"rationale": "The first one is kind."})
    file = tmp_path / "reasons.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    recipe = recipe_in(tmp_path, None, None, {"learning_rate": 1e-3, "max_steps": 2}, dataset_name=str(file))
    setup = set_up(recipe, training=True, loss=loss)
    pair, tokenizer = setup.train[0], setup.tokenizer
    group = pair.groups["rationale"]
    assert tokenizer.decode(group.chosen[:-1]).strip() == "The first one is kind." and len(group.rejected) == 0
    before = [*pair.prompt, *pair.chosen, *pair.rejected][-512 + len(group.chosen) :]
    assert group.prompt.tolist() == before and all(group.slots <= shape.T for shape in setup.shapes[:1])
    train(recipe, loss=loss)
    logged = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert logged[1]["loss"] < logged[0]["loss"]
    del rows[3]["rationale"]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"row ultrafeedback:\d+ of .* has no text as 'rationale', which the loss needs"
    ):
        set_up(recipe, training=True, loss=loss)


@pytest.mark.slow
def test_a_running_state_goes_on_from_a_checkpoint_and_evaluation_leaves_it(folder, tmp_path):
    def counting(pairs, *, beta=0.1, state, training):
        """Against the mean margin of all pairs seen so far."""
        new = {"sum": state["sum"] + pairs.ratio_margin_B.sum(), "count": state["count"] + len(pairs.logps_B2)}
        new = new if training else state
        shift = jax.lax.stop_gradient(new["sum"] / jnp.maximum(new["count"], 1))
        return LossOut(
            jax.nn.softplus(beta * (shift - pairs.ratio_margin_B)), new, {"seen": new["count"], "shift": shift}
        )

    loss = Loss(counting, reference=True, coupled=True, initial_state=lambda: {"sum": 0.0, "count": 0.0})
    output = tmp_path / "run"
    recipe = recipe_in(
        folder, None, {"output_dir": str(output), "eval_steps": 2}, {"learning_rate": 1e-3, "max_steps": 4}
    )
    train(recipe, loss=loss)
    first = read_metrics(output / "metrics.jsonl")
    assert [line["seen"] for line in first] == [8, 16, 24, 32] and first[1]["eval_seen"] == 16
    assert first[1]["eval_shift"] == first[1]["shift"] != first[3]["eval_shift"]
    for name in ("checkpoint-4", "hf"):
        shutil.rmtree(output / name)
    train(recipe, loss=loss)
    again = read_metrics(output / "metrics.jsonl")
    assert [line["step"] for line in again] == [1, 2, 3, 4]
    for name in ("loss", "seen", "shift", "rewards/margins"):
        assert [line[name] for line in again] == [line[name] for line in first]


def test_a_whole_distribution_is_compared_in_evaluation_too(folder):
    recipe = recipe_in(folder, model={"reference_model_name_or_path": str(STORIES)})
    recipe = dataclasses.replace(recipe, loss={"loss_type": "tdpo2"})
    setup = set_up(recipe, training=False)
    found = evaluate_setup(setup._replace(mesh=one_device(), shapes=(setup.shapes[0]._replace(R=1),)))
    assert found["loss"] == pytest.approx(math.log(2), abs=1e-5)  # of a model beside itself


@pytest.mark.parametrize("loss_type", ["kto", "tdpo2"])
def test_the_datas_own_columns_do_for_pairs_alone(folder, tmp_path, loss_type):
    """Else the model that is evaluated would be its own reference."""
    for split in ("train", "test"):
        text = (folder / "data" / f"{split}.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines()]
        (tmp_path / "data").mkdir(exist_ok=True)
        more = {"ref_chosen_logps": -20.0, "ref_rejected_logps": -21.0}
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row | more) + "\n" for row in rows))
    recipe = dataclasses.replace(recipe_in(tmp_path), loss={"loss_type": loss_type})
    with pytest.raises(ValueError, match=f"loss '{loss_type}' compares .* give reference_model_name_or_path"):
        set_up(recipe, training=False)
    set_up(dataclasses.replace(recipe, loss={"loss_type": "dpo"}), training=False)
