"""What features answer to: the contexts in which each is strongest, and what each makes likelier."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

BEFORE, AFTER = 12, 4
"""Tokens shown on either side of the one where a feature is strongest."""


class Strongest(NamedTuple):
    """Each feature's strongest rows, no two of them of one context."""

    values: Float[Array, "features shown"]
    rows: Int[Array, "features shown"]
    fired: Int[Array, "features"]
    """Rows on which it was active."""


def strongest(
    encode: Callable[[Array], Float[Array, "rows features"]],
    blocks: Iterator[Float[np.ndarray, "rows d_in"]],
    context: int,
    shown: int = 30,
) -> Strongest:
    """One pass over the rows of a store, a running top-k on the device.

    Args:
      encode: activations to features.
      blocks: the store's rows in order, each block whole contexts.
      context: rows per context.
      shown: how many contexts are kept per feature.
    """

    @jax.jit
    def seen(found: Strongest, x, first) -> Strongest:
        f = encode(x.astype(jnp.float32))
        by_context = f.reshape(-1, context, f.shape[-1])
        begins = first + context * jnp.arange(len(by_context), dtype=jnp.int32)
        values = jnp.concatenate([found.values, by_context.max(axis=1).T], axis=1)
        rows = jnp.concatenate([found.rows, (begins[:, None] + by_context.argmax(axis=1)).T], axis=1)
        values, places = jax.lax.top_k(values, shown)
        rows = jnp.take_along_axis(rows, places, axis=1)
        return Strongest(values, rows, found.fired + (f > 0).sum(axis=0))

    found, first = None, 0
    for x in blocks:
        if found is None:
            features = jax.eval_shape(encode, x).shape[-1]
            nothing = jnp.zeros((features, shown))
            found = Strongest(nothing, nothing.astype(jnp.int32), jnp.zeros(features, jnp.int32))
        found = seen(found, x, jnp.int32(first))
        first += len(x)
    return jax.tree.map(np.asarray, found)


class Shown(NamedTuple):
    """A feature in one of its contexts."""

    value: float
    before: str
    token: str
    after: str


def contexts_of(
    found: Strongest, feature: int, tokens: np.ndarray, context: int, spelling: Sequence[bytes]
) -> list[Shown]:
    """The strongest contexts of a feature, those that read alike but once.

    Args:
      found: from `strongest`.
      feature: which.
      tokens: of the store's rows.
      context: rows per context.
      spelling: what each token stands for.
    """
    text = partial(_text, spelling=spelling)
    shown = {}
    for value, row in zip(found.values[feature].tolist(), found.rows[feature].tolist(), strict=True):
        begin = row // context * context
        before = tokens[max(begin, row - BEFORE) : row]
        after = tokens[row + 1 : min(begin + context, row + 1 + AFTER)]
        near = (*before[-3:].tolist(), tokens[row], *after[:2].tolist())
        if value > 0:
            shown.setdefault(near, Shown(value, text(before), text(tokens[row : row + 1]), text(after)))
    return list(shown.values())


def _text(tokens: np.ndarray, spelling: Sequence[bytes]) -> str:
    return b"".join(spelling[token] for token in tokens.tolist()).decode(errors="replace")
