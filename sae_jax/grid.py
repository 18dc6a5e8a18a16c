"""Which members a sweep has: a table of hyper-parameters, one row per member."""

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Array

from sae_jax.base import InputError, require

Grid = dict[str, np.ndarray]
"""Columns of equal length, by the name of the hyper-parameter."""


Axis = Sequence[float] | np.ndarray | Array
"""The values of one hyper-parameter."""


def zipped(**axes: Axis) -> Grid:
    """Axes walked together: member i takes the i-th value of each.

    Args:
      axes: values by name, all of one length.

    Returns:
      A grid of that many members.

    Raises:
      InputError: an empty axis, one that is not a list of numbers, or lengths that differ.

    Example:
      >>> zipped(l1=[0.1, 0.2], lr=[1e-3, 1e-4])["lr"]
      array([0.001 , 0.0001])
    """
    require(bool(axes), "zipped needs at least one axis, such as l1=[0.01, 0.1]")
    columns = {name: _column(name, values) for name, values in axes.items()}
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise InputError(f"axes walked together must be of one length, but {listed}")
    return columns


def grid(*tables: Grid, **axes: Axis) -> Grid:
    """The product of axes, and of grids made before: every combination, the last named varying fastest.

    Args:
      tables: grids such as `zipped(...)`, each one axis of the product.
      axes: values by name.

    Returns:
      A grid whose length is the product of the lengths.

    Raises:
      InputError: an axis that is empty, not a list of numbers, or given twice.

    Example:
      >>> len(grid(zipped(l1=[0.1, 0.2], lr=[1e-3, 1e-4]), seed=range(8))["seed"])
      16
    """
    parts = [*tables, *({name: _column(name, values)} for name, values in axes.items())]
    names = [name for part in parts for name in part]
    twice = next((name for name in names if names.count(name) > 1), None)
    require(twice is None, f"axis {twice!r} is given twice")
    require(bool(names), "a grid needs at least one axis, such as l1=[0.01, 0.1]")
    picks = list(itertools.product(*(range(members(part)) for part in parts)))
    rows = np.array(picks).T
    return {name: part[name][row] for part, row in zip(parts, rows, strict=True) for name in part}


def members(table: Grid) -> int:
    """How many members a grid has."""
    return len(next(iter(table.values())))


def parse_axis(text: str) -> list[float]:
    """Read an axis as the command line writes it: `A:B:N`, `a,b,c`, or one number.

    Args:
      text: `A:B:N` for N values from A to B evenly spaced in their logarithm, ends included; values with
        commas between as they stand.

    Returns:
      The values.

    Raises:
      InputError: not a number, a range that is reversed or not positive, or fewer than one value.

    Example:
      >>> parse_axis("0.01:1:3")
      [0.01, 0.1, 1.0]
    """
    if ":" not in text:
        return [_number(part, text) for part in text.split(",")]
    parts = text.split(":")
    require(len(parts) == 3, f"a range is written A:B:N (N log-spaced values from A to B), got {text!r}")
    low, high, count = (_number(part, text) for part in parts)
    require(low > 0, f"a log-spaced range must start above 0, got {text!r}")
    require(high >= low, f"range {text!r} is reversed: write it from the smaller to the larger value")
    require(count == int(count) and 1 <= count <= 1e6, f"N in {text!r} must be a whole number from 1 on")
    require(count > 1 or low == high, f"range {text!r} asks for one value between two ends")
    inner = np.geomspace(low, high, int(count))[1:-1].tolist() if count > 2 else []
    return [low, *inner, high][: int(count)]


def _number(part: str, text: str) -> float:
    try:
        value = float(part)
    except ValueError:
        raise InputError(f"{part.strip()!r} in {text!r} is not a number") from None
    require(bool(np.isfinite(value)), f"{part.strip()!r} in {text!r} is not finite")
    return value


def _column(name: str, values: Axis) -> np.ndarray:
    try:
        column = np.asarray(values)
    except ValueError:  # a list of lists of several lengths
        column = np.empty((0, 0))
    is_axis = column.ndim == 1 and column.dtype.kind in "iuf"
    require(is_axis, f"axis {name!r} must be a list of numbers, got {values!r}")
    require(len(column) > 0, f"axis {name!r} has no values")
    return column
