import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from examples import ROOT, STORIES, TINY, equations_of, pair_of, random_pairs, random_params, stories, tokens
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from oracles.decoder import next_token_logps

from repo_jax.data.rows import RowShape, row_batches
from repo_jax.data.weights import ld, temporal_decay
from repo_jax.logps import Head, Softmax, pair_logps, token_logps, token_scores, weighted_sum
from repo_jax.models.decoder import Decoder
from repo_jax.models.hf import hf_tensors
from repo_jax.sharding import BATCH, make_mesh

SHAPE = RowShape(R=4, T=64, S=48)
SMALL = Softmax(forward_chunk=48, backward_chunk=28)  # tokens, of few rows


def scored(model, params, pairs, shape=SHAPE):
    """Sums and lengths of all pairs, and the gradient of a fixed mixture of the sums, over all row batches."""
    mixture = jnp.asarray(np.random.default_rng(1).normal(size=(len(pairs), 2)), jnp.float32)

    @jax.jit
    def one(params, batch):
        def objective(params):
            result = pair_logps(model, {"params": params}, batch)
            return (mixture * result.logps_B2).sum(), result

        return jax.grad(objective, has_aux=True)(params)

    parts = [one(params, batch) for batch in row_batches(pairs, shape)]
    return jax.tree.map(lambda *leaves: sum(np.asarray(leaf, np.float64) for leaf in leaves), *parts)


def assert_same(one, other):
    """Log-probs equal, gradients within 1e-5 of their norm."""
    (grads, pairs), (other_grads, other_pairs) = one, other
    np.testing.assert_allclose(pairs.logps_B2, other_pairs.logps_B2, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(pairs.lengths_B2, other_pairs.lengths_B2)
    flat, other_flat = (np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(g)]) for g in (grads, other_grads))
    assert np.linalg.norm(flat - other_flat) <= 1e-5 * np.linalg.norm(flat)


def head_inputs(S, *, R=2, V=50, padded_V=50, D=16):
    """Hidden states, a head, targets and slopes of a loss at their log-probs."""
    rng = np.random.default_rng(0)
    source, head, slopes = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((R, S, D), (padded_V, D), (R, S)))
    return source, head, jnp.asarray(rng.integers(V, size=(R, S))), slopes


def naive_weighted(source, head, targets, slopes, V=50, cap=None):
    logits = jnp.einsum("RSD,VD->RSV", source, head[:V])
    logits = logits if cap is None else cap * jnp.tanh(logits / cap)
    return (slopes * jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]).sum()


FORMS = {
    "token_logps": lambda source, head, targets, slopes, **used: (
        slopes * token_logps(source, head, targets, **used)
    ).sum(),
    "weighted_sum": weighted_sum,
}


def assert_a_head_equals_the_naive_one(form, softmax, inputs, *, V=50):
    """The sum of slopes times log-probs, and its gradients at sources and head."""
    source, head, targets, slopes = inputs

    @jax.jit
    def ours(source, head, targets, slopes):
        return jax.value_and_grad(lambda x, w: 3 * FORMS[form](x, Head(w, softmax), targets, slopes), (0, 1))(
            source, head
        )

    value, (dsource, dhead) = ours(*inputs)
    wanted = jax.value_and_grad(lambda x, w: 3 * naive_weighted(x, w, targets, slopes, V, softmax.cap), (0, 1))
    wanted_value, (wanted_dsource, wanted_dhead) = wanted(source, head)
    np.testing.assert_allclose(value, wanted_value, rtol=2e-5, atol=1e-4)
    np.testing.assert_allclose(dsource, wanted_dsource, rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(dhead, wanted_dhead, rtol=2e-5, atol=1e-4)
    assert not np.asarray(dhead)[V:].any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "S, forward, backward", [(1, 1, 1), (96, 48, 64), (37, 20, 14), (37, 14, 20), (37, 1, 3), (200, 1000, 1000)]
)
def test_chunked_head_equals_log_softmax_of_all_logits_in_value_and_gradient(form, S, forward, backward):
    softmax = Softmax(forward_chunk=forward, backward_chunk=backward)
    assert_a_head_equals_the_naive_one(form, softmax, head_inputs(S))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cap", [None, 3.0])
def test_rows_that_pad_the_vocabulary_and_the_soft_cap_are_those_of_the_plain_form(form, cap):
    assert_a_head_equals_the_naive_one(form, SMALL._replace(vocab=50, cap=cap), head_inputs(37, padded_V=64))


@pytest.mark.parametrize("form", FORMS)
def test_the_head_on_a_mesh_equals_that_on_one_device(form):
    mesh = make_mesh(2, 2, 2)
    source, head, targets, slopes = head_inputs(37, R=8, padded_V=64)
    rows = NamedSharding(mesh, BATCH)
    inputs = (
        jax.device_put(source, rows),
        jax.device_put(head, NamedSharding(mesh, P("tensor", "fsdp"))),
        *jax.device_put((targets, slopes), rows),
    )
    with jax.set_mesh(mesh):
        # 28 tokens a device are 14 of each of its two rows.
        assert_a_head_equals_the_naive_one(form, SMALL._replace(vocab=50, cap=3.0), inputs)


def term_inputs(R=2, padded_V=64):
    source, head, targets, slopes = head_inputs(37, R=R, padded_V=padded_V)
    rng = np.random.default_rng(3)
    others = source + 0.3 * jnp.asarray(rng.normal(size=source.shape), jnp.float32)
    of_terms = jnp.asarray(rng.normal(size=(2, *slopes.shape)), jnp.float32)
    return source, head, targets, slopes, others, head * 1.1, of_terms


def assert_terms_are_those_of_all_logits(form, softmax, inputs):
    """Sums of slopes times log-probs and terms, and their gradients, against float64 on all logits."""
    names = ("log_sum_p2", "kl_reference")

    @jax.jit
    def ours(source, head, targets, slopes, others, other_head, of_terms):
        def objective(x, w):
            reference = others, Head(other_head, softmax)
            if form == "weighted_sum":
                terms = dict(zip(names, of_terms, strict=True))
                return weighted_sum(x, Head(w, softmax), targets, slopes, terms=terms, reference=reference)
            scores = token_scores(x, Head(w, softmax), targets, terms=names, reference=reference)
            return sum((one * other).sum() for one, other in zip((slopes, *of_terms), scores, strict=True))

        return jax.value_and_grad(objective, (0, 1))(source, head)

    def plain(source, head, targets, slopes, others, other_head, of_terms):
        """Values and, by small steps, the slope along a fixed direction."""
        logits, theirs = (np.einsum("RSD,VD->RSV", x, w[:50]) for x, w in ((source, head), (others, other_head)))
        if softmax.cap is not None:
            logits, theirs = (softmax.cap * np.tanh(x / softmax.cap) for x in (logits, theirs))
        logps, theirs = (x - np.log(np.exp(x).sum(axis=-1, keepdims=True)) for x in (logits, theirs))
        picked = np.take_along_axis(logps, targets[..., None], axis=-1)[..., 0]
        log_sum_p2 = np.log((np.exp(logps) ** 2).sum(axis=-1))
        kl = (np.exp(theirs) * (theirs - logps)).sum(axis=-1)
        return (slopes * picked + of_terms[0] * log_sum_p2 + of_terms[1] * kl).sum()

    value, (dsource, dhead) = ours(*inputs)
    exact = [np.asarray(x, np.float64 if x.dtype == jnp.float32 else None) for x in inputs]
    np.testing.assert_allclose(value, plain(*exact), rtol=1e-5)
    rng = np.random.default_rng(9)
    for at, slope in ((0, dsource), (1, dhead)):
        for _ in range(3):
            along, ends = rng.normal(size=exact[at].shape), []
            for step in (1e-5, -1e-5):
                moved = [x + step * along if i == at else x for i, x in enumerate(exact)]
                ends.append(plain(*moved))
            np.testing.assert_allclose(
                (np.asarray(slope) * along).sum(), (ends[0] - ends[1]) / 2e-5, rtol=1e-4, atol=1e-3
            )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cap", [None, 3.0])
def test_terms_of_whole_distributions_are_those_of_all_logits_in_value_and_gradient(form, cap):
    assert_terms_are_those_of_all_logits(form, SMALL._replace(vocab=50, cap=cap), term_inputs())


def test_terms_on_a_mesh_equal_those_on_one_device():
    mesh = make_mesh(2, 2, 2)
    source, head, targets, slopes, others, other_head, of_terms = term_inputs(R=8)
    rows, table = NamedSharding(mesh, BATCH), NamedSharding(mesh, P("tensor", "fsdp"))
    spread = jax.device_put((source, targets, slopes, others), rows)
    inputs = (spread[0], jax.device_put(head, table), *spread[1:], jax.device_put(other_head, table), of_terms)
    with jax.set_mesh(mesh):
        assert_terms_are_those_of_all_logits("weighted_sum", SMALL._replace(vocab=50, cap=3.0), inputs)


@pytest.mark.parametrize(
    "form, forward, backward, most",
    [("token_logps", 64, 32, 64), ("token_logps", 32, 64, 64), ("weighted_sum", 512, 64, 64)],
)
def test_the_head_never_makes_or_keeps_more_logits_than_a_chunk(form, forward, backward, most):
    source, _, targets, slopes = head_inputs(512, V=1000)
    softmax = Softmax(forward_chunk=forward, backward_chunk=backward)
    jaxpr = jax.make_jaxpr(jax.grad(lambda w: FORMS[form](source, Head(w, softmax), targets, slopes)))
    equations = equations_of(jaxpr(jnp.ones((1000, 16))).jaxpr)
    assert max(variable.aval.size for equation in equations for variable in equation.outvars) == most * 1000


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("used", [0, 1, 14, 30])
def test_the_head_is_not_applied_to_chunks_that_no_row_uses(form, used):
    source, head, targets, slopes = head_inputs(37)
    slopes = slopes.at[:, used:].set(0)
    softmax = Softmax(forward_chunk=14, backward_chunk=14)  # 7 of each row
    ends = -(-used // 7) * 7

    @jax.jit
    def ours(source, head, used):
        return jax.value_and_grad(
            lambda x, w: FORMS[form](x, Head(w, softmax), targets, slopes, used=used), argnums=(0, 1)
        )(source, head)

    # What is not a number reaches nothing: 0 times it would.
    value, (dsource, dhead) = ours(source.at[:, ends:].set(jnp.nan), head, used)
    wanted = jax.value_and_grad(lambda x, w: naive_weighted(x, w, targets, slopes), (0, 1))
    wanted_value, (wanted_dsource, wanted_dhead) = wanted(source, head)
    np.testing.assert_allclose(value, wanted_value, rtol=2e-5, atol=1e-4)
    np.testing.assert_allclose(dsource, wanted_dsource, rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(dhead, wanted_dhead, rtol=2e-5, atol=1e-4)


def test_a_weighted_sum_takes_three_products_with_the_head_where_log_probs_and_their_backward_take_four():
    source, head, targets, slopes = head_inputs(512)

    def products(form):
        softmax = Softmax(forward_chunk=64, backward_chunk=64)
        gradient = jax.grad(lambda x, w: FORMS[form](x, Head(w, softmax), targets, slopes), (0, 1))
        names = [equation.primitive.name for equation in equations_of(jax.make_jaxpr(gradient)(source, head).jaxpr)]
        return names.count("dot_general")

    assert {form: products(form) for form in FORMS} == {"token_logps": 4, "weighted_sum": 3}


@pytest.mark.parametrize("form", FORMS)
def test_a_bfloat16_source_still_gives_float32_log_probs_and_head_gradient(form):
    source, head, targets = jnp.ones((1, 4, 16), jnp.bfloat16), jnp.ones((50, 16)), jnp.zeros((1, 4), jnp.int32)
    value, grads = jax.value_and_grad(lambda x, w: FORMS[form](x, Head(w), targets, jnp.ones((1, 4))), (0, 1))(
        source, head
    )
    assert [value.dtype, *(grad.dtype for grad in grads)] == [jnp.float32, jnp.bfloat16, jnp.float32]
    np.testing.assert_allclose(value, 4 * -np.log(50), rtol=1e-6)


def test_float32_log_probs_of_the_real_model_equal_its_reference():
    import json

    cfg, params = stories()
    sequences = json.loads((STORIES / "reference.json").read_text())["sequences"]
    model = Decoder(cfg, jnp.float32)
    for sequence in sequences:
        # The whole sequence as one answer to a prompt of its first token, so that all of the path is used.
        ids = np.asarray(sequence["ids"], np.int32)
        pair = tokens(ids[:1], ids[1:], [2])
        batch = row_batches([pair], RowShape(1, pair.slots, pair.scored))[0]
        hidden = model.apply(
            {"params": params}, batch.tokens_RT, batch.positions_RT, batch.segments_RT, batch.prompts_RT
        )
        source = jnp.take_along_axis(hidden, batch.sources_RS[..., None], axis=1)
        ours = np.asarray(token_logps(source, Head(params["embed_VD"]), batch.targets_RS))[0, : len(ids) - 1]
        np.testing.assert_allclose(ours, sequence["logprob"], atol=1e-4)
        result = pair_logps(model, {"params": params}, batch)
        np.testing.assert_allclose(result.mean_B2[0, 0], sequence["mean_logprob"], atol=1e-4)


def test_the_numpy_oracle_agrees_with_the_reference_too():
    import json

    sequence = json.loads((ROOT / "assets/stories260K/reference.json").read_text())["sequences"][0]
    ids = sequence["ids"][:20]
    np.testing.assert_allclose(next_token_logps(STORIES, ids), sequence["logprob"][:19], atol=1e-6)


def test_a_packed_pair_scores_as_each_answer_alone_after_its_prompt():
    cfg, params = stories()
    pairs = [p._replace(prompt=np.r_[np.int32(1), p.prompt]) for p in random_pairs(3, V=cfg.V, most=8)]
    result = pair_logps(Decoder(cfg, jnp.float32), {"params": params}, row_batches(pairs, SHAPE)[0])
    for number, pair in enumerate(pairs):
        for side, branch in enumerate(pair.branches):
            alone = next_token_logps(STORIES, np.concatenate([pair.prompt, branch]))[len(pair.prompt) - 1 :]
            np.testing.assert_allclose(result.logps_B2[number, side], alone.sum(), rtol=1e-5, atol=1e-4)
            assert result.lengths_B2[number, side] == len(branch)


def test_packed_equals_padded():
    params, pairs = random_params(TINY), random_pairs(7, V=TINY.V)
    model = Decoder(TINY, jnp.float32)
    shape = SHAPE._replace(R=1)  # more rows at a time are all used, a pair in each
    assert len(row_batches(pairs, shape)) < len(pairs)  # so some pairs do share a row
    alone = [scored(model, params, [pair], RowShape(1, 60, 40))[1].logps_B2 for pair in pairs]
    np.testing.assert_allclose(
        scored(model, params, pairs, shape)[1].logps_B2, np.concatenate(alone), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize(
    "shape", [RowShape(7, 60, 40), RowShape(4, 128, 128), RowShape(1, 64, 48), RowShape(3, 100, 70)], ids=str
)
def test_rows_batches_and_padding_change_neither_value_nor_gradient(shape):
    params, pairs = random_params(TINY), random_pairs(7, V=TINY.V)
    model = Decoder(TINY, jnp.float32)
    assert_same(scored(model, params, pairs), scored(model, params, pairs, shape))


def test_a_shared_prompt_equals_a_prompt_per_answer():
    params, pairs = random_params(TINY), random_pairs(5, V=TINY.V)
    model = Decoder(TINY, jnp.float32)
    mixture = jnp.asarray(np.random.default_rng(1).normal(size=(5, 2)), jnp.float32)

    def grads_of(batches):
        def objective(params):
            results = [pair_logps(model, {"params": params}, batch) for batch in batches]
            return sum((mixture * r.logps_B2).sum() for r in results), sum(r.logps_B2 for r in results)

        return jax.grad(objective, has_aux=True)(params)

    shared = grads_of(row_batches(pairs, SHAPE))
    sides = [np.tile([side == 0, side == 1], (5, 1)) for side in (0, 1)]
    apart = grads_of([batch for wanted in sides for batch in row_batches(pairs, SHAPE, wanted_B2=wanted)])
    np.testing.assert_allclose(shared[1], apart[1], rtol=1e-5, atol=1e-4)
    flat, other = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(g)]) for g in (shared[0], apart[0]))
    assert np.linalg.norm(flat - other) <= 1e-5 * np.linalg.norm(flat)


def test_tokens_that_are_not_scored_are_read():
    params, rng = random_params(TINY), np.random.default_rng(0)
    model = Decoder(TINY, jnp.float32)
    pair = pair_of(rng, (5, 6, 4), V=TINY.V, masks=[[0, 0, 1, 1, 1, 1], [1, 1, 1, 1]])
    longer_prompt = tokens(np.concatenate([pair.prompt, pair.chosen[:2]]), pair.chosen[2:], pair.rejected)
    results = [
        pair_logps(model, {"params": params}, row_batches([p], RowShape(1, 32, 16))[0]) for p in (pair, longer_prompt)
    ]
    np.testing.assert_allclose(results[0].logps_B2[0, 0], results[1].logps_B2[0, 0], rtol=1e-5)
    assert results[0].lengths_B2.tolist() == [[4, 4]]


def test_an_answer_scored_in_pieces_sums_those_after_all_that_stands_before_them():
    cfg, params = stories()
    pair = tokens([1, 20, 30], [40, 50, 60, 70, 80], [90, 100], masks=[[1, 0, 0, 1, 1], [0, 1]])
    result = pair_logps(Decoder(cfg, jnp.float32), {"params": params}, row_batches([pair], RowShape(1, 16, 8))[0])
    for side, (branch, mask) in enumerate(zip(pair.branches, pair.masks, strict=True)):
        alone = next_token_logps(STORIES, np.concatenate([pair.prompt, branch]))[len(pair.prompt) - 1 :]
        np.testing.assert_allclose(result.logps_B2[0, side], alone[mask].sum(), rtol=1e-5, atol=1e-4)
    assert result.lengths_B2.tolist() == [[3, 1]]


def test_an_unpaired_row_scores_its_one_answer():
    params, pairs = random_params(TINY), random_pairs(2, V=TINY.V)
    empty = {"rejected": pairs[0].rejected[:0], "rejected_mask": pairs[0].rejected_mask[:0]}
    model = Decoder(TINY, jnp.float32)
    paired, unpaired = (
        pair_logps(model, {"params": params}, row_batches([first, pairs[1]], SHAPE)[0])
        for first in (pairs[0], pairs[0]._replace(**empty))
    )
    assert unpaired.lengths_B2.tolist() == [[len(pairs[0].chosen), 0], paired.lengths_B2[1].tolist()]
    np.testing.assert_allclose(unpaired.logps_B2[0], [paired.logps_B2[0, 0], 0], rtol=1e-5)
    np.testing.assert_allclose(unpaired.logps_B2[1], paired.logps_B2[1], rtol=1e-5)


# Weights


def weighted_pairs(V):
    """Pairs with the weights of either kind, some of their tokens not scored, and one pair without weights."""
    rng = np.random.default_rng(2)
    pairs = [
        pair_of(rng, (3, 6, 4), V=V, masks=[[1, 0, 1, 1, 0, 1], [1, 1, 0, 1]]),
        pair_of(rng, (2, 2, 5), V=V),
        pair_of(rng, (4, 5, 1), V=V),
        pair_of(rng, (1, 3, 3), V=V),
    ]
    return [temporal_decay(pairs[0], gamma=0.8), ld(pairs[1], alpha=0.25), ld(pairs[2], alpha=0.0), pairs[3]]


def test_weighted_sums_are_those_of_float64_numpy_in_value_and_gradient(tmp_path):
    cfg, params = stories()
    pairs = weighted_pairs(cfg.V)
    mixture = np.asarray(jnp.asarray(np.random.default_rng(1).normal(size=(len(pairs), 2)), jnp.float32), np.float64)
    start = safetensors.numpy.load_file(STORIES / "model.safetensors")

    def oracle(weights):
        (tmp_path / "config.json").write_bytes((STORIES / "config.json").read_bytes())
        safetensors.numpy.save_file(weights, tmp_path / "model.safetensors")
        sums = np.zeros((len(pairs), 2))
        for number, pair in enumerate(pairs):
            for side, (branch, mask) in enumerate(zip(pair.branches, pair.masks, strict=True)):
                logps = next_token_logps(tmp_path, [*pair.prompt, *branch])[len(pair.prompt) - 1 :][mask]
                sums[number, side] = logps.sum() if pair.weights is None else logps @ pair.weights[side]
        return sums

    grads, result = scored(Decoder(cfg, jnp.float32), params, pairs)
    np.testing.assert_allclose(result.logps_B2, oracle(start), rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(result.lengths_B2, [[4, 3], [2, 5], [5, 1], [3, 3]])  # weights change no length

    # The slope of the oracle in a random direction, against the gradient's share of that direction.
    rng, step = np.random.default_rng(0), 1e-4
    ours = dict(hf_tensors(jax.tree.map(np.float32, grads), cfg, dtypes="float32"))
    for _ in range(2):
        direction = {name: rng.normal(size=tensor.shape) * abs(tensor).mean() for name, tensor in start.items()}
        up, down = (oracle({name: start[name] + sign * step * direction[name] for name in start}) for sign in (1, -1))
        slope = (mixture * (up - down)).sum() / (2 * step)
        np.testing.assert_allclose(sum((ours[name] * direction[name]).sum() for name in start), slope, rtol=1e-4)


def test_rows_batches_and_padding_change_no_weighted_value_or_gradient():
    params, pairs = random_params(TINY), weighted_pairs(TINY.V)
    model = Decoder(TINY, jnp.float32)
    padded = scored(model, params, pairs, RowShape(4, 14, 10))
    for shape in (SHAPE, RowShape(1, 32, 20)):
        assert_same(padded, scored(model, params, pairs, shape))


def test_an_answer_that_is_in_no_row_has_sum_and_length_zero():
    params, pairs = random_params(TINY), random_pairs(2, V=TINY.V)
    wanted = np.array([[True, False], [False, False]])
    result = pair_logps(Decoder(TINY, jnp.float32), {"params": params}, row_batches(pairs, SHAPE, wanted_B2=wanted)[0])
    assert result.lengths_B2.tolist() == [[len(pairs[0].chosen), 0], [0, 0]]
    assert (np.asarray(result.logps_B2) != 0).tolist() == [[True, False], [False, False]]


def test_bfloat16_stays_within_rounding_of_float32_in_value_and_gradient():
    cfg, params = stories()
    pairs = [p._replace(prompt=np.r_[np.int32(1), p.prompt]) for p in random_pairs(8, V=cfg.V)]
    (grads, exact), (low_grads, low) = (
        scored(Decoder(cfg, dtype), params, pairs) for dtype in (jnp.float32, jnp.bfloat16)
    )
    np.testing.assert_allclose(low.logps_B2 / low.lengths_B2, exact.logps_B2 / exact.lengths_B2, atol=0.1)
    flat, low_flat = (np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(g)]) for g in (grads, low_grads))
    assert flat @ low_flat >= 0.99 * np.linalg.norm(flat) * np.linalg.norm(low_flat)


@pytest.mark.slow
def test_in_bfloat16_the_gradient_of_a_frequent_token_is_still_summed_in_float32():
    """2048 times the same small cotangent: a bfloat16 sum stalls at a fraction of it."""
    params = random_params(TINY)
    batch = (jnp.full((1, 2048), 7), jnp.zeros((1, 2048), jnp.int32), jnp.arange(2048)[None], jnp.arange(2048)[None])

    def summed(dtype):
        model = Decoder(TINY, dtype)  # each token is a segment of its own, so all hidden states are equal
        return jax.grad(lambda p: model.apply({"params": p}, *batch)[..., 0].astype(jnp.float32).sum())(params)[
            "embed_VD"
        ][7]

    exact, low = summed(jnp.float32), summed(jnp.bfloat16)
    assert jnp.linalg.norm(low - exact) <= 0.1 * jnp.linalg.norm(exact)
