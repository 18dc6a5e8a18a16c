"""Members that end before their time: what they keep, what the others notice of it, and what is told."""

import itertools
from functools import partial

import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sae_jax
from sae_jax import InputError, Patience, halving, train

factory = partial(sae_jax.relu, d_in=5, d_sae=6)
SIXTEEN = np.geomspace(1e-3, 1e-1, 16)


def trained(small, lr, seeds=None, **options):
    """One member per learning rate."""
    grid = sae_jax.zipped(lr=list(lr), seed=range(len(lr)) if seeds is None else seeds)
    source = sae_jax.in_memory(small, batch_size=16)
    return sae_jax.sweep(factory, grid=grid, source=source, **{"steps": 40, "points": 40, **options})


def same_bits(ours, theirs):
    return np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


# Divergence


def test_a_nan_in_one_of_sixteen_changes_no_bit_of_the_other_fifteen(small):
    others = np.arange(16) != 7
    sick = trained(small, np.where(others, SIXTEEN, np.nan))
    healthy = trained(small, SIXTEEN)
    without = trained(small, SIXTEEN[others], seeds=np.arange(16)[others].tolist())
    assert sick.status[7].startswith("diverged at step ")
    assert set(sick.status[others]) == {"ok"}
    for name in sick.params:
        assert same_bits(sick.params[name][others], healthy.params[name][others]), name
        assert same_bits(sick.params[name][others], without.params[name]), name
    for name in ("loss", "l0"):
        assert same_bits(sick.history[name][:, others], healthy.history[name][:, others])


def test_a_member_that_diverges_is_frozen_and_the_step_is_told(small):
    found = trained(small, [1e-2, 1e30])
    # the first update makes the weights 1e30, the square of which is no float32
    assert found.status.tolist() == ["ok", "diverged at step 2"]
    assert np.isfinite(found.history["loss"][0, 1])
    assert np.isinf(found.history["loss"][1, 1]) or np.isnan(found.history["loss"][1, 1])
    assert np.isnan(found.history["loss"][2:, 1]).all()
    once = trained(small, [1e-2, 1e30], steps=1)
    assert same_bits(found.params["W_dec"][1], once.params["W_dec"][1]), "the weights of before the step"
    assert np.isnan(found.table["loss"][1])
    assert found.frontier().tolist() == [0]


def test_a_sweep_whose_members_have_all_ended_is_over(small):
    looks = []
    found = trained(small, [1e30, 1e30], steps=10_000, points=10, look=looks.append)
    assert set(found.status) == {"diverged at step 2"}
    assert looks[-1].done < 100
    assert looks[-1].ended == {"diverged": 2}
    assert len(found.history["step"]) == 10
    assert np.isnan(found.table["loss"]).all()


# Patience


def test_a_member_that_no_longer_gets_better_stops_and_keeps_its_weights(small):
    patience = Patience(20, improvement=0.01, over=5)
    found = trained(small, [1e-2, 1e-12], patience=patience, steps=100)
    assert found.status[0] == "ok"
    assert found.status[1].startswith("stopped early at step ")
    stopped = int(found.status[1].rsplit(" ", 1)[1])
    assert 20 < stopped < 100
    assert (
        np.isfinite(found.history["loss"][:stopped, 1]).all() if len(found.history["step"]) == 100 else True
    )
    assert np.isfinite(found.table["loss"]).all()
    alone = trained(small, [1e-2], steps=100)
    assert same_bits(found.params["W_dec"][0], alone.params["W_dec"][0])


@pytest.mark.parametrize("settings", [(0,), (5, 1.0), (5, -0.1), (5, 0.1, 0)])
def test_a_patience_that_means_nothing_is_refused(small, settings):
    with pytest.raises(InputError):
        trained(small, [1e-2], patience=Patience(*settings))


def test_the_watch_is_the_average_that_it_says(small):
    """Against the same rule written out in numpy."""
    patience = Patience(15, improvement=0.05, over=4)
    lr = np.geomspace(1e-5, 1e-2, 8)
    found = trained(small, lr, patience=patience, steps=60, points=60)
    free = trained(small, lr, steps=60, points=60).history["loss"]
    for member, status in enumerate(found.status):
        average, least, least_at, stopped = 0.0, np.inf, 0, None
        for done, loss in enumerate(free[:, member], 1):
            average += (loss - average) / min(done, 4)
            if average < 0.95 * least:
                least, least_at = average, done
            if done - least_at >= 15:
                stopped = done
                break
        assert status == ("ok" if stopped is None else f"stopped early at step {stopped}")
    assert len(set(found.status)) > 2, "or this test tells nothing"


# Halving


def test_rounds_double_and_halve():
    rounds = halving.rounds(64, 8000, 16)
    assert [(one.start, one.until, one.members) for one in rounds] == [
        (0, 2000, 64), (2000, 4000, 32), (4000, 8000, 16),
    ]  # fmt: skip
    assert halving.rounds(5, 10) == (halving.Round(0, 10, 5, 5),)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 500), st.data())
def test_rounds_go_from_all_members_to_those_that_are_left(members, data):
    left = data.draw(st.integers(1, members))
    rounds = halving.rounds(members, 10_000, left)
    assert (rounds[0].start, rounds[0].members) == (0, members)
    assert (rounds[-1].until, rounds[-1].members, rounds[-1].keep) == (10_000, left, left)
    for one, following in itertools.pairwise(rounds):
        assert one.until == following.start < following.until
        assert following.members == one.keep >= one.members / 2 or one.keep == left


@pytest.mark.parametrize(("left", "steps"), [(0, 100), (9, 100), (1, 7)])
def test_rounds_that_cannot_be_are_refused(left, steps):
    with pytest.raises(InputError, match=f"got {left if steps == 100 else steps}"):
        halving.rounds(8, steps, left)


points = st.tuples(st.integers(0, 6).map(float), st.integers(0, 6).map(float) | st.just(np.nan))


@settings(max_examples=200, deadline=None)
@given(st.lists(points, min_size=1, max_size=20), st.data())
def test_nobody_is_dropped_for_one_that_it_beats(pairs, data):
    l0, fvu = (np.array(column) for column in zip(*pairs, strict=True))
    count = data.draw(st.integers(1, len(pairs)))
    kept = halving.best(l0, fvu, count)
    assert len(kept) == count == len(set(kept.tolist()))
    dropped = [place for place in range(len(pairs)) if place not in kept]
    for one in dropped:
        for other in kept.tolist():
            beats = l0[one] <= l0[other] and fvu[one] <= fvu[other] and pairs[one] != pairs[other]
            assert not beats
            assert np.isfinite(fvu[other]) or not np.isfinite(fvu[one])


def test_those_that_are_left_train_as_if_nobody_had_been_dropped(small):
    source = sae_jax.in_memory(small, batch_size=16)
    grid = sae_jax.grid(l1=[0.01, 0.1, 0.3, 1.0], lr=[1e-2], seed=range(4))
    looks = []
    halved = sae_jax.sweep(
        factory,
        grid=grid,
        source=source,
        steps=80,
        points=8,
        keep_best=4,
        members_at_once=8,
        look=looks.append,
    )
    whole = sae_jax.sweep(factory, grid=grid, source=source, steps=80, points=8)
    left = np.flatnonzero(halved.status == "ok")
    assert len(left) == 4
    np.testing.assert_allclose(halved.params["W_dec"][left], whole.params["W_dec"][left], rtol=0, atol=1e-6)
    np.testing.assert_allclose(halved.history["loss"][:, left], whole.history["loss"][:, left], rtol=1e-5)
    dropped = np.flatnonzero(halved.status != "ok")
    assert set(halved.status[dropped]) == {"dropped at step 20", "dropped at step 40"}
    first = np.flatnonzero(halved.status == "dropped at step 20")
    assert np.isnan(halved.history["loss"][2:, first]).all()
    assert np.isfinite(halved.history["loss"][:2, first]).all()
    assert np.isfinite(halved.table["loss"]).all()
    # 16 members for 20 steps, 8 for 20, 4 for 40
    assert looks[-1].total == looks[-1].member_steps == 16 * 20 + 8 * 20 + 4 * 40
    assert looks[-1].ended == {"dropped": 12}


def test_who_diverged_holds_no_place_among_those_that_are_left(small):
    found = trained(small, [1e-2, 1e30, 1e-3, 3e-3], steps=40, keep_best=3)
    assert found.status.tolist() == ["ok", "diverged at step 2", "ok", "ok"]
    assert found.endings == {"diverged": 1}


def test_groups_that_are_halved_tell_the_work_of_all(small):
    source, looks = sae_jax.in_memory(small, batch_size=16), []
    groups = [
        sae_jax.Group(partial(sae_jax.relu, 5, d_sae), optax.adam, sae_jax.grid(lr=[1e-2], seed=range(4)))
        for d_sae in (6, 7)
    ]
    sae_jax.sweep_all(groups, source=source, steps=8, keep_best=2, look=looks.append)
    assert looks[-1].member_steps == looks[-1].total == 2 * (4 * 4 + 2 * 4)
    assert looks[-1].ended == {"dropped": 4}
    with pytest.raises(InputError, match="of 4 members 1 to 4 can be left, got 5"):
        sae_jax.sweep_all(groups, source=source, steps=8, keep_best=5, look=looks.clear())


def test_a_stopped_halving_goes_on_to_the_same_bits(small, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SECONDS_PER_CHUNK", 0.0)
    monkeypatch.setattr(train, "SECONDS_WORTH_KEEPING", 0.0)
    source = sae_jax.in_memory(small, batch_size=16)
    grid = sae_jax.grid(l1=[0.01, 0.1, 0.3, 1.0], lr=[1e-2], seed=range(2))
    how = {"grid": grid, "source": source, "steps": 16, "points": 4, "keep_best": 2, "members_at_once": 4}
    whole = sae_jax.sweep(factory, **how)
    for stop in (10, 36, 50, 60):
        with pytest.raises(sae_jax.Stopped):
            sae_jax.sweep(
                factory, **how, checkpoints=tmp_path, look=lambda look, stop=stop: look.member_steps > stop
            )
    resumed = sae_jax.sweep(factory, **how, checkpoints=tmp_path)
    assert resumed.status.tolist() == whole.status.tolist()
    for name in whole.params:
        assert same_bits(resumed.params[name], whole.params[name])
    np.testing.assert_array_equal(resumed.history["loss"], whole.history["loss"])
    with pytest.raises(InputError, match="keep_best was 2, now 4"):
        sae_jax.sweep(factory, **{**how, "keep_best": 4}, checkpoints=tmp_path)
