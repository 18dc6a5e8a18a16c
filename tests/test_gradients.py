"""Gradients checked on their own: estimators against the papers' formulas, the rest against differences.

The reference here is the formula, or the loss itself at neighbouring points; no other library.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sae_jax
from sae_jax import Batch, Progress, activations, auxk, linear, losses
from sae_jax.architectures import TABLE

# Straight-through estimators (arXiv 2407.14435, equations 11 and 12), point by point


def rect(z):
    return np.where(np.abs(z) < 0.5, 1.0, 0.0)


def papers_jumprelu(z, theta, eps, ste_to_input):
    by_theta = -(theta / eps) * rect((z - theta) / eps)
    return np.where(z > theta, 1.0, 0.0) - (by_theta if ste_to_input else 0), by_theta


def papers_step(z, theta, eps, ste_to_input):
    by_theta = -(1 / eps) * rect((z - theta) / eps)
    return -by_theta if ste_to_input else np.zeros_like(z), by_theta


ESTIMATORS = pytest.mark.parametrize(
    ("function", "formula"), [(activations.jumprelu, papers_jumprelu), (activations.step, papers_step)]
)
STE_TO_INPUT = pytest.mark.parametrize("ste_to_input", [False, True])


def points():
    """Pre-activations and thresholds, some 1/3 each below, inside and above the window of width 0.3."""
    rng = np.random.default_rng(0)
    theta = rng.uniform(0.05, 0.8, 400)
    z = theta + rng.uniform(-0.45, 0.45, 400)
    assert 0.2 < (rect((z - theta) / 0.3) > 0).mean() < 0.5
    return z, theta


def slopes(function, ste_to_input):
    """`(z, theta, eps) -> (df/dz, df/dtheta)` at one point."""
    at_one = lambda z, theta, eps: function(z[None], theta[None], eps, ste_to_input)[0]  # noqa: E731
    return jax.grad(at_one, argnums=(0, 1))


@ESTIMATORS
@STE_TO_INPUT
def test_each_points_slope_is_the_papers(function, formula, ste_to_input, x64):
    z, theta = map(jnp.asarray, points())
    ours = jax.vmap(slopes(function, ste_to_input), in_axes=(0, 0, None))(z, theta, 0.3)
    for slope, expected in zip(ours, formula(*points(), 0.3, ste_to_input), strict=True):
        np.testing.assert_allclose(slope, expected, rtol=1e-13, atol=0)


@ESTIMATORS
@STE_TO_INPUT
def test_a_traced_and_vmapped_bandwidth_gives_the_same_slopes(function, formula, ste_to_input, x64):
    z, theta = map(jnp.asarray, points())
    widths = np.array([0.02, 0.3, 2.0])
    each_point = jax.vmap(slopes(function, ste_to_input), in_axes=(0, 0, None))
    ours = jax.jit(jax.vmap(each_point, in_axes=(None, None, 0)))(z, theta, jnp.asarray(widths))
    for i, eps in enumerate(widths):
        for slope, expected in zip(ours, formula(*points(), eps, ste_to_input), strict=True):
            np.testing.assert_allclose(slope[i], expected, rtol=1e-13, atol=0)


@ESTIMATORS
@STE_TO_INPUT
def test_what_comes_down_is_weighed_and_summed_over_the_batch(function, formula, ste_to_input, x64):
    z, theta = (values[:12] for values in points())
    z = np.stack([z, z + 0.1, z - 0.1])
    above = np.random.default_rng(1).normal(size=z.shape)
    _, pull = jax.vjp(
        lambda z, theta: function(z, theta, 0.3, ste_to_input), jnp.asarray(z), jnp.asarray(theta)
    )
    to_z, to_theta = formula(z, theta, 0.3, ste_to_input)
    ours = pull(jnp.asarray(above))
    np.testing.assert_allclose(ours[0], above * to_z, rtol=1e-13, atol=0)
    np.testing.assert_allclose(ours[1], (above * to_theta).sum(axis=0), rtol=1e-12, atol=1e-14)


@ESTIMATORS
def test_no_slope_reaches_the_bandwidth(function, formula):
    by_width = jax.grad(lambda eps: function(jnp.array([0.5, 0.6]), jnp.array([0.5, 0.5]), eps, True).sum())
    assert by_width(0.3) == 0


@ESTIMATORS
@pytest.mark.parametrize("z", [0.35, 0.65, 0.1, 0.9])
def test_on_the_edge_of_the_window_and_outside_a_threshold_feels_nothing(function, formula, z, x64):
    # 0.5 -+ 0.15: binary fractions, so that the edge is hit
    eps, theta = 0.25, 0.5
    z = {0.35: 0.375, 0.65: 0.625}.get(z, z)
    assert slopes(function, True)(jnp.asarray(z), jnp.asarray(theta), eps)[1] == 0
    inside = slopes(function, True)(jnp.asarray(0.5 + (z > 0.5) * 0.124 - 0.062), jnp.asarray(theta), eps)[1]
    assert inside < 0


# Every smooth gradient against the difference quotient, in float64

ROWS, D_IN, D_SAE, D_OUT = 6, 4, 7, 3
DEAD = np.array([0, 9, 0, 9, 9, 0, 0])
AUXK = {"k": 2, "k_aux": 2, "dead_after": 3, "auxk": 0.7}

SMOOTH = {
    "relu": ("relu", {"l1": 0.3}),
    "relu, by decoder norm, tied": (
        "relu", {"l1": 0.3, "decoder_norm_l1": True, "tied": True, "apply_b_dec_to_input": True}
    ),
    "relu, lp": ("relu", {"l1": 0.3, "p": 0.7, "mean_features": False}),
    "relu, lp root": ("relu", {"l1": 0.3, "p": 0.7, "lp_root": True, "decoder_norm_l1": True}),
    "relu, p-annealing": ("relu", {"l1": 0.3, "p_end": 0.5, "p_anneal": (0, 10)}),
    "relu, target L0": ("relu", {"l1": 0.3, "target_l0": 3}),
    "relu, warm-up": ("relu", {"l1": 0.3, "l1_warmup": 50}),
    "relu, unexplained": ("relu", {"l1": 0.3, "reconstruction": losses.unexplained}),
    "topk": ("topk", {"k": 3, "auxk": 0}),
    "topk, attached": ("topk", {**AUXK, "auxk_loss": auxk.attached}),
    "batch_topk, attached": (
        "batch_topk", {**AUXK, "auxk_loss": auxk.attached, "rescale_acts_by_decoder_norm": True}
    ),
    "jumprelu": ("jumprelu", {"threshold_init": 0.2}),
    "jumprelu, tanh and pre_act": (
        "jumprelu",
        {"threshold_init": 0.2, "penalty": losses.tanh_l0, "pre_act": 0.4, "dead_after": 3},
    ),
    "jumprelu, log threshold": (
        "jumprelu",
        {
            "threshold_init": 0.2, "penalty": losses.tanh_l0, "log_threshold": True, "target_l0": 2,
            "apply_b_dec_to_input": True,
        },
    ),
    "gated, attached": ("gated", {"l1": 0.3, "detach_auxiliary": False, "decoder_norm_l1": True}),
    "gated, target L0": ("gated", {"l1": 0.3, "detach_auxiliary": False, "target_l0": 3}),
    "matryoshka": (
        "matryoshka",
        {**AUXK, "prefixes": (2, 4, 7), "prefix_weights": (0.2, 0.3, 0.5), "auxk_loss": auxk.attached},
    ),
    "matryoshka of relu": ("matryoshka", {"of": sae_jax.relu, "prefixes": (3, 7), "l1": 0.3}),
    "transcoder of topk, skip": (
        "transcoder", {**AUXK, "of": sae_jax.topk, "skip": True, "d_out": D_OUT, "auxk_loss": auxk.attached}
    ),
    "transcoder of gated, skip": (
        "transcoder", {"of": sae_jax.gated, "skip": True, "d_out": D_OUT, "detach_auxiliary": False}
    ),
    "crosscoder": ("crosscoder", {"sources": 2, "l1": 0.3, "target_l0": 3}),
}  # fmt: skip
"""Every architecture, with nothing detached that a difference would see; see below for what is."""

NOT_SMOOTH = ("threshold", "log_threshold", "log_penalty")
"""Leaves whose gradient is an estimate, or which are set: the tests above and below answer for them."""


def problem(architecture, arguments):
    """An SAE, params off every symmetry, and a loss of params alone."""
    sae = TABLE[architecture](D_IN, D_SAE, **arguments)
    rng = np.random.default_rng(3)
    params = {
        name: np.asarray(leaf) + (name not in NOT_SMOOTH) * 0.3 * rng.normal(size=leaf.shape)
        for name, leaf in sae.init(jax.random.key(1), jnp.float64).items()
    }
    if "dead_after" in arguments and "k" in arguments:
        params["W_enc"] *= np.where(DEAD > 0, 0.1, 1)  # too weak to be chosen, but above 0 on some rows
    rows = (2, D_IN) if architecture == "crosscoder" else (D_IN,)
    x = rng.normal(size=(ROWS, *rows))
    y = rng.normal(size=(ROWS, D_OUT)) if "d_out" in arguments else x + rng.normal(size=x.shape)
    batch, progress = Batch(jnp.asarray(x), jnp.asarray(y)), Progress(jnp.int32(5), jnp.asarray(DEAD))
    return sae, params, lambda params: sae.loss(params, batch, progress)[0], batch, progress


def quotient(loss, params, name, place, h):
    moved = [dict(params), dict(params)]
    for side, sign in zip(moved, (1, -1), strict=True):
        side[name] = params[name].copy()
        side[name][place] += sign * h
    above, below = (float(loss(side)) for side in moved)
    return (above - below) / (2 * h)


def assert_is_the_quotient(gradients, loss, params, names):
    """Entry by entry; at two step sizes, so that a jump within the step cannot hide as an error of it."""
    loss, seen = jax.jit(loss), 0
    for name in names:
        for place in np.ndindex(params[name].shape):
            coarse, fine = (quotient(loss, params, name, place, h) for h in (1e-5, 3e-6))
            np.testing.assert_allclose(coarse, fine, rtol=1e-5, atol=1e-7, err_msg=f"{name}{place}: a kink")
            np.testing.assert_allclose(
                gradients[name][place], fine, rtol=1e-6, atol=1e-8, err_msg=f"{name}{place}"
            )
            seen += fine != 0
    assert seen > 0


@pytest.mark.parametrize("name", SMOOTH)
def test_a_gradient_is_the_difference_quotient(name, x64):
    sae, params, loss, batch, progress = problem(*SMOOTH[name])
    gradients, info = jax.grad(sae.loss, has_aux=True)(params, batch, progress)
    assert 0 < info.logs["l0"] < D_SAE
    for term in ("auxk", "pre_act"):
        assert info.logs.get(term, 1) > 0
    smooth = [leaf for leaf in params if leaf not in NOT_SMOOTH]
    assert {"W_dec", "b_dec"} < set(smooth)
    assert_is_the_quotient(gradients, loss, params, smooth)


def test_every_architecture_is_among_them():
    assert {architecture for architecture, _ in SMOOTH.values()} == set(TABLE)


@pytest.mark.parametrize("name", [name for name in SMOOTH if "target" in name or "annealing" in name])
def test_what_a_penalty_is_steered_by_takes_no_gradient(name, x64):
    _, params, loss, *_ = problem(*SMOOTH[name])
    assert jax.grad(loss)(params)["log_penalty"] == 0
    # although the loss depends on it
    assert loss({**params, "log_penalty": jnp.asarray(1.0)}) > loss(params)


def test_the_threshold_of_batch_topk_takes_no_gradient(x64):
    _, params, loss, *_ = problem(*SMOOTH["batch_topk, attached"])
    assert jax.grad(loss)(params)["threshold"] == 0


# Gradients of a threshold through whole losses: by hand from the estimators


@pytest.mark.parametrize("log_threshold", [False, True])
@STE_TO_INPUT
def test_a_thresholds_gradient_in_the_loss_is_the_papers(log_threshold, ste_to_input, x64):
    arguments = {"bandwidth": 0.6, "threshold_init": 0.2, "l0_coefficient": 0.3}
    _, params, loss, batch, _ = problem(
        "jumprelu", {**arguments, "log_threshold": log_threshold, "ste_to_input": ste_to_input}
    )
    x, y = map(np.asarray, batch)
    pre = x @ params["W_enc"] + params["b_enc"]
    theta, eps = np.full(D_SAE, 0.2), 0.6
    f = np.where(pre > theta, pre, 0)
    by_f = 2 * (f @ params["W_dec"] + params["b_dec"] - y) @ params["W_dec"].T / ROWS
    f_by_pre, f_by_theta = papers_jumprelu(pre, theta, eps, ste_to_input)
    h_by_pre, h_by_theta = papers_step(pre, theta, eps, ste_to_input)
    by_theta = (by_f * f_by_theta + 0.3 / ROWS * h_by_theta).sum(axis=0)
    by_pre = by_f * f_by_pre + 0.3 / ROWS * h_by_pre
    ours = jax.grad(loss)(params)
    leaf = "log_threshold" if log_threshold else "threshold"
    np.testing.assert_allclose(ours[leaf], by_theta * (theta if log_threshold else 1), rtol=1e-11)
    np.testing.assert_allclose(ours["b_enc"], by_pre.sum(axis=0), rtol=1e-11)
    np.testing.assert_allclose(ours["W_enc"], x.T @ by_pre, rtol=1e-11, atol=1e-13)


# What is detached: the gradient is that of the loss in which the detached part is frozen


def test_the_detached_auxiliary_of_gated_is_the_loss_with_a_frozen_decoder(x64):
    _, params, loss, batch, _ = problem("gated", {"l1": 0.3})
    x, y = batch
    frozen = {name: jnp.asarray(params[name]) for name in ("W_dec", "b_dec")}

    def with_frozen_decoder(p):
        h = (x - p["b_dec"]) @ p["W_enc"]
        gate = h + p["b_gate"]
        opened = jnp.maximum(gate, 0)
        f = jnp.where(gate > 0, jnp.maximum(jnp.exp(p["r_mag"]) * h + p["b_mag"], 0), 0)
        error = ((f @ p["W_dec"] + p["b_dec"] - y) ** 2).sum() / ROWS
        auxiliary = ((opened @ frozen["W_dec"] + frozen["b_dec"] - y) ** 2).sum() / ROWS
        return error + 0.3 * opened.sum() / ROWS + auxiliary

    np.testing.assert_allclose(loss(params), with_frozen_decoder(params), rtol=1e-12)
    gradients = jax.grad(loss)(params)
    assert_is_the_quotient(gradients, with_frozen_decoder, params, params)
    with pytest.raises(AssertionError, match="W_dec"):
        assert_is_the_quotient(gradients, loss, params, params)


@pytest.mark.parametrize("convention", [auxk.saelens, auxk.normalised, auxk.fvu], ids=lambda c: c.__name__)
@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("of", ["topk", "batch_topk"])
def test_a_detached_residual_of_auxk_is_the_loss_with_a_frozen_residual(of, rescaled, convention, x64):
    arguments = {**AUXK, "rescale_acts_by_decoder_norm": rescaled}
    _, params, loss, batch, progress = problem(of, {**arguments, "auxk_loss": convention})
    bare, *_ = problem(of, {**arguments, "auxk": 0})

    def terms(p):
        norms = jnp.linalg.norm(p["W_dec"], axis=-1) if rescaled else jnp.ones(D_SAE)
        pre = ((batch.x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]) * norms
        f = (activations.topk if of == "topk" else activations.batch_topk)(pre, AUXK["k"])
        directions = p["W_dec"] / norms[:, None]
        return pre, f, directions, batch.y - (f @ directions + p["b_dec"])

    frozen = terms(params)[-1]

    def with_frozen_residual(p):
        pre, f, directions, _ = terms(p)
        fired = (f > 0).any(axis=0)
        term = convention(pre, frozen, batch.y, lambda a: a @ directions, fired, progress, AUXK["k_aux"], 3)
        return bare.loss(p, batch, progress)[0] + AUXK["auxk"] * term

    np.testing.assert_allclose(loss(params), with_frozen_residual(params), rtol=1e-12)
    gradients = jax.grad(loss)(params)
    smooth = [leaf for leaf in params if leaf not in NOT_SMOOTH]
    assert_is_the_quotient(gradients, with_frozen_residual, params, smooth)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_is_the_quotient(gradients, loss, params, smooth)


@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [("relu", {"target_l0": 3}), ("gated", {"target_l0": 3}), ("relu", {"p_end": 0.5, "p_anneal": (0, 10)})],
)
def test_a_steered_factor_is_a_constant_to_the_gradient(architecture, arguments, x64):
    sae, params, loss, batch, progress = problem(architecture, {"l1": 0.3, **arguments})
    logs = sae.loss(params, batch, progress)[1].logs
    plain = {key: value for key, value in arguments.items() if key != "target_l0"}
    rest = float(loss(params) - logs["reconstruction"] - logs.get("auxiliary", 0))
    weight = rest / float(logs["sparsity"])
    if plain:  # at step 5 of an annealing from 1 to 0.5 over 10
        plain = {"p": 0.75}
    else:
        assert weight != pytest.approx(0.3, rel=1e-3)
    constant = problem(architecture, {"l1": weight, **plain})[0]
    bare = {name: leaf for name, leaf in params.items() if name != "log_penalty"}
    ours = jax.grad(loss)(params)
    for name, gradient in jax.grad(lambda p: constant.loss(p, batch, progress)[0])(bare).items():
        np.testing.assert_allclose(ours[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["jumprelu", "topk, attached", "gated, attached", "crosscoder"])
def test_vmapped_gradients_are_those_of_each_alone(name, x64):
    architecture, arguments = SMOOTH[name]
    _, params, loss, *_ = problem(architecture, arguments)
    both = {leaf: jnp.stack([value, 1.1 * value]) for leaf, value in params.items()}
    together = jax.vmap(jax.grad(loss))(both)
    for i in (0, 1):
        alone = jax.grad(loss)(jax.tree.map(lambda leaf, i=i: leaf[i], both))
        for leaf, gradient in alone.items():
            np.testing.assert_allclose(together[leaf][i], gradient, rtol=1e-11, atol=1e-13)


# Products of a training step, whose gradients go by turned operands on a CPU


WIDER = pytest.mark.parametrize(
    ("rows", "inner", "out"), [(64, 16, 32), (64, 32, 16), (24, 8, 40), (60, 32, 16), (64, 20, 32)]
)


def of_product(a, b):
    return (jnp.sin(linear.matmul(a, b)) * jnp.arange(b.shape[1])).sum()


@WIDER
@pytest.mark.parametrize("members", [1, 3])
def test_products_in_reverse_have_the_gradients_of_products(x64, rows, inner, out, members):
    rng = np.random.default_rng(0)
    a, b = (
        jnp.asarray(rng.normal(size=(members, rows, inner))),
        jnp.asarray(rng.normal(size=(members, inner, out))),
    )
    gradients = jax.vmap(jax.grad(of_product, argnums=(0, 1)))
    expected = jax.jit(gradients)(a, b)
    with linear.in_reverse():
        found = jax.jit(gradients)(a, b)
    for one, other in zip(found, expected, strict=True):
        # sums of at most 64 terms of about 40, in another order
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("divisible", [True, False])
def test_a_step_alone_gives_up_forward_mode(divisible):
    d_sae = 32 if divisible else 30
    sae = sae_jax.relu(16, d_sae, l1=0.1)
    state, batch = sae_jax.init(sae, optax.sgd(0.1), jax.random.key(0)), jnp.ones((64, 16))
    assert jax.jacfwd(lambda x: sae.encode(state.params, x))(batch[:8]).shape == (8, d_sae, 8, 16)
    step = sae_jax.make_step(sae, optax.sgd(0.1))
    forward = lambda: jax.jvp(lambda x: step(state, Batch(x, x))[1]["loss"], (batch,), (batch,))  # noqa: E731
    if divisible:
        with pytest.raises(TypeError, match="custom_vjp"):
            forward()
    else:
        forward()
