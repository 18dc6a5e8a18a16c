"""Which entries are the largest, of each row or of a whole batch, wherever the entries lie."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.custom_batching import custom_vmap
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from sae_jax import sharding
from sae_jax.base import InputError, require

Number = Any
"""A Python number, or a traced scalar."""


def largest(values: Float[Array, "*batch n"], k: Number, k_max: int | None = None) -> Bool[Array, "*batch n"]:
    """Which entries of each row are among its `k` largest; of equal ones the earlier.

    Where latents are spread over devices, each takes the largest of its own, and what they took is merged:
    no device sees a whole row.

    Args:
      values: rows.
      k: how many, a whole number; traced where `k_max` is given. More than `n` are all.
      k_max: the largest `k` that will come, a Python integer: it sets the size of the search.

    Returns:
      A mask with `min(k, n)` entries set per row. NaN counts as largest, so that it goes on to the loss.

    Raises:
      InputError: `k` is traced and `k_max` left out.

    Example:
      >>> largest(jnp.array([3.0, 1.0, 2.0]), k=2)
      Array([ True, False,  True], dtype=bool)
    """
    n = values.shape[-1]
    rows = jax.lax.stop_gradient(jnp.asarray(values)).reshape(-1, n)
    return _largest(rows, k, _bound(k, k_max, n), whole=False).reshape(values.shape)


def largest_of_all(
    values: Float[Array, "batch n"], count: Number, count_max: int | None = None
) -> Bool[Array, "batch n"]:
    """Which entries are among the `count` largest of all rows together; of equal ones the earlier.

    Arguments, returns and errors: as `largest`.
    """
    require(values.size < 2**31, f"a batch of {values.shape} entries is too large to choose among at once")
    bound = _bound(count, count_max, values.size)
    return _largest(jax.lax.stop_gradient(jnp.asarray(values)), count, bound, whole=True)


def _bound(k: Number, k_max: int | None, n: int) -> int:
    if k_max is None and isinstance(k, Tracer):
        raise InputError("k is traced, as an axis of a sweep is: give k_max, the largest k that it will take")
    return min(int(k) if k_max is None else k_max, n)


def _largest(rows: Float[Array, "batch n"], k: Number, k_max: int, whole: bool) -> Bool[Array, "batch n"]:
    if k_max == 0:
        return jnp.zeros(rows.shape, bool)
    k = jnp.asarray(k).astype(jnp.int32)
    if not sharding.in_force():
        return _among(rows, k, k_max, whole, split=(), origin=(0, 0), n=rows.shape[-1])

    # a map over devices cannot itself be vmapped, so a vmap over it is led to its axis of members
    @custom_vmap
    def one(rows, k):
        return _spread(rows[None], k[None], k_max, whole)[0]

    @one.def_vmap
    def several(axis_size, mapped, rows, k):
        rows, k = (
            array if is_mapped else jnp.broadcast_to(array, (axis_size, *array.shape))
            for array, is_mapped in zip((rows, k), mapped, strict=True)
        )
        return _spread(rows, k, k_max, whole), True

    return one(rows, k)


def _spread(
    rows: Float[Array, "members batch n"], k: Int[Array, "members"], k_max: int, whole: bool
) -> Bool[Array, "members batch n"]:
    """`_among` on every device's own part of the rows."""
    n = rows.shape[-1]
    member, data, latent = (
        axis if size % sharding.size(axis) == 0 else None
        for axis, size in zip(sharding.AXES, rows.shape, strict=True)
    )
    split = tuple(axis for axis in (data if whole else None, latent) if axis is not None)
    split = tuple(axis for axis in split if sharding.size(axis) > 1)

    def own(rows, k):
        row, column = (
            0 if axis is None else jax.lax.axis_index(axis) * size
            for axis, size in zip((data, latent), rows.shape[1:], strict=True)
        )
        return jax.vmap(lambda rows, k: _among(rows, k, k_max, whole, split, (row, column), n))(rows, k)

    spec = PartitionSpec(member, data, latent)
    return jax.shard_map(own, in_specs=(spec, PartitionSpec(member)), out_specs=spec)(rows, k)


def _among(
    rows: Float[Array, "batch n"],
    k: Int[Array, ""],
    k_max: int,
    whole: bool,
    split: tuple[str, ...],
    origin: tuple[Any, Any],
    n: int,
) -> Bool[Array, "batch n"]:
    """The mask of a block, which begins at `origin` of the whole; `split` are the axes that hold the rest."""
    places = origin[1] + jnp.arange(rows.shape[1])
    values = jnp.where(jnp.isnan(rows), jnp.inf, rows)
    if whole:
        places = ((origin[0] + jnp.arange(rows.shape[0]))[:, None] * n + places).reshape(1, -1)
        values = values.reshape(1, -1)
    # without the barriers XLA sees that one entry is wanted, and sorts all values in place of the search
    best, where = map(jax.lax.optimization_barrier, jax.lax.top_k(values, min(k_max, values.shape[-1])))
    found = places.reshape(-1)[where]
    if split:
        best, found = (
            jax.lax.all_gather(each, split, axis=each.ndim - 1, tiled=True) for each in (best, found)
        )
        descending, found = jax.lax.sort((-best, found), num_keys=2)
        best = -descending
    last = jnp.broadcast_to(jnp.clip(k - 1, 0, best.shape[-1] - 1), (best.shape[0], 1))
    least, at = (jnp.take_along_axis(each, last, axis=-1) for each in (best, found))
    chosen = (values > least) | ((values == least) & (places <= at))
    return (chosen & (k > 0)).reshape(rows.shape)
