"""Labels stay with their SAE, whatever becomes of it, and name none but features that exist."""

import csv
import json
from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from observed_by_hand import by_hand

import sae_jax
from sae_jax import InputError, TrainedSAE, formats, labels
from sae_jax.cli import labelling
from sae_jax.convert import convert
from sae_jax.features import contexts
from sae_jax.features.labelling import from_function
from sae_jax.inspection import inspect

D_SAE = 7
NAMES = {0: "animals", 3: 'a "quoted", label', 6: "\u202eلاب\u2028\U0001f408"}
TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30).filter(str.strip)
OF_FEATURES = st.dictionaries(st.integers(0, D_SAE - 1), TEXTS)


def trained(named=NAMES, sae=None) -> TrainedSAE:
    sae = sae_jax.relu(5, D_SAE) if sae is None else sae
    return TrainedSAE(sae, sae.init(jax.random.key(0))).labelled(named)


def jsonl(path, found):
    rows = [{"feature": feature, "label": label} for feature, label in found.items()]
    path.write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8", newline=""
    )


def table(path, found, delimiter):
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        rows = csv.writer(file, delimiter=delimiter)
        rows.writerows(
            [("note", "label", "feature"), *(("", label, feature) for feature, label in found.items())]
        )


WRITERS = {
    "json": labels.write, "jsonl": jsonl,
    "csv": partial(table, delimiter=","), "tsv": partial(table, delimiter="\t"),
}  # fmt: skip


# --- files ---


@pytest.mark.parametrize("kind", WRITERS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(found=OF_FEATURES)
@example(found=NAMES)
def test_what_is_written_is_read(kind, found, tmp_path):
    if kind in ("csv", "tsv"):  # its own line ends may come back as others
        found = {feature: label for feature, label in found.items() if not {"\r", "\n", "\0"} & set(label)}
    WRITERS[kind](tmp_path / f"named.{kind}", found)
    assert labels.read(tmp_path / f"named.{kind}", D_SAE) == found
    assert [path.name for path in tmp_path.glob(".*")] == []


BAD = {
    ".json": {
        '{"7": "a"}': "feature 7 does not exist, there are 0 to 6",
        '{"-1": "a"}': "feature -1 does not exist",
        '{"1.5": "a"}': "a feature must be a whole number, got '1.5'",
        '{"١": "a"}': "must be a whole number",
        '{"99999999999999999999": "a"}': "must be a whole number",
        '{"1": "a", "1": "b"}': "two labels of feature 1",
        '{"1": "a", "01": "b"}': "two labels of feature 1",
        '{"1": 2}': "the label of feature 1 must be text, got 2",
        '{"1": {"a": "b"}}': "must be text",
        '{"1": " "}': "must be text, got ' '",
        '{"1": "\\ud800"}': "must be text",
        '{"1": "' + "a" * 1001 + '"}': "has 1001 characters, more than 1000",
        '["a"]': 'it must be an object like {"12": "animals"}',
        "{": "cannot be read as .json",
        "[" * 100_000: "cannot be read as .json",
        '{"1": 1' + "0" * 5000 + "}": "cannot be read as .json",
    },
    ".jsonl": {
        '{"feature": 1}': 'line 1 must be like {"feature": 12, "label": "animals"}',
        '\n{"feature": true, "label": "a"}': "must be a whole number, got True",
        '{"feature": 1.0, "label": "a"}': "must be a whole number, got 1.0",
        '{"feature": 9, "label": "a"}': "feature 9 does not exist",
        "1": "line 1 must be like",
        "{": "cannot be read as .jsonl",
    },
    ".csv": {
        "": "its first line must name the columns feature and label",
        "feature,name\n1,a": "its first line must name",
        "feature,label\n1,a\n1,b": "two labels of feature 1",
        "feature,label\n1": "must be text, got None",
        "feature,label\nx,a": "must be a whole number, got 'x'",
        'feature,label\n1,"a': "cannot be read as .csv",
    },
    ".txt": {"1 a": "labels are read from .json, .jsonl, .csv, .tsv"},
}


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in BAD.items() for text in texts])
def test_bad_labels_are_one_sentence(kind, text, tmp_path, unchecked):
    path = tmp_path / f"named{kind}"
    path.write_text(text)
    with pytest.raises(InputError) as raised:
        labels.read(path, D_SAE)
    assert BAD[kind][text] in str(raised.value)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_is_no_text_or_not_there(tmp_path):
    (tmp_path / "named.json").write_bytes('{"1": "é"}'.encode("latin-1"))
    with pytest.raises(InputError, match=r"is not UTF-8: its byte 7"):
        labels.read(tmp_path / "named.json", D_SAE)
    with pytest.raises(InputError, match="does not exist"):
        labels.read(tmp_path / "none.json", D_SAE)


@pytest.mark.parametrize("kind", WRITERS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary(max_size=60) | st.text('{}[]":,0123456789feature labl\n\t', max_size=60).map(str.encode)
)
def test_a_file_of_any_content_is_read_or_refused(kind, data, tmp_path):
    path = tmp_path / f"any.{kind}"
    path.write_bytes(data)
    try:
        found = labels.read(path, D_SAE)
    except InputError:
        return
    assert all(0 <= feature < D_SAE and isinstance(label, str) for feature, label in found.items())


def test_cells_without_text_are_no_labels(tmp_path):
    (tmp_path / "all.csv").write_text("feature,label\n0,\n1,animals\n2,\n")
    assert labels.read(tmp_path / "all.csv", D_SAE) == {1: "animals"}


# --- with the SAE ---


def test_labels_come_back_with_the_sae(tmp_path):
    trained().save(tmp_path / "sae")
    assert json.loads((tmp_path / "sae/labels.json").read_text(encoding="utf-8"))["0"] == "animals"
    loaded = sae_jax.load(tmp_path / "sae")
    assert loaded.about.labels == NAMES
    loaded.save(tmp_path / "again")
    assert sae_jax.load(tmp_path / "again").about.labels == NAMES


def test_those_of_an_sae_that_was_there_go(tmp_path):
    trained().save(tmp_path / "sae")
    trained({}).save(tmp_path / "sae")
    assert sae_jax.load(tmp_path / "sae").about.labels == {}
    assert not (tmp_path / "sae/labels.json").exists()


@pytest.mark.parametrize("format", formats.FORMATS)
def test_a_format_keeps_labels_or_says_that_it_does_not(format, tmp_path, torch):
    holds = {
        "crosscoder": sae_jax.crosscoder(5, D_SAE, sources=2),
        "sparsify": sae_jax.topk(5, D_SAE, k=2),
    }
    left_out = trained(sae=holds.get(format)).save(tmp_path / "sae", format, lossy=True)
    (back,) = sae_jax.load_all(tmp_path).values()
    kept = "what its features are called" not in left_out
    assert back.about.labels == (NAMES if kept else {})
    assert kept == (format != "circuit_tracer")


def test_one_file_among_others_has_no_place_for_labels(tmp_path, torch):
    assert "what its features are called" in trained().save(tmp_path / "a.pt", "seed")
    trained().save(tmp_path / "b.pt", "seed")
    labels.write(tmp_path / "labels.json", NAMES)
    assert sae_jax.load(tmp_path / "a.pt").about.labels == {}
    (tmp_path / "b.pt").unlink()
    assert sae_jax.load(tmp_path / "a.pt").about.labels == NAMES


def test_labels_that_do_not_fit_are_told_when_it_is_loaded(tmp_path):
    trained().save(tmp_path / "sae")
    labels.write(tmp_path / "sae/labels.json", {70: "a"})
    with pytest.raises(InputError, match=r"labels.json: feature 70 does not exist, there are 0 to 6"):
        sae_jax.load(tmp_path / "sae")


def test_convert_keeps_them(tmp_path, torch):
    trained().save(tmp_path / "sae")
    (there,) = convert(tmp_path / "sae", tmp_path / "there", "dictionary_learning")
    assert sae_jax.load(tmp_path / "there/ae.pt").about.labels == NAMES
    assert "what its features are called" not in there.left_out
    (one,) = convert(tmp_path / "there", tmp_path / "one.pt", "seed")
    assert "what its features are called" in one.left_out


def test_inspect_counts_them(tmp_path):
    trained(dict.fromkeys(range(7), "[red]a")).save(tmp_path / "sae")
    told = inspect(tmp_path / "sae")["labels"]
    assert told == {"count": 7, "first": dict.fromkeys("01234", "[red]a")}


def test_the_card_tells_of_them():
    from sae_jax import card

    one = trained({2: "a|b <b>", **{each: f"label {each}" for each in (0, 1, 3, 4, 5, 6)}})
    text = card.of_sae("me/saes", "", *one, {}, one.about.labels, None, opens_in_saelens=True)
    assert "7 of 7 features have a label in `labels.json`." in text
    assert "| 2 | a\\|b \\<b\\> |" in text
    without = card.of_sae("me/saes", "", *trained({}), {}, {}, None, opens_in_saelens=True)
    assert "label" not in without


# --- a user's own function ---


def test_a_mapping_or_a_function_labels(unchecked):
    assert trained({np.int64(2): "b"}).about.labels == {2: "b"}
    named = trained().labelled(lambda feature: f"feature {feature}" if feature % 2 else None)
    assert named.about.labels == {1: "feature 1", 3: "feature 3", 5: "feature 5"}
    assert named.params is not None
    with pytest.raises(InputError, match="labels: feature 7 does not exist"):
        trained({7: "a"})
    with pytest.raises(InputError, match="labels: a feature must be a whole number, got True"):
        trained().labelled({True: "a"})


def test_a_function_is_given_contexts_with_the_strongest_token_marked():
    observed = by_hand(6, never=(4,))
    given, done = {}, []

    def name(feature, texts):
        given[feature] = texts
        return None if feature == 5 else f"on {texts[0].split('«')[1].split('»')[0]!r}"

    found = from_function(observed, name, look=lambda *told: done.append(told))
    assert set(given) == {0, 1, 2, 3, 5}
    assert set(found) == {0, 1, 2, 3}
    assert done == [(each, 5) for each in range(1, 6)]
    for feature, texts in given.items():
        tokens, row = observed.seen.strongest.tokens[feature], observed.seen.strongest.rows[feature]
        assert len(texts) == (row >= 0).sum()
        for text, window in zip(texts, tokens, strict=True):
            words = [observed.words[each] for each in window.tolist() if each >= 0]
            assert text.replace("«", "").replace("»", "") == "".join(words)
            assert f"«{observed.words[window[4]]}»" in text


def test_rows_without_tokens_go_by_their_numbers():
    observed = by_hand(3, tokens=False)
    first = contexts(observed, observed.seen.strongest, 0)[0]
    assert first.tokens[first.place] == f" row {first.row}"
    assert f"« row {first.row}»" in first.text


def test_a_function_that_fails_names_the_feature(unchecked):
    def fails(feature, texts):
        if feature == 2:
            raise ConnectionError("no\nmodel")
        return "a"

    with pytest.raises(InputError, match=r"failed at feature 2: ConnectionError: no model$"):
        from_function(by_hand(4), fails)
    with pytest.raises(InputError, match=r"the label of feature 0 must be text, got 1"):
        from_function(by_hand(4), lambda feature, texts: 1)
    with pytest.raises(InputError, match=r"feature 0 has 2000 characters"):
        from_function(by_hand(4), lambda feature, texts: "a" * 2000)


# --- the command line ---


def command(sae, file=None, **options):
    return labelling.run(labelling.Label(str(sae), file, **options))


def test_the_command_puts_labels_beside_the_sae(tmp_path, capsys):
    trained({0: "old", 1: "stays"}).save(tmp_path / "sae")
    (tmp_path / "new.csv").write_text("feature,label\n0,new\n5,more\n")
    assert command(tmp_path / "sae", tmp_path / "new.csv") == 0
    assert capsys.readouterr().out.endswith(f"labels.json: 3 labels, 2 of them from {tmp_path / 'new.csv'}\n")
    assert sae_jax.load(tmp_path / "sae").about.labels == {0: "new", 1: "stays", 5: "more"}
    command(tmp_path / "sae")
    assert capsys.readouterr().out == "0\tnew\n1\tstays\n5\tmore\n"
    command(tmp_path / "sae", tmp_path / "new.csv", replace=True, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"0": "new", "5": "more"}
    assert sae_jax.load(tmp_path / "sae").about.labels == {0: "new", 5: "more"}


def test_a_label_does_not_steer_the_terminal(tmp_path, capsys):
    trained({0: "\x1b[31mred\nnext\u202e"}).save(tmp_path / "sae")
    command(tmp_path / "sae")
    assert capsys.readouterr().out == "0\t\N{REPLACEMENT CHARACTER}[31mred next\N{REPLACEMENT CHARACTER}\n"


def test_the_command_finds_the_only_sae_below(tmp_path, capsys):
    trained({}).save(tmp_path / "run/trainer_0")
    command(tmp_path / "run")
    assert capsys.readouterr().out == "no labels\n"
    (tmp_path / "new.json").write_text('{"1": "a"}')
    command(tmp_path / "run", tmp_path / "new.json")
    assert (tmp_path / "run/trainer_0/labels.json").exists()


def test_bad_input_of_the_command_is_one_sentence_and_changes_nothing(tmp_path, torch):
    trained().save(tmp_path / "sae")
    (tmp_path / "new.json").write_text('{"1": "a", "70": "b"}')
    with pytest.raises(InputError, match=r"new.json: feature 70 does not exist, there are 0 to 6"):
        command(tmp_path / "sae", tmp_path / "new.json")
    assert sae_jax.load(tmp_path / "sae").about.labels == NAMES
    with pytest.raises(InputError, match="me/saes is not on this disk"):
        command("me/saes", tmp_path / "new.json")
    trained().save(tmp_path / "a.pt", "seed")
    trained().save(tmp_path / "b.pt", "seed")
    (tmp_path / "new.json").write_text('{"1": "a"}')
    with pytest.raises(InputError, match="lies among other SAEs"):
        command(tmp_path / "a.pt", tmp_path / "new.json")
