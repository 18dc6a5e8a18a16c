"""What SAEs are known to do to worlds whose features are known: the examples' experiments in seconds."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

import sae_jax
from sae_jax import synthetic
from sae_jax.metrics import mmcs

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name):
    specification = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hedging():
    return example("06_hedging")


@pytest.fixture(scope="module")
def sharkey():
    return example("05_sharkey")


def test_one_latent_takes_the_likelier_feature_and_the_bias_hedges_the_other(hedging):
    world = synthetic.hedging()
    cosine, along, off = hedging.hedging(world, hedging.hedged(world, seeds=3))
    assert (cosine > 0.999).all()
    np.testing.assert_allclose(along, 0.2, rtol=0.02)
    assert (off < 0.02).all()


@pytest.fixture(scope="module")
def uncorrelated(sharkey):
    world = synthetic.sharkey_uncorrelated(features=32, d_in=16, active=1.0, decay=0.95, batch_size=256)
    widths, l1 = [16, 64], np.array([0.01, 0.5, 1.0, 10.0])
    return sharkey.swept(world, widths, l1, steps=1000, lr=1e-2), widths, l1


def test_features_come_out_of_superposition_on_a_band_of_l1(uncorrelated):
    result, widths, l1 = uncorrelated
    narrow, wide = result.metrics["mmcs"].reshape(len(widths), len(l1))
    # too few latents, or too much of a penalty, and they do not come out
    assert narrow.max() < 0.85
    assert wide.max() > 0.95
    assert wide[-1] < 0.7
    assert result.table["d_sae"].tolist() == np.repeat(widths, len(l1)).tolist()


def test_there_is_no_decoder_bias(uncorrelated):
    result, *_ = uncorrelated
    assert not any(part.params["b_dec"].any() for part in result.parts)


def test_too_small_an_l0_mixes_features_and_has_the_smaller_error(hedging):
    world = synthetic.sparse_but_wrong(features=10, d_in=20, batch_size=256)
    below, above = 1.25, 2.25
    assert below < world.expected_l0 < above
    result = hedging.by_k(world, [below, above], seeds=2, steps=2000, lr=3e-3)
    found, error, k = hedging.found(world, result), result.metrics["mse"], result.grid["k"]
    assert (found[k == above] == 10).all()
    assert (found[k == below] < 5).all()
    assert (error[k == below] < hedging.error_of_truth(world, below)).all()


def test_the_truth_needs_its_own_l0(hedging):
    world = synthetic.sparse_but_wrong(batch_size=512)
    errors = [hedging.error_of_truth(world, k, rows=4096) for k in (9, 11, 12)]
    assert errors[0] > 10 * errors[1] > 10 * errors[2]


@pytest.mark.parametrize("seed", [0, 7])
def test_an_sae_of_the_worlds_seed_does_not_start_on_its_features(seed):
    """Both draw from the seed: without a key of its own the world would hand the SAE its directions."""
    key = jax.random.key(seed)
    for world in (
        synthetic.sharkey_uncorrelated(64, 32, seed=seed),
        synthetic.sharkey_correlated(64, 32, seed=seed),
        synthetic.generated(np.full(64, 0.1), 32, seed=seed),
    ):
        for factory in (sae_jax.relu, sae_jax.topk, sae_jax.gated, sae_jax.jumprelu):
            options = {"k": 4} if factory is sae_jax.topk else {}
            found = mmcs(factory(32, 64, **options).init(key)["W_dec"], world.directions)
            assert found < 0.6, "64 random directions of 32 dimensions come to about .45"
