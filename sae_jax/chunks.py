"""The members of a grid, chunk by chunk side by side, and after each round of halving those that are left."""

import zlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Int

from sae_jax import halving, linear, metrics, sharding
from sae_jax.base import Params
from sae_jax.book import Book
from sae_jax.cut import Cut
from sae_jax.data import Source, on_mesh
from sae_jax.grid import Grid, members
from sae_jax.halving import Round
from sae_jax.metrics.recovery import recovered_by
from sae_jax.program import Members, Program, layout
from sae_jax.synthetic import World
from sae_jax.train import History, Saving, points_of, run_resumable, trained_params


class Look(NamedTuple):
    """What a sweep tells between chunks of steps."""

    member_steps: int
    """Steps done, summed over members."""
    total: int
    """Steps that the whole sweep has, summed over members."""
    history: History
    """Of the members that are training."""
    first: int
    stop: int
    """These are rows `first` to `stop - 1` of the table; logs of those between that were dropped are NaN."""
    ended: dict[str, int]
    """How many members ended before their time, by how: {"diverged": 1}."""
    done: int
    """Steps that the members that are training have behind them."""


class Way(NamedTuple):
    """What all chunks of a sweep have in common; see `sweep`."""

    program: Program
    grid: Grid
    source: Source
    steps: int
    cut: Cut
    points: int
    evaluate_rows: int
    look: Callable[[Look], bool | None] | None
    saving: Saving | None


class Heat(NamedTuple):
    """A round as it is run: who is in it, and what is behind it."""

    round: Round
    rows: Int[np.ndarray, "members"]
    """Of the grid."""
    states: Members | None
    """The members' at its start, on the host; None where they begin with it."""
    name: str
    """A folder for its checkpoints; empty for the sweep's own."""
    behind: int
    """Steps done before it, summed over members."""
    total: int
    """Steps of all rounds, summed over members."""
    last: bool


def trained(way: Way, rounds: Sequence[Round]) -> Book:
    """Train a grid.

    Args:
      way: how.
      rounds: from `halving.rounds`.

    Returns:
      What became of every member.

    Raises:
      Stopped: `look` asked for the end.
    """
    mesh, count = way.cut.mesh, members(way.grid)
    book, total = Book(count, points_of(0, way.steps, way.points)), sum(round.work for round in rounds)
    with nullcontext() if mesh is None else jax.set_mesh(mesh):
        if mesh is not None:
            way = way._replace(source=on_mesh(way.source, mesh))
        rows, states, behind = np.arange(count), None, 0
        for number, round in enumerate(rounds):
            # who goes on is measured, and a checkpoint of others is not to be taken for theirs
            name = f"round-{number}-{zlib.crc32(rows.tobytes()):08x}" if len(rounds) > 1 else ""
            heat = Heat(round, rows, states, name, behind, total, last=round is rounds[-1])
            size = way.cut.side_by_side(len(rows))
            ends = [_chunk(way, book, heat, first, size) for first in range(0, len(rows), size)]
            behind += round.work
            if not heat.last:
                best = halving.best(*book.ranked(rows), round.keep)
                book.drop(np.delete(rows, best), round.until)
                whole = jax.tree.map(lambda *leaves: np.concatenate(leaves), *ends)
                rows, states = rows[best], _of(whole, best)
    return book


def _chunk(way: Way, book: Book, heat: Heat, first: int, size: int) -> Members | None:
    """Train some of a round's members; their state where a further round wants it."""
    round, own = heat.round, heat.rows[first : first + size]
    # filled up with copies of the last member, so that one program serves all chunks
    places = np.minimum(np.arange(first, first + size), len(heat.rows) - 1)
    if heat.states is None:
        state = _begun(way, {name: column[heat.rows[places]] for name, column in way.grid.items()})
    else:
        state = _placed(way, _of(heat.states, places))
    behind = heat.behind + first * (round.until - round.start)
    ended: dict[str, int] = {}

    def over(state: Members) -> bool:
        nonlocal ended
        ending = sharding.everywhere(state.ending)
        ended = book.ended(own, ending)
        return bool(ending.over.all())

    def tell(done: int, history: History) -> bool | None:
        if way.look is None:
            return None
        spread = {name: log if name == "step" else _spread(log, own) for name, log in history.items()}
        steps, first, last = behind + len(own) * (done - round.start), own[0].item(), own[-1].item()
        return way.look(Look(steps, heat.total, spread, first, last + 1, ended, done))

    state, history = run_resumable(
        way.program.step,
        state,
        way.source,
        way.steps,
        start=round.start,
        until=round.until,
        points=way.points,
        over=over,
        look=tell,
        checkpoints=way.saving and way.saving.at(heat.name).at(f"{first}-{first + size}"),
        consume=True,
    )
    params = sharding.everywhere(trained_params(state.train))
    measured = _measured(way, state, params, to_the_end=heat.last)
    book.note(own, params, measured, history, sharding.everywhere(state.ending), round.until)
    return None if heat.last else _of(sharding.everywhere(state), np.arange(len(own)))


def _begun(way: Way, rows: Grid) -> Members:
    hyper: Any = way.program.to_device(rows)
    if way.cut.mesh is not None:
        hyper = sharding.placed(hyper, way.cut.mesh, PartitionSpec("member"))
    return way.program.start(hyper)


def _measured(way: Way, state: Members, params: Params, to_the_end: bool) -> dict[str, np.ndarray]:
    """What the members do to data, and of those that trained to the end what they found of a world."""
    # whatever training rounds, the table tells what the weights do
    with linear.precision("highest"):
        batches = way.source.evaluation(way.evaluate_rows)
        measured = metrics.stream(partial(way.program.measure, state), batches)
        if isinstance(way.source, World) and to_the_end:
            encode = partial(way.program.encode, state)
            measured |= recovered_by(params["W_dec"], encode, way.source, way.evaluate_rows)
    return measured


def _placed(way: Way, state: Members) -> Members:
    """A state that lies on the host, where it is to be trained."""
    if way.cut.mesh is None:
        return jax.tree.map(jnp.array, state)
    return sharding.placed(state, way.cut.mesh, layout(state))


def _of(state: Members, places: Int[np.ndarray, "some"]) -> Members:
    return jax.tree.map(lambda leaf: leaf[places], state)


def _spread(log: np.ndarray, rows: Int[np.ndarray, "members"]) -> np.ndarray:
    """Columns at the members' own places among all from the first to the last; NaN between them."""
    if len(rows) == rows[-1] + 1 - rows[0]:
        return log[:, : len(rows)]
    spread = np.full((len(log), rows[-1] + 1 - rows[0]), np.nan, log.dtype)
    spread[:, rows - rows[0]] = log[:, : len(rows)]
    return spread
