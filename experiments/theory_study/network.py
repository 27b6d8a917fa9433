"""Nets beside their SDE: is the path-wise order 1 of Theorem 3 seen, and is smoothness needed?

For each learning rate, M-SGD-Fisher goes beside the SDE with the same Brownian path, and beside the
same SDE with draws of its own, for which the order is 1/2 at best. Learning rates and keys are
arguments of the compiled functions, so a net is compiled once.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from experiments import terminal
from experiments._typing import Data, Law, Params
from experiments.studies.study import Study, rounded
from experiments.theory_study import _net, _network_report
from experiments.theory_study._network_config import NetworkConfig
from msgd_jax import loss, noise, sde
from msgd_jax._streams import Stream, derive

# The draws that a seed makes from its stream of cases.
_SHARED, _OWN = range(2)
# Measured on one core: of the gradient of one example, and of compiling a net.
_SECONDS, _COMPILING = 7e-6, 6.0


def plan(config: NetworkConfig) -> list[tuple[str, int]]:
    """The net and the seed of all paths."""
    return [(net, seed) for net in config.nets for seed in config.all_seeds]


def make(config: NetworkConfig, missing: list[tuple[str, int]]) -> Iterator[dict[str, Any]]:
    """The records of some paths, made one after the other."""
    seeds = sorted({seed for _, seed in missing})
    drawn = _net.images(seeds, config.num_train, config.data_dir)
    examples = dict(zip(seeds, drawn, strict=True))
    compiled: dict[str, Beside] = {}
    with terminal.Progress(len(missing) * gradients(config), "gradient") as progress:
        for net, seed in missing:
            if net not in compiled:
                progress.compiling(net)
                compiled[net] = beside(config, net)
            yield path(config, compiled[net], net, seed, examples[seed], progress.update)


def gradients(config: NetworkConfig) -> int:
    """The gradients of the whole loss that one path takes."""
    finer = sum(round(config.learning_rates[0] / rate) for rate in config.learning_rates)
    return config.iterations * finer * (config.substeps + 2)


def seconds(config: NetworkConfig, missing: Sequence[tuple[str, int]]) -> float:
    """About how long some paths take on one core."""
    nets = len({net for net, _ in missing})
    return nets * _COMPILING + len(missing) * gradients(config) * config.num_train * _SECONDS


class Beside(NamedTuple):
    """Compiled functions of one net; steps and learning rates are arguments.

    Attributes:
        walk: ``walk(params, examples, key, rate, first, last)`` goes along the SDE.
        train: the same for M-SGD-Fisher.
    """

    walk: Callable[..., Params]
    train: Callable[..., Params]


def beside(config: NetworkConfig, net: Any) -> Beside:
    """The functions of a net."""
    losses = _net.losses_of(net)
    fisher = noise.fisher(config.num_train, config.batch_size)

    @jax.jit
    def walk(
        params: Params, examples: Data, key: Key[Array, ""], rate: Array, first: Array, last: Array
    ) -> Params:
        return sde.euler_maruyama(
            loss.LossVector(losses, examples),
            params,
            fisher,
            learning_rate=rate,
            key=key,
            first_step=first,
            num_steps=last,
            scheme=sde.Scheme(config.substeps),
        ).last_params

    return Beside(walk, jax.jit(trainer(losses, fisher)))


def trainer(losses: loss.LossVectorFn, law: Law) -> Callable[..., Params]:
    """A function ``(params, examples, key, rate, first, last) -> params``: steps of M-SGD."""
    value_and_grad = loss.weighted_value_and_grad(losses)

    def train(
        params: Params, examples: Data, key: Key[Array, ""], rate: Array, first: Array, last: Array
    ) -> Params:
        def step(t: Array, params: Params) -> Params:
            _, grads = value_and_grad(params, examples, law.sample(key, t))
            return jax.tree.map(lambda p, g: p - rate * g, params, grads)

        return jax.lax.fori_loop(first, last, step, params)

    return train


def path(
    config: NetworkConfig,
    functions: Beside,
    net: str,
    seed: int,
    examples: Data,
    advanced: Callable[[int], None] = lambda passes: None,
) -> dict[str, Any]:
    """The distances of one seed, [learning rates][times]."""
    key = jax.random.key(seed)
    start = _net.initial(key)
    shared, own = (derive(key, Stream.CASES, which) for which in (_SHARED, _OWN))
    found: dict[str, list[Any]] = {name: [] for name in _network_report.DISTANCES}
    for rate in config.learning_rates:
        finer = round(config.learning_rates[0] / rate)
        between = finer * (config.iterations // config.points)
        exact, coupled, apart = start, start, start
        line: dict[str, list[float]] = {name: [] for name in found}
        for point in range(config.points):
            at = (jnp.float32(rate), point * between, (point + 1) * between)
            exact = functions.walk(exact, examples, shared, *at)
            coupled = functions.train(coupled, examples, shared, *at)
            apart = functions.train(apart, examples, own, *at)
            for name, first in (("shared", coupled), ("own", apart), ("displacement", start)):
                line[name].append(rounded(_distance(first, exact), 6))
            advanced(between * (config.substeps + 2))
        for name, values in line.items():
            found[name].append(values)
    return {"step": config.iterations, "net": net, "seed": seed, **found}


@jax.jit
def _distance(first: Params, second: Params) -> Float[Array, ""]:
    return jnp.asarray(optax.tree.norm(jax.tree.map(jnp.subtract, first, second)))


STUDY = Study(
    name="network",
    names=("net", "seed"),
    fields=frozenset(_network_report.DISTANCES),
    plan=plan,
    make=make,
    rows=_network_report.rows,
    table=_network_report.table,
    draw=_network_report.draw,
    command="theory-study",
    seconds=seconds,
)
