"""A heavy-tailed law with the covariance of SGD, whose weights have Student's t distribution."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt32

from msgd_jax import _validate
from msgd_jax._values import bound
from msgd_jax.noise import _building_blocks
from msgd_jax.noise._types import MNoise, Weights


def student_t(
    num_examples: int,
    batch_size: float | int,
    *,
    degrees_of_freedom: float | int,
    dtype: Any = jnp.float32,
) -> MNoise:
    """Heavy-tailed noise with SGD's covariance: ``W = 1/N + s (t_i - mean t)``, t_i Student's t.

    With ``s^2 = (nu-2)/(nu b N)`` the moments are exactly those of `cov`: the gradient noise has
    covariance S/b, like SGD with replacement. The fewer degrees of freedom nu, the heavier the
    tails: the moments ``E|W_i|^k`` with k < nu are finite. As nu grows, the law tends to that of
    `cov`.

    It is the tool to ask whether the tails of single steps matter at an equal covariance: compare
    it with `cov`. It is not a tool for SDEs driven by Lévy processes: its variance is finite, so
    sums of many small steps are Gaussian in the limit, and its SDE is that of `cov`. What heavy
    tails change are single large steps at a finite learning rate, such as exits in one jump.

    The t_i are drawn by Bailey's method, the formula of Box and Muller with the radius of a
    bivariate t distribution (Bailey 1994, Polar Generation of Random Variates with the
    t-Distribution, Mathematics of Computation 62). The uniform numbers in it are at least 2^-65.
    The tail beyond is missing, and with it the share (nu/2) 2^(-65 (1 - 2/nu)) of the variance:
    5e-7 at nu = 3, 2e-4 at nu = 2.5, 12 % at nu = 2.1.

    Args:
        num_examples: N, at least 1; with N = 1 there is nothing to vary and W = 1.
        batch_size: b, the batch size of the SGD whose covariance the noise has: in (0, 10^12 N],
            which may be fractional or above N.
        degrees_of_freedom: nu, finite and above 2, so that the variance is finite.
        dtype: of the weights, float32 or float64.

    Raises:
        TypeError: if `num_examples` is not an integer, or `batch_size` or `degrees_of_freedom` is
            not a number.
        ValueError: if one of them is out of its range, or `dtype` is neither float32 nor float64.
    """
    n, b = _building_blocks.scale(num_examples, batch_size)
    dtype = _validate.wide_float_dtype("dtype", dtype)
    nu = _degrees_of_freedom(degrees_of_freedom)
    scale = math.sqrt((nu - 2) / (nu * b * n))

    covariance = _building_blocks.centred_covariance(n, (n - 1) / (b * n**2))
    name = f"student_t({n}, {b}, degrees_of_freedom={nu:g})"
    return MNoise(name, n, n, covariance, bound(_draw, n, nu, scale, dtype))


def _draw(n: int, nu: float, scale: float, dtype: jnp.dtype, key: Key[Array, ""]) -> Weights:
    t = _building_blocks.centre_symmetric(_variates(key, n, nu, dtype))
    return Weights(1 / n + scale * t, None, n)


def _variates(
    key: Key[Array, ""], size: int, nu: float, dtype: jnp.dtype
) -> Float[Array, " {size}"]:
    """Independent t-distributed numbers, the same bits in any program."""
    radius_key, angle_key = jax.random.split(key)
    words = jax.random.bits(radius_key, (2, size), jnp.uint32)
    # The radius R has P(R > r) = (1 + r^2/nu)^(-nu/2): solve for r with a uniform probability.
    radius = jnp.sqrt(nu * jnp.expm1(-2 / nu * jnp.log(_uniform(words, dtype))))
    angle = 2 * math.pi * jax.random.uniform(angle_key, (size,), dtype)
    return jax.lax.optimization_barrier(radius * jnp.cos(angle))


def _uniform(words: UInt32[Array, "2 size"], dtype: jnp.dtype) -> Float[Array, " size"]:
    """Uniform numbers between 2^-65 and 1; small ones have all bits of a float too."""
    high, low = words.astype(dtype)
    return (high + (low + 0.5) * 2.0**-32) * 2.0**-32


def _degrees_of_freedom(value: Any) -> float:
    _validate.real("degrees_of_freedom", value)
    if not math.isfinite(value) or value <= 2:
        raise ValueError(
            "degrees_of_freedom must be finite and above 2, so that the variance is finite, got "
            f"{value}."
        )
    return float(value)
