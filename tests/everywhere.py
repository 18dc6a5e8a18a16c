"""Train every architecture over meshes and processes, and hold the losses against those of one device.

    python tests/everywhere.py                    all of it: 1 device, 8 in four meshes, 2 and 4 processes
    python tests/everywhere.py --only latent=8    one place

Prints the largest relative difference of a loss, and exits 1 where one passes its bound. Every place
is a process, or several over loopback, of its own: how many devices there are is settled when JAX starts.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

STEPS, MEMBERS, BATCH = 200, 8, 16
BOUNDS = {"float32": 1e-6, "float64": 1e-10}


class Place(NamedTuple):
    """Where to train."""

    mesh: str | None
    processes: int = 1
    devices: int = 8
    """Of each process."""

    @property
    def name(self) -> str:
        return f"{self.processes} x {self.devices}: {self.mesh or 'one device'}"


ALONE = Place(None, devices=1)
PLACES = (
    Place("member=8"),
    Place("data=8"),
    Place("latent=8"),
    Place("member=2,data=2,latent=2"),
    Place("member=2", processes=2, devices=1),
    Place("data=2", processes=2, devices=1),
    Place("latent=2", processes=2, devices=1),
    Place("member=2,data=2", processes=2, devices=2),
    Place("member=2,data=2,latent=2", processes=4, devices=2),
)


def losses(place: Place, folder: Path, cases: str, dtypes: str) -> dict[str, np.ndarray]:
    """Every loss of every member, by case and dtype, as the first process of a place has them."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    out = folder / f"{place.name.replace(' ', '')}.npz"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={place.devices}"
    command = [sys.executable, __file__, "--train", str(out), "--cases", cases, "--dtypes", dtypes]
    running = [
        subprocess.Popen(
            [
                *command,
                "--mesh",
                place.mesh or "",
                "--at",
                f"127.0.0.1:{port}",
                str(place.processes),
                str(process),
            ],
            env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        )
        for process in range(place.processes)
    ]
    codes = [process.wait() for process in running]
    if any(codes):
        raise SystemExit(f"{place.name}: exit statuses {codes}")
    return dict(np.load(out))


def differences(
    place: Place, reference: dict[str, np.ndarray], folder: Path, cases: str, dtypes: str
) -> dict[str, float]:
    """By case and dtype the largest relative difference of a loss."""
    found = losses(place, folder, cases, dtypes)
    return {name: float(np.abs(found[name] / reference[name] - 1).max()) for name in reference}


def train(out: str, mesh: str, at: list[str], cases: str, dtypes: str) -> None:
    """What each process of a place does."""
    import jax

    jax.config.update("jax_enable_x64", True)
    from cases import THOROUGH

    import sae_jax
    from sae_jax import distributed

    coordinator, processes, process = at[0], int(at[1]), int(at[2])
    with distributed.together(coordinator, processes, process):
        found = {}
        rows = np.random.default_rng(0).normal(size=(48, 5))
        for case in THOROUGH:
            for dtype in dtypes.split(","):
                if cases and case.name not in cases.split(","):
                    continue
                x, y = case.data(rows)
                x, y = (None if each is None else each.astype(dtype) for each in (x, y))
                axes = {case.axis: [case.values[i % len(case.values)] for i in range(MEMBERS)]}
                result = sae_jax.sweep(
                    case.sized(8),
                    case.optimizer,
                    grid=sae_jax.zipped(**axes, lr=[1e-3, 3e-3] * (MEMBERS // 2), seed=range(MEMBERS)),
                    source=sae_jax.in_memory(x, BATCH, 1, y=y),
                    steps=STEPS,
                    dtype=dtype,
                    mesh=mesh or None,
                    points=STEPS,
                )
                assert (result.status == "ok").all()
                found[f"{case.name} {dtype}"] = result.history["loss"]
        if process == 0:
            np.savez(out, **found)


def main() -> int:
    """Compare, tell, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="part of a place's name")
    parser.add_argument("--cases", default="", help="names, with commas between")
    parser.add_argument("--dtypes", default=",".join(BOUNDS))
    parser.add_argument("--train", help=argparse.SUPPRESS)
    parser.add_argument("--mesh", default="", help=argparse.SUPPRESS)
    parser.add_argument("--at", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.train:
        train(given.train, given.mesh, given.at, given.cases, given.dtypes)
        return 0
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        reference = losses(ALONE, Path(folder), given.cases, given.dtypes)
        for place in PLACES:
            if given.only and given.only not in place.name:
                continue
            found = differences(place, reference, Path(folder), given.cases, given.dtypes)
            for dtype in given.dtypes.split(","):
                by_case = {name.split()[0]: value for name, value in found.items() if name.endswith(dtype)}
                worst = max(by_case, key=by_case.__getitem__)
                over = [name for name, value in by_case.items() if not value <= BOUNDS[dtype]]
                wrong += len(over)
                told = f"  over {BOUNDS[dtype]:g}: {', '.join(over)}" if over else ""
                print(f"{place.name:45} {dtype}  {by_case[worst]:.1e} ({worst}){told}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
