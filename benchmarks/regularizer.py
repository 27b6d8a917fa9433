"""The cost of the Rademacher regulariser in training: a step with it against a plain step.

``python -m benchmarks.regularizer``. Both sides are gradient descent on the same LeNet and
examples. As the paper trains it, without supremum and absolute value, the regulariser is a law of
weights and its step is a plain one. In full it takes ``1 + 2 (K + 1)`` more gradients, for ascents
of K steps. Both sides use micro-batches: without them, a program with a single gradient waits for
memory, and one with several gradients does not.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import tyro

from benchmarks import problems, report, step_overhead, timing
from msgd_jax import complexity, noise, train

PLAIN, LINEAR = "plain", "no sup, no abs"


@dataclasses.dataclass(frozen=True)
class Config(report.Config):
    """Compares steps with the regulariser with plain steps.

    Attributes:
        examples: The number N of examples.
        batch_size: The batch size b, whose SGD sets the scale.
        ascent_steps: The number K of ascent steps of each contestant.
        microbatch_size: The number of examples in one pass.
    """

    repeats: int = 20
    examples: int = 1_000
    batch_size: int = 50
    ascent_steps: tuple[int, ...] = (0, 1, 3)
    microbatch_size: int = 100


def main(config: Config) -> list[report.Headline]:
    """Measures, prints, writes; returns the headlines."""
    if config.quick:
        config = dataclasses.replace(
            config, repeats=2, examples=60, batch_size=5, ascent_steps=(1,)
        )
    problem = problems.lenet(config.examples)
    n = config.examples
    scale = noise.matching_scale(noise.fisher(n, config.batch_size))
    loop = functools.partial(_loop, problem, config.microbatch_size)
    contestants = {PLAIN: loop(noise.gd(n)), LINEAR: loop(noise.rademacher(n, scale))}
    gradients = {PLAIN: 1, LINEAR: 1}
    law = complexity.rademacher(n)
    for steps in config.ascent_steps:
        name = f"in full, {steps} steps of ascent"
        added = complexity.add_local_complexity(
            law,
            jax.random.key(2),
            radius=0.1,
            scale=scale,
            ascent=complexity.Ascent(num_starts=1, num_steps=steps),
            microbatch_size=config.microbatch_size,
        )
        contestants[name] = loop(noise.gd(n), added)
        gradients[name] = 2 + 2 * (steps + 1)
    seconds = timing.alternate(contestants, repeats=config.repeats, description="regulariser")
    ratios = {name: timing.ratio(seconds, name, PLAIN) for name in contestants if name != PLAIN}
    rows = [
        {
            "step": name,
            "gradients": gradients[name],
            "ms": f"{1e3 * float(np.median(seconds[name])):.1f}",
            "over a plain step": f"{ratio.median:.2f}",
            "quartiles": f"{ratio.low:.2f} to {ratio.high:.2f}",
        }
        for name, ratio in ratios.items()
    ]
    headlines = [_headline(name, ratio, gradients[name]) for name, ratio in ratios.items()]
    report.publish(
        "regularizer",
        config,
        rows,
        headlines,
        functools.partial(_plot, ratios, gradients),
        seconds={name: values.tolist() for name, values in seconds.items()},
    )
    return headlines


def _loop(
    problem: problems.Problem, microbatch_size: int, law: noise.MNoise, added: Any = None
) -> Callable[[], Any]:
    """One step of gradient descent with this law and this addition to the gradient."""
    sgd = optax.sgd(step_overhead.LEARNING_RATE)
    optimizer = sgd if added is None else optax.chain(added, sgd)
    step = train.make_step(problem.loss_vector_fn, optimizer, law, microbatch_size=microbatch_size)
    loop = train.make_loop(step, max_steps=1)
    state = train.init(problem.params, optimizer, jax.random.key(1))

    def run() -> Any:
        nonlocal state
        state, metrics = loop(state, problem.data, 1)
        return state.params, metrics

    return run


def _headline(name: str, ratio: timing.Spread, gradients: int) -> report.Headline:
    target = 1.1 * gradients
    return report.Headline(
        "regularizer",
        f"step with the Rademacher regulariser, {name}, over plain step ({gradients} gradients)",
        f"{ratio.median:.2f} (quartiles {ratio.low:.2f} to {ratio.high:.2f})",
        f"<= {target:.1f}",
        ratio.median <= target,
    )


def _plot(ratios: dict[str, timing.Spread], gradients: dict[str, int], axes: Any) -> None:
    counts = np.array([gradients[name] for name in ratios])
    medians = np.array([ratio.median for ratio in ratios.values()])
    errors = [
        [ratio.median - ratio.low for ratio in ratios.values()],
        [ratio.high - ratio.median for ratio in ratios.values()],
    ]
    axes.plot([0, counts.max()], [0, counts.max()], color="gray", linewidth=1)
    axes.errorbar(counts, medians, yerr=errors, fmt="o", capsize=3)
    for name, count, median in zip(ratios, counts, medians, strict=True):
        axes.annotate(name, (count, median), textcoords="offset points", xytext=(8, -10))
    axes.set_xlim(0, 1.4 * counts.max())
    axes.set_xlabel("gradients in a step")
    axes.set_ylabel("time over a plain step (median, quartiles)")
    axes.set_title("LeNet, N = 1,000", fontsize=11)


if __name__ == "__main__":
    main(tyro.cli(Config))
