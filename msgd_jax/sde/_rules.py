"""Momentum, Adam and RMSprop as rules with numbers, and how their SDEs scale with the rate."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import optax
from jax.core import Tracer

from msgd_jax import _validate
from msgd_jax._typing import Scalar


@dataclasses.dataclass(frozen=True)
class Momentum:
    """Heavy balls that share an SDE, for a `Sweep`: at the rate eta, mu is 1 - q sqrt(eta).

    An iteration takes the time sqrt(eta), as in `underdamped`.

    Attributes:
        friction: q, above 0.

    Raises:
        TypeError: if `friction` is not a number.
        ValueError: if `friction` is not finite and above 0.
    """

    friction: float

    def __post_init__(self) -> None:
        _validate.real("friction", self.friction)
        _validate.positive_scalar("friction", self.friction)

    def time(self, learning_rate: float) -> float:
        """The time of one iteration."""
        return math.sqrt(learning_rate)

    def at(self, learning_rate: float) -> dict[str, float]:
        """The numbers at a learning rate; raises ValueError if mu would be negative."""
        momentum = 1 - self.friction * math.sqrt(learning_rate)
        if momentum < 0:
            raise ValueError(
                f"learning_rates must be at most 1/friction^2 = {self.friction**-2:g}, since the "
                f"momentum is 1 - friction sqrt(learning_rate), got {learning_rate:g}."
            )
        return {"momentum": momentum}


class _Scaled:
    """What `Adam` and `RMSprop` say of themselves to a `Sweep`."""

    learning_rate: optax.ScalarOrSchedule

    def time(self, learning_rate: float) -> float:
        """The time of one iteration."""
        return learning_rate**2

    def at(self, learning_rate: float) -> dict[str, float]:
        """The numbers at a learning rate, by `scaled`; `ratio` is that of the batch sizes."""
        ratio = (learning_rate / _validate.real("rule.learning_rate", self.learning_rate)) ** 2
        numbers = vars(self.scaled(ratio))  # type: ignore[attr-defined]
        return {"ratio": ratio} | {name: float(value) for name, value in numbers.items()}


@dataclasses.dataclass(frozen=True)
class Adam(_Scaled):
    """The numbers of `optax.adam`, as `adaptive` takes them.

    Attributes:
        learning_rate: eta, above 0, or an optax schedule that is finite and at least 0.
        b1: the decay of the mean of the gradients, in [0, 1).
        b2: the decay of the mean of their squares, in [0, 1).
        eps: the number that is added to the root of the squares, at least 0.

    Raises:
        TypeError: if a number has the wrong type.
        ValueError: if a number is out of its range.
    """

    learning_rate: optax.ScalarOrSchedule
    b1: Scalar = 0.9
    b2: Scalar = 0.999
    eps: Scalar = 1e-8

    def __post_init__(self) -> None:
        _check_rate(self.learning_rate)
        check_decay("b1", self.b1)
        check_decay("b2", self.b2)
        _validate.nonnegative_scalar("eps", self.eps)

    @property
    def decays(self) -> tuple[Scalar, Scalar, bool]:
        """The decays of the squares and of the mean, and whether their bias is corrected."""
        return self.b2, self.b1, True

    def optimizer(self) -> optax.GradientTransformation:
        """The same rule in optax."""
        return optax.adam(self.learning_rate, self.b1, self.b2, self.eps)

    def scaled(self, ratio: float | int) -> "Adam":
        """The rule for batches `ratio` times as large: the square root scaling rule.

        Malladi, Lyu, Panigrahi and Arora (2022), arXiv:2205.10287: eta becomes ``sqrt(ratio) eta``,
        ``1 - b1`` and ``1 - b2`` become `ratio` times as large, and eps becomes
        ``eps/sqrt(ratio)``. An iteration then takes `ratio` times as much time, so train for
        ``num_steps/ratio`` steps: both rules have the same SDE. A schedule is stretched in step.

        With a ratio of 1/l this is SVAG for adaptive rules: train l times as many steps with the
        law ``noise.svag(law, l)``, whose covariance is l times as large. As l grows, the iteration
        approaches the SDE of the rule and the law that it started from.

        Args:
            ratio: the factor of the batch size, above 0, and small enough for decays of at least 0.

        Raises:
            TypeError: if `ratio` is not a number.
            ValueError: if `ratio` is not positive, or makes a decay negative.
        """
        return Adam(
            _scaled_rate(self.learning_rate, _check_ratio(ratio)),
            _scaled_decay("b1", self.b1, ratio),
            _scaled_decay("b2", self.b2, ratio),
            self.eps / math.sqrt(ratio),
        )


@dataclasses.dataclass(frozen=True)
class RMSprop(_Scaled):
    """The numbers of ``optax.rmsprop(..., eps_in_sqrt=False)``, as `adaptive` takes them.

    Attributes:
        learning_rate: eta, above 0, or an optax schedule that is finite and at least 0.
        decay: the decay of the mean of the squared gradients, in [0, 1).
        eps: the number that is added to the root of the squares, at least 0.
        initial_scale: the mean of the squares before the first step, at least 0.

    Raises:
        TypeError: if a number has the wrong type.
        ValueError: if a number is out of its range.
    """

    learning_rate: optax.ScalarOrSchedule
    decay: Scalar = 0.9
    eps: Scalar = 1e-8
    initial_scale: Scalar = 0.0

    def __post_init__(self) -> None:
        _check_rate(self.learning_rate)
        check_decay("decay", self.decay)
        _validate.nonnegative_scalar("eps", self.eps)
        _validate.nonnegative_scalar("initial_scale", self.initial_scale)

    @property
    def decays(self) -> tuple[Scalar, Scalar, bool]:
        """The decays of the squares and of the mean (it has none), and no bias is corrected."""
        return self.decay, 0.0, False

    def optimizer(self) -> optax.GradientTransformation:
        """The same rule in optax."""
        options = {"initial_scale": self.initial_scale, "eps_in_sqrt": False}
        return optax.rmsprop(self.learning_rate, self.decay, self.eps, **options)

    def scaled(self, ratio: float | int) -> "RMSprop":
        """The rule for batches `ratio` times as large, as `Adam.scaled`.

        The squares of the gradients' noise become ``1/ratio`` times as large, and so does
        `initial_scale`.

        Args:
            ratio: the factor of the batch size, above 0, and small enough for a decay of at least
                0.

        Raises:
            TypeError, ValueError: as `Adam.scaled`.
        """
        return RMSprop(
            _scaled_rate(self.learning_rate, _check_ratio(ratio)),
            _scaled_decay("decay", self.decay, ratio),
            self.eps / math.sqrt(ratio),
            self.initial_scale / ratio,
        )


def check_decay(name: str, value: Any) -> None:
    """Raises TypeError or ValueError unless `value` is a number in [0, 1), or traced."""
    _validate.nonnegative_scalar(name, value)
    if not isinstance(value, Tracer) and float(value) >= 1:
        raise ValueError(f"{name} must be at least 0 and below 1, got {value}.")


def _check_rate(learning_rate: Any) -> None:
    if not callable(learning_rate):
        _validate.positive_scalar("learning_rate", learning_rate)


def _check_ratio(ratio: Any) -> float:
    value = _validate.real("ratio", ratio)
    if not 0 < value < math.inf:
        raise ValueError(f"ratio must be finite and above 0, got {ratio}.")
    return value


def _scaled_rate(
    learning_rate: optax.ScalarOrSchedule, ratio: float | int
) -> optax.ScalarOrSchedule:
    root = math.sqrt(ratio)
    if not callable(learning_rate):
        return root * learning_rate
    schedule = learning_rate
    return lambda step: root * schedule(ratio * jnp.asarray(step))


def _scaled_decay(name: str, decay: Any, ratio: float | int) -> Scalar:
    scaled = 1 - ratio * (1 - decay)
    if not isinstance(scaled, Tracer) and scaled < 0:
        raise ValueError(
            f"ratio must be at most 1/(1 - {name}) = {1 / (1 - float(decay)):.6g}, since 1 - "
            f"{name} becomes ratio times as large, got {ratio:g}."
        )
    return scaled
