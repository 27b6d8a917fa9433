"""Batch sharpness along training against 2 / eta (arXiv 2412.20553), for laws of SGD's covariance.

All seeds of a run are trained side by side in one compiled loop. The largest eigenvalue of the
Hessian and SGD's batch sharpness, which are the same yardsticks for all laws, show which parameters
a law leads training to. The law's own batch sharpness shows how sharp its own steps are.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from experiments import terminal
from experiments._typing import Params
from experiments.noise_study import _edge_report, _problem
from experiments.noise_study._config import EdgeConfig
from experiments.studies.study import Study
from msgd_jax import loss, measure

# Draws of SGD's batch sharpness for each draw of a law's own, which may need all examples.
_YARDSTICK = 6
Examples = dict[str, Array]


def make(config: EdgeConfig, missing: list[tuple[str, float]]) -> Iterator[dict[str, Any]]:
    """The records of some runs, made one after the other."""
    examples = _problem.digits(config.all_seeds)
    with terminal.Progress(len(missing) * config.steps) as progress:
        for name, rate in missing:
            progress.compiling(f"{name} at {rate:g}")
            yield train(config, examples, name, rate, progress.update)


STUDY = Study(
    name="edge",
    names=("noise", "learning_rate"),
    fields=_edge_report.FIELDS,
    plan=lambda config: config.runs,
    make=make,
    rows=_edge_report.rows,
    table=_edge_report.table,
    draw=_edge_report.draw,
)


def train(
    config: EdgeConfig,
    examples: Examples,
    name: str,
    rate: float,
    advanced: Callable[[int], Any] = lambda steps: None,
) -> dict[str, Any]:
    """Trains all seeds with one law; returns its record, [measurements][seeds] per quantity.

    Args:
        config: the configuration of the study.
        examples: the examples of all seeds, as from `_problem.digits`.
        name: the name of the law.
        rate: the learning rate.
        advanced: called with the number of steps made since its last call.
    """
    keys = jax.vmap(jax.random.key)(jnp.asarray(config.all_seeds))
    inputs = examples["x"].shape[-1]
    params = jax.vmap(lambda key: _problem.initial(key, inputs, config.width))(keys)
    advance, measured = _advance(config, examples, name, rate), _measured(config, examples, name)
    found, done = [], 0
    for step in config.measured_at:
        params = advance(params, examples, keys, done, step)
        found.append(jax.device_get(measured(params, examples, keys, step)))
        advanced(step - done)
        done = step
    values = {
        quantity: [[float(f"{x:.5g}") for x in one[quantity]] for one in found]
        for quantity in found[0]
    }
    return {
        "step": done,
        "noise": name,
        "learning_rate": rate,
        "seeds": list(config.all_seeds),
        "steps": list(config.measured_at),
        **values,
    }


def _advance(
    config: EdgeConfig, examples: Examples, name: str, rate: float
) -> Callable[..., Params]:
    """A compiled function ``(params, examples, keys, begin, end) -> params`` for all seeds."""
    law = _problem.law_of(name, config, examples["y"].shape[1])
    value_and_grad = loss.weighted_value_and_grad(_problem.losses)
    perturbed = name == "isotropic"

    def one(params: Params, own: Examples, key: Key[Array, ""], begin: Array, end: Array) -> Params:
        key = _problem.noise_key(key, name)

        def step(t: Array, state: tuple[Params, Array]) -> tuple[Params, Array]:
            params, variance = state
            _, grads = value_and_grad(params, own, law.sample(key, t))
            if perturbed:
                # `t` is the same for all seeds, so only one branch is computed.
                variance = jax.lax.cond(
                    (t % config.refresh_every == 0) | (t == begin),
                    lambda: _problem.isotropic_variance(params, own, config.batch_size),
                    lambda: variance,
                )
                normals = _problem.isotropic(key, t, params)
                grads = jax.tree.map(lambda g, z: g + jnp.sqrt(variance) * z, grads, normals)
            return jax.tree.map(lambda p, g: p - rate * g, params, grads), variance

        return jax.lax.fori_loop(begin, end, step, (params, jnp.zeros(())))[0]

    return jax.jit(jax.vmap(one, in_axes=(0, 0, 0, None, None)))


def _measured(
    config: EdgeConfig, examples: Examples, name: str
) -> Callable[..., dict[str, Float[Array, " seeds"]]]:
    """A compiled function from ``(params, examples, keys, step)`` to all quantities."""
    num_examples, draws = examples["y"].shape[1], config.law_draws
    law, sgd = (_problem.law_of(which, config, num_examples) for which in (name, "sgd"))

    def one(
        params: Params, own: Examples, key: Key[Array, ""], step: Array
    ) -> dict[str, Float[Array, ""]]:
        vector = loss.LossVector(_problem.losses, own)
        keys = jax.random.split(_problem.measure_key(key, step), 4)
        here = measure.batch_sharpness(vector, params, sgd, keys[0], num_draws=_YARDSTICK * draws)
        top = measure.hessian_eigenvalues(
            vector, params, keys[1], num_steps=config.lanczos_steps
        ).values[0]
        # GD's draws are all the same.
        count = 2 if name in ("gd", "isotropic") else draws
        sharp = measure.batch_sharpness(vector, params, law, keys[2], num_draws=count)
        step_own = sharp.ratio_of_expectations.value
        if name == "isotropic":
            # For additive noise z: E[(g + z)^T H (g + z)] / E|g + z|^2, exact in z.
            variance = _problem.isotropic_variance(params, own, config.batch_size)
            size = sum(leaf.size for leaf in jax.tree.leaves(params))
            trace = measure.hessian_trace(vector, params, keys[3], num_probes=draws).trace.value
            step_own = (sharp.curvature.value + variance * trace) / (
                sharp.squared_gradient.value + variance * size
            )
        numbers: dict[str, Any] = {
            "loss": _problem.losses(params, own).mean(),
            "eigenvalue": top,
            "sgd_sharpness": here.ratio_of_expectations.value,
            "sgd_mean_of_ratios": here.expectation_of_ratios.value,
            "own_sharpness": step_own,
        }
        return numbers

    return jax.jit(jax.vmap(one, in_axes=(0, 0, 0, None)))
