"""SAELens's own generator of synthetic data agrees, at the same configurations."""

from contextlib import redirect_stderr
from io import StringIO

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from sae_jax.synthetic import directions, firing, hierarchy, world

ROWS = 20_000
FEATURES, WIDTH = 120, 24

pytestmark = pytest.mark.usefixtures("sae_lens")

CASES = {
    "independent": {"tree": False},
    "correlated": {"tree": False, "scale": 0.3},
    "hierarchy": {},
    "exclusive": {"exclusive": True},
    "exclusive, compensated": {"exclusive": True, "compensate": True},
    "all of it": {"exclusive": True, "compensate": True, "scale_children": True, "scale": 0.2},
}


def build(tree=True, exclusive=False, compensate=False, scale_children=False, scale=0.0):
    """Their model, and our world of the same probabilities, factors, directions and bias."""
    from sae_lens.synthetic import (
        FoldedNormalMagnitudeConfig,
        HierarchyConfig,
        LinearMagnitudeConfig,
        LowRankCorrelationConfig,
        OrthogonalizationConfig,
        SyntheticModel,
        SyntheticModelConfig,
        ZipfianFiringProbabilityConfig,
    )

    config = SyntheticModelConfig(
        num_features=FEATURES,
        hidden_dim=WIDTH,
        firing_probability=ZipfianFiringProbabilityConfig(0.5, 0.4, 0.02),
        hierarchy=HierarchyConfig(
            total_root_nodes=5,
            branching_factor=4,
            max_depth=2,
            mutually_exclusive_portion=float(exclusive),
            compensate_probabilities=compensate,
            scale_children_by_parent=scale_children,
        )
        if tree
        else None,
        orthogonalization=OrthogonalizationConfig(num_steps=5, lr=3e-3),
        correlation=LowRankCorrelationConfig(rank=4, correlation_scale=scale) if scale else None,
        mean_firing_magnitudes=LinearMagnitudeConfig(5.0, 4.0),
        std_firing_magnitudes=FoldedNormalMagnitudeConfig(0.5, 0.5),
        bias=0.5,
        seed=3,
    )
    with redirect_stderr(StringIO()):
        theirs = SyntheticModel(config)
    generator = theirs.activation_generator
    mean = generator.mean_firing_magnitudes.numpy()
    asked = firing.zipf(FEATURES, 0.5, 0.4, 0.02)
    forest = None
    if tree:
        parents = hierarchy.regular(FEATURES, 5, 4, 2)
        forest = hierarchy.forest(parents, exclusive, mean.astype(np.float64) if scale_children else None)
        asked = (hierarchy.first_order if compensate else hierarchy.as_given)(asked, forest)
    fires = firing.independent(asked)
    if scale:
        factors, diagonal = (each.numpy() for each in theirs.correlation_matrix)
        thresholds = -scipy.special.ndtri(asked)
        fires = firing.Copula(jnp.asarray(thresholds), jnp.asarray(factors), jnp.sqrt(jnp.asarray(diagonal)))
    ours = world(
        theirs.feature_dict.feature_vectors.detach().numpy(),
        fires,
        firing.Normal(jnp.asarray(mean), jnp.asarray(generator.std_firing_magnitudes.numpy())),
        forest=forest,
        bias=theirs.feature_dict.bias.detach().numpy(),
    )
    return theirs, ours


@pytest.fixture(scope="module", params=list(CASES))
def both(request, sae_lens, torch):
    """x and amounts of theirs, of ours, and our world."""
    theirs, ours = build(**CASES[request.param])
    torch.manual_seed(0)
    of_theirs = [each.numpy() for each in theirs.sample_with_features(ROWS)]
    amounts = jax.jit(lambda of: of.amounts(jax.random.key(0), ROWS))(ours)
    return of_theirs, [np.asarray(ours.rows_of(amounts)), np.asarray(amounts)], ours


def test_firing_rates(both):
    (_, theirs), (_, amounts), ours = both
    probabilities = np.asarray(ours.probabilities)
    error = np.sqrt(probabilities * (1 - probabilities) / ROWS)
    for measured in (theirs, amounts):
        wrong = ((measured > 0).mean(axis=0) - probabilities) / error
        assert np.abs(wrong).max() < 4.5
        assert np.sqrt(np.square(wrong).mean()) < 1.3


def distance(a, b):
    """Of two samples' means, in standard errors."""
    return (a.mean() - b.mean()) / np.sqrt(a.var() / len(a) + b.var() / len(b))


def assert_alike(a, b):
    """Means and variances are within 4.5 standard errors of each other."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert abs(distance(a, b)) < 4.5
    assert abs(distance(np.square(a - a.mean()), np.square(b - b.mean()))) < 4.5


def test_active_features_per_row(both):
    (_, theirs), (_, ours), _ = both
    assert_alike((theirs > 0).sum(axis=1), (ours > 0).sum(axis=1))


def test_amounts_where_a_feature_fires(both):
    (_, theirs), (_, ours), _ = both
    often = np.flatnonzero(((theirs > 0).sum(axis=0) > 200) & ((ours > 0).sum(axis=0) > 200))
    assert len(often) > 20
    for i in often:
        assert_alike(theirs[theirs[:, i] > 0, i], ours[ours[:, i] > 0, i])


def test_norms_of_rows(both):
    (theirs, _), (ours, _), _ = both
    assert_alike(np.linalg.norm(theirs, axis=1), np.linalg.norm(ours, axis=1))
    for column in range(WIDTH):
        assert_alike(theirs[:, column], ours[:, column])


def test_pairs_that_fire_together(both):
    (_, theirs), (_, ours), _ = both
    often = np.flatnonzero((theirs > 0).mean(axis=0) > 0.005)
    pairs = np.triu_indices(len(often), 1)
    a, b = (np.corrcoef((each[:, often] > 0).T)[pairs] for each in (theirs, ours))
    # each correlation has an error of 1 / sqrt(rows); larger ones of rare pairs have larger ones
    assert np.sqrt(np.square(a - b).mean()) < 2 * np.sqrt(2 / ROWS)
    assert np.abs(a - b).max() < 0.06


# Parts, number by number


def test_zipf_probabilities():
    from sae_lens.synthetic.firing_probabilities import zipfian_firing_probabilities

    for arguments in [(16_384, 0.5, 0.4, 5e-4), (10, 1.0, 0.3, 0.01), (1, 1.0, 0.3, 0.01)]:
        theirs = zipfian_firing_probabilities(*arguments).numpy()
        np.testing.assert_allclose(firing.zipf(*arguments), theirs, rtol=2e-5)


@pytest.mark.parametrize("sizes", [(2_000, 32, 4, 3), (50, 3, 4, 2), (9, 20, 2, 1)])
def test_hierarchies_and_their_compensation(torch, sizes):
    from sae_lens.synthetic.hierarchy import HierarchyConfig, generate_hierarchy

    features, roots, branching, depth = sizes
    config = HierarchyConfig(
        total_root_nodes=roots, branching_factor=branching, max_depth=depth, mutually_exclusive_portion=1.0
    )
    theirs = generate_hierarchy(features, config, seed=0)
    parents = np.full(features, -1)

    def visit(node):
        for child in node.children:
            parents[child.feature_index] = node.feature_index
            visit(child)

    for root in theirs.roots:
        visit(root)
    ours = hierarchy.regular(features, roots, branching, depth)
    np.testing.assert_array_equal(ours, parents)
    asked = firing.zipf(features, 0.5, 0.4, 5e-4)
    factors = theirs.compute_probability_correction_factors(torch.tensor(asked)).numpy()
    compensated = hierarchy.first_order(asked, hierarchy.forest(ours, exclusive=True))
    np.testing.assert_allclose(compensated, np.minimum(asked * factors, 1), rtol=1e-9)


def test_orthogonalised_directions(torch):
    from sae_lens.synthetic import orthogonalize_embeddings

    start = np.array(directions.gaussian(jax.random.key(1), 96, 16))
    for steps, rate in [(50, 3e-4), (50, 0.01)]:
        theirs = orthogonalize_embeddings(torch.tensor(start), steps, rate, chunk_size=40).numpy()
        ours = np.asarray(directions.orthogonalised(jnp.asarray(start), steps, rate))
        np.testing.assert_allclose(ours, theirs, atol=2e-3)
        off = ~np.eye(96, dtype=bool)
        rms = [np.sqrt(np.square(d @ d.T)[off].mean()) for d in (ours, theirs)]
        assert rms[0] == pytest.approx(rms[1], rel=1e-4)


def test_factors_of_low_rank_correlations():
    from sae_lens.synthetic import generate_random_low_rank_correlation_matrix

    for rank, scale in [(25, 0.1), (10, 0.5)]:  # the second passes the bound on shared variance
        theirs = generate_random_low_rank_correlation_matrix(2000, rank, scale, seed=0)
        ours = firing.low_rank(np.full(2000, 0.1), jax.random.key(0), rank, scale)
        a = np.square(theirs.correlation_factor.numpy()).sum(axis=1)
        b = np.square(np.asarray(ours.factors)).sum(axis=1)
        assert a.mean() == pytest.approx(b.mean(), rel=0.03)
        assert a.max() <= 0.99 + 1e-5 >= b.max()
        np.testing.assert_allclose(np.square(ours.own) + b, 1, rtol=1e-5)
