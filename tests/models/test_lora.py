import copy
import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from examples import TINY, one_device, random_params
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import PartitionSpec as P

from repo_jax.models import hf, lora
from repo_jax.models.config import DecoderConfig
from repo_jax.models.decoder import Decoder, next_token_logits, output_head, param_shapes
from repo_jax.sharding import make_mesh, param_shardings

R, ALPHA = 4, 10.0
SCALE = ALPHA / R
PHI3 = dataclasses.replace(TINY, layout="phi3")
WINDOWED = dataclasses.replace(TINY, windows=(8, None))  # two layers in layers_L, one in rest_L
NAMES = ["q_proj", "down_proj"]
IDS = np.random.default_rng(0).integers(1, TINY.V, size=40)


def start(cfg, target_modules, *, mesh=None, seed=0):
    shapes = lora.adapter_shapes(cfg, R, target_modules)
    return lora.init_adapters(jax.random.key(seed), shapes, param_shardings(shapes, mesh or one_device()))


def random_adapters(cfg, target_modules="all-linear", seed=1):
    rng = np.random.default_rng(seed)
    shapes = lora.adapter_shapes(cfg, R, target_modules)
    return jax.tree.map(lambda leaf: np.float32(rng.normal(scale=0.2, size=leaf.shape)), shapes)


def without_effect(cfg, target_modules="all-linear"):
    """Adapters as they are before training."""
    adapters = flat(random_adapters(cfg, target_modules))
    return unflatten_dict({path: leaf * ("/a_" in path) for path, leaf in adapters.items()}, sep="/")


def merge(params, adapters, scale):
    """The parameters with W + scale * A B in the place of every adapted W."""
    params, pairs = dict(flat(params)), flat(adapters)
    for path in {path.rpartition("/")[0] for path in pairs}:
        (a_name, a), (b_name, b) = sorted(
            (p.rpartition("/")[2], leaf) for p, leaf in pairs.items() if p.startswith(path)
        )
        product = f"L{a_name[2:]},L{b_name[2:]}->L{path.rpartition('_')[2]}"
        params[path] = params[path] + scale * jnp.einsum(product, a, b, precision=jax.lax.Precision.HIGHEST)
    return unflatten_dict(params, sep="/")


def variables(params, adapters):
    return {"params": params} | ({} if adapters is None else {"lora": adapters})


@functools.partial(jax.jit, static_argnames=("cfg", "dropout"))
def hidden(cfg, params, adapters, ids, key=None, dropout=0.0):
    model = Decoder(cfg, jnp.float32, lora_scale=SCALE, lora_dropout=dropout)
    rows, ones = ids[None], jnp.ones_like(ids)[None]
    positions = jnp.arange(ids.size)[None]
    rngs = None if key is None else {"dropout": key}
    return model.apply(variables(params, adapters), rows, positions, ones, ones, rngs=rngs)[0]


def logps(cfg, params, adapters, ids):
    """log p(ids[i + 1] | ids[: i + 1])."""
    logits = next_token_logits(cfg, hidden(cfg, params, adapters, ids), output_head(params))
    return jnp.take_along_axis(jax.nn.log_softmax(logits[:-1]), ids[1:, None], axis=1)[:, 0]


@functools.partial(jax.jit, static_argnames="cfg")
def logps_and_slopes(cfg, params, adapters, ids):
    def objective(adapters):
        found = logps(cfg, params, adapters, ids)
        return found.mean(), found

    return jax.grad(objective, has_aux=True)(adapters)[::-1]


def flat(tree):
    return flatten_dict(tree, sep="/")


def norm_of(tree):
    return np.sqrt(sum(np.square(leaf, dtype=np.float64).sum() for leaf in jax.tree.leaves(tree)))


# --- which weights, of what shape, from what values


@pytest.mark.parametrize(
    "cfg, names, adapted",
    [
        (TINY, None, ["attn/q_DNH", "attn/v_DKH"]),
        (TINY, ["q_proj"], ["attn/q_DNH"]),
        (TINY, "k_proj", ["attn/k_DKH"]),
        (TINY, ["self_attn.o_proj", "mlp.down_proj"], ["attn/o_NHD", "mlp/down_FD"]),
        (PHI3, None, ["attn/k_DKH", "attn/q_DNH", "attn/v_DKH"]),
        (PHI3, ["gate_up_proj"], ["mlp/gate_DF", "mlp/up_DF"]),
    ],
)
def test_hugging_face_names_select_our_weights(cfg, names, adapted):
    assert sorted(lora.targets(cfg, names)) == [f"layers_L/{path}" for path in adapted]


@pytest.mark.parametrize("layout", hf.LAYOUTS)
def test_all_linear_is_every_matrix_of_every_layer_and_nothing_else(layout):
    cfg = dataclasses.replace(WINDOWED, layout=layout, qkv_bias=True, qk_norm="whole" if layout == "olmo2" else "head")
    matrices = {
        f"{stack}/{path}"
        for stack in ("layers_L", "rest_L")
        for path in ("attn/q_DNH", "attn/k_DKH", "attn/v_DKH", "attn/o_NHD", "mlp/gate_DF", "mlp/up_DF", "mlp/down_FD")
    }
    assert set(lora.targets(cfg, "all-linear")) == set(lora.targets(cfg, ["all-linear"])) == matrices


@pytest.mark.parametrize(
    "names, message",
    [
        (["q_proj", "lm_head"], "but lm_head is no linear map in this model's layers; choose from q_proj, k_proj, v_proj, "
                                "o_proj, gate_proj, up_proj, down_proj, or take all-linear"),
        ("embed_tokens", "but embed_tokens is no linear map"),
        (["proj"], "but proj is no linear map"),
        ([], "adapts nothing; choose from q_proj, "),
    ],
)  # fmt: skip
def test_other_names_are_answered_with_those_there_are(names, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        lora.targets(TINY, names)


def test_adapters_stand_where_their_weights_do_and_name_their_axes():
    shapes = {path: leaf.shape for path, leaf in flat(lora.adapter_shapes(WINDOWED, R, ["q_proj", "o_proj"])).items()}
    assert shapes == {
        "layers_L/attn/q_DNH/a_Dr": (2, 16, R),
        "layers_L/attn/q_DNH/b_rNH": (2, R, 4, 4),
        "layers_L/attn/o_NHD/a_NHr": (2, 4, 4, R),
        "layers_L/attn/o_NHD/b_rD": (2, R, 16),
        "rest_L/attn/q_DNH/a_Dr": (1, 16, R),
        "rest_L/attn/q_DNH/b_rNH": (1, R, 4, 4),
        "rest_L/attn/o_NHD/a_NHr": (1, 4, 4, R),
        "rest_L/attn/o_NHD/b_rD": (1, R, 16),
    }


def test_adapters_start_as_pefts_do_and_no_two_are_equal():
    adapters = flat(start(dataclasses.replace(TINY, D=64, F=256), NAMES))
    first = {}
    for path, leaf in adapters.items():
        if "/b_" in path:
            assert not np.any(leaf)
        else:
            inputs = np.prod(leaf.shape[1:-1])
            scaled = np.ravel(leaf) * np.sqrt(inputs)  # uniform in [-1, 1], whose variance is 1/3
            assert np.abs(scaled).max() <= 1
            assert abs(scaled.var() - 1 / 3) < 4 / np.sqrt(scaled.size) / 3 and np.abs(scaled).max() > 0.98
            first |= {(path, i): round(layer[0].item(), 5) for i, layer in enumerate(scaled.reshape(len(leaf), -1))}
    assert len(first) == 2 * TINY.L == len(set(first.values()))


def test_adapters_start_with_the_same_values_on_every_mesh():
    one, other = (flat(start(WINDOWED, ["q_proj"], seed=seed)) for seed in (0, 1))
    spread = flat(start(WINDOWED, ["q_proj"], mesh=make_mesh(1, 4, 2)))
    assert all(np.array_equal(spread[path], one[path]) for path in one)
    assert all(np.array_equal(other[path], one[path]) == ("/b_" in path) for path in one)
    assert spread["layers_L/attn/q_DNH/a_Dr"].sharding.spec == P(None, "fsdp", None)
    assert spread["rest_L/attn/q_DNH/b_rNH"].sharding.spec == P(None, None, "tensor", None)


# --- what they do to the model


def test_with_b_zero_the_model_is_unchanged():
    params, adapters = random_params(WINDOWED), without_effect(WINDOWED)
    np.testing.assert_array_equal(hidden(WINDOWED, params, adapters, IDS), hidden(WINDOWED, params, None, IDS))


def test_adapters_have_the_value_and_the_gradient_of_merged_weights():
    cfg, params, adapters = WINDOWED, random_params(WINDOWED), random_adapters(WINDOWED)
    cotangent = np.random.default_rng(2).normal(size=(IDS.size, cfg.D)).astype(np.float32)

    def slopes(apply):
        def objective(adapters):
            out = apply(adapters)
            return (out * cotangent).sum(), out

        return jax.jit(jax.grad(objective, has_aux=True))(adapters)

    grads, out = slopes(lambda adapters: hidden(cfg, params, adapters, IDS))
    merged_grads, merged_out = slopes(lambda adapters: hidden(cfg, merge(params, adapters, SCALE), None, IDS))
    np.testing.assert_allclose(out, merged_out, atol=1e-4)
    assert np.abs(out - hidden(cfg, params, None, IDS)).max() > 0.1
    difference = jax.tree.map(lambda one, other: np.subtract(one, other, dtype=np.float64), grads, merged_grads)
    assert norm_of(difference) <= 1e-5 * norm_of(merged_grads)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(grads))


# --- dropout


def test_dropout_is_nothing_at_rate_0_or_without_a_key_and_one_function_of_the_key():
    cfg = dataclasses.replace(TINY, L=1)
    params, adapters = random_params(cfg), random_adapters(cfg, ["v_proj"])
    plain = hidden(cfg, params, adapters, IDS)
    np.testing.assert_array_equal(hidden(cfg, params, adapters, IDS, jax.random.key(0), dropout=0.0), plain)
    np.testing.assert_array_equal(hidden(cfg, params, adapters, IDS, dropout=0.3), plain)
    dropped = [hidden(cfg, params, adapters, IDS, jax.random.key(seed), dropout=0.3) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(dropped[0], dropped[1])
    assert np.abs(dropped[0] - dropped[2]).max() > 0.1 and np.abs(dropped[0] - plain).max() > 0.1


def test_dropout_drops_the_inputs_of_adapters_alone_and_keeps_their_mean():
    cfg = dataclasses.replace(TINY, L=1)
    # Adapters this small change the output linearly.
    params, adapters = random_params(cfg), jax.tree.map(lambda leaf: 0.1 * leaf, random_adapters(cfg, ["v_proj"]))
    zero = jax.tree.map(np.zeros_like, adapters)
    without = hidden(cfg, params, zero, IDS, jax.random.key(0), dropout=0.3)
    np.testing.assert_array_equal(without, hidden(cfg, params, zero, IDS))
    delta = hidden(cfg, params, adapters, IDS) - without
    deltas = [hidden(cfg, params, adapters, IDS, jax.random.key(seed), dropout=0.3) - without for seed in range(400)]
    one_off = np.mean([np.linalg.norm(one - delta) for one in deltas])
    assert np.linalg.norm(np.mean(deltas, axis=0) - delta) < 0.1 * one_off


# --- PEFT


@functools.cache
def peft():
    return pytest.importorskip("peft", reason="the oracle of PEFT's folders is PEFT")


@functools.cache
def checkpoints():
    pytest.importorskip("torch", reason="PEFT needs torch")
    import checkpoints

    return checkpoints


def fresh(name):
    """A torch model of our own, since PEFT changes the one it is given, that says where it is from."""
    model = copy.deepcopy(checkpoints().torch_model(name))
    model.name_or_path = str(checkpoints().folder_of(name))
    return model


@functools.cache
def imported(folder, deltas=None):
    cfg = DecoderConfig.from_hf(folder)
    return cfg, hf.from_hf(folder, cfg, param_shardings(param_shapes(cfg), one_device()), deltas=deltas)


def made_by_peft(name, folder, **options):
    """A torch model with a random adapter, which is saved in `folder`."""
    torch = pytest.importorskip("torch", reason="PEFT needs torch")
    settings = dict(r=R, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM") | options
    model = peft().get_peft_model(fresh(name), peft().LoraConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return model


FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "olmo2", "llama-reward"]
COMPILED = ["llama", "qwen2", "gemma2", "phi3"]  # whose log-probs are compared too: a program takes seconds to compile
SOME_COMPILED = [pytest.param(name, marks=[pytest.mark.slow] * (name in ("qwen2", "gemma2"))) for name in COMPILED]


def trained(cfg, params, adapters, ids, steps=4):
    """Adapters after a few steps up the log-probs, the mean log-prob before them, and all log-probs after them."""
    means = []
    for _ in range(steps):
        found, slopes = logps_and_slopes(cfg, params, adapters, ids)
        means.append(found.mean())
        adapters = jax.tree.map(lambda leaf, slope: leaf + np.float32(0.02) * np.sign(slope), adapters, slopes)
    return adapters, means[0], logps_and_slopes(cfg, params, adapters, ids)[0]


def save(adapters, cfg, folder, base, *, target_modules="all-linear"):
    options = dict(r=R, alpha=ALPHA, dropout=0.1, target_modules=target_modules)
    lora.save_adapter(adapters, cfg, folder, **options, base=str(base))


@pytest.mark.parametrize("name", SOME_COMPILED)
def test_peft_on_torch_has_our_log_probs_for_an_adapter_trained_here(name, tmp_path):
    folder, ids = checkpoints().folder_of(name), checkpoints().random_ids()
    cfg, params = imported(folder)
    adapters, before, ours = trained(cfg, params, without_effect(cfg), ids)
    assert ours.mean() > before + 0.1
    save(adapters, cfg, tmp_path, folder)
    model = peft().PeftModel.from_pretrained(fresh(name), tmp_path).eval()
    np.testing.assert_allclose(ours, checkpoints().torch_logps(model, ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", SOME_COMPILED)
def test_an_adapter_that_peft_made_has_torchs_log_probs_here(name, tmp_path):
    folder, ids = checkpoints().folder_of(name), checkpoints().random_ids()
    theirs = checkpoints().torch_logps(made_by_peft(name, tmp_path), ids)
    cfg, params = imported(folder, lora.PeftAdapter(tmp_path))
    ours, _ = logps_and_slopes(cfg, params, without_effect(cfg), ids)  # what is already compiled, and does nothing here
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    assert np.abs(theirs - checkpoints().torch_logps(name, ids)).max() > 0.1


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in ("mistral", "qwen3", "gemma", "gemma3"))) for n in FAMILIES],
)
def test_merged_weights_of_every_family_equal_pefts_in_both_directions(name, tmp_path):
    cfg, params = imported(checkpoints().folder_of(name))
    adapters = random_adapters(cfg)
    save(adapters, cfg, tmp_path / "ours", checkpoints().folder_of(name))
    one = peft().PeftModel.from_pretrained(fresh(name), tmp_path / "ours")
    two = made_by_peft(name, tmp_path / "theirs", target_modules=r".*_proj", task_type=None)
    for model, folder in ((one, "1"), (two, "2")):
        model.merge_and_unload().save_pretrained(tmp_path / folder)
    adapter = lora.PeftAdapter(tmp_path / "theirs")
    adapter.check(cfg)
    _, read = imported(checkpoints().folder_of(name), adapter)
    for merged, folder in ((merge(params, adapters, SCALE), "1"), (read, "2")):
        theirs, before = flat(imported(tmp_path / folder)[1]), flat(params)
        for path, leaf in flat(merged).items():
            np.testing.assert_allclose(leaf, theirs[path], atol=2e-6)
            assert np.array_equal(leaf, before[path]) == (path not in lora.targets(cfg, "all-linear"))


@pytest.mark.parametrize(
    "name, options",
    [
        ("llama", dict(target_modules=["q_proj", "v_proj"])),
        ("llama", dict(target_modules=r".*\.mlp\.(up|down)_proj")),
        ("llama", dict(rank_pattern={"down_proj": 2, r"layers\.1\.self_attn\.q_proj": 7}, alpha_pattern={"k_proj": 3})),
        ("llama", dict(rank_pattern={"^model.layers.0.mlp.up_proj": 1}, use_rslora=True)),
        ("llama", dict(target_modules=["q_proj", "o_proj"], layers_to_transform=[0, 2])),
        ("llama", dict(target_modules=["q_proj", "o_proj"], layers_to_transform=1, init_lora_weights="gaussian")),
        ("llama", dict(target_modules=["self_attn.q_proj", "up_proj"], exclude_modules=["model.layers.1.mlp.up_proj"])),
        ("phi3", dict(target_modules=["qkv_proj"])),
    ],
)  # fmt: skip
def test_pefts_options_mean_here_what_they_mean_there(name, options, tmp_path):
    model = made_by_peft(name, tmp_path / "adapter", **options)
    cfg, before = imported(checkpoints().folder_of(name))
    adapter = lora.PeftAdapter(tmp_path / "adapter")
    adapter.check(cfg)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    ours, theirs, before = map(
        flat, (imported(checkpoints().folder_of(name), adapter)[1], imported(tmp_path / "merged")[1], before)
    )
    for path in ours:
        np.testing.assert_allclose(ours[path], theirs[path], atol=1e-6)
    adapted = [path for path in ours if not np.array_equal(ours[path], before[path])]
    assert 0 < len(adapted) < len(ours)


@pytest.mark.parametrize("cfg", [WINDOWED, PHI3], ids=["windowed", "phi3"])
def test_what_is_written_is_read_as_the_same_deltas_also_in_parts(cfg, tmp_path):
    params, adapters = random_params(cfg), random_adapters(cfg)
    save(adapters, cfg, tmp_path / "adapter", "ORG/NAME")
    hf.to_hf(params, cfg, tmp_path / "base", dtypes="float32")
    adapter = lora.PeftAdapter(tmp_path / "adapter")
    adapter.check(cfg)
    merged = flat(merge(params, adapters, SCALE))
    for mesh in (one_device(), make_mesh(1, 4, 2)):
        read = flat(hf.from_hf(tmp_path / "base", cfg, param_shardings(param_shapes(cfg), mesh), deltas=adapter))
        for path in lora.targets(cfg, "all-linear"):
            np.testing.assert_allclose(read[path], merged[path], atol=1e-6)


def test_the_folder_says_what_peft_and_people_need_to_know(tmp_path):
    lora.save_adapter(
        random_adapters(PHI3, ["qkv_proj", "down_proj"]), PHI3, tmp_path, r=R, alpha=ALPHA, dropout=0.1,
        target_modules=["qkv_proj", "down_proj"], base="ORG/NAME", revision="v1",
    )  # fmt: skip
    config = peft().LoraConfig.from_pretrained(tmp_path)
    assert (config.task_type, config.peft_type, config.r, config.lora_alpha) == ("CAUSAL_LM", "LORA", R, ALPHA)
    assert (config.lora_dropout, config.target_modules) == (0.1, {"down_proj", "qkv_proj"})
    assert type(config.lora_alpha) is int
    # The three adapters of qkv_proj are one of three times the rank, with the scale that each has.
    assert (config.rank_pattern, config.alpha_pattern) == ({"qkv_proj": 3 * R}, {"qkv_proj": 3 * ALPHA})
    assert (config.base_model_name_or_path, config.revision) == ("ORG/NAME", "v1")


def test_adapters_on_a_mesh_are_written_as_they_are_on_one_device(tmp_path):
    adapters = random_adapters(WINDOWED)
    spread = jax.device_put(adapters, param_shardings(adapters, make_mesh(1, 4, 2)))
    for name, tree in (("one", adapters), ("mesh", spread)):
        save(tree, WINDOWED, tmp_path / name, "ORG/NAME")
    for file in (lora.CONFIG, lora.WEIGHTS):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "mesh" / file).read_bytes()


# --- folders that are not what they should be


@pytest.fixture
def adapter(tmp_path):
    """An adapter of TINY's q_proj and up_proj, to be spoilt: spoil(change of its tensors, **changes of its config)."""
    names = ["q_proj", "up_proj"]
    adapters = random_adapters(TINY, names)
    save(adapters, TINY, tmp_path, "ORG/NAME", target_modules=names)

    def spoil(change=None, **changes):
        config = json.loads((tmp_path / lora.CONFIG).read_text()) | changes
        (tmp_path / lora.CONFIG).write_text(json.dumps(config))
        if change is not None:
            tensors = safetensors.numpy.load_file(tmp_path / lora.WEIGHTS)
            change(tensors)
            safetensors.numpy.save_file(tensors, tmp_path / lora.WEIGHTS)
        return tmp_path

    return spoil


@pytest.mark.parametrize(
    "changes",
    [
        dict(use_dora=True),
        dict(bias="all"),
        dict(lora_bias=True),
        dict(modules_to_save=["score"]),
        dict(fan_in_fan_out=True),
        dict(peft_type="IA3"),
        dict(peft_type=None),
        dict(task_type="FEATURE_EXTRACTION"),
        dict(task_type="SEQ_CLS"),
        dict(init_lora_weights="pissa_niter_4"),
        dict(layer_replication=[[0, 2], [1, 3]]),
        dict(trainable_token_indices=[5]),
        dict(target_parameters=["mlp.experts.down_proj"]),
        dict(something_of_next_year=True),
    ],
    ids=lambda changes: "{}={}".format(*next(iter(changes.items()))),
)
def test_what_is_more_than_low_rank_deltas_is_refused_by_name(adapter, changes):
    [(name, value)] = changes.items()
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r} of ") + ".* is not supported; merge the adapter"):
        lora.PeftAdapter(adapter(**changes))


def test_what_changes_nothing_is_passed_over(adapter):
    harmless = dict(
        inference_mode=False, lora_dropout=0.5, peft_version="0.9", auto_mapping={"a": "b"}, loftq_config={}
    )
    lora.PeftAdapter(adapter(**harmless)).check(TINY)


Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    "change, changes, message",
    [
        (lambda t: t.pop(Q0), {}, f"missing {Q0}"),
        (lambda t: [t.pop(Q0), t.pop(Q0.replace("_A", "_B"))], {}, f"missing {Q0}; missing {Q0.replace('_A', '_B')}"),
        (lambda t: t.update({"base_model.model.lm_head.lora_A.weight": t[Q0]}), {},
         "unexpected base_model.model.lm_head.lora_A.weight"),
        (lambda t: t.update({Q0.replace("layers.0", "layers.7"): t[Q0]}), {}, "unexpected base_model.model.model.layers.7"),
        (lambda t: t.update({Q0: t[Q0][:, :-1].copy()}), {}, f"{Q0} has shape [4, 15], wanted [4, 16]"),
        (None, dict(rank_pattern={"layers.0.self_attn.q_proj": 2}), f"{Q0} has shape [4, 16], wanted [2, 16]"),
        (None, dict(target_modules=["q_proj", "up_proj", "v_proj"]), "missing base_model.model.model.layers.0.self_attn.v_proj"),
        (lambda t: t.clear(), dict(target_modules=["c_attn"]), "it adapts nothing in it"),
    ],
)  # fmt: skip
def test_an_adapter_that_does_not_fit_is_told_tensor_by_tensor(adapter, change, changes, message):
    peft_adapter = lora.PeftAdapter(adapter(change, **changes))
    with pytest.raises(ValueError, match=r"does not fit its adapter_config\.json and its base model: ") as error:
        peft_adapter.check(TINY)
    assert message in str(error.value)


def test_nan_in_an_adapter_is_named(adapter, tmp_path):
    folder = adapter(lambda tensors: tensors[Q0].__setitem__((0, 0), np.nan))
    hf.to_hf(random_params(TINY), TINY, tmp_path / "base", dtypes="float32")
    with pytest.raises(ValueError, match=f"{re.escape(Q0)} in '.*{lora.WEIGHTS}' holds NaN"):
        imported_with = lora.PeftAdapter(folder)
        hf.from_hf(tmp_path / "base", TINY, param_shardings(param_shapes(TINY), one_device()), deltas=imported_with)


def test_files_that_are_missing_or_damaged_are_named(adapter, tmp_path):
    folder = adapter()
    with pytest.raises(ValueError, match=r"adapter_config.json does not say base_model_name_or_path; write it there"):
        lora.PeftAdapter(adapter(base_model_name_or_path=None))
    adapter(base_model_name_or_path="ORG/NAME")
    weights = folder / lora.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match=f"{lora.WEIGHTS}' is not a whole safetensors file"):
        lora.PeftAdapter(folder)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(
        FileNotFoundError, match=f"has no {lora.WEIGHTS} but adapter_model.bin, which is not read; load"
    ):
        lora.PeftAdapter(folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {lora.WEIGHTS}; load"):
        lora.PeftAdapter(folder)
    (folder / lora.CONFIG).write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config.json is not JSON .*; fetch it again"):
        lora.PeftAdapter(folder)
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config.json; give the folder of an adapter"):
        lora.PeftAdapter(tmp_path / "nowhere")
