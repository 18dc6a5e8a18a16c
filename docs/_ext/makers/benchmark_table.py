"""`benchmark.inc`: the seed's work on this build's machine, one round of `tests/benchmarks/seed_loop.py`.

It runs when everything else has run. What is slower than the goal fails no build: machines differ.
"""

import datetime
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

SCRIPT = Path(__file__).parents[3] / "tests" / "benchmarks" / "seed_loop.py"
WITHOUT = "The table is missing: this build has no PyTorch."


def digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(told: dict) -> str:
    """What was measured, and on what."""
    on = told["machine"]
    rows = [
        f"| {each['members']:,} | {each['contender']} | {each['warm_up_s']:.2f} "
        f"| {digits(each['ms_per_member'])} ({digits(each['least'])} - {digits(each['most'])}) "
        f"| {digits(each['times_the_loop'])} |"
        for each in told["rows"]
    ]
    today = datetime.datetime.now(datetime.UTC).date()
    about = (
        f"Measured on {today} by the build of this site: {on['processor']}, {on['cores']} cores with a load "
        f"of {on['load_at_start']:.1f} at the start, Python {on['python']}, jax {on['jax']}, torch "
        f"{on['torch']}; one round of three calls."
    )
    head = "| members | contender | first call, s | ms per member | against the loop |"
    return "\n".join([about, "", head, "| --- | --- | --- | --- | --- |", *rows, ""])


def main() -> int:
    """Exit with 1 where there is no table that CI is to have."""
    if find_spec("torch") is None:
        Path("benchmark.inc").write_text(f"*{WITHOUT}*\n")
        print("no PyTorch here: the page says so in place of its table")
        return int(os.environ.get("CI") == "true")
    words = [sys.executable, SCRIPT, "--rounds", "1", "--json", "measured.json"]
    subprocess.run(words, check=False, stdout=sys.stderr)
    Path("benchmark.inc").write_text(table(json.loads(Path("measured.json").read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
