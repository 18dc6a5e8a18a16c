"""Runs what stands on one page, in the working directory: `python page.py PAGE.md FOUND.json`.

A process of its own for each page: what one page sets or compiles reaches no other.
"""

import json
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

from blocks import Block, blocks, commands, runs, shortened

LONGEST = 600  # seconds of a command


class PageError(Exception):
    """A line of the page, and what it said."""


def in_shell(block: Block) -> None:
    """Run the commands of a shell block, each in a shell of its own.

    Raises:
      PageError: a command exits with another status than 0.
    """
    for command in filter(runs, commands(block)):
        words = ["bash", "-c", shortened(command.text)]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=LONGEST)
        except subprocess.TimeoutExpired:
            raise PageError(command.line, f"{command.text}\nnot done after {LONGEST} seconds") from None
        if done.returncode:
            raise PageError(command.line, f"{command.text}\n{(done.stdout + done.stderr)[-2000:]}")


def in_python(block: Block, page: Path, names: dict[str, Any]) -> None:
    """Run a Python block in the namespace of its page.

    Raises:
      PageError: it raises.
    """
    at_its_line = "\n" * (block.line - 1) + block.code
    try:
        exec(compile(at_its_line, str(page), "exec"), names)
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(page)]
        if not lines:  # it does not even compile
            lines = [getattr(error, "lineno", block.line)]
        said = "".join(traceback.format_exception(error)[-4:])
        raise PageError(lines[-1], said) from error


def run(page: Path) -> dict[str, Any]:
    """Run a page up to the first block that fails.

    Returns:
      How many blocks ran, and `failed`: line and words, or None.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    ran = 0
    for block in blocks(page.read_text(encoding="utf-8")):
        try:
            if block.file:
                Path(block.file).write_text(block.code, encoding="utf-8")
            elif block.language == "python":
                in_python(block, page, names)
            else:
                in_shell(block)
        except PageError as failure:
            return {"blocks": ran, "failed": failure.args}
        ran += 1
    return {"blocks": ran, "failed": None}


if __name__ == "__main__":
    sys.path.insert(0, "")  # a block imports what stands in its folder
    Path(sys.argv[2]).write_text(json.dumps(run(Path(sys.argv[1]))), encoding="utf-8")
