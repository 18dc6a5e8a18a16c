"""What a recipe is: a published training set-up by name, with every constant as its source has it."""

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import optax

from sae_jax.base import SAE, InputError, require


class Recipe(NamedTuple):
    """A factory and what makes its optimizer; `sweep(*recipe, grid=..., ...)` takes both.

    Example:
      >>> factory, optimizer = recipes.saelens_topk(d_in=64, d_sae=256, k=8)
      >>> sae, chain = factory(), optimizer()
      >>> result = sweep(factory, optimizer, grid=grid(k=[4, 8, 16]), source=source, steps=5000)
    """

    factory: Callable[..., SAE]
    """Everything bound; what is not a shape can still be swept."""
    optimizer: Callable[..., optax.GradientTransformation]
    """`optimizer(learning_rate=...)`, the source's own learning rate by default."""


def recipe(build: Callable[..., Recipe]) -> Callable[..., Recipe]:
    """Make `build` say in one sentence that it fixes what it is asked to change."""
    signature = inspect.signature(build)

    @functools.wraps(build)
    def checked(**keywords) -> Recipe:
        strange = [name for name in keywords if name not in signature.parameters]
        if strange:
            raise InputError(
                f"recipes.{build.__name__} fixes {strange[0]!r}, or knows nothing of it; "
                f"it takes: {', '.join(signature.parameters)}"
            )
        missing = [
            name
            for name, parameter in signature.parameters.items()
            if parameter.default is parameter.empty and name not in keywords
        ]
        if missing:
            raise InputError(f"recipes.{build.__name__} needs {', '.join(missing)}")
        # some take a learning rate from the width before any architecture has looked at it
        for name in ("d_in", "d_sae"):
            require(keywords.get(name, 1) >= 1, f"{name} must be at least 1, got {keywords.get(name)}")
        return build(**keywords)

    return checked
