"""Reward models: what their head says of an answer at its last token.

Axis letters: B answers, T token slots, D width, Y labels, P pairs; 2 is (chosen, rejected).
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from repo_jax.data.rows import round_up
from repo_jax.data.schema import PairTokens
from repo_jax.logps import exact_matmuls
from repo_jax.models.decoder import Decoder
from repo_jax.preparation import Setup
from repo_jax.sharding import BATCH


def sequence_scores(model: Decoder, variables: dict, tokens_BT, lengths_B):
    """scores_BY in float32 of sequences that begin at slot 0, as transformers' *ForSequenceClassification has them."""
    slots_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    real_BT = (slots_BT < lengths_B[:, None]).astype(jnp.int32)
    with exact_matmuls(model.dtype):
        hidden_BTD = model.apply(variables, tokens_BT, slots_BT, real_BT, real_BT)
        last_BD = jnp.take_along_axis(hidden_BTD, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
        score_YD = variables["params"]["score_YD"].astype(last_BD.dtype)
        return jnp.einsum("BD,YD->BY", last_BD, score_YD, preferred_element_type=jnp.float32)


def pair_rewards(setup: Setup, variables: dict, pairs: Sequence[PairTokens]) -> np.ndarray:
    """rewards_P2: the one score of both answers of every pair, each after its prompt."""
    ids = [np.concatenate([pair.prompt, branch]) for pair in pairs for branch in pair.branches]
    T, B = round_up(max(map(len, ids)), 128), setup.shapes[0].R
    score = jax.jit(functools.partial(sequence_scores, setup.model), out_shardings=NamedSharding(setup.mesh, P()))
    spread, rewards = NamedSharding(setup.mesh, BATCH), []
    for start in tqdm(range(0, len(ids), B), desc="scoring", unit=f" x {B} answers", disable=None, leave=False):
        group = ids[start : start + B]
        tokens_BT, lengths_B = np.zeros((B, T), np.int32), np.ones(B, np.int32)
        for i, one in enumerate(group):
            tokens_BT[i, : len(one)], lengths_B[i] = one, len(one)
        with jax.set_mesh(setup.mesh):
            scores_BY = score(variables, jax.device_put(tokens_BT, spread), jax.device_put(lengths_B, spread))
        rewards.append(jax.device_get(scores_BY)[: len(group), 0])
    return np.concatenate(rewards).reshape(-1, 2)


def evaluate_rewards(setup: Setup) -> dict[str, float]:
    """How a reward model ranks the held-out pairs, under the names of preference_metrics."""
    variables = {"params": setup.pretrained.params(setup.mesh, setup.recipe.model.param_dtype)}
    pairs = [setup.held_out[i] for i in range(len(setup.held_out))]
    chosen_P, rejected_P = pair_rewards(setup, variables, pairs).astype(np.float64).T
    return {
        "rewards/chosen": float(chosen_P.mean()),
        "rewards/rejected": float(rejected_P.mean()),
        "rewards/margins": float((chosen_P - rejected_P).mean()),
        "rewards/accuracies": float((chosen_P > rejected_P).mean()),
        "pairs": len(pairs),
    }
