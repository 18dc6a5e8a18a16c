"""Resampling: dead latents start again exactly as the formulas say, and nothing else changes."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sae_jax
from sae_jax import Batch, InputError, Progress, TrainState, resampling
from sae_jax.train import state_from

D_IN, D_SAE, N = 4, 6, 9
DEAD = np.array([False, True, False, False, True, False])
X = np.random.default_rng(0).normal(size=(N, D_IN)).astype(np.float32) * 3

WAYS = {
    "anthropic": lambda chain, **kwargs: resampling.anthropic(chain, **{"last": None, **kwargs}),
    "dictionary_learning": resampling.dictionary_learning,
}
DUE = {"anthropic": 9, "dictionary_learning": 10}
"""The step, counted from 0, at whose end each resamples with `every=10`."""
ways = pytest.mark.parametrize("way", WAYS)


def sae():
    return sae_jax.relu(D_IN, D_SAE, l1=0.1, mean_features=False)


def adam():
    return optax.adam(1e-2)


def with_dead(dead=DEAD, silence=100):
    """Weights under which the dead latents fire on no row, moments that are not 0, and their silence."""
    model = sae()
    params = model.init(jax.random.key(0))
    params["b_enc"] = jnp.where(dead, -1e3, params["b_enc"])
    moments = jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.5), adam().init(params))
    return model, params, moments, jnp.where(dead, silence, 0).astype(jnp.int32)


@cache
def compiled(way=None, last=None):
    """A model's step with one way of resampling, or none, compiled once for all tests."""
    options = {"every": 10, "dead_after": 50} | ({} if last is None else {"last": last})
    optimizer = adam() if way is None else WAYS[way](adam(), **options)
    return jax.jit(sae_jax.make_step(sae(), optimizer))


def one_step(way, step, dead=DEAD, silence=100, x=X, last=None):
    """Weights before, and the state after one step of a run that is at `step`."""
    _, params, moments, silent = with_dead(dead, silence)
    state = TrainState(params, moments, Progress(jnp.int32(step), silent))
    return params, compiled(way, last)(state, Batch(jnp.asarray(x), jnp.asarray(x)))[0]


def plain_step(step, dead=DEAD, silence=100):
    return one_step(None, step, dead, silence)[1]


def rows_of(after, dead=DEAD, x=X):
    """Which row of the batch each new decoder row points to."""
    units = x / np.linalg.norm(x, axis=1, keepdims=True)
    new = np.asarray(after.params["W_dec"])[dead]
    cosines = new @ units.T
    np.testing.assert_allclose(cosines.max(axis=1), 1, rtol=1e-5)
    return cosines.argmax(axis=1)


@ways
def test_dead_latents_start_again_on_rows_of_the_batch(way):
    before, after = one_step(way, DUE[way])
    rows = rows_of(after)
    assert len(set(rows.tolist())) == 2  # a row each
    units = X / np.linalg.norm(X, axis=1, keepdims=True)
    live = np.linalg.norm(np.asarray(before["W_enc"]), axis=0)[~DEAD].mean()
    inputs = units if way == "anthropic" else X
    np.testing.assert_allclose(after.params["W_dec"][DEAD], units[rows], rtol=1e-5)
    np.testing.assert_allclose(after.params["W_enc"].T[DEAD], 0.2 * live * inputs[rows], rtol=1e-5)
    np.testing.assert_array_equal(after.params["b_enc"][DEAD], 0)


@ways
def test_their_moments_start_again_from_zero(way):
    _, after = one_step(way, DUE[way])
    adams = after.opt_state[0]
    for moment in (adams.mu, adams.nu):
        assert not moment["W_enc"][:, DEAD].any()
        assert not moment["W_dec"][DEAD].any()
        assert not moment["b_enc"][DEAD].any()
        assert moment["b_dec"].all()


@ways
def test_live_latents_are_untouched_to_the_bit(way):
    _, after = one_step(way, DUE[way])
    plain = plain_step(DUE[way])
    for ours, theirs in (
        (after.params, plain.params), (after.opt_state[0].mu, plain.opt_state[0].mu),
        (after.opt_state[0].nu, plain.opt_state[0].nu),
    ):  # fmt: skip
        np.testing.assert_array_equal(ours["W_enc"][:, ~DEAD], theirs["W_enc"][:, ~DEAD])
        np.testing.assert_array_equal(ours["W_dec"][~DEAD], theirs["W_dec"][~DEAD])
        np.testing.assert_array_equal(ours["b_enc"][~DEAD], theirs["b_enc"][~DEAD])
        np.testing.assert_array_equal(ours["b_dec"], theirs["b_dec"])
    assert after.opt_state[0].count == plain.opt_state[0].count


@ways
def test_it_happens_every_so_many_steps_and_at_no_other(way):
    at = []
    for step in range(32):
        _, after = one_step(way, step)
        at += [step] if (np.asarray(after.params["b_enc"])[DEAD] == 0).all() else []
        if step not in at:
            jax.tree.map(np.testing.assert_array_equal, after.params, plain_step(step).params)
    assert at == [DUE[way], DUE[way] + 10, *([DUE[way] + 20] if DUE[way] + 20 < 32 else [])]


def test_after_its_last_step_it_happens_no_more():
    for step, happens in {9: True, 19: True, 29: False}.items():
        _, after = one_step("anthropic", step, last=20)
        assert (after.params["b_enc"][1] == 0) == happens


@ways
def test_only_those_silent_for_long_enough_are_dead(way):
    # silent before the step, whose own silence counts too: 50 in the post, more than 50 in the library
    edge = way == "anthropic"
    for silence, dies in {10: False, 48: False, 49: edge, 50: True, 1000: True}.items():
        _, after = one_step(way, DUE[way], silence=silence)
        assert (after.params["b_enc"][1] == 0) == dies


@ways
def test_a_latent_that_fires_in_this_very_step_is_live(way):
    model, params, moments, _ = with_dead(np.zeros(D_SAE, bool))
    params["b_enc"] = jnp.full(D_SAE, 10.0)
    optimizer = WAYS[way](adam(), every=10, dead_after=50)
    progress = Progress(jnp.int32(DUE[way]), jnp.full(D_SAE, 500, jnp.int32))
    state = state_from(params, optimizer)._replace(opt_state=moments, progress=progress)
    after, _ = jax.jit(sae_jax.make_step(model, optimizer))(state, Batch(jnp.asarray(X), jnp.asarray(X)))
    assert (after.params["b_enc"] > 5).all()


@ways
def test_no_dead_latents_change_nothing(way):
    none = np.zeros(D_SAE, bool)
    _, after = one_step(way, DUE[way], dead=none, silence=0)
    jax.tree.map(np.testing.assert_array_equal, after.params, plain_step(DUE[way], none, 0).params)


@ways
def test_with_fewer_rows_than_dead_latents_the_rest_wait(way):
    dead = np.array([True, True, True, True, True, False])
    _, after = one_step(way, DUE[way], dead=dead, x=X[:2])
    replaced = np.asarray(after.params["b_enc"]) == 0
    assert replaced.tolist() == [True, True, False, False, False, False]
    assert sorted(rows_of(after, replaced, X[:2]).tolist()) == [0, 1]
    assert (after.params["b_enc"][2:5] < -900).all()


@ways
def test_where_all_are_dead_the_weights_stay_finite(way):
    _, after = one_step(way, DUE[way], dead=np.ones(D_SAE, bool))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(after))


@ways
def test_it_is_the_same_under_vmap(way):
    model, params, moments, silent = with_dead()
    optimizer = WAYS[way](adam(), every=10, dead_after=50)
    step, batch = sae_jax.make_step(model, optimizer), Batch(jnp.asarray(X), jnp.asarray(X))
    states = [
        state_from(params, optimizer)._replace(opt_state=moments, progress=Progress(jnp.int32(count), silent))
        for count in (3, DUE[way], DUE[way] + 10)
    ]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    together, _ = jax.jit(jax.vmap(step, in_axes=(0, None)))(stacked, batch)
    for i, state in enumerate(states):
        alone, _ = jax.jit(step)(state, batch)
        for name, leaf in alone.params.items():
            np.testing.assert_allclose(together.params[name][i], leaf, rtol=1e-5, atol=1e-6)


def test_the_gated_sae_has_its_three_biases_reset():
    model = sae_jax.gated(D_IN, D_SAE)
    params = model.init(jax.random.key(0)) | {
        "b_gate": jnp.where(DEAD, -1e3, 0.5), "b_mag": jnp.full(D_SAE, 0.5), "r_mag": jnp.full(D_SAE, 0.5)
    }  # fmt: skip
    optimizer = resampling.anthropic(optax.sgd(1e-6), every=10, dead_after=50)
    progress = Progress(jnp.int32(9), jnp.where(DEAD, 100, 0).astype(jnp.int32))
    state = state_from(params, optimizer)._replace(progress=progress)
    after, _ = jax.jit(sae_jax.make_step(model, optimizer))(state, Batch(jnp.asarray(X), jnp.asarray(X)))
    for name in ("b_gate", "b_mag", "r_mag"):
        np.testing.assert_array_equal(np.asarray(after.params[name]) == 0, DEAD)


# The draw


@pytest.mark.parametrize(("way", "power"), [("anthropic", 4), ("dictionary_learning", 1)])
def test_rows_are_drawn_in_proportion_to_a_power_of_the_error(way, power):
    error = np.array([0.5, 1.0, 1.5, 2.0])
    dead = jnp.array([False, True, False])
    draw = jax.vmap(lambda key: resampling.drawn_rows(key, power * jnp.log(jnp.asarray(error)), dead)[1][1])
    counts = np.bincount(draw(jax.random.split(jax.random.key(0), 20_000)), minlength=4) / 20_000
    np.testing.assert_allclose(counts, error**power / (error**power).sum(), atol=0.015)


def test_the_error_that_counts_is_each_rows_own():
    # of two rows, the one that the SAE gives back exactly is never taken
    model, params, moments, silent = with_dead()
    params |= {"W_dec": jnp.zeros((D_SAE, D_IN)), "b_dec": jnp.asarray(X[0])}
    optimizer = resampling.anthropic(adam(), every=10, dead_after=50)
    for step in (9, 19, 29, 39, 49):
        progress = Progress(jnp.int32(step), jnp.where(jnp.arange(D_SAE) == 1, silent, 0))
        state = state_from(params, optimizer)._replace(opt_state=moments, progress=progress)
        after, _ = sae_jax.make_step(model, optimizer)(state, Batch(*[jnp.asarray(X[:2])] * 2))
        only = np.arange(D_SAE) == 1
        assert rows_of(after, only, X[:2]).tolist() == [1]


def test_a_row_serves_one_latent():
    dead = jnp.ones(5, bool)
    for seed in range(20):
        replaced, rows = resampling.drawn_rows(jax.random.key(seed), jnp.zeros(8), dead)
        assert replaced.all()
        assert len(set(np.asarray(rows).tolist())) == 5


def test_a_tied_sae_is_refused():
    model = sae_jax.relu(D_IN, D_SAE, tied=True)
    optimizer = resampling.anthropic(adam())
    state = sae_jax.init(model, optimizer, jax.random.key(0))
    with pytest.raises(InputError, match="resampling needs params with an encoder of their own, W_enc"):
        sae_jax.make_step(model, optimizer)(state, Batch(jnp.asarray(X), jnp.asarray(X)))


def test_half_of_every_is_the_default_silence_of_dictionary_learning():
    model, params, moments, _ = with_dead()
    optimizer = resampling.dictionary_learning(adam(), every=10)
    for silence, dies in {3: False, 6: True}.items():
        progress = Progress(jnp.int32(10), jnp.where(DEAD, silence, 0).astype(jnp.int32))
        state = state_from(params, optimizer)._replace(opt_state=moments, progress=progress)
        after, _ = jax.jit(sae_jax.make_step(model, optimizer))(state, Batch(jnp.asarray(X), jnp.asarray(X)))
        assert (after.params["b_enc"][1] == 0) == dies
