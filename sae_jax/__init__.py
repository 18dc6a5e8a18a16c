"""Sparse autoencoders in JAX: pure functions, one step, sweeps by vmap."""

from typing import TYPE_CHECKING, Any

from sae_jax import (
    adapters,
    architectures,
    auxk,
    data,
    distributed,
    features,
    folds,
    formats,
    initialisation,
    labels,
    language_models,
    losses,
    metrics,
    normalise,
    recipes,
    resampling,
    sharding,
    synthetic,
    transforms,
)
from sae_jax.adapters import export_functions, export_saelens, to_torch
from sae_jax.architectures import (
    batch_topk,
    crosscoder,
    gated,
    jumprelu,
    matryoshka,
    relu,
    topk,
    transcoder,
)
from sae_jax.base import SAE, Batch, Info, InputError, Params, Progress, TrainState
from sae_jax.convert import convert
from sae_jax.data import in_memory, open_rows, open_store, read_array, stored
from sae_jax.endings import Patience
from sae_jax.grid import grid, zipped
from sae_jax.harvest import harvest
from sae_jax.inspection import inspect
from sae_jax.metrics import evaluate
from sae_jax.result import SweepResult, join
from sae_jax.sweep import Group, Look, sweep, sweep_all
from sae_jax.train import Saving, Stopped, init, make_step, run, run_resumable
from sae_jax.trained import TrainedSAE, load, load_all

if TYPE_CHECKING:
    from sae_jax.adapters import SAEModule

__version__ = "0.1.0"

__all__ = [
    "SAE",
    "Batch",
    "Group",
    "Info",
    "InputError",
    "Look",
    "Params",
    "Patience",
    "Progress",
    "SAEModule",
    "Saving",
    "Stopped",
    "SweepResult",
    "TrainState",
    "TrainedSAE",
    "adapters",
    "architectures",
    "auxk",
    "batch_topk",
    "convert",
    "crosscoder",
    "data",
    "distributed",
    "evaluate",
    "export_functions",
    "export_saelens",
    "features",
    "folds",
    "formats",
    "gated",
    "grid",
    "harvest",
    "in_memory",
    "init",
    "initialisation",
    "inspect",
    "join",
    "jumprelu",
    "labels",
    "language_models",
    "load",
    "load_all",
    "losses",
    "make_step",
    "matryoshka",
    "metrics",
    "normalise",
    "open_rows",
    "open_store",
    "read_array",
    "recipes",
    "relu",
    "resampling",
    "run",
    "run_resumable",
    "sharding",
    "stored",
    "sweep",
    "sweep_all",
    "synthetic",
    "to_torch",
    "topk",
    "transcoder",
    "transforms",
    "zipped",
]


def __getattr__(name: str) -> Any:
    """`SAEModule`, when it is asked for; see `adapters`."""
    if name != "SAEModule":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return adapters.SAEModule
