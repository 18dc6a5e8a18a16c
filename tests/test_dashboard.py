"""The folder of a dashboard holds what was observed, in scripts that no token can break."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from observed_by_hand import by_hand

from sae_jax.features.observed import NONE
from sae_jax.report.dashboard import LONGEST, TOGETHER, write_dashboard

HOSTILE = "</script><img src=x onerror=alert(1)>"
ANY = st.text(st.characters(), max_size=12)  # lone surrogates and control characters among them


def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")


def read(path):
    """What a data script hands over."""
    text = path.read_bytes().decode("ascii")
    name, value = re.fullmatch(r'arrived\("(\w+)",(.*)\);\n', text).groups()
    assert name == path.stem
    return json.loads(value, parse_constant=refuse)


def written(observed, folder):
    """All data scripts by name, and the features in one list."""
    write_dashboard(observed, folder)
    data = {path.stem: read(path) for path in (folder / "data").iterdir()}
    features = [feature for name in sorted(data) if name.isdigit() for feature in data[name]]
    assert len(features) == observed.d_sae
    return data, features


def with_seen(observed, **fields):
    return observed._replace(seen=observed.seen._replace(**fields))


@pytest.fixture(scope="module")
def observed():
    return by_hand(70, never=(3, 69), labels={5: "animals", 70: "of no feature"})


def test_one_page_one_script_and_a_file_for_every_32_features(observed, tmp_path):
    write_dashboard(observed, tmp_path / "new")
    files = {
        str(path.relative_to(tmp_path / "new")) for path in (tmp_path / "new").rglob("*") if path.is_file()
    }
    data = ("words", "table", "passages", "0000", "0001", "0002")
    assert files == {"index.html", "dashboard.js", *(f"data/{name}.js" for name in data)}
    assert len(read(tmp_path / "new/data/0000.js")) == TOGETHER
    assert len(read(tmp_path / "new/data/0002.js")) == 70 - 2 * TOGETHER


@pytest.mark.parametrize(("kind", "stored"), [("strongest", "strongest"), ("by_chance", "chance")])
def test_contexts_are_those_observed(observed, tmp_path, kind, stored):
    data, features = written(observed, tmp_path)
    examples = getattr(observed.seen, kind)
    for number, feature in enumerate(features):
        unit = 10.0 ** data["table"]["exponents"][number]
        told = feature[stored]
        held = examples.rows[number] != NONE
        assert told["rows"] == examples.rows[number][held].tolist()
        for values, words, expected, tokens in zip(
            told["values"],
            told["words"],
            examples.values[number][held],
            examples.tokens[number][held],
            strict=True,
        ):
            beyond = np.isnan(expected)
            values = np.array(values)
            assert (values[beyond] == NONE).all()
            # the least that is active is told as one unit
            np.testing.assert_allclose(values[~beyond] * unit, expected[~beyond], atol=unit)
            np.testing.assert_allclose(values[values > 1] * unit, expected[values > 1], atol=0.51 * unit)
            assert ((values > 0) == (expected > 0)).all()
            shown = [data["words"][word] for word in np.array(words)[~beyond]]
            assert shown == [observed.word(token) for token in tokens[~beyond].tolist()]


def test_activations_have_at_least_three_digits_at_the_peak(observed, tmp_path):
    data, features = written(observed, tmp_path)
    before = data["table"]["before"]["strongest"]
    peaks = [
        feature["strongest"]["values"][0][before] for feature in features if feature["strongest"]["rows"]
    ]
    assert len(peaks) == 68
    assert min(peaks) >= 1000
    assert max(peaks) <= 10_000


def test_a_weak_activation_does_not_vanish(observed, tmp_path):
    values = observed.seen.strongest.values.copy()
    values[0, 0, 0] = values[0, 0, observed.seen.strongest.before] * 1e-7
    data = written(with_seen(observed, strongest=observed.seen.strongest._replace(values=values)), tmp_path)[
        1
    ]
    assert data[0]["strongest"]["values"][0][0] == 1


def test_what_is_near_names_features_and_words(observed, tmp_path):
    data, features = written(observed, tmp_path)
    near, promoted = observed.weighed.near, observed.weighed.promoted
    assert [place for place, _ in features[9]["near"]] == near.places[9].tolist()
    np.testing.assert_allclose([value for _, value in features[9]["near"]], near.values[9], rtol=5e-3)
    assert [data["words"][word] for word, _ in features[9]["promoted"]] == [
        observed.word(token) for token in promoted.places[9].tolist()
    ]
    assert features[3]["together"] == []


def test_the_histogram_keeps_every_count(observed, tmp_path):
    data, features = written(observed, tmp_path)
    assert [sum(feature["histogram"]) for feature in features] == observed.seen.histogram.sum(axis=1).tolist()
    filled = np.flatnonzero(observed.seen.histogram.any(axis=0))
    # and where the last of them ends
    np.testing.assert_allclose(
        data["table"]["edges"], observed.seen.edges[filled[0] : filled[-1] + 2], rtol=1e-3
    )
    assert {len(feature["histogram"]) for feature in features} == {len(data["table"]["edges"]) - 1}


def test_passages_end_where_they_end(observed, tmp_path):
    passages = written(observed, tmp_path)[0]["passages"]
    assert [len(passage["rows"]) for passage in passages] == [64, 64, 64, 32]
    assert {len(row) for row in passages[3]["values"]} == {len(passages[3]["features"])}


def test_labels_of_features_that_do_not_exist_are_left_out(observed, tmp_path):
    assert written(observed, tmp_path)[0]["table"]["labels"] == [[5, "animals"]]


@settings(max_examples=40, deadline=None)
@given(words=st.lists(ANY, min_size=1, max_size=20), label=ANY.filter(bool))
def test_any_word_and_label_comes_back(words, label, tmp_path_factory):
    observed = by_hand(2, words=words * 3, labels={1: label})
    data = written(observed, tmp_path_factory.mktemp("any"))[0]
    assert set(data["words"]) <= set(words)
    assert data["words"] != []
    assert data["table"]["labels"] == [[1, label]]


def test_a_long_word_is_cut(tmp_path):
    words = written(by_hand(1, words=["a" * 10_000]), tmp_path)[0]["words"]
    assert words == ["a" * LONGEST + "…"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_no_number_is_written_that_json_has_not(observed, tmp_path, bad):
    def spoiled(value):
        if isinstance(value, tuple):
            return type(value)(*map(spoiled, value))
        return (
            np.full_like(value, bad) if isinstance(value, np.ndarray) and value.dtype.kind == "f" else value
        )

    edges = observed.seen.edges
    seen = spoiled(observed.seen)._replace(edges=edges)
    written(observed._replace(seen=seen, weighed=spoiled(observed.weighed)), tmp_path)


def test_rows_without_tokens(tmp_path):
    data, features = written(by_hand(5, tokens=False), tmp_path)
    assert data["words"] == []
    assert data["table"]["peaks"] is None
    assert set(features[0]["strongest"]) == {"rows", "values"}
    assert "promoted" not in features[0]
    assert data["passages"][0]["words"] is None


def test_no_feature_ever_active(tmp_path):
    observed = by_hand(3, never=(0, 1, 2))
    data, features = written(observed, tmp_path)
    assert data["table"]["largest"] == [0, 0, 0]
    assert [feature["strongest"]["rows"] for feature in features] == [[], [], []]
    assert "No feature was ever active" in (tmp_path / "index.html").read_text()


def test_one_feature(tmp_path):
    data, features = written(by_hand(1), tmp_path)
    assert len(features) == 1
    assert data["table"]["places"] == [[0], [0]]


def test_a_folder_is_filled_anew(observed, tmp_path):
    write_dashboard(by_hand(2), tmp_path)
    data = written(observed, tmp_path)[0]
    assert len(data["table"]["fired"]) == 70


def test_sixteen_thousand_features_of_forty_contexts_of_twenty_five_tokens_take_ten_kilobytes_each(tmp_path):
    write_dashboard(by_hand(3 * TOGETHER, shown=20, before=12), tmp_path)
    assert (tmp_path / "data/0001.js").stat().st_size / TOGETHER < 10_000


class Page(HTMLParser):
    """Tags with their attributes, and the text between."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_has_no_script_of_its_own_and_refuses_what_is_not_in_its_folder(observed, tmp_path):
    hostile = observed._replace(
        left_out=(HOSTILE,), about={"SAE": HOSTILE, HOSTILE: {"nested": [HOSTILE, "\udc80"]}}
    )
    write_dashboard(hostile, tmp_path)
    page = Page((tmp_path / "index.html").read_text(encoding="utf-8"))
    scripts = [attributes["src"] for tag, attributes in page.tags if tag == "script"]
    assert scripts == ["dashboard.js", "data/words.js", "data/table.js"]
    assert [tag for tag, _ in page.tags if tag == "img"] == []
    policy = next(attributes["content"] for _, attributes in page.tags if "http-equiv" in attributes)
    assert policy == "default-src 'none'; script-src 'self' file:; style-src 'unsafe-inline'"
    assert sum(HOSTILE in text for text in page.text) == 5
