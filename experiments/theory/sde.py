"""The SDE side by side with its discretisations: strong and weak orders, paths, a real net.

Every part returns plain numbers; `_sde_figures` draws them, and `run` writes both to a folder.
"""

import functools
import itertools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import data, terminal, training
from experiments.theory import _sde_figures, _sde_tables, weak_order
from experiments.theory.config import SDEConfig, check_batch_size
from experiments.theory.sde_problems import Problem, at_minimum, logistic, two_wells
from experiments.training import runs
from msgd_jax import loss, noise, sde, train
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


class NetworkRun(NamedTuple):
    """The distances of iterations from the SDE, on a network, at one learning rate.

    Attributes:
        learning_rate: eta.
        times: the times, from 0, [saved].
        displacement: the distance of the SDE from its start, root mean square over paths, [saved].
        distances: the same for the distance of every iteration from the SDE, by name, [saved].
    """

    learning_rate: float
    times: np.ndarray
    displacement: np.ndarray
    distances: dict[str, np.ndarray]


SHARED, OWN, STILL = "M-SGD-Fisher", "M-SGD-Fisher, own draws", "GD"


def network(config: SDEConfig, dataset: data.Dataset) -> Iterator[NetworkRun]:
    """M-SGD-Fisher by the usual training, and the SDE with the same key, for eta, eta/2, eta/4, ...

    At the first learning rate there are also M-SGD-Fisher with another key, and GD. All paths start
    from the same initial weights.
    """
    functions = training.model_functions("lenet", dataset.max_value)
    losses = functions.losses
    start_key = derive(jax.random.key(config.seed), Stream.PARAMETERS)
    params = jax.tree.map(lambda leaf: leaf[0], functions.init_params(start_key[None]))
    keys = _keys(config.seed, config.network_paths)
    train_set = jax.device_put(dataset.train)
    fisher = noise.fisher(len(dataset.train.label), config.batch_size)
    rates = [config.learning_rate / 2**i for i in range(config.halvings + 1)]
    passes = (config.substeps + 1) * (2 ** len(rates) - 1) + 2
    total = config.iterations * passes * len(keys)
    with terminal.Progress(total, "iteration") as progress:
        progress.compiling("network")
        for rate in rates:
            walk = _walker(losses, fisher, rate, config, train_set)
            ends = round(config.learning_rate / rate) * _iterations_at(config)
            laws = {SHARED: fisher}
            if rate == config.learning_rate:
                laws |= {OWN: fisher, STILL: noise.gd(fisher.num_examples)}
            trainers = {
                name: _trainer(losses, law, rate, config.microbatch_size, ends, train_set)
                for name, law in laws.items()
            }
            squares = [
                _squares(walk, config.substeps, trainers, params, key, ends, progress)
                for key in keys
            ]
            displacement, distances = jax.tree.map(
                lambda *paths: np.sqrt(np.mean(paths, 0)), *squares
            )
            yield NetworkRun(rate, rate * ends, displacement, distances)


Walk = Callable[[Any, Any, int, int], sde.Path]


def _walker(
    losses: loss.LossVectorFn, law: noise.MNoise, rate: float, config: SDEConfig, train_set: Any
) -> Walk:
    """A function for a part of the SDE's path between two iterations; compiled once for all."""

    @jax.jit
    def walk(params: Any, data: Any, key: Any, first_step: Any, num_steps: Any) -> sde.Path:
        return sde.euler_maruyama(
            loss.LossVector(losses, data, microbatch_size=config.microbatch_size),
            params,
            law,
            learning_rate=rate,
            key=key,
            first_step=first_step,
            num_steps=num_steps,
            scheme=sde.Scheme(config.substeps),
        )

    return lambda params, key, first, last: walk(params, train_set, key, first, last)


class _Trainer(NamedTuple):
    """Training with one law: the state at the start, and a function that makes further steps."""

    start: Callable[[Any, Any], train.TrainState]
    advance: Callable[[train.TrainState, int], train.TrainState]


def _trainer(
    losses: loss.LossVectorFn,
    law: noise.MNoise,
    learning_rate: float,
    microbatch_size: int | None,
    ends: np.ndarray,
    train_set: Any,
) -> _Trainer:
    optimizer = optax.sgd(learning_rate)
    step = train.make_step(losses, optimizer, law, microbatch_size=microbatch_size)
    loop = train.make_loop(step, max_steps=int(np.diff(ends).max()))
    return _Trainer(
        lambda params, key: train.init(params, optimizer, key),
        lambda state, steps: loop(state, train_set, steps)[0],
    )


def _iterations_at(config: SDEConfig) -> np.ndarray:
    """The iterations, at the largest learning rate, at which distances are measured; from 0."""
    return np.unique(np.linspace(0, config.iterations, config.points + 1).astype(int))


def _squares(
    walk: Walk,
    substeps: int,
    trainers: dict[str, _Trainer],
    params: Any,
    key: Any,
    ends: np.ndarray,
    progress: Any,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The squared displacement of one SDE path, and squared distances to it, at `ends`."""
    own_key = derive(key, Stream.CASES, 0)
    states = {
        name: trainer.start(params, own_key if name == OWN else key)
        for name, trainer in trainers.items()
    }
    position, displacement = params, [0.0]
    distances = {name: [0.0] for name in trainers}
    for before, after in itertools.pairwise(ends.tolist()):
        path = walk(position, key, before, after)
        if path.diverged_at >= 0:
            raise ValueError(
                f"The SDE left the finite numbers in iteration {path.diverged_at} of {ends[-1]}: "
                "choose a smaller learning rate."
            )
        position = path.last_params
        displacement.append(_square_distance(position, params))
        progress.update(substeps * (after - before))
        for name, trainer in trainers.items():
            states[name] = trainer.advance(states[name], after - before)
            distances[name].append(_square_distance(states[name].params, position))
            progress.update(after - before)
    return np.array(displacement), {name: np.array(values) for name, values in distances.items()}


def _square_distance(first: Any, second: Any) -> float:
    return float(optax.tree.norm(jax.tree.map(jnp.subtract, first, second), squared=True))


def run(config: SDEConfig) -> pathlib.Path:
    """Runs the chosen parts; each prints its table and writes its picture when it is done."""
    steps: dict[str, Callable[[pathlib.Path], Any]] = {
        "strong": functools.partial(_strong_part, config),
        "weak": functools.partial(_weak_part, config),
        "paths": functools.partial(_paths_part, config),
    }
    if "network" in config.parts:
        # The folder is checked before anything is loaded.
        check_batch_size(config.batch_size, data.DATASETS["fashion_mnist"].sizes[0])
        dataset: Any = None
        # Loaded first, so that missing images are reported at once.
        if not runs.finished_parts("sde", config):
            dataset = data.load("fashion_mnist", data_dir=config.data_dir)
        steps["network"] = functools.partial(_network_part, config, dataset)
    tables = {
        "strong": _sde_tables.strong_table,
        "weak": _sde_tables.weak_table,
        "network": _sde_tables.network_table,
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


def _network_part(config: SDEConfig, dataset: data.Dataset, folder: pathlib.Path) -> Any:
    networks = list(network(config, dataset))
    _sde_figures.plot_network(networks, config, folder / "network.png")
    return [_sde_tables.as_json(part) for part in networks]
