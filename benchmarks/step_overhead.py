"""The cost of multiplicative noise: an M-SGD step against a plain `optax.sgd` step.

``python -m benchmarks.step_overhead``. Both sides have the same net, examples, loss vector
function, micro-batches and reported numbers (loss and gradient norm). The benchmark runs on jax's
default device, and reports it. Dense laws are compared with plain gradient descent on the N
examples, and sparse laws with mini-batch SGD on as many examples per step, which has to draw its
batch too: without replacement as the first entries of a permutation, or, for the law that draws
with replacement, as random integers. The plain step is measured twice: the ratio of both runs shows
how much of the other ratios is due to the machine.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import machine, problems, report, rows, timing
from experiments import models
from msgd_jax import noise, train

LEARNING_RATE = 0.01
PLAIN, CONTROL = "plain", "(plain again)"
COMPILING = 0.6  # The fraction of the time that compiling may take.


@dataclasses.dataclass(frozen=True)
class Config(report.Config):
    """Compares M-SGD steps with plain steps, for every law.

    Attributes:
        net: The net: lenet, or vgg11 with 16 channels in its first convolution.
        examples: The number N of examples.
        batch_size: The batch size b.
        support_size: The number B of examples that a step of the sparse laws computes.
        microbatch_size: The number of examples in one pass, on both sides; None stands for all of
            them at once.
        dense_steps: The number of full-batch steps in one sample; more than one where they are
            quick, as on GPUs.
        sparse_steps: The number of mini-batch steps in one sample.
        seconds: The seconds after which no further laws are begun; those left out are printed.
    """

    repeats: int = 60
    net: Literal["lenet", "vgg11"] = "lenet"
    examples: int = 1_000
    batch_size: int = 50
    support_size: int = 100
    microbatch_size: int | None = None
    dense_steps: int = 1
    sparse_steps: int = 20
    seconds: float = float("inf")


class Group(NamedTuple):
    """Laws that are compared with the same plain step.

    Attributes:
        kind: dense or sparse.
        replace: whether the plain step draws its batch with replacement.
        laws: the laws by name.
    """

    kind: str
    replace: bool
    laws: dict[str, noise.MNoise]


def groups(config: Config) -> list[Group]:
    """All laws of the library."""
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
        "student_t": noise.student_t(n, b, degrees_of_freedom=10),
        # A loader drew the batch from ten times as many examples.
        "batch_cov": noise.batch_cov(10 * n, b).of(n),
        "batch_fisher": noise.batch_fisher(10 * n, b).of(n),
    }
    sparse = {
        "sparse_fisher": noise.sparse_fisher(n, b, support_size=support),
        "sparse_cov": noise.sparse_cov(n, b, support_size=support),
        # A step has two mini-batches, of B examples together.
        "svag": noise.svag(noise.sgd(n, support // 2), refinement=3),
    }
    if config.quick:
        dense = {"cov": dense["cov"]}
        return [Group("dense", False, dense)]
    shuffled = noise.random_reshuffling(n, b, drop_remainder=True)
    return [
        Group("dense", False, dense),
        Group("sparse", False, {"sgd": noise.sgd(n, b), "random_reshuffling": shuffled}),
        Group("sparse", True, {"sgd, replace": noise.sgd(n, b, replace=True)}),
        Group("sparse", False, sparse),
    ]


def main(config: Config) -> list[report.Headline]:
    """Measures, prints, writes; returns the headlines."""
    if config.quick:
        config = dataclasses.replace(
            config, repeats=2, examples=60, batch_size=5, support_size=10, sparse_steps=1
        )
    problem = _problem(config)
    begin = time.monotonic()
    lines: list[dict[str, Any]] = []
    ratios: dict[str, dict[str, timing.Spread]] = {"dense": {}, "sparse": {}}
    samples = []
    for i, group in enumerate(groups(config)):
        left = config.seconds - (time.monotonic() - begin)
        if i and left <= 0:
            print(f"Left out, no time: {', '.join(group.laws)}")
            continue
        # The two are the plain steps.
        to_come = [len(other.laws) + 2 for other in groups(config)[i:]]
        seconds = _measure(group, problem, config, left * to_come[0] / sum(to_come))
        samples.append({name: values.tolist() for name, values in seconds.items()})
        steps = _steps(group, config)
        for name in [name for name in seconds if name != PLAIN]:
            ratio = timing.ratio(seconds, name, PLAIN)
            lines.append(_row(name, group, steps, seconds, ratio))
            if name != CONTROL:
                ratios[group.kind][name] = ratio
    targets = {"dense": 1.02, "sparse": 1.05}
    headlines = [_headline(kind, targets[kind], found) for kind, found in ratios.items() if found]
    title = f"{problem.num_parameters:,} parameters, N = {config.examples:,}"
    plot = functools.partial(_plot, {**ratios["dense"], **ratios["sparse"]}, title)
    report.publish("step_overhead", config, lines, headlines, plot, seconds=samples)
    return headlines


def _problem(config: Config) -> problems.Problem:
    if config.net == "lenet":
        return problems.lenet(config.examples)
    row = rows.Row("vgg11", 16, config.examples, config.microbatch_size or config.examples)
    params = jax.jit(rows.model(row).init)(jax.random.key(0))
    data = problems.random_images(config.examples, models.VGG11.image_shape)
    count = models.num_parameters(params)
    return problems.Problem(rows.loss_vector_fn(row), params, data, count)


def _steps(group: Group, config: Config) -> int:
    return config.dense_steps if group.kind == "dense" else config.sparse_steps


def _measure(
    group: Group, problem: problems.Problem, config: Config, budget: float
) -> dict[str, np.ndarray]:
    """Times the plain step twice, the second time as a control, and the laws, all in turn.

    Laws whose compilation has not begun when a fraction of the budget, in seconds, is used are left
    out.
    """
    support = next(iter(group.laws.values())).support_size
    steps = _steps(group, config)
    plain = plain_step(
        problem, support, replace=group.replace, microbatch_size=config.microbatch_size
    )
    contestants = {PLAIN: _loop(plain, problem, steps)}
    for name, law in group.laws.items():
        step = msgd_step(problem, law, config.microbatch_size)
        contestants[name] = _loop(step, problem, steps)
    contestants[CONTROL] = _loop(plain, problem, steps)
    start = time.monotonic()

    def get_ready(name: str) -> bool:
        # The plain steps and one law are measured in any case.
        needed = name in (PLAIN, CONTROL, next(iter(group.laws)))
        if not needed and time.monotonic() - start > COMPILING * budget:
            return False
        jax.block_until_ready(contestants[name]())
        return True

    with futures.ThreadPoolExecutor(min(4, machine.usable_cores())) as pool:
        ready = dict(zip(contestants, pool.map(get_ready, contestants), strict=True))
    if late := [name for name in contestants if not ready[name]]:
        print(f"Left out, no time to compile: {', '.join(late)}")
    contestants = {name: run for name, run in contestants.items() if ready[name]}
    return timing.alternate(
        contestants,
        repeats=config.repeats,
        warmups=1,
        budget=start + budget - time.monotonic(),
        description=", ".join(group.laws)[:40],
    )


def msgd_step(
    problem: problems.Problem, law: noise.MNoise, microbatch_size: int | None = None
) -> train.StepFn:
    """Ours: `train.make_step`."""
    optimizer = optax.sgd(LEARNING_RATE)
    return train.make_step(problem.loss_vector_fn, optimizer, law, microbatch_size=microbatch_size)


def plain_step(
    problem: problems.Problem,
    batch_size: int,
    *,
    replace: bool,
    microbatch_size: int | None = None,
) -> train.StepFn:
    """A plain training step on all examples, or on a mini-batch drawn with or without replacement.

    It uses the state of `train` and reports the same two metrics as our step.
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

    def mean_gradient(params: Any, batch: Any) -> tuple[Any, Any]:
        return jax.value_and_grad(lambda p: problem.loss_vector_fn(p, batch).mean())(params)

    def step(state: train.TrainState, data: Any) -> tuple[train.TrainState, train.StepMetrics]:
        batch = batch_of(state, data)
        if microbatch_size is None or microbatch_size >= batch_size:
            value, grads = mean_gradient(state.params, batch)
        else:
            value, grads = _in_microbatches(mean_gradient, state.params, batch, microbatch_size)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = train.StepMetrics(loss=value, gradient_norm=optax.tree.norm(grads))
        state = state._replace(params=params, opt_state=opt_state, step=state.step + 1)
        return state, metrics

    return step


def _in_microbatches(mean_gradient: Any, params: Any, batch: Any, size: int) -> tuple[Any, Any]:
    """The mean over micro-batches, whose size divides the batch, of mean losses and gradients."""
    batches = jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), batch)
    count = jax.tree.leaves(batches)[0].shape[0]

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, mean_gradient(params, part)), None

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    total, _ = jax.lax.scan(add, zero, batches)
    return jax.tree.map(lambda leaf: leaf / count, total)


def _loop(step: train.StepFn, problem: problems.Problem, steps: int) -> Callable[[], Any]:
    """Many steps in one compiled loop, so that steps are timed and not their dispatch."""
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
        "plain, ms per step": f"{ms[PLAIN]:.2f}",
        "this, ms per step": f"{ms[name]:.2f}",
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


def _plot(ratios: dict[str, timing.Spread], title: str, axes: Any) -> None:
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
    axes.set_title(title, fontsize=11)


if __name__ == "__main__":
    import tyro  # It is imported here, since `main` needs no command line.

    main(tyro.cli(Config))
