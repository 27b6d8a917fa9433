"""First exits from a region, of the SDE and of the iteration."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from msgd_jax import _laws, _validate, loss
from msgd_jax._estimate import Estimate
from msgd_jax._laws import Law
from msgd_jax._streams import Stream, derive
from msgd_jax._typing import Data, Gradients, Params, Scalar
from msgd_jax.noise import MNoise
from msgd_jax.sde import (
    _dynamics,
    _euler_maruyama,
    _schedules,
    _stationary,
    _sweeps,
    _underdamped,
)
from msgd_jax.sde._dynamics import Equation, Scheme

Region = Callable[[Params], Bool[Array, ""]]
"""``inside(params)``: whether these parameters are in the region, a boolean scalar."""


@dataclasses.dataclass(frozen=True, eq=False)
class ExitTimes:
    """When paths left a region, and where. Paths that had not left by `limit` are censored.

    Attributes:
        times: the exit times, [paths], in the time of the SDE: the sum of the learning rates so
            far, or with momentum of their square roots; `limit` for censored paths.
        iterations: the iterations of the exits, counted from 1, [paths].
        exited: whether the path left, [paths].
        points: a pytree like the parameters with a leading axis [paths]: the first point outside,
            or the last point of a censored path.
        limit: the time at which paths were stopped.
    """

    times: Float[np.ndarray, " paths"]
    iterations: Int[np.ndarray, " paths"]
    exited: Bool[np.ndarray, " paths"]
    points: Params
    limit: float

    @property
    def censored(self) -> int:
        """The number of paths that had not left by `limit`."""
        return int((~self.exited).sum())

    @property
    def exited_fraction(self) -> float:
        """The fraction of paths that left."""
        return float(self.exited.mean())

    @property
    def exited_interval(self) -> tuple[float, float]:
        """The exact 95 % confidence interval (Clopper-Pearson) of the probability to leave."""
        from scipy.stats import binomtest  # imported here, since scipy.stats is slow to import

        interval = binomtest(int(self.exited.sum()), self.exited.size).proportion_ci()
        return float(interval.low), float(interval.high)

    @property
    def restricted_mean(self) -> Estimate:
        """E min(T, limit), the mean of `times`, without assumptions; E T if no path is censored."""
        mean, error = _sweeps.mean_and_spread(self.times)
        return Estimate(float(mean), float(error), self.times.size - 1, positive=True)

    @property
    def exponential_mean(self) -> Estimate:
        """E T if T is exponential: the total time of all paths, censored ones too, per exit.

        Exits over a high barrier are exponential, after the path has settled; others are not.

        Raises:
            ValueError: if no path left.
        """
        exits = int(self.exited.sum())
        if not exits:
            raise ValueError(
                f"No path left until {self.limit:g}, so there is no mean exit time: use "
                "exited_interval."
            )
        mean = float(self.times.sum()) / exits
        return Estimate(mean, mean / math.sqrt(exits), positive=True)


@dataclasses.dataclass(frozen=True)
class Trials:
    """The paths of `exit_time`.

    Attributes:
        num_paths: the number of paths, at least 2.
        max_steps: the number of iterations after which a path that has not left is censored.
        at_once: the number of paths that run at the same time; those that have left wait for the
            last one.

    Raises:
        TypeError: if one is not an integer.
        ValueError: if one is out of its range.
    """

    num_paths: int
    max_steps: int
    at_once: int = 1_000

    def __post_init__(self) -> None:
        _validate.positive_int("num_paths", self.num_paths, minimum=2)
        _validate.positive_int("max_steps", self.max_steps, _validate.MAX_STEP)
        _validate.positive_int("at_once", self.at_once)


def exit_time(
    losses: loss.LossVector,
    params: Params,
    law: Law,
    inside: Region,
    trials: Trials,
    *,
    learning_rate: optax.ScalarOrSchedule,
    momentum: Scalar | None = None,
    key: Key[Array, ""],
    scheme: Scheme | None = Scheme(),  # noqa: B008 (frozen)
) -> ExitTimes:
    """When, and where, paths from `params` first leave a region: a basin, a ball, a level set.

    The paths are those of the SDE, or with ``scheme=None`` those of M-SGD itself. **Exits are
    checked at the ends of substeps only** (for M-SGD, of iterations), and so they are late: to
    first order as if the barrier were farther away by ``0.5826 s sqrt(eta/substeps)``, where s^2 =
    eta n^T C n is the variance of the noise across the barrier (Broadie, Glasserman and Kou 1997).
    So compare M-SGD with the SDE with one substep, not with the continuous SDE.

    With momentum the paths are those of `underdamped`, at rest at the start, or of heavy-ball
    M-SGD. The region is one of parameters, whatever the velocity. A mass moves smoothly, so that
    its exits are found late by at most a substep, and not by the distance above.

    Each call compiles a program and frees it afterwards.

    Args:
        losses: the loss vector.
        params: the starting point of all paths: a pytree of float32 or float64 arrays.
        law: a `noise.MNoise` with independent steps, or a `noise.Exchangeable`; with
            ``scheme=None``, any `noise.MNoise`.
        inside: ``inside(params)`` returns a boolean scalar; it must be true at the start.
        trials: the number of paths, and the iterations after which they are stopped.
        learning_rate: eta, above 0, or a schedule, as in `euler_maruyama`.
        momentum: mu, in [0, 1); None for plain M-SGD and its SDE.
        key: a typed PRNG key.
        scheme: the number of substeps per iteration and the order of the SDE; None for M-SGD, with
            draws of the law.

    Returns:
        Exit times and points, and estimates of the mean exit time, on the host.

    Raises:
        TypeError: if `losses` is not a `loss.LossVector`, `params` are not float32 or float64,
            `law` is not a law, `inside` is not a function that returns a boolean scalar, `key` is
            not a typed PRNG key, `trials` is not a `Trials`, `scheme` is not a `Scheme`, or a
            number has the wrong type.
        ValueError: if `inside` is false at the start, the law is for another number of examples or
            (with a scheme) its steps depend on each other, a number is out of its range, the scheme
            is of order 2 with momentum, or a path becomes infinite or NaN.

    Example:
        >>> from msgd_jax import loss, noise, sde
        >>> fn = loss.per_example(lambda theta, x: theta**2 / 2 - x * theta)
        >>> losses = loss.LossVector(fn, jnp.asarray([-3.0, 3.0]))
        >>> exits = sde.exit_time(
        ...     losses, jnp.asarray(0.0), noise.cov(2, 1), lambda theta: jnp.abs(theta) < 0.5,
        ...     sde.Trials(num_paths=100, max_steps=1000), learning_rate=0.1,
        ...     key=jax.random.key(0),
        ... )
        >>> exits.censored, exits.points.shape
        (0, (100,))
    """
    equation = _check_sides(losses, params, law, scheme)
    if not isinstance(trials, Trials):
        raise TypeError(f"trials must be an sde.Trials, got {_validate.shown(trials)}.")
    if momentum is not None:
        _stationary.check_momentum(momentum)
        if scheme is not None and scheme.order != 1:
            raise ValueError(f"scheme must be of order 1 with momentum, got order {scheme.order}.")
    _validate.prng_key("key", key)
    _schedules.check(learning_rate, 0, trials.max_steps)
    params = jax.tree.map(jnp.asarray, params)
    _check_region(inside, params)

    # Compiled here, so that the program is freed after the call.
    @jax.jit
    def exits_of_all(params: Params, data: Data, key: Key[Array, ""]) -> _State:
        rate_at = _schedules.rate_at(learning_rate, _dynamics.wide_dtype(params))
        mu = None if momentum is None else jnp.asarray(momentum, _dynamics.wide_dtype(params))
        if equation is None:
            assert isinstance(law, MNoise)
            advance = _iteration(losses.replace(data=data), law, rate_at, mu)
        else:
            advance = _sde(equation.with_data(data), rate_at, mu)
        start = params, () if mu is None else optax.tree.zeros_like(params)
        one_path = _one_path(advance, inside, start, trials.max_steps)
        return _sweeps.over_paths(one_path, key, trials.num_paths, trials.at_once)

    found = exits_of_all(params, losses.data, derive(key, Stream.PATHS))
    _check_finite(found)
    substeps = 1 if scheme is None else scheme.substeps
    power = 1.0 if momentum is None else 0.5
    times, limit = _times(found, learning_rate, power, substeps, trials.max_steps)
    out = np.asarray(found.out)
    iterations = np.asarray(found.step)
    return ExitTimes(times, iterations, out, jax.tree.map(np.asarray, found.at[0]), limit)


def _check_sides(losses: Any, params: Params, law: Any, scheme: Scheme | None) -> Equation | None:
    """The SDE, or None for M-SGD; raises TypeError or ValueError if an argument does not fit."""
    if scheme is not None:
        return Equation.of(losses, params, law, scheme)
    loss.checked(losses, params, wide=True)
    _laws.drawable("law", law)
    _laws.of_size("law", law, losses.num_examples)
    return None


def _check_region(inside: Any, params: Params) -> None:
    """Raises TypeError or ValueError unless `inside` is a predicate that is true at the start."""
    _validate.function("inside", inside)
    kind = jax.eval_shape(inside, params)
    if getattr(kind, "dtype", None) != jnp.bool_ or kind.shape:
        raise ValueError(
            "inside must return a boolean scalar, which says whether params are in the region, got "
            f"{_validate.shown(kind)}."
        )
    if not bool(inside(params)):
        raise ValueError("inside must hold at params, where all paths start, got False there.")


_Point = tuple[Params, Gradients]
"""The parameters and their momentum, which is () without one."""


class _State(NamedTuple):
    """A path that stops where it leaves: after `step` iterations, at a substep of the last one."""

    at: _Point
    step: Int[Array, "*paths"]
    substep: Int[Array, "*paths"]
    out: Bool[Array, "*paths"]


Substep = Callable[[_Point, Any], _Point]
"""Maps the point before a substep, and what drives it, to the point after it."""
Drive = Callable[[Key[Array, ""], Int[Array, ""]], tuple[Substep, Any]]
"""The substep function of an iteration, and what drives its substeps, [substeps, ...]."""


def _sde(equation: Equation, rate_at: _schedules.RateAt, mu: Float[Array, ""] | None) -> Drive:
    root = equation.root

    def drive(key: Key[Array, ""], step: Int[Array, ""]) -> tuple[Substep, Any]:
        rate = rate_at(step)

        def substep(at: _Point, increment: Float[Array, " N"]) -> _Point:
            if mu is None:
                return equation.substep(at[0], root(increment), rate), at[1]
            return _underdamped.momentum_substep(equation, at, root(increment), rate, mu)

        return substep, equation.increments(key, step)

    return drive


def _iteration(
    losses: loss.LossVector,
    law: MNoise,
    rate_at: _schedules.RateAt,
    mu: Float[Array, ""] | None,
) -> Drive:
    def drive(key: Key[Array, ""], step: Int[Array, ""]) -> tuple[Substep, Any]:
        rate = rate_at(step)

        def substep(at: _Point, _: Any) -> _Point:
            params, trace = at
            direction = losses.gradient(params, law.sample(key, step))
            if mu is not None:
                direction = trace = _dynamics.step_along(direction, trace, mu)
            return _dynamics.step_along(params, direction, -rate), trace

        return substep, jnp.zeros((1,))

    return drive


def _one_path(
    drive: Drive, inside: Region, start: _Point, max_steps: int
) -> Callable[[Key[Array, ""]], _State]:
    """A function from a key to where and when its path left, or to its last point."""

    def one_path(key: Key[Array, ""]) -> _State:
        def iterate(state: _State) -> _State:
            substep, drives = drive(key, state.step)

            def advance(state: _State, driven: Any) -> tuple[_State, None]:
                moved = substep(state.at, driven)
                out = ~(inside(moved[0]) & _euler_maruyama.all_finite(moved))
                new = _State(moved, state.step, state.substep + 1, out)
                return jax.tree.map(lambda a, b: jnp.where(state.out, a, b), state, new), None

            state = jax.lax.scan(advance, state._replace(substep=zero), drives)[0]
            return state._replace(step=state.step + 1)

        zero = jnp.asarray(0, jnp.int32)
        state = _State(start, zero, zero, jnp.asarray(False))
        return jax.lax.while_loop(lambda s: ~s.out & (s.step < max_steps), iterate, state)

    return one_path


def _times(
    found: _State, learning_rate: Any, power: float, substeps: int, max_steps: int
) -> tuple[Float[np.ndarray, " paths"], float]:
    """The exit times, and the time of the last iteration, in float64."""
    before = np.asarray(found.step) - 1
    part = np.asarray(found.substep) / substeps
    if callable(learning_rate):
        rates = np.asarray(jax.vmap(learning_rate)(jnp.arange(max_steps)), np.float64) ** power
        ends = np.concatenate([[0.0], np.cumsum(rates)])
        return ends[before] + rates[before] * part, float(ends[-1])
    rate = float(learning_rate) ** power
    return (before + part) * rate, max_steps * rate


def _check_finite(found: _State) -> None:
    """Raises ValueError if a path became infinite or NaN."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(found.at)]
    finite = np.logical_and.reduce(
        [np.isfinite(leaf).reshape(len(leaf), -1).all(1) for leaf in leaves]
    )
    if not finite.all():
        first = np.asarray(found.step)[~finite].min()
        raise ValueError(
            f"learning_rate: {(~finite).sum()} of {finite.size} paths left the finite numbers, the "
            f"first in iteration {first} (counted from 1); choose a smaller one."
        )
