"""The full regulariser of section 3 in training, against what it costs and what else is as fast.

All cases of a seed have the same images, labels and initial weights. Cases with noise have keys of
their own. Nothing is chosen on the seeds that decide: the best learning rates come from others.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import Array, Key

from experiments import data, terminal, training
from experiments.studies.study import Study, rounded
from experiments.theory_study import _regularizer_report
from experiments.theory_study._regularizer_config import RegularizerConfig
from experiments.training import NoiseSettings, TrainConfig
from msgd_jax import complexity, noise

PASSES = 6
"""The forward and backward passes of a step with the regulariser: one for the gradient, and five
for one ascent of one step per sign, as in `complexity.penalty`."""
_DECAY = 0.1
# Measured on one core: of a pass over one example, and of compiling one group of runs.
_SECONDS, _COMPILING = 0.7e-6, 5.0
# The evaluations of a run, of which the last one is the endpoint; the others move the progress bar.
_EVALUATIONS = 4
Run = tuple[str, float, int]


class Case(NamedTuple):
    """One way to train.

    Attributes:
        algorithm: the name of the algorithm in `experiments.training`.
        share: the factor of the regulariser, relative to that at which its first order has the
            variance of SGD's noise; 0 for none.
        support: whether the regulariser is computed on b examples per step and not on all; its
            factor is then `share` itself.
        longer: whether there are as many gradients as with the regulariser.
    """

    algorithm: str
    share: float = 0.0
    support: bool = False
    longer: bool = False

    @property
    def cost(self) -> int:
        """The passes over the examples of a step, relative to plain training of as many steps."""
        return PASSES if self.share or self.longer else 1


CASES: dict[str, Case] = {
    "gd": Case("gd"),
    "gd-longer": Case("gd", longer=True),
    "full": Case("gd", share=1.0),
    "tenth": Case("gd", share=0.1),
    "no-sup": Case("gd-rademacher"),
    "sgd": Case("sgd"),
    "sgd-longer": Case("sgd", longer=True),
    "sgd-full": Case("sgd", share=0.1, support=True),
}
"""The cases by name; those that are compared are in `_regularizer_report.FAMILY`."""


def plan(config: RegularizerConfig) -> list[Run]:
    """The case, learning rate and seed of all runs: those that decide, and those that choose."""
    every = [(name, rate) for name in CASES for rate in rates(config, name)]
    # Only where there is something to choose.
    chosen = [(name, rate) for name, rate in every if len(rates(config, name)) > 1]
    return [
        *((name, rate, seed) for name, rate in every for seed in config.all_seeds),
        *((name, rate, seed) for name, rate in chosen for seed in config.all_tuning_seeds),
    ]


def rates(config: RegularizerConfig, name: str) -> tuple[float, ...]:
    """The learning rates of a case; none if it is not among the chosen ones."""
    chosen = (config.learning_rate,) if name in config.cases else ()
    if name == "gd":
        return (*chosen, *config.other_rates) if chosen else ()
    if name == "full" and "full-rates" in config.cases:
        return (*chosen, *config.other_rates)
    return chosen


def make(config: RegularizerConfig, missing: list[Run]) -> Iterator[dict[str, Any]]:
    """The records of some runs; seeds that follow each other are trained side by side."""
    groups = [
        (name, rate, own)
        for (name, rate), runs in itertools.groupby(missing, key=lambda run: run[:2])
        for own in consecutive([seed for _, _, seed in runs])
    ]
    total = sum(CASES[name].cost * config.steps * len(own) for name, _, own in groups)
    with terminal.Progress(total, "gradient") as progress:
        for name, rate, own in groups:
            progress.compiling(f"{name}, rate {rate:g}")
            yield from train(config, name, rate, own, progress.update)


def seconds(config: RegularizerConfig, missing: Sequence[Run]) -> float:
    """About how long some runs take on one core."""
    passes = sum(CASES[name].cost for name, _, _ in missing) * config.steps
    groups = len({(name, rate) for name, rate, _ in missing})
    return groups * _COMPILING + passes * config.num_train * _SECONDS


def consecutive(seeds: Sequence[int]) -> list[range]:
    """The seeds in ascending order, as ranges that are as long as possible."""
    found: list[range] = []
    for seed in sorted(seeds):
        if found and seed == found[-1].stop:
            found[-1] = range(found[-1].start, seed + 1)
        else:
            found.append(range(seed, seed + 1))
    return found


def train(
    config: RegularizerConfig,
    name: str,
    rate: float,
    seeds: range,
    advanced: Callable[[int], None] = lambda passes: None,
) -> Iterator[dict[str, Any]]:
    """Trains one case with these seeds, and yields their records.

    A run whose loss stops being finite ends as NaN, and so do those that are trained beside it.
    """
    case = CASES[name]
    asked = plan_of(config, case, rate, seeds)
    last, done = None, 0
    try:
        for _, evaluation in training.train_seeds(
            asked, examples(config, seeds), regularizer(config, case)
        ):
            passes = (evaluation.step - done) * len(seeds) * (PASSES if case.share else 1)
            advanced(passes)
            last, done = evaluation, evaluation.step
    except training.DivergedError:
        last = None
    for i, seed in enumerate(seeds):
        yield {
            "step": asked.steps,
            "case": name,
            "rate": rate,
            "seed": seed,
            **{
                quantity: float("nan") if last is None else rounded(getattr(last, quantity)[i], 6)
                for quantity in _regularizer_report.QUANTITIES
            },
        }


def plan_of(config: RegularizerConfig, case: Case, rate: float, seeds: range) -> TrainConfig:
    """The configuration of the training of one case."""
    steps = config.steps * (PASSES if case.longer else 1)
    decayed = round(config.decay_at * steps)
    return TrainConfig(
        algorithm=case.algorithm,
        dataset="digits",
        steps=steps,
        learning_rate=rate,
        decay_at=(decayed,) if 0 < decayed < steps else (),
        decay_factor=_DECAY,
        noise=NoiseSettings(batch_size=config.batch_size),
        seeds=len(seeds),
        seed=seeds.start,
        subset_per_seed=True,
        eval_every=-(-steps // _EVALUATIONS),
        microbatch_size=None,
    )


def examples(config: RegularizerConfig, seeds: range) -> data.Dataset:
    """The images of all seeds side by side, each seed with a split and wrong labels of its own."""
    drawn = []
    for seed in seeds:
        one = data.subset(data.load("digits", seed=seed), config.num_train, None, seed=seed)
        drawn.append(data.with_wrong_labels(one, config.label_noise, seed=seed))
    tests = jax.tree.map(lambda *leaves: np.stack(leaves), *(one.test for one in drawn))
    shared = data.side_by_side(drawn)
    return dataclasses.replace(shared, test=tests)


def regularizer(
    config: RegularizerConfig, case: Case
) -> Callable[[Key[Array, ""]], optax.GradientTransformation] | None:
    """A function from a key to the transformation that adds the regulariser; None for none."""
    if not case.share:
        return None
    n, b = config.num_train, config.batch_size
    law = complexity.rademacher(n, b) if case.support else complexity.rademacher(n)
    matched = 1.0 if case.support else noise.matching_scale(noise.fisher(n, b))
    return lambda key: complexity.add_local_complexity(
        law, key, radius=config.radius, scale=case.share * matched
    )


STUDY = Study(
    name="regularizer",
    names=("case", "rate", "seed"),
    fields=frozenset(_regularizer_report.QUANTITIES),
    plan=plan,
    make=make,
    rows=_regularizer_report.rows,
    table=_regularizer_report.table,
    draw=_regularizer_report.draw,
    command="theory-study",
    seconds=seconds,
)
