"""SAELens's side of `examples/07_synthsaebench.py --beside sae_lens`: its trainers, on batches of ours.

Every SAE is measured by our functions, as SAELens saves it (a BatchTopK or Matryoshka SAE as a JumpReLU SAE);
one of each architecture also by SAELens's own functions, which must come to the same.
"""

import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sae_jax
from sae_jax.metrics.recovery import recover
from sae_jax.synthetic import World

AGREE = 1e-4
"""How far our figures may lie from SAELens's, which sums in float32."""


def train(
    world: World, configs: dict[str, tuple[str, dict[str, Any]]], seeds: int, steps: int, lr: float
) -> dict[str, list[Any]]:
    """SAELens's own trainers, all fed with the same batches of the world, each drawn once.

    Args:
      world: what to train on.
      configs: by name SAELens's architecture and the options of its config.
      seeds: of each, `torch.manual_seed(0)` and on.
      steps: of training.
      lr: learning rate, constant.

    Returns:
      By name the trained SAEs, one per seed, and prints the seconds that each name took.
    """
    import torch

    trainers = {
        name: [
            _trainer(*config, steps * world.batch_size, world.batch_size, lr, seed) for seed in range(seeds)
        ]
        for name, config in configs.items()
    }
    seconds = dict.fromkeys(trainers, 0.0)
    draw = jax.jit(lambda i: world.batch(i).x)
    for i in range(steps):
        x = torch.as_tensor(np.array(draw(jnp.int32(i))))
        for name, group in trainers.items():
            began = time.perf_counter()
            for trainer in group:
                trainer.step(x)
                # what `SAETrainer.fit` does between steps, as far as it touches the numbers
                trainer.n_training_steps += 1
            seconds[name] += time.perf_counter() - began
        if (i + 1) % 500 == 0:
            print(f"  SAELens: {i + 1:,} steps in {sum(seconds.values()):.0f} s", flush=True)
    for name, spent in seconds.items():
        print(f"  SAELens: {seeds} x {name} in {spent:.0f} s")
    return {name: [trainer.sae for trainer in group] for name, group in trainers.items()}


def _trainer(
    architecture: str, options: dict[str, Any], samples: int, batch: int, lr: float, seed: int
) -> Any:
    """One of its trainers around one of its SAEs."""
    import sae_lens
    import torch
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.registry import get_sae_training_class

    model, config = get_sae_training_class(architecture)
    torch.manual_seed(seed)
    # it wants lists, and appends to them
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
    settings = SAETrainerConfig(
        total_training_samples=samples,
        train_batch_size_samples=batch,
        lr=lr,
        # of no effect on a constant learning rate; without it there is no trainer
        lr_end=lr / 10,
        logger=LoggingConfig(log_to_wandb=False),
    )
    return sae_lens.SAETrainer(settings, model(config(**lists)), iter(()))


def measured(sae: Any, world: World, rows: int) -> dict[str, np.ndarray]:
    """Our figures of an SAE, as SAELens saves it."""
    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        trained = sae_jax.load(folder)
    return sae_jax.evaluate(*trained, world.evaluation(rows)) | recover(*trained, world, rows)


def difference(sae: Any, world: World, rows: int) -> dict[str, float]:
    """Our figures less those of SAELens's own functions, on the same SAE and rows."""
    import torch
    from sae_lens import SAE
    from sae_lens.evals import ExplainedVarianceCalculator
    from sae_lens.synthetic import evals

    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        saved = SAE.load_from_disk(folder)
    truth = torch.as_tensor(np.array(world.directions))
    explained, l0 = ExplainedVarianceCalculator(), evals.L0Calculator()
    with torch.no_grad():
        firing = evals.ClassificationMetricsCalculator(saved.W_dec, truth)
        for batch, amounts in world.labelled(rows):
            x = torch.as_tensor(np.array(batch.x))
            f = saved.encode(x)
            explained.add_batch(saved.decode(f), x)
            l0.add_batch(f)
            firing.add_batch(f, torch.as_tensor(np.array(amounts)))
        latents = firing.compute()
        theirs = {
            "mcc": evals.mean_correlation_coefficient(saved.W_dec, truth),
            "uniqueness": evals.feature_uniqueness(saved.W_dec, truth),
            "f1": latents.f1_score,
            "precision": latents.precision,
            "recall": latents.recall,
            "explained_variance": explained.compute(),
            "l0": l0.compute(),
        }
    ours = measured(sae, world, rows)
    return {name: float(ours[name]) - value for name, value in theirs.items()}
