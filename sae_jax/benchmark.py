"""How fast this machine trains: works timed in turn, in one process, by the loop that every sweep uses."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from sae_jax import linear
from sae_jax.architectures import find
from sae_jax.base import require
from sae_jax.cost import training_flops
from sae_jax.data import Source, in_memory
from sae_jax.devices import free_memory, peak
from sae_jax.grid import grid, members
from sae_jax.need import told
from sae_jax.program import arguments_of, first_of, footprint_of, shapes_of, sizes_of
from sae_jax.sweep import Group, program_for
from sae_jax.train import run

SECONDS = 16.0
SECONDS_OF_A_REPETITION = 0.5
FEWEST_ROUNDS = 3
BUSY = 0.15
"""A spread above it tells of other programs that want the same processors."""
BATCHES, SOURCES, K = 8, 2, 32
MOST_MEMBERS, MOST_STEPS = 1_000_000, 2**31 - 1


class Work(NamedTuple):
    """What is trained: the members of one grid side by side, over one source."""

    group: Group
    source: Source


class Timing(NamedTuple):
    """What was measured of one work."""

    architecture: str
    d_in: int
    d_sae: int
    batch_size: int
    members: int
    flops: float
    """Of the matrix products of a step, all members', by `cost.training_flops`."""
    memory: float
    """Bytes that training takes by arithmetic, `cost.Footprint.total`; not measured."""
    first_step: float
    """Seconds until the first step was done: tracing and compiling, and the step."""
    steps: int
    """Of a repetition."""
    seconds: tuple[float, ...]
    """Of a step, on the average over each repetition."""

    @property
    def name(self) -> str:
        """As a sentence calls it."""
        return f"{self.architecture} {self.d_in} -> {self.d_sae}"

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return float(np.median(self.seconds))

    @property
    def spread(self) -> float:
        """(most - least) / median of the repetitions."""
        return (max(self.seconds) - min(self.seconds)) / self.median

    @property
    def rows_per_second(self) -> float:
        """Of the source; all members see the same."""
        return self.batch_size / self.median

    @property
    def member_steps_per_second(self) -> float:
        """Steps, summed over members."""
        return self.members / self.median

    @property
    def flops_per_second(self) -> float:
        """In matrix products."""
        return self.flops / self.median


class Benchmark(NamedTuple):
    """What was measured of a machine."""

    peak: float
    """FLOP/s of a matrix product, measured between the warm-up and the first round."""
    timings: tuple[Timing, ...]

    @property
    def unsteady(self) -> tuple[Timing, ...]:
        """Works whose repetitions spread by more than `BUSY`."""
        return tuple(timing for timing in self.timings if timing.spread > BUSY)


def work(
    architecture: str,
    d_in: int,
    d_sae: int,
    batch_size: int,
    members: int,
    *,
    k: int | None = None,
    batches: int = BATCHES,
) -> Work:
    """A work of that size on standard normal rows, with Adam; members differ by seed.

    Args:
      architecture: a name of `architectures.TABLE`; a crosscoder has two sources, a transcoder gives rows as
        wide as it reads.
      d_in, d_sae: widths of the rows and of the latents.
      batch_size: rows of a step.
      members: how many train side by side.
      k: active latents of each row, where the architecture takes it; None for 32, or `d_sae` if that is less.
      batches: how many batches of rows there are before they come again.

    Returns:
      A `Work`.

    Raises:
      InputError: no such architecture, a number below 1, more than a million members, or rows that no memory
        is left for.

    Example:
      >>> measure([work("topk", 64, 256, batch_size=256, members=8, k=16)], seconds=3).timings[0].median
    """
    arguments = arguments_of(find(architecture))
    sizes = {"d_in": d_in, "d_sae": d_sae, "batch_size": batch_size, "members": members, "batches": batches}
    for name, size in sizes.items():
        require(size >= 1, f"{name} must be at least 1, got {size}")
    require(members <= MOST_MEMBERS, f"members must be at most {MOST_MEMBERS:,}, got {members}")
    shape = (batches * batch_size, *((SOURCES,) if "sources" in arguments else ()), d_in)
    bytes_of_rows, free = 4 * math.prod(shape), free_memory()
    require(bytes_of_rows <= free, f"the rows would take {told(bytes_of_rows)}, and {told(free)} are free")
    draw, fixed, axes = np.random.default_rng(0), {}, {}
    x, y = draw.standard_normal(shape, np.float32), None
    if "sources" in arguments:
        fixed["sources"] = SOURCES
    if "d_out" in arguments:
        fixed["d_out"], y = d_in, draw.standard_normal(shape, np.float32)
    if "k" in arguments:
        axes["k"] = [min(K, d_sae) if k is None else k]
    factory = partial(find(architecture), d_in=d_in, d_sae=d_sae, **fixed)
    table = grid(**axes, lr=[1e-3], seed=range(members))
    return Work(Group(factory, optax.adam, table), in_memory(x, batch_size, y=y))


def usual() -> tuple[Work, ...]:
    """Four works that stand for many: tiny, small and middling products, and an architecture that selects."""
    return (
        work("relu", 4, 6, batch_size=8, members=1024, batches=1),
        work("relu", 64, 256, batch_size=256, members=8),
        work("relu", 512, 2048, batch_size=1024, members=4),
        work("topk", 512, 4096, batch_size=1024, members=1, k=32),
    )


def measure(
    works: Sequence[Work],
    *,
    seconds: float = SECONDS,
    precision: str | None = None,
    tell: Callable[[str], None] = lambda sentence: None,
) -> Benchmark:
    """Time works in turn, A B C A B C, so that what else the machine does falls on all.

        a repetition = seconds of the same steps from the same state / steps

    Compiling, and the first step of each repetition, come before its clock starts. Members train in float32
    on JAX's default device.

    Args:
      works: what is trained.
      seconds: of all repetitions together, on a machine that is as fast as in the warm-up. Each takes half a
        second, or less where three rounds would not fit otherwise, and at least one step.
      precision: as for `sweep`.
      tell: called with what is being done.

    Returns:
      A `Benchmark`.

    Raises:
      InputError: no works, seconds that are not finite and above 0, a work that does not fit the memory, or
        what `sweep` would say against one.

    Example:
      >>> found = measure(usual())
      >>> [timing.flops_per_second / found.peak for timing in found.timings]
    """
    require(len(works) > 0, "there is nothing to time: no works were given")
    require(0 < seconds < math.inf, f"seconds must be finite and above 0, got {seconds}")
    each = min(SECONDS_OF_A_REPETITION, seconds / len(works) / FEWEST_ROUNDS)
    rounds = max(FEWEST_ROUNDS, int(seconds / len(works) / each))
    with nullcontext() if precision is None else linear.precision(precision):
        ready = []
        for number, one in enumerate(works, 1):
            tell(f"compiling {number} of {len(works)}")
            ready.append(_warmed(one, each))
        tell("measuring the peak")
        rate = peak(jnp.float32, precision)
        turns = []
        for number in range(1, rounds + 1):
            tell(f"round {number} of {rounds}")
            turns.append([_repeated(one) for one in ready])
    timings = [
        one.timing._replace(seconds=taken) for one, taken in zip(ready, zip(*turns, strict=True), strict=True)
    ]
    return Benchmark(rate, tuple(timings))


class _Ready(NamedTuple):
    """A work that is compiled."""

    step: Callable[..., Any]
    state: Any
    source: Source
    timing: Timing
    """Without the repetitions."""


def _warmed(one: Work, seconds: float) -> _Ready:
    group, source = one
    program, count = program_for(group, source, jnp.float32), members(group.grid)
    state, batch = shapes_of(program, group.grid, source, count)
    memory, free, sizes = footprint_of(state, batch).total, free_memory(), sizes_of(state, batch, count)
    architecture = first_of(program, group.grid).config.get("architecture", "sae")
    timing = Timing(
        architecture, batch.x.shape[-1], sizes.d_sae, sizes.batch_size, count,
        training_flops(state.train.params, sizes.batch_size), memory, 0.0, 0, (),
    )  # fmt: skip
    require(
        memory <= free,
        f"{timing.name} with {count} members and {sizes.batch_size} rows a step needs {told(memory)}, and "
        f"{told(free)} are free: try fewer members, rows or latents",
    )
    begun: Any = program.to_device(group.grid)
    ready = _Ready(program.step, program.start(begun), source, timing)
    first, *_ = _marks(ready, 1)
    per_step = _seconds_per_step(_marks(ready, MOST_STEPS, enough=seconds / 2))
    steps = int(min(max(1, round(seconds / per_step)), MOST_STEPS - 1))
    return ready._replace(timing=timing._replace(first_step=first.seconds, steps=steps))


def _repeated(ready: _Ready) -> float:
    """Seconds of a step, over as many as a repetition has, after one that is not timed."""
    return _seconds_per_step(_marks(ready, ready.timing.steps + 1))


class _Mark(NamedTuple):
    seconds: float
    """Since the run began."""
    done: int
    """Steps."""


def _marks(ready: _Ready, steps: int, enough: float = math.inf) -> list[_Mark]:
    """When each of the loop's chunks was done; the first is one step."""
    marks, began = [], time.perf_counter()

    def between(done: int, state: Any, history: Any) -> bool:
        marks.append(_Mark(time.perf_counter() - began, done))
        return len(marks) > 1 and marks[-1].seconds - marks[0].seconds > enough

    run(ready.step, ready.state, ready.source, steps, points=1, between=between)
    return marks


def _seconds_per_step(marks: Sequence[_Mark]) -> float:
    first, last = marks[0], marks[-1]
    return (last.seconds - first.seconds) / (last.done - first.done)
