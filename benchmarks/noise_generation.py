"""One draw of gradient noise with covariance S/b at a new point: one backward pass, or a matrix?

``python -m benchmarks.noise_generation``. Every draw starts from parameters and data, as a training
step does: the baselines compute their matrix anew, and do not even add the mean gradient, which
ours includes. Per-example gradients in PyTorch take part if the packages are installed.
"""

import dataclasses
import functools
import multiprocessing
import queue
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import psutil
import tyro
from jax.flatten_util import ravel_pytree

from benchmarks import machine, problems, report, timing, torch_gradients
from experiments import styles
from msgd_jax import covariance, loss, noise

OURS = "grad(L.W)"
LIBRARY = ("svd", "eigh", "cholesky")
NAMES = (OURS, "gradient matrix", *torch_gradients.NAMES, "diagonal", *LIBRARY[::-1])
REFERENCE_PARAMETERS = 11_330
# The cost of a D x D factorisation in D^3 operations, to estimate its time in advance.
CUBIC_FLOPS = {"svd": 22, "eigh": 9, "cholesky": 1 / 3}
COPIES = {"svd": 6, "eigh": 5, "cholesky": 4}


@dataclasses.dataclass(frozen=True)
class Config(report.Config):
    """Compares our draw of gradient noise with the usual ways.

    Attributes:
        parameters: The numbers D of parameters, at which N is `examples`.
        examples: The number N of examples.
        more_examples: The numbers N of examples at D = `few_parameters`, for the growth in N.
        few_parameters: The number D of parameters for the growth in N.
        limit: The seconds that a single draw may take; beyond it, times are extrapolated.
        budget: The seconds for the rounds at one size, of which there are three at least.
        slow_draws: The number of draws of a contestant that is too slow to take turns.
    """

    repeats: int = 11
    parameters: tuple[int, ...] = (100, 300, 1_000, 3_000, 11_330, 100_000, 1_000_000)
    examples: int = 1_000
    more_examples: tuple[int, ...] = (250, 1_000, 4_000, 16_000)
    few_parameters: int = 1_000
    limit: float = 600.0
    budget: float = 20.0
    slow_draws: int = 1


def draw_function(name: str, problem: problems.Problem) -> Any:
    """A compiled function of the key for one draw, from parameters and data to the noise."""
    loss_vector_fn, params, data, _ = problem
    law = noise.cov(problem_examples(problem), problems.BATCH_SIZE)

    def matrix(params: Any, data: Any) -> Any:
        losses = loss.LossVector(loss_vector_fn, data)
        return covariance.sgd_covariance(losses, params) / problems.BATCH_SIZE

    def sampler(params: Any, data: Any) -> covariance.GaussianSampler:
        if name in LIBRARY:
            return getattr(covariance, f"{name}_sampler")(matrix(params, data))
        losses = loss.LossVector(loss_vector_fn, data)
        if name == "diagonal":
            variances, _ = ravel_pytree(covariance.diagonal(losses, params, law))
            return covariance.diagonal_sampler(variances)
        return covariance.gradient_sampler(losses, params, law)

    def draw(params: Any, data: Any, key: Any) -> Any:
        if name == OURS:
            weights = law.sample(key, 0)
            return loss.weighted_value_and_grad(loss_vector_fn)(params, data, weights)[1]
        return sampler(params, data).sample(key, 0)

    return functools.partial(jax.jit(draw), params, data)


def problem_examples(problem: problems.Problem) -> int:
    """N."""
    return problem.data[1].shape[0]


def main(config: Config) -> list[report.Headline]:
    """Measures, prints, writes; returns the headlines."""
    if config.quick:
        config = dataclasses.replace(
            config,
            repeats=2,
            parameters=(60, 200),
            more_examples=(60, 120),
            examples=60,
            few_parameters=100,
        )
    rate = machine.matmul_rate(sizes=(256,) if config.quick else (512, 1024, 2048))
    in_d = {
        size: _measure(size, config.examples, config, rate) for size in sorted(config.parameters)
    }
    in_n = {
        size: _measure(config.few_parameters, size, config, rate)
        for size in sorted(config.more_examples)
    }
    _extrapolate(in_d)
    growth = {
        axis: {name: _growth(points, name) for name in NAMES}
        for axis, points in (("D", in_d), ("N", in_n))
    }
    rows = [_row("D", d, config.examples, points) for d, points in in_d.items()]
    rows += [_row("N", config.few_parameters, n, points) for n, points in in_n.items()]
    rows += [_growth_row(axis, growth[axis]) for axis in growth]
    lenet = None if config.quick else _lenet(config)
    headlines = _headlines(in_d, growth, lenet)
    report.publish(
        "noise_generation",
        config,
        rows,
        headlines,
        functools.partial(_plot, in_d),
        seconds={"D": _plain(in_d), "N": _plain(in_n)},
        lenet_seconds=lenet,
    )
    return headlines


@dataclasses.dataclass
class Point:
    """The seconds of one draw: samples, an extrapolation, or the reason why there are none."""

    samples: list[float]
    note: str = ""

    @property
    def median(self) -> float | None:
        """The median of the seconds; None if it was not measured."""
        return float(np.median(self.samples)) if self.samples else None


Points = dict[str, Point]


def _measure(num_parameters: int, num_examples: int, config: Config, rate: float) -> Points:
    """Measures all contestants at one size: quick ones in turn, slow ones by themselves."""
    print(f"D = {num_parameters:,}, N = {num_examples:,} ...", flush=True)
    problem = problems.two_layer_net(num_parameters, num_examples)
    points: Points = {}
    quick: dict[str, Callable[[], Any]] = {}
    slow = []
    for name in NAMES:
        if why := name in torch_gradients.NAMES and torch_gradients.missing(name):
            points[name] = Point([], why)
        elif _bytes(name, problem) > 0.7 * psutil.virtual_memory().available:
            points[name] = Point([], "does not fit")
        elif 10 * CUBIC_FLOPS.get(name, 0) * num_parameters**3 / rate > 20:
            slow.append(name)
        elif name in torch_gradients.NAMES:
            quick[name] = torch_gradients.draw_function(name, problem)
        else:
            keys = iter(jax.random.split(jax.random.key(1), 1_000))
            draw = draw_function(name, problem)
            quick[name] = lambda draw=draw, keys=keys: draw(next(keys))
    taken = timing.alternate(quick, repeats=config.repeats, warmups=1, budget=config.budget)
    for name, samples in taken.items():
        points[name] = Point(samples.tolist())
    for name in slow:
        points[name] = _alone(name, num_parameters, num_examples, config)
    return points


def _bytes(name: str, problem: problems.Problem) -> float:
    """An estimate of the memory that a contestant needs, in bytes."""
    dim, num_examples = problem.num_parameters, problem_examples(problem)
    if name == OURS:
        return 0.0
    return 4.0 * (4 * dim * num_examples + COPIES.get(name, 0) * dim**2)


def _alone(name: str, num_parameters: int, num_examples: int, config: Config) -> Point:
    """A few draws in a process of its own, which is stopped where one exceeds the limit."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    arguments = (name, num_parameters, num_examples, config.slow_draws, answers)
    process = context.Process(target=_draw, args=arguments, name=name, daemon=True)
    process.start()
    samples: list[float] = []
    try:
        # Set-up and compilation do not count against the limit.
        _answer(process, answers, timeout=300)
        for _ in range(config.slow_draws):
            seconds = _answer(process, answers, timeout=config.limit)
            if seconds is None:
                break
            samples.append(seconds)
    finally:
        process.kill()
    if not samples:
        return Point([], f"over {config.limit:g} s")
    return Point(samples, "one draw" if len(samples) == 1 else f"median of {len(samples)} draws")


def _answer(process: Any, answers: Any, timeout: float) -> float | None:
    """The next answer of the process; None if it takes too long. Raises RuntimeError if it died."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            return answers.get(timeout=1.0)
        except queue.Empty:
            if process.exitcode is not None:
                raise RuntimeError(
                    f"the process of {process.name} ended with exit code {process.exitcode}: out "
                    "of memory?"
                ) from None
    return None


def _draw(name: str, num_parameters: int, num_examples: int, draws: int, answers: Any) -> None:
    problem = problems.two_layer_net(num_parameters, num_examples)
    draw = draw_function(name, problem)
    compiled = draw.func.lower(*draw.args, jax.random.key(0)).compile()
    answers.put(0.0)  # The process is ready.
    for key in jax.random.split(jax.random.key(0), draws):
        answers.put(timing.once(lambda: compiled(*draw.args, key)))  # noqa: B023


def _extrapolate(points: dict[int, Points]) -> None:
    """Extrapolates times over the limit by D^3 from the largest size below it, with a note."""
    for name in LIBRARY:
        done = [size for size, at in points.items() if at[name].samples]
        for size, at in points.items():
            if at[name].note.startswith("over") and done:
                factor = (size / done[-1]) ** 3
                guess = factor * np.asarray(points[done[-1]][name].samples)
                at[name] = Point(guess.tolist(), f"extrapolated: {at[name].note}")


def _growth(points: dict[int, Points], name: str) -> timing.Growth | None:
    """The exponent over the upper half of the measured sizes; overheads hide it at smaller ones."""
    measured = [
        (size, at[name].median)
        for size, at in points.items()
        if at[name].samples and not at[name].note.startswith("extrapolated")
    ]
    if len(measured) < 2:
        return None
    upper = measured[-max(3, (len(measured) + 1) // 2) :]
    return timing.growth(*zip(*upper, strict=True))


def _row(varied: str, d: int, n: int, points: Points) -> dict[str, Any]:
    row: dict[str, Any] = {"varied": varied, "D": f"{d:,}", "N": f"{n:,}"}
    for name in NAMES:
        point = points[name]
        text = point.note if point.median is None else report.duration(point.median)
        mark = "*" if point.note.startswith("extrapolated") else ""
        row[name] = text + mark
    return row


def _growth_row(axis: str, growth: dict[str, timing.Growth | None]) -> dict[str, Any]:
    row: dict[str, Any] = {"varied": f"exponent in {axis}", "D": "", "N": ""}
    for name in NAMES:
        fit = growth[name]
        row[name] = "-" if fit is None else f"{fit.exponent:.2f} ± {fit.standard_error:.2f}"
    return row


def _lenet(config: Config) -> float:
    """The seconds of our draw for a convolutional net of the same size, with more work each."""
    problem = problems.lenet(config.examples)
    value_and_grad = loss.weighted_value_and_grad(problem.loss_vector_fn, microbatch_size=100)
    law = noise.cov(config.examples, problems.BATCH_SIZE)
    draw = jax.jit(lambda p, d, key: value_and_grad(p, d, law.sample(key, 0))[1])
    keys = iter(jax.random.split(jax.random.key(1), 1_000))
    contestants = {OURS: lambda: draw(problem.params, problem.data, next(keys))}
    return float(np.median(timing.alternate(contestants, repeats=config.repeats)[OURS]))


def _headlines(
    points: dict[int, Points], growth: dict[str, dict[str, Any]], lenet: float | None
) -> list[report.Headline]:
    size = REFERENCE_PARAMETERS if REFERENCE_PARAMETERS in points else max(points)
    svd, ours = points[size]["svd"], points[size][OURS]
    headlines = []
    if svd.median is not None and ours.median is not None:
        how = f" ({svd.note})" if svd.note else ""
        for label, seconds in (("fully connected net", ours.median), ("LeNet", lenet)):
            if seconds is not None:
                times = svd.median / seconds
                measured = f"{times:,.0f} times: {report.duration(svd.median)}{how} against "
                headlines.append(
                    report.Headline(
                        "noise_generation",
                        f"faster than SVD at D = {size:,}, {label}",
                        measured + report.duration(seconds),
                        ">= 10,000 times",
                        times >= 10_000,
                    )
                )
    for axis, fits in growth.items():
        fit = fits[OURS]
        if fit is not None:
            measured = f"{fit.exponent:.2f} ± {fit.standard_error:.2f}"
            headlines.append(
                report.Headline(
                    "noise_generation",
                    f"exponent in {axis}",
                    measured,
                    "linear (<= 1.1)",
                    fit.exponent <= 1.1,
                )
            )
    return headlines


def _plain(points: dict[int, Points]) -> dict[str, Any]:
    return {
        str(size): {name: dataclasses.asdict(point) for name, point in at.items()}
        for size, at in points.items()
    }


def _plot(points: dict[int, Points], axes: Any) -> None:
    for i, name in enumerate(NAMES):
        medians = {size: at[name].median for size, at in points.items()}
        shown = {size: median for size, median in medians.items() if median is not None}
        if not shown:
            continue  # not installed: no line, and no name in the legend
        colour, line, marker = styles.style(i + 1)
        look = {"color": colour, "marker": marker}
        axes.loglog(list(shown), list(shown.values()), linestyle=line, label=name, **look)
        for size, median in shown.items():
            if points[size][name].note.startswith("extrapolated"):
                axes.plot([size], [median], markerfacecolor="none", markersize=9, **look)
    axes.set_xlabel("parameters D")
    axes.set_ylabel("seconds for one draw")
    axes.set_title("One draw of gradient noise at a new point")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, handlelength=4)


if __name__ == "__main__":
    main(tyro.cli(Config))
