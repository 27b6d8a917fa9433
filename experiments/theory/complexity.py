"""Theorem 1: the inequalities between local complexities, and how tight they are.

`theorem1_rows` returns plain numbers; `_complexity_figures` draws them, `run` writes both.
"""

import functools
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments import data, terminal, training
from experiments.theory import _complexity_figures, _complexity_tables
from experiments.theory.config import ComplexityConfig
from experiments.training import runs
from experiments.training.config import TrainConfig
from msgd_jax import complexity, loss
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
    for case in terminal.each(settings(config), "Theorem 1", "setting"):
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


def run(config: ComplexityConfig) -> pathlib.Path:
    """Measures all classes of losses, prints the table and writes the picture."""
    return runs.run_parts(
        "complexity",
        config,
        {"theorem1": functools.partial(_theorem1_part, config)},
        {"theorem1": _complexity_tables.theorem1_table},
    )


def _theorem1_part(config: ComplexityConfig, folder: pathlib.Path) -> Any:
    rows = list(theorem1_rows(config))
    _complexity_figures.plot_theorem1(rows, _complexity_tables.COLUMNS, folder / "theorem1.png")
    return rows
