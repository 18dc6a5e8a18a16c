"""One pass over activations: on what each feature is active, how often, how strongly, and in which contexts.

A stretch is encoded, taken into what is kept, and gone.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from sae_jax.base import SAE, Params, require
from sae_jax.data.stored import read_ahead
from sae_jax.features.keeping import ROWS_AT_A_TIME, USUAL, Kept, Options, Sums, edges_for, nothing, take_in
from sae_jax.features.observed import NONE, Examples, Passages, Seen
from sae_jax.features.reading import Reading, Stretch, stretches, windows
from sae_jax.features.together import fires_with

STRETCH_BYTES = 2**29
"""About how large the features of one stretch may be."""
MOST_AT_ONCE = 2**16
"""Rows."""
SAMPLED, SAMPLED_BYTES = 16_384, 2**28
"""Tokens by which it is judged what fires together, and as how many flags of features at most."""
MOST_OF_A_PASSAGE = 64
"""Rows, where each is a context of its own."""


class Told(NamedTuple):
    """How far a pass has come."""

    rows: int
    total: int
    device_bytes: int
    """What the compiled step takes of the device's memory, its arguments and results among it."""
    at_once: int
    """Rows of a stretch."""


def look(
    sae: SAE,
    params: Params,
    reading: Reading,
    options: Options = USUAL,
    *,
    seed: int = 0,
    told: Callable[[Told], None] = lambda now: None,
) -> Seen:
    """On what each feature is active, how often, how strongly, and in which contexts: in one pass.

    Args:
      sae: the model, whose `encode` gives the features.
      params: its weights.
      reading: rows as wide as the SAE reads, in contexts; from `of_store` or `of_rows`.
      options: how much to keep.
      seed: of the sample of contexts.
      told: called before the first stretch and after each.

    Returns:
      `Seen`. Of each feature the contexts with its largest activations, and a uniform sample of all those in
      which it is active, each context once, by its strongest token. Counts and histograms are of every token;
      what fires together is judged by up to 16,384 tokens drawn by chance.

    Raises:
      InputError: rows of another width, or sizes under 1.

    Example:
      >>> seen = look(*trained, of_store(open_store("acts/")))
      >>> seen.density[123], seen.strongest.rows[123]
    """
    require_fit(sae, reading, options)
    d_sae = jax.eval_shape(sae.encode, params, np.zeros(reading.x.shape[1:], np.float32)).shape[-1]
    contexts = _contexts_at_once(reading, d_sae)
    sampled = _sampled(len(reading.x), d_sae, seed)
    wanted = np.unique(np.linspace(0, len(reading.begins) - 1, options.passages).astype(int))
    stream = read_ahead(stretches(reading, contexts), 1)
    first = next(stream)
    edges = edges_for(float(_largest(sae.encode, params, first.x)))
    step, sums = _compiled(sae, params, options, first, edges, d_sae)
    now = Told(0, len(reading.x), _memory(step), first.rows.size)
    told(now)
    flags, passages = [], []
    for stretch in itertools.chain([first], stream):
        sums, f = step(params, sums, stretch.x, stretch.rows, edges, _key(seed, stretch))
        flags.append(_flags(f, stretch, sampled))
        passages += _passages(f, stretch, wanted, options.at_once)
        now = now._replace(rows=now.rows + int((stretch.rows != NONE).sum()))
        told(now)
        del f  # before the next is made
    return _finished(reading, options, sums, np.asarray(edges), np.concatenate(flags), passages)


def _contexts_at_once(reading: Reading, d_sae: int) -> int:
    contexts = max(1, min(STRETCH_BYTES // (4 * d_sae), MOST_AT_ONCE) // reading.length)
    # so that the histogram's rows come in whole groups
    contexts -= contexts % ROWS_AT_A_TIME if contexts > ROWS_AT_A_TIME else 0
    return min(contexts, len(reading.begins))


def _sampled(rows: int, d_sae: int, seed: int) -> Int[np.ndarray, "n"]:
    """Rows drawn by chance, in order."""
    size = min(rows, max(1, min(SAMPLED, SAMPLED_BYTES // d_sae)))
    return np.sort(np.random.default_rng(seed).choice(rows, size, replace=False))


def _flags(f: Array, stretch: Stretch, sampled: Int[np.ndarray, "n"]) -> Bool[np.ndarray, "here d_sae"]:
    """Of the rows that are sampled and in this stretch, which features are active."""
    places = np.flatnonzero(np.isin(stretch.rows.reshape(-1), sampled))
    # filled up to a power of two, so that few programs are compiled
    padded = np.zeros(1 << max(0, len(places) - 1).bit_length(), np.int32)
    padded[: len(places)] = places
    return np.asarray(_active(f, padded))[: len(places)]


def _compiled(sae: SAE, params: Params, options: Options, first: Stretch, edges: Array, d_sae: int):
    """The step, and what it begins with, which it makes its own."""
    sums = nothing(d_sae, options)
    step = jax.jit(partial(take_in, sae.encode, options), donate_argnums=1)
    return step.lower(params, sums, first.x, first.rows, edges, _key(0, first)).compile(), sums


def _key(seed: int, stretch: Stretch) -> PRNGKeyArray:
    return jax.random.fold_in(jax.random.key(seed), stretch.first)


@jax.jit
def _active(
    f: Float[Array, "contexts length d_sae"], places: Int[Array | np.ndarray, "n"]
) -> Bool[Array, "n d_sae"]:
    return f.reshape(-1, f.shape[-1])[places] > 0


_one = jax.jit(lambda f, which: f[which])
"""A context of a stretch; which one is no constant of the program."""


@partial(jax.jit, static_argnums=0)
def _largest(encode, params: Params, x: Shaped[Array | np.ndarray, "contexts length *_"]) -> Float[Array, ""]:
    return encode(params, x.reshape(-1, *x.shape[2:]).astype(jnp.float32)).max()


def _memory(step) -> int:
    found = step.memory_analysis()
    whole = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    return whole - found.alias_size_in_bytes


def most_active(f: Float[np.ndarray, "tokens d_sae"], most: int) -> Int[np.ndarray, "shown"]:
    """The features that are most active on some tokens, in their own order."""
    return np.sort(np.argsort(-f.max(axis=0, initial=0), kind="stable")[:most])


def _passages(f: Array, stretch: Stretch, wanted: np.ndarray, most: int) -> list[tuple[np.ndarray, ...]]:
    """Of the contexts that are wanted, those in this stretch: rows, the strongest features, their values.

    Where a context is a single row, the first rows of all are one passage.
    """
    contexts, length = stretch.rows.shape
    if length == 1:
        parts = [slice(0, MOST_OF_A_PASSAGE)] if stretch.first == 0 else []
        here = [(stretch.rows[part, 0], np.asarray(f[part, 0])) for part in parts]
    else:
        inside = wanted[(wanted >= stretch.first) & (wanted < stretch.first + contexts)] - stretch.first
        here = [(stretch.rows[each], np.asarray(_one(f, each))) for each in inside.tolist()]
    found = []
    for rows, values in here:
        features = most_active(values, most)
        active = values[:, features].max(axis=0) > 0
        found.append((rows, np.where(active, features, NONE), values[:, features]))
    return found


def _finished(
    reading: Reading, options: Options, sums: Sums, edges: np.ndarray, active: np.ndarray, passages: list
) -> Seen:
    above = np.asarray(sums.above).T
    fired, total = above[:, 0], np.asarray(sums.total)
    rows, features, values = (np.stack(each) for each in zip(*passages, strict=True))
    tokens = None if reading.tokens is None else windows(rows, reading, 0, 1)[..., 0]
    return Seen(
        rows=len(reading.x),
        contexts=len(reading.begins),
        fired=fired,
        mean=np.divide(total, fired, out=np.zeros_like(total), where=fired > 0),
        edges=edges,
        histogram=-np.diff(above, axis=1, append=0),
        strongest=_examples(sums.strongest, reading, options),
        by_chance=_examples(sums.by_chance, reading, options),
        fires_with=fires_with(active, options.near),
        sampled=len(active),
        passages=Passages(rows, tokens, features, values),
    )


def _examples(kept: Kept, reading: Reading, options: Options) -> Examples:
    """The stronger first, with their tokens."""
    keys, rows, values = map(np.asarray, kept)
    rows = np.where(keys < 0, NONE, rows)
    peaks = np.where(rows == NONE, -np.inf, values[..., options.before])
    order = np.argsort(-peaks, axis=1, kind="stable")
    rows = np.take_along_axis(rows, order, axis=1)
    values = np.take_along_axis(values, order[..., None], axis=1)
    tokens = None if reading.tokens is None else windows(rows, reading, options.before, options.window)
    return Examples(rows, values, tokens, options.before)


def require_fit(sae: SAE, reading: Reading, options: Options) -> None:
    """Raise `InputError` unless the rows are as wide as the SAE reads, and sizes are some."""
    for name, size in options._asdict().items():
        least = 0 if name in ("before", "after") else 1
        require(size >= least, f"{name} must be at least {least}, got {size}")
    config, shape = sae.config, list(reading.x.shape[1:])
    reads = [config["sources"], config["d_in"]] if "sources" in config else [config.get("d_in", shape[-1])]
    require(shape == reads, f"the SAE reads rows of {reads}, but {reading.x.label} has rows of {shape}")
