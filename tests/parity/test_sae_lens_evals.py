"""SAELens's own evaluations of SAEs trained here give our figures, on the same activations."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sae_jax
from sae_jax import TrainedSAE, in_memory, metrics
from sae_jax.base import Batch
from sae_jax.cli import main
from sae_jax.trained import About

WIDTH, D_SAE, CONTEXT, PROMPTS = 16, 24, 12, 20
HOOK = "blocks.0.hook_resid_post"

FACTORIES = {
    "relu": lambda: sae_jax.relu(WIDTH, D_SAE, l1=0.05, apply_b_dec_to_input=True),
    "topk": lambda: sae_jax.topk(WIDTH, D_SAE, k=4, rescale_acts_by_decoder_norm=True),
    "batch_topk": lambda: sae_jax.batch_topk(WIDTH, D_SAE, k=4, threshold_decay=0.5),
    "jumprelu": lambda: sae_jax.jumprelu(WIDTH, D_SAE, l0_coefficient=0.02, bandwidth=0.5),
    "gated": lambda: sae_jax.gated(WIDTH, D_SAE, l1=0.05),
    "layer_norm": lambda: sae_jax.normalise.layer_normed(sae_jax.topk(WIDTH, D_SAE, k=4)),
}


@pytest.fixture(scope="module")
def model(sae_lens, torch):
    """A transformer of one layer with random weights, whose activations have a mean."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=1, d_model=WIDTH, n_ctx=CONTEXT, d_head=8, n_heads=2, d_mlp=32, d_vocab=50, act_fn="relu",
        seed=0, device="cpu",
    )  # fmt: skip
    made = HookedTransformer(config)
    with torch.no_grad():
        made.embed.W_E.mul_(30)
        made.pos_embed.W_pos.mul_(10).add_(1)
        made.blocks[0].mlp.b_out.add_(0.5)
    return made


@pytest.fixture(scope="module")
def tokens(torch):
    return torch.randint(50, (PROMPTS, CONTEXT), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def activations(model, tokens, torch):
    """[rows, WIDTH], of the very prompts that SAELens will draw."""
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, prepend_bos=False, names_filter=[HOOK])
    return cache[HOOK].reshape(-1, WIDTH).numpy()


def trained_here(name, rows, folder):
    """An SAE after some steps, saved and read again."""
    sae, optimizer = FACTORIES[name](), optax.adam(1e-2)
    state = sae_jax.init(sae, optimizer, jax.random.key(0))
    state, _ = sae_jax.run(sae_jax.make_step(sae, optimizer), state, in_memory(rows, 64), 150)
    told = {"hook_name": HOOK, "context_size": CONTEXT, "prepend_bos": False, "model_name": "tiny"}
    TrainedSAE(sae, state.params, About(metadata=told)).save(folder)
    return sae_jax.load(folder)


def ours_by_command(sae, rows, folder, capsys) -> dict[str, float]:
    np.save(folder / "rows.npy", rows)
    with pytest.raises(SystemExit, match="0"):
        main(["eval", str(sae), str(folder / "rows.npy"), "--json", "--batch-size", str(len(rows))])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", FACTORIES)
def test_its_evaluation_of_a_language_models_activations(
    name, model, tokens, activations, tmp_path, capsys, sae_lens
):
    import datasets
    from sae_lens.evals import EvalConfig, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler
    from sae_lens.training.activations_store import ActivationsStore

    trained_here(name, activations, tmp_path / "sae")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "sae")
    dataset = datasets.Dataset.from_dict({"tokens": tokens.tolist()})
    store = ActivationsStore.from_sae(
        model, theirs, dataset, streaming=False, store_batch_size_prompts=PROMPTS
    )
    config = EvalConfig(
        compute_l2_norms=True, compute_sparsity_metrics=True, compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
    )  # fmt: skip
    told, of_features = run_evals(
        theirs, store, model, ActivationScaler(), config, exclude_special_tokens=False
    )
    ours = ours_by_command(tmp_path / "sae", activations, tmp_path, capsys)
    quality, shrinkage, sparsity = told["reconstruction_quality"], told["shrinkage"], told["sparsity"]
    expected = {
        "explained_variance": quality["explained_variance"],
        "explained_variance_legacy": quality["explained_variance_legacy"],
        "mse": quality["mse"] / WIDTH,  # summed over features there
        "cosine": quality["cossim"],
        "shrinkage": shrinkage["l2_ratio"],
        "relative_reconstruction_bias": shrinkage["relative_reconstruction_bias"],
        "l0": sparsity["l0"],
        "l1_norm": sparsity["l1"],
    }
    assert 0.2 < expected["explained_variance"] < 0.999
    assert 1 < expected["l0"] < D_SAE
    assert {key: ours[key] for key in expected} == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert ours["density"] == pytest.approx(of_features["feature_density"], abs=1e-6)


@pytest.mark.parametrize("name", ["relu", "topk", "batch_topk", "jumprelu", "gated"])
def test_its_evaluation_on_synthetic_data(name, tmp_path, sae_lens, torch):
    from sae_lens.synthetic import ActivationGenerator, FeatureDictionary, eval_sae_on_synthetic_data

    torch.manual_seed(0)
    features, batches, rows = 20, 4, 500
    dictionary = FeatureDictionary(features, WIDTH, bias=True)
    generator = ActivationGenerator(features, firing_probabilities=torch.full((features,), 0.15))

    def drawn():
        torch.manual_seed(1)
        return [generator.sample(rows) for _ in range(batches)]

    with torch.no_grad():
        dictionary.bias.fill_(0.3)
        amounts = [batch.numpy() for batch in drawn()]
        x = [dictionary(torch.tensor(batch)).numpy() for batch in amounts]
        trained = trained_here(name, np.concatenate(x), tmp_path)
        theirs = sae_lens.SAE.load_from_disk(tmp_path)
        torch.manual_seed(1)
        told = eval_sae_on_synthetic_data(theirs, dictionary, generator, batches * rows, rows)

    class Drawn:
        """The rows that SAELens drew."""

        forest = None
        directions = jnp.asarray(dictionary.feature_vectors.detach().numpy())

        def labelled(self, rows):
            return (
                (Batch(jnp.asarray(a), jnp.asarray(a)), jnp.asarray(b))
                for a, b in zip(x, amounts, strict=True)
            )

    data = [Batch(jnp.asarray(batch), jnp.asarray(batch)) for batch in x]
    ours = metrics.evaluate(trained.sae, trained.params, data)
    W_dec = np.asarray(trained.params["W_dec"])
    ours |= {
        key: value[0]
        for key, value in metrics.recovered_by(
            W_dec[None], lambda x: trained.encode(x)[None], Drawn()
        ).items()
        if key in ("mcc", "uniqueness", "precision", "recall", "f1")
    }
    expected = {
        "explained_variance": told.explained_variance,
        "shrinkage": told.shrinkage,
        "l0": told.sae_l0,
        "dead_fraction": told.dead_latents / D_SAE,
        "mcc": told.mcc,
        "uniqueness": told.uniqueness,
        "precision": told.classification.precision,
        "recall": told.classification.recall,
        "f1": told.classification.f1_score,
    }
    assert 0.2 < expected["explained_variance"] < 0.999
    assert 0.1 < expected["f1"] < 1
    assert {key: float(ours[key]) for key in expected} == pytest.approx(expected, rel=1e-4, abs=1e-4)
