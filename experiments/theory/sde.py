"""The SDE side by side with its discretisations: strong and weak orders, and paths.

Every part returns plain numbers; `_sde_figures` draws them, and `run` writes both to a folder.
"""

import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import terminal
from experiments.theory import _sde_figures, _sde_tables, weak_order
from experiments.theory.config import SDEConfig
from experiments.theory.sde_problems import Problem, at_minimum, logistic, two_wells
from experiments.training import runs
from msgd_jax import loss, noise, sde
from msgd_jax._streams import Stream, derive

RATES = (0.1, 0.05, 0.025, 0.0125)
HORIZON = 2.0
DRAWN = 4  # The number of paths of each process that are drawn in the plane.


class StrongCase(NamedTuple):
    """One line of the strong-order figure.

    Attributes:
        label: the name of the iteration.
        expected: the order that theory gives.
        law: the law whose covariance the SDE has.
        iterate: the weights of the iteration, as in `sde.strong_error`.
        order: the order of the SDE.
        at_minimum: whether paths start at the minimum of the loss.
    """

    label: str
    expected: float
    law: noise.MNoise
    iterate: Any = None
    order: int = 1
    at_minimum: bool = False


def strong_cases(num_examples: int) -> list[StrongCase]:
    """Couplings that give order 1 or 3/2, and iterations on other paths, which give 1/2."""
    n = num_examples
    cov, fisher = noise.cov(n, n), noise.fisher(n, n)
    coupled = sde.coupling(cov, n)
    return [
        StrongCase("M-SGD-Cov, b = N", 1, cov),
        StrongCase("M-SGD-Fisher, b = N", 1, fisher),
        StrongCase("M-SGD-Cov, b = N/8", 1, noise.cov(n, n // 8)),
        StrongCase("GD, no noise on either side", 1, noise.gd(n)),
        StrongCase("M-SGD-Cov, b = N, from the minimum", 1.5, cov, at_minimum=True),
        StrongCase("M-SGD-Cov, b = N, modified drift", 1.5, cov, order=2),
        StrongCase("M-SGD-Cov, b = N/8, modified drift", 1.5, noise.cov(n, n // 8), order=2),
        StrongCase("mini-batches, own sampling", 0.5, cov, noise.sgd(n, n, replace=True)),
        StrongCase("Gaussian noise, own draws", 0.5, cov, cov),
        StrongCase("no noise in the iteration", 0.5, cov, noise.gd(n)),
        StrongCase("sign of Eq. 71", 0.5, cov, lambda dW: coupled(-dW)),
        StrongCase("SDE of Fisher, iteration of Cov", 0.5, fisher, coupled),
    ]


def strong(config: SDEConfig) -> Iterator[dict[str, Any]]:
    """The strong order of every case, and the constant a of rms^2 = a^2 eta^2 + c eta^3."""
    problem = logistic()
    cases = strong_cases(problem.num_examples)
    for case in terminal.each(cases, "strong order", "case"):
        start = at_minimum(problem) if case.at_minimum else problem
        sweep = sde.strong_error(
            start.losses,
            start.params,
            case.law,
            sde.Sweep(RATES, HORIZON, num_paths=config.strong_paths),
            key=jax.random.key(config.seed),
            iterate=case.iterate,
            scheme=sde.Scheme(order=case.order),
        )
        row = {"label": case.label, "expected": case.expected, **_sde_tables.record(sweep)}
        if case.expected == 1:
            model = sweep.error_model
            row |= {"deterministic": model.deterministic._asdict(), "noise": model.noise._asdict()}
        yield row


class WeakCase(NamedTuple):
    """One line of the sampled weak orders: the iteration is SGD, the SDE may have another law."""

    label: str
    expected: float
    law: noise.MNoise
    order: int


def weak(config: SDEConfig) -> Iterator[dict[str, Any]]:
    """The weak order of SGD with b = 4 against its SDE, sampled with the control variate; g = L.

    The second order is measured from the minimum to an early time, where it can be seen at learning
    rates that sampling can resolve, with little error of third order.
    """
    problem = logistic()
    sgd = noise.sgd(problem.num_examples, 4, replace=True)
    still = noise.gd(problem.num_examples)
    cases = [
        WeakCase("SGD, SDE (12)", 1, sgd, 1),
        WeakCase("SGD, noise-free flow", 1, still, 1),
        WeakCase("SGD, modified SDE", 2, sgd, 2),
        WeakCase("SGD, modified flow without noise", 1, still, 2),
    ]
    settings = {
        1: (problem, (0.1, 0.05, 0.025), 1.6),
        2: (at_minimum(problem), (0.4, 0.2, 0.1), 0.8),
    }
    for case in terminal.each(cases, "weak order, sampled", "case"):
        start, rates, horizon = settings[case.order]
        num_paths = config.weak_paths * (4 if case.order == 2 else 1)
        sweep = sde.weak_error(
            start.losses,
            start.params,
            case.law,
            sde.Sweep(rates, horizon, num_paths, at_once=16_000),
            key=jax.random.key(config.seed),
            iterate=sgd,
            scheme=sde.Scheme(order=case.order),
        )
        group = "sampled: logistic regression, g = L"
        named = {"group": group, "label": case.label, "expected": case.expected}
        yield named | _sde_tables.record(sweep)


class Paths(NamedTuple):
    """Paths on the two-dimensional loss, from the same start.

    Attributes:
        times: [saved].
        points: the points of every process by name, [drawn, saved, 2].
        distances: the median distance over paths to the SDE at the same time, by name, [saved].
        learning_rate: eta.
    """

    times: np.ndarray
    points: dict[str, np.ndarray]
    distances: dict[str, np.ndarray]
    learning_rate: float


def paths(config: SDEConfig, learning_rate: float, horizon: float = 12.0, many: int = 64) -> Paths:
    """Paths of SGD, M-SGD-Gaussian and the SDE; the last two share their Brownian paths."""
    problem = two_wells()
    n, b = problem.num_examples, 1
    law, sgd = noise.cov(n, b), noise.sgd(n, b, replace=True)
    num_steps = round(horizon / learning_rate)
    options = {"learning_rate": learning_rate, "num_steps": num_steps}
    at = problem.losses, problem.params, law

    def euler(key: Any, substeps: int) -> Any:
        scheme, saved = sde.Scheme(substeps), range(num_steps + 1)
        return sde.euler_maruyama(*at, key=key, scheme=scheme, save_at=saved, **options).params

    @jax.jit
    @jax.vmap
    def every(key: Any) -> dict[str, Any]:
        # SGD draws from another key, so that it does not share the path.
        own_key = derive(key, Stream.CASES, 0)
        return {
            "SDE": euler(key, 32),
            "M-SGD-Gaussian": euler(key, 1),
            "SGD": _iterate(problem, sgd, learning_rate, num_steps, own_key),
        }

    points = jax.device_get(every(_keys(config.seed, many)))
    distances = {
        name: np.median(np.linalg.norm(points[name] - points["SDE"], axis=-1), axis=0)
        for name in ("M-SGD-Gaussian", "SGD")
    }
    times = learning_rate * np.arange(num_steps + 1)
    return Paths(times, {k: v[:DRAWN] for k, v in points.items()}, distances, learning_rate)


def _iterate(
    problem: Problem, law: noise.MNoise, learning_rate: float, num_steps: int, key: Any
) -> Any:
    """All points of the iteration theta - eta grad(L . W), including the start."""
    value_and_grad = loss.weighted_value_and_grad(problem.loss_vector_fn)

    def step(params: Any, t: Any) -> tuple[Any, Any]:
        _, gradient = value_and_grad(params, problem.data, law.sample(key, t))
        moved = jax.tree.map(lambda p, g: p - learning_rate * g, params, gradient)
        return moved, moved

    _, points = jax.lax.scan(step, problem.params, jnp.arange(num_steps))
    return jnp.concatenate([problem.params[None], points])


def _keys(seed: int, count: int) -> Any:
    """One key per path."""
    return jax.vmap(lambda i: derive(jax.random.key(seed), Stream.CASES, i))(jnp.arange(count))


def run(config: SDEConfig) -> pathlib.Path:
    """Runs the chosen parts; each prints its table and writes its picture when it is done."""
    steps: dict[str, Callable[[pathlib.Path], Any]] = {
        "strong": functools.partial(_strong_part, config),
        "weak": functools.partial(_weak_part, config),
        "paths": functools.partial(_paths_part, config),
    }
    tables = {
        "strong": _sde_tables.strong_table,
        "weak": _sde_tables.weak_table,
    }
    return runs.run_parts("sde", config, steps, tables)


def _strong_part(config: SDEConfig, folder: pathlib.Path) -> Any:
    rows = list(strong(config))
    _sde_figures.plot_strong(rows, folder / "strong_order.png")
    return rows


def _weak_part(config: SDEConfig, folder: pathlib.Path) -> Any:
    rows = [*weak_order.table(), *weak(config)]
    _sde_figures.plot_weak(rows, folder / "weak_order.png")
    return rows


def _paths_part(config: SDEConfig, folder: pathlib.Path) -> Any:
    plane = [paths(config, rate) for rate in (0.2, 0.05)]
    _sde_figures.plot_paths(two_wells(), plane, folder / "paths.png")
    return [_sde_tables.as_json(part) for part in plane]
