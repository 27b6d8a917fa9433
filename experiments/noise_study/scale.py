"""The noise scale along training (McCandlish et al. 2018, arXiv 1812.06162) on FashionMNIST.

Two questions: what do three estimators of the noise scale cost, and how far are they off? And does
the noise scale predict the batch size above which larger batches hardly save steps? All seeds of a
run are trained side by side in one compiled loop.
"""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key

from experiments import terminal
from experiments._typing import Params
from experiments.noise_study import _fashion, _scale_report
from experiments.noise_study._scale_config import ScaleConfig
from experiments.studies.study import Study, rounded
from msgd_jax import loss, measure, noise
from msgd_jax._streams import Stream, derive

# The draws that a seed makes from its stream of cases.
_REFERENCE, _MEASURES, _RACES = range(3)
# The examples whose gradients are in memory at once.
_AT_ONCE = 512
# The batch size at which the search begins with half of the first rate.
_KNEE = 32
# The number of learning rates after which a target that none of them reaches is given up.
_MOST_RATES = 8
Examples = dict[str, Array]


def plan(config: ScaleConfig) -> list[tuple[str, int]]:
    """The reference run and one group of runs per batch size."""
    size = config.microbatches * config.microbatch_size
    return [("reference", size), *(("batch", b) for b in config.batch_sizes)]


def make(config: ScaleConfig, missing: list[tuple[str, int]]) -> Iterator[dict[str, Any]]:
    """The records of some runs, made one after the other."""
    examples = _fashion.images(config.all_seeds, config.num_examples)
    with terminal.Progress(len(missing), "run") as progress:
        for kind, size in missing:
            progress.compiling(f"{kind}, batch size {size}")
            yield (
                reference(config, examples) if kind == "reference" else best(config, examples, size)
            )
            progress.update()


def _start(config: ScaleConfig, examples: Examples) -> tuple[Key[Array, " seeds"], Params]:
    """The keys and the initial parameters of all seeds."""
    keys = jax.vmap(jax.random.key)(jnp.asarray(config.all_seeds))
    inputs = examples["x"].shape[-1]
    return keys, jax.vmap(lambda key: _fashion.initial(key, inputs, config.width))(keys)


# The reference run, with all estimators side by side.


def monitors(config: ScaleConfig) -> dict[str, tuple[int, optax.GradientTransformation]]:
    """The free estimators: how many micro-batches each of its gradients is the mean of, and it."""
    found = {}
    for groups in (config.microbatches, 2):
        merged = config.microbatches // groups
        for window in config.windows:
            found[f"{groups} micro-batches, {window} steps"] = (
                merged,
                measure.noise_scale_monitor(
                    groups, batch_size=merged * config.microbatch_size, decay=1 - 1 / window
                ),
            )
    return found


def reference(config: ScaleConfig, examples: Examples) -> dict[str, Any]:
    """A run with large batches in micro-batches; the record has [measurements][seeds] per entry."""
    keys, params = _start(config, examples)
    free = monitors(config)
    states = {name: jax.vmap(each.init)(params) for name, (_, each) in free.items()}
    advance, measured = _advance(config, free), _measured(config, free)
    found, done = [], 0
    for step in config.measured_at:
        params, states = advance(params, states, examples, keys, done, step)
        found.append(jax.device_get(measured(params, states, examples, keys, step)))
        done = step
    # In this order in the table; compiled functions sort by name.
    draws = (f"{count} draws" for count in config.law_draws)
    order = ["exact", *draws, *free, *_scale_report.SERIES]
    return {
        "step": done,
        "kind": "reference",
        "batch_size": config.microbatches * config.microbatch_size,
        "seeds": list(config.all_seeds),
        "learning_rate": config.reference_rate,
        "steps": list(config.measured_at),
        "cost": _costs(config, params, examples, keys),
        "measured": {name: [rounded(one[name], 5) for one in found] for name in order},
    }


def _advance(config: ScaleConfig, free: dict[str, Any]) -> Callable[..., Any]:
    """A compiled function ``(params, states, examples, keys, begin, end) -> (params, states)``."""
    law = noise.sgd(config.num_examples, config.microbatch_size, replace=True)
    value_and_grad = loss.weighted_value_and_grad(_fashion.losses)
    count = config.microbatches

    def one(params: Params, states: Any, own: Examples, key: Any, begin: Any, end: Any) -> Any:
        key = derive(key, Stream.CASES, _REFERENCE)

        def step(t: Array, carry: tuple[Params, Any]) -> tuple[Params, Any]:
            params, states = carry
            weights = jax.vmap(law.sample, in_axes=(None, 0))(key, t * count + jnp.arange(count))
            _, grads = jax.vmap(value_and_grad, in_axes=(None, None, 0))(params, own, weights)
            states = {
                name: _shown_to(each, states[name], grads, merged)
                for name, (merged, each) in free.items()
            }
            moved = jax.tree.map(lambda p, g: p - config.reference_rate * g.mean(0), params, grads)
            return moved, states

        return jax.lax.fori_loop(begin, end, step, (params, states))

    return jax.jit(jax.vmap(one, in_axes=(0, 0, 0, 0, None, None)))


def _shown_to(each: optax.GradientTransformation, state: Any, grads: Any, merged: int) -> Any:
    """The state of a monitor after the gradients of a step, means of `merged` micro-batches."""

    def means(leaf: Array) -> Array:
        return leaf.reshape(-1, merged, *leaf.shape[1:]).mean(1)

    return jax.lax.scan(
        lambda state, g: (each.update(g, state)[1], None), state, jax.tree.map(means, grads)
    )[0]


def _measured(config: ScaleConfig, free: dict[str, Any]) -> Callable[..., dict[str, Array]]:
    """A compiled function from ``(params, states, examples, keys, step)`` to all measurements.

    Each estimator gives ``[noise scale, tr S, |grad L|^2, low, high]``, with the ends of the 95 %
    interval of the noise scale.
    """
    cov = noise.cov(config.num_examples, config.microbatch_size)

    def five(found: measure.NoiseScale) -> Float[Array, "5"]:
        total = found.total
        numbers = (total.noise_scale.value, total.trace.value, total.squared_gradient.value)
        return jnp.stack([jnp.asarray(x) for x in (*numbers, *total.interval)])

    def one(
        params: Params, states: Any, own: Examples, key: Key[Array, ""], step: Array
    ) -> dict[str, Any]:
        vector = loss.LossVector(_fashion.losses, own, microbatch_size=_AT_ONCE)
        keys = jax.random.split(
            derive(key, Stream.CASES, _MEASURES, step), len(config.law_draws) + 1
        )
        found = {"exact": five(measure.noise_scale(vector, params))}
        for draws, own_key in zip(config.law_draws, keys[1:], strict=True):
            found[f"{draws} draws"] = five(
                measure.noise_scale_from_draws(vector, params, cov, own_key, num_draws=draws)
            )
        # Before the first step the monitors have seen nothing, and the numbers are not used.
        found |= {name: five(measure.monitored_noise_scale(states[name])) for name in free}
        # For the noise scale with curvature, tr(HS) / (g . H g).
        aligned = measure.alignment(
            vector, params, cov, keys[0], num_draws=config.hessian_draws, num_probes=3
        )
        g = vector.gradient(params)
        along = optax.tree.vdot(g, vector.hessian_product(params, g))
        return found | {
            "trace_hs": jnp.asarray(aligned.trace_hs.value),
            "along": along,
            "loss": vector.mean(params),
        }

    return jax.jit(jax.vmap(one, in_axes=(0, 0, 0, 0, None)))


def _costs(
    config: ScaleConfig, params: Params, examples: Examples, keys: Key[Array, " seeds"]
) -> dict[str, list[float]]:
    """Per estimator, the gradients of one example that it computes, and its seconds on one seed."""
    first = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)  # noqa: E731
    params, own, key = first(params), first(examples), first(keys)
    n, cov = config.num_examples, noise.cov(config.num_examples, config.microbatch_size)

    def vector(own: Examples) -> loss.LossVector:
        return loss.LossVector(_fashion.losses, own, microbatch_size=_AT_ONCE)

    def from_draws(draws: int) -> Callable[..., Any]:
        def program(params: Params, own: Examples, key: Key[Array, ""]) -> measure.NoiseScale:
            return measure.noise_scale_from_draws(vector(own), params, cov, key, num_draws=draws)

        return program

    programs: dict[str, tuple[int, Callable[..., Any]]] = {
        "exact": (2 * n, lambda params, own, _: measure.noise_scale(vector(own), params))
    }
    for draws in config.law_draws:
        programs[f"{draws} draws"] = ((draws + 1) * n, from_draws(draws))
    found = {name: [0.0, 0.0] for name in monitors(config)}
    for name, (gradients, program) in programs.items():
        compiled = jax.jit(program).lower(params, own, key).compile()
        seconds = []
        for _ in range(4):
            began = time.perf_counter()
            jax.block_until_ready(compiled(params, own, key))
            seconds.append(time.perf_counter() - began)
        found[name] = [float(gradients), rounded(min(seconds), 5)]
    return found


# Training with one batch size to all targets, at the best learning rate of each.


def best(config: ScaleConfig, examples: Examples, size: int) -> dict[str, Any]:
    """The steps to every target at several learning rates, until each has its best one inside.

    The record has [rates][seeds][targets] steps, infinite for a target that was not reached.
    """
    race = _race(config, size)
    keys, params = _start(config, examples)
    # About where the best rate was in pilot runs; the search goes on from there.
    guess = 2.0 ** round(math.log2(config.first_rate * size / (size + _KNEE)))
    limit = max(1, config.most_epochs * config.num_examples // size)
    tried: dict[float, Any] = {}
    todo = {guess}
    while todo:
        for rate in sorted(todo):
            # A rate that needs 3 times the steps of the best so far is not the best one.
            reached = [float(np.max(steps[:, -1])) for steps in tried.values()]
            most = min([limit, *(3 * s + 10 for s in reached if math.isfinite(s))])
            tried[rate] = np.asarray(race(params, examples, keys, rate, round(most)), float)
        todo = _edges(tried) - tried.keys()
    rates = sorted(tried)
    return {
        "step": limit,
        "kind": "batch",
        "batch_size": size,
        "seeds": list(config.all_seeds),
        "rates": rates,
        "reached": [rounded(tried[rate], 5) for rate in rates],
    }


def _edges(tried: dict[float, Float[np.ndarray, "seeds targets"]]) -> set[float]:
    """The learning rates beside the best ones of the targets, by the mean logarithm of steps."""
    rates = sorted(tried)
    logs = np.stack([np.log(np.maximum(tried[rate], 1e-9)).mean(0) for rate in rates])
    reached = np.isfinite(logs).any(0)
    found = {rates[i] * factor for i in logs[:, reached].argmin(0) for factor in (0.5, 2.0)}
    if not reached.all() and len(rates) < _MOST_RATES:
        found |= {rates[0] / 2, rates[-1] * 2}
    return found


def _race(config: ScaleConfig, size: int) -> Callable[..., Float[Array, "seeds targets"]]:
    """A compiled function ``(params, examples, keys, rate, limit)`` to the steps to each target.

    The loss is evaluated from time to time, and the step at which it first passes a target is
    interpolated between two evaluations.
    """
    law = noise.sgd(config.num_examples, size, replace=True)
    value_and_grad = loss.weighted_value_and_grad(_fashion.losses)
    targets = jnp.asarray(config.targets)
    seen = config.evaluated

    def evaluate(params: Params, own: Examples) -> Float[Array, ""]:
        part = jax.tree.map(lambda leaf: leaf[:seen], own)
        return _fashion.losses(params, part).mean()

    def step(params: Params, own: Examples, key: Key[Array, ""], rate: Array, t: Array) -> Params:
        _, grads = value_and_grad(params, own, law.sample(key, t))
        return jax.tree.map(lambda p, g: p - rate * g, params, grads)

    def program(params: Params, own: Examples, keys: Any, rate: Array, limit: Array) -> Array:
        keys = jax.vmap(lambda key: derive(key, Stream.CASES, _RACES, size))(keys)
        step_all = jax.vmap(step, in_axes=(0, 0, 0, None, None))

        def unfinished(carry: Any) -> Array:
            _, t, _, reached = carry
            return (t < limit) & ~jnp.isfinite(reached).all()

        def until_next(carry: Any) -> Any:
            params, t, before, reached = carry
            gap = jnp.maximum(1, (config.growth * t).astype(t.dtype))
            end = jnp.minimum(t + gap, limit)
            params = jax.lax.fori_loop(t, end, lambda i, p: step_all(p, own, keys, rate, i), params)
            now = jax.vmap(evaluate)(params, own)
            share = (before[:, None] - targets[None]) / (before - now)[:, None]
            passed = (now[:, None] <= targets[None]) & ~jnp.isfinite(reached)
            at = t + jnp.clip(share, 0, 1) * (end - t)
            return params, end, now, jnp.where(passed, at, reached)

        first = jax.vmap(evaluate)(params, own)
        # A target that the initial weights pass already is reached after 0 steps.
        reached = jnp.where(first[:, None] <= targets[None], 0.0, jnp.inf)
        return jax.lax.while_loop(unfinished, until_next, (params, jnp.asarray(0), first, reached))[
            3
        ]

    return jax.jit(program)


STUDY = Study(
    name="scale",
    names=("kind", "batch_size"),
    fields=frozenset({"seeds"}),
    plan=plan,
    make=make,
    rows=_scale_report.rows,
    table=_scale_report.table,
    draw=_scale_report.draw,
)
