"""The small net of the studies: its losses, its digits and its laws."""

from collections.abc import Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key

from experiments import data
from experiments._typing import Law, Params
from experiments.decide.settings import noise_number
from experiments.noise_study._config import EdgeConfig
from msgd_jax import loss, measure, noise
from msgd_jax._streams import Stream, derive

NUM_CLASSES = 10
# The draws that a seed makes from its stream of cases.
_NOISE, _MEASURES = range(2)


def outputs(params: Params, x: Float[Array, " inputs"]) -> Float[Array, " classes"]:
    """The outputs of the net for one image, one per class."""
    hidden = jnp.tanh(x @ params["w1"] + params["b1"])
    hidden = jnp.tanh(hidden @ params["w2"] + params["b2"])
    return hidden @ params["w3"] + params["b3"]


@loss.per_example
def losses(params: Params, example: dict[str, Array]) -> Float[Array, ""]:
    """The smooth losses ``|net(x) - e_y|^2 / 2``, where e_y is the unit vector of the label."""
    error = outputs(params, example["x"]) - jax.nn.one_hot(example["y"], NUM_CLASSES)
    return jnp.square(error).sum() / 2


def initial(key: Key[Array, ""], inputs: int, width: int) -> Params:
    """Normal weights of variance 1 / inputs, 16 times smaller in the last layer; biases are 0.

    The small last layer makes the Hessian small at the start, so that sharpness can grow.
    """
    keys = jax.random.split(derive(key, Stream.PARAMETERS), 3)
    sizes = ((inputs, width, 1.0), (width, width, 1.0), (width, NUM_CLASSES, 0.25))
    params: Params = {}
    for i, (rows, columns, scale) in enumerate(sizes, start=1):
        weights = jax.random.normal(keys[i - 1], (rows, columns))
        params |= {f"w{i}": scale * weights / rows**0.5, f"b{i}": jnp.zeros(columns)}
    return params


def digits(seeds: Iterable[int], part: Literal["train", "test"] = "train") -> dict[str, Array]:
    """The digits of all seeds, with a leading axis of seeds; in training their grey mean is 0."""
    images, labels = [], []
    for seed in seeds:
        drawn = data.load("digits", seed=seed)
        grey = (drawn.train.image.reshape(len(drawn.train.label), -1) / drawn.max_value).mean()
        found = getattr(drawn, part)
        images.append(found.image.reshape(len(found.label), -1) / drawn.max_value - grey)
        labels.append(found.label)
    return {
        "x": jnp.asarray(np.stack(images), jnp.float32),
        "y": jnp.asarray(np.stack(labels), jnp.int32),
    }


def law_of(name: str, config: EdgeConfig, num_examples: int) -> Law:
    """The law of the weights; for isotropic noise it is that of GD, since the noise is added."""
    n, b = num_examples, config.batch_size
    match name:
        case "sgd" | "sgd-other-key":
            return noise.sgd(n, b, replace=True)  # Its covariance is S/b, like that of the others.
        case "cov":
            return noise.cov(n, b)
        case "bernoulli":
            return noise.bernoulli(n, b)
        case "sparse_cov":
            return noise.sparse_cov(n, b, support_size=2 * b)
        case "student_t":
            return noise.student_t(n, b, degrees_of_freedom=config.degrees_of_freedom)
        case _:
            return noise.gd(n)


def noise_key(key: Key[Array, ""], name: str) -> Key[Array, ""]:
    """A different key per law, so that their draws are independent."""
    return derive(key, Stream.CASES, _NOISE, noise_number(name))


def measure_key(key: Key[Array, ""], step: Any) -> Key[Array, ""]:
    """The key of the measurements at a step, the same for all laws."""
    return derive(key, Stream.CASES, _MEASURES, step)


def isotropic_variance(
    params: Params, examples: dict[str, Array], batch_size: int
) -> Float[Array, ""]:
    """The variance per parameter of isotropic noise with the trace of S/b."""
    scale = measure.noise_scale(loss.LossVector(losses, examples), params)
    return jnp.asarray(scale.total.trace.value) / (batch_size * optax.tree.size(params))


def isotropic(key: Key[Array, ""], step: Any, like: Params) -> Params:
    """Independent standard normals, from a separate stream."""
    normals: Any = optax.tree.random_like(derive(key, Stream.LANGEVIN, step), like)
    return normals
