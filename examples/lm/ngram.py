"""What the language model must beat: an n-gram model with modified Kneser-Ney smoothing, interpolated.

    P_n(w | h) = (c(h w) - D(c(h w))) / c(h) + g(h) P_{n-1}(w | h'),   h' = h without its first token
    g(h)       = sum_w D(c(h w)) / c(h)

c counts occurrences in the highest order, and below it in how many kinds of tokens' company an n-gram
stands: c(w_1..w_n) = #{v : v w_1..w_n was seen}. D is one of three discounts, for counts of 1, 2, and 3 or
more, estimated from the counts of each order. P_0 is uniform.

Source: Chen and Goodman 1999, "An empirical study of smoothing techniques for language modeling".
"""

import numpy as np


def losses(train: np.ndarray, held_out: np.ndarray, vocabulary: int, order: int = 5) -> np.ndarray:
    """-log P of every held-out token after those before it, in nats.

    Args:
      train: tokens [n] that are counted.
      held_out: tokens [m]; the first of them follow the last of `train`.
      vocabulary: how many tokens there are.
      order: n of the n-grams.

    Returns:
      [m].
    """
    tokens = np.concatenate([train, held_out]).astype(np.int64)
    size = len(train)
    grams = _grams(tokens, vocabulary, order)
    ends = np.arange(size, len(tokens))
    p = np.full(len(held_out), 1 / vocabulary)
    for n in range(1, order + 1):
        count = _counts(grams, n, order, size)
        # the n-1 tokens before the last, of each kind of n-gram; for n = 1 there is but one such history
        starts = np.unique(grams[n], return_index=True)[1]
        history = grams[n - 1][starts]
        discount = _discounts(count)[np.minimum(count, 3)]
        kinds = grams[n - 1].max() + 1
        seen = np.bincount(history, count, kinds)
        left_over = np.bincount(history, discount, kinds)
        at = ends - n + 1
        gram, before = grams[n][at], grams[n - 1][at]
        total = np.maximum(seen[before], 1)
        longer = (count[gram] - discount[gram] + left_over[before] * p) / total
        p = np.where(seen[before] > 0, longer, p)
    return -np.log(p)


def _grams(tokens: np.ndarray, vocabulary: int, order: int) -> list[np.ndarray]:
    """At n, which n-gram begins at each place: numbers from 0, equal where the n-grams are."""
    grams = [np.zeros(len(tokens), np.int64)]
    for n in range(1, order + 1):
        pairs = grams[-1][: len(tokens) - n + 1] * vocabulary + tokens[n - 1 :]
        grams.append(np.unique(pairs, return_inverse=True)[1])
    return grams


def _counts(grams: list[np.ndarray], n: int, order: int, size: int) -> np.ndarray:
    """c of each kind of n-gram, from those that lie within the first `size` tokens."""
    kinds = grams[n].max() + 1
    if n == order:
        return np.bincount(grams[n][: size - n + 1], minlength=kinds)
    first = np.unique(grams[n + 1][: size - n], return_index=True)[1]
    return np.bincount(grams[n][first + 1], minlength=kinds)


def _discounts(count: np.ndarray) -> np.ndarray:
    """D for counts of 0, 1, 2, and 3 or more."""
    n1, n2, n3, n4 = np.bincount(np.minimum(count, 5), minlength=5)[1:5]
    share = n1 / max(n1 + 2 * n2, 1)
    ratios = np.array([n2 / max(n1, 1), n3 / max(n2, 1), n4 / max(n3, 1)])
    # where there are too few counts to tell, no more is taken than is there
    return np.concatenate([[0], np.clip([1, 2, 3] - np.array([2, 3, 4]) * share * ratios, 0, [1, 2, 3])])
