import jax
import numpy as np
import pytest
from examples import TINY, one_device, random_pairs, random_params

from repo_jax import evaluation
from repo_jax.data.rows import RowShape
from repo_jax.evaluation import evaluate_pairs, summarize
from repo_jax.losses import make_loss
from repo_jax.models.decoder import Decoder
from repo_jax.sharding import make_mesh, param_shardings
from repo_jax.step import Scorer

PAIRS = random_pairs(21, V=TINY.V)
SHAPE = RowShape(2, 64, 48)


def evaluated(shape=SHAPE, mesh=None, loss="repo"):
    mesh = mesh or one_device()
    scorer = Scorer(Decoder(TINY, np.dtype("float32")), *make_loss(loss), mesh, shape)
    params = random_params(TINY)
    return evaluate_pairs(scorer, {"params": jax.device_put(params, param_shardings(params, mesh))}, PAIRS)


@pytest.mark.parametrize(
    "group", [pytest.param(1, marks=pytest.mark.slow), 4, pytest.param(21, marks=pytest.mark.slow), 100]
)
def test_metrics_do_not_depend_on_batches_rows_or_mesh(monkeypatch, group):
    plain = evaluated()
    monkeypatch.setattr(evaluation, "GROUP", group)
    # The last has more shards than key/value heads.
    meshes = (make_mesh(2, 4, 1), make_mesh(1, 2, 4))
    for other in (evaluated(), *(evaluated(RowShape(8, 100, 100), mesh) for mesh in meshes)):
        np.testing.assert_allclose(other.margins_B, plain.margins_B, rtol=1e-4, atol=1e-5)
        assert other.metrics == {
            name: pytest.approx(value, rel=1e-4, abs=1e-5) for name, value in plain.metrics.items()
        }


def test_metrics_are_what_their_names_say():
    plain, simpo = evaluated(), evaluated(loss="simpo")  # simpo's beta is 2
    margins = plain.margins_B
    assert len(margins) == len(PAIRS)
    for name, value in {
        "loss": np.maximum(0.5 - margins, 0).mean(),
        "rewards/accuracies": (margins > 0).mean(),
        "active_fraction": (margins < 0.5).mean(),
        "rewards/margins": margins.mean(),
    }.items():
        assert plain.metrics[name] == pytest.approx(value, rel=1e-5), name
    assert plain.metrics["rewards/chosen"] == plain.metrics["logps/chosen"]
    assert plain.metrics["rewards/chosen"] - plain.metrics["rewards/rejected"] == pytest.approx(
        margins.mean(), abs=1e-5
    )
    assert simpo.metrics["rewards/chosen"] == pytest.approx(2 * plain.metrics["logps/chosen"])
    assert simpo.metrics["active_fraction"] == 1
    assert summarize(simpo)["mean_margin"] == pytest.approx(margins.mean())
