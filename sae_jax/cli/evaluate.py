"""`sae-jax eval SAE DATA`."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from sae_jax.base import require
from sae_jax.cli.jobs import world
from sae_jax.data import as_float32, in_memory, read_array
from sae_jax.metrics import by_source, evaluate
from sae_jax.metrics.recovery import recover
from sae_jax.trained import TrainedSAE, load

ROWS_OF_A_WORLD = 65_536


@dataclass
class Eval:
    """Which SAE to measure, and on what."""

    sae: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SAE")]
    """A folder in the SAELens layout, or a .pt file of the seed's module."""
    data: Annotated[
        tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="DATA", help_behavior_hint="")
    ] = None
    """A .npy, .npz or .safetensors array [n, d_in]."""
    world: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = None
    """In place of DATA a world, whose features are then held against the SAE's; see sae-jax sweep."""
    world_args: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    """NAME=VALUE ...: arguments of the world."""
    target: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Of a transcoder: the rows [n, d_out] that it is to give."""
    array: str | None = None
    """Which array of the file, where it holds several."""
    batch_size: int = 1024
    """Rows at a time; explained_variance_legacy and fvu_batch are defined by the batch."""
    as_json: Annotated[bool, tyro.conf.arg(name="json", help="print JSON, densities included")] = False


def run(options: Eval) -> int:
    """Measure every metric on every row, and print them."""
    trained = load(options.sae)
    require(
        options.data is not None or options.world is not None, "say what to measure on: DATA or --world NAME"
    )
    require(options.data is None or options.world is None, "--world makes its own data: leave out DATA")
    require(not options.world_args or options.world is not None, "--world-args is for --world NAME")
    if options.data is None:
        return _tell(options, *_in_world(options, trained))
    x = read_array(options.data, options.array)
    y = None if options.target is None else read_array(options.target)
    _require_fit(options, trained.sae.config, x, y)
    y = None if y is None else as_float32(y, str(options.target))
    source = in_memory(as_float32(x, str(options.data)), options.batch_size, y=y)
    found = evaluate(trained.sae, trained.params, source.evaluation(len(x)))
    if "sources" in trained.sae.config:
        found |= by_source(trained.sae, trained.params, source.evaluation(len(x)))
    return _tell(options, found, f"{len(x)} rows of {options.data}")


def _in_world(options: Eval, trained: TrainedSAE) -> tuple[dict[str, np.ndarray], str]:
    """What the SAE makes of a world's rows, and what it finds of its features."""
    for name in ("array", "target"):
        require(getattr(options, name) is None, f"--world makes its own data: leave out --{name}")
    require(
        "d_out" not in trained.sae.config,
        f"{options.sae} is a transcoder: a world has no rows for it to give",
    )
    place = world(str(options.world), itertools.chain(*options.world_args))
    reads, width = trained.sae.config["d_in"], place.directions.shape[1]
    require(reads == width, f"{options.sae} reads {reads} columns, but the world {options.world} has {width}")
    found = evaluate(trained.sae, trained.params, place.evaluation(ROWS_OF_A_WORLD))
    found |= recover(trained.sae, trained.params, place, ROWS_OF_A_WORLD)
    return found, f"about {ROWS_OF_A_WORLD} rows of the world {options.world}"


def _tell(options: Eval, found: dict[str, np.ndarray], on: str) -> int:
    if options.as_json:
        print(json.dumps({name: _plain(value) for name, value in found.items()}, indent=2))
        return 0
    table = Table("metric", "value", title=f"{options.sae} on {on}")
    for name, value in found.items():
        if value.ndim == 0:
            table.add_row(name, f"{float(value):.6g}")
        elif name.endswith("_by_source"):
            table.add_row(name, ", ".join(f"{each:.6g}" for each in value.tolist()))
    Console().print(table)
    return 0


def _require_fit(options: Eval, config: dict[str, Any], x: np.ndarray, y: np.ndarray | None) -> None:
    """The rows are what this SAE reads, and the targets, of a transcoder, what it gives."""
    name, d_in, d_out = options.sae, config["d_in"], config.get("d_out")
    found = f"{options.data} has {x.shape[-1]}"
    require(x.shape[-1] == d_in, f"{name} reads {d_in} columns, but {found}")
    rows = [config["sources"], d_in] if "sources" in config else [d_in]
    shape = list(x.shape[1:])
    require(shape == rows, f"{name} reads rows of {rows}, but {options.data} has rows of {shape}")
    if d_out is None:
        require(y is None, f"{name} is no transcoder, so it takes no --target")
    else:
        require(y is not None, f"{name} is a transcoder: give --target FILE")
        width = 0 if y is None else y.shape[-1]
        require(width == d_out, f"{name} gives {d_out} columns, but {options.target} has {width}")


def _plain(value: np.ndarray):
    return np.where(np.isfinite(value), value.astype(object), np.array(None)).tolist()
