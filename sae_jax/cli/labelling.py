"""`sae-jax label SAE [FILE]`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sae_jax import formats, hub, labels
from sae_jax.base import InputError, require


@dataclass
class Label:
    """Which SAE, and what its features are called."""

    sae: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SAE")]
    """A folder in any known format, or a file that is alone in its own; to tell labels, also a Hugging Face
    repository."""
    file: Annotated[
        tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="FILE", help_behavior_hint="")
    ] = None
    """Labels to put beside it: .json as {"12": "animals"}, .jsonl, or .csv or .tsv with the columns feature
    and label. Left out, those that are there are told."""
    replace: bool = False
    """Let go of the labels that are there; otherwise those of FILE come on top."""
    as_json: Annotated[bool, tyro.conf.arg(name="json", help="print the labels as JSON")] = False


def run(options: Label) -> int:
    """Put a file's labels beside the SAE, or tell those that are there."""
    on_disk = Path(options.sae).exists()
    require(
        options.file is None or on_disk,
        f"{options.sae} is not on this disk: label an SAE that is, and `sae-jax push` takes its labels along",
    )
    path = hub.locate(options.sae).path
    found = formats.read(path)[1]
    named = found.labels if options.file is None else _put(options, path, found)
    if options.as_json:
        print(json.dumps({str(feature): label for feature, label in named.items()}, indent=2))
    elif options.file is None:
        lines = [f"{feature}\t{labels.shown(label)}" for feature, label in named.items()]
        print("\n".join(lines or ["no labels"]))
    return 0


def _put(options: Label, path: Path, found: formats.Loaded) -> dict[int, str]:
    """Write the labels of the file, with those that were there; all of them."""
    assert options.file is not None
    # the SAE that is there, or the only one below
    home = formats.home(next(iter(formats.several(path).values()), path))
    if home is None:
        raise InputError(
            f"{path} lies among other SAEs: `sae-jax convert` gives it a folder, where labels can be"
        )
    new = labels.read(options.file, found.sae.config["d_sae"])
    merged = dict(sorted({**({} if options.replace else found.labels), **new}.items()))
    labels.write(home / labels.NAME, merged)
    if not options.as_json:
        print(f"{home / labels.NAME}: {len(merged)} labels, {len(new)} of them from {options.file}")
    return merged
