"""Terms of losses, and the two forms of the matrix product, against hand computations and differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sae_jax
from sae_jax import Batch, activations, linear, losses

F = jnp.array([[1.0, 0.0, 2.0], [0.0, 0.0, 5.0]])


def test_squared_error_is_averaged_or_summed_over_features():
    x_hat, y = jnp.array([[1.0, 2.0], [0.0, 0.0]]), jnp.array([[0.0, 0.0], [3.0, 1.0]])
    assert losses.squared_error(x_hat, y) == (1 + 4 + 9 + 1) / 4
    assert losses.squared_error(x_hat, y, mean_features=False) == (1 + 4 + 9 + 1) / 2


def test_l1_is_averaged_or_summed_over_latents():
    assert losses.l1(F) == pytest.approx(8 / 6)
    assert losses.l1(-F) == pytest.approx(8 / 6)
    assert losses.l1(F, mean_features=False) == 4


def test_l1_weighs_each_latent():
    weights = jnp.array([10.0, 100.0, 0.5])
    assert losses.l1(F, weights) == pytest.approx((10 + 1 + 2.5) / 6)
    assert losses.l1(F, weights, mean_features=False) == (10 + 1 + 2.5) / 2


def test_relu_has_derivative_zero_at_zero():
    slope = jax.vmap(jax.grad(lambda pre: activations.relu(pre[None])[0]))
    assert slope(jnp.array([-1.0, 0.0, 2.0])).tolist() == [0.0, 0.0, 1.0]
    assert activations.relu(jnp.array([-1.0, 0.0, 2.0])).tolist() == [0.0, 0.0, 2.0]


@pytest.mark.parametrize("mean_features", [True, False])
@pytest.mark.parametrize("decoder_norm_l1", [True, False])
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_the_relu_loss_is_its_formula_and_its_gradient_the_difference_quotient(
    mean_features, decoder_norm_l1, apply_b_dec_to_input, tied, x64
):
    sae = sae_jax.relu(
        4, 6, l1=0.3, mean_features=mean_features, decoder_norm_l1=decoder_norm_l1,
        apply_b_dec_to_input=apply_b_dec_to_input, tied=tied,
    )  # fmt: skip
    params = sae.init(jax.random.key(0), jnp.float64)
    assert ("W_enc" in params) is not tied
    x = np.random.default_rng(0).normal(size=(9, 4))
    y = np.random.default_rng(1).normal(size=(9, 4))  # not x: a transcoder's target

    def by_hand(p):
        W_enc = p["W_dec"].T if tied else p["W_enc"]
        f = np.maximum((x - apply_b_dec_to_input * p["b_dec"]) @ W_enc + p["b_enc"], 0)
        error = np.square(f @ p["W_dec"] + p["b_dec"] - y)
        penalty = f * np.linalg.norm(p["W_dec"], axis=1) if decoder_norm_l1 else f
        width, latents = (4, 6) if mean_features else (1, 1)
        return error.sum() / 9 / width + 0.3 * penalty.sum() / 9 / latents, f

    progress = sae_jax.init(sae, sae_jax.transforms.unit_norm_decoder(), jax.random.key(0)).progress
    ours = lambda params: sae.loss(params, Batch(jnp.asarray(x), jnp.asarray(y)), progress)  # noqa: E731
    (value, info), grads = jax.value_and_grad(ours, has_aux=True)(params)
    grads = jax.tree.map(np.asarray, grads)
    theirs = {name: np.array(leaf) for name, leaf in params.items()}
    expected, f = by_hand(theirs)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(info.logs["reconstruction"] + 0.3 * info.logs["sparsity"], value, rtol=1e-12)
    assert info.logs["l0"] == pytest.approx((f > 0).sum() / 9, rel=1e-12)
    np.testing.assert_array_equal(info.fired, (f > 0).any(axis=0))
    assert 0 < (f > 0).mean() < 1
    for name, leaf in theirs.items():
        for place in np.ndindex(leaf.shape):
            kept = leaf[place]
            leaf[place] = kept + 1e-6
            above = by_hand(theirs)[0]
            leaf[place] = kept - 1e-6
            below = by_hand(theirs)[0]
            leaf[place] = kept
            np.testing.assert_allclose(grads[name][place], (above - below) / 2e-6, rtol=1e-6, atol=1e-8)


def test_initial_weights_are_drawn_as_torch_draws_them():
    params = sae_jax.relu(16, 400).init(jax.random.key(0))
    for name, fan_in in {"W_enc": 16, "b_enc": 16, "W_dec": 400, "b_dec": 400}.items():
        bound = fan_in**-0.5
        assert np.abs(params[name]).max() <= bound
        assert np.std(params[name]) == pytest.approx(bound / 3**0.5, rel=0.3 if name == "b_dec" else 0.06)
    assert not np.array_equal(params["W_enc"], params["W_dec"].T)


# linear.matmul


@pytest.mark.parametrize("out", [31, 32, 33], ids=["below TINY", "at TINY", "above TINY"])
def test_both_forms_of_the_product_agree_in_value_and_gradient(out, monkeypatch, x64):
    rng = np.random.default_rng(out)
    a, b, weight = rng.normal(size=(8, 16)), rng.normal(size=(16, out)), rng.normal(size=(8, out))
    assert (8 * b.size <= linear.TINY) == (out <= 32)

    def value_and_grads():
        return jax.value_and_grad(lambda a, b: (weight * linear.matmul(a, b)).sum(), argnums=(0, 1))(
            jnp.asarray(a), jnp.asarray(b)
        )

    np.testing.assert_allclose(linear.matmul(jnp.asarray(a), jnp.asarray(b)), a @ b, rtol=1e-12, atol=1e-13)
    as_it_is = value_and_grads()
    for tiny in (0, 10**9):
        monkeypatch.setattr(linear, "TINY", tiny)
        for ours, theirs in zip(jax.tree.leaves(value_and_grads()), jax.tree.leaves(as_it_is), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(as_it_is[1][0], weight @ b.T, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(as_it_is[1][1], a.T @ weight, rtol=1e-12, atol=1e-12)


def test_a_tiny_product_is_fused_and_a_large_one_is_not():
    def primitives(rows):
        jaxpr = jax.make_jaxpr(linear.matmul)(jnp.ones((rows, 4)), jnp.ones((4, 6)))
        return {equation.primitive.name for equation in jaxpr.eqns}

    assert "dot_general" not in primitives(8)
    assert "dot_general" in primitives(linear.TINY)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"d_in": 0, "d_sae": 6}, "d_in must be at least 1, got 0"),
        ({"d_in": 4, "d_sae": -1}, "d_sae must be at least 1, got -1"),
        ({"d_in": 4, "d_sae": 6, "l1": -0.1}, "l1 must be finite and not negative, got -0.1"),
        ({"d_in": 4, "d_sae": 6, "l1": float("nan")}, "l1 must be finite and not negative, got nan"),
    ],
)
def test_relu_refuses_what_makes_no_sae(arguments, message):
    with pytest.raises(sae_jax.InputError, match=message):
        sae_jax.relu(**arguments)


def test_an_unknown_architecture_is_told_the_known_ones():
    from sae_jax.architectures import find

    with pytest.raises(sae_jax.InputError, match="no architecture is called 'rleu'; there are: relu"):
        find("rleu")
    assert find("relu") is sae_jax.relu


def test_a_decoder_row_of_zeros_has_a_finite_gradient_under_its_norm():
    sae = sae_jax.relu(3, 4, decoder_norm_l1=True)
    params = sae.init(jax.random.key(0))
    params["W_dec"] = params["W_dec"].at[1].set(0)
    batch = sae_jax.Batch(jnp.ones((2, 3)), jnp.ones((2, 3)))
    progress = sae_jax.Progress(jnp.int32(0), jnp.zeros(4, jnp.int32))
    gradients = jax.grad(lambda params: sae.loss(params, batch, progress)[0])(params)
    for name, gradient in gradients.items():
        assert jnp.isfinite(gradient).all(), name


@pytest.mark.parametrize("width", [4, 90])  # below and above linear.TINY
def test_matmul_takes_any_leading_axes(width):
    b = jax.random.normal(jax.random.key(0), (width, width))
    a = np.asarray(jax.random.normal(jax.random.key(1), (2, 3, width)))
    flat = linear.matmul(a.reshape(6, width), b)
    np.testing.assert_allclose(linear.matmul(a, b), flat.reshape(2, 3, width), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(linear.matmul(a[0, 0], b), flat[0], rtol=1e-5, atol=1e-5)


# Further terms

SOME = np.abs(np.random.default_rng(5).normal(size=(6, 8))) * (np.random.default_rng(6).random((6, 8)) > 0.4)
WEIGHTS = np.random.default_rng(7).uniform(0.5, 2, 8)


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_lp_is_the_sum_of_powers_or_the_norm(p, weighted, x64):
    size = SOME * WEIGHTS if weighted else SOME
    weights = jnp.asarray(WEIGHTS) if weighted else None
    f = jnp.asarray(SOME)
    np.testing.assert_allclose(losses.lp(f, p, weights), (size**p).mean(), rtol=1e-12)
    np.testing.assert_allclose(losses.lp(f, p, weights, False), (size**p).sum(axis=1).mean(), rtol=1e-12)
    norm = (size**p).sum(axis=1) ** (1 / p)
    np.testing.assert_allclose(losses.lp(f, p, weights, root=True), norm.mean(), rtol=1e-12)


@pytest.mark.parametrize("root", [False, True])
def test_lp_has_finite_gradients_where_features_are_zero(root):
    for f in (jnp.zeros((2, 3)), jnp.array([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])):
        for p in (0.5, 1.0):
            gradient = jax.grad(lambda f, p=p: losses.lp(f, p, root=root))(f)
            assert jnp.isfinite(gradient).all()


PARAMS = {"W_dec": np.random.default_rng(8).normal(size=(8, 3)), "b_dec": np.arange(3.0)}
TARGET = np.random.default_rng(9).normal(size=(6, 3))


def judged(reconstruction):
    params = jax.tree.map(jnp.asarray, PARAMS)
    return reconstruction(params, jnp.asarray(SOME), Batch(jnp.asarray(TARGET), jnp.asarray(TARGET)))


def test_reconstructions_are_judged_by_their_formulas(x64):
    expected = SOME @ PARAMS["W_dec"] + PARAMS["b_dec"]
    error = np.square(expected - TARGET)
    spread = np.square(TARGET - TARGET.mean(axis=0)).sum()
    for reconstruction, value in (
        (losses.summed, error.sum(axis=1).mean()),
        (losses.averaged, error.mean()),
        (losses.unexplained, error.sum() / spread),
    ):
        x_hat, ours = judged(reconstruction)
        np.testing.assert_allclose(x_hat, expected, rtol=1e-12)
        np.testing.assert_allclose(ours, value, rtol=1e-12)


def test_nested_reconstructions_are_those_of_the_prefixes(x64):
    prefixes, weights = (2, 5, 8), (0.5, 2.0, 1.0)
    total = 0
    for m, weight in zip(prefixes, weights, strict=True):
        x_hat = SOME[:, :m] @ PARAMS["W_dec"][:m] + PARAMS["b_dec"]
        total += weight * np.square(x_hat - TARGET).sum(axis=1).mean()
    ours, value = judged(losses.nested(prefixes, weights))
    np.testing.assert_allclose(ours, x_hat, rtol=1e-12)
    np.testing.assert_allclose(value, total, rtol=1e-12)


def test_penalties_of_jumprelu_are_their_formulas(x64):
    active = (SOME > 0).astype(float)
    l0 = active.sum(axis=1)
    for penalty, value in (
        (losses.step_l0, l0.mean()),
        (losses.tanh_l0, np.tanh(4.0 * SOME).sum(axis=1).mean()),
        (losses.quadratic_l0, (2 / 3.0 * (l0 - 3.0) ** 2).mean()),
        (losses.quadratic_mean_l0, (l0.mean() / 3.0 - 1) ** 2),
    ):
        np.testing.assert_allclose(
            penalty(jnp.asarray(active), jnp.asarray(SOME), 3.0, 4.0), value, rtol=1e-12
        )
    assert set(losses.AIMED) == {losses.quadratic_l0, losses.quadratic_mean_l0}
