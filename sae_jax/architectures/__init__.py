"""Every architecture by name. Adding one is a file beside this one and a row in the table."""

import difflib
from collections.abc import Callable

from sae_jax.architectures.relu import relu
from sae_jax.base import SAE, InputError

TABLE: dict[str, Callable[..., SAE]] = {
    "relu": relu,
}


def find(name: str) -> Callable[..., SAE]:
    """The factory of that name.

    Args:
      name: a key of `TABLE`.

    Raises:
      InputError: no such name; the message lists those there are, the nearest first.
    """
    if name not in TABLE:
        nearness = lambda known: -difflib.SequenceMatcher(None, name, known).ratio()  # noqa: E731
        known = ", ".join(sorted(TABLE, key=nearness))
        raise InputError(f"no architecture is called {name!r}; there are: {known}")
    return TABLE[name]
