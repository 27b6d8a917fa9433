"""Batch sharpness along training against 2 / eta (arXiv 2412.20553), for laws of SGD's covariance.

All seeds of a run are trained side by side in one compiled loop. The largest eigenvalue of the
Hessian and SGD's batch sharpness, which are the same yardsticks for all laws, show which parameters
a law leads training to. The law's own batch sharpness shows how sharp its own steps are.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from experiments import records, terminal
from experiments._typing import Params
from experiments.noise_study import _problem, _report
from experiments.noise_study.config import NoiseStudyConfig
from experiments.training import runs
from msgd_jax import loss, measure

RECORDS = "edge.jsonl"
# Draws of SGD's batch sharpness for each draw of a law's own, which may need all examples.
_YARDSTICK = 6
Examples = dict[str, Array]


def run(config: NoiseStudyConfig) -> pathlib.Path:
    """Makes the missing runs, prints the table, draws the picture; returns the folder.

    Raises:
        FileExistsError: if the folder belongs to another command or configuration.
        records.DamagedRecordError: if records are missing or cannot be read.
    """
    if config.report:
        return _again(config)
    steps = {"edge": functools.partial(_part, config)}
    return runs.run_parts("noise-study", config, steps, {"edge": _report.table})


def _again(config: NoiseStudyConfig) -> pathlib.Path:
    """Makes the table and the picture from the records, without new runs."""
    assert config.out is not None  # checked by the configuration
    found = recorded(config.out)
    held = records.read_object(config.out / "config.json")
    rate, margin = held["learning_rate"], held["margin"]
    print(_report.table(_report.rows(found, rate, margin)))
    _report.draw(found, rate, config.out / "edge.png")
    return config.out


def _part(config: NoiseStudyConfig, folder: pathlib.Path) -> list[dict[str, Any]]:
    """Makes the missing runs, one after the other; returns the rows of the table."""
    path = folder / RECORDS
    done = records.read_lines(path)
    # Write the records again without a last line that was cut short.
    records.replace_text(path, "".join(map(records.as_line, done)))
    have = {(line["noise"], line["learning_rate"]) for line in done}
    missing = [run for run in config.runs if run not in have]
    if missing:
        examples = _problem.digits(config)
        with terminal.Progress(len(missing) * config.steps) as progress:
            for name, rate in missing:
                progress.compiling(f"{name} at {rate:g}")
                line = train(config, examples, name, rate, progress.update)
                with path.open("a", encoding="utf-8") as file:
                    file.write(records.as_line(line))
    found = recorded(folder)
    _report.draw(found, config.learning_rate, folder / "edge.png")
    return _report.rows(found, config.learning_rate, config.margin)


def recorded(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The records of a folder, one per law and learning rate."""
    found = records.read_lines(folder / RECORDS)
    for line in found:
        if not line.keys() >= _report.FIELDS:
            raise records.DamagedRecordError(
                f"{folder / RECORDS} has a line without {min(_report.FIELDS - line.keys())}"
            )
    if not any(line["noise"] == "sgd" for line in found):
        raise records.DamagedRecordError(f"{folder / RECORDS} has no run of sgd")
    return found


def train(
    config: NoiseStudyConfig,
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
    keys = jax.vmap(jax.random.key)(jnp.arange(config.seed, config.seed + config.seeds))
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
        "seeds": list(range(config.seed, config.seed + config.seeds)),
        "steps": list(config.measured_at),
        **values,
    }


def _advance(
    config: NoiseStudyConfig, examples: Examples, name: str, rate: float
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
    config: NoiseStudyConfig, examples: Examples, name: str
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
