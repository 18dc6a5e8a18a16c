"""Worlds: what they promise of their features holds in the rows that they give."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sae_jax
from sae_jax import InputError, synthetic
from sae_jax.synthetic import directions, firing, generated, hierarchy, world
from sae_jax.train import init, make_step, run

SMALL = {
    "synthsaebench_1k": {"features": 128, "d_in": 16, "roots": 4, "depth": 2, "rank": 3},
    "sharkey_uncorrelated": {"features": 64, "d_in": 32},
    "sharkey_correlated": {"features": 64, "d_in": 32},
}


@pytest.fixture(scope="module")
def worlds():
    return {name: synthetic.find(name)(batch_size=256, **SMALL.get(name, {})) for name in NAMES}


NAMES = [name for name in synthetic.WORLDS if name != "synthsaebench_16k"]  # which differs by its sizes alone
every_world = pytest.mark.parametrize("name", NAMES)
every_kind = pytest.mark.parametrize(
    "name",
    ["toy_superposition", "sharkey_correlated", "sparse_but_wrong", "matryoshka_tree", "synthsaebench_1k"],
)


@jax.jit
def batch(of, i):
    return of.batch(i).x


@jax.jit
def firing_rates(of, number):
    return (of.amounts(of.key(number), 4096) > 0).mean(axis=0)


def measured(of, batches=16):
    """Rates over so many batches of 4,096 rows, which for some worlds share a draw."""
    return np.stack([firing_rates(of, jnp.uint32(10_000 + i)) for i in range(batches)]).astype(np.float64)


def amounts_of(of):
    return np.asarray(jax.jit(lambda of: of.amounts(jax.random.key(7), 20_000))(of))


# A source


@every_world
def test_a_batch_is_a_function_of_the_world_and_its_number(worlds, name):
    of = worlds[name]
    again = synthetic.find(name)(batch_size=256, **SMALL.get(name, {}))
    first = batch(of, jnp.int32(3))
    assert first.shape == (256, of.directions.shape[1])
    np.testing.assert_array_equal(first, batch(again, jnp.int32(3)))
    assert not np.array_equal(first, batch(of, jnp.int32(4)))
    other = of.replace(seed=jnp.uint32(1))
    assert not np.array_equal(first, batch(other, jnp.int32(3)))


@every_kind
def test_compiled_and_eager_agree(worlds, name):
    eager = worlds[name].batch(5)
    np.testing.assert_array_equal(eager.x, eager.y)
    np.testing.assert_allclose(eager.x, batch(worlds[name], jnp.int32(5)), atol=2e-5)


@every_kind
def test_worlds_can_be_vmapped(worlds, name):
    of = worlds[name]
    two = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), of).replace(seed=jnp.uint32([0, 1]))
    both = jax.jit(jax.vmap(lambda one: one.batch(2).x))(two)
    np.testing.assert_allclose(both[0], batch(of, jnp.int32(2)), atol=2e-5)
    np.testing.assert_allclose(both[1], batch(of.replace(seed=jnp.uint32(1)), jnp.int32(2)), atol=2e-5)


@every_kind
def test_what_is_held_out_is_no_training_batch(worlds, name):
    of = worlds[name]
    labelled = list(of.labelled(512))
    evaluation = list(of.evaluation(512))
    assert len(labelled) == len(evaluation) == 2
    for (seen, amounts), without in zip(labelled, evaluation, strict=True):
        np.testing.assert_array_equal(seen.x, without.x)
        np.testing.assert_allclose(seen.x, amounts @ of.directions + of.bias, atol=2e-5)
        assert not np.array_equal(seen.x, batch(of, jnp.int32(0)))
    assert not np.array_equal(labelled[0][0].x, labelled[1][0].x)


@every_world
def test_no_step_touches_the_host(worlds, name):
    of, i = worlds[name], jnp.int32(1)
    batch(of, i)
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(batch(of, i))


def test_one_compiled_loop_trains_on_a_world():
    of = synthetic.matryoshka_tree(batch_size=64)
    sae, optimizer = sae_jax.relu(20, 20, l1=1e-3), optax.adam(1e-2)
    start = init(sae, optimizer, jax.random.key(0))
    trained = run(make_step(sae, optimizer), start, of, 200)[0]
    x, _ = next(of.labelled(1024))[0]

    def error(params):
        return float(jnp.square(sae.decode(params, sae.encode(params, x), x) - x).sum(axis=1).mean())

    assert error(trained.params) < 0.5 * error(start.params)


def test_worlds_over_traced_arguments():
    densities = jnp.array([0.05, 0.5])
    many = jax.vmap(lambda density: synthetic.toy_superposition(8, density))(densities)
    np.testing.assert_allclose(many.expected_l0, [0.4, 4.0], rtol=1e-5)
    alone = synthetic.toy_superposition(8, 0.5)
    rows = jax.vmap(lambda one: one.batch(0).x)(many)
    np.testing.assert_array_equal(rows[1], alone.batch(0).x)
    seeds = jax.vmap(lambda seed: synthetic.hedging(seed=seed, first=0.1))(jnp.arange(2))
    np.testing.assert_allclose(seeds.directions[1], synthetic.hedging(seed=1).directions, atol=1e-6)


def test_double_precision(x64):
    of = synthetic.synthsaebench_1k(batch_size=32, **SMALL["synthsaebench_1k"])
    assert batch(of, 0).dtype == of.probabilities.dtype == jnp.float64


# Rates


@every_world
def test_features_fire_as_often_as_the_world_says(worlds, name):
    of = worlds[name]
    rates = measured(of)
    # one draw of probabilities serves a batch of a drifting world, so batches and not rows are the sample
    spread = rates.std(axis=0, ddof=1) / np.sqrt(len(rates))
    binomial = np.sqrt(np.asarray(of.probabilities) / (4096 * len(rates)))
    wrong = (rates.mean(axis=0) - np.asarray(of.probabilities)) / np.maximum(spread, binomial)
    assert np.abs(wrong).max() < 5.5
    assert np.sqrt(np.mean(np.square(wrong))) < 1.35
    np.testing.assert_allclose(rates.sum(axis=1).mean(), of.expected_l0, rtol=0.03)


PARENTS = np.array([-1, -1, 0, 0, 0, 1, 1, 2, 2, -1])
ASKED = np.array([0.5, 0.3, 0.2, 0.15, 0.1, 0.2, 0.05, 0.1, 0.1, 0.02])


@pytest.mark.parametrize(
    ("compensate", "rank"), [(hierarchy.exact, 0), (hierarchy.first_order, 3), (hierarchy.as_given, 0)]
)
def test_rates_are_known_under_each_compensation(compensate, rank):
    of = generated(ASKED, 8, std=0.5, parents=PARENTS, compensate=compensate, rank=rank, scale=0.4)
    rates = measured(of).mean(axis=0)
    errors = (rates - np.asarray(of.probabilities)) / np.sqrt(np.asarray(of.probabilities) / 65_536)
    assert np.abs(errors).max() < 4.5


def test_exact_gives_the_rates_that_are_asked_for():
    of = generated(ASKED, 8, parents=PARENTS)
    np.testing.assert_allclose(of.probabilities, ASKED, rtol=1e-6)
    full = generated(np.array([0.6, 0.3, 0.2, 0.1]), 4, parents=np.array([-1, 0, 0, 0]))
    np.testing.assert_allclose(full.probabilities, [0.6, 0.3, 0.2, 0.1], rtol=1e-3)
    near = generated(ASKED, 8, parents=PARENTS, compensate=hierarchy.first_order)
    assert 0.01 < np.abs(np.asarray(near.probabilities) / ASKED - 1).max() < 0.3


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=6), st.floats(0.05, 0.95))
def test_exact_inverts_the_rates_of_exclusive_siblings(weights, share):
    asked = np.array([0.5, *(0.5 * share * np.array(weights) / np.sum(weights))])
    tree = hierarchy.forest([-1] + [0] * len(weights), exclusive=True)
    candidates = hierarchy.exact(asked, tree)
    assert (candidates <= 1).all()
    np.testing.assert_allclose(tree.rates(candidates), asked, rtol=1e-9)


def test_chosen_against_all_cases():
    q = np.array([0.9, 0.3, 0.05, 1.0])
    stays = np.zeros(4)
    for case in range(16):
        fires = np.array([case >> j & 1 for j in range(4)])
        stays += np.prod(np.where(fires, q, 1 - q)) * fires / max(fires.sum(), 1)
    np.testing.assert_allclose(hierarchy.chosen(q), stays / q, rtol=1e-12)


# Hierarchies


def test_children_fire_under_their_parents_and_exclude_each_other():
    exclusive = np.arange(10) == 0
    of = world(jnp.eye(10), firing.independent(np.full(10, 0.5)), forest=hierarchy.forest(PARENTS, exclusive))
    fires = amounts_of(of) > 0
    for child, parent in enumerate(PARENTS):
        assert parent < 0 or not (fires[:, child] & ~fires[:, parent]).any()
    assert fires[:, [2, 3, 4]].sum(axis=1).max() == 1
    assert fires[:, [5, 6]].sum(axis=1).max() == 2
    assert fires[:, [7, 8]].sum(axis=1).max() == 2
    # each of the candidates is as likely to stay as another
    assert np.ptp(fires[:, [2, 3, 4]].mean(axis=0)) < 0.02


def test_children_are_scaled_by_their_parent():
    parents = np.array([-1, 0, 1])
    of = generated(
        np.ones(3), 3, mean=np.array([2.0, 3.0, 5.0]), std=0.25, parents=parents, scale_children=True
    )
    scaled = amounts_of(of)
    plain = amounts_of(of.replace(forest=hierarchy.forest(parents)))
    np.testing.assert_allclose(scaled[:, 1], plain[:, 1] * plain[:, 0] / 2, rtol=1e-5)
    np.testing.assert_allclose(scaled[:, 2], plain[:, 2] * scaled[:, 1] / 3, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12).flatmap(lambda n: st.lists(st.integers(-1, n - 1), min_size=n, max_size=n)))
def test_a_cycle_is_told_from_a_forest(parents):
    def root_of(i):
        for _ in parents:
            i = parents[i] if i >= 0 else i
        return i

    if all(root_of(i) < 0 for i in range(len(parents))):
        tree = hierarchy.forest(parents)
        children = [int(c) for level in tree.levels for c in np.ravel(level.children) if c < len(parents)]
        assert sorted(children) == [i for i, parent in enumerate(parents) if parent >= 0]
    else:
        with pytest.raises(InputError, match="its own ancestor"):
            hierarchy.forest(parents)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 200), st.integers(1, 9), st.integers(1, 5), st.integers(0, 4))
def test_regular_trees(features, roots, branching, depth):
    parents = hierarchy.regular(features, roots, branching, depth)
    tree = hierarchy.forest(parents)
    assert len(parents) == features
    assert len(tree.levels) <= depth
    assert np.bincount(parents[parents >= 0], minlength=features).max() <= branching
    wanted = min(features, roots * sum(branching**level for level in range(depth + 1)))
    assert (parents >= 0).sum() == max(0, wanted - min(roots, features))


# Figures of the sources


def test_figures_of_the_sources():
    assert synthetic.sharkey_uncorrelated().expected_l0.item() == pytest.approx(0.971, abs=5e-4)
    wrong = synthetic.sparse_but_wrong()
    assert wrong.expected_l0.item() == pytest.approx(10.9525, abs=1e-4)
    np.testing.assert_allclose(wrong.directions @ wrong.directions.T, np.eye(50), atol=1e-5)
    np.testing.assert_allclose(wrong.probabilities, 0.345 * (49 - np.arange(50)) / 50 + 0.05, rtol=1e-5)
    tree = synthetic.matryoshka_tree()
    np.testing.assert_allclose(tree.probabilities, [0.15] * 3 + [0.03] * 9 + [0.05] * 8, rtol=1e-5)
    np.testing.assert_array_equal(tree.forest.parents[:12], [-1] * 3 + [0] * 3 + [1] * 3 + [2] * 3)
    np.testing.assert_allclose(synthetic.hedging().probabilities, [0.25, 0.2], rtol=1e-6)
    assert synthetic.forty_in_five(0.9).expected_l0.item() == pytest.approx(4, rel=1e-5)
    np.testing.assert_array_equal(synthetic.toy_superposition(6).directions, np.eye(6))


def test_gaussians_of_sparse_but_wrong_are_correlated_as_asked():
    of = synthetic.sparse_but_wrong(features=6, d_in=6)
    asked = np.asarray(of.fires.factors @ of.fires.factors.T)
    np.testing.assert_allclose(np.diag(asked), 1, atol=1e-5)
    joint = np.corrcoef((amounts_of(of) > 0).T)
    off = ~np.eye(6, dtype=bool)
    assert np.corrcoef(asked[off], joint[off])[0, 1] > 0.9
    assert np.sign(joint[np.abs(asked) > 0.3]).tolist() == np.sign(asked[np.abs(asked) > 0.3]).tolist()


def test_directions():
    start = directions.gaussian(jax.random.key(0), 64, 16)
    apart = directions.orthogonalised(start, 200, 0.01)

    def overlap(d):
        return float(np.square(np.asarray(d @ d.T)[~np.eye(64, dtype=bool)]).mean())

    np.testing.assert_allclose(np.linalg.norm(apart, axis=1), 1, atol=1e-5)
    # 64 vectors in 16 dimensions cannot do better than (64 / 16 - 1) / 63, the bound of Welch
    assert 3 / 63 - 1e-6 < overlap(apart) < 1.01 * 3 / 63 < overlap(start)


# Bad input


CYCLE = np.array([1, 0])
NOT_POSITIVE = np.array([[1, 0.9, 0.9], [0.9, 1, -0.9], [0.9, -0.9, 1]])
HALF = np.full(3, 0.5)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: synthetic.find("moon"), "there is no world 'moon'"),
        (lambda: firing.independent([0.5, 1.5]), r"must lie from 0 to 1, got \[1.5\]"),
        (lambda: firing.independent([np.nan]), "must lie from 0 to 1"),
        (lambda: firing.low_rank([-0.1], jax.random.key(0)), "must lie from 0 to 1"),
        (lambda: firing.low_rank(HALF, jax.random.key(0), rank=0), "rank of a correlation"),
        (lambda: firing.low_rank(HALF, jax.random.key(0), rank=2, scale=-1.0), "scale of a correlation"),
        (lambda: firing.correlated(HALF, NOT_POSITIVE), "not positive definite"),
        (lambda: firing.correlated(HALF, np.eye(2)), r"is \[3, 3\], got \[2, 2\]"),
        (lambda: firing.correlated(HALF, np.triu(np.ones((3, 3)))), "symmetric with ones"),
        (lambda: firing.nearest_correlation(np.ones((2, 3))), "must be symmetric"),
        (lambda: firing.zipf(0), "features must be at least 1"),
        (lambda: firing.zipf(5, most=0.1, least=0.2), "0 < least < most <= 1"),
        (lambda: hierarchy.forest(CYCLE), "its own ancestor"),
        (lambda: hierarchy.forest([-1, 2]), r"from -1 \(none\) to 1, got \[2\]"),
        (lambda: hierarchy.forest([0.5, -1.0]), "one whole number per feature"),
        (lambda: hierarchy.forest([-1, 0], exclusive=[True]), "exclusive is one flag or one for each"),
        (lambda: hierarchy.forest([-1, 0], scale=np.zeros(2)), "means above 0"),
        (lambda: hierarchy.regular(5, 0, 2, 1), "roots must be at least 1"),
        (lambda: hierarchy.exact(HALF, hierarchy.forest([-1, 0])), "has 2 features, but there are 3"),
        (lambda: generated(HALF, 4, parents=np.array([-1, 0, 0])), "exclusive children of feature 0 would"),
        (lambda: generated(np.array([0.2, 0.5]), 4, parents=np.array([-1, 0])), "feature 0 would fire"),
        (lambda: generated(HALF, 4, parents=CYCLE), "3 features but 2 parents"),
        (lambda: generated(HALF, 4, std=-1.0), "std must not be negative"),
        (lambda: generated(HALF, 4, mean=np.ones(2)), "mean is one finite number or one for each"),
        (lambda: generated(HALF, 0), "d_in must be at least 1"),
        (lambda: generated(np.array([]), 4), "features must be at least 1"),
        (lambda: generated(HALF, 4, seed=-1), "a seed must be a whole number"),
        (lambda: synthetic.toy_superposition(0), "features must be at least 1"),
        (lambda: synthetic.toy_superposition(density=1.2), "density must lie from 0 to 1"),
        (lambda: synthetic.forty_in_five(sparsity=-0.2), "sparsity must lie from 0 to 1"),
        (lambda: synthetic.hedging(first=2.0), "must lie from 0 to 1"),
        (lambda: synthetic.hedging(d_in=1), "at most 1 orthogonal features"),
        (lambda: synthetic.hedging(batch_size=0), "batch_size must be at least 1"),
        (lambda: synthetic.hedging(data_seed=2**32), "a seed must be a whole number"),
        (lambda: synthetic.matryoshka_tree(child=0.4), "exclusive children of feature 0 would"),
        (lambda: synthetic.matryoshka_tree(parent=1.4), "parent must lie from 0 to 1"),
        (lambda: synthetic.sparse_but_wrong(features=0), "features must be at least 1"),
        (lambda: synthetic.sparse_but_wrong(std=-1.0), "std must be finite"),
        (lambda: synthetic.sharkey_uncorrelated(active=1000.0), "must lie from 0 to 1"),
        (lambda: synthetic.sharkey_correlated(active=0.0), "active must lie above 0"),
        (lambda: synthetic.sharkey_correlated(decay=1.5), "decay must lie above 0"),
        (lambda: synthetic.synthsaebench_1k(most=2.0), "0 < least < most <= 1"),
        (lambda: world(np.eye(3), firing.independent([0.5])), "3 directions, but fires is of 1 features"),
        (lambda: world(np.eye(1), firing.independent([0.5]), bias=np.ones(2)), r"is \[1\], got \[2\]"),
        (lambda: world(np.ones(3), firing.independent(HALF)), r"directions must be \[features, d_in\]"),
    ],
)
def test_bad_input_gets_a_sentence(call, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        call()
    assert "\n" not in str(error.value)
