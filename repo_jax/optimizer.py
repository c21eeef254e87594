"""AdamW with the schedules that preference recipes use, as optax chains."""

import math

import jax
import optax

from repo_jax.config import OptimSection


def learning_rate(optim: OptimSection, total_steps: int) -> optax.Schedule:
    """The learning rate of update k (from 0): Hugging Face's schedules, so that update 0 of a warm-up has rate 0."""
    peak, warmup = optim.learning_rate, math.ceil(total_steps * optim.warmup_ratio)
    after = max(total_steps - warmup, 1)
    decay = {
        "cosine": optax.cosine_decay_schedule(peak, after),
        "linear": optax.linear_schedule(peak, 0.0, after),
        "constant": optax.constant_schedule(peak),
    }[optim.lr_scheduler_type]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup]) if warmup else decay


def decayed(params: dict) -> dict:
    """True for the parameters that weight decay touches: all with more than one axis, so not the norms."""

    def is_matrix(path, _):
        return len(path[-1].key.rsplit("_", 1)[-1]) > 1

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def make_optimizer(optim: OptimSection, total_steps: int) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW; moments are float32 like the parameters."""
    adamw = optax.adamw(
        learning_rate(optim, total_steps),
        b1=optim.adam_beta1,
        b2=optim.adam_beta2,
        eps=optim.adam_epsilon,
        weight_decay=optim.weight_decay,
        mask=decayed,
    )
    if optim.max_grad_norm is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(optim.max_grad_norm), adamw)
