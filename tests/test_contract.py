"""Every architecture keeps every promise."""

import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, THOROUGH, Case

import sae_jax
from sae_jax import SAE, Batch, Info, TrainedSAE, train
from sae_jax.architectures import TABLE
from sae_jax.checkpoint import Checkpoints
from sae_jax.data import Source
from sae_jax.need import needs
from sae_jax.spread import SHARE_OF_MEMORY
from sae_jax.sweep import Group

EVERYTHING = next(case for case in CASES if case.name == "relu-everything")

every_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
every_kind = pytest.mark.parametrize("case", THOROUGH, ids=[case.name for case in THOROUGH])
two_kinds = pytest.mark.parametrize(
    "case",
    [case for case in THOROUGH if case.name in ("relu-resampled", "batch-topk")],
    ids=lambda case: case.name,
)
"""For promises of the one loop, which knows no architecture."""

REST = {"lr": [1e-2, 3e-3], "seed": range(2)}
FIVE = {"lr": [1e-2, 3e-3, 1e-2, 1e-3, 5e-3], "seed": [4, 3, 2, 1, 0]}


def solo(case: Case, value=None, lr=1e-2, seed=0, dtype=jnp.float32):
    """The state and the step of one model, as a user without a sweep would make them."""
    sae = case.sae() if value is None else case.factory(**{case.axis: value})
    optimizer = case.optimizer(lr)
    return sae_jax.init(sae, optimizer, jax.random.key(seed), dtype), sae_jax.make_step(sae, optimizer)


def alone(case: Case, grid, i, dtype=jnp.float32):
    """`solo` of a grid's row."""
    return solo(case, *(grid[name][i].item() for name in (case.axis, "lr", "seed")), dtype)


def assert_close(ours, theirs, rtol):
    """Within `rtol` of the largest entry of each leaf."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max())


def assert_same_bits(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)  # says where they differ
        assert a.tobytes() == b.tobytes()


# Member = solo


@every_case
def test_member_equals_solo_in_float64(case, small, x64):
    source, grid = case.source(small.astype(np.float64), batch_size=16, seed=1), case.grid(2, **REST)
    swept = sae_jax.sweep(
        case.factory, case.optimizer, grid=grid, source=source, steps=500, dtype=jnp.float64, points=5
    )
    # members 1 and 6 differ in every axis
    for i in (1, 6) if case in THOROUGH else (6,):
        state, step = alone(case, grid, i, jnp.float64)
        state, history = sae_jax.run(step, state, source, 500, points=5)
        assert_close(swept.member(i).params, train.trained_params(state), 1e-9)
        for name, log in history.items():
            swept_log = swept.history[name] if name == "step" else swept.history[name][:, i]
            np.testing.assert_allclose(swept_log, log, rtol=1e-9)


@pytest.mark.parametrize("case", [CASES[0], EVERYTHING], ids=lambda case: case.name)
def test_member_stays_close_to_solo_in_float32(case, small):
    # Each sum of at most 16 terms rounds by about 16 * 6e-8 = 1e-6 of its size; Adam divides by the root of
    # the second moment, so this reaches the weights as 1e-6 of the step, lr = 1e-2. 20 steps add up to 2e-7,
    # and the loss surface amplifies them by less than a hundred in so few steps.
    source, grid = case.source(small, batch_size=16, seed=1), case.grid(2, **REST)
    swept = sae_jax.sweep(case.factory, case.optimizer, grid=grid, source=source, steps=20)
    state, step = alone(case, grid, 6)
    state, history = sae_jax.run(step, state, source, 20)
    assert_close(swept.member(6).params, state.params, 2e-5)
    np.testing.assert_allclose(swept.history["loss"][:, 6], history["loss"], rtol=2e-5)


# Members are islands


@every_kind
def test_a_diverging_member_changes_no_bit_of_the_others(case, small):
    source = case.source(small, batch_size=16)

    def with_lr(middle):
        values = [case.values[1], case.values[1], case.values[0]]
        grid = sae_jax.zipped(**{"lr": [1e-2, middle, 3e-3], case.axis: values, "seed": [0, 1, 2]})
        return sae_jax.sweep(case.factory, case.optimizer, grid=grid, source=source, steps=30, points=30)

    healthy, sick = with_lr(1e-2), with_lr(1e30)
    assert list(healthy.status) == ["ok"] * 3
    assert sick.status[1].startswith("diverged at step ")
    assert [sick.status[0], sick.status[2]] == ["ok", "ok"]
    for i in (0, 2):
        assert_same_bits(sick.member(i).params, healthy.member(i).params)
        for name in healthy.history:
            if name != "step":
                np.testing.assert_array_equal(sick.history[name][:, i], healthy.history[name][:, i])
        for name in healthy.metrics:
            np.testing.assert_array_equal(sick.metrics[name][i], healthy.metrics[name][i])


# No retrace


@two_kinds
def test_a_second_run_does_not_compile(case, small, compilations):
    source = case.source(small, batch_size=16)
    state, step = solo(case)
    sae_jax.run(step, state, source, 20)
    assert compilations
    compilations.clear()
    after, _ = sae_jax.run(step, state, source, 33)
    sae_jax.run(step, after, source, 40, start=33)
    assert len(compilations) == 0


@every_kind
def test_a_second_sweep_does_not_compile(case, small, compilations):
    source = case.source(small, batch_size=16)
    again = sae_jax.grid(**{case.axis: list(case.values[1:3]), "lr": [1e-3, 2e-3], "seed": [5, 6]})
    sae_jax.sweep(case.factory, case.optimizer, grid=case.grid(2, **REST), source=source, steps=10)
    compilations.clear()
    sae_jax.sweep(case.factory, case.optimizer, grid=again, source=source, steps=12)
    assert len(compilations) == 0


def test_a_second_evaluation_does_not_compile(small, compilations):
    source = sae_jax.in_memory(small, batch_size=16)
    sae = sae_jax.relu(5, 6)
    params = sae.init(jax.random.key(0))
    sae_jax.evaluate(sae, params, source.evaluation(100))
    assert compilations
    compilations.clear()
    sae_jax.evaluate(sae, params, source.evaluation(100))
    assert len(compilations) == 0


def test_a_second_encode_does_not_compile(small, compilations):
    sae = sae_jax.relu(5, 6)
    trained = TrainedSAE(sae, sae.init(jax.random.key(0)))
    x = jnp.asarray(small)
    first = trained(x)
    compilations.clear()
    np.testing.assert_array_equal(trained(x), first)
    assert len(compilations) == 0


def test_a_trained_sae_takes_numpy_rows_as_its_example_does(small):
    sae = sae_jax.relu(5, 6)
    trained = TrainedSAE(sae, sae.init(jax.random.key(0)))
    np.testing.assert_array_equal(trained.encode(small), trained.encode(jnp.asarray(small)))


# Types stay


def shapes_and_types(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)


@every_case
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64], ids=lambda dtype: dtype.__name__)
def test_a_step_keeps_shapes_and_types(case, dtype):
    with jax.enable_x64(dtype is jnp.float64):
        state, step = solo(case, dtype=dtype)
        batch = jax.tree.map(
            lambda rows: rows.astype(dtype), case.batch(np.arange(40.0).reshape(8, 5) % 7 / 7)
        )
        after, logs = jax.eval_shape(step, state, batch)
        assert shapes_and_types(after) == shapes_and_types(state)
        wide = {"threshold", "log_threshold", "log_penalty"}  # whose small steps half precision would lose
        exact = jnp.promote_types(dtype, jnp.float32)
        for name, leaf in state.params.items():
            assert leaf.dtype == (exact if name in wide else jnp.dtype(dtype)), name
        assert {log.dtype for log in logs.values()} == {jnp.dtype(dtype)}
        if dtype is jnp.bfloat16:  # the one in which a step might overflow or lose a divisor
            after, _ = jax.jit(step)(state, batch)
            assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(after))


def test_the_step_needs_no_implicit_promotion(small):
    """Under JAX's strict promotion, with an optimizer that bears it."""
    for case in CASES:
        sae, optimizer, batch = case.sae(), optax.sgd(0.1), case.batch(small)
        state = sae_jax.init(sae, optimizer, jax.random.key(0))
        with jax.numpy_dtype_promotion("strict"):
            jax.eval_shape(sae_jax.make_step(sae, optimizer), state, batch)


# One loop


@two_kinds
def test_run_equals_a_python_loop(case, small, x64):
    source = case.source(small.astype(np.float64), batch_size=20)
    start, step = solo(case, dtype=jnp.float64)
    state, history = sae_jax.run(step, start, source, 40, points=40)
    one, by_hand, losses = jax.jit(lambda state, i: step(state, source.batch(i))), start, []
    for i in range(40):
        by_hand, logs = one(by_hand, jnp.int32(i))
        losses.append(logs["loss"])
    assert_close(state, by_hand, 1e-12)
    np.testing.assert_allclose(history["loss"], losses, rtol=1e-12)
    assert list(history["step"]) == list(range(1, 41))


@two_kinds
def test_chunking_changes_no_bit(case, small, monkeypatch):
    source = case.source(small, batch_size=20)
    start, step = solo(case)
    chunks = []

    def run(seconds, points):
        monkeypatch.setattr(train, "SECONDS_PER_CHUNK", seconds)
        stops = []
        result = sae_jax.run(step, start, source, 50, points=points, between=lambda i, *_: stops.append(i))
        chunks.append(stops)
        return result

    single, by_one = run(0.0, 1)
    whole, by_whole = run(1e9, 1)
    often, by_often = run(1e9, 50)
    _, by_one_often = run(0.0, 50)
    seldom, by_seldom = run(1e9, 12)
    _, by_one_seldom = run(0.0, 12)
    assert chunks[0] == list(range(1, 51))
    assert chunks[1] == [1, 17, 50]
    assert chunks[2] == [1, 17, 49, 50], "a chunk holds so many points"
    for other in (whole, often, seldom):
        assert_same_bits(single, other)
    assert_same_bits(by_one, by_whole)
    assert_same_bits(by_one_often, by_often)
    assert_same_bits(by_one_seldom, by_seldom)
    assert list(by_seldom["step"]) == [*range(4, 49, 4), 50]


def test_run_leaves_the_given_state_usable(small):
    state, step = solo(CASES[0])
    before = jax.tree.map(np.array, state)
    sae_jax.run(step, state, sae_jax.in_memory(small), 3)
    assert_same_bits(state, before)


def test_a_run_may_take_the_memory_of_its_state(small):
    state, step = solo(CASES[0])
    kept, history = sae_jax.run(step, state, sae_jax.in_memory(small), 3)
    taken, same_history = sae_jax.run(step, state, sae_jax.in_memory(small), 3, consume=True)
    assert_same_bits(taken, kept)
    assert_same_bits(same_history, history)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


class Staged(NamedTuple):
    """A source that is read in stages, the second of which is short."""

    whole: Source

    @property
    def batch_size(self):
        return self.whole.batch_size

    def batch(self, i):
        return self.whole.batch(i)

    def evaluation(self, rows):
        return self.whole.evaluation(rows)

    def stages(self, start, steps):
        return ((self.whole, stop) for stop in (17, 18, steps))


def test_a_chunk_that_its_stage_cuts_short_does_not_shorten_the_next(small, monkeypatch):
    monkeypatch.setattr(train, "SECONDS_PER_CHUNK", 1e9)
    state, step = solo(CASES[0])
    stops = []
    source = Staged(sae_jax.in_memory(small))
    sae_jax.run(step, state, source, 60, points=1, between=lambda done, *_: stops.append(done))
    assert stops == [1, 17, 18, 60]


@pytest.mark.parametrize(
    ("start", "steps", "points", "expected"),
    [(0, 10, 5, [2, 4, 6, 8, 10]), (0, 3, 100, [1, 2, 3]), (0, 10, 3, [3, 6, 9, 10]), (5, 10, 5, [6, 8, 10]),
     (10, 10, 5, []), (9, 10, 2, [10])],
)  # fmt: skip
def test_points_are_evenly_spaced_and_hold_the_last(start, steps, points, expected):
    assert train.points_of(start, steps, points) == expected


@pytest.mark.parametrize(("steps", "start"), [(0, 0), (-1, 0), (5, 6), (5, -1)])
def test_run_refuses_a_length_that_is_none(small, steps, start):
    state, step = solo(CASES[0])
    with pytest.raises(sae_jax.InputError, match=f"got {start if steps > 0 else steps}$"):
        sae_jax.run(step, state, sae_jax.in_memory(small), steps, start=start)


# Resume is exact


@every_kind
def test_a_stopped_run_resumes_bit_for_bit(case, small, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SECONDS_PER_CHUNK", 0.0)
    source = case.source(small, batch_size=20)
    start, step = solo(case)
    whole, whole_history = sae_jax.run(step, start, source, 30, points=10)
    folder = tmp_path / "run"
    for stop in (7, 8, 29):  # between 7 and 8 lies no point of history
        with pytest.raises(sae_jax.Stopped):
            sae_jax.run_resumable(
                step, start, source, 30, points=10, checkpoints=folder, look=lambda done, _, s=stop: done >= s
            )
    done, held, _ = Checkpoints(folder).restore(start)
    assert done == 29
    assert int(held.progress.step) == 29
    first_looks = []
    state, history = sae_jax.run_resumable(
        step, start, source, 30, points=10, checkpoints=folder,
        look=lambda done, history: first_looks.append((done, len(history["step"]))),
    )  # fmt: skip
    assert first_looks == [(30, 10)], "only the one missing step is done again, and the history is whole"
    assert_same_bits(state, whole)
    assert_same_bits(history, whole_history)


def test_a_killed_run_resumes_from_its_last_checkpoint(small, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SECONDS_PER_CHUNK", 0.0)
    monkeypatch.setattr(train, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    source = sae_jax.in_memory(small, batch_size=20)
    start, step = solo(CASES[0])
    whole, whole_history = sae_jax.run(step, start, source, 12)

    def killed(done, history):
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sae_jax.run_resumable(step, start, source, 12, checkpoints=tmp_path, look=killed)
    assert Checkpoints(tmp_path).restore(start)[0] == 5
    state, history = sae_jax.run_resumable(step, start, source, 12, checkpoints=tmp_path)
    assert_same_bits(state, whole)
    assert_same_bits(history, whole_history)


def test_a_stopped_sweep_of_several_chunks_resumes_bit_for_bit(small, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SECONDS_PER_CHUNK", 0.0)
    case, source = EVERYTHING, sae_jax.in_memory(small, batch_size=20)

    def sweep(between=None, checkpoints=None):
        return sae_jax.sweep(
            case.factory, case.optimizer, grid=case.five(**FIVE), source=source, steps=9, members_at_once=2,
            look=between, checkpoints=checkpoints,
        )  # fmt: skip

    whole = sweep()
    looks = []

    def stop_in_the_second_chunk(look: sae_jax.Look):
        looks.append(look)
        return look.member_steps >= 2 * 9 + 2 * 4

    with pytest.raises(sae_jax.Stopped):
        sweep(stop_in_the_second_chunk, tmp_path)
    assert looks[-1].member_steps == 26
    assert {look.total for look in looks} == {45}
    later = []
    resumed = sweep(later.append, tmp_path)
    assert 2 * 9 + 2 * 5 in [look.member_steps for look in later]
    assert 26 not in [look.member_steps for look in later], "what was done is not done again"
    assert later[-1].member_steps == 45
    assert_same_bits(resumed.params, whole.params)
    assert_same_bits(resumed.metrics, whole.metrics)
    assert_same_bits(resumed.history, whole.history)


@pytest.mark.parametrize(
    "change",
    [
        {"grid": sae_jax.grid(lr=[1e-2], l1=[0.2, 0.1])},  # as many members, otherwise ordered
        {"steps": 8},
        {"optimizer": optax.sgd},
        {"factory": partial(CASES[0].factory, mean_features=False)},
        {"source": sae_jax.in_memory(np.ones((48, 5), np.float32), batch_size=20)},
    ],
)
def test_a_sweep_is_resumed_by_the_same_request_only(small, tmp_path, change):
    arguments = {
        "factory": CASES[0].factory,
        "optimizer": optax.adam,
        "grid": sae_jax.grid(lr=[1e-2], l1=[0.1, 0.2]),
        "source": sae_jax.in_memory(small, batch_size=20),
        "steps": 9,
    }
    with pytest.raises(sae_jax.Stopped):  # before there is any history, too
        sae_jax.sweep(**arguments, points=1, checkpoints=tmp_path, look=lambda look: True)
    with pytest.raises(sae_jax.InputError, match="other options"):
        sae_jax.sweep(**{**arguments, **change}, checkpoints=tmp_path)
    resumed = sae_jax.sweep(**arguments, points=1, checkpoints=tmp_path)
    assert_same_bits(resumed.params, sae_jax.sweep(**arguments, points=1).params)


def test_a_partial_made_anew_compiles_nothing_new(small, compilations):
    source = sae_jax.in_memory(small, batch_size=20)
    for _ in range(2):
        before = len(compilations)
        sae_jax.sweep(
            partial(sae_jax.relu, d_in=5, d_sae=9),
            partial(optax.adam, b1=0.8),
            grid=CASES[0].five(**FIVE),
            source=source,
            steps=3,
        )
    assert len(compilations) == before


def test_a_resumed_sweep_keeps_its_chunks_when_memory_has_changed(small, tmp_path, monkeypatch):
    case, source = CASES[0], sae_jax.in_memory(small, batch_size=20)
    sweep = partial(
        sae_jax.sweep, case.factory, case.optimizer, grid=case.five(**FIVE), source=source, steps=9
    )
    whole = sweep(members_at_once=2)
    one = needs([Group(case.factory, case.optimizer, case.five(**FIVE))], source=source)[0].one.total
    limited = sys.modules["sae_jax.cut"]
    monkeypatch.setattr(limited, "free_memory", lambda: 2 * one / SHARE_OF_MEMORY)
    with pytest.raises(sae_jax.Stopped):
        sweep(checkpoints=tmp_path, look=lambda look: look.member_steps > 2 * 9)
    monkeypatch.setattr(limited, "free_memory", lambda: 5 * one / SHARE_OF_MEMORY)
    resumed = sweep(checkpoints=tmp_path)
    assert_same_bits(resumed.params, whole.params)


def test_nothing_is_restored_from_an_empty_or_missing_folder(tmp_path):
    assert Checkpoints(tmp_path / "missing").restore({"a": jnp.ones(1)}) is None
    assert Checkpoints(tmp_path).restore({"a": jnp.ones(1)}) is None


# Weights on disk


@every_case
def test_saved_weights_come_back(case, small, tmp_path):
    sae, batch = case.sae(), case.batch(small)
    trained = TrainedSAE(sae, sae.init(jax.random.key(3)))
    trained.save(tmp_path / "sae")
    loaded = sae_jax.load(tmp_path / "sae")
    if "rescaled" in case.name or case.name == "topk-saelens":  # decoder norms are folded in
        np.testing.assert_allclose(loaded.encode(batch.x), trained.encode(batch.x), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(loaded(batch.x), trained(batch.x), rtol=1e-5, atol=1e-6)
        return
    assert_same_bits(loaded.params, trained.params)
    assert loaded.sae.config == sae.config
    assert loaded.sae.config[case.axis] == case.values[1]
    np.testing.assert_array_equal(loaded.encode(batch.x), trained.encode(batch.x))
    np.testing.assert_array_equal(loaded(batch.x), trained(batch.x))
    progress = sae_jax.init(sae, optax.sgd(0.1), jax.random.key(0)).progress
    loss = sae.loss(trained.params, batch, progress)[0]
    assert loaded.sae.loss(loaded.params, batch, progress)[0] == loss


# Other machines


@every_case
def test_the_step_lowers_for_gpu_and_tpu(case):
    state, step = solo(case)
    batch = case.batch(np.ones((8, 5), np.float32))
    # the kernels of the sparse way, which export does not promise to read in other versions
    triton = jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
    lowered = jax.export.export(jax.jit(step), platforms=["cuda", "tpu"], disabled_checks=[triton])
    exported = lowered(state, batch)
    assert exported.platforms == ("cuda", "tpu")


# Members that do not fit


@pytest.mark.parametrize("at_once", [1, 2])
def test_members_at_once_does_not_show_in_the_result(at_once, small, x64):
    case = EVERYTHING
    source = case.source(small.astype(np.float64), batch_size=20)

    def sweep(members_at_once):
        return sae_jax.sweep(
            case.factory, case.optimizer, grid=case.five(**FIVE), source=source, steps=50, dtype=jnp.float64,
            members_at_once=members_at_once,
        )  # fmt: skip

    chunked, whole = sweep(at_once), sweep(None)
    assert_close(chunked.params, whole.params, 1e-10)
    assert_close(chunked.metrics, whole.metrics, 1e-10)
    assert_close(chunked.history, whole.history, 1e-10)
    assert chunked.params["W_dec"].shape[0] == 5
    assert chunked.history["loss"].shape[1] == 5


# What an architecture may do through the same step


def with_running_mean() -> SAE:
    """An SAE whose decoder bias is a running mean of the data, and whose loss tells what progress it saw."""

    def init(key, dtype=jnp.float32):
        return {
            "W_enc": jax.random.normal(key, (5, 3), dtype),
            "W_dec": jnp.ones((3, 5), dtype),
            "b_dec": jnp.zeros(5, dtype),
        }

    def encode(params, x):
        # the last latent fires on no data
        return jax.nn.relu(x @ params["W_enc"]) * jnp.array([1.0, 1.0, 0.0])

    def decode(params, f):
        return f @ params["W_dec"] + params["b_dec"]

    def loss(params, batch, progress):
        f = encode(params, batch.x)
        value = jnp.square(decode(params, f) - batch.y).mean()
        mean = 0.9 * params["b_dec"] + 0.1 * batch.x.mean(axis=0)
        logs = {"step_seen": progress.step, "silence_seen": progress.since_fired[-1]}
        logs = {name: log.astype(value.dtype) for name, log in logs.items()}
        return value, Info(logs, (f > 0).any(axis=0), {"b_dec": mean})

    return SAE(init, encode, decode, loss)


def test_assigned_leaves_replace_what_the_optimizer_made(small):
    source = sae_jax.in_memory(small)  # full batch: the running mean is known in closed form
    sae, optimizer = with_running_mean(), optax.adam(1e-2)
    start = sae_jax.init(sae, optimizer, jax.random.key(0))
    state, _ = sae_jax.run(sae_jax.make_step(sae, optimizer), start, source, 10)
    mean = small.mean(axis=0)
    np.testing.assert_allclose(state.params["b_dec"], (1 - 0.9**10) * mean, rtol=1e-5, atol=1e-7)
    assert np.abs(state.params["W_dec"] - start.params["W_dec"]).max() > 0.01


def test_a_loss_sees_the_step_and_how_long_each_latent_was_silent(small):
    sae, optimizer = with_running_mean(), optax.adam(1e-2)
    start = sae_jax.init(sae, optimizer, jax.random.key(0))
    state, history = sae_jax.run(sae_jax.make_step(sae, optimizer), start, sae_jax.in_memory(small), 10)
    assert history["step_seen"].tolist() == list(range(10))
    assert history["silence_seen"].tolist() == list(range(10))
    assert state.progress.step == 10
    assert state.progress.since_fired.tolist() == [0, 0, 10]


def test_an_optimizer_is_handed_the_batch_the_value_and_the_progress(small):
    seen = {}

    def update(updates, state, params=None, **extra):
        seen.update(extra)
        return updates, state

    spy = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    sae = sae_jax.relu(5, 6)
    optimizer = optax.chain(optax.sgd(0.1), spy)
    state = sae_jax.init(sae, optimizer, jax.random.key(0))
    _, logs = sae_jax.make_step(sae, optimizer)(state, Batch(jnp.asarray(small), jnp.asarray(small)))
    assert seen["value"] == logs["loss"]
    assert seen["progress"].step == 0
    assert seen["batch"].x.shape == small.shape


def test_every_architecture_has_a_case():
    built = {case.sae().config["architecture"] for case in CASES}
    assert built == set(TABLE), "add a row to tests/cases.py"
    assert {case.sae().config["architecture"] for case in THOROUGH} == set(TABLE), "name it in THOROUGH"


def test_checkpoints_are_written_where_they_are_asked_for(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    monkeypatch.setattr(train, "SECONDS_PER_CHUNK", 0.0)
    start, step = solo(CASES[0])
    sae_jax.run_resumable(step, start, sae_jax.in_memory(small), 4, checkpoints=Path("relative"))
    kept = [path.name for path in (tmp_path / "relative").iterdir() if path.is_dir()]
    assert sorted(kept) == ["2", "3"], "the last two are kept, and a short run's end is not worth one"
