"""Learning rates that change from step to step: optax schedules, and functions of time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from msgd_jax import _validate

RateAt = Callable[[Int[Array, ""]], Float[Array, ""]]
"""The learning rate of a step, counted from 0."""

_CHUNK = 2**16  # the number of steps whose rates are checked at a time


def rate_at(learning_rate: optax.ScalarOrSchedule, dtype: jnp.dtype) -> RateAt:
    """The learning rate as a function of the step, in `dtype`; constant if it is a number."""

    def rate(step: Int[Array, ""]) -> Float[Array, ""]:
        value = learning_rate(step) if callable(learning_rate) else learning_rate
        return jnp.asarray(value, dtype)

    return rate


def check(learning_rate: Any, first: Any, end: Any) -> None:
    """Raises unless a learning rate is a number above 0, or a schedule that is >= 0 and finite.

    A schedule is evaluated and checked at the steps from `first` to `end` - 1 only. It may be 0:
    then nothing moves. Traced values are not checked.
    """
    if not callable(learning_rate):
        _validate.positive_scalar("learning_rate", learning_rate)
        return
    if isinstance(first, Tracer) or isinstance(end, Tracer):
        return
    for low in range(int(first), int(end), _CHUNK):
        steps = np.arange(low, min(low + _CHUNK, int(end)), dtype=np.int32)
        if not _check_values("learning_rate", learning_rate, steps, "step"):
            return


def check_shape(schedule: Any, times: Float[np.ndarray, " steps"]) -> None:
    """Raises TypeError or ValueError unless `schedule` is finite and at least 0 at these times."""
    _validate.function("schedule", schedule)
    _check_values("schedule", schedule, times, "time")


def _check_values(name: str, function: Any, at: np.ndarray, called: str) -> bool:
    """Whether no value is traced; raises an error that names the first value that is not a rate."""
    # Evaluated at compile time, so that values are known also while a program is traced.
    with jax.ensure_compile_time_eval():
        values = jax.vmap(function)(jnp.asarray(at))
    if isinstance(values, Tracer):
        return False
    values = np.asarray(values)
    real = jnp.issubdtype(values.dtype, jnp.floating) or jnp.issubdtype(values.dtype, jnp.integer)
    if values.shape != at.shape or not real:
        raise ValueError(
            f"{name}({called}) must return a real number, got {values.dtype}"
            f"{list(values.shape[1:])}."
        )
    wrong = ~(np.isfinite(values) & (values >= 0))
    if wrong.any():
        first = int(wrong.argmax())
        raise ValueError(
            f"{name} must be finite and at least 0 at every {called} from {at[0]:g} to "
            f"{at[-1]:g}, got {values[first]:g} at {called} {at[first]:g}."
        )
    return True


def times(
    learning_rate: optax.ScalarOrSchedule, dtype: jnp.dtype, targets: Int[Array, " saved"]
) -> Float[Array, " saved"]:
    """The times of these iterations: the sums of the learning rates before them."""
    rate = rate_at(learning_rate, dtype)
    if not callable(learning_rate):
        return targets.astype(dtype) * rate(targets[0])

    def run_to(
        carry: tuple[Int[Array, ""], Float[Array, ""]], target: Int[Array, ""]
    ) -> tuple[tuple[Int[Array, ""], Float[Array, ""]], Float[Array, ""]]:
        step, time = carry
        time = jax.lax.fori_loop(step, target, lambda k, total: total + rate(k), time)
        return (target, time), time

    start = jnp.zeros((), targets.dtype), jnp.zeros((), dtype)
    return jax.lax.scan(run_to, start, targets)[1]
