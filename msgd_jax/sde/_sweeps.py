"""What strong and weak error share: checked arguments, keys, and paths in passes."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from msgd_jax import _validate
from msgd_jax.sde import _brownian, _dynamics


class Problem(NamedTuple):
    """One SDE with its iteration: what stays the same along a sweep over learning rates."""

    loss_vector_fn: Any
    params: Any
    data: Any
    eigenvalues: tuple[float, float]
    substeps: int
    order: int
    microbatch_size: int | None

    @classmethod
    def of(
        cls,
        loss_vector_fn: Any,
        params: Any,
        data: Any,
        noise: Any,
        substeps: Any,
        order: Any,
        microbatch_size: Any,
    ) -> "Problem":
        """Checks the arguments; raises TypeError or ValueError."""
        size = _dynamics.check_problem(loss_vector_fn, params, data, microbatch_size, wide=True)
        _dynamics.check_order(order)
        return cls(
            loss_vector_fn,
            jax.tree.map(jnp.asarray, params),
            data,
            _dynamics.eigenvalues(noise, size),
            _brownian.check_substeps(substeps),
            order,
            microbatch_size,
        )


def whole_steps(
    learning_rates: Sequence[float], horizon: float
) -> tuple[Float[np.ndarray, " E"], list[int]]:
    """The learning rates, and how many iterations of each make up the horizon.

    Raises:
        TypeError, ValueError: if one is not positive, or not a whole fraction of the horizon.
    """
    _validate.positive_scalar("horizon", horizon)
    rates = [_positive("learning_rates", rate) for rate in learning_rates]
    if not rates:
        raise ValueError("learning_rates must hold at least one, got none.")
    steps = [round(horizon / rate) for rate in rates]
    for rate, count in zip(rates, steps, strict=True):
        if count < 1 or not math.isclose(count * rate, horizon, rel_tol=1e-6):
            raise ValueError(
                f"learning_rates must divide horizon = {horizon} into whole iterations, "
                f"got {rate}, which makes {horizon / rate:g}."
            )
    return np.array(rates), steps


def over_paths(
    one_path: Callable[[Key[Array, ""]], Any],
    key: Key[Array, ""],
    num_paths: int,
    paths_per_pass: int | None,
) -> Any:
    """`one_path` of `num_paths` keys; results have a leading axis [num_paths]."""
    keys = jax.random.split(key, num_paths)
    if paths_per_pass is None or paths_per_pass >= num_paths:
        return jax.vmap(one_path)(keys)
    return jax.lax.map(one_path, keys, batch_size=paths_per_pass)


def check_paths(num_paths: Any, paths_per_pass: Any, name: str = "num_paths") -> None:
    """Raises unless there are two paths or more."""
    _validate.positive_int(name, num_paths, minimum=2)
    if paths_per_pass is not None:
        _validate.positive_int("paths_per_pass", paths_per_pass)


def check_finite(left_at: Int[Array, " paths"], learning_rate: float, what: str) -> None:
    """Raises ValueError if a path left the finite numbers; `left_at` is when, or -1."""
    left = np.asarray(left_at)
    left = left[left >= 0]
    if left.size:
        raise ValueError(
            f"learning_rates: at {learning_rate:g}, {left.size} of {left_at.size} paths of {what} "
            f"left the finite numbers, the first in iteration {left.min()}; choose smaller ones."
        )


def _positive(name: str, value: Any) -> float:
    _validate.positive_scalar(name, value)
    return float(value)
