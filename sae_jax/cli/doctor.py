"""`sae-jax doctor`: is this machine fit to compute on?"""

import importlib.metadata
import json
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from sae_jax.cli import compilation_cache

KNOWN_BAD = {
    "0.10.2": "computes wrong sums on CPU, silently (jax issue 39103)",
    "0.11.0": "has a scatter-add hundreds of times too slow on GPU (jax issue 38806)",
}
PACKAGES = (
    "sae-jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "safetensors",
    "numpy",
    "torch",
    "sae-lens",
)


class Check(NamedTuple):
    """One thing looked at: its name, what was found, and whether that is well."""

    name: str
    found: str
    ok: bool


def version_of(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, str]:
    """Versions and device, as `sweep.json` records them."""
    device = jax.local_devices()[0]
    versions = {package: version for package in PACKAGES if (version := version_of(package))}
    return {
        "python": platform.python_version(),
        **versions,
        "device": f"{len(jax.local_devices())} x {device.platform} ({device.device_kind})",
        "system": platform.platform(),
    }


def known_bad() -> str | None:
    """What is wrong with the installed jaxlib, if it is one of the builds known to be broken."""
    version = version_of("jaxlib") or ""
    reason = KNOWN_BAD.get(version)
    return f"jaxlib {version} {reason}: pip install 'jaxlib!={version}'" if reason else None


def exact_sums() -> bool:
    """Whether a vmapped matrix-vector product and the reduction after it come out exact on whole numbers.

    jaxlib 0.10.2 takes some rows twice and leaves others out once there are more than 2^15 of them.
    """
    count = 40_000
    rows = np.zeros((count, 3), np.float32)
    rows[:, 0] = np.arange(count) % 4096
    sums = jax.jit(jax.vmap(lambda row: jnp.square(jnp.eye(3) @ row).sum()))(rows)
    return bool((np.asarray(sums) == rows[:, 0] ** 2).all())


def checks() -> Iterator[Check]:
    """Everything that the doctor looks at."""
    yield Check("python", platform.python_version(), True)
    for package in PACKAGES:
        version = version_of(package)
        optional = package in ("torch", "sae-lens")
        yield Check(
            package,
            version or ("not installed (optional)" if optional else "missing"),
            optional or bool(version),
        )
    yield Check("known faults", known_bad() or "none in this jaxlib", known_bad() is None)
    for device in jax.local_devices():
        yield Check("device", f"{device.platform} {device.device_kind}", True)
    yield Check("compiled programs", compilation_cache.told(), True)
    exact = exact_sums()
    yield Check(
        "numeric probe", "exact" if exact else "WRONG: this jaxlib cannot be trusted with sums", exact
    )


@dataclass
class Doctor:
    """Versions, devices, builds known to be broken, and a numeric probe; exit 1 if something is wrong."""

    as_json: Annotated[bool, tyro.conf.arg(name="json", help="print JSON")] = False


def run(options: Doctor) -> int:
    """Look, tell, and return the exit status."""
    found = list(checks())
    if options.as_json:
        print(json.dumps([check._asdict() for check in found], indent=2))
    else:
        table = Table("what", "found", "")
        for check in found:
            table.add_row(check.name, check.found, "[green]ok[/]" if check.ok else "[bold red]wrong[/]")
        Console().print(table)
    return 0 if all(check.ok for check in found) else 1
