"""Inside a member: what it makes of tokens, and how often its latents fire."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from sae_jax.features.look import most_active
from sae_jax.labels import named
from sae_jax.metrics import DENSITY_BINS
from sae_jax.report.numbers import on_one_line
from sae_jax.report.plots.words import Plot, plain, words
from sae_jax.result import SweepResult
from sae_jax.synthetic import Tokens

MOST_CELLS = 64
"""Tokens, and features, of a heat map."""


def features(result: SweepResult, shown: list[int], tokens: Tokens | None) -> Plot | None:
    """What each member shown makes of the tokens; the script draws the one that is chosen."""
    saved = [index for index in shown if index in result.kept]
    if tokens is None or not saved:
        return None
    x = jnp.asarray(tokens.x[:MOST_CELLS])
    views = {}
    for index in saved:
        member = result.member(index)
        f = np.asarray(member.sae.encode(member.params, x))  # not jitted: each would compile anew
        chosen = most_active(f, MOST_CELLS)
        labels = member.about.labels
        names = [words(on_one_line(named(number, labels))) for number in chosen.tolist()]
        views[str(index)] = {"features": names, "z": plain(f[:, chosen])}
    return {"tokens": [words(on_one_line(name)) for name in tokens.names[:MOST_CELLS]], "views": views}


def density(result: SweepResult, shown: list[int]) -> Plot | None:
    """How often latents fire, for each member shown of which it is known."""
    known = {
        index: part.density[place]
        for part in result.parts
        if part.density is not None
        for place, index in enumerate(part.members.tolist())
    }
    views = {str(index): _histogram(known[index]) for index in shown if index in known}
    if not views:
        return None
    middles = (DENSITY_BINS[:-1] + DENSITY_BINS[1:]) / 2
    return {"middles": middles.tolist(), "width": float(np.diff(DENSITY_BINS)[0]), "views": views}


def _histogram(density: Float[np.ndarray, "d_sae"]) -> list[int]:
    """Latents per bin of `DENSITY_BINS`, as `density_histogram` of the metrics."""
    log_density = np.clip(np.log10(density + 1e-10), DENSITY_BINS[0], DENSITY_BINS[-1])
    return np.histogram(log_density, DENSITY_BINS)[0].tolist()
