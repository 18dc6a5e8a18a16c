"""A sweep is the same over devices and processes. These tests start processes of their own, for how many
devices a CPU is cannot be changed in one that runs."""

import os
import subprocess
import sys
from pathlib import Path

import everywhere
import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
def test_on_eight_devices():
    """Every test of eight_devices.py."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
    ran = subprocess.run(
        [*command, HERE / "eight_devices.py"],
        capture_output=True, text=True, check=False, cwd=HERE, env={**os.environ, "XLA_FLAGS": flags},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-10_000:] + ran.stderr[-2_000:]


SOME = "topk-saelens,batch-topk"
"""Of the architectures; `python tests/everywhere.py` has them all, in every place."""


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    return everywhere.losses(everywhere.ALONE, tmp_path_factory.mktemp("alone"), SOME, "float64")


@pytest.mark.slow
@pytest.mark.parametrize(
    "place",
    [place for place in everywhere.PLACES if place.mesh in ("member=2,data=2,latent=2", "data=2")],
    ids=lambda place: place.name,
)
def test_losses_are_the_same_everywhere(place, one_device, tmp_path):
    found = everywhere.differences(place, one_device, tmp_path, SOME, "float64")
    assert len(found) == 2
    assert max(found.values()) <= everywhere.BOUNDS["float64"], found
