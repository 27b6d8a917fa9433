"""Trains the contestants of a setting: all seeds of a chunk side by side, in one compiled loop.

Contestants whose laws have the same support share one program, which takes the number of the law as
an argument, since compiling takes longest on a graphics card. All draws are functions of the seed's
key, so the result of a seed does not depend on its chunk and its program, up to rounding.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, UInt8

from experiments.decide import _datasets, _nets
from experiments.decide.settings import CONTESTANTS, Setting, noise_number
from msgd_jax import covariance, loss, noise
from msgd_jax._streams import Stream, derive

# Large enough to keep the device busy, small enough for the activations of all seeds to fit.
EVALUATION_BATCH = 500
# The number of examples whose gradients are in memory at the same time, per seed.
GRADIENT_ROWS = 100


@dataclasses.dataclass(frozen=True)
class Options:
    """How a setting is computed; results depend on it by rounding only.

    Attributes:
        convolution: see `_nets.make`.
        groups: see `_nets.make`.
        microbatch_size: the examples of a seed in one pass; None for all examples of a step.
    """

    convolution: _nets.Convolution = "product"
    groups: int = 1
    microbatch_size: int | None = None


class Shape(NamedTuple):
    """The properties that contestants with the same program have in common.

    Attributes:
        support: the number of examples that a step computes; None for all N of them, in order.
        perturbed: whether Gaussian noise is added to the gradient.
    """

    support: int | None
    perturbed: bool


class Example(NamedTuple):
    """The images and the labels of a seed, with a leading axis of examples."""

    image: UInt8[Array, "N height width channels"]
    label: Int[Array, " N"]


class State(NamedTuple):
    """The state of a chunk of seeds; every array has a leading axis of seeds.

    Attributes:
        params: the parameters of the net.
        variances: the variances of the Gaussian noise, like `params`; () without such noise.
        examples: the training examples of each seed.
        noise_keys: the keys of the contestant's noise.
    """

    params: Any
    variances: Any
    examples: Example
    noise_keys: Key[Array, " seeds"]


class Score(NamedTuple):
    """Mean losses, and numbers of images classified correctly.

    They are [seeds] on the device, and NumPy arrays [evaluations, seeds] in an `Outcome`.
    """

    train_loss: Any
    train_correct: Any
    test_loss: Any
    test_correct: Any


class Ends(NamedTuple):
    """Compiled functions that all contestants of a setting share.

    Attributes:
        start: ``start(images, seeds, noise_name) -> State``, without the variances.
        evaluate: ``evaluate(params, examples, images) -> Score``.
    """

    start: Callable[..., State]
    evaluate: Callable[..., Score]


class Program(NamedTuple):
    """The compiled training loop of the contestants of one shape.

    Attributes:
        names: the contestants; `which` of `advance` is an index of them.
        advance: ``advance(state, which, begin, end, learning_rates, decay_step) -> State`` makes
            the steps from `begin` to `end` - 1, each seed at its own learning rate; it donates the
            state.
    """

    names: tuple[str, ...]
    advance: Callable[..., State]


def shape_of(setting: Setting, name: str) -> Shape:
    """The shape of a contestant's program."""
    contestant = CONTESTANTS[name]
    law = contestant.law(setting)
    indices = jax.eval_shape(lambda: law.draw(jax.random.key(0)).indices)
    support = None if indices is None else law.support_size
    return Shape(support, contestant.perturbation != "none")


def make_ends(setting: Setting, options: Options) -> Ends:
    """Makes the functions that all contestants of a setting share: start and evaluation."""
    net = _nets.make(setting, options.convolution)

    def start_one(images: _datasets.Images, seed: Array, noise_name: Array) -> State:
        key = jax.random.key(seed)
        sample = _datasets.draw(setting, key, images.pool_labels)
        params = net.init(derive(key, Stream.PARAMETERS))
        return State(
            params=params,
            variances=(),
            examples=Example(jnp.asarray(images.pool_images)[sample.positions], sample.labels),
            noise_keys=_datasets.noise_key(key, noise_name),
        )

    def evaluate(params: Any, examples: Example, images: _datasets.Images) -> Score:
        test = Example(jnp.asarray(images.test_images), jnp.asarray(images.test_labels))
        mapped = functools.partial(_sums, net.logits)
        train_loss, train_correct = jax.vmap(mapped)(params, examples)
        test_loss, test_correct = jax.vmap(mapped, in_axes=(0, None))(params, test)
        return Score(train_loss, train_correct, test_loss, test_correct)

    start = jax.jit(jax.vmap(start_one, in_axes=(None, 0, None)), compiler_options=_optimization(1))
    return Ends(start, jax.jit(evaluate))


def make_program(setting: Setting, shape: Shape, options: Options) -> Program:
    """Makes the program of all contestants of a shape.

    Raises:
        ValueError: if there is no such convolution, or `groups` is below 1.
    """
    names = tuple(name for name in setting.contestants if shape_of(setting, name) == shape)
    net = _nets.make(setting, options.convolution, options.groups)

    def losses(params: Any, batch: Example) -> Float[Array, " batch"]:
        logits = net.logits(params, batch.image)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.label)

    value_and_grad = loss.weighted_value_and_grad(losses, microbatch_size=options.microbatch_size)
    draws = [CONTESTANTS[name].law(setting).sample for name in names]
    isotropic = jnp.asarray([CONTESTANTS[name].perturbation == "isotropic" for name in names])

    def variances(params: Any, examples: Example, isotropic: Array) -> Any:
        diagonal = covariance_diagonal(losses, params, examples)
        scaled = jax.tree.map(lambda x: x / setting.batch_size, diagonal)
        mean = optax.tree.sum(scaled) / sum(x.size for x in jax.tree.leaves(scaled))
        return jax.tree.map(lambda x: jnp.where(isotropic, mean, x), scaled)

    def step_one(state: State, which: Array, step: Array, rate: Array) -> Any:
        key = state.noise_keys
        weights = jax.lax.switch(which, draws, key, step) if len(draws) > 1 else draws[0](key, step)
        _, grads = value_and_grad(state.params, state.examples, weights)
        if shape.perturbed:
            grads = jax.tree.map(jnp.add, grads, _gaussian(key, step, state.variances))
        return jax.tree.map(lambda p, g: p - rate * g, state.params, grads)

    def advance(
        state: State, which: Array, begin: Array, end: Array, rates: Array, decay_step: Array
    ) -> State:
        def one_step(step: Array, state: State) -> State:
            if shape.perturbed:
                # Outside `vmap`, which would compute both branches at every step.
                fresh = jax.lax.cond(
                    step % setting.refresh_every == 0,
                    lambda: jax.vmap(variances, in_axes=(0, 0, None))(
                        state.params, state.examples, isotropic[which]
                    ),
                    lambda: state.variances,
                )
                state = state._replace(variances=fresh)
            now = jnp.where(step < decay_step, rates, rates * setting.decay_factor)
            params = jax.vmap(step_one, in_axes=(0, None, None, 0))(state, which, step, now)
            return state._replace(params=params)

        return jax.lax.fori_loop(begin, end, one_step, state)

    # Programs with noise are the long ones; at the next lower level their steps take as long.
    lower = _optimization(2) if shape.perturbed else None
    return Program(names, jax.jit(advance, donate_argnums=0, compiler_options=lower))


def _optimization(level: int) -> dict[str, int] | None:
    """Options for a program that takes long to compile: half as long on CPU; elsewhere none."""
    on_cpu = jax.default_backend() == "cpu"
    return {"xla_backend_optimization_level": level} if on_cpu else None


def covariance_diagonal(losses: Any, params: Any, examples: Example) -> Any:
    """The diagonal of S, the covariance of the gradients of single examples; like `params`."""
    vector = loss.LossVector(losses, examples, microbatch_size=GRADIENT_ROWS)
    return covariance.diagonal(vector, params, noise.sgd(vector.num_examples, batch_size=1))


def _gaussian(key: Key[Array, ""], step: Array, variances: Any) -> Any:
    """Independent normals with these variances, from a separate stream."""
    leaves, structure = jax.tree.flatten(variances)
    keys = [derive(key, Stream.LANGEVIN, step, i) for i in range(len(leaves))]
    normals = [
        jnp.sqrt(leaf) * jax.random.normal(own, leaf.shape, leaf.dtype)
        for own, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, normals)


def _sums(logits_of: Callable[..., Array], params: Any, examples: Example) -> tuple[Array, Array]:
    """The mean loss and the number of correct answers, computed batch by batch."""
    size = examples.label.shape[0]
    batch_size = min(EVALUATION_BATCH, size)
    positions = jnp.arange(-(-size // batch_size) * batch_size).reshape(-1, batch_size)

    def one_batch(positions: Array) -> tuple[Array, Array]:
        # The last batch is filled up with the last example, which does not count.
        batch = jax.tree.map(lambda x: x.take(positions, axis=0, mode="clip"), examples)
        counts = positions < size
        logits = logits_of(params, batch.image)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.label)
        correct = (logits.argmax(-1) == batch.label) & counts
        return jnp.where(counts, losses, 0.0).sum(), correct.sum()

    losses, correct = jax.lax.map(one_batch, positions)
    return losses.sum() / size, correct.sum()


class Outcome(NamedTuple):
    """The results of a contestant with the seeds of one chunk.

    Attributes:
        steps: the numbers of steps after which it was evaluated, [evaluations].
        scores: the scores, with arrays [evaluations, seeds].
        seconds: the wall time of steps and evaluations, without compiling.
        compile_seconds: the time before the first step: compiling, and drawing the initial weights.
    """

    steps: list[int]
    scores: Score
    seconds: float
    compile_seconds: float


class Runner:
    """Runs chunks of one setting; it holds the images on the device, and the programs.

    Attributes:
        setting: the setting that is run.
        options: the options with which it is computed.
    """

    def __init__(self, setting: Setting, images: _datasets.Images, options: Options):
        """Puts the images on the device."""
        self.setting, self.options = setting, options
        self._images = jax.device_put(images)
        self._ends = make_ends(setting, options)
        self._programs: dict[Shape, Program] = {}

    def _program(self, name: str) -> Program:
        shape = shape_of(self.setting, name)
        if shape not in self._programs:
            self._programs[shape] = make_program(self.setting, shape, self.options)
        return self._programs[shape]

    def run(
        self,
        name: str,
        seeds: Sequence[int],
        *,
        factors: Sequence[float] | None = None,
        advanced: Callable[[int], None] = lambda steps: None,
    ) -> Outcome:
        """Trains a contestant with these seeds, side by side.

        Args:
            name: the name of the contestant.
            seeds: the seeds, from which subset, labels, initial weights and noise are drawn.
            factors: the factors of the setting's learning rate, one per seed; None for 1.
            advanced: called with the number of steps made since its last call.
        """
        contestant = CONTESTANTS[name]
        steps, before = contestant.evaluation_steps(self.setting), time.perf_counter()
        state, advance = self._started(name, seeds, factors)
        jax.block_until_ready(self._evaluate(state))
        began = time.perf_counter()
        scores, done = [], 0
        for step in steps:
            state = advance(state, done, step)
            scores.append(jax.device_get(self._evaluate(state)))
            advanced(step - done)
            done = step
        seconds = time.perf_counter() - began
        stacked = Score(*(np.stack(values) for values in zip(*scores, strict=True)))
        return Outcome(steps, stacked, seconds, began - before)

    def time_steps(self, name: str, seeds: Sequence[int], steps: int) -> tuple[float, float]:
        """Seconds per step of a contestant after compiling, and the seconds that compiling took."""
        before = time.perf_counter()
        state, advance = self._started(name, seeds, None)
        state = jax.block_until_ready(advance(state, 0, 1))
        began = time.perf_counter()
        jax.block_until_ready(advance(state, 1, 1 + steps))
        return (time.perf_counter() - began) / steps, began - before

    def _evaluate(self, state: State) -> Score:
        return self._ends.evaluate(state.params, state.examples, self._images)

    def _started(
        self, name: str, seeds: Sequence[int], factors: Sequence[float] | None
    ) -> tuple[State, Callable[[State, int, int], State]]:
        """The state before the first step, and the compiled function that advances it."""
        contestant, program = CONTESTANTS[name], self._program(name)
        number = np.uint32(noise_number(contestant.key))
        state = self._ends.start(self._images, np.asarray(seeds, np.int32), number)
        if contestant.perturbation != "none":
            state = state._replace(variances=jax.tree.map(jnp.zeros_like, state.params))
        which = np.int32(program.names.index(name))
        factors = [1.0] * len(seeds) if factors is None else factors
        rates = [contestant.learning_rate(self.setting, factor) for factor in factors]
        rates = np.asarray(rates, np.float32)
        decay_step = np.int32(round(self.setting.decay_at * contestant.steps(self.setting)))

        def advance(state: State, begin: int, end: int) -> State:
            return program.advance(state, which, np.int32(begin), np.int32(end), rates, decay_step)

        # Zero steps, which only compiles.
        return jax.block_until_ready(advance(state, 0, 0)), advance
