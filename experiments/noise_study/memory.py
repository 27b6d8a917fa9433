"""Correlated noise around a minimum (arXiv 2202.02831, arXiv 2306.05300): variances of weights.

At a minimum of a small net, found by training, paths start whose noise has or has not a memory. The
variance along the eigenvectors of the Hessian, between paths, is compared with its exact value for
the quadratic loss there, which has no fitted constant: on this quadratic, where nothing but the
statistics can be wrong, and on the net itself.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from experiments import terminal
from experiments._typing import Law
from experiments.noise_study import _memory_report, _minimum, _problem
from experiments.noise_study._minimum import Examples, Flat, Minimum
from experiments.studies.config import StudyConfig, check
from experiments.studies.study import Study
from msgd_jax import loss, noise

Model = Literal["quadratic", "net"]
Run = tuple[int, Model, str, float]


@dataclasses.dataclass(frozen=True)
class MemoryConfig(StudyConfig):
    """Measures the variance of weights around a minimum for noise with a memory, on the digits.

    Trains a small net to a minimum of its squared loss with weight decay. From there, paths start
    with independent batches of SGD, reshuffled epochs, and correlated noise. Their variances along
    the eigenvectors of the Hessian are compared with the exact ones of the quadratic loss. Prints
    tables; writes memory.jsonl, memory.png and summary.json. A study that was stopped is continued;
    recorded runs are never made again.

    Attributes:
        learning_rate: The learning rate eta of all runs.
        other_rates: The learning rates at which the net is run as well.
        batch_size: The batch size b of each step.
        num_examples: The number N of training images, a multiple of the batch size.
        width: The number of units in each of the two hidden layers.
        weight_decay: The factor of the squared length of the parameters, divided by 2, in the loss.
        steps: The number of iterations of each path; variances are measured in the second half.
        measure_every: The number of iterations between two measurements.
        paths: The number of paths that each run has, from the same minimum.
        descent_rate: The learning rate of gradient descent, which leads near to the minimum.
        descent_steps: The number of its iterations, after which Newton's methods take over.
        margin: The relative error of a prediction within which it counts as right.
        seeds: The number of minima, each with its own images, initial weights and noise.
        seed: The seed of the first minimum; those of the others count up from it.
        report: Whether only the tables and the picture are made again from the records in `out`,
            and nothing is run.
        out: The folder of the results, which must be new or of the same command; None stands for
            runs/noise-study-memory-DATE-TIME.
    """

    parts: ClassVar = ("memory",)

    learning_rate: float = 0.1
    other_rates: tuple[float, ...] = (0.025,)
    batch_size: int = 5
    num_examples: int = 200
    width: int = 8
    weight_decay: float = 1e-3
    steps: int = 4_000
    measure_every: int = 50
    paths: int = 32
    descent_rate: float = 0.3
    descent_steps: int = 5_000
    margin: float = 0.1
    seeds: int = 5
    seed: int = 0
    report: bool = False
    out: pathlib.Path | None = None

    def __post_init__(self):
        fewest = {"batch_size": 1, "width": 1, "measure_every": 1, "paths": 2, "descent_steps": 1}
        positive = ("learning_rate", "other_rates", "descent_rate", "weight_decay", "margin")
        check(self, fewest, {name: getattr(self, name) for name in positive})
        rates = (self.learning_rate, *self.other_rates)
        if len(set(rates)) < len(rates):
            raise ValueError(
                "other_rates must be different from learning_rate and from each other, got "
                f"{self.other_rates}."
            )
        if self.num_examples % self.batch_size or not 2 * self.batch_size <= self.num_examples:
            raise ValueError(
                "num_examples must be a multiple of batch_size, at least twice as large, got "
                f"{self.num_examples} and {self.batch_size}."
            )
        if self.num_examples > 1_000:
            raise ValueError(f"num_examples must be at most 1,000, got {self.num_examples}.")
        if self.steps < 2 * self.measure_every:
            raise ValueError(
                f"steps must be at least twice measure_every = {self.measure_every}, got "
                f"{self.steps}."
            )

    @property
    def measured_at(self) -> tuple[int, ...]:
        """The steps at which variances are measured, in the second half."""
        every = range(self.measure_every, self.steps + 1, self.measure_every)
        return tuple(step for step in every if 2 * step > self.steps)

    @property
    def runs(self) -> tuple[Run, ...]:
        """The seed, the model, the noise and the learning rate of each run, seed by seed."""
        rates = (self.learning_rate, *self.other_rates)
        of_seed: list[tuple[Model, str, float]] = [
            *(("quadratic", name, self.learning_rate) for name in LAWS),
            *(("net", name, rate) for rate in rates for name in _memory_report.ON_NET),
        ]
        return tuple((seed, *rest) for seed in self.all_seeds for rest in of_seed)


def _anti(num_examples: int, batch_size: int) -> Law:
    return noise.coloured(noise.sgd(num_examples, batch_size), (1.0, -1.0))


def _persistent(num_examples: int, batch_size: int) -> Law:
    return noise.coloured(noise.sgd(num_examples, batch_size), (0.5**0.5, 0.5**0.5))


LAWS: dict[str, Callable[[int, int], Law]] = {
    "independent": noise.sgd,
    "reshuffled": noise.random_reshuffling,
    "anti": _anti,
    "persistent": _persistent,
}
"""The laws by name, as functions of N and b. But for "anti", whose steps have twice the variance,
all have the same covariance in each step, that of batches without replacement."""


def make(config: MemoryConfig, missing: list[Run]) -> Iterator[dict[str, Any]]:
    """The records of some runs, made one after the other."""
    losses = _minimum.make_losses(config.width, config.weight_decay)
    find = _minimum.make_finder(
        losses,
        num_examples=config.num_examples,
        width=config.width,
        learning_rate=config.descent_rate,
        descent_steps=config.descent_steps,
    )
    trace = jax.jit(functools.partial(_trace, losses))
    laws = {name: law(config.num_examples, config.batch_size) for name, law in LAWS.items()}
    programs: dict[tuple[str, str], Callable[..., Any]] = {}
    minimum, of_seed = None, None
    with terminal.Progress(len(missing) * config.steps) as progress:
        for seed, model, name, rate in missing:
            if minimum is None or seed != of_seed:
                progress.compiling(f"minimum of seed {seed}")
                minimum, of_seed = find(seed), seed
            if (model, name) not in programs:
                progress.compiling(f"{name} on the {model}")
                programs[model, name] = _make_advance(model, laws[name], losses)
            key = _problem.noise_key(jax.random.key(seed), name)
            found, last = walk(config, minimum, programs[model, name], model, key, rate, progress)
            found["predicted"] = _minimum.predicted_variances(
                laws[name],
                minimum.curvatures,
                np.square(minimum.slopes).mean(0),
                learning_rate=rate,
                measured_at=config.measured_at,
                cycle=config.num_examples // config.batch_size,
            )
            yield {
                "step": config.steps,
                "seed": seed,
                "model": model,
                "noise": name,
                "learning_rate": rate,
                "loss_at_minimum": minimum.loss,
                "slope_at_minimum": minimum.slope,
                "smallest_curvature": float(minimum.curvatures[0]),
                "trace_at_minimum": float(trace(minimum.params, minimum.examples)),
                "trace_at_mean": float(trace(last, minimum.examples)),
                **_memory_report.binned(minimum.curvatures, found),
            }


STUDY = Study(
    name="memory",
    names=("seed", "model", "noise", "learning_rate"),
    fields=_memory_report.FIELDS,
    plan=lambda config: config.runs,
    make=make,
    rows=_memory_report.rows,
    table=_memory_report.table,
    draw=_memory_report.draw,
)


def walk(
    config: MemoryConfig,
    minimum: Minimum,
    advance: Callable[..., Array],
    model: str,
    key: Key[Array, ""],
    rate: float,
    progress: terminal.Silent,
) -> tuple[dict[str, Float[np.ndarray, " D"]], Flat]:
    """Lets paths start at a minimum, and measures their variances along the eigenvectors.

    Args:
        config: the configuration of the study.
        minimum: where the paths start.
        advance: as from `_make_advance`, for the model and the law.
        model: "quadratic" or "net".
        key: the key of the noise; each path has its own, made from it.
        rate: the learning rate.
        progress: is told of the steps.

    Returns:
        The variances between the paths, and their mean squares about the minimum, both as means
        over the measurements, [D]; and the mean of the paths at the end, as parameters.
    """
    keys = jax.random.split(key, config.paths)
    narrow = [jnp.asarray(x, jnp.float32) for x in (minimum.curvatures, minimum.slopes)]
    basis = jnp.asarray(minimum.basis, jnp.float32)
    quadratic = model == "quadratic"
    own = tuple(narrow) if quadratic else minimum.examples
    start = jnp.zeros_like(minimum.params) if quadratic else minimum.params
    points = jnp.tile(start, (config.paths, 1))

    @jax.jit
    def moments(points: Float[Array, "paths D"]) -> tuple[Flat, Flat]:
        places = points
        if not quadratic:
            places = jnp.matmul(points - minimum.params[None], basis, precision="highest")
        return places.var(0, ddof=1), jnp.square(places).mean(0)

    total, done = np.zeros((2, len(start))), 0
    for step in config.measured_at:
        points = advance(points, own, keys, rate, done, step)
        total += np.asarray(jnp.stack(moments(points)), float)
        progress.update(step - done)
        done = step
    progress.update(config.steps - done)
    measured, about = total / len(config.measured_at)
    last = points.mean(0)
    return {"measured": measured, "about_minimum": about}, (
        minimum.params + basis @ last if quadratic else last
    )


def _make_advance(
    model: str, law: Law, losses: Callable[..., Float[Array, " batch"]]
) -> Callable[..., Array]:
    """A compiled function ``(points, own, keys, rate, begin, end) -> points`` for all paths.

    On the quadratic, `own` are the eigenvalues of the Hessian and the slopes of the losses along
    its eigenvectors, and points have coordinates along these. On the net, `own` are the examples.
    """
    value_and_grad = loss.weighted_value_and_grad(losses)

    def on_quadratic(place: Flat, own: Any, weights: noise.Weights) -> Flat:
        curvatures, slopes = own
        # The mean slope is 0, so that the weights need not be centred.
        slopes = slopes if weights.indices is None else slopes[weights.indices]
        return curvatures * place + jnp.matmul(weights.values, slopes, precision="highest")

    def on_net(params: Flat, own: Examples, weights: noise.Weights) -> Flat:
        return value_and_grad(params, own, weights)[1]

    gradient = on_quadratic if model == "quadratic" else on_net

    def one(
        point: Flat, own: Any, key: Key[Array, ""], rate: Array, begin: Array, end: Array
    ) -> Flat:
        def step(t: Array, point: Flat) -> Flat:
            return point - rate * gradient(point, own, law.sample(key, t))

        return jax.lax.fori_loop(begin, end, step, point)

    return jax.jit(jax.vmap(one, in_axes=(0, None, 0, None, None, None)))


def _trace(
    losses: Callable[..., Float[Array, " batch"]], params: Flat, examples: Examples
) -> Float[Array, ""]:
    """The trace of the Hessian of the mean loss."""
    return jnp.trace(jax.hessian(lambda params: losses(params, examples).mean())(params))
