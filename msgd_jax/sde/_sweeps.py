"""Code that strong and weak error share: checks of arguments, keys, and paths in passes."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Key

from msgd_jax import _validate
from msgd_jax._typing import PyTree, Scalar
from msgd_jax.sde import _schedules
from msgd_jax.sde._rules import Adam, Momentum, RMSprop

MIN_PATHS = 4  # with fewer, the 95 % intervals of an order cover less than 92 %


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The learning rates, the time and the paths of `strong_error` and `weak_error`.

    Attributes:
        learning_rates: the values of eta, [E]; each divides `horizon` into whole iterations.
        horizon: T, the time at which iteration and SDE are compared, above 0.
        num_paths: the number of paths per eta (and per side), at least 4.
        at_once: the number of paths that run at the same time; None for all.
        schedule: the change of the rate over time: iteration k has the rate ``eta schedule(t)`` at
            the time t = k eta (and so covers that much time of the SDE). Optax schedules are such
            functions if their steps are read as time: ``optax.cosine_decay_schedule(1.0,
            horizon)``. None for 1.
        rule: None for plain M-SGD; a `Momentum`, whose iterations take the time sqrt(eta); an
            `Adam` or an `RMSprop`, whose iterations take the time eta^2. An adaptive rule has the
            law's own noise at its own learning rate, which is a number; at another eta it is
            ``rule.scaled(ratio)`` with ``ratio = (eta/rule.learning_rate)^2``, and the covariance
            of the law is divided by `ratio`, so that all of them have the same SDE.

    Raises:
        TypeError: if `learning_rates` is not a sequence of numbers, another number has the wrong
            type, or `rule` is not one of these.
        ValueError: if there are no learning rates, one is not positive or its iterations do not
            divide the horizon, there are fewer than 4 paths, the schedule is negative or not finite
            at one of its times, which the error names, or a number of the rule would be negative at
            a learning rate.
    """

    learning_rates: Sequence[float]
    horizon: float
    num_paths: int
    at_once: int | None = None
    schedule: Callable[[Any], Any] | None = None
    rule: Momentum | Adam | RMSprop | None = None

    def __post_init__(self) -> None:
        _validate.positive_scalar("horizon", self.horizon)
        if isinstance(self.learning_rates, str) or not np.iterable(self.learning_rates):
            raise TypeError(
                "learning_rates must be a sequence of numbers, such as [0.1, 0.05], got "
                f"{_validate.shown(self.learning_rates)}."
            )
        object.__setattr__(self, "learning_rates", tuple(map(_positive, self.learning_rates)))
        if not self.learning_rates:
            raise ValueError("learning_rates must hold at least one, got none.")
        if not isinstance(self.rule, Momentum | Adam | RMSprop | None):
            raise TypeError(
                "rule must be an sde.Momentum, an sde.Adam, an sde.RMSprop or None, got "
                f"{_validate.shown(self.rule)}."
            )
        for rate, count in zip(self.learning_rates, self.num_steps, strict=True):
            unit = self._time(rate)
            if count < 1 or not math.isclose(count * unit, self.horizon, rel_tol=1e-6):
                raise ValueError(
                    f"learning_rates must divide horizon = {self.horizon} into whole iterations, "
                    f"got {rate}, which makes {self.horizon / unit:g}."
                )
            self.numbers(rate)
        _validate.positive_int("num_paths", self.num_paths, minimum=MIN_PATHS)
        _validate.optional_positive_int("at_once", self.at_once)
        for rate, count in zip(self.learning_rates, self.num_steps, strict=True):
            if self.schedule is not None:
                _schedules.check_shape(self.schedule, self._time(rate) * np.arange(count))

    @property
    def num_steps(self) -> tuple[int, ...]:
        """The number of iterations in the horizon, one per learning rate."""
        return tuple(round(self.horizon / self._time(rate)) for rate in self.learning_rates)

    def _time(self, rate: float) -> float:
        """The time of one iteration at the learning rate eta."""
        return rate if self.rule is None else self.rule.time(rate)

    def numbers(self, rate: float) -> dict[str, float]:
        """The numbers of the rule at the learning rate eta, and the time of one iteration."""
        own = {} if self.rule is None else self.rule.at(rate)
        return own | {"time": self._time(rate)}

    @property
    def rates(self) -> Float[np.ndarray, " E"]:
        """The learning rates as an array."""
        return np.array(self.learning_rates)

    def rate_at(self, rate: Scalar, time: Scalar, dtype: jnp.dtype) -> _schedules.RateAt:
        """The learning rate of each iteration, for one of the learning rates and its time."""
        schedule = self.schedule
        if schedule is None:
            return _schedules.rate_at(rate, dtype)
        eta, unit = jnp.asarray(rate, dtype), jnp.asarray(time, dtype)
        return _schedules.rate_at(lambda step: eta * schedule(step * unit), dtype)

    def over_paths(
        self, one_path: Callable[[Key[Array, ""]], PyTree], key: Key[Array, ""]
    ) -> PyTree:
        """`one_path` for one key per path; results have a leading axis [num_paths]."""
        return over_paths(one_path, key, self.num_paths, self.at_once)


def over_paths(
    one_path: Callable[[Key[Array, ""]], PyTree],
    key: Key[Array, ""],
    num_paths: int,
    at_once: int | None,
) -> PyTree:
    """`one_path` for one key per path, in passes; results have a leading axis [num_paths]."""
    keys = jax.random.split(key, num_paths)
    if at_once is None or at_once >= num_paths:
        return jax.vmap(one_path)(keys)
    return jax.lax.map(one_path, keys, batch_size=at_once)


def checked(sweep: Sweep) -> Sweep:
    """Returns `sweep` if it is a `Sweep`; else raises TypeError."""
    if not isinstance(sweep, Sweep):
        raise TypeError(f"sweep must be an sde.Sweep, got {_validate.shown(sweep)}.")
    return sweep


def check_rule(rule: Any, scheme: Any, iterate: Any = None) -> None:
    """Raises ValueError if the scheme or the iterate cannot be used with the rule of a sweep."""
    if rule is not None and scheme.order != 1:
        raise ValueError(f"scheme must be of order 1 with a rule, got order {scheme.order}.")
    if isinstance(rule, Adam | RMSprop) and iterate is not None:
        raise ValueError(
            "iterate must be None with an adaptive rule, whose noise changes with the learning "
            f"rate, got {_validate.shown(iterate)}."
        )


def check_finite(left_at: Int[Array, " paths"], learning_rate: float, what: str) -> None:
    """Raises ValueError if a path became infinite or NaN in the iteration `left_at` (-1: never)."""
    left = np.asarray(left_at)
    left = left[left >= 0]
    if left.size:
        raise ValueError(
            f"learning_rates: at {learning_rate:g}, {left.size} of {left_at.size} paths of {what} "
            f"left the finite numbers, the first in iteration {left.min()} (counted from 1); "
            "choose smaller ones."
        )


def check_values(values: ArrayLike, learning_rate: float, what: str) -> Float[np.ndarray, " paths"]:
    """The values in float64; raises ValueError if one is not finite although its path is."""
    values = np.asarray(values, np.float64)
    wrong = int((~np.isfinite(values)).sum())
    if wrong:
        raise ValueError(
            f"learning_rates: at {learning_rate:g}, all paths are finite, but {what} is not for "
            f"{wrong} of {values.size}: it overflows the type of the parameters. Choose smaller "
            "ones, or float64 parameters."
        )
    return values


def left_at(
    before: Int[Array, ""], step: Int[Array, ""], finite: Bool[Array, ""]
) -> Int[Array, ""]:
    """The iteration in which a path became infinite or NaN, counted from 1, or -1."""
    return jnp.where((before < 0) & ~finite, jnp.asarray(step, jnp.int32) + 1, before)


def mean_and_spread(values: Float[np.ndarray, " paths"]) -> tuple[float, float]:
    """The mean and its standard error, also where squares would overflow or vanish."""
    scale = float(np.abs(values).max()) or 1.0
    values = values / scale
    return scale * values.mean(), scale * values.std(ddof=1) / math.sqrt(values.size)


def _positive(rate: float) -> float:
    _validate.positive_scalar("learning_rates", rate)
    return float(rate)
