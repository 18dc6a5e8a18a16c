"""A sweep is `vmap` of the training step over a table of hyper-parameters."""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
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
from sae_jax.metrics.recovery import recovered_by
from sae_jax.program import bounded, checked_program, members_that_fit
from sae_jax.result import Part, SweepResult, join
from sae_jax.synthetic import World
from sae_jax.train import History, run_resumable, trained_params


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
      A `SweepResult`. Where the source is a `synthetic.World`, what it knows of its features is held against
      what the members found: `metrics.recovery` tells the figures.

    Raises:
      InputError: an axis that nothing takes or that sets a shape, a value that the factory refuses, an
        optimizer that lacks an argument, data of another width, checkpoints of another request.
      Stopped: `look` asked for the end.

    Example:
      >>> result = sweep(partial(relu, d_in=4, d_sae=6), grid=grid(l1=[0.01, 0.1], lr=[1e-2], seed=range(8)),
      ...                source=in_memory(x), steps=500)
      >>> result.table["l0"]
    """
    factory = bounded(factory, grid)
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
        if isinstance(source, World):
            dictionaries = trained_params(state.train)["W_dec"]
            measured |= recovered_by(dictionaries, partial(program.encode, state), source, evaluate_rows)
        parts.append(
            {
                "params": {
                    name: np.asarray(leaf)[:size] for name, leaf in trained_params(state.train).items()
                },
                "metrics": {name: value[:size] for name, value in measured.items()},
                "step": history["step"],
                "history": {name: log.T[:size] for name, log in history.items() if name != "step"},
            }
        )

    logs = {name: log.T for name, log in _joined(parts, "history").items()}
    joined_metrics = _joined(parts, "metrics")
    part = Part(
        lambda place: factory(**{name: grid[name][place].item() for name in program.factory_names}),
        _joined(parts, "params"),
        np.arange(total),
        density=joined_metrics["density"],
    )
    return SweepResult(
        (part,),
        grid,
        metrics=joined_metrics,
        history={"step": parts[0]["step"], **logs},
    )


class Group(NamedTuple):
    """One of the sweeps that `sweep_all` makes: what differs between them."""

    factory: Callable[..., SAE]
    optimizer: Callable[..., optax.GradientTransformation] | optax.GradientTransformation
    grid: Grid


def sweep_all(
    groups: Sequence[Group],
    *,
    source: Source,
    steps: int,
    dtype=jnp.float32,
    members_at_once: int | None = None,
    points: int = 100,
    evaluate_rows: int = 65_536,
    look: Callable[[Look], bool | None] | None = None,
    checkpoints: str | Path | None = None,
) -> SweepResult:
    """Sweep several architectures or widths over the same batches: one table, one frontier.

    Each group is one compiled program, trained after the one before.

    Args:
      groups: a factory, an optimizer and a grid each.
      checkpoints: a folder; each group gets one of its own in it.
      source, steps, dtype, members_at_once, points, evaluate_rows, look: as for `sweep`.

    Returns:
      A `SweepResult` whose first columns are `architecture` and `d_sae`.

    Raises:
      InputError: no groups, or what `sweep` would say against one of them, before any is compiled.
      Stopped: `look` asked for the end.

    Example:
      >>> groups = [Group(partial(relu, 64, 256), optax.adam, grid(l1=[0.01, 0.1], lr=[1e-3])),
      ...           Group(partial(topk, 64, 256), optax.adam, grid(k=[4, 8], lr=[1e-3]))]
      >>> sweep_all(groups, source=source, steps=5000).frontier()
    """
    require(len(groups) > 0, "there is nothing to sweep: no groups were given")
    configs = [_first_config(group, source, dtype) for group in groups]
    sizes = [members(group.grid) for group in groups]
    if checkpoints is not None:
        checkpoint.claim(Path(checkpoints), request_all(groups, source=source, steps=steps, dtype=dtype))
    results = []
    for number, group in enumerate(groups):
        before = sum(sizes[:number])

        def tell(seen: Look, before=before) -> bool | None:
            return look and look(Look(before * steps + seen.member_steps, sum(sizes) * steps, seen.history))

        results.append(
            sweep(
                *group[:2],
                grid=group.grid,
                source=source,
                steps=steps,
                dtype=dtype,
                members_at_once=members_at_once,
                points=points,
                evaluate_rows=evaluate_rows,
                look=tell,
                checkpoints=None if checkpoints is None else Path(checkpoints) / f"group-{number}",
            )
        )
    return join(results, [{name: config[name] for name in ("architecture", "d_sae")} for config in configs])


def request_all(groups: Sequence[Group], *, source: Source, steps: int, dtype=jnp.float32) -> dict[str, Any]:
    """`request` of a single group, or of several: what decides the numbers of `sweep_all`, as JSON."""
    asked = [
        request(group.factory, group.optimizer, grid=group.grid, source=source, steps=steps, dtype=dtype)
        for group in groups
    ]
    if len(asked) == 1:
        return asked[0]
    shared = {name: asked[0][name] for name in ("steps", "dtype", "batch_size", "data")}
    return {**shared, "members": sum(one["members"] for one in asked), "groups": asked}


def _first_config(group: Group, source: Source, dtype) -> dict[str, Any]:
    """The config of a group's first member; what can be said against the group is said here."""
    factory = bounded(group.factory, group.grid)
    names = checked_program(factory, group.optimizer, group.grid, source, dtype).factory_names
    return factory(**{name: group.grid[name][0].item() for name in names}).config


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
    config = _first_config(Group(factory, optimizer, grid), source, dtype)
    made_by = optimizer.func if isinstance(optimizer, partial) else optimizer
    return {
        "model": {
            name: getattr(value, "__qualname__", str(value))
            for name, value in config.items()
            if name not in grid
        },
        "optimizer": getattr(made_by, "__qualname__", type(made_by).__name__),
        "steps": steps,
        "dtype": str(jnp.dtype(dtype)),
        "batch_size": source.batch_size,
        "axes": {name: list(dict.fromkeys(column.tolist())) for name, column in grid.items()},
        "members": members(grid),
        "grid": _digest(grid.values()),
        "data": _digest(jax.tree.leaves(source), str(jax.tree.structure(source))),
    }


def _digest(arrays: Iterable[Any], kind: str = "") -> str:
    digest = hashlib.sha256(kind.encode())
    for array in arrays:
        flat = array.reshape(-1)
        sample = np.asarray(
            flat[np.unique(np.linspace(0, flat.size - 1, min(flat.size, 65_536)).astype(np.int64))]
        )
        digest.update(f"{array.shape} {sample.dtype}".encode() + sample.tobytes())
    return digest.hexdigest()[:16]
