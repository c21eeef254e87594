"""What an update changes, and where it lives."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from repo_jax.models.config import DecoderConfig
from repo_jax.models.decoder import param_shapes
from repo_jax.sharding import param_shardings


class TrainState(NamedTuple):
    step: jax.Array  # updates done, int32
    params: dict  # float32
    opt_state: optax.OptState


def state_shapes(cfg: DecoderConfig, optimizer: optax.GradientTransformation) -> TrainState:
    """The state as ShapeDtypeStructs; nothing is allocated."""
    params = param_shapes(cfg)
    return TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(optimizer.init, params))


def state_shardings(shapes: TrainState, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Moments lie where their parameters lie; counters are on every device."""
    everywhere = NamedSharding(mesh, P())
    params = param_shardings(shapes.params, mesh)
    opt_state = optax.tree.map_params(
        optimizer, lambda _, sharding: sharding, shapes.opt_state, params, transform_non_params=lambda _: everywhere
    )
    return TrainState(everywhere, params, opt_state)


def initial_state(params: dict, optimizer: optax.GradientTransformation, shardings: TrainState) -> TrainState:
    """The state before update 0."""
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    return TrainState(jax.device_put(jnp.zeros((), jnp.int32), shardings.step), params, opt_state)
