"""The page of `--live` in a real browser, over real runs."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
SCRIPT = Path(sys.executable).with_name("sae-jax")
FOR_A_MINUTE = 60_000
LONG = "sweep --steps 4000000 --seeds 2 --l1 0.01,0.1"
"""Long enough on any machine for whatever is looked at."""


@pytest.fixture
def begun(tmp_path):
    """`begun(words)`: a run with `--live`, and where it is; ended with the test."""
    runs = []

    def begin(words, out="r"):
        run = subprocess.Popen(
            [SCRIPT, *words.split(), "--live", "--live-port", "0", "--out", out],
            cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        runs.append(run)
        address = next(filter(None, (re.search(r"live at (http://\S+)", line) for line in run.stderr)))
        return run, address[1]

    yield begin
    for run in runs:
        run.kill()
        run.communicate()


def require_quiet(opened, address):
    """No complaint, and nothing asked for beyond the address."""
    assert opened.complaints == []
    assert [url for url in opened.requests if not url.startswith((address, "data:", "blob:"))] == []


def points(page):
    """How many points of the loss are drawn."""
    return page.evaluate("document.getElementById('curve-loss')?.data?.[0].x.length ?? 0")


def until(page, expression):
    """Wait for it to be true; playwright's own way is an eval, which the page forbids."""
    end = time.monotonic() + FOR_A_MINUTE / 1000
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"never: {expression}"
        page.wait_for_timeout(50)


def test_a_page_follows_a_run_by_itself_and_ends_as_its_report(begun, opened):
    run, address = begun("sweep --steps 1000000 --seeds 2 --l1 0.01,0.1,0.2")
    seen = opened(address)
    page = seen.page
    until(page, "document.getElementById('curve-loss')?.data")
    before, share = points(page), page.evaluate("document.getElementById('share').value")
    until(page, f"document.getElementById('curve-loss').data[0].x.length > {before}")
    assert page.evaluate("document.getElementById('share').value") > share
    assert page.locator("#frontier .scatterlayer .point").count() == 6
    assert re.fullmatch(r"Training(: past \d0%)?\.", page.locator("[role=status]").inner_text())
    assert "time left" in page.locator("#figures").inner_text()
    page.wait_for_url(f"{address}report.html*", timeout=2 * FOR_A_MINUTE)
    page.wait_for_selector("#frontier .main-svg", timeout=FOR_A_MINUTE)
    assert "6 members" in page.title()
    run.wait(timeout=60)
    assert run.returncode == 0
    require_quiet(seen, address)


@pytest.mark.parametrize(("theme", "width"), [("light", 1280), ("dark", 390)])
def test_everybody_can_read_it(begun, opened, theme, width):
    _, address = begun(f"{LONG} --arch relu,topk")
    seen = opened(address, theme=theme, width=width)
    seen.page.wait_for_selector("#curve-loss .main-svg", timeout=FOR_A_MINUTE)
    assert seen.accessibility() == []
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= width
    require_quiet(seen, address)


def test_what_was_zoomed_into_stays_as_points_come(begun, opened):
    _, address = begun(LONG)
    page = opened(address).page
    until(page, "document.getElementById('curve-loss')?.data?.[0].x.length > 1")
    # as a person does it: plotly keeps no range that a script has set
    place = page.locator("#curve-loss .nsewdrag")
    place.scroll_into_view_if_needed()
    box = place.bounding_box()
    page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.3 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.7 * box["width"], box["y"] + 0.7 * box["height"], steps=5)
    page.mouse.up()
    until(page, "document.getElementById('curve-loss').layout.xaxis.autorange === false")
    shown, before = page.evaluate("document.getElementById('curve-loss').layout.xaxis.range"), points(page)
    until(page, f"document.getElementById('curve-loss').data[0].x.length > {before}")
    assert page.evaluate("document.getElementById('curve-loss').layout.xaxis.range") == shown


def test_a_run_that_stops_says_how_to_go_on(begun, opened):
    run, address = begun(LONG)
    seen = opened(address)
    seen.page.wait_for_selector("#curve-loss .main-svg", timeout=FOR_A_MINUTE)
    run.send_signal(signal.SIGTERM)
    seen.page.wait_for_selector("[role=status]:text('--resume')", timeout=FOR_A_MINUTE)
    assert seen.page.locator("[role=status]").inner_text().startswith("stopped at ")
    run.wait(timeout=30)
    require_quiet(seen, address)


def test_a_lost_connection_is_told_and_tried_again(begun, opened, tmp_path):
    _, address = begun(LONG)
    page = opened(address).page
    page.wait_for_selector("#curve-loss .main-svg", timeout=FOR_A_MINUTE)
    page.context.set_offline(True)
    page.wait_for_selector("[role=status]:text('No answer')", timeout=FOR_A_MINUTE)
    assert str(tmp_path / "r") in page.locator("[role=status]").inner_text()
    page.context.set_offline(False)
    page.wait_for_selector("[role=status]:text('Training')", timeout=FOR_A_MINUTE)


def test_a_hostile_name_is_shown_as_text(begun, opened):
    out = "</script><img src=x onerror=alert(1)>\u202e\U0001f40d{{ 7 * 7 }}"
    _, address = begun(LONG, out)
    seen = opened(address)
    seen.page.wait_for_selector("#curve-loss .main-svg", timeout=FOR_A_MINUTE)
    told = seen.page.locator(".environment").inner_text()
    assert out in told
    assert seen.page.locator("img").count() == 0
    require_quiet(seen, address)
