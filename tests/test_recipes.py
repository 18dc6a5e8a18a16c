"""Recipes: what every one of them can do, and the numbers of their sources."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sae_jax
from sae_jax import Batch, InputError, Progress, auxk, losses, recipes, sweep
from sae_jax.train import state_from, trained_params

D_IN, D_SAE = 6, 12
ROWS = np.random.default_rng(0).normal(size=(64, D_IN)).astype(np.float32)
TRAINER = {"steps": 1000, "warmup_steps": 10}
SPARSE_TRAINER = {**TRAINER, "sparsity_warmup_steps": 10}


class Case(NamedTuple):
    """What a recipe needs beside the sizes, what it is swept by, and a rate at which 30 steps tell."""

    needs: dict[str, Any]
    axis: str
    values: tuple[float, float]
    learning_rate: float = 1e-2


CASES = {
    "seed": Case({}, "l1", (0.01, 0.1)),
    "anthropic_2023": Case({"l1": 0.01, "x": ROWS}, "l1", (0.01, 0.1)),
    "anthropic_april_2024": Case({"steps": 100, "l1": 0.01}, "l1", (0.01, 0.1)),
    "openai_topk": Case({"k": 3, "x": ROWS}, "k", (2, 3)),
    "sparsify_topk": Case({"k": 3, "x": ROWS}, "k", (2, 3), 1e-3),
    "gemma_scope": Case({"l0_coefficient": 1e-2}, "l0_coefficient", (1e-2, 1.0)),
    "gemma_scope_2": Case({"target_l0": 3.0}, "target_l0", (1.0, 6.0)),
    "saelens_standard": Case({"l1": 0.01}, "l1", (0.01, 0.1)),
    "saelens_topk": Case({"k": 3}, "k", (2, 3)),
    "saelens_batchtopk": Case({"k": 3.0}, "k", (1.5, 3.0)),
    "saelens_jumprelu": Case({"l0_coefficient": 0.01}, "l0_coefficient", (0.01, 0.1)),
    "saelens_gated": Case({"l1": 0.01}, "l1", (0.01, 0.1)),
    "saelens_matryoshka": Case({"k": 3.0, "matryoshka_widths": (4, 12)}, "k", (1.5, 3.0)),
    "dictionary_learning_standard": Case({**SPARSE_TRAINER, "l1": 0.01}, "l1", (0.01, 0.1)),
    "dictionary_learning_april": Case({**SPARSE_TRAINER, "l1": 0.01}, "l1", (0.01, 0.1)),
    "dictionary_learning_topk": Case({**TRAINER, "k": 3, "batch_size": 64}, "k", (2, 3)),
    "dictionary_learning_batchtopk": Case({**TRAINER, "k": 3, "batch_size": 64}, "k", (2, 3)),
    "dictionary_learning_jumprelu": Case({**SPARSE_TRAINER, "target_l0": 3.0}, "target_l0", (1.0, 6.0)),
    "dictionary_learning_gated": Case({**SPARSE_TRAINER, "l1": 0.01}, "l1", (0.01, 0.1)),
    "dictionary_learning_matryoshka": Case(
        {**TRAINER, "k": 3, "batch_size": 64, "group_fractions": (0.25, 0.75)}, "k", (2, 3)
    ),
}
every = pytest.mark.parametrize("name", CASES)


def built(name: str) -> recipes.Recipe:
    return recipes.find(name)(d_in=D_IN, d_sae=D_SAE, **CASES[name].needs)


def test_the_table_holds_every_recipe_under_its_own_name():
    assert set(recipes.RECIPES) == set(CASES)
    assert all(build.__name__ == name for name, build in recipes.RECIPES.items())
    assert set(recipes.RECIPES) < set(recipes.__all__)


def test_an_unknown_name_is_told_the_nearest_first():
    with pytest.raises(
        InputError, match="no recipe is called 'gemmascope'; there are: gemma_scope, gemma_scope_2"
    ):
        recipes.find("gemmascope")


# Every recipe


@every
def test_its_sparsity_and_its_learning_rate_are_axes_of_a_sweep_which_lowers_the_loss(name):
    case = CASES[name]
    factory, optimizer = built(name)
    result = sweep(
        factory,
        optimizer,
        grid=sae_jax.grid(**{case.axis: list(case.values)}, lr=[0.0, case.learning_rate]),
        source=sae_jax.in_memory(ROWS, batch_size=32),
        steps=30,
    )
    assert np.isfinite(result.table["loss"]).all()
    sae, batch = factory(**{case.axis: case.values[1]}), Batch(jnp.asarray(ROWS), jnp.asarray(ROWS))
    # past the warm-ups of penalties, so that both losses weigh the same
    late = Progress(jnp.int32(10**6), jnp.zeros(D_SAE, jnp.int32))
    params = [jax.tree.map(jnp.asarray, result.member(i).params) for i in (2, 3)]
    stood_still, learned = (sae.loss(each, batch, late)[0] for each in params)
    assert learned < stood_still
    moved = [
        not np.array_equal(result.member(0).params["b_dec"], result.member(i).params["b_dec"])
        for i in range(4)
    ]
    still = name == "openai_topk"  # rows to norm 1, and an average: all else stands still at rate 0
    assert moved[1]
    assert moved[3]
    assert not moved[2] or still


@every
def test_its_step_lowers_for_cuda_and_tpu(name):
    sae, chain = built(name).factory(), built(name).optimizer()
    state = jax.eval_shape(lambda: sae_jax.init(sae, chain, jax.random.key(0)))
    batch = Batch(*[jax.ShapeDtypeStruct((16, D_IN), jnp.float32)] * 2)
    step = jax.jit(sae_jax.make_step(sae, chain))
    exported = jax.export.export(step, platforms=["cuda", "tpu"])(state, batch)
    assert exported.platforms == ("cuda", "tpu")


@every
def test_what_it_fixes_is_refused_in_one_sentence(name):
    with pytest.raises(
        InputError, match=rf"^recipes.{name} fixes 'tied', or knows nothing of it; it takes: d_in, "
    ):
        recipes.find(name)(d_in=D_IN, d_sae=D_SAE, **CASES[name].needs, tied=True)


@every
def test_what_it_lacks_is_named_in_one_sentence(name):
    if name == "seed":
        assert recipes.seed().factory().config["d_sae"] == 6
        return
    with pytest.raises(InputError, match=rf"^recipes.{name} needs .*d_sae"):
        recipes.find(name)(d_in=D_IN)


@every
def test_no_width_under_one(name):
    with pytest.raises(InputError):
        recipes.find(name)(d_in=D_IN, d_sae=0, **CASES[name].needs).factory()


# The numbers of the papers


CONSTANTS: dict[str, dict[str, Any]] = {
    "seed": {
        "architecture": "relu", "d_in": D_IN, "d_sae": D_SAE, "l1": 0.1, "mean_features": True,
        "decoder_norm_l1": False, "apply_b_dec_to_input": False, "tied": False, "decoder_init_norm": None,
        "p": 1.0, "l1_warmup": 0,
    },
    "anthropic_2023": {
        "architecture": "relu", "l1": 0.01, "mean_features": False, "decoder_norm_l1": False,
        "apply_b_dec_to_input": True, "tied": False, "l1_warmup": 0, "p": 1.0,
    },
    "anthropic_april_2024": {
        "architecture": "relu", "l1_warmup": 5, "mean_features": False, "decoder_norm_l1": True,
        "apply_b_dec_to_input": False, "tied": False, "decoder_init_norm": 0.1, "p": 1.0,
    },
    "openai_topk": {
        "architecture": "topk", "k": 3, "auxk": 1 / 32, "auxk_loss": auxk.normalised, "k_aux": 256,
        "dead_after": 76, "apply_b_dec_to_input": True, "rescale_acts_by_decoder_norm": False,
        "reconstruction": losses.unexplained,
    },
    "sparsify_topk": {
        "architecture": "topk", "k": 3, "auxk": 0.0, "auxk_loss": auxk.fvu, "apply_b_dec_to_input": True,
        "rescale_acts_by_decoder_norm": False, "reconstruction": losses.unexplained,
    },
    "gemma_scope": {
        "architecture": "jumprelu", "l0_coefficient": 1e-2, "l0_warmup": 10_000, "target_l0": None,
        "penalty": losses.step_l0, "bandwidth": 0.001, "threshold_init": 0.001, "log_threshold": True,
        "ste_to_input": False, "penalty_of_features": False, "pre_act": 0.0, "apply_b_dec_to_input": True,
        "decoder_init_norm": 1.0,
    },
    "gemma_scope_2": {
        "architecture": "jumprelu", "l0_coefficient": 1e-3, "l0_warmup": 50_000, "target_l0": 3.0,
        "penalty": losses.quadratic_l0, "bandwidth": 0.001, "threshold_init": 0.001, "log_threshold": True,
        "apply_b_dec_to_input": True, "decoder_init_norm": 1.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CONSTANTS)
def test_the_model_has_the_numbers_of_its_source(name):
    config = built(name).factory().config
    assert {key: config[key] for key in CONSTANTS[name]} == CONSTANTS[name]


def test_defaults_are_those_of_the_sources():
    sizes = {"d_in": 8, "d_sae": 64}
    assert recipes.anthropic_april_2024(**sizes, steps=200_000).factory().config["l1"] == 5
    assert recipes.anthropic_april_2024(**sizes, steps=200_000).factory().config["l1_warmup"] == 10_000
    assert recipes.openai_topk(**sizes).factory().config["k"] == 32
    assert recipes.openai_topk(**sizes, batch_size=4096).factory().config["dead_after"] == 2441
    assert recipes.sparsify_topk(**sizes).factory().config["k"] == 32
    assert recipes.seed().factory().config == {**recipes.seed(l1=0.1).factory().config, "d_in": 4, "d_sae": 6}


def adam_by_hand(gradients, rates, b1, b2, eps):
    m, v, updates = 0.0, 0.0, []
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        m, v = b1 * m + (1 - b1) * gradient, b2 * v + (1 - b2) * gradient**2
        updates.append(-rate * m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps))
    return np.array(updates)


def updates_of(recipe, gradients):
    """What the recipe's chain, at its own learning rate, makes of gradients of `b_dec`, step by step."""
    sae, chain = recipe.factory(), optax.with_extra_args_support(recipe.optimizer())
    params = sae.init(jax.random.key(0), jnp.float64)
    zeros = jax.tree.map(jnp.zeros_like, params)
    x = jnp.ones((2, D_IN))

    def update(carry, gradient):
        step, state = carry
        updates, state = chain.update(
            {**zeros, "b_dec": gradient}, state, params,
            sae=sae, batch=Batch(x, x), progress=Progress(step, jnp.zeros(D_SAE, jnp.int32)), value=0.0,
        )  # fmt: skip
        return (step + 1, state), updates["b_dec"]

    return np.asarray(jax.lax.scan(update, (jnp.int32(0), chain.init(params)), jnp.asarray(gradients))[1])


def constant(rate):
    return lambda step: rate


def april(step):
    return 5e-5 * min(1, (100 - step) / 20)


def gemma(step):
    return 7e-5 * (0.55 - 0.45 * math.cos(math.pi * min(step / 1000, 1)))


@pytest.mark.parametrize(
    ("name", "rate", "b1", "b2", "eps"),
    [
        ("seed", constant(1e-2), 0.9, 0.999, 1e-8),
        ("anthropic_2023", constant(1e-4), 0.9, 0.999, 1e-8),
        ("anthropic_april_2024", april, 0.9, 0.999, 1e-8),
        ("openai_topk", constant(1e-4), 0.9, 0.999, 6.25e-10),
        ("gemma_scope", gemma, 0.0, 0.999, 1e-8),
        ("gemma_scope_2", gemma, 0.0, 0.999, 1e-8),
    ],
)
def test_the_optimizer_is_adam_with_the_numbers_of_its_source(name, rate, b1, b2, eps, x64):
    steps = {"anthropic_april_2024": 100, "gemma_scope": 1010}.get(name, 50)
    # small enough for eps to tell
    gradients = np.random.default_rng(1).normal(size=(steps, D_IN)) * 1e-8
    expected = adam_by_hand(gradients, [rate(step) for step in range(steps)], b1, b2, eps)
    np.testing.assert_allclose(updates_of(built(name), gradients), expected, rtol=1e-9)


def test_gemma_scopes_rate_starts_at_a_tenth():
    assert gemma(0) == pytest.approx(7e-6)
    assert gemma(500) == pytest.approx(0.55 * 7e-5)
    assert gemma(1000) == gemma(5000) == pytest.approx(7e-5)


def test_the_april_update_clips_at_norm_one(x64):
    gradients = np.zeros((2, D_IN))
    gradients[:, 0] = [100.0, 0.5]
    clipped = adam_by_hand(np.array([100 / (100 + 1e-6), 0.5]), [5e-5, 5e-5], 0.9, 0.999, 1e-8)
    updates = updates_of(built("anthropic_april_2024"), gradients)
    np.testing.assert_allclose(updates[:, 0], clipped, rtol=1e-9)


@pytest.mark.parametrize("name", ["anthropic_2023", "openai_topk", "gemma_scope", "gemma_scope_2"])
def test_unit_decoders_keep_their_norm_and_their_gradient_is_projected_before_adam(name, x64):
    sae, chain = built(name).factory(), optax.with_extra_args_support(built(name).optimizer())
    params = sae.init(jax.random.key(0), jnp.float64)
    np.testing.assert_allclose(np.linalg.norm(params["W_dec"], axis=1), 1, rtol=1e-12)
    zeros, x = jax.tree.map(jnp.zeros_like, params), jnp.ones((2, D_IN))
    updates, _ = chain.update(
        {**zeros, "W_dec": 3.0 * params["W_dec"]}, chain.init(params), params,
        sae=sae, batch=Batch(x, x), progress=Progress(jnp.int32(0), jnp.zeros(D_SAE, jnp.int32)), value=0.0,
    )  # fmt: skip
    # a gradient along the rows is gone but for rounding, which Adam would blow up to a whole step
    assert np.abs(updates["W_dec"]).max() < 1e-7
    state, batch = (
        state_from(params, chain),
        Batch(jnp.asarray(ROWS, float), jnp.asarray(ROWS, float)),
    )
    step = jax.jit(sae_jax.make_step(sae, chain))
    for _ in range(3):
        state, _ = step(state, batch)
    tolerance = 1e-3 if name == "openai_topk" else 1e-12
    np.testing.assert_allclose(np.linalg.norm(state.params["W_dec"], axis=1), 1, atol=tolerance)


# Where they start


def test_biases_start_where_the_sources_put_them():
    median = np.asarray(sae_jax.initialisation.geometric_median(ROWS))
    for name, point in {
        "anthropic_2023": median,
        "openai_topk": median,
        "sparsify_topk": ROWS.mean(axis=0),
    }.items():
        params = built(name).factory().init(jax.random.key(0))
        np.testing.assert_allclose(params["b_dec"], point, rtol=1e-6, atol=1e-7)
        assert not params["b_enc"].any()
        needs = {**CASES[name].needs, "x": None}
        bare = recipes.find(name)(d_in=D_IN, d_sae=D_SAE, **needs).factory().init(jax.random.key(0))
        assert not bare["b_dec"].any()
    for name in ("anthropic_april_2024", "gemma_scope", "gemma_scope_2"):
        params = built(name).factory().init(jax.random.key(0))
        assert not params["b_dec"].any()
        assert not params["b_enc"].any()


@pytest.mark.parametrize("name", ["anthropic_2023", "openai_topk", "sparsify_topk"])
def test_no_rows_have_no_centre(name):
    with pytest.raises(InputError, match="no rows is not defined"):
        recipes.find(name)(d_in=D_IN, d_sae=D_SAE, **{**CASES[name].needs, "x": ROWS[:0]})


def test_decoders_start_at_the_norms_of_the_sources():
    norms = {
        "anthropic_2023": 1,
        "anthropic_april_2024": 0.1,
        "openai_topk": 1,
        "sparsify_topk": 1,
        "gemma_scope": 1,
    }
    for name, norm in norms.items():
        params = built(name).factory().init(jax.random.key(0))
        np.testing.assert_allclose(np.linalg.norm(params["W_dec"], axis=1), norm, rtol=1e-5)
        directions = params["W_enc"].T / np.linalg.norm(params["W_enc"].T, axis=1, keepdims=True)
        tied = np.allclose(directions * norm, params["W_dec"], rtol=1e-5)
        assert tied is (name != "anthropic_2023")
    params = built("gemma_scope").factory().init(jax.random.key(0))
    np.testing.assert_allclose(np.exp(params["log_threshold"]), 0.001, rtol=1e-5)
    np.testing.assert_array_equal(params["W_enc"], params["W_dec"].T)
    assert np.abs(built("sparsify_topk").factory().init(jax.random.key(0))["W_enc"]).max() <= D_IN**-0.5


def test_openais_encoder_gives_random_unit_vectors_back_at_norm_one_on_average():
    recipe = recipes.openai_topk(d_in=32, d_sae=256, k=8)
    sae = recipe.factory()
    params = sae.init(jax.random.key(3))
    drawn = np.random.default_rng(0).normal(size=(4096, 32)).astype(np.float32)
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    x_hat = np.asarray(sae.decode(params, sae.encode(params, jnp.asarray(drawn))))
    # 256 others were looked at
    assert np.linalg.norm(x_hat, axis=1).mean() == pytest.approx(1, rel=0.03)


# Resampling, and what is evaluated


@pytest.mark.parametrize(
    ("step", "silent", "resampled"),
    [
        (24_999, 12_500, True), (99_999, 20_000, True), (24_999, 12_000, False),
        (24_998, 20_000, False), (25_000, 20_000, False), (124_999, 20_000, False),
    ],
)  # fmt: skip
def test_towards_monosemanticity_resamples_at_its_four_steps(step, silent, resampled):
    sae, chain = built("anthropic_2023").factory(), built("anthropic_2023").optimizer()
    params = sae.init(jax.random.key(0))
    params["b_enc"] = params["b_enc"].at[4].set(-1e3)  # latent 4 is silent
    state = state_from(params, chain)
    progress = Progress(jnp.int32(step), jnp.zeros(D_SAE, jnp.int32).at[4].set(silent))
    batch = Batch(jnp.asarray(ROWS), jnp.asarray(ROWS))
    after, _ = jax.jit(sae_jax.make_step(sae, chain))(state._replace(progress=progress), batch)
    assert (after.params["b_enc"][4] == 0) == resampled


def test_openai_evaluates_an_average_of_decay_999(x64):
    sae, chain = built("openai_topk").factory(), built("openai_topk").optimizer()
    state = sae_jax.init(sae, chain, jax.random.key(0), jnp.float64)
    step, batch = (
        jax.jit(sae_jax.make_step(sae, chain)),
        Batch(jnp.asarray(ROWS, float), jnp.asarray(ROWS, float)),
    )
    seen = []
    for _ in range(5):
        state, _ = step(state, batch)
        seen.append(np.asarray(state.params["W_enc"]))
    weights = 0.999 ** np.arange(4, -1, -1)
    average = np.tensordot(weights, np.array(seen), 1) / weights.sum()
    np.testing.assert_allclose(trained_params(state)["W_enc"], average, rtol=1e-6)


def test_sparsify_takes_schedule_free_signs_with_momentum_95_and_evaluates_their_average(x64):
    recipe = built("sparsify_topk")
    sae, chain = recipe.factory(), recipe.optimizer()
    lr = 5e-3 / (D_SAE / 2**14) ** 0.5
    state = sae_jax.init(sae, chain, jax.random.key(0), jnp.float64)
    y = {name: np.array(leaf) for name, leaf in state.params.items()}
    z = {name: leaf.copy() for name, leaf in y.items()}
    average = {name: leaf.copy() for name, leaf in y.items()}
    step, rng = jax.jit(sae_jax.make_step(sae, chain)), np.random.default_rng(2)
    gradient = jax.jit(jax.grad(lambda params, batch: sae.loss(params, batch, state.progress)[0]))
    for t in range(1, 21):
        x = jnp.asarray(rng.normal(size=(32, D_IN)))
        g = {name: np.array(leaf) for name, leaf in gradient(y, Batch(x, x)).items()}
        g["W_dec"] -= (g["W_dec"] * y["W_dec"]).sum(axis=1, keepdims=True) * y["W_dec"]
        for name in y:
            # normalising y moves the average that y and z stand for
            average[name] = (y[name] - 0.05 * z[name]) / 0.95
            z[name] = z[name] - lr * np.sign(g[name])
            average[name] = (1 - 1 / t) * average[name] + z[name] / t
            y[name] = 0.05 * z[name] + 0.95 * average[name]
        y["W_dec"] /= np.linalg.norm(y["W_dec"], axis=1, keepdims=True) + np.finfo(float).eps
        state, _ = step(state, Batch(x, x))
    for name in y:
        np.testing.assert_allclose(state.params[name], y[name], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(trained_params(state)[name], average[name], rtol=1e-9, atol=1e-12)
