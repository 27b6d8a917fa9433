"""Laws whose means differ from 1/N: importance weights, balanced classes, a curriculum."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from msgd_jax import _validate
from msgd_jax._values import bound
from msgd_jax.noise._algebra import weights_at
from msgd_jax.noise._types import MNoise, Weights

Factors = Callable[[Int[Array, " support"], Int[Array, ""]], Float[Array, " support"]]


def reweighted(law: MNoise, factors: Any) -> MNoise:
    """Lets examples count more or less: W_i = r_i W'_i, W' a draw of `law`.

    The mean is r_i / N, so training minimises the weighted loss (1/N) sum_i r_i L_i. The law is
    sparse if `law` is. The weights are no longer exchangeable, so the law states no `covariance`,
    and functions that need one (in `covariance`, `sde` and `complexity`) refuse it. `train`, `loss`
    and `transform` take it like any other law.

    Args:
        law: the law that W' is drawn from.
        factors: r, an array of N finite numbers of at least 0 whose mean is 1. The array becomes
            part of compiled programs, so for millions of examples, or for factors that change
            during training, give a function instead. It maps indices of examples (int32, [support])
            and the step (int32, a scalar) to the factors of these examples, [support]; its results
            are not checked::

              seen = lambda indices, step: jnp.where(indices < 100 * (step + 1), r(indices), 0.0)

    Raises:
        TypeError: if `law` is not a law or `factors` neither an array of numbers nor a function.
        ValueError: if there are not N factors, a factor is below 0 or not finite, or their mean is
            not 1.

    Example:
        >>> from msgd_jax import noise
        >>> labels = np.array([0, 0, 0, 1])
        >>> balanced = noise.reweighted(noise.gd(4), 4 / (2 * np.bincount(labels)[labels]))
        >>> (6 * balanced.sample(jax.random.key(0), 0).values).tolist()
        [1.0, 1.0, 1.0, 3.0]
    """
    _validate.instance("law", law, MNoise, "noise.MNoise")
    if callable(factors):
        own: Any = factors
        name = getattr(factors, "__name__", type(factors).__name__)
    else:
        own, name = _Table.of(factors, law.num_examples), "factors"
    return MNoise(
        f"reweighted({law.name}, {name})",
        law.num_examples,
        law.support_size,
        None,
        bound(_draw, law, own),
        bound(_draw_at, law, own),
    )


@dataclasses.dataclass(frozen=True)
class _Table:
    """N factors in an object that compares by value."""

    data: bytes  # float64

    @classmethod
    def of(cls, factors: Any, num_examples: int) -> "_Table":
        array = np.asarray(factors)
        if array.dtype.kind not in "fiu":
            raise TypeError(
                "factors must be an array of numbers or a function of (indices, step), got "
                f"{_validate.shown(factors)}."
            )
        if array.shape != (num_examples,):
            raise ValueError(f"factors must have shape ({num_examples},), got {array.shape}.")
        array = array.astype(np.float64)
        bad = ~(np.isfinite(array) & (array >= 0))
        if bad.any():
            first = int(bad.argmax())
            raise ValueError(
                f"factors must be finite and at least 0, got {array[first]} at example {first}."
            )
        if abs(array.mean() - 1) > 1e-5:
            raise ValueError(
                f"factors must have mean 1, got {array.mean():g}: divide them by their mean."
            )
        return cls(array.tobytes())

    def __call__(
        self, indices: Int[Array, " support"], step: Int[Array, ""]
    ) -> Float[Array, " support"]:
        del step
        table = jnp.asarray(np.frombuffer(self.data, np.float64).astype(np.float32))
        return table[indices]


def _draw(law: MNoise, factors: Factors, key: Key[Array, ""]) -> Weights:
    return _times(law.draw(key), factors, jnp.zeros((), jnp.int32))


def _draw_at(law: MNoise, factors: Factors, key: Key[Array, ""], step: Int[Array, ""]) -> Weights:
    return _times(weights_at(law, key, step), factors, step)


def _times(weights: Weights, factors: Factors, step: Int[Array, ""]) -> Weights:
    n, indices = weights.num_examples, weights.indices
    members = jnp.arange(n, dtype=jnp.int32) if indices is None else indices.astype(jnp.int32)
    values = jax.lax.optimization_barrier(weights.values)
    return Weights(values * factors(members, step).astype(values.dtype), indices, n)
