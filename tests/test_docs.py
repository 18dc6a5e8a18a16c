"""The build of the site runs what its pages show, and tells where it does not.

That the pages themselves run is seen by `sphinx-build -W docs`, which .ci/run does.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXTENSIONS = Path(__file__).parent.parent / "docs" / "_ext"
sys.path.append(str(EXTENSIONS))

from blocks import Command, blocks, commands, runs, shortened  # noqa: E402

PAGE = """\
# A page

```python
x = 2
```

<!-- not run: it has no end -->
```python
while True: pass
```

<!--
```python
assert x == 2  # not shown
```
-->

<!-- file: mine.txt -->
```text
kept
```

1. In a list:

   ```console
   $ sae-jax doctor \\
       --json
   pip install nothing
   ```

````markdown
```python
shown, not run
```
````
"""


def test_blocks_are_those_that_run_with_their_lines():
    found = [(each.line, each.language, each.code.split("\n")[0], each.file) for each in blocks(PAGE)]
    assert found == [
        (4, "python", "x = 2", None),
        (14, "python", "assert x == 2  # not shown", None),
        (20, "text", "kept", "mine.txt"),
        (26, "console", "$ sae-jax doctor \\", None),
    ]


def test_commands_are_whole_lines_without_prompts_and_only_ours_run():
    found = commands(blocks(PAGE)[-1])
    assert found == [Command(26, "sae-jax doctor     --json"), Command(28, "pip install nothing")]
    assert list(map(runs, found)) == [True, False]


def test_a_reason_is_wanted_for_what_does_not_run():
    assert len(blocks("<!-- not run: -->\n```python\n1\n```\n")) == 1
    assert len(blocks("% not run: no network\n```python\n1\n```\n")) == 0


@pytest.mark.parametrize(
    ("said", "done"),
    [
        ("sae-jax sweep", "sae-jax sweep --steps 20"),
        ("sae-jax sweep a.npy --steps 20000 --l0 4", "sae-jax sweep --steps 20 a.npy  --l0 4"),
        ("sae-jax train a.npy --steps=9  # less", "sae-jax train --steps 20 a.npy   # less"),
        ("sae-jax verify --steps 100", "sae-jax verify --steps 100"),
    ],
)
def test_training_is_cut_to_few_steps_and_nothing_else_is_changed(said, done):
    assert shortened(said) == done


def run_page(folder, text):
    """What `page.py` finds of a page in that folder."""
    (folder / "page.md").write_text(text)
    words = [sys.executable, str(EXTENSIONS / "page.py"), "page.md", "found.json"]
    subprocess.run(words, cwd=folder, check=True, capture_output=True)
    return json.loads((folder / "found.json").read_text())


def test_python_blocks_share_names_and_files(tmp_path):
    text = (
        "```python\nx = 1\n```\n<!-- file: mine.py -->\n```python\ny = 2\n```\n"
        "```python\nfrom mine import y\nassert x + y == 3\n```\n"
    )
    assert run_page(tmp_path, text) == {"blocks": 3, "failed": None}


@pytest.mark.parametrize(
    ("text", "line", "told"),
    [
        ("\n```python\nx = 1\n\nx / 0\n```\n", 5, "ZeroDivisionError"),
        ("```python\ndef f():\n    return g\n```\n\n```python\nx = 1\nf()\n```\n", 3, "NameError"),
        ("\n\n```python\nx = = 1\n```\n", 4, "SyntaxError"),
        ("```python\nexit(3)\n```\n", 2, "SystemExit"),
        ("```bash\necho\nsae-jax nonsense\n```\n", 3, "nonsense"),
    ],
)
def test_a_failure_is_told_with_its_line(tmp_path, text, line, told):
    found = run_page(tmp_path, text)["failed"]
    assert found[0] == line
    assert told in found[1]


@pytest.fixture
def site(tmp_path):
    """Builds a small site as docs/ is built: `site(pages, examples, rows of conf.py) -> status, words`."""
    pytest.importorskip("sphinx", reason="the extra docs is not installed")
    docs = tmp_path / "docs"
    docs.mkdir()

    def build(pages, examples=(), **rows):
        conf = f"import sys\nsys.path.insert(0, {str(EXTENSIONS)!r})\nextensions = ['executed', 'myst_nb']\n"
        settings = {"exclude_patterns": ["_build"], "nb_execution_in_temp": True, **rows}
        (docs / "conf.py").write_text(conf + "".join(f"{name} = {row!r}\n" for name, row in settings.items()))
        for name, text in pages.items():
            (docs / name).write_text(text)
        (tmp_path / "examples").mkdir(exist_ok=True)
        for name, text in dict(examples).items():
            (tmp_path / "examples" / name).write_text(text)
        words = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-b", "html", "docs", "out"]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    return build


@pytest.mark.slow
def test_a_page_that_fails_fails_the_build_and_says_where(site, tmp_path):
    page = "# Title\n\n```python\nopen('shown.png', 'w').close()\n```\n\n```bash\nsae-jax nonsense\n```\n"
    status, said = site({"index.md": page})
    assert status == 1
    assert f"{tmp_path / 'docs' / 'index.md'}:8: WARNING: does not run: sae-jax nonsense" in said
    assert (tmp_path / "docs" / "generated" / "index" / "shown.png").exists()


@pytest.mark.slow
def test_examples_run_with_their_arguments_and_each_needs_a_row(site, tmp_path):
    shows = "import sys\nopen(sys.argv[1], 'w').close()\n"
    examples = {"01_a.py": shows, "02_b.py": "raise ValueError('of b')\n", "03_c.py": ""}
    index = "# Title\n\n```bash\npython examples/01_a.py\npython examples/04_d.py\n```\n"
    status, said = site({"index.md": index}, examples, executed_examples={"01_a.py": "a.png", "02_b.py": ""})
    assert status == 1
    assert "ValueError: of b" in said
    assert "03_c.py and executed_examples of conf.py: only one of them knows it" in said
    assert "index.md:5: WARNING: there is no examples/04_d.py" in said
    assert (tmp_path / "docs" / "generated" / "01_a" / "a.png").exists()
