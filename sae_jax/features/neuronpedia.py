"""Features in Neuronpedia's export layout, which its import reads: a line of JSON per row, in batches.

    MODEL/SOURCE/model.jsonl, release.jsonl, sourceset.jsonl, source.jsonl     one line each
    MODEL/SOURCE/features/batch-0.jsonl.gz                                     a line per feature
    MODEL/SOURCE/activations/batch-0.jsonl.gz                                  a line per context
    MODEL/SOURCE/explanations/batch-0.jsonl.gz                                 a line per label

with SOURCE = LAYER-SET. A batch is of 1,024 features; one without lines is left out, because the import takes
its columns from the first line. Contexts are grouped as SAEDashboard does: the strongest, with -1 for what an
interval tells, then those by chance in five even intervals of activation, each with its share of all tokens.
Not known here and so empty: the histogram of logits, alignment with the model's own neurons, vectors.

Source: the repository hijohnnylin/neuronpedia. In `utils/neuronpedia-utils/neuronpedia_utils`,
`export-data.py` for layout and columns, `convert-saedashboard-to-neuronpedia-export.py` for their meaning; in
`apps/webapp`, `prisma/schema.prisma` for types, `lib/db/import.ts` for how they are read. SAEDashboard 0.8.0,
`sequence_data_generator.py` and `neuronpedia/neuronpedia_converter.py`, for the groups.
"""

import gzip
import hashlib
import re
import shutil
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from sae_jax.base import require
from sae_jax.features.contexts import Context, contexts
from sae_jax.features.exports import (
    counts,
    density,
    intervals,
    largest,
    neighbours,
    rounded,
    short,
    staged,
    strict,
    words,
)
from sae_jax.features.observed import Observed

BATCH = 1024
BINS = 50
CREATOR = "clkht01d40000jv08hvalcvly"
"""The user under which Neuronpedia's own scripts write where none is named."""
IDENTIFIER = r"[A-Za-z0-9][A-Za-z0-9._-]*"
NOT_KNOWN = (
    "logits_hist_data_bar_heights", "logits_hist_data_bar_values", "decoder_weights_dist", "vector",
    "neuron_alignment_indices", "neuron_alignment_l1", "neuron_alignment_values",
    "correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson",
)  # fmt: skip

Row = dict[str, Any]


class Source(NamedTuple):
    """Where rows belong."""

    model_id: str
    layer: int
    source_set: str
    creator: str
    creator_id: str
    dataset: str

    @property
    def id(self) -> str:
        """What Neuronpedia calls a source, and in its tables a layer."""
        return f"{self.layer}-{self.source_set}"

    def row(self, feature: int, **more: Any) -> Row:
        """A row of a feature."""
        return {"modelId": self.model_id, "layer": self.id, "index": str(feature), **more}

    def key(self, *parts: Any) -> str:
        """A key that is the same whenever the same is written, so that a second import adds nothing."""
        named = "/".join(map(str, (self.model_id, self.id, *parts)))
        return f"c{hashlib.sha256(named.encode()).hexdigest()[:24]}"


def write(
    observed: Observed,
    folder: str | Path,
    *,
    model_id: str,
    layer: int = 0,
    source_set: str = "sae_jax",
    creator: str = "sae_jax",
    creator_id: str = CREATOR,
    dataset: str = "",
) -> Path:
    """Write every feature, its contexts and its label for Neuronpedia, one after another.

    Args:
      observed: what is known of the features.
      folder: of exports; what was there of this source is replaced.
      model_id: Neuronpedia's name of the model, as "gpt2-small".
      layer: the number of the layer.
      source_set: the name of this SAE and its sisters, as "res-16k".
      creator: who made them, for people.
      creator_id: the key of the instance's user under which rows go.
      dataset: the name of the texts, for people.

    Returns:
      The folder of the source, FOLDER/MODEL/LAYER-SET.

    Raises:
      InputError: a name that is no identifier, a layer below 0, or activations that are not finite.

    Example:
      >>> write(observed, "exports/", model_id="gpt2-small", layer=3, source_set="res-16k")
    """
    for told, name in (("model_id", model_id), ("source_set", source_set)):
        good = re.fullmatch(IDENTIFIER, name) is not None
        require(good, f"{told} must be of letters, digits, dots, dashes and underscores, got {name!r:.50}")
    require(layer >= 0, f"layer must be at least 0, got {layer}")
    source = Source(model_id, layer, source_set, creator, creator_id, dataset)
    target = Path(folder) / model_id / source.id
    with staged(target) as stage:
        whole = stage / source.id
        whole.mkdir()
        for name, row in _about(observed, source).items():
            (whole / f"{name}.jsonl").write_bytes(_line(row))
        for number, first in enumerate(range(0, observed.d_sae, BATCH)):
            batch = range(first, min(first + BATCH, observed.d_sae))
            for table, rows in TABLES.items():
                lines = chain.from_iterable(rows(observed, feature, source) for feature in batch)
                _write_lines(whole / table / f"batch-{number}.jsonl.gz", lines)
        if target.exists():
            shutil.rmtree(target)
        whole.replace(target)
    return target


def identifier(name: str) -> str:
    """A name as Neuronpedia takes one: "google/gemma-2-2b" as "gemma-2-2b"."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name.rsplit("/", 1)[-1]).strip(".-_") or "model"


def _about(observed: Observed, source: Source) -> dict[str, Row]:
    """The four tables of one row."""
    owned = {"creatorId": source.creator_id, "visibility": "PUBLIC"}
    return {
        "model": {
            **owned, "id": source.model_id, "displayName": source.model_id,
            "displayNameShort": source.model_id, "instruct": False, "layers": 0, "neuronsPerLayer": 0,
            "owner": "",
        },
        "release": {
            **owned, "name": source.source_set, "description": source.source_set,
            "descriptionShort": source.source_set, "creatorName": source.creator, "urls": [],
        },
        "sourceset": {
            **owned, "modelId": source.model_id, "name": source.source_set, "description": source.source_set,
            "creatorName": source.creator, "releaseName": source.source_set, "urls": [],
        },
        "source": {
            **owned, "modelId": source.model_id, "id": source.id, "setName": source.source_set,
            "dataset": source.dataset, "num_prompts": observed.seen.contexts,
            "num_tokens_in_prompt": -(-observed.seen.rows // max(observed.seen.contexts, 1)),
        },
    }  # fmt: skip


def _feature(observed: Observed, feature: int, source: Source) -> Iterator[Row]:
    top = largest(observed.seen, feature)
    pos_str, pos_values = words(observed, observed.weighed.promoted, feature)
    neg_str, neg_values = words(observed, observed.weighed.suppressed, feature)
    indices, cosines = neighbours(observed.weighed.near, feature)
    heights = counts(observed.seen, feature, BINS) if top > 0 else []
    yield source.row(
        feature,
        creatorId=source.creator_id,
        sourceSetName=source.source_set,
        maxActApprox=short(top),
        frac_nonzero=density(observed.seen, feature),
        freq_hist_data_bar_heights=rounded(heights),
        freq_hist_data_bar_values=rounded([(bar + 0.5) * top / BINS for bar in range(len(heights))]),
        pos_str=pos_str,
        pos_values=pos_values,
        neg_str=neg_str,
        neg_values=neg_values,
        topkCosSimIndices=indices,
        topkCosSimValues=cosines,
        hasVector=False,
        **{name: [] for name in NOT_KNOWN},
    )


def _activations(observed: Observed, feature: int, source: Source) -> Iterator[Row]:
    """The strongest contexts, then of those by chance the ones that are not among them."""
    strongest = contexts(observed, observed.seen.strongest, feature)
    top = largest(observed.seen, feature)
    for context in strongest:
        yield _activation(context, feature, source, -1.0, short(top), -1.0)
    shown = {context.row for context in strongest}
    for part in intervals(observed, feature):
        for context in part.contexts:
            if context.row not in shown:
                yield _activation(context, feature, source, part.low, part.high, part.share)


def _activation(context: Context, feature: int, source: Source, low: float, high: float, share: float) -> Row:
    values = rounded(context.values)
    return source.row(
        feature,
        id=source.key("activation", feature, context.row),
        creatorId=source.creator_id,
        dataSource=source.dataset,
        tokens=list(context.tokens),
        values=values,
        maxValue=max(values),
        maxValueTokenIndex=values.index(max(values)),
        minValue=min(values),
        binMin=low,
        binMax=high,
        binContains=share,
        qualifyingTokenIndex=context.place,
        dfaValues=[],
        dfaMaxValue=None,
        dfaTargetIndex=None,
    )


def _explanation(observed: Observed, feature: int, source: Source) -> Iterator[Row]:
    if feature in observed.labels:
        yield source.row(
            feature,
            id=source.key("explanation", feature),
            authorId=source.creator_id,
            description=observed.labels[feature],
            typeName=None,
            explanationModelName=None,
        )


TABLES = {"features": _feature, "activations": _activations, "explanations": _explanation}
"""What the rows of a feature are, by table."""


def _write_lines(path: Path, rows: Iterable[Row]) -> None:
    """Write a batch, row by row; nothing where there is none."""
    first = next(rows := iter(rows), None)
    if first is None:
        return
    path.parent.mkdir(exist_ok=True)
    with (
        path.open("wb") as raw,
        gzip.GzipFile(filename="", mode="wb", fileobj=raw, compresslevel=5, mtime=0) as file,
    ):
        for row in chain([first], rows):
            file.write(_line(row))


def _line(row: Row) -> bytes:
    # the import strikes \u0000 from a file's text, and would break a line where a backslash stands before it
    return strict(row).replace(rb"\\", rb"\u005c").replace(rb"\u0000", b" ") + b"\n"
