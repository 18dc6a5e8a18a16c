"""`sae-jax eval SAE DATA`, and what a language model makes of the SAE."""

import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from sae_jax.base import require
from sae_jax.cli.jobs import is_streamed, streamed, world
from sae_jax.data import as_float32, in_memory, read_array, stored
from sae_jax.language_models import Contexts, contexts, read_texts, torch_hooks
from sae_jax.metrics import by_source, downstream, evaluate, mean_activation
from sae_jax.metrics.recovery import recover
from sae_jax.trained import TrainedSAE, load

ROWS_OF_A_WORLD = 65_536


@dataclass
class Eval:
    """Which SAE to measure, and on what."""

    sae: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SAE")]
    """A file or folder in any known format, or a Hugging Face repository: user/repo, hf://user/repo@rev/path."""
    data: Annotated[
        tyro.conf.Positional[str | None], tyro.conf.arg(metavar="DATA", help_behavior_hint="")
    ] = None
    """A .npy, .npz or .safetensors array [n, d_in], or a store: a folder or URL."""
    world: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = None
    """In place of DATA a world, whose features are then held against the SAE's; see sae-jax sweep."""
    world_args: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    """NAME=VALUE ...: arguments of the world."""
    target: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Of a transcoder: the rows [n, d_out] that it is to give."""
    array: str | None = None
    """Which array of the file, where it holds several."""
    site: Annotated[str | None, tyro.conf.arg(metavar="NAMES", help_behavior_hint="")] = None
    """Which site of a store; of a crosscoder all its sites, with commas between."""
    target_site: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = None
    """Of a transcoder: the site of the same store that it is to give."""
    model: Annotated[str | None, tyro.conf.arg(metavar="MODEL", help_behavior_hint="")] = None
    """Beside DATA or in place of it a Hugging Face model, by folder or hub name: what it still predicts with
    the SAE's reconstruction in place of its own activations."""
    hook: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = None
    """Whose activations the SAE reads: a module of the model; see sae-jax harvest --list-hooks."""
    text: tuple[str, ...] = ()
    """What the model reads: text files in UTF-8, .jsonl files, folders of them, or a dataset."""
    context: int = 128
    """Tokens that the model sees at a time."""
    contexts: int = 64
    """How many contexts the model reads at most."""
    device: str = "cpu"
    """Where torch puts the model: cpu, cuda, mps."""
    batch_size: int = 1024
    """Rows or tokens at a time; explained_variance_legacy and fvu_batch are defined by the batch."""
    as_json: Annotated[bool, tyro.conf.arg(name="json", help="print JSON, densities included")] = False


def run(options: Eval) -> int:
    """Measure every metric on every row, and what a model predicts through the SAE, and print them."""
    trained = load(options.sae)
    require(
        options.data is not None or options.world is not None or options.model is not None,
        "say what to measure on: DATA, --world NAME or --model PATH",
    )
    require(options.data is None or options.world is None, "--world makes its own data: leave out DATA")
    require(not options.world_args or options.world is not None, "--world-args is for --world NAME")
    for name, of, place in (
        ("array", options.data, "DATA"),
        ("target", options.data, "DATA"),
        ("site", options.data, "DATA"),
        ("target_site", options.data, "DATA"),
        ("hook", options.model, "--model PATH"),
        ("text", options.model, "--model PATH"),
    ):
        require(not getattr(options, name) or of is not None, f"--{name.replace('_', '-')} is for {place}")
    found, places = {}, []
    for given, measure in ((options.data, _on_data), (options.world, _in_world), (options.model, _in_model)):
        if given is not None:
            figures, place = measure(options, trained)
            found |= figures
            places.append(place)
    return _tell(options, found, " and ".join(places))


def _on_data(options: Eval, trained: TrainedSAE) -> tuple[dict[str, np.ndarray], str]:
    """What the SAE makes of the rows of a file."""
    data = str(options.data)
    if is_streamed(data):
        x, y = streamed(options)
        _require_fit(options, trained.sae.config, x.shape, None if y is None else y.shape)
        source = stored(x, options.batch_size, y=y)
    else:
        for name in ("site", "target_site"):
            require(getattr(options, name) is None, f"--{name.replace('_', '-')} is for a store")
        x = read_array(data, options.array)
        y = None if options.target is None else read_array(options.target)
        _require_fit(options, trained.sae.config, x.shape, None if y is None else y.shape)
        y = None if y is None else as_float32(y, str(options.target))
        source = in_memory(as_float32(x, data), options.batch_size, y=y)
    found = evaluate(trained.sae, trained.params, source.evaluation(len(x)))
    if "sources" in trained.sae.config:
        found |= by_source(trained.sae, trained.params, source.evaluation(len(x)))
    return found, f"{len(x)} rows of {data}"


def _in_world(options: Eval, trained: TrainedSAE) -> tuple[dict[str, np.ndarray], str]:
    """What the SAE makes of a world's rows, and what it finds of its features."""
    require(
        "d_out" not in trained.sae.config,
        f"{options.sae} is a transcoder: a world has no rows for it to give",
    )
    place = world(str(options.world), itertools.chain(*options.world_args))
    reads, width = trained.sae.config["d_in"], place.directions.shape[1]
    require(reads == width, f"{options.sae} reads {reads} columns, but the world {options.world} has {width}")
    found = evaluate(trained.sae, trained.params, place.evaluation(ROWS_OF_A_WORLD))
    found |= recover(trained.sae, trained.params, place, ROWS_OF_A_WORLD)
    return found, f"about {ROWS_OF_A_WORLD} rows of the world {options.world}"


def _in_model(options: Eval, trained: TrainedSAE) -> tuple[dict[str, np.ndarray], str]:
    """What a language model still predicts with the SAE's reconstruction in place of its activations."""
    require(options.hook is not None, "say where the SAE belongs: --hook NAME (sae-jax harvest --list-hooks)")
    require(len(options.text) > 0, "say what the model is to read: --text FILES")
    for name in ("context", "contexts", "batch_size"):
        value, least = getattr(options, name), 2 if name == "context" else 1
        require(value >= least, f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    logits = torch_hooks.splice(
        torch_hooks.load(str(options.model), device=options.device), str(options.hook)
    )
    read = contexts(
        read_texts(options.text),
        torch_hooks.tokenizer(str(options.model)),
        options.context,
        batch_size=max(1, options.batch_size // options.context),
    )
    batches = list(_first(read, options.contexts))
    text = ", ".join(options.text)
    require(len(batches) > 0, f"{text} does not fill one context of {options.context} tokens")
    shown = partial(track, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    mean = mean_activation(logits, shown(batches, "mean activation"))
    found = downstream(logits, trained.sae, trained.params, shown(batches, "through the SAE"), mean=mean)
    count = sum(len(batch.tokens) for batch in batches)
    return found, f"{count} contexts of {text}, read by {options.model}"


def _first(batches: Iterable[Contexts], count: int) -> Iterator[Contexts]:
    """The first `count` contexts."""
    for tokens, kept in batches:
        yield Contexts(tokens[:count], kept[:count])
        count -= len(tokens)
        if count <= 0:
            return


def _tell(options: Eval, found: dict[str, np.ndarray], on: str) -> int:
    if options.as_json:
        print(json.dumps({name: _plain(value) for name, value in found.items()}, indent=2))
        return 0
    table = Table("metric", "value", title=f"{options.sae} on {on}")
    for name, value in found.items():
        if value.ndim == 0:
            table.add_row(name, f"{float(value):.6g}")
        elif name.endswith("_by_source"):
            table.add_row(name, ", ".join(f"{each:.6g}" for each in value.tolist()))
    Console().print(table)
    return 0


def _require_fit(
    options: Eval, config: dict[str, Any], x: tuple[int, ...], y: tuple[int, ...] | None
) -> None:
    """Rows of these shapes are what this SAE reads, and, of a transcoder, what it gives."""
    name, d_in, d_out = options.sae, config["d_in"], config.get("d_out")
    require(x[-1] == d_in, f"{name} reads {d_in} columns, but {options.data} has {x[-1]}")
    rows = [config["sources"], d_in] if "sources" in config else [d_in]
    require(list(x[1:]) == rows, f"{name} reads rows of {rows}, but {options.data} has rows of {list(x[1:])}")
    if d_out is None:
        require(y is None, f"{name} is no transcoder, so it takes no target")
    else:
        require(
            y is not None, f"{name} is a transcoder: give --target FILE, or of a store --target-site NAME"
        )
        width, target = 0 if y is None else y[-1], options.target or options.target_site
        require(width == d_out, f"{name} gives {d_out} columns, but {target} has {width}")


def _plain(value: np.ndarray):
    return np.where(np.isfinite(value), value.astype(object), np.array(None)).tolist()
