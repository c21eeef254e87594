"""Five SimPO updates here and in TRL 1.16: same ids, same losses, same weights. Skipped where TRL is not installed."""

import json
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from examples import ASSETS, STORIES, one_device, tokenize, tokens

from repo_jax.config import OptimSection
from repo_jax.data.chat import load_tokenizer
from repo_jax.data.rows import RowShape, row_batches, suggest_row_length
from repo_jax.data.schema import PairTokens, PreferenceExample
from repo_jax.losses import make_loss
from repo_jax.models.config import DecoderConfig
from repo_jax.models.decoder import Decoder, param_shapes
from repo_jax.models.hf import from_hf, hf_tensors
from repo_jax.optimizer import make_optimizer
from repo_jax.state import initial_state, state_shapes, state_shardings
from repo_jax.step import Scorer, TrainStep

NEEDED = "is not installed; requirements-test.txt names it, for Python 3.11"
torch = pytest.importorskip("torch", reason=f"torch {NEEDED}")
pytest.importorskip("trl", reason=f"trl {NEEDED}")

from datasets import Dataset  # noqa: E402 - comes with trl
from trl.experimental.cpo import CPOConfig, CPOTrainer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")  # TRL sets it

UPDATES, PAIRS = 5, 4  # pairs of one update
BETA, GAMMA = 2.0, 0.25
ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "weight_decay": 0.0}
OPTIM = ADAM | {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "max_grad_norm": 1.0}  # names that both use


class Trained(NamedTuple):
    """What TRL made of the model."""

    pairs: list[PairTokens]  # in the order of its updates
    logs: list[dict]  # one per update
    before: dict[str, np.ndarray]
    after: dict[str, np.ndarray]


def short_texts() -> list[PreferenceExample]:
    """Single-turn pairs as texts, too short for TRL to cut. The prompt ends in a space, which some answers merge into their first token."""
    found = []
    for line in (ASSETS / "preferences" / "train.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt, chosen, rejected = (row[column][0]["content"] for column in ("prompt", "chosen", "rejected"))
        if len(row["prompt"]) == 1 and len((prompt + chosen + rejected).encode()) < 400:
            found.append(PreferenceExample(row["id"], row["id"], f"{prompt} ", chosen, rejected))
    return found


def from_trl(row: dict) -> PairTokens:
    """A row of TRL's tokenized data as our pair; label -100 marks what is not scored."""
    prompt, branches, masks = row["prompt_input_ids"], [], []
    for side in ("chosen", "rejected"):
        ids, labels = row[f"{side}_input_ids"], row[f"{side}_labels"]
        assert ids[: len(prompt)] == prompt
        assert all(label in (-100, token) for label, token in zip(labels, ids, strict=True))
        branches.append(ids[len(prompt) :])
        masks.append([label != -100 for label in labels[len(prompt) :]])
    return tokens(prompt, *branches, masks, name=row["id"], where=row["where"])


@pytest.fixture(scope="module")
def trl(tmp_path_factory) -> Trained:
    options = CPOConfig(
        loss_type="simpo",
        cpo_alpha=0.0,
        beta=BETA,
        simpo_gamma=BETA * GAMMA,  # TRL divides its gamma by beta; ours is in nats per token
        max_steps=UPDATES,
        per_device_train_batch_size=PAIRS,
        train_sampling_strategy="sequential",
        **OPTIM,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        output_dir=str(tmp_path_factory.mktemp("trl")),
    )
    tokenizer = load_tokenizer(STORIES)
    tokenizer.pad_token = tokenizer.eos_token  # TRL wants one; no loss looks at it
    model = transformers.AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    columns = ("id", "where", "prompt", "chosen", "rejected")
    rows = Dataset.from_list([{name: getattr(example, name) for name in columns} for example in short_texts()])
    trainer = CPOTrainer(model, options, train_dataset=rows, processing_class=tokenizer)

    def weights():
        return {name: p.detach().numpy().copy() for name, p in trainer.model.named_parameters()}

    before = weights()
    trainer.train()
    logs = [line for line in trainer.state.log_history if "loss" in line]
    return Trained([from_trl(row) for row in trainer.train_dataset], logs, before, weights())


@pytest.fixture(scope="module", params=["direct", "two_pass"])
def ours(request, trl) -> tuple[list[dict], dict[str, np.ndarray]]:
    """The metrics of every update and the weights after the last, from the very ids that TRL trained on."""
    cfg, mesh = DecoderConfig.from_hf(STORIES), one_device()
    loss, hparams = make_loss("simpo", beta=BETA, gamma=GAMMA)
    model, optimizer = Decoder(cfg, jnp.float32), make_optimizer(OptimSection(**OPTIM, warmup_ratio=0.0), UPDATES)
    shardings = state_shardings(state_shapes(param_shapes(cfg), optimizer), optimizer, mesh)
    pairs = trl.pairs[: UPDATES * PAIRS]
    T = suggest_row_length(np.array([pair.slots for pair in pairs]))
    scorer = Scorer(model, loss, hparams, mesh, RowShape(R=1, T=T, S=T))
    step = TrainStep(scorer, model, loss, optimizer, shardings, mode=request.param)
    state, logs = initial_state(from_hf(STORIES, cfg, shardings.params), optimizer, shardings), []
    for start in range(0, len(pairs), PAIRS):
        batch = pairs[start : start + PAIRS]
        assert 1 < len(row_batches(batch, scorer.shapes)) < PAIRS  # pairs share rows, and gradients add up over rows
        state, metrics = step(state, batch)
        logs.append({name: float(value) for name, value in metrics.items()})
    return logs, dict(hf_tensors(state.params, cfg, dtypes="float32"))


def test_a_pair_has_the_ids_and_the_scored_tokens_that_trl_gives_it(trl):
    tokenizer = load_tokenizer(STORIES)
    for example, pair in zip(short_texts(), trl.pairs, strict=True):
        for one, other in zip(tokenize(tokenizer, example).pair, pair, strict=True):
            np.testing.assert_array_equal(one, other, err_msg=example.id)
    # Among them are answers that split the prompt's end.
    assert any(not mask.all() for pair in trl.pairs[: UPDATES * PAIRS] for mask in pair.masks)


def test_simpo_has_the_losses_and_metrics_of_trl_at_every_update(trl, ours):
    logs, _ = ours
    assert len(logs) == len(trl.logs) == UPDATES
    rewards = [f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")]

    def assert_close(name, **tolerance):
        values, trls = ([line[name] for line in lines] for lines in (logs, trl.logs))
        np.testing.assert_allclose(values, trls, **tolerance, err_msg=name)

    for name in ["loss", "logps/chosen", "logps/rejected", *rewards]:
        assert_close(name, rtol=0, atol=1e-4)
    assert_close("grad_norm", rtol=1e-4)


def test_simpo_ends_at_the_weights_of_trl(trl, ours):
    _, after = ours
    assert after.keys() == trl.after.keys()

    def distance(one, other):
        return np.linalg.norm([np.linalg.norm(one[name] - other[name]) for name in one])

    assert distance(after, trl.after) <= 0.01 * distance(trl.before, trl.after)
