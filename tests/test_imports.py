"""What importing costs, and who may know whom (docs/design.md)."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

LEVELS = {
    "base": 1,
    "activations": 2,
    "linear": 2,
    "losses": 2,
    "resampling": 2,
    "initialisation": 2,
    "control": 2,
    "auxk": 2,
    "labels": 2,
    "transforms": 2,
    "metrics": 2,
    "data": 2,
    "synthetic": 2,
    "sharding": 2,
    "selection": 2,
    "distributed": 2,
    "devices": 2,
    "cost": 2,
    "spread": 2,
    "checkpoint": 2,
    "grid": 2,
    "seeds": 2,
    "kernels": 2,
    "segments": 2,
    "sparse": 2,
    "architectures": 3,
    "train": 4,
    "layer_norm": 4,
    "folds": 4,
    "normalise": 4,
    "formats": 4,
    "recipes": 5,
    "plan": 5,
    "benchmark": 5,
    "need": 5,
    "hub": 5,
    "card": 5,
    "trained": 5,
    "result": 5,
    "program": 5,
    "endings": 5,
    "halving": 5,
    "book": 5,
    "cut": 5,
    "chunks": 5,
    "sweep": 5,
    "recording": 5,
    "adapters": 5,
    "target_models": 5,
    "harvest": 5,
    "convert": 5,
    "inspection": 5,
    "language_models": 5,
    "features": 5,
    "verify": 6,
    "report": 6,
    "doctor": 7,
    "cli": 7,
    "__main__": 7,
}
"""The first part of a module's name, and its line in "Who may know whom". It may import lower ones."""

WITHIN_A_LEVEL = {
    ("selection", "sharding"),
    ("activations", "selection"),
    ("activations", "sharding"),
    ("activations", "sparse"),
    ("linear", "sharding"),
    ("segments", "kernels"),
    ("sparse", "segments"),
    ("sparse", "sharding"),
    ("linear", "sparse"),
    ("losses", "sparse"),
    ("auxk", "sparse"),
    ("auxk", "selection"),
    ("losses", "selection"),
    ("control", "selection"),
    ("transforms", "selection"),
    ("data", "sharding"),
    ("spread", "sharding"),
    ("spread", "cost"),
    ("losses", "activations"),
    ("losses", "linear"),
    ("checkpoint", "distributed"),
    ("auxk", "activations"),
    ("control", "activations"),
    ("transforms", "activations"),
    ("resampling", "transforms"),
    ("synthetic", "data"),
    ("seeds", "grid"),
    ("metrics", "seeds"),
    ("folds", "layer_norm"),
    ("normalise", "layer_norm"),
    ("normalise", "folds"),
    ("formats", "layer_norm"),
    ("formats", "folds"),
    ("formats", "normalise"),
    ("card", "hub"),
    ("trained", "hub"),
    ("trained", "card"),
    ("result", "trained"),
    ("sweep", "trained"),
    ("sweep", "result"),
    ("sweep", "program"),
    ("sweep", "endings"),
    ("result", "endings"),
    ("sweep", "halving"),
    ("sweep", "cut"),
    ("sweep", "chunks"),
    ("chunks", "halving"),
    ("chunks", "book"),
    ("chunks", "cut"),
    ("chunks", "program"),
    ("cut", "program"),
    ("book", "endings"),
    ("program", "endings"),
    ("need", "program"),
    ("need", "sweep"),
    ("plan", "need"),
    ("plan", "halving"),
    ("plan", "program"),
    ("plan", "sweep"),
    ("benchmark", "need"),
    ("benchmark", "program"),
    ("benchmark", "sweep"),
    ("recording", "sweep"),
    ("adapters", "trained"),
    ("harvest", "language_models"),
    ("features", "trained"),
    ("target_models", "features"),
    ("cli", "doctor"),
    ("__main__", "cli"),
}
"""(importer, imported) where one level has an order of its own."""

FACE = 5
"""The level of the package itself: what sees `sae_jax.relu` sees everything up to the sweep."""

MAY_IMPORT_TORCH = ("verify", "adapters", "formats.files", "language_models.torch_hooks")
NEVER_AT_THE_TOP = {"torch", "sae_lens", "transformers", "orbax"}


def modules(package: Path) -> dict[str, Path]:
    """Dotted names below the package, the face itself left out."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
    return found


def imports(path: Path):
    """(dotted name, whether importing the module runs it) of everything that a file imports."""
    tree = ast.parse(path.read_text())
    inside = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING")
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) not in inside
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written out, not relative"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", id(node) not in inside


def wrong_edges(found: dict[str, Path], edges) -> list[str]:
    """The edges (importer, imported name) that the levels do not allow, each as a sentence."""
    wrong = []
    for importer, target in edges:
        parts = target.split(".")[1:]
        while parts and ".".join(parts) not in found:
            parts.pop()
        imported = parts[0] if parts else None
        room = importer.split(".")[0]
        if room == imported or (room, imported) in WITHIN_A_LEVEL:
            continue
        level = LEVELS[imported] if imported else FACE
        if level >= LEVELS[room]:
            wrong.append(f"{importer} (level {LEVELS[room]}) imports {target} (level {level})")
    return wrong


def test_every_module_has_a_level(package):
    unknown = {name.split(".")[0] for name in modules(package)} - set(LEVELS)
    assert not unknown, (
        f"{unknown}: add a row to LEVELS in {__file__} and to 'Who may know whom' in docs/design.md"
    )


def test_modules_import_only_what_lies_below_them(package):
    found = modules(package)
    edges = [
        (name, target) for name, path in found.items() for target, _ in imports(path)
        if target.split(".")[0] == "sae_jax"
    ]  # fmt: skip
    assert len(edges) > 20
    assert wrong_edges(found, edges) == []


@pytest.mark.parametrize(
    ("importer", "target"),
    [("base", "sae_jax.losses"), ("losses", "sae_jax.metrics"), ("train", "sae_jax.formats"),
     ("trained", "sae_jax.sweep"), ("result", "sae_jax.sweep.sweep"), ("metrics", "sae_jax.relu"),
     ("formats.saelens", "sae_jax.trained.load")],
)  # fmt: skip
def test_an_edge_upwards_is_seen(package, importer, target):
    assert wrong_edges(modules(package), [(importer, target)])


def test_torch_is_imported_only_where_it_is_needed(package):
    for name, path in modules(package).items():
        for target, at_top in imports(path):
            library = target.split(".")[0]
            assert not (at_top and library in NEVER_AT_THE_TOP), f"{name} imports {library} at its top"
            if library in ("torch", "sae_lens"):
                assert name.startswith(MAY_IMPORT_TORCH), f"{name} imports {library}"


def test_importing_the_package_is_light_and_touches_no_device():
    code = """
import json, sys
import sae_jax
from jax._src import xla_bridge
print(json.dumps([xla_bridge.backends_are_initialized(), [name for name in sys.modules if "." not in name],
                  "orbax.checkpoint" in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    initialised, loaded, orbax = json.loads(done.stdout)
    assert not initialised
    assert not orbax
    assert {"jax", "sae_jax"} <= set(loaded)
    assert not {"torch", "matplotlib", "plotly", "sae_lens", "transformers", "tyro", "huggingface_hub"} & set(
        loaded
    )
