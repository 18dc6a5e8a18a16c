"""Which features come back in other seeds: by hand, by what must not matter, and against simulation."""

import time
from itertools import combinations

import numpy as np
import pytest

from sae_jax import metrics
from sae_jax.base import InputError
from sae_jax.metrics.stability import _neighbours


def random_rows(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def noisy(truth, noise, seed):
    """The truth with some of another direction in each row."""
    return truth + noise * random_rows(seed, *truth.shape)


def together(dictionaries, **options):
    """All members in one group."""
    return metrics.stability(list(dictionaries), [np.arange(len(dictionaries))], **options)


# By hand


def test_three_seeds_by_hand():
    a = np.eye(3)
    b = np.array([[0, 1, 0], [1, 0, 0], [0, 0.6, 0.8]])  # cosines with a 1, 1 and .8
    c = np.array([[3.0, 0, 0], [0, 2, 0]])  # the third of a and of b has no partner
    found = together([a, b, c])
    assert [each.tolist() for each in found.comes_back] == [[1, 1, 0], [1, 1, 0], [1, 1]]
    assert np.allclose(np.concatenate(found.mean_cosine), [1, 1, 0.4, 1, 1, 0.4, 1, 1])
    ab, ac, bc = 2.8 / 3, 2 / 3, 2 / 3
    assert np.allclose(found.of_member, [(ab + ac) / 2, (ab + bc) / 2, (ac + bc) / 2])
    assert np.allclose(found.consistency, [(ab + ac + bc) / 3])
    # without one seed one pair is left; Student's t at two degrees of freedom is 4.3027
    half = 4.3027 * np.sqrt(2 / 3 * np.square(np.array([ab, ac, bc]) - (ab + ac + bc) / 3).sum())
    assert np.allclose(found.error, [half], rtol=1e-4)


def test_a_partner_is_the_best_for_all_together_and_the_sign_counts():
    a, b = np.eye(2), np.array([[-1.0, 0], [0, 1]])
    found = together([a, b])
    assert [each.tolist() for each in found.comes_back] == [[0, 1], [0, 1]]
    assert found.consistency == [0.5]


def test_latents_that_are_not_live_take_no_part():
    a, b = np.eye(3), np.array([[0, 0, 1.0], [0, 1, 0], [1, 0, 0]])
    found = together([a, b], live=[np.array([True, True, False]), np.array([False, True, True])])
    assert np.array_equal(found.comes_back[0], [1, 1, np.nan], equal_nan=True)
    assert np.array_equal(found.mean_cosine[1], [np.nan, 1, 1], equal_nan=True)
    assert found.consistency == [1]
    one = together([a, b], live=[np.ones(3, bool), np.array([False, True, False])])
    assert one.consistency == pytest.approx([1 / 3])
    assert one.comes_back[0].tolist() == [0, 1, 0]


def test_a_member_without_live_latents_agrees_with_none():
    found = together([np.eye(2)] * 3, live=[np.ones(2, bool), np.ones(2, bool), np.zeros(2, bool)])
    assert found.of_member.tolist() == [0.5, 0.5, 0]
    assert found.comes_back[0].tolist() == [0.5, 0.5]


def test_the_threshold_is_passed_not_met():
    a, b = np.array([[1.0, 0]]), np.array([[0.6, 0.8]])
    assert together([a, b], threshold=0.61).comes_back[0] == [0]
    assert together([a, b], threshold=0.59).comes_back[0] == [1]


# What must and what must not matter


def test_order_and_length_of_latents_do_not_matter():
    seeds = [noisy(random_rows(0, 12, 6), 0.3, seed) for seed in range(1, 6)]
    order = [np.random.default_rng(seed).permutation(12) for seed in range(5)]
    other = [(each * np.linspace(0.1, 9, 12)[:, None])[by] for each, by in zip(seeds, order, strict=True)]
    found, again = together(seeds, threshold=0.8), together(other, threshold=0.8)
    assert 0 < np.mean(found.comes_back) < 1
    assert np.allclose(found.consistency, again.consistency)
    assert np.allclose(found.error, again.error)
    for i, by in enumerate(order):
        assert np.array_equal(found.comes_back[i][by], again.comes_back[i])
        assert np.allclose(found.mean_cosine[i][by], again.mean_cosine[i])


def test_copies_agree_wholly():
    found = together([random_rows(0, 8, 5)] * 4)
    assert np.allclose(found.of_member, 1)
    assert np.allclose(found.consistency, 1)
    assert np.allclose(found.error, 0, atol=1e-9)
    assert all((each == 1).all() for each in found.comes_back)


def test_groups_know_nothing_of_each_other():
    members = [random_rows(seed, 5 + seed % 2, 4) for seed in range(8)]
    groups = [np.array([0, 2, 4, 6]), np.array([1, 3, 5]), np.array([7])]
    found = metrics.stability(members, groups)
    for number, group in enumerate(groups):
        alone = together([members[i] for i in group])
        assert np.array_equal(found.consistency[number], alone.consistency[0], equal_nan=True)
        assert np.array_equal(found.error[number], alone.error[0], equal_nan=True)
        for place, i in enumerate(group):
            assert np.array_equal(found.comes_back[i], alone.comes_back[place], equal_nan=True)
    assert np.isnan(found.of_member[7])
    assert np.isnan(found.consistency[2])


def test_two_seeds_have_a_figure_but_no_interval():
    found = together([random_rows(0, 4, 3), random_rows(1, 4, 3)])
    assert np.isfinite(found.consistency).all()
    assert np.isnan(found.error).all()


def test_a_member_that_diverged_is_left_out():
    seeds = [noisy(random_rows(0, 6, 4), 0.3, seed) for seed in range(4)]
    broken = [*seeds[:2], np.full((6, 4), np.nan), *seeds[2:]]
    broken[2][0] = np.inf
    found, without = together(broken), together(seeds)
    assert np.allclose(found.consistency, without.consistency)
    assert np.allclose(found.error, without.error)
    assert np.isnan(found.comes_back[2]).all()
    assert np.isnan(found.of_member[2])
    assert np.allclose(np.delete(found.of_member, 2), without.of_member)


def test_pw_mcc_where_no_cosine_is_negative():
    """arXiv 2505.20254: the mean |cosine| of matched pairs, over pairs of runs."""
    seeds = [np.abs(random_rows(seed, 7, 5)) for seed in range(4)]
    pairs = [metrics.mcc(a, b) for a, b in combinations(seeds, 2)]
    assert together(seeds).consistency == pytest.approx([np.mean(pairs)])


@pytest.mark.parametrize(
    ("members", "others"), [(1, 16), (2, 2), (5, 4), (17, 16), (18, 16), (9, 3), (40, 6)]
)
def test_each_member_is_held_against_as_many_others(members, others):
    pairs = _neighbours(members, others)
    assert len({frozenset(pair) for pair in pairs.tolist()}) == len(pairs)
    assert (pairs[:, 0] != pairs[:, 1]).all()
    expected = members - 1 if members - 1 <= others else others // 2 * 2
    assert (np.bincount(pairs.ravel(), minlength=members) == expected).all()


def test_fewer_others_give_the_same_figure_within_its_error():
    seeds = [noisy(random_rows(0, 6, 8), 0.4, seed) for seed in range(1, 41)]
    few, all_of_them = together(seeds, others=6), together(seeds, others=40)
    assert few.consistency != all_of_them.consistency
    assert abs(few.consistency - all_of_them.consistency) < few.error


# Its interval


@pytest.mark.parametrize(("seeds", "others"), [(3, 16), (6, 16), (12, 4)])
def test_the_interval_holds_the_truth_as_often_as_it_says(seeds, others):
    """Seeds of very different quality, so that a pair's score depends on both."""
    truth, draw = np.eye(4), np.random.default_rng(7)

    def group():
        noise = draw.uniform(0.1, 0.7, size=(seeds, 1, 1))
        return list(truth + noise * draw.normal(size=(seeds, 4, 4)))

    groups = [group() for _ in range(400)]
    found = metrics.stability(
        [each for one in groups for each in one],
        [np.arange(seeds) + seeds * number for number in range(400)],
        others=others,
    )
    inside = np.abs(found.consistency - found.consistency.mean()) < found.error
    assert 0.9 < inside.mean() < 1
    # and no wider than needed by much: pairs taken for independent would err by a factor of 2 and more
    from scipy.special import stdtrit

    standard = found.error / stdtrit(seeds - 1, 0.975)
    assert 0.9 < np.sqrt(np.square(standard).mean()) / found.consistency.std() < 1.7


# Stable and true


def test_stable_features_may_be_true_or_not():
    truth = np.eye(6)
    wrong = np.array([[1.0, 1, 0, 0, 0, 0]])  # every seed has it
    seeds = [np.concatenate([truth[2:4], wrong, random_rows(seed, 1, 6)]) for seed in range(4)]
    found = together(seeds)
    told = metrics.stable_and_true(found, seeds, truth)
    assert np.allclose(told.true_cosine[0][:3], [1, 1, np.sqrt(0.5)])
    assert told.in_all == pytest.approx([(2 + np.sqrt(0.5)) / 3])
    assert told.share_in_all == [0.75]
    assert told.share_in_none == [0.25]
    best = [metrics.cosines(each[3:], truth).max() for each in seeds]
    assert told.in_none == pytest.approx([np.mean(best)])


def test_rank_correlation_is_one_where_the_order_is_the_same():
    truth = np.eye(4)
    tilted = [np.cos(t) * truth[0] + np.sin(t) * truth[3] for t in (0.1, 0.3)]
    # the nearer to the truth, the nearer to its like in the other seed
    one = np.stack([truth[1], truth[0], truth[2]])
    two = np.stack([truth[1], tilted[0], np.array([0, 0, np.cos(0.6), np.sin(0.6)])])
    told = metrics.stable_and_true(together([one, two]), [two, two], truth)
    assert told.rank_correlation == pytest.approx([1])
    turned = metrics.stable_and_true(together([one, two]), [two[[2, 1, 0]]] * 2, truth)
    assert turned.rank_correlation == pytest.approx([-1])


def test_rank_correlation_is_scipys():
    from scipy.stats import spearmanr

    truth = random_rows(9, 10, 6)
    seeds = [np.round(noisy(truth, 0.4, seed), 1) for seed in range(3)]
    found = together(seeds, live=[np.arange(10) > 1] * 3)
    told = metrics.stable_and_true(found, seeds, truth)
    agreed, true = np.concatenate(found.mean_cosine), np.concatenate(told.true_cosine)
    seen = np.isfinite(agreed)
    assert np.array_equal(seen, np.isfinite(true))
    assert seen.sum() == 24
    assert told.rank_correlation == pytest.approx([spearmanr(agreed[seen], true[seen]).statistic])


def test_where_nothing_was_compared_nothing_is_told():
    told = metrics.stable_and_true(together([np.eye(2)]), [np.eye(2)], np.eye(2))
    assert np.isnan(told.in_all).all()
    assert np.isnan(told.rank_correlation).all()
    assert np.isnan(told.true_cosine[0]).all()


# Cost and bad input


def test_256_small_members_take_less_than_half_a_second():
    members = list(random_rows(0, 256, 6, 4).astype(np.float32))
    groups = [np.arange(16) + 16 * number for number in range(16)]
    together(members[:3])
    start = time.process_time()
    metrics.stability(members, groups)
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize(
    ("groups", "others", "sentence"),
    [([[0, 3]], 16, "there is no member 3: members are 0 to 2"),
     ([[0, -1]], 16, "there is no member -1"),
     ([[0, 1], [1, 2]], 16, "member 1 is named twice"),
     ([[0, 2]], 16, "members 0 and 2 of a group have rows of widths 4 and 5"),
     ([[0, 1]], 1, "others must be at least 2, got 1")],
)  # fmt: skip
def test_bad_input_is_told_in_one_sentence(groups, others, sentence):
    members = [random_rows(0, 3, 4), random_rows(1, 3, 4), random_rows(2, 3, 5)]
    with pytest.raises(InputError, match=sentence):
        metrics.stability(members, [np.array(group) for group in groups], others=others)
