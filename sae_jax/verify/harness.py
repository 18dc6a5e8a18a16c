"""Train an SAE here and a module in PyTorch from the same weights on the same batches, and compare."""

from collections.abc import Callable, Iterator, Mapping
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
    means: dict[str, float] | None = None
    """Each term of the loss here, averaged over the steps: one that is 0 throughout has proved nothing."""
    trajectory: dict[str, list[float]] | None = None
    """The error of every parameter after each step, where `compare` followed them."""

    @property
    def parted(self) -> tuple[int, str] | None:
        """The first step after which a parameter is past the bound, and which is furthest; None for never."""
        for step, errors in enumerate(zip(*(self.trajectory or {}).values(), strict=True), 1):
            error, name = max(zip(map(_nan_is_infinite, errors), self.trajectory or {}, strict=True))
            if error > self.bounds["trained"]:
                return step, name
        return None

    @property
    def worst(self) -> dict[str, float]:
        """Stage -> its largest error; NaN counts as infinite."""
        return {stage: max(map(_nan_is_infinite, errors.values())) for stage, errors in self.errors.items()}

    @property
    def ok(self) -> bool:
        """Whether every stage is within its bound, and every step that was followed."""
        within = all(error <= self.bounds[stage] for stage, error in self.worst.items())
        return within and self.parted is None


def compare(
    sae: SAE,
    optimizer: optax.GradientTransformation,
    params: Params,
    *,
    module: "torch.nn.Module",
    names: Mapping[str, str],
    observe: Callable[..., dict[str, "torch.Tensor"]],
    torch_optimizer: Callable[[Any], "torch.optim.Optimizer"],
    batches: np.ndarray,
    targets: np.ndarray | None = None,
    steps: int = 500,
    dtype: str = "float64",
    since_fired: np.ndarray | None = None,
    after_backward: Callable[["torch.nn.Module"], None] | None = None,
    after_step: Callable[["torch.nn.Module"], None] | None = None,
    bounds: Mapping[str, float] | None = None,
    follow: bool = False,
) -> Report:
    """Hold an SAE against any PyTorch module that claims to be the same model.

    Both start from `params` and see batch i mod n at step i. Compared are: what the first forward pass
    gives; the loss and each of its terms; the gradient of every parameter; every parameter after `steps`
    optimizer steps, and the mean of every term over them.

    `observe` is called once per step, in order, so a module may keep its own count of steps, of dead
    latents, of a threshold's average, in buffers.

    Args:
      sae: the model here.
      optimizer: its optax chain.
      params: initial weights, numpy or JAX.
      module: the model there; its parameters are overwritten.
      names: our parameter names to the module's; `.T` at the end says that the tensor is transposed there:
        `{"W_enc": "encoder.0.weight.T", "b_enc": "encoder.0.bias", ...}`. Each parameter of the module must
        be named. A leaf that is set rather than learned (`threshold` of `batch_topk`, `log_penalty`) may be
        a buffer there; a buffer has no gradient, so ours must be 0.
      observe: `(module, x) -> tensors by name`, or `(module, x, y)` where there are targets: `loss`, and any
        of `f`, `x_hat` and the names of our logs (`reconstruction`, `sparsity`, `l0`); what it leaves out is
        not compared. `f` is what `sae.encode` gives, which for `batch_topk` goes by the threshold.
      torch_optimizer: makes the optimizer from the module's parameters.
      batches: [n, batch, d_in]; of a crosscoder [n, batch, sources, d_in].
      targets: [n, batch, d_out]; None for `batches` themselves.
      steps: how long to train.
      dtype: "float64" or "float32".
      since_fired: steps since each latent was active, at the start [d_sae]; None for 0. What the module
        keeps of it, it has to start at the same.
      after_backward: what is done to the module's gradients (or weights) before each step: clipping, say.
      after_step: what is done to the module after each step, a constraint on the decoder say.
      bounds: largest relative error by stage; None for `BOUNDS[dtype]`.
      follow: hold the parameters beside one another after every step, not only after the last.

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
        batches.ndim >= 3 and len(batches) > 0, f"batches must be [n, batch, d_in], got shape {batches.shape}"
    )
    y = batches if targets is None else targets
    require(
        y.ndim == batches.ndim and y.shape[:2] == batches.shape[:2],
        f"targets must be one row per row of batches, {batches.shape[:2]}, got shape {y.shape}",
    )
    hooks = after_backward or _nothing, after_step or _nothing
    data = (batches,) if targets is None else (batches, targets)
    stride = 1 if follow else steps
    here = _train_here(sae, optimizer, params, batches, y, since_fired, steps, dtype, stride)
    there = _train_there(module, names, observe, torch_optimizer, params, data, steps, dtype, hooks, stride)
    trajectory: dict[str, list[float]] = {name: [] for name in params}
    # Default matrix products on an accelerator round to fewer bits than the dtype has.
    with (
        jax.enable_x64(True) if dtype == "float64" else nullcontext(),
        jax.default_matmul_precision("highest"),
    ):
        theirs, ours = next(there), next(here)  # what is wrong with the module is said before any compiling
        trained, sums, trained_there, sums_there = {}, {}, {}, {}
        for after_steps in zip(here, there, strict=True):
            (trained, sums), (trained_there, sums_there) = after_steps
            for name, errors in trajectory.items():
                errors.append(relative_error(trained[name], trained_there[name]))
    means = {name: float(total / steps) for name, total in sums.items()}
    ours["trained"] = {**trained, **_named_mean(sums, steps)}
    theirs["trained"] = {**trained_there, **_named_mean(sums_there, steps)}
    for stage in ours:
        unknown = sorted(set(theirs[stage]) - set(ours[stage]))
        require(
            not unknown, f"observe gives {', '.join(unknown)}, but here there are {', '.join(ours[stage])}"
        )
    errors = {
        stage: {name: relative_error(ours[stage][name], theirs[stage][name]) for name in theirs[stage]}
        for stage in theirs
    }
    errors = {stage: by_name for stage, by_name in errors.items() if by_name}
    return Report(dtype, steps, errors, dict(bounds or BOUNDS[dtype]), means, trajectory if follow else None)


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """`max |a - b| / max |b|`; infinite where the shapes differ, absolute where all of b is 0."""
    if ours.shape != theirs.shape:
        return float("inf")
    return float(np.abs(ours - theirs).max() / (np.abs(theirs).max() or 1.0))


def _train_here(sae, optimizer, params, batches, targets, since_fired, steps, dtype, stride) -> Iterator[Any]:
    """The first pass by stage; then after every `stride` steps the parameters, and each term's sum so far."""
    params = {name: jnp.asarray(leaf, dtype) for name, leaf in params.items()}
    data = Batch(jnp.asarray(batches, dtype), jnp.asarray(targets, dtype))
    state = state_from(params, optimizer)
    if since_fired is not None:
        since_fired = jnp.asarray(since_fired, state.progress.since_fired.dtype)
        state = state._replace(progress=state.progress._replace(since_fired=since_fired))
    step = make_step(sae, optimizer)

    @jax.jit
    def first(state):
        x = data.x[0]
        f = sae.encode(state.params, x)
        gradients, logs = jax.grad(_loss_and_logs(sae), has_aux=True)(
            state.params, Batch(x, data.y[0]), state.progress
        )
        return {
            "forward": {"f": f, "x_hat": sae.decode(state.params, f, x)},
            "loss": logs,
            "gradients": gradients,
        }

    @jax.jit
    def train(state, start):
        # one compiled loop: five hundred calls of a small step would be mostly calls
        batch = lambda i: jax.tree.map(lambda rows: rows[i % len(rows)], data)  # noqa: E731
        return jax.lax.scan(lambda state, i: step(state, batch(i)), state, start + jnp.arange(stride))

    yield _wide(first(state))
    sums = {}
    for start in range(0, steps, stride):
        state, history = train(state, jnp.asarray(start))
        sums = {name: sums.get(name, 0.0) + values.sum() for name, values in _wide(history).items()}
        yield _wide(state.params), sums


def _loss_and_logs(sae: SAE):
    def loss(params, batch, progress):
        value, info = sae.loss(params, batch, progress)
        return value, {"loss": value, **info.logs}

    return loss


def put(params: Params, module: "torch.nn.Module", names: Mapping[str, str]) -> dict[str, "torch.Tensor"]:
    """Write our weights over the module's, and tell which of its tensors are whose counterpart.

    Args:
      params: weights, numpy or JAX.
      module: its parameters are overwritten.
      names: as in `compare`.

    Returns:
      The module's tensors by our names, laid out as they are there.

    Raises:
      InputError: names or shapes that do not match.
    """
    import torch

    _require_names(module, names, params)
    kept = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    tensors = {ours: kept[theirs.removesuffix(".T")] for ours, theirs in names.items()}
    with torch.no_grad():
        for name, tensor in tensors.items():
            start = torch.as_tensor(np.array(params[name], np.float64))
            tensor.copy_(start.T if names[name].endswith(".T") else start)
    return tensors


def _train_there(
    module, names, observe, torch_optimizer, params, data, steps, dtype, hooks, stride
) -> Iterator[Any]:
    """As `_train_here`, in PyTorch."""
    import torch

    module.to(getattr(torch, dtype))
    tensors = put(params, module, names)
    after_backward, after_step = map(torch.no_grad(), hooks)

    def as_ours(name: str, tensor: torch.Tensor) -> np.ndarray:
        array = tensor.detach().to(torch.float64).numpy().copy()
        return array.T if names[name].endswith(".T") else array

    data = [torch.as_tensor(rows).to(getattr(torch, dtype)) for rows in data]
    optimizer = torch_optimizer(module.parameters())
    sums = {}
    for i in range(steps):
        optimizer.zero_grad()
        seen = observe(module, *(rows[i % len(rows)] for rows in data))
        require("loss" in seen, f"observe must give a 'loss', got {', '.join(seen) or 'nothing'}")
        seen["loss"].backward()
        arrays = {name: tensor.detach().to(torch.float64).numpy() for name, tensor in seen.items()}
        forward = {name: arrays.pop(name) for name in ("f", "x_hat") if name in arrays}
        if i == 0:
            gradients = {name: as_ours(name, _gradient(name, tensor)) for name, tensor in tensors.items()}
            yield {"forward": forward, "loss": arrays, "gradients": gradients}
        sums = {name: sums.get(name, 0.0) + array for name, array in arrays.items()}
        after_backward(module)
        optimizer.step()
        after_step(module)
        if (i + 1) % stride == 0:
            yield {name: as_ours(name, tensor) for name, tensor in tensors.items()}, sums


def _wide(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def _named_mean(sums: dict[str, Any], steps: int) -> dict[str, np.ndarray]:
    return {f"mean {name}": np.asarray(total / steps) for name, total in sums.items()}


def _nothing(module: "torch.nn.Module") -> None:
    pass


def _gradient(name: str, tensor: "torch.Tensor") -> "torch.Tensor":
    import torch

    if not isinstance(tensor, torch.nn.Parameter):
        return torch.zeros_like(tensor)
    if tensor.grad is None:
        raise InputError(f"the module's loss does not depend on the parameter that {name} is mapped to")
    return tensor.grad


def _require_names(module: "torch.nn.Module", names: Mapping[str, str], params: Params) -> None:
    parameters = dict(module.named_parameters())
    kept = {**parameters, **dict(module.named_buffers())}
    missing = [name for name in params if name not in names]
    require(not missing, f"the map names no counterpart of {', '.join(missing)}")
    strange = [name for name in names if name not in params]
    require(not strange, f"the map names {', '.join(strange)}, but the SAE has {', '.join(params)}")
    theirs = {name.removesuffix(".T") for name in names.values()}
    unknown = sorted(theirs - set(kept))
    require(not unknown, f"the module has no parameter {', '.join(unknown)}; it has {', '.join(parameters)}")
    unnamed = sorted(set(parameters) - theirs)
    require(not unnamed, f"the map leaves out the module's {', '.join(unnamed)}")
    for name, path in names.items():
        shape = tuple(kept[path.removesuffix(".T")].shape)
        shape = shape[::-1] if path.endswith(".T") else shape
        ours = tuple(np.shape(params[name]))
        require(
            ours == shape, f"{name} is {ours} here, but {path} is {shape} there; transposed ones end in .T"
        )


def _nan_is_infinite(error: float) -> float:
    return float("inf") if np.isnan(error) else error
