"""Laws whose noise is correlated over steps."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from msgd_jax import _validate
from msgd_jax._values import bound
from msgd_jax.noise._algebra import check_independent, combined
from msgd_jax.noise._types import Exchangeable, MNoise, Weights, is_sparse


def coloured(law: MNoise, coefficients: Any) -> MNoise:
    """Noise that is correlated over steps: W_t = 1/N + sum over k of c_k V_(t-k).

    V_t = W'_t - 1/N is the noise of the draw W'_t of `law` for step t with the same key. The first
    steps also need draws for steps before the first; these have keys of their own, so that the
    noise is stationary from step 0 on. With ``rho(h) = sum_k c_k c_(k+h)``, exactly
    ``Cov(W_t, W_(t+h)) = rho(h) Cov(W')``; summed over all lags it is ``(sum c)^2 Cov(W')``.

    * ``(1, -1)`` is the noise of Anti-PGD (Orvieto et al. 2022, arXiv:2202.02831): its sum over
      any number of steps stays bounded.
    * ``sqrt(1 - r^2) r^k`` for k = 0 ... M is an autoregressive noise, as momentum makes it.
    * If the squares of the coefficients add up to 1, a step is as noisy as a step of `law`.

    Each step draws M + 1 vectors, where M + 1 is the number of coefficients. If the coefficients
    add up to 1 and `law` is sparse, a step computes M + 1 times as many losses; otherwise it
    computes all N.

    Args:
        law: any law of independent steps.
        coefficients: c_0, c_1, ..., finite numbers, at least one.

    Raises:
        TypeError: if `law` is not a law or a coefficient is not a number.
        ValueError: if there is no coefficient, one is not finite, or the steps of `law` are not
            independent.

    Example:
        >>> from msgd_jax import noise
        >>> law = noise.coloured(noise.cov(100, batch_size=10), (1.0, -1.0))
        >>> one = noise.cov(100, 10).covariance.diagonal
        >>> [round(law.covariance_between(3, t).diagonal / one, 6) + 0.0 for t in (3, 4, 5)]
        [2.0, -1.0, 0.0]
    """
    _validate.instance("law", law, MNoise, "noise.MNoise")
    check_independent(law)
    c = _numbers("coefficients", coefficients)
    n = law.num_examples
    rest = 1 - math.fsum(c)  # the part of the mean 1/N that is added on all examples
    sparse = is_sparse(law) and abs(rest) < 1e-12 * math.fsum(map(abs, c))
    size = len(c) * law.support_size if sparse else n
    rest = None if sparse else rest
    moments = None if law.moments is None else _autocovariance(c, 0) * law.moments
    between = None if law.moments is None else bound(_coloured_between, law.moments, c)
    return MNoise(
        f"coloured({law.name}, {_brief(c)})",
        n,
        size,
        moments,
        bound(_coloured_draw, law, c, rest),
        bound(_coloured_draw_at, law, c, rest),
        between,
    )


# Draws --------------------------------------------------------------------------------------------


def _coloured_draw(
    law: MNoise, coefficients: tuple[float, ...], rest: float | None, key: Key[Array, ""]
) -> Weights:
    """A draw of one step, whose law is the same for every step."""
    return _coloured_draw_at(law, coefficients, rest, key, jnp.zeros((), jnp.int32))


def _coloured_draw_at(
    law: MNoise,
    coefficients: tuple[float, ...],
    rest: float | None,
    key: Key[Array, ""],
    step: Int[Array, ""],
) -> Weights:
    # As unsigned numbers, the steps before the first are 2^32 - 1 and downwards: all of them are
    # above the last step, 2^31 - 1, so that their keys are used for nothing else.
    now = step.astype(jnp.uint32)
    parts = [
        law.draw(jax.random.fold_in(key, now - jnp.uint32(lag))) for lag in range(len(coefficients))
    ]
    if rest is None:
        values = [c * part.values for c, part in zip(coefficients, parts, strict=True)]
        indices = [part.indices for part in parts if part.indices is not None]
        return Weights(jnp.concatenate(values), jnp.concatenate(indices), law.num_examples)
    return combined(parts, coefficients, rest)


# Covariances --------------------------------------------------------------------------------------


def _coloured_between(
    covariance: Exchangeable, coefficients: tuple[float, ...], step: int, other: int
) -> Exchangeable:
    return _autocovariance(coefficients, abs(step - other)) * covariance


def _autocovariance(coefficients: tuple[float, ...], lag: int) -> float:
    """``rho(h) = sum_k c_k c_(k+h)``."""
    return math.fsum(a * b for a, b in zip(coefficients, coefficients[lag:], strict=False))


# Checks -------------------------------------------------------------------------------------------


def _numbers(name: str, values: Any) -> tuple[float, ...]:
    sized = isinstance(values, Sequence | np.ndarray | jax.Array) and np.ndim(values) == 1
    if isinstance(values, str) or not sized or not len(values):
        raise ValueError(f"{name} must be at least one number, got {_validate.shown(values)}.")
    for position, value in enumerate(values):
        if isinstance(value, np.ndarray | jax.Array) and value.shape == ():
            value = value.item()
        if not math.isfinite(_validate.real(f"{name}[{position}]", value)):
            raise ValueError(f"{name}[{position}] must be finite, got {value}.")
    return tuple(float(value) for value in values)


def _brief(values: tuple[float, ...]) -> str:
    shown = ", ".join(f"{value:g}" for value in values[:4])
    return f"({shown}, ...)" if len(values) > 4 else f"({shown})"
