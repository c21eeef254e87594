"""Packed rows in, log-probs per answer out; the output head sees scored tokens only, a chunk at a time.

Axis letters: R rows, T token slots, S scored tokens, C scored tokens of one chunk, D width, V vocabulary,
G groups of rows that share a device, B pairs; 2 is (chosen, rejected).
"""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from repo_jax.data.rows import RowBatch
from repo_jax.losses import Loss, PairLogps
from repo_jax.models.attention import MASKED, soften
from repo_jax.models.decoder import Decoder, Kept, output_head
from repo_jax.sharding import BATCH, constrain


def exact_matmuls(dtype):
    """float32 means float32 also where the hardware's default is coarser (TF32, bfloat16 passes)."""
    return jax.default_matmul_precision("highest") if dtype == jnp.float32 else contextlib.nullcontext()


def pair_logps(
    model: Decoder, variables: dict, batch: RowBatch, *, dropout=None, terms: Sequence[str] = ()
) -> PairLogps:
    """Scores every answer of every row in one forward pass; an answer that is in no row gets sum and length 0.

    `variables` holds the collections that the model has: "params", and "lora" where it has adapters, whose dropout `dropout`, a key,
    switches on; beside them "reference", those of the reference model, for the terms that compare with its whole distribution. Tokens
    with weights count for these in the sums of log-probs and for 1 in the lengths and terms.
    """
    return pair_logps_and_kept(model, variables, batch, dropout=dropout, terms=terms, keep=False)[0]


def pair_logps_and_kept(
    model: Decoder, variables: dict, batch: RowBatch, *, dropout=None, terms: Sequence[str] = (), keep: bool
) -> tuple[PairLogps, Kept | None]:
    """pair_logps, and what each layer was given if that is to be kept."""
    B = batch.filled_B.shape[0]

    def sum_by_answer(x_RS):
        # Unused entries carry 2 * B, which segment_sum drops.
        return jax.ops.segment_sum(x_RS.ravel(), batch.answers_RS.ravel(), num_segments=2 * B).reshape(B, 2)

    (logps_RS, *terms_RS), kept = scored_tokens(model, variables, batch, dropout=dropout, terms=terms, keep=keep)
    lengths_B2 = sum_by_answer(jnp.ones_like(logps_RS))
    if batch.weights_RS is not None:
        logps_RS = logps_RS * batch.weights_RS
    summed = {name: sum_by_answer(term_RS) for name, term_RS in zip(terms, terms_RS, strict=True)}
    return PairLogps(sum_by_answer(logps_RS), lengths_B2, terms=summed), kept


def scored_tokens(
    model: Decoder, variables: dict, batch: RowBatch, *, dropout=None, terms: Sequence[str] = (), keep: bool = False
) -> tuple[list[jax.Array], Kept | None]:
    """[R, S] each: the log-probs of the scored tokens, and the terms; and what each layer was given if that is to be kept."""
    source_RSD, kept = predicting(model, variables, batch, dropout, keep=keep)
    live = reference_of(model, variables, batch, terms)
    head, used = head_of(model, variables), used_of(batch)
    return token_scores(source_RSD, head, batch.targets_RS, used=used, terms=terms, reference=live), kept


def weighted_logps(
    model: Decoder,
    variables: dict,
    batch: RowBatch,
    slopes_B2,
    terms: Mapping[str, jax.Array] = {},
    *,
    kept: Kept | None = None,
):
    """The sum over answers of slope times log-prob, whose gradient the head makes as it goes, because the slopes are known.

    `terms` holds the slopes of the terms; `kept` is what each layer was given when these tokens were scored, if that was kept.
    """

    def by_token(slopes_B2):
        return jnp.take(slopes_B2.ravel(), batch.answers_RS, mode="fill", fill_value=0.0)

    slopes_RS = by_token(slopes_B2)
    if batch.weights_RS is not None:
        slopes_RS = slopes_RS * batch.weights_RS
    source_RSD, _ = predicting(model, variables, batch, kept=kept)
    live = reference_of(model, variables, batch, terms)
    of_terms = {name: by_token(term_B2) for name, term_B2 in terms.items()}
    head, used = head_of(model, variables), used_of(batch)
    return weighted_sum(source_RSD, head, batch.targets_RS, slopes_RS, used=used, terms=of_terms, reference=live)


def predicting(
    model: Decoder, variables: dict, batch: RowBatch, dropout=None, *, keep: bool = False, kept: Kept | None = None
):
    """source_RSD: the hidden states that predict the scored tokens; and what each layer was given if that is to be kept."""
    variables = {name: collection for name, collection in variables.items() if name != "reference"}
    with exact_matmuls(model.dtype):
        hidden_RTD = model.apply(
            variables,
            *(batch.tokens_RT, batch.positions_RT, batch.segments_RT, batch.prompts_RT, batch.views_R2Y),
            keep=keep,
            kept=kept,
            rngs=None if dropout is None else {"dropout": dropout},
        )
    hidden_RTD, found = hidden_RTD if keep else (hidden_RTD, None)
    # Not a shift by one: a prompt's last slot predicts two tokens, the first of each answer.
    return jnp.take_along_axis(hidden_RTD, batch.sources_RS[..., None], axis=1), found


def is_live(loss: Loss) -> bool:
    """Whether the reference model has to run beside the one that is trained."""
    return any(TERMS[name].live for name in loss.terms)


def reference_of(model: Decoder, variables: dict, batch: RowBatch, terms) -> tuple[jax.Array, "Head"] | None:
    """The reference model's hidden states and head where a term wants its whole distribution. The two models share a configuration."""
    if not any(TERMS[name].live for name in terms):
        return None
    reference = jax.lax.stop_gradient(variables["reference"])
    return jax.lax.stop_gradient(predicting(model, reference, batch)[0]), head_of(model, reference)


def used_of(batch: RowBatch):
    """How many scored tokens the fullest row has; they stand first in a row."""
    return jnp.sum(batch.answers_RS < 2 * len(batch.filled_B), axis=1).max()


class Softmax(NamedTuple):
    """How the head's logits are taken, and how many tokens a device sends to it at a time: [tokens, V] in float32 is the largest array."""

    vocab: int | None = None  # rows of the head from here on only pad it
    cap: float | None = None  # the soft cap on logits
    forward_chunk: int = 1024
    backward_chunk: int = 1024  # each adds to the gradient of the whole head, which few tokens would not be worth


class Head(NamedTuple):
    """The output head; it is used in the dtype of what it is applied to, and its gradient is added up in float32."""

    weight_VD: jax.Array
    softmax: Softmax = Softmax()


class Term(NamedTuple):
    """One number for every scored token from its whole distribution: fn(logps_XV, reference_logps_XV) -> [X]."""

    fn: Callable
    live: bool = False  # it wants the reference model's distribution, for which that has to run beside the model


def log_sum_p2(logps_XV, _):
    """The log of the chance that two tokens drawn here are the same."""
    return jax.nn.logsumexp(2 * logps_XV, axis=-1)


def kl_reference(logps_XV, reference_XV):
    """KL(reference || model)."""
    return jnp.sum(jnp.exp(reference_XV) * (reference_XV - logps_XV), axis=-1)


TERMS = {
    # name            fn             live reference?
    "log_sum_p2":   Term(log_sum_p2),
    "kl_reference": Term(kl_reference, True),
}  # fmt: skip


def head_of(model: Decoder, variables: dict) -> Head:
    return Head(output_head(variables["params"]), Softmax(model.cfg.V, model.cfg.logit_softcap, *model.head_chunks))


def token_logps(source_RSD, head: Head, targets_RS, *, used=None):
    """Log-prob of each target under softmax(source @ head), in float32; [R, S, V] is never built.

    Only the first `used` targets of a row are asked for; the others' log-probs are any finite number.
    """
    return token_scores(source_RSD, head, targets_RS, used=used)[0]


def token_scores(
    source_RSD, head: Head, targets_RS, *, used=None, terms: Sequence[str] = (), reference=None
) -> list[jax.Array]:
    """token_logps, and the terms of the same tokens. `reference` is the reference model's (source_RSD, head)."""
    used = targets_RS.shape[1] if used is None else used
    plan = Plan(head.softmax, tuple(terms))
    return _token_scores(plan, source_RSD, head.weight_VD, targets_RS, used, _arrays(reference))


def weighted_sum(
    source_RSD, head: Head, targets_RS, slopes_RS, *, used=None, terms: Mapping[str, jax.Array] = {}, reference=None
):
    """sum(slopes * token_logps) for constant slopes, 0 from `used` on. Forward and backward are one sweep: three products with the
    head where token_logps takes four. `terms` are the slopes of the terms."""
    used = targets_RS.shape[1] if used is None else used
    plan, slopes = Plan(head.softmax, tuple(terms)), (slopes_RS, *terms.values())
    return _weighted_sum(plan, source_RSD, head.weight_VD, targets_RS, slopes, used, _arrays(reference))


class Plan(NamedTuple):
    """What the head makes of a chunk of logits."""

    softmax: Softmax
    terms: tuple[str, ...] = ()


def _arrays(reference) -> tuple:
    return () if reference is None else (reference[0], reference[1].weight_VD)


def _groups() -> int:
    """Groups of rows that share a device."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]


def _over_chunks(fn, carry, tokens: int, used, *arrays):
    """A scan of fn over chunks of the [R, S, ...] arrays: (carry, [X, ...] each) -> (carry, a tuple of [X, ...]), X = R C.

    Ends with the chunk that holds scored token `used`; what comes after is 0. Rows stay the axis that is spread over devices. Chunks are flat:
    with an axis of rows beside C, XLA keeps a second copy of the logits on CPUs.
    """
    R, S = arrays[0].shape[:2]
    C = min(S, max(1, tokens // (R // _groups())))
    N = -(-S // C)

    def split(x_RS):
        x_RS = jnp.pad(x_RS, ((0, 0), (0, N * C - S)) + ((0, 0),) * (x_RS.ndim - 2))
        return jnp.moveaxis(x_RS.reshape(R, N, C, *x_RS.shape[2:]), 1, 0)

    chunks = tuple(split(x_RS) for x_RS in arrays)

    def flat(i):
        return tuple(x_NRC[i].reshape(R * C, *x_NRC.shape[3:]) for x_NRC in chunks)

    _, shapes = jax.eval_shape(lambda carry: fn(carry, flat(0)), carry)

    def turn(i, state):
        carry, done = state
        carry, new = fn(carry, flat(i))
        return carry, tuple(x_NRC.at[i].set(x_X.reshape(x_NRC.shape[1:])) for x_NRC, x_X in zip(done, new, strict=True))

    spread = functools.partial(constrain, spec=P(None, *BATCH))
    empty = tuple(spread(jnp.zeros((N, R, C, *x_X.shape[1:]), x_X.dtype)) for x_X in shapes)
    carry, done = jax.lax.fori_loop(0, -(-used // C), turn, (carry, empty))
    return carry, tuple(_unchunk(x_NRC, S) for x_NRC in done)


def _unchunk(x_NRC, S: int):
    """[N, R, C, ...] -> [R, S, ...]"""
    N, R, C = x_NRC.shape[:3]
    return jnp.moveaxis(x_NRC, 0, 1).reshape(R, N * C, *x_NRC.shape[3:])[:, :S]


def _logits(softmax: Softmax, x_XD, head_VD):
    """The logits as the softmax takes them, and their slopes d logits / d (x @ head)."""
    raw_XV = jnp.einsum("XD,VD->XV", x_XD, head_VD, preferred_element_type=jnp.float32)
    logits_XV = soften(raw_XV, softmax.cap)
    slopes_XV = 1.0 if softmax.cap is None else 1 - (logits_XV / softmax.cap) ** 2
    if softmax.vocab is not None and head_VD.shape[0] > softmax.vocab:
        there_V = jnp.arange(head_VD.shape[0]) < softmax.vocab
        logits_XV = jnp.where(there_V[None], logits_XV, MASKED)
    return logits_XV, slopes_XV


def _is_target(targets_X, V):
    return targets_X[..., None] == jnp.arange(V, dtype=targets_X.dtype)[None]


def _logps(logits_XV, targets_X):
    """The targets' log-probs and the log of the softmax's sum."""
    lse_X = jax.nn.logsumexp(logits_XV, axis=-1)
    if jax.sharding.get_abstract_mesh().size <= 1:  # the sum below would cost a CPU a second array of logits
        target_X = jnp.take_along_axis(logits_XV, targets_X[:, None], axis=-1)[:, 0]
    else:
        # A masked sum rather than an index: where V is split, each shard adds its own part.
        target_X = jnp.sum(jnp.where(_is_target(targets_X, logits_XV.shape[-1]), logits_XV, 0.0), axis=-1)
    return target_X - lse_X, lse_X


def _reference_logps(plan: Plan, head_VD, x_XD: Sequence):
    """Of the same tokens, all of the vocabulary; None where no term wants them."""
    return None if head_VD is None else jax.nn.log_softmax(_logits(plan.softmax, x_XD[0], head_VD)[0], axis=-1)


def _terms(plan: Plan, logits_XV, lse_X, reference_XV) -> list:
    return [TERMS[name].fn(logits_XV - lse_X[:, None], reference_XV) for name in plan.terms]


def _push_back(plan: Plan, dhead_GVD, logits_XV, slopes_XV, lse_X, targets_X, g_X, x_XD, head, reference_XV):
    """dhead_GVD with this chunk's part, and dx_XD, for g_X = d loss / d log-prob of each target, and then of each term."""
    g_X, *of_terms_X = g_X
    (X, D), (V, dtype, G) = x_XD.shape, (head.shape[0], x_XD.dtype, dhead_GVD.shape[0])
    probs_XV = jnp.exp(logits_XV - lse_X[..., None])
    dlogits_XV = g_X[..., None] * (_is_target(targets_X, V) - probs_XV)
    if plan.terms:

        def terms(logits_XV):
            return _terms(plan, logits_XV, jax.nn.logsumexp(logits_XV, axis=-1), reference_XV)

        dlogits_XV += jax.vjp(terms, logits_XV)[1](of_terms_X)[0]
    dlogits_XV = (dlogits_XV * slopes_XV).astype(dtype)
    dx_XD = jnp.einsum("XV,VD->XD", dlogits_XV, head, preferred_element_type=jnp.float32).astype(dtype)
    by_group = (G, X // G)
    dhead_GVD += jnp.einsum(
        "GXV,GXD->GVD",
        dlogits_XV.reshape(*by_group, V),
        x_XD.reshape(*by_group, D),
        preferred_element_type=jnp.float32,
    )
    return _local(dhead_GVD), dx_XD


def _whole_width(head_VD, dtype):
    """The head in the compute dtype, D gathered once before the loop; V stays split over `tensor`."""
    return constrain(head_VD.astype(dtype), P("tensor", None))


# Each device adds up the head's gradient over its own rows; the sum over devices follows once, after the loop.
_local = functools.partial(constrain, spec=P(*BATCH, "tensor", None))


def _no_gradient(head_VD):
    return _local(jnp.zeros((_groups(), *head_VD.shape), jnp.float32))


def _whole_reference(reference: tuple, dtype) -> tuple:
    """The reference's hidden states, to be split into chunks, and its head."""
    return (reference[:1], _whole_width(reference[1], dtype)) if reference else ((), None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_scores(plan: Plan, source_RSD, head_VD, targets_RS, used, reference):
    return _token_scores_fwd(plan, source_RSD, head_VD, targets_RS, used, reference)[0]


def _token_scores_fwd(plan, source_RSD, head_VD, targets_RS, used, reference):
    head = _whole_width(head_VD, source_RSD.dtype)
    others, other_head = _whole_reference(reference, source_RSD.dtype)

    def chunk(_, inputs):
        x_XD, targets_X, *other_XD = inputs
        logits_XV = _logits(plan.softmax, x_XD, head)[0]
        logps_X, lse_X = _logps(logits_XV, targets_X)
        reference_XV = _reference_logps(plan, other_head, other_XD)
        return None, (lse_X, logps_X, *_terms(plan, logits_XV, lse_X, reference_XV))

    with exact_matmuls(source_RSD.dtype):
        inputs = source_RSD, targets_RS, *others
        _, (lse_RS, *scores) = _over_chunks(chunk, None, plan.softmax.forward_chunk, used, *inputs)
    return scores, (source_RSD, head_VD, targets_RS, used, reference, lse_RS)


def _token_scores_bwd(plan, residuals, g):
    source_RSD, head_VD, targets_RS, used, reference, lse_RS = residuals
    head = _whole_width(head_VD, source_RSD.dtype)
    others, other_head = _whole_reference(reference, source_RSD.dtype)

    def chunk(dhead_GVD, inputs):
        x_XD, targets_X, lse_X, *rest = inputs
        g_X, other_XD = rest[: len(g)], rest[len(g) :]
        reference_XV, logits = _reference_logps(plan, other_head, other_XD), _logits(plan.softmax, x_XD, head)
        dhead_GVD, dx_XD = _push_back(plan, dhead_GVD, *logits, lse_X, targets_X, g_X, x_XD, head, reference_XV)
        return dhead_GVD, (dx_XD,)

    with exact_matmuls(source_RSD.dtype):
        start, inputs = _no_gradient(head_VD), (source_RSD, targets_RS, lse_RS, *g, *others)
        dhead_GVD, (dx_RSD,) = _over_chunks(chunk, start, plan.softmax.backward_chunk, used, *inputs)
    return dx_RSD, dhead_GVD.sum(axis=0).astype(head_VD.dtype), None, None, None


_token_scores.defvjp(_token_scores_fwd, _token_scores_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_sum(plan: Plan, source_RSD, head_VD, targets_RS, slopes, used, reference):
    scores = _token_scores(plan, source_RSD, head_VD, targets_RS, used, reference)
    return sum(jnp.sum(slopes_RS * score_RS) for slopes_RS, score_RS in zip(slopes, scores, strict=True))


def _weighted_sum_fwd(plan, source_RSD, head_VD, targets_RS, slopes, used, reference):
    head = _whole_width(head_VD, source_RSD.dtype)
    others, other_head = _whole_reference(reference, source_RSD.dtype)

    def chunk(sums, inputs):
        total, dhead_GVD = sums
        x_XD, targets_X, *rest = inputs
        g_X, other_XD = rest[: len(slopes)], rest[len(slopes) :]
        logits_XV, slopes_XV = _logits(plan.softmax, x_XD, head)
        logps_X, lse_X = _logps(logits_XV, targets_X)
        reference_XV = _reference_logps(plan, other_head, other_XD)
        scores = logps_X, *_terms(plan, logits_XV, lse_X, reference_XV)
        logits = logits_XV, slopes_XV
        dhead_GVD, dx_XD = _push_back(plan, dhead_GVD, *logits, lse_X, targets_X, g_X, x_XD, head, reference_XV)
        total += sum(jnp.sum(one * other) for one, other in zip(g_X, scores, strict=True))
        return (total, dhead_GVD), (dx_XD,)

    with exact_matmuls(source_RSD.dtype):
        start, inputs = (jnp.zeros(()), _no_gradient(head_VD)), (source_RSD, targets_RS, *slopes, *others)
        (total, dhead_GVD), (dx_RSD,) = _over_chunks(chunk, start, plan.softmax.backward_chunk, used, *inputs)
    return total, (dx_RSD, dhead_GVD.sum(axis=0).astype(head_VD.dtype))


def _weighted_sum_bwd(plan, residuals, g):
    dx_RSD, dhead_VD = residuals
    return (dx_RSD * g).astype(dx_RSD.dtype), (dhead_VD * g).astype(dhead_VD.dtype), None, None, None, None


_weighted_sum.defvjp(_weighted_sum_fwd, _weighted_sum_bwd)
