"""The dashboard of an SAE's features: a folder of static files to explore them in, which asks for no server.

`index.html` holds the words and the style, `dashboard.js` draws, and `data/` is what it draws. The data are
scripts, because a page that is opened from a disk may load a script and nothing else. The features lie
`TOGETHER` to a file, which the page loads when one of them is opened.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from jinja2 import Environment, FileSystemLoader

from sae_jax.features.observed import NONE, Examples, Near, Observed, Passages

TOGETHER = 32
"""Features in one file."""
LONGEST = 1000
"""Characters of a token that are kept."""
DIGITS = 3
"""Activations are whole multiples of a power of ten, this many below that of the feature's largest."""
AT_ONCE = 2**22
"""Tokens that are counted at a time."""
SCRIPTS = ("page.js", "tokens.js", "table.js", "map.js", "feature.js", "passages.js", "start.js")
TEMPLATES = Path(__file__).parent / "templates"


def write_dashboard(observed: Observed, out: str | Path) -> None:
    """Fill a folder with the dashboard: open its `index.html`, at a feature with `index.html#feature=123`.

    Args:
      observed: what is known of the features. Labels of features that do not exist are left out.
      out: a folder, made if it is not there; files of the same names are replaced.

    Example:
      >>> write_dashboard(features.observe(trained, features.of_store(store)), "features")
    """
    out = Path(out)
    data = out / "data"
    data.mkdir(parents=True, exist_ok=True)
    words, exponents = _words(observed), _exponents(_largest(observed))
    (out / "index.html").write_text(_page(observed), encoding="utf-8")
    script = "\n".join((TEMPLATES / "dashboard" / name).read_text(encoding="utf-8") for name in SCRIPTS)
    (out / "dashboard.js").write_text(script, encoding="utf-8")
    _write(data, "words", [_cut(observed.word(int(token))) for token in words.by_rank])
    bins = _bins(observed.seen.histogram)
    _write(data, "table", _table(observed, words, exponents, bins))
    _write(data, "passages", _passages(observed.seen.passages, words, exponents))
    for first in range(0, observed.d_sae, TOGETHER):
        some = slice(first, first + TOGETHER)
        _write(data, f"{first // TOGETHER:04d}", _features(observed, words, exponents, bins, some))


def _write(data: Path, name: str, value: Any) -> None:
    """As a script that hands the value over; in ASCII, so that no character of a token ends or breaks it."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    (data / f"{name}.js").write_text(f'arrived("{name}",{text});\n', encoding="ascii")


def _page(observed: Observed) -> str:
    """The page without its data."""
    jinja = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True)
    page = jinja.get_template("dashboard/index.html").render(
        observed=observed, alive=int((observed.seen.fired > 0).sum()), labels=len(_labels(observed))
    )
    # a command line may hold bytes that are no text
    return page.encode("utf-8", "replace").decode()


class Words(NamedTuple):
    """The tokens that are shown somewhere, the most frequent with the shortest numbers."""

    ids: Int[np.ndarray, "words"]
    """In rising order."""
    ranks: Int[np.ndarray, "words"]
    """The number of each."""

    by_rank: Int[np.ndarray, "words"]
    """In the order of their numbers."""

    def numbers(self, tokens: Int[np.ndarray, "*places"] | None) -> Int[np.ndarray, "*places"] | None:
        """Each token's number; `NONE` stays."""
        if tokens is None:
            return None
        found = np.append(self.ranks, NONE)[np.searchsorted(self.ids, tokens)]
        return np.where(tokens == NONE, NONE, found)


def _words(observed: Observed) -> Words:
    seen, weighed = observed.seen, observed.weighed
    near = [None if each is None else each.places for each in (weighed.promoted, weighed.suppressed)]
    found = Counter()
    for tokens in (seen.strongest.tokens, seen.by_chance.tokens, seen.passages.tokens, *near):
        if tokens is not None:
            for part in np.array_split(tokens.ravel(), tokens.size // AT_ONCE + 1):
                ids, counts = np.unique(part, return_counts=True)
                found.update(dict(zip(ids.tolist(), counts.tolist(), strict=True)))
    del found[NONE]
    by_rank = np.array([token for token, _ in found.most_common()], int)
    return Words(np.sort(by_rank), np.argsort(by_rank), by_rank)


def _cut(word: str) -> str:
    return word if len(word) <= LONGEST else word[:LONGEST] + "…"


def _labels(observed: Observed) -> dict[int, str]:
    return {feature: label for feature, label in observed.labels.items() if 0 <= feature < observed.d_sae}


def _largest(observed: Observed) -> Float[np.ndarray, "d_sae"]:
    """The largest activation of each feature; 0 where it is never active."""
    return _finite(observed.seen.strongest.peaks).max(axis=1, initial=0)


def _finite(values: np.ndarray) -> np.ndarray:
    """Infinite activations as the largest that is finite; NaN stays, negative ones are none."""
    return np.clip(values, 0, np.finfo(np.float32).max).astype(float)


def _exponents(largest: Float[np.ndarray, "d_sae"]) -> Int[np.ndarray, "d_sae"]:
    """The power of ten in whole multiples of which each feature's activations are told."""
    return np.floor(np.log10(np.where(largest > 0, largest, 1))).astype(int) - DIGITS


def _whole(values: np.ndarray, exponents: np.ndarray) -> Int[np.ndarray, "..."]:
    """Activations in whole multiples of 10**exponent, at least 1 where active; `NONE` beyond a context."""
    scaled = _finite(values) / 10.0**exponents
    whole = np.where(scaled > 0, np.clip(np.rint(scaled), 1, 10 ** (DIGITS + 1)), 0)
    return np.where(np.isnan(values), NONE, whole).astype(int)


def _short(values: np.ndarray | None, digits: int = 4) -> list[float | None] | None:
    """To so many significant digits; None where not finite."""
    if values is None:
        return None
    return [float(f"{each:.{digits}g}") if np.isfinite(each) else None for each in values.tolist()]


def _table(observed: Observed, words: Words, exponents: np.ndarray, bins: slice) -> dict[str, Any]:
    """What the page knows of all features without opening one."""
    seen, weighed = observed.seen, observed.weighed
    strongest = seen.strongest
    peaks = None if strongest.tokens is None else strongest.tokens[..., strongest.before]
    promoted = None if weighed.promoted is None else weighed.promoted.places
    return {
        "rows": seen.rows,
        "together": TOGETHER,
        "sampled": seen.sampled,
        "before": {"strongest": strongest.before, "chance": seen.by_chance.before},
        "fired": seen.fired.tolist(),
        "mean": _short(seen.mean),
        "largest": _short(_largest(observed)),
        "norm": _short(weighed.norm),
        "cosine": _short(weighed.cosine),
        "again": _short(weighed.again),
        "exponents": exponents.tolist(),
        "places": _places(weighed.place),
        "edges": _short(seen.edges[bins.start : bins.stop + 1]),
        "labels": [[feature, _cut(label)] for feature, label in sorted(_labels(observed).items())],
        "peaks": _distinct(words.numbers(peaks)),
        "promoted": _distinct(words.numbers(promoted)),
    }


def _bins(histogram: Int[np.ndarray, "d_sae bins"]) -> slice:
    """From the first bin that holds anything of any feature to the last."""
    held = np.flatnonzero(histogram.any(axis=0))
    return slice(int(held[0]), int(held[-1]) + 1) if held.size else slice(0, 0)


def _places(place: Float[np.ndarray, "d_sae 2"]) -> list[list[int]]:
    """Across and up, in ten-thousandths of what the features span."""
    finite = np.where(np.isfinite(place), place, np.nan)
    known = finite[~np.isnan(finite).any(axis=1)]
    low, high = (known.min(axis=0), known.max(axis=0)) if len(known) else (np.zeros(2), np.ones(2))
    share = (finite - low) / np.where(high > low, high - low, 1)
    return np.rint(10_000 * np.nan_to_num(share, nan=0.5)).astype(int).T.tolist()


def _distinct(numbers: Int[np.ndarray, "d_sae shown"] | None) -> list[list[int]] | None:
    """Each row's numbers once, in order, without `NONE`."""
    if numbers is None:
        return None
    return [[each for each in dict.fromkeys(row) if each != NONE] for row in numbers.tolist()]


def _features(
    observed: Observed, words: Words, exponents: np.ndarray, bins: slice, some: slice
) -> list[dict[str, Any]]:
    """What the page knows of a few features once one of them is opened."""
    seen, weighed = observed.seen, observed.weighed
    columns = {
        "histogram": seen.histogram[some, bins].tolist(),
        "strongest": _contexts(seen.strongest, words, exponents, some),
        "chance": _contexts(seen.by_chance, words, exponents, some),
        "together": _near(seen.fires_with, some),
        "near": _near(weighed.near, some),
        "promoted": _near(weighed.promoted, some, words),
        "suppressed": _near(weighed.suppressed, some, words),
    }
    told = {name: column for name, column in columns.items() if column is not None}
    return [dict(zip(told, row, strict=True)) for row in zip(*told.values(), strict=True)]


def _contexts(examples: Examples, words: Words, exponents: np.ndarray, some: slice) -> list[dict[str, Any]]:
    """The contexts of each feature: their rows, activations and, where known, words."""
    rows = examples.rows[some]
    held = (rows != NONE).sum(axis=1).tolist()
    told: Mapping[str, np.ndarray | None] = {
        "rows": rows,
        "values": _whole(examples.values[some], exponents[some, None, None]),
        "words": words.numbers(None if examples.tokens is None else examples.tokens[some]),
    }
    return [
        {name: array[place, :count].tolist() for name, array in told.items() if array is not None}
        for place, count in enumerate(held)
    ]


def _near(near: Near | None, some: slice, words: Words | None = None) -> list[list[Any]] | None:
    """Pairs of each feature: another, or a word, and the value."""
    if near is None:
        return None
    places = near.places[some] if words is None else words.numbers(near.places[some])
    rows = zip(np.asarray(places).tolist(), near.values[some], strict=True)
    return [
        [[place, value] for place, value in zip(row, _short(values, 3) or [], strict=True) if place != NONE]
        for row, values in rows
    ]


def _passages(passages: Passages, words: Words, exponents: np.ndarray) -> list[dict[str, Any]]:
    """Whole contexts: rows, words where known, features, and the activations of each row."""
    told = []
    numbers = words.numbers(passages.tokens)
    for place, (rows, features) in enumerate(zip(passages.rows, passages.features, strict=True)):
        here, shown = rows != NONE, features != NONE
        values = passages.values[place][here][:, shown]
        told.append(
            {
                "rows": rows[here].tolist(),
                "words": None if numbers is None else numbers[place][here].tolist(),
                "features": features[shown].tolist(),
                "values": _whole(values, exponents[features[shown]]).tolist(),
            }
        )
    return told
