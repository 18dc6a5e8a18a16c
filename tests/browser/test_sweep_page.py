"""The pages of a sweep and of a port in a real browser: they lead, sort and show, and ask for nothing."""

import json
import re
from functools import partial

import numpy as np
import pytest

import sae_jax
from sae_jax import report
from sae_jax.report import port_page, sweep_page

pytestmark = pytest.mark.slow
expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect

THEMES = ("light", "dark")
EVIL = "</script><img src=x onerror=alert(1)>"
HOSTILE = (
    EVIL,
    '"quoted" & \'single\' <b onclick="alert(1)">',
    "😀 $\\frac$ %{x}",
    "שלום \u202e\x07 <i>עולם</i>",
)
TOKENS = sae_jax.synthetic.seed_tokens()
WITH_DASHBOARD = 1


@pytest.fixture(scope="module")
def result():
    return sae_jax.sweep(
        partial(sae_jax.relu, d_in=4, d_sae=6),
        grid=sae_jax.grid(l1=[1e-3, 1e-2, 1e-1], lr=[1e-2, 1e30], b1=[0.8, 0.9], seed=range(2)),
        source=sae_jax.in_memory(TOKENS.x),
        steps=50,
    )


@pytest.fixture(scope="module")
def run(result, tmp_path_factory):
    """A finished run with the dashboard of one member and its report."""
    folder = tmp_path_factory.mktemp("run")
    result.save(folder, about={"command": "sae-jax sweep", "data": "the seed's tokens", "seconds": 2.0})
    dashboard = folder / "members" / f"{WITH_DASHBOARD:03d}" / "features"
    dashboard.mkdir()
    (dashboard / "index.html").write_text("<!doctype html><title>dashboard</title>")
    report.renew(folder)
    return folder


@pytest.fixture(scope="module")
def hostile(result, tmp_path_factory):
    """A page where whatever a user names is hostile."""
    grid = {EVIL if name == "l1" else name: column for name, column in result.grid.items()}
    about = {"command": " ".join(HOSTILE), "environment": {EVIL: list(HOSTILE)}}
    named = result._replace(grid=grid).finished(lambda one: one.labelled({0: EVIL}))
    path = tmp_path_factory.mktemp("hostile") / "report.html"
    path.write_text(sweep_page(named, about, TOKENS._replace(names=HOSTILE * 2)), encoding="utf-8")
    return path


def place_of(page, member, plot="frontier"):
    """Where a member's point lies on the screen."""
    page.locator(f"#{plot}").scroll_into_view_if_needed()
    return page.evaluate(
        """([id, member]) => {
            const plot = document.getElementById(id);
            const {left, top} = plot.getBoundingClientRect();
            const {xaxis, yaxis} = plot._fullLayout;
            for (const {customdata, x, y} of plot.data) {
                const at = customdata?.indexOf(member) ?? -1;
                const across = (value) => left + xaxis._offset + xaxis.d2p(value);
                const down = (value) => top + yaxis._offset + yaxis.d2p(value);
                if (at >= 0) return [across(x[at]), down(y[at])];
            }
        }""",
        [plot, member],
    )


def alone(result, members):
    """One of the members that no other lies near to, so that a pointer can mean it only."""
    xs, ys = result.metrics["l0"], result.metrics["explained_variance"]
    ok = np.flatnonzero(result.sound)
    spread = np.ptp(xs[ok]), np.ptp(ys[ok])
    away = lambda i: min(  # noqa: E731
        np.hypot((xs[i] - xs[j]) / spread[0], (ys[i] - ys[j]) / spread[1]) for j in ok if j != i
    )
    return int(max(members, key=away))


def test_a_point_shows_its_member_and_leads_inside(result, run, opened):
    seen = opened(run / "report.html")
    page = seen.page
    member = alone(result, set(np.flatnonzero(result.sound)) - {WITH_DASHBOARD})
    page.mouse.move(*place_of(page, member))
    hover = page.locator("#frontier .hoverlayer .hovertext")
    hover.wait_for()
    assert re.match(rf"member {member}l1 ", hover.text_content())
    page.mouse.down()
    page.mouse.up()
    expect(page.locator("#view")).to_have_value(str(member))
    assert page.evaluate("document.activeElement.id") == "view"
    assert page.evaluate("document.getElementById('h-inside').getBoundingClientRect().top") < 200
    assert page.locator(".members tr[aria-current]").get_attribute("data-member") == str(member)
    seen.require_quiet(run)


def test_a_point_with_a_dashboard_opens_it(run, opened):
    seen = opened(run / "report.html")
    page = seen.page
    # the point itself may lie under another: the event is plotly's own
    page.evaluate(
        "member => document.getElementById('frontier').emit('plotly_click',"
        " {points: [{customdata: member, hovertext: ''}]})",
        WITH_DASHBOARD,
    )
    page.wait_for_url("**/members/001/features/index.html")
    assert page.title() == "dashboard"
    seen.require_quiet(run)


def test_the_table_leads_by_key(run, opened):
    seen = opened(run / "report.html")
    page = seen.page
    page.get_by_role("button", name="Look inside member 9", exact=True).focus()
    page.keyboard.press("Enter")
    assert page.locator("#view").input_value() == "9"
    page.get_by_role("link", name=f"Dashboard of member {WITH_DASHBOARD}").focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**/members/001/features/index.html")
    seen.require_quiet(run)


def test_the_chosen_member_has_a_link_or_is_told_to_have_numbers_alone(run, opened):
    seen = opened(run / "report.html")
    page = seen.page
    page.locator("#view").select_option(str(WITH_DASHBOARD))
    page.locator("#chosen a").click()
    page.wait_for_url("**/members/001/features/index.html")
    page.go_back()
    # member 4 diverged: it is in the table and not among those with figures
    page.get_by_role("button", name="Look inside member 4", exact=True).click()
    assert "the numbers of member 4 alone" in page.locator("#chosen").text_content()
    assert page.locator("#view option:checked").text_content().startswith("member 4, l1 0.001")
    assert not page.locator("#features").is_visible()
    page.locator("#view").select_option(str(WITH_DASHBOARD))
    assert page.locator("#features").is_visible()
    seen.require_quiet(run)


def test_the_table_sorts(result, run, opened):
    page = opened(run / "report.html").page
    heading = page.locator(".members th", has_text="l0")
    column = list(result.table).index("l0")
    for direction, sign in (("ascending", 1), ("descending", -1)):
        heading.locator("button").press("Enter")
        assert heading.get_attribute("aria-sort") == direction
        cells = page.locator(f".members tbody td:nth-child({column + 1})").all()
        values = [float(cell.get_attribute("data-v")) for cell in cells]
        assert values == sorted(values, key=lambda value: sign * value)


def test_metric_and_axes_of_the_heat_map_are_chosen(run, opened):
    seen = opened(run / "report.html")
    page = seen.page
    shown = lambda: page.evaluate(  # noqa: E731
        "() => { const {data: [{hovertext}], layout} = document.getElementById('axes');"
        " return [hovertext[0][0], layout.xaxis.title.text, layout.yaxis.title.text]; }"
    )
    assert shown()[0].startswith("l1 0.001<br>lr 0.01<br>explained variance ")
    page.locator("#metric").select_option("l0")
    page.locator("#pair").select_option("lr × b1")
    assert shown()[0].startswith("lr 0.01<br>b1 0.8<br>l0 ")
    assert shown()[1:] == ["lr", "b1"]
    seen.require_quiet(run)


@pytest.mark.parametrize("theme", THEMES)
def test_hostile_words_run_nothing(hostile, theme, opened):
    seen = opened(hostile, theme=theme)
    page = seen.page
    assert page.locator("#features").text_content().count("onerror") == 2 + 1, "two tokens, one label"
    page.mouse.move(*place_of(page, 0))
    page.locator("#frontier .hoverlayer .hovertext").wait_for()
    assert page.locator("img").count() == 0
    assert EVIL in page.locator("h1").text_content()
    assert EVIL in page.locator("pre").text_content()
    seen.require_quiet(hostile)


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", [1280, 390])
def test_a_sweep_is_accessible_and_fits(run, theme, width, opened):
    seen = opened(run / "report.html", theme=theme, width=width)
    page = seen.page
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert seen.accessibility() == []
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 29)"}[theme]
    seen.require_quiet(run)


def test_plots_follow_the_scheme(run, opened):
    page = opened(run / "report.html").page
    title = page.locator("#frontier .xtitle")
    expect(title).to_have_css("fill", "rgb(28, 33, 40)")
    page.emulate_media(color_scheme="dark")
    expect(title).to_have_css("fill", "rgb(228, 232, 236)")


def test_a_finger_sees_before_it_goes(run, chromium):
    context = chromium.new_context(viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto((run / "report.html").as_uri())
    press = (
        "member => document.getElementById('frontier').emit('plotly_click',"
        " {points: [{customdata: member, hovertext: ''}]})"
    )
    page.evaluate(press, WITH_DASHBOARD)
    assert page.url.endswith("report.html")
    page.evaluate(press, WITH_DASHBOARD)
    page.wait_for_url("**/members/001/features/index.html")
    context.close()


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    """The page of a port that differs, with a tensor of a hostile name."""
    stage = {"bound": 1e-4, "errors": {EVIL: 1e-6, "b_dec": None}}
    steps = {EVIL: [1e-6, 1e-5], "b_dec": [1e-6, None]}
    reports = [
        {
            "dtype": dtype,
            "parted": parted,
            "trajectory": steps,
            "stages": dict.fromkeys(("forward", "loss", "gradients", "trained"), stage),
        }
        for dtype, parted in (("float32", {"step": 2, "parameter": "b_dec"}), ("float64", None))
    ]
    told = {
        "ok": False,
        "torch": EVIL,
        "sae": "members/001",
        "steps": 2,
        "findings": [EVIL],
        "reports": reports,
    }
    path = tmp_path_factory.mktemp("port") / "report.html"
    path.write_text(port_page(json.loads(json.dumps({**told, "versions": EVIL}))), encoding="utf-8")
    return path


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", [1280, 390])
def test_a_port_is_accessible_and_runs_nothing(port, theme, width, opened):
    seen = opened(port, theme=theme, width=width)
    assert seen.page.evaluate("document.documentElement.scrollWidth") == width
    assert seen.accessibility() == []
    assert seen.page.locator("img").count() == 0
    assert EVIL in seen.page.locator("h1").text_content()
    seen.require_quiet(port)
