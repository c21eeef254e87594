"""Sampling: prompts in, new tokens out, the same for a row whatever stands beside it and whatever mesh it runs on.

Axis letters: B prompts, T slots of the longest prompt, S slots of the cache, M new tokens, D width, V vocabulary, C slots at a time,
L layers, K key/value heads, H head size.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from repo_jax.logps import exact_matmuls
from repo_jax.models.decoder import Cache, Decoder, empty_cache, next_token_logits, output_head
from repo_jax.sharding import BATCH, batch_ways, constrain

CHUNK = 512  # slots of a prompt that go through the model at a time: their attention holds [B, heads, CHUNK, S] numbers


class Sampling(NamedTuple):
    """How tokens are chosen, in transformers' meaning and order: temperature, then top_k, then top_p."""

    max_new_tokens: int
    temperature: float = 0.0  # 0: always the likeliest token
    top_k: int = 0  # only so many of the likeliest tokens; 0: all
    top_p: float = 1.0  # only the fewest likeliest tokens that have this probability together; 1: all
    eos_ids: tuple[int, ...] = ()  # a row ends behind any of these


def warp(logits_BV, sampling: Sampling):
    """The logits to draw from: divided by the temperature, -inf where a token is out of the question."""
    logits_BV = logits_BV / sampling.temperature
    V = logits_BV.shape[-1]
    if 0 < sampling.top_k < V:
        least_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)  # equals of the last one stay
    if sampling.top_p < 1:
        # From the unlikeliest on, as transformers adds: tokens go while all up to them have at most 1 - top_p together.
        order_BV = jnp.argsort(logits_BV, axis=-1, stable=True)
        probs_BV = jax.nn.softmax(jnp.take_along_axis(logits_BV, order_BV, axis=-1), axis=-1)
        gone_B1 = jnp.sum(jnp.cumsum(probs_BV, axis=-1) <= 1 - sampling.top_p, axis=-1, keepdims=True)
        last_B1 = jnp.take_along_axis(order_BV, jnp.minimum(gone_B1, V - 1), axis=-1)  # the unlikeliest that stays
        least_B1 = jnp.take_along_axis(logits_BV, last_B1, axis=-1)
        stays_BV = (logits_BV > least_B1) | ((logits_BV == least_B1) & (jnp.arange(V)[None] >= last_B1))
        logits_BV = jnp.where(stays_BV, logits_BV, -jnp.inf)
    return logits_BV


def choose(logits_BV, keys_B, sampling: Sampling):
    """The next token of each row; a row's key decides it alone."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    # Rows whole on their devices: top_k and the sort of top_p look at all of V.
    logits_BV = warp(constrain(logits_BV, BATCH), sampling)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


class State(NamedTuple):
    """A batch between two tokens."""

    t: jax.Array  # new tokens so far
    last_B: jax.Array  # the newest of them
    goes_on_B: jax.Array  # bool
    tokens_BM: jax.Array
    counts_B: jax.Array  # how many of tokens_BM a row has
    cache: Cache


def generate_tokens(variables, tokens_BT, positions_BT, limits_B, rows_B, seed, *, model: Decoder, sampling: Sampling):
    """tokens_BM and counts_B: the tokens that follow each row of tokens_BT, and how many there are, at most limits_B.

    Rows are padded on the left (position -1). Token t of a row is drawn with a key made of seed, row and t.
    """
    (B, T), M, cfg = tokens_BT.shape, sampling.max_new_tokens, model.cfg
    lengths_B = positions_BT[:, -1] + 1
    # Named, whatever jax is configured to: what rbg draws for a row depends on the rows beside it.
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed, impl="threefry2x32"), rows_B)

    def forward(tokens_BT, positions_BT, cache):
        hidden_BTD, cache = model.apply(variables, tokens_BT, positions_BT, cache=_spread(cache))
        return hidden_BTD[:, -1], _spread(cache)

    def read_prompts(cache):
        C = T if T <= CHUNK else math.gcd(T, CHUNK)
        tokens, positions = (jnp.moveaxis(x_BT.reshape(B, T // C, C), 1, 0) for x_BT in (tokens_BT, positions_BT))

        def chunk(carry, inputs):
            return forward(*inputs, carry[1]), None

        nothing_BD = jnp.zeros((B, cfg.D), model.dtype)
        return jax.lax.scan(chunk, (nothing_BD, cache), (tokens, positions))[0]

    def add(t, hidden_BD, goes_on_B, tokens_BM, counts_B, cache) -> State:
        logits_BV = next_token_logits(cfg, hidden_BD, output_head(variables["params"]))
        token_B = choose(logits_BV, jax.vmap(jax.random.fold_in, (0, None))(keys_B, t), sampling)
        tokens_BM = tokens_BM.at[:, t].set(jnp.where(goes_on_B, token_B, 0))
        counts_B = counts_B + goes_on_B
        ended_B = functools.reduce(jnp.logical_or, [token_B == eos for eos in sampling.eos_ids], counts_B >= limits_B)
        return State(t + 1, token_B, goes_on_B & ~ended_B, tokens_BM, counts_B, cache)

    def step(s: State) -> State:
        positions_B = lengths_B + s.t - 1
        hidden_BD, cache = forward(s.last_B[:, None], positions_B[:, None], s.cache)
        return add(s.t, hidden_BD, s.goes_on_B, s.tokens_BM, s.counts_B, cache)

    with exact_matmuls(model.dtype):
        # The last token is never fed back, so that it needs no slot.
        hidden_BD, cache = read_prompts(empty_cache(cfg, B, T + M - 1, model.dtype))
        nothing = jnp.zeros((B, M), jnp.int32), jnp.zeros(B, jnp.int32)
        state = add(jnp.int32(0), hidden_BD, limits_B > 0, *nothing, cache)
        state = jax.lax.while_loop(lambda s: s.goes_on_B.any(), step, state)
    return state.tokens_BM, state.counts_B


def _spread(cache: Cache) -> Cache:
    """Rows over data and fsdp, key/value heads over tensor where it divides them, as their weights are."""
    mesh = jax.sharding.get_abstract_mesh()

    def place(x_LBSKH):
        split = not mesh.empty and x_LBSKH.shape[3] % mesh.shape["tensor"] == 0
        return constrain(x_LBSKH, P(None, *BATCH, None, "tensor" if split else None))

    keys, values = jax.tree.map(place, (cache.keys, cache.values))
    return cache._replace(keys=keys, values=values, positions_BS=constrain(cache.positions_BS, BATCH))


def slots(length: int) -> int:
    """The slots for prompts of up to this length: one of 32, 64, 96, 128, 192, 256, 384 ..., so that few programs are compiled."""
    step = max(32, 1 << max((length - 1).bit_length() - 2, 0))
    return -(-length // step) * step


class Generator:
    """Continues prompts with one model on one mesh. A program is compiled for each size of batch and of `slots`."""

    def __init__(self, model: Decoder, mesh: Mesh, sampling: Sampling, *, batch_size: int = 1):
        """Batches are filled up to a multiple of batch_size, and of the devices that share them."""
        self.mesh, self.sampling, self._positions = mesh, sampling, model.cfg.max_positions
        self._multiple = math.lcm(batch_size, batch_ways(mesh))
        self._generate = jax.jit(
            functools.partial(generate_tokens, model=model, sampling=sampling), out_shardings=NamedSharding(mesh, P())
        )

    def __call__(
        self, variables: dict, prompts: Sequence[np.ndarray], rows: Sequence[int], seed: int
    ) -> list[np.ndarray]:
        """The tokens that follow each prompt, an end token included, int32 each.

        They depend on the prompt, its number in `rows` and the seed alone, and end at the last of the model's positions.
        `variables` holds the collections that the model has, "params" and perhaps "lora".
        """
        B = -(-len(prompts) // self._multiple) * self._multiple
        T = slots(max(map(len, prompts)))
        tokens_BT, positions_BT = np.zeros((B, T), np.int32), np.full((B, T), -1, np.int32)
        limits_B, rows_B = np.zeros(B, np.int32), np.zeros(B, np.int32)
        for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            if not 0 < len(prompt) < self._positions:
                raise ValueError(
                    f"prompt {row} has {len(prompt)} tokens; wanted 1 to {self._positions - 1}, for the model has {self._positions} positions"
                )
            tokens_BT[i, T - len(prompt) :] = prompt
            positions_BT[i, T - len(prompt) :] = np.arange(len(prompt))
            limits_B[i], rows_B[i] = self._positions - len(prompt), row
        limits_B = np.minimum(limits_B, self.sampling.max_new_tokens)
        spread = NamedSharding(self.mesh, BATCH)
        placed = [
            jax.make_array_from_callback(array.shape, spread, lambda index, array=array: array[index])
            for array in (tokens_BT, positions_BT, limits_B, rows_B)
        ]
        with jax.set_mesh(self.mesh):
            tokens_BM, counts_B = jax.device_get(self._generate(variables, *placed, np.uint32(seed)))
        return [tokens_BM[i, : counts_B[i]] for i in range(len(prompts))]
