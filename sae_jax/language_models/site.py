"""A site: a place in a model that holds activations, by name."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from jaxtyping import Array

from sae_jax.base import require

Edit = Callable[[Array], Array]
"""`value -> value`, both [batch, context, width]; what it returns is cast to the site's dtype."""


class Site(NamedTuple):
    """A place that gives [batch, context, width] activations."""

    name: str
    width: int
    dtype: str
    kind: str
    """Class of the module that it belongs to."""


def nearest(name: str, names: Iterable[str]) -> str:
    """The three names that are most like `name`, for a reader who mistyped it."""
    return ", ".join(difflib.get_close_matches(name, list(names), n=3, cutoff=0.0))


def first(output: Any) -> Any:
    """What a site holds: the output itself, or the first element of a tuple or mapping."""
    elements = list(output.values()) if isinstance(output, Mapping) else output
    if isinstance(elements, tuple | list):
        return elements[0] if elements else None
    return output


def with_first(output: Any, value: Any) -> Any:
    """The output with `value` where `first` looks."""
    if isinstance(output, Mapping):
        return type(output)(**{**output, next(iter(output)): value})
    if isinstance(output, tuple | list):
        return type(output)([value, *output[1:]])
    return value


def flattened(name: str, value: Any, context: tuple[int, int]) -> Any:
    """The value as [batch, context, width], whatever its trailing axes; numpy, JAX and torch alike."""
    shape = tuple(getattr(value, "shape", ()))
    require(
        len(shape) > 2 and shape[:2] == tuple(context),
        f"{name} gives {list(shape) if shape else type(value).__name__} for tokens {list(context)}, "
        "not [batch, context, width]",
    )
    return value.reshape(*shape[:2], -1)


def require_same_shape(name: str, edited: Any, value: Any) -> None:
    """An edit keeps the shape of what it is given."""
    shape = list(getattr(edited, "shape", ()))
    require(
        shape == list(value.shape),
        f"the edit at {name} must return {list(value.shape)}, got {shape or type(edited).__name__}",
    )
