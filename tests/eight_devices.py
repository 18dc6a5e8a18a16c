"""What test_sharding.py runs in a process of its own, in which a CPU is eight devices."""

import math
import re
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import THOROUGH, Case
from jax.sharding import PartitionSpec

import sae_jax
from sae_jax import InputError, sharding, train
from sae_jax.activations import batch_topk, topk
from sae_jax.data import Rows, on_mesh, stored
from sae_jax.program import checked_program, layout
from sae_jax.selection import largest, largest_of_all
from sae_jax.sweep import Group

ALL_AXES = "member=2,data=2,latent=2"
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")

every_kind = pytest.mark.parametrize("case", THOROUGH, ids=[case.name for case in THOROUGH])


@pytest.fixture(scope="module")
def rows():
    assert jax.device_count() == 8
    return np.random.default_rng(0).normal(size=(48, 5)).astype(np.float32)


def eight_members(case: Case):
    values = [case.values[i % len(case.values)] for i in range(8)]
    return sae_jax.zipped(**{case.axis: values, "lr": [1e-3, 3e-3] * 4, "seed": range(8)})


def sweep(case: Case, rows, **options):
    source = case.source(rows, 16, 1)
    return sae_jax.sweep(
        case.sized(8), case.optimizer, grid=eight_members(case), source=source, **{"steps": 20, **options}
    )


def step_on(case: Case, rows, mesh):
    """The sweep's step, its state and its batch, laid out on a mesh; to be called while it is in force."""
    grid, source = eight_members(case), case.source(rows, 16, 1)
    program = checked_program(case.sized(8), case.optimizer, grid, source, jnp.float32)
    hyper = sharding.placed(program.to_device(grid), mesh, PartitionSpec("member"))
    return program.step, program.start(hyper), on_mesh(source, mesh)


def collectives(case: Case, rows, axes: str) -> Counter:
    """How often each is in the compiled step."""
    mesh = sharding.mesh(axes)
    with jax.set_mesh(mesh):
        step, state, source = step_on(case, rows, mesh)
        batch = jax.jit(source.batch)(0)
        compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile().as_text()
    return Counter(re.findall(rf"= [^=]*?\b({'|'.join(COLLECTIVES)})(?:-start)?\(", compiled))


# Communication


@every_kind
def test_members_exchange_nothing(case, rows):
    assert not collectives(case, rows, "member=8")


@pytest.mark.parametrize(
    ("axes", "most"),
    [("data=8", {"all-reduce": 3}), ("latent=8", {"all-reduce": 3}), (ALL_AXES, {"all-reduce": 6})],
)
def test_rows_and_latents_of_a_relu_are_only_summed_over(rows, axes, most):
    found = collectives(THOROUGH[0], rows, axes)
    assert set(found) == set(most)
    assert all(found[name] <= count for name, count in most.items()), found


def test_topk_gathers_what_each_device_chose_and_not_its_latents():
    mesh = sharding.mesh("latent=8")
    with jax.set_mesh(mesh):
        f = sharding.placed(np.random.default_rng(0).normal(size=(16, 4096)).astype(np.float32), mesh,
                            PartitionSpec(None, "latent"))  # fmt: skip
        text = jax.jit(lambda f: largest(f, 4)).lower(f).compile().as_text()
    gathered = re.findall(r"= \(?\w+\[([\d,]+)\][^=]*? all-gather(?:-start)?\(", text)
    # of 16 rows what 8 devices chose, and where: 4 each
    sizes = [math.prod(map(int, shape.split(","))) for shape in gathered]
    assert sizes == [16 * 8 * 4] * 2


def test_a_chunk_of_steps_moves_nothing_behind_the_hosts_back(rows):
    mesh = sharding.mesh(ALL_AXES)
    with jax.set_mesh(mesh):
        step, state, source = step_on(THOROUGH[0], rows, mesh)
        numbers = sharding.placed((np.int32(0), np.int32(3), np.int32(2)), mesh)
        with jax.transfer_guard("disallow"):
            train._advance(step, state, source, *numbers)


# Layout


def test_every_leaf_lies_where_the_table_says_before_and_after(rows):
    mesh = sharding.mesh(ALL_AXES)
    with jax.set_mesh(mesh):
        step, state, source = step_on(THOROUGH[0], rows, mesh)
        after, _ = jax.jit(step, donate_argnums=0)(state, jax.jit(source.batch)(0))
        wanted = jax.tree.leaves(layout(after))
    for leaf, spec in zip(jax.tree.leaves(after), wanted, strict=True):
        assert leaf.sharding.is_equivalent_to(jax.NamedSharding(mesh, spec), leaf.ndim)
    (kernel,) = {shard.data.shape for shard in after.train.params["W_dec"].addressable_shards}
    assert kernel == (4, 4, 5), "half of the members, half of the latents"


@every_kind
def test_latents_are_spread_in_every_weight_that_has_them(case, rows):
    sae = case.sized(8)(**{case.axis: case.values[1]})
    params = jax.eval_shape(lambda: sae.init(jax.random.key(0)))
    for name, spec in sharding.specs(params, params).items():
        assert tuple(spec).count("latent") == params[name].shape.count(8), name


# The same numbers


@pytest.mark.parametrize("k", [0, 1, 3, 7, 8, 20])
def test_the_largest_are_the_same_entries_wherever_they_lie(k):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 4, (3, 8, 16)).astype(np.float32)  # with ties
    values[1, 2, 3] = np.nan
    ks = jnp.array([k, max(k - 1, 0), k])
    both = [
        jax.jit(jax.vmap(lambda values, k: largest(values, k, 20))),
        jax.jit(jax.vmap(lambda values, k: largest_of_all(values, k, 20))),
    ]
    here = [of(values, ks) for of in both]
    for axes in ("data=8", "latent=8", "data=2,latent=4"):
        mesh = sharding.mesh(axes)
        with jax.set_mesh(mesh):
            spread = sharding.placed(values, mesh, PartitionSpec(None, "data", "latent"))
            for of, expected in zip(both, here, strict=True):
                np.testing.assert_array_equal(of(spread, ks), expected)


def test_features_and_gradients_of_a_spread_topk_are_those_of_one_device():
    pre = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)

    def both(pre):
        return jnp.square(topk(pre, 3)).sum() + jnp.square(batch_topk(pre, 2)).sum()

    expected = jax.grad(both)(jnp.asarray(pre))
    with jax.set_mesh(mesh := sharding.mesh("data=2,latent=4")):
        spread = sharding.placed(pre, mesh, PartitionSpec("data", "latent"))
        np.testing.assert_array_equal(jax.jit(jax.grad(both))(spread), expected)


def numbered(n: int, dtype=np.float32) -> Rows:
    array = np.random.default_rng(1).normal(size=(n, 5)).astype(dtype)
    return Rows(array.shape, array.dtype, 8, "rows", lambda start, stop: array[start:stop])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16], ids=lambda dtype: dtype.__name__)
def test_a_store_on_a_mesh_gives_the_same_batches(dtype):
    source = stored(numbered(200, dtype), batch_size=16, seed=3, window_rows=48)
    there = on_mesh(source, sharding.mesh("data=4,latent=2"))
    for (stage, end), (spread, spread_end) in zip(source.stages(5, 30), there.stages(5, 30), strict=True):
        assert end == spread_end
        for i in range(int(stage.first), end):
            rows = jax.jit(lambda stage, i: stage.batch(i).x)(spread, jnp.int32(i))
            np.testing.assert_array_equal(stage.batch(jnp.int32(i)).x, rows)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=lambda dtype: dtype.__name__)
def test_rows_to_measure_on_are_the_same_on_a_mesh(dtype):
    source = stored(numbered(50, dtype), batch_size=16, seed=3)
    there = on_mesh(source, sharding.mesh("data=8")).evaluation(100)
    for here, spread in zip(source.evaluation(100), there, strict=True):
        assert here.x.dtype == spread.x.dtype == jnp.float32
        np.testing.assert_array_equal(here.x, spread.x)


def test_a_stored_sweep_on_a_mesh_has_the_same_losses():
    run = partial(
        sae_jax.sweep, partial(sae_jax.topk, 5, 8, k=2), grid=sae_jax.grid(lr=[1e-3], seed=range(4)),
        source=stored(numbered(200), batch_size=16, seed=3), steps=60,
    )  # fmt: skip
    np.testing.assert_allclose(run(mesh=ALL_AXES).history["loss"], run().history["loss"], rtol=1e-6)


@pytest.mark.parametrize("mesh", ["auto", "member=2"])
def test_chunks_halvings_and_worlds_do_as_on_one_device(mesh):
    world = sae_jax.synthetic.toy_superposition(12, 0.2, 6, batch_size=32)
    run = partial(
        sae_jax.sweep, partial(sae_jax.relu, 6, 8),
        grid=sae_jax.grid(l1=[0.01, 0.1, 1.0, 2.0], lr=[1e-3], seed=range(4)), source=world,
        steps=40, keep_best=4, members_at_once=8, evaluate_rows=256,
    )  # fmt: skip
    here, there = run(), run(mesh=mesh)
    assert there.status.tolist() == here.status.tolist()
    for name in ("l0", "explained_variance", "mmcs", "f1"):
        np.testing.assert_allclose(there.metrics[name], here.metrics[name], rtol=1e-4, atol=1e-6)


# Checkpoints


@pytest.mark.parametrize(
    ("before", "after"), [(None, ALL_AXES), ("member=8", "data=4,latent=2"), (ALL_AXES, None)]
)
def test_a_checkpoint_goes_on_on_another_mesh(rows, tmp_path, before, after):
    (case,) = [case for case in THOROUGH if case.name == "batch-topk"]
    whole = sweep(case, rows, steps=60, points=60)
    with pytest.raises(sae_jax.Stopped):
        sweep(case, rows, steps=60, points=60, mesh=before, checkpoints=tmp_path,
              look=lambda look: look.done > 20)  # fmt: skip
    looks = []
    resumed = sweep(case, rows, steps=60, points=60, mesh=after, checkpoints=tmp_path, look=looks.append)
    assert looks[0].done - 1 > 20, "it went on"
    np.testing.assert_allclose(resumed.history["loss"], whole.history["loss"], rtol=1e-6)


# Bad input


@pytest.mark.parametrize(
    ("axes", "sentence"),
    [
        ("member=3", "the mesh's member=3 does not divide the 8 members; the nearest that does is member=2"),
        (
            "data=5",
            "the mesh's data=5 does not divide the 16 rows of a batch; the nearest that does is data=",
        ),
        ("latent=6", "the mesh's latent=6 does not divide the 8 latents; the nearest that does is latent=4"),
        ("member=4,data=4", "the mesh member=4,data=4,latent=1 needs 16 devices, and there are 8"),
        ("rows=2", "a mesh has no axis 'rows'; its axes are member, data, latent"),
        ("member=0", "the mesh's axis member must be at least 1, got 0"),
        ("member", "a mesh is written member=2,data=2,latent=2 (or some of these), or auto, got 'member'"),
        ("data=2,data=2", "a mesh is written member=2,data=2,latent=2 (or some of these), or auto, got"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_in_a_sentence(rows, axes, sentence):
    with pytest.raises(InputError) as refused:
        sweep(THOROUGH[0], rows, mesh=axes)
    assert str(refused.value).startswith(sentence)
    assert "\n" not in str(refused.value)


def test_a_mesh_that_a_later_group_cannot_have_is_refused_before_the_first_trains(rows):
    grid, looks = sae_jax.grid(lr=[1e-3], seed=range(8)), []
    groups = [Group(partial(sae_jax.relu, 5, d_sae), optax.adam, grid) for d_sae in (8, 12)]
    sweep_all = partial(sae_jax.sweep_all, groups, source=sae_jax.in_memory(rows, 16), steps=4)
    for mesh in ("latent=8", sharding.mesh("latent=8")):
        with pytest.raises(InputError, match="latent=8 does not divide the 12 latents"):
            sweep_all(mesh=mesh, look=looks.append)
    assert not looks


def test_the_optimizer_of_a_large_sae_lies_where_its_weights_do():
    sae = sae_jax.crosscoder(4, 16, sources=2)
    state = jax.eval_shape(lambda: sae_jax.init(sae, optax.adam(1e-3), jax.random.key(0)))
    found = sharding.specs(state, state.params)
    assert found.params["W_enc"] == found.opt_state[0].mu["W_enc"] == PartitionSpec(None, None, "latent")
    assert found.params["W_dec"] == found.opt_state[0].nu["W_dec"] == PartitionSpec("latent", None, None)
    assert found.opt_state[0].count == PartitionSpec()
