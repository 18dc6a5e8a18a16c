"""Which batch is step i's: a shuffle without a table, and sources over it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sae_jax
from sae_jax import InputError
from sae_jax.data.permutation import divmod_product, mix, permute

keys = st.integers(0, 2**32 - 1)


jitted_permute = jax.jit(permute, static_argnums=1)


def order(size, key):
    return np.asarray(jitted_permute(jnp.arange(size, dtype=jnp.uint32), size, jnp.uint32(key)))


# The permutation


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 5000), keys)
def test_permute_is_a_bijection(size, key):
    np.testing.assert_array_equal(np.sort(order(size, key)), np.arange(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 12, 16, 17, 4095, 4096, 4097])
def test_permute_is_a_bijection_at_edges(size):
    np.testing.assert_array_equal(np.sort(order(size, 7)), np.arange(size))


def test_permute_stays_in_range_just_below_its_limit():
    size = 2**30 - 1
    index = jnp.uint32(np.random.default_rng(0).choice(size, 10_000, replace=False))
    where = np.asarray(permute(index, size, jnp.uint32(3)))
    assert where.max() < size
    assert len(np.unique(where)) == 10_000
    assert where.mean() == pytest.approx(size / 2, rel=0.02)


def test_different_keys_give_different_orders():
    orders = {tuple(order(100, key)) for key in range(50)}
    assert len(orders) == 50


def test_one_key_per_index():
    both = permute(jnp.arange(10, dtype=jnp.uint32), 10, jnp.uint32([3] * 5 + [9] * 5))
    assert both.tolist() == [*order(10, 3)[:5].tolist(), *order(10, 9)[5:].tolist()]


@pytest.mark.parametrize("size", [10, 13])
def test_every_row_is_about_equally_likely_everywhere(size):
    trials = 20_000
    shuffle = jax.vmap(lambda key: permute(jnp.arange(size, dtype=jnp.uint32), size, key))
    orders = np.asarray(shuffle(mix(jnp.arange(trials, dtype=jnp.uint32))))
    counts = np.stack([np.bincount(column, minlength=size) for column in orders.T])
    expected = trials / size
    # size^2 cells of a binomial: chi-square with (size - 1)^2 degrees of freedom, six deviations allowed
    freedom = (size - 1) ** 2
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - freedom) < 6 * (2 * freedom) ** 0.5
    # and neighbours are not kept together: a fair shuffle puts i + 1 after i with probability 1 / size.
    # Six Feistel half-rounds on pairs as small as (4, 4) come within a tenth of that.
    together = (np.diff(orders.astype(int), axis=1) == 1).mean()
    assert together == pytest.approx(1 / size, rel=0.15)


def test_mix_is_one_to_one_on_a_sample():
    values = np.asarray(mix(jnp.arange(100_000, dtype=jnp.uint32)))
    assert len(np.unique(values)) == 100_000


division = jax.jit(divmod_product, static_argnums=(1, 2))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_divmod_product_is_big_integer_arithmetic(data):
    size = data.draw(st.one_of(st.integers(1, 2**30 - 1), st.integers(1, 50)))
    factor = data.draw(st.one_of(st.integers(1, size), st.just(size)))
    for i in (data.draw(st.integers(0, 2**31 - 1)), 0, 2**31 - 1):
        quotient, remainder = divmod(i * factor, size)
        ours = division(jnp.uint32(i), factor, size)
        assert (int(ours[0]), int(ours[1])) == (quotient % 2**32, remainder)


# In memory


def numbered(n, width=2):
    return np.arange(n * width, dtype=np.float32).reshape(n, width)


@settings(max_examples=8, deadline=None)
@given(st.integers(2, 40), st.integers(1, 39), st.integers(0, 1000))
def test_every_row_comes_once_per_epoch(n, batch_size, seed):
    batch_size = min(batch_size, n - 1)
    source = sae_jax.in_memory(numbered(n, 1), batch_size, seed)
    epochs = 3
    steps = -(-epochs * n // batch_size)
    seen = np.asarray(jax.jit(jax.vmap(source.batch))(jnp.arange(steps)).x).reshape(-1)[: epochs * n]
    for epoch in seen.reshape(epochs, n):
        assert sorted(epoch.tolist()) == list(range(n))


def test_epochs_and_seeds_shuffle_differently():
    n = 30
    orders = set()
    batches_of = jax.jit(lambda source: jax.vmap(source.batch)(jnp.arange(12)).x)
    for seed in range(4):
        batches = batches_of(sae_jax.in_memory(numbered(n, 1), 10, seed))
        orders |= {tuple(epoch.tolist()) for epoch in np.asarray(batches).reshape(4, n)}
    assert len(orders) == 16
    assert tuple(range(n)) not in orders


def test_a_batch_depends_on_its_number_only():
    source = sae_jax.in_memory(numbered(23), 5, seed=2)
    jitted = jax.jit(lambda source, i: source.batch(i).x)
    forward = [np.asarray(jitted(source, jnp.int32(i))) for i in range(12)]
    np.testing.assert_array_equal(source.batch(jnp.int32(3)).x, forward[3])
    for i in reversed(range(12)):
        np.testing.assert_array_equal(jitted(source, jnp.int32(i)), forward[i])
    again = sae_jax.in_memory(numbered(23), 5, seed=2)
    np.testing.assert_array_equal(again.batch(jnp.int32(7)).x, forward[7])
    far = source.batch(jnp.int32(2**31 - 1)).x
    assert len(np.unique(np.asarray(far)[:, 0])) == 5


@pytest.mark.parametrize("batch_size", [8, 9, 1000])
def test_a_full_batch_is_all_rows_in_order(batch_size):
    x = numbered(8)
    source = sae_jax.in_memory(x, batch_size, seed=3)
    assert source.batch_size == 8
    for i in (0, 1, 5):
        np.testing.assert_array_equal(source.batch(jnp.int32(i)).x, x)


def test_targets_stay_with_their_rows():
    x = numbered(20)
    source = sae_jax.in_memory(x, 6, y=x.sum(axis=1, keepdims=True))
    for i in range(3):
        batch = source.batch(jnp.int32(i))
        assert batch.y.shape == (6, 1)
        np.testing.assert_array_equal(batch.x.sum(axis=1, keepdims=True), batch.y)
    for batch in source.evaluation(20):
        np.testing.assert_array_equal(batch.x.sum(axis=1, keepdims=True), batch.y)


def test_without_targets_the_input_is_the_target():
    batch = sae_jax.in_memory(numbered(8), 3).batch(jnp.int32(0))
    np.testing.assert_array_equal(batch.x, batch.y)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 80))
def test_evaluation_covers_each_row_at_most_once(n, batch_size, rows):
    batches = [
        np.asarray(batch.x) for batch in sae_jax.in_memory(numbered(n, 1), batch_size).evaluation(rows)
    ]
    seen = np.concatenate(batches)[:, 0].tolist()
    assert len(set(seen)) == len(seen)
    assert seen == sorted(seen)
    if rows >= n:
        assert seen == list(range(n))
    else:
        assert len(seen) == rows
        assert rows == 1 or (seen[0], seen[-1]) == (0, n - 1)
    assert all(len(batch) <= batch_size for batch in batches)


X = np.ones((4, 2), np.float32)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sae_jax.in_memory(np.ones(4, np.float32)), r"x must be \[rows, width\] .*, got \(4,\)"),
        (lambda: sae_jax.in_memory(np.ones((4, 2, 1, 1), np.float32)), r"got \(4, 2, 1, 1\)"),
        (lambda: sae_jax.in_memory(X[:0]), "x has no rows"),
        (lambda: sae_jax.in_memory(X.astype(int)), "x must be floating point, got int64"),
        (lambda: sae_jax.in_memory(X.astype(complex)), "x must be floating point, got complex128"),
        (lambda: sae_jax.in_memory(X, y=X[:3]), "x has 4 rows but y has 3"),
        (lambda: sae_jax.in_memory(X, y=X[:, 0]), r"y must be \[rows, width\]"),
        (lambda: sae_jax.in_memory(X, y=X.astype(int)), "y must be floating point"),
        (lambda: sae_jax.in_memory(X, batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda: sae_jax.in_memory(X, batch_size=-3), "batch_size must be at least 1, got -3"),
        (lambda: sae_jax.in_memory(X, seed=-1), "seed"),
        (lambda: sae_jax.in_memory(X, seed=2**32), "seed"),
        (lambda: sae_jax.in_memory(np.broadcast_to(np.float32(0), (2**30, 1))), r"fewer than 2\^30 rows"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(make, message, unchecked):
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


# The seed's tokens


def test_the_seed_tokens_are_the_posts(tokens):
    assert tokens.x.shape == (8, 4)
    assert tokens.x.dtype == np.float32
    assert tokens.names[6] == "robot"
    np.testing.assert_array_equal(tokens.x[6], np.float32([0.0, 0.7, 0.9, 0.8]))
    assert tokens.x.sum() == pytest.approx(13.42, abs=0.005)
    assert set().union(*tokens.truth.values()) == set(tokens.names)


def test_a_feature_is_found_when_a_latent_is_active_on_exactly_its_tokens(tokens):
    animal = np.float32([1, 1, 1, 1, 0, 0, 0, 0])
    artificial = np.float32([0, 0, 0, 0, 0, 0, 1, 1])
    almost = np.float32([1, 1, 1, 1, 0, 0, 0, 0.1])
    f = np.stack([np.stack([artificial, animal], axis=1), np.stack([almost, 0 * animal], axis=1)])
    found = sae_jax.synthetic.features_found(f, tokens)
    assert found.tolist() == [[True, True, False], [False, False, False]]
