"""What strong and weak error share: checked arguments, keys, and paths in passes."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from msgd_jax import _validate
from msgd_jax.sde import _brownian, _dynamics

MIN_PATHS = 4  # with fewer, the 95 % intervals of an order cover less than 92 %


class Problem(NamedTuple):
    """One SDE with its iteration: what stays the same along a sweep over learning rates."""

    loss_vector_fn: Any
    params: Any
    data: Any
    eigenvalues: tuple[float, float]
    substeps: int
    order: int
    microbatch_size: int | None
    path_dtype: Any

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
        eigenvalues = _dynamics.eigenvalues(noise, size)
        params = jax.tree.map(jnp.asarray, params)
        return cls(
            loss_vector_fn, params, data, eigenvalues, _brownian.check_substeps(substeps), order,
            microbatch_size, _brownian.path_dtype(noise, _dynamics.wide_dtype(params)),
        )  # fmt: skip

    @property
    def num_examples(self) -> int:
        """N."""
        return _validate.leading_axis("data", self.data)

    def field(self, data: Any) -> _dynamics.Field:
        """Its weighted gradients, of `data` that may be traced."""
        return _dynamics.Field.of(self.loss_vector_fn, self.params, data, self.microbatch_size)

    def root(self, dtype: Any) -> _dynamics.Root:
        """The root of the covariance."""
        return _dynamics.Root.cast(self.eigenvalues, dtype)

    def increments(self, key: Key[Array, ""], step: Any, dtype: Any) -> Float[Array, "substeps N"]:
        """Of the Brownian path over one iteration: drawn in the type of the law."""
        return _brownian.brownian_increments(
            key, step, self.num_examples, substeps=self.substeps, dtype=self.path_dtype
        ).astype(dtype)


def whole_steps(
    learning_rates: Sequence[float], horizon: float
) -> tuple[Float[np.ndarray, " E"], list[int]]:
    """The learning rates, and how many iterations of each make up the horizon.

    Raises:
        TypeError, ValueError: if one is not positive, or not a whole fraction of the horizon.
    """
    _validate.positive_scalar("horizon", horizon)
    if isinstance(learning_rates, str) or not np.iterable(learning_rates):
        raise TypeError(
            "learning_rates must be a sequence of numbers, such as [0.1, 0.05], got "
            f"{_validate.shown(learning_rates)}."
        )
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


def check_paths(num_paths: Any, paths_per_pass: Any) -> None:
    """Raises unless there are enough paths for a standard error that can be relied on."""
    _validate.positive_int("num_paths", num_paths, minimum=MIN_PATHS)
    if paths_per_pass is not None:
        _validate.positive_int("paths_per_pass", paths_per_pass)


def check_finite(left_at: Int[Array, " paths"], learning_rate: float, what: str) -> None:
    """Raises ValueError if a path left the finite numbers; `left_at` is when, or -1."""
    left = np.asarray(left_at)
    left = left[left >= 0]
    if left.size:
        raise ValueError(
            f"learning_rates: at {learning_rate:g}, {left.size} of {left_at.size} paths of {what} "
            f"left the finite numbers, the first in iteration {left.min()} (counted from 1); "
            "choose smaller ones."
        )


def check_values(values: Any, learning_rate: float, what: str) -> Float[np.ndarray, " paths"]:
    """In float64; raises ValueError if what is measured of finite paths is not finite."""
    values = np.asarray(values, np.float64)
    wrong = int((~np.isfinite(values)).sum())
    if wrong:
        raise ValueError(
            f"learning_rates: at {learning_rate:g}, all paths are finite, but {what} is not for "
            f"{wrong} of {values.size}: it overflows the type of the parameters. Choose smaller "
            "ones, or float64 parameters."
        )
    return values


def left_at(before: Int[Array, ""], step: Any, finite: Bool[Array, ""]) -> Int[Array, ""]:
    """The iteration in which a path left the finite numbers, counted from 1, or -1."""
    return jnp.where((before < 0) & ~finite, jnp.asarray(step, jnp.int32) + 1, before)


def mean_and_spread(values: Float[np.ndarray, " paths"]) -> tuple[float, float]:
    """The mean and its standard error, also where squares would overflow or vanish."""
    scale = float(np.abs(values).max()) or 1.0
    values = values / scale
    return scale * values.mean(), scale * values.std(ddof=1) / math.sqrt(values.size)


def _positive(name: str, value: Any) -> float:
    _validate.positive_scalar(name, value)
    return float(value)
