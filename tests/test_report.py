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
from sae_jax import report
from sae_jax.cli import main, reporting
from sae_jax.report import figures, numbers, sweep_page
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
                density=result.parts[0].density[rows],
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


def test_curves_are_medians_by_value_or_members(result, single):
    ax = figures.curves(result, "l0")
    assert [line.get_label() for line in ax.lines] == ["l1 0.001", "l1 0.01", "l1 0.1"]
    assert len(ax.collections) == 3, "a band per median"
    last = result.history["l0"][-1, result.grid["l1"] == 0.1]
    assert ax.lines[2].get_ydata()[-1] == pytest.approx(np.median(last[np.isfinite(last)]))
    few = figures.curves(single)
    np.testing.assert_array_equal(few.lines[0].get_ydata(), single.history["loss"][:, 0])
    assert (few.get_yscale(), len(few.collections)) == ("log", 0)
    with pytest.raises(sae_jax.InputError, match="there is no log 'lo'; there are: "):
        figures.curves(single, "lo")


def test_a_heat_map_over_two_axes_is_of_means(result):
    ax = figures.by_setting(result, "l0", "lr", "l1")
    drawn = ax.images[0].get_array()
    assert drawn.shape == (3, 3)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("lr", "l1")
    here = (result.grid["lr"] == 0.01) & (result.grid["l1"] == 0.1)
    assert drawn[2, 1] == pytest.approx(result.metrics["l0"][here].mean())
    assert drawn.mask[:, 2].all(), "these diverged"
    assert len(ax.texts) == 6


@pytest.mark.parametrize(
    ("names", "said"),
    [(("l0", "l2"), "'l2' is not swept; the axes are: l1, lr"), (("l0", "l1", "l1"), "both are 'l1'"),
     (("l3",), "there is no column 'l3'")],
)  # fmt: skip
def test_what_makes_no_heat_map(result, names, said):
    with pytest.raises(sae_jax.InputError, match=said):
        figures.by_setting(result, *names)


def test_a_single_member_makes_no_heat_map(single):
    with pytest.raises(sae_jax.InputError, match="needs two swept axes"):
        figures.by_setting(single)


def test_stability_is_drawn_by_setting(result):
    found = result.stability()
    ax = figures.stability(result, found)
    known = np.isfinite(found.consistency)
    np.testing.assert_allclose(ax.lines[0].get_ydata()[known], found.consistency[known])
    np.testing.assert_allclose(ax.lines[0].get_xdata()[known], result.intervals()["l0"].mean[known])


def test_dead_latents_are_drawn_by_member_and_by_group(result):
    points = figures.dead(result).collections[0].get_offsets()
    ok = result.sound
    np.testing.assert_allclose(points, np.stack([result.metrics[n][ok] for n in ("l0", "dead_fraction")], 1))
    both = sae_jax.result.join([result, result], [{"architecture": name, "d_sae": 6} for name in "ab"])
    ax = figures.dead(both)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]
    assert [len(each.get_offsets()) for each in ax.collections] == [ok.sum(), ok.sum()]


def test_features_of_a_text_are_the_most_active_ones_by_name():
    sae = sae_jax.relu(3, 6)
    trained = sae_jax.TrainedSAE(
        sae,
        {"W_enc": np.eye(3, 6), "b_enc": np.zeros(6), "W_dec": np.eye(6, 3), "b_dec": np.zeros(3)},
    ).labelled({2: "animals"})
    x = np.array([[0, 0.5, 30], [0, 0.25, 10]])
    ax = figures.features_of(trained, x, ["a\nb", "</script>"], most=2)
    np.testing.assert_array_equal(ax.images[0].get_array(), [[0.5, 30], [0.25, 10]])
    assert ax.images[0].get_clim() == (0, 30)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "2 animals"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a\\nb", "</script>"]
    chosen = figures.features_of(trained, x, ["a", "b"], [5, 0], labels={5: "mine"})
    assert [label.get_text() for label in chosen.get_xticklabels()] == ["5 mine", "0"]
    with pytest.raises(sae_jax.InputError, match="has features 0 to 5, not 6"):
        figures.features_of(trained, x, ["a", "b"], [6])
    with pytest.raises(sae_jax.InputError, match="there are 2 rows but 1 tokens"):
        figures.features_of(trained, x, ["a"])


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
    assert numbers.log_spaced(np.array(values)) is expected


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
    assert dots["customdata"] == np.flatnonzero(ok).tolist()
    cells = page.plots["settings"][0]["explained_variance"]["data"][0]["z"]
    mean = result.metrics["explained_variance"][0:3].mean()  # l1 1e-3, lr 1e-3
    assert cells[0][0] == pytest.approx(mean, rel=1e-4)
    assert cells[2] == [None] * 3  # lr 1e30
    assert page.count("tr") == 28
    assert re.findall(r"<dd>(.*?)</dd>", text) == ["27", "20", "2", "13.5", "9"]


def test_page_shows_features(result):
    plots = Page(sweep_page(result, {}, TOKENS)).plots
    views = plots["features"]["views"]
    sound = np.flatnonzero(result.sound).tolist()
    assert set(views) == set(map(str, sound)) == set(plots["density"]["views"])
    for index, view in views.items():
        assert view["features"] == list("012345")
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
    whole = Page(sweep_page(result, {}, TOKENS)).plots
    for name in ("features", "density"):
        front = {str(index): whole[name]["views"][str(index)] for index in result.frontier()}
        assert plots[name]["views"] == front
    result.save(tmp_path / "none", save="none")
    assert "features" not in Page(sweep_page(sae_jax.SweepResult.load(tmp_path / "none"), {}, TOKENS)).plots


def test_page_of_a_single_member(single):
    page = Page(sweep_page(single, {}, TOKENS))
    assert set(page.plots) == {"frontier", "curve-loss", "curve-l0", "dead", "features", "density"}
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


def test_members_lead_to_their_dashboards(result):
    link = "members/001/features/index.html"
    page = Page(sweep_page(result, {}, TOKENS, dashboards={1: link}))
    assert [attrs["href"] for tag, attrs in page.tags if tag == "a"] == [link]
    assert page.plots["dashboards"] == {"1": link}
    # of the others a button shows what the page has
    assert page.count("button") == 26 + len(result.table)


@pytest.mark.parametrize(
    ("dashboards", "said"),
    [({27: "members/027/features/index.html"}, "there is no member 27"),
     ({1: "javascript:alert(1)"}, "lies below the page"), ({1: "//host/x"}, "lies below the page")],
)  # fmt: skip
def test_links_lead_nowhere_else(result, dashboards, said):
    with pytest.raises(sae_jax.InputError, match=said):
        sweep_page(result, {}, dashboards=dashboards)


def test_labels_are_shown_beside_the_numbers_of_features(result):
    named = result.finished(lambda one: one.labelled({2: "<b>animals</b>"}))
    views = Page(sweep_page(named, {}, TOKENS)).plots["features"]["views"]
    assert views["0"]["features"] == ["0", "1", "2 &lt;b&gt;animals&lt;/b&gt;", "3", "4", "5"]


def test_every_metric_over_every_pair_of_axes(result):
    table = {name: column for name, column in result.grid.items() if name != "seed"}
    third = {**table, "b1": np.arange(27) % 3, "seed": np.zeros(27, int)}
    plots = Page(sweep_page(result._replace(grid=third), {})).plots["settings"]
    assert len(plots) == 3, "pairs of three axes"
    assert all(set(views) == {"explained_variance", "l0", "dead_fraction"} for views in plots)
    assert plots[2]["l0"]["layout"]["yaxis"]["title"]["text"] == "b1"


def test_a_random_search_has_no_heat_map(result):
    many = repeated(result, 6)
    grid = {name: np.arange(162.0) for name in ("l1", "lr")}
    assert "settings" not in Page(sweep_page(many._replace(grid=grid), {})).plots


# --- a report written anew


@pytest.fixture
def run(result, tmp_path):
    """A finished run of the seed's tokens, with a dashboard of member 1 and a label in member 0."""
    result.save(tmp_path, about={"command": "sae-jax sweep", "data": "the seed's tokens", "seconds": 2.0})
    (tmp_path / "members/001/features").mkdir()
    (tmp_path / "members/001/features/index.html").write_text("here")
    (tmp_path / "members/000/labels.json").write_text('{"3": "animals"}')
    return tmp_path


def test_a_report_is_written_anew_with_what_has_come_since(result, run):
    before = {path.name for path in run.iterdir()}
    report.renew(run)
    assert {path.name for path in run.iterdir()} == before | {"report.html", "frontier.png"}
    page = Page((run / "report.html").read_text())
    found = result.stability()
    first = Page(
        sweep_page(
            result, {"command": "sae-jax sweep", "data": "the seed's tokens", "seconds": 2.0}, TOKENS, found
        )
    )
    assert page.plots.pop("dashboards") == {"1": "members/001/features/index.html"}
    assert page.plots["features"]["views"]["0"].pop("features")[3] == "3 animals"
    del first.plots["features"]["views"]["0"]["features"]
    for name, plot in first.plots.items():
        assert page.plots[name] == plot, name


@pytest.mark.parametrize(
    ("broken", "said"),
    [(lambda run: run.joinpath("sweep.json").unlink(), "holds no run: it has no sweep.json"),
     (lambda run: run.joinpath("checkpoints").mkdir(), "is not finished: its command with --resume"),
     (lambda run: run.joinpath("metrics.csv").write_text(""), "does not hold a whole sweep")],
    ids=["no-run", "unfinished", "damaged"],
)  # fmt: skip
def test_what_is_no_finished_run_is_left_as_it_is(run, broken, said):
    broken(run)
    before = sorted(run.rglob("*"))
    with pytest.raises(sae_jax.InputError, match=said):
        reporting.run(reporting.Report(run, quiet=True))
    assert sorted(run.rglob("*")) == before


def test_the_command_says_what_it_wrote(run, capsys):
    assert reporting.run(reporting.Report(run)) == 0
    assert "report.html and frontier.png" in capsys.readouterr().err
    with pytest.raises(sae_jax.InputError, match="is no folder"):
        reporting.run(reporting.Report(run / "nowhere"))


def test_a_world_is_made_again(run):
    about = json.loads((run / "sweep.json").read_text())
    told = {"name": "hedging", "arguments": [], "data_seed": 3}
    (run / "sweep.json").write_text(json.dumps({**about, "world": told}))
    again = reporting.truth_of(run)
    np.testing.assert_array_equal(again.directions, sae_jax.synthetic.hedging(data_seed=3).directions)
    (run / "sweep.json").write_text(json.dumps({**about, "world": {"name": "gone"}}))
    assert reporting.truth_of(run) is None


@pytest.mark.slow
def test_the_report_of_a_world_comes_out_the_same_again(tmp_path):
    run = tmp_path / "run"
    words = (
        f"sweep --world hedging --world-args d_in=8 first=0.3 --data-seed 3 --steps 50 --quiet --out {run}"
    )
    with pytest.raises(SystemExit, match="0"):
        main(words.split())
    first = (run / "report.html").read_text()
    assert "stability-truth" in Page(first).plots
    reporting.run(reporting.Report(run, quiet=True))
    assert (run / "report.html").read_text() == first
