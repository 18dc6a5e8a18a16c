"""Which features of a world are candidates to fire on a row, and how strongly."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy
from flax import struct
from jaxtyping import Array, Bool, Float, Key

from sae_jax.base import known, require

COMMON_DRAWS = 2**12
"""Draws of what features share over which rates that hang together are averaged."""
AT_ONCE = 2**8
"""Of these, how many are held in memory."""


@struct.dataclass
class Independent:
    """Feature i fires with probability p_i, whatever the others do."""

    probabilities: Float[Array, "*worlds features"]

    def __call__(self, key: Key[Array, ""], rows: int) -> Bool[Array, "rows features"]:
        """Candidates on so many rows."""
        return jax.random.uniform(key, (rows, len(self.probabilities))) < self.probabilities

    def alone(self) -> Float[Array, "features"]:
        """How often each is a candidate."""
        return self.probabilities

    def given(self) -> Iterator[Float[np.ndarray, "draws features"]]:
        """Probabilities under which features are independent: one row, since they share nothing."""
        yield np.asarray(self.probabilities, np.float64)[None]


@struct.dataclass
class Copula:
    """Features that fire together: those whose correlated Gaussian lies above its threshold.

    z = F u + o v,  u and v standard normal;   feature i fires where z_i > Phi^-1(1 - p_i)
    """

    thresholds: Float[Array, "*worlds features"]
    factors: Float[Array, "*worlds features rank"]
    own: Float[Array, "*worlds features"]
    """What each has of its own; all 0 where the factors are of full rank."""

    def __call__(self, key: Key[Array, ""], rows: int) -> Bool[Array, "rows features"]:
        """Candidates on so many rows."""
        features, rank = self.factors.shape
        shared, own = jax.random.split(key)
        z = jax.random.normal(shared, (rows, rank)) @ self.factors.T
        return z + self.own * jax.random.normal(own, (rows, features)) > self.thresholds

    def alone(self) -> Float[np.ndarray, "features"]:
        """How often each is a candidate."""
        return scipy.special.ndtr(-np.asarray(self.thresholds, np.float64))

    def given(self) -> Iterator[Float[np.ndarray, "draws features"]]:
        """Probabilities given a draw of the shared u, over which they average to p."""
        from scipy.stats import qmc  # half a second that only such a world needs

        thresholds, factors, own = (
            np.asarray(each, np.float64) for each in (self.thresholds, self.factors, self.own)
        )
        # unscrambled points start at 0: the middles of their cells are as even, and none is infinite
        cells = qmc.Sobol(factors.shape[1], scramble=False).random(COMMON_DRAWS) + 0.5 / COMMON_DRAWS
        for shared in scipy.special.ndtri(cells).reshape(-1, AT_ONCE, factors.shape[1]):
            yield scipy.special.ndtr((shared @ factors.T - thresholds) / np.maximum(own, 1e-12))


@struct.dataclass
class Drifting:
    """Features whose probabilities hang together by the batch (Sharkey et al. 2022).

        p_i of a batch = mean * share_i * Phi(z_i) / (mean over i of share_i * Phi(z_i)),   z ~ N(0, C)

    z is drawn once per batch; a row on which none fires gets one feature, each as likely as another.
    """

    cholesky: Float[Array, "*worlds features features"]
    """L with L L^T = C."""
    share: Float[Array, "*worlds features"]
    mean: Float[Array, "*worlds"]

    def __call__(self, key: Key[Array, ""], rows: int) -> Bool[Array, "rows features"]:
        """Candidates on so many rows, which are one batch."""
        of_batch, of_rows, of_empty = jax.random.split(key, 3)
        features = len(self.share)
        share = self.share * jax.scipy.special.ndtr(self.cholesky @ jax.random.normal(of_batch, (features,)))
        fires = jax.random.uniform(of_rows, (rows, features)) < self.mean * share / share.mean()
        spare = jax.nn.one_hot(jax.random.randint(of_empty, (rows,), 0, features), features, dtype=bool)
        return jnp.where(fires.any(axis=1, keepdims=True), fires, spare)

    def alone(self) -> Float[np.ndarray, "features"]:
        """How often each is a candidate, as the spare feature of an empty row too."""
        return np.mean([block.mean(axis=0) for block in self.given()], axis=0)

    def given(self) -> Iterator[Float[np.ndarray, "draws features"]]:
        """How often each is a candidate in a batch, a row per draw of z."""
        cholesky, share = np.asarray(self.cholesky, np.float64), np.asarray(self.share, np.float64)
        draws = np.random.default_rng(0).normal(size=(COMMON_DRAWS // AT_ONCE, AT_ONCE, len(share)))
        for z in draws:
            drawn = share * scipy.special.ndtr(z @ cholesky.T)
            fires = np.minimum(float(self.mean) * drawn / drawn.mean(axis=1, keepdims=True), 1)
            yield fires + np.prod(1 - fires, axis=1, keepdims=True) / len(share)


@struct.dataclass
class Uniform:
    """Magnitudes drawn from U[0, 1]."""

    def __call__(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "rows features"]:
        """Magnitudes of candidates."""
        return 1 - jax.random.uniform(key, shape)  # U(0, 1]: a feature that fires is never 0

    def positive(self) -> float:
        """The probability that a magnitude is above 0."""
        return 1.0


@struct.dataclass
class Normal:
    """Magnitudes drawn from N(mean_i, std_i^2); below 0 there is none."""

    mean: Float[Array, "*worlds features"]
    std: Float[Array, "*worlds features"]

    def __call__(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "rows features"]:
        """Magnitudes of candidates."""
        return jax.nn.relu(self.mean + self.std * jax.random.normal(key, shape))

    def positive(self) -> Float[Array, "features"]:
        """The probability that a magnitude is above 0."""
        varies = self.std > 0
        return jnp.where(
            varies, jax.scipy.special.ndtr(self.mean / jnp.where(varies, self.std, 1)), self.mean > 0
        )


def constant(features: int, value: float = 1.0) -> Normal:
    """Magnitudes that are always the same."""
    return Normal(jnp.full(features, value), jnp.zeros(features))


def require_probabilities(probabilities: Any, name: str = "firing probabilities") -> None:
    """Each from 0 to 1; nothing is said of what is being traced."""
    if known(probabilities):
        values = np.asarray(probabilities, np.float64).reshape(-1)
        wrong = values[~((values >= 0) & (values <= 1))]
        require(wrong.size == 0, f"{name} must lie from 0 to 1, got {wrong[:1].tolist()}")


def independent(probabilities: Float[Any, "features"]) -> Independent:
    """Features that fire independently.

    Args:
      probabilities: of each; they may be traced.

    Raises:
      InputError: one outside [0, 1].
    """
    require_probabilities(probabilities)
    return Independent(jnp.asarray(probabilities, float))


def low_rank(
    probabilities: Float[Any, "features"], key: Key[Array, ""], rank: int = 32, scale: float = 0.1
) -> Copula:
    """Features that fire together by a few shared factors.

        correlation of z = F F^T off the diagonal, 1 on it;   entries of F ~ N(0, scale^2)

    Args:
      probabilities: of each.
      key: draws the factors.
      rank: how many factors.
      scale: of a factor's entries. Rows whose shared variance would pass .99 are scaled down to it.

    Raises:
      InputError: a probability outside [0, 1], a rank that is not from 1 to the number of features, or a
        scale below 0.

    Source: `sae_lens.synthetic`, `generate_random_low_rank_correlation_matrix`.
    """
    require_probabilities(probabilities)
    most = len(np.asarray(probabilities))
    require(
        1 <= rank <= most, f"the rank of a correlation of {most} features is from 1 to {most}, got {rank}"
    )
    require(0 <= scale < np.inf, f"the scale of a correlation must be finite and not negative, got {scale}")
    probabilities = np.asarray(probabilities, np.float64)
    factors = np.array(scale * jax.random.normal(key, (len(probabilities), rank)), np.float64)
    shared = np.square(factors).sum(axis=1, keepdims=True)
    factors *= np.sqrt(np.minimum(1, 0.99 / np.maximum(shared, 1e-30)))
    own = np.sqrt(1 - np.square(factors).sum(axis=1))
    return Copula(*(jnp.asarray(each, float) for each in (-scipy.special.ndtri(probabilities), factors, own)))


def correlated(probabilities: Float[Any, "features"], correlation: Float[Any, "features features"]) -> Copula:
    """Features that fire together as a whole matrix of correlations of their Gaussians says.

    Args:
      probabilities: of each.
      correlation: symmetric, ones on its diagonal, positive definite; `nearest_correlation` makes one so.

    Raises:
      InputError: a probability outside [0, 1], or another kind of matrix.
    """
    require_probabilities(probabilities)
    probabilities = np.asarray(probabilities, np.float64)
    factors = cholesky(correlation, len(probabilities))
    return Copula(
        jnp.asarray(-scipy.special.ndtri(probabilities), float),
        jnp.asarray(factors, float),
        jnp.zeros(len(probabilities)),
    )


def cholesky(correlation: Any, features: int) -> Float[np.ndarray, "n n"]:
    """L with L L^T = C, of a correlation matrix.

    Raises:
      InputError: it is none.
    """
    matrix = np.asarray(correlation, np.float64)
    require(
        matrix.shape == (features, features),
        f"a correlation matrix of {features} features is [{features}, {features}], got {list(matrix.shape)}",
    )
    sound = np.allclose(np.diag(matrix), 1) and np.allclose(matrix, matrix.T)
    require(sound, "a correlation matrix must be symmetric with ones on its diagonal")
    least = np.linalg.eigvalsh(matrix)[0].item()
    require(
        least > 0,
        f"this correlation matrix is not positive definite (its least eigenvalue is {least:.3g}); "
        "nearest_correlation makes it so",
    )
    return np.linalg.cholesky(matrix)


def nearest_correlation(matrix: Float[Any, "n n"], floor: float = 1e-6) -> Float[np.ndarray, "n n"]:
    """A symmetric matrix made a correlation matrix: eigenvalues cut from below, diagonal scaled to 1.

    Args:
      matrix: symmetric.
      floor: the least eigenvalue left, before the scaling; above 0.

    Raises:
      InputError: not square and symmetric, or a floor not above 0.

    Source: `sae_lens.synthetic`, `create_correlation_matrix_from_correlations`.
    """
    matrix = np.asarray(matrix, np.float64)
    square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1]
    require(
        square and np.allclose(matrix, matrix.T),
        f"a matrix to be made a correlation matrix must be symmetric, got one of shape {list(matrix.shape)}",
    )
    require(floor > 0, f"floor must be above 0, got {floor}")
    values, vectors = np.linalg.eigh(matrix)
    fixed = (vectors * np.maximum(values, floor)) @ vectors.T
    scale = 1 / np.sqrt(np.diag(fixed))
    fixed = fixed * scale * scale[:, None]
    return np.where(np.eye(len(fixed), dtype=bool), 1, (fixed + fixed.T) / 2)


def zipf(
    features: int, exponent: float = 1.0, most: float = 0.3, least: float = 0.01
) -> Float[np.ndarray, "features"]:
    """Probabilities that fall with the rank: i^-exponent, stretched to run from `most` to `least`.

    Args:
      features: how many.
      exponent: how steeply; above 0.
      most: of the first.
      least: of the last.

    Raises:
      InputError: no features, not 0 < least < most <= 1, or an exponent not above 0.

    Example:
      >>> zipf(3, 1.0, 0.3, 0.1)
      array([0.3 , 0.15, 0.1 ])

    Source: `sae_lens.synthetic`, `zipfian_firing_probabilities`.
    """
    require(features >= 1, f"features must be at least 1, got {features}")
    require(0 < least < most <= 1, f"0 < least < most <= 1 must hold, got least {least} and most {most}")
    require(0 < exponent < np.inf, f"exponent must be finite and above 0, got {exponent}")
    raw = np.arange(1, features + 1, dtype=np.float64) ** -exponent
    return most + (least - most) * (raw[0] - raw) / max(raw[0] - raw[-1], 1e-30)
