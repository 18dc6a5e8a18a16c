"""Which entries are the largest, of each row or of a whole batch, wherever the entries lie."""

import math
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.custom_batching import custom_vmap
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped

from sae_jax import sharding
from sae_jax.base import InputError, require

GROUP = 8
"""How many neighbours `top` looks at together; measured in docs/performance.md."""

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
    _require_few_enough(values)
    bound = _bound(count, count_max, values.size)
    return _largest(jax.lax.stop_gradient(jnp.asarray(values)), count, bound, whole=True)


def _require_few_enough(values: Array) -> None:
    require(values.size < 2**31, f"a batch of {values.shape} entries is too large to choose among at once")


def top(
    values: Float[Array, "rows n"], k: int, maxima: Callable[..., Array] | None = None
) -> tuple[Float[Array, "rows k"], Int[Array, "rows k"]]:
    """The `k` largest entries of each row, the largest first, and where they lie; of equal ones the earlier.

    A row is cut into groups of `GROUP` neighbours. Whatever is among the k largest lies in one of the k
    groups with the largest maxima: k others would each hold something larger. So the groups are chosen
    first, by the same rule, and only their entries looked at: of 16,384 entries for k = 32 some 512.

    Args:
      values: rows; NaN counts as infinite.
      k: at most n.
      maxima: of groups [rows, groups, GROUP]; None for a way that keeps NaN.

    Returns:
      Values and places, as `jax.lax.top_k`.
    """
    count, n = values.shape
    if n < 4 * GROUP * k:
        return _top_k(values, k)
    rest = -n % GROUP
    padded = jnp.pad(values, ((0, 0), (0, rest)), constant_values=-jnp.inf) if rest else values
    groups = padded.reshape(count, -1, GROUP)
    of_groups = _without_nan((maxima or _maxima)(groups))
    # the maxima of these by XLA's reduction, which it does not fuse with those and compute them anew
    chosen = top(of_groups, k, partial(jnp.max, axis=-1))[1]
    # in their own order, so that of equal entries the earlier comes first
    chosen = jnp.sort(chosen, axis=-1)
    best, where = top(jnp.take_along_axis(groups, chosen[..., None], axis=1).reshape(count, -1), k)
    return best, jnp.take_along_axis(chosen, where // GROUP, axis=-1) * GROUP + where % GROUP


def _top_k(values: Float[Array, "*rows n"], k: int) -> tuple[Float[Array, "*rows k"], Int[Array, "*rows k"]]:
    # without the barriers XLA sees where only one of the two is wanted, and sorts all values instead;
    # a barrier for both together breaks its partitioner
    best, where = map(jax.lax.optimization_barrier, jax.lax.top_k(_without_nan(values), k))
    return best, where


def _maxima(groups: Float[Array, "rows groups size"]) -> Float[Array, "rows groups"]:
    """The largest of each group, NaN where it holds one: XLA's own reduction loses NaN on a CPU."""
    return reduce(jnp.maximum, [groups[..., place] for place in range(groups.shape[-1])])


def _without_nan(values: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.where(jnp.isnan(values), jnp.inf, values)


def entries(
    values: Float[Array, "rows n"], k: Number, k_max: int | None = None
) -> tuple[Int[Array, "rows k_max"], Bool[Array, "rows k_max"]]:
    """Where the `k` largest entries of each row lie, and which of the places are in use.

    Arguments and errors: as `largest`; the largest come first.
    """
    bound = _bound(k, k_max, values.shape[-1])
    _, where = top(jax.lax.stop_gradient(values), bound)
    return where, jnp.broadcast_to(jnp.arange(bound) < k, where.shape)


def entries_of_all(
    values: Float[Array, "rows n"], count: Number, count_max: int | None = None
) -> tuple[Int[Array, "places"], Bool[Array, "places"]]:
    """Where the `count` largest entries of all rows lie, as `row n + column`, and which places are in use.

    Arguments and errors: as `largest_of_all`. There may be more places than `count_max`.
    """
    _require_few_enough(values)
    bound, count = _bound(count, count_max, values.size), jnp.asarray(count).astype(jnp.int32)
    best, places = _contenders(jax.lax.stop_gradient(values), count, bound)
    least, at = _last(best, places, count)
    return places, ((best > least) | ((best == least) & (places <= at))) & (count > 0)


def _contenders(
    values: Float[Array, "rows n"], count: Int[Array, ""], count_max: int
) -> tuple[Float[Array, "places"], Int[Array, "places"]]:
    """Some entries and their places, among which are the `count` largest of all.

    The matrix is dealt out to tiles: the c-th stretch of columns of tile t is of row t - c. A row with many
    large entries, or a column, so falls to all tiles in equal parts, and twice the mean number of each is
    nearly always enough. Where it is not, all entries are sorted.
    """
    rows, n = values.shape
    each = 2 * -(-count_max // rows) + 16
    groups = n // GROUP
    if n % GROUP or groups < 2 * each:
        return _top_k(values.reshape(-1), count_max)

    @jax.custom_batching.sequential_vmap
    def dealt(values, count):
        stretches = math.gcd(groups, 16)
        maxima = _maxima(values.reshape(rows, groups, GROUP)).reshape(rows, stretches, -1)
        maxima = jnp.concatenate([jnp.roll(maxima[:, c], c, axis=0) for c in range(stretches)], axis=1)
        chosen = top(maxima, each)[1]
        row = (jnp.arange(rows, dtype=jnp.int32)[:, None] - chosen // (groups // stretches)) % rows
        candidates = values.reshape(rows * groups, GROUP)[row * groups + chosen].reshape(rows, -1)
        best, where = top(candidates, each)
        of_all = jnp.take_along_axis(row * groups + chosen, where // GROUP, axis=-1) * GROUP + where % GROUP
        flat, places = best.reshape(-1), of_all.reshape(-1)
        all_there = (best[:, -1] < _kth(flat, count)).all()

        def sort(_):
            return _top_k(values.reshape(-1), flat.size)

        return jax.lax.cond(all_there, lambda found: found, sort, (flat, places))

    return dealt(values, count)


def _last(
    best: Float[Array, "places"], places: Int[Array, "places"], count: Int[Array, ""]
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """The `count`-th of these entries, by value and then by place: what it is, and where."""
    least = _kth(best, count)
    # of those that equal it so many are wanted, the earliest: as the largest of negative numbers
    wanted = count - (best > least).sum(dtype=jnp.int32)
    return least, -_kth(jnp.where(best == least, -places, jnp.iinfo(places.dtype).min), wanted)


def _kth(values: Shaped[Array, "n"], k: Int[Array, ""]) -> Shaped[Array, ""]:
    """The k-th largest, found bit by bit: the largest number that k of them reach."""
    bits = values.dtype.itemsize * 8
    kind = jnp.dtype(f"uint{bits}")
    top_bit = kind.type(1 << (bits - 1))
    raw = jax.lax.bitcast_convert_type(values, kind)
    if jnp.issubdtype(values.dtype, jnp.floating):
        # below 0, a larger pattern of bits is a smaller number
        keys = jnp.where(raw >= top_bit, ~raw, raw | top_bit)
    else:
        keys = raw ^ top_bit

    def narrowed(place, found):
        tried = found | (top_bit >> place.astype(kind))
        return jnp.where((keys >= tried).sum(dtype=jnp.int32) >= k, tried, found)

    key = jax.lax.fori_loop(0, bits, narrowed, kind.type(0))
    if jnp.issubdtype(values.dtype, jnp.floating):
        key = jnp.where(key >= top_bit, key ^ top_bit, ~key)
    else:
        key = key ^ top_bit
    return jax.lax.bitcast_convert_type(key, values.dtype)


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
    values = _without_nan(rows)
    if whole and not sharding.in_force():
        least, at = _last(*_contenders(rows, k, k_max), k)
        chosen = (values > least) | (
            (values == least) & (places + n * jnp.arange(len(rows), dtype=jnp.int32)[:, None] <= at)
        )
        return chosen & (k > 0)
    if whole:
        places = ((origin[0] + jnp.arange(rows.shape[0]))[:, None] * n + places).reshape(1, -1)
        values = values.reshape(1, -1)
    best, where = top(values, min(k_max, values.shape[-1]))
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
