"""The small net of the study of the noise scale: its losses, and the images of all seeds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key

from experiments import data
from experiments._typing import Params
from msgd_jax import loss
from msgd_jax._streams import Stream, derive

NUM_CLASSES = 10
POOL = 60_000
"""The number of images to draw from, FashionMNIST's original training images."""


@loss.per_example
def losses(params: Params, example: dict[str, Array]) -> Float[Array, ""]:
    """The cross-entropy (nats) of a net with one hidden layer of tanh units."""
    hidden = jnp.tanh(example["x"] @ params["w1"] + params["b1"])
    logits = hidden @ params["w2"] + params["b2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, example["y"])


def initial(key: Key[Array, ""], inputs: int, width: int) -> Params:
    """Normal weights of variance 1 / inputs, and biases of 0."""
    keys = jax.random.split(derive(key, Stream.PARAMETERS), 2)
    params: Params = {}
    for i, (rows, columns) in enumerate(((inputs, width), (width, NUM_CLASSES)), start=1):
        weights = jax.random.normal(keys[i - 1], (rows, columns))
        params |= {f"w{i}": weights / rows**0.5, f"b{i}": jnp.zeros(columns)}
    return params


def images(seeds: range, num_examples: int) -> dict[str, Array]:
    """Training images of all seeds, with a leading axis of seeds.

    Pixels are averaged over squares of 2 x 2; over the images of a seed, their mean is 0 and their
    variance 1.
    """
    # The paper trains on the original test images, so the original training images are `test` here.
    pool = data.load("fashion_mnist").test
    pixels, labels = [], []
    for seed in seeds:
        # Every seed draws with a key of its own, from the stream of the examples.
        key = derive(jax.random.key(seed), Stream.EXAMPLES)
        own = np.asarray(jax.random.choice(key, len(pool.label), (num_examples,), replace=False))
        found = pool.image[own].reshape(num_examples, 14, 2, 14, 2).mean((2, 4))
        found = found.reshape(num_examples, -1)
        pixels.append((found - found.mean()) / found.std())
        labels.append(pool.label[own])
    return {
        "x": jnp.asarray(np.stack(pixels), jnp.float32),
        "y": jnp.asarray(np.stack(labels), jnp.int32),
    }
