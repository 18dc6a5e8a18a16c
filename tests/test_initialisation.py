"""Where training starts: draws against PyTorch's, and points of the data against a direct search."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

import sae_jax
from sae_jax import InputError, initialisation
from sae_jax.initialisation import b_dec_at, geometric_median, rows_at, starting


def test_linear_layers_are_drawn_as_torch_draws_them(torch):
    params = initialisation.linear_layers(jax.random.key(0), 30, 500)
    layers = torch.nn.Linear(30, 500), torch.nn.Linear(500, 30)
    theirs = {
        "W_enc": layers[0].weight.T,
        "b_enc": layers[0].bias,
        "W_dec": layers[1].weight.T,
        "b_dec": layers[1].bias,
    }
    for name, tensor in theirs.items():
        drawn, tensor = np.asarray(params[name]), tensor.detach().numpy()
        assert drawn.shape == tensor.shape
        bound = 30**-0.5 if name.endswith("enc") else 500**-0.5
        for values in (drawn, tensor):
            assert np.abs(values).max() <= bound
            assert np.abs(values).max() > 0.85 * bound
            assert np.abs(values.mean()) < 5 * bound / 3**0.5 / values.size**0.5
            assert values.std() == pytest.approx(bound / 3**0.5, rel=0.3 if values.size < 100 else 0.06)


@pytest.mark.parametrize("gaussian", [False, True])
@pytest.mark.parametrize("norm", [0.1, 1.0])
def test_tied_rows_have_one_norm_and_an_encoder_that_is_their_transpose(gaussian, norm):
    params = initialisation.tied_rows(jax.random.key(1), 8, 300, norm, gaussian=gaussian)
    np.testing.assert_allclose(np.linalg.norm(params["W_dec"], axis=1), norm, rtol=1e-5)
    np.testing.assert_array_equal(params["W_enc"], params["W_dec"].T)
    assert not params["b_enc"].any()
    assert not params["b_dec"].any()
    # the fourth moment tells a direction drawn evenly over the sphere (3 / (d (d + 2))) from a cube's
    fourth = np.mean((np.asarray(params["W_dec"]) / norm) ** 4)
    assert (fourth == pytest.approx(3 / (8 * 10), rel=0.06)) == gaussian


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_draws_have_the_dtype_that_was_asked_for(dtype):
    for params in (
        initialisation.linear_layers(jax.random.key(0), 3, 4, dtype),
        initialisation.tied_rows(jax.random.key(0), 3, 4, 1.0, dtype),
    ):
        assert {leaf.dtype for leaf in params.values()} == {jnp.dtype(dtype)}


# starting


def test_a_factory_that_starts_elsewhere_is_otherwise_the_same():
    factory = partial(sae_jax.topk, 4, 9, k=2)
    moved = starting(factory, b_dec_at(np.arange(4.0)))
    assert inspect.signature(moved) == inspect.signature(factory)
    plain, ours = factory(k=3), moved(k=3)
    assert ours.config == plain.config
    assert (ours.encode, ours.decode, ours.loss) != (None, None, None)
    params, before = ours.init(jax.random.key(0)), plain.init(jax.random.key(0))
    np.testing.assert_array_equal(params["b_dec"], np.arange(4.0))
    for name in ("W_enc", "W_dec", "b_enc"):
        np.testing.assert_array_equal(params[name], before[name])
    assert {leaf.dtype for leaf in ours.init(jax.random.key(0), jnp.bfloat16).values()} == {
        jnp.dtype("bfloat16")
    }


def test_changes_are_applied_in_order():
    factory = starting(
        partial(sae_jax.relu, 3, 5), b_dec_at(np.ones(3)), b_dec_at(np.full(3, 2.0)), rows_at(0.5)
    )
    params = factory().init(jax.random.key(0))
    assert not params["b_dec"].any()  # rows_at draws the biases again too
    np.testing.assert_allclose(np.linalg.norm(params["W_dec"], axis=1), 0.5, rtol=1e-6)


def test_rows_are_drawn_again_only_where_they_are():
    params = starting(partial(sae_jax.relu, 3, 5, tied=True), rows_at(0.5))().init(jax.random.key(0))
    assert "W_enc" not in params
    params = starting(partial(sae_jax.jumprelu, 3, 5), rows_at(0.5))().init(jax.random.key(0))
    np.testing.assert_allclose(params["threshold"], 0.01, rtol=1e-6)


# geometric_median


def distances(point, x):
    return np.linalg.norm(x - point, axis=1).sum()


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10_000))
def test_the_median_has_the_least_sum_of_distances(seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(40, 3)) * rng.uniform(0.5, 3, 3) + rng.normal(size=3)
    found = np.asarray(geometric_median(x.astype(np.float32)), np.float64)
    best = minimize(
        distances, x.mean(axis=0), args=(x,), method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-10}
    )
    assert distances(found, x) <= best.fun * (1 + 1e-6)
    np.testing.assert_allclose(found, best.x, atol=2e-3)


def test_outliers_pull_it_less_than_the_mean():
    x = np.concatenate([np.random.default_rng(0).normal(size=(200, 4)), np.full((10, 4), 1e3)]).astype(
        np.float32
    )
    assert np.linalg.norm(x.mean(axis=0)) > 90
    assert np.linalg.norm(geometric_median(x)) < 0.5


def test_a_row_at_the_median_is_found_and_stayed_at():
    directions = np.array([[1, 0], [-0.5, 3**0.5 / 2], [-0.5, -(3**0.5) / 2]])
    x = np.concatenate([[[0, 0]], directions * [[1], [2], [5]]]).astype(np.float32) + 7
    np.testing.assert_allclose(geometric_median(x), [7, 7], atol=1e-4)
    cross = np.array([[0, 0], [0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]], np.float32)
    np.testing.assert_allclose(geometric_median(cross), [0, 0], atol=1e-6)


def test_a_row_at_the_mean_that_is_not_the_median_is_left():
    x = np.array([[0.0], [0.0], [0.0], [1.0], [4.0]], np.float32)  # the mean, 1, is a row; the median is 0
    np.testing.assert_allclose(geometric_median(x), [0.0], atol=1e-3)


def test_one_row_is_its_own_median_and_equal_rows_theirs():
    np.testing.assert_array_equal(geometric_median(np.array([[1.0, 2.0]], np.float32)), [1, 2])
    np.testing.assert_allclose(geometric_median(np.full((5, 2), 3.0, np.float32)), [3, 3], rtol=1e-6)


def test_no_rows_have_no_median():
    with pytest.raises(InputError, match="the geometric median of no rows is not defined"):
        geometric_median(np.zeros((0, 3), np.float32))
