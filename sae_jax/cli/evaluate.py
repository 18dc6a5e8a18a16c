"""`sae-jax eval SAE DATA`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from sae_jax.base import require
from sae_jax.data import as_float32, in_memory, read_array
from sae_jax.metrics import evaluate
from sae_jax.trained import load


@dataclass
class Eval:
    """Which SAE to measure, and on what."""

    sae: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SAE")]
    """A folder in the SAELens layout, or a .pt file of the seed's module."""
    data: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DATA")]
    """A .npy, .npz or .safetensors array [n, d_in]."""
    array: str | None = None
    """Which array of the file, where it holds several."""
    batch_size: int = 1024
    """Rows at a time; explained_variance_legacy and fvu_batch are defined by the batch."""
    as_json: Annotated[bool, tyro.conf.arg(name="json", help="print JSON, densities included")] = False


def run(options: Eval) -> int:
    """Measure every metric on every row, and print them."""
    trained = load(options.sae)
    x = read_array(options.data, options.array)
    d_in = trained.sae.config["d_in"]
    require(x.shape[1] == d_in, f"{options.sae} reads {d_in} columns, but {options.data} has {x.shape[1]}")
    source = in_memory(as_float32(x, str(options.data)), options.batch_size)
    found = evaluate(trained.sae, trained.params, source.evaluation(len(x)))
    if options.as_json:
        print(json.dumps({name: _plain(value) for name, value in found.items()}, indent=2))
        return 0
    table = Table("metric", "value", title=f"{options.sae} on {len(x)} rows of {options.data}")
    for name, value in found.items():
        if value.ndim == 0:
            table.add_row(name, f"{float(value):.6g}")
    Console().print(table)
    return 0


def _plain(value: np.ndarray):
    return np.where(np.isfinite(value), value.astype(object), np.array(None)).tolist()
