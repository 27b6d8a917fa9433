"""The nets and data that are timed, the same for all contestants."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import models
from msgd_jax.loss import LossVectorFn

BATCH_SIZE = 50


class Problem(NamedTuple):
    """A loss vector function with parameters and data (image or features, label) on the device."""

    loss_vector_fn: LossVectorFn
    params: Any
    data: Any
    num_parameters: int


def lenet(num_examples: int, seed: int = 0) -> Problem:
    """The paper's net of 11,330 parameters on random images, kept as uint8.

    The speed does not depend on the values of the pixels.
    """
    model = models.functional(models.LeNet)
    image, label = random_images(num_examples, models.LeNet.image_shape, seed)

    def loss_vector_fn(params: Any, batch: Any) -> Any:
        images, labels = batch
        logits, _ = model.apply(params, {}, images.astype(jnp.float32) / 255)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)

    params = jax.jit(model.init)(jax.random.key(seed))
    return Problem(loss_vector_fn, params, (image, label), models.num_parameters(params))


def random_images(
    num_examples: int, shape: tuple[int, int, int], seed: int = 0
) -> tuple[jax.Array, jax.Array]:
    """Images as uint8 and labels of ten classes, on the device."""
    image_key, label_key = jax.random.split(jax.random.key(seed))
    image = jax.random.bits(image_key, (num_examples, *shape), jnp.uint8)
    return image, jax.random.randint(label_key, (num_examples,), 0, 10)


def two_layer_net(num_parameters: int, num_examples: int, seed: int = 0) -> Problem:
    """A fully connected net with one hidden layer, ten classes and about D parameters.

    The work per example is proportional to the number of parameters, so growth with D is easy to
    see.
    """
    hidden, inputs = layer_sizes(num_parameters)
    rng = np.random.default_rng(seed)

    def normal(*shape: int, scale: float = 1.0) -> jax.Array:
        return jnp.asarray(scale * rng.normal(size=shape), jnp.float32)

    params = {
        "w1": normal(inputs, hidden, scale=inputs**-0.5),
        "b1": jnp.zeros(hidden),
        "w2": normal(hidden, 10, scale=hidden**-0.5),
        "b2": jnp.zeros(10),
    }
    data = (normal(num_examples, inputs), jnp.asarray(rng.integers(0, 10, num_examples), jnp.int32))

    def loss_vector_fn(params: Any, batch: Any) -> Any:
        features, labels = batch
        hidden = jnp.tanh(features @ params["w1"] + params["b1"][None])
        logits = hidden @ params["w2"] + params["b2"][None]
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)

    return Problem(loss_vector_fn, params, data, models.num_parameters(params))


def layer_sizes(num_parameters: int) -> tuple[int, int]:
    """Hidden units h and inputs f with h (f + 11) + 10 parameters, h near sqrt(D) / 2.6.

    The number is exactly `num_parameters` if a suitable h divides, and as near as possible if not.
    """
    wanted = num_parameters**0.5 / 2.6
    exact = [h for h in range(2, int(4 * wanted) + 2) if (num_parameters - 10) % h == 0]
    near = [h for h in exact if wanted / 2 <= h <= 2 * wanted]
    hidden = min(near, key=lambda h: abs(h - wanted)) if near else max(2, round(wanted))
    return hidden, max(1, round((num_parameters - 10) / hidden) - 11)
