"""Every metric against its documented formula, computed by numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sae_jax
from sae_jax import Batch, InputError, metrics

NAMES = {
    "mse", "explained_variance", "fvu", "explained_variance_legacy", "fvu_batch", "cosine", "shrinkage",
    "relative_reconstruction_bias", "l0", "l1_norm", "density", "dead_fraction", "density_histogram",
}  # fmt: skip


def by_formula(batches, f, x_hat):
    """The metrics of rows `batches` (a list), features and reconstructions (likewise), from the docstring."""
    y = np.concatenate(batches).astype(np.float64)
    all_f, all_hat = np.concatenate(f).astype(np.float64), np.concatenate(x_hat).astype(np.float64)
    error = np.square(all_hat - y).sum(axis=1)
    norm = lambda rows: np.linalg.norm(rows, axis=1)  # noqa: E731
    variance = np.square(y - y.mean(axis=0)).sum(axis=1).mean()
    legacy, fvu_batch = [], []
    for rows, hats in zip(batches, x_hat, strict=True):
        rows, hats = rows.astype(np.float64), hats.astype(np.float64)
        spread = np.square(rows - rows.mean(axis=0)).sum(axis=1)
        wrong = np.square(hats - rows).sum(axis=1)
        legacy.extend(1 - wrong / spread)
        fvu_batch.append(wrong.sum() / spread.sum())
    density = (all_f > 0).mean(axis=0)
    return {
        "mse": error.mean() / y.shape[1],
        "explained_variance": 1 - error.mean() / variance,
        "fvu": error.mean() / variance,
        "explained_variance_legacy": np.mean(legacy),
        "fvu_batch": np.mean(fvu_batch),
        "cosine": ((all_hat * y).sum(axis=1) / np.maximum(norm(all_hat) * norm(y), 1e-30)).mean(),
        "shrinkage": (norm(all_hat) / norm(y)).mean(),
        "relative_reconstruction_bias": np.square(all_hat).sum() / (all_hat * y).sum(),
        "l0": (all_f > 0).sum(axis=1).mean(),
        "l1_norm": np.abs(all_f).sum(axis=1).mean(),
        "density": density,
        "dead_fraction": (density == 0).mean(),
    }


def model(d_in, offset, dtype):
    """An SAE around `offset` with some latents dead, some rare."""
    sae = sae_jax.relu(d_in, 12, apply_b_dec_to_input=True)
    params = sae.init(jax.random.key(0), dtype)
    b_enc = jnp.asarray([-100.0, -100.0, -4.0, -3.0, *[0.0] * 8], dtype)
    return sae, {**params, "b_enc": b_enc, "b_dec": jnp.full(d_in, offset, dtype)}


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64], ids=["float32", "float64"])
def test_metrics_are_their_formulas(offset, dtype):
    with jax.enable_x64(dtype is jnp.float64):
        rng = np.random.default_rng(0)
        data = (rng.normal(size=(530, 6)) * [1, 2, 3, 1, 0.5, 1] + offset + rng.normal(size=6)).astype(dtype)
        batches = [data[:200], data[200:400], data[400:]]
        sae, params = model(6, offset, dtype)
        f = [np.asarray(sae.encode(params, jnp.asarray(rows))) for rows in batches]
        x_hat = [np.asarray(sae.decode(params, jnp.asarray(rows))) for rows in f]
        ours = sae_jax.evaluate(
            sae, params, [Batch(jnp.asarray(rows), jnp.asarray(rows)) for rows in batches]
        )
    expected = by_formula(batches, f, x_hat)
    assert set(ours) == NAMES == {*expected, "density_histogram"}
    # float32: sums of hundreds of rows round by about 1e-6; at offset 1e3 each value itself is known to 6e-5
    tolerance = 1e-12 if dtype is jnp.float64 else 1e-5 if offset == 0 else 1e-3
    tolerance = max(tolerance, 1e-9) if offset else tolerance
    for name, value in expected.items():
        np.testing.assert_allclose(ours[name], value, rtol=tolerance, err_msg=name)
        assert np.asarray(ours[name]).dtype == np.float64
    assert 0 < ours["dead_fraction"] < 1
    assert 0.05 < expected["fvu"] < 5
    # what decides whether a latent fires is the same on both sides: the counts are exact
    assert ours["l0"] == pytest.approx(expected["l0"], rel=1e-12)


def test_a_large_mean_does_not_cancel_the_variance():
    rng = np.random.default_rng(1)
    noise = rng.normal(size=(1000, 4))
    data = (noise + 1e3).astype(np.float32)
    sae = sae_jax.relu(4, 3, apply_b_dec_to_input=True)
    params = {name: jnp.zeros_like(leaf) for name, leaf in sae.init(jax.random.key(0)).items()}
    # it always answers 1000: the variance is not explained at all, and E|e|^2 = var + |mean - 1000|^2
    params["b_dec"] = jnp.full(4, 1e3)
    ours = sae_jax.evaluate(sae, params, sae_jax.in_memory(data, 100).evaluation(1000))
    exact = data.astype(np.float64)
    fvu = np.square(exact - 1e3).sum(axis=1).mean() / np.square(exact - exact.mean(axis=0)).sum(axis=1).mean()
    assert ours["fvu"] == pytest.approx(fvu, rel=1e-5)
    assert ours["explained_variance"] == pytest.approx(1 - fvu, abs=1e-5)


def test_the_histogram_counts_every_latent_once():
    sae, params = model(6, 0.0, jnp.float32)
    data = np.random.default_rng(0).normal(size=(400, 6)).astype(np.float32)
    ours = sae_jax.evaluate(sae, params, sae_jax.in_memory(data, 128).evaluation(400))
    assert ours["density_histogram"].shape == (len(metrics.DENSITY_BINS) - 1,)
    assert ours["density_histogram"].sum() == 12
    dead = int(ours["dead_fraction"] * 12)
    assert dead >= 2
    assert ours["density_histogram"][0] == dead
    alive = ours["density"][ours["density"] > 0]
    expected = np.histogram(np.log10(alive + 1e-10).clip(max=0), metrics.DENSITY_BINS)[0]
    np.testing.assert_array_equal(ours["density_histogram"][1:], expected[1:])


def test_metrics_of_a_perfect_sae_are_perfect():
    sae = sae_jax.relu(2, 2)
    params = {"W_enc": jnp.eye(2), "b_enc": jnp.zeros(2), "W_dec": jnp.eye(2), "b_dec": jnp.zeros(2)}
    data = np.abs(np.random.default_rng(0).normal(size=(64, 2))).astype(np.float32) + 0.1
    ours = sae_jax.evaluate(sae, params, sae_jax.in_memory(data, 16).evaluation(64))
    exact = {
        "mse": 0,
        "fvu": 0,
        "explained_variance": 1,
        "explained_variance_legacy": 1,
        "fvu_batch": 0,
        "cosine": 1,
        "shrinkage": 1,
        "relative_reconstruction_bias": 1,
        "l0": 2,
        "dead_fraction": 0,
    }
    for name, value in exact.items():
        assert ours[name] == pytest.approx(value, abs=1e-6), name


def test_how_rows_are_grouped_matters_to_the_batchwise_metrics_only(small):
    sae = sae_jax.relu(5, 7)
    params = sae.init(jax.random.key(0))
    fine = sae_jax.evaluate(sae, params, sae_jax.in_memory(small, 7).evaluation(48))
    coarse = sae_jax.evaluate(sae, params, sae_jax.in_memory(small, 48).evaluation(48))
    for name in NAMES - {"explained_variance_legacy", "fvu_batch"}:
        np.testing.assert_allclose(fine[name], coarse[name], rtol=1e-5, err_msg=name)
    assert fine["fvu_batch"] != pytest.approx(coarse["fvu_batch"], rel=1e-3)


def test_members_measured_together_equal_each_alone(small):
    sae = sae_jax.relu(5, 7)
    many = [sae.init(jax.random.key(seed)) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *many)
    source = sae_jax.in_memory(small, 20)
    measure = lambda params, batch, centre: metrics.measure(sae, params, batch, centre)  # noqa: E731
    members = jax.jit(jax.vmap(measure, in_axes=(0, None, None)))
    together = metrics.stream(lambda batch, centre: members(stacked, batch, centre), source.evaluation(48))
    for i, params in enumerate(many):
        alone = sae_jax.evaluate(sae, params, source.evaluation(48))
        assert set(alone) == set(together)
        for name, value in alone.items():
            np.testing.assert_allclose(together[name][i], value, rtol=1e-5, err_msg=name)


def test_explained_variance_is_saelens_own(small, sae_lens, torch):
    from sae_lens.evals import ExplainedVarianceCalculator

    sae = sae_jax.relu(5, 7)
    params = sae.init(jax.random.key(0))
    theirs = ExplainedVarianceCalculator()
    for start in range(0, 48, 20):
        rows = jnp.asarray(small[start : start + 20])
        x_hat = sae.decode(params, sae.encode(params, rows))
        theirs.add_batch(torch.tensor(np.asarray(x_hat)), torch.tensor(np.asarray(rows)))
    ours = sae_jax.evaluate(sae, params, sae_jax.in_memory(small, 20).evaluation(48))
    assert ours["explained_variance"] == pytest.approx(theirs.compute(), rel=1e-5)


def test_data_without_variance_gives_no_finite_explained_variance():
    sae = sae_jax.relu(3, 2)
    batch = Batch(jnp.ones((4, 3)), jnp.ones((4, 3)))
    ours = sae_jax.evaluate(sae, sae.init(jax.random.key(0)), [batch])
    assert not np.isfinite(ours["explained_variance"])
    assert np.isfinite(ours["mse"])


def test_no_data_is_refused():
    sae = sae_jax.relu(3, 2)
    with pytest.raises(InputError, match="no data to measure on"):
        sae_jax.evaluate(sae, sae.init(jax.random.key(0)), [])


def test_a_last_batch_of_one_row_spoils_nothing():
    sae, params = model(6, 0.0, jnp.float32)
    data = np.random.default_rng(0).normal(size=(65, 6)).astype(np.float32)
    whole = sae_jax.in_memory(data[:64], 64).evaluation(65)
    tailed = sae_jax.in_memory(data, 64).evaluation(65)
    a, b = sae_jax.evaluate(sae, params, whole), sae_jax.evaluate(sae, params, tailed)
    for name in ("explained_variance_legacy", "fvu_batch"):
        np.testing.assert_allclose(b[name], a[name], rtol=1e-6)
    assert np.isfinite(b["explained_variance"])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_summed_in_single(dtype):
    """float16 ends at 65,504, and bfloat16 cannot count beyond 256."""
    sae, params = model(6, 0.0, jnp.float32)
    data = jnp.asarray(100 * np.random.default_rng(0).normal(size=(1001, 6)), dtype)
    half = sae_jax.evaluate(sae, params, sae_jax.in_memory(data, 1001).evaluation(1001))
    exact = sae_jax.evaluate(sae, params, sae_jax.in_memory(data.astype(jnp.float32), 1001).evaluation(1001))
    for name, value in exact.items():
        np.testing.assert_allclose(half[name], value, rtol=1e-3, err_msg=name)


@pytest.mark.parametrize("data", [np.ones((50, 6)), 1e-30 * np.random.default_rng(0).normal(size=(50, 6))])
def test_data_without_variance_has_none_explained(data):
    sae, params = model(6, 0.0, jnp.float32)
    found = sae_jax.evaluate(sae, params, sae_jax.in_memory(data.astype(np.float32)).evaluation(50))
    assert np.isnan(found["explained_variance"])
    assert np.isnan(found["fvu"])
    assert np.isfinite(found["l0"])
