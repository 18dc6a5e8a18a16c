"""circuit-tracer's own model of a feature, and its own server of graphs, over what is written here."""

import gzip
import importlib.util
import json
import threading
import urllib.request
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from observed_by_hand import by_hand

from sae_jax.features import circuit_tracer


def from_file(path: Path):
    spec = importlib.util.spec_from_file_location(f"circuit_tracer_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def frontend():
    """Its modules, without its package, which needs TransformerLens."""
    found = importlib.util.find_spec("circuit_tracer")
    if found is None:
        pytest.skip("not installed: pip install --no-deps circuit-tracer==0.5.0")
    pytest.importorskip("pydantic")
    folder = Path(found.submodule_search_locations[0]) / "frontend"
    names = ("feature_models", "graph_models", "local_server")
    return SimpleNamespace(
        **{name: from_file(folder / f"{name}.py") for name in names}, assets=folder / "assets"
    )


@pytest.fixture(scope="module")
def observed():
    return by_hand(9, never=(4,))


def test_its_model_takes_every_feature_and_changes_nothing(frontend, observed, tmp_path):
    circuit_tracer.write(observed, tmp_path, layer=2, transcoder_id="sae")
    index = json.loads(gzip.decompress((tmp_path / "features/index.json.gz").read_bytes()))["2"]
    whole = (tmp_path / "features" / index["filename"]).read_bytes()
    for feature in range(9):
        begin, end = index["offsets"][feature : feature + 2]
        assert int.from_bytes(whole[begin : begin + 4], "little") == end - begin - 4
        told = json.loads(gzip.decompress(whole[begin + 4 : end]))
        found = frontend.feature_models.Model.model_validate(told, strict=True)
        assert found.model_dump() == told
        assert found.index == feature


def test_its_server_finds_the_feature_of_a_node(frontend, observed, tmp_path):
    circuit_tracer.write(observed, tmp_path, layer=2, packed=False)
    handler = partial(
        frontend.local_server.CircuitGraphHandler, frontend_dir=frontend.assets, data_dir=str(tmp_path)
    )
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for feature in range(9):
            # a graph's node has the number of its layer and feature, by which the page asks for a file
            node = frontend.graph_models.Node.feature_node(2, 0, feature)
            url = f"http://127.0.0.1:{server.server_port}/data/features/{node.feature}.json"
            with urllib.request.urlopen(url, timeout=10) as answer:
                found = frontend.feature_models.Model.model_validate_json(answer.read())
            assert found.index == feature
        server.shutdown()


def test_its_pages_read_what_is_written_here(frontend):
    """What was read from its sources still stands there."""
    examples = (frontend.assets / "feature_examples/init-feature-examples.js").read_text()
    for line in ("index.json.gz", "['offsets']", "['filename']", "`${scan}/${featureIndex}.json`"):
        assert line in examples
    util = (frontend.assets / "util.js").read_text()
    assert "bytes[0] | (bytes[1] << 8) | (bytes[2] << 16) | (bytes[3] << 24)" in util
