"""Folds: the same SAE in other terms, there and, where it goes, back."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from cases import weights

import sae_jax
from sae_jax import InputError, folds
from sae_jax.architectures import find
from sae_jax.layer_norm import layer_normed

relu, topk, batch_topk, jumprelu, gated = (partial(find(name), 5, 7) for name in folds.WITHOUT_PENALTY)
onto = partial(sae_jax.transcoder, 5, 7, d_out=4)

PLAIN = {
    "relu": relu(),
    "relu-b-dec": relu(apply_b_dec_to_input=True),
    "topk": topk(k=3),
    "topk-no-b-dec": topk(k=3, apply_b_dec_to_input=False),
    "batch-topk": batch_topk(k=2.5),
    "jumprelu": jumprelu(),
    "jumprelu-b-dec": jumprelu(apply_b_dec_to_input=True),
    "gated": gated(),
    "gated-no-b-dec": gated(apply_b_dec_to_input=False),
    "gated-layer-normed": layer_normed(gated()),
}
TRAINED = {
    "tied": relu(tied=True, target_l0=2.0),
    "tied-b-dec": relu(tied=True, apply_b_dec_to_input=True),
    "log-threshold": jumprelu(log_threshold=True, target_l0=2.0),
    "rescaled": topk(k=3, rescale_acts_by_decoder_norm=True),
    "rescaled-batch": batch_topk(k=2, rescale_acts_by_decoder_norm=True),
    "matryoshka": sae_jax.matryoshka(5, 7, prefixes=(2, 7), k=3),
    "matryoshka-relu": sae_jax.matryoshka(5, 7, prefixes=(2, 7), of=sae_jax.relu, tied=True),
    "transcoder": onto(skip=True, target_l0=2.0),
    "transcoder-topk": onto(of=sae_jax.topk, k=2),
    "transcoder-matryoshka": onto(of=sae_jax.matryoshka, prefixes=(3, 7), k=2),
    "layer-normed": layer_normed(jumprelu(log_threshold=True)),
    "crosscoder": sae_jax.crosscoder(5, 7, sources=3, target_l0=2.0),
    "crosscoder-layer-normed": layer_normed(sae_jax.crosscoder(5, 7, sources=3)),
}


def each(cases):
    return pytest.mark.parametrize("sae", list(cases.values()), ids=list(cases))


def computed(sae, params):
    shape = (64, sae.config["sources"], 5) if "sources" in sae.config else (64, 5)
    x = jnp.asarray(np.random.default_rng(3).normal(size=shape))
    f = sae.encode({name: jnp.asarray(leaf) for name, leaf in params.items()}, x)
    assert 0.05 < float((f > 0).mean()) < 0.95
    return np.asarray(f), np.asarray(sae.decode(params, f, x))


def assert_same(before, after, factors=1.0):
    (f, x_hat), (g, y_hat) = computed(*before), computed(*after)
    np.testing.assert_allclose(g, f * factors, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(y_hat, x_hat, rtol=1e-12, atol=1e-12)


def assert_equal(params, expected, rtol=0.0):
    assert params.keys() == expected.keys()
    for name, leaf in expected.items():
        assert params[name].dtype == leaf.dtype
        np.testing.assert_allclose(params[name], leaf, rtol=rtol, atol=rtol, err_msg=name)


@each(PLAIN | TRAINED)
def test_plain_computes_the_same(sae, x64):
    params = weights(sae, np.float64)
    plain, found = folds.plain(sae, params)
    assert_same((sae, params), (plain, found))
    assert set(found) <= {
        "W_enc",
        "b_enc",
        "W_dec",
        "b_dec",
        "threshold",
        "b_gate",
        "b_mag",
        "r_mag",
        "W_skip",
    }
    assert "W_enc" in found
    assert plain.config["architecture"] not in ("matryoshka",)
    again, same = folds.plain(plain, found)
    assert again.config == plain.config
    assert_equal(same, found)


@each(PLAIN | {name: TRAINED[name] for name in ("tied", "rescaled", "matryoshka-relu", "layer-normed")})
def test_b_dec_moves_out_of_the_input_and_back(sae, x64):
    params = weights(sae, np.float64)
    now = folds.inner(sae.config)["apply_b_dec_to_input"]
    moved, found = folds.fold_b_dec(sae, params, not now)
    assert folds.inner(moved.config)["apply_b_dec_to_input"] is (not now)
    assert_same((sae, params), (moved, found))
    back, again = folds.fold_b_dec(moved, found, now)
    untied, expected = folds.untied(sae, params)
    assert folds.plain_of(back).config == folds.plain_of(untied).config
    assert_equal(again, expected, 1e-14)
    assert folds.fold_b_dec(sae, params, now) == (sae, params)


@pytest.mark.parametrize("name", ["transcoder", "crosscoder"])
def test_b_dec_of_another_space_stays(name):
    sae = TRAINED[name]
    with pytest.raises(InputError, match=f"b_dec of a {name} is no point of its input"):
        folds.fold_b_dec(sae, weights(sae), True)


RESCALABLE = {name: PLAIN[name] for name in PLAIN if "topk" not in name} | {
    name: TRAINED[name] for name in ("tied", "log-threshold", "matryoshka-relu", "transcoder", "layer-normed")
}


@each(RESCALABLE)
def test_latents_in_other_units_and_back(sae, x64):
    params = weights(sae, np.float64)
    factors = np.random.default_rng(4).uniform(0.1, 10, 7)
    scaled, found = folds.rescale_latents(sae, params, factors)
    assert_same((sae, params), (scaled, found), factors)
    back, again = folds.rescale_latents(scaled, found, 1 / factors)
    untied, expected = folds.untied(sae, params)
    assert back.config == untied.config
    assert_equal(again, expected, 1e-13)
    unit = folds.rescale_latents(sae, params, np.linalg.norm(params["W_dec"], axis=-1))[1]
    np.testing.assert_allclose(np.linalg.norm(unit["W_dec"], axis=-1), 1)


@pytest.mark.parametrize("name", ["topk", "batch-topk"])
def test_latents_that_compete_keep_their_unit(name):
    with pytest.raises(InputError, match="compete in one unit"):
        folds.rescale_latents(PLAIN[name], weights(PLAIN[name]), np.full(7, 2.0))


@pytest.mark.parametrize("factor", [0.0, -1.0, np.inf, np.nan])
def test_a_unit_is_above_0(factor):
    with pytest.raises(InputError, match="finite and above 0"):
        folds.rescale_latents(PLAIN["relu"], weights(PLAIN["relu"]), np.full(7, factor))


@each({"plain": PLAIN["batch-topk"], "rescaled": TRAINED["rescaled-batch"], "nested": TRAINED["matryoshka"]})
def test_a_batch_topk_is_a_jumprelu_and_back(sae, x64):
    params = weights(sae, np.float64)
    jump, found = folds.batch_topk_as_jumprelu(sae, params)
    assert folds.kind(jump) == "jumprelu"
    assert_same((sae, params), (jump, found))
    back, again = folds.jumprelu_as_batch_topk(jump, found, folds.inner(sae.config)["k"])
    plain, expected = folds.plain(sae, params)
    assert back.config == plain.config
    assert_equal(again, expected)


def test_thresholds_that_differ_are_no_batch_topk():
    sae = PLAIN["jumprelu"]
    with pytest.raises(InputError, match="one threshold, this JumpReLU 7"):
        folds.jumprelu_as_batch_topk(sae, weights(sae), 3)


@each({name: PLAIN[name] for name in ("relu", "relu-b-dec")} | {"skip": onto(skip=True)})
def test_a_relu_is_a_jumprelu_and_back(sae, x64):
    params = weights(sae, np.float64)
    jump, found = folds.relu_as_jumprelu(sae, params)
    assert_same((sae, params), (jump, found))
    back, again = folds.jumprelu_as_relu(jump, found)
    assert back.config == folds.plain(sae, params)[0].config
    assert_equal(again, params)


def test_a_jumprelu_with_thresholds_is_no_relu():
    sae = PLAIN["jumprelu"]
    with pytest.raises(InputError, match="7 of this JumpReLU's are above 0"):
        folds.jumprelu_as_relu(sae, weights(sae))


@each({name: PLAIN[name] for name in ("gated", "gated-no-b-dec", "gated-layer-normed")})
@pytest.mark.parametrize("seed", range(5))
def test_a_gated_sae_is_a_jumprelu(sae, seed, x64):
    params = weights(sae, np.float64, seed)
    jump, found = folds.gated_as_jumprelu(sae, params)
    assert folds.kind(jump) == "jumprelu"
    assert_same((sae, params), (jump, found))


@each(PLAIN)
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
def test_leaves_keep_their_dtype(sae, dtype):
    params = weights(sae, dtype)
    now = folds.inner(sae.config)["apply_b_dec_to_input"]
    for leaf in folds.fold_b_dec(sae, params, not now)[1].values():
        assert leaf.dtype == dtype
    for leaf in folds.batch_topk_as_jumprelu(sae, params)[1].values():
        assert leaf.dtype == dtype
