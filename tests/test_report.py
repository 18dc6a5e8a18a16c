"""The figures draw what they are given; the page holds it, asks for nothing and runs no foreign script."""

import json
import re
from functools import partial
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.axes import Axes
from plotly.offline import get_plotlyjs

import sae_jax
from sae_jax.report import figures, sweep_page
from sae_jax.result import Part

TOKENS = sae_jax.synthetic.seed_tokens()
HOSTILE = (
    "</script><img src=x onerror=alert(1)>",
    '"quoted" & \'single\' <b onclick="alert(1)">',
    "😀 $\\frac$ %{x}",
    "שלום <i>עולם</i>",
)


@pytest.fixture(scope="module")
def result():
    """Two axes, three seeds, and a third of the members diverged."""
    return sae_jax.sweep(
        partial(sae_jax.relu, d_in=4, d_sae=6),
        grid=sae_jax.grid(l1=[1e-3, 1e-2, 1e-1], lr=[1e-3, 1e-2, 1e30], seed=range(3)),
        source=sae_jax.in_memory(TOKENS.x),
        steps=20,
    )


@pytest.fixture(scope="module")
def single(result):
    return picked(result, [3])


@pytest.fixture(scope="module")
def diverged(result):
    return picked(result, [8])


def picked(result, rows):
    """The sweep that had only these members, or some of them twice."""
    return result._replace(
        grid={name: column[rows] for name, column in result.grid.items()},
        parts=(
            Part(
                lambda place: result.parts[0].sae(rows[place]),
                {name: leaf[rows] for name, leaf in result.params.items()},
                np.arange(len(rows)),
            ),
        ),
        metrics={name: value[rows] for name, value in result.metrics.items()},
        history={name: log if name == "step" else log[:, rows] for name, log in result.history.items()},
        status=result.status[rows],
    )


def repeated(result, times):
    return picked(result, np.tile(np.arange(27), times))


def renamed(result, old, new):
    """The same sweep with an axis called otherwise."""

    return result._replace(
        grid={new if name == old else name: column for name, column in result.grid.items()},
    )


class Page(HTMLParser):
    """Tags with their attributes, text outside scripts, and the page's JSON."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.scripts = [], "", []
        self.feed(text)
        self.plots = json.loads(self.scripts[1], parse_constant=pytest.fail)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.cdata_elem == "script":
            self.scripts[-1] += data
        else:
            self.text += data

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)


# --- figures


def test_heat_map_shows_f(tmp_path):
    f = np.arange(12).reshape(4, 3) / 10
    ax = figures.heat_map(f, HOSTILE)
    assert isinstance(ax, Axes)
    np.testing.assert_array_equal(ax.images[0].get_array(), f)
    assert ax.images[0].get_clim() == (0, 1)
    assert [text.get_text() for text in ax.texts] == [f"{value:.2f}" for value in f.ravel()]
    assert [label.get_text() for label in ax.get_yticklabels()] == list(HOSTILE)
    figures.save(ax, tmp_path / "map.png")  # where "$...$" is read as maths, this raises


def test_figures_draw_where_they_are_told(result):
    ax = figures.heat_map(np.eye(2), ["a", "b"]).figure.add_subplot()
    assert figures.frontier(result, ax=ax) is ax


def test_frontier_draws_every_member_that_is_ok(result):
    ax = figures.frontier(result)
    ok, best = result.status == "ok", result.frontier()
    assert 0 < ok.sum() < ok.size
    drawn = np.asarray(ax.collections[0].get_offsets())
    np.testing.assert_allclose(drawn[:, 0], result.metrics["l0"][ok])
    np.testing.assert_allclose(drawn[:, 1], result.metrics["explained_variance"][ok])
    np.testing.assert_allclose(ax.collections[0].get_array(), result.grid["l1"][ok])
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), result.metrics["l0"][best])
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), result.metrics["explained_variance"][best])
    assert "9 diverged" in ax.get_title()


@pytest.mark.parametrize("color", [None, "lr", "seed"])
def test_frontier_of_other_columns(result, color):
    ax = figures.frontier(result, x="dead_fraction", y="mse", color=color)
    best = result.frontier("dead_fraction", "mse")
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), result.metrics["mse"][best])


def test_frontier_is_not_flattened_by_one_bad_member(result):
    worst = result.metrics["explained_variance"].copy()
    worst[0] = -1e9
    ax = figures.frontier(
        result._replace(metrics={**result.metrics, "explained_variance": worst, "fvu": 1 - worst})
    )
    assert -3 < ax.get_ylim()[0] < 0


def test_frontier_png(result, single, diverged, tmp_path):
    for each in (result, single, diverged):
        figures.frontier_png(each, tmp_path / "frontier.png")
        assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_found_distribution_counts():
    found = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 1]], bool)
    ax = figures.found_distribution(found)
    assert [bar.get_height() for bar in ax.patches] == [0.25, 0.5, 0, 0.25]


def test_wilson_interval():
    # 1 of 10: Brown, Cai and DasGupta's formula by hand
    low, high = figures.wilson(np.array([0.0, 0.1, 1.0]), 10)
    np.testing.assert_allclose(low, [0, 0.01788, 0.72246], atol=2e-5)
    np.testing.assert_allclose(high, [0.27754, 0.40416, 1], atol=2e-5)


def test_shrinkage_draws_medians(result, single):
    ax = figures.shrinkage({"many": result, "one": single})
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["many", "one"]
    np.testing.assert_array_equal(ax.lines[1].get_ydata(), single.history["sparsity"][:, 0])
    last = result.history["sparsity"][-1]
    assert ax.lines[0].get_ydata()[-1] == pytest.approx(np.median(last[np.isfinite(last)]))


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1e-4, 1e-3, 1e-2], True), ([1, 2, 3], False), ([0, 1e-3, 1], False), ([1], False)],
)
def test_log_spaced(values, expected):
    assert figures.log_spaced(np.array(values)) is expected


# --- page


def test_page_loads_nothing(result):
    text = sweep_page(result, {}, TOKENS)
    assert text.count(get_plotlyjs()) == 1
    page = Page(text)
    assert page.count("script") == 3
    assert not {"link", "img", "iframe", "base", "object"} & {tag for tag, _ in page.tags}
    assert not [attrs for _, attrs in page.tags if {"src", "href", "srcset"} & set(attrs)]
    assert not re.search(r"https?:|@import|url\(", text.replace(get_plotlyjs(), ""))
    policy = next(attrs for _, attrs in page.tags if attrs.get("http-equiv"))
    assert policy["content"].startswith("default-src 'none'")


def test_page_draws_the_members(result):
    text = sweep_page(result, {"seconds": 2.0}, TOKENS)
    page = Page(text)
    ok = result.status == "ok"
    line, dots, means = page.plots["frontier"]["data"]
    np.testing.assert_allclose(dots["y"], result.metrics["explained_variance"][ok], rtol=1e-4)
    np.testing.assert_allclose(line["x"], result.metrics["l0"][result.frontier()], rtol=1e-4)
    assert dots["hovertext"][0].startswith("member 0<br>l1 0.001<br>lr 0.001<br>seed 0<br>loss ")
    told = result.intervals()["explained_variance"]
    np.testing.assert_allclose(means["y"], told.mean[np.isfinite(told.mean)], rtol=1e-4)
    np.testing.assert_allclose(means["error_y"]["array"], told.half_width[np.isfinite(told.mean)], rtol=1e-3)
    assert len(page.plots["curve-loss"]["data"]) == 9, "median and quartiles for each l1"
    cells = page.plots["axes"]["data"][0]["z"]
    mean = result.metrics["explained_variance"][0:3].mean()  # l1 1e-3, lr 1e-3
    assert cells[0][0] == pytest.approx(mean, rel=1e-4)
    assert cells[2] == [None] * 3  # lr 1e30
    assert page.count("tr") == 28
    assert re.findall(r"<dd>(.*?)</dd>", text) == ["27", "20", "2", "13.5", "9"]


def test_page_shows_features(result):
    plots = Page(sweep_page(result, {}, TOKENS)).plots
    views = plots["features"]["views"]
    assert set(views) == {str(index) for index in result.frontier()} == set(plots["density"]["views"])
    for index, view in views.items():
        assert view["features"] == [*range(6)]
        np.testing.assert_allclose(view["z"], result.member(int(index)).encode(TOKENS.x), rtol=1e-4)
        assert sum(plots["density"]["views"][index]) == 6


def test_page_of_many_members_shows_bands(result):
    plots = Page(sweep_page(repeated(result, 2), {})).plots
    curves = plots["curve-l0"]["data"]
    assert len(curves) == 3 * 3
    last = result.history["l0"][-1, result.grid["l1"] == 0.1]
    assert curves[-1]["y"][-1] == pytest.approx(np.median(last[np.isfinite(last)]), rel=1e-4)
    assert "features" not in plots


def test_page_of_a_result_from_disk(result, tmp_path):
    result.save(tmp_path, save="frontier")
    plots = Page(sweep_page(sae_jax.SweepResult.load(tmp_path), {}, TOKENS)).plots
    assert "density" not in plots
    assert set(plots["features"]["views"]) == {str(index) for index in result.frontier()}
    result.save(tmp_path / "none", save="none")
    assert "features" not in Page(sweep_page(sae_jax.SweepResult.load(tmp_path / "none"), {}, TOKENS)).plots


def test_page_of_a_single_member(single):
    page = Page(sweep_page(single, {}, TOKENS))
    assert set(page.plots) == {"frontier", "curve-loss", "curve-l0", "features", "density"}
    assert page.count("tr") == 2


def test_page_where_all_diverged(diverged):
    page = Page(sweep_page(diverged, {}, TOKENS))
    assert set(page.plots) == {"curve-loss", "curve-l0"}
    assert "diverged at step" in page.text


def test_hostile_words_stay_words(result):
    tame = Page(sweep_page(result, {"command": "x", "environment": {"x": ["x"]}}, TOKENS))
    evil = HOSTILE[0]
    about = {"command": " ".join(HOSTILE), "environment": {evil: list(HOSTILE)}}
    named = TOKENS._replace(names=HOSTILE * 2)
    page = Page(sweep_page(renamed(result, "l1", evil), about, named))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in tame.tags]
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    for word in HOSTILE:
        assert word in page.text
    # plotly reads tags in labels: they must reach it escaped
    labels = json.dumps(page.plots)
    assert "onerror" in labels
    assert not re.search(r"<(?!br>)", labels)
    assert page.plots["features"]["tokens"][3] == "שלום &lt;i&gt;עולם&lt;/i&gt;"


def test_command_of_arguments_and_of_broken_bytes(single):
    page = Page(sweep_page(single, {"command": ["sae-jax", "two words", "\udc80"]}))
    assert "sae-jax 'two words' '?'" in page.text
    sweep_page(single, {"command": "\udc80"}).encode("utf-8")


def test_page_of_ten_thousand_members_stays_small(result):
    many = repeated(result, 371)
    best = many.frontier()
    text = sweep_page(many, {})
    page = Page(text)
    assert len(text.encode()) < 15e6
    assert page.count("tr") == 1001
    assert len(page.plots["frontier"]["data"][1]["x"]) == 3000
    np.testing.assert_allclose(page.plots["frontier"]["data"][0]["x"], many.metrics["l0"][best], rtol=1e-4)
    assert "1,000 of 10,017 members" in page.text
