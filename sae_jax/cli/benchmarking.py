"""`sae-jax bench`: how fast this machine trains."""

import json
import os
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jax
import tyro
from rich.console import Console

from sae_jax import benchmark
from sae_jax.architectures import find
from sae_jax.base import require
from sae_jax.benchmark import BUSY, Benchmark, Timing, Work, measure
from sae_jax.cli.doctor import environment
from sae_jax.cli.memory import show
from sae_jax.need import told
from sae_jax.program import arguments_of

MaybeSize = Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")]


@dataclass
class Bench:
    """What is timed: four usual works, or with any option of a work that work alone."""

    arch: Annotated[str | None, tyro.conf.arg(metavar="NAMES", help_behavior_hint="")] = None
    """Architectures, with commas between; each is a work. Default: relu."""
    d_in: MaybeSize = None
    """Width of the rows, which are drawn from a standard normal distribution. Default: 512."""
    d_sae: MaybeSize = None
    """Number of latents. Default: 4 * d_in."""
    batch_size: MaybeSize = None
    """Rows per step. Default: 1024."""
    members: MaybeSize = None
    """How many train side by side; they differ by seed. Default: 1."""
    k: MaybeSize = None
    """Active latents per row of topk, batch_topk and matryoshka. Default: 32, or d_sae if that is less."""
    precision: Annotated[
        Literal["bfloat16", "tensorfloat32", "highest"] | None, tyro.conf.arg(help_behavior_hint="")
    ] = None
    """To what factors of matrix products are rounded. Default: what JAX does on the device."""
    seconds: Annotated[float, tyro.conf.arg(metavar="S")] = benchmark.SECONDS
    """Of timed training in all; compiling, the peak, and what starts a repetition come on top."""
    as_json: Annotated[
        bool, tyro.conf.arg(name="json", help="print JSON, with the seconds of every repetition")
    ] = False


def run(options: Bench) -> int:
    """Measure, print a column per work, and say so where the machine was busy."""
    with Console(stderr=True).status("drawing rows") as status:
        found = measure(
            _works(options), seconds=options.seconds, precision=options.precision, tell=status.update
        )
    if options.as_json:
        print(json.dumps(_plain(found, options.precision), indent=2))
    else:
        _show(Console(), found, options.precision)
    return 0


def _works(options: Bench) -> tuple[Work, ...]:
    """The usual works, or those that the options describe."""
    own = (options.arch, options.d_in, options.d_sae, options.batch_size, options.members, options.k)
    if all(option is None for option in own):
        return benchmark.usual()
    names = (options.arch or "relu").split(",")
    require(len(set(names)) == len(names), f"--arch names an architecture twice: {options.arch}")
    taken = any("k" in arguments_of(find(name)) for name in names)
    require(
        options.k is None or taken, f"--k is for topk, batch_topk and matryoshka, not for {','.join(names)}"
    )
    d_in = _or(options.d_in, 512)
    sizes = (d_in, _or(options.d_sae, 4 * d_in), _or(options.batch_size, 1024), _or(options.members, 1))
    return tuple(benchmark.work(name, *sizes, k=options.k) for name in names)


def _or(option: int | None, default: int) -> int:
    return default if option is None else option


def _show(console: Console, found: Benchmark, precision: str | None) -> None:
    show(console, [_rows_of(timing, found.peak) for timing in found.timings])
    device = jax.local_devices()[0]
    lines = [
        f"one {device.device_kind} device of {len(jax.local_devices())}, {os.cpu_count()} processors, "
        f"jax {jax.__version__}, float32, precision {precision or 'as JAX has it'}",
        f"peak: {found.peak:.3g} FLOP/s, the best of some matrix products before the first round",
        *busy(found),
    ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def busy(found: Benchmark) -> list[str]:
    """A sentence where repetitions differ by more than a machine does that has nothing else to do."""
    named = ", ".join(f"{timing.name} by {timing.spread:.0%}" for timing in found.unsteady)
    sentence = (
        "this machine was busy, and these figures are not to be relied on: repetitions spread over more than "
        f"{BUSY:.0%} of their median, {named}"
    )
    return [sentence] if named else []


def _rows_of(timing: Timing, peak: float) -> dict[str, str]:
    return {
        "architecture": timing.architecture,
        "d_in": f"{timing.d_in:,}",
        "d_sae": f"{timing.d_sae:,}",
        "batch size": f"{timing.batch_size:,}",
        "members": f"{timing.members:,}",
        "ms a step": _figure(1e3 * timing.median),
        "  spread": f"{timing.spread:.1%}",
        "  repetitions": f"{len(timing.seconds)} of {timing.steps:,} steps",
        "rows/s": _figure(timing.rows_per_second),
        "member steps/s": _figure(timing.member_steps_per_second),
        "share of the peak": f"{timing.flops_per_second / peak:.1%}",
        "first step, compiled": f"{timing.first_step:.3g} s",
        "memory, by arithmetic": told(timing.memory),
    }


def _figure(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 1000 else f"{rate:.3g}"


def _plain(found: Benchmark, precision: str | None) -> dict[str, Any]:
    works = [
        {
            "architecture": timing.architecture,
            "d_in": timing.d_in,
            "d_sae": timing.d_sae,
            "batch_size": timing.batch_size,
            "members": timing.members,
            "seconds_per_step": timing.median,
            "spread": timing.spread,
            "rows_per_second": timing.rows_per_second,
            "member_steps_per_second": timing.member_steps_per_second,
            "flops_per_step": timing.flops,
            "share_of_peak": timing.flops_per_second / found.peak,
            "first_step_seconds": timing.first_step,
            "memory_by_arithmetic": timing.memory,
            "steps_per_repetition": timing.steps,
            "repetitions": list(timing.seconds),
        }
        for timing in found.timings
    ]
    about = {"environment": environment() | {"processors": os.cpu_count()}, "precision": precision}
    return {**about, "peak": found.peak, "busy": bool(found.unsteady), "works": works}
