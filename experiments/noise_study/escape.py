"""Anisotropic noise (Zhu et al. 2018, arXiv 1803.00195): alignment, and escape from a minimum.

Zhu et al. say that SGD's noise leaves sharp minima fast because its covariance is aligned with the
Hessian. GD finds a minimum; from there, noises of equal trace and different shapes go on. All seeds
of a run are trained side by side in one compiled loop.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from experiments import terminal
from experiments._typing import Params
from experiments.decide.settings import noise_number
from experiments.noise_study import _escape_report, _problem, _shapes
from experiments.noise_study._escape_config import EscapeConfig
from experiments.studies.config import evenly
from experiments.studies.study import Study, rounded
from msgd_jax import loss, measure, noise
from msgd_jax._streams import Stream, derive

# The draws that a seed makes from its stream of cases.
_NOISE, _MEASURES = range(2)
Examples = dict[str, Array]


def plan(config: EscapeConfig) -> list[tuple[str, str]]:
    """Both paths along which alignment is measured, and the runs from the minimum."""
    return [("path", "gd"), ("path", "sgd"), *(("escape", name) for name in config.noises)]


def make(config: EscapeConfig, missing: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """The records of some runs, made one after the other."""
    examples = {part: _problem.digits(config.all_seeds, part) for part in ("train", "test")}
    examples["train"] = {
        name: values[:, : config.num_examples] for name, values in examples["train"].items()
    }
    keys = jax.vmap(jax.random.key)(jnp.asarray(config.all_seeds))
    inputs = examples["train"]["x"].shape[-1]
    begin = jax.vmap(lambda key: _problem.initial(key, inputs, config.width))(keys)
    # Each program is compiled when it is first called, and used for all runs.
    advances = {name: _advance(config, name) for name in ("gd", "sgd", *config.noises)}
    aligned, measured = _aligned(config), _measured(config)
    minimum = None
    steps = {"path": config.gd_steps, "escape": config.steps}
    with terminal.Progress(sum(steps[kind] for kind, _ in missing)) as progress:
        for kind, name in missing:
            progress.compiling(f"{kind}, {name}")
            run = Run(config, name, keys, advances[name], progress.update)
            if kind == "path":
                yield path(run, examples["train"], begin, aligned)
                continue
            if minimum is None:
                minimum = advances["gd"](begin, examples["train"], keys, 0, config.gd_steps)
            yield escape(run, examples, minimum, measured)


class Run(NamedTuple):
    """What both kinds of runs need.

    Attributes:
        config: the options of the study.
        name: the name of the noise.
        keys: the keys of the seeds.
        advance: as from `_advance`.
        advanced: called with the number of steps made since its last call.
    """

    config: EscapeConfig
    name: str
    keys: Key[Array, " seeds"]
    advance: Callable[..., Params]
    advanced: Callable[[int], Any] = lambda steps: None


def path(
    run: Run, examples: Examples, params: Params, aligned: Callable[..., Any]
) -> dict[str, Any]:
    """Trains from the start, and measures the alignment of each shape with the Hessian there."""
    config, found, done = run.config, [], 0
    at = evenly(config.gd_steps, config.path_checkpoints)
    for step in at:
        params = run.advance(params, examples, run.keys, done, step)
        found.append(jax.device_get(aligned(params, examples)))
        run.advanced(step - done)
        done = step
    shapes = {
        shape: {
            quantity: rounded([one["shapes"][shape][quantity] for one in found], 6)
            for quantity in ("alignment", "cosine")
        }
        # The prediction is used at the end only.
        | {"rise": rounded(found[-1]["shapes"][shape]["rise"], 6)}
        for shape in found[0]["shapes"]
    }
    return {
        "step": done,
        "kind": "path",
        "noise": run.name,
        "seeds": list(config.all_seeds),
        "steps": at,
        "shapes": shapes,
        **{
            quantity: rounded([one[quantity] for one in found], 6)
            for quantity in ("loss", "squared_gradient", "trace")
        },
    }


def _aligned(config: EscapeConfig) -> Callable[..., dict[str, Any]]:
    """A compiled function from ``(params, examples)`` to alignments, the loss and its gradient."""

    def one(given: tuple[Params, Examples]) -> dict[str, Any]:
        vector = loss.LossVector(_problem.losses, given[1])
        gradient = vector.gradient(given[0])
        return {
            "shapes": _shapes.numbers(
                *given,
                rate=config.learning_rate,
                batch_size=config.batch_size,
                steps=config.short_steps,
            ),
            "loss": vector.mean(given[0]),
            "squared_gradient": optax.tree.norm(gradient, squared=True),
            "trace": measure.noise_scale(vector, given[0]).total.trace.value,
        }

    # One seed after the other, since each has matrices of its own.
    return jax.jit(lambda *args: jax.lax.map(one, args))


def escape(
    run: Run, examples: dict[str, Examples], minimum: Params, measured: Callable[..., Any]
) -> dict[str, Any]:
    """Goes on from the minimum with one noise: several short runs, and a long one."""
    config, train = run.config, examples["train"]
    rise = _rise(config, run.name)(minimum, train, run.keys)
    params, found, done = minimum, [], 0
    at = evenly(config.steps, config.checkpoints)
    for step in at:
        params = run.advance(params, train, run.keys, done, step)
        found.append(jax.device_get(measured(params, minimum, examples, run.keys, step)))
        run.advanced(step - done)
        done = step
    return {
        "step": done,
        "kind": "escape",
        "noise": run.name,
        "seeds": list(config.all_seeds),
        "steps": at,
        "short_loss": rounded(rise, 6),
        **{quantity: rounded([one[quantity] for one in found], 6) for quantity in found[0]},
    }


def _law(config: EscapeConfig, name: str, num_examples: int) -> noise.MNoise:
    """The law of the weights; for additive noise it is that of GD."""
    if name.startswith("sgd"):
        return noise.sgd(num_examples, config.batch_size, replace=True)
    return noise.cov(num_examples, config.batch_size) if name == "cov" else noise.gd(num_examples)


def _key(key: Key[Array, ""], name: str, repetition: Any) -> Key[Array, ""]:
    """A different key per noise and repetition, so that their draws are independent."""
    return derive(key, Stream.CASES, _NOISE, noise_number(name), repetition)


def _stepped(config: EscapeConfig, name: str, num_examples: int) -> Callable[..., Any]:
    """A function ``(own, key, begin) -> (start, step)`` for one seed, with its loop's state."""
    law = _law(config, name, num_examples)
    value_and_grad = loss.weighted_value_and_grad(_problem.losses)
    b, rate = config.batch_size, config.learning_rate

    def of(own: Examples, key: Key[Array, ""], begin: Any) -> Any:
        def step(t: Array, state: tuple[Params, Params]) -> tuple[Params, Params]:
            params, deviations = state
            _, grads = value_and_grad(params, own, law.sample(key, t))
            if name in _shapes.ADDITIVE:
                # `t` is the same for all seeds, so only one branch is computed.
                deviations = jax.lax.cond(
                    (t % config.refresh_every == 0) | (t == begin),
                    lambda: _shapes.spread(name, params, own, b, deviations),
                    lambda: deviations,
                )
                grads = optax.tree.add(grads, _shapes.additive(name, key, t, deviations))
            return jax.tree.map(lambda p, g: p - rate * g, params, grads), deviations

        return step

    return of


def _advance(config: EscapeConfig, name: str) -> Callable[..., Params]:
    """A compiled function ``(params, examples, keys, begin, end) -> params`` for all seeds."""

    def one(params: Params, own: Examples, key: Any, begin: Array, end: Array) -> Params:
        step = _stepped(config, name, own["y"].shape[0])(own, _key(key, name, 0), begin)
        return jax.lax.fori_loop(begin, end, step, (params, optax.tree.zeros_like(params)))[0]

    return jax.jit(jax.vmap(one, in_axes=(0, 0, 0, None, None)))


def _rise(config: EscapeConfig, name: str) -> Callable[..., Float[Array, "seeds steps"]]:
    """A compiled function to the mean loss over the repetitions after 1, 2, ... steps."""
    count = config.repetitions if name != "gd" else 1

    def one(params: Params, own: Examples, key: Any) -> Float[Array, " steps"]:
        def repetition(number: Array) -> Float[Array, " steps"]:
            # Number 0 is the long run.
            step = _stepped(config, name, own["y"].shape[0])(own, _key(key, name, number), 0)

            def scanned(state: Any, t: Array) -> Any:
                state = step(t, state)
                return state, _problem.losses(state[0], own).mean()

            start = params, optax.tree.zeros_like(params)
            return jax.lax.scan(scanned, start, jnp.arange(config.short_steps))[1]

        return jax.lax.map(repetition, 1 + jnp.arange(count)).mean(0)

    return jax.jit(jax.vmap(one, in_axes=(0, 0, 0)))


def _measured(config: EscapeConfig) -> Callable[..., dict[str, Array]]:
    """A compiled function from ``(params, minimum, examples, keys, step)`` to all quantities."""

    def one(
        params: Params, minimum: Params, train: Examples, test: Examples, key: Any, step: Array
    ) -> dict[str, Any]:
        vector = loss.LossVector(_problem.losses, train)
        keys = jax.random.split(derive(key, Stream.CASES, _MEASURES, step), 2)
        top = measure.hessian_eigenvalues(
            vector, params, keys[0], num_steps=config.lanczos_steps
        ).values[0]
        trace = measure.hessian_trace(vector, params, keys[1], num_probes=config.probes).trace
        answers = jax.vmap(_problem.outputs, in_axes=(None, 0))(params, test["x"]).argmax(-1)
        return {
            "loss": vector.mean(params),
            "eigenvalue": top,
            "trace_h": trace.value,
            "distance": optax.tree.norm(optax.tree.sub(params, minimum)),
            "test_accuracy": (answers == test["y"]).mean(),
        }

    program = jax.vmap(one, in_axes=(0, 0, 0, 0, 0, None))
    return jax.jit(
        lambda params, minimum, examples, keys, step: program(
            params, minimum, examples["train"], examples["test"], keys, step
        )
    )


STUDY = Study(
    name="escape",
    names=("kind", "noise"),
    fields=frozenset({"seeds", "steps", "loss"}),
    plan=plan,
    make=make,
    rows=_escape_report.rows,
    table=_escape_report.table,
    draw=_escape_report.draw,
)
