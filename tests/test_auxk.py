"""AuxK: each library's convention against a plain loop over rows and latents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import Progress, auxk

BATCH, D_SAE, D, K_AUX, DEAD_AFTER = 7, 10, 4, 3, 5
RNG = np.random.default_rng(0)
PRE, W_DEC = RNG.normal(size=(BATCH, D_SAE)), RNG.normal(size=(D_SAE, D))
RESIDUAL, Y = RNG.normal(size=(BATCH, D)), RNG.normal(size=(BATCH, D))

SILENCE = {
    "none dead": np.array([0, 1, 2, 3, 0, 0, 1, 2, 3, 0]),
    "fewer than k_aux": np.array([0, 9, 2, 3, 0, 0, 1, 6, 3, 0]),
    "more than k_aux": np.array([0, 9, 2, 8, 0, 20, 7, 6, 3, 0]),
    "all dead": np.full(10, 50),
    # one step more or less decides
    "at the edge": np.array([3, 4, 5, 6, 4, 5, 6, 4, 5, 6]),
}
FIRED = np.zeros(D_SAE, bool)
FIRED[4:6] = True


def chosen_by_hand(pre, dead, rectify):
    """Each row's k_aux largest pre-activations among dead latents, in place; the rest 0."""
    a = np.zeros_like(pre)
    for b in range(len(pre)):
        candidates = sorted((i for i in range(pre.shape[1]) if dead[i]), key=lambda i: -max(pre[b, i], -1e9))
        if rectify:
            candidates = sorted(candidates, key=lambda i: -max(pre[b, i], 0))
        for i in candidates[:K_AUX]:
            a[b, i] = max(pre[b, i], 0) if rectify else pre[b, i]
    return a


def by_hand(convention, pre, W_dec, residual, y, silence, fired):
    before = np.array([s > DEAD_AFTER for s in silence])
    with_this = np.array([0 if fired[i] else s + 1 for i, s in enumerate(silence)]) >= DEAD_AFTER
    dead = before if convention in ("saelens", "fvu") else with_this
    if not dead.any():
        return 0.0
    e_hat = chosen_by_hand(pre, dead, convention != "saelens") @ W_dec
    error = sum((e_hat[b, d] - residual[b, d]) ** 2 for b in range(BATCH) for d in range(D))
    share = min(dead.sum() / K_AUX, 1)
    if convention == "saelens":
        return share * error / BATCH
    if convention == "normalised":
        return error / np.square(residual - residual.mean(axis=0)).sum()
    if convention == "fvu":
        return share * error / np.square(y - y.mean(axis=0)).sum()
    return error / BATCH / D


def ours(convention, silence, fired):
    progress = Progress(jnp.int32(100), jnp.asarray(silence, jnp.int32))

    def loss(pre, W_dec, residual):
        return getattr(auxk, convention)(
            pre,
            residual,
            jnp.asarray(Y),
            lambda a: a @ W_dec,
            jnp.asarray(fired),
            progress,
            K_AUX,
            DEAD_AFTER,
        )

    return loss


conventions = pytest.mark.parametrize("convention", ["saelens", "normalised", "fvu", "attached"])


@conventions
@pytest.mark.parametrize("which", SILENCE)
def test_it_is_its_formula_and_its_gradient_the_difference_quotient(convention, which, x64):
    silence = SILENCE[which]
    loss = ours(convention, silence, FIRED)
    arrays = [PRE.copy(), W_DEC.copy(), RESIDUAL.copy()]
    value, gradients = jax.value_and_grad(loss, argnums=(0, 1, 2))(*map(jnp.asarray, arrays))

    def hand():
        return by_hand(convention, *arrays, Y, silence, FIRED)

    np.testing.assert_allclose(value, hand(), rtol=1e-12)
    for which_array, (array, gradient) in enumerate(zip(arrays, gradients, strict=True)):
        if which_array == 2 and convention != "attached":
            assert not gradient.any()  # the residual takes no gradient
            continue
        for place in np.ndindex(array.shape):
            kept = array[place]
            array[place] = kept + 1e-6
            above = hand()
            array[place] = kept - 1e-6
            below = hand()
            array[place] = kept
            np.testing.assert_allclose(gradient[place], (above - below) / 2e-6, rtol=1e-6, atol=1e-7)


@conventions
def test_without_dead_latents_it_is_exactly_zero_and_so_are_its_gradients(convention):
    loss = ours(convention, SILENCE["none dead"], np.zeros(D_SAE, bool))
    arrays = [jnp.asarray(array, jnp.float32) for array in (PRE, W_DEC, RESIDUAL)]
    value, gradients = jax.value_and_grad(loss, argnums=(0, 1, 2))(*arrays)
    assert value == 0
    assert all((gradient == 0).all() for gradient in gradients)


@conventions
def test_a_residual_of_zero_leaves_it_finite(convention):
    loss = ours(convention, SILENCE["all dead"], np.zeros(D_SAE, bool))
    arrays = [jnp.asarray(array, jnp.float32) for array in (PRE, W_DEC, 0 * RESIDUAL)]
    value, gradients = jax.value_and_grad(loss, argnums=(0, 1, 2))(*arrays)
    assert jnp.isfinite(value)
    assert all(jnp.isfinite(gradient).all() for gradient in gradients)
    # OpenAI divides by the residual's spread, and counts what that gives as 0
    assert (value == 0) == (convention == "normalised")


def test_normalised_counts_what_is_not_finite_as_zero():
    loss = ours("normalised", SILENCE["all dead"], np.zeros(D_SAE, bool))
    value = loss(jnp.full((BATCH, D_SAE), jnp.inf), jnp.asarray(W_DEC), jnp.asarray(RESIDUAL))
    assert value == 0


@conventions
def test_it_is_the_same_under_vmap_and_jit(convention):
    silences = jnp.asarray(np.stack([SILENCE["none dead"], SILENCE["more than k_aux"]]), jnp.int32)
    pre, W_dec, residual = (jnp.asarray(array, jnp.float32) for array in (PRE, W_DEC, RESIDUAL))

    def one(silence):
        return getattr(auxk, convention)(
            pre, residual, jnp.asarray(Y, jnp.float32), lambda a: a @ W_dec, jnp.asarray(FIRED),
            Progress(jnp.int32(0), silence), K_AUX, DEAD_AFTER,
        )  # fmt: skip

    together = jax.jit(jax.vmap(one))(silences)
    np.testing.assert_allclose(together, [one(silences[0]), one(silences[1])], rtol=1e-5)


def test_only_a_python_zero_leaves_it_out_of_the_program():
    assert not auxk.wanted(0)
    assert not auxk.wanted(0.0)
    assert auxk.wanted(0.1)
    assert auxk.wanted(jnp.float32(0))
