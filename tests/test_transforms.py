"""Constraints in the optimizer chain."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sae_jax
from sae_jax import Batch, InputError, transforms


def test_decoder_rows_have_norm_one_after_every_step(small, x64):
    small = small.astype(np.float64)
    sae = sae_jax.relu(5, 7, l1=0.1)
    optimizer = optax.chain(optax.adam(1e-2), transforms.unit_norm_decoder())
    state = sae_jax.init(sae, optimizer, jax.random.key(0), jnp.float64)
    assert np.abs(np.linalg.norm(state.params["W_dec"], axis=1) - 1).max() > 0.1
    step, batch = jax.jit(sae_jax.make_step(sae, optimizer)), Batch(jnp.asarray(small), jnp.asarray(small))
    for _ in range(20):
        state, _ = step(state, batch)
        np.testing.assert_allclose(np.linalg.norm(state.params["W_dec"], axis=1), 1, rtol=1e-12)


def test_it_is_the_plain_update_brought_to_norm_one_and_touches_no_other_leaf():
    params = {"W_dec": jnp.array([[3.0, 4.0], [0.0, 1.0]]), "b_dec": jnp.ones(2)}
    updates = {"W_dec": jnp.array([[0.0, 0.0], [1.0, 0.0]]), "b_dec": jnp.array([5.0, 7.0])}
    optimizer = transforms.unit_norm_decoder()
    bent, _ = optimizer.update(updates, optimizer.init(params), params)
    after = optax.apply_updates(params, bent)
    np.testing.assert_allclose(after["W_dec"], [[0.6, 0.8], [0.5**0.5, 0.5**0.5]], rtol=1e-6)
    np.testing.assert_array_equal(bent["b_dec"], updates["b_dec"])
    np.testing.assert_array_equal(updates["W_dec"], [[0.0, 0.0], [1.0, 0.0]])


def test_a_row_of_zeros_stays_and_harms_no_other():
    params = {"W_dec": jnp.array([[0.0, 0.0], [0.0, 2.0]])}
    optimizer = transforms.unit_norm_decoder()
    bent, _ = optimizer.update({"W_dec": jnp.zeros((2, 2))}, optimizer.init(params), params)
    np.testing.assert_array_equal(optax.apply_updates(params, bent)["W_dec"], [[0.0, 0.0], [0.0, 1.0]])


def test_it_says_what_it_lacks():
    optimizer = transforms.unit_norm_decoder()
    with pytest.raises(InputError, match="needs the params"):
        optimizer.update({"W_dec": jnp.ones((1, 1))}, optax.EmptyState())
