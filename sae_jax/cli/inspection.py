"""`sae-jax inspect PATH`."""

import json
from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sae_jax import formats, hub
from sae_jax.inspection import inspect
from sae_jax.labels import shown


@dataclass
class Inspect:
    """Which file to look into."""

    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PATH")]
    """A file or folder in any known format, a folder of several SAEs, or a Hugging Face repository."""
    as_json: Annotated[bool, tyro.conf.arg(name="json", help="print JSON")] = False


def run(options: Inspect) -> int:
    """Tell what is in a file of weights; of a folder of several, what is in each."""
    path = hub.locate(options.path).path
    found = [inspect(one) for one in formats.several(path).values() or [path]]
    if options.as_json:
        print(json.dumps(found[0] if len(found) == 1 else found, indent=2, default=str))
        return 0
    console = Console()
    for one in found:
        _tell(console, one)
    return 0


def _tell(console: Console, found: dict[str, Any]) -> None:
    of = "" if found["kind"] == found["architecture"] else f" of {found['kind']}"
    console.print(
        f"{found['path']}: {found['format']}, {found['architecture']}{of}, "
        f"{found['parameters']:,} parameters",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    numbers = ("mean", "std", "min", "max", "zero", "nan", "infinite")
    table = Table("tensor", "shape", "dtype", *numbers, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name, tensor in found["tensors"].items():
        shape = " x ".join(map(str, tensor["shape"])) or "scalar"
        table.add_row(name, shape, tensor["dtype"], *(_short(tensor[number]) for number in numbers))
    console.print(table)
    quartiles = ("min", "lower", "median", "upper", "max")
    table = Table("of each latent", *quartiles, "", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for leaf, norms in found["norms"].items():
        side = "encoder norm" if leaf == "W_enc" else "decoder norm"
        table.add_row(
            side, *(_short(norms[name]) for name in quartiles), f"{norms['zero']} dead rows (norm 0)"
        )
    for name, label in (("encoder_decoder_cosine", "encoder . decoder"), ("log_sparsity", "log10 frequency")):
        if found[name]:
            rare = found[name].get("under_1e-5")
            note = "" if rare is None else f"{rare} under 1e-5"
            table.add_row(label, *(_short(found[name][entry]) for entry in quartiles), note)
    console.print(table)
    labels = found["labels"]
    if labels["count"]:
        table = Table(f"{labels['count']} labels", "", box=box.SIMPLE, padding=(0, 1, 0, 0))
        for feature, label in labels["first"].items():
            table.add_row(feature, Text(shown(label)))
        console.print(table)
    for label in ("config", "metadata"):
        told = {key: value for key, value in found[label].items() if value not in (None, {}, [])}
        if told:
            table = Table(label, "", box=box.SIMPLE, padding=(0, 1, 0, 0))
            for key, value in told.items():
                table.add_row(key, str(value))
            console.print(table)


def _short(value: float | int | None) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
