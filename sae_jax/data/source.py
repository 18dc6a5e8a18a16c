"""A source answers one question: which batch is step i's?"""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt32

from sae_jax import sharding
from sae_jax.base import Batch, require
from sae_jax.data.permutation import divmod_product, mix, permute


@runtime_checkable
class Source(Protocol):
    """A pytree whose `batch(i)` depends on nothing but itself and `i`, and can be traced."""

    @property
    def batch_size(self) -> int:
        """Rows per step."""
        ...

    def batch(self, i: Int[Array, ""]) -> Batch:
        """The batch of step `i`."""
        ...

    def evaluation(self, rows: int) -> Iterator[Batch]:
        """Batches of about `rows` rows in all to measure on, each row at most once."""
        ...


@jax.jit
def _batch(source: Source, i: Int[Array, ""]) -> Batch:
    return source.batch(i)


def batch_shape(source: Source) -> Batch:
    """The shapes of a source's batches; traced once for all sources of a kind, and none is computed."""
    return jax.eval_shape(_batch, source, jnp.int32(0))


@runtime_checkable
class Streamed(Protocol):
    """A source that is quicker to go through than to ask: it reads ahead."""

    def stages(self, start: int, steps: int) -> Iterator[tuple[Source, int]]:
        """Sources that hold the steps from `start` on, each with the step before which it ends."""
        ...


def stages(source: Source, start: int, steps: int) -> Iterator[tuple[Source, int]]:
    """The sources that hold the steps from `start` to `steps - 1`, each with the step before which it ends.

    All but a `Streamed` one serve for all steps.
    """
    if isinstance(source, Streamed):
        return source.stages(start, steps)
    return iter([(source, steps)])


@runtime_checkable
class Placeable(Protocol):
    """A source that lies on a mesh in a way of its own."""

    def on_mesh(self, mesh: Mesh) -> Source:
        """The same batches, as arrays of the mesh."""
        ...


def on_mesh(source: Source, mesh: Mesh) -> Source:
    """A source whose batches are arrays of a mesh.

    What is in memory, and what is computed, lies on every device; of what is read, each process reads its
    share.
    """
    return source.on_mesh(mesh) if isinstance(source, Placeable) else sharding.placed(source, mesh)


@struct.dataclass
class InMemory:
    """Rows of an array, reshuffled every epoch; see `in_memory`."""

    x: Float[Array, "n *d_in"]
    y: Float[Array, "n *d_out"] | None
    seed: UInt32[Array, ""]
    batch_size: int = struct.field(pytree_node=False)

    def rows(self, i: Int[Array, ""]) -> Int[Array, "batch"]:
        """Which rows make up batch `i`."""
        size = len(self.x)
        epoch, offset = divmod_product(jnp.uint32(i), self.batch_size, size)
        position = offset + jnp.arange(self.batch_size, dtype=jnp.uint32)
        beyond = position >= size
        epoch = mix(epoch + beyond + mix(self.seed))
        return permute(jnp.where(beyond, position - size, position), size, epoch).astype(jnp.int32)

    def take(self, rows) -> Batch:
        """The batch of those rows."""
        x = self.x[rows]
        return Batch(x, x if self.y is None else self.y[rows])

    def batch(self, i: Int[Array, ""]) -> Batch:
        """The batch of step `i`: all rows where the batch is the whole, else the next of the shuffle."""
        whole = self.batch_size == len(self.x)
        return self.take(slice(None)) if whole else self.take(self.rows(i))

    def evaluation(self, rows: int) -> Iterator[Batch]:
        """Every row once, in order; where there are more than `rows`, that many spread evenly."""
        chosen = np.unique(np.linspace(0, len(self.x) - 1, min(rows, len(self.x))).astype(np.int64))
        for start in range(0, len(chosen), self.batch_size):
            yield self.take(chosen[start : start + self.batch_size])


def in_memory(
    x: Float[Array | np.ndarray, "n *d_in"] | list,
    batch_size: int = 1024,
    seed: int = 0,
    *,
    y: Float[Array, "n d_out"] | Float[np.ndarray, "n d_out"] | None = None,
) -> InMemory:
    """A source over an array that fits in device memory.

    Batches follow one another through a shuffle of the rows, a new one each epoch, and run on over the
    epoch's end: every row comes exactly once per epoch. The shuffle is computed, not stored, so batch i
    is had at once, in any order, inside a compiled loop.

    Args:
      x: activations, [n, d_in], float; of several sources, for a crosscoder, [n, sources, d_in].
      batch_size: rows per step; where it reaches n, every batch is all rows in order.
      seed: names the order of the rows.
      y: targets [n, d_out] of the same rows, for a transcoder; None where the SAE gives back `x`.

    Returns:
      A source.

    Raises:
      InputError: not [n, d], no rows, not floating point, or `y` of another length.

    Example:
      >>> source = in_memory(x, batch_size=256, seed=0)
      >>> source.batch(7).x.shape
      (256, 32)
    """
    x = np.asarray(x) if isinstance(x, list) else x
    for name, array in [("x", x)] if y is None else [("x", x), ("y", y)]:
        fits = array.ndim in (2, 3)
        require(fits, f"{name} must be [rows, width] (or [rows, sources, width]), got {tuple(array.shape)}")
        require(len(array) > 0, f"{name} has no rows")
        require(
            jnp.issubdtype(array.dtype, jnp.floating), f"{name} must be floating point, got {array.dtype}"
        )
    require(y is None or len(y) == len(x), f"x has {len(x)} rows but y has {len(y) if y is not None else 0}")
    require(0 <= seed < 2**32, f"seed must be at least 0 and below 2^32, got {seed}")
    require(batch_size >= 1, f"batch_size must be at least 1, got {batch_size}")
    require(len(x) < 2**30, f"an array in memory holds fewer than 2^30 rows, got {len(x)}")
    return InMemory(
        jnp.asarray(x), None if y is None else jnp.asarray(y), jnp.uint32(seed), min(batch_size, len(x))
    )
