"""From pre-activations to features: every selection against a plain sort."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sae_jax import InputError, activations

ROWS, N = 3, 6
TIED = arrays.arrays(np.float32, (ROWS, N), elements=st.integers(-2, 2).map(float))
"""Few distinct values, so that ties are the rule."""


def sorted_mask(row, k):
    """The k largest of a row by a stable sort: of equal ones the earlier."""
    mask = np.zeros(len(row), bool)
    mask[np.argsort(-row, kind="stable")[: int(k)]] = True
    return mask


@pytest.fixture(scope="module")
def traced():
    return jax.jit(lambda values, k: activations.largest(values, k, k_max=N))


@settings(deadline=None, max_examples=60)
@given(values=TIED, k=st.integers(1, N + 2))
def test_largest_is_a_stable_sort(values, k):
    expected = np.array([sorted_mask(row, k) for row in values])
    np.testing.assert_array_equal(activations.largest(jnp.asarray(values), k), expected)


@settings(deadline=None, max_examples=60)
@given(values=TIED, k=st.integers(0, N))
def test_a_traced_k_under_k_max_chooses_the_same(traced, values, k):
    expected = np.array([sorted_mask(row, k) for row in values])
    np.testing.assert_array_equal(traced(values, k), expected)


def test_of_equal_ones_the_earlier_wins():
    assert activations.largest(jnp.array([1.0, 2.0, 2.0, 2.0]), 2).tolist() == [False, True, True, False]


def test_k_of_all_chooses_all_and_more_is_all():
    assert activations.largest(jnp.array([[-1.0, 3.0]]), 2).all()
    assert activations.largest(jnp.array([[-1.0, 3.0]]), 9).all()
    assert activations.largest(jnp.array([[-1.0, 3.0]]), 9, k_max=20).all()


def test_a_vmapped_axis_of_k_equals_each_k_alone():
    values = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32))
    together = jax.jit(jax.vmap(lambda k: activations.topk(values, k, k_max=8)))(jnp.arange(1, 9))
    for k in range(1, 9):
        np.testing.assert_array_equal(together[k - 1], activations.topk(values, k))


def test_a_traced_k_needs_its_bound():
    with pytest.raises(InputError, match=r"k is traced.*give k_max"):
        jax.jit(lambda k: activations.largest(jnp.ones((2, 3)), k))(2)


def test_no_gradient_flows_through_the_choice():
    values = jnp.array([3.0, 1.0, 2.0])
    gradient = jax.grad(lambda values: (activations.largest(values, 2) * 1.0).sum())(values)
    assert not gradient.any()


@pytest.mark.parametrize("k", [1, 3, 8])
def test_topk_is_torchs_followed_by_relu(k, torch):
    values = np.random.default_rng(k).normal(size=(5, 8)).astype(np.float32)
    ours, pull = jax.vjp(lambda pre: activations.topk(pre, k), jnp.asarray(values))
    pre = torch.tensor(values, requires_grad=True)
    chosen = pre.topk(k, dim=-1)
    theirs = torch.zeros_like(pre).scatter(-1, chosen.indices, chosen.values.relu())
    weights = np.random.default_rng(9).normal(size=values.shape).astype(np.float32)
    (theirs * torch.tensor(weights)).sum().backward()
    np.testing.assert_array_equal(ours, theirs.detach().numpy())
    np.testing.assert_array_equal(pull(jnp.asarray(weights))[0], pre.grad.numpy())


@pytest.mark.parametrize("k", [1, 2, 1.5, 0.34, 2.99, 6])
def test_batch_topk_keeps_floor_k_n_of_the_whole_batch(k):
    values = np.random.default_rng(1).normal(size=(3, 6)).astype(np.float32)
    mask = sorted_mask(values.reshape(-1), math.floor(k * 3)).reshape(3, 6)
    expected = np.where(mask, np.maximum(values, 0), 0)
    np.testing.assert_array_equal(activations.batch_topk(jnp.asarray(values), k), expected)
    traced = jax.jit(lambda k: activations.batch_topk(jnp.asarray(values), k, k_max=6))
    np.testing.assert_array_equal(traced(k), expected)


def test_batch_topk_gives_a_row_what_another_does_not_need():
    f = activations.batch_topk(jnp.array([[5.0, 4.0, 3.0], [1.0, 0.5, 0.1]]), 1.5)
    assert f.tolist() == [[5.0, 4.0, 3.0], [0.0, 0.0, 0.0]]


def test_a_vmapped_axis_of_k_in_batch_topk_equals_each_k_alone():
    values = jnp.asarray(np.random.default_rng(2).normal(size=(4, 5)).astype(np.float32))
    ks = [0.5, 1.25, 3.0]
    together = jax.vmap(lambda k: activations.batch_topk(values, k, k_max=3.0))(jnp.array(ks))
    for i, k in enumerate(ks):
        np.testing.assert_array_equal(together[i], activations.batch_topk(values, k))


# JumpReLU


@pytest.mark.parametrize("ste_to_input", [False, True])
def test_jumprelu_and_step_jump_strictly_above_the_threshold(ste_to_input):
    pre = np.array([[-1.0, 0.2, 0.5, 0.5000001, 2.0], [0.49, 0.51, 0.0, -0.5, 1.0]], np.float32)
    threshold = np.full(5, 0.5, np.float32)
    above = pre > threshold
    arguments = (jnp.asarray(pre), jnp.asarray(threshold), 0.1, ste_to_input)
    np.testing.assert_array_equal(activations.jumprelu(*arguments), np.where(above, pre, 0))
    np.testing.assert_array_equal(activations.step(*arguments), above)


def test_a_threshold_of_zero_is_relu():
    pre = jnp.array([-1.0, 0.0, 2.0])
    np.testing.assert_array_equal(activations.jumprelu(pre, jnp.zeros(3), 0.1), activations.relu(pre))


@settings(deadline=None, max_examples=40)
@given(z=arrays.arrays(np.float32, 5, elements=st.floats(-2, 2, width=32)))
def test_the_kernel_is_one_within_half(z):
    np.testing.assert_array_equal(activations.rectangle(jnp.asarray(z)), np.where(np.abs(z) < 0.5, 1, 0))


@pytest.mark.parametrize("ste_to_input", [False, True])
def test_the_estimators_are_the_papers_formulas(ste_to_input, x64):
    rng = np.random.default_rng(3)
    pre, threshold, bandwidth = rng.normal(size=(40, 6)) * 0.3 + 0.3, rng.uniform(0.1, 0.5, 6), 0.2
    weights = rng.normal(size=pre.shape)
    above, window = pre > threshold, np.abs((pre - threshold) / bandwidth) < 0.5
    assert 0.1 < window.mean() < 0.9

    def gradients(function):
        loss = lambda pre, threshold: (weights * function(pre, threshold, bandwidth, ste_to_input)).sum()  # noqa: E731
        return jax.grad(loss, argnums=(0, 1))(jnp.asarray(pre), jnp.asarray(threshold))

    to_pre, to_threshold = gradients(activations.jumprelu)
    slope = weights * threshold / bandwidth * window
    np.testing.assert_allclose(to_threshold, -slope.sum(axis=0), rtol=1e-12)
    np.testing.assert_allclose(to_pre, weights * above + (slope if ste_to_input else 0), rtol=1e-12)
    to_pre, to_threshold = gradients(activations.step)
    slope = weights / bandwidth * window
    np.testing.assert_allclose(to_threshold, -slope.sum(axis=0), rtol=1e-12)
    np.testing.assert_allclose(to_pre, slope if ste_to_input else 0 * slope, rtol=1e-12)
