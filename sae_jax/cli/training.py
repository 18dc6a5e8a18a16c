"""`sae-jax sweep` and `sae-jax train`: from options to a folder of trained members."""

import inspect
import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import optax
import tyro
from rich.console import Console

from sae_jax.architectures import find
from sae_jax.base import SAE, require
from sae_jax.cli import doctor, folder
from sae_jax.cli.progress import StopSignals, Ticker, counted, summary
from sae_jax.data import InMemory, as_float32, in_memory, read_array
from sae_jax.grid import Grid, grid, members, parse_axis, zipped
from sae_jax.result import SweepResult
from sae_jax.sweep import request, sweep
from sae_jax.synthetic import Tokens, seed_tokens
from sae_jax.train import Stopped
from sae_jax.transforms import unit_norm_decoder

SAVE_ALL_UP_TO = 256


class Defaults(NamedTuple):
    """What is taken where an option is left out."""

    d_sae: Callable[[int], int]
    lr: str
    steps: int
    l1: str
    seeds: int


ON_TOKENS = Defaults(d_sae=lambda d_in: 6, lr="0.01", steps=500, l1="0.001:1:16", seeds=16)
ON_DATA = Defaults(d_sae=lambda d_in: 4 * d_in, lr="0.001", steps=5000, l1="0.0001:0.1:8", seeds=1)


def _left_out(metavar: str) -> Any:
    """An option that may be left out, whose help says itself what is then taken."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


MaybeText = Annotated[str | None, _left_out("VALUES")]
MaybeCount = Annotated[int | None, _left_out("N")]
MaybePath = Annotated[Path | None, _left_out("FOLDER")]


@dataclass
class Training:
    """What to train on what, and where to put it."""

    data: Annotated[tyro.conf.Positional[Path | None], _left_out("DATA")] = None
    """A .npy, .npz or .safetensors array [n, d_in]. Default: the eight tokens."""
    array: Annotated[str | None, _left_out("NAME")] = None
    """Which array of the file, where it holds several."""
    arch: str = "relu"
    """Architecture."""
    d_sae: MaybeCount = None
    """Number of latents. Default: 6 on the tokens, 4 * d_in on data."""
    l1: MaybeText = None
    """Weight of the sparsity penalty. Default: 0.001:1:16 on the tokens, 0.0001:0.1:8 on data; train: 0.1."""
    lr: MaybeText = None
    """Adam's learning rate. Default: 0.01 on the tokens, 0.001 on data."""
    seeds: MaybeCount = None
    """How many seeds draw initial weights: 0, 1, ... Default: 16 on the tokens, 1 on data; train: 1."""
    arg: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=VALUES: any other argument of the architecture or of Adam (b1, b2, eps): tied=True, b1=0,0.9."""
    zip: Annotated[str | None, _left_out("AXES")] = None
    """Axes to walk together instead of multiplying, such as l1,lr."""
    unit_norm_decoder: bool = False
    """Keep every decoder row at norm 1."""
    batch_size: int = 1024
    """Rows per step; all rows where there are fewer."""
    steps: MaybeCount = None
    """Training steps. Default: 500 on the tokens, 5000 on data."""
    data_seed: int = 0
    """Names the order of the rows."""
    members_at_once: MaybeCount = None
    """How many members train side by side. Default: as many as fit in half of the free memory."""
    out: MaybePath = None
    """Folder for the results. Default: runs/NAME-N, the first N that is free."""
    save: Annotated[Literal["all", "frontier", "none"] | None, _left_out("{all,frontier,none}")] = None
    """Whose weights to keep. Default: all up to 256 members, the frontier beyond."""
    overwrite: bool = False
    """Replace a finished or interrupted run in the folder."""
    resume: bool = False
    """Go on with an interrupted run in the folder."""
    quiet: bool = False
    """No progress, no table."""
    as_json: Annotated[bool, tyro.conf.arg(name="json", help="print the result as JSON on stdout")] = False


class Job(NamedTuple):
    """A training run, ready to start."""

    factory: Callable[..., SAE]
    optimizer: Callable[..., optax.GradientTransformation]
    table: Grid
    source: InMemory
    steps: int
    tokens: Tokens | None


def sweep_command(options: Training) -> int:
    """Train every member of the grid."""
    return _execute("sweep", options, prepare(options))


def train_command(options: Training) -> int:
    """Train a single member."""
    given = replace(
        options,
        l1="0.1" if options.l1 is None else options.l1,
        seeds=1 if options.seeds is None else options.seeds,
    )
    job = prepare(given)
    count = members(job.table)
    require(count == 1, f"these options make {count} members; train makes one, `sae-jax sweep` makes several")
    return _execute("train", given, job)


def prepare(options: Training) -> Job:
    """Read the data and lay out the grid. What can be said against the input is said here."""
    architecture = find(options.arch)
    defaults = ON_TOKENS if options.data is None else ON_DATA
    tokens = seed_tokens() if options.data is None else None
    fixed, axes = _arguments(architecture, options, defaults)
    table = _table(axes, options.zip)
    x = seed_tokens().x if options.data is None else read_array(options.data, options.array)
    x = as_float32(x, str(options.data))
    d_sae = options.d_sae if options.d_sae is not None else defaults.d_sae(x.shape[1])
    return Job(
        factory=partial(architecture, d_in=x.shape[1], d_sae=d_sae, **fixed),
        optimizer=adam_on_unit_norm if options.unit_norm_decoder else adam,
        table=table,
        source=in_memory(x, options.batch_size, options.data_seed),
        steps=options.steps if options.steps is not None else defaults.steps,
        tokens=tokens,
    )


def adam(learning_rate, b1=0.9, b2=0.999, eps=1e-8):
    """Adam, by the arguments that the command line can sweep."""
    return optax.adam(learning_rate, b1, b2, eps)


def adam_on_unit_norm(learning_rate, b1=0.9, b2=0.999, eps=1e-8):
    """Adam, with every decoder row kept at norm 1."""
    return optax.chain(adam(learning_rate, b1, b2, eps), unit_norm_decoder())


def _arguments(
    architecture: Callable[..., SAE], options: Training, defaults: Defaults
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options as what is bound in the factory, and the axes."""
    seeds = options.seeds if options.seeds is not None else defaults.seeds
    require(seeds >= 1, f"--seeds must be at least 1, got {seeds}")
    at_once = options.members_at_once
    require(at_once is None or at_once >= 1, f"--members-at-once must be at least 1, got {at_once}")
    axes: dict[str, Any] = {
        "l1": parse_axis(defaults.l1 if options.l1 is None else options.l1),
        "lr": parse_axis(defaults.lr if options.lr is None else options.lr),
    }
    require(min(axes["lr"]) > 0, f"--lr must be above 0, got {min(axes['lr'])}")
    fixed = {}
    parameters = inspect.signature(architecture).parameters
    for argument in options.arg:
        name, equals, text = argument.partition("=")
        require(bool(equals), f"--arg takes NAME=VALUES, got {argument!r}")
        require(
            name not in {*axes, *fixed, "seed", "d_in", "d_sae"},
            f"{name} is given twice, or has an option of its own",
        )
        kind = parameters[name].annotation if name in parameters else float
        if kind in (bool, int):
            fixed[name] = _whole(name, text, kind)
        else:
            axes[name] = parse_axis(text)
    return fixed, {**axes, "seed": range(seeds)}


def _whole(name: str, text: str, kind: type) -> bool | int:
    words = {"true": True, "false": False}
    if kind is bool:
        require(text.lower() in words, f"{name} must be True or False, got {text!r}")
        return words[text.lower()]
    require(text.isdecimal(), f"{name} must be a whole number, got {text!r}")
    return int(text)


def _table(axes: dict[str, Any], together: str | None) -> Grid:
    if together is None:
        return grid(**axes)
    names = together.split(",")
    unknown = [name for name in names if name not in axes]
    require(len(set(names)) == len(names), f"--zip names an axis twice: {together}")
    require(not unknown, f"--zip names {', '.join(unknown)}, but the axes are {', '.join(axes)}")
    rest = {name: values for name, values in axes.items() if name not in names}
    return grid(zipped(**{name: axes[name] for name in names}), **rest)


def _execute(command: str, options: Training, job: Job) -> int:
    """Claim the folder, train, write, tell."""
    console = Console(stderr=True, quiet=options.quiet)
    arguments = {"grid": job.table, "source": job.source, "steps": job.steps}
    asked = request(job.factory, job.optimizer, **arguments)
    out = folder.choose(options.out, options.data, options.resume)
    with (
        folder.claim(out, asked, overwrite=options.overwrite, resume=options.resume) as run,
        StopSignals() as signals,
        Ticker(console, members(job.table), job.steps) as ticker,
    ):
        if run.finished:
            ticker.say(f"{out} is finished already: there is nothing to resume")
            if options.as_json:
                print(json.dumps(_as_json(SweepResult.load(out), out, run.about()), indent=2))
            return 0
        began = time.monotonic()
        try:
            result = sweep(
                job.factory,
                job.optimizer,
                **arguments,
                members_at_once=options.members_at_once,
                look=lambda look: ticker.show(look) or signals.received is not None,
                checkpoints=run.checkpoints,
            )
        except Stopped:
            ticker.say(f"stopped at {ticker.share:.0%}; go on with: {_again(out)}")
            return signals.exit_status
        about = _about(command, options, asked, time.monotonic() - began)
        save = options.save or ("all" if about["members"] <= SAVE_ALL_UP_TO else "frontier")
        run.publish(partial(_write, result, save, about, job.tokens))
    if options.as_json:
        print(json.dumps(_as_json(result, out, about), indent=2))
    elif not options.quiet:
        Console().print(summary(result))
    if problem := doctor.known_bad():
        console.print(f"[bold red]{problem}[/]")
    kept = {"all": "every member's weights", "frontier": "the frontier's weights", "none": "no weights"}[save]
    console.print(
        f"{counted(about['members'])} in {about['seconds']:.1f} s "
        f"({about['members_per_second']:,.3g} members/s); "
        f"wrote {out}/: sweep.json, metrics.csv, history.npz, frontier.png, report.html and {kept}",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def _write(
    result: SweepResult, save: str, about: dict[str, Any], tokens: Tokens | None, target: Path
) -> None:
    from sae_jax import report  # a second of matplotlib that only a finished run needs

    result.save(target, save, about)
    report.figures.frontier_png(result, target / "frontier.png")
    (target / "report.html").write_text(report.sweep_page(result, about, tokens), encoding="utf-8")


def _about(command: str, options: Training, asked: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What `sweep.json` tells."""
    return {
        "command": shlex.join(["sae-jax", *sys.argv[1:]]),
        "kind": command,
        "data": "the seed's tokens" if options.data is None else str(options.data.absolute()),
        "members": asked["members"],
        "steps": asked["steps"],
        "seconds": round(seconds, 3),
        "members_per_second": round(asked["members"] / seconds, 3),
        "request": asked,
        "environment": doctor.environment(),
    }


def _again(out: Path) -> str:
    words = [word for word in sys.argv[1:] if word not in ("--overwrite", "--resume")]
    out_given = any(word == "--out" or word.startswith("--out=") for word in words)
    return shlex.join(["sae-jax", *words, *([] if out_given else ["--out", str(out)]), "--resume"])


def _as_json(result: SweepResult, out: Path, about: dict[str, Any]) -> dict[str, Any]:
    """`sweep.json`, the frontier, and the table as rows; JSON knows no NaN, so what is not finite is null."""
    table = {
        name: [
            None if isinstance(value, float) and not np.isfinite(value) else value
            for value in column.tolist()
        ]
        for name, column in result.table.items()
    }
    rows = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    return {"out": str(out), **about, "frontier": result.frontier().tolist(), "table": rows}
