"""Local complexities along training, compared where training losses are equal.

Noise slows training down, so that complexities after equally many steps belong to different losses.
Here they are measured when the training loss, which is evaluated every few steps, first reaches a
target. Each measurement draws multipliers of its own: seeds, algorithms and targets share none.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from experiments import terminal
from experiments._typing import Data, Law, Params
from experiments.decide.settings import noise_number
from experiments.studies.study import Study, rounded
from experiments.theory_study import _complexities_report, _net
from experiments.theory_study._complexities_config import ComplexitiesConfig
from experiments.theory_study.network import trainer
from msgd_jax import complexity, loss, noise
from msgd_jax._streams import Stream, derive

NET = "relu-max"
# The draws that a seed makes from its stream of cases.
_NOISE, _MULTIPLIERS = range(2)
# Measured on one core: of the gradient of one example, and of compiling an algorithm.
_SECONDS, _COMPILING = 1e-5, 6.0
# About how many steps a run takes with the options' defaults.
_STEPS = 1_000


def plan(config: ComplexitiesConfig) -> list[tuple[str, int]]:
    """The algorithm and the seed of all runs."""
    return [(name, seed) for name in config.algorithms for seed in config.all_seeds]


def make(config: ComplexitiesConfig, missing: list[tuple[str, int]]) -> Iterator[dict[str, Any]]:
    """The records of some runs, made one after the other."""
    seeds = sorted({seed for _, seed in missing})
    drawn = _net.images(seeds, config.num_train, config.data_dir)
    examples = dict(zip(seeds, drawn, strict=True))
    functions: dict[str, Until] = {}
    measure = measurement(config)
    with terminal.Progress(len(missing) * len(config.targets), "measurement") as progress:
        for name, seed in missing:
            if name not in functions:
                progress.compiling(name)
                functions[name] = until(config, law_of(config, name))
            yield run(config, functions[name], measure, name, seed, examples[seed], progress.update)


def law_of(config: ComplexitiesConfig, name: str) -> Law:
    """The law of an algorithm's weights."""
    n, b = config.num_train, config.batch_size
    if name.startswith("sgd"):
        return noise.sgd(n, b)
    return noise.cov(n, b) if name == "cov" else noise.gd(n)


def seconds(config: ComplexitiesConfig, missing: Sequence[tuple[str, int]]) -> float:
    """About how long some runs take on one core."""
    ascents = 2 * len(_complexities_report.LAWS) * config.num_draws * (config.ascent_steps + 2)
    gradients = _STEPS + ascents * len(config.targets)
    compiling = (len({name for name, _ in missing}) + 1) * _COMPILING
    return compiling + len(missing) * gradients * config.num_train * _SECONDS


class Point(NamedTuple):
    """Where a run is: its parameters, the number of steps made, and the training loss."""

    params: Params
    step: Int[Array, ""]
    loss: Float[Array, ""]


Until = Callable[[Point, Data, Key[Array, ""], float], Point]


def until(config: ComplexitiesConfig, law: Law) -> Until:
    """A compiled function ``(point, examples, key, target)`` to the point that reaches the target.

    It ends after `most_steps` steps, and where the loss is not finite.
    """
    losses = _net.losses_of(NET)
    train = trainer(losses, law)

    def reach(point: Point, examples: Data, key: Key[Array, ""], target: Array) -> Point:
        def unfinished(point: Point) -> Array:
            return (
                (point.loss > target)
                & jnp.isfinite(point.loss)
                & (point.step + config.every <= config.most_steps)
            )

        def further(point: Point) -> Point:
            end = point.step + config.every
            params = train(
                point.params,
                examples,
                key,
                jnp.float32(config.learning_rate),
                point.step,
                end,
            )
            return Point(params, end, losses(params, examples).mean())

        return jax.lax.while_loop(unfinished, further, point)

    return jax.jit(reach)


def measurement(config: ComplexitiesConfig) -> Callable[..., dict[str, dict[str, Array]]]:
    """A compiled function ``(params, examples, key)`` to the complexities by law."""
    n = config.num_train
    laws = {
        "Rademacher": complexity.rademacher(n),
        "SGD": complexity.sgd(n, config.batch_size),
    }

    def measure(params: Params, examples: Data, key: Key[Array, ""]) -> dict[str, Any]:
        vector = loss.LossVector(_net.losses_of(NET), examples)
        found = {}
        for place, (name, law) in enumerate(laws.items()):
            local = complexity.local_complexity(
                vector,
                params,
                law,
                radius=config.radius,
                num_draws=config.num_draws,
                key=derive(key, Stream.CASES, place),
                ascent=complexity.Ascent(num_starts=1, num_steps=config.ascent_steps, at_once=1),
            )
            found[name] = {
                "mean": local.mean,
                "standard_error": local.standard_error,
                "gap": local.gap.max(),
            }
        return found

    return jax.jit(measure)


def run(
    config: ComplexitiesConfig,
    reach: Until,
    measure: Callable[..., Any],
    name: str,
    seed: int,
    examples: Data,
    advanced: Callable[[int], None] = lambda measurements: None,
) -> dict[str, Any]:
    """Trains one algorithm with one seed; the record has an entry per target.

    Entries of targets that were not reached are NaN.
    """
    key = jax.random.key(seed)
    noise_key = derive(key, Stream.CASES, _NOISE, noise_number(name))
    params = _net.initial(key)
    first = _net.losses_of(NET)(params, examples).mean()
    point = Point(params, jnp.asarray(0), first)
    reached: dict[str, list[float]] = {"steps": [], "train_loss": []}
    complexities: dict[str, dict[str, list[float]]] = {}
    for place, target in enumerate(config.targets):
        point = reach(point, examples, noise_key, target)
        there = float(point.loss) <= target
        reached["steps"].append(int(point.step) if there else float("nan"))
        reached["train_loss"].append(rounded(float(point.loss), 6) if there else float("nan"))
        own_key = derive(key, Stream.CASES, _MULTIPLIERS, noise_number(name), place)
        measured = measure(point.params, examples, own_key)
        for law, values in jax.device_get(measured).items():
            own = complexities.setdefault(law, {quantity: [] for quantity in values})
            for quantity, value in values.items():
                value = rounded(np.float64(value), 6) if there else float("nan")
                own[quantity].append(value)
        advanced(1)
    return {
        "step": int(point.step),
        "algorithm": name,
        "seed": seed,
        "reached": reached["steps"],
        "train_loss": reached["train_loss"],
        "complexities": complexities,
    }


STUDY = Study(
    name="complexities",
    names=("algorithm", "seed"),
    fields=frozenset({"reached", "train_loss", "complexities"}),
    plan=plan,
    make=make,
    rows=_complexities_report.rows,
    table=_complexities_report.table,
    draw=_complexities_report.draw,
    command="theory-study",
    seconds=seconds,
)
