"""The contexts in which a feature is active, as text."""

from typing import NamedTuple

import numpy as np

from sae_jax.features.observed import NONE, Examples, Observed

MARKS = "«", "»"
"""Around the token where the feature is strongest."""


class Context(NamedTuple):
    """One context, without what lies beyond its ends."""

    row: int
    """Of the token where the feature is strongest."""
    tokens: tuple[str, ...]
    values: tuple[float, ...]
    """The feature's activation on each."""
    place: int
    """Of the strongest token among them."""

    @property
    def peak(self) -> float:
        """The largest activation."""
        return self.values[self.place]

    @property
    def text(self) -> str:
        """The context with its strongest token in marks, " a «cat» sat"."""
        before, token, after = (
            self.tokens[: self.place],
            self.tokens[self.place],
            self.tokens[self.place + 1 :],
        )
        return "".join((*before, MARKS[0], token, MARKS[1], *after))


def contexts(observed: Observed, examples: Examples, feature: int) -> list[Context]:
    """A feature's contexts among the examples, the stronger first.

    Args:
      observed: what is known of the features.
      examples: `observed.seen.strongest` or `.by_chance`.
      feature: its number.

    Returns:
      Contexts. Rows without tokens go by their numbers, " row 17".
    """
    inside = ~np.isnan(examples.values[feature])
    begins, sizes = inside.argmax(axis=1).tolist(), inside.sum(axis=1).tolist()
    values, rows = examples.values[feature].tolist(), examples.rows[feature].tolist()
    tokens = None if examples.tokens is None else examples.tokens[feature].tolist()
    found = []
    for number, row in enumerate(rows):
        if row == NONE:
            continue
        begin, end = begins[number], begins[number] + sizes[number]
        if tokens is None:
            words = [f" row {row - examples.before + one}" for one in range(begin, end)]
        else:
            words = [observed.word(one) for one in tokens[number][begin:end]]
        found.append(Context(row, tuple(words), tuple(values[number][begin:end]), examples.before - begin))
    return found
