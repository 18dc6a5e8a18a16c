"""What an SAE found of features that are known: each figure by hand, and on SAEs that fail in known ways."""

from itertools import permutations
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sae_jax
from sae_jax import metrics, synthetic
from sae_jax.base import Batch, InputError
from sae_jax.metrics import recovery
from sae_jax.metrics.matching import assignment
from sae_jax.synthetic.hierarchy import forest

ROWS = 8192


class Given(NamedTuple):
    """A world of rows that are written down."""

    directions: jax.Array
    amounts: np.ndarray
    forest: object = None

    def labelled(self, rows):
        for amounts in np.array_split(self.amounts, 2):
            x = jnp.asarray(amounts, jnp.float32) @ self.directions
            yield Batch(x, x), jnp.asarray(amounts, jnp.float32)


def affine(W_enc, b_enc):
    """ReLU encoders of several members."""
    W_enc, b_enc = jnp.asarray(W_enc, jnp.float32), jnp.asarray(b_enc, jnp.float32)
    return jax.jit(lambda x: jnp.maximum(jnp.einsum("rd,mfd->mrf", x, W_enc) + b_enc[:, None], 0))


def found(W_dec, W_enc, b_enc, world, rows=ROWS):
    """The figures of one SAE."""
    told = metrics.recovered_by(np.asarray(W_dec)[None], affine([W_enc], [b_enc]), world, rows)
    return {name: value[0] for name, value in told.items()}


def random_rows(seed, rows, d_in):
    return np.random.default_rng(seed).normal(size=(rows, d_in)).astype(np.float32)


@pytest.fixture(scope="module")
def tree():
    """Twenty features, three of which have three children each."""
    return synthetic.matryoshka_tree()


@pytest.fixture(scope="module")
def two():
    """Two features that fire independently."""
    return synthetic.hedging()


# From the decoder


TWO = np.eye(3)[:2]
"""Two true features in three dimensions."""

LATENTS = np.array([[2.0, 0, 0], [3, 4, 0], [0, -5, 0], [0, 0, 1]])
"""Cosines with them: (1, 0), (.6, .8), (0, -1), (0, 0)."""


def test_cosines_by_hand():
    assert np.allclose(metrics.cosines(LATENTS, TWO), [[1, 0], [0.6, 0.8], [0, -1], [0, 0]])


@pytest.mark.parametrize(
    ("metric", "value"),
    [(metrics.mmcs, (1 + 0.8) / 2), (metrics.mmcs_learned, (1 + 0.8 + 0 + 0) / 4),
     (metrics.mcc, (1 + 1) / 2), (metrics.uniqueness, 2 / 4)],
)  # fmt: skip
def test_figures_of_a_decoder_by_hand(metric, value):
    assert metric(LATENTS, TWO) == pytest.approx(value)


def test_matching_is_one_to_one_where_the_largest_cosines_are_not():
    # both latents are nearest to the first feature, but only one of them can have it
    latents = np.array([[1, 0.1], [1, 0.2]])
    c = metrics.cosines(latents, np.eye(2))
    assert metrics.mcc(latents, np.eye(2)) == pytest.approx((c[0, 0] + c[1, 1]) / 2)
    assert metrics.uniqueness(latents, np.eye(2)) == 0.5


@pytest.mark.parametrize("metric", [metrics.mmcs, metrics.mmcs_learned, metrics.mcc, metrics.uniqueness])
def test_order_and_length_of_latents_do_not_matter(metric):
    latents, truth = random_rows(0, 9, 5), random_rows(1, 7, 5)
    shuffled = np.random.default_rng(2).permutation(latents) * np.linspace(0.1, 30, 9)[:, None]
    assert metric(shuffled, truth[::-1] * 3) == pytest.approx(metric(latents, truth), rel=1e-6)


def test_sign_matters_to_mmcs_and_not_to_what_is_matched_by_size():
    latents, truth = random_rows(0, 9, 5), random_rows(1, 7, 5)
    assert metrics.mcc(-latents, truth) == pytest.approx(metrics.mcc(latents, truth))
    assert metrics.uniqueness(-latents, truth) == metrics.uniqueness(latents, truth)
    assert metrics.mmcs(-truth, truth) < 0.9 < metrics.mmcs(truth, truth)


def test_a_zero_row_is_like_nothing():
    assert np.array_equal(metrics.cosines(np.zeros((1, 2)), np.eye(2)), [[0, 0]])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_decoder_that_is_not_finite_has_no_figures(bad):
    latents = random_rows(0, 4, 5)
    latents[1, 2] = bad
    for metric in (metrics.mmcs, metrics.mmcs_learned, metrics.mcc, metrics.uniqueness):
        assert np.isnan(metric(latents, random_rows(1, 4, 5)))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 10**6))
def test_no_other_one_to_one_matching_is_better(n, m, seed):
    scores = np.random.default_rng(seed).normal(size=(n, m))
    rows, columns = assignment(scores)
    assert len(set(rows)) == len(set(columns)) == len(rows) == min(n, m)
    wide = scores if n <= m else scores.T
    best = max(
        sum(wide[i, j] for i, j in enumerate(chosen)) for chosen in permutations(range(max(n, m)), min(n, m))
    )
    assert scores[rows, columns].sum() == pytest.approx(best)


# From when latents fire


def test_detection_by_hand():
    # feature 0 on rows 0 to 3, feature 1 on rows 4 and 5, neither on rows 6 and 7
    amounts = np.array([[1, 0]] * 4 + [[0, 1]] * 2 + [[0, 0]] * 2)
    world = Given(jnp.eye(2), amounts)
    # by row, since the encoder may be any function: latent 0 fires on rows 0, 1, 2, 4; latent 1 on none,
    # latent 2 on all; latents 1 and 2 are of feature 1
    fires = np.array([[1, 0, 1]] * 3 + [[0, 0, 1]] + [[1, 0, 1]] + [[0, 0, 1]] * 3)
    halves = iter(np.array_split(fires, 2))
    told = metrics.recovered_by(
        np.array([[[1, 0], [0, 1], [0.1, 1]]]), lambda x: jnp.asarray(next(halves), jnp.float32)[None], world
    )
    assert told["precision"] == pytest.approx([(3 / 4 + 0 + 2 / 8) / 3])
    assert told["recall"] == pytest.approx([(3 / 4 + 0 + 1) / 3])
    assert told["f1"] == pytest.approx([(3 / 4 + 0 + 2 * 0.25 / 1.25) / 3])
    assert told["recovered"] == [1]


PERFECT = {"mmcs": 1, "mmcs_learned": 1, "mcc": 1, "uniqueness": 1, "recovered": 1,
           "precision": 1, "recall": 1, "f1": 1, "hedging": 0, "absorption": 0}  # fmt: skip


def test_a_perfect_sae_is_perfect(tree):
    W = np.asarray(tree.directions)
    assert found(W, W, np.full(20, -0.5), tree) == pytest.approx(PERFECT, abs=1e-6)


def test_a_true_direction_hedges_nothing_whatever_the_angles_between_features():
    truth = random_rows(0, 40, 10)
    truth /= np.linalg.norm(truth, axis=1, keepdims=True)
    assert np.allclose(recovery.hedged(truth, truth, np.arange(40)), 0, atol=1e-6)


def test_order_and_length_of_latents_do_not_matter_to_what_is_recovered(tree):
    W, b = random_rows(0, 15, 20) + np.asarray(tree.directions)[:15] * 3, np.full(15, -1.0)
    order, length = np.random.default_rng(1).permutation(15), np.linspace(0.2, 9, 15)
    told = found(W, W, b, tree)
    other = found((W * length[:, None])[order], (W / length[:, None])[order], (b / length)[order], tree)
    assert told == pytest.approx(other, rel=1e-6)


def test_features_nobody_looks_for_lower_what_is_recovered_and_dead_latents_what_is_detected(tree):
    W = np.asarray(tree.directions)
    half = found(W[:10], W[:10], np.full(10, -0.5), tree)
    assert half["recovered"] == 0.5
    assert half["f1"] == half["uniqueness"] == pytest.approx(1)
    dead = found(np.concatenate([W, W]), np.concatenate([W, -W]), np.full(40, -0.5), tree)
    assert dead["recovered"] == 1
    assert dead["f1"] == dead["uniqueness"] == pytest.approx(0.5)
    assert dead["hedging"] == pytest.approx(0, abs=1e-6)


# SAEs that fail in known ways


def absorbing(world, children):
    """The tree's perfect SAE, but so many children of each parent fire in its place and say what it says."""
    truth = np.asarray(world.directions)
    W_dec, W_enc, b_enc = truth.copy(), truth.copy(), np.full(20, -0.5)
    for parent in range(3):
        for child in range(3 + 3 * parent, 3 + 3 * parent + children):
            W_dec[child] += truth[parent]
            W_enc[parent] -= truth[child]
    return W_dec, W_enc, b_enc


@pytest.mark.parametrize("children", [0, 1, 2, 3])
def test_absorption_is_the_share_of_children_that_take_their_parents_place(children, tree):
    told = found(*absorbing(tree, children), tree)
    assert told["absorption"] == pytest.approx(children / 3)
    assert told["precision"] == pytest.approx(1)
    assert (told["recall"] < 1) == (children > 0)
    # the child's latent holds parent and child in equal parts
    assert told["hedging"] == pytest.approx(3 * children / 20 * np.sqrt(0.5), abs=1e-6)


def test_a_parent_that_misses_anyway_is_not_absorbed(tree):
    truth = np.asarray(tree.directions)
    # each parent's latent fires only where a single does too, whatever its children do
    W_enc, b_enc = truth.copy(), np.full(20, -0.5)
    W_enc[:3] += truth[12]
    b_enc[:3] = -1.5
    told = found(truth, W_enc, b_enc, tree, 65_536)
    assert told["recall"] < 0.9
    assert told["absorption"] == pytest.approx(0, abs=0.01)


def test_pairs_without_two_latents_do_not_count(tree):
    W_dec, W_enc, b_enc = absorbing(tree, 3)
    # of the first tree the parent's latent never fires, of the second one latent is the best of all four
    b_enc[0] = -9
    W_dec[6:9] = 0
    W_dec[1] = np.asarray(tree.directions)[[1, 6, 7, 8]].sum(axis=0)
    assert found(W_dec, W_enc, b_enc, tree)["absorption"] == pytest.approx(1)
    assert np.isnan(found(W_dec[:3], W_enc[:3], b_enc[:3], tree)["absorption"])


def test_absorption_by_hand_two_levels_deep():
    # 0 -> 1 -> 2, and 0 -> 3; features at right angles, one latent each
    tree = forest([-1, 0, 1, 0])
    amounts = np.array([[1, 0, 0, 0]] * 4 + [[1, 1, 0, 0]] * 4 + [[1, 1, 1, 0]] * 2 + [[1, 0, 0, 1]] * 2)
    fires = amounts.copy()
    fires[0, 0] = 0  # of feature 0 alone 1 of 4 rows is missed
    fires[4:7, 0] = 0  # with 1, 3 of 6, but on one of them the latent of 1 is silent too
    fires[4, 1] = 0
    fires[8, 1] = 0  # of 1 alone 1 of 4 rows is missed; with 2, 1 of 2
    world = Given(jnp.eye(4), amounts, tree)
    halves = iter(np.array_split(fires, 2))
    told = metrics.recovered_by(
        np.eye(4)[None], lambda x: jnp.asarray(next(halves), jnp.float32)[None], world
    )
    of_0_by_1, of_1_by_2, of_0_by_3 = 2 / 6 - 1 / 4, 1 / 2 - 1 / 4, 0
    assert told["absorption"] == pytest.approx([(of_0_by_1 + of_1_by_2 + of_0_by_3) / 3])


def test_hedging_is_what_a_latent_holds_of_the_other_feature(two):
    first, second = np.asarray(two.directions)
    share = np.array([0.0, 0.5, 0.8])
    rows = (first + share[:, None] * second)[:, None]
    told = metrics.recovered_by(rows, affine(first[None, None].repeat(3, 0), [[-0.5]] * 3), two, ROWS)
    assert told["hedging"] == pytest.approx(share / np.sqrt(1 + share**2), abs=1e-6)
    assert told["f1"] == pytest.approx(np.ones(3))
    assert np.isnan(told["absorption"]).all()


def test_latents_that_never_fire_hedge_nothing(two):
    first, second = np.asarray(two.directions)
    rows = np.stack([first, first + second])
    told = metrics.recovered_by(
        np.stack([rows, rows]), affine([rows, rows], [[-0.5, -9.0], [-9.0, -9.0]]), two, ROWS
    )
    assert told["hedging"][0] == pytest.approx(0, abs=1e-6)
    assert np.isnan(told["hedging"][1])


# Members


def test_members_side_by_side_are_as_alone(tree):
    W = np.stack([random_rows(seed, 24, 20) for seed in range(7)])
    b = np.linspace(-2, 1, 7)[:, None].repeat(24, axis=1)
    told = metrics.recovered_by(W, affine(W, b), tree, 2048)
    for i in range(7):
        alone = metrics.recovered_by(W[i : i + 1], affine(W[i : i + 1], b[i : i + 1]), tree, 2048)
        for name, value in alone.items():
            assert np.allclose(told[name][i], value[0], rtol=1e-9, equal_nan=True), name


def test_how_many_members_are_counted_side_by_side_changes_nothing(monkeypatch, tree):
    W = np.stack([random_rows(seed, 24, 20) for seed in range(7)])
    told = metrics.recovered_by(W, affine(W, np.zeros((7, 24))), tree, 1024)
    recovery._count.clear_cache()
    monkeypatch.setattr(recovery, "ROOM", 3 * 1024 * 24)
    again = metrics.recovered_by(W, affine(W, np.zeros((7, 24))), tree, 1024)
    assert all(np.array_equal(told[name], again[name], equal_nan=True) for name in told)


@pytest.mark.parametrize("where", ["decoder", "encoder"])
def test_a_member_that_diverged_is_nan_and_touches_no_other(where, tree):
    W = np.asarray(tree.directions)
    dictionaries, encoders = np.stack([W, W, W]), np.stack([W, W, W])
    {"decoder": dictionaries, "encoder": encoders}[where][1, 4, 4] = np.nan
    told = metrics.recovered_by(dictionaries, affine(encoders, np.full((3, 20), -0.5)), tree, 2048)
    for name, value in told.items():
        assert np.isnan(value[1]), name
        assert value[[0, 2]] == pytest.approx([PERFECT[name]] * 2, abs=1e-6)


def test_one_sae_is_a_sweep_of_one(tree):
    sae = sae_jax.topk(d_in=20, d_sae=30, k=2)
    params = sae.init(jax.random.key(0), jnp.float32)
    told = metrics.recover(sae, params, tree, 2048)
    swept = metrics.recovered_by(params["W_dec"][None], lambda x: sae.encode(params, x)[None], tree, 2048)
    assert told.keys() == swept.keys() == PERFECT.keys()
    for name, value in told.items():
        assert value.shape == ()
        assert value.dtype == np.float64
        assert np.array_equal(value, swept[name][0], equal_nan=True)


def test_counting_compiles_once(compilations, tree):
    sae = sae_jax.relu(d_in=20, d_sae=30)
    for key in range(2):
        metrics.recover(sae, sae.init(jax.random.key(key), jnp.float32), tree, 2048)
        params = sae.init(jax.random.key(key + 5), jnp.float32)
    compilations.clear()
    metrics.recover(sae, params, tree, 4096)
    assert compilations == []


def test_an_sae_of_another_width_is_told(tree):
    sae = sae_jax.relu(d_in=21, d_sae=30)
    with pytest.raises(InputError, match="world's rows have 20 columns, but the decoder gives 21"):
        metrics.recover(sae, sae.init(jax.random.key(0), jnp.float32), tree)
