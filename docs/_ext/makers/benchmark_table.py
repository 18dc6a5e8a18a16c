"""`benchmark.inc`: the seed's work on this build's machine, one round of `tests/benchmarks/peers.py`.

It runs when everything else has run. A goal that is missed fails no build: machines differ. Contenders that
do not do the same work fail it.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

SCRIPT = Path(__file__).parents[3] / "tests" / "benchmarks" / "peers.py"
WITHOUT = "The table is missing: this build has no PyTorch."


def main() -> int:
    """Exit with what the benchmark exits with; with 1 where there is no table that CI is to have."""
    if find_spec("torch") is None:
        Path("benchmark.inc").write_text(f"*{WITHOUT}*\n")
        print("no PyTorch here: the page says so in place of its table")
        return int(os.environ.get("CI") == "true")
    measured = Path("measured.json")
    words = [sys.executable, SCRIPT, "--works", "seed", "--rounds", "1", "--json", measured]
    done = subprocess.run(words, check=False, stdout=sys.stderr)
    if measured.exists():
        Path("benchmark.inc").write_text(json.loads(measured.read_text())["markdown"])
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
