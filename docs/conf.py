"""Sphinx configuration: Markdown pages and a notebook by MyST, API pages from docstrings; all code runs."""

import sys
from pathlib import Path

import sae_jax

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "sae_jax"
author = "The sae_jax authors"
copyright = "2026, the sae_jax authors"
version = release = sae_jax.__version__

extensions = [
    "executed",
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx.ext.mathjax",
]
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "_ext"]
nb_execution_in_temp = True
nb_execution_timeout = 300

# the same code at a size that a build has time for
executed_examples = {
    "01_seed_tokens.py": "--out .",
    "02_five_neurons.py": "--out .",
    "03_two_neurons.py": "--out .",
    "04_superposition_geometry.py": "--steps 100 --out .",
    "05_sharkey.py": "--widths 64 128 --steps 100 --out .",
    "06_hedging.py": "--k 9 11 --seeds 1 --steps 100 --out .",
    "07_synthsaebench.py": "--steps 50 --rows 4096 --out .",
    "08_one_layer_lm.py": "--quick --out .",
    "09_architectures.py": "--steps 100 --out .",
    "10_dead_latents.py": "",
    "11_every_format.py": "--out .",
}

html_theme = "sphinx_book_theme"
html_title = "sae_jax"
html_theme_options = {"show_toc_level": 2}

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # shapes stand in the text; jaxtyping's forms would bury the signatures
napoleon_google_docstring = True
napoleon_numpy_docstring = False


def formulas_are_literal(app, what, name, obj, options, lines):
    """Docstrings are written to be read in a terminal: make their indented formulas literal blocks."""
    plain = [line.replace("|", r"\|") for line in lines]
    for i in range(1, len(lines)):
        if lines[i].startswith("    ") and not lines[i - 1].strip():
            block = next((j for j in range(i, len(lines)) if not lines[j].startswith("    ")), len(lines))
            plain[i:block] = lines[i:block]
            plain[i - 1] = "\n::\n"
    lines[:] = "\n".join(plain).split("\n")


def setup(app):
    """Before napoleon, which comes at 500, turns sections into fields."""
    app.connect("autodoc-process-docstring", formulas_are_literal, priority=400)


napoleon_custom_sections = [("Source", "notes_style")]
