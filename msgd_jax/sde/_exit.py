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
from msgd_jax._typing import Data, Params, PositiveInt
from msgd_jax.noise import MNoise
from msgd_jax.sde import _dynamics, _euler_maruyama, _schedules, _sweeps
from msgd_jax.sde._dynamics import Equation, Scheme

Region = Callable[[Params], Bool[Array, ""]]
"""``inside(params)``: whether these parameters are in the region, a boolean scalar."""


@dataclasses.dataclass(frozen=True, eq=False)
class ExitTimes:
    """When paths left a region, and where. Paths that had not left by `limit` are censored.

    Attributes:
        times: the exit times, [paths], in the time of the SDE, the sum of the learning rates so
            far; `limit` for censored paths.
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


# The number of paths that are simulated at the same time.
_AT_ONCE = 1_000


def exit_time(
    losses: loss.LossVector,
    params: Params,
    law: Law,
    inside: Region,
    *,
    learning_rate: optax.ScalarOrSchedule,
    max_steps: PositiveInt,
    num_paths: PositiveInt,
    key: Key[Array, ""],
    scheme: Scheme | None = Scheme(),  # noqa: B008 (frozen)
) -> ExitTimes:
    """When, and where, paths from `params` first leave a region: a basin, a ball, a level set.

    The paths are those of the SDE, or with ``scheme=None`` those of M-SGD itself. **Exits are
    checked at the ends of substeps only** (for M-SGD, of iterations), and so they are late: to
    first order as if the barrier were farther away by ``0.5826 s sqrt(eta/substeps)``, where s^2 =
    eta n^T C n is the variance of the noise across the barrier (Broadie, Glasserman and Kou 1997).
    So compare M-SGD with the SDE with one substep, not with the continuous SDE.

    Each call compiles a program and frees it afterwards. 1,000 paths run at the same time; those
    that have left wait for the last one.

    Args:
        losses: the loss vector.
        params: the starting point of all paths: a pytree of float32 or float64 arrays.
        law: a `noise.MNoise` with independent steps, or a `noise.Exchangeable`; with
            ``scheme=None``, any `noise.MNoise`.
        inside: ``inside(params)`` returns a boolean scalar; it must be true at the start.
        learning_rate: eta, above 0, or a schedule, as in `euler_maruyama`.
        max_steps: the number of iterations after which a path that has not left is censored.
        num_paths: the number of paths, at least 2.
        key: a typed PRNG key.
        scheme: the number of substeps per iteration and the order of the SDE; None for M-SGD, with
            draws of the law.

    Returns:
        Exit times and points, and estimates of the mean exit time, on the host.

    Raises:
        TypeError: if `losses` is not a `loss.LossVector`, `params` are not float32 or float64,
            `law` is not a law, `inside` is not a function that returns a boolean scalar, `key` is
            not a typed PRNG key, `scheme` is not a `Scheme`, or a number has the wrong type.
        ValueError: if `inside` is false at the start, the law is for another number of examples or
            (with a scheme) its steps depend on each other, a number is out of its range, or a path
            becomes infinite or NaN.

    Example:
        >>> from msgd_jax import loss, noise, sde
        >>> fn = loss.per_example(lambda theta, x: theta**2 / 2 - x * theta)
        >>> losses = loss.LossVector(fn, jnp.asarray([-3.0, 3.0]))
        >>> exits = sde.exit_time(
        ...     losses, jnp.asarray(0.0), noise.cov(2, 1), lambda theta: jnp.abs(theta) < 0.5,
        ...     learning_rate=0.1, max_steps=1000, num_paths=100, key=jax.random.key(0),
        ... )
        >>> exits.censored, exits.points.shape
        (0, (100,))
    """
    equation = _check_sides(losses, params, law, scheme)
    max_steps = _validate.positive_int("max_steps", max_steps, _validate.MAX_STEP)
    num_paths = _validate.positive_int("num_paths", num_paths, minimum=2)
    _validate.prng_key("key", key)
    _schedules.check(learning_rate, 0, max_steps)
    params = jax.tree.map(jnp.asarray, params)
    _check_region(inside, params)

    # Compiled here, so that the program is freed after the call.
    @jax.jit
    def exits_of_all(params: Params, data: Data, key: Key[Array, ""]) -> _State:
        rate_at = _schedules.rate_at(learning_rate, _dynamics.wide_dtype(params))
        if equation is None:
            assert isinstance(law, MNoise)
            advance = _iteration(losses.replace(data=data), law, rate_at)
        else:
            advance = _sde(equation.with_data(data), rate_at)
        one_path = _one_path(advance, inside, params, max_steps)
        return _sweeps.over_paths(one_path, key, num_paths, _AT_ONCE)

    found = exits_of_all(params, losses.data, derive(key, Stream.PATHS))
    _check_finite(found)
    substeps = 1 if scheme is None else scheme.substeps
    times, limit = _times(found, learning_rate, substeps, max_steps)
    out = np.asarray(found.out)
    iterations = np.asarray(found.step)
    return ExitTimes(times, iterations, out, jax.tree.map(np.asarray, found.params), limit)


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


class _State(NamedTuple):
    """A path that stops where it leaves: after `step` iterations, at a substep of the last one."""

    params: Params
    step: Int[Array, "*paths"]
    substep: Int[Array, "*paths"]
    out: Bool[Array, "*paths"]


Substep = Callable[[Params, Any], Params]
"""Maps the parameters before a substep, and what drives it, to the parameters after it."""
Drive = Callable[[Key[Array, ""], Int[Array, ""]], tuple[Substep, Any]]
"""The substep function of an iteration, and what drives its substeps, [substeps, ...]."""


def _sde(equation: Equation, rate_at: _schedules.RateAt) -> Drive:
    root = equation.root

    def drive(key: Key[Array, ""], step: Int[Array, ""]) -> tuple[Substep, Any]:
        rate = rate_at(step)
        return (
            lambda params, increment: equation.substep(params, root(increment), rate),
            equation.increments(key, step),
        )

    return drive


def _iteration(losses: loss.LossVector, law: MNoise, rate_at: _schedules.RateAt) -> Drive:
    def drive(key: Key[Array, ""], step: Int[Array, ""]) -> tuple[Substep, Any]:
        rate = rate_at(step)

        def substep(params: Params, _: Any) -> Params:
            noisy_gradient = losses.gradient(params, law.sample(key, step))
            return _dynamics.step_along(params, noisy_gradient, -rate)

        return substep, jnp.zeros((1,))

    return drive


def _one_path(
    drive: Drive, inside: Region, start: Params, max_steps: int
) -> Callable[[Key[Array, ""]], _State]:
    """A function from a key to where and when its path left, or to its last point."""

    def one_path(key: Key[Array, ""]) -> _State:
        def iterate(state: _State) -> _State:
            substep, drives = drive(key, state.step)

            def advance(state: _State, driven: Any) -> tuple[_State, None]:
                moved = substep(state.params, driven)
                out = ~(inside(moved) & _euler_maruyama.all_finite(moved))
                new = _State(moved, state.step, state.substep + 1, out)
                return jax.tree.map(lambda a, b: jnp.where(state.out, a, b), state, new), None

            state = jax.lax.scan(advance, state._replace(substep=zero), drives)[0]
            return state._replace(step=state.step + 1)

        zero = jnp.asarray(0, jnp.int32)
        state = _State(start, zero, zero, jnp.asarray(False))
        return jax.lax.while_loop(lambda s: ~s.out & (s.step < max_steps), iterate, state)

    return one_path


def _times(
    found: _State, learning_rate: Any, substeps: int, max_steps: int
) -> tuple[Float[np.ndarray, " paths"], float]:
    """The exit times, and the time of the last iteration, in float64."""
    before = np.asarray(found.step) - 1
    part = np.asarray(found.substep) / substeps
    if callable(learning_rate):
        rates = np.asarray(jax.vmap(learning_rate)(jnp.arange(max_steps)), np.float64)
        ends = np.concatenate([[0.0], np.cumsum(rates)])
        return ends[before] + rates[before] * part, float(ends[-1])
    rate = float(learning_rate)
    return (before + part) * rate, max_steps * rate


def _check_finite(found: _State) -> None:
    """Raises ValueError if a path became infinite or NaN."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(found.params)]
    finite = np.logical_and.reduce(
        [np.isfinite(leaf).reshape(len(leaf), -1).all(1) for leaf in leaves]
    )
    if not finite.all():
        first = np.asarray(found.step)[~finite].min()
        raise ValueError(
            f"learning_rate: {(~finite).sum()} of {finite.size} paths left the finite numbers, the "
            f"first in iteration {first} (counted from 1); choose a smaller one."
        )
