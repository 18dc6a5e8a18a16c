"""Pictures of what people open in a browser, of real runs: `NAME-light.png`, `NAME-dark.png`, `NAME.inc`.

A page shows `NAME.inc`, which holds the pictures, or where there is no Chromium a sentence in their place.
"""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

THEMES = ("light", "dark")
SIZE = {"width": 1280, "height": 860}
WITHOUT = "The picture is missing: this build found no Chromium."


class Shot(NamedTuple):
    """A picture of a page."""

    name: str
    page: str
    """A file of the run, and what stands behind it in the address."""
    alt: str
    clip: tuple[int, int] | None = None
    """Width and height, where not the usual ones."""


COMMANDS = ("sae-jax sweep --out run", "sae-jax features run/members/142 --out dashboard")
SHOTS = (
    Shot("report", "run/report.html", "The report of a sweep: the frontier, and the curves over training"),
    Shot("dashboard", "dashboard/index.html", "The features of one SAE: a map and a table"),
    Shot("feature", "dashboard/index.html#feature=3", "A feature: its histogram and strongest contexts"),
    Shot("phone", "dashboard/index.html#feature=3", "The same on a phone", clip=(390, 780)),
)


def found() -> str | None:
    """The Chromium that CHROMIUM names, the system's, or playwright's own."""
    if named := os.environ.get("CHROMIUM") or shutil.which("chromium"):
        return named
    if find_spec("playwright") is None:
        return None
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        own = driver.chromium.executable_path
    return own if Path(own).exists() else None


def fragment(shot: Shot) -> str:
    """The pictures of both themes, of which the site shows the reader's."""
    return "\n".join(
        f"```{{image}} /generated/screenshots/{shot.name}-{theme}.png\n:alt: {shot.alt}\n"
        f":class: only-{theme}\n:width: {'40%' if shot.clip else '100%'}\n```\n"
        for theme in THEMES
    )


def take(chromium: str) -> None:
    """Open each page in each theme."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        # as root, which CI is, Chromium has no sandbox
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for shot in SHOTS:
            size = dict(zip(SIZE, shot.clip, strict=True)) if shot.clip else SIZE
            for theme in THEMES:
                page = browser.new_page(viewport=size, color_scheme=theme, reduced_motion="reduce")
                file, _, place = shot.page.partition("#")
                page.goto(Path(file).resolve().as_uri() + (f"#{place}" if place else ""))
                page.wait_for_timeout(800)  # what is drawn after the page has come
                page.screenshot(path=f"{shot.name}-{theme}.png")
                page.close()
            Path(f"{shot.name}.inc").write_text(fragment(shot))
        browser.close()


def main() -> int:
    """Exit with 1 where pictures are missing that CI is to have."""
    chromium = found()
    if chromium is None:
        for shot in SHOTS:
            Path(f"{shot.name}.inc").write_text(f"*{WITHOUT}*\n")
        print("no Chromium (apt-get install chromium, or name one in CHROMIUM): pages say so in their place")
        return int(os.environ.get("CI") == "true")
    for command in COMMANDS:
        subprocess.run(command.split(), check=True, stdout=sys.stderr)
    take(chromium)
    return 0


if __name__ == "__main__":
    sys.exit(main())
