"""The five full-batch steps that are compared (the rows of the table), and our side of them.

Every row trains a net of the experiments by plain SGD on weighted cross-entropy, with weights drawn
anew at every step from ``noise.cov``. Images stay uint8 on the device and are scaled in each step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import problems
from experiments import models
from msgd_jax import loss, noise, train

LEARNING_RATE = 0.01


class Row(NamedTuple):
    """One step.

    Attributes:
        net: its name in `models.MODELS`.
        width: channels of the first convolution; None for a net that has one size.
        num_examples: N.
        microbatch_size: the examples in one pass of the experiments, and in one ghost batch.
    """

    net: str
    width: int | None
    num_examples: int
    microbatch_size: int

    @property
    def normalises(self) -> bool:
        """Whether the net has ghost batch norm, so that micro-batches are part of the function."""
        return self.net == "resnet18"

    def __str__(self) -> str:
        net = {"lenet": "LeNet", "vgg11": "VGG-11", "resnet18": "ResNet-18"}[self.net]
        width = "" if self.width is None else f" width {self.width}"
        return f"{net}{width}, N = {self.num_examples:,}"


ROWS = {
    "lenet": Row("lenet", None, 1_000, 100),
    "vgg11-16": Row("vgg11", 16, 200, 50),
    "vgg11-64": Row("vgg11", 64, 50, 50),
    "resnet18-8": Row("resnet18", 8, 200, 50),
    "resnet18-64": Row("resnet18", 64, 50, 50),
}
"""The rows by the name that ``--rows`` takes."""

TINY = {
    "lenet": Row("lenet", None, 24, 8),
    "vgg11-16": Row("vgg11", 2, 8, 4),
    "vgg11-64": Row("vgg11", 4, 4, 4),
    "resnet18-8": Row("resnet18", 2, 8, 4),
    "resnet18-64": Row("resnet18", 4, 4, 4),
}
"""The same rows in tiny sizes, to show that everything runs."""


class Reference(NamedTuple):
    """The starting point of all contestants, as numpy arrays.

    Attributes:
        params: the parameters, under the names of flax.
        images: [N, H, W, C], uint8.
        labels: [N].
        weights: W of our first step, [N], for the check that all compute the same.
        order: the order in which our first step computes the examples, [N].
        num_parameters: the number of scalars in the parameters.
    """

    params: Any
    images: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    order: np.ndarray
    num_parameters: int


def model(row: Row) -> models.Model:
    """The net of a row as pure functions."""
    options = {} if row.width is None else {"width": row.width}
    return models.functional(models.MODELS[row.net], **options)


def law(row: Row) -> noise.MNoise:
    """The law of the weights, for all contestants."""
    return noise.cov(row.num_examples, min(problems.BATCH_SIZE, row.num_examples))


def key() -> jax.Array:
    """The key of every run."""
    return jax.random.key(1)


def reference(row: Row) -> Reference:
    """Initial parameters, random images and the first weights, made on the CPU."""
    with jax.default_device(jax.devices("cpu")[0]):
        params = jax.jit(model(row).init)(jax.random.key(0))
        shape = {"lenet": models.LeNet, "vgg11": models.VGG11}.get(row.net, models.ResNet18)
        images, labels = problems.random_images(row.num_examples, shape.image_shape)
        weights = law(row).sample(key(), 0).values
        return Reference(
            params=jax.tree.map(np.asarray, params),
            images=np.asarray(images),
            labels=np.asarray(labels),
            weights=np.asarray(weights),
            order=np.asarray(_first_order(row)),
            num_parameters=models.num_parameters(params),
        )


def _first_order(row: Row) -> Any:
    """The order of the examples in the first step; ghost batches are drawn anew in every step."""
    if not row.normalises:
        return jnp.arange(row.num_examples)

    def note(params: Any, positions: Any, seen: Any) -> Any:
        count, order = seen
        order = jax.lax.dynamic_update_slice(order, positions, (count,))
        return params * jnp.ones(positions.shape), (count + positions.size, order)

    walk = loss.noisy_value_and_grad(
        note, law(row), microbatch_size=row.microbatch_size, has_state=True
    )
    positions = jnp.arange(row.num_examples, dtype=jnp.int32)
    seen = (jnp.int32(0), jnp.zeros_like(positions))
    (_, (_, order)), _ = walk(jnp.float32(1), positions, key(), 0, seen)
    return order


def loss_vector_fn(row: Row) -> Callable[..., Any]:
    """The losses of a micro-batch; with ghost batch norm also the running statistics after it."""
    apply = model(row).apply

    def losses(params: Any, batch: Any, stats: Any) -> tuple[Any, Any]:
        images, labels = batch
        images = images.astype(jnp.float32) / 255
        logits, stats = apply(params, stats, images, training=True)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels), stats

    return losses if row.normalises else lambda params, batch: losses(params, batch, {})[0]


def step(row: Row, microbatch_size: int | None) -> train.StepFn:
    """Our step, not compiled."""
    return train.make_step(
        loss_vector_fn(row),
        optax.sgd(LEARNING_RATE),
        law(row),
        microbatch_size=microbatch_size,
        has_state=row.normalises,
    )


def start(row: Row, params: Any) -> train.TrainState:
    """The state before the first step."""
    params = jax.tree.map(jnp.asarray, params)
    model_state = model(row).init_stats() if row.normalises else ()
    return train.init(params, optax.sgd(LEARNING_RATE), key(), model_state=model_state)
