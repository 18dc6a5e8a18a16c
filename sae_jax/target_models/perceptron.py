"""A network with one hidden layer."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Scalar

from sae_jax.base import Batch, require


class Perceptron(nnx.Module):
    """One hidden layer of ReLU neurons.

        h = ReLU(x W_in + b_in);   logits = h W_out + b_out

    Args:
      inputs: width of x.
      hidden: number of neurons.
      outputs: number of logits.
      rngs: of nnx.

    Raises:
      InputError: a size under 1.

    Example:
      >>> Perceptron(2, 4, 2, rngs=nnx.Rngs(0)).hidden(jnp.ones((8, 2))).shape
      (8, 4)
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, *, rngs: nnx.Rngs):
        for name, size in (("inputs", inputs), ("hidden", hidden), ("outputs", outputs)):
            require(size >= 1, f"{name} must be at least 1, got {size}")
        draw = nnx.initializers.he_normal()
        self.W_in = nnx.Param(draw(rngs.params(), (inputs, hidden)))
        self.b_in = nnx.Param(jnp.zeros(hidden))
        self.W_out = nnx.Param(draw(rngs.params(), (hidden, outputs)))
        self.b_out = nnx.Param(jnp.zeros(outputs))

    def hidden(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch hidden"]:
        """What the neurons say."""
        return jax.nn.relu(x @ self.W_in[...] + self.b_in[...])

    def read(self, h: Float[Array, "*batch hidden"]) -> Float[Array, "*batch outputs"]:
        """Logits from the hidden layer, or from what an SAE makes of it."""
        return h @ self.W_out[...] + self.b_out[...]

    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        """Logits."""
        return self.read(self.hidden(x))


def cross_entropy(model: nnx.Module, batch: Batch) -> Scalar:
    """How badly logits tell labels of yes and no: sigmoid cross-entropy, the mean over rows and labels.

        - y log s(z) - (1 - y) log(1 - s(z)),   s the logistic function

    Args:
      model: gives logits z [batch, labels].
      batch: `x`, and labels `y` [batch, labels] from 0 to 1.
    """
    return optax.sigmoid_binary_cross_entropy(model(batch.x), batch.y).mean()
