"""What an update changes, and where it lives."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from repo_jax.losses import Loss
from repo_jax.sharding import param_shardings


class TrainState(NamedTuple):
    step: jax.Array  # updates done, int32
    params: dict  # what is trained: the model's parameters, or adapters alone
    opt_state: optax.OptState
    active_2: jax.Array  # the running share of scored tokens that had a gradient: one update ago, and now
    loss_state: Any = ()  # the loss's running state, () where it has none; evaluation leaves it as it is


def variables_of(params: dict, frozen: dict | None, live: dict | None = None) -> dict:
    """What the decoder is applied to: the parameters that are trained, or frozen ones under the adapters that are; beside them `live`,
    the variables of a reference model that runs along."""
    variables = {"params": params} if frozen is None else {"params": frozen, "lora": params}
    return variables if live is None else variables | {"reference": live}


def initial_loss_state(loss: Loss | None) -> Any:
    """The loss's running state before update 0."""
    return () if loss is None or loss.initial_state is None else jax.tree.map(jnp.asarray, loss.initial_state())


def state_shapes(params: dict, optimizer: optax.GradientTransformation, loss: Loss | None = None) -> TrainState:
    """The state for parameters of these shapes as ShapeDtypeStructs; nothing is allocated."""
    opt_state = jax.eval_shape(optimizer.init, params)
    loss_state = jax.eval_shape(lambda: initial_loss_state(loss))
    step, active_2 = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.float32)
    return TrainState(step, params, opt_state, active_2, loss_state)


def state_shardings(shapes: TrainState, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Moments lie where their parameters lie; counters, moments that are factored, and the loss's state are on every device."""
    everywhere = NamedSharding(mesh, P())
    params = param_shardings(shapes.params, mesh)
    opt_state = optax.tree.map_params(
        optimizer,
        lambda leaf, param, sharding: sharding if leaf.shape == param.shape else everywhere,
        *(shapes.opt_state, shapes.params, params),
        transform_non_params=lambda _: everywhere,
    )
    loss_state = jax.tree.map(lambda _: everywhere, shapes.loss_state)
    return TrainState(everywhere, params, opt_state, everywhere, loss_state)


def initial_state(
    params: dict, optimizer: optax.GradientTransformation, shardings: TrainState, loss: Loss | None = None
) -> TrainState:
    """The state before update 0."""
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    step = jax.device_put(jnp.zeros((), jnp.int32), shardings.step)
    active_2 = jax.device_put(jnp.ones(2, jnp.float32), shardings.active_2)
    loss_state = jax.device_put(initial_loss_state(loss), shardings.loss_state)
    return TrainState(step, params, opt_state, active_2, loss_state)
