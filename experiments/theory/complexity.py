"""Local complexities: Theorem 1, the regulariser in training, and a trace along training.

Every part returns plain numbers; `_complexity_figures` draws them, `run` writes both to a folder.
"""

import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import data, figures, records, terminal, training
from experiments.theory import _complexity_figures, _complexity_tables
from experiments.theory.config import ComplexityConfig, check_batch_size
from experiments.training import loop, runs
from experiments.training.algorithms import NoiseSettings
from experiments.training.config import AlgorithmName, TrainConfig
from msgd_jax import complexity, loss, noise
from msgd_jax._streams import Stream, derive


class Setting(NamedTuple):
    """One line of the table of Theorem 1.

    Attributes:
        label: the class of losses.
        problem: loss vector function, parameters, and data or a function that draws them.
        num_examples: N.
        batch_size: b.
        radius: the radius of the ball.
        num_draws: the number of draws per complexity; None for all draws (then the Gaussian
            complexity is left out).
        ascent: the settings of the search for the suprema.
    """

    label: str
    problem: tuple[Any, Any, Any]
    num_examples: int
    batch_size: int
    radius: float
    num_draws: int | None
    ascent: complexity.Ascent

    @property
    def losses(self) -> Any:
        """The loss vector, or a function from a key to one."""
        loss_vector_fn, _, data = self.problem
        if callable(data):
            return lambda key: loss.LossVector(loss_vector_fn, data(key))
        return loss.LossVector(loss_vector_fn, data)


def settings(config: ComplexityConfig) -> list[Setting]:
    """Affine losses, a single loss, losses that can be raised one by one, and a net."""
    exact = complexity.Ascent(num_starts=1, num_steps=1)
    many, n = config.theorem1_draws, 32
    spike = (lambda p, batch: batch + 0 * p, jnp.zeros(()), jnp.zeros(8).at[0].set(1.0))
    # sup |sum v_i theta_i^2| over the unit ball is max |v_i|: the class {e_1, ..., e_N}.
    separate = (lambda p, batch: jnp.square(batch @ p), jnp.zeros(n), jnp.eye(n))
    net = _digits_problems(config)
    options = complexity.Ascent(num_starts=1, num_steps=20, at_once=1)
    few = max(many // 300, 2)
    return [
        Setting("affine", _affine(0.0), n, 8, 1.0, many, exact),
        Setting("affine, small ball", _affine(0.0), n, 8, 0.1, many, exact),
        Setting("affine, b = N/2", _affine(0.0), n, 16, 1.0, many, exact),
        Setting("affine, mean loss 2", _affine(2.0), n, 8, 1.0, many, exact),
        Setting("one loss, b = 2", spike, 8, 2, 1.0, None, exact),
        Setting("one loss, b = 4", spike, 8, 4, 1.0, None, exact),
        Setting("separate losses", separate, n, 8, 1.0, max(many // 10, 2), complexity.Ascent(8)),
        Setting("net at the start", net[0], 64, 16, 0.2, few, options),
        Setting("net, trained", net[1], 64, 16, 0.2, few, options),
    ]


def _affine(mean: float) -> tuple[Any, Any, Any]:
    """N = 32 random affine losses of 5 parameters, drawn anew per draw of v."""

    def sample(key: Any) -> dict[str, Any]:
        loss_key, slope_key = (derive(key, Stream.CASES, i) for i in range(2))
        return {
            "loss": mean + jax.random.normal(loss_key, (32,), jnp.float32),
            "slope": jax.random.normal(slope_key, (32, 5), jnp.float32),
        }

    return lambda p, batch: batch["loss"] + batch["slope"] @ p, jnp.zeros(5), sample


def _digits_problems(config: ComplexityConfig) -> list[tuple[Any, Any, Any]]:
    """The small net on 64 digits, at its initial weights and after 300 steps of GD on 1,000."""
    digits = data.load("digits")
    losses = training.model_functions("digits_net", digits.max_value).losses
    few = jax.tree.map(lambda x: jnp.asarray(x[:64]), digits.train)
    plan = TrainConfig(
        algorithm="gd",
        dataset="digits",
        steps=300,
        learning_rate=config.learning_rate,
        eval_every=300,
        seed=config.seed,
        microbatch_size=None,
    )
    weights = [
        jax.tree.map(lambda leaf: jnp.copy(leaf[0]), params)
        for params, _ in training.train_seeds(plan, digits)
    ]
    return [(losses, params, few) for params in weights]


def theorem1_rows(config: ComplexityConfig) -> Iterator[dict[str, Any]]:
    """The ratio of the two sides of each inequality, for every class of losses."""
    for case in terminal.each(settings(config), "Theorem 1", "class"):
        common = {
            "radius": case.radius,
            "num_draws": case.num_draws,
            "key": jax.random.key(config.seed),
            "ascent": case.ascent,
        }
        found: dict[str, complexity.Inequality] = {}
        if case.num_draws is not None:
            lower, upper = complexity.gaussian_inequalities(case.losses, case.problem[1], **common)
            found |= {"gaussian_lower": lower, "gaussian_upper": upper}
        bound = functools.partial(
            complexity.sgd_inequality,
            case.losses,
            case.problem[1],
            batch_size=case.batch_size,
            **common,
        )
        # The paper's bound without and with replacement (where it is false), and the right one.
        found["without"] = bound(bound="paper")
        found["with"] = bound(replace=True, bound="paper")
        found["with, corrected"] = bound(replace=True)
        yield {
            "label": case.label,
            "num_examples": case.num_examples,
            "batch_size": case.batch_size,
            "radius": case.radius,
            "num_draws": case.num_draws,
            "inequalities": {name: _record(inequality) for name, inequality in found.items()},
        }


def _record(inequality: complexity.Inequality) -> dict[str, Any]:
    sides = inequality.left, inequality.right
    return {
        "name": inequality.name,
        "ratio": inequality.ratio._asdict(),
        "violated": inequality.violated,
        "factor": inequality.factor,
        "left": sides[0].estimate._asdict(),
        "right": sides[1].estimate._asdict(),
        "largest_gap": float(max(side.gap.max() for side in sides)),
    }


def regularizers(config: ComplexityConfig, n: int) -> dict[str, tuple[AlgorithmName, Any]]:
    """By label, the algorithm and the full regulariser that is added to its gradient, or None.

    N is `n`; b and the scale are those of `config`.
    """
    b = config.batch_size
    scale = config.regularizer_scale
    if scale is None:
        scale = noise.matching_scale(noise.fisher(n, b))

    def full(law: complexity.Multipliers, scale: float) -> Callable[[Any], Any]:
        return lambda key: complexity.add_local_complexity(
            law, key, radius=config.regularizer_radius, scale=scale
        )

    return {
        "GD": ("gd", None),
        "SGD": ("sgd", None),
        "GD-Rademacher, no sup, no abs": ("gd-rademacher", None),
        "GD, full, same scale": ("gd", full(complexity.rademacher(n), scale)),
        "GD, full, a tenth of it": ("gd", full(complexity.rademacher(n), scale / 10)),
        "SGD, full on b examples, scale 0.1": ("sgd", full(complexity.rademacher(n, b), 0.1)),
    }


def regularizer(config: ComplexityConfig) -> Iterator[dict[str, Any]]:
    """Training on the digits with and without the regulariser: accuracies and time."""
    digits = data.load("digits")
    cases = regularizers(config, len(digits.train.label))
    steps = config.regularizer_steps
    with terminal.Progress(len(cases) * steps) as progress:
        for label, (algorithm, extra) in cases.items():
            progress.compiling(label)
            plan = TrainConfig(
                algorithm=algorithm,
                dataset="digits",
                steps=steps,
                learning_rate=config.learning_rate,
                noise=NoiseSettings(batch_size=config.batch_size),
                seeds=config.seeds,
                seed=config.seed,
                eval_every=max(steps // 4, 1),
                microbatch_size=None,
            )
            last = None
            for _, evaluation in training.train_seeds(plan, digits, extra):
                if last:
                    progress.update(evaluation.step - last.step)
                last = evaluation
            assert last is not None
            yield {"label": label, **_means(last), "seconds": last.seconds}


def _means(evaluation: training.Evaluation) -> dict[str, Any]:
    values = {
        name: getattr(evaluation, name)
        for name in ("train_loss", "test_loss", "train_accuracy", "test_accuracy")
    }
    values["loss_gap"] = values["test_loss"] - values["train_loss"]
    values["accuracy_gap"] = values["train_accuracy"] - values["test_accuracy"]
    return {
        name: {"value": float(x.mean()), "standard_error": float(figures.standard_error(x))}
        for name, x in values.items()
    }


def laws(config: ComplexityConfig, num_examples: int) -> dict[str, complexity.Multipliers]:
    """The multipliers whose complexities are traced."""
    return {
        "Rademacher": complexity.rademacher(num_examples),
        "Gaussian": complexity.gaussian(num_examples),
        "SGD": complexity.sgd(num_examples, config.batch_size),
    }


def trace(config: ComplexityConfig, dataset: data.Dataset) -> Iterator[dict[str, Any]]:
    """The complexities along training, one record per algorithm and measurement.

    All measurements use the same key: the multipliers are the same for all algorithms, seeds and
    times, so that they do not cause differences.
    """
    model = "digits_net" if dataset.name == "digits" else "lenet"
    losses = training.model_functions(model, dataset.max_value).losses
    train_set = jax.device_put(dataset.train)
    multipliers = {
        name: _measurement(config, losses, law)
        for name, law in laws(config, len(dataset.train.label)).items()
    }
    times = -(-config.steps // config.every) + 1
    total = len(config.algorithms) * times * config.seeds * len(multipliers)
    with terminal.Progress(total, "measurement") as progress:
        for algorithm in config.algorithms:
            plan = _traced(config, algorithm, dataset.name)
            progress.compiling(plan.label)
            for params, evaluation in training.train_seeds(plan, dataset):
                measured = {name: [] for name in multipliers}
                for i in range(config.seeds):
                    own = jax.tree.map(lambda leaf, i=i: leaf[i], params)
                    for name, measure in multipliers.items():
                        measured[name].append(_as_numbers(measure(own, train_set)))
                        progress.update()
                yield {
                    "algorithm": plan.label,
                    **evaluation.record(),
                    "complexities": {
                        name: _transposed(values) for name, values in measured.items()
                    },
                }


def _traced(config: ComplexityConfig, algorithm: AlgorithmName, dataset: Any) -> TrainConfig:
    return TrainConfig(
        algorithm=algorithm,
        dataset=dataset,
        steps=config.steps,
        learning_rate=config.learning_rate,
        eval_every=config.every,
        noise=NoiseSettings(batch_size=config.batch_size),
        seeds=config.seeds,
        seed=config.seed,
        microbatch_size=config.microbatch_size,
    )


def _measurement(
    config: ComplexityConfig, losses: Any, law: complexity.Multipliers
) -> Callable[[Any, Any], dict[str, Any]]:
    """A function of parameters and examples, compiled once for the whole trace."""

    @jax.jit
    def measure(params: Any, examples: Any) -> dict[str, Any]:
        found = complexity.local_complexity(
            loss.LossVector(losses, examples, microbatch_size=config.microbatch_size),
            params,
            law,
            radius=config.radius,
            num_draws=config.trace_draws,
            key=jax.random.key(config.seed),
            ascent=complexity.Ascent(num_starts=1, num_steps=config.ascent_steps, at_once=1),
        )
        return {
            "mean": found.mean,
            "standard_error": found.standard_error,
            "at_centre": found.at_centre.mean(),
            "first_order": found.first_order.mean(),
            "largest_gap": found.gap.max(),
        }

    return measure


def _as_numbers(measured: dict[str, Any]) -> dict[str, float]:
    numbers = {name: float(value) for name, value in measured.items()}
    if not np.isfinite(numbers["mean"]):  # Under jit, `local_complexity` cannot raise.
        raise ValueError(
            "The losses or gradients are not finite in the ball: choose a smaller --radius, or a "
            "--learning-rate at which training does not diverge."
        )
    return numbers


def _transposed(values: list[dict[str, float]]) -> dict[str, list[float]]:
    return {name: [value[name] for value in values] for name in values[0]}


def run(config: ComplexityConfig) -> pathlib.Path:
    """Runs the chosen parts; each prints its table and writes its picture when it is done."""
    _check(config)
    dataset: Any = None
    # Loaded first, so that missing images are reported at once.
    if "trace" in config.parts and not runs.finished_parts("complexity", config):
        dataset = data.load("fashion_mnist", data_dir=config.data_dir)
    steps: dict[str, Callable[[pathlib.Path], Any]] = {
        "theorem1": functools.partial(_theorem1_part, config),
        "regularizer": lambda _: list(regularizer(config)),
        "trace": functools.partial(_trace_part, config, dataset),
    }
    tables = {
        "theorem1": _complexity_tables.theorem1_table,
        "regularizer": _complexity_tables.regularizer_table,
        "trace": _complexity_tables.trace_table,
    }
    return runs.run_parts("complexity", config, steps, tables)


def _check(config: ComplexityConfig) -> None:
    """Raises ValueError for batch sizes that a part cannot have, before anything is loaded."""
    if "regularizer" in config.parts:
        check_batch_size(config.batch_size, data.DATASETS["digits"].sizes[0])
    if "trace" in config.parts:
        laws(config, data.DATASETS["fashion_mnist"].sizes[0])
        for algorithm in config.algorithms:
            loop.check(_traced(config, algorithm, "fashion_mnist"))


def _theorem1_part(config: ComplexityConfig, folder: pathlib.Path) -> Any:
    rows = list(theorem1_rows(config))
    _complexity_figures.plot_theorem1(rows, _complexity_tables.COLUMNS, folder / "theorem1.png")
    return rows


def _trace_part(config: ComplexityConfig, dataset: data.Dataset, folder: pathlib.Path) -> Any:
    found = []
    with open(folder / "trace.jsonl", "w", encoding="utf-8") as file:
        for record in trace(config, dataset):
            found.append(record)
            file.write(records.as_line(record))
            file.flush()
    _complexity_figures.plot_trace(found, config, folder / "trace.png")
    return found
