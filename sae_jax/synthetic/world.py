"""A world: rows made of features that are known, drawn on the device as they are asked for."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Integer, Key, UInt32

from sae_jax.base import Batch, known, require
from sae_jax.synthetic.firing import Copula, Drifting, Independent, Normal, Uniform, constant
from sae_jax.synthetic.hierarchy import Forest

NO_BATCH = 2**32 - 1
"""What no batch is numbered."""
HELD_OUT = 2**31
"""Batches from this number on are for measuring: no training step reaches them."""

Number = float | Float[Array, ""]
"""An argument of a world that may be traced, so that worlds can be vmapped over it."""
Seed = int | Integer[Array, ""]
"""From 0 to 2^32 - 1; it may be traced."""


@struct.dataclass
class World:
    """A traced source whose rows are sums of known features, and that knows them; see `world`.

    Vmapped worlds have one more axis, in front, on every array.
    """

    directions: Float[Array, "*worlds features d_in"]
    """Unit vectors, unless the world says otherwise."""
    bias: Float[Array, "*worlds d_in"]
    probabilities: Float[Array, "*worlds features"]
    """How often each feature fires: exact, except that rates which hang together are averaged over draws."""
    fires: Independent | Copula | Drifting
    magnitudes: Uniform | Normal
    forest: Forest | None
    seed: UInt32[Array, "*worlds"]
    batch_size: int = struct.field(pytree_node=False)

    @property
    def expected_l0(self) -> Float[Array, "*worlds"]:
        """How many features fire on a row, on average."""
        return self.probabilities.sum(axis=-1)

    def key(self, i: Seed) -> Key[Array, ""]:
        """What batch `i` is drawn from."""
        return jax.random.fold_in(jax.random.key(self.seed), jnp.uint32(i))

    def amounts(self, key: Key[Array, ""], rows: int) -> Float[Array, "rows features"]:
        """How much of each feature is in each of so many rows."""
        of_firing, of_magnitude, of_forest = jax.random.split(key, 3)
        fires = self.fires(of_firing, rows)
        amounts = jnp.where(fires, self.magnitudes(of_magnitude, fires.shape), 0)
        return amounts if self.forest is None else self.forest(of_forest, amounts)

    def rows_of(self, amounts: Float[Array, "rows features"]) -> Float[Array, "rows d_in"]:
        """x = a D + bias."""
        return amounts @ self.directions + self.bias

    def batch(self, i: Seed) -> Batch:
        """The batch of step `i`."""
        x = self.rows_of(self.amounts(self.key(i), self.batch_size))
        return Batch(x, x)

    def labelled(self, rows: int) -> Iterator[tuple[Batch, Float[Array, "rows features"]]]:
        """Held-out batches of about `rows` rows in all, one at least, with the amounts they are made of."""
        for number in range(max(1, round(rows / self.batch_size))):
            x, amounts = _drawn(self, jnp.uint32(HELD_OUT + number))
            yield Batch(x, x), amounts

    def evaluation(self, rows: int) -> Iterator[Batch]:
        """The same batches without their amounts."""
        return (batch for batch, _ in self.labelled(rows))


@jax.jit
def _drawn(
    world: World, number: UInt32[Array, ""]
) -> tuple[Float[Array, "rows d_in"], Float[Array, "rows features"]]:
    amounts = world.amounts(world.key(number), world.batch_size)
    return world.rows_of(amounts), amounts


def world(
    directions: Float[Any, "features d_in"],
    fires: Independent | Copula | Drifting,
    magnitudes: Uniform | Normal | None = None,
    *,
    forest: Forest | None = None,
    bias: Float[Any, "d_in"] | None = None,
    data_seed: Seed = 0,
    batch_size: int = 1024,
) -> World:
    """A world out of its parts.

        x = a D + bias;   a_i = magnitude_i where feature i fires, else 0

    Args:
      directions: a row per feature.
      fires: which features are candidates, from `independent`, `low_rank` or `correlated`.
      magnitudes: how strongly; None for always 1.
      forest: which candidates stay, from `forest`; None for all.
      bias: added to every row; None for nothing.
      data_seed: names the rows.
      batch_size: rows per step.

    Returns:
      A `World`: a source for `sweep` and `run`, and its truth.

    Raises:
      InputError: parts that are not of the same features, no features or dimensions, a batch size below 1,
        or a seed that does not fit 32 bits.

    Example:
      >>> two = world(jnp.eye(2, 50), independent(np.array([0.25, 0.2])))
      >>> two.batch(0).x.shape, round(two.expected_l0.item(), 6)
      ((1024, 50), 0.45)
    """
    require(batch_size >= 1, f"batch_size must be at least 1, got {batch_size}")
    require_seed(data_seed)
    directions = jnp.asarray(directions, float)
    full = directions.ndim == 2 and directions.size > 0
    require(full, f"directions must be [features, d_in], at least one each, got {list(directions.shape)}")
    features, d_in = directions.shape
    magnitudes = constant(features) if magnitudes is None else magnitudes
    bias = jnp.zeros(d_in) if bias is None else jnp.asarray(bias, float)
    require(bias.shape == (d_in,), f"the bias of rows of {d_in} columns is [{d_in}], got {list(bias.shape)}")
    for name, part in (("fires", fires), ("magnitudes", magnitudes), ("forest", forest)):
        for leaf in jax.tree.leaves(part)[:1]:
            require(
                len(leaf) == features,
                f"there are {features} directions, but {name} is of {len(leaf)} features",
            )
    return World(
        directions,
        bias,
        rates(fires, magnitudes, forest),
        fires,
        magnitudes,
        forest,
        jnp.uint32(data_seed),
        batch_size,
    )


def rates(
    fires: Independent | Copula | Drifting, magnitudes: Uniform | Normal, forest: Forest | None
) -> Float[Array, "features"]:
    """How often each feature is in a row with an amount above 0."""
    if forest is None:
        return jnp.asarray(fires.alone() * magnitudes.positive(), float)
    positive = np.asarray(magnitudes.positive(), np.float64)
    blocks = [forest.rates(given * positive).mean(axis=0) for given in fires.given()]
    return jnp.asarray(np.mean(blocks, axis=0), float)


def require_seed(seed: Seed) -> None:
    """A seed fits 32 bits."""
    good = not known(seed) or bool(0 <= seed < 2**32)
    require(good, f"a seed must be a whole number from 0 to 2^32 - 1, got {seed}")


def key_of(seed: Seed) -> Key[Array, ""]:
    """What a world of this seed is drawn from.

    Raises:
      InputError: it does not fit 32 bits.
    """
    require_seed(seed)
    # an SAE of the same seed draws from the seed's own key, and would start on this world's directions
    return jax.random.fold_in(jax.random.key(jnp.uint32(seed)), NO_BATCH)
