"""What an SAE does to data, measured in one streaming pass; each figure named by its definition.

Sums over a batch are taken on the device in the data's precision, around the first batch's mean so that
variances do not cancel; sums over batches are taken on the host in float64.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Scalar

from sae_jax.base import SAE, Batch, InputError, Params

DENSITY_BINS = np.linspace(-10, 0, 41)
"""Edges of `density_histogram`, in log10 of density; a latent that never fires lies in the first bin."""


class Sums(NamedTuple):
    """Sums over rows, from which every metric follows. e = x_hat - y, c = a fixed centre."""

    rows: Scalar
    error: Scalar  # |e|^2
    centred: Float[Array, "d"]  # y - c
    centred_square: Scalar  # |y - c|^2
    dot: Scalar  # x_hat . y
    x_hat_square: Scalar  # |x_hat|^2
    cosine: Scalar  # cos(x_hat, y)
    norm_ratio: Scalar  # |x_hat| / |y|
    l1: Scalar  # |f|_1
    fired: Float[Array, "d_sae"]  # f > 0
    spread_rows: Scalar  # rows that differ from their batch's mean
    legacy: Scalar  # 1 - |e|^2 / |y - batch mean|^2, over those
    spread_batches: Scalar  # batches that hold such rows
    fvu_batch: Scalar  # summed over those


def measure(sae: SAE, params: Params, batch: Batch, centre: Float[Array, "d"]) -> Sums:
    """The sums of one batch, in float32 or better whatever the precision of the SAE."""
    f = sae.encode(params, batch.x)
    exact = jnp.promote_types(jnp.result_type(f, batch.y), jnp.float32)
    # a crosscoder's sources side by side
    x_hat, y = (array.reshape(len(f), -1) for array in (sae.decode(params, f, batch.x), batch.y))
    f, x_hat, y = (array.astype(exact) for array in (f, x_hat, y))
    error = jnp.square(x_hat - y).sum(axis=-1)
    centred = y - centre
    norm, norm_hat = jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(x_hat, axis=-1)
    spread = jnp.square(y - y.mean(axis=0)).sum(axis=-1)
    return Sums(
        rows=jnp.asarray(len(y), y.dtype),
        error=error.sum(),
        centred=centred.sum(axis=0),
        centred_square=jnp.square(centred).sum(),
        dot=(x_hat * y).sum(),
        x_hat_square=jnp.square(norm_hat).sum(),
        cosine=((x_hat * y).sum(axis=-1) / jnp.maximum(norm * norm_hat, 1e-30)).sum(),
        norm_ratio=(norm_hat / jnp.maximum(norm, 1e-30)).sum(),
        l1=jnp.abs(f).sum(),
        fired=(f > 0).sum(axis=0).astype(y.dtype),
        # a row at the mean of its batch, as the only row of one is, has no variance to explain
        spread_rows=(spread > 0).sum().astype(y.dtype),
        legacy=jnp.where(spread > 0, 1 - error / spread, 0).sum(),
        spread_batches=(spread.sum() > 0).astype(y.dtype),
        fvu_batch=jnp.where(spread.sum() > 0, error.sum() / spread.sum(), 0),
    )


def stream(measure_batch: Callable[[Batch, Array], Sums], batches: Iterable[Batch]) -> dict[str, np.ndarray]:
    """Every metric over a stream of batches.

    With E over all rows, e = x_hat - y, d the width of y:

        mse                           E|e|^2 / d
        explained_variance            1 - E|e|^2 / (E|y|^2 - |E y|^2)      (SAELens; Gao et al. 2024)
        fvu                           1 - explained_variance
        explained_variance_legacy     E (1 - |e|^2 / |y - batch mean|^2)   (SAELens, before 2025)
        fvu_batch                     mean over batches of sum|e|^2 / sum|y - batch mean|^2
                                      (sparsify, dictionary_learning)
        cosine                        E cos(x_hat, y), 0 where either is 0
        shrinkage                     E |x_hat| / |y|
        relative_reconstruction_bias  E|x_hat|^2 / E(x_hat . y)            (Rajamanoharan et al. 2024)
        l0, l1_norm                   E #{f > 0}, E sum|f|
        density [d_sae]               share of rows on which the latent is active
        dead_fraction                 share of latents active on no row
        density_histogram             latents per bin of log10(density + 1e-10), edges `DENSITY_BINS`

    Args:
      measure_batch: `(batch, centre) -> Sums`, whose leaves may carry leading axes (members of a sweep).
      batches: what to measure on. The two batch-wise metrics depend on how rows are grouped, and leave out
        rows and batches that do not vary.

    Returns:
      float64 arrays by name, with the leading axes of the sums. Where y does not vary, the explained
      variances and fvus are NaN.

    Raises:
      InputError: no batches.
    """
    total, centre = None, None
    for batch in batches:
        centre = batch.y.mean(axis=0).reshape(-1) if centre is None else centre
        sums = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), measure_batch(batch, centre))
        total = sums if total is None else jax.tree.map(np.add, total, sums)
    if total is None:
        raise InputError("there is no data to measure on")
    return _finish(total)


def evaluate(sae: SAE, params: Params, batches: Iterable[Batch]) -> dict[str, np.ndarray]:
    """Every metric of one SAE; see `stream` for their definitions.

    Args:
      sae: the model.
      params: its weights.
      batches: what to measure on, `source.evaluation(rows)` for one.

    Returns:
      float64 values by name.

    Example:
      >>> evaluate(sae, state.params, source.evaluation(65_536))["l0"]
    """
    return stream(partial(_measure, sae, params), batches)


def by_source(sae: SAE, params: Params, batches: Iterable[Batch]) -> dict[str, np.ndarray]:
    """What a crosscoder gives back of each of its sources; `evaluate` tells of all together.

        mse_by_source                 E|e_s|^2 / d
        explained_variance_by_source  1 - E|e_s|^2 / (E|x_s|^2 - |E x_s|^2)

    Args:
      sae: a crosscoder.
      params: its weights.
      batches: what to measure on.

    Returns:
      float64 arrays [sources] by name. Which latents are of which source, `crosscoder.decoder_shares` tells.

    Example:
      >>> by_source(sae, state.params, source.evaluation(65_536))["explained_variance_by_source"]
    """
    rows, error, centred, square, centre = 0, 0.0, 0.0, 0.0, None
    for batch in batches:
        x_hat = np.asarray(_reconstruct(sae, params, batch.x), np.float64)
        y = np.asarray(batch.y, np.float64)
        centre = y.mean(axis=0) if centre is None else centre
        rows += len(y)
        error = error + np.square(x_hat - y).sum(axis=(0, -1))
        centred = centred + (y - centre).sum(axis=0)
        square = square + np.square(y - centre).sum(axis=(0, -1))
    if centre is None:
        raise InputError("there is no data to measure on")
    variance = square / rows - np.square(centred / rows).sum(axis=-1)
    return {
        "mse_by_source": error / rows / centre.shape[-1],
        "explained_variance_by_source": 1 - error / rows / np.where(variance > 0, variance, np.nan),
    }


@partial(jax.jit, static_argnums=0)
def _reconstruct(sae: SAE, params: Params, x: Array) -> Array:
    return sae.decode(params, sae.encode(params, x), x)


_measure = jax.jit(measure, static_argnums=0)


def _finish(s) -> dict[str, np.ndarray]:
    rows = s.rows
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = s.centred_square / rows - np.square(s.centred / rows[..., None]).sum(axis=-1)
        # where squares underflow or cancel there is no variance that could be explained
        fvu = s.error / rows / np.where(variance > 0, variance, np.nan)
        density = s.fired / rows[..., None]
        log_density = np.clip(np.log10(density + 1e-10), DENSITY_BINS[0], DENSITY_BINS[-1])
        histogram = np.apply_along_axis(lambda row: np.histogram(row, DENSITY_BINS)[0], -1, log_density)
        found = {
            "mse": s.error / rows / s.centred.shape[-1],
            "explained_variance": 1 - fvu,
            "fvu": fvu,
            "explained_variance_legacy": s.legacy / s.spread_rows,
            "fvu_batch": s.fvu_batch / s.spread_batches,
            "cosine": s.cosine / rows,
            "shrinkage": s.norm_ratio / rows,
            "relative_reconstruction_bias": s.x_hat_square / s.dot,
            "l0": s.fired.sum(axis=-1) / rows,
            "l1_norm": s.l1 / rows,
            "density": density,
            "dead_fraction": (density == 0).mean(axis=-1),
            "density_histogram": histogram,
        }
    return {name: np.asarray(value) for name, value in found.items()}
