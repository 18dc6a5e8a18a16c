"""The vocabulary: what an SAE is, what a step reads, what it leaves behind."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

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
    """What one step sees. `y` is what the decoder should give: `x` itself, or a transcoder's target."""

    x: Float[Array, "batch d_in"]
    y: Float[Array, "batch d_out"]


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

    `init(key, dtype) -> params`, `encode(params, x) -> f`, `decode(params, f) -> x_hat`,
    `loss(params, batch, progress) -> (scalar, Info)`.
    """

    init: Callable[..., Params]
    encode: Callable[[Params, Float[Array, "*batch d_in"]], Float[Array, "*batch d_sae"]]
    decode: Callable[[Params, Float[Array, "*batch d_sae"]], Float[Array, "*batch d_out"]]
    loss: Callable[[Params, Batch, Progress], tuple[Scalar, Info]]
    config: dict[str, Any] = field(default_factory=dict)
    """`{"architecture": name, argument: value, ...}`: enough to build the same SAE again."""


class TrainState(NamedTuple):
    """All that the next step needs."""

    params: Params
    opt_state: Any
    progress: Progress


def architecture(build: Callable[..., SAE]) -> Callable[..., SAE]:
    """Make `build` note its own name and arguments in the `config` of the SAE it returns."""
    signature = inspect.signature(build)

    @functools.wraps(build)
    def factory(*args, **kwargs) -> SAE:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        for name in ("d_in", "d_sae"):
            size = bound.arguments[name]
            require(size >= 1, f"{name} must be at least 1, got {size}")
            require(size < 2**31, f"{name} must be below 2^31, got {size}")
        return replace(build(*args, **kwargs), config={"architecture": build.__name__, **bound.arguments})

    return factory
