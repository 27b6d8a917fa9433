"""K noise draws at one point: `loss.weighted_values_and_grads` against K separate gradients.

``python -m benchmarks.many_draws``. LeNet, N = 1,000, the same micro-batches on both sides.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks import problems, report, timing
from msgd_jax import loss, noise

SHARED, SEPARATE = "one linearisation", "K separate gradients"


@dataclasses.dataclass(frozen=True)
class Config(report.Config):
    """Compares K draws at one point by one linearisation with K gradients.

    Attributes:
        examples: The number N of examples.
        draws: The numbers K of draws; the headline is about the largest.
        microbatch_size: The number of examples in one pass, on both sides.
    """

    examples: int = 1_000
    draws: tuple[int, ...] = (2, 8, 32)
    microbatch_size: int = 100


def main(config: Config) -> list[report.Headline]:
    """Measures, prints, writes; returns the headline."""
    if config.quick:
        config = dataclasses.replace(config, repeats=2, examples=60, draws=(2,), microbatch_size=20)
    problem = problems.lenet(config.examples)
    law = noise.cov(config.examples, problems.BATCH_SIZE)
    size = config.microbatch_size
    shared = jax.jit(loss.weighted_values_and_grads(problem.loss_vector_fn, microbatch_size=size))
    one = jax.jit(loss.weighted_value_and_grad(problem.loss_vector_fn, microbatch_size=size))
    samples, rows = {}, []
    for draws in config.draws:
        steps = jnp.arange(draws)
        weights = jax.vmap(law.sample, in_axes=(None, 0))(jax.random.key(1), steps)
        each = [jax.tree.map(lambda leaf, k=k: leaf[k], weights) for k in range(draws)]
        contestants = {
            SEPARATE: lambda each=each: [one(problem.params, problem.data, w) for w in each],
            SHARED: lambda weights=weights: shared(problem.params, problem.data, weights),
        }
        samples[draws] = timing.alternate(
            contestants, repeats=config.repeats, description=f"{draws} draws"
        )
        rows.append(_row(draws, samples[draws]))
    ratio = timing.ratio(samples[config.draws[-1]], SHARED, SEPARATE)
    headline = report.Headline(
        "many_draws",
        f"time per draw over a separate gradient's, K = {config.draws[-1]}",
        f"{ratio.median:.2f} (quartiles {ratio.low:.2f} to {ratio.high:.2f})",
        "<= 0.75",
        ratio.median <= 0.75,
    )
    report.publish(
        "many_draws",
        config,
        rows,
        [headline],
        functools.partial(_plot, samples),
        seconds={str(k): {n: v.tolist() for n, v in s.items()} for k, s in samples.items()},
    )
    return [headline]


def _row(draws: int, seconds: dict[str, np.ndarray]) -> dict[str, Any]:
    ratio = timing.ratio(seconds, SHARED, SEPARATE)
    return {
        "K": draws,
        **{f"{n}, ms per draw": f"{1e3 * np.median(v) / draws:.1f}" for n, v in seconds.items()},
        "ratio": f"{ratio.median:.2f}",
        "quartiles": f"{ratio.low:.2f} to {ratio.high:.2f}",
    }


def _plot(samples: dict[int, dict[str, np.ndarray]], axes: Any) -> None:
    for name in (SEPARATE, SHARED):
        medians = [1e3 * np.median(seconds[name]) / draws for draws, seconds in samples.items()]
        axes.plot(list(samples), medians, "o-", label=name)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("draws K")
    axes.set_ylabel("ms per draw")
    axes.set_title("Noise draws at one point, LeNet, N = 1,000", fontsize=11)
    axes.legend()


if __name__ == "__main__":
    main(tyro.cli(Config))
