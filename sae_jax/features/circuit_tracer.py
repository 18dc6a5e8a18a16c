"""Features in the form that circuit-tracer's pages read, beside the transcoders that `formats` writes for it.

A feature is one JSON: `index`, `examples_quantiles` (groups of contexts, each a list of `tokens`, their
`tokens_acts_list`, and `train_token_ind`, the token that is meant), `top_logits`, `bottom_logits`, `act_min`,
`act_max`, `quantile_values` (100 of them), `histogram` (even bins from `act_min` to `act_max`),
`activation_frequency`. It has no place for labels: there they are `clerp`, of a graph's nodes.

Packed, as on the hub, `features/layer_0.bin` has one after another, each as four bytes that give a length,
the lowest first, and as many of gzip; `features/index.json.gz` tells, by layer, that file's name and where
each feature begins, and the last ends. Not packed, as pages ask a disk for them, feature f of layer l is
`features/N.json` with N = (l + f)(l + f + 1) / 2 + f, Cantor's pairing.

Source: circuit-tracer 0.5.0, `frontend/feature_models.py` for the fields, and of `frontend/assets`
`feature_examples/init-feature-examples.js`, `util.js` and `attribution_graph/render-act-histogram.js` for the
files, the pairing, and how bins and quantiles are read.
"""

import gzip
import json
from pathlib import Path
from typing import Any

from sae_jax.base import InputError, require
from sae_jax.features.contexts import Context, contexts
from sae_jax.features.exports import (
    counts,
    density,
    intervals,
    largest,
    percentiles,
    rounded,
    short,
    staged,
    strict,
    words,
)
from sae_jax.features.observed import Observed

FOLDER, INDEX = "features", "index.json.gz"
BINS = 50
LEVEL = 6
"""Of compression; gzip's highest takes twice the time and saves a fortieth."""


def write(
    observed: Observed, folder: str | Path, *, layer: int = 0, transcoder_id: str = "", packed: bool = True
) -> Path:
    """Write every feature for circuit-tracer, one after another.

    Args:
      observed: what is known of the features.
      folder: the folder of a transcoder set, or any; other layers that are there stay.
      layer: the number of the layer.
      transcoder_id: of the features, for people.
      packed: one file per layer, for a repository on the hub; or one file per feature, which a graph on this
        disk finds with the scan `./data/features` when the folder is the one that circuit-tracer serves.

    Returns:
      The folder `features` in it.

    Raises:
      InputError: a layer below 0, an index there that is damaged, or activations that are not finite.

    Example:
      >>> write(observed, "transcoders/", layer=3)
    """
    require(layer >= 0, f"layer must be at least 0, got {layer}")
    features = Path(folder) / FOLDER
    layers = _layers(features / INDEX) if packed else {}
    with staged(features) as stage:
        if packed:
            name = f"layer_{layer}.bin"
            layers[str(layer)] = {"filename": name, "offsets": _pack(observed, stage / name, transcoder_id)}
            (stage / INDEX).write_bytes(gzip.compress(strict(layers), mtime=0))
        else:
            for feature in range(observed.d_sae):
                document = of_feature(observed, feature, transcoder_id)
                (stage / f"{paired(layer, feature)}.json").write_bytes(strict(document))
        features.mkdir(parents=True, exist_ok=True)
        for file in sorted(stage.iterdir(), reverse=True):  # the index last
            file.replace(features / file.name)
    return features


def of_feature(observed: Observed, feature: int, transcoder_id: str = "") -> dict[str, Any]:
    """What circuit-tracer's pages read of one feature."""
    seen = observed.seen
    strongest = contexts(observed, seen.strongest, feature)
    shown = {each.row for each in strongest}
    groups = [("Top", strongest)] + [
        (f"Interval {each.low:.3g} to {each.high:.3g}", each.contexts)
        for each in intervals(observed, feature)
        if each.contexts
    ]
    return {
        "transcoder_id": transcoder_id,
        "index": feature,
        "examples_quantiles": [
            {
                "quantile_name": name,
                "examples": [_example(each, bool(number) and each.row in shown) for each in group],
            }
            for number, (name, group) in enumerate(groups)
            if group
        ],
        "top_logits": words(observed, observed.weighed.promoted, feature)[0],
        "bottom_logits": words(observed, observed.weighed.suppressed, feature)[0],
        "act_min": 0.0,
        "act_max": short(largest(seen, feature)),
        "quantile_values": rounded(percentiles(seen, feature)),
        "histogram": rounded(counts(seen, feature, BINS)),
        "activation_frequency": density(seen, feature),
    }


def paired(layer: int, feature: int) -> int:
    """The one number of a layer and a feature."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature


def _example(context: Context, repeated: bool) -> dict[str, Any]:
    return {
        "tokens_acts_list": rounded(context.values),
        "train_token_ind": context.place,
        "is_repeated_datapoint": repeated,
        "tokens": list(context.tokens),
    }


def _pack(observed: Observed, path: Path, transcoder_id: str) -> list[int]:
    """Write a layer's features; where each begins, and the last ends."""
    offsets = [0]
    with path.open("wb") as file:
        for feature in range(observed.d_sae):
            document = of_feature(observed, feature, transcoder_id)
            packed = gzip.compress(strict(document), LEVEL, mtime=0)
            file.write(len(packed).to_bytes(4, "little") + packed)
            offsets.append(file.tell())
    return offsets


def _layers(index: Path) -> dict[str, Any]:
    """The layers that are there."""
    if not index.exists():
        return {}
    try:
        found = json.loads(gzip.decompress(index.read_bytes()))
    except (ValueError, EOFError, gzip.BadGzipFile) as error:
        raise InputError(f"{index} is damaged: {error}") from None
    require(isinstance(found, dict), f"{index} must hold a JSON object by layer")
    return found
