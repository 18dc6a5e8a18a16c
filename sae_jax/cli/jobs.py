"""From the options of `sae-jax sweep` and `train` to groups: one per architecture and width."""

import collections.abc
import inspect
import itertools
import typing
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optax

from sae_jax import normalise, synthetic
from sae_jax.architectures import convention, find
from sae_jax.base import SAE, require
from sae_jax.data import (
    Rows,
    Source,
    as_float32,
    in_memory,
    is_store,
    open_rows,
    open_store,
    read_array,
    side_by_side,
    stored,
)
from sae_jax.grid import Grid, grid, members, parse_axis, zipped
from sae_jax.program import arguments_of
from sae_jax.sweep import Group
from sae_jax.synthetic import Tokens, World, seed_tokens
from sae_jax.transforms import unit_norm_decoder

OPTIONS = {"l1": "--l1", "lr": "--lr", "seed": "--seeds", "d_sae": "--d-sae"}
"""Arguments that have an option of their own."""
FROM_DATA = ("d_in", "d_out", "sources")
"""Arguments that the data tell."""
NORMALISATIONS = {
    "mean_norm": normalise.mean_norm,
    "unit_mean_square": normalise.unit_mean_square,
    "centring": normalise.centring,
    "whitening": normalise.whitening,
    "layer_norm": lambda x: normalise.layer_norm,
}


class Defaults(NamedTuple):
    """What is taken where an option is left out."""

    d_sae: Callable[[int], int]
    lr: str
    steps: int
    sparsity: dict[str, str]
    """Values by the argument that sets sparsity; an architecture's is the first that it takes."""
    seeds: int


ON_TOKENS = Defaults(
    d_sae=lambda d_in: 6,
    lr="0.01",
    steps=500,
    sparsity={"k": "1,2,3", "l1": "0.001:1:16", "l0_coefficient": "0.001:1:16"},
    seeds=16,
)
ON_DATA = Defaults(
    d_sae=lambda d_in: 4 * d_in,
    lr="0.001",
    steps=5000,
    sparsity={"k": "2,4,8,16,32", "l1": "0.0001:0.1:8", "l0_coefficient": "0.0001:0.1:8"},
    seeds=1,
)
IN_WORLD = ON_DATA._replace(seeds=3)
ROWS_PER_STEP = 1024
ROWS_TO_NORMALISE_BY = 65_536
"""Of a stream, spread evenly; of an array it is all."""
LARGEST_OF_A_WORLD = 10_000_000
"""Above it a number of features or rows is a slip of the hand that would end in the machine's memory."""


class Job(NamedTuple):
    """A training run, ready to start."""

    groups: tuple[Group, ...]
    source: Source
    steps: int
    tokens: Tokens | None
    normalisation: Any
    """What the rows went through, to be folded into the weights; None for nothing."""

    @property
    def truth(self) -> World | None:
        """The world that the data come from."""
        return self.source if isinstance(self.source, World) else None

    @property
    def members(self) -> int:
        """How many members all groups have together."""
        return sum(members(group.grid) for group in self.groups)


def prepare(options: Any) -> Job:
    """Read the data and lay out the grids. What can be said against the input is said here."""
    builders = [find(name) for name in options.arch.split(",")]
    require(len(set(builders)) == len(builders), f"--arch names an architecture twice: {options.arch}")
    at_once = options.members_at_once
    require(at_once is None or at_once >= 1, f"--members-at-once must be at least 1, got {at_once}")
    source, normalisation, shapes, defaults = _given(options)
    widths = (
        [defaults.d_sae(shapes["d_in"])]
        if options.d_sae is None
        else _whole_numbers("--d-sae", options.d_sae)
    )
    words = _words(options.arg)
    shaped = [_shaped(build, words, shapes, options) for build in builders]
    optimizer = adam_on_unit_norm if options.unit_norm_decoder else adam
    _require_taken([*words, *(["l1"] if options.l1 is not None else [])], shaped, optimizer)
    groups = [
        Group(partial(factory, d_sae=d_sae), optimizer, _table(factory, d_sae, words, options, defaults))
        for factory in shaped
        for d_sae in widths
    ]
    steps = options.steps if options.steps is not None else defaults.steps
    tokens = seed_tokens() if defaults is ON_TOKENS else None
    return Job(tuple(groups), source, steps, tokens, normalisation)


class Given(NamedTuple):
    """What the options say of the data."""

    source: Source
    normalisation: Any
    """What the rows go through; None for nothing."""
    shapes: dict[str, int]
    """Arguments that the data tell."""
    defaults: Defaults


def _given(options: Any) -> Given:
    """Where the rows come from, and what goes without saying for them."""
    if options.world is not None:
        return _world_rows(options)
    require(not options.world_args, "--world-args is for --world NAME")
    streamed = options.data is not None and (options.stream or is_streamed(options.data))
    if not streamed:
        for name in ("stream", "window_rows"):
            require(not getattr(options, name), f"--{name.replace('_', '-')} is for rows that are streamed")
    if options.data is None or not is_store(options.data):
        for name in ("site", "target_site"):
            require(getattr(options, name) is None, f"--{name.replace('_', '-')} is for a store")
    source, x, y = (_streamed_rows if streamed else _rows_in_memory)(options)
    normalisation = None
    if options.normalise is not None:
        require(y is None, "--normalise is for data that are their own target, not for transcoders")
        sample = np.concatenate([np.asarray(batch.x) for batch in source.evaluation(ROWS_TO_NORMALISE_BY)])
        normalisation = NORMALISATIONS[options.normalise](sample if streamed else x)
        source = normalise.normalised(source, normalisation)
    shapes = {"d_in": x.shape[-1], "sources": x.shape[1]} | ({} if y is None else {"d_out": y.shape[-1]})
    return Given(source, normalisation, shapes, ON_TOKENS if options.data is None else ON_DATA)


def _rows_in_memory(options: Any) -> tuple[Source, Any, Any]:
    """The source, its rows and its targets."""
    x = seed_tokens().x
    if options.data is not None:
        x = as_float32(read_array(options.data, options.array), options.data)
    y = None if options.target is None else as_float32(read_array(options.target), str(options.target))
    return in_memory(x, _rows_per_step(options), options.data_seed, y=y), x, y


def _streamed_rows(options: Any) -> tuple[Source, Any, Any]:
    x, y = streamed(options)
    window = {} if options.window_rows is None else {"window_rows": options.window_rows}
    return stored(x, _rows_per_step(options), options.data_seed, y=y, **window), x, y


def _rows_per_step(options: Any) -> int:
    return ROWS_PER_STEP if options.batch_size is None else options.batch_size


def streamed(options: Any) -> tuple[Rows, Rows | None]:
    """The rows that DATA, a store or a file, gives as they are asked for, and the targets of a transcoder."""
    if is_store(options.data):
        require(options.array is None, "a store holds sites: --site NAME in place of --array")
        require(options.target is None, "a store's targets are a site of it: --target-site NAME")
        store = open_store(options.data)
        names = [None] if options.site is None else options.site.split(",")
        several = [store.site(name) for name in names]
        x = several[0] if len(several) == 1 else side_by_side(several)
        return x, None if options.target_site is None else store.site(options.target_site)
    x = open_rows(options.data, options.array)
    return x, None if options.target is None else open_rows(options.target)


def is_streamed(data: str) -> bool:
    """Whether data are read as they are asked for without anybody asking for it: stores and folders."""
    return is_store(data) or Path(data).is_dir()


def _world_rows(options: Any) -> Given:
    for name in ("data", "array", "target", "normalise", "site", "target_site", "window_rows", "stream"):
        word = name.upper() if name == "data" else f"--{name.replace('_', '-')}"
        require(not getattr(options, name), f"--world makes its own data: leave out {word}")
    rows = {} if options.batch_size is None else {"batch_size": options.batch_size}
    found = world(options.world, itertools.chain(*options.world_args), data_seed=options.data_seed, **rows)
    features, d_in = found.directions.shape
    return Given(found, None, {"d_in": d_in}, IN_WORLD._replace(d_sae=lambda d_in: features))


def world(name: str, arguments: Iterable[str], **options: int) -> World:
    """A world by its name, its `NAME=VALUE` arguments, and arguments that have options of their own."""
    build = synthetic.find(name)
    taken = inspect.signature(build).parameters
    given: dict[str, Any] = {}
    for argument in arguments:
        word, equals, text = argument.partition("=")
        require(bool(equals), f"--world-args takes NAME=VALUE, got {argument!r}")
        require(word not in given, f"{word} of the world is given twice")
        require(word not in options, f"{word} has an option of its own: --{word.replace('_', '-')}")
        listed = ", ".join(taken)
        require(word in taken, f"the world {name} takes no argument {word!r}; there are: {listed}")
        given[word] = _value(word, text, taken[word].annotation)
        small = not isinstance(given[word], int) or "seed" in word or given[word] < LARGEST_OF_A_WORLD
        require(small, f"{word} must be below {LARGEST_OF_A_WORLD:,}, got {text}")
    return build(**given, **options)


def adam(learning_rate, b1=0.9, b2=0.999, eps=1e-8):
    """Adam, by the arguments that the command line can sweep."""
    return optax.adam(learning_rate, b1, b2, eps)


def adam_on_unit_norm(learning_rate, b1=0.9, b2=0.999, eps=1e-8):
    """Adam, with every decoder row kept at norm 1."""
    return optax.chain(adam(learning_rate, b1, b2, eps), unit_norm_decoder())


def _words(arguments: Iterable[str]) -> dict[str, str]:
    """`--arg NAME=VALUES` as names and texts."""
    words: dict[str, str] = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        require(bool(equals), f"--arg takes NAME=VALUES, got {argument!r}")
        require(name not in OPTIONS, f"{name} has an option of its own: {OPTIONS.get(name)}")
        require(name not in FROM_DATA, f"{name} is told by the data")
        require(name not in words, f"{name} is given twice")
        words[name] = text
    return words


def _shaped(
    build: Callable[..., SAE], words: dict[str, str], shapes: dict[str, int], options: Any
) -> Callable[..., SAE]:
    """The architecture with what the data tell, and what sets a shape or a branch, bound."""
    if "of" in words and "of" in arguments_of(build):
        build = partial(build, of=convention(words["of"]))
    arguments = arguments_of(build)
    if "d_out" in arguments and options.world is not None:
        require(
            False, "a world has no rows that a transcoder could give; --world is for the other architectures"
        )
    elif "d_out" in arguments:
        require(
            "d_out" in shapes,
            "a transcoder needs --target FILE (of a store --target-site NAME): the rows that it is to give",
        )
    elif "d_out" in shapes:
        require(False, f"--target and --target-site are for --arch transcoder, not for {options.arch}")
    told = {name: size for name, size in shapes.items() if name in arguments}
    fixed = {
        name: _value(name, text, arguments[name].annotation)
        for name, text in words.items()
        if name in arguments and name != "of" and not _may_be_swept(arguments[name].annotation)
    }
    return partial(build, **told, **fixed)


def _table(
    factory: Callable[..., SAE], d_sae: int, words: dict[str, str], options: Any, defaults: Defaults
) -> Grid:
    """The grid of one architecture at one width."""
    require(d_sae >= 1, f"d_sae must be at least 1, got {d_sae}")
    arguments = arguments_of(factory)
    name = next((name for name in defaults.sparsity if name in arguments), None)
    axes: dict[str, Any] = {}
    if options.l0 is not None:
        target = "k" if "k" in arguments else "target_l0"
        require(target in arguments, f"{options.arch} has no argument that --l0 could set")
        axes[target] = parse_axis(options.l0)
    elif name is not None and name not in words and "target_l0" not in words:
        given = options.l1 if name == "l1" else None
        axes[name] = parse_axis(defaults.sparsity[name] if given is None else given)
        if name == "k" and given is None:
            axes[name] = [k for k in axes[name] if k <= d_sae] or [1]
    if options.l1 is not None and "l1" in arguments:
        axes["l1"] = parse_axis(options.l1)
    axes["lr"] = parse_axis(defaults.lr if options.lr is None else options.lr)
    require(min(axes["lr"]) > 0, f"--lr must be above 0, got {min(axes['lr'])}")
    optimizers = arguments_of(adam)
    for word, text in words.items():
        swept = word in arguments and _may_be_swept(arguments[word].annotation)
        require(not (swept and word in axes), f"{word} is given twice, by --l0 and by --arg")
        if swept or (word in optimizers and word not in arguments):
            axes[word] = parse_axis(text)
    if "k" in axes:
        axes["k"] = [int(k) if k == int(k) else k for k in axes["k"]]
    seeds = options.seeds if options.seeds is not None else defaults.seeds
    require(seeds >= 1, f"--seeds must be at least 1, got {seeds}")
    axes["seed"] = range(seeds)
    return _product(axes, options.zip)


def _product(axes: dict[str, Any], together: str | None) -> Grid:
    if together is None:
        return grid(**axes)
    names = together.split(",")
    unknown = [name for name in names if name not in axes]
    require(len(set(names)) == len(names), f"--zip names an axis twice: {together}")
    require(not unknown, f"--zip names {', '.join(unknown)}, but the axes are {', '.join(axes)}")
    rest = {name: values for name, values in axes.items() if name not in names}
    return grid(zipped(**{name: axes[name] for name in names}), **rest)


def _require_taken(names: list[str], factories: list[Callable[..., SAE]], optimizer: Callable) -> None:
    """Every argument given is one that some architecture, or the optimizer, takes."""
    known = {name for taker in (*factories, optimizer) for name in arguments_of(taker)}
    for name in names:
        listed = ", ".join(sorted(known - {*FROM_DATA, "d_sae", "learning_rate", "reconstruction"}))
        require(name in known, f"nothing takes the argument {name!r}; there are: {listed}")


def _may_be_swept(annotation: Any) -> bool:
    """Whether an argument is a number that may be traced: its annotation says so by naming an array."""
    return not _is_function(annotation) and any(
        "jaxtyping" in str(getattr(kind, "__module__", "")) or "Shaped" in str(kind)
        for kind in _kinds(annotation)
    )


def _is_function(annotation: Any) -> bool:
    """Whether an argument is a function, whose own annotation may name arrays too."""
    return any(
        typing.get_origin(kind) is collections.abc.Callable for kind in (annotation, *_kinds(annotation))
    )


def _kinds(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) or (annotation,)


def _value(name: str, text: str, annotation: Any) -> Any:
    """What the text of an argument that sets a shape or a branch stands for."""
    kinds = (annotation, *_kinds(annotation))
    if _is_function(annotation):
        return convention(text)
    if any(typing.get_origin(kind) is tuple for kind in kinds):
        return tuple(int(value) if value == int(value) else value for value in parse_axis(text))
    if bool in kinds:
        words = {"true": True, "false": False}
        require(text.lower() in words, f"{name} must be True or False, got {text!r}")
        return words[text.lower()]
    if int in kinds:
        if text == "None" and type(None) in kinds:
            return None
        numbers = _whole_numbers(name, text)
        require(len(numbers) == 1, f"{name} sets a shape or a branch, so it takes one value, got {text!r}")
        return numbers[0]
    values = parse_axis(text)
    require(len(values) == 1, f"{name} sets a shape or a branch, so it takes one value, got {text!r}")
    return values[0]


def _whole_numbers(name: str, text: str) -> list[int]:
    parts = text.split(",")
    for part in parts:
        require(part.strip().isdecimal(), f"{name} must be a whole number, got {part.strip()!r}")
    return [int(part) for part in parts]
