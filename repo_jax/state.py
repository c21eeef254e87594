"""What an update changes, and where it lives."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from repo_jax.sharding import param_shardings


class TrainState(NamedTuple):
    step: jax.Array  # updates done, int32
    params: dict  # what is trained: the model's parameters, or adapters alone
    opt_state: optax.OptState


def variables_of(params: dict, frozen: dict | None) -> dict:
    """What the decoder is applied to: the parameters that are trained, or frozen ones under the adapters that are."""
    return {"params": params} if frozen is None else {"params": frozen, "lora": params}


def state_shapes(params: dict, optimizer: optax.GradientTransformation) -> TrainState:
    """The state for parameters of these shapes as ShapeDtypeStructs; nothing is allocated."""
    return TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(optimizer.init, params))


def state_shardings(shapes: TrainState, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Moments lie where their parameters lie; counters, and moments that are factored, are on every device."""
    everywhere = NamedSharding(mesh, P())
    params = param_shardings(shapes.params, mesh)
    opt_state = optax.tree.map_params(
        optimizer,
        lambda leaf, param, sharding: sharding if leaf.shape == param.shape else everywhere,
        *(shapes.opt_state, shapes.params, params),
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(everywhere, params, opt_state)


def initial_state(params: dict, optimizer: optax.GradientTransformation, shardings: TrainState) -> TrainState:
    """The state before update 0."""
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    return TrainState(jax.device_put(jnp.zeros((), jnp.int32), shardings.step), params, opt_state)
