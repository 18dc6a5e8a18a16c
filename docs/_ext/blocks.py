"""The code that stands on a page, and which of it runs.

Every `python` block of a page runs, after those before it and in one namespace; so does every line of a
`bash` or `console` block that begins with `sae-jax`, between them, in the same folder. A block that stands
inside an HTML comment runs and is not shown. A comment before a block says what else is done with it:

    <!-- not run: asks the hub -->      (or % not run: asks the hub)
    <!-- file: mine.py -->
"""

import re
import textwrap
from typing import NamedTuple

SHELLS = ("bash", "console")
STEPS = 20
"""Of a training command of a page: enough to see that it runs."""

FENCE = re.compile(r"^( *)(`{3,})(.*)$")
NOT_RUN = re.compile(r"^ *(% not run: \S.*|<!-- not run: \S.* -->)$")
FILE = re.compile(r"^ *<!-- file: (\S+) -->$")


class Block(NamedTuple):
    """A fenced block of code that runs, or that is written to a file."""

    line: int
    """Of the page, where its code begins."""
    language: str
    code: str
    file: str | None = None


class Command(NamedTuple):
    """A line of a shell block, those that it is continued on with it."""

    line: int
    text: str


def blocks(text: str) -> list[Block]:
    """The blocks of a page of Markdown, in their order, without those that say that they are not run."""
    found, opened, before = [], None, ""
    for number, line in enumerate(text.split("\n"), 1):
        if opened is None and (fence := FENCE.match(line)):
            opened, inside = fence, []
            begins, skipped, file = number + 1, NOT_RUN.match(before), FILE.match(before)
        elif opened is not None and line.strip() == opened[2]:
            language, code = opened[3].strip(), textwrap.dedent("\n".join(inside)) + "\n"
            if file or (not skipped and language in ("python", *SHELLS)):
                found.append(Block(begins, language, code, file and file[1]))
            opened = None
        elif opened is not None:
            inside.append(line)
        before = line if line.strip() else before
    return found


def commands(block: Block) -> list[Command]:
    """The commands of a shell block, without their prompts."""
    if block.language not in SHELLS or block.file:
        return []
    found, words = [], ""
    for number, line in enumerate(block.code.split("\n"), block.line):
        begins = begins if words else number
        words += re.sub(r"^\$ ", "", line)
        if words.endswith("\\"):
            words = words[:-1]
            continue
        found.append(Command(begins, words))
        words = ""
    return [command for command in found if command.text.strip()]


def runs(command: Command) -> bool:
    """Whether a page's command is run where it stands: those of this package are."""
    return command.text.startswith("sae-jax ")


def shortened(text: str) -> str:
    """A command as it stands, but that one which trains stops after `STEPS` steps."""
    trains = re.match(r"sae-jax (sweep|train)\b", text)
    if not trains:
        return text
    rest = re.sub(r"--steps[ =]\S+", "", text[trains.end() :])
    return f"{trains[0]} --steps {STEPS}{rest}"
