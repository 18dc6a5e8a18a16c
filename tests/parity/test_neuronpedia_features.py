"""SAEDashboard's own classes, from whose files Neuronpedia's are made, over the rows written here."""

import gzip
import json

import pytest
from observed_by_hand import by_hand

from sae_jax.features import neuronpedia

ONLY_NEURONPEDIA = {
    "modelId", "layer", "index", "creatorId", "sourceSetName", "maxActApprox", "hasVector",
    "topkCosSimIndices", "topkCosSimValues",
}  # fmt: skip
"""Columns that its import has beside SAEDashboard's."""
OF_ACTIVATION = {
    "bin_min": "binMin", "bin_max": "binMax", "bin_contains": "binContains", "tokens": "tokens",
    "values": "values", "qualifying_token_index": "qualifyingTokenIndex",
}  # fmt: skip
"""SAEDashboard's names, and what `convert-saedashboard-to-neuronpedia-export.py` calls them."""


@pytest.fixture(scope="module")
def dashboard():
    return pytest.importorskip(
        "sae_dashboard.neuronpedia.neuronpedia_dashboard",
        reason="not installed: pip install --no-deps sae-dashboard==0.8.0",
    )


def rows(path):
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


def test_its_classes_take_every_row_and_change_nothing(dashboard, tmp_path):
    observed = by_hand(9, never=(4,))
    folder = neuronpedia.write(observed, tmp_path, model_id="gpt2-small", layer=3, source_set="res-16k")
    activations = rows(folder / "activations/batch-0.jsonl.gz")
    features = [
        {
            "feature_index": int(row["index"]),
            **{name: value for name, value in row.items() if name not in ONLY_NEURONPEDIA},
            "activations": [
                {name: each[ours] for name, ours in OF_ACTIVATION.items()}
                for each in activations
                if each["index"] == row["index"]
            ],
        }
        for row in rows(folder / "features/batch-0.jsonl.gz")
    ]
    told = {"model_id": "gpt2-small", "layer": 3, "sae_set": "res-16k", "features": features}
    found = dashboard.NeuronpediaDashboardBatch(**told).to_dict()
    assert len(found["features"]) == 9
    for feature, row in zip(found["features"], features, strict=True):
        assert {name: feature[name] for name in row} == row
    shown = [len(each["activations"]) for each in found["features"]]
    assert shown[4] == 0
    assert min(shown[:4]) >= 1
