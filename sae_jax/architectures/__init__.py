"""Every architecture by name. Adding one is a file beside this one and a row in the table."""

import difflib
from collections.abc import Callable
from typing import Any

import numpy as np

from sae_jax import auxk, losses
from sae_jax.architectures.batch_topk import batch_topk
from sae_jax.architectures.crosscoder import crosscoder
from sae_jax.architectures.gated import gated
from sae_jax.architectures.jumprelu import jumprelu
from sae_jax.architectures.matryoshka import matryoshka
from sae_jax.architectures.relu import relu
from sae_jax.architectures.topk import topk
from sae_jax.architectures.transcoder import transcoder
from sae_jax.base import SAE, InputError, require

TABLE: dict[str, Callable[..., SAE]] = {
    "relu": relu,
    "topk": topk,
    "batch_topk": batch_topk,
    "jumprelu": jumprelu,
    "gated": gated,
    "matryoshka": matryoshka,
    "transcoder": transcoder,
    "crosscoder": crosscoder,
}

CONVENTIONS: dict[str, Callable[..., Any]] = {
    f"{module.__name__.split('.')[-1]}.{function.__name__}": function
    for module, functions in {
        auxk: (auxk.saelens, auxk.normalised, auxk.fvu, auxk.attached),
        losses: (
            losses.summed, losses.averaged, losses.unexplained,
            losses.step_l0, losses.tanh_l0, losses.quadratic_l0, losses.quadratic_mean_l0,
        ),
    }.items()
    for function in functions
}  # fmt: skip
"""Functions that are arguments of architectures, by the name that files and the command line know them by."""


def find(name: str) -> Callable[..., SAE]:
    """The factory of that name.

    Args:
      name: a key of `TABLE`.

    Raises:
      InputError: no such name; the message lists those there are, the nearest first.
    """
    return _find(name, TABLE, "architecture")


def convention(name: str) -> Callable[..., Any]:
    """What an argument that is a function is called by: an architecture, or one of `CONVENTIONS`.

    Raises:
      InputError: no such name.
    """
    return _find(name, {**TABLE, **CONVENTIONS}, "architecture or convention")


def describe(config: dict[str, Any]) -> dict[str, Any]:
    """An SAE's `config` in plain values, which JSON can hold.

    Raises:
      InputError: a function that has no name here, or an array.
    """
    return {name: _plain(name, value) for name, value in config.items()}


def build(description: dict[str, Any]) -> SAE:
    """The SAE that `describe` described.

    Raises:
      InputError: no such architecture, or arguments that it does not take.
    """
    arguments = dict(description)
    factory = find(str(arguments.pop("architecture", None)))
    live = {str: convention, list: tuple}
    arguments = {name: live.get(type(value), lambda same: same)(value) for name, value in arguments.items()}
    try:
        return factory(**arguments)
    except TypeError as error:
        raise InputError(f"{factory.__name__} cannot be built: {error}") from None


def _find(name: str, table: dict[str, Callable[..., Any]], kind: str) -> Callable[..., Any]:
    if name not in table:
        nearness = lambda known: -difflib.SequenceMatcher(None, name, known).ratio()  # noqa: E731
        known = ", ".join(sorted(table, key=nearness))
        raise InputError(f"no {kind} is called {name!r}; there are: {known}")
    return table[name]


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, str | bool | int | float | None):
        return value
    if isinstance(value, tuple | list):
        return [_plain(name, entry) for entry in value]
    if callable(value):
        named = next((key for key, known in {**TABLE, **CONVENTIONS}.items() if known is value), None)
        require(
            named is not None, f"{name} is a function that has no name here, so it cannot be written down"
        )
        return named
    require(np.ndim(value) == 0, f"{name} = {value!r} cannot be written as JSON")
    return np.asarray(value).item()
