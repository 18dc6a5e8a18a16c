"""What would be known of features that nobody trained, for tests of what shows it."""

import argparse
import inspect
import re

import numpy as np

from sae_jax.features.observed import NONE, Examples, Near, Observed, Passages, Seen, Weighed

EDGES = np.concatenate([[0.0], np.logspace(-2, 2, 40)])
CONTEXT = 64


def text():
    """A long text that every machine has, cut into words."""
    return re.findall(r"\n+ *| ?\w+| ?[^\w\s]+|\s+", inspect.getsource(argparse))


def by_hand(d_sae=40, *, words=None, tokens=True, never=(), shown=8, before=4, labels=None, seed=0, **fields):
    """Features that are each active on one word of a text, and a little around it.

    Args:
      d_sae: how many.
      words: the text; None for `text()`.
      tokens: False for rows without tokens.
      never: features that are never active.
      shown: contexts of either kind.
      before: tokens of a window on either side of the strongest.
      labels: by feature.
      seed: of what is drawn.
      **fields: of `Observed`, to be put in place of what is made here.
    """
    draw = np.random.default_rng(seed)
    words = np.array(text() if words is None else words, dtype=object)
    vocabulary, stream = np.unique(words, return_inverse=True)
    dead = np.isin(np.arange(d_sae), never)
    density = np.where(dead, 0, 10 ** draw.uniform(-5, -1, d_sae))
    fired = np.where(dead, 0, np.maximum(np.rint(density * len(stream) * 40), 1)).astype(np.int64)
    scale = np.exp(draw.normal(size=d_sae))
    hill = 40 * np.exp(-(((np.arange(len(EDGES)) - 20) / 6) ** 2))
    histogram = np.where(dead[:, None], 0, draw.poisson(hill, (d_sae, len(EDGES))))
    reach = min(len(stream), CONTEXT)
    near = draw.integers(0, d_sae, (d_sae, 5))
    written = draw.integers(0, len(vocabulary), (2, d_sae, 6))
    weights = np.sort(draw.exponential(size=(d_sae, 6)).astype(np.float32))[:, ::-1]
    falling = np.sort(draw.uniform(size=near.shape))[:, ::-1]
    observed = Observed(
        seen=Seen(
            rows=len(stream) * 40,
            contexts=len(stream) * 40 // CONTEXT,
            fired=fired,
            mean=np.where(dead, 0, scale / 2),
            edges=EDGES,
            histogram=histogram.astype(np.int64),
            strongest=_examples(draw, stream, shown, before, scale, dead, tokens, 0.7),
            by_chance=_examples(draw, stream, shown, before, scale, dead, tokens, 0.1),
            fires_with=Near(np.where(dead[:, None], NONE, near), falling),
            sampled=1000,
            passages=_passages(draw, stream, d_sae, scale, dead, reach, tokens),
        ),
        weighed=Weighed(
            norm=draw.uniform(0.5, 2, d_sae),
            cosine=draw.uniform(0.2, 1, d_sae),
            near=Near(near, falling),
            place=draw.normal(size=(d_sae, 2)) + 3 * draw.integers(0, 3, (d_sae, 1)),
            again=draw.uniform(0.3, 1, d_sae),
            promoted=Near(written[0], weights) if tokens else None,
            suppressed=Near(written[1], -weights) if tokens else None,
        ),
        words=dict(enumerate(vocabulary.tolist())) if tokens else None,
        labels=labels or {},
        left_out=(),
        about={
            "SAE": "by hand",
            "command": "sae-jax features SAE STORE",
            "versions": {"jax": "0.0"},
            "seconds": 1.5,
        },
    )
    return observed._replace(**fields)


def _examples(draw, stream, shown, before, scale, dead, tokens, least):
    """Windows around places of a word of each feature's own, the strongest first."""
    d_sae = len(scale)
    word = stream[np.arange(d_sae) * 7919 % len(stream)]
    order = np.argsort(stream, kind="stable")
    first = np.searchsorted(stream[order], word)
    held = np.bincount(stream)[word]
    places = order[first[:, None] + draw.integers(0, np.iinfo(np.int32).max, (d_sae, shown)) % held[:, None]]
    window = places[..., None] + np.arange(-before, before + 1)
    beyond = (window < 0) | (window >= len(stream))
    values = np.where(draw.uniform(size=window.shape) < 0.15, draw.uniform(0, 0.4, window.shape), 0)
    peaks = np.sort(draw.uniform(least, 1, (d_sae, shown)))[:, ::-1]
    values[..., before] = peaks
    values = np.where(beyond, np.nan, values * scale[:, None, None]).astype(np.float32)
    values[dead] = np.nan
    ids = np.where(beyond | dead[:, None, None], NONE, stream[np.clip(window, 0, len(stream) - 1)])
    rows = np.where(dead[:, None], NONE, places)
    return Examples(rows, values, ids if tokens else None, before)


def _passages(draw, stream, d_sae, scale, dead, length, tokens, count=4, shown=12):
    """The beginning of the text and some of its later parts."""
    rows = (np.arange(count)[:, None] * length + np.arange(length)) % len(stream)
    alive = np.flatnonzero(~dead)[:shown]
    features = np.full((count, shown), NONE)
    features[:, : len(alive)] = alive
    values = np.zeros((count, length, shown), np.float32)
    values[..., : len(alive)] = draw.uniform(0, 0.7, (count, length, len(alive))) * scale[alive]
    values[draw.uniform(size=values.shape) < 0.8] = 0
    rows[-1, length // 2 :] = NONE
    return Passages(rows, np.where(rows == NONE, NONE, stream[rows]) if tokens else None, features, values)
