"""The decoder: token ids to hidden states, in packed rows or with a cache of keys and values. The output head belongs to logps.py.

Axis letters: B sequences (packed rows), T token slots, S keys, D width, F MLP width, N query heads, K key/value heads,
H head size, h = H // 2, V vocabulary, L layers, Y labels, r rank of an adapter.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from repo_jax.models.attention import (
    DENSE,
    RESIDUALS,
    Places,
    attend,
    rotate,
    rotations,
    soften,
    visible_cached,
)
from repo_jax.models.blocked import BLOCKED
from repo_jax.models.config import DecoderConfig
from repo_jax.models.flash import FLASH
from repo_jax.models.splash import SPLASH
from repo_jax.models.triton import TRITON
from repo_jax.sharding import BATCH, constrain

INIT = nn.initializers.normal(0.02)
ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}

ATTENTION = {
    # name      kernel      for
    "dense":    DENSE,      # anywhere: the plain form
    "blocked":  BLOCKED,    # one CPU device
    "splash":   SPLASH,     # TPU; needs the views of rows
    "triton":   TRITON,     # NVIDIA GPU; needs the views of rows
    "flash":    FLASH,      # any GPU, in plain jax; needs the views of rows
}  # fmt: skip
IN_VIEWS = ("splash", "triton", "flash")

INPUT = "layer_input"

# What the backward pass finds stored; the rest it computes again.
REMAT = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # the results of weight matmuls
    "attention": jax.checkpoint_policies.save_only_these_names(
        RESIDUALS
    ),  # each layer's input and its attention's output
    "full": jax.checkpoint_policies.nothing_saveable,  # each layer's input alone
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(  # each layer's input, in the host's memory
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


Kept = dict[
    str, jax.Array
]  # stack -> [L, B, T, D], what each of its layers was given; OUTPUT -> [1, B, T, D], what the last one made
OUTPUT = "output"
KEPT_LAYERS = "kept_layers"  # the loop over them, in a program's text


class Context(NamedTuple):
    """What a kind of layer (plain, or of one window) sees of where the tokens stand; the same for all layers of the kind."""

    cos_BT1h: jax.Array
    sin_BT1h: jax.Array
    sight: Any  # what the kernel of attention needs; with a cache, the mask


class Cache(NamedTuple):
    """Keys and values of the tokens so far, for every layer."""

    keys: dict[str, jax.Array]  # stack -> [L, B, S, K, H]
    values: dict[str, jax.Array]
    positions_BS: jax.Array  # -1 where there is no token
    length: jax.Array  # slots filled so far, int32


def rms_norm(x, scale, *, eps: float, unit_offset: bool = False):
    """Root-mean-square norm (arXiv:1910.07467) over the axes of scale, the last of x; the mean runs in float32."""
    x32 = x.astype(jnp.float32)
    axes = tuple(range(-scale.ndim, 0))
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=axes, keepdims=True) + eps)
    scale = jnp.expand_dims(scale.astype(jnp.float32), tuple(range(x.ndim - scale.ndim)))
    return (normed * (1 + scale if unit_offset else scale)).astype(x.dtype)


@jax.custom_vjp
def look_up(table_VD, tokens_BT):
    """Rows of the table. Its gradient, a sum over all tokens, is added up in float32 whatever the table's dtype."""
    # Gathering the table's D shards first keeps XLA from replicating the activations after the look-up.
    return constrain(table_VD, P("tensor", None))[tokens_BT]


def _look_up_fwd(table_VD, tokens_BT):
    return look_up(table_VD, tokens_BT), (table_VD, tokens_BT)


def _look_up_bwd(residuals, g_BTD):
    table_VD, tokens_BT = residuals
    zeros_VD = constrain(jnp.zeros(table_VD.shape, jnp.float32), P("tensor", None))
    return zeros_VD.at[tokens_BT].add(g_BTD.astype(jnp.float32)).astype(table_VD.dtype), None


look_up.defvjp(_look_up_fwd, _look_up_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def multiply(axes: tuple[str, str], x, weight):
    """x times a weight over the inputs among its axes (inputs, outputs)."""
    return _multiply_fwd(axes, x, weight)[0]


def _multiply_fwd(axes, x, weight):
    # The product itself, not multiply: remat policies look into this function alone.
    inputs, outputs = axes
    return jnp.einsum(f"BT{inputs},{inputs}{outputs}->BT{outputs}", x, weight), (x, weight)


def _multiply_bwd(axes, residuals, g):
    # Autodiff's own weight gradient has g on the left; XLA then writes a transposed copy of it, the larger of the two, which
    # cost a CPU 40 % of the dense layers' time (benchmarks/README.md).
    inputs, outputs = axes
    x, weight = residuals
    dx = jnp.einsum(f"BT{outputs},{inputs}{outputs}->BT{inputs}", g, weight)
    return dx, jnp.einsum(f"BT{inputs},BT{outputs}->{inputs}{outputs}", x, g)


multiply.defvjp(_multiply_fwd, _multiply_bwd)


class Block(nn.Module):
    """What the parts of a layer share: parameters whose names end in their axes, each a field of the configuration."""

    cfg: DecoderConfig
    lora_scale: float = 1.0
    lora_dropout: float = 0.0

    def weight(self, name: str, init=INIT):
        return self.param(name, init, tuple(getattr(self.cfg, axis) for axis in name.rsplit("_", 1)[-1]))

    def project(self, x, name: str):
        """x times the weight of that name over the axes they share, plus its low-rank delta if it has one (arXiv:2106.09685)."""
        axes = name.rsplit("_", 1)[-1]
        inputs, outputs = axes[: x.ndim - 2], axes[x.ndim - 2 :]
        out = multiply((inputs, outputs), x, self.weight(name).astype(x.dtype))
        if not self.has_variable("lora", name):
            return out
        delta = self.get_variable("lora", name)
        a, b = delta[f"a_{inputs}r"].astype(x.dtype), delta[f"b_r{outputs}"].astype(x.dtype)
        if self.lora_dropout and self.has_rng("dropout"):
            kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.lora_dropout, x.shape)
            x = jnp.where(kept, x / (1 - self.lora_dropout), 0)
        low_BTr = self.lora_scale * jnp.einsum(f"BT{inputs},{inputs}r->BTr", x, a)
        return out + jnp.einsum(f"BTr,r{outputs}->BT{outputs}", low_BTr, b)

    def norm(self, x, name: str):
        c = self.cfg
        scale = self.weight(name, nn.initializers.zeros if c.unit_offset_norm else nn.initializers.ones)
        return rms_norm(x, scale, eps=c.norm_eps, unit_offset=c.unit_offset_norm)

    def bias(self, x, name: str):
        scale = self.weight(name, nn.initializers.zeros).astype(x.dtype)
        return x + jnp.expand_dims(scale, (0, 1))


class Attention(Block):
    kernel: str = "dense"  # a key of ATTENTION

    @nn.compact
    def __call__(self, x_BTD, context: Context, cached=None, window: int | None = None):
        """The output, and where `cached` = (k_BSKH, v_BSKH, slots filled) is given also the longer keys and values."""
        c = self.cfg
        q_BTNH, k_BTKH, v_BTKH = (self.project(x_BTD, name) for name in ("q_DNH", "k_DKH", "v_DKH"))
        if c.qkv_bias:
            q_BTNH, k_BTKH = self.bias(q_BTNH, "q_bias_NH"), self.bias(k_BTKH, "k_bias_KH")
            v_BTKH = self.bias(v_BTKH, "v_bias_KH")
        if c.qk_norm == "head":
            q_BTNH, k_BTKH = self.norm(q_BTNH, "q_norm_H"), self.norm(k_BTKH, "k_norm_H")
        elif c.qk_norm == "whole":
            q_BTNH, k_BTKH = self.norm(q_BTNH, "q_norm_NH"), self.norm(k_BTKH, "k_norm_KH")
        q_BTNH, k_BSKH = (rotate(x, context.cos_BT1h, context.sin_BT1h) for x in (q_BTNH, k_BTKH))
        v_BSKH = v_BTKH
        if cached is not None:
            *stored, filled = cached
            k_BSKH, v_BSKH = (
                jax.lax.dynamic_update_slice(old, new.astype(old.dtype), (0, filled, 0, 0))
                for old, new in zip(stored, (k_BSKH, v_BSKH), strict=True)
            )
        scale = c.H**-0.5 if c.query_scale is None else c.query_scale
        kernel = attend if cached is not None else functools.partial(ATTENTION[self.kernel].attend, window=window)
        out_BTNH = kernel(q_BTNH, k_BSKH, v_BSKH, context.sight, scale=scale, cap=c.attn_softcap)
        out_BTD = self.project(out_BTNH, "o_NHD")
        if c.o_bias:
            out_BTD = self.bias(out_BTD, "o_bias_D")
        return out_BTD if cached is None else (out_BTD, (k_BSKH, v_BSKH))


class MLP(Block):
    @nn.compact
    def __call__(self, x_BTD):
        hidden_BTF = ACTIVATIONS[self.cfg.activation](self.project(x_BTD, "gate_DF")) * self.project(x_BTD, "up_DF")
        return self.project(hidden_BTF, "down_FD")


class Layer(Block):
    kernel: str = "dense"

    @nn.compact
    def __call__(self, x_BTD, context: Context, cached=None, window: int | None = None):
        c, adapters = self.cfg, (self.lora_scale, self.lora_dropout)
        kept = None
        normed_BTD = self.norm(x_BTD, "attn_norm_D") if c.pre_norms else x_BTD
        out_BTD = Attention(c, *adapters, kernel=self.kernel, name="attn")(normed_BTD, context, cached, window)
        if cached is not None:
            out_BTD, kept = out_BTD
        out_BTD = self.norm(out_BTD, "attn_post_norm_D") if c.post_norms else out_BTD
        x_BTD = constrain(x_BTD + out_BTD, BATCH)
        normed_BTD = self.norm(x_BTD, "mlp_norm_D") if c.pre_norms else x_BTD
        out_BTD = MLP(c, *adapters, name="mlp")(normed_BTD)
        out_BTD = self.norm(out_BTD, "mlp_post_norm_D") if c.post_norms else out_BTD
        return constrain(x_BTD + out_BTD, BATCH), kept


class Decoder(nn.Module):
    """Token ids in, hidden states out; dtype is what it computes in, whatever the parameters are stored in.

    Low-rank adapters, where there are any, are a second collection of variables, "lora" (lora.py); their inputs are dropped out
    where apply is given rngs={"dropout": key}.
    """

    cfg: DecoderConfig
    dtype: jnp.dtype
    remat: str = "full"  # a key of REMAT
    attention: str = "dense"  # a key of ATTENTION
    lora_scale: float = 1.0  # alpha / r
    lora_dropout: float = 0.0
    head_chunks: tuple[int, int] = (1024, 1024)  # logps.Softmax has them

    @nn.compact
    def __call__(
        self,
        tokens_BT,
        positions_BT,
        segments_BT=None,
        prompts_BT=None,
        views_B2Y=None,
        *,
        cache: Cache | None = None,
        keep: bool = False,
        kept: Kept | None = None,
    ):
        """hidden_BTD of packed rows (the views are for the kernels that need them).

        With a cache, of tokens that continue its sequences (position -1: no token), and the cache that holds them too. With `keep`, also
        what each layer was given. With that as `kept`, laid out as these rows are, nothing is computed: hidden_BTD is as it was then,
        and the backward pass begins each layer from what it was given.
        """
        c = self.cfg
        embed_VD = self.param("embed_VD", INIT, (c.padded_V, c.D))
        if c.labels:
            self.param("score_YD", INIT, (c.labels, c.D))  # declared here, used by logps.py, like the head
        elif not c.tie_embeddings:
            self.param("head_VD", INIT, (c.padded_V, c.D))
        x_BTD = constrain(look_up(embed_VD, tokens_BT).astype(self.dtype), BATCH)
        if c.scale_embeddings:
            x_BTD = x_BTD * jnp.asarray(c.D**0.5, self.dtype)
        if cache is None:
            places = Places(positions_BT, segments_BT, prompts_BT, views_B2Y)
            see = functools.partial(ATTENTION[self.attention].sight, places)
        else:
            seen_BS = jax.lax.dynamic_update_slice(cache.positions_BS, positions_BT, (0, cache.length))
            see = functools.partial(visible_cached, positions_BT, seen_BS)
        spread = functools.partial(constrain, spec=BATCH)
        contexts = {}
        for window in dict.fromkeys(c.windows):
            rope = c.local_rope if window is not None and c.local_rope is not None else c.rope
            contexts[window] = Context(*rotations(positions_BT, rope, c.H), jax.tree.map(spread, see(window)))
        keys, values, inputs = {}, {}, {}
        for stack, length in c.stacks.items():
            params = self.param(stack, functools.partial(_init_stack, c, length))
            variables = {"params": params} | (
                {"lora": self.get_variable("lora", stack)} if self.has_variable("lora", stack) else {}
            )
            cached = None if cache is None else (cache.keys[stack], cache.values[stack])
            if kept is not None:
                out_BTD = _given_next(c, stack, kept)
                windows = c.windows[:length]
                seen = tuple(contexts[window] for window in windows)
                x_BTD = _from_kept(self._layer(), windows, x_BTD, variables, seen, kept[stack], out_BTD)
                continue
            run = x_BTD, variables, length, contexts, cached, cache and cache.length
            x_BTD, new, inputs[stack] = self._run(*run, keep=keep)
            if cache is not None:
                keys[stack], values[stack] = new
        inputs[OUTPUT] = x_BTD[None]
        scale_D = self.param("final_norm_D", nn.initializers.ones, (c.D,))
        x_BTD = rms_norm(x_BTD, scale_D, eps=c.norm_eps, unit_offset=c.unit_offset_norm)
        if cache is None:
            return (x_BTD, inputs) if keep else x_BTD
        return x_BTD, Cache(keys, values, seen_BS, cache.length + tokens_BT.shape[1])

    def _layer(self) -> Layer:
        return Layer(self.cfg, self.lora_scale, self.lora_dropout, self.attention, parent=None)

    def _run(self, x_BTD, variables, length: int, contexts, cached, filled, *, keep: bool):
        """The layers of one stack: what comes out, the longer keys and values where there is a cache, and what each layer was given if
        that is to be kept.

        scan compiles the layers of one period of windows and runs them over parameters stacked along L; remat inside it decides
        what each turn of the loop keeps for the backward pass (prevent_cse guards a case that cannot arise inside a scan).
        """
        windows = self.cfg.windows[:length]
        layer = self._layer()
        dropping = self.lora_dropout and self.has_rng("dropout") and "lora" in variables

        # A layer is picked out of its period inside: what the loop keeps for the backward pass is then the stack itself. A layer
        # picked outside would be kept, and all of them together are a copy of the parameters.
        @functools.partial(jax.checkpoint, policy=REMAT[self.remat], prevent_cse=False, static_argnums=3)
        def one(inputs, x_BTD, context, j):
            variables, cached, key = inputs if len(windows) == 1 else jax.tree.map(lambda leaf: leaf[j], inputs)
            cached = None if cached is None else (*cached, filled)
            x_BTD = checkpoint_name(x_BTD, INPUT)
            return layer.apply(
                variables, x_BTD, context, cached, windows[j], rngs=None if key is None else {"dropout": key}
            )

        def period(x_BTD, inputs):
            found = []
            for j, window in enumerate(windows):
                given_BTD = x_BTD if keep else None
                x_BTD, new = one(inputs, x_BTD, contexts[window], j)
                found.append((new, given_BTD))
            return x_BTD, found[0] if len(windows) == 1 else jax.tree.map(lambda *layers: jnp.stack(layers), *found)

        keys_L = jax.random.split(self.make_rng("dropout"), length) if dropping else None
        periods = (variables, cached, keys_L)
        x_BTD, found = jax.lax.scan(period, x_BTD, _by_period(periods, len(windows)))
        return x_BTD, *_by_layer(found, len(windows))


def _by_period(layers, n: int):
    """[L, ...] -> [L / n, n, ...]; where n is 1 as it is: a reshape that changes nothing would cost a CPU a copy of every weight."""
    return layers if n == 1 else jax.tree.map(lambda leaf: leaf.reshape(-1, n, *leaf.shape[1:]), layers)


def _by_layer(periods, n: int):
    """The inverse of _by_period."""
    return periods if n == 1 else jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), periods)


def _given_next(cfg: DecoderConfig, stack: str, kept: Kept):
    """What the layers of a stack made: the first input of the next stack, or the last one's output."""
    after = [*cfg.stacks, OUTPUT]
    return kept[after[after.index(stack) + 1]][0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _from_kept(layer: Layer, windows: tuple, x_BTD, variables: dict, contexts: tuple, inputs_LBTD, out_BTD):
    """out_BTD, which the layers of a stack made of x_BTD when their inputs were kept; a window and a context for each of a period. Backward
    computes each layer forward once, from its input. Where there are adapters, they alone are taken to be trained."""
    return out_BTD


def _from_kept_fwd(layer, windows, x_BTD, variables, contexts, inputs_LBTD, out_BTD):
    return out_BTD, (variables, contexts, inputs_LBTD)


def _from_kept_bwd(layer, windows, residuals, g_BTD):
    variables, contexts, inputs_LBTD = residuals
    trained = "lora" if "lora" in variables else "params"

    def period(g_BTD, of_period):
        found = []
        for j, window in reversed(list(enumerate(windows))):
            variables, x_BTD = of_period if len(windows) == 1 else jax.tree.map(lambda leaf, j=j: leaf[j], of_period)

            def one(weights, x_BTD, variables=variables, context=contexts[j], window=window):
                return layer.apply(variables | {trained: weights}, x_BTD, context, None, window)[0]

            dweights, g_BTD = jax.vjp(one, variables[trained], x_BTD)[1](g_BTD)
            found.insert(0, dweights)
        return g_BTD, found[0] if len(windows) == 1 else jax.tree.map(lambda *layers: jnp.stack(layers), *found)

    periods = _by_period((variables, inputs_LBTD), len(windows))
    with jax.named_scope(KEPT_LAYERS):
        g_BTD, dweights = jax.lax.scan(period, g_BTD, periods, reverse=True)
    dvariables = dict.fromkeys(variables) | {trained: _by_layer(dweights, len(windows))}
    return g_BTD, dvariables, None, None, None


_from_kept.defvjp(_from_kept_fwd, _from_kept_bwd)


def _init_stack(cfg: DecoderConfig, length: int, key):
    """The parameters of `length` layers, each stacked along a leading axis."""
    x_BTD = jnp.zeros((1, 1, cfg.D))
    context = Context(*(jnp.zeros((1, 1, 1, cfg.H // 2)),) * 2, jnp.ones((1, 1, 1), bool))
    return jax.vmap(lambda key: Layer(cfg).init(key, x_BTD, context)["params"])(jax.random.split(key, length))


def param_shapes(cfg: DecoderConfig, dtype: str = "float32") -> dict:
    """The parameter tree as ShapeDtypeStructs; nothing is allocated."""
    ids_BT = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    model = Decoder(cfg, jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids_BT, ids_BT, ids_BT, ids_BT)["params"]
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)


def empty_cache(cfg: DecoderConfig, B: int, S: int, dtype) -> Cache:
    """Room for S tokens of B sequences."""

    def empty():
        return {stack: jnp.zeros((length, B, S, cfg.K, cfg.H), dtype) for stack, length in cfg.stacks.items()}

    return Cache(empty(), empty(), jnp.full((B, S), -1, jnp.int32), jnp.zeros((), jnp.int32))


def output_head(params: dict) -> jax.Array:
    """head_VD: the embedding itself where the checkpoint ties them."""
    return params["head_VD"] if "head_VD" in params else params["embed_VD"]


def next_token_logits(cfg: DecoderConfig, hidden_BD, head_VD):
    """logits_BV in float32, without the rows that only pad the vocabulary."""
    logits_BV = jnp.einsum("BD,VD->BV", hidden_BD, head_VD.astype(hidden_BD.dtype), preferred_element_type=jnp.float32)
    return soften(logits_BV[:, : cfg.V], cfg.logit_softcap)
