"""How near a dictionary comes to features that are known: from the decoder alone, no data needed.

A row of a dictionary may have any length; only directions count. Where the signed cosine is looked at, a
latent that points the wrong way has not found its feature, since a latent only ever adds its row.
"""

import numpy as np
from jaxtyping import Array, Float, Int

Rows = Float[np.ndarray, "_ d_in"] | Float[Array, "_ d_in"]
"""Vectors, one a row."""


def unit(rows: Rows) -> Float[np.ndarray, "_ d_in"]:
    """Each divided by its length, in float64; a row of zeros stays one, one with an infinity becomes NaN."""
    rows = np.asarray(rows, np.float64)
    with np.errstate(invalid="ignore"):
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        return rows / np.where(length == 0, 1, length)


def cosines(a: Rows, b: Rows) -> Float[np.ndarray, "n m"]:
    """The signed cosine of each row of `a` with each of `b`.

        c_ij = a_i . b_j / (|a_i| |b_j|),   0 where either is 0

    Args:
      a: [n, d_in].
      b: [m, d_in].

    Returns:
      [n, m], float64; NaN in the rows and columns of vectors that are not finite.

    Example:
      >>> cosines(params["W_dec"], world.directions).max(axis=0)  # how well each feature is known
    """
    return unit(a) @ unit(b).T


def mmcs(dictionary: Rows, truth: Rows) -> float:
    """Mean over true features of the largest cosine that any latent has with it.

        1 / n  sum_j  max_i  c_ij

    Args:
      dictionary: decoder rows, [d_sae, d_in].
      truth: directions of the n true features, [features, d_in].

    Returns:
      1 where every feature has a latent of its direction, however many latents there are besides.

    Source: Sharkey et al. 2022, "Taking features out of superposition with sparse autoencoders".
    """
    return mmcs_of(cosines(dictionary, truth))


def mmcs_learned(dictionary: Rows, truth: Rows) -> float:
    """Mean over latents of the largest cosine that any true feature has with it.

        1 / d_sae  sum_i  max_j  c_ij

    Args:
      dictionary: decoder rows, [d_sae, d_in].
      truth: directions of the true features, [features, d_in].

    Returns:
      1 where every latent is a true feature, however many features none has found.

    Source: HoagyC/sparse_coding, `standard_metrics.py`, whose name for it is MMCS too.
    """
    return mmcs_learned_of(cosines(dictionary, truth))


def mcc(dictionary: Rows, truth: Rows) -> float:
    """Mean absolute cosine of latents and true features, matched one to one as well as can be.

        1 / min(d_sae, n)  max over matchings P of  sum over (i, j) in P of |c_ij|

    Args:
      dictionary: decoder rows, [d_sae, d_in].
      truth: directions of the n true features, [features, d_in].

    Returns:
      From 0 to 1, or NaN for a dictionary that is not finite.

    Source: SAELens, `mean_correlation_coefficient`; arXiv 2505.20254.
    """
    return mcc_of(cosines(dictionary, truth))


def uniqueness(dictionary: Rows, truth: Rows) -> float:
    """How many different true features the latents look most like, over the number of latents.

        #{argmax_j |c_ij| : i} / d_sae

    Args:
      dictionary: decoder rows, [d_sae, d_in].
      truth: directions of the true features, [features, d_in].

    Returns:
      1 where no two latents share a feature; NaN for a dictionary that is not finite.

    Source: SAELens, `feature_uniqueness`; arXiv 2602.14687.
    """
    return uniqueness_of(cosines(dictionary, truth))


def assignment(
    scores: Float[np.ndarray, "n m"],
) -> tuple[Int[np.ndarray, "pairs"], Int[np.ndarray, "pairs"]]:
    """The min(n, m) pairs of a row and a column, each in one pair at most, of the largest sum of scores.

    Args:
      scores: finite.

    Returns:
      Rows and columns of the pairs.

    Source: Kuhn 1955, the Hungarian method, as `scipy.optimize.linear_sum_assignment` has it.
    """
    from scipy.optimize import linear_sum_assignment  # its import alone takes .7 s

    return linear_sum_assignment(scores, maximize=True)


def mmcs_of(cosine: Float[np.ndarray, "d_sae features"]) -> float:
    """`mmcs`, the cosines at hand."""
    return cosine.max(axis=0).mean()


def mmcs_learned_of(cosine: Float[np.ndarray, "d_sae features"]) -> float:
    """`mmcs_learned`, the cosines at hand."""
    return cosine.max(axis=1).mean()


def mcc_of(cosine: Float[np.ndarray, "d_sae features"]) -> float:
    """`mcc`, the cosines at hand."""
    if not np.isfinite(cosine).all():
        return np.nan
    size = np.abs(cosine)
    return size[assignment(size)].mean()


def uniqueness_of(cosine: Float[np.ndarray, "d_sae features"]) -> float:
    """`uniqueness`, the cosines at hand."""
    if not np.isfinite(cosine).all():
        return np.nan
    return len(np.unique(np.abs(cosine).argmax(axis=1))) / len(cosine)
