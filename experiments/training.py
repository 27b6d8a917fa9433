"""Trains one algorithm, several seeds at once, on images that stay on the device."""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from experiments import data, models
from experiments.algorithms import ALGORITHMS
from experiments.config import TrainConfig
from msgd_jax import loss, train

# Large enough to keep the cores busy, small enough for the activations of several seeds to fit.
EVALUATION_BATCH = 500


class Evaluation(NamedTuple):
    """How the runs stand after `step` iterations; arrays have one entry for each seed.

    Attributes:
        step: iterations made.
        train_loss: mean loss over all training images.
        train_accuracy: fraction of the training images classified correctly.
        test_loss: mean loss over all test images.
        test_accuracy: the same of the test images.
        seconds: wall time of the training steps since the last evaluation, compilation included.
    """

    step: int
    train_loss: np.ndarray
    train_accuracy: np.ndarray
    test_loss: np.ndarray
    test_accuracy: np.ndarray
    seconds: float

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in self._asdict().items()
        }


def train_seeds(
    config: TrainConfig,
    dataset: data.Dataset,
    regularizer: Callable[[Any], optax.GradientTransformation] | None = None,
) -> Iterator[tuple[Any, Evaluation]]:
    """Trains `config.seeds` runs side by side; yields an evaluation every `eval_every` steps.

    With it come the parameters, a leading axis for the seeds: they are gone when the next ones are
    asked for. The first evaluation, at step 0, is of the initial parameters. Seed s has the key
    ``jax.random.key(s)``, split for parameters and noise: what a seed does depends on neither the
    other seeds nor how often it is evaluated.

    Args:
        config: what to train.
        dataset: the images, as uint8.
        regularizer: from a PRNG key, one for each seed, to what the noisy gradient goes through
            before the optimizer; None for nothing.

    Raises:
        ValueError: at once, if noise or model does not allow the settings (a batch size above N,
          say); later, if the training loss leaves the finite numbers, naming step and seeds.
    """
    init_params, losses, evaluate = model_functions(config.model_name, dataset.max_value)

    def optimizer(key: Any) -> optax.GradientTransformation:
        sgd = optax.sgd(config.learning_rate, momentum=config.momentum or None)
        # Keys folded with 0, 1, 2, ... are the noise's.
        last = np.uint32(2**32 - 1)
        return optax.chain(regularizer(jax.random.fold_in(key, last)), sgd) if regularizer else sgd

    train_set, test_set = jax.device_put((dataset.train, dataset.test))
    noise = ALGORITHMS[config.algorithm].make(train_set.label.shape[0], config.noise)

    def start() -> train.TrainState:
        seeds = jnp.arange(config.seed, config.seed + config.seeds)
        keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed)))(seeds)
        params = init_params(keys[:, 0])
        return jax.vmap(lambda p, key: train.init(p, optimizer(key), key))(params, keys[:, 1])

    # A transformation keeps its key in the state: here any will do.
    updater = optimizer(jax.random.key(0))
    step = train.make_step(losses, updater, noise, microbatch_size=config.microbatch_size)
    every_seed = jax.vmap(step, in_axes=(0, None))
    jax.eval_shape(lambda: every_seed(start(), train_set))  # so that errors come now
    loop = train.make_loop(every_seed, max_steps=config.eval_every)

    def evaluations() -> Iterator[tuple[Any, Evaluation]]:
        state, done, seconds = start(), 0, 0.0
        while True:
            train_loss, train_accuracy = evaluate(state.params, train_set)
            test_loss, test_accuracy = evaluate(state.params, test_set)
            _check_finite(train_loss, done, config.seed)
            yield (
                state.params,
                Evaluation(
                    step=done,
                    train_loss=np.asarray(train_loss),
                    train_accuracy=np.asarray(train_accuracy),
                    test_loss=np.asarray(test_loss),
                    test_accuracy=np.asarray(test_accuracy),
                    seconds=seconds,
                ),
            )
            if done == config.steps:
                return
            num_steps = min(config.eval_every, config.steps - done)
            before = time.perf_counter()
            state, _ = jax.block_until_ready(loop(state, train_set, num_steps))
            seconds = time.perf_counter() - before
            done += num_steps

    return evaluations()


class ModelFunctions(NamedTuple):
    """What is the same for every algorithm: initial parameters of a vector of keys, the loss
    vector function, and the evaluation of every seed: mean loss and accuracy.
    """

    init_params: Callable[[Any], Any]
    losses: loss.LossVectorFn
    evaluate: Callable[[Any, data.Examples], tuple[Array, Array]]


@functools.cache  # so that several runs in one process compile these once
def model_functions(model_name: str, max_value: int) -> ModelFunctions:
    """The functions of a net that takes images with pixels from 0 to `max_value`."""
    model = models.functional(models.MODELS[model_name])

    def logits(params: Any, images: Any) -> Float[Array, "batch classes"]:
        return model.apply(params, images.astype(jnp.float32) / max_value)

    def losses(params: Any, batch: data.Examples) -> Float[Array, " batch"]:
        return optax.losses.softmax_cross_entropy_with_integer_labels(
            logits(params, batch.image), batch.label
        )

    def sums(params: Any, examples: data.Examples, counts: Array) -> tuple[Array, Array]:
        """Summed loss and correct answers of one batch; examples with count 0 do not count."""
        scores = logits(params, examples.image)
        cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels
        correct = scores.argmax(-1) == examples.label
        return counts @ cross_entropy(scores, examples.label), counts @ correct

    @jax.jit
    def evaluate(params: Any, examples: data.Examples) -> tuple[Array, Array]:
        size = examples.label.shape[0]
        positions = jnp.arange(-(-size // EVALUATION_BATCH) * EVALUATION_BATCH)
        batches = positions.reshape(-1, EVALUATION_BATCH)

        def one_batch(positions: Array) -> tuple[Array, Array]:
            # The last batch is filled up with the last example, which does not count.
            batch = jax.tree.map(lambda x: x.take(positions, axis=0, mode="clip"), examples)
            counts = (positions < size).astype(jnp.float32)
            return jax.vmap(sums, in_axes=(0, None, None))(params, batch, counts)

        return jax.tree.map(lambda x: x.sum(0) / size, jax.lax.map(one_batch, batches))

    return ModelFunctions(jax.jit(jax.vmap(model.init)), losses, evaluate)


def _check_finite(train_loss: Array, step: int, first_seed: int) -> None:
    diverged = np.flatnonzero(~np.isfinite(np.asarray(train_loss)))
    if diverged.size:
        seeds = ", ".join(str(first_seed + i) for i in diverged)
        raise ValueError(
            f"The training loss is not finite after {step} steps (seed {seeds}): "
            "choose a smaller learning_rate."
        )
