"""A user's PyTorch class beside the SAE that it is to be a port of."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sae_jax.base import SAE, Info, InputError, Params, require, require_positive, require_weight
from sae_jax.formats.files import read_json
from sae_jax.verify.harness import Report, compare, put

if TYPE_CHECKING:
    import torch

STAGES = ("forward", "loss", "gradients", "trained")
DISTINCT_BATCHES = 16
ITS_OWN = "the class's own, beside the SAE's"
PLAIN = "mean |x_hat - y|^2 + {l1:g} mean |f|_1 on both sides, for the class has no loss of its own"


class Port(NamedTuple):
    """A class, or anything else that makes a module, and what of it is whose counterpart."""

    label: str
    """For sentences: `MODULE:CLASS`."""
    make: Callable[..., "torch.nn.Module"]
    names: Mapping[str, str]
    """Our parameter names to the module's, `.T` at the end of what is transposed there."""
    arguments: Mapping[str, Any] = {}
    """Of `make`."""


class Comparison(NamedTuple):
    """What came of it."""

    label: str
    loss: str
    optimizer: str
    active: int
    """Latents active on some row: of the others nothing was proved but that they stay silent."""
    reports: list[Report]

    @property
    def ok(self) -> bool:
        """Whether every error is within its bound, in every precision and at every step."""
        return all(report.ok for report in self.reports)

    @property
    def findings(self) -> list[str]:
        """Where to look: of each precision that breaks a bound, the first stage that does."""
        return [finding for report in self.reports if (finding := _finding(report))]


def find(told: str) -> Callable[..., Any]:
    """What `MODULE:CLASS` names: MODULE is importable from the working directory, or the path of a .py file.

    Raises:
      InputError: no such module or class, or a module that raises when imported.
    """
    module, colon, name = told.rpartition(":")
    require(bool(colon and module and name), f"the class must be told as MODULE:CLASS, got {told!r}")
    path = Path(module)
    is_file = path.suffix == ".py"
    require(not is_file or path.is_file(), f"there is no file {module}")
    sys.path.insert(0, str((path.parent if is_file else Path()).resolve()))
    try:
        with _naming(f"importing {module}"):
            imported = _from_file(path) if is_file else importlib.import_module(module)
    finally:
        sys.path.pop(0)
    classes = [each for each, value in vars(imported).items() if isinstance(value, type)]
    require(hasattr(imported, name), f"{module} has no {name}; its classes: {', '.join(classes) or 'none'}")
    found = getattr(imported, name)
    require(callable(found), f"{told} is no class, but {type(found).__name__}")
    return found


def read_map(path: str | Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Names and constructor arguments of a map.

        {"W_enc": "encoder.weight.T", ...}       or
        {"parameters": {"W_enc": "encoder.weight.T", ...}, "arguments": {"d_in": 16, "k": 4}}

    Raises:
      InputError: not JSON, or neither of the two.
    """
    found = read_json(Path(path))
    nested = isinstance(found.get("parameters"), dict)
    strange = sorted(set(found) - {"parameters", "arguments"}) if nested else []
    require(not strange, f"{path} has parameters and arguments, but also {', '.join(strange)}")
    names, arguments = (found["parameters"], found.get("arguments", {})) if nested else (found, {})
    require(isinstance(arguments, dict), f"{path}: arguments must be an object, got {arguments!r}")
    wrong = [name for name, other in names.items() if not isinstance(other, str)]
    require(not wrong, f"{path}: {', '.join(wrong)} must be the name of a parameter there, a text")
    return names, arguments


def random_rows(sae: SAE, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray | None]:
    """Rows of independent standard normal numbers as the SAE reads them; of a transcoder, targets too.

    Args:
      sae: the model.
      count: how many rows.
      seed: of the draw.
    """
    draw, config = np.random.default_rng(seed), sae.config
    x = draw.normal(size=(count, *_row(sae)))
    return x, draw.normal(size=(count, config["d_out"])) if "d_out" in config else None


def compare_port(
    sae: SAE,
    params: Params,
    port: Port,
    x: np.ndarray,
    y: np.ndarray | None = None,
    *,
    steps: int = 100,
    learning_rate: float = 1e-3,
    batch_size: int = 64,
    l1: float = 0.0,
) -> Comparison:
    """Hold a port beside its SAE in float64 and float32: forward, loss, gradients, and every training step.

    The module's weights are overwritten by the SAE's. Of the module are used:

    - `module(x)` gives x_hat, or the pair (x_hat, f); without `forward` it is `decode(encode(x))`.
    - `encode(x)` gives f, where there is one; else f is of the pair, or not compared.
    - `loss(x)`, of a transcoder `loss(x, y)`, gives a scalar, or a tuple that starts with it, held beside the
      SAE's own loss. Without one both sides train on mean |x_hat - y|^2 + l1 mean |f|_1, a sum over features
      and a mean over rows.
    - `configure_optimizers()` gives its optimizer; without one it is `torch.optim.Adam(lr=learning_rate)`.

    Args:
      sae: the model.
      params: its weights.
      port: the class.
      x: [n, d_in]; of a crosscoder [n, sources, d_in].
      y: of a transcoder [n, d_out]; otherwise None.
      steps: of Adam at `learning_rate`, betas 0.9 and 0.999, eps 1e-8.
      learning_rate: of Adam here, and there.
      batch_size: rows of a step; batches follow one another in order and come round again.
      l1: weight of the penalty where the class has no loss.

    Raises:
      InputError: a class that cannot be built or raises, a map that does not fit, outputs of another shape,
        a module that answers differently when asked twice, rows on which no latent is active.

    Example:
      >>> port = Port("mine", MyAutoencoder, {"W_enc": "encoder.weight.T", "b_enc": "encoder.bias", ...})
      >>> found = compare_port(*sae_jax.load("sae/"), port, x)
      >>> found.ok, found.findings, found.reports[0].parted
    """
    import torch

    for name, value in (("steps", steps), ("batch_size", batch_size)):
        require(value >= 1, f"{name} must be at least 1, got {value}")
    require_positive("the learning rate", learning_rate)
    require_weight("l1", l1)
    batches, targets = _batches(sae, x, y, batch_size)
    has_loss = _has_loss(_built(port))
    require(l1 == 0 or not has_loss, f"{port.label} has a loss of its own, so l1 must be left out")
    if not has_loss:
        sae = replace(sae, loss=_plain_loss(sae, l1))
        # it steers a penalty, which this loss has not
        params = {name: leaf for name, leaf in params.items() if name != "log_penalty"}
    active = _active(sae, params, batches)
    require(active > 0, "no latent is active on these rows, so they prove nothing: give others")
    own_optimizer, reports = False, []
    for dtype in ("float64", "float32"):
        module = _built(port)
        own_optimizer = hasattr(module, "configure_optimizers")
        observe = partial(_observe, port.label, dtype, sae.config["d_sae"], l1)
        _probe(port, observe, module, params, dtype, batches[0], None if y is None else targets[0])
        reports.append(
            compare(
                sae, optax.adam(learning_rate), params,
                module=module, names=port.names, observe=observe,
                torch_optimizer=partial(_own_optimizer, port.label, module) if own_optimizer
                else partial(torch.optim.Adam, lr=learning_rate),
                batches=batches, targets=None if y is None else targets, steps=steps, dtype=dtype,
                follow=True,
            )
        )  # fmt: skip
    optimizer = "the class's own, beside Adam" if own_optimizer else "Adam on both sides"
    return Comparison(
        port.label, ITS_OWN if has_loss else PLAIN.format(l1=l1), f"{optimizer} at {learning_rate:g}",
        active, reports,
    )  # fmt: skip


def told(comparison: Comparison) -> dict[str, Any]:
    """The comparison in what JSON can hold; an error that is not finite is null, and past every bound."""
    reports = [
        {
            "dtype": report.dtype,
            "ok": report.ok,
            "stages": {
                stage: {
                    "bound": report.bounds[stage],
                    "ok": report.worst[stage] <= report.bounds[stage],
                    "errors": {name: _finite(error) for name, error in errors.items()},
                }
                for stage, errors in report.errors.items()
            },
            "parted": None
            if report.parted is None
            else dict(zip(("step", "parameter"), report.parted, strict=True)),
            "trajectory": {
                name: [_finite(error) for error in errors]
                for name, errors in (report.trajectory or {}).items()
            },
            "means": {name: _finite(mean) for name, mean in (report.means or {}).items()},
        }
        for report in comparison.reports
    ]
    return {
        "ok": comparison.ok,
        "findings": comparison.findings,
        "torch": comparison.label,
        "loss": comparison.loss,
        "optimizer": comparison.optimizer,
        "steps": comparison.reports[0].steps,
        "active_latents": comparison.active,
        "reports": reports,
    }


def _finding(report: Report) -> str | None:
    for stage in STAGES:
        bound, errors = report.bounds[stage], report.errors.get(stage, {})
        past = [name for name, error in errors.items() if not error <= bound]
        past.sort(key=lambda name: (isfinite(errors[name]), -errors[name]))
        if past:
            off = ", ".join(f"{name} by {errors[name]:.1e}" for name in past)
            agree = ", ".join(name for name in errors if name not in past)
            where = f"{stage} is the first stage that differs: {off} (bound {bound:.0e})"
            return f"{report.dtype}: {where}{f'; {agree} agree' if agree else ''}"
    return f"{report.dtype}: the weights part on the way and meet again" if report.parted else None


def _finite(value: float) -> float | None:
    return float(value) if isfinite(value) else None


def _row(sae: SAE) -> tuple[int, ...]:
    config = sae.config
    return (config["sources"], config["d_in"]) if "sources" in config else (config["d_in"],)


def _batches(sae: SAE, x: np.ndarray, y: np.ndarray | None, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and targets as [batches, rows, ...], what does not fill a batch left out."""
    row = _row(sae)
    require(x.shape[1:] == row, f"the SAE reads rows of {list(row)}, got rows of {list(x.shape[1:])}")
    require(len(x) > 0, "there are no rows to compare on")
    d_out = sae.config.get("d_out")
    require((y is None) == (d_out is None), "a transcoder takes rows and targets, any other SAE rows alone")
    y = x if y is None else y
    fits = len(y) == len(x) and (d_out is None or y.shape[1:] == (d_out,))
    require(fits, f"targets must be [{len(x)}, {d_out}], got {list(y.shape)}")
    size = min(batch_size, len(x))
    count = min(len(x) // size, DISTINCT_BATCHES)
    cut = lambda rows: np.array(rows[: count * size]).reshape(count, size, *rows.shape[1:])  # noqa: E731
    return cut(x), cut(y)


def _active(sae: SAE, params: Params, batches: np.ndarray) -> int:
    leaves = jax.tree.map(jnp.asarray, params)
    f = sae.encode(leaves, jnp.asarray(batches.reshape(-1, *batches.shape[2:])))
    return int((f > 0).any(axis=0).sum())


def _plain_loss(sae: SAE, l1: float):
    def loss(params, batch, progress):
        f = sae.encode(params, batch.x)
        # |x_hat - y|^2 + l1 |f|_1
        squared = jnp.square(sae.decode(params, f, batch.x) - batch.y)
        error = squared.reshape(len(squared), -1).sum(axis=-1).mean()
        sparsity = jnp.abs(f).sum(axis=-1).mean()
        logs = {"reconstruction": error, "sparsity": sparsity}
        return error + l1 * sparsity, Info(logs, (f > 0).any(axis=0), {})

    return loss


def _has_loss(module: "torch.nn.Module") -> bool:
    # of the class: an attribute may well be a module such as nn.MSELoss
    return callable(getattr(type(module), "loss", None))


def _built(port: Port) -> "torch.nn.Module":
    import torch

    arguments = ", ".join(f"{name}={value!r}" for name, value in port.arguments.items())
    with _naming(f"{port.label}({arguments})"):
        module = port.make(**port.arguments)
    require(
        isinstance(module, torch.nn.Module),
        f"{port.label} makes {type(module).__name__}, but must make a torch.nn.Module",
    )
    return module


def _own_optimizer(label: str, module: "torch.nn.Module", _parameters: Any) -> "torch.optim.Optimizer":
    import torch

    with _naming(f"{label}.configure_optimizers"):
        optimizer: Any = module.configure_optimizers()  # pyright: ignore[reportCallIssue]
    require(
        isinstance(optimizer, torch.optim.Optimizer),
        f"{label}.configure_optimizers must give one torch optimizer, got {type(optimizer).__name__}",
    )
    return optimizer


def _observe(label: str, dtype: str, d_sae: int, l1: float, module, x, y=None) -> dict[str, "torch.Tensor"]:
    import torch

    target = x if y is None else y
    for parameter in module.parameters():
        # what the loss does not reach has a gradient of 0, which the SAE's is then held beside
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)

    def called(name: str, *arguments: Any) -> Any:
        with _naming(f"{label}.{name} in {dtype}"):
            return module(x) if name == "forward" else getattr(module, name)(*arguments)

    def shaped(name: str, tensor: Any, shape: tuple[int, ...]) -> Any:
        came = list(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        require(came == list(shape), f"{label}: {name} must be a tensor of shape {list(shape)}, got {came}")
        return tensor

    encodes = callable(getattr(module, "encode", None))
    if type(module).forward is torch.nn.Module.forward:
        able = encodes and callable(getattr(module, "decode", None))
        require(able, f"{label} has no forward, nor both encode and decode")
        f = called("encode", x)
        x_hat = called("decode", f)
    else:
        given = called("forward")
        is_pair = isinstance(given, tuple | list) and len(given) == 2
        x_hat, f = given if is_pair else (given, None)
        f = called("encode", x) if encodes else f
    seen = {"x_hat": shaped("x_hat", x_hat, tuple(target.shape))}
    if f is not None:
        seen["f"] = shaped("f", f, (len(x), d_sae))
    if _has_loss(module):
        given = called("loss", x) if y is None else called("loss", x, y)
        value = given[0] if isinstance(given, tuple | list) and given else given
        return {**seen, "loss": shaped("loss", value, ())}
    seen["reconstruction"] = seen["loss"] = (x_hat - target).square().flatten(1).sum(dim=-1).mean()
    if f is not None:
        seen["sparsity"] = f.abs().sum(dim=-1).mean()
        seen["loss"] = seen["reconstruction"] + l1 * seen["sparsity"]
    require(l1 == 0 or f is not None, f"{label} gives no features, so that l1 has nothing to weigh")
    return seen


def _probe(port: Port, observe, module, params, dtype, x, y) -> None:
    """Put a copy through one step, so that whatever is wrong with the module is said before training."""
    import torch

    kind = getattr(torch, dtype)
    put(params, module.to(kind), port.names)
    rows = [torch.as_tensor(each).to(kind) for each in (x, y) if each is not None]
    one, other = (observe(deepcopy(module), *rows) for _ in range(2))
    for name, tensor in one.items():
        require(
            torch.equal(tensor.isnan(), other[name].isnan())
            and torch.equal(tensor.nan_to_num(), other[name].nan_to_num()),
            f"{port.label} gives another {name} when asked twice about the same rows: "
            "it must be deterministic, so take out dropout, noise and unseeded draws",
        )
    require(
        one["loss"].requires_grad,
        f"{port.label}: the loss depends on no parameter, so nothing can be trained",
    )
    with _naming(f"the backward pass of {port.label} in {dtype}"):
        one["loss"].backward()


def _from_file(path: Path) -> Any:
    # a name of its own, lest a file called json.py take another's place
    spec = importlib.util.spec_from_file_location(f"port_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Say whose error it is, in one sentence."""
    try:
        yield
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{what} raised {type(error).__name__}{f': {reason}' if reason else ''}") from error
