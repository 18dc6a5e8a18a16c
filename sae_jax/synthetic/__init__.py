"""Worlds whose features are known, each a traced source and its truth."""

from collections.abc import Callable

from sae_jax.base import require
from sae_jax.synthetic import directions, firing, hierarchy
from sae_jax.synthetic.benchmark import generated, synthsaebench_1k, synthsaebench_16k
from sae_jax.synthetic.exact_cases import hedging, matryoshka_tree, sparse_but_wrong
from sae_jax.synthetic.planted import Planted, planted
from sae_jax.synthetic.sharkey import sharkey_correlated, sharkey_uncorrelated
from sae_jax.synthetic.superposition import forty_in_five, toy_superposition
from sae_jax.synthetic.tokens import Tokens, features_found, seed_tokens
from sae_jax.synthetic.world import World, world

WORLDS: dict[str, Callable[..., World]] = {
    "toy_superposition": toy_superposition,
    "forty_in_five": forty_in_five,
    "sharkey_uncorrelated": sharkey_uncorrelated,
    "sharkey_correlated": sharkey_correlated,
    "hedging": hedging,
    "sparse_but_wrong": sparse_but_wrong,
    "matryoshka_tree": matryoshka_tree,
    "synthsaebench_1k": synthsaebench_1k,
    "synthsaebench_16k": synthsaebench_16k,
}
"""What the command line knows by name."""


def find(name: str) -> Callable[..., World]:
    """The world of that name.

    Raises:
      InputError: there is none; the message lists those that are.
    """
    require(name in WORLDS, f"there is no world {name!r}; there are: {', '.join(WORLDS)}")
    return WORLDS[name]


__all__ = [
    "WORLDS",
    "Planted",
    "Tokens",
    "World",
    "directions",
    "features_found",
    "find",
    "firing",
    "forty_in_five",
    "generated",
    "hedging",
    "hierarchy",
    "matryoshka_tree",
    "planted",
    "seed_tokens",
    "sharkey_correlated",
    "sharkey_uncorrelated",
    "sparse_but_wrong",
    "synthsaebench_1k",
    "synthsaebench_16k",
    "toy_superposition",
    "world",
]
