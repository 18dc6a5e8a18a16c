"""The table of parity with PyTorch, from a run of `sae-jax verify --all` in this build: `parity.inc`.

A breach ends in an error, so that the build fails.
"""

import datetime
import json
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

STAGES = ("forward", "loss", "gradients", "trained")
WITHOUT = "The table is missing: this build has no PyTorch."


def table(reports: list[dict]) -> str:
    """A row for each case and dtype."""
    rows = [
        " | ".join([each["case"], each["dtype"], *(f"{each['worst'][name]:.1e}" for name in STAGES)])
        for each in reports
    ]
    head = "case | dtype | forward | loss | gradients | after 500 steps"
    return "\n".join(f"| {row} |" for row in [head, " | ".join(["---"] * 6), *rows])


def main() -> int:
    """Exit with what `verify` exits with."""
    if find_spec("torch") is None:
        Path("parity.inc").write_text(f"*{WITHOUT}*\n")
        print("no PyTorch here: the page says so in place of its table")
        return int(os.environ.get("CI") == "true")
    done = subprocess.run(["sae-jax", "verify", "--all", "--json"], stdout=subprocess.PIPE, text=True)
    told = json.loads(done.stdout)
    today = datetime.datetime.now(datetime.UTC).date()
    versions = f"jax {version('jax')} and torch {version('torch')}"
    about = f"Made by the build of this site on {today} with {versions}, on a CPU:"
    Path("parity.inc").write_text(f"{about}\n\n{table(told['reports'])}\n")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
