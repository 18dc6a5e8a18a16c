"""How far neighbouring tokens part in batches read from a store, by the size of the window.

    python tests/benchmarks/mixing.py STORE [--site NAME] [--batch-size 1024]

Two figures over an epoch, for rows in order, for several windows, and for a shuffle of everything:

    together   other rows of its own context that a row meets in its batch
    spread     variance of a batch's mean over that of as many independent rows, averaged over columns by
               their variance: 1 where rows are independent

A context is told by its positions, which begin anew.
"""

import argparse

import numpy as np

import sae_jax
from sae_jax.data.order import Order


def spread(x: np.ndarray, batch_size: int) -> float:
    """Of rows in the order of a stream."""
    whole = x[: len(x) // batch_size * batch_size].reshape(-1, batch_size, x.shape[1])
    means = whole.mean(axis=1)
    # batches are drawn without replacement: the mean of all of them is known
    share = 1 - batch_size / len(x)
    return float(means.var(axis=0, ddof=1).sum() * batch_size / (x.var(axis=0).sum() * share))


def together(context: np.ndarray, batch_size: int) -> float:
    """Other rows of its own context that a row meets in its batch."""
    batches = context[: len(context) // batch_size * batch_size].reshape(-1, batch_size)
    met = [np.unique(batch, return_counts=True)[1] for batch in batches]
    return float(np.mean([(size * (size - 1)).sum() / batch_size for size in met]))


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store")
    parser.add_argument("--site", default=None)
    parser.add_argument("--batch-size", type=int, default=1024)
    options = parser.parse_args()
    store = sae_jax.open_store(options.store)
    site, size = store.site(options.site), options.batch_size
    n = store.rows
    x = site.read(0, n).astype(np.float32)
    positions = store.positions.read(0, n)
    context = np.cumsum(np.r_[True, positions[1:] <= positions[:-1]])
    orders = {"in order": np.arange(n)}
    for window in (1, 4, 16, 32, 64, 256):
        order = Order(n, site.chunk_rows, window, size, 0)
        if window * site.chunk_rows < n:
            orders[f"window of {window * site.chunk_rows:,}"] = order.rows_of(0, n)
    orders["all shuffled"] = np.random.default_rng(0).permutation(n)
    print(
        f"{n:,} rows of {site.label}, chunks of {site.chunk_rows}, {context[-1]:,} contexts, "
        f"batches of {size}"
    )
    print(f"{'order':>20} {'together':>9} {'spread':>7}")
    for name, rows in orders.items():
        print(f"{name:>20} {together(context[rows], size):9.2f} {spread(x[rows], size):7.2f}")


if __name__ == "__main__":
    main()
