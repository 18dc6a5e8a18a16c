"""What members that differ only by their seed say together: settings, means, intervals."""

from functools import partial

import numpy as np
import pytest
import scipy.stats

import sae_jax
from sae_jax.result import WHERE_KNOWN
from sae_jax.seeds import interval, of_pairs, settings


def test_settings_are_rows_alike_but_for_their_seed():
    grid = sae_jax.grid(seed=range(3), l1=[0.1, 0.2])
    found = settings(grid)
    assert [rows.tolist() for rows in found.members] == [[0, 2, 4], [1, 3, 5]]
    assert list(found.grid) == ["l1"]
    assert found.grid["l1"].tolist() == [0.1, 0.2]
    assert found.repeated


def test_what_a_member_has_not_is_the_same_as_what_another_has_not():
    grid = {
        "k": np.array([np.nan, np.nan, 2.0]),
        "l1": np.array([0.1, 0.1, np.nan]),
        "seed": np.array([0, 1, 0]),
    }
    assert [rows.tolist() for rows in settings(grid).members] == [[0, 1], [2]]


def test_without_seeds_every_row_is_a_setting():
    found = settings(sae_jax.grid(l1=[0.1, 0.1, 0.2]))
    assert [rows.tolist() for rows in found.members] == [[0], [1], [2]]
    assert not found.repeated


def test_the_interval_is_students():
    values = np.random.default_rng(0).normal(size=7)
    found = interval(values, settings(sae_jax.grid(seed=range(7))))
    low, high = scipy.stats.t.interval(0.95, 6, values.mean(), scipy.stats.sem(values))
    np.testing.assert_allclose(found.mean - found.half_width, [low])
    np.testing.assert_allclose(found.mean + found.half_width, [high])


def test_the_interval_holds_the_mean_as_often_as_it_says():
    grid = sae_jax.grid(l1=np.arange(4000.0), seed=range(4))
    found = interval(np.random.default_rng(0).normal(size=16_000), settings(grid))
    assert (np.abs(found.mean) <= found.half_width).mean() == pytest.approx(0.95, abs=0.012)


def test_one_seed_has_no_interval_and_what_is_not_finite_is_left_out():
    grid = sae_jax.grid(l1=[0.1, 0.2, 0.3], seed=range(2))
    found = interval(np.array([1.0, np.nan, 2.0, 4.0, np.nan, np.inf]), settings(grid))
    np.testing.assert_array_equal(found.mean, [1, 3, np.nan])
    assert np.isfinite(found.half_width).tolist() == [False, True, False]


@pytest.fixture(scope="module")
def found():
    """A world with a hierarchy, two settings, three seeds, and a member that diverged."""
    return sae_jax.sweep(
        partial(sae_jax.relu, d_in=20, d_sae=12),
        grid=sae_jax.grid(lr=[3e-3, 1e30], l1=[0.01, 0.1], seed=range(3)),
        source=sae_jax.synthetic.matryoshka_tree(batch_size=64),
        steps=60,
        evaluate_rows=640,
    )


def test_a_sweep_in_a_world_measures_what_each_member_finds(found):
    world = sae_jax.synthetic.matryoshka_tree(batch_size=64)
    alone = sae_jax.metrics.recovery.recover(*found.member(4), world, rows=640)
    for name, value in alone.items():
        assert found.metrics[name][4] == pytest.approx(value, abs=1e-6), name
        assert name in found.table
    assert found.endings == {"diverged": 6}
    assert np.isnan(found.intervals()["mcc"].mean[2:]).all(), "what diverged tells nothing of its setting"


def test_columns_of_a_world_come_back_from_a_folder(found, tmp_path):
    found.with_consistency(found.stability()).save(tmp_path)
    again = sae_jax.SweepResult.load(tmp_path)
    np.testing.assert_allclose(again.table["f1"], found.table["f1"])
    assert np.isfinite(again.table["consistency"][:6]).all()
    np.testing.assert_allclose(again.intervals()["mcc"].mean, found.intervals()["mcc"].mean)


def test_intervals_leave_out_members_that_diverged(found):
    told = found.intervals()
    assert list(told)[:4] == ["loss", "mse", "l0", "explained_variance"]
    np.testing.assert_allclose(told["l0"].mean[:2], found.metrics["l0"][:6].reshape(2, 3).mean(axis=1))
    assert np.isnan(told["l0"].mean[2:]).all()


def test_stability_is_of_each_setting_and_counts_live_latents(found):
    stable = found.stability()
    assert [rows.tolist() for rows in stable.groups] == [rows.tolist() for rows in found.settings.members]
    assert np.isfinite(stable.consistency).tolist() == [True, True, False, False]
    dead = found.metrics["density"][0] == 0
    assert np.isnan(stable.comes_back[0]).tolist() == dead.tolist()


def test_the_interval_of_consistency_is_that_of_stability(found):
    stable = found.stability()
    told = found.with_consistency(stable).intervals()["consistency"]
    np.testing.assert_allclose(told.mean[:2], stable.consistency[:2])
    np.testing.assert_allclose(told.half_width[:2], stable.error[:2], rtol=1e-6)


def test_two_seeds_have_no_interval_of_consistency():
    among = settings(sae_jax.grid(l1=[0.1], seed=range(2)))
    assert np.isnan(of_pairs(interval(np.array([0.7, 0.7]), among), among).half_width).all()


def test_stability_is_of_the_weights_that_are_saved(tmp_path):
    x = np.random.default_rng(0).normal(size=(400, 6)).astype(np.float32) * np.arange(1, 7, dtype=np.float32)
    whitened = sae_jax.normalise.whitening(x)
    result = sae_jax.sweep(
        partial(sae_jax.relu, d_in=6, d_sae=8),
        grid=sae_jax.grid(lr=[1e-2], l1=[0.01], seed=range(3)),
        source=sae_jax.normalise.normalised(sae_jax.in_memory(x), whitened),
        steps=50,
    ).finished(lambda one: sae_jax.TrainedSAE(*sae_jax.normalise.fold(*one, whitened)))
    result.save(tmp_path)
    again = sae_jax.SweepResult.load(tmp_path)
    assert (result.metrics["density"] > 0).all(), "what a folder does not hold plays no part here"
    np.testing.assert_allclose(result.stability().consistency, again.stability().consistency, rtol=1e-5)


def test_dead_latents_are_left_out_of_joined_widths_too(found):
    wider = sae_jax.sweep(
        partial(sae_jax.relu, d_in=20, d_sae=16),
        grid=sae_jax.grid(lr=[3e-3], l1=[0.1], seed=range(2)),
        source=sae_jax.synthetic.matryoshka_tree(batch_size=64),
        steps=60,
        evaluate_rows=640,
    )
    both = sae_jax.join(
        [found, wider], [{"d_sae": 12, "architecture": "relu"}, {"d_sae": 16, "architecture": "relu"}]
    )
    np.testing.assert_allclose(both.stability().of_member[:6], found.stability().of_member[:6])


def test_the_best_goes_up_where_more_is_better(found):
    assert found.metrics["f1"][found.best("f1")] == np.nanmax(found.metrics["f1"])


def test_stability_needs_seeds_and_weights(found, tmp_path):
    single = sae_jax.sweep(
        partial(sae_jax.relu, d_in=20, d_sae=12),
        grid=sae_jax.grid(lr=[3e-3], l1=[0.01, 0.1]),
        source=sae_jax.synthetic.matryoshka_tree(batch_size=64),
        steps=1,
        evaluate_rows=64,
    )
    with pytest.raises(sae_jax.InputError, match="several seeds"):
        single.stability()
    found.save(tmp_path, save="frontier")
    with pytest.raises(sae_jax.InputError, match="not saved"):
        sae_jax.SweepResult.load(tmp_path).stability()


def test_the_frontier_goes_up_where_more_is_better(found):
    best = found.frontier("l0", "f1")
    f1 = found.metrics["f1"]
    assert best.size
    assert (np.diff(f1[best]) > 0).all()
    assert f1[best[-1]] == np.nanmax(f1)


def test_the_page_tells_of_recovery_and_stability(found):
    from sae_jax.report import sweep_page

    world = sae_jax.synthetic.matryoshka_tree(batch_size=64)
    stable = found.stability()
    page = sweep_page(found, {}, None, stable, world)
    for name in (
        "recovery-f1",
        "recovery-mcc",
        "stability-consistency",
        "stability-features",
        "stability-truth",
    ):
        assert f'id="{name}"' in page, name
    unknown = {name: value for name, value in found.metrics.items() if name not in WHERE_KNOWN}
    plain = sweep_page(found._replace(metrics=unknown), {})
    assert 'id="recovery-' not in plain
    assert 'id="stability-' not in plain
