"""Where axes go, what cannot be one, and what a sweep leaves behind."""

import json
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sae_jax
from sae_jax import InputError, SweepResult, devices, program
from sae_jax.spread import SHARE_OF_MEMORY, spread

factory = partial(sae_jax.relu, d_in=5, d_sae=6)


@pytest.fixture
def source(small):
    return sae_jax.in_memory(small, batch_size=16)


@pytest.fixture(scope="module")
def result():
    """Six members, the last of which diverges."""
    data = np.random.default_rng(0).normal(size=(48, 5)).astype(np.float32)
    grid = sae_jax.zipped(
        l1=[0.01, 0.03, 0.1, 0.3, 1.0, 0.1], lr=[1e-2, 1e-2, 1e-2, 3e-3, 1e-2, 1e30], seed=[0, 1, 2, 3, 4, 5]
    )
    source = sae_jax.in_memory(data, batch_size=16)
    return sae_jax.sweep(factory, optax.adam, grid=grid, source=source, steps=60, points=20)


def sweep(source, optimizer=optax.adam, make=factory, steps=3, **kwargs):
    return sae_jax.sweep(make, optimizer, source=source, steps=steps, **kwargs)


# Where axes go


def test_each_axis_reaches_what_takes_it(source):
    grid = sae_jax.zipped(b1=[0.9, 0.0, 0.9, 0.9, 0.9], l1=[0.1, 0.1, 0.5, 0.1, 0.1], lr=[1e-2] * 4 + [1e-3],
                          seed=[0, 0, 0, 1, 0])  # fmt: skip
    swept = sweep(source, grid=grid, steps=30)
    for i in range(5):
        hyper = {name: column[i].item() for name, column in grid.items()}
        sae, optimizer = factory(l1=hyper["l1"]), optax.adam(hyper["lr"], b1=hyper["b1"])
        state = sae_jax.init(sae, optimizer, jax.random.key(hyper["seed"]))
        state, _ = sae_jax.run(sae_jax.make_step(sae, optimizer), state, source, 30)
        for name, leaf in state.params.items():
            np.testing.assert_allclose(swept.member(i).params[name], leaf, atol=1e-4, rtol=0)
            for other in range(5):
                different = np.abs(swept.member(other).params[name] - leaf).max() > 1e-3
                assert different == (other != i), f"members {i} and {other} should differ"


def test_a_ready_chain_serves_all_members(source):
    swept = sweep(source, optax.sgd(0.1), grid=sae_jax.grid(l1=[0.1, 0.2]))
    assert "lr" not in swept.table
    assert swept.status.tolist() == ["ok", "ok"]


def test_an_optimizer_may_take_lr_by_that_name(source):
    swept = sweep(source, lambda lr: optax.sgd(lr), grid=sae_jax.grid(lr=[0.1, 0.2]))
    assert np.abs(swept.params["W_dec"][0] - swept.params["W_dec"][1]).max() > 1e-4


def test_without_a_seed_axis_members_start_alike(source):
    swept = sweep(source, grid=sae_jax.grid(lr=[1e-30, 2e-30]))
    expected = factory().init(jax.random.key(0))
    np.testing.assert_allclose(swept.params["W_enc"][0], expected["W_enc"], rtol=1e-6)
    np.testing.assert_allclose(swept.params["W_enc"][1], expected["W_enc"], rtol=1e-6)


@pytest.mark.parametrize("seed", [2**31, 2**32 - 1])
def test_a_large_seed_is_the_solo_runs_seed(source, seed):
    swept = sweep(source, grid=sae_jax.grid(lr=[1e-30], seed=[seed]))
    expected = factory().init(jax.random.key(seed))
    np.testing.assert_allclose(swept.params["W_enc"][0], expected["W_enc"], rtol=1e-6)


# What cannot be an axis

BAD = {
    "unknown axis": (
        {"grid": sae_jax.grid(l2=[0.1], lr=[0.1])},
        "nothing takes the axis 'l2'; there are: .*l1.*lr.*seed",
    ),
    "no lr": (
        {"grid": sae_jax.grid(l1=[0.1])},
        "the optimizer needs learning_rate: give the grid an axis lr=",
    ),
    "lr with a ready chain": (
        {"grid": sae_jax.grid(lr=[0.1]), "optimizer": optax.sgd(0.1)},
        "nothing takes the axis 'lr'",
    ),
    "d_sae bound and swept": ({"grid": sae_jax.grid(lr=[0.1], d_sae=[6, 7])}, "'d_sae' sets a shape"),
    "d_sae": (
        {"grid": sae_jax.grid(lr=[0.1], d_sae=[6, 7]), "make": partial(sae_jax.relu, d_in=5)},
        "'d_sae' sets a shape",
    ),
    "tied": ({"grid": sae_jax.grid(lr=[0.1], tied=[0, 1])}, "'tied' sets a shape or a branch"),
    "decoder_norm_l1": (
        {"grid": sae_jax.grid(lr=[0.1], decoder_norm_l1=[0, 1])},
        "'decoder_norm_l1' sets a shape or a branch",
    ),
    "mean_features": (
        {"grid": sae_jax.grid(lr=[0.1], mean_features=[0, 1])},
        "'mean_features' sets a shape or a branch",
    ),
    "apply_b_dec": (
        {"grid": sae_jax.grid(lr=[0.1], apply_b_dec_to_input=[0, 1])},
        "'apply_b_dec_to_input' sets a shape or a branch",
    ),
    "nesterov": ({"grid": sae_jax.grid(lr=[0.1], nesterov=[0, 1])}, "'nesterov' sets a shape or a branch"),
    "a value refused": (
        {"grid": sae_jax.grid(lr=[0.1], l1=[0.1, -0.5])},
        "l1 must be finite and not negative, got -0.5",
    ),
    "a negative seed": ({"grid": sae_jax.grid(lr=[0.1], seed=[-1])}, "seed"),
    "doubles that are not switched on": (
        {"grid": sae_jax.grid(lr=[0.1]), "dtype": jnp.float64},
        "jax_enable_x64",
    ),
    "a seed that is no whole number": ({"grid": sae_jax.grid(lr=[0.1], seed=[0.5])}, "seed"),
    "both take it": (
        {"grid": sae_jax.grid(lr=[0.1], l1=[0.1]), "optimizer": lambda lr, l1: optax.sgd(lr)},
        "both the factory and the optimizer take 'l1'",
    ),
    "no steps": ({"grid": sae_jax.grid(lr=[0.1]), "steps": 0}, "steps must be at least 1, got 0"),
    "members_at_once": (
        {"grid": sae_jax.grid(lr=[0.1]), "members_at_once": -1},
        "members_at_once must be at least 1, got -1",
    ),
    "members_at_once 0": (
        {"grid": sae_jax.grid(lr=[0.1]), "members_at_once": 0},
        "members_at_once must be at least 1, got 0",
    ),
    "points": ({"grid": sae_jax.grid(lr=[0.1]), "points": 0}, "points"),
    "nothing to measure on": ({"grid": sae_jax.grid(lr=[0.1]), "evaluate_rows": 0}, "no data to measure on"),
    "a width that is not the data's": (
        {"grid": sae_jax.grid(lr=[0.1]), "make": partial(sae_jax.relu, d_in=9, d_sae=6)},
        "d_in",
    ),
}


@pytest.mark.parametrize("bad", list(BAD))
def test_bad_input_is_refused_in_one_sentence(bad, source, unchecked):
    arguments, message = BAD[bad]
    with pytest.raises(InputError, match=message) as caught:
        sweep(source, **arguments)
    assert "\n" not in str(caught.value)


def test_an_error_inside_the_factory_is_not_taken_for_a_static_axis(source, unchecked):
    def broken(l1):
        raise TypeError("my own mistake")

    with pytest.raises(TypeError, match="my own mistake"):
        sweep(source, make=broken, grid=sae_jax.grid(lr=[0.1], l1=[0.1]))


# Memory


def members_that_fit(made, grid, source, free):
    state, batch = program.shapes_of(made, grid, source)
    one, sizes = program.footprint_of(state, batch), program.sizes_of(state, batch, 64)
    return spread(one, sizes, free).fit


def test_members_that_fit_follow_the_free_memory(source):
    grid = sae_jax.grid(lr=[1e-2], l1=[0.1], seed=range(64))
    made = program.program_of(factory, optax.adam, tuple(grid), jnp.dtype("float32"))
    # by hand: weights 5*6 + 6 + 6*5 + 5 = 71 floats; held: weights, two moments, count, step, 6 silences, 3
    # hyper-parameters; a training step adds gradients and updates, and activations for 16 rows
    # and when it ended; of a batch four arrays over latents, and reconstructions, errors, gradients, inputs
    held, weights, rows = 4 * (3 * 71 + 1 + 1 + 6 + 3 + 2), 4 * 71, 4 * 16 * (4 * 6 + 4 * 5)
    one = 2 * held + 2 * weights + rows
    assert members_that_fit(made, grid, source, 0) == 1
    for members in (1, 3, 1000):
        assert members_that_fit(made, grid, source, 2 * members * one) == members
        assert members_that_fit(made, grid, source, 2 * members * one - 1) == max(1, members - 1)


def test_a_sweep_beyond_the_free_memory_trains_in_chunks(source, monkeypatch):
    grid = sae_jax.grid(lr=[1e-2], seed=range(5))
    made = program.program_of(factory, optax.adam, tuple(grid), jnp.dtype("float32"))
    one = program.footprint_of(*program.shapes_of(made, grid, source)).total
    monkeypatch.setattr(sys.modules["sae_jax.cut"], "free_memory", lambda: 2 * one / SHARE_OF_MEMORY)
    sizes = []
    look = lambda look: sizes.append(look.history["loss"].shape[1])  # noqa: E731
    swept = sweep(source, grid=grid, look=look)
    assert set(sizes) == {2, 1}
    assert len(swept.table["loss"]) == 5


def test_free_memory_is_a_plausible_number():
    assert 2**20 < devices.free_memory() < 2**50


# What a sweep tells


def test_between_sees_the_steps_of_all_members_and_can_end_the_sweep(source):
    looks = []

    def look(seen: sae_jax.Look):
        looks.append(seen)
        return seen.member_steps >= 10

    with pytest.raises(sae_jax.Stopped):
        sweep(source, grid=sae_jax.grid(lr=[1e-2], seed=range(2)), steps=50, look=look)
    assert looks[0].total == 100
    assert 10 <= looks[-1].member_steps < 100
    steps = [seen.member_steps for seen in looks]
    assert steps == sorted(steps)


def test_the_table_has_one_row_per_member(result):
    table = result.table
    assert list(table) == [
        "member",
        "l1",
        "lr",
        "seed",
        "loss",
        "mse",
        "l0",
        "explained_variance",
        "dead_fraction",
        "status",
    ]
    assert {len(column) for column in table.values()} == {6}
    assert table["member"].tolist() == list(range(6))
    np.testing.assert_array_equal(table["loss"], result.history["loss"][-1])
    assert table["status"][:5].tolist() == ["ok"] * 5
    assert table["status"][5].startswith("diverged at step ")


def test_metrics_are_of_the_final_weights_on_the_sources_rows(result, small):
    source = sae_jax.in_memory(small, batch_size=16)
    for i in range(5):
        trained = result.member(i)
        measured = sae_jax.evaluate(trained.sae, trained.params, source.evaluation(65_536))
        for name, value in measured.items():
            np.testing.assert_allclose(result.metrics[name][i], value, rtol=1e-5, err_msg=name)


def test_a_member_is_its_weights_and_its_own_config(result):
    trained = result.member(3)
    assert trained.sae.config["l1"] == 0.3
    assert trained.params["W_enc"].shape == (5, 6)
    np.testing.assert_array_equal(trained.params["W_enc"], result.params["W_enc"][3])
    for index in (-1, 6, 100):
        with pytest.raises(InputError, match=f"there is no member {index}: this sweep has members 0 to 5"):
            result.member(index)


# The best and the frontier


def made_of(result, l0, fvu, status="ok"):
    """A result with these metrics, for members 0, 1, ..."""
    count = len(l0)
    healthy = np.zeros((1, count))
    metrics = {"l0": np.array(l0, float), "fvu": np.array(fvu, float), "mse": np.array(fvu, float)}
    metrics |= {name: np.zeros(count) for name in ("explained_variance", "dead_fraction")}
    history = {"step": np.array([1]), "loss": healthy}
    return result._replace(
        grid={"l1": np.arange(count) * 1.0},
        metrics=metrics,
        history=history,
        status=np.broadcast_to(status, count),
    )


few_values = st.integers(0, 4).map(float)
members = st.lists(st.tuples(few_values, few_values | st.just(float("nan"))), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(members)
def test_the_frontier_is_all_that_nobody_beats(pairs):
    l0, fvu = zip(*pairs, strict=True)
    made = made_of(SweepResult((), {}, {}, {}, np.empty(0)), l0, fvu)
    front = made.frontier().tolist()
    fit = [i for i in range(len(l0)) if np.isfinite(fvu[i])]

    def beats(a, b):
        return l0[a] <= l0[b] and fvu[a] <= fvu[b] and (l0[a], fvu[a]) != (l0[b], fvu[b])

    unbeaten = [i for i in fit if not any(beats(j, i) for j in fit)]
    first_of_equals = [
        i for i in unbeaten if (l0[i], fvu[i]) not in [(l0[j], fvu[j]) for j in unbeaten if j < i]
    ]
    assert front == sorted(first_of_equals, key=lambda i: l0[i])


def test_the_frontier_takes_other_columns(result):
    made = made_of(result, [1, 2, 3], [0.3, 0.2, 0.1])
    assert made.frontier(x="l1", y="l0").tolist() == [0]
    with pytest.raises(InputError, match=r"there is no column 'fidelity'; there are: .*fvu"):
        made.frontier(y="fidelity")


def test_the_frontier_leaves_out_who_diverged(result):
    assert 5 not in result.frontier()
    assert len(result.frontier()) >= 1


def test_the_best_keeps_to_bounds(result):
    made = made_of(result, [1, 2, 3, 4], [0.4, 0.3, 0.2, 0.1])
    assert made.best() == 3
    assert made.best(at_most={"l0": 3}) == 2
    assert made.best(at_most={"l0": 3, "l1": 0.5}) == 0
    assert made.best(by="l0") == 0
    with pytest.raises(InputError, match=r"no member keeps to \{'l0': 0.5\}: the least l0 reached is 1"):
        made.best(at_most={"l0": 0.5})
    with pytest.raises(InputError, match="there is no column 'nope'"):
        made.best(by="nope")
    with pytest.raises(InputError, match="there is no column 'status'"):
        made.best(by="status")
    with pytest.raises(InputError, match="there is no column 'nope'"):
        made.best(at_most={"nope": 1})


def test_the_best_is_never_one_that_diverged(result):
    made = made_of(result, [0, 1], [0.1, 0.2], status=["diverged at step 3", "ok"])
    assert made.best(by="l0") == made.best() == 1
    assert made.frontier().tolist() == [1]


def test_what_no_member_reached_is_not_what_a_diverged_one_did(result):
    with pytest.raises(InputError) as caught:
        result.best(at_most={"l0": 0.01})
    healthy = result.table["l0"][:5].min()
    assert f"the least l0 reached is {healthy:.4g}" in str(caught.value)


def test_the_best_of_a_sweep_that_diverged_says_so(source):
    lost = sweep(source, grid=sae_jax.grid(lr=[1e30], seed=range(2)), steps=5)
    assert all(status.startswith("diverged") for status in lost.status)
    assert len(lost.frontier()) == 0
    with pytest.raises(InputError, match="all diverged"):
        lost.best()


# On disk


@pytest.mark.parametrize("save", ["all", "frontier", "none"])
def test_what_is_saved_comes_back(result, tmp_path, save):
    result.save(tmp_path / "sweep", save=save, about={"seconds": 1.5})
    loaded = SweepResult.load(tmp_path / "sweep")
    expected = {"all": list(range(6)), "frontier": sorted(result.frontier().tolist()), "none": []}[save]
    assert loaded.kept.tolist() == expected
    assert list(loaded.table) == list(result.table)
    for name, column in result.table.items():
        assert loaded.table[name].dtype.kind == column.dtype.kind
        np.testing.assert_array_equal(loaded.table[name], column, err_msg=name)
    for name, log in result.history.items():
        np.testing.assert_array_equal(loaded.history[name], log)
    assert loaded.frontier().tolist() == result.frontier().tolist()
    assert loaded.best() == result.best()
    for i in range(6):
        if i in expected:
            assert loaded.member(i).sae.config == result.member(i).sae.config
            for name, leaf in result.member(i).params.items():
                np.testing.assert_array_equal(loaded.member(i).params[name], leaf)
        else:
            with pytest.raises(InputError, match=f"the weights of member {i} were not saved"):
                loaded.member(i)
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text())["seconds"] == 1.5


def test_a_loaded_result_saves_again(result, tmp_path):
    result.save(tmp_path / "first")
    SweepResult.load(tmp_path / "first").save(tmp_path / "second")
    for name in ("metrics.csv", "members/003/cfg.json", "members/003/sae_weights.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_saving_fewer_over_more_leaves_no_stale_members(result, tmp_path):
    result.save(tmp_path, save="all")
    result.save(tmp_path, save="none")
    assert SweepResult.load(tmp_path).kept.tolist() == []


def test_member_folders_open_one_by_one_and_hold_history_by_member(result, tmp_path):
    result.save(tmp_path)
    assert sorted(path.name for path in (tmp_path / "members").iterdir()) == [f"{i:03d}" for i in range(6)]
    loaded = sae_jax.load(tmp_path / "members" / "002")
    np.testing.assert_array_equal(loaded.params["b_dec"], result.params["b_dec"][2])
    with np.load(tmp_path / "history.npz") as logs:
        assert logs["loss"].shape == (6, len(logs["step"]))


def test_another_word_for_save_is_refused(result, tmp_path):
    with pytest.raises(InputError, match="save must be one of all, frontier, none, got 'some'"):
        result.save(tmp_path / "sweep", save="some")
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("lost", ["sweep.json", "metrics.csv", "history.npz"])
@pytest.mark.parametrize("how", ["missing", "empty", "garbage", "cut"])
def test_a_damaged_folder_is_refused_in_one_sentence(result, tmp_path, lost, how):
    result.save(tmp_path, save="none")
    path = tmp_path / lost
    if how == "missing":
        path.unlink()
    else:
        whole = path.read_bytes()
        path.write_bytes({"empty": b"", "garbage": b"\xff\x00garbage", "cut": whole[: len(whole) // 2]}[how])
    with pytest.raises(InputError, match=str(tmp_path)) as caught:
        SweepResult.load(tmp_path)
    assert "\n" not in str(caught.value)
