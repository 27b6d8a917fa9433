"""Trains one algorithm, several seeds at once, on images that stay on the device."""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, ArrayLike, Float, Key

from experiments import data, models
from experiments._typing import Batch, Data, ImageShape, Law, Params, Record, Statistics
from experiments.training import _augmentation, _optimizers
from experiments.training.algorithms import ALGORITHMS
from experiments.training.config import TrainConfig
from msgd_jax import loss, train
from msgd_jax._streams import Stream, derive
from msgd_jax.sharding import shard_examples

# Large enough to keep the cores busy, small enough for the activations of several seeds to fit.
EVALUATION_BATCH = 500


class Evaluation(NamedTuple):
    """An evaluation of the runs after `step` iterations; arrays have one entry per seed.

    Attributes:
        step: the number of iterations made.
        train_loss: the mean loss over all training images.
        train_accuracy: the fraction of training images that are classified correctly.
        test_loss: the mean loss over all test images.
        test_accuracy: the fraction of test images that are classified correctly.
        seconds: the wall time of the training steps since the last evaluation, with compilation.
    """

    step: int
    train_loss: np.ndarray
    train_accuracy: np.ndarray
    test_loss: np.ndarray
    test_accuracy: np.ndarray
    seconds: float

    def record(self) -> Record:
        """The evaluation as JSON values."""
        return {
            k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in self._asdict().items()
        }

    @classmethod
    def of_record(cls, record: Record) -> "Evaluation":
        """The evaluation from which `record` was made, in float64."""
        values: Record = {k: np.array(v) if isinstance(v, list) else v for k, v in record.items()}
        return cls(**values)


Regularizer = Callable[[Key[Array, ""]], optax.GradientTransformation]


class Trainer(NamedTuple):
    """One configuration as functions; a state has a leading axis of seeds.

    Attributes:
        start: makes the state before the first step.
        advance: ``advance(state, num_steps) -> (state, metrics)``, up to `eval_every` steps in one
            compiled loop, with losses [num_steps, seeds]; it donates the state.
        evaluate: ``evaluate(state, step, seconds) -> Evaluation``.
    """

    start: Callable[[], train.TrainState]
    advance: Callable[[train.TrainState, int], tuple[train.TrainState, train.StepMetrics]]
    evaluate: Callable[[train.TrainState, int, float], Evaluation]


def make_trainer(
    config: TrainConfig,
    dataset: data.Dataset,
    regularizer: Regularizer | None = None,
    over: NamedSharding | None = None,
) -> Trainer:
    """Makes the functions for `config.seeds` runs side by side.

    Seed s has the key ``jax.random.key(s)``, with a separate stream per kind of draw. So the result
    of a seed does not depend on the other seeds, nor on when it is stopped or evaluated.

    Args:
        config: the configuration of the runs.
        dataset: the images, as uint8.
        regularizer: a function from a PRNG key, a different one per seed, to a transformation of
            the noisy gradient before the optimizer; None for none.
        over: the sharding of the training images over several devices, for one seed; None for one
            device. Draws are the same; sums over examples differ in the last bits.

    Raises:
        ValueError: if the law or the net does not allow the settings, such as a batch size above N.
    """
    if config.subset_per_seed and dataset.train.label.shape[:-1] != (config.seeds,):
        raise ValueError(
            f"dataset must have examples of its own for each of {config.seeds} seeds, as "
            f"subset_per_seed says, got labels of shape {dataset.train.label.shape}."
        )
    functions = functions_of(config, dataset)
    algorithm, net = ALGORITHMS[config.algorithm], models.MODELS[config.model_name]
    whole_train_set, test_set = jax.device_put((dataset.train, dataset.test))
    train_set = whole_train_set if over is None else shard_examples(dataset.train, over)
    # For the number of images before they are filled up to equal shares for the devices.
    law = algorithm.make(dataset.num_train, config.noise)
    stats = functions.init_stats()
    has_stats = bool(jax.tree.leaves(stats))
    if has_stats:
        check_ghost_batches(law, config.microbatch_size, config.ghost_batch_size)

    def optimizer(key: Key[Array, ""]) -> optax.GradientTransformation:
        before = []
        if regularizer is not None:
            before.append(regularizer(derive(key, Stream.REGULARIZER)))
        if algorithm.additive != "none":
            before.append(
                _optimizers.additive_noise(
                    key,
                    algorithm.additive,
                    batch_size=config.noise.batch_size,
                    refresh_every=config.noise.refresh_every,
                    microbatch_size=config.microbatch_size,
                )
            )
        return _optimizers.make(config, *before)

    def start() -> train.TrainState:
        seeds = jnp.arange(config.seed, config.seed + config.seeds)
        keys = jax.vmap(jax.random.key)(seeds)
        params = functions.init_params(jax.vmap(lambda k: derive(k, Stream.PARAMETERS))(keys))
        if config.noise_draw:
            keys = jax.vmap(lambda k: derive(k, Stream.CASES, config.noise_draw))(keys)
        state = jax.vmap(lambda p, key: train.init(p, optimizer(key), key, stats))(params, keys)
        if over is None:
            return state
        everywhere = NamedSharding(over.mesh, PartitionSpec())
        return jax.jit(lambda state: state, out_shardings=everywhere)(state)

    # A transformation takes its key from the state, so the key given here is not used.
    plain_step = train.make_step(
        functions.losses,
        optimizer(jax.random.key(0)),
        law,
        microbatch_size=config.microbatch_size,
        has_state=has_stats,
        sharding=over,
    )

    def step(state: train.TrainState, examples: Data) -> tuple[train.TrainState, train.StepMetrics]:
        if config.augment:
            examples = _augmentation.draw(state.key, state.step, examples)
        return plain_step(state, examples)

    def every_seed(
        states: train.TrainState, examples: Data
    ) -> tuple[train.TrainState, train.StepMetrics]:
        if over is not None:
            # One seed only, since a program over devices is not mapped over seeds.
            state, metrics = step(jax.tree.map(lambda leaf: leaf[0], states), examples)
            return jax.tree.map(lambda leaf: leaf[None], (state, metrics))
        # Under `vmap` both branches of the `cond` that keeps the variances are computed.
        one_at_a_time = algorithm.additive != "none" or net.one_seed_at_a_time
        if config.subset_per_seed:
            return _over_seeds(lambda one: step(*one), one_at_a_time)((states, examples))
        return _over_seeds(lambda state: step(state, examples), one_at_a_time)(states)

    # Traced once without computing anything, so that mistakes raise here, not at the first step.
    jax.eval_shape(lambda: every_seed(start(), train_set))
    loop = train.make_loop(every_seed, max_steps=config.eval_every)

    def evaluate(state: train.TrainState, step: int, seconds: float) -> Evaluation:
        params, stats = state.params, state.model_state
        if over is not None:  # Every process evaluates on its own device, to equal results.
            params, stats = jax.device_get((params, stats))
        train_loss, train_accuracy = functions.evaluate(params, stats, whole_train_set)
        test_loss, test_accuracy = functions.evaluate(params, stats, test_set)
        return Evaluation(
            step=step,
            train_loss=np.asarray(train_loss),
            train_accuracy=np.asarray(train_accuracy),
            test_loss=np.asarray(test_loss),
            test_accuracy=np.asarray(test_accuracy),
            seconds=seconds,
        )

    return Trainer(start, lambda state, num_steps: loop(state, train_set, num_steps), evaluate)


def check_ghost_batches(
    law: Law, microbatch_size: int | None, ghost_batch_size: int | None = None
) -> None:
    """Raises ValueError unless the examples of a step can be divided into whole ghost batches."""
    support = law.support_size
    size = min(support, microbatch_size or support)
    if support % size:
        raise ValueError(
            f"microbatch_size must divide the {support} examples of a step, since batch norm takes "
            f"the statistics of what is in a pass, got {size}."
        )
    if size % min(size, ghost_batch_size or size):
        raise ValueError(
            f"ghost_batch_size must divide the {size} examples of a pass, got {ghost_batch_size}."
        )


def train_seeds(
    config: TrainConfig, dataset: data.Dataset, regularizer: Regularizer | None = None
) -> Iterator[tuple[Params, Evaluation]]:
    """Trains `config.seeds` runs side by side; yields an evaluation every `eval_every` steps.

    Each evaluation comes with the parameters, which have a leading axis of seeds and are deleted
    when the next evaluation is asked for. The first evaluation is that of the initial parameters.

    Args:
        config: the configuration of the runs.
        dataset: the images, as uint8.
        regularizer: as in `make_trainer`.

    Raises:
        ValueError: at once, as `make_trainer`; later, if a loss becomes infinite or NaN; the error
            names the step and the seeds.
    """
    trainer = make_trainer(config, dataset, regularizer)

    def evaluations() -> Iterator[tuple[Params, Evaluation]]:
        state, done, seconds = trainer.start(), 0, 0.0
        while True:
            evaluation = trainer.evaluate(state, done, seconds)
            check_finite(evaluation.train_loss[None], done, config.seed)
            yield state.params, evaluation
            if done == config.total_steps:
                return
            num_steps = min(config.eval_every, config.total_steps - done)
            before = time.perf_counter()
            state, metrics = jax.block_until_ready(trainer.advance(state, num_steps))
            seconds = time.perf_counter() - before
            check_finite(metrics.loss, done, config.seed)
            done += num_steps

    return evaluations()


class DivergedError(ValueError):
    """A loss is not finite.

    Attributes:
        step: the number of iterations after which it was not finite.
        seeds: the seeds whose loss was not finite.
    """

    def __init__(self, step: int, seeds: list[int]):
        self.step, self.seeds = step, seeds
        which = ", ".join(map(str, seeds[:10])) + (", ..." if len(seeds) > 10 else "")
        super().__init__(
            f"The training loss is not finite after {step} steps (seed {which}): choose a smaller "
            "learning_rate."
        )


def check_finite(losses: ArrayLike, step: int, first_seed: int) -> None:
    """Raises DivergedError at the first of these losses that is not finite.

    Args:
        losses: the loss before each step, [steps, seeds].
        step: the number of iterations made before the first of them.
        first_seed: the seed of the first column.
    """
    bad = ~np.isfinite(np.asarray(losses))
    if bad.any():
        row = int(bad.any(1).argmax())
        raise DivergedError(step + row, (first_seed + np.flatnonzero(bad[row])).tolist())


def functions_of(config: TrainConfig, dataset: data.Dataset) -> "ModelFunctions":
    """The functions of the net of a configuration, for the images of a data set."""
    net = models.MODELS[config.model_name]
    shape, classes = dataset.image_shape, dataset.num_classes
    return model_functions(
        config.model_name,
        dataset.max_value,
        config.width,
        None if shape == net.image_shape else shape,
        None if classes == net.num_classes else classes,
        config.ghost_batch_size if net.has_batch_norm else None,
    )


class ModelFunctions(NamedTuple):
    """The functions that do not depend on the algorithm.

    Attributes:
        init_params: makes the initial parameters for a vector of keys.
        losses: the loss vector function, with the net's statistics as third argument if it has any.
        evaluate: computes the mean loss and accuracy of every seed, from parameters, statistics and
            examples, which may have a leading axis of seeds, too.
        init_stats: the net's initial running statistics; {} for none.
    """

    init_params: Callable[[Key[Array, " seeds"]], Params]
    losses: loss.LossVectorFn
    evaluate: Callable[[Params, Statistics, data.Examples], tuple[Array, Array]]
    init_stats: Callable[[], Statistics]


def _over_seeds(function: Callable[[Any], Any], one_at_a_time: bool) -> Callable[[Any], Any]:
    """A function of one seed as one of all seeds, which are the leading axis of its argument."""
    return functools.partial(jax.lax.map, function) if one_at_a_time else jax.vmap(function)


@functools.cache  # Several runs in one process compile these once.
def model_functions(
    model_name: str,
    max_value: int,
    width: int | None = None,
    image_shape: ImageShape | None = None,
    num_classes: int | None = None,
    ghost_size: int | None = None,
) -> ModelFunctions:
    """The functions of a net that takes images with pixels from 0 to `max_value`.

    Args:
        model_name: one of `models.MODELS`.
        max_value: value of the brightest possible pixel.
        width: the channels of the net's first layer; None for the net's default.
        image_shape: height, width and channels of the images; None for the net's default.
        num_classes: the number of logits; None for the net's default.
        ghost_size: the images in one ghost batch; None for all those of a pass.
    """
    net = models.MODELS[model_name]
    asked: dict[str, Any] = {"width": width, "image_shape": image_shape}
    asked |= {"num_classes": num_classes, "ghost_size": ghost_size}
    model = models.functional(net, **{k: v for k, v in asked.items() if v is not None})
    cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels

    def losses_and_stats(
        params: Params, batch: Batch, stats: Statistics
    ) -> tuple[Float[Array, " batch"], Statistics]:
        augmented = isinstance(batch, _augmentation.Augmented)
        images = _augmentation.apply(batch) if augmented else batch.image
        logits, stats = model.apply(
            params, stats, images.astype(jnp.float32) / max_value, training=True
        )
        return cross_entropy(logits, batch.label), stats

    def losses(params: Params, batch: Batch) -> Float[Array, " batch"]:
        return losses_and_stats(params, batch, {})[0]

    def sums(
        params: Params, stats: Statistics, examples: data.Examples, counts: Array
    ) -> tuple[Array, Array]:
        """The summed loss and the correct answers of a batch; examples with count 0 are ignored."""
        scores, _ = model.apply(params, stats, examples.image.astype(jnp.float32) / max_value)
        correct = scores.argmax(-1) == examples.label
        return counts @ cross_entropy(scores, examples.label), counts @ correct

    def evaluate_one(model: tuple[Params, Statistics], examples: data.Examples) -> Any:
        """The summed loss and the correct answers of one seed."""
        return loss.sum_over_examples(
            lambda model, batch, counts: sums(model[0], model[1], batch, counts),
            model,
            examples,
            microbatch_size=EVALUATION_BATCH,
        )

    @jax.jit
    def evaluate(params: Params, stats: Statistics, examples: data.Examples) -> tuple[Array, Array]:
        def one_batch(
            model: tuple[Params, Statistics], batch: Batch, counts: Array
        ) -> tuple[Array, Array]:
            params, stats = model
            if net.one_seed_at_a_time:
                return jax.lax.map(
                    lambda model: sums(model[0], model[1], batch, counts), (params, stats)
                )
            return jax.vmap(sums, in_axes=(0, 0, None, None))(params, stats, batch, counts)

        if examples.label.ndim == 2:  # Each seed has its own.
            over_seeds = _over_seeds(lambda one: evaluate_one(*one), net.one_seed_at_a_time)
            total = over_seeds(((params, stats), examples))
        else:
            total = loss.sum_over_examples(
                one_batch, (params, stats), examples, microbatch_size=EVALUATION_BATCH
            )
        return jax.tree.map(lambda x: x / examples.label.shape[-1], total)

    has_stats = bool(jax.tree.leaves(model.init_stats()))
    return ModelFunctions(
        jax.jit(jax.vmap(model.init)),
        losses_and_stats if has_stats else losses,
        evaluate,
        model.init_stats,
    )
