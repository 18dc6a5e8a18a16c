"""From a model and texts to a store: the activations of each token, at one or several sites in one pass."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from sae_jax.base import InputError, require
from sae_jax.data import writer as writers
from sae_jax.data.manifest import Reached
from sae_jax.data.store import DTYPES, Store
from sae_jax.language_models.text import Contexts
from sae_jax.train import Stopped

Activations = Callable[[Int[np.ndarray, "batch context"]], Mapping[str, Any]]
"""`tokens [batch, context] -> {site: [batch, context, d_in]}`."""


class Harvested(NamedTuple):
    """What a harvest tells after each batch of contexts."""

    rows: int
    """Rows so far, those among them that are not on disk yet."""
    stored: int
    """Rows on disk."""
    row_bytes: int
    """Of all sites together."""


def harvest(
    activations: Activations,
    contexts: Iterable[Contexts],
    out: str | Path,
    *,
    dtype: str = "bfloat16",
    rows: int | None = None,
    about: Mapping[str, Any] | None = None,
    look: Callable[[Harvested], bool | None] | None = None,
) -> Store:
    """Run a model over contexts and store what its sites hold on the tokens that are kept.

    Interrupted at any moment, the same call goes on from the last rows on disk, and ends in the same store,
    byte for byte in its arrays, if model and contexts give the same again.

    Args:
      activations: from `language_models.torch_hooks.capture`, `nnx_capture.capture`, or any function
        `tokens -> {site: [batch, context, d_in]}`.
      contexts: batches of tokens and which of them to keep, the same in every call.
      out: a folder, or a URL that tensorstore can write to (`gs://`, `s3://`).
      dtype: to store in: "bfloat16", "float16" or "float32".
      rows: when to stop; None for the end of the contexts.
      about: what the manifest tells of where the rows come from, as plain values.
      look: called after every batch; returning True ends the harvest there.

    Returns:
      The finished store.

    Raises:
      InputError: `out` holds another store or is being written, no rows are left, a site gives another shape
        or values that are not finite in `dtype`, contexts that are not those of the call that is continued.
      OSError: the disk is full; the rows already stored stay, and the same call goes on.
      Stopped: `look` asked for the end.

    Example:
      >>> activations = nnx_capture.capture(model, ["mlp.hidden"])
      >>> store = harvest(activations, from_tokens(tokens, batch_size=32), "acts/")
      >>> source = stored(store.site("mlp.hidden"))
    """
    require(rows is None or rows >= 1, f"rows must be at least 1, got {rows}")
    found = _captured(activations, contexts)
    first = next(found, None)
    if first is None:
        raise InputError("there is nothing to harvest: what the model is to read does not fill a context")
    widths = {name: value.shape[-1] for name, value in first.values().items()}
    told = {
        **(about or {}),
        "context": first.tokens.shape[1],
        **({} if rows is None else {"most_rows": rows}),
    }
    with writers.writing(out, writers.begun(widths, dtype=dtype, about=told)) as writer:
        before = writer.manifest.reached
        row_bytes = sum(widths.values()) * DTYPES[dtype].itemsize
        digest = hashlib.sha256()
        for number, batch in enumerate(_all(first, found)):
            digest.update(batch.tokens.tobytes() + batch.kept.tobytes())
            if number < before.batch:
                continue
            reached = Reached(number, before.rows if number == before.batch else 0, digest.hexdigest())
            same = number != before.batch or reached.digest == before.digest
            require(same, f"{out} was begun on other tokens: its harvest cannot go on with these")
            _append(writer, batch, reached, rows)
            full = rows is not None and writer.rows >= rows
            if (
                look is not None
                and look(Harvested(writer.rows, writer.manifest.rows, row_bytes))
                and not full
            ):
                raise Stopped
            if full:
                break
        require(
            writer.rows > 0, "no rows are left: every token is padding or a special token that is left out"
        )
        return writer.finish()


class _Batch(NamedTuple):
    tokens: Int[np.ndarray, "batch context"]
    kept: np.ndarray
    values: Callable[[], Mapping[str, Any]]
    """What the model gives; it runs when this is called."""


def _captured(activations: Activations, contexts: Iterable[Contexts]) -> Iterator[_Batch]:
    for tokens, kept in contexts:

        @cache
        def values(tokens=tokens) -> Mapping[str, Any]:
            found = activations(tokens)
            require(bool(found), "the model gave the activations of no site")
            for name, value in found.items():
                shape = tuple(np.shape(value))
                fits = len(shape) == 3 and shape[:2] == tokens.shape
                require(
                    fits,
                    f"the site {name} must give [batch, context, d_in] for tokens {list(tokens.shape)}, "
                    f"got {list(shape)}",
                )
            return found

        yield _Batch(np.ascontiguousarray(tokens, np.int32), np.ascontiguousarray(kept, bool), values)


def _all(first: _Batch, rest: Iterator[_Batch]) -> Iterator[_Batch]:
    yield first
    yield from rest


def _append(writer: writers.Writer, batch: _Batch, reached: Reached, rows: int | None) -> None:
    """Hand over the kept rows of a batch that are not stored yet, at most as many as are wanted."""
    contexts, positions = np.nonzero(batch.kept)
    stop = len(contexts) if rows is None else reached.rows + rows - writer.rows
    chosen = contexts[reached.rows : stop], positions[reached.rows : stop]
    if len(chosen[0]) == 0:
        return
    values = {name: np.asarray(value)[chosen] for name, value in batch.values().items()}
    widths = {name: len(found.mean) for name, found in writer.manifest.sites.items()}
    now = {name: value.shape[-1] for name, value in values.items()}
    require(now == widths, f"the sites of this store have the widths {widths}, but the model now gives {now}")
    writer.append(values, batch.tokens[chosen], chosen[1].astype(np.int32), reached)
