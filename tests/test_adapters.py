"""An SAE in a Flax network: same numbers, visible weights, gradients through it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sae_jax
from sae_jax.adapters import SAEModule


@pytest.fixture
def trained():
    sae = sae_jax.relu(4, 6, apply_b_dec_to_input=True)
    return sae_jax.TrainedSAE(sae, sae.init(jax.random.key(0)))


def test_numbers_are_those_of_the_sae(trained):
    x = jax.random.normal(jax.random.key(1), (8, 4))
    module = SAEModule(trained)
    # compiled and not, the same sums are taken in two orders
    np.testing.assert_allclose(module.encode(x), trained.encode(x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(module, x), trained(x), rtol=1e-5, atol=1e-6)


def test_weights_are_params_of_the_network_around_it(trained):
    class Network(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.linear = nnx.Linear(3, 4, rngs=rngs)
            self.sae = SAEModule(trained)

        def __call__(self, x):
            return self.sae(self.linear(x))

    network = Network(nnx.Rngs(0))
    state = nnx.state(network, nnx.Param)
    assert set(state["sae"]) == set(trained.params)
    gradients = nnx.grad(lambda network, x: jnp.square(network(x)).sum())(network, jnp.ones((8, 3)))
    assert float(jnp.abs(gradients["sae"]["W_dec"][...]).max()) > 0
    assert float(jnp.abs(gradients["linear"]["kernel"][...]).max()) > 0
