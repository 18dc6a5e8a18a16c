"""The sparse way through a step gives what the dense one gives, and touches the chosen entries alone."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sae_jax
from sae_jax import Batch, InputError, auxk, linear, losses, segments, selection, sharding, sparse
from sae_jax.base import Progress


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def ragged(lengths, seed=0):
    """Values, rows and starts of segments so long, with three entries of none behind them."""
    rng, count = np.random.default_rng(seed), int(sum(lengths)) + 3
    values, rows = rng.normal(size=count), rng.integers(0, 9, count).astype(np.int32)
    return values, rows, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.one_of(st.integers(0, 4), st.integers(15, 90)), min_size=1, max_size=12),
    turned=st.booleans(),
)
def test_sums_by_segments(lengths, turned):
    # always as many segments and entries, so that little is compiled
    lengths = [*lengths, *[0] * (300 - len(lengths))]
    values, rows, starts = ragged(lengths)
    values, rows = np.resize(values, 1200).astype(np.float32), np.resize(rows, 1200)
    table = numbers(9, 6).astype(np.float32)
    expected = np.array([values[a:b] @ table[rows[a:b]] for a, b in pairwise(starts)])
    sums = jax.jit(partial(segments.fused_segment_sum, turned=turned))(values, rows, starts, table)
    # sums of at most 90 terms of about 1, each rounded to 6e-8 of itself
    np.testing.assert_allclose(sums.T if turned else sums, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [5, 40])
def test_dots_of_pairs_of_rows(x64, width):
    left, right = numbers(700, width), numbers(11, width, seed=1)
    columns = np.arange(2800, dtype=np.int32) % 11
    rows = np.repeat(np.arange(700, dtype=np.int32), 4)
    dots = segments.gathered_dots(*map(jnp.asarray, (left, rows, right, columns)))
    # forty terms of about 1 in another order; where they cancel, what is left is no larger than rounding
    np.testing.assert_allclose(dots, (left[rows] * right[columns]).sum(axis=-1), rtol=1e-12, atol=1e-14)


WAYS = {
    "topk": partial(sae_jax.topk, k=3, auxk_loss=auxk.normalised),
    "topk-rescaled": partial(
        sae_jax.topk, k=3, rescale_acts_by_decoder_norm=True, reconstruction=losses.unexplained
    ),
    "topk-whole-input": partial(sae_jax.topk, k=20, auxk=0, apply_b_dec_to_input=False),
    "batch-topk": partial(sae_jax.batch_topk, k=2.5, auxk_loss=auxk.attached),
    "batch-topk-rescaled": partial(sae_jax.batch_topk, k=3, rescale_acts_by_decoder_norm=True),
}


@pytest.mark.parametrize("dead", [False, True], ids=["all-alive", "some-dead"])
@pytest.mark.parametrize("way", WAYS)
def test_losses_and_gradients_equal_the_dense_ones(x64, way, dead):
    d_in, d_sae, rows = 9, 512, 70
    dense, few = (WAYS[way](d_in, d_sae, dead_after=3, sparse=sparse) for sparse in (False, True))
    params = dense.init(jax.random.key(0), jnp.float64)
    params = {
        name: leaf + 0.05 * numbers(*leaf.shape, seed=i) for i, (name, leaf) in enumerate(params.items())
    }
    batch = Batch(*[jnp.asarray(numbers(rows, d_in, seed=9))] * 2)
    silent = jnp.where(jnp.arange(d_sae) % 3 == 0, 10 * dead, 0).astype(jnp.int32)
    progress = Progress(jnp.int32(4), silent)
    (ours, told), gradient = jax.jit(jax.value_and_grad(few.loss, has_aux=True))(params, batch, progress)
    (theirs, asked), expected = jax.jit(jax.value_and_grad(dense.loss, has_aux=True))(params, batch, progress)
    if "auxk" in asked.logs:
        assert bool(asked.logs["auxk"] > 0) == dead
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    np.testing.assert_array_equal(told.fired, asked.fired)
    for tree, other in ((told.logs, asked.logs), (told.assigned, asked.assigned), (gradient, expected)):
        assert tree.keys() == other.keys()
        for name in tree:
            size = np.abs(other[name]).max()
            np.testing.assert_allclose(tree[name], other[name], rtol=0, atol=1e-11 * size + 1e-300)


def test_products_are_rounded_where_that_is_asked():
    dense, few = (sae_jax.topk(16, 1024, k=4, sparse=sparse) for sparse in (False, True))
    params, progress = dense.init(jax.random.key(0)), Progress(jnp.int32(0), jnp.zeros(1024, jnp.int32))
    batch = Batch(*[jnp.asarray(numbers(64, 16), jnp.float32)] * 2)

    def gradient(sae):
        return jax.jit(jax.grad(lambda params: sae.loss(params, batch, progress)[0]))(params)

    exact = gradient(dense)
    with linear.precision("bfloat16"):
        ours, theirs = gradient(few), gradient(dense)
    for name in ("W_enc", "W_dec"):
        size = np.abs(exact[name]).max()
        # as the dense way rounds, to the order of sums in float32; 8 bits away from what is not rounded
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-5 * size)
        assert np.abs(ours[name] - exact[name]).max() > 1e-4 * size


def test_only_the_encoder_is_a_product_of_whole_matrices():
    def products(sparse):
        sae = sae_jax.topk(16, 1024, k=2, sparse=sparse)
        batch, progress = (
            Batch(jnp.ones((32, 16)), jnp.ones((32, 16))),
            Progress(jnp.int32(0), jnp.zeros(1024, jnp.int32)),
        )
        step = jax.jit(jax.grad(lambda params: sae.loss(params, batch, progress)[0]))
        text = step.lower(sae.init(jax.random.key(0))).as_text()
        return sum("dot_general" in line and "32x1024" in line for line in text.splitlines())

    # with AuxK and without, a branch each, of which one is taken
    assert products(True) == 2
    assert products(False) > 4


def test_a_gradient_by_the_data_is_refused():
    sae = sae_jax.topk(4, 64, k=2, sparse=True)
    params, progress = sae.init(jax.random.key(0)), Progress(jnp.int32(0), jnp.zeros(64, jnp.int32))

    def of_data(x):
        return sae.loss(params, Batch(x, x), progress)[0]

    with pytest.raises(InputError, match="sparse=False"):
        jax.grad(of_data)(jnp.ones((8, 4)))


def test_it_is_chosen_by_size_unless_it_is_asked_for():
    large = {"rows": 1024, "d_in": 512, "d_sae": 16384, "k": 32}
    assert sparse.pays(None, **large)
    assert not sparse.pays(False, **large)
    assert not sparse.pays(None, **{**large, "rows": 1})
    assert not sparse.pays(None, **{**large, "k": 4096})
    assert sparse.pays(True, **{**large, "k": 4096})


def test_a_mesh_takes_the_dense_way():
    with jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh((2, 1, 1), sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    ):
        assert not sparse.pays(True, 1024, 512, 16384, 32)


# What is largest


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_the_largest_of_long_rows_are_those_of_a_stable_sort(data):
    some = st.sampled_from([-np.inf, -1.0, -0.0, 0.0, 1.0, 2.0, 3.0, np.inf, np.nan])
    values = np.array(data.draw(st.lists(some, min_size=205, max_size=205)), np.float32)[None]
    best, where = jax.jit(selection.top, static_argnums=1)(jnp.asarray(values), 3)
    known = np.where(np.isnan(values), np.inf, values)
    expected = np.argsort(-known[0], kind="stable")[:3]
    np.testing.assert_array_equal(where[0], expected)
    np.testing.assert_array_equal(best[0], known[0][expected])


@pytest.mark.parametrize("k", [0, 1, 5, 8])
@pytest.mark.parametrize("n", [40, 400])
def test_fewer_entries_than_there_is_room_for(k, n):
    values = np.round(numbers(6, n), 1).astype(np.float32)
    where, used = jax.jit(lambda values, k: selection.entries(values, k, 8))(values, k)
    for row, places, chosen in zip(values, where, used, strict=True):
        np.testing.assert_array_equal(places[chosen], np.sort(np.argsort(-row, kind="stable")[:k]))


def mask_of(values, count):
    expected = np.zeros(values.size, bool)
    expected[np.argsort(-values.reshape(-1), kind="stable")[:count]] = True
    return expected.reshape(values.shape)


@pytest.mark.parametrize("kind", ["spread", "in one row", "in one latent", "in one tile", "all the same"])
def test_the_largest_of_a_batch_wherever_they_lie(kind):
    rows, n, count = 8, 1024, 128
    values = numbers(rows, n).astype(np.float32)
    row, column = np.indices(values.shape)
    large = {
        "spread": (row + column) % 97 == 0,
        "in one row": row == 3,
        "in one latent": column == 5,
        # more of them than a tile is asked for
        "in one tile": ((row + column // (n // 16)) % rows == 0) & (column % 7 == 0),
        "all the same": values == np.inf,
    }[kind]
    values = np.where(large, values + 20, values) if kind != "all the same" else np.ones_like(values)
    mask = jax.jit(lambda values: selection.largest_of_all(values, count))(jnp.asarray(values))
    np.testing.assert_array_equal(mask, mask_of(values, count))
    places, used = jax.jit(lambda values: selection.entries_of_all(values, count))(jnp.asarray(values))
    np.testing.assert_array_equal(np.sort(places[used]), np.flatnonzero(mask_of(values, count)))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.one_of(st.integers(-3, 3).map(float), st.just(-np.inf), st.just(np.inf)), min_size=7, max_size=7
    ),
    st.integers(1, 7),
)
def test_the_kth_largest_bit_by_bit(values, k):
    values = np.array(values, np.float32) + np.float32(0)
    kth = jax.jit(selection._kth)
    assert kth(jnp.asarray(values), jnp.int32(k)) == np.sort(values)[::-1][k - 1]
    whole = (
        np.nan_to_num(values, posinf=2**31 - 1, neginf=-(2**31)).astype(np.int64).clip(-(2**31), 2**31 - 1)
    )
    whole = whole.astype(np.int32)
    assert kth(jnp.asarray(whole), jnp.int32(k)) == np.sort(whole)[::-1][k - 1]


# Activity


@pytest.mark.parametrize("rows", [5, 64, 100])
def test_activity_of_a_batch(rows):
    f = np.maximum(numbers(rows, 40) - 2, 0).astype(np.float32)
    found = jax.jit(sae_jax.activations.activity)(jnp.asarray(f))
    np.testing.assert_array_equal(found.active, (f > 0).any(axis=0))
    np.testing.assert_allclose(found.l0, (f > 0).sum(axis=-1).mean(), rtol=1e-6)
