"""What training promises beyond a falling loss: a target L0 is met, and dead latents come back."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sae_jax
from sae_jax import initialisation, resampling
from sae_jax.transforms import scale_by_adam, trapezoid, unit_norm_decoder

SIZES = {"d_in": 16, "d_sae": 64}
STEPS = 2500


@pytest.fixture(scope="module")
def world():
    return sae_jax.synthetic.planted(10_000, d_in=16, features=64, active=4)


def decaying(learning_rate):
    return optax.chain(
        scale_by_adam(),
        optax.scale_by_schedule(trapezoid(100, STEPS, STEPS // 5)),
        optax.scale(-learning_rate),
        unit_norm_decoder(),
    )


field = {"mean_features": False, "apply_b_dec_to_input": True, "decoder_init_norm": 1.0}


@pytest.mark.parametrize(
    "factory",
    [
        partial(sae_jax.relu, **SIZES, **field, l1=0.5),
        partial(sae_jax.relu, **SIZES, **field, l1=1e-3),  # a start that is far off
        partial(sae_jax.gated, **SIZES),
        partial(sae_jax.jumprelu, **SIZES, l0_coefficient=0.01),
    ],
    ids=["relu", "relu-far-off", "gated", "jumprelu"],
)
def test_each_member_lands_within_two_percent_of_its_target(factory, world):
    grid = sae_jax.grid(target_l0=[2.0, 4.0, 8.0], lr=[1e-3])
    source = sae_jax.in_memory(world.x, batch_size=256)
    result = sae_jax.sweep(factory, decaying, grid=grid, source=source, steps=STEPS, points=5)
    np.testing.assert_allclose(result.metrics["l0"], grid["target_l0"], rtol=0.02)
    assert result.missed() == []


def test_a_target_that_is_missed_is_told_with_what_was_reached(world):
    source = sae_jax.in_memory(world.x, batch_size=256)
    grid = sae_jax.grid(target_l0=[1.0], lr=[1e-5])
    result = sae_jax.sweep(partial(sae_jax.gated, **SIZES), grid=grid, source=source, steps=5)
    (sentence,) = result.missed()
    assert f"reached an L0 of {result.metrics['l0'][0]:.3g}, not its target 1" in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize("mend", ["auxk", "resampling"])
def test_dead_latents_come_back(mend, world):
    """The set-ups of examples/10_dead_latents.py, smaller."""

    def chain(learning_rate):
        return optax.chain(scale_by_adam(), optax.scale(-learning_rate), unit_norm_decoder())

    def low(params, key):
        return {**params, "b_enc": jnp.linspace(-3, 0, 128)}

    if mend == "auxk":
        rows = world.x + 2 * jax.random.normal(jax.random.key(5), (16,))
        build = partial(sae_jax.topk, 16, 128, apply_b_dec_to_input=False, dead_after=50)
        grid = sae_jax.grid(auxk=[0.0, 1.0], k=[4], lr=[1e-3])
        run = partial(sae_jax.sweep, grid=grid, source=sae_jax.in_memory(rows, 256), steps=1500)
        plain, mended = run(build, chain).metrics["dead_fraction"]
    else:
        build = initialisation.starting(partial(sae_jax.relu, 16, 128, **field), low)
        grid = sae_jax.grid(l1=[0.2], lr=[1e-3])
        run = partial(sae_jax.sweep, grid=grid, source=sae_jax.in_memory(world.x, 256), steps=1500)
        (plain,) = run(build, chain).metrics["dead_fraction"]
        revived = partial(resampling.anthropic, every=200, last=1000, dead_after=100)
        (mended,) = run(build, lambda learning_rate: revived(chain(learning_rate))).metrics["dead_fraction"]
    assert plain > 0.2
    assert mended < 0.05


# Several architectures in one call


@pytest.fixture(scope="module")
def groups():
    return [
        sae_jax.Group(
            partial(sae_jax.relu, 16, 32, **field), optax.adam, sae_jax.grid(l1=[0.1, 1.0], lr=[1e-3])
        ),
        sae_jax.Group(partial(sae_jax.topk, 16, 32), optax.adam, sae_jax.grid(k=[2, 4, 8], lr=[1e-3])),
        sae_jax.Group(partial(sae_jax.topk, 16, 48), optax.adam, sae_jax.grid(k=[2, 4], lr=[1e-3])),
    ]


def test_several_architectures_and_widths_make_one_table(groups, world, tmp_path):
    source = sae_jax.in_memory(world.x, batch_size=256)
    looks = []
    joined = sae_jax.sweep_all(groups, source=source, steps=20, points=4, look=looks.append)
    assert looks[-1].member_steps == looks[-1].total == 7 * 20
    assert joined.table["architecture"].tolist() == ["relu"] * 2 + ["topk"] * 5
    assert joined.table["d_sae"].tolist() == [32] * 5 + [48] * 2
    np.testing.assert_array_equal(joined.table["k"], [np.nan, np.nan, 2, 4, 8, 2, 4])
    assert list(joined.groups) == ["relu 32", "topk 32", "topk 48"]
    offset = 0
    for group in groups:
        alone = sae_jax.sweep(*group[:2], grid=group.grid, source=source, steps=20, points=4)
        for i in range(len(group.grid["lr"])):
            for name, leaf in alone.member(i).params.items():
                np.testing.assert_array_equal(joined.member(offset + i).params[name], leaf)
            assert joined.metrics["l0"][offset + i] == alone.metrics["l0"][i]
        offset += len(group.grid["lr"])
    with pytest.raises(sae_jax.InputError, match="several shapes"):
        joined.params  # noqa: B018
    joined.save(tmp_path)
    loaded = sae_jax.SweepResult.load(tmp_path)
    assert loaded.table["architecture"].tolist() == joined.table["architecture"].tolist()
    np.testing.assert_array_equal(loaded.table["k"], joined.table["k"])
    assert loaded.frontier().tolist() == joined.frontier().tolist()
    np.testing.assert_array_equal(loaded.member(6).params["W_dec"], joined.member(6).params["W_dec"])
    assert loaded.member(6).sae.config["k"] == 4
    with np.load(tmp_path / "history.npz") as logs:
        assert np.isnan(logs["sparsity"][2:]).all()
    assert json.loads((tmp_path / "sweep.json").read_text())["axes"]["architecture"].startswith("<U")


def test_groups_stopped_in_the_second_resume_bit_for_bit(groups, world, tmp_path):
    source = sae_jax.in_memory(world.x, batch_size=256)
    run = partial(sae_jax.sweep_all, groups, source=source, steps=8, points=2)
    whole = run()
    with pytest.raises(sae_jax.Stopped):
        run(checkpoints=tmp_path, look=lambda look: look.member_steps > 2 * 8 + 3 * 4)
    resumed = run(checkpoints=tmp_path)
    for i in range(7):
        for name, leaf in whole.member(i).params.items():
            np.testing.assert_array_equal(resumed.member(i).params[name], leaf)


def test_a_group_that_cannot_work_is_told_before_any_is_trained(groups, world):
    wrong = groups[1]._replace(factory=partial(sae_jax.topk, 16, 4))
    seen = []
    source = sae_jax.in_memory(world.x, batch_size=256)
    with pytest.raises(sae_jax.InputError, match="k must be above 0 and at most d_sae = 4, got 8"):
        sae_jax.sweep_all([groups[0], wrong], source=source, steps=8, look=seen.append)
    assert not seen
    with pytest.raises(sae_jax.InputError, match="nothing to sweep"):
        sae_jax.sweep_all([], source=source, steps=8)


def test_planted_features_are_what_they_say():
    world = sae_jax.synthetic.planted(50_000, d_in=64, features=32, active=4, correlation=0.5, seed=3)
    amounts = np.linalg.lstsq(np.asarray(world.directions).T, np.asarray(world.x).T, rcond=None)[0]
    active = np.abs(amounts) > 0.02
    np.testing.assert_allclose(active.mean(axis=1), world.probabilities, atol=0.01)
    assert float(world.probabilities.sum()) == pytest.approx(4, rel=1e-3)
    correlations = np.corrcoef(active)[np.triu_indices(32, 1)]
    independent = np.asarray(sae_jax.synthetic.planted(50_000, 64, 32, 4, correlation=0.0, seed=3).x)
    apart = np.linalg.lstsq(np.asarray(world.directions).T, independent.T, rcond=None)[0]
    assert correlations.std() > 5 * np.corrcoef(np.abs(apart) > 0.02)[np.triu_indices(32, 1)].std()
    for arguments in ({"active": 0}, {"active": 100}, {"correlation": 1.0}):
        with pytest.raises(sae_jax.InputError):
            sae_jax.synthetic.planted(10, **arguments)
