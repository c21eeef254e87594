import numpy as np
import optax
import pytest
from examples import TINY, random_params

from repo_jax.config import OptimSection
from repo_jax.optimizer import decayed, learning_rate, make_optimizer


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.1])
def test_schedules_are_those_of_transformers(kind, warmup_ratio):
    torch = pytest.importorskip("torch", reason="the oracle is transformers' scheduler, which needs torch")
    from transformers import get_scheduler

    name = "constant_with_warmup" if kind == "constant" else kind
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=int(np.ceil(47 * warmup_ratio)), num_training_steps=47)
    ours = learning_rate(OptimSection(learning_rate=1e-3, lr_scheduler_type=kind, warmup_ratio=warmup_ratio), 47)
    for k in range(47):
        np.testing.assert_allclose(float(ours(k)), theirs.get_last_lr()[0], rtol=1e-5, atol=1e-9)  # ours is float32
        optimizer.step(), theirs.step()


def test_weight_decay_leaves_the_norms_alone():
    assert {
        name: flag for name, flag in decayed(random_params(TINY))["layers_L"].items() if name.endswith("norm_D")
    } == {
        "attn_norm_D": False,
        "mlp_norm_D": False,
    }
    mask = decayed(random_params(TINY))
    assert mask["embed_VD"] and mask["layers_L"]["attn"]["q_DNH"] and not mask["final_norm_D"]


def test_updates_equal_adamw_written_out():
    optim = OptimSection(
        learning_rate=1e-2, lr_scheduler_type="constant", warmup_ratio=0, weight_decay=0.1, max_grad_norm=0.5,
        adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-3,
    )  # fmt: skip
    optimizer = make_optimizer(optim, total_steps=3)
    params = {"w_DF": np.ones((2, 2), np.float32), "scale_D": np.ones(2, np.float32)}
    state = optimizer.init(params)
    want = {name: leaf.astype(np.float64) for name, leaf in params.items()}
    m, v = ({name: 0.0 for name in params} for _ in range(2))
    for k in range(1, 4):
        grads = {"w_DF": np.full((2, 2), 0.3 * k, np.float32), "scale_D": np.array([1.0, -k], np.float32)}
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads.values()))
        for name, g in grads.items():
            g = g * min(1.0, 0.5 / norm)
            m[name] = 0.8 * m[name] + 0.2 * g
            v[name] = 0.9 * v[name] + 0.1 * g * g
            step = m[name] / (1 - 0.8**k) / (np.sqrt(v[name] / (1 - 0.9**k)) + 1e-3)
            want[name] = want[name] - 1e-2 * (step + (0.1 * want[name] if name == "w_DF" else 0))
    for name in params:
        np.testing.assert_allclose(params[name], want[name], rtol=1e-5)


def test_without_max_grad_norm_nothing_is_clipped():
    grads = {"w_DF": np.full((2, 2), 1e3, np.float32)}
    params = {"w_DF": np.ones((2, 2), np.float32)}
    sizes = []
    for norm in (None, 1.0):
        optimizer = make_optimizer(
            OptimSection(max_grad_norm=norm, adam_epsilon=1.0, lr_scheduler_type="constant", warmup_ratio=0), 1
        )
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        sizes.append(float(np.abs(updates["w_DF"]).max()))
    assert sizes[0] > 2 * sizes[1]
