"""The vocabulary: what an SAE is, what a step reads, what it leaves behind."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, NamedTuple

from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Scalar

Params = dict[str, Any]
"""Weights by the field's names: `W_enc`, `b_enc`, `W_dec`, `b_dec`, and what an architecture adds.

The leaves are arrays, JAX's or numpy's."""


class InputError(ValueError):
    """Something the caller gave cannot be used; the message is one sentence that says what to do."""


def require(condition: bool, sentence: str) -> None:
    """Raise `InputError(sentence)` unless `condition` holds."""
    if not condition:
        raise InputError(sentence)


class Batch(NamedTuple):
    """What one step sees. `y` is what the decoder should give: `x` itself, or a transcoder's target.

    A crosscoder's rows are [sources, d_in]; everyone else's [d_in].
    """

    x: Float[Array, "batch *d_in"]
    y: Float[Array, "batch *d_out"]


class Progress(NamedTuple):
    """What a loss or an optimizer may need to know of the training so far."""

    step: Int[Array, ""]
    since_fired: Int[Array, "d_sae"]
    """Steps since each latent was last active."""


class Info(NamedTuple):
    """What a loss tells beside its value."""

    logs: dict[str, Scalar]
    """Scalars for a reader, by name."""
    fired: Bool[Array, "d_sae"]
    """Which latents were active on some row of the batch."""
    assigned: Params
    """Leaves that are set rather than learned: they replace those of the same name after the update."""


@dataclass(frozen=True, eq=False)
class SAE:
    """Four pure functions and the call that made them; hashable by identity, so it may be static to `jit`.

    `init(key, dtype) -> params`, `encode(params, x) -> f`, `decode(params, f, x) -> x_hat`,
    `loss(params, batch, progress) -> (scalar, Info)`. To `decode`, `x` is the input that `f` was encoded
    from; only a skip connection looks at it, and without it gives the decoder's part alone.
    """

    init: Callable[..., Params]
    encode: Callable[[Params, Float[Array, "*batch d_in"]], Float[Array, "*batch d_sae"]]
    decode: Callable[..., Float[Array, "*batch d_out"]]
    loss: Callable[[Params, Batch, Progress], tuple[Scalar, Info]]
    config: dict[str, Any] = field(default_factory=dict)
    """`{"architecture": name, argument: value, ...}`: enough to build the same SAE again."""


class TrainState(NamedTuple):
    """All that the next step needs."""

    params: Params
    opt_state: Any
    progress: Progress


def known(value: Any) -> bool:
    """Whether a number is here to be looked at, and not an abstract one that is being traced."""
    return not isinstance(value, Tracer)


def require_weight(name: str, value: Any) -> None:
    """A penalty's weight is finite and not negative."""
    good = not known(value) or bool(0 <= value < inf)
    require(good, f"{name} must be finite and not negative, got {value}")


def require_positive(name: str, value: Any) -> None:
    """A number that is divided by, or is a power, lies above 0; None is left out."""
    good = value is None or not known(value) or bool(0 < value < inf)
    require(good, f"{name} must be finite and above 0, got {value}")


def require_target(target_l0: Any, d_sae: int) -> None:
    """A target L0 lies above 0 and at most at the number of latents; None is no target."""
    good = target_l0 is None or not known(target_l0) or bool(0 < target_l0 <= d_sae)
    require(good, f"target_l0 must be above 0 and at most d_sae = {d_sae}, got {target_l0}")


def require_k(k: Any, d_sae: int, whole: bool, k_max: Any = None) -> None:
    """The k of a TopK lies above 0, and at most at the number of latents and at its own bound."""
    if known(k) and k_max is not None:
        require(bool(k <= k_max), f"k must be at most k_max = {k_max}, got {k}")
    if known(k):
        require(bool(0 < k <= d_sae), f"k must be above 0 and at most d_sae = {d_sae}, got {k}")
        require(not whole or bool(k == int(k)), f"k must be a whole number, got {k}")


def architecture(build: Callable[..., SAE]) -> Callable[..., SAE]:
    """Make `build` note its own name and arguments in the `config` of the SAE it returns."""
    signature = inspect.signature(build)

    @functools.wraps(build)
    def factory(*args, **kwargs) -> SAE:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        for parameter in signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                arguments |= arguments.pop(parameter.name)
        for name in ("d_in", "d_sae"):
            size = arguments[name]
            require(size >= 1, f"{name} must be at least 1, got {size}")
            require(size < 2**31, f"{name} must be below 2^31, got {size}")
        return replace(build(*args, **kwargs), config={"architecture": build.__name__, **arguments})

    return factory
