"""Features in the forms of other tools: read back as those tools read them, and nothing else in the files."""

import gzip
import json
import re
import tracemalloc
from math import isqrt

import jax
import numpy as np
import pytest
from observed_by_hand import by_hand

import sae_jax
from sae_jax import InputError, features
from sae_jax.features import NONE, Near, circuit_tracer, contexts, neuronpedia
from sae_jax.features.exports import DIGITS, counts, intervals, largest, percentiles, rounded, short

HOSTILE = [
    '</script><img src=x onerror="1">', '"', "'", "\\", "\\u0000", "\\x41", "\0", "\x1b[31m", "\n", "\r\n",
    "\t", "\u2028", "\u202eعربى", "👩‍👩‍👧", "\ud800", "�", " ", "a" * 10_000, "NaN", "{{ 7 }}",
]  # fmt: skip
"""Tokens that would break a page, a line or a reader."""


def strictly(text: bytes | str):
    """JSON without NaN and infinity, each name once."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    def once(pairs):
        assert len(dict(pairs)) == len(pairs)
        return dict(pairs)

    text = text.decode("utf-8") if isinstance(text, bytes) else text
    return json.loads(text, parse_constant=refuse, object_pairs_hook=once)


@pytest.fixture(scope="module")
def observed():
    """Of 12 features the sixth is never active; two have labels."""
    draws = np.random.default_rng(0)
    sae = sae_jax.relu(6, 12)
    params = sae.init(jax.random.key(0))
    bias = params["b_enc"].at[5].set(-100.0)
    trained = sae_jax.TrainedSAE(sae, {**params, "b_enc": bias}).labelled({2: "animals", 7: "two\nlines"})
    rows = draws.normal(size=(700, 6)).astype(np.float32)
    tokens = draws.integers(0, 30, 700).astype(np.int32)
    return features.observe(
        trained,
        features.of_rows(features.in_memory(rows), features.in_memory(tokens), context=7),
        words=[f" word{each}" for each in range(30)],
        unembedding=draws.normal(size=(6, 30)).astype(np.float32),
        options=features.Options(strongest=8, by_chance=12, before=3, after=3),
    )


# --- what both tell ---


def test_even_bins_hold_the_tokens_of_the_bins_of_the_pass(observed):
    seen = observed.seen
    for feature in range(observed.d_sae):
        for bins in (1, 5, 50):
            found = counts(seen, feature, bins)
            assert found.min() >= 0
            assert found.sum() == pytest.approx(seen.fired[feature])
    # even bins of the width of the lowest, over the pass's own: nothing moves
    edges = np.array([0.0, 1.0, 2.0, 3.0])
    histogram = np.array([[5, 0, 2, 1]])
    one = by_hand(1)
    strongest = one.seen.strongest._replace(values=np.full_like(one.seen.strongest.values, 4.0))
    even = one.seen._replace(edges=edges, histogram=histogram, fired=np.array([8]), strongest=strongest)
    assert counts(even, 0, 4).tolist() == [5, 0, 2, 1]
    assert percentiles(even, 0)[[49, 99]].tolist() == [0.8, 4.0]


def test_percentiles_rise_to_the_largest(observed):
    for feature in np.flatnonzero(observed.seen.fired).tolist():
        found = percentiles(observed.seen, feature)
        assert len(found) == 100
        assert (np.diff(found) >= 0).all()
        assert found[-1] == largest(observed.seen, feature) == observed.seen.strongest.peaks[feature].max()


def test_every_context_by_chance_is_in_its_interval(observed):
    for feature in range(observed.d_sae):
        found = intervals(observed, feature)
        inside = [(part, each) for part in found for each in part.contexts]
        assert len(inside) == (observed.seen.by_chance.rows[feature] != NONE).sum()
        assert all(part.low * 0.99999 < each.peak <= part.high * 1.00001 for part, each in inside)
        if found:
            assert sum(part.share for part in found) == pytest.approx(1, rel=1e-5)
    assert intervals(observed, 5) == []


def test_numbers_are_short_and_near():
    draws = np.random.default_rng(0).lognormal(0, 20, 1000).astype(np.float32)
    values = np.concatenate([draws, -draws, [0, 1e-45, 3e38]])
    found = np.array(rounded(values))
    np.testing.assert_allclose(found, values.astype(np.float64), rtol=5.1e-6)
    assert (
        max(
            len(json.dumps(each).lstrip("-").split("e")[0].replace(".", "").strip("0"))
            for each in found[:1000]
        )
        <= DIGITS
    )
    assert json.dumps(short(float(np.float32(0.1)))) == "0.1"


# --- circuit-tracer ---

OF_FEATURE = {
    "transcoder_id": str, "index": int, "examples_quantiles": list, "top_logits": list, "bottom_logits": list,
    "act_min": float, "act_max": float, "quantile_values": list, "histogram": list,
    "activation_frequency": float,
}  # fmt: skip
OF_EXAMPLE = {"tokens_acts_list": list, "train_token_ind": int, "is_repeated_datapoint": bool, "tokens": list}
"""`frontend/feature_models.py` of circuit-tracer 0.5.0."""


def unpaired(number):
    """`util.cantorUnpair` of its pages."""
    w = (isqrt(8 * number + 1) - 1) // 2
    y = number - w * (w + 1) // 2
    return w - y, y


def of_hub(folder, layer, feature):
    """A feature as `loadFeatureFromBinary` reads it: the byte after the last is asked for, too."""
    index = strictly(gzip.decompress((folder / "features/index.json.gz").read_bytes()))[str(layer)]
    whole = (folder / "features" / index["filename"]).read_bytes()
    part = whole[index["offsets"][feature] : index["offsets"][feature + 1] + 1]
    length = part[0] | part[1] << 8 | part[2] << 16 | part[3] << 24
    return strictly(gzip.decompress(part[4 : 4 + length]))


def of_disk(folder, layer, feature):
    """A feature as `loadFeature` reads it from a scan that begins with "./"."""
    files = {unpaired(int(path.stem)): path for path in (folder / "features").glob("*.json")}
    return strictly(files[layer, feature].read_bytes())


READERS = {True: of_hub, False: of_disk}


@pytest.mark.parametrize("packed", READERS)
def test_circuit_tracer_reads_every_feature(packed, observed, tmp_path):
    assert (
        circuit_tracer.write(observed, tmp_path, layer=3, transcoder_id="sae", packed=packed)
        == tmp_path / "features"
    )
    for feature in range(observed.d_sae):
        found = READERS[packed](tmp_path, 3, feature)
        assert {name: type(value) for name, value in found.items()} == OF_FEATURE
        assert (found["index"], found["transcoder_id"], found["act_min"]) == (feature, "sae", 0)
        for group in found["examples_quantiles"]:
            assert set(group) == {"quantile_name", "examples"}
            assert group["examples"]
            for each in group["examples"]:
                assert {name: type(value) for name, value in each.items()} == OF_EXAMPLE
                assert len(each["tokens"]) == len(each["tokens_acts_list"]) > each["train_token_ind"]
                assert max(each["tokens_acts_list"]) <= found["act_max"]
        assert len(found["quantile_values"]) == 100
        assert all(type(each) is str for name in ("top_logits", "bottom_logits") for each in found[name])
    assert sorted(path.suffix for path in (tmp_path / "features").iterdir()) == (
        [".bin", ".gz"] if packed else [".json"] * observed.d_sae
    )
    assert [path.name for path in tmp_path.iterdir()] == ["features"]


def test_circuit_tracer_is_told_what_is_known(observed, tmp_path):
    circuit_tracer.write(observed, tmp_path)
    seen = observed.seen
    found = of_hub(tmp_path, 0, 2)
    top, *parts = found["examples_quantiles"]
    assert top["quantile_name"] == "Top"
    for told, each in zip(top["examples"], contexts(observed, seen.strongest, 2), strict=True):
        assert told["tokens"] == list(each.tokens)
        np.testing.assert_allclose(told["tokens_acts_list"], each.values, rtol=1e-5)
        assert told["tokens_acts_list"][told["train_token_ind"]] == max(told["tokens_acts_list"])
        assert not told["is_repeated_datapoint"]
    assert [part["quantile_name"] for part in parts] == [
        f"Interval {each.low:.3g} to {each.high:.3g}" for each in intervals(observed, 2) if each.contexts
    ]
    rows = set(seen.strongest.rows[2].tolist())
    repeated = [each["is_repeated_datapoint"] for part in parts for each in part["examples"]]
    assert sum(repeated) == sum(row in rows for row in seen.by_chance.rows[2].tolist())
    assert found["activation_frequency"] == pytest.approx(seen.fired[2] / seen.rows, rel=1e-5)
    assert sum(found["histogram"]) == pytest.approx(seen.fired[2], rel=1e-4)
    assert found["top_logits"] == [
        observed.words[each] for each in observed.weighed.promoted.places[2].tolist()
    ]
    dead = of_hub(tmp_path, 0, 5)
    assert (dead["examples_quantiles"], dead["act_max"], sum(dead["histogram"])) == ([], 0, 0)


def test_layers_come_together(observed, tmp_path):
    circuit_tracer.write(observed, tmp_path, layer=0, transcoder_id="first")
    circuit_tracer.write(observed, tmp_path, layer=1, transcoder_id="other")
    circuit_tracer.write(observed, tmp_path, layer=1, transcoder_id="second")
    assert of_hub(tmp_path, 0, 11)["transcoder_id"] == "first"
    assert of_hub(tmp_path, 1, 0)["transcoder_id"] == "second"


def test_bad_input_of_circuit_tracer_leaves_what_was_there(observed, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="layer must be at least 0, got -1"):
        circuit_tracer.write(observed, tmp_path / "new", layer=-1)
    assert not (tmp_path / "new").exists()
    circuit_tracer.write(observed, tmp_path / "there")
    before = {path.name: path.read_bytes() for path in (tmp_path / "there/features").iterdir()}
    seen = observed.seen
    values = observed.seen.strongest.values.copy()
    values[11, 0, seen.strongest.before] = np.inf
    endless = observed._replace(
        seen=observed.seen._replace(strongest=observed.seen.strongest._replace(values=values))
    )
    with np.errstate(all="ignore"), pytest.raises(InputError, match="not finite"):
        circuit_tracer.write(endless, tmp_path / "there")
    assert {path.name: path.read_bytes() for path in (tmp_path / "there/features").iterdir()} == before
    for damaged in (b"", b"no gzip", gzip.compress(b"{"), gzip.compress(b"[]"), gzip.compress(b"{}")[:-4]):
        (tmp_path / "there/features/index.json.gz").write_bytes(damaged)
        with pytest.raises(InputError, match=r"index.json.gz"):
            circuit_tracer.write(observed, tmp_path / "there")
    assert list(tmp_path.glob("*/.*")) == []


# --- Neuronpedia ---

TEXT, INTEGER, DOUBLE, BOOLEAN = "text", "integer", "double precision", "boolean"
MODEL = {
    "id": TEXT, "displayNameShort": TEXT, "displayName": TEXT, "creatorId": TEXT, "visibility": TEXT,
    "instruct": BOOLEAN, "layers": INTEGER, "neuronsPerLayer": INTEGER, "owner": TEXT,
}  # fmt: skip
RELEASE = {
    "name": TEXT, "visibility": TEXT, "description": TEXT, "descriptionShort": TEXT, "urls": [TEXT],
    "creatorName": TEXT, "creatorId": TEXT,
}  # fmt: skip
SOURCE_SET = {
    "modelId": TEXT, "name": TEXT, "visibility": TEXT, "description": TEXT, "creatorName": TEXT,
    "urls": [TEXT], "creatorId": TEXT, "releaseName": TEXT,
}  # fmt: skip
SOURCE = {
    "id": TEXT, "modelId": TEXT, "visibility": TEXT, "setName": TEXT, "creatorId": TEXT,
    "num_prompts": INTEGER, "num_tokens_in_prompt": INTEGER, "dataset": TEXT,
}  # fmt: skip
NEURON = {
    "modelId": TEXT, "layer": TEXT, "index": TEXT, "sourceSetName": TEXT, "creatorId": TEXT,
    "maxActApprox": DOUBLE, "hasVector": BOOLEAN, "vector": [DOUBLE], "topkCosSimIndices": [INTEGER],
    "topkCosSimValues": [DOUBLE], "neuron_alignment_indices": [INTEGER], "neuron_alignment_values": [DOUBLE],
    "neuron_alignment_l1": [DOUBLE], "correlated_neurons_indices": [INTEGER],
    "correlated_neurons_pearson": [DOUBLE], "correlated_neurons_l1": [DOUBLE], "neg_str": [TEXT],
    "neg_values": [DOUBLE], "pos_str": [TEXT], "pos_values": [DOUBLE], "frac_nonzero": DOUBLE,
    "freq_hist_data_bar_heights": [DOUBLE], "freq_hist_data_bar_values": [DOUBLE],
    "logits_hist_data_bar_heights": [DOUBLE], "logits_hist_data_bar_values": [DOUBLE],
    "decoder_weights_dist": [DOUBLE],
}  # fmt: skip
ACTIVATION = {
    "id": TEXT, "tokens": [TEXT], "index": TEXT, "layer": TEXT, "modelId": TEXT, "dataSource": TEXT,
    "maxValue": DOUBLE, "maxValueTokenIndex": INTEGER, "minValue": DOUBLE, "values": [DOUBLE],
    "dfaValues": [DOUBLE], "dfaTargetIndex": INTEGER, "dfaMaxValue": DOUBLE, "creatorId": TEXT,
    "binMin": DOUBLE, "binMax": DOUBLE, "binContains": DOUBLE, "qualifyingTokenIndex": INTEGER,
}  # fmt: skip
EXPLANATION = {
    "id": TEXT, "modelId": TEXT, "layer": TEXT, "index": TEXT, "description": TEXT, "authorId": TEXT,
    "typeName": TEXT, "explanationModelName": TEXT,
}  # fmt: skip
NULL = {"dfaTargetIndex", "dfaMaxValue", "typeName", "explanationModelName"}
"""Columns of `prisma/schema.prisma` by table with what Postgres holds in them, and those that may be null."""
PYTHON = {TEXT: (str,), INTEGER: (int,), DOUBLE: (int, float), BOOLEAN: (bool,)}


def fits(value, column):
    if isinstance(column, list):
        return isinstance(value, list) and all(fits(each, column[0]) for each in value)
    return type(value) in PYTHON[column] and not (column == TEXT and "\0" in value)


def imported(path, table):
    """The rows of a file as `importJsonlString` of `lib/db/import.ts` reads them into a table."""
    text = (
        gzip.decompress(path.read_bytes()).decode("utf-8")
        if path.suffix == ".gz"
        else path.read_text("utf-8")
    )
    lines = text.replace("\\u0000", " ").strip().split("\n")
    columns = strictly(lines[0]).keys()
    rows = strictly(f"[{','.join(lines)}]")
    assert set(columns) <= set(table)
    for row in rows:
        assert row.keys() == columns
        wrong = {
            name
            for name, value in row.items()
            if not fits(value, table[name]) and (name not in NULL or value is not None)
        }
        assert not wrong
    return rows


def batches(folder, name, table):
    files = sorted(
        (folder / name).iterdir(), key=lambda path: int(re.fullmatch(r"batch-(\d+)\.jsonl\.gz", path.name)[1])
    )
    return [row for path in files for row in imported(path, table)]


def test_neuronpedia_imports_every_table(observed, tmp_path):
    folder = neuronpedia.write(
        observed,
        tmp_path,
        model_id="gpt2-small",
        layer=3,
        source_set="res-16k",
        creator="me",
        dataset="texts",
    )
    assert folder == tmp_path / "gpt2-small/3-res-16k"
    (model,), (release,), (source_set,), (source,) = (
        imported(folder / f"{name}.jsonl", table)
        for name, table in {
            "model": MODEL,
            "release": RELEASE,
            "sourceset": SOURCE_SET,
            "source": SOURCE,
        }.items()
    )
    assert source["id"] == "3-res-16k"
    assert source["modelId"] == model["id"] == source_set["modelId"] == "gpt2-small"
    assert source["setName"] == source_set["name"] == "res-16k"
    assert source_set["releaseName"] == release["name"]
    assert source["num_prompts"] == observed.seen.contexts
    neurons, activations, explanations = (
        batches(folder, name, table)
        for name, table in {
            "features": NEURON,
            "activations": ACTIVATION,
            "explanations": EXPLANATION,
        }.items()
    )
    assert [row["index"] for row in neurons] == [str(feature) for feature in range(12)]
    keys = {(row["modelId"], row["layer"], row["index"]) for row in neurons}
    for row in (*activations, *explanations):
        assert (row["modelId"], row["layer"], row["index"]) in keys
    ids = [row["id"] for row in (*activations, *explanations)]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"c[0-9a-f]{24}", each) for each in ids)
    assert {row["index"]: row["description"] for row in explanations} == {"2": "animals", "7": "two\nlines"}
    assert [path.name for path in (tmp_path / "gpt2-small").iterdir()] == ["3-res-16k"]


def test_neuronpedia_is_told_what_is_known(observed, tmp_path):
    folder = neuronpedia.write(observed, tmp_path, model_id="gpt2-small")
    seen, weighed = observed.seen, observed.weighed
    neuron = batches(folder, "features", NEURON)[2]
    assert neuron["frac_nonzero"] == pytest.approx(seen.fired[2] / seen.rows, rel=1e-5)
    assert neuron["maxActApprox"] == pytest.approx(largest(seen, 2), rel=1e-5)
    # as many heights as values: the page maps over one and looks into the other
    assert len(neuron["freq_hist_data_bar_heights"]) == len(neuron["freq_hist_data_bar_values"]) == 50
    assert neuron["topkCosSimIndices"] == weighed.near.places[2].tolist()
    assert neuron["neg_str"] == [observed.words[each] for each in weighed.suppressed.places[2].tolist()]
    assert all(value <= 0 for value in neuron["neg_values"])
    rows = [row for row in batches(folder, "activations", ACTIVATION) if row["index"] == "2"]
    strongest = contexts(observed, seen.strongest, 2)
    for row, each in zip(rows, strongest, strict=False):
        assert (row["binMin"], row["binContains"]) == (-1, -1)
        assert row["tokens"] == list(each.tokens)
        assert row["maxValue"] == row["values"][row["maxValueTokenIndex"]] == max(row["values"])
        assert row["maxValue"] == pytest.approx(each.peak, rel=1e-5)
        assert row["qualifyingTokenIndex"] == each.place
    by_chance = set(seen.by_chance.rows[2].tolist()) - set(seen.strongest.rows[2].tolist())
    assert len(rows) == len(strongest) + len(by_chance)
    for row in rows[len(strongest) :]:
        assert row["binMin"] * 0.99999 < row["maxValue"] <= row["binMax"] * 1.00001
        assert 0 <= row["binContains"] <= 1
    dead = batches(folder, "features", NEURON)[5]
    assert (dead["frac_nonzero"], dead["maxActApprox"], dead["freq_hist_data_bar_heights"]) == (0, 0, [])


def test_batches_without_rows_are_left_out(observed, tmp_path, monkeypatch):
    monkeypatch.setattr(neuronpedia, "BATCH", 5)
    some = by_hand(12, never=(5, 6, 7, 8, 9), labels={11: "last"})
    folder = neuronpedia.write(some, tmp_path, model_id="m")
    names = {name: sorted(path.name for path in (folder / name).iterdir()) for name in neuronpedia.TABLES}
    assert names == {
        "features": ["batch-0.jsonl.gz", "batch-1.jsonl.gz", "batch-2.jsonl.gz"],
        "activations": ["batch-0.jsonl.gz", "batch-2.jsonl.gz"],
        "explanations": ["batch-2.jsonl.gz"],
    }
    assert len(batches(folder, "features", NEURON)) == 12


def test_writing_twice_is_writing_once(observed, tmp_path):
    folder = neuronpedia.write(observed, tmp_path, model_id="m")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (folder / "stray").touch()
    neuronpedia.write(observed, tmp_path, model_id="m")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["", "a/b", "..", "a b", ".hidden", "x" * 3 + "\n"])
def test_bad_input_of_neuronpedia_is_one_sentence(name, observed, tmp_path):
    with pytest.raises(InputError, match="model_id must be of letters"):
        neuronpedia.write(observed, tmp_path, model_id=name)
    with pytest.raises(InputError, match="source_set must be of letters"):
        neuronpedia.write(observed, tmp_path, model_id="m", source_set=name)
    with pytest.raises(InputError, match="layer must be at least 0"):
        neuronpedia.write(observed, tmp_path, model_id="m", layer=-1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "identifier"),
    [
        ("google/gemma-2-2b", "gemma-2-2b"),
        ("a b/c d", "c-d"),
        ("../..", "model"),
        ("", "model"),
        ("é", "model"),
    ],
)
def test_any_name_gives_an_identifier(name, identifier, observed, tmp_path):
    assert neuronpedia.identifier(name) == identifier
    neuronpedia.write(observed, tmp_path, model_id=neuronpedia.identifier(name))


# --- what tokens may be ---


@pytest.fixture(scope="module")
def hostile():
    return by_hand(20, words=HOSTILE * 40, labels={0: HOSTILE[0], 1: HOSTILE[4]})


def test_tokens_of_any_content_come_back(hostile, tmp_path):
    written = {word: word.encode("utf-8", "replace").decode() for word in HOSTILE}
    circuit_tracer.write(hostile, tmp_path)
    shown = [each for feature in range(20) for each in contexts(hostile, hostile.seen.strongest, feature)]
    told = [
        each["tokens"]
        for feature in range(20)
        for each in of_hub(tmp_path, 0, feature)["examples_quantiles"][0]["examples"]
    ]
    assert told == [[written[word] for word in each.tokens] for each in shown]
    assert {word for each in shown for word in each.tokens} == set(HOSTILE)
    folder = neuronpedia.write(hostile, tmp_path, model_id="m")
    rows = [row for row in batches(folder, "activations", ACTIVATION) if row["binMin"] == -1]
    assert [row["tokens"] for row in rows] == [
        [written[word].replace("\0", " ") for word in each.tokens] for each in shown
    ]
    assert [row["description"] for row in batches(folder, "explanations", EXPLANATION)] == [
        HOSTILE[0],
        HOSTILE[4],
    ]


def test_what_is_not_known_is_left_empty(tmp_path):
    near = Near(np.full((4, 2), NONE), np.full((4, 2), np.nan))
    bare = by_hand(4, tokens=False, never=range(4))
    bare = bare._replace(weighed=bare.weighed._replace(near=near))
    circuit_tracer.write(bare, tmp_path)
    assert of_hub(tmp_path, 0, 3)["top_logits"] == []
    folder = neuronpedia.write(bare, tmp_path, model_id="m")
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["features"]
    assert all(
        row["topkCosSimIndices"] == row["pos_str"] == [] for row in batches(folder, "features", NEURON)
    )


def test_memory_is_that_of_a_feature(tmp_path, unchecked):
    observed = by_hand(100, words=[f"{each:2000}" for each in range(100)])
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        circuit_tracer.write(observed, tmp_path)
        neuronpedia.write(observed, tmp_path, model_id="m")
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert peak < 2**21
    assert sum(len(gzip.decompress(path.read_bytes())) for path in tmp_path.rglob("activations/*")) > 2**23
