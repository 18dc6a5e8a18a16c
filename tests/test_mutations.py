"""Hostile files for every reader; `python tests/mutations.py` tries a hundred thousand."""

import subprocess
import sys
from pathlib import Path

import pytest

from sae_jax import formats


@pytest.mark.slow
def test_no_damaged_or_hostile_file_does_more_than_be_refused():
    script = Path(__file__).parent / "mutations.py"
    command = [sys.executable, str(script), "--count", "3000", "--seed", "1", "--processes", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "3000 files" in done.stdout
    told = {line.split()[0]: line for line in done.stdout.splitlines()}
    for name in formats.FORMATS:
        refused, loaded = (int(told[name].split()[place]) for place in (2, 4))
        assert min(refused, loaded) > 0, told[name]
