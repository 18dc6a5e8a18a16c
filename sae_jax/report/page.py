"""The page of a sweep: one HTML file to explore it in, which asks the network for nothing.

What is drawn is worked out in `plots`; the template holds the words, the style and the small script that
draws. Whatever a user named is escaped by Jinja, in the JSON for the script too.
"""

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader
from plotly.offline import get_plotlyjs

from sae_jax.base import require
from sae_jax.grid import members
from sae_jax.metrics.stability import Stability, StableAndTrue, stable_and_true
from sae_jax.report import plots
from sae_jax.report.figures.canvas import LABELS
from sae_jax.report.numbers import short, spread, thin, told
from sae_jax.result import SweepResult
from sae_jax.synthetic import Tokens, World

MOST_ROWS = 1000  # of the table
MOST_VIEWS = 50  # members to choose from
RECOVERY = ("f1", "mcc", "recovered", "uniqueness")
"""Columns that are drawn where the true features are known."""
NO_DASHBOARDS: Mapping[int, str] = MappingProxyType({})
HEADLINE = ("command", "members", "steps", "seconds", "members_per_second")
"""What of `about` the page shows elsewhere than in its last table."""


def sweep_page(
    result: SweepResult,
    about: Mapping[str, Any],
    tokens: Tokens | None = None,
    stability: Stability | None = None,
    truth: World | None = None,
    dashboards: Mapping[int, str] = NO_DASHBOARDS,
) -> str:
    """A sweep as one self-contained HTML file: frontier, curves, heat maps, features, members, environment.

    Args:
      result: the sweep. Members that diverged are counted and listed; where a mean or a frontier is drawn
        they are left out.
      about: `command` (a text or a list of arguments), `seconds`, `members_per_second`, and whatever else
        there is to tell; nested dictionaries become rows of a table. Anything may be missing.
      tokens: named rows, as wide as what the members read, to encode with the members to look into; None, or
        a result without weights, for no heat map of features.
      stability: `result.stability()`, to be shown; None for none.
      truth: the world that the data come from, to show whether features that are stable are true.
      dashboards: by member, where its dashboard lies as seen from the page, such as
        `members/007/features/index.html`. A press on the member opens it; else the page shows what it has.

    Returns:
      The HTML text.

    Raises:
      InputError: a dashboard of no member, or a link that leads out of where the page lies.

    Example:
      >>> Path("report.html").write_text(sweep_page(result, {"command": "sae-jax sweep"}), encoding="utf-8")
    """
    _require_links(dashboards, members(result.grid))
    best = result.frontier()
    shown = _views_of(result, best, dashboards)
    settings = plots.settings(result)
    always = np.union1d(best, np.array(list(dashboards), int))
    rows = thin(members(result.grid), always, MOST_ROWS).tolist()
    drawn = {
        "frontier": plots.frontier(result),
        **{f"recovery-{name}": plots.frontier(result, name) for name in RECOVERY if name in result.metrics},
        **{f"curve-{name}": plots.curves(result, name) for name in ("loss", "l0") if name in result.history},
        "dead": plots.dead(result),
        "settings": list(settings.values()),
        "features": plots.features(result, shown, tokens),
        "density": plots.density(result, shown),
        "dashboards": {str(index): link for index, link in dashboards.items()},
    }
    told_apart = None
    if stability is not None:
        if truth is not None:
            told_apart = stable_and_true(stability, result.dictionaries(), truth.directions)
        drawn |= plots.stability(result, stability, told_apart)
    command = about.get("command", "")
    shown_plots = {name: plot for name, plot in drawn.items() if plot}
    return rendered(
        "sweep.html",
        shown_plots,
        recovery=[name for name in shown_plots if name.startswith("recovery-")],
        stability=[name for name in shown_plots if name.startswith("stability-")],
        truth_told=_truth_told(told_apart),
        seeds=result.settings.repeated,
        inside=bool(shown and (dashboards or {"features", "density"} & shown_plots.keys())),
        names=LABELS,
        pairs=[" × ".join(pair) for pair in settings],
        metrics=list(dict.fromkeys(name for views in settings.values() for name in views)),
        views=[(index, told(result, index, ", ", ("l0", "explained_variance"))) for index in shown],
        headline=_headline(result, about),
        axes=[name for name, column in result.grid.items() if np.unique(column).size > 1],
        command=command if isinstance(command, str) else shlex.join(map(str, command)),
        environment=list(_flat({key: value for key, value in about.items() if key not in HEADLINE})),
        columns=list(result.table),
        rows=_rows(result, rows, set(best.tolist()), dashboards),
        total=members(result.grid),
        ok=int(result.sound.sum()),
    )


def rendered(template: str, drawn: Mapping[str, plots.Plot], **words: Any) -> str:
    """A page from its template, with plotly and what it draws in it."""
    templates = FileSystemLoader(Path(__file__).parent / "templates")
    jinja = Environment(loader=templates, autoescape=True, trim_blocks=True)
    jinja.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    page = jinja.get_template(template).render(plotly=get_plotlyjs(), plots=drawn, **words)
    # a command line may hold bytes that are no text
    return page.encode("utf-8", "replace").decode()


def _require_links(dashboards: Mapping[int, str], total: int) -> None:
    for index, link in dashboards.items():
        require(0 <= index < total, f"there is no member {index} to have a dashboard: there are {total}")
        below = not link.startswith("/") and not {":", "\\"} & set(link) and ".." not in link.split("/")
        require(
            below, f"a dashboard lies below the page, such as members/007/features/index.html, not {link!r}"
        )


def _views_of(result: SweepResult, best: np.ndarray, dashboards: Iterable[int]) -> list[int]:
    """The members to look into: the frontier's, the one nearest to its ideal corner first, then others.

    Of the others those with a dashboard come first.
    """
    if not best.size:
        ok = result.sound & np.isfinite(result.metrics["mse"])
        return [result.best()] if ok.any() else []
    corner = [result.metrics[name][best] for name in ("l0", "fvu")]
    away = sum(np.square((column - column.min()) / (np.ptp(column) or 1)) for column in corner)
    knee = int(best[np.argmin(away)])
    front = [knee, *(index for index in spread(best, MOST_VIEWS).tolist() if index != knee)][:MOST_VIEWS]
    sound = np.flatnonzero(result.sound)
    with_dashboard = np.setdiff1d(np.intersect1d(sound, np.array(list(dashboards), int)), front)
    others = np.setdiff1d(sound, [*best, *with_dashboard])
    room = max(0, MOST_VIEWS - len(front) - len(with_dashboard))
    return [*front, *with_dashboard.tolist(), *(spread(others, room).tolist() if room else [])]


def _headline(result: SweepResult, about: Mapping[str, Any]) -> dict[str, str]:
    total, seconds = members(result.grid), about.get("seconds")
    rate = about.get("members_per_second") or (total / seconds if seconds else None)
    numbers = {
        "members": total,
        "steps": about.get("steps") or int(result.history["step"][-1]),
        "seconds": seconds,
        "members per second": rate,
        "diverged": int((~result.sound).sum()),
    }
    return {
        name: f"{number:,.3g}" if isinstance(number, float) and number < 1000 else f"{number:,.0f}"
        for name, number in numbers.items()
        if number is not None
    }


def _truth_told(told: StableAndTrue | None) -> str:
    """Whether stable features are the true ones, in a sentence; nothing where it is not known."""
    if told is None or not (np.isfinite(told.in_all) & np.isfinite(told.in_none)).any():
        return ""
    always, never = np.nanmean(told.in_all), np.nanmean(told.in_none)
    return (
        f"Features that come back in every seed have a cosine of {always:.2f} with the nearest true feature, "
        f"those that come back in none {never:.2f} (means over settings)."
    )


def _rows(
    result: SweepResult, rows: list[int], best: set[int], dashboards: Mapping[int, str]
) -> list[dict[str, Any]]:
    """Rows of the table: each value as it is and as it is told."""
    columns = [column.tolist() for column in result.table.values()]
    return [
        {
            "member": row,
            "best": row in best,
            "dashboard": dashboards.get(row),
            "cells": [(column[row], short(column[row])) for column in columns],
        }
        for row in rows
    ]


def _flat(nested: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Rows of a nested dictionary, the names of a path joined by dots."""
    for key, value in nested.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            listed = isinstance(value, list | tuple)
            yield f"{prefix}{key}", ", ".join(map(str, value)) if listed else str(value)
