"""A dashboard of 16,384 features over 2 million tokens: its time, its memory, and how quick its pages are.

    python tests/many_features.py [--out FOLDER] [--features 16384] [--rows 2000000] [--d-in 512]

Makes a store of activations (each token a fixed sum of 24 directions, and noise) and a JumpReLU SAE whose
decoder rows are those directions, runs `sae-jax features` on them as a process of its own, and opens what it
wrote in Chromium. Prints seconds, the largest resident memory of that process, the size of the folder, the
first paint, and the slowest of forty features opened, the first time and again.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

import sae_jax

CONTEXT, WORDS, ACTIVE = 128, 5000, 24


def made(out: Path, rows: int, d_in: int, d_sae: int) -> tuple[Path, Path]:
    """The store and the SAE, or those that are there."""
    store, trained = out / "store", out / "sae"
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(d_sae, d_in)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    if not (trained / "cfg.json").exists():
        sae = sae_jax.jumprelu(d_in, d_sae)
        params = dict(sae.init(jax.random.key(0)))
        params |= {"W_enc": directions.T, "W_dec": directions}
        params["threshold"] = np.full_like(params["threshold"], 0.75)
        sae_jax.TrainedSAE(sae, jax.tree.map(jax.numpy.asarray, params)).save(trained)
    if not (store / "manifest.json").exists():
        # a word's features, the commoner the more often
        which = np.minimum(rng.zipf(1.2, (WORDS, ACTIVE)) - 1 + rng.integers(0, d_sae, (WORDS, 1)), d_sae - 1)
        strengths = rng.uniform(1, 3, (WORDS, ACTIVE, 1)).astype(np.float32)
        table = (directions[which] * strengths).sum(axis=1)
        tokens = np.minimum(rng.zipf(1.3, (rows // CONTEXT, CONTEXT)), WORDS) - 1

        def activations(batch):
            return {"site": table[batch] + 0.05 * rng.standard_normal((*batch.shape, d_in), np.float32)}

        sae_jax.harvest(activations, sae_jax.language_models.from_tokens(tokens, 64), store)
    return store, trained


def looked_at(store: Path, trained: Path, out: Path) -> None:
    """Make the dashboard by the command, as a process that is measured."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "sae_jax", "features", str(trained), str(store), "--out", str(out)]
    began = time.monotonic()
    subprocess.run(command, check=True)
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{time.monotonic() - began:.1f} s, {most:.2f} GB resident at most, {size / 1e6:.0f} MB written")


def opened(page: Path, d_sae: int) -> None:
    """The first paint, and forty features in turn: from the change of the address to the panel drawn."""
    from playwright.sync_api import sync_playwright

    open_one = """feature => new Promise(done => {
      const began = performance.now();
      const look = () => document.querySelector("#feature h2")?.textContent === `Feature ${feature}`
        ? done(performance.now() - began) : requestAnimationFrame(look);
      location.hash = `#feature=${feature}`;
      look();
    })"""
    paint = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium"), args=["--no-sandbox"]
        )
        paints = []
        for _ in range(3):
            shown = browser.new_page()
            shown.goto(page.absolute().as_uri())
            shown.wait_for_selector("#rows tr")
            paints.append(shown.evaluate(paint))
        wanted = np.random.default_rng(0).permutation(d_sae)[:40].tolist()
        first, again = ([shown.evaluate(open_one, feature) for feature in wanted] for _ in range(2))
        browser.close()
    print(f"first paint {max(paints):.0f} ms (the slowest of 3)")
    for name, times in (("a feature, its file loaded", first), ("a feature again", again)):
        print(f"{name}: {np.median(times):.0f} ms, {max(times):.0f} ms at most")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/many_features"))
    parser.add_argument("--features", type=int, default=16_384)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--d-in", type=int, default=512)
    parser.add_argument("--look", action="store_true", help="only open what is there")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    page = options.out / "dashboard"
    if not options.look:
        looked_at(*made(options.out, options.rows, options.d_in, options.features), page)
    opened(page / "index.html", options.features)


if __name__ == "__main__":
    main()
