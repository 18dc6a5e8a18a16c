"""What the pages show runs as it stands there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


PAGES = [
    "README.md",
    "docs/tutorial.md",
    "docs/architectures.md",
    "docs/adding_an_architecture.md",
    "docs/target_l0.md",
    "docs/recipes.md",
    "docs/parity.md",
    "docs/metrics.md",
    "docs/many_hosts.md",
    "docs/mesh.md",
    "docs/observability.md",
    "docs/precision.md",
    "docs/worlds.md",
    "docs/superposition.md",
    "docs/undoing_superposition.md",
    "docs/synthsaebench.md",
    "docs/activations.md",
    "docs/formats.md",
]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_every_python_block_runs_after_those_before_it(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert blocks(page)
    names = {}
    for block in blocks(page):
        exec(compile(block, page, "exec"), names)
