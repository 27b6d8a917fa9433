"""What multiplicative noise costs: an M-SGD step against a plain `optax.sgd` step.

``python -m benchmarks.step_overhead``. The same LeNet, examples, loss vector function and reported
numbers (loss and gradient norm) on both sides, without micro-batches. Dense noises stand against
plain gradient descent on the N examples; sparse ones against mini-batch SGD with as many a step,
which has to draw its batch too: without replacement as a permutation's first entries, or, for the
noise that draws with replacement, as random integers.
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
from msgd_jax import noise, train

LEARNING_RATE = 0.01


@dataclasses.dataclass(frozen=True)
class Config(report.Config):
    """M-SGD steps against plain steps, for every noise.

    Attributes:
        examples: N.
        batch_size: b.
        support_size: B, what a step of the sparse noises computes.
        dense_steps: full-batch steps in one sample.
        sparse_steps: mini-batch steps in one sample.
    """

    repeats: int = 25
    examples: int = 1_000
    batch_size: int = 50
    support_size: int = 100
    dense_steps: int = 4
    sparse_steps: int = 40


def laws(config: Config) -> dict[str, noise.MNoise]:
    """Every noise of the library."""
    n, b, support = config.examples, config.batch_size, config.support_size
    scale = noise.matching_scale(noise.fisher(n, b))
    return {
        "gd": noise.gd(n),
        "fisher": noise.fisher(n, b),
        "cov": noise.cov(n, b),
        "bernoulli": noise.bernoulli(n, b),
        "rademacher": noise.rademacher(n, scale),
        "estimated_fisher": noise.estimated_fisher(n, b, estimate_size=b),
        "estimated_cov": noise.estimated_cov(n, b, estimate_size=b),
        "sgd": noise.sgd(n, b),
        "sgd, replace": noise.sgd(n, b, replace=True),
        "sparse_fisher": noise.sparse_fisher(n, b, support_size=support),
        "sparse_cov": noise.sparse_cov(n, b, support_size=support),
    }


def main(config: Config) -> list[report.Headline]:
    """Measures, prints, writes; returns the headlines."""
    if config.quick:
        config = dataclasses.replace(
            config, repeats=2, examples=60, batch_size=5, support_size=10, dense_steps=1,
            sparse_steps=1,
        )  # fmt: skip
    problem = problems.lenet(config.examples)
    rows, ratios, samples = [], {}, {}
    chosen = laws(config)
    if config.quick:
        chosen = {name: chosen[name] for name in ("cov", "sgd, replace")}
    for name, law in chosen.items():
        dense = law.support_size == config.examples
        steps = config.dense_steps if dense else config.sparse_steps
        plain = plain_step(problem, law.support_size, replace=name.endswith("replace"))
        contestants = {
            "plain": _loop(plain, problem, steps),
            name: _loop(msgd_step(problem, law), problem, steps),
        }
        samples[name] = timing.alternate(contestants, repeats=config.repeats, description=name)
        ratios[name] = timing.ratio(samples[name], name, "plain")
        rows.append(_row(name, law, steps, samples[name], ratios[name]))
    headlines = [
        _headline(kind, target, {row["noise"]: ratios[row["noise"]] for row in rows_of(rows, kind)})
        for kind, target in (("dense", 1.02), ("sparse", 1.05))
    ]
    report.publish(
        "step_overhead", config, rows, headlines, functools.partial(_plot, ratios),
        seconds={k: {n: v.tolist() for n, v in s.items()} for k, s in samples.items()},
    )  # fmt: skip
    return headlines


def rows_of(rows: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The rows of dense or of sparse noises."""
    return [row for row in rows if row["kind"] == kind]


def msgd_step(problem: problems.Problem, law: noise.MNoise) -> train.StepFn:
    """Ours: `train.make_step`."""
    return train.make_step(problem.loss_vector_fn, optax.sgd(LEARNING_RATE), law)


def plain_step(problem: problems.Problem, batch_size: int, *, replace: bool) -> train.StepFn:
    """A plain training step on all examples, or on a mini-batch drawn with or without replacement.

    On the state of `train`, and with its two metrics, so that both sides keep the same books.
    """
    optimizer = optax.sgd(LEARNING_RATE)
    num_examples = problem.data[1].shape[0]

    def batch_of(state: train.TrainState, data: Any) -> Any:
        if batch_size == num_examples:
            return data
        key = jax.random.fold_in(state.key, state.step)
        if replace:
            indices = jax.random.randint(key, (batch_size,), 0, num_examples)
        else:
            indices = jax.random.permutation(key, num_examples)[:batch_size]
        return jax.tree.map(lambda leaf: leaf[indices], data)

    def step(state: train.TrainState, data: Any) -> tuple[train.TrainState, train.StepMetrics]:
        def mean_loss(params: Any) -> Any:
            return problem.loss_vector_fn(params, batch_of(state, data)).mean()

        value, grads = jax.value_and_grad(mean_loss)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = train.StepMetrics(loss=value, gradient_norm=optax.tree.norm(grads))
        state = state._replace(params=params, opt_state=opt_state, step=state.step + 1)
        return state, metrics

    return step


def _loop(step: train.StepFn, problem: problems.Problem, steps: int) -> Callable[[], Any]:
    """Many steps in one compiled loop, so that it is the step that is timed, not its dispatch."""
    loop = train.make_loop(step, max_steps=steps)
    state = train.init(problem.params, optax.sgd(LEARNING_RATE), jax.random.key(1))

    def run() -> Any:
        nonlocal state
        state, metrics = loop(state, problem.data, steps)
        return state.params, metrics

    return run


def _row(
    name: str,
    law: noise.MNoise,
    steps: int,
    seconds: dict[str, np.ndarray],
    ratio: timing.Spread,
) -> dict[str, Any]:
    ms = {who: 1e3 * float(jnp.median(values)) / steps for who, values in seconds.items()}
    return {
        "noise": name,
        "kind": "dense" if law.support_size == law.num_examples else "sparse",
        "losses": law.support_size,
        "plain, ms a step": f"{ms['plain']:.2f}",
        "ours, ms a step": f"{ms[name]:.2f}",
        "ratio": f"{ratio.median:.3f}",
        "quartiles": f"{ratio.low:.3f} to {ratio.high:.3f}",
    }


def _headline(kind: str, target: float, ratios: dict[str, timing.Spread]) -> report.Headline:
    worst = max(ratios, key=lambda name: ratios[name].median)
    found = ratios[worst]
    return report.Headline(
        "step_overhead",
        f"step over plain step, largest of the {kind} noises ({worst})",
        f"{found.median:.3f} (quartiles {found.low:.3f} to {found.high:.3f})",
        f"<= {target}",
        found.median <= target,
    )


def _plot(ratios: dict[str, timing.Spread], axes: Any) -> None:
    medians = np.array([ratio.median for ratio in ratios.values()])
    errors = [
        [ratio.median - ratio.low for ratio in ratios.values()],
        [ratio.high - ratio.median for ratio in ratios.values()],
    ]
    axes.errorbar(medians, np.arange(len(medians)), xerr=errors, fmt="o", capsize=3)
    axes.set_yticks(np.arange(len(medians)), list(ratios))
    axes.invert_yaxis()
    axes.axvline(1.0, color="gray", linewidth=1)
    axes.set_xlabel("time of an M-SGD step over a plain step (median, quartiles)")
    axes.set_title("LeNet, N = 1,000", fontsize=11)


if __name__ == "__main__":
    main(tyro.cli(Config))
