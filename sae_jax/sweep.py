"""A sweep is `vmap` of the training step over a table of hyper-parameters."""

import hashlib
import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sae_jax import checkpoint, metrics
from sae_jax.base import SAE, require
from sae_jax.data import Source
from sae_jax.grid import Grid, members
from sae_jax.program import checked_program, members_that_fit
from sae_jax.result import SweepResult
from sae_jax.train import History, run_resumable


class Look(NamedTuple):
    """What a sweep tells between chunks of steps."""

    member_steps: int
    """Steps done, summed over members."""
    total: int
    """Steps that the whole sweep has, summed over members."""
    history: History
    """Of the members that are training."""


def sweep(
    factory: Callable[..., SAE],
    optimizer: Callable[..., optax.GradientTransformation] | optax.GradientTransformation = optax.adam,
    *,
    grid: Grid,
    source: Source,
    steps: int,
    dtype=jnp.float32,
    members_at_once: int | None = None,
    points: int = 100,
    evaluate_rows: int = 65_536,
    look: Callable[[Look], bool | None] | None = None,
    checkpoints: str | Path | None = None,
) -> SweepResult:
    """Train one SAE per row of a grid, all in one compiled program on one shared stream of batches.

    Each column goes where its name is an argument: to the factory (`l1`), to the optimizer (`b1`; `lr` is
    its `learning_rate`), or, for `seed`, to the key that draws the initial weights. Member i follows the
    run of that member alone, and one that diverges touches no other.

    Args:
      factory: makes the SAE, shapes bound: `partial(sae_jax.relu, d_in=4, d_sae=6)`.
      optimizer: makes the optax chain from `lr` and whatever else is swept, or is a chain.
      grid: from `grid` or `zipped`; every argument in it must be one that sets no shape.
      source: one batch a step, shared by all members.
      steps: training steps per member.
      dtype: of the weights and hyper-parameters.
      members_at_once: how many train side by side; None for as many as fit in half of the free memory.
      points: about how many points of history to keep.
      evaluate_rows: how many rows the final metrics look at, at most.
      look: called between chunks of steps; returning True ends the sweep there, after a checkpoint.
      checkpoints: a folder to write checkpoints to, and to go on from where it holds some.

    Returns:
      A `SweepResult`.

    Raises:
      InputError: an axis that nothing takes or that sets a shape, a value that the factory refuses, an
        optimizer that lacks an argument, data of another width, checkpoints of another request.
      Stopped: `look` asked for the end.

    Example:
      >>> result = sweep(partial(relu, d_in=4, d_sae=6), grid=grid(l1=[0.01, 0.1], lr=[1e-2], seed=range(8)),
      ...                source=in_memory(x), steps=500)
      >>> result.table["l0"]
    """
    program = checked_program(factory, optimizer, grid, source, dtype)
    total = members(grid)
    checkpoints = None if checkpoints is None else Path(checkpoints)
    if checkpoints is not None:
        checkpoint.claim(
            checkpoints, request(factory, optimizer, grid=grid, source=source, steps=steps, dtype=dtype)
        )
    at_once = _members_per_chunk(program, grid, source, members_at_once, checkpoints)
    chunks = math.ceil(total / at_once)

    parts = []
    for number in range(chunks):
        first = number * at_once
        size = min(at_once, total - first)
        # the last chunk is filled up with copies of the last member, so that one program serves all
        rows = np.minimum(np.arange(first, first + at_once), total - 1)

        def tell(done: int, history: History, first=first, size=size) -> bool:
            return bool(look and look(Look(first * steps + size * done, total * steps, history)))

        state, history = run_resumable(
            program.step,
            program.start(program.to_device({name: column[rows] for name, column in grid.items()})),
            source,
            steps,
            points=points,
            look=tell,
            checkpoints=None if checkpoints is None else checkpoints / f"{number}-of-{chunks}",
        )
        measured = metrics.stream(partial(program.measure, state), source.evaluation(evaluate_rows))
        parts.append(
            {
                "params": {name: np.asarray(leaf)[:size] for name, leaf in state.train.params.items()},
                "metrics": {name: value[:size] for name, value in measured.items()},
                "step": history["step"],
                "history": {name: log.T[:size] for name, log in history.items() if name != "step"},
            }
        )

    logs = {name: log.T for name, log in _joined(parts, "history").items()}
    return SweepResult(
        build=lambda row: factory(**{name: row[name] for name in program.factory_names}),
        grid=grid,
        params=_joined(parts, "params"),
        kept=np.arange(total),
        metrics=_joined(parts, "metrics"),
        history={"step": parts[0]["step"], **logs},
    )


def _joined(parts: list[dict[str, Any]], what: str) -> dict[str, np.ndarray]:
    """The chunks' arrays end to end, each let go of as it is joined: at most one is held twice."""
    return {name: np.concatenate([part[what].pop(name) for part in parts]) for name in list(parts[0][what])}


def _members_per_chunk(
    program, grid: Grid, source: Source, asked: int | None, checkpoints: Path | None
) -> int:
    """How many members train side by side: as asked, as in the run that is resumed, or as many as fit."""
    require(asked is None or asked >= 1, f"members_at_once must be at least 1, got {asked}")
    total = members(grid)
    # the memory that is free may have changed since
    before = [] if checkpoints is None else [path.name for path in checkpoints.glob("*-of-*")]
    if before and asked is None:
        chunks = int(before[0].split("-of-")[1])
    else:
        chunks = math.ceil(total / (asked or members_that_fit(program, grid, source)))
    return math.ceil(total / chunks)


def request(
    factory: Callable[..., SAE],
    optimizer: Callable[..., optax.GradientTransformation] | optax.GradientTransformation,
    *,
    grid: Grid,
    source: Source,
    steps: int,
    dtype=jnp.float32,
) -> dict[str, Any]:
    """What decides the numbers of a sweep, as JSON: a sweep is resumed only by an equal request.

    Arguments are those of `sweep`. Of the optimizer only the name is known; of the data a digest of at most
    65,536 values per array, spread evenly.

    Returns:
      A dictionary of plain values.

    Raises:
      InputError: whatever `sweep` would say against these arguments.
    """
    require(1 <= steps < 2**31, f"steps must be at least 1 and below 2^31, got {steps}")
    names = checked_program(factory, optimizer, grid, source, dtype).factory_names
    config = factory(**{name: grid[name][0].item() for name in names}).config
    made_by = optimizer.func if isinstance(optimizer, partial) else optimizer
    return {
        "model": {name: str(value) for name, value in config.items() if name not in grid},
        "optimizer": getattr(made_by, "__qualname__", type(made_by).__name__),
        "steps": steps,
        "dtype": str(jnp.dtype(dtype)),
        "batch_size": source.batch_size,
        "axes": {name: list(dict.fromkeys(column.tolist())) for name, column in grid.items()},
        "members": members(grid),
        "grid": _digest(grid.values()),
        "data": _digest(jax.tree.leaves(source)),
    }


def _digest(arrays: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        flat = array.reshape(-1)
        sample = np.asarray(
            flat[np.unique(np.linspace(0, flat.size - 1, min(flat.size, 65_536)).astype(np.int64))]
        )
        digest.update(f"{array.shape} {sample.dtype}".encode() + sample.tobytes())
    return digest.hexdigest()[:16]
