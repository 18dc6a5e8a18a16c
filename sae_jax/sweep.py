"""A sweep is `vmap` of the training step over a table of hyper-parameters."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from sae_jax import checkpoint, chunks, distributed, halving, linear
from sae_jax.base import SAE, require
from sae_jax.chunks import Look
from sae_jax.cut import cut, laid
from sae_jax.data import Source
from sae_jax.devices import free_memory
from sae_jax.endings import Patience
from sae_jax.grid import Grid, members
from sae_jax.program import Program, bounded, checked_program, first_of
from sae_jax.result import Part, SweepResult, join
from sae_jax.train import Saving


def sweep(
    factory: Callable[..., SAE],
    optimizer: Callable[..., optax.GradientTransformation] | optax.GradientTransformation = optax.adam,
    *,
    grid: Grid,
    source: Source,
    steps: int,
    dtype=jnp.float32,
    precision: str | None = None,
    mesh: str | Mesh | None = None,
    members_at_once: int | None = None,
    points: int = 100,
    evaluate_rows: int = 65_536,
    patience: Patience | None = None,
    keep_best: int | None = None,
    look: Callable[[Look], bool | None] | None = None,
    checkpoints: str | Path | Saving | None = None,
) -> SweepResult:
    """Train one SAE per row of a grid, all in one compiled program on one shared stream of batches.

    Each column goes where its name is an argument: to the factory (`l1`), to the optimizer (`b1`; `lr` is
    its `learning_rate`), or, for `seed`, to the key that draws the initial weights. Member i follows the
    run of that member alone. One that diverges touches no other, and keeps the weights that it had.

    Args:
      factory: makes the SAE, shapes bound: `partial(sae_jax.relu, d_in=4, d_sae=6)`.
      optimizer: makes the optax chain from `lr` and whatever else is swept, or is a chain.
      grid: from `grid` or `zipped`; every argument in it must be one that sets no shape.
      source: one batch a step, shared by all members.
      steps: training steps per member.
      dtype: of the weights and hyper-parameters.
      precision: to what factors of matrix products are rounded, a key of `linear.PRECISIONS`; None for what
        JAX does.
      mesh: how to spread over devices, `"member=4,data=2"`, `"auto"`, or from `sharding.mesh`; None for one
        device, or where there are several processes `"auto"`.
      members_at_once: how many train side by side; None for as many as fit in half of the free memory, and on
        a CPU about in its cache.
      points: about how many points of history to keep.
      evaluate_rows: how many rows the final metrics look at, at most.
      patience: when a member has trained enough; None for never.
      keep_best: how many members are left after successive halvings (`halving.rounds`), chosen by the
        frontier of L0 against unexplained variance; None for all. The others are not computed any longer:
        those that are left train packed together.
      look: called between chunks of steps; returning True ends the sweep there, after a checkpoint.
      checkpoints: a folder to write checkpoints to, and to go on from where it holds some; or a `Saving`.

    Returns:
      A `SweepResult`. Where the source is a `synthetic.World`, what it knows of its features is held against
      what the members that were left found: `metrics.recovery` tells the figures.

    Raises:
      InputError: an axis that nothing takes or that sets a shape, a value that the factory refuses, an
        optimizer that lacks an argument, data of another width, checkpoints of another request, a mesh that
        does not divide members, rows or latents, processes that were given different data.
      Stopped: `look` asked for the end.

    Example:
      >>> result = sweep(partial(relu, d_in=4, d_sae=6), grid=grid(l1=[0.01, 0.1], lr=[1e-2], seed=range(8)),
      ...                source=in_memory(x), steps=500)
      >>> result.table["l0"]
    """
    factory, saving = bounded(factory, grid), Saving.of(checkpoints)
    require(
        precision != "bfloat16" or jnp.dtype(dtype) == jnp.float32,
        f"precision bfloat16 rounds products of float32 weights, and these are {jnp.dtype(dtype)}",
    )
    with nullcontext() if precision is None else linear.precision(precision):
        program = checked_program(factory, optimizer, grid, source, dtype, patience)
        rounds = halving.rounds(members(grid), steps, keep_best)
        if saving is not None or distributed.several():
            settings = {"dtype": dtype, "precision": precision, "patience": patience, "keep_best": keep_best}
            settings |= {"points": points, "evaluate_rows": evaluate_rows}
            asked = request(factory, optimizer, grid=grid, source=source, steps=steps, **settings)
            spread = {"mesh": str(mesh), "members_at_once": members_at_once, "saving": saving is not None}
            distributed.agree({**asked, **spread})
            if saving is not None:
                checkpoint.claim(saving.folder, asked)
        how = cut(program, grid, source, mesh, members_at_once, saving)
        way = chunks.Way(program, grid, source, steps, how, points, evaluate_rows, look, saving)
        book = chunks.trained(way, rounds)
    part = Part(
        lambda place: factory(**{name: grid[name][place].item() for name in program.factory_names}),
        book.params,
        np.arange(members(grid)),
        density=book.metrics["density"],
    )
    history = {name: log if name == "step" else log.T for name, log in book.history.items()}
    return SweepResult((part,), grid, book.metrics, history, book.status)


DECIDE = ("precision", "patience", "keep_best", "points", "evaluate_rows")
"""Options of `sweep` that decide its numbers, beside those that every request has."""


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
    look: Callable[[Look], bool | None] | None = None,
    checkpoints: str | Path | Saving | None = None,
    **rest: Any,
) -> SweepResult:
    """Sweep several architectures or widths over the same batches: one table, one frontier.

    Each group is one compiled program, trained after the one before.

    Args:
      groups: a factory, an optimizer and a grid each.
      source, steps, look: as for `sweep`.
      checkpoints: as for `sweep`; each group gets a folder of its own in it.
      rest: whatever else `sweep` takes.

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
    settings = {name: value for name, value in rest.items() if name in ("dtype", *DECIDE)}
    configs, free = [], float(free_memory())
    for group in groups:
        program = program_for(group, source, settings.get("dtype", jnp.float32))
        laid(program, group.grid, source, rest.get("mesh"), rest.get("members_at_once"), free)
        configs.append(first_of(program, group.grid).config)
    sizes, saving = [members(group.grid) for group in groups], Saving.of(checkpoints)
    work = [sum(round.work for round in halving.rounds(size, steps, rest.get("keep_best"))) for size in sizes]
    if saving is not None:
        checkpoint.claim(saving.folder, request_all(groups, source=source, steps=steps, **settings))
    results: list[SweepResult] = []
    for number, group in enumerate(groups):
        behind, rows = sum(work[:number]), sum(sizes[:number])
        ended = sum((Counter(result.endings) for result in results), Counter())

        def tell(seen: Look, behind=behind, rows=rows, ended=ended) -> bool | None:
            of_all = seen._replace(
                member_steps=behind + seen.member_steps,
                total=sum(work),
                first=rows + seen.first,
                stop=rows + seen.stop,
                ended=dict(ended + Counter(seen.ended)),
            )
            return look and look(of_all)

        results.append(
            sweep(
                *group[:2],
                grid=group.grid,
                source=source,
                steps=steps,
                look=tell,
                checkpoints=None if saving is None else saving.at(f"group-{number}"),
                **rest,
            )
        )
    return join(results, [{name: config[name] for name in ("architecture", "d_sae")} for config in configs])


def request_all(groups: Sequence[Group], *, source: Source, steps: int, **settings: Any) -> dict[str, Any]:
    """`request` of a single group, or of several: what decides the numbers of `sweep_all`, as JSON."""
    asked = [
        request(group.factory, group.optimizer, grid=group.grid, source=source, steps=steps, **settings)
        for group in groups
    ]
    if len(asked) == 1:
        return asked[0]
    shared = {
        name: asked[0][name] for name in ("steps", "dtype", "batch_size", "data", *DECIDE) if name in asked[0]
    }
    return {**shared, "members": sum(one["members"] for one in asked), "groups": asked}


def program_for(group: Group, source: Source, dtype) -> Program:
    """A group's program; what can be said against the group is said here."""
    return checked_program(bounded(group.factory, group.grid), group.optimizer, group.grid, source, dtype)


def request(
    factory: Callable[..., SAE],
    optimizer: Callable[..., optax.GradientTransformation] | optax.GradientTransformation,
    *,
    grid: Grid,
    source: Source,
    steps: int,
    dtype=jnp.float32,
    precision: str | None = None,
    patience: Patience | None = None,
    keep_best: int | None = None,
    points: int = 100,
    evaluate_rows: int = 65_536,
) -> dict[str, Any]:
    """What decides the numbers of a sweep, as JSON: a sweep is resumed only by an equal request.

    Arguments are those of `sweep`; where it runs, and over how many devices, is not among them. Of the
    optimizer only the name is known; of the data a digest of at most 65,536 values per array, spread evenly.

    Returns:
      A dictionary of plain values.

    Raises:
      InputError: whatever `sweep` would say against these arguments.
    """
    require(1 <= steps < 2**31, f"steps must be at least 1 and below 2^31, got {steps}")
    config = first_of(program_for(Group(factory, optimizer, grid), source, dtype), grid).config
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
        "precision": precision,
        "patience": None if patience is None else patience._asdict(),
        "keep_best": keep_best,
        "points": points,
        "evaluate_rows": evaluate_rows,
    }


def _digest(arrays: Iterable[Any], kind: str = "") -> str:
    digest = hashlib.sha256(kind.encode())
    for array in arrays:
        if array.size > 65_536:
            places = np.linspace(0, array.size - 1, 65_536).astype(np.int64)
            sample = np.asarray(array.reshape(-1)[np.unique(places)])
        else:
            sample = np.asarray(array).reshape(-1)
        digest.update(f"{array.shape} {sample.dtype}".encode() + sample.tobytes())
    return digest.hexdigest()[:16]
