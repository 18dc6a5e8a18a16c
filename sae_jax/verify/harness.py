"""Train an SAE here and a module in PyTorch from the same weights on the same batches, and compare."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sae_jax.base import SAE, Batch, InputError, Params, require
from sae_jax.train import make_step, state_from

if TYPE_CHECKING:
    import torch

BOUNDS = {
    "float64": {"forward": 1e-9, "loss": 1e-9, "gradients": 1e-9, "trained": 1e-9},
    # One float32 rounding is 6e-8; sums of some hundred terms and 500 Adam steps, which divide by the root
    # of squared gradients, widen it.
    "float32": {"forward": 1e-5, "loss": 1e-5, "gradients": 1e-4, "trained": 1e-2},
}
"""The largest relative error allowed, by dtype and stage."""


class Report(NamedTuple):
    """Largest relative errors: per quantity, and per stage against its bound."""

    dtype: str
    steps: int
    errors: dict[str, dict[str, float]]
    """Stage (`forward`, `loss`, `gradients`, `trained`) -> quantity -> max |a - b| / max |b|."""
    bounds: dict[str, float]

    @property
    def worst(self) -> dict[str, float]:
        """Stage -> its largest error; NaN counts as infinite."""
        return {stage: max(map(_nan_is_infinite, errors.values())) for stage, errors in self.errors.items()}

    @property
    def ok(self) -> bool:
        """Whether every stage is within its bound."""
        return all(error <= self.bounds[stage] for stage, error in self.worst.items())


def compare(
    sae: SAE,
    optimizer: optax.GradientTransformation,
    params: Params,
    *,
    module: "torch.nn.Module",
    names: Mapping[str, str],
    observe: Callable[["torch.nn.Module", "torch.Tensor"], dict[str, "torch.Tensor"]],
    torch_optimizer: Callable[[Any], "torch.optim.Optimizer"],
    batches: np.ndarray,
    steps: int = 500,
    dtype: str = "float64",
    after_step: Callable[["torch.nn.Module"], None] | None = None,
    bounds: Mapping[str, float] | None = None,
) -> Report:
    """Hold an SAE against any PyTorch module that claims to be the same model.

    Both start from `params` and see batch i mod n at step i. Compared are: what the first forward pass
    gives; the loss and each of its terms; the gradient of every parameter; every parameter after `steps`
    optimizer steps.

    Args:
      sae: the model here.
      optimizer: its optax chain.
      params: initial weights, numpy or JAX.
      module: the model there; its parameters are overwritten.
      names: our parameter names to the module's; `.T` at the end says that the tensor is transposed there:
        `{"W_enc": "encoder.0.weight.T", "b_enc": "encoder.0.bias", ...}`. Each parameter of the module must
        be named.
      observe: `(module, x) -> tensors by name`: `loss`, and any of `f`, `x_hat` and the names of our logs
        (`reconstruction`, `sparsity`, `l0`); what it leaves out is not compared.
      torch_optimizer: makes the optimizer from the module's parameters.
      batches: [n, batch, d_in].
      steps: how long to train.
      dtype: "float64" or "float32".
      after_step: what is done to the module after each step, a constraint on the decoder say.
      bounds: largest relative error by stage; None for `BOUNDS[dtype]`.

    Returns:
      A `Report`.

    Raises:
      InputError: names or shapes that do not match, or an `observe` without `loss`.

    Example:
      >>> report = compare(sae, optax.adam(1e-2), params, module=mine, names=names, observe=terms,
      ...                  torch_optimizer=lambda p: torch.optim.Adam(p, lr=1e-2), batches=batches)
      >>> report.ok, report.worst
    """
    require(steps >= 1, f"steps must be at least 1, got {steps}")
    require(dtype in BOUNDS, f"dtype must be one of {', '.join(BOUNDS)}, got {dtype!r}")
    require(
        batches.ndim == 3 and len(batches) > 0, f"batches must be [n, batch, d_in], got shape {batches.shape}"
    )
    with jax.enable_x64(True) if dtype == "float64" else nullcontext():
        ours = _train_here(sae, optimizer, params, batches, steps, dtype)
    theirs = _train_there(module, names, observe, torch_optimizer, params, batches, steps, dtype, after_step)
    for stage in ours:
        unknown = sorted(set(theirs[stage]) - set(ours[stage]))
        require(
            not unknown, f"observe gives {', '.join(unknown)}, but here there are {', '.join(ours[stage])}"
        )
    errors = {
        stage: {name: relative_error(ours[stage][name], theirs[stage][name]) for name in theirs[stage]}
        for stage in ours
    }
    errors = {stage: by_name for stage, by_name in errors.items() if by_name}
    return Report(dtype, steps, errors, dict(bounds or BOUNDS[dtype]))


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """`max |a - b| / max |b|`; infinite where the shapes differ, absolute where all of b is 0."""
    if ours.shape != theirs.shape:
        return float("inf")
    return float(np.abs(ours - theirs).max() / (np.abs(theirs).max() or 1.0))


def _train_here(sae, optimizer, params, batches, steps, dtype) -> dict[str, dict[str, np.ndarray]]:
    params = {name: jnp.asarray(leaf, dtype) for name, leaf in params.items()}
    data = [Batch(x, x) for x in jnp.asarray(batches, dtype)]
    state = state_from(params, optimizer)
    # Default matrix products on an accelerator round to fewer bits than the dtype has.
    with jax.default_matmul_precision("highest"):
        f = sae.encode(params, data[0].x)
        (value, info), gradients = jax.value_and_grad(sae.loss, has_aux=True)(params, data[0], state.progress)
        forward = {"f": f, "x_hat": sae.decode(params, f)}
        step = jax.jit(make_step(sae, optimizer))
        for i in range(steps):
            state, _ = step(state, data[i % len(data)])
    stages = {
        "forward": forward,
        "loss": {"loss": value, **info.logs},
        "gradients": gradients,
        "trained": state.params,
    }
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), stages)


def _train_there(
    module, names, observe, torch_optimizer, params, batches, steps, dtype, after_step
) -> dict[str, dict[str, np.ndarray]]:
    import torch

    module.to(getattr(torch, dtype))
    parameters = dict(module.named_parameters())
    _require_names(parameters, names, params)
    tensors = {ours: parameters[theirs.removesuffix(".T")] for ours, theirs in names.items()}

    def as_ours(name: str, tensor: torch.Tensor) -> np.ndarray:
        array = tensor.detach().to(torch.float64).numpy().copy()
        return array.T if names[name].endswith(".T") else array

    with torch.no_grad():
        for name, tensor in tensors.items():
            start = torch.as_tensor(np.array(params[name], np.float64))
            tensor.copy_(start.T if names[name].endswith(".T") else start)
    data = torch.as_tensor(batches).to(getattr(torch, dtype))

    seen = observe(module, data[0])
    require("loss" in seen, f"observe must give a 'loss', got {', '.join(seen) or 'nothing'}")
    module.zero_grad()
    seen["loss"].backward()
    arrays = {name: tensor.detach().to(torch.float64).numpy() for name, tensor in seen.items()}
    forward = ("f", "x_hat")
    stages = {
        "forward": {name: array for name, array in arrays.items() if name in forward},
        "loss": {name: array for name, array in arrays.items() if name not in forward},
        "gradients": {name: as_ours(name, _gradient(name, tensor)) for name, tensor in tensors.items()},
    }

    optimizer = torch_optimizer(module.parameters())
    for i in range(steps):
        optimizer.zero_grad()
        observe(module, data[i % len(data)])["loss"].backward()
        optimizer.step()
        if after_step is not None:
            with torch.no_grad():
                after_step(module)
    return {**stages, "trained": {name: as_ours(name, tensor) for name, tensor in tensors.items()}}


def _gradient(name: str, tensor: "torch.Tensor") -> "torch.Tensor":
    if tensor.grad is None:
        raise InputError(f"the module's loss does not depend on the parameter that {name} is mapped to")
    return tensor.grad


def _require_names(parameters: Mapping[str, Any], names: Mapping[str, str], params: Params) -> None:
    missing = [name for name in params if name not in names]
    require(not missing, f"the map names no counterpart of {', '.join(missing)}")
    strange = [name for name in names if name not in params]
    require(not strange, f"the map names {', '.join(strange)}, but the SAE has {', '.join(params)}")
    theirs = {name.removesuffix(".T") for name in names.values()}
    unknown = sorted(theirs - set(parameters))
    require(not unknown, f"the module has no parameter {', '.join(unknown)}; it has {', '.join(parameters)}")
    unnamed = sorted(set(parameters) - theirs)
    require(not unnamed, f"the map leaves out the module's {', '.join(unnamed)}")
    for name, path in names.items():
        shape = tuple(parameters[path.removesuffix(".T")].shape)
        shape = shape[::-1] if path.endswith(".T") else shape
        ours = tuple(np.shape(params[name]))
        require(
            ours == shape, f"{name} is {ours} here, but {path} is {shape} there; transposed ones end in .T"
        )


def _nan_is_infinite(error: float) -> float:
    return float("inf") if np.isnan(error) else error
