"""Sparse autoencoders in JAX: pure functions, one step, sweeps by vmap."""

from sae_jax import architectures, data, formats, losses, metrics, synthetic, transforms
from sae_jax.architectures import relu
from sae_jax.base import SAE, Batch, Info, InputError, Params, Progress, TrainState
from sae_jax.data import in_memory, read_array
from sae_jax.grid import grid, zipped
from sae_jax.metrics import evaluate
from sae_jax.result import SweepResult
from sae_jax.sweep import Look, sweep
from sae_jax.train import Stopped, init, make_step, run, run_resumable
from sae_jax.trained import TrainedSAE, load

__version__ = "0.1.0"

__all__ = [
    "SAE",
    "Batch",
    "Info",
    "InputError",
    "Look",
    "Params",
    "Progress",
    "Stopped",
    "SweepResult",
    "TrainState",
    "TrainedSAE",
    "architectures",
    "data",
    "evaluate",
    "formats",
    "grid",
    "in_memory",
    "init",
    "load",
    "losses",
    "make_step",
    "metrics",
    "read_array",
    "relu",
    "run",
    "run_resumable",
    "sweep",
    "synthetic",
    "transforms",
    "zipped",
]
