"""Tail indices of gradient noise, as Simsekli et al. 2019 estimate them, for noise of known tails.

At several points of SGD's training, SGD's noise and noises whose tails are known go through the
same estimators: Gaussian noise (M-SGD-Cov has SGD's covariance), Student t weights, and stable
noise, for which the published estimator was made.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from experiments import terminal
from experiments._typing import Params
from experiments.noise_study import _problem, _tails_report
from experiments.noise_study._minimum import Examples, digits
from experiments.studies.config import StudyConfig, check
from experiments.studies.study import Study
from msgd_jax import covariance, loss, measure, noise
from msgd_jax._streams import Stream, derive

Net = Literal["relu", "tanh"]
_BLOCK = 32
"""The block size of the block estimator for draws; for pooled numbers it is the root of their
number, as in the published code."""
_TESTED = 3
"""The number of directions of the test of Gaussianity."""


@dataclasses.dataclass(frozen=True)
class TailsConfig(StudyConfig):
    """Measures what estimators of tail indices say of SGD's noise, and of noise of known tails.

    Trains small nets on the digits by SGD, and draws noises of several laws at some points on the
    way. Prints tables; writes tails.jsonl, tails.png and summary.json. A study that was stopped is
    continued; recorded runs are never made again.

    Attributes:
        nets: The nets: "relu" has cross-entropy as its loss, as in the paper; "tanh" has squared
            loss, as in the other studies.
        points: The iterations after which the noise is measured, in ascending order.
        learning_rate: The learning rate eta of SGD.
        batch_size: The batch size b.
        num_examples: The number N of training images.
        width: The number of units in each of the two hidden layers.
        num_draws: The number of draws of each noise at each point, a multiple of 32.
        directions: The number of random directions on which the noise is projected.
        degrees_of_freedom: Those of the Student t noise, above 2: the index of its tails.
        stable_index: The index of the stable noise, between 0.1 and 2.
        seeds: The number of runs, each with its own images, initial weights and noise.
        seed: The seed of the first run; those of the other runs count up from it.
        report: Whether only the tables and the picture are made again from the records in `out`,
            and nothing is run.
        out: The folder of the results, which must be new or of the same command; None stands for
            runs/noise-study-tails-DATE-TIME.
    """

    parts: ClassVar = ("tails",)

    nets: tuple[Net, ...] = ("relu", "tanh")
    points: tuple[int, ...] = (0, 100, 1_000, 6_000)
    learning_rate: float = 0.1
    batch_size: int = 16
    num_examples: int = 1_000
    width: int = 32
    num_draws: int = 512
    directions: int = 16
    degrees_of_freedom: float = 3.0
    stable_index: float = 1.5
    seeds: int = 5
    seed: int = 0
    report: bool = False
    out: pathlib.Path | None = None

    def __post_init__(self):
        fewest = {"batch_size": 1, "num_examples": 4, "width": 1, "directions": _TESTED}
        check(self, fewest | {"num_draws": 2 * _BLOCK}, {"learning_rate": self.learning_rate})
        if not self.nets or len(set(self.nets)) < len(self.nets):
            raise ValueError(f"nets must name one or more, each once, got {self.nets}.")
        if not self.points or min(self.points) < 0 or sorted(set(self.points)) != [*self.points]:
            raise ValueError(
                f"points must be iterations from 0 on, in ascending order, got {self.points}."
            )
        if self.num_examples > 1_000:
            raise ValueError(f"num_examples must be at most 1,000, got {self.num_examples}.")
        if self.num_draws % _BLOCK:
            raise ValueError(f"num_draws must be a multiple of {_BLOCK}, got {self.num_draws}.")
        if not (math.isfinite(self.degrees_of_freedom) and self.degrees_of_freedom > 2):
            raise ValueError(
                f"degrees_of_freedom must be finite and above 2, got {self.degrees_of_freedom}."
            )
        if not 0.1 <= self.stable_index < 2:
            raise ValueError(f"stable_index must be from 0.1 to below 2, got {self.stable_index}.")

    @property
    def runs(self) -> tuple[tuple[Net, int], ...]:
        """The net and the seed of each run."""
        return tuple((net, seed) for net in self.nets for seed in self.all_seeds)


def make(config: TailsConfig, missing: list[tuple[Net, int]]) -> Iterator[dict[str, Any]]:
    """The records of some runs, made one after the other."""
    laws = _laws(config)
    measured = jax.jit(_measures)
    programs = {net: _make_advance(config, net, laws["sgd"]) for net in dict(missing)}
    total = len(missing) * len(config.points) * len(_tails_report.LABELS)
    with terminal.Progress(total, "measurement") as progress:
        for net, seed in missing:
            progress.compiling(f"{net} net of seed {seed}")
            yield _run(config, net, seed, laws, programs[net], measured, progress)


STUDY = Study(
    name="tails",
    names=("net", "seed"),
    fields=_tails_report.FIELDS,
    plan=lambda config: config.runs,
    make=make,
    rows=_tails_report.rows,
    table=_tails_report.table,
    draw=_tails_report.draw,
)


def _laws(config: TailsConfig) -> dict[str, noise.MNoise]:
    """The laws of weights; SGD draws with replacement, so that its covariance is S/b, as Cov's."""
    n, b = config.num_examples, config.batch_size
    return {
        "sgd": noise.sgd(n, b, replace=True),
        "cov": noise.cov(n, b),
        "fisher": noise.fisher(n, b),
        "student_t": noise.student_t(n, b, degrees_of_freedom=config.degrees_of_freedom),
    }


def _run(
    config: TailsConfig,
    net: Net,
    seed: int,
    laws: dict[str, noise.MNoise],
    advance: Callable[..., Params],
    measured: Callable[..., dict[str, Array]],
    progress: terminal.Silent,
) -> dict[str, Any]:
    """Trains one net; returns its record, quantity -> noise -> [points]."""
    key = jax.random.key(seed)
    examples = digits(seed, config.num_examples)
    params = initial(net, key, examples["x"].shape[1], config.width)
    training = _problem.noise_key(key, f"training, {net}")
    vector = loss.LossVector(LOSSES[net], examples)
    found: dict[str, Any] = {name: {} for name in _tails_report.QUANTITIES}
    losses, exact, done = [], [], 0
    for step in config.points:
        params = advance(params, examples, training, done, step)
        done = step
        gradients = covariance.flatten(vector.gradient_matrix(params))
        here = _problem.measure_key(key, step)
        probes = _probes(derive(here, Stream.PROBES), gradients.shape[1], config.directions)
        losses.append(float(f"{vector.mean(params):.5g}"))
        slopes = jnp.matmul(gradients, probes[0], precision="highest").T
        values = measure.sgd_kurtosis(slopes, config.batch_size, replace=True)
        exact.append(float(f"{values.mean():.5g}"))
        for name in _tails_report.LABELS:
            drawn = draws(config, name, laws, _problem.noise_key(here, f"{name}, {net}"), gradients)
            for quantity, value in measured(drawn, *probes).items():
                found[quantity].setdefault(name, []).append(float(f"{value:.5g}"))
            progress.update()
    return {
        "step": done,
        "net": net,
        "seed": seed,
        "points": list(config.points),
        "loss": losses,
        "sgd_kurtosis": exact,
        **found,
    }


# Nets ---------------------------------------------------------------------------------------------


@loss.per_example
def _relu_losses(params: Params, example: Examples) -> Float[Array, ""]:
    """The cross-entropy of a net of rectified linear units."""
    hidden = jax.nn.relu(example["x"] @ params["w1"] + params["b1"])
    hidden = jax.nn.relu(hidden @ params["w2"] + params["b2"])
    return -jax.nn.log_softmax(hidden @ params["w3"] + params["b3"])[example["y"]]


LOSSES: dict[str, Any] = {"relu": _relu_losses, "tanh": _problem.losses}
"""The losses of each net."""


def initial(net: Net, key: Key[Array, ""], inputs: int, width: int) -> Params:
    """The initial parameters; the weights of "relu" are normal, with variance 2 / inputs."""
    params = _problem.initial(key, inputs, width)
    if net == "tanh":
        return params
    factors = {"w1": 2**0.5, "w2": 2**0.5, "w3": 4 * 2**0.5}
    return {name: factors.get(name, 1.0) * leaf for name, leaf in params.items()}


def _make_advance(config: TailsConfig, net: Net, law: noise.MNoise) -> Callable[..., Params]:
    """A compiled function ``(params, examples, key, begin, end) -> params`` that trains by SGD."""
    value_and_grad = loss.weighted_value_and_grad(LOSSES[net])

    @jax.jit
    def advance(
        params: Params, examples: Examples, key: Key[Array, ""], begin: Array, end: Array
    ) -> Params:
        def step(t: Array, params: Params) -> Params:
            _, grads = value_and_grad(params, examples, law.sample(key, t))
            return jax.tree.map(lambda p, g: p - config.learning_rate * g, params, grads)

        return jax.lax.fori_loop(begin, end, step, params)

    return advance


# Draws and measurements ---------------------------------------------------------------------------


def draws(
    config: TailsConfig,
    name: str,
    laws: dict[str, noise.MNoise],
    key: Key[Array, ""],
    gradients: Float[Array, "N D"],
) -> Float[Array, "K D"]:
    """Draws of a noise, given the gradients of all examples."""
    shape = config.num_draws, gradients.shape[1]
    if name == "stable":
        return stable(key, shape, config.stable_index)
    if name == "isotropic":
        variance = gradients.var(0).mean() / config.batch_size
        return jnp.sqrt(variance) * jax.random.normal(key, shape)
    steps = jnp.arange(config.num_draws)
    weights = jax.vmap(laws[name].sample, in_axes=(None, 0))(key, steps).dense()
    return jnp.matmul(weights - 1 / config.num_examples, gradients, precision="highest")


def stable(key: Key[Array, ""], shape: tuple[int, ...], index: float) -> Array:
    """Independent symmetric stable numbers, by Chambers, Mallows and Stuck (1976)."""
    keys = jax.random.split(key, 3)
    # The angle's distance from -pi/2 or pi/2, above 0: a rounded pi/2 has a cosine below 0.
    apart = math.pi / 2 * (1 - jax.random.uniform(keys[0], shape))
    angle = jax.random.rademacher(keys[1], shape, jnp.float32) * (math.pi / 2 - apart)
    wait = jax.random.exponential(keys[2], shape)
    tail = (jnp.cos((1 - index) * angle) / wait) ** ((1 - index) / index)
    return jnp.sin(index * angle) / jnp.sin(apart) ** (1 / index) * tail


def _probes(key: Key[Array, ""], size: int, count: int) -> tuple[Array, Array, Key[Array, ""]]:
    """Orthonormal directions [D, J], an order of the coordinates [D], and a key for the test."""
    keys = jax.random.split(key, 3)
    directions = jnp.linalg.qr(jax.random.normal(keys[0], (size, count)))[0]
    return directions, jax.random.permutation(keys[1], size), keys[2]


def _measures(
    drawn: Float[Array, "K D"],
    directions: Float[Array, "D J"],
    order: Array,
    key: Key[Array, ""],
) -> dict[str, Array]:
    """All estimates for one noise; an index per direction is averaged as its inverse."""
    pooled = math.isqrt(drawn.size)
    vector = measure.block_index(drawn, block_size=_BLOCK)
    projected = jnp.matmul(drawn, directions, precision="highest")

    def over_directions(estimate: Callable[[Array], measure.TailIndex]) -> Array:
        inverse = jax.vmap(lambda x: 1 / jnp.asarray(estimate(x).estimate.value))(projected.T)
        return 1 / inverse.mean()

    def block(numbers: Float[Array, "K *J"], size: int) -> Array:
        return jnp.asarray(measure.block_index(numbers, block_size=size).estimate.value)

    hill = {
        f"hill_{name}": over_directions(
            lambda x, top=top: measure.hill_index(x, num_top=max(1, round(top * len(x))))
        )
        for name, top in _tails_report.SHARES.items()
    }
    kurtosis = jax.vmap(lambda x: jnp.asarray(measure.excess_kurtosis(x).value))(projected.T)
    return {
        "pooled": block(drawn.reshape(-1), pooled),
        "permuted": block(drawn[:, order].reshape(-1), pooled),
        "vector": jnp.asarray(vector.estimate.value),
        "vector_limit": jnp.asarray(vector.without_tails),
        "projection": over_directions(lambda x: measure.block_index(x, block_size=_BLOCK)),
        **hill,
        "kurtosis": kurtosis.mean(),
        "gaussian_p": measure.gaussianity_test(projected[:, :_TESTED], key).p_value,
    }
