"""What multiplicative noise costs: an M-SGD step against a plain `optax.sgd` step.

``python -m benchmarks.step_overhead``. The same LeNet, examples, loss vector function and reported
numbers (loss and gradient norm) on both sides, without micro-batches. Dense noises stand against
plain gradient descent on the N examples; sparse ones against mini-batch SGD with as many a step,
which has to draw its batch too: without replacement as a permutation's first entries, or, for the
noise that draws with replacement, as random integers. The plain step competes twice: how far its
second run is from its first says how much of the other ratios is the machine.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import tyro

from benchmarks import problems, report, timing
from msgd_jax import noise, train

LEARNING_RATE = 0.01
PLAIN, CONTROL = "plain", "(plain again)"


@dataclasses.dataclass(frozen=True)
class Config(report.Config):
    """M-SGD steps against plain steps, for every noise.

    Attributes:
        examples: N.
        batch_size: b.
        support_size: B, what a step of the sparse noises computes.
        sparse_steps: mini-batch steps in one sample; of full-batch steps it is one.
    """

    repeats: int = 60
    examples: int = 1_000
    batch_size: int = 50
    support_size: int = 100
    sparse_steps: int = 20


class Group(NamedTuple):
    """Noises that stand against the same plain step.

    Attributes:
        kind: dense or sparse.
        replace: whether the plain step draws its batch with replacement.
        laws: the noises by name.
    """

    kind: str
    replace: bool
    laws: dict[str, noise.MNoise]


def groups(config: Config) -> list[Group]:
    """Every noise of the library."""
    n, b, support = config.examples, config.batch_size, config.support_size
    scale = noise.matching_scale(noise.fisher(n, b))
    dense = {
        "gd": noise.gd(n),
        "fisher": noise.fisher(n, b),
        "cov": noise.cov(n, b),
        "bernoulli": noise.bernoulli(n, b),
        "rademacher": noise.rademacher(n, scale),
        "estimated_fisher": noise.estimated_fisher(n, b, estimate_size=b),
        "estimated_cov": noise.estimated_cov(n, b, estimate_size=b),
    }
    sparse = {
        "sparse_fisher": noise.sparse_fisher(n, b, support_size=support),
        "sparse_cov": noise.sparse_cov(n, b, support_size=support),
    }
    if config.quick:
        dense = {"cov": dense["cov"]}
        return [Group("dense", False, dense)]
    return [
        Group("dense", False, dense),
        Group("sparse", False, {"sgd": noise.sgd(n, b)}),
        Group("sparse", True, {"sgd, replace": noise.sgd(n, b, replace=True)}),
        Group("sparse", False, sparse),
    ]


def main(config: Config) -> list[report.Headline]:
    """Measures, prints, writes; returns the headlines."""
    if config.quick:
        config = dataclasses.replace(
            config, repeats=2, examples=60, batch_size=5, support_size=10, sparse_steps=1
        )
    problem = problems.lenet(config.examples)
    rows: list[dict[str, Any]] = []
    ratios: dict[str, dict[str, timing.Spread]] = {"dense": {}, "sparse": {}}
    samples = []
    for group in groups(config):
        seconds = _measure(group, problem, config)
        samples.append({name: values.tolist() for name, values in seconds.items()})
        steps = 1 if group.kind == "dense" else config.sparse_steps
        for name in [*group.laws, CONTROL]:
            ratio = timing.ratio(seconds, name, PLAIN)
            rows.append(_row(name, group, steps, seconds, ratio))
            if name != CONTROL:
                ratios[group.kind][name] = ratio
    targets = {"dense": 1.02, "sparse": 1.05}
    headlines = [_headline(kind, targets[kind], found) for kind, found in ratios.items() if found]
    plot = functools.partial(_plot, {**ratios["dense"], **ratios["sparse"]})
    report.publish("step_overhead", config, rows, headlines, plot, seconds=samples)
    return headlines


def _measure(group: Group, problem: problems.Problem, config: Config) -> dict[str, np.ndarray]:
    """The plain step twice, the second time as a control, and the noises, all in turn."""
    support = next(iter(group.laws.values())).support_size
    steps = 1 if group.kind == "dense" else config.sparse_steps
    plain = plain_step(problem, support, replace=group.replace)
    contestants = {PLAIN: _loop(plain, problem, steps)}
    for name, law in group.laws.items():
        contestants[name] = _loop(msgd_step(problem, law), problem, steps)
    contestants[CONTROL] = _loop(plain, problem, steps)
    return timing.alternate(
        contestants, repeats=config.repeats, description=", ".join(group.laws)[:40]
    )


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
    name: str, group: Group, steps: int, seconds: dict[str, np.ndarray], ratio: timing.Spread
) -> dict[str, Any]:
    ms = {who: 1e3 * float(np.median(values)) / steps for who, values in seconds.items()}
    error = 1.25 * np.std(seconds[name] / seconds[PLAIN]) / len(seconds[name]) ** 0.5
    return {
        "noise": name,
        "kind": group.kind,
        "losses": next(iter(group.laws.values())).support_size,
        "plain, ms a step": f"{ms[PLAIN]:.2f}",
        "this, ms a step": f"{ms[name]:.2f}",
        "ratio": f"{ratio.median:.3f}",
        "standard error": f"{error:.3f}",
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
