"""What moves a hyper-parameter while training goes on."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import control, losses


def test_a_warm_up_rises_from_zero_to_one_and_stays():
    factor = jax.vmap(lambda step: control.warmup(step, 4))(jnp.arange(7))
    assert factor.tolist() == [0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert control.warmup(jnp.int32(0), 0) == 1
    assert control.warmup(jnp.int32(3), jnp.int32(0)) == 1


def test_a_warm_up_can_be_an_axis():
    factors = jax.vmap(lambda steps: control.warmup(jnp.int32(2), steps))(jnp.array([0, 1, 4, 8]))
    assert factors.tolist() == [1, 1, 0.5, 0.25]


def test_annealing_goes_linearly_between_two_steps():
    values = jax.vmap(lambda step: control.anneal(step, 1.0, 0.5, 2, 6))(jnp.arange(9))
    np.testing.assert_allclose(values, [1, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.5, 0.5])
    sudden = jax.vmap(lambda step: control.anneal(step, 1.0, 0.5, 2, 2))(jnp.arange(5))
    np.testing.assert_allclose(sudden, [1, 1, 1, 0.5, 0.5])


# steer


def steered_l0(target, c, a, weight, lag, steps=6000):
    """A plant that answers a weight by L0 = c weight^-a, a share `lag` of the way each step; its last L0s."""

    def one(carry, _):
        log_l0, log_penalty = carry
        params = {"log_penalty": log_penalty}
        factor, assigned = control.steer(params, jnp.exp(log_l0), target)
        settled = jnp.log(c) - a * jnp.log(weight * factor)
        log_l0 = log_l0 + lag * (settled - log_l0)
        return (log_l0, assigned["log_penalty"]), jnp.exp(log_l0)

    start = (jnp.log(c) - a * jnp.log(weight), jnp.zeros(()))
    return np.asarray(jax.lax.scan(one, start, None, steps)[1])


@pytest.mark.parametrize(("a", "lag"), [(0.5, 1.0), (0.9, 0.3), (1.0, 0.05), (1.5, 0.1), (0.3, 0.01)])
@pytest.mark.parametrize("weight", [1e-4, 1e-2, 1.0, 1e2], ids=str)
def test_a_plant_lands_on_its_target_from_far_away_on_either_side(a, lag, weight):
    target = 20.0
    l0 = steered_l0(target, c=20.0 * 0.3**a, a=a, weight=weight, lag=lag)
    assert abs(l0[0] / target - 1) > 0.05
    np.testing.assert_allclose(l0[-500:], target, rtol=0.02)


def test_the_factor_and_the_integral_are_their_formulas(x64):
    for l0, error in {20.0: np.log(2), 10.0: 0.0, 5.0: -np.log(2), 1e4: 1.0, 0.0: -1.0}.items():
        factor, assigned = control.steer({"log_penalty": jnp.float64(0.7)}, jnp.float64(l0), 10.0)
        np.testing.assert_allclose(factor, np.exp(0.7 + control.PROPORTIONAL * error), rtol=1e-12)
        np.testing.assert_allclose(assigned["log_penalty"], 0.7 + control.INTEGRAL * error, rtol=1e-12)


def test_no_gradient_flows_through_the_controller():
    def loss(log_penalty, l0):
        return control.steer({"log_penalty": log_penalty}, l0, 5.0)[0]

    assert jax.grad(loss, argnums=(0, 1))(0.3, 7.0) == (0, 0)


# continued


def test_a_penalty_whose_form_changes_does_not_jump(x64):
    f = jnp.asarray(np.abs(np.random.default_rng(0).normal(size=(9, 5))))
    exponents = np.linspace(1, 0.2, 40)
    params, seen = control.steered({}, jnp.float64), []
    for p, following in itertools.pairwise(exponents):
        now = losses.lp(f, p)
        factor, params = control.continued(params, now, losses.lp(f, following))
        seen.append(factor * now)
    assert losses.lp(f, exponents[-1]) / losses.lp(f, 1.0) > 1.05 or losses.lp(f, 0.2) < 0.95 * losses.lp(
        f, 1.0
    )
    np.testing.assert_allclose(seen, losses.lp(f, 1.0), rtol=1e-12)


@pytest.mark.parametrize(("now", "following"), [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0)])
def test_a_penalty_of_zero_leaves_the_factor_as_it_is(now, following):
    factor, assigned = control.continued(
        {"log_penalty": jnp.float32(0.5)}, jnp.float32(now), jnp.float32(following)
    )
    assert factor == pytest.approx(np.exp(0.5))
    assert assigned["log_penalty"] == 0.5


def test_steered_params_hold_one_more_leaf():
    params = control.steered({"W": jnp.ones(2)}, jnp.float32)
    assert set(params) == {"W", "log_penalty"}
    assert params["log_penalty"].shape == ()
    assert params["log_penalty"].dtype == jnp.float32
