"""`sae-jax harvest`: a model's activations to a store."""

import errno
import importlib
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from sae_jax.base import InputError, require
from sae_jax.cli.progress import SECONDS_BETWEEN_LINES, StopSignals
from sae_jax.data import Store
from sae_jax.harvest import Activations, Harvested, harvest
from sae_jax.language_models import (
    Contexts,
    Site,
    contexts,
    from_tokens,
    read_texts,
    torch_hooks,
)
from sae_jax.language_models.text import size_of
from sae_jax.train import Stopped


@dataclass
class Harvest:
    """Which model, on which text, at which sites, and where to."""

    model: Annotated[str, tyro.conf.arg(metavar="MODEL")]
    """A Hugging Face model in torch, by folder or hub name; or MODULE:NAME of Python: a flax nnx model, or a
    function from tokens [batch, context] to {site: [batch, context, d_in]}."""
    hook: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A site to harvest, once per site: a module's name for its output, NAME:input for what it is given.
    --list-hooks tells them."""
    list_hooks: bool = False
    """Print the model's sites with their widths, and do nothing else."""
    text: tuple[str, ...] = ()
    """Text files in UTF-8, .jsonl files, folders of them, or a dataset: a folder saved by datasets, or a
    name on the hub."""
    tokens: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """In place of text: a .npy file of contexts that are tokens already, [n, context], -1 for none."""
    out: Annotated[str | None, tyro.conf.arg(metavar="STORE", help_behavior_hint="")] = None
    """A folder, or a gs:// or s3:// URL. A harvest that was interrupted goes on there."""
    context: int = 128
    """Tokens that the model sees at a time."""
    batch_size: int = 32
    """Contexts that the model reads at a time."""
    rows: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")] = None
    """Stop after so many rows. Default: at the end of the text."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """To store in."""
    begin: Literal["context", "document", "none"] = "context"
    """Where the BOS token stands: first in each context, first in each document, or nowhere."""
    one_document: bool = False
    """Give each document a context of its own, cut off or padded, instead of filling contexts."""
    keep_special: bool = False
    """Store the rows of BOS, EOS, CLS, SEP and PAD tokens too. Padding is never stored."""
    tokenizer: Annotated[str | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")] = None
    """Default: the model's own."""
    revision: Annotated[str | None, tyro.conf.arg(metavar="REVISION", help_behavior_hint="")] = None
    """Branch, tag or commit of the model on the hub."""
    column: str = "text"
    """Where .jsonl files and datasets have the text."""
    split: str = "train"
    """Of a dataset."""
    device: str = "cpu"
    """Where torch puts the model: cpu, cuda, mps."""
    quiet: bool = False
    """No progress."""
    as_json: Annotated[bool, tyro.conf.arg(name="json", help="print what was stored as JSON")] = False


class Model(NamedTuple):
    """What a harvest asks of a model, whatever it is made with."""

    sites: Callable[[], tuple[Site, ...]]
    capture: Callable[[tuple[str, ...]], Activations]
    about: dict[str, Any]


def run(options: Harvest) -> int:
    """Load, harvest, tell."""
    if options.list_hooks:
        return _list(options)
    require(options.out is not None, "say where to: --out STORE")
    out = str(options.out)
    given = (len(options.text) > 0) + (options.tokens is not None)
    require(given == 1, "say what the model is to read: --text FILES, or --tokens FILE")
    for name in ("context", "batch_size"):
        value = getattr(options, name)
        require(value >= 1, f"--{name.replace('_', '-')} must be at least 1, got {value}")
    reading = Reading(options.text)
    model = _model(options)
    batches, about = _contexts(options, reading)
    console = Console(stderr=True, quiet=options.quiet)
    began = time.monotonic()
    with StopSignals() as signals, showing(console, options.rows, reading) as show:
        try:
            store = harvest(
                model.capture(options.hook),
                batches,
                out,
                dtype=options.dtype,
                rows=options.rows,
                about={**model.about, **about},
                look=lambda now: show(now) or signals.received is not None,
            )
        except Stopped:
            console.print(f"stopped; go on with: {shlex.join(['sae-jax', *sys.argv[1:]])}",
                          highlight=False, soft_wrap=True)  # fmt: skip
            return signals.exit_status
        except OSError as error:
            full = error.errno == errno.ENOSPC and error.filename == out
            raise InputError(f"{out}: {error.strerror}") if full else error from None
    _tell(options, console, store, time.monotonic() - began)
    return 0


def _tell(options: Harvest, console: Console, store: Store, seconds: float) -> None:
    found = {
        name: {"d_in": len(of.mean), "mean_norm": of.mean_norm} for name, of in store.manifest.sites.items()
    }
    told = {"out": store.location, "rows": store.rows, "dtype": options.dtype, "sites": found,
            "seconds": round(seconds, 3)}  # fmt: skip
    if options.as_json:
        print(json.dumps(told, indent=2))
        return
    sites = ", ".join(f"{name} [{of['d_in']}], mean norm {of['mean_norm']:.3g}" for name, of in found.items())
    console.print(
        f"{store.rows:,} rows of {sites} in {store.location}; train on it with: "
        f"sae-jax sweep {store.location}" + (" --site NAME" if len(found) > 1 else ""),
        highlight=False,
        soft_wrap=True,
    )


def _list(options: Harvest) -> int:
    found = _model(options).sites()
    if options.as_json:
        print(json.dumps([site._asdict() for site in found], indent=2))
        return 0
    table = Table("site", "width", "dtype", "module", box=box.SIMPLE, title=f"sites of {options.model}")
    for site in found:
        table.add_row(site.name, str(site.width), site.dtype, site.kind)
    Console().print(table)
    return 0


def _model(options: Harvest) -> Model:
    """By MODULE:NAME what Python has there, else a Hugging Face model."""
    module, colon, name = options.model.partition(":")
    if colon and module.replace(".", "").isidentifier() and not os.path.exists(options.model):
        return _of_python(options.model, _imported(module, name))
    if options.quiet or not sys.stderr.isatty():
        _silence_loading()
    model = torch_hooks.load(options.model, revision=options.revision, device=options.device)
    about = {
        "model": options.model,
        "revision": getattr(model.config, "_commit_hash", None) or options.revision,
        "model_class": type(model).__name__,
        # weights as they are: no layer norm folded, nothing centred
        "weight_processing": "none",
    }
    return Model(partial(torch_hooks.sites, model), _named(partial(torch_hooks.capture, model)), about)


def _named(capture: Callable[[tuple[str, ...]], Activations]) -> Callable[[tuple[str, ...]], Activations]:
    """A capture that asks for at least one name."""

    def named(names: tuple[str, ...]) -> Activations:
        require(len(names) > 0, "name a site: --hook NAME (--list-hooks tells which there are)")
        return capture(names)

    return named


def _silence_loading() -> None:
    """No bars of transformers' own, where nobody watches them move."""
    with suppress(ImportError):
        from transformers.utils import logging

        logging.disable_progress_bar()


def _of_python(label: str, found: Any) -> Model:
    from flax import nnx  # no other command waits for its import

    from sae_jax.language_models import nnx_capture

    about = {"model": label, "model_class": type(found).__name__, "weight_processing": "none"}
    if isinstance(found, nnx.Module):
        return Model(partial(nnx_capture.sites, found), _named(partial(nnx_capture.capture, found)), about)
    require(callable(found), f"{label} is a {type(found).__name__}, neither an nnx model nor a function")

    def sites() -> tuple[Site, ...]:
        raise InputError(f"{label} is a function: it gives the sites it gives, and --hook chooses among them")

    def chosen(names: tuple[str, ...]) -> Activations:
        def activations(tokens):
            given = found(tokens)
            for name in names:
                require(name in given, f"{label} gives no site {name!r}; it gives {', '.join(given)}")
            return {name: given[name] for name in names or given}

        return activations

    return Model(sites, chosen, about)


def _imported(module: str, name: str) -> Any:
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise InputError(f"there is no Python module {error.name}, in {os.getcwd()} or installed") from None
    except AttributeError:
        raise InputError(f"the Python module {module} has no {name}") from None
    finally:
        sys.path.pop(0)


class Reading:
    """How much of the texts has been read, where that can be known."""

    def __init__(self, sources: tuple[str, ...]):
        self.total = size_of(sources)
        self.done = 0

    def counted(self, texts: Iterable[str]) -> Iterator[str]:
        """The same texts."""
        for text in texts:
            yield text
            self.done += len(text.encode())

    @property
    def share(self) -> float | None:
        """From 0 to 1; None where it is not known."""
        return None if not self.total else min(1.0, self.done / self.total)


def _contexts(options: Harvest, reading: Reading) -> tuple[Iterator[Contexts], dict[str, Any]]:
    """The batches to read, and what the manifest tells of them."""
    about: dict[str, Any] = {"hooks": list(options.hook), "batch_size": options.batch_size}
    if options.tokens is not None:
        require(options.tokens.is_file(), f"there is no file {options.tokens}")
        try:
            tokens = np.load(options.tokens, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise InputError(f"{options.tokens} cannot be read as .npy: {error}") from None
        return from_tokens(tokens, options.batch_size), {**about, "tokens": str(options.tokens)}
    source = options.tokenizer or options.model
    tokenizer = torch_hooks.tokenizer(source, revision=options.revision if source == options.model else None)
    texts = reading.counted(read_texts(options.text, column=options.column, split=options.split))
    batches = contexts(
        texts,
        tokenizer,
        options.context,
        batch_size=options.batch_size,
        begin=options.begin,
        pack=not options.one_document,
        keep_special=options.keep_special,
    )
    told = {
        "text": list(options.text),
        "tokenizer": source,
        "begin": "the tokenizer's own" if options.one_document else options.begin,
        "documents": "one a context" if options.one_document else "packed",
        "special_tokens": "kept" if options.keep_special else "left out",
    }
    return batches, {**about, **told}


@contextmanager
def showing(console: Console, rows: int | None, reading: Reading) -> Iterator[Callable[[Harvested], None]]:
    """A progress bar on a terminal, a line now and then elsewhere: tokens/s, size so far, time left."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[told]}"),
        TimeRemainingColumn(),
        console=console,
        disable=console.quiet or not console.is_terminal,
    )
    task = bar.add_task("harvesting", total=1.0, told="")
    first: list[tuple[float, int]] = []
    due = [0.0]

    def show(now: Harvested) -> None:
        moment = time.monotonic()
        first[:] = first or [(moment, now.rows)]  # what came before was loading and compiling
        began, before = first[0]
        speed = (now.rows - before) / max(moment - began, 1e-9)
        share = now.rows / rows if rows else reading.share
        told = f"{now.rows:,} rows, {_size(now.rows * now.row_bytes)}" + (
            f", {speed:,.0f} rows/s" if speed else ""
        )
        bar.update(task, completed=share, total=None if share is None else 1.0, told=told)
        if not console.is_terminal and moment >= due[0]:
            left = f", {(moment - began) * (1 - share) / share:,.0f} s left" if share and speed else ""
            done = "" if share is None else f"{share:.0%}  "
            console.print(f"{done}{told}{left}", highlight=False, soft_wrap=True)
            due[0] = moment + SECONDS_BETWEEN_LINES

    with bar:
        yield show


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
