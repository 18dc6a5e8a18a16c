"""A source over rows that do not fit in memory: read ahead by a thread, in an order that is computed."""

import math
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Int, Int64, Shaped

from sae_jax import sharding
from sae_jax.base import Batch, require
from sae_jax.data.order import Order
from sae_jax.data.rows import Rows
from sae_jax.data.source import Source

WINDOW_ROWS = 65_536
"""Rows that are mixed among one another, if nothing else is said."""
BLOCKS_AHEAD = 1
"""Blocks read, or being read, beside the one in use and the one that waits."""
READERS = 4
"""Threads that read chunks side by side."""
LANES = 16
"""As many hosts can share the reading, if nothing else is said."""
SAMPLED = 16
"""Chunks whose first rows stand for the content, where two sources are compared."""

Item = TypeVar("Item")


@struct.dataclass
class Block:
    """The batches of some consecutive steps, on the device."""

    columns: tuple[Shaped[Array, "steps batch *_"], ...]
    """x and, if there are targets, y. Half precisions as uint16: to slice bfloat16, XLA's CPU compiler would
    widen a whole block each time."""
    first: Int[Array | np.ndarray, ""]
    """The step of the first batch."""
    dtypes: tuple[np.dtype, ...] = struct.field(pytree_node=False)
    """Of the rows themselves."""

    @property
    def batch_size(self) -> int:
        """Rows per step."""
        return self.columns[0].shape[1]

    def batch(self, i: Int[Array, ""]) -> Batch:
        """The batch of step `i`."""
        columns = zip(self.columns, self.dtypes, strict=True)
        return as_batch(*(_as(column[i - self.first], dtype) for column, dtype in columns))

    def evaluation(self, rows: int) -> Iterator[Batch]:
        """The block's own batches."""
        yield from (self.batch(self.first + jnp.int32(i)) for i in range(len(self.columns[0])))


@struct.dataclass
class Stored:
    """Rows in a store or a file, mixed within windows; see `stored`."""

    sample: Shaped[Array | np.ndarray, "sampled *d_in"]
    """A few rows, by which the data are told from others."""
    x: Rows = struct.field(pytree_node=False)
    y: Rows | None = struct.field(pytree_node=False)
    order: Order = struct.field(pytree_node=False)
    lanes: frozenset[int] | None = struct.field(pytree_node=False)
    """Which parts of every batch are read here; None for all."""
    mesh: Mesh | None = struct.field(pytree_node=False, default=None)
    """Where batches go; None for the first device."""

    @property
    def batch_size(self) -> int:
        """Rows per step, of those that are read here."""
        whole = self.order.batch_size
        return whole if self.lanes is None else whole // self.order.lanes * len(self.lanes)

    def batch(self, i: Int[Array, ""]) -> Batch:
        """The batch of step `i`, read on its own: `stages` is the quick way through many."""
        shapes = [
            jax.ShapeDtypeStruct(
                (self.batch_size, *rows.shape[1:]), jax.dtypes.canonicalize_dtype(rows.dtype)
            )
            for rows in self._columns
        ]

        def read(i) -> list[np.ndarray]:
            _, columns = next(self._blocks(int(i), int(i) + 1))
            return [column[0].astype(shape.dtype) for column, shape in zip(columns, shapes, strict=True)]

        return as_batch(*jax.pure_callback(read, shapes, i))

    def stages(self, start: int, steps: int) -> Iterator[tuple[Source, int]]:
        """Blocks that hold the steps from `start` on, each with the step before which it ends.

        A thread reads a block ahead and brings it to the device. At most three are held at a time.
        """
        # the switch for double precision is each thread's own
        exact = jax.dtypes.canonicalize_dtype(np.float64) == np.float64

        def blocks() -> Iterator[tuple[Source, int]]:
            first = start
            for count, columns in self._blocks(start, steps):
                with jax.enable_x64(exact):
                    held = tuple(self._put(_bits(column)) for column in columns)
                    dtypes = tuple(rows.dtype for rows in self._columns)
                    block = Block(held, np.asarray(first, np.int32), dtypes)
                first += count
                yield block, min(first, steps)

        return read_ahead(blocks(), BLOCKS_AHEAD)

    def evaluation(self, rows: int) -> Iterator[Batch]:
        """About `rows` rows in stretches spread evenly, each row at most once."""
        size = self.x.chunk_rows
        chunks, wanted = -(-len(self.x) // size), -(-min(rows, len(self.x)) // size)
        spread = np.unique(np.linspace(0, chunks - 1, wanted).astype(int)) * size
        stretches = ((start, min(start + size, len(self.x))) for start in spread.tolist())
        pieces = ([rows.read(*stretch) for rows in self._columns] for stretch in stretches)
        # grouped alike, however many share the reading of training batches
        batches = rebatched(pieces, self.order.batch_size)
        return (as_batch(*map(self._everywhere, each)) for each in batches)

    def on_mesh(self, mesh: Mesh) -> "Stored":
        """The same batches on a mesh: each process reads the lanes that its devices take.

        Raises:
          InputError: the processes cannot share the lanes evenly.
        """
        return replace(self, lanes=_lanes_of(sharding.share(mesh), self.order.lanes), mesh=mesh)

    def _put(self, local: np.ndarray) -> Array:
        return jax.device_put(local) if self.mesh is None else sharding.from_shares(local, self.mesh)

    def _everywhere(self, whole: np.ndarray) -> Array:
        return jnp.asarray(whole) if self.mesh is None else sharding.placed(whole, self.mesh)

    @property
    def _columns(self) -> list[Rows]:
        return [self.x] if self.y is None else [self.x, self.y]

    def _blocks(self, start: int, steps: int) -> Iterator[tuple[int, list[np.ndarray]]]:
        """How many steps, and their rows [capacity, batch, d]; what lies beyond those steps is no one's."""
        size = self.batch_size
        most = min(len(self.x), self.order.window_chunks * self.x.chunk_rows)
        capacity = 2 + most // self.order.batch_size
        over = [np.empty((0, *rows.shape[1:]), rows.dtype) for rows in self._columns]
        buffers = [Buffers((capacity * size, *rows.shape[1:]), rows.dtype) for rows in self._columns]
        with ThreadPoolExecutor(READERS) as pool:
            for window in self.order.windows(start * self.order.batch_size, self.lanes):
                carried = len(over[0])
                total = carried + len(window.rows)
                # counted by the whole stream, so that all who share it hold the same steps
                count = window.stop // self.order.batch_size - start
                blocks = [each.take() for each in buffers]
                for block, rest, rows in zip(blocks, over, self._columns, strict=True):
                    block[:carried] = rest
                    gather(rows, window.rows, block[carried:total], pool)
                over = [block[count * size : total].copy() for block in blocks]
                if count:
                    yield count, [block.reshape(capacity, size, *block.shape[1:]) for block in blocks]
                start += count
                if start >= steps:
                    return


def stored(
    x: Rows,
    batch_size: int = 1024,
    seed: int = 0,
    *,
    y: Rows | None = None,
    window_rows: int = WINDOW_ROWS,
    lanes: int | None = None,
    share: tuple[int, int] = (0, 1),
) -> Stored:
    """A source over rows that are read as training goes on: a site of a store, or a file.

    Chunks come in an order that is new each epoch, and rows are mixed within a window of chunks. Every row
    comes exactly once per epoch. Batch i depends on nothing but the data, the arguments and i, so a run that
    stops goes on with the rows that it would have seen. While a sweep trains on one window the next is read.

    Args:
      x: from `store.site(name)`, `open_rows(path)`, or `side_by_side` of several for a crosscoder.
      batch_size: rows per step, of all hosts together.
      seed: names the order of the rows.
      y: what a transcoder should give, another site of the same store.
      window_rows: about how many rows are mixed among one another. On the host four times as many are held,
        on the device up to three times.
      lanes: into how many parts batches are cut, so that several hosts can share the reading: a multiple of
        their number; None for as many of 16 as the batch allows. It takes part in the order of the rows; how
        many hosts there are does not.
      share: (which, of how many) hosts: this one reads that share of the lanes.

    Returns:
      A source for `run` and `sweep`.

    Raises:
      InputError: a seed that does not fit, sizes under 1, rows of `y` that are not those of `x`, lanes that
        do not divide the batch or that the hosts cannot share evenly.

    Example:
      >>> source = stored(open_store("acts/").site("mlp.hidden"), batch_size=1024, seed=0)
      >>> sweep(partial(topk, 512, 4096), grid=grid(k=[8, 16, 32], lr=[1e-3]), source=source, steps=5000)
    """
    require(0 <= seed < 2**32, f"seed must be at least 0 and below 2^32, got {seed}")
    for name, size in (("batch_size", batch_size), ("window_rows", window_rows)):
        require(size >= 1, f"{name} must be at least 1, got {size}")
    require(lanes is None or lanes >= 1, f"lanes must be at least 1, got {lanes}")
    if y is not None:
        require(len(y) == len(x), f"{x.label} has {len(x)} rows but {y.label} has {len(y)}")
    batch_size = min(batch_size, len(x))
    lanes = math.gcd(batch_size, LANES) if lanes is None else lanes
    require(batch_size % lanes == 0, f"{lanes} lanes do not divide a batch of {batch_size} rows")
    own = _lanes_of(share, lanes)
    # a window holds a batch at least, so that each window brings some step to its end
    chunks = max(1, -(-max(window_rows, batch_size) // x.chunk_rows))
    order = Order(len(x), x.chunk_rows, chunks, batch_size, seed, lanes)
    some = np.unique(np.linspace(0, len(x) - 1, SAMPLED).astype(int)).tolist()
    sample = np.concatenate([x.read(row, row + 1) for row in some]).astype(np.float32)
    return Stored(sample, x, y, order, own)


def _lanes_of(share: tuple[int, int], lanes: int) -> frozenset[int] | None:
    """The lanes of one of several hosts; None for all of them."""
    which, hosts = share
    require(0 <= which < hosts, f"share is (which, of how many), got {share}")
    require(lanes % hosts == 0, f"{hosts} hosts cannot share {lanes} lanes evenly")
    several = lanes // hosts
    return None if hosts == 1 else frozenset(range(which * several, (which + 1) * several))


class Buffers:
    """Arrays of one shape, handed out again once nothing refers to them: fresh memory is slow to touch.

    They begin on a multiple of 64 bytes, so that a CPU device uses them where they lie.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype):
        self._shape, self._dtype = shape, dtype
        self._free: list[np.ndarray] = []

    def take(self) -> np.ndarray:
        """An array that nobody else has, of any content."""
        size = math.prod(self._shape) * self._dtype.itemsize
        memory = self._free.pop() if self._free else np.empty(size + 64, np.uint8)
        begin = -memory.ctypes.data % 64
        flat = np.frombuffer(memory.data[begin : begin + size], self._dtype)
        # every view holds on to `flat` itself, so that it lives until the last of them is gone
        weakref.finalize(flat, self._free.append, memory)
        return flat.reshape(self._shape)


def gather(rows: Rows, wanted: Int64[np.ndarray, "n"], out: np.ndarray, pool: ThreadPoolExecutor) -> None:
    """Put the wanted rows into `out`, in their order; each chunk is read once, several at a time."""
    places = np.argsort(wanted)
    numbers, begins = np.unique(wanted[places] // rows.chunk_rows, return_index=True)

    def read(number: int, where: np.ndarray) -> None:
        start = number * rows.chunk_rows
        found = rows.read(start, min(start + rows.chunk_rows, len(rows)))
        out[where] = found if len(where) == len(found) else found[wanted[where] - start]

    list(pool.map(read, numbers.tolist(), np.split(places, begins[1:])))


def rebatched(pieces: Iterator[list[np.ndarray]], size: int) -> Iterator[list[np.ndarray]]:
    """Columns that come in pieces of any length, in pieces of `size` rows and a last one of what is left."""
    over: list[np.ndarray] = []
    for piece in pieces:
        whole = [np.concatenate(parts) for parts in zip(over, piece, strict=True)] if over else piece
        end = len(whole[0]) // size * size
        for begin in range(0, end, size):
            yield [column[begin : begin + size] for column in whole]
        over = [column[end:] for column in whole]
    if over and len(over[0]):
        yield over


def read_ahead(items: Iterator[Item], depth: int) -> Iterator[Item]:
    """The same items, made by a thread while the one before is in use; `depth` more than that one wait."""
    pool = ThreadPoolExecutor(1)
    try:
        waiting = deque(pool.submit(next, items, None) for _ in range(depth + 1))
        while (item := waiting.popleft().result()) is not None:
            waiting.append(pool.submit(next, items, None))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint16) if array.dtype.itemsize == 2 else array


def _as(array: Array, dtype: np.dtype) -> Array:
    return jax.lax.bitcast_convert_type(array, dtype) if dtype.itemsize == 2 else array


def as_batch(x: Array, y: Array | None = None) -> Batch:
    """In float32 where the data are of half precision."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return Batch(x, x if y is None else y.astype(jnp.promote_types(y.dtype, jnp.float32)))
