"""Normalised inputs: train on them, and save the SAE that equals it on raw ones."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Float

from sae_jax import sharding
from sae_jax.base import SAE, Batch, InputError, Params, require
from sae_jax.data import Source, on_mesh, stages
from sae_jax.folds import WITHOUT_PENALTY, fold_decoder_norms, inner, untied
from sae_jax.layer_norm import LayerNorm, is_layer_normed, layer_norm, layer_normed

__all__ = [
    "Affine",
    "LayerNorm",
    "Normalisation",
    "Normalised",
    "centring",
    "fold",
    "identity",
    "layer_norm",
    "layer_normed",
    "mean_norm",
    "normalised",
    "unit_mean_square",
    "whitening",
]

Rows = Float[Array | np.ndarray, "n d"]

ROWS_AT_A_TIME = 65_536

FOLDS = tuple(WITHOUT_PENALTY)
"""What a normalisation can be folded into, as it is or within a wrapper."""


class Affine(NamedTuple):
    """`z = (x - shift) matrix`, undone by `x = z inverse + shift`. A pytree, and a function of rows.

    Example:
      >>> z = whitening(x)(x)
    """

    shift: Float[Array | np.ndarray, "d"]
    matrix: Float[Array | np.ndarray, "d d"] | Float[Array | np.ndarray, ""]
    """A matrix, or one factor for all directions."""
    inverse: Float[Array | np.ndarray, "d d"] | Float[Array | np.ndarray, ""]

    def __call__(self, x: Float[Array | np.ndarray, "*batch d"]) -> Float[Array, "*batch d"]:
        """Rows normalised, in their own dtype."""
        x = jnp.asarray(x)
        self._require_width(x)
        return _times(x - self.shift, self.matrix).astype(x.dtype)

    def undo(self, z: Float[Array | np.ndarray, "*batch d"]) -> Float[Array, "*batch d"]:
        """Rows as they were before."""
        z = jnp.asarray(z)
        self._require_width(z)
        return (_times(z, self.inverse) + self.shift).astype(z.dtype)

    def inverted(self) -> "Affine":
        """The map from `z` back to `x`; folding it undoes the fold of this one, to rounding."""
        return Affine(-_times(self.shift, self.matrix), self.inverse, self.matrix)

    def _require_width(self, rows) -> None:
        widths = f"this normalisation is of {len(self.shift)} columns, got {rows.shape[-1]}"
        require(rows.shape[-1] == len(self.shift), widths)


Normalisation = Affine | LayerNorm


def identity(d: int) -> Affine:
    """`z = x`: for the side of a transcoder that is left as it is."""
    return _scale(d, 1.0)


def mean_norm(x: Rows) -> Affine:
    """`z = x sqrt(d) / mean_b |x_b|`: SAELens's `expected_average_only_in`.

    Args:
      x: rows to measure on.

    Returns:
      A scale.

    Raises:
      InputError: no rows, NaN or infinity among them, or nothing but zeros.

    Example:
      >>> source = normalised(source, mean_norm(x))

    Source: Anthropic, Circuits Updates April 2024.
    """
    mean = _mean(x, lambda rows: np.linalg.norm(rows, axis=1).sum())
    require(bool(mean > 0), "rows that are all 0 have no scale to normalise by")
    return _scale(x.shape[1], math.sqrt(x.shape[1]) / mean)


def unit_mean_square(x: Rows) -> Affine:
    """`z = x / sqrt(mean_b |x_b|^2)`: dictionary_learning, Gemma Scope.

    Arguments, returns and raises: as `mean_norm`.
    """
    mean = _mean(x, lambda rows: np.square(rows).sum())
    require(bool(mean > 0), "rows that are all 0 have no scale to normalise by")
    return _scale(x.shape[1], 1 / math.sqrt(mean))


def centring(x: Rows) -> Affine:
    """`z = x - mean_b x_b`.

    Arguments, returns and raises: as `mean_norm`; rows of zeros are allowed.
    """
    mean = _mean(x, lambda rows: rows.sum(axis=0))
    return identity(len(mean))._replace(shift=mean)


def whitening(x: Rows, eps: float = 1e-3) -> Affine:
    """`z = (x - mean) E diag(lambda + eps)^-1/2`, so that z has covariance about 1 in every direction.

    Here `E diag(lambda) E^T` is the (unbiased) covariance of the rows: SAELens's `covariance_whitening`.

    Args:
      x: rows to measure on, more than there are columns to be of use.
      eps: added to the eigenvalues, in the square of the unit of `x`.

    Returns:
      An affine map.

    Raises:
      InputError: fewer than two rows, NaN or infinity among them, or no spread along some direction
        where `eps` is 0.

    Source: Saraswatula and Klindt 2025 (arXiv 2511.13981).
    """
    require(len(x) >= 2, f"whitening needs at least two rows, got {len(x)}")
    mean = centring(x).shift
    covariance = _mean(x, lambda rows: (rows - mean).T @ (rows - mean)) * (len(x) / (len(x) - 1))
    eigenvalues, directions = np.linalg.eigh(covariance)
    spread = np.sqrt(np.maximum(eigenvalues, 0) + eps)
    require(bool((spread > 0).all()), "the rows have no spread along some direction: give an eps above 0")
    return Affine(mean, directions / spread, spread[:, None] * directions.T)


@struct.dataclass
class Normalised:
    """A source whose rows are normalised; see `normalised`."""

    source: Source
    normalisation: Any
    target: Any

    @property
    def batch_size(self) -> int:
        """Rows per step."""
        return self.source.batch_size

    def batch(self, i) -> Batch:
        """The batch of step `i`."""
        return self._apply(self.source.batch(i))

    def stages(self, start: int, steps: int) -> Iterator[tuple[Source, int]]:
        """What the source under it reads ahead."""
        for source, stop in stages(self.source, start, steps):
            yield Normalised(source, self.normalisation, self.target), stop

    def evaluation(self, rows: int) -> Iterator[Batch]:
        """Batches to measure on."""
        return map(self._apply, self.source.evaluation(rows))

    def on_mesh(self, mesh: Mesh) -> "Normalised":
        """The same batches on a mesh."""
        by = sharding.placed((self.normalisation, self.target), mesh)
        return Normalised(on_mesh(self.source, mesh), *by)

    def _apply(self, batch: Batch) -> Batch:
        of_target = self.normalisation if self.target is None else self.target
        return Batch(self.normalisation(batch.x), of_target(batch.y))


def normalised(
    source: Source, normalisation: Normalisation, target: Normalisation | None = None
) -> Normalised:
    """A source with its rows normalised as they are drawn.

    Args:
      source: any source.
      normalisation: `mean_norm(x)`, `whitening(x)`, ..., or `layer_norm`.
      target: of what a transcoder should give; None for the same as of its input.

    Returns:
      A source. `fold(sae, params, normalisation, target)` is the SAE on raw rows.

    Example:
      >>> source = normalised(in_memory(x), whitening(x))
    """
    return Normalised(source, normalisation, target)


def fold(
    sae: SAE, params: Params, normalisation: Normalisation, target: Normalisation | None = None
) -> tuple[SAE, Params]:
    """The SAE on raw x that gives the features of the one trained on normalised x, and x's reconstruction.

    For `z = (x - s) M`, and where `b_dec` is subtracted from the input without the second line:

        W_enc <- M W_enc;             W_dec <- W_dec M^-1;          b_dec <- b_dec M^-1 + s
        b_enc <- b_enc - s M W_enc    (b_gate too; b_mag by exp(r_mag) times as much)

    A transcoder's decoder takes the target's s and M, and `W_skip <- M W_skip M_target^-1`. Decoder norms
    that features are chosen by are folded first, because M changes them. Thresholds stay. Layer norm is
    no matrix and is carried along by `layer_normed`.

    Args:
      sae: as it was trained.
      params: its weights.
      normalisation: of its input.
      target: of a transcoder's output; None for the same as of its input.

    Returns:
      The SAE, untied and without rescaling, and its weights in the dtypes they had. Only its encoder and
      decoder are those of before: its loss is in another unit.

    Raises:
      InputError: an architecture that is not among `FOLDS`, a layer norm to be undone on a transcoder's
        output, a width that does not fit.

    Example:
      >>> TrainedSAE(*fold(member.sae, member.params, whitening(x))).save("sae/")

    Source: SAELens's `fold_activation_norm_scaling_factor` and `fold_activation_whitening`.
    """
    transcodes = "d_out" in sae.config
    require(target is None or transcodes, "only a transcoder's target has a normalisation of its own")
    require(not is_layer_normed(sae), "this SAE normalises its input by layer norm already")
    target = normalisation if target is None else target
    if isinstance(normalisation, LayerNorm) and not transcodes:
        return layer_normed(sae), params
    if isinstance(target, LayerNorm):
        raise InputError("the layer norm of a transcoder's target cannot be undone without the target itself")
    if isinstance(normalisation, LayerNorm):
        sae, params = fold(sae, params, identity(sae.config["d_in"]), target)
        return layer_normed(sae), params
    core = inner(sae.config)
    name = core.get("architecture")
    require(name in FOLDS, f"a normalisation cannot be folded into {name!r}, only into: {', '.join(FOLDS)}")
    widths = (sae.config["d_in"], sae.config.get("d_out", sae.config["d_in"]))
    found = (len(normalisation.shift), len(target.shift))
    require(found == widths, f"the normalisations are of {found} columns, but the SAE's widths are {widths}")
    sae, params = fold_decoder_norms(*untied(sae, params))
    kinds = {name: np.asarray(leaf).dtype for name, leaf in params.items()}
    weights = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    normalisation, target = (
        Affine(*(np.asarray(leaf, np.float64) for leaf in one)) for one in (normalisation, target)
    )
    shift, matrix, _ = normalisation
    # W_enc <- M W_enc
    W_enc = _times(matrix, weights["W_enc"])
    folded = {
        "W_enc": W_enc,
        # W_dec <- W_dec M^-1;  b_dec <- b_dec M^-1 + s
        "W_dec": _times(weights["W_dec"], target.inverse),
        "b_dec": _times(weights["b_dec"], target.inverse) + target.shift,
    }
    if not core["apply_b_dec_to_input"]:
        # b_enc <- b_enc - s M W_enc
        folded |= {bias: weights[bias] - shift @ W_enc for bias in ("b_enc", "b_gate") if bias in weights}
        if "b_mag" in weights:
            folded["b_mag"] = weights["b_mag"] - np.exp(weights["r_mag"]) * (shift @ W_enc)
    if "W_skip" in weights:
        # W_skip <- M W_skip M_target^-1
        folded["W_skip"] = _times(_times(matrix, weights["W_skip"]), target.inverse)
        folded["b_dec"] = folded["b_dec"] - shift @ folded["W_skip"]
    return sae, {**params, **{name: leaf.astype(kinds[name]) for name, leaf in folded.items()}}


def _times(a, b):
    """A product of matrices, either of which may be one factor."""
    if 0 in (np.ndim(a), np.ndim(b)):
        return a * b
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a @ b
    # whitening magnifies what a product in half precision, a GPU's default, would lose
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _scale(d: int, factor: float) -> Affine:
    return Affine(np.zeros(d), np.asarray(factor), np.asarray(1 / factor))


def _mean(x: Rows, summed: Callable[[np.ndarray], Any]) -> Any:
    """The mean over rows of what `summed` adds up, in float64 and a part of the rows at a time."""
    require(x.ndim == 2 and len(x) > 0, f"a normalisation is measured on [rows, d], got {tuple(x.shape)}")
    starts = range(0, len(x), ROWS_AT_A_TIME)
    total = sum(summed(np.asarray(x[start : start + ROWS_AT_A_TIME], np.float64)) for start in starts)
    require(bool(np.isfinite(total).all()), "the rows to normalise by hold values that are NaN or infinite")
    return total / len(x)
