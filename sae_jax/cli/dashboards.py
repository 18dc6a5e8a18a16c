"""`sae-jax features SAE DATA`: a dashboard of what each feature answers to."""

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from sae_jax import features, language_models
from sae_jax import labels as beside
from sae_jax.architectures import describe
from sae_jax.base import InputError, require
from sae_jax.cli import doctor, reporting
from sae_jax.cli.folder import FINISHED
from sae_jax.cli.progress import SECONDS_BETWEEN_LINES
from sae_jax.cli.staging import staged
from sae_jax.data import Rows, Store, as_float32, is_store, open_rows, open_store, read_array
from sae_jax.features import circuit_tracer, neuronpedia
from sae_jax.language_models import torch_hooks
from sae_jax.result import SweepResult
from sae_jax.synthetic import seed_tokens
from sae_jax.trained import TrainedSAE, load


@dataclass
class Features:
    """Which SAE, on which activations, and where to."""

    sae: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SAE")]
    """A file or folder in any known format, a member of a sweep, or a Hugging Face repository."""
    data: Annotated[
        tyro.conf.Positional[str | None], tyro.conf.arg(metavar="STORE", help_behavior_hint="")
    ] = None
    """A store that sae-jax harvest filled, or an array [n, d_in], whose rows have no tokens. Default: the
    eight tokens."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Default: the folder `features` beside the weights."""
    site: Annotated[str | None, tyro.conf.arg(metavar="NAMES", help_behavior_hint="")] = None
    """Which site of the store; of a crosscoder all its sites, with commas between."""
    array: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = None
    """Which array of the file, where it holds several."""
    rows: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")] = None
    """Look at the first rows only, about so many."""
    tokenizer: Annotated[str | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")] = None
    """How tokens are written: a tokenizer by folder or hub name, or a .json list of words. Default: the
    tokenizer that the store was harvested with."""
    model: Annotated[str | None, tyro.conf.arg(metavar="MODEL", help_behavior_hint="")] = None
    """The Hugging Face model whose logits features of its residual stream write to."""
    unembedding: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """In place of a model: an array [d_out, vocabulary], what a decoder row adds to the logits."""
    labels: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """What features are called, in place of the labels beside the SAE; see sae-jax label."""
    seeds: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SAES")] = ()
    """SAEs that differ by their seed, for the stability of each feature. Default: of a member of a sweep, the
    other seeds of its setting."""
    strongest: Annotated[int, tyro.conf.arg(metavar="N")] = 20
    """Contexts with the largest activations, per feature."""
    sample: Annotated[int, tyro.conf.arg(metavar="N")] = 32
    """Contexts drawn evenly from those in which it is active."""
    before: Annotated[int, tyro.conf.arg(metavar="N")] = 16
    """Tokens of a context before the strongest one."""
    after: Annotated[int, tyro.conf.arg(metavar="N")] = 8
    """Tokens of a context after it."""
    map: Literal["pca", "umap"] = "pca"
    """How decoder rows come to a plane; umap needs the package umap-learn."""
    also: tyro.conf.UseAppendAction[tuple[Literal["circuit-tracer", "neuronpedia"], ...]] = ()
    """Write the features in the form of another tool, too, into a folder of that name."""
    layer: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Of the model, that the SAE is of; for --also."""
    overwrite: bool = False
    """Replace the dashboard that is there."""
    quiet: bool = False
    """No progress."""
    as_json: Annotated[bool, tyro.conf.arg(name="json", help="print what was written as JSON")] = False


class Known(NamedTuple):
    """What the options tell beside SAE and activations; the arguments of `features.observe`."""

    labels: Mapping[int, str] | None
    unembedding: np.ndarray | None
    others: Sequence[TrainedSAE]


def run(options: Features) -> int:
    """Look, write, tell."""
    from sae_jax import report  # a second of matplotlib that only what has been seen needs

    require(options.layer >= 0, f"--layer must be at least 0, got {options.layer}")
    trained = load(options.sae)
    reading, words, origin = _given(options)
    known = _known(options, trained)
    out, member = _folder(options), _member(options.sae)
    console = Console(stderr=True, quiet=options.quiet)
    around = (options.before, options.after) if reading.length > 1 else (0, 0)
    kept = features.Options(options.strongest, options.sample, *around)
    began = time.monotonic()
    with staged(out, "data/table.js", overwrite=options.overwrite) as stage:
        with _showing(console) as show:
            found = features.observe(
                trained,
                reading,
                words=words,
                options=kept,
                projection=options.map,
                told=show,
                **known._asdict(),
            )
        found = found._replace(about=origin | _about(options, trained, time.monotonic() - began))
        console.print("writing", highlight=False)
        report.write_dashboard(found, stage)
        for name in dict.fromkeys(options.also):
            EXPORTS[name](found, stage / name, options.layer)
    _tell(options, console, found, out, time.monotonic() - began)
    if member is not None:
        reporting.renewed(member[0])
        console.print(f"{member[0] / 'report.html'} leads to it", highlight=False, soft_wrap=True)
    return 0


class Given(NamedTuple):
    """The activations, how their tokens are written, and what is told of where they come from."""

    reading: features.Reading
    words: features.Words | Sequence[str] | None
    origin: dict[str, Any]


def _given(options: Features) -> Given:
    origin = {}
    words = None if options.tokenizer is None else _words(options.tokenizer)
    if options.data is None:
        tokens = seed_tokens()
        ids = features.in_memory(np.arange(len(tokens.x), dtype=np.int32))
        reading = features.of_rows(features.in_memory(tokens.x, "the eight tokens"), ids)
        words = tokens.names if words is None else words
    elif is_store(options.data):
        require(options.array is None, "a store holds sites: --site NAME in place of --array")
        store = open_store(options.data)
        reading = features.of_store(store, *(options.site.split(",") if options.site else ()))
        words = _words_of(store) if words is None else words
        origin = {"model_name": store.manifest.about.get("model", "")}
    else:
        require(options.site is None, "--site is for a store")
        reading = features.of_rows(_rows(options.data, options.array))
    reading = reading if options.rows is None else features.first(reading, options.rows)
    return Given(reading, words, origin)


def _rows(data: str, array: str | None) -> Rows:
    if Path(data).suffix == ".npz":
        return features.in_memory(as_float32(read_array(data, array), data), data)
    return open_rows(data, array)


def _words(path: str) -> features.Words | Sequence[str]:
    """A list of words, or a tokenizer's."""
    if not path.endswith(".json"):
        return language_models.words(torch_hooks.tokenizer(path))
    require(Path(path).is_file(), f"there is no file {path}")
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from None
    good = isinstance(found, list) and all(isinstance(word, str) for word in found)
    require(good, f"{path} must hold a JSON list of words, the token's id being its place")
    return found


def _words_of(store: Store) -> features.Words | None:
    """The words of the tokenizer that the store was harvested with, where it can be had."""
    source = store.manifest.about.get("tokenizer")
    try:
        return None if source is None else language_models.words(torch_hooks.tokenizer(source))
    except InputError:
        return None  # the page says that tokens go by their ids


def _known(options: Features, trained: TrainedSAE) -> Known:
    require(
        options.model is None or options.unembedding is None,
        "--model and --unembedding both say what features write to: give one of them",
    )
    writes = None
    if options.model is not None:
        writes = language_models.unembedding(torch_hooks.load(options.model))
    elif options.unembedding is not None:
        writes = read_array(options.unembedding)
    d_sae = trained.params["W_dec"].shape[0]
    labels = None if options.labels is None else beside.read(options.labels, d_sae)
    others = [load(path) for path in options.seeds] or _other_seeds(options.sae)
    return Known(labels, writes, others)


def _member(sae: str) -> tuple[Path, int] | None:
    """The run and the number, where the SAE is a member of a finished sweep."""
    path = Path(sae).absolute()
    run = path.parent.parent
    is_one = path.parent.name == "members" and path.name.isdecimal() and (run / FINISHED).is_file()
    return (run, int(path.name)) if is_one else None


def _other_seeds(sae: str) -> list[TrainedSAE]:
    """The members of the same sweep that differ by their seed alone, of those whose weights were kept."""
    if (member := _member(sae)) is None:
        return []
    run, number = member
    result = SweepResult.load(run)
    groups = [group.tolist() for group in result.settings.members]
    alike = next((group for group in groups if number in group), [])
    return [result.member(one) for one in alike if one != number and one in result.kept and result.sound[one]]


def _folder(options: Features) -> Path:
    if options.out is not None:
        return options.out
    path = Path(options.sae)
    require(path.exists(), f"{options.sae} is not a folder of this machine: say where to, --out FOLDER")
    return (path if path.is_dir() else path.parent) / "features"


@contextmanager
def _showing(console: Console) -> Iterator[Callable[[features.Told], None]]:
    """A bar on a terminal, a line now and then elsewhere; first of all what memory it takes."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=console,
        disable=console.quiet or not console.is_terminal,
    )
    task = bar.add_task("looking", total=1.0, rate="")
    began, due = time.monotonic(), time.monotonic() + SECONDS_BETWEEN_LINES

    def show(now: features.Told) -> None:
        nonlocal began, due
        moment = time.monotonic()
        if now.rows == 0:
            began = moment
            bar.console.print(
                f"one pass over {now.total:,} rows, {now.at_once:,} at a time: "
                f"{now.device_bytes / 1e9:.2f} GB of the device's memory",
                highlight=False, soft_wrap=True,
            )  # fmt: skip
            return
        rate = now.rows / max(moment - began, 1e-9)
        bar.update(task, completed=now.rows / now.total, rate=f"{rate:,.0f} rows/s")
        if not console.is_terminal and moment >= due and now.rows < now.total:
            left = (now.total - now.rows) / rate
            console.print(
                f"{now.rows / now.total:.0%}  {rate:,.0f} rows/s  {left:,.0f} s left", highlight=False
            )
            due = moment + SECONDS_BETWEEN_LINES

    with bar:
        yield show


def _about(options: Features, trained: TrainedSAE, seconds: float) -> dict[str, Any]:
    """What the page tells of itself."""
    config = {name: value for name, value in describe(trained.sae.config).items() if value is not None}
    return {
        "command": shlex.join(["sae-jax", *sys.argv[1:]]),
        "SAE": trained.about.origin or options.sae,
        "activations": options.data or "the eight tokens",
        **config,
        **{
            name: value
            for name, value in trained.about.metadata.items()
            if isinstance(value, str | int | float)
        },
        "seconds": round(seconds, 1),
        "environment": doctor.environment(),
    }


def _tell(options: Features, console: Console, found: features.Observed, out: Path, seconds: float) -> None:
    dead = int((found.seen.fired == 0).sum())
    told = {
        "out": str(out),
        "features": found.d_sae,
        "dead": dead,
        "rows": found.seen.rows,
        "contexts": found.seen.contexts,
        "seconds": round(seconds, 3),
        "left_out": list(found.left_out),
    }
    if options.as_json:
        print(json.dumps(told, indent=2))
        return
    for sentence in found.left_out:
        console.print(sentence, highlight=False, soft_wrap=True)
    silent = f", of which {dead:,} are active on none of them" if dead else ""
    console.print(
        f"{found.d_sae:,} features on {found.seen.rows:,} rows{silent}, in {seconds:.1f} s; "
        f"look at them in {out / 'index.html'}",
        highlight=False,
        soft_wrap=True,
    )


EXPORTS: dict[str, Callable[[features.Observed, Path, int], object]] = {
    "circuit-tracer": lambda found, folder, layer: circuit_tracer.write(found, folder, layer=layer),
    "neuronpedia": lambda found, folder, layer: neuronpedia.write(
        found,
        folder,
        layer=layer,
        model_id=neuronpedia.identifier(str(found.about.get("model_name", ""))),
        dataset=str(found.about["activations"]),
    ),
}
"""By what `--also` calls them."""
