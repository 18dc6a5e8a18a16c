"""What a training step costs, by its shapes alone: FLOPs, memory, and bytes that move."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from sae_jax.base import Batch, TrainState


def training_flops(params: Mapping[str, Any], batch_rows: int) -> float:
    """FLOPs of the matrix products of one training step: 10 B d F for an SAE.

        encode 2 B d F,  decode 2 B d F,  d/dW_enc 2 B d F,  d/dW_dec 2 B d F,  d/df 2 B d F

    The gradient by the input is not taken. An auxiliary loss comes on top; XLA's own count has it.

    Args:
      params: arrays or their shapes, by name; with a leading axis over members the sum over them.
      batch_rows: B.

    Returns:
      FLOPs.

    Example:
      >>> training_flops(jax.eval_shape(sae.init, jax.random.key(0)), 1024)
    """
    learned = sum(leaf.size for name, leaf in params.items() if name.startswith("W_"))
    encoder = params["W_enc"] if "W_enc" in params else params["W_dec"]
    tied = 0 if "W_enc" in params else encoder.size
    return float(batch_rows * (4 * (learned + tied) + 2 * params["W_dec"].size))


class Footprint(NamedTuple):
    """Bytes that training takes at its fullest, by what they hold."""

    parameters: float
    optimizer: float
    counters: float
    """Steps since each latent fired, and hyper-parameters."""
    gradients: float
    """And the updates made of them."""
    features: float
    """And pre-activations, and the gradients of both."""
    reconstructions: float
    """And their errors and gradients, and the inputs, which each member has for itself."""

    @property
    def state(self) -> float:
        """What a step takes and gives back."""
        return self.parameters + self.optimizer + self.counters

    @property
    def activations(self) -> float:
        """All that there is for each row of a batch."""
        return self.features + self.reconstructions

    @property
    def total(self) -> float:
        """What must be there: the state twice, because XLA may copy what a loop carries and still reads."""
        return 2 * self.state + self.gradients + self.activations

    @property
    def moved(self) -> float:
        """Bytes read and written in a step.

        The state once each way; weights once more in each pass; gradients and activations once each way.
        """
        return 2 * (self.state + self.parameters + self.gradients / 2 + self.activations)

    def over(self, data: int, latent: int) -> "Footprint":
        """On one device of several, where rows and latents are cut into so many parts."""
        return Footprint(
            self.parameters / latent,
            self.optimizer / latent,
            self.counters / latent,
            self.gradients / latent,
            self.features / data / latent,
            self.reconstructions / data,
        )


def footprint(train: TrainState, batch: Batch, beside: Any = ()) -> Footprint:
    """What a state takes while it trains on such batches.

    Args:
      train: arrays or shapes; leading axes over members are counted.
      batch: arrays or shapes.
      beside: what else a step takes and gives back, such as hyper-parameters.

    Returns:
      A `Footprint`, by arithmetic.
    """
    parameters = bytes_of(train.params)
    members, latents = train.progress.step.size, train.progress.since_fired.size
    width = train.params["W_dec"].dtype.itemsize
    return Footprint(
        parameters,
        optimizer=bytes_of(train.opt_state),
        counters=bytes_of((train.progress, beside)),
        gradients=2 * parameters,
        features=4 * batch.x.shape[0] * latents * width,
        reconstructions=members * (3 * batch.y.size + batch.x.size) * width,
    )


def bytes_of(tree: Any) -> int:
    """Of all arrays, or shapes, in a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
