"""`sae-jax plan`: what a sweep will take, before it starts."""

import json
import math
from dataclasses import dataclass, field
from typing import Annotated, Any

import jax
import tyro
from rich.console import Console

from sae_jax import devices
from sae_jax.base import require
from sae_jax.cli.jobs import prepare
from sae_jax.cli.memory import rows_of, show
from sae_jax.cli.options import Training
from sae_jax.need import told
from sae_jax.plan import Plan, Work, plan
from sae_jax.sharding import AXES, parse


@dataclass
class Planning:
    """What would be trained, and on what."""

    training: tyro.conf.OmitArgPrefixes[Training] = field(default_factory=Training)
    device: Annotated[str, tyro.conf.arg(metavar="NAME")] = devices.HERE
    """here, which is measured, or a kind by its data sheet: h100-sxm, h100-pcie, h200, a100-40, a100-80, l4,
    rtx-4090, tpu-v4, tpu-v5e, tpu-v5p, tpu-v6e."""
    devices: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")] = None
    """How many of them, to choose a mesh over. Default: those of --mesh, with auto those here, else 1."""


def run(options: Planning) -> int:
    """Plan, and print a column per group."""
    asked = options.training
    apart = asked.site is not None and "," in asked.site and "crosscoder" not in asked.arch.split(",")
    require(not apart, "each site of several is a sweep of its own: plan one at a time")
    job, axes = prepare(asked), _axes(asked.mesh)
    with Console(stderr=True, quiet=asked.quiet).status("counting"):
        found = plan(
            job.groups, source=job.source, steps=job.steps, precision=asked.precision, on=options.device,
            devices=_count(options, axes), axes=axes, members_at_once=asked.members_at_once,
            keep_best=asked.keep_best,
        )  # fmt: skip
    if asked.as_json:
        print(json.dumps(_plain(found), indent=2))
    else:
        _show(Console(), found)
    return 0


def _axes(text: str | None) -> dict[str, int] | None:
    """The mesh that was asked for; None where it is to be chosen."""
    if text in (None, "auto"):
        return None
    sizes = dict.fromkeys(AXES, 1) | parse(str(text))
    good = len(sizes) == len(AXES) and min(sizes.values()) >= 1
    require(good, f"a mesh has the axes {', '.join(AXES)}, each at least 1, got {text}")
    return sizes


def _count(options: Planning, axes: dict[str, int] | None) -> int:
    """How many devices there are to spread over."""
    if axes is not None:
        count = math.prod(axes.values())
        require(
            options.devices in (None, count), f"the mesh has {count} devices, got --devices {options.devices}"
        )
        return count
    here = options.training.mesh == "auto" and options.device == devices.HERE
    return options.devices or (jax.device_count() if here else 1)


def _show(console: Console, found: Plan) -> None:
    each = zip(found.needs, found.work, found.seconds, strict=True)
    show(
        console,
        [
            rows_of(need) | _rows_of(work) | {f"{found.steps:,} steps": _time(seconds)}
            for need, work, seconds in each
        ],
    )
    kind = found.device
    source = "measured" if kind.name == devices.HERE else "by the data sheet"
    for line in (
        f"{found.devices} x {kind.name}, {source}: {found.rate:.3g} FLOP/s, {told(kind.bandwidth)}/s, "
        f"{told(kind.memory)}",
        *dict.fromkeys(work.counted for work in found.work),
        f"{_time(sum(found.seconds))} in all; not counted: compiling, starting kernels, evaluating, and what "
        "devices tell one another",
    ):
        console.print(line, highlight=False, soft_wrap=True)


def _rows_of(work: Work) -> dict[str, str]:
    beside = {} if work.temporary is None else {"  beside the state, by XLA": told(work.temporary)}
    return beside | {
        "a step on a device:": "",
        "  FLOPs": f"{work.flops:.3g}",
        "  bytes moved": told(work.moved),
        "  limit by compute": _time(work.compute),
        "  limit by memory": _time(work.memory),
        "  bound by": work.bound,
        "  expected": _time(work.seconds),
    }


def _plain(found: Plan) -> dict[str, Any]:
    groups = [
        {
            **need._asdict(),
            "one": {**need.one._asdict(), "total": need.one.total},
            "chunks": need.chunks,
            "taken": need.taken,
            **work._asdict(),
            "bound": work.bound,
            "seconds_per_step": work.seconds,
            "seconds": seconds,
        }
        for need, work, seconds in zip(found.needs, found.work, found.seconds, strict=True)
    ]
    machine = {"name": found.device.name, "memory": found.device.memory, "bandwidth": found.device.bandwidth}
    about = {"device": machine | {"flops": found.rate}, "devices": found.devices, "steps": found.steps}
    return {**about, "seconds": sum(found.seconds), "groups": groups}


def _time(seconds: float) -> str:
    """Three figures and a unit."""
    units = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"), (1e-6, "us"))
    size, unit = next((pair for pair in units if seconds >= pair[0]), (1e-9, "ns"))
    return f"{seconds / size:.3g} {unit}"
