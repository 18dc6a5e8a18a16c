"""Features of which each row has few: products and gradients that touch the chosen entries alone.

Of the five products of a dense step, 2 B d F FLOPs each, four meet only k of F latents in every row. With the
chosen entries in the order of rows and in that of latents, all four are one of two operations: sums of a
table's rows by segments, and dot products of pairs of rows.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Scalar

from sae_jax import sharding
from sae_jax.base import Batch, Info, InputError, Params, Progress
from sae_jax.segments import row_dots, segment_sum

WORTH = {"cpu": 64, "gpu": 512, "tpu": 512}
"""From which d_sae / k on the sparse way is taken; measured on a CPU only (docs/performance.md)."""
SMALL = 2**26
"""Multiply-adds of a product below which the dense way is."""


def pays(sparse: bool | None, rows: int, d_in: int, d_sae: int, k: float | None) -> bool:
    """Whether a loss goes the sparse way: as it was asked for, or by the sizes.

    On a mesh of several devices it is always the dense one.

    Args:
      sparse: what the user says; None for nothing.
      rows, d_in, d_sae: of a product.
      k: entries of a row, at most; None where it is not known.
    """
    if sharding.in_force() or sparse is False or k is None:
        return False
    worth = WORTH.get(jax.default_backend(), WORTH["gpu"])
    return sparse is True or (rows * d_in * d_sae >= SMALL and d_sae >= worth * k)


class Places(NamedTuple):
    """Where the entries of a sparse matrix [rows, d_sae] lie, row after row; and in the order of latents."""

    rows: Int[Array, "entries"]
    latents: Int[Array, "entries"]
    row_starts: Int[Array, "row_bounds"]
    """The first entry of each row, and the end of the last."""
    by_latent: Int[Array, "entries"]
    """Numbers of entries, latent after latent; those in no use come last."""
    latent_starts: Int[Array, "latent_bounds"]

    @staticmethod
    def per_row_of(latents: Int[Array, "rows k"], used: Bool[Array, "rows k"], d_sae: int) -> "Places":
        """As many entries in each row; those that are not `used` have to be 0."""
        count, k = latents.shape
        rows = jnp.repeat(jnp.arange(count, dtype=jnp.int32), k)
        row_starts = jnp.arange(count + 1, dtype=jnp.int32) * k
        flat = latents.reshape(-1).astype(jnp.int32)
        return Places(rows, flat, row_starts, *_grouped(flat, used.reshape(-1), d_sae))

    @staticmethod
    def of(
        flat: Int[Array, "places"], used: Bool[Array, "places"], most: int, count: int, d_sae: int
    ) -> "Places":
        """At most so many entries, at the places `row d_sae + latent` in any order."""
        flat = jnp.sort(jnp.where(used, flat, count * d_sae))[:most]
        rows, latents = flat // d_sae, flat % d_sae
        row_starts = _starts(rows, count)
        used = rows < count
        rows, latents = jnp.where(used, rows, 0), jnp.where(used, latents, 0)
        return Places(rows, latents, row_starts, *_grouped(latents, used, d_sae))


def _grouped(latents: Int[Array, "entries"], used: Bool[Array, "entries"], d_sae: int):
    """Numbers of entries in the order of latents, and where each latent's begin."""
    entries, wanted = latents.size, jnp.where(used, latents, d_sae)
    if (d_sae + 1) * entries < 2**32:
        # one number to sort by is four times as quick as a number and what goes with it
        packed = wanted.astype(jnp.uint32) * entries + jnp.arange(entries, dtype=jnp.uint32)
        packed = jnp.sort(packed)
        order, ordered = (packed % entries).astype(jnp.int32), (packed // entries).astype(jnp.int32)
    else:
        order = jnp.argsort(wanted).astype(jnp.int32)
        ordered = wanted[order]
    return order, _starts(ordered, d_sae)


def _starts(ordered: Int[Array, "entries"], groups: int) -> Int[Array, "bounds"]:
    return jnp.searchsorted(ordered, jnp.arange(groups + 1, dtype=ordered.dtype)).astype(jnp.int32)


Rounding = Callable[[Array], Array]
"""What becomes of the operands of a product."""


def as_it_is(array: Array) -> Array:
    """Not rounded."""
    return array


@struct.dataclass
class Few:
    """Features [rows, d_sae] by their chosen entries."""

    values: Float[Array, "entries"]
    places: Places
    each: int | None = struct.field(pytree_node=False)
    """How many entries each row has; None where they differ."""

    def __mul__(self, factors: Float[Array, "d_sae"]) -> "Few":
        """Each feature times a factor of its latent."""
        return replace(self, values=self.values * factors[self.places.latents])

    def times(self, W: Float[Array, "d_sae d"], rounding: Rounding = as_it_is) -> Float[Array, "rows d"]:
        """The product with a matrix, of rounded operands, and so its gradients."""
        return _times((rounding, self.each), self.values, self.places, W)

    def relu(self) -> "Few":
        """Rectified."""
        return replace(self, values=jax.nn.relu(self.values))

    def l0(self) -> Scalar:
        """Mean number of entries above 0 per row."""
        rows = self.places.row_starts.size - 1
        return ((self.values > 0).sum() / rows).astype(self.values.dtype)

    def fired(self) -> Bool[Array, "d_sae"]:
        """Which latents have an entry above 0."""
        latents = self.places.latents
        silent = jnp.zeros(self.places.latent_starts.size - 1, bool)
        return silent.at[jnp.where(self.values > 0, latents, silent.size)].set(True, mode="drop")

    def smallest(self) -> Scalar:
        """The smallest entry above 0; infinite where there is none."""
        return jnp.min(self.values, where=self.values > 0, initial=jnp.inf)


@struct.dataclass
class Encoded:
    """Pre-activations that remember what they were made of, so that the gradient of few of them is cheap."""

    pre: Float[Array, "rows d_sae"]
    params: Params
    x: Float[Array, "rows d_in"]
    apply_b_dec_to_input: bool = struct.field(pytree_node=False)
    rounding: Rounding = struct.field(pytree_node=False, default=as_it_is)
    factors: Float[Array, "d_sae"] | None = None

    def __mul__(self, factors: Float[Array, "d_sae"]) -> "Encoded":
        """Each pre-activation times a factor of its latent."""
        return replace(self, factors=factors)

    @property
    def values(self) -> Float[Array, "rows d_sae"]:
        """All of them; no gradient flows through these."""
        pre = self.pre if self.factors is None else self.pre * self.factors
        return jax.lax.stop_gradient(pre)

    @property
    def dtype(self):
        """Of the pre-activations."""
        return self.pre.dtype

    def at(self, places: Places, each: int | None) -> Few:
        """Some of them; `each` as in `Few`."""
        W_enc, b_enc, b_dec = (self.params[name] for name in ("W_enc", "b_enc", "b_dec"))
        b_dec = b_dec if self.apply_b_dec_to_input else None
        taken: Any = _taken((self.rounding, each), W_enc, b_enc, b_dec, self.x, self.pre, places)
        few = Few(taken, places, each)
        return few if self.factors is None else few * self.factors

    def per_row(self, latents: Int[Array, "rows k"], used: Bool[Array, "rows k"]) -> Few:
        """As many of each row; 0 where one is not used."""
        few = self.at(Places.per_row_of(latents, used, self.pre.shape[1]), latents.shape[1])
        return replace(few, values=jnp.where(used.reshape(-1), few.values, 0))

    def of_all(self, flat: Int[Array, "places"], used: Bool[Array, "places"], most: int) -> Few:
        """At most so many of all, at the places `row d_sae + latent`; entries in no use are 0."""
        few = self.at(Places.of(flat, used, most, *self.pre.shape), None)
        return replace(few, values=jnp.where(jnp.arange(few.values.size) < used.sum(), few.values, 0))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _taken(how, W_enc, b_enc, b_dec, x, pre, places: Places) -> Float[Array, "entries"]:
    """`pre` at the places; its gradient goes to the weights that `pre` was made by."""
    return pre[places.rows, places.latents]


def _taken_forward(how, W_enc, b_enc, b_dec, x, pre, places):
    return _taken(how, W_enc, b_enc, b_dec, x, pre, places), (W_enc, b_dec, x, places)


def _taken_backward(how, kept, gradient):
    """`dL/dW_enc^T = D^T (x - b_dec)` for the sparse D of `gradient`; `dL/db_dec = -W_enc dL/db_enc`."""
    (rounding, each), (W_enc, b_dec, x, places) = how, kept
    centred = rounding(x if b_dec is None else x - b_dec)
    dW_enc = _to_latents(rounding(gradient), places, centred, turned=True)
    db_enc = jnp.zeros(W_enc.shape[1], gradient.dtype).at[places.latents].add(gradient)
    # no product of matrices, whose precision would be another's choice
    db_dec = None if b_dec is None else -(rounding(W_enc) * db_enc).sum(axis=1)
    dx = segment_sum(rounding(gradient), places.latents, places.row_starts, rounding(W_enc).T, each)
    return dW_enc, db_enc, db_dec, dx, None, None


_taken.defvjp(_taken_forward, _taken_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _times(how, values, places: Places, W) -> Float[Array, "rows d"]:
    rounding, each = how
    return segment_sum(rounding(values), places.latents, places.row_starts, rounding(W), each)


def _times_forward(how, values, places, W):
    return _times(how, values, places, W), (values, places, W)


def _times_backward(how, kept, gradient):
    """`dL/dvalue_bi = g_b . W_i`, `dL/dW_i = sum_b value_bi g_b`, for g = dL/d(product)."""
    (rounding, _), (values, places, W) = how, kept
    values, W, gradient = map(rounding, (values, W, gradient))
    to_values = row_dots(gradient, places.rows, W, places.latents)
    return to_values, None, _to_latents(values, places, gradient)


_times.defvjp(_times_forward, _times_backward)


def _to_latents(values, places: Places, table, turned: bool = False) -> Float[Array, "..."]:
    order = places.by_latent
    return segment_sum(values[order], places.rows[order], places.latent_starts, table, turned=turned)


Loss = Callable[[Any, Params, Batch, Progress], tuple[Scalar, Info]]
"""`(hyper, params, batch, progress) -> (value, info)`."""


def one_by_one(loss: Loss, instead: Loss, needed: Callable[[Any, Progress], Bool[Array, ""]]) -> Loss:
    """`loss` where it is needed, and `instead` where not, of members side by side each by itself.

    What a member chose differs from member to member, and so does whether one needs the longer loss: under
    `vmap` members follow one another, and of the two losses one alone is computed, with its gradient.

    Args:
      loss: differentiable by its `params`.
      instead: equal to it wherever it is not needed.
      needed: tells from hyper-parameters and progress.

    Returns:
      A loss with a gradient by `params` alone.

    Raises:
      InputError: when a gradient by anything else is asked for.
    """
    both = [jax.value_and_grad(each, argnums=1, has_aux=True) for each in (loss, instead)]

    @jax.custom_batching.sequential_vmap
    def valued(*arguments):
        return jax.lax.cond(needed(arguments[0], arguments[3]), loss, instead, *arguments)

    @jax.custom_batching.sequential_vmap
    def derived(*arguments):
        return jax.lax.cond(needed(arguments[0], arguments[3]), *both, *arguments)

    @jax.custom_vjp
    def one(*arguments):
        return valued(*arguments)

    def forward(*arguments):
        for number in (0, 2):
            if any(leaf.perturbed for leaf in jax.tree.leaves(arguments[number], is_leaf=_is_primal)):
                raise InputError(
                    "the sparse way has a gradient by the weights alone: build with sparse=False"
                )
        values = jax.tree.map(lambda leaf: leaf.value, arguments, is_leaf=_is_primal)
        return derived(*values)

    def backward(gradients, cotangents):
        factor = cotangents[0]
        scaled = jax.tree.map(lambda leaf: leaf * factor.astype(leaf.dtype), gradients)
        return None, scaled, None, None

    one.defvjp(forward, backward, symbolic_zeros=True)
    return one


def _is_primal(leaf: Any) -> bool:
    return hasattr(leaf, "perturbed")
