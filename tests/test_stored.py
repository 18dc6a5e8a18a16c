"""Rows from a disk as a source: every row once, the same rows for the same step, read ahead or not."""

import threading
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sae_jax
from sae_jax import InputError, normalise
from sae_jax.data import Rows, side_by_side, stages, stored
from sae_jax.data.order import Order


def rows_of(array, chunk_rows=8, label="rows"):
    return Rows(array.shape, array.dtype, chunk_rows, label, lambda start, stop: array[start:stop])


def numbered(n, d=3, dtype=np.float32):
    """Rows that say which row they are."""
    return (np.arange(n)[:, None] + np.zeros(d)).astype(dtype)


def seen(source, start, steps):
    """The row numbers of each step, as they are read ahead."""
    found = [
        np.asarray(stage.batch(jnp.int32(i)).x[:, 0])
        for stage, stop in stages(source, start, steps)
        for i in range(int(stage.first), stop)
    ]
    return np.stack(found).astype(int)


# The order

shapes = st.tuples(st.integers(1, 300), st.integers(1, 40), st.integers(1, 9))


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 2**32 - 1), st.integers(0, 3))
def test_every_row_comes_once_per_epoch(shape, seed, epoch):
    n, chunk_rows, window = shape
    order = Order(n, chunk_rows, window, batch_size=min(7, n), seed=seed)
    found = order.rows_of(epoch * n, (epoch + 1) * n)
    assert sorted(found.tolist()) == list(range(n))


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 700), st.integers(1, 200))
def test_a_stretch_of_the_stream_does_not_depend_on_where_one_begins(shape, first, length):
    n, chunk_rows, window = shape
    order = Order(n, chunk_rows, window, batch_size=min(7, n), seed=3)
    whole = order.rows_of(0, first + length)
    assert order.rows_of(first, first + length).tolist() == whole[first:].tolist()


@settings(max_examples=60, deadline=None)
@given(shapes, st.sampled_from([1, 2, 4]), st.integers(1, 4), st.integers(0, 100))
def test_the_shares_of_hosts_make_up_the_whole_batch(shape, hosts, several, start):
    n, chunk_rows, window = shape
    lanes = hosts * several
    size = lanes * max(1, min(24, n) // lanes)
    if size > n:
        return
    x = rows_of(numbered(n), chunk_rows)
    made = partial(stored, x, size, 5, window_rows=window * chunk_rows, lanes=lanes)
    whole = seen(made(), start, start + 3)
    parts = [seen(made(share=(which, hosts)), start, start + 3) for which in range(hosts)]
    assert np.concatenate(parts, axis=1).tolist() == whole.tolist()


def test_a_share_reads_few_chunks_of_each_window():
    touched = set()
    array = numbered(4096)

    def read(start, stop):
        touched.add(start)
        return array[start:stop]

    x = Rows(array.shape, array.dtype, 64, "rows", read)
    source = stored(x, 64, window_rows=4096, lanes=4, share=(1, 4))
    touched.clear()
    seen(source, 0, 64)
    assert 16 <= len(touched) <= 17  # of 64, and one more that it shares with its neighbour


def test_seeds_and_epochs_have_orders_of_their_own():
    orders = [Order(200, 10, 4, 10, seed).rows_of(200 * epoch, 200 * epoch + 200).tolist()
              for seed in (0, 1) for epoch in (0, 1)]  # fmt: skip
    assert len({tuple(order) for order in orders}) == 4


def test_the_order_is_the_same_on_every_machine():
    assert Order(20, 4, 2, 5, 0).rows_of(0, 20).tolist() == [
        2, 0, 1, 15, 13, 3, 12, 14, 9, 11, 8, 5, 4, 7, 6, 10, 17, 18, 16, 19,
    ]  # fmt: skip


def test_neighbours_part():
    """Of the rows of a context, about as many meet in a batch as window and batch size let expect."""
    n, context, batch, window = 65_536, 128, 256, 16_384
    found = Order(n, 1024, window // 1024, batch, 0).rows_of(0, n) // context
    sizes = [np.unique(each, return_counts=True)[1] for each in found.reshape(-1, batch)]
    pairs = np.mean([(size * (size - 1) / 2).sum() for size in sizes])
    assert pairs == pytest.approx(batch * (batch - 1) / 2 * (context - 1) / (window - 1), rel=0.02)


# The source


@pytest.mark.parametrize("n", [5, 64, 250])
@pytest.mark.parametrize("batch_size", [5, 24, 64])
def test_what_is_read_ahead_is_what_each_step_is_asked_for(n, batch_size):
    source = stored(rows_of(numbered(n)), batch_size, 1, window_rows=32)
    ahead = seen(source, 0, 12)
    alone = [np.asarray(source.batch(jnp.int32(i)).x[:, 0]).astype(int).tolist() for i in range(12)]
    assert ahead.tolist() == alone
    assert seen(source, 7, 12).tolist() == alone[7:]


def test_a_batch_can_be_asked_for_inside_a_compiled_function():
    source = stored(rows_of(numbered(100)), 10)
    traced = jax.jit(lambda source, i: source.batch(i).x)(source, jnp.int32(4))
    np.testing.assert_array_equal(traced, source.batch(jnp.int32(4)).x)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float32])
def test_half_precision_is_widened_on_the_device(dtype):
    source = stored(rows_of(numbered(64, dtype=dtype)), 8)
    stage, _ = next(stages(source, 0, 2))
    assert stage.columns[0].dtype.itemsize == np.dtype(dtype).itemsize
    batch = stage.batch(jnp.int32(0))
    assert batch.x.dtype == np.float32
    assert batch.x[:, 0].tolist() == source.order.rows_of(0, 8).tolist()


def test_double_precision_stays_where_it_is_on(x64):
    source = stored(rows_of(numbered(64, dtype=np.float64)), 8)
    stage, _ = next(stages(source, 0, 2))
    assert stage.batch(jnp.int32(0)).x.dtype == np.float64


def test_blocks_keep_their_rows_while_later_ones_are_read():
    """Memory is used again only when nothing refers to it."""
    source = stored(rows_of(numbered(512)), 8, window_rows=64)
    held = list(stages(source, 0, 64))
    again = seen(source, 0, 64)
    kept = [np.asarray(stage.batch(jnp.int32(i)).x[:, 0]) for stage, stop in held
            for i in range(int(stage.first), stop)]  # fmt: skip
    assert np.stack(kept).astype(int).tolist() == again.tolist()


def test_targets_are_of_the_same_rows():
    x = numbered(100)
    source = stored(rows_of(x), 10, y=rows_of(-np.tile(x, 2), chunk_rows=8))
    stage, _ = next(stages(source, 0, 3))
    batch = stage.batch(jnp.int32(2))
    np.testing.assert_array_equal(batch.y[:, 0], -batch.x[:, 0])
    assert batch.y.shape == (10, 6)
    np.testing.assert_array_equal(source.batch(jnp.int32(2)).y, batch.y)


def test_sites_stand_side_by_side_for_a_crosscoder():
    x = numbered(64)
    source = stored(side_by_side([rows_of(x), rows_of(x + 1000)]), 8)
    batch = source.batch(jnp.int32(0))
    assert batch.x.shape == (8, 2, 3)
    np.testing.assert_array_equal(batch.x[:, 1], batch.x[:, 0] + 1000)


@pytest.mark.parametrize(("n", "rows"), [(100, 1000), (100, 100), (1000, 200), (7, 3), (64, 64), (65, 65)])
def test_evaluation_looks_at_rows_once_and_at_about_as_many_as_asked(n, rows):
    source = stored(rows_of(numbered(n)), 10)
    batches = [np.asarray(batch.x[:, 0]).astype(int) for batch in source.evaluation(rows)]
    found = np.concatenate(batches)
    assert len(np.unique(found)) == len(found)
    assert all(0 < len(batch) <= 10 for batch in batches)
    assert min(rows, n) - 8 <= len(found) <= min(n, rows + 2 * 8)
    if rows >= n:
        assert sorted(found.tolist()) == list(range(n))
    elif n > 100:
        assert found.max() > 0.9 * n


def test_normalised_rows_are_read_ahead_too():
    x = numbered(100) + np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    plain = stored(rows_of(x), 10)
    source = normalise.normalised(plain, normalise.centring(x))
    (first, _), (raw, _) = next(stages(source, 0, 4)), next(stages(plain, 0, 4))
    assert first.source.columns
    np.testing.assert_allclose(
        first.batch(jnp.int32(3)).x, raw.batch(jnp.int32(3)).x - x.mean(axis=0), atol=1e-4
    )


# Training


def factory_and_grid():
    return partial(sae_jax.relu, d_in=6, d_sae=12), sae_jax.grid(l1=[0.01, 0.1], lr=[1e-2], seed=[0, 1])


@pytest.fixture
def activations():
    return np.random.default_rng(0).normal(size=(1000, 6)).astype(np.float32)


def test_a_sweep_from_a_store_is_the_sweep_on_the_same_batches(activations):
    """Each member against plain steps over the rows in the order that is promised."""
    factory, grid = factory_and_grid()
    source = stored(rows_of(activations, 64), 32, window_rows=256)
    taken = source.order.rows_of(0, 50 * 32)
    batches = jnp.asarray(activations[taken]).reshape(50, 32, 6)
    ahead = sae_jax.sweep(factory, grid=grid, source=source, steps=50)
    params = [ahead.member(i).params for i in range(4)]
    for i in range(4):
        sae = factory(l1=float(ahead.table["l1"][i]))
        step = jax.jit(sae_jax.make_step(sae, optax.adam(1e-2)))
        state = sae_jax.init(sae, optax.adam(1e-2), jax.random.key(int(ahead.table["seed"][i])))
        for k in range(50):
            state, _ = step(state, sae_jax.Batch(batches[k], batches[k]))
        np.testing.assert_allclose(params[i]["W_dec"], state.params["W_dec"], rtol=1e-4, atol=1e-5)


def test_a_stopped_sweep_goes_on_to_the_same_bits(activations, tmp_path):
    factory, grid = factory_and_grid()
    make = partial(stored, rows_of(activations, 64), 32, window_rows=128)
    whole = sae_jax.sweep(factory, grid=grid, source=make(), steps=60)
    stop_at = iter([False, False, False, True])
    with pytest.raises(sae_jax.Stopped):
        sae_jax.sweep(factory, grid=grid, source=make(), steps=60, checkpoints=tmp_path / "c",
                      look=lambda look: next(stop_at, False))  # fmt: skip
    resumed = sae_jax.sweep(factory, grid=grid, source=make(), steps=60, checkpoints=tmp_path / "c")
    for name, leaf in whole.params.items():
        np.testing.assert_array_equal(leaf, resumed.params[name])


def test_other_data_are_no_resumption(activations, tmp_path):
    factory, grid = factory_and_grid()
    sae_jax.sweep(factory, grid=grid, source=stored(rows_of(activations), 32), steps=5,
                  checkpoints=tmp_path / "c")  # fmt: skip
    for other in (stored(rows_of(activations + 1), 32), stored(rows_of(activations), 32, 1),
                  stored(rows_of(activations), 32, window_rows=64)):  # fmt: skip
        with pytest.raises(InputError, match="data was"):
            sae_jax.sweep(factory, grid=grid, source=other, steps=5, checkpoints=tmp_path / "c")
    # where the same rows lie does not matter
    moved = stored(rows_of(activations.copy(), label="elsewhere"), 32)
    sae_jax.sweep(factory, grid=grid, source=moved, steps=5, checkpoints=tmp_path / "c")


def test_another_block_compiles_nothing(activations, compilations):
    factory, _ = factory_and_grid()
    step = jax.vmap(sae_jax.make_step(factory(l1=0.1), optax.adam(1e-2)), in_axes=(0, None))
    start = jax.vmap(lambda key: sae_jax.init(factory(l1=0.1), optax.adam(1e-2), key))
    state = start(jax.random.split(jax.random.key(0), 2))
    source = stored(rows_of(activations, 64), 32, window_rows=128)
    sae_jax.run(step, state, source, 60)
    before = len(compilations)
    sae_jax.run(step, state, source, 60)
    assert len(compilations) == before


def test_an_error_while_reading_ahead_ends_the_run_and_its_thread():
    array = numbered(400, 6)

    def read(start, stop):
        if start >= 200:
            raise InputError("chunk 25 is damaged")
        return array[start:stop]

    factory, grid = factory_and_grid()
    source = stored(rows_of(array), 8, window_rows=32)
    source = source.replace(x=Rows(array.shape, array.dtype, 8, "rows", read))
    before = threading.active_count()
    with pytest.raises(InputError, match="chunk 25 is damaged"):
        sae_jax.sweep(factory, grid=grid, source=source, steps=400)
    assert threading.active_count() <= before + 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [({"seed": -1}, "seed must be"), ({"batch_size": 0}, "batch_size must be at least 1"),
     ({"lanes": 3}, "3 lanes do not divide a batch of 32 rows"), ({"window_rows": 0}, "window_rows must be"),
     ({"lanes": 2, "share": (0, 4)}, "4 hosts cannot share 2 lanes"), ({"share": (2, 2)}, "share is"),
     ({"y": rows_of(numbered(9), label="y")}, "rows has 100 rows but y has 9")],
)  # fmt: skip
def test_what_is_said_against_arguments(change, sentence):
    arguments = {"batch_size": 32, "seed": 0, **change}
    with pytest.raises(InputError, match=sentence.replace("(", r"\(")):
        stored(rows_of(numbered(100)), **arguments)


def test_sources_of_a_crosscoder_must_be_alike():
    with pytest.raises(InputError, match="alike"):
        side_by_side([rows_of(numbered(10)), rows_of(numbered(11))])
