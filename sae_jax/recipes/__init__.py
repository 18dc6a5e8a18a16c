"""Published training set-ups by name: each returns a factory and what makes its optimizer."""

import difflib
from collections.abc import Callable

from sae_jax.base import InputError
from sae_jax.recipes.dictionary_learning import (
    dictionary_learning_april,
    dictionary_learning_batchtopk,
    dictionary_learning_gated,
    dictionary_learning_jumprelu,
    dictionary_learning_matryoshka,
    dictionary_learning_standard,
    dictionary_learning_topk,
)
from sae_jax.recipes.papers import (
    anthropic_2023,
    anthropic_april_2024,
    gemma_scope,
    gemma_scope_2,
    openai_topk,
    seed,
    sparsify_topk,
)
from sae_jax.recipes.recipe import Recipe, recipe
from sae_jax.recipes.saelens import (
    saelens_batchtopk,
    saelens_gated,
    saelens_jumprelu,
    saelens_matryoshka,
    saelens_standard,
    saelens_topk,
)

RECIPES: dict[str, Callable[..., Recipe]] = {
    build.__name__: build
    for build in (
        seed, anthropic_2023, anthropic_april_2024, openai_topk, sparsify_topk, gemma_scope, gemma_scope_2,
        saelens_standard, saelens_topk, saelens_batchtopk, saelens_jumprelu, saelens_gated,
        saelens_matryoshka,
        dictionary_learning_standard, dictionary_learning_april, dictionary_learning_topk,
        dictionary_learning_batchtopk, dictionary_learning_jumprelu, dictionary_learning_gated,
        dictionary_learning_matryoshka,
    )
}  # fmt: skip
"""Every recipe by name."""


def find(name: str) -> Callable[..., Recipe]:
    """The recipe of that name.

    Args:
      name: a key of `RECIPES`.

    Raises:
      InputError: no such name; the message lists those there are, the nearest first.
    """
    if name not in RECIPES:
        nearness = lambda known: -difflib.SequenceMatcher(None, name, known).ratio()  # noqa: E731
        raise InputError(
            f"no recipe is called {name!r}; there are: {', '.join(sorted(RECIPES, key=nearness))}"
        )
    return RECIPES[name]


__all__ = [
    "RECIPES",
    "Recipe",
    "anthropic_2023",
    "anthropic_april_2024",
    "dictionary_learning_april",
    "dictionary_learning_batchtopk",
    "dictionary_learning_gated",
    "dictionary_learning_jumprelu",
    "dictionary_learning_matryoshka",
    "dictionary_learning_standard",
    "dictionary_learning_topk",
    "find",
    "gemma_scope",
    "gemma_scope_2",
    "openai_topk",
    "recipe",
    "saelens_batchtopk",
    "saelens_gated",
    "saelens_jumprelu",
    "saelens_matryoshka",
    "saelens_standard",
    "saelens_topk",
    "seed",
    "sparsify_topk",
]
