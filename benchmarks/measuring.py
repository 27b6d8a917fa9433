"""The cost of measuring the noise with `measure`, in gradients of the mean loss, on LeNet.

``python -m benchmarks.measuring``. All contestants use the same examples and micro-batches.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from benchmarks import problems, report, timing
from msgd_jax import loss, measure, noise

GRADIENT, PRODUCT = "one gradient of the mean loss", "Hessian-vector product"
PER_DRAW = "noise scale from draws, per draw"


@dataclasses.dataclass(frozen=True)
class Config(report.Config):
    """Measures the cost of measurements of the noise, in gradients.

    Attributes:
        examples: The number N of examples.
        draws: The number K of draws, and of probes.
        microbatch_size: The number of examples in one pass.
    """

    examples: int = 1_000
    draws: int = 16
    microbatch_size: int = 100


def main(config: Config) -> list[report.Headline]:
    """Measures, prints, writes; returns the headlines."""
    if config.quick:
        config = dataclasses.replace(config, repeats=2, examples=60, draws=3, microbatch_size=20)
    contestants, shares = _contestants(config)
    samples = timing.alternate(
        contestants, repeats=config.repeats, budget=240.0, description="measuring"
    )
    in_gradients = {
        name: timing.spread(
            np.asarray(samples[name]) / np.asarray(samples[GRADIENT]) / shares.get(name, 1)
        )
        for name in contestants
    }
    rows = [
        {
            "measured": name,
            "gradients": f"{spread.median:.2f}",
            "quartiles": f"{spread.low:.2f} to {spread.high:.2f}",
            "ms": f"{1e3 * np.median(samples[name]) / shares.get(name, 1):.2f}",
        }
        for name, spread in in_gradients.items()
    ]
    headlines = [
        report.Headline(
            "measuring",
            f"{name}, in gradients of the mean loss",
            f"{in_gradients[name].median:.2f} "
            f"(quartiles {in_gradients[name].low:.2f} to {in_gradients[name].high:.2f})",
            f"<= {target}",
            in_gradients[name].median <= target,
        )
        for name, target in ((PRODUCT, 4), (PER_DRAW, 1))
    ]
    report.publish(
        "measuring",
        config,
        rows,
        headlines,
        functools.partial(_plot, in_gradients),
        seconds={name: values.tolist() for name, values in samples.items()},
    )
    return headlines


def _contestants(config: Config) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """The functions that are timed, and the number of draws or steps in each call."""
    problem = problems.lenet(config.examples)
    fn, params, data, k = problem.loss_vector_fn, problem.params, problem.data, config.draws
    law = noise.cov(config.examples, problems.BATCH_SIZE)
    sparse = noise.sgd(config.examples, min(problems.BATCH_SIZE, config.examples))

    def of_losses(measured: Callable[[loss.LossVector, Any], Any]) -> Callable[[], Any]:
        """A function that calls a compiled program, whose arguments are data and parameters."""

        @jax.jit
        def program(params: Any, data: Any) -> Any:
            return measured(
                loss.LossVector(fn, data, microbatch_size=config.microbatch_size), params
            )

        return lambda: program(params, data)

    key = jax.random.key(1)
    directions = measure.random_directions(params, jax.random.key(2), 4)
    monitor = measure.noise_scale_monitor(2, batch_size=problems.BATCH_SIZE)
    state = monitor.init(params)
    watch = jax.jit(lambda gradient, state: monitor.update(gradient, state)[1])
    plain = jax.jit(lambda gradient: optax.tree.norm(gradient))
    gradient = of_losses(lambda losses, params: losses.gradient(params))
    one = jax.tree.map(jnp.asarray, gradient())
    draws = {"num_draws": k}
    contestants = {
        GRADIENT: gradient,
        PRODUCT: of_losses(lambda losses, params: measure.hessian_product(losses, params)(params)),
        "noise scale, exact": of_losses(measure.noise_scale),
        PER_DRAW: of_losses(
            lambda losses, params: measure.noise_scale_from_draws(losses, params, law, key, **draws)
        ),
        "gradient norms of all examples": of_losses(measure.squared_gradient_norms),
        "probed norms, per probe": of_losses(
            lambda losses, params: (
                measure.probed_gradient_norms(losses, params, key, num_probes=k).norm
            )
        ),
        "batch sharpness of sgd, b = 50, per draw": of_losses(
            lambda losses, params: measure.batch_sharpness(losses, params, sparse, key, **draws)
        ),
        "1,000 draws along 4 directions": of_losses(
            lambda losses, params: measure.noise_projections(
                losses, params, law, key, directions=directions, num_draws=1000
            )
        ),
        "the monitor, per step": lambda: watch(one, state),
        "a norm of a gradient, for comparison": lambda: plain(one),
    }
    shares = {name: float(k) for name in contestants if name.endswith(("per draw", "per probe"))}
    return contestants, shares


def _plot(in_gradients: dict[str, timing.Spread], axes: Any) -> None:
    names = list(in_gradients)[::-1]
    axes.barh(names, [in_gradients[name].median for name in names], color="C0")
    axes.set_xscale("log")
    axes.set_xlabel("cost in gradients of the mean loss")
    axes.set_title("Measuring the noise, LeNet", fontsize=11)


if __name__ == "__main__":
    main(tyro.cli(Config))
