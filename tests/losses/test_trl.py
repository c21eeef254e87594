"""Objectives beside TRL 1.16's own code on the same log-probs: values and slopes. Skipped where TRL is not installed.

TRL computes its losses inside of trainers, from a model's outputs; a stand-in for the model hands it the log-probs, token by token.
"""

import collections
import types

import numpy as np
import pytest
from loss_pairs import Given, mean_loss, slopes_of

from repo_jax.losses import LOSSES, make_loss

NEEDED = "is not installed; requirements-test.txt names it, for Python 3.11"
torch = pytest.importorskip("torch", reason=f"torch {NEEDED}")
pytest.importorskip("trl", reason=f"trl {NEEDED}")

from trl import DPOTrainer, KTOTrainer  # noqa: E402
from trl.experimental.cpo import CPOTrainer  # noqa: E402
from trl.experimental.orpo import ORPOTrainer  # noqa: E402

B, T = 6, 9  # pairs, and places for tokens after a prompt of one


def tokens(seed: int, lengths_N) -> tuple[np.ndarray, np.ndarray]:
    """logps_NT, 0 beyond each answer's end, and the mask of one place more, for the prompt."""
    rng = np.random.default_rng(seed)
    mask = np.arange(T) < np.asarray(lengths_N)[:, None]
    logps = -rng.uniform(0.1, 3, mask.shape) * mask
    return logps, np.concatenate([np.zeros((len(mask), 1), int), mask.astype(int)], axis=1)


LENGTHS = np.random.default_rng(0).integers(2, T + 1, 2 * B)  # chosen, then rejected
LOGPS, MASK = tokens(1, LENGTHS)
REFERENCE, _ = tokens(2, LENGTHS)
LOG_SUM_P2 = tokens(3, LENGTHS)[0]


def by_pair(x_N) -> np.ndarray:
    return np.stack([x_N[:B], x_N[B:]], axis=1)


def given(weights_NT=1.0, terms=False) -> Given:
    sums = [by_pair((weights_NT * x).sum(axis=1)) for x in (LOGPS, REFERENCE)]
    return Given(
        sums[0],
        by_pair(LENGTHS).astype(float),
        sums[1],
        terms={"log_sum_p2": by_pair(LOG_SUM_P2.sum(axis=1))} if terms else {},
    )


class Accelerator:
    """One process."""

    device = "cpu"

    def gather(self, x):
        return x

    gather_for_metrics = gather


def stand_in(logps_NT) -> types.SimpleNamespace:
    """Outputs of a model, of which only the log-probs matter."""
    zeros = torch.zeros_like(logps_NT.detach())
    return types.SimpleNamespace(
        log_probs=logps_NT,
        log_sum_sq_probs=torch.tensor(LOG_SUM_P2[: len(logps_NT)]),
        entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(),
    )  # fmt: skip


def metrics() -> dict:
    return {mode: collections.defaultdict(list) for mode in ("train", "eval")}


def trl_dpo(loss_types, weights=None, **options) -> tuple[float, np.ndarray]:
    """DPOTrainer's loss, and its slopes in each answer's tokens, summed (with LD weights: in the tokens themselves)."""
    logps = torch.tensor(LOGPS, requires_grad=True)
    reference = torch.tensor((options.pop("weights_NT", 1.0) * REFERENCE).sum(axis=1))
    own = {
        "beta": 0.1,
        "label_smoothing": 0.0,
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
        "use_weighting": False,
    }
    own |= options
    trainer = types.SimpleNamespace(
        model=types.SimpleNamespace(training=True),
        accelerator=Accelerator(), aux_loss_enabled=False, precompute_ref_logps=True, _metrics=metrics(), _tp_size=1,
        loss_types=loss_types, loss_weights=weights or [1.0] * len(loss_types), _total_train_tokens=0,
        args=types.SimpleNamespace(discopop_tau=own.pop("discopop_tau", 0.05)), **own,
    )  # fmt: skip
    inputs = {
        "input_ids": torch.zeros(MASK.shape, dtype=torch.long),
        "attention_mask": torch.ones(MASK.shape, dtype=torch.long),
        "completion_mask": torch.tensor(MASK),
        "ref_chosen_logps": reference[:B],
        "ref_rejected_logps": reference[B:],
    }
    loss = DPOTrainer._compute_loss(trainer, lambda **_: stand_in(logps), inputs, False)
    loss.backward()
    # d loss / d a sum is that of any of its tokens that counts for 1: the first.
    return float(loss), by_pair(logps.grad.numpy()[:, 0])


def assert_equal(name, trl, pairs=None, **hparams):
    """Mean loss and slopes."""
    loss, hparams = make_loss(name, **hparams)
    pairs = (pairs or given()).pairs()
    value, slopes = trl
    np.testing.assert_allclose(mean_loss(loss, pairs, hparams), value, rtol=2e-5, atol=1e-6)
    ours = np.asarray(slopes_of(loss, pairs, hparams).logps_B2)
    counted = B if loss.layout != "answers" else int((np.asarray(pairs.lengths_B2) > 0).sum())
    np.testing.assert_allclose(ours / counted, slopes, rtol=1e-3, atol=1e-6)


# ours: TRL's name, and the hyperparameters of both
OF_DPO_TRAINER = [
    ("sigmoid", "sigmoid", {"beta": 0.3}),
    ("hinge", "hinge", {"beta": 0.3}),
    ("rso_hinge_norm", "hinge", {"beta": 0.05}),
    ("ipo", "ipo", {"beta": 0.3}),
    ("exo_pair", "exo_pair", {"beta": 0.3, "label_smoothing": 0.01}),
    ("nca_pair", "nca_pair", {"beta": 0.3}),
    ("robust", "robust", {"beta": 0.3, "label_smoothing": 0.2}),
    ("bco_pair", "bco_pair", {"beta": 0.3}),
    ("sppo_hard", "sppo_hard", {"beta": 0.05}),
    ("aot", "aot", {"beta": 0.3, "label_smoothing": 0.1}),
    ("aot_unpaired", "aot_unpaired", {"beta": 0.3, "label_smoothing": 0.1}),
    ("apo_zero", "apo_zero", {"beta": 0.3}),
    ("apo_down", "apo_down", {"beta": 0.3}),
    ("discopop", "discopop", {"beta": 0.3, "discopop_tau": 0.2}),
    ("sigmoid_norm", "sigmoid_norm", {"beta": 2.0}),
    ("sft", "sft", {}),
]


@pytest.mark.parametrize("name, theirs, hparams", OF_DPO_TRAINER)
def test_a_loss_of_dpo_trainer_has_its_values_and_slopes(name, theirs, hparams):
    # TRL counts completion tokens by completion_mask, whose first place, the prompt's, is 0 here.
    assert_equal(name, trl_dpo([theirs], **hparams), **hparams)


def test_a_weighted_sum_is_trls():
    options = {"beta": 0.2}
    assert_equal(
        ["sigmoid", "bco_pair", "sft"],
        trl_dpo(["sigmoid", "bco_pair", "sft"], weights=[0.8, 0.2, 1.0], **options),
        loss_weights=[0.8, 0.2, 1.0],
        **options,
    )


def test_rpo_is_trls_sum_of_sigmoid_and_sft_and_so_is_sft_weight():
    trl = trl_dpo(["sigmoid", "sft"], weights=[1.0, 0.3], beta=0.2)
    assert_equal("rpo", trl, beta=0.2, rpo_alpha=0.3)
    assert_equal("dpo", trl, beta=0.2, sft_weight=0.3)


def test_ld_dpo_is_trls_ld_alpha():
    shared = np.minimum(LENGTHS[:B], LENGTHS[B:])
    weights_NT = np.where(np.arange(T) < np.tile(shared, 2)[:, None], 1.0, 0.4)
    assert_equal("ld_dpo", trl_dpo(["sigmoid"], ld_alpha=0.4, weights_NT=weights_NT), pairs=given(weights_NT))


@pytest.mark.parametrize("name, theirs", [("dpo", "sigmoid"), ("ipo", "ipo"), ("apo_zero", "apo_zero")])
def test_weighting_is_trls(name, theirs):
    assert_equal(name, trl_dpo([theirs], use_weighting=True), pairs=given(terms=True), use_weighting=True)


def trl_kto(loss_type, labels, beta, **weights):
    logps = torch.tensor(LOGPS, requires_grad=True)
    kl = torch.tensor([0.9, -0.2, 0.4, 0.1] * 3)
    rows = 2 * B
    trainer = types.SimpleNamespace(
        model=types.SimpleNamespace(training=True), accelerator=Accelerator(), aux_loss_enabled=False, precompute_ref_logps=True,
        calculate_KL=loss_type == "kto", _metrics=metrics(), _tp_size=1, _total_train_tokens=0, loss_type=loss_type, beta=beta,
        desirable_weight=1.0, undesirable_weight=1.0, _compute_kl_logps=lambda *_: kl,
    )  # fmt: skip
    vars(trainer).update(weights)
    batch = {
        "input_ids": torch.zeros(MASK.shape, dtype=torch.long),
        "attention_mask": torch.ones(MASK.shape, dtype=torch.long),
        "completion_mask": torch.tensor(MASK),
        "label": torch.tensor(labels),
        "ref_logps": torch.tensor(REFERENCE.sum(axis=1)),
        "ref_KL_logps": torch.zeros(rows),
    }
    loss = KTOTrainer._compute_loss(trainer, lambda **_: stand_in(logps), batch, False)
    loss.backward()
    return float(loss), logps.grad.numpy()[:, 0], kl.numpy()


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_a_loss_of_kto_trainer_has_its_values_and_slopes(loss_type):
    """Rows of one answer each, in TRL's order: a good one is a pair without a rejected answer."""
    labels = np.array([True, False, True, True, False, True, False, False, True, True, True, False])
    options = {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.8}
    value, slopes_N, kl_N = trl_kto(loss_type, labels, **options)
    side = np.stack([labels, ~labels], axis=1)
    rows = Given(
        LOGPS.sum(axis=1)[:, None] * side, LENGTHS[:, None] * side, REFERENCE.sum(axis=1)[:, None] * side,
        groups={"kl": Given(kl_N[:, None] * side, side * 3.0, np.zeros((12, 2)))},
    )  # fmt: skip
    assert_equal(loss_type, (value, slopes_N[:, None] * side), pairs=rows, **options)


def trl_cpo(loss_type, cpo_alpha=0.0, **options):
    """CPOTrainer's loss: means of log-probs for simpo, sums else, and its NLL of all chosen tokens."""
    logps = torch.tensor(LOGPS, requires_grad=True)
    sums = logps.sum(dim=1)
    per_answer = sums / torch.tensor(LENGTHS) if loss_type == "simpo" else sums
    nll = -sums[:B].sum() / LENGTHS[:B].sum()
    zeros = torch.zeros(B)
    own = {"alpha": 0.0, "label_smoothing": 0.0, "beta": 0.1} | options
    trainer = types.SimpleNamespace(
        accelerator=Accelerator(), loss_type=loss_type, aux_loss_enabled=False, cpo_alpha=cpo_alpha,
        concatenated_forward=lambda *_: (per_answer[:B], per_answer[B:], zeros, zeros, nll), **own,
    )  # fmt: skip
    trainer.cpo_loss = types.MethodType(CPOTrainer.cpo_loss, trainer)
    loss, _ = CPOTrainer.get_batch_loss_metrics(trainer, None, {})
    loss.backward()
    return float(loss), by_pair(logps.grad.numpy()[:, 0])


@pytest.mark.parametrize(
    "name, theirs, ours",
    [
        ("simpo", {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5}, {"beta": 2.0, "gamma": 0.25}),
        (
            "simpo",
            {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5, "label_smoothing": 0.1},
            {"beta": 2.0, "gamma": 0.25, "label_smoothing": 0.1},
        ),
        ("cpo", {"loss_type": "sigmoid", "cpo_alpha": 1.0}, {}),
        (
            "cpo",
            {"loss_type": "sigmoid", "cpo_alpha": 0.5, "label_smoothing": 0.2, "beta": 0.3},
            {"cpo_alpha": 0.5, "label_smoothing": 0.2, "beta": 0.3},
        ),
        (
            "cpo_simpo",
            {"loss_type": "simpo", "beta": 10.0, "simpo_gamma": 5.4, "cpo_alpha": 0.05},
            {"beta": 10.0, "gamma": 0.54, "cpo_alpha": 0.05},
        ),
        (
            "alphapo",
            {"loss_type": "simpo", "beta": 2.5, "simpo_gamma": 0.1, "alpha": 0.25},
            {"beta": 2.5, "gamma": 0.04, "alpha": 0.25},
        ),
        (
            "alphapo",
            {"loss_type": "simpo", "beta": 2.5, "simpo_gamma": 0.1, "alpha": -0.5},
            {"beta": 2.5, "gamma": 0.04, "alpha": -0.5},
        ),
    ],
)
def test_a_loss_of_cpo_trainer_has_its_values_and_slopes(name, theirs, ours):
    assert_equal(name, trl_cpo(**theirs), **ours)


def test_orpo_is_trls_given_the_nll_of_the_answers_alone():
    """TRL's own NLL is over the prompt's tokens too, and over all tokens of the batch: that term differs."""
    logps = torch.tensor(LOGPS, requires_grad=True)
    means = logps.sum(dim=1) / torch.tensor(LENGTHS)
    zeros = torch.zeros(B)
    trainer = types.SimpleNamespace(
        accelerator=Accelerator(), aux_loss_enabled=False, beta=0.3,
        concatenated_forward=lambda *_: (means[:B], means[B:], zeros, zeros, -means[:B].mean()),
    )  # fmt: skip
    trainer.odds_ratio_loss = types.MethodType(ORPOTrainer.odds_ratio_loss, trainer)
    loss, _ = ORPOTrainer.get_batch_loss_metrics(trainer, None, {})
    loss.backward()
    assert_equal("orpo", (float(loss), by_pair(logps.grad.numpy()[:, 0])), beta=0.3)


def test_every_loss_vouched_for_by_trl_is_tested_beside_it():
    beside = {name for name, _, _ in OF_DPO_TRAINER} | {"dpo", "dpo_norm"}
    beside |= {"rpo", "ld_dpo", "kto", "apo_zero_unpaired", "simpo", "cpo", "cpo_simpo", "alphapo", "orpo"}
    assert {name for name, loss in LOSSES.items() if loss.vouched == "TRL"} <= beside


def test_where_trl_differs_from_a_name_it_shares():
    """TRL's sigmoid_norm is no loss of RSO's, and its sigmoid reads no label_smoothing."""
    loss, hparams = make_loss("rso_sigmoid_norm")
    assert abs(float(mean_loss(loss, given().pairs(), hparams)) - trl_dpo(["sigmoid_norm"], beta=0.05)[0]) > 1e-3
    assert trl_dpo(["sigmoid"], label_smoothing=0.2)[0] == trl_dpo(["sigmoid"])[0]
