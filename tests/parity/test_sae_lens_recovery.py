"""SAELens measures the same recovery: `sae_lens.synthetic.evals` on the same decoders and activations."""

import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import metrics
from sae_jax.base import Batch

pytestmark = pytest.mark.usefixtures("sae_lens")

SHAPES = [(24, 24, 10), (40, 15, 10), (12, 30, 8)]
"""d_sae, features, d_in: as many, more and fewer latents than features."""


class Drawn:
    """A world of random rows, in three batches."""

    forest = None

    def __init__(self, directions, amounts):
        self.directions, self.amounts = jnp.asarray(directions), amounts

    def labelled(self, rows):
        for amounts in np.array_split(self.amounts, 3):
            x = jnp.asarray(amounts) @ self.directions
            yield Batch(x, x), jnp.asarray(amounts)


def drawn(d_sae, features, d_in, seed=0):
    """A dictionary some of whose rows are near true features, and one dead latent."""
    draw = np.random.default_rng(seed)
    truth = draw.normal(size=(features, d_in)).astype(np.float32)
    W_dec = draw.normal(size=(d_sae, d_in)).astype(np.float32)
    some = min(d_sae, features) // 2
    W_dec[:some] = truth[:some] * np.sign(draw.normal(size=(some, 1))) + 0.1 * W_dec[:some]
    amounts = np.maximum(draw.normal(size=(3000, features)) - 1, 0).astype(np.float32)
    b_enc = draw.normal(size=d_sae).astype(np.float32) - 2
    b_enc[-1] = -1e6
    return truth, W_dec, b_enc, amounts


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shared_figure_is_theirs(shape, torch):
    from sae_lens.synthetic import evals

    truth, W_dec, b_enc, amounts = drawn(*shape)

    def encode(x):
        return jnp.maximum(x @ W_dec.T + b_enc, 0)

    ours = metrics.recovered_by(W_dec[None], lambda x: encode(x)[None], Drawn(truth, amounts))
    f = np.asarray(encode(jnp.asarray(amounts) @ truth))
    theirs = evals.compute_classification_metrics(
        *(torch.tensor(each) for each in (f, amounts, W_dec, truth))
    )
    pair = torch.tensor(W_dec), torch.tensor(truth)
    expected = {
        "mcc": evals.mean_correlation_coefficient(*pair),
        "uniqueness": evals.feature_uniqueness(*pair),
        "precision": theirs.precision,
        "recall": theirs.recall,
        "f1": theirs.f1_score,
    }
    assert 0 < expected["f1"] < 1
    assert {name: ours[name][0] for name in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decoders_alone(shape, torch):
    from sae_lens.synthetic import evals

    truth, W_dec, _, _ = drawn(*shape, seed=1)
    pair = torch.tensor(W_dec), torch.tensor(truth)
    assert metrics.mcc(W_dec, truth) == pytest.approx(evals.mean_correlation_coefficient(*pair), rel=1e-5)
    assert metrics.uniqueness(W_dec, truth) == pytest.approx(evals.feature_uniqueness(*pair))
