"""What the forms of other tools share: even bins, contexts by interval, JSON that any reader takes."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from sae_jax.base import InputError
from sae_jax.features.contexts import Context, contexts
from sae_jax.features.observed import NONE, Near, Observed, Seen

DIGITS = 6
"""Significant ones of an activation; a float32 has seven."""
INTERVALS = 5


class Interval(NamedTuple):
    """A fifth of a feature's activations, and contexts by chance whose largest activation is in it."""

    low: float
    high: float
    """It is of activations above `low` and not above `high`."""
    share: float
    """Of all tokens; in the lowest interval with those on which the feature is not active."""
    contexts: list[Context]


def largest(seen: Seen, feature: int) -> float:
    """The largest activation of a feature; 0 where it is never active."""
    strongest = seen.strongest
    there = strongest.rows[feature] != NONE
    return float(strongest.values[feature, there, strongest.before].max(initial=0))


def density(seen: Seen, feature: int) -> float:
    """The share of tokens on which a feature is active."""
    return short(seen.fired[feature] / seen.rows)


def counts(seen: Seen, feature: int, bins: int) -> Float[np.ndarray, "bins"]:
    """Tokens by activation in even bins from 0 to the largest one.

    The pass counts in bins that widen with the activation. Within each, tokens are taken to lie evenly, so
    that these are not whole numbers.
    """
    ends, below = _below(seen, feature)
    return np.diff(np.interp(np.linspace(0, ends[-1], bins + 1), ends, below))


def percentiles(seen: Seen, feature: int) -> Float[np.ndarray, "100"]:
    """The activations that 1, 2, ..., 100 in a hundred of those above 0 are not above; 0 without any."""
    ends, below = _below(seen, feature)
    return np.interp(below[-1] * np.arange(1, 101) / 100, below, ends)


def intervals(observed: Observed, feature: int) -> list[Interval]:
    """The fifths of a feature's activations, the highest first; none of a feature that is never active."""
    seen = observed.seen
    if seen.fired[feature] == 0:
        return []
    top, tokens = largest(seen, feature), counts(seen, feature, INTERVALS)
    tokens[0] += seen.rows - seen.fired[feature]
    ends = np.linspace(0, top, INTERVALS + 1)
    by_chance = contexts(observed, seen.by_chance, feature)
    which = np.searchsorted(ends[1:-1], [each.peak for each in by_chance])
    return [
        Interval(
            short(ends[number]),
            short(ends[number + 1]),
            short(tokens[number] / seen.rows),
            [each for each, its in zip(by_chance, which, strict=True) if its == number],
        )
        for number in reversed(range(INTERVALS))
    ]


def neighbours(near: Near, feature: int) -> tuple[list[int], list[float]]:
    """The places and values that there are of a feature."""
    there = (near.places[feature] != NONE) & np.isfinite(near.values[feature])
    return near.places[feature][there].tolist(), rounded(near.values[feature][there])


def words(observed: Observed, near: Near | None, feature: int) -> tuple[list[str], list[float]]:
    """The tokens to or from whose logits a feature adds or takes most, and by how much."""
    if near is None:
        return [], []
    places, values = neighbours(near, feature)
    return [observed.word(place) for place in places], values


def rounded(values: np.ndarray | Sequence[float]) -> list[float]:
    """As Python numbers of `DIGITS` digits."""
    # most activations are 0
    return [short(value) if value else 0.0 for value in np.asarray(values, np.float64).tolist()]


def short(value: float) -> float:
    """As a Python number of `DIGITS` digits."""
    return float(f"{value:.{DIGITS}g}")


def strict(document: Any) -> bytes:
    """A document as one line of JSON in UTF-8, whatever is in its texts.

    Raises:
      InputError: a number that is not finite, for which JSON has no form.
    """
    try:
        text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError:
        raise InputError("an activation is not finite, and JSON has no form for it") from None
    # half of a surrogate pair is no character
    return text.encode("utf-8", "replace")


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A folder beside another one, for what shall be there at once or not at all; removed in the end."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _below(seen: Seen, feature: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the bins end, from 0 to the largest activation, and how many activations lie below each end."""
    top = largest(seen, feature)
    some = int(np.searchsorted(seen.edges, top))
    ends = np.append(seen.edges[:some], top).astype(np.float64)
    below = np.append(0, np.cumsum(seen.histogram[feature, :some])).astype(np.float64)
    return ends, below
