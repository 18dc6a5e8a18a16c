"""A sweep is `vmap` of the training step over a table of hyper-parameters."""

import hashlib
import inspect
import math
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import psutil
from jaxtyping import Array, Shaped

from sae_jax import checkpoint, metrics
from sae_jax.base import SAE, Batch, InputError, Params, TrainState, require
from sae_jax.data import Source
from sae_jax.grid import Grid, members
from sae_jax.result import SweepResult
from sae_jax.train import History, init, make_step, run_resumable

SHARE_OF_MEMORY = 0.5
"""How much of the free memory a chunk of members may fill."""


class Members(NamedTuple):
    """The state of a sweep: each leaf has a leading axis over members."""

    hyper: dict[str, Shaped[Array, "members"]]
    train: TrainState


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
    checkpoints: Path | None = None,
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
    program = _checked(factory, optimizer, grid, source, dtype)
    total = members(grid)
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


def _checked(factory, optimizer, grid: Grid, source: Source, dtype) -> "_Program":
    """The program for these arguments; whatever can be said against them is said here."""
    seeds = grid.get("seed", np.zeros(1, int))
    whole = seeds.dtype.kind in "iu" and seeds.min() >= 0 and seeds.max() < 2**32
    require(bool(whole), "every seed must be a whole number from 0 to 2^32 - 1")
    exact = jax.dtypes.canonicalize_dtype(dtype) == jnp.dtype(dtype)
    require(
        exact, f"dtype {jnp.dtype(dtype)} needs double precision: jax.config.update('jax_enable_x64', True)"
    )
    program = _program(_Call.of(factory), _Call.of(optimizer), tuple(grid), jnp.dtype(dtype))
    for row in _distinct_rows(grid, program.factory_names):
        factory(**row)
    _try(program, grid, source)
    return program


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
    names = _checked(factory, optimizer, grid, source, dtype).factory_names
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


class _Call(NamedTuple):
    """A partial as a value, so that two of the same call share one compiled program."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]

    @staticmethod
    def of(function: Any) -> Any:
        """The call that a partial stands for; anything else, or a partial over lists, as it is."""
        if not isinstance(function, partial):
            return function
        call = _Call(function.func, function.args, tuple(sorted(function.keywords.items())))
        try:
            hash(call)
        except TypeError:
            return function
        return call

    def partial(self) -> partial:
        """The call as a partial again."""
        return partial(self.function, *self.arguments, **dict(self.keywords))


class _Program(NamedTuple):
    """The compiled parts of a sweep; made once per factory, optimizer and axes."""

    factory_names: tuple[str, ...]
    build: Callable[[dict[str, Any]], tuple[SAE, optax.GradientTransformation]]
    first_step: Callable[[dict[str, Any], Batch], Any]
    """Of one member, from its initial weights; to find out whether it can be traced."""
    to_device: Callable[[Grid], dict[str, Array]]
    start: Callable[[dict[str, Array]], Members]
    step: Callable[[Members, Batch], tuple[Members, dict[str, Array]]]
    measure: Callable[[Members, Batch, Array], metrics.Sums]


@lru_cache(maxsize=32)
def _program(factory, optimizer, names: tuple[str, ...], dtype) -> _Program:
    factory = factory.partial() if isinstance(factory, _Call) else factory
    optimizer = optimizer.partial() if isinstance(optimizer, _Call) else optimizer
    factory_names, optimizer_names = _route(factory, optimizer, names)

    def build(hyper) -> tuple[SAE, optax.GradientTransformation]:
        sae = factory(**{name: hyper[name] for name in factory_names})
        if isinstance(optimizer, optax.GradientTransformation):
            return sae, optimizer
        return sae, optimizer(**{theirs: hyper[ours] for ours, theirs in optimizer_names.items()})

    def to_device(rows: Grid) -> dict[str, Array]:
        kinds = {"f": dtype, "i": jnp.int32, "u": jnp.uint32}
        whole = {
            name: column.astype(np.uint32) if name == "seed" else column for name, column in rows.items()
        }
        return {name: jnp.asarray(column, kinds[column.dtype.kind]) for name, column in whole.items()}

    def start(hyper) -> TrainState:
        return init(*build(hyper), jax.random.key(hyper.get("seed", 0)), dtype)

    def step(hyper, state: TrainState, batch: Batch):
        return make_step(*build(hyper))(state, batch)

    def measure(hyper, params: Params, batch: Batch, centre):
        return metrics.measure(build(hyper)[0], params, batch, centre)

    def vmapped_step(state: Members, batch: Batch):
        train, logs = jax.vmap(step, in_axes=(0, 0, None))(state.hyper, state.train, batch)
        return Members(state.hyper, train), logs

    return _Program(
        factory_names,
        build,
        lambda hyper, batch: step(hyper, start(hyper), batch),
        to_device,
        jax.jit(lambda hyper: Members(hyper, jax.vmap(start)(hyper))),
        vmapped_step,
        jax.jit(
            lambda state, batch, centre: jax.vmap(measure, in_axes=(0, 0, None, None))(
                state.hyper, state.train.params, batch, centre
            )
        ),
    )


def _route(factory, optimizer, names: Iterable[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Which axes the factory takes, and under which name the optimizer takes the others."""
    ours = set(inspect.signature(factory).parameters)
    is_chain = isinstance(optimizer, optax.GradientTransformation)
    parameters = {} if is_chain else dict(inspect.signature(optimizer).parameters)
    theirs = {name: name for name in parameters}
    if "learning_rate" in theirs:
        theirs["lr"] = "learning_rate"
    to_optimizer: dict[str, str] = {}
    for name in names:
        if name in ours and name in theirs:
            raise InputError(f"both the factory and the optimizer take {name!r}: bind it in one with partial")
        if name in theirs:
            require(theirs[name] not in to_optimizer.values(), f"{name!r} is swept under two names")
            to_optimizer[name] = theirs[name]
        elif name not in ours and name != "seed":
            known = ", ".join(sorted({*ours, *theirs, "seed"}))
            raise InputError(f"nothing takes the axis {name!r}; there are: {known}")
    for name, parameter in parameters.items():
        needed = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        )
        axis = "lr" if name == "learning_rate" else name
        given = name in to_optimizer.values()
        require(given or not needed, f"the optimizer needs {name}: give the grid an axis {axis}=[...]")
    return tuple(name for name in names if name in ours), to_optimizer


def _try(program: _Program, grid: Grid, source: Source) -> None:
    """Trace one member's first step, so that what cannot work is said before anything is compiled."""
    batch = jax.eval_shape(lambda: source.batch(jnp.int32(0)))
    concrete = {name: column[0].item() for name, column in grid.items()}
    width = batch.x.shape[1]
    d_in = program.build(concrete)[0].config.get("d_in", width)
    require(d_in == width, f"the factory's d_in is {d_in}, but the source's rows have {width} columns")
    sae = program.build(concrete)[0]
    shape = jax.eval_shape(
        lambda x: sae.decode(p := sae.init(jax.random.key(0)), sae.encode(p, x)), batch.x
    ).shape
    require(
        shape == batch.y.shape,
        f"the SAE gives {shape[-1]} columns, but the source's targets have {batch.y.shape[-1]}",
    )
    rows = program.to_device({name: column[:1] for name, column in grid.items()})
    traced = {name: jax.ShapeDtypeStruct((), column.dtype) for name, column in rows.items()}

    def fails(names: Iterable[str]) -> Exception | None:
        """What tracing over these axes raises, the others at their first value."""
        some = {name: traced[name] for name in names}
        try:
            jax.eval_shape(lambda hyper, batch: program.first_step({**concrete, **hyper}, batch), some, batch)
        except (TypeError, ValueError, jax.errors.JAXTypeError) as error:
            return error
        return None

    error = fails(grid)
    if error is None:
        return
    culprit = None if fails(()) else next((name for name in grid if fails((name,))), None)
    if culprit is None:
        raise error
    raise InputError(
        f"{culprit!r} sets a shape or a branch, so it cannot be an axis: run one sweep per value of it"
    ) from error


def _distinct_rows(grid: Grid, names: tuple[str, ...]) -> list[dict[str, Any]]:
    if not names:
        return []
    rows = np.unique(np.stack([np.asarray(grid[name], np.float64) for name in names], axis=1), axis=0)
    return [dict(zip(names, row.tolist(), strict=True)) for row in rows]


def members_that_fit(program: _Program, grid: Grid, source: Source) -> int:
    """How many members train at once in half of the free memory: weights, moments, gradients, activations."""
    one = program.to_device({name: column[:1] for name, column in grid.items()})
    state = jax.eval_shape(program.start, one)
    batch = jax.eval_shape(lambda: source.batch(jnp.int32(0)))
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.train.params))
    d_sae = state.train.progress.since_fired.shape[-1]
    # features, pre-activations and their gradients; reconstruction, error and its gradient
    rows = batch.x.shape[0] * (4 * d_sae + 3 * batch.y.shape[1]) * state.train.params["W_dec"].dtype.itemsize
    return max(1, int(SHARE_OF_MEMORY * free_memory() // (2 * held + 2 * weights + rows)))


def free_memory() -> int:
    """Bytes that the first device still has."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return psutil.virtual_memory().available
