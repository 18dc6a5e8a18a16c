"""Activations of flax nnx models, by `nnx.capture`.

A site is a dotted path: `layers.0` is what that module's `__call__` gives (of a tuple, the first element),
`layers.0.hidden` what its method `hidden` gives, or a value that it sows under that name. What runs more
than once in a forward pass counts the first time. The model is left as it is: a copy runs, with the weights
of the moment, in evaluation mode, compiled once per shape of tokens. Where tokens are PADDING, the model is
given just that: right for a model that looks only back, and a sign to one that looks both ways.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from sae_jax.base import InputError, known, require
from sae_jax.language_models.site import (
    Edit,
    Site,
    first,
    flattened,
    nearest,
    require_same_shape,
    with_first,
)

Tokens = Int[Array | np.ndarray, "batch context"]


def sites(model: nnx.Module, context: int = 7) -> tuple[Site, ...]:
    """The methods and sown values that give [batch, context, ...] floats, found by tracing the model.

    Args:
      model: its `__call__` takes tokens [batch, context].
      context: tokens in the trial. A number unlike any other in the model tells this axis from heads, say.

    Returns:
      Sites in alphabetical order; `__call__` is the whole model's output.
    """
    tokens = jax.ShapeDtypeStruct((2, context), jnp.int32)
    graphdef, state = nnx.split(model)
    values = jax.eval_shape(lambda *given: _run(nnx.merge(graphdef, given[0]), given[1])[1], state, tokens)
    kinds = {_name(path): type(module).__name__ for path, module in nnx.iter_modules(model)}
    return tuple(
        Site(name, int(np.prod(value.shape[2:])), str(value.dtype), kinds.get(name) or kinds[_owner(name)])
        for name, value in values.items()
        if value.ndim > 2 and value.shape[:2] == (2, context) and jnp.issubdtype(value.dtype, jnp.floating)
    )


def capture(
    model: nnx.Module, names: Iterable[str]
) -> Callable[[Tokens], dict[str, Float[Array, "batch context _"]]]:
    """A function from tokens to the activations of these sites.

    Compiled, so that what comes after the last site is not computed.

    Args:
      model: its `__call__` takes tokens [batch, context].
      names: of sites.

    Returns:
      A function of tokens [batch, context] that gives by name [batch, context, width] in the sites' own
      dtypes; axes beyond the context are flattened.

    Raises:
      InputError: no sites; when called, one that does not exist or gives another shape.

    Example:
      >>> activations = capture(model, ["layers.0.hidden"])
      >>> activations(tokens)["layers.0.hidden"].shape
      (32, 128, 512)
    """
    names = tuple(dict.fromkeys(names))
    require(len(names) > 0, "name at least one site to take activations from")

    def activations(tokens: Tokens) -> dict[str, Float[Array, "batch context _"]]:
        values = _values(*nnx.split(model), tokens, names)
        return {name: values[name] for name in names}

    return activations


def splice(model: nnx.Module, name: str) -> Callable[..., Float[Array, "batch context vocabulary"]]:
    """A function from tokens and an edit to the logits with the site's value replaced.

    One compiled program gives the site's value, `edit` runs outside of it, and another program goes on with
    what it returns. So nothing recompiles from edit to edit, and an edit may close over traced arrays; the
    layers before the site run twice.

    Args:
      model: its `__call__` takes tokens [batch, context] and gives logits [batch, context, vocabulary].
      name: of a site that is the output of a method.

    Returns:
      `(tokens, edit=None) -> logits`. `edit` is given the site's value [batch, context, width] and gives back
      one of that shape, which is cast to the site's dtype; None leaves the model as it is.

    Raises:
      InputError: when called, as for `capture`, a sown value, which no method reads back, an edit that
        changes the shape, a model that gives no logits, or tokens beyond their vocabulary.

    Example:
      >>> spliced = splice(model, "layers.0.hidden")
      >>> logits = spliced(tokens, lambda x: sae.decode(params, sae.encode(params, x)))
    """
    values = capture(model, [name])

    def spliced(tokens: Tokens, edit: Edit | None = None) -> Float[Array, "batch context vocabulary"]:
        if edit is None:
            logits = _logits(*nnx.split(model), tokens, None, None)
        else:
            value = values(tokens)[name]
            edited = edit(value)
            require_same_shape(name, edited, value)
            logits = _logits(*nnx.split(model), tokens, name, edited)
        largest, vocabulary = tokens.max() if known(tokens) else 0, logits.shape[-1]
        require(
            int(largest) < vocabulary,
            f"model and tokenizer do not match: the largest token is {largest}, and "
            f"{type(model).__name__} gives logits for {vocabulary}, from 0",
        )
        return logits

    return spliced


@partial(jax.jit, static_argnums=(0, 3))
def _values(graphdef, state, tokens, names):
    model = nnx.merge(graphdef, state)
    _, values = _run(model, tokens)
    for name in names:
        if name not in values:
            kind, near = type(model).__name__, nearest(name, values)
            raise InputError(f"{kind} has no site {name}; the nearest are {near}")
    return {name: flattened(name, values[name], tokens.shape) for name in names}


@partial(jax.jit, static_argnums=(0, 3))
def _logits(graphdef, state, tokens, name, value):
    model = nnx.merge(graphdef, state)
    if name is not None:
        _replace(model, tokens, name, value)
    logits, _ = _run(model, tokens)
    kind, shape = type(model).__name__, tuple(getattr(logits, "shape", ()))
    require(
        len(shape) == 3 and shape[:2] == tokens.shape,
        f"{kind} must give logits [batch, context, vocabulary] for tokens {list(tokens.shape)}, "
        f"got {list(shape) or type(logits).__name__}",
    )
    return logits


def _replace(model: nnx.Module, tokens: Array, name: str, value: Array) -> None:
    """Let a method of one module return `value` the first time: what only led to its own is not computed."""
    found = _method(model, name)
    if found is None:
        methods = [site for site in _run(model, tokens)[1] if _method(model, site)]
        raise InputError(
            f"{name} is sown and not what a method gives, so it cannot be replaced; "
            f"{nearest(name, methods)} can"
        )
    module, method = found
    kind, waiting = type(module), [value]

    def replaced(self, *args, **kwargs):
        output = getattr(kind, method)(self, *args, **kwargs)
        if not waiting:
            return output
        own = first(output)
        return with_first(output, waiting.pop().astype(own.dtype).reshape(own.shape))

    # of this one instance: other modules of its class stay as they are
    module.__class__ = type(kind.__name__, (kind,), {method: replaced})


def _method(model: nnx.Module, name: str) -> tuple[nnx.Module, str] | None:
    """The module and the method that give a site its value; None where it is sown."""
    modules = {_name(path): module for path, module in nnx.iter_modules(model)}
    if name in modules:
        return modules[name], "__call__"
    module, method = modules[_owner(name)], name.rpartition(".")[2]
    return (module, method) if callable(getattr(type(module), method, None)) else None


def _run(model: nnx.Module, tokens: Array) -> tuple[Any, dict[str, Array]]:
    """What the model gives for tokens, and the value of each site."""
    model.eval()
    output, caught = nnx.capture(model, nnx.Intermediate, method_outputs=nnx.Intermediate)(tokens)
    values = {_name(path): first(first(variable.get_value())) for path, variable in nnx.to_flat_state(caught)}
    return output, {name: value for name, value in values.items() if isinstance(value, jax.Array)}


def _name(path: tuple) -> str:
    return ".".join(map(str, path)).removesuffix(".__call__")


def _owner(name: str) -> str:
    return name.rpartition(".")[0]
