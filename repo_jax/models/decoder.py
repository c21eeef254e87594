"""The decoder: token ids in packed rows to hidden states. The output head belongs to logps.py.

Axis letters: B sequences (packed rows), T token slots, S keys, D width, F MLP width, N query heads, K key/value heads,
H head size, V vocabulary, L layers.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from repo_jax.models.attention import ATTENTION, rope, visible
from repo_jax.models.config import DecoderConfig
from repo_jax.sharding import BATCH, constrain

INIT = nn.initializers.normal(0.02)

# What the backward pass finds stored; the rest it computes again.
REMAT = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # the results of weight matmuls
    "full": jax.checkpoint_policies.nothing_saveable,  # each layer's input alone
}


def rms_norm(x_BTD, scale_D, *, eps: float):
    """Root-mean-square norm (arXiv:1910.07467); the mean runs in float32."""
    x32_BTD = x_BTD.astype(jnp.float32)
    normed_BTD = x32_BTD * jax.lax.rsqrt(jnp.mean(x32_BTD**2, axis=-1, keepdims=True) + eps)
    return (normed_BTD * scale_D[None, None]).astype(x_BTD.dtype)


class Attention(nn.Module):
    cfg: DecoderConfig
    kernel: str

    @nn.compact
    def __call__(self, x_BTD, positions_BT, mask_BTS):
        c, dtype = self.cfg, x_BTD.dtype
        q_DNH = self.param("q_DNH", INIT, (c.D, c.N, c.H))
        k_DKH = self.param("k_DKH", INIT, (c.D, c.K, c.H))
        v_DKH = self.param("v_DKH", INIT, (c.D, c.K, c.H))
        o_NHD = self.param("o_NHD", INIT, (c.N, c.H, c.D))
        q_BTNH = rope(jnp.einsum("BTD,DNH->BTNH", x_BTD, q_DNH.astype(dtype)), positions_BT, theta=c.rope_theta)
        k_BTKH = rope(jnp.einsum("BTD,DKH->BTKH", x_BTD, k_DKH.astype(dtype)), positions_BT, theta=c.rope_theta)
        v_BTKH = jnp.einsum("BTD,DKH->BTKH", x_BTD, v_DKH.astype(dtype))
        out_BTNH = ATTENTION[self.kernel](q_BTNH, k_BTKH, v_BTKH, mask_BTS)
        return jnp.einsum("BTNH,NHD->BTD", out_BTNH, o_NHD.astype(dtype))


class MLP(nn.Module):
    cfg: DecoderConfig

    @nn.compact
    def __call__(self, x_BTD):
        c, dtype = self.cfg, x_BTD.dtype
        gate_DF = self.param("gate_DF", INIT, (c.D, c.F))
        up_DF = self.param("up_DF", INIT, (c.D, c.F))
        down_FD = self.param("down_FD", INIT, (c.F, c.D))
        hidden_BTF = jax.nn.silu(x_BTD @ gate_DF.astype(dtype)) * (x_BTD @ up_DF.astype(dtype))
        return hidden_BTF @ down_FD.astype(dtype)


class Layer(nn.Module):
    cfg: DecoderConfig
    attention: str

    @nn.compact
    def __call__(self, x_BTD, positions_BT, mask_BTS):
        c = self.cfg
        attn_norm_D = self.param("attn_norm_D", nn.initializers.ones, (c.D,))
        mlp_norm_D = self.param("mlp_norm_D", nn.initializers.ones, (c.D,))
        normed_BTD = rms_norm(x_BTD, attn_norm_D, eps=c.norm_eps)
        x_BTD = constrain(x_BTD + Attention(c, self.attention, name="attn")(normed_BTD, positions_BT, mask_BTS), BATCH)
        normed_BTD = rms_norm(x_BTD, mlp_norm_D, eps=c.norm_eps)
        x_BTD = constrain(x_BTD + MLP(c, name="mlp")(normed_BTD), BATCH)
        return x_BTD, None


class Decoder(nn.Module):
    """Packed rows in, hidden states out; dtype is what it computes in, whatever the parameters are stored in."""

    cfg: DecoderConfig
    dtype: jnp.dtype
    remat: str = "full"  # a key of REMAT
    attention: str = "dense"  # a key of ATTENTION

    @nn.compact
    def __call__(self, tokens_BT, positions_BT, segments_BT, prompts_BT):
        c = self.cfg
        embed_VD = self.param("embed_VD", INIT, (c.V, c.D))
        if not c.tie_embeddings:
            self.param("head_VD", INIT, (c.V, c.D))  # declared here, used by logps.py
        # Gathering the table's D shards first keeps XLA from replicating the activations after the look-up.
        # Looking up before the cast keeps the table's gradient, a sum over all tokens, in float32.
        table_VD = constrain(embed_VD, P("tensor", None))
        x_BTD = constrain(table_VD[tokens_BT].astype(self.dtype), BATCH)
        mask_BTS = constrain(visible(segments_BT, prompts_BT), BATCH)
        # scan compiles one layer and runs it L times over parameters stacked along L; remat inside it decides what each
        # turn of the loop keeps for the backward pass (prevent_cse guards a case that cannot arise inside a scan).
        layers = nn.scan(
            nn.remat(Layer, policy=REMAT[self.remat], prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=c.L,
        )
        x_BTD, _ = layers(c, self.attention, name="layers_L")(x_BTD, positions_BT, mask_BTS)
        return rms_norm(x_BTD, self.param("final_norm_D", nn.initializers.ones, (c.D,)), eps=c.norm_eps)


def param_shapes(cfg: DecoderConfig) -> dict:
    """The parameter tree as float32 ShapeDtypeStructs; nothing is allocated."""
    ids_BT = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    model = Decoder(cfg, jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), ids_BT, ids_BT, ids_BT, ids_BT)["params"]


def output_head(params: dict) -> jax.Array:
    """head_VD: the embedding itself where the checkpoint ties them."""
    return params["head_VD"] if "head_VD" in params else params["embed_VD"]
