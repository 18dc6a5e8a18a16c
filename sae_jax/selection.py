"""Which entries are the largest, of each row or of a whole batch, wherever the entries lie."""

import math
from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

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

ENOUGH = 3
"""From how many times `k` groups on they are chosen among first."""
WORD = 32
"""How many entries of a mask `_nth` counts at once."""

Number = Any
"""A Python number, or a traced scalar."""


class Cut(NamedTuple):
    """The last entry that is chosen: what it is, and where. NaN where none is."""

    least: Float[Array, "*rows"]
    place: Int[Array, "*rows"]

    def keeps(self, values: Float[Array, "*some"], places: Int[Array, "..."]) -> Bool[Array, "*some"]:
        """Which entries are larger, or equal and no later."""
        return (values > self.least) | ((values == self.least) & (places <= self.place))


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
    """The `k` largest entries of each row in the order of their places, and these; of equal ones the earlier.

    Args:
      values: rows; NaN counts as infinite.
      k: at most n.
      maxima: as in `_candidates`.
    """
    values, places = _candidates(values, k, maxima)
    where = jax.vmap(lambda row: _nth(_keeps(row, k), jnp.arange(k, dtype=jnp.int32)))(values)
    best, found = (jnp.take_along_axis(each, where, axis=-1) for each in (values, places))
    return best, found


def _candidates(
    values: Float[Array, "rows n"], k: int, maxima: Callable[..., Array] | None = None
) -> tuple[Float[Array, "rows some"], Int[Array, "rows some"]]:
    """Some entries of each row in their order, among them the `k` largest, and their places.

    A row is cut into groups of `GROUP` neighbours. Whatever is among the k largest lies in one of the k
    groups with the largest maxima: k others would each hold something larger. So the groups are chosen
    first, by the same rule, and only their entries looked at: of 16,384 entries for k = 32 some 256.

    Args:
      values: rows; NaN counts as infinite.
      k: at most n.
      maxima: of groups [rows, groups, GROUP]; None for a way that keeps NaN.
    """
    count, n = values.shape
    if n < ENOUGH * GROUP * k:
        return _without_nan(values), jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), values.shape)
    rest = -n % GROUP
    padded = jnp.pad(values, ((0, 0), (0, rest)), constant_values=-jnp.inf) if rest else values
    groups = padded.reshape(count, -1, GROUP)
    of_groups = _without_nan((maxima or _maxima)(groups))
    # the maxima of these by XLA's reduction, which it does not fuse with those and compute them anew
    chosen = top(of_groups, k, partial(jnp.max, axis=-1))[1][..., None]
    candidates = _without_nan(jnp.take_along_axis(groups, chosen, axis=1))
    places = chosen * GROUP + jnp.arange(GROUP, dtype=jnp.int32)
    return candidates.reshape(count, -1), places.reshape(count, -1)


def _maxima(groups: Float[Array, "rows groups size"]) -> Float[Array, "rows groups"]:
    """The largest of each group, NaN where it holds one: XLA's own reduction loses NaN on a CPU."""
    return reduce(jnp.maximum, [groups[..., place] for place in range(groups.shape[-1])])


def _without_nan(values: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.where(jnp.isnan(values), jnp.inf, values)


def entries(
    values: Float[Array, "rows n"], k: Number, k_max: int | None = None
) -> tuple[Int[Array, "rows k_max"], Bool[Array, "rows k_max"]]:
    """Where the `k` largest entries of each row lie, in the order of places, and which of these are in use.

    Arguments and errors: as `largest`.
    """
    bound = _bound(k, k_max, values.shape[-1])
    best, where = top(jax.lax.stop_gradient(values), bound)
    if k_max is None:
        return where, jnp.ones(where.shape, bool)
    return where, jax.vmap(_keeps, in_axes=(0, None))(best, k)


def entries_of_all(
    values: Float[Array, "rows n"], count: Number, count_max: int | None = None
) -> tuple[Int[Array, "places"], Bool[Array, "places"]]:
    """Where the `count` largest entries of all rows lie, as `row n + column`, and which places are in use.

    Arguments and errors: as `largest_of_all`. There may be more places than `count_max`.
    """
    _require_few_enough(values)
    bound, count = _bound(count, count_max, values.size), jnp.asarray(count).astype(jnp.int32)
    best, places = _contenders(jax.lax.stop_gradient(values), count, bound)
    return places, _cut_anywhere(best, places, count).keeps(best, places)


def _contenders(
    values: Float[Array, "rows n"], count: Int[Array, ""], count_max: int
) -> tuple[Float[Array, "places"], Int[Array, "places"]]:
    """Some entries and their places, among which are the `count` largest of all.

    The matrix is dealt out to tiles: the c-th stretch of columns of tile t is of row t - c. A row with many
    large entries, or a column, so falls to all tiles in equal parts, and twice the mean number of each is
    nearly always enough. Where it is not, all entries are looked at.
    """
    rows, n = values.shape
    each = 2 * -(-count_max // rows) + 16
    groups = n // GROUP
    if n % GROUP or groups < 2 * each:
        return _of_all(values, count_max)

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
        all_there = (best.min(axis=-1) < _kth(flat, count)).all()
        return jax.lax.cond(
            all_there, lambda found: found, lambda _: _of_all(values, flat.size), (flat, places)
        )

    return dealt(values, count)


def _of_all(values: Float[Array, "rows n"], count: int) -> tuple[Float[Array, "count"], Int[Array, "count"]]:
    """The `count` largest of all, and their places."""
    best, places = top(values.reshape(1, -1), count)
    return best[0], places[0]


def _keeps(values: Float[Array, "n"], k: Number) -> Bool[Array, "n"]:
    """Which are among the `k` largest; of equal ones the earlier."""
    return _cut(values, k).keeps(values, jnp.arange(values.size, dtype=jnp.int32))


def _cut(values: Float[Array, "n"], k: Number) -> Cut:
    """After the `k` largest of a row, of equal ones the earlier."""
    k = jnp.minimum(jnp.asarray(k).astype(jnp.int32), values.size)
    least = _kth(values, k)
    wanted = k - (values > least).sum(dtype=jnp.int32)
    return Cut(least, _nth(values == least, wanted - 1))


def _cut_anywhere(best: Float[Array, "places"], places: Int[Array, "places"], count: Int[Array, ""]) -> Cut:
    """After the `count` largest of these, whatever their order; of equal ones those at the earlier places."""
    least = _kth(best, count)
    # of those that equal it so many are wanted, the earliest: as the largest of negative numbers
    wanted = count - (best > least).sum(dtype=jnp.int32)
    return Cut(least, -_kth(jnp.where(best == least, -places, jnp.iinfo(places.dtype).min), wanted))


def _nth(mask: Bool[Array, "n"], numbers: Int[Array, "*some"]) -> Int[Array, "*some"]:
    """Where the entries of these numbers lie, among those that are set and from 0: by words of bits."""
    bits = jnp.arange(WORD, dtype=jnp.uint32)
    words = jnp.pad(mask, (0, -mask.size % WORD)).reshape(-1, WORD).astype(jnp.uint32)
    words = (words << bits).sum(axis=-1, dtype=jnp.uint32)
    counts = jax.lax.population_count(words).astype(jnp.int32)
    ends = jnp.cumsum(counts)
    word = jnp.minimum(jnp.searchsorted(ends, numbers, side="right"), words.size - 1).astype(jnp.int32)
    up_to_each = jax.lax.population_count(words[word][..., None] & (jnp.uint32(2) << bits) - 1)
    number = numbers - (ends - counts)[word]
    return word * WORD + (up_to_each.astype(jnp.int32) <= number[..., None]).sum(axis=-1, dtype=jnp.int32)


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

    # like the keys, so that it may differ between devices as they do
    key = jax.lax.fori_loop(0, bits, narrowed, jnp.zeros_like(keys, shape=()))
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
    places = origin[1] + jnp.arange(rows.shape[1], dtype=jnp.int32)
    values = _without_nan(rows)
    if whole:
        places = (origin[0] + jnp.arange(len(rows), dtype=jnp.int32))[:, None] * n + places
        if not sharding.in_force():
            return _cut_anywhere(*_contenders(rows, k, k_max), k).keeps(values, places)
        places, values = places.reshape(-1), values.reshape(1, -1)
    if split:
        best, where = top(values, min(k_max, values.shape[-1]))
        best, found = (
            jax.lax.all_gather(each, split, axis=each.ndim - 1, tiled=True) for each in (best, places[where])
        )
        found, best = jax.lax.sort((found, best), num_keys=1)
    else:
        best, where = _candidates(values, k_max)
        found = places[where]
    least, last = jax.vmap(_cut, in_axes=(0, None))(best, k)
    cut = Cut(least[:, None], jnp.take_along_axis(found, last[:, None], axis=-1))
    return cut.keeps(values, places).reshape(rows.shape)
