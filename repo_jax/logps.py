"""Packed rows in, log-probs per answer out; the output head sees scored tokens only, a chunk at a time.

Axis letters: R rows, T token slots, S scored tokens, C scored tokens of one chunk, D width, V vocabulary,
G groups of rows that share a device, B pairs; 2 is (chosen, rejected).
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from repo_jax.data.rows import RowBatch
from repo_jax.losses import PairLogps
from repo_jax.models.attention import MASKED, soften
from repo_jax.models.decoder import Decoder, output_head
from repo_jax.sharding import BATCH, constrain

CHUNK = 128  # scored tokens a row sends to the head at a time; [R, CHUNK, V] is the largest array the head makes


def exact_matmuls(dtype):
    """float32 means float32 also where the hardware's default is coarser (TF32, bfloat16 passes)."""
    return jax.default_matmul_precision("highest") if dtype == jnp.float32 else contextlib.nullcontext()


def pair_logps(model: Decoder, variables: dict, batch: RowBatch, *, dropout=None) -> PairLogps:
    """Scores every answer of every row in one forward pass; an answer that is in no row gets sum and length 0.

    `variables` holds the collections that the model has: "params", and "lora" where it has adapters, whose dropout `dropout`, a key,
    switches on. Tokens with weights count for these in the sums and for 1 in the lengths.
    """
    B = batch.filled_B.shape[0]

    def sum_by_answer(x_RS):
        # Unused entries carry 2 * B, which segment_sum drops.
        return jax.ops.segment_sum(x_RS.ravel(), batch.answers_RS.ravel(), num_segments=2 * B).reshape(B, 2)

    with exact_matmuls(model.dtype):
        hidden_RTD = model.apply(
            variables,
            *(batch.tokens_RT, batch.positions_RT, batch.segments_RT, batch.prompts_RT),
            rngs=None if dropout is None else {"dropout": dropout},
        )
        # Not a shift by one: a prompt's last slot predicts two tokens, the first of each answer.
        source_RSD = jnp.take_along_axis(hidden_RTD, batch.sources_RS[..., None], axis=1)
        cfg, head_VD = model.cfg, output_head(variables["params"])
        logps_RS = token_logps(source_RSD, head_VD, batch.targets_RS, vocab=cfg.V, cap=cfg.logit_softcap)
    lengths_B2 = sum_by_answer(jnp.ones_like(logps_RS))
    if batch.weights_RS is not None:
        logps_RS = logps_RS * batch.weights_RS
    return PairLogps(sum_by_answer(logps_RS), lengths_B2)


def token_logps(source_RSD, head_VD, targets_RS, *, vocab: int | None = None, cap: float | None = None):
    """Log-prob of each target under softmax(source @ head), in float32; [R, S, V] is never built.

    The head is used in the dtype of `source`; its gradient is added up in float32. Rows of the head from `vocab` on only pad it;
    `cap` is the soft cap on logits.
    """
    S = targets_RS.shape[1]
    padded = -S % min(S, CHUNK)
    source_RSD = jnp.pad(source_RSD, ((0, 0), (0, padded), (0, 0)))
    targets_RS = jnp.pad(targets_RS, ((0, 0), (0, padded)))
    return _token_logps(vocab, cap, source_RSD, head_VD, targets_RS)[:, :S]


def _chunks(x_RS):
    """[R, S, ...] -> [S // C, R, C, ...], for a scan over chunks; rows stay the axis that is spread over devices."""
    R, S = x_RS.shape[:2]
    C = min(S, CHUNK)
    return jnp.moveaxis(x_RS.reshape(R, S // C, C, *x_RS.shape[2:]), 1, 0)


def _unchunk(x_NRC):
    """The inverse of _chunks."""
    N, R, C = x_NRC.shape[:3]
    return jnp.moveaxis(x_NRC, 0, 1).reshape(R, N * C, *x_NRC.shape[3:])


def _logits(vocab: int | None, cap: float | None, x_RCD, head_VD):
    """The logits as the softmax takes them, and their slopes d logits / d (x @ head)."""
    raw_RCV = jnp.einsum("RCD,VD->RCV", x_RCD, head_VD, preferred_element_type=jnp.float32)
    logits_RCV = soften(raw_RCV, cap)
    slopes_RCV = 1.0 if cap is None else 1 - (logits_RCV / cap) ** 2
    if vocab is not None and head_VD.shape[0] > vocab:
        there_V = jnp.arange(head_VD.shape[0]) < vocab
        logits_RCV = jnp.where(there_V[None, None], logits_RCV, MASKED)
    return logits_RCV, slopes_RCV


def _is_target(targets_RC, V):
    return targets_RC[..., None] == jnp.arange(V, dtype=targets_RC.dtype)[None, None]


def _whole_width(head_VD, dtype):
    """The head in the compute dtype, D gathered once before the loop; V stays split over `tensor`."""
    return constrain(head_VD.astype(dtype), P("tensor", None))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _token_logps(vocab, cap, source_RSD, head_VD, targets_RS):
    return _token_logps_fwd(vocab, cap, source_RSD, head_VD, targets_RS)[0]


def _token_logps_fwd(vocab, cap, source_RSD, head_VD, targets_RS):
    head = _whole_width(head_VD, source_RSD.dtype)

    def chunk(_, inputs):
        x_RCD, targets_RC = inputs
        logits_RCV, _ = _logits(vocab, cap, x_RCD, head)
        lse_RC = jax.nn.logsumexp(logits_RCV, axis=-1)
        # A masked sum rather than an index: where V is split, each shard adds its own part.
        target_RC = jnp.sum(jnp.where(_is_target(targets_RC, head.shape[0]), logits_RCV, 0.0), axis=-1)
        return None, (target_RC - lse_RC, lse_RC)

    _, (logps, lse) = jax.lax.scan(chunk, None, (_chunks(source_RSD), _chunks(targets_RS)))
    return _unchunk(logps), (source_RSD, head_VD, targets_RS, _unchunk(lse))


def _token_logps_bwd(vocab, cap, residuals, g_RS):
    source_RSD, head_VD, targets_RS, lse_RS = residuals
    R, _, D = source_RSD.shape
    V, dtype = head_VD.shape[0], source_RSD.dtype
    head = _whole_width(head_VD, dtype)
    # Each device adds up the head's gradient over its own rows; the sum over devices follows once, after the loop.
    mesh = jax.sharding.get_abstract_mesh()
    G = 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]
    local = functools.partial(constrain, spec=P(*BATCH, "tensor", None))

    def chunk(dhead_GVD, inputs):
        x_RCD, targets_RC, lse_RC, g_RC = inputs
        logits_RCV, slopes_RCV = _logits(vocab, cap, x_RCD, head)
        probs_RCV = jnp.exp(logits_RCV - lse_RC[..., None])
        dlogits_RCV = (g_RC[..., None] * (_is_target(targets_RC, V) - probs_RCV) * slopes_RCV).astype(dtype)
        dx_RCD = jnp.einsum("RCV,VD->RCD", dlogits_RCV, head, preferred_element_type=jnp.float32).astype(dtype)
        grouped = (G, R // G * x_RCD.shape[1])
        dhead_GVD += jnp.einsum(
            "GXV,GXD->GVD",
            dlogits_RCV.reshape(*grouped, V),
            x_RCD.reshape(*grouped, D),
            preferred_element_type=jnp.float32,
        )
        return local(dhead_GVD), dx_RCD

    with exact_matmuls(dtype):
        start = local(jnp.zeros((G, V, D), jnp.float32))
        dhead_GVD, dx = jax.lax.scan(
            chunk, start, (_chunks(source_RSD), _chunks(targets_RS), _chunks(lse_RS), _chunks(g_RS))
        )
    return _unchunk(dx), dhead_GVD.sum(axis=0).astype(head_VD.dtype), None


_token_logps.defvjp(_token_logps_fwd, _token_logps_bwd)
