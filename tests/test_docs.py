"""What the README and the tutorial show runs as it stands there."""

import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md"])
def test_every_python_block_runs_after_those_before_it(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("acts.npy", np.random.default_rng(0).normal(size=(100, 8)).astype(np.float32))
    assert blocks(page)
    names = {"network": type("Network", (), {})()}
    for block in blocks(page):
        exec(compile(block, page, "exec"), names)
    assert (tmp_path / "sae" / "cfg.json").exists()
