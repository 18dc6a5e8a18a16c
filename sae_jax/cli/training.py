"""`sae-jax sweep` and `sae-jax train`: from options to a folder of trained members."""

import itertools
import json
import math
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jax
import numpy as np
from rich.console import Console

from sae_jax import distributed, normalise, sharding
from sae_jax.architectures import find
from sae_jax.base import require
from sae_jax.cli import doctor, folder, memory, throughput
from sae_jax.cli.jobs import Job, prepare
from sae_jax.cli.live import Live, served
from sae_jax.cli.observing import observed
from sae_jax.cli.options import Training
from sae_jax.cli.processes import joined
from sae_jax.cli.progress import StopSignals, Ticker, counted, summary
from sae_jax.endings import Patience
from sae_jax.metrics import stability_file
from sae_jax.metrics.stability import Stability
from sae_jax.program import arguments_of
from sae_jax.result import MOST_MATCHING, SweepResult
from sae_jax.sweep import Look, request_all, sweep, sweep_all
from sae_jax.synthetic.tokens import SEED_TOKENS
from sae_jax.train import Saving, Stopped
from sae_jax.trained import TrainedSAE

SAVE_ALL_UP_TO = 256
EACH_ITS_OWN = ("hosts", "quiet", "as_json")
"""Options that the processes of a run need not have alike."""
WRITTEN = "sweep.json, metrics.csv, metrics.jsonl, history.npz, frontier.png, report.html"
WHOSE = {"all": "every member's weights", "frontier": "the frontier's weights", "none": "no weights"}
"""By what `--save` says."""


def sweep_command(options: Training) -> int:
    """Train every member of the grid; of several sites, one after the other."""
    with joined(options.hosts):
        sites = (options.site or "").split(",")
        if len(sites) == 1 or "crosscoder" in options.arch.split(","):
            return _execute("sweep", options, prepare(options))
        out = _chosen(options)
        for site in sites:
            own = out / quote(site, safe=":")
            begun = distributed.leader(own.exists())
            one = replace(options, site=site, out=own, resume=options.resume and begun)
            status = _execute("sweep", one, prepare(one), whole=out)
            # the first process publishes before it asks, and the others wait for it here
            if distributed.any_of(bool(status)) or not distributed.leader((own / folder.FINISHED).exists()):
                return status
        return 0


def train_command(options: Training) -> int:
    """Train a single member."""
    with joined(options.hosts):
        sparse = options.l0 is not None or "l1" not in arguments_of(find(options.arch.split(",")[0]))
        given = replace(
            options,
            l1="0.1" if options.l1 is None and not sparse else options.l1,
            seeds=1 if options.seeds is None else options.seeds,
        )
        job = prepare(given)
        count = job.members
        require(
            count == 1, f"these options make {count} members; train makes one, `sae-jax sweep` makes several"
        )
        return _execute("train", given, job)


def _chosen(options: Training) -> Path:
    """The run's folder, the same for all processes."""
    return Path(distributed.leader(str(folder.choose(options.out, _name(options), options.resume))))


def _execute(command: str, options: Training, job: Job, whole: Path | None = None) -> int:
    """Claim the folder, train, write, tell; where it is one of several within a `whole`, that goes on."""
    console = Console(stderr=True, quiet=options.quiet)
    asked = request_all(job.groups, source=job.source, steps=job.steps, **_settings_of(options))
    shared = {name: str(value) for name, value in vars(options).items() if name not in EACH_ITS_OWN}
    distributed.agree({**shared, **asked})
    out = _chosen(options)
    page_tells = {"command": _command(), "data": _told(options), "folder": str(out.absolute())}
    # to the last word: a run that is finished does not end by a signal
    with StopSignals() as signals, served(options, command, job, asked, page_tells, signals) as page:
        with (
            memory.explained(job, options.members_at_once, _devices(options), _axes(options)),
            folder.claim(out, asked, overwrite=options.overwrite, resume=options.resume) as run,
            Ticker(console, job.members, job.steps, job.source.batch_size) as ticker,
        ):
            if run.finished:
                ticker.say(f"{out} is finished already: there is nothing to resume")
                page.end("finished", report=run.out / "report.html")
                if options.as_json:
                    print(json.dumps(_as_json(SweepResult.load(out), out, run.about()), indent=2))
                return 0
            if page.serves:
                ticker.say(page.where)
            began = time.monotonic()
            try:
                result = _train(job, options, run, ticker, signals, asked, page)
            except Stopped:
                stopped = f"stopped at {ticker.share:.0%}; go on with: {_again(whole or out)}"
                ticker.say(stopped)
                page.end("stopped", stopped)
                return signals.exit_status
            if not distributed.first():
                return 0
            about = _about(command, options, asked, time.monotonic() - began)
            found = _between_seeds(result, ticker)
            result = result if found is None else result.with_consistency(found)
            save = options.save or ("all" if about["members"] <= SAVE_ALL_UP_TO else "frontier")
            write = partial(_write, result, save, about, job, found)
            run.publish(write, keep_checkpoints=options.keep_best_checkpoints > 0)
            page.end("finished", report=run.out / "report.html")
        share = throughput.share_of_peak(ticker.meter, result, _devices(options))
        rates = throughput.told(about["members_per_second"], ticker.meter.rows_per_second, share)
        wrote = f"wrote {out}/: {WRITTEN} and {WHOSE[save]}"
        _tell(console, options, result, about, out, f"({rates}); {wrote}")
    return 0


def _between_seeds(result: SweepResult, ticker: Ticker) -> Stability | None:
    """How far seeds agree, where there are several and it takes no minutes."""
    if not result.settings.repeated:
        return None
    if result.matching > MOST_MATCHING:
        ticker.say(
            "features are not matched between seeds: it would take minutes; result.stability() does it"
        )
        return None
    ticker.say("matching features between seeds")
    return result.stability()


def _tell(
    console: Console, options: Training, result: SweepResult, about: dict[str, Any], out: Path, wrote: str
) -> None:
    """The table or the JSON on the screen, and beside it what a reader should know."""
    if options.as_json:
        print(json.dumps(_as_json(result, out, about), indent=2))
    elif not options.quiet:
        Console().print(summary(result))
    if problem := doctor.known_bad():
        console.print(f"[bold red]{problem}[/]")
    for sentence in result.missed():
        console.print(sentence, highlight=False, soft_wrap=True)
    console.print(
        f"{counted(about['members'])} in {about['seconds']:.1f} s {wrote}", highlight=False, soft_wrap=True
    )


def _settings_of(options: Training) -> dict[str, Any]:
    """What decides the numbers beside the grid, the data and the steps."""
    patience = None if options.patience is None else Patience(options.patience)
    return {"precision": options.precision, "patience": patience, "keep_best": options.keep_best}


def _axes(options: Training) -> Mapping[str, int] | None:
    """Of the mesh that was asked for; None of `auto`, and where none was."""
    asked = options.mesh is not None and options.mesh != "auto"
    return sharding.mesh(options.mesh).shape if asked and options.mesh else None


def _devices(options: Training) -> int:
    """How many may train."""
    axes = _axes(options)
    if axes is not None:
        return math.prod(axes.values())
    return jax.device_count() if options.mesh == "auto" or distributed.several() else 1


def _train(
    job: Job,
    options: Training,
    run: folder.Run,
    ticker: Ticker,
    signals: StopSignals,
    asked: dict[str, Any],
    page: Live,
) -> SweepResult:
    saving = Saving(
        run.checkpoints,
        options.checkpoint_seconds,
        options.keep_checkpoints,
        options.keep_best_checkpoints,
        ticker.say,
    )
    watching = {"tensorboard": options.tensorboard, "wandb": options.wandb, "profile": options.profile}
    with observed(ticker, run, asked, resume=options.resume, page=page, **watching) as show:

        def look(seen: Look) -> bool:
            show(seen)
            return signals.received is not None

        rest = {
            "source": job.source,
            "steps": job.steps,
            "mesh": options.mesh,
            "members_at_once": options.members_at_once,
            "look": look,
            "checkpoints": saving,
            **_settings_of(options),
        }
        if len(job.groups) == 1:
            result = sweep(*job.groups[0][:2], grid=job.groups[0].grid, **rest)
        else:
            result = sweep_all(job.groups, **rest)
    if job.normalisation is None:
        return result
    return result.finished(lambda one: TrainedSAE(*normalise.fold(one.sae, one.params, job.normalisation)))


def _write(
    result: SweepResult, save: str, about: dict[str, Any], job: Job, found: Stability | None, target: Path
) -> None:
    from sae_jax import report  # a second of matplotlib that only a finished run needs

    result.save(target, save, about)
    if found is not None:
        stability_file.write(target, found)
    report.figures.frontier_png(result, target / "frontier.png")
    (target / "report.html").write_text(
        report.sweep_page(result, about, job.tokens, found, job.truth), encoding="utf-8"
    )


def _about(command: str, options: Training, asked: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What `sweep.json` tells."""
    return {
        "command": _command(),
        "kind": command,
        "data": _told(options),
        **({} if options.world is None else {"world": _world(options)}),
        "members": asked["members"],
        "steps": asked["steps"],
        "seconds": round(seconds, 3),
        "members_per_second": round(asked["members"] / seconds, 3),
        "request": asked,
        "environment": doctor.environment(),
    }


def _command() -> str:
    return shlex.join(["sae-jax", *sys.argv[1:]])


def _name(options: Training) -> str:
    """What a folder is called after."""
    return options.world or ("tokens" if options.data is None else Path(options.data).stem)


def _world(options: Training) -> dict[str, Any]:
    """What makes the world anew: the arguments of `jobs.world`."""
    arguments = list(itertools.chain(*options.world_args))
    return {"name": options.world, "arguments": arguments, "data_seed": options.data_seed}


def _told(options: Training) -> str:
    """The data in words."""
    if options.world is not None:
        return " ".join([f"the world {options.world}", *itertools.chain(*options.world_args)])
    if options.data is None:
        return SEED_TOKENS
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
