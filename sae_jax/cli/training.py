"""`sae-jax sweep` and `sae-jax train`: from options to a folder of trained members."""

import itertools
import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

import numpy as np
import tyro
from rich.console import Console

from sae_jax import normalise
from sae_jax.architectures import find
from sae_jax.base import require
from sae_jax.cli import doctor, folder
from sae_jax.cli.jobs import Job, prepare
from sae_jax.cli.progress import StopSignals, Ticker, counted, summary
from sae_jax.metrics.stability import Stability
from sae_jax.program import arguments_of
from sae_jax.result import SweepResult
from sae_jax.sweep import Look, request_all, sweep, sweep_all
from sae_jax.train import Stopped
from sae_jax.trained import TrainedSAE

SAVE_ALL_UP_TO = 256
MOST_MATCHING = 1e12
"""Of `_matching`; five seeds of 4,096 latents are .7e12 and took 20 s on two cores."""


def _left_out(metavar: str) -> Any:
    """An option that may be left out, whose help says itself what is then taken."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


MaybeText = Annotated[str | None, _left_out("VALUES")]
MaybeCount = Annotated[int | None, _left_out("N")]
MaybePath = Annotated[Path | None, _left_out("FOLDER")]


@dataclass
class Training:
    """What to train on what, and where to put it."""

    data: Annotated[tyro.conf.Positional[str | None], _left_out("DATA")] = None
    """A .npy, .npz or .safetensors array [n, d_in], or a store: a folder or URL that sae-jax harvest filled.
    Default: the eight tokens."""
    array: Annotated[str | None, _left_out("NAME")] = None
    """Which array of the file, where it holds several."""
    site: Annotated[str | None, _left_out("NAMES")] = None
    """Which site of a store. Of several with commas between, each is swept by itself, in a folder of its own;
    --arch crosscoder reads them all."""
    target_site: Annotated[str | None, _left_out("NAME")] = None
    """The site of the same store that a transcoder is to give."""
    stream: bool = False
    """Read a .npy, .safetensors or .pt file, or a folder of Arrow files, as training goes on and not at once.
    A store always is."""
    window_rows: Annotated[int | None, _left_out("N")] = None
    """Rows of a stream that are mixed among one another. Default: 65536."""
    world: Annotated[str | None, _left_out("NAME")] = None
    """In place of DATA a world whose features are known: toy_superposition, forty_in_five, hedging,
    sharkey_uncorrelated, sharkey_correlated, sparse_but_wrong, matryoshka_tree, synthsaebench_1k,
    synthsaebench_16k."""
    world_args: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    """NAME=VALUE ...: arguments of the world, such as features=512 d_in=64 seed=1."""
    target: MaybePath = None
    """A file of rows [n, d_out] that a transcoder is to give."""
    arch: str = "relu"
    """Architectures, with commas between: relu, topk, batch_topk, jumprelu, gated, matryoshka, transcoder,
    crosscoder."""
    d_sae: MaybeText = None
    """Number of latents, or several with commas between. Default: 6 on the tokens, 4 * d_in on data, as many
    as there are features in a world."""
    l0: MaybeText = None
    """Active latents per row to arrive at: the k of TopK's family, the target L0 of the others."""
    l1: MaybeText = None
    """Weight of the L1 penalty. Default: 0.001:1:16 on the tokens, 0.0001:0.1:8 on data; train: 0.1."""
    lr: MaybeText = None
    """Adam's learning rate. Default: 0.01 on the tokens, 0.001 on data."""
    seeds: MaybeCount = None
    """How many seeds draw initial weights: 0, 1, ... Default: 16 on the tokens, 1 on data, 3 in a
    world; train: 1."""
    arg: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=VALUES: any other argument of the architectures that take it, or of Adam (b1, b2, eps):
    tied=True, k=4,8,16, auxk_loss=auxk.saelens, of=topk, b1=0,0.9."""
    zip: Annotated[str | None, _left_out("AXES")] = None
    """Axes to walk together instead of multiplying, such as l1,lr."""
    normalise: Annotated[
        Literal["mean_norm", "unit_mean_square", "centring", "whitening", "layer_norm"] | None,
        tyro.conf.arg(help_behavior_hint=""),
    ] = None
    """Normalise the data; what is saved takes the data as they are. Default: not at all."""
    unit_norm_decoder: bool = False
    """Keep every decoder row at norm 1."""
    batch_size: MaybeCount = None
    """Rows per step; all rows where there are fewer. Default: 1024, or what the world says."""
    steps: MaybeCount = None
    """Training steps. Default: 500 on the tokens, 5000 on data."""
    data_seed: int = 0
    """Names the order of the rows, or the rows of a world."""
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


def sweep_command(options: Training) -> int:
    """Train every member of the grid; of several sites, one after the other."""
    sites = (options.site or "").split(",")
    if len(sites) == 1 or "crosscoder" in options.arch.split(","):
        return _execute("sweep", options, prepare(options))
    out = folder.choose(options.out, _name(options), options.resume)
    for site in sites:
        own = out / quote(site, safe=":")
        one = replace(options, site=site, out=own)
        status = _execute("sweep", one, prepare(one))
        if status or not (own / folder.FINISHED).exists():
            return status
    return 0


def train_command(options: Training) -> int:
    """Train a single member."""
    sparse = options.l0 is not None or "l1" not in arguments_of(find(options.arch.split(",")[0]))
    given = replace(
        options,
        l1="0.1" if options.l1 is None and not sparse else options.l1,
        seeds=1 if options.seeds is None else options.seeds,
    )
    job = prepare(given)
    count = job.members
    require(count == 1, f"these options make {count} members; train makes one, `sae-jax sweep` makes several")
    return _execute("train", given, job)


def _execute(command: str, options: Training, job: Job) -> int:
    """Claim the folder, train, write, tell."""
    console = Console(stderr=True, quiet=options.quiet)
    asked = request_all(job.groups, source=job.source, steps=job.steps)
    out = folder.choose(options.out, _name(options), options.resume)
    with (
        folder.claim(out, asked, overwrite=options.overwrite, resume=options.resume) as run,
        StopSignals() as signals,
        Ticker(console, job.members, job.steps) as ticker,
    ):
        if run.finished:
            ticker.say(f"{out} is finished already: there is nothing to resume")
            if options.as_json:
                print(json.dumps(_as_json(SweepResult.load(out), out, run.about()), indent=2))
            return 0
        began = time.monotonic()
        try:
            result = _train(job, options, run, lambda look: ticker.show(look) or signals.received is not None)
        except Stopped:
            ticker.say(f"stopped at {ticker.share:.0%}; go on with: {_again(out)}")
            return signals.exit_status
        about = _about(command, options, asked, time.monotonic() - began)
        found = None
        if result.settings.repeated and _matching(result) <= MOST_MATCHING:
            ticker.say("matching features between seeds")
            found = result.stability()
            result = result.with_consistency(found)
        elif result.settings.repeated:
            ticker.say(
                "features are not matched between seeds: it would take minutes; result.stability() does it"
            )
        save = options.save or ("all" if about["members"] <= SAVE_ALL_UP_TO else "frontier")
        run.publish(partial(_write, result, save, about, job, found))
    if options.as_json:
        print(json.dumps(_as_json(result, out, about), indent=2))
    elif not options.quiet:
        Console().print(summary(result))
    if problem := doctor.known_bad():
        console.print(f"[bold red]{problem}[/]")
    for sentence in result.missed():
        console.print(sentence, highlight=False, soft_wrap=True)
    kept = {"all": "every member's weights", "frontier": "the frontier's weights", "none": "no weights"}[save]
    console.print(
        f"{counted(about['members'])} in {about['seconds']:.1f} s "
        f"({about['members_per_second']:,.3g} members/s); "
        f"wrote {out}/: sweep.json, metrics.csv, history.npz, frontier.png, report.html and {kept}",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def _train(job: Job, options: Training, run: folder.Run, look: Callable[[Look], bool]) -> SweepResult:
    rest = {
        "source": job.source,
        "steps": job.steps,
        "members_at_once": options.members_at_once,
        "look": look,
        "checkpoints": run.checkpoints,
    }
    if len(job.groups) == 1:
        result = sweep(*job.groups[0][:2], grid=job.groups[0].grid, **rest)
    else:
        result = sweep_all(job.groups, **rest)
    if job.normalisation is None:
        return result
    return result.finished(lambda one: TrainedSAE(*normalise.fold(one.sae, one.params, job.normalisation)))


def _matching(result: SweepResult) -> float:
    """The work of holding seeds against each other: the cube of d_sae for each pair of members."""
    partners = {
        index: min(len(rows) - 1, 16) / 2 for rows in result.settings.members for index in rows.tolist()
    }
    return sum(
        partners[index] * part.params["W_dec"].shape[1] ** 3
        for part in result.parts
        for index in part.members.tolist()
    )


def _write(
    result: SweepResult, save: str, about: dict[str, Any], job: Job, found: Stability | None, target: Path
) -> None:
    from sae_jax import report  # a second of matplotlib that only a finished run needs

    result.save(target, save, about)
    report.figures.frontier_png(result, target / "frontier.png")
    (target / "report.html").write_text(
        report.sweep_page(result, about, job.tokens, found, job.truth), encoding="utf-8"
    )


def _about(command: str, options: Training, asked: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What `sweep.json` tells."""
    return {
        "command": shlex.join(["sae-jax", *sys.argv[1:]]),
        "kind": command,
        "data": _told(options),
        "members": asked["members"],
        "steps": asked["steps"],
        "seconds": round(seconds, 3),
        "members_per_second": round(asked["members"] / seconds, 3),
        "request": asked,
        "environment": doctor.environment(),
    }


def _name(options: Training) -> str:
    """What a folder is called after."""
    return options.world or ("tokens" if options.data is None else Path(options.data).stem)


def _told(options: Training) -> str:
    """The data in words."""
    if options.world is not None:
        return " ".join([f"the world {options.world}", *itertools.chain(*options.world_args)])
    if options.data is None:
        return "the seed's tokens"
    where = options.data if "://" in options.data else str(Path(options.data).absolute())
    return where if options.site is None else f"{where}, {options.site}"


def _again(out: Path) -> str:
    words = [word for word in sys.argv[1:] if word not in ("--overwrite", "--resume")]
    out_given = any(word == "--out" or word.startswith("--out=") for word in words)
    return shlex.join(["sae-jax", *words, *([] if out_given else ["--out", str(out)]), "--resume"])


def _as_json(result: SweepResult, out: Path, about: dict[str, Any]) -> dict[str, Any]:
    """`sweep.json`, the frontier, and the table as rows; JSON knows no NaN, so what is not finite is null."""
    table = {name: [_finite(value) for value in column.tolist()] for name, column in result.table.items()}
    rows = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    told = {"out": str(out), **about, "frontier": result.frontier().tolist(), "table": rows}
    if not result.settings.repeated:
        return told
    return {**told, "settings": _settings(result)}


def _settings(result: SweepResult) -> list[dict[str, Any]]:
    """Per setting its hyper-parameters, and by column [mean over seeds, half the width of its interval]."""
    intervals = {
        name: [[_finite(mean), _finite(half)] for mean, half in zip(*told, strict=True)]
        for name, told in result.intervals().items()
    }
    axes = {name: [_finite(value) for value in column] for name, column in result.settings.grid.items()}
    columns = {**axes, **intervals}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _finite(value: Any) -> Any:
    """As JSON knows it."""
    plain = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(plain, float) and not np.isfinite(plain) else plain
