"""How much room each feature of a model has to itself."""

import numpy as np
from jaxtyping import Array, Float

from sae_jax.base import require


def feature_dimensionality(
    W: Float[Array | np.ndarray, "*members features hidden"],
) -> Float[np.ndarray, "*members features"]:
    """The share of a dimension that a feature has: 1 alone, 1/2 in a pair of opposites, 2/5 in a pentagon.

        D_i = |W_i|^2 / sum_j (unit(W_i) . W_j)^2

    A feature that is not represented, W_i = 0, has 0. Over all features they add up to at most the rank of W.

    Args:
      W: a row per feature, of one model or of several.

    Returns:
      D_i of each feature, in float64.

    Raises:
      InputError: W with fewer than two axes.

    Example:
      >>> feature_dimensionality(np.array([[1.0, 0.0], [-1.0, 0.0]]))
      array([0.5, 0.5])

    Source: Elhage et al. 2022, "Toy Models of Superposition", "Feature dimensionality".
    """
    W = _checked(W)
    norms = np.linalg.norm(W, axis=-1, keepdims=True)
    units = np.divide(W, norms, out=np.zeros_like(W), where=norms > 0)
    shared = np.square(units @ W.swapaxes(-1, -2)).sum(axis=-1)
    own = np.square(norms[..., 0])
    return np.divide(own, shared, out=np.zeros_like(own), where=shared > 0)


def dimensions_per_feature(
    W: Float[Array | np.ndarray, "*members features hidden"],
) -> Float[np.ndarray, "*members"]:
    """Hidden dimensions over the number of features that are represented.

        D* = m / |W|_F^2

    A feature that is represented has a row of norm about 1, so that |W|_F^2 counts them.

    Args:
      W: a row per feature, of one model or of several.

    Returns:
      D*, in float64; infinite where W is 0.

    Raises:
      InputError: W with fewer than two axes.

    Example:
      >>> dimensions_per_feature(np.array([[1.0], [-1.0]]))
      array(0.5)

    Source: Elhage et al. 2022, "Toy Models of Superposition", "The geometry of superposition".
    """
    W = _checked(W)
    with np.errstate(divide="ignore"):
        return np.asarray(W.shape[-1] / np.square(W).sum(axis=(-2, -1)))


def _checked(W: Array | np.ndarray) -> np.ndarray:
    W = np.asarray(W, np.float64)
    require(W.ndim >= 2, f"W must be [features, hidden], or several of them, got {W.shape}")
    return W
