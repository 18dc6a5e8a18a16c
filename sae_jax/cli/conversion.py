"""`sae-jax convert SRC DST --to FORMAT`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from sae_jax import hub
from sae_jax.convert import Conversion, convert
from sae_jax.data import read_array


@dataclass
class Convert:
    """Which SAE, and what it shall become."""

    src: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
    """A file or folder in any known format, a folder of several, or a Hugging Face repository."""
    dst: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
    """Where to write: a folder, or a file where the format is one file."""
    to: Annotated[str, tyro.conf.arg(metavar="FORMAT")]
    """saelens, dictionary_learning, sparsify, gemma_scope, ...: docs/formats.md lists them."""
    data: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Rows [n, d_in] to check on, beside random ones."""
    rows: int = 1024
    """How many of them at most."""
    no_check: bool = False
    """Leave out comparing encoder and decoder before and after."""
    lossy: bool = False
    """Go on where the format cannot hold all that the SAE computes, and say what was dropped."""
    overwrite: bool = False
    """Replace what is at DST."""
    as_json: Annotated[bool, tyro.conf.arg(name="json", help="print JSON")] = False


def run(options: Convert) -> int:
    """Convert, tell the largest difference of each, and leave nothing that disagrees."""
    x = None if options.data is None else read_array(options.data)[: options.rows]
    console = Console(stderr=options.as_json)
    done = convert(
        hub.locate(options.src).path, options.dst, options.to, check=not options.no_check, x=x,
        lossy=options.lossy, overwrite=options.overwrite, told=lambda one: _tell(console, one, options.to),
    )  # fmt: skip
    if options.as_json:
        print(json.dumps([_plain(one, options.to) for one in done], indent=2))
    return 0


def _tell(console: Console, one: Conversion, to: str) -> None:
    console.print(f"{one.source} ({one.format}) -> {one.target} ({to})", highlight=False, soft_wrap=True)
    if one.difference is None:
        console.print("  not checked")
    else:
        console.print(f"  {one.difference}", highlight=False, soft_wrap=True)
    if one.left_out:
        console.print(f"  left out: {'; '.join(one.left_out)}", highlight=False, soft_wrap=True)


def _plain(one: Conversion, to: str) -> dict:
    found = one.difference
    return {
        "source": str(one.source),
        "from": one.format,
        "target": str(one.target),
        "to": to,
        "left_out": one.left_out,
        "difference": None if found is None else {**found._asdict(), "ok": found.ok},
    }
