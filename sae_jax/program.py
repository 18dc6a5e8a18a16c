"""What a sweep compiles: one member's functions, vmapped, with each axis led to what takes it."""

import inspect
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Shaped

from sae_jax import metrics, sharding
from sae_jax.base import SAE, Batch, InputError, TrainState, require
from sae_jax.cost import Footprint, footprint
from sae_jax.data import Source, batch_shape
from sae_jax.endings import Ending, Patience, not_yet, until_ended
from sae_jax.grid import Grid
from sae_jax.spread import Sizes
from sae_jax.train import init, make_step, trained_params


class Members(NamedTuple):
    """The state of a sweep: each leaf has a leading axis over members."""

    hyper: dict[str, Shaped[Array, "members"]]
    train: TrainState
    ending: Ending


def checked_program(
    factory, optimizer, grid: Grid, source: Source, dtype, patience: Patience | None = None
) -> "Program":
    """The program for these arguments; whatever can be said against them is said here."""
    seeds = grid.get("seed", np.zeros(1, int))
    whole = seeds.dtype.kind in "iu" and seeds.min() >= 0 and seeds.max() < 2**32
    require(bool(whole), "every seed must be a whole number from 0 to 2^32 - 1")
    exact = jax.dtypes.canonicalize_dtype(dtype) == jnp.dtype(dtype)
    require(
        exact, f"dtype {jnp.dtype(dtype)} needs double precision: jax.config.update('jax_enable_x64', True)"
    )
    if patience is not None:
        patience.check()
    program = program_of(Call.of(factory), Call.of(optimizer), tuple(grid), jnp.dtype(dtype), patience)
    for row in _distinct_rows(grid, program.factory_names):
        factory(**row)
    _try(program, grid, source)
    return program


class Call(NamedTuple):
    """A partial as a value, so that two of the same call share one compiled program."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]

    @staticmethod
    def of(function: Any) -> Any:
        """The call that a partial stands for; anything else, or a partial over lists, as it is."""
        if not isinstance(function, partial):
            return function
        call = Call(function.func, function.args, tuple(sorted(function.keywords.items())))
        try:
            hash(call)
        except TypeError:
            return function
        return call

    def partial(self) -> partial:
        """The call as a partial again."""
        return partial(self.function, *self.arguments, **dict(self.keywords))


class Program(NamedTuple):
    """The compiled parts of a sweep; made once per factory, optimizer and axes."""

    factory_names: tuple[str, ...]
    build: Callable[[dict[str, Any]], tuple[SAE, optax.GradientTransformation]]
    first_step: Callable[[dict[str, Any], Batch], Any]
    """Of one member, from its initial weights; to find out whether it can be traced."""
    to_device: Callable[[Grid], dict[str, np.ndarray]]
    """Columns of a grid in the dtypes that devices take."""
    start: Callable[[dict[str, Array]], Members]
    step: Callable[[Members, Batch], tuple[Members, dict[str, Array]]]
    measure: Callable[[Members, Batch, Array], metrics.Sums]
    encode: Callable[[Members, Array], Array]


@lru_cache(maxsize=32)
def program_of(
    factory, optimizer, names: tuple[str, ...], dtype, patience: Patience | None = None
) -> Program:
    factory = factory.partial() if isinstance(factory, Call) else factory
    optimizer = optimizer.partial() if isinstance(optimizer, Call) else optimizer
    factory_names, optimizer_names = _route(factory, optimizer, names)

    def build(hyper) -> tuple[SAE, optax.GradientTransformation]:
        sae = factory(**{name: hyper[name] for name in factory_names})
        if isinstance(optimizer, optax.GradientTransformation):
            return sae, optimizer
        return sae, optimizer(**{theirs: hyper[ours] for ours, theirs in optimizer_names.items()})

    def to_device(rows: Grid) -> dict[str, np.ndarray]:
        kinds = {"f": dtype, "i": jnp.int32, "u": jnp.uint32}
        whole = {
            name: column.astype(np.uint32) if name == "seed" else column for name, column in rows.items()
        }
        return {name: column.astype(kinds[column.dtype.kind]) for name, column in whole.items()}

    def start(hyper) -> TrainState:
        return init(*build(hyper), jax.random.key(hyper.get("seed", 0)), dtype)

    def begin(hyper) -> Members:
        return Members(hyper, jax.vmap(start)(hyper), jax.vmap(lambda _: not_yet(patience))(hyper))

    def step(hyper, state: TrainState, batch: Batch):
        return make_step(*build(hyper))(state, batch)

    def guarded_step(hyper, state: TrainState, ending: Ending, batch: Batch):
        return until_ended(make_step(*build(hyper)), patience)(state, ending, batch)

    def measure(hyper, state: TrainState, batch: Batch, centre):
        return metrics.measure(build(hyper)[0], trained_params(state), batch, centre)

    def encode(hyper, state: TrainState, x):
        return build(hyper)[0].encode(trained_params(state), x)

    def vmapped_step(state: Members, batch: Batch):
        over_members = jax.vmap(guarded_step)
        count = state.train.progress.step.shape[0]
        own = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), sharding.rows(batch))
        train, ending, logs = over_members(state.hyper, state.train, state.ending, own)
        return laid_out(Members(state.hyper, train, ending)), logs

    def vmapped_measure(state: Members, batch: Batch, centre):
        over_members = jax.vmap(measure, in_axes=(0, 0, None, None))
        return sharding.everywhere_on_mesh(
            over_members(state.hyper, state.train, sharding.rows(batch), centre)
        )

    def vmapped_encode(state: Members, x):
        over_members = jax.vmap(encode, in_axes=(0, 0, None))
        return sharding.everywhere_on_mesh(over_members(state.hyper, state.train, sharding.rows(x)))

    return Program(
        factory_names,
        build,
        lambda hyper, batch: step(hyper, start(hyper), batch),
        to_device,
        jax.jit(lambda hyper: laid_out(begin(hyper))),
        vmapped_step,
        jax.jit(vmapped_measure),
        jax.jit(vmapped_encode),
    )


def laid_out(state: Members) -> Members:
    """Inside a compiled function: the state as `sharding.SPECS` lays it out, where a mesh is in force."""
    return sharding.constrained(state, layout(state))


def layout(state: Members) -> Any:
    """How the state lies on a mesh, a spec per leaf."""
    one = jax.eval_shape(lambda params: jax.tree.map(lambda leaf: leaf[0], params), state.train.params)
    return sharding.specs(state, one, lead=("member",))


def arguments_of(factory: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The arguments that a factory takes by name, those it hands on to another (`of=topk`) among them."""
    parameters = dict(inspect.signature(factory).parameters)
    for parameter in list(parameters.values()):
        if parameter.kind is parameter.VAR_KEYWORD:
            del parameters[parameter.name]
            inner = parameters["of"].default if "of" in parameters else None
            parameters = {**(arguments_of(inner) if callable(inner) else {}), **parameters}
    return parameters


def bounded(factory: Callable[..., SAE], grid: Grid) -> Callable[..., SAE]:
    """The factory with `k_max` set to the largest `k` of the grid, and so for any argument NAME_max.

    What bounds a traced argument is static, and only the grid knows it.
    """
    arguments = arguments_of(factory)
    bounds = {
        f"{name}_max": column.max().item()
        for name, column in grid.items()
        if name in arguments and f"{name}_max" in arguments and arguments[f"{name}_max"].default is None
    }
    return partial(factory, **bounds) if bounds else factory


def _route(factory, optimizer, names: Iterable[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Which axes the factory takes, and under which name the optimizer takes the others."""
    ours = set(arguments_of(factory))
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


def _try(program: Program, grid: Grid, source: Source) -> None:
    """Trace one member's first step, so that what cannot work is said before anything is compiled."""
    batch = batch_shape(source)
    # one seed is as good as another, and seeds differ from sweep to sweep
    concrete = tuple((name, 0 if name == "seed" else column[0].item()) for name, column in grid.items())
    rows = program.to_device({name: column[:1] for name, column in grid.items()})
    traced = tuple((name, jax.ShapeDtypeStruct((), column.dtype)) for name, column in rows.items())
    _tried(program, concrete, traced, batch)


@lru_cache(maxsize=32)
def _tried(
    program: Program,
    first: tuple[tuple[str, Any], ...],
    kinds: tuple[tuple[str, jax.ShapeDtypeStruct], ...],
    batch: Batch,
) -> None:
    """`_try` of a grid by its first row and the kinds of its columns, on batches of that shape."""
    concrete, traced = dict(first), dict(kinds)
    sae, _ = program.build(concrete)
    width = batch.x.shape[-1]
    d_in = sae.config.get("d_in", width)
    require(d_in == width, f"the factory's d_in is {d_in}, but the source's rows have {width} columns")

    def both(x):
        params = sae.init(jax.random.key(0))
        f = sae.encode(params, x)
        return f, sae.decode(params, f, x)

    f, x_hat = jax.eval_shape(both, batch.x)
    require(
        f.ndim == 2, f"rows of {list(batch.x.shape[1:])} are for a crosscoder; this SAE reads one vector each"
    )
    require(
        x_hat.shape == batch.y.shape,
        f"the SAE gives {x_hat.shape[-1]} columns, but the source's targets have {batch.y.shape[-1]}",
    )

    def fails(names: Iterable[str]) -> Exception | None:
        """What tracing over these axes raises, the others at their first value."""
        some = {name: traced[name] for name in names}
        try:
            jax.eval_shape(lambda hyper, batch: program.first_step({**concrete, **hyper}, batch), some, batch)
        except (TypeError, ValueError, jax.errors.JAXTypeError) as error:
            return error
        return None

    error = fails(concrete)
    if error is None:
        return
    culprit = None if fails(()) else next((name for name in concrete if fails((name,))), None)
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


def first_of(program: Program, grid: Grid) -> SAE:
    """The SAE of a grid's first member."""
    return program.build({name: column[0].item() for name, column in grid.items()})[0]


def shapes_of(program: Program, grid: Grid, source: Source, count: int = 1) -> tuple[Members, Batch]:
    """The shapes of a state of so many members of a grid, and of a batch."""
    hyper = program.to_device({name: np.resize(column, count) for name, column in grid.items()})
    return jax.eval_shape(program.start, hyper), batch_shape(source)


def footprint_of(state: Members, batch: Batch) -> Footprint:
    """What members take while they train on such batches."""
    return footprint(state.train, batch, beside=(state.hyper, state.ending))


def sizes_of(state: Members, batch: Batch, total: int) -> Sizes:
    """What is spread over devices, where there are so many members in all."""
    return Sizes(total, batch.x.shape[0], state.train.progress.since_fired.shape[-1])
