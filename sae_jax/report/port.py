"""The page of a port that was held beside its SAE: one HTML file, which asks the network for nothing."""

import html
import itertools
from collections.abc import Mapping
from typing import Any

from sae_jax.report.figures import CATEGORIES
from sae_jax.report.page import rendered
from sae_jax.report.plots import Plot

TITLES = {
    "forward": "Forward pass",
    "loss": "Loss",
    "gradients": "Gradients",
    "trained": "After the last step",
}
"""Stages in the order in which a fault shows."""
SHOWN = ("ok", "findings", "reports")
"""What of the report the page shows elsewhere than in its last table."""


def port_page(report: Mapping[str, Any]) -> str:
    """A comparison as one self-contained HTML file: where it differs, the errors of every step and tensor.

    Args:
      report: what `report.json` holds: `verify.ports.told`, and `sae`.

    Returns:
      The HTML text.

    Example:
      >>> Path("report.html").write_text(port_page(json.loads(Path("report.json").read_text())))
    """
    return rendered(
        "port.html",
        {f"steps-{one['dtype']}": _steps(one) for one in report["reports"]},
        report=report,
        titles=TITLES,
        stages={stage: _table(report, stage) for stage in report["reports"][0]["stages"]},
        headline={
            "verdict": "agrees" if report["ok"] else "differs",
            "steps": report["steps"],
            **{f"parted, {one['dtype']}": _parted(one) for one in report["reports"]},
        },
        about={name: value for name, value in report.items() if name not in SHOWN},
    )


def _parted(one: Mapping[str, Any]) -> str:
    return "never" if one["parted"] is None else f"step {one['parted']['step']}"


def _steps(one: Mapping[str, Any]) -> Plot:
    """Each parameter's error over the steps, on a log axis, and the bound."""
    steps = max((len(errors) for errors in one["trajectory"].values()), default=1)
    hues = itertools.cycle(CATEGORIES)
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": html.escape(name),
            "x": list(range(1, len(errors) + 1)),
            "y": [error or None for error in errors],  # a log axis has no 0
            "line": {"color": hue, "width": 1.5},
            "marker": {"size": 3},
        }
        for (name, errors), hue in zip(one["trajectory"].items(), hues, strict=False)
    ]
    bound = {
        "type": "scatter",
        "mode": "lines",
        "name": "bound",
        "x": [1, max(steps, 2)],
        "y": [one["stages"]["trained"]["bound"]] * 2,
        "line": {"dash": "dash", "color": "#c8423a", "width": 1.5},
    }
    return {
        "data": [*traces, bound],
        "layout": {
            "title": {"text": one["dtype"]},
            "xaxis": {"title": {"text": "step"}},
            "yaxis": {"title": {"text": "relative error"}, "type": "log", "exponentformat": "power"},
        },
    }


def _table(report: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """One row per tensor, one column per precision."""
    found = {one["dtype"]: one["stages"][stage] for one in report["reports"]}
    names = next(iter(found.values()))["errors"]
    cell = lambda error, bound: {  # noqa: E731
        "text": "not finite" if error is None else f"{error:.1e}",
        "ok": error is not None and error <= bound,
    }
    return {
        "bounds": {dtype: each["bound"] for dtype, each in found.items()},
        "rows": {
            name: [cell(each["errors"][name], each["bound"]) for each in found.values()] for name in names
        },
    }
