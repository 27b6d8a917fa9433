"""The practical laws of section 5.3, whose Gaussian part is on a random subset of the examples."""

import math
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Key

from msgd_jax import _validate
from msgd_jax._values import bound
from msgd_jax.noise import _building_blocks
from msgd_jax.noise._types import MNoise, Weights


def estimated_fisher(
    num_examples: int, batch_size: float | int, *, estimate_size: int, dtype: Any = jnp.float32
) -> MNoise:
    """M-SGD-[Fisher-m]: the full gradient plus Fisher noise estimated from m examples (5.3).

    W = 1/N + eps_i/sqrt(bm) on a uniform subset T of m examples, 1/N elsewhere. Given T, the
    gradient noise has covariance F_T/b; over all T, the moments are exactly those of `fisher`.

    Args:
        num_examples: N, at least 1.
        batch_size: b, the batch size of the SGD whose scale the noise has: in (0, 10^12 N],
            which may be fractional or above N.
        estimate_size: m, the number of examples that the Fisher matrix is estimated from, between 1
            and N.
        dtype: of the weights, float32 or float64.

    Raises:
        TypeError: if `num_examples` or `estimate_size` is not an integer, or `batch_size` is not a
            number.
        ValueError: if one of them is out of its range, or `dtype` is neither float32 nor float64.
    """
    n, b = _building_blocks.scale(num_examples, batch_size)
    dtype = _validate.wide_float_dtype("dtype", dtype)
    m = _validate.positive_int("estimate_size", estimate_size, maximum=n)
    scale = 1 / math.sqrt(b * m)

    name = f"estimated_fisher({n}, {b}, estimate_size={m})"
    covariance = _building_blocks.normals_covariance(n, m, scale)
    return MNoise(name, n, n, covariance, bound(_draw_estimated, n, m, scale, False, dtype))


def estimated_cov(
    num_examples: int, batch_size: float | int, *, estimate_size: int, dtype: Any = jnp.float32
) -> MNoise:
    """M-SGD-[Cov-m]: the full gradient plus covariance noise estimated from m examples (5.3).

    ``W = 1/N + s (eps_i - mean_T eps)`` on a uniform subset T of m examples, 1/N elsewhere, with
    ``s^2 = (N-1)/(bN(m-1))``: Bessel's correction makes the moments exactly those of `cov`.

    Args:
        num_examples: N, at least 2.
        batch_size: b, the batch size of the SGD whose covariance the noise has: in (0, 10^12 N],
            which may be fractional or above N.
        estimate_size: m, the number of examples that the covariance is estimated from, between 2
            and N.
        dtype: of the weights, float32 or float64.

    Raises:
        TypeError: if `num_examples` or `estimate_size` is not an integer, or `batch_size` is not a
            number.
        ValueError: if one of them is out of its range, or `dtype` is neither float32 nor float64.
    """
    n, b = _building_blocks.scale(num_examples, batch_size, smallest=2)
    dtype = _validate.wide_float_dtype("dtype", dtype)
    m = _validate.positive_int("estimate_size", estimate_size, minimum=2, maximum=n)
    scale = math.sqrt((n - 1) / (b * n * (m - 1)))

    name = f"estimated_cov({n}, {b}, estimate_size={m})"
    covariance = _building_blocks.centred_normals_covariance(n, m, scale)
    return MNoise(name, n, n, covariance, bound(_draw_estimated, n, m, scale, True, dtype))


def _draw_estimated(
    n: int, m: int, scale: float, centred: bool, dtype: jnp.dtype, key: Key[Array, ""]
) -> Weights:
    """1/N + scale * eps on a subset of m examples, 1/N elsewhere."""
    subset, noise = _building_blocks.subset_and_normals(key, n, m, dtype)
    noise = _building_blocks.centre_normals(noise) if centred else noise
    return Weights(_building_blocks.scatter(scale * noise, subset, n) + 1 / n, None, n)


def sparse_fisher(
    num_examples: int,
    batch_size: int,
    *,
    support_size: int,
    matching: Literal["total", "gaussian"] = "total",
    dtype: Any = jnp.float32,
) -> MNoise:
    """[M-SGD-Fisher]-B: a mini-batch of B examples times Gaussian weights (section 5.3).

    ``W = (1 + s eps_i)/B`` on a uniform subset of B examples, 0 elsewhere: a large batch that is as
    noisy as a small one. The paper does not say how it scales the Gaussian part. There are two
    readings:

    * ``matching="total"``: the variances of W, including those of the subset draw, are those of
      `fisher`, 1/(bN). Then ``s^2 = B/b - 1 + B/N``; at B = b hardly any Gaussian noise is left.
    * ``matching="gaussian"``: the Gaussian part alone has the covariance of `fisher`, and the
      covariance of the subset draw adds to it. Then s^2 = B/b.

    Args:
        num_examples: N, at least 1.
        batch_size: b, the batch size of the SGD whose scale the noise has, between 1 and N.
        support_size: B, the number of examples that a step computes, between 1 (for "total",
          bN/(N+b)) and N.
        matching: "total" or "gaussian".
        dtype: of the weights, float32 or float64.

    Raises:
        TypeError: if `num_examples`, `batch_size` or `support_size` is not an integer.
        ValueError: if one of them is out of its range (the error names the smallest support),
            `matching` is unknown, or `dtype` is neither float32 nor float64.
    """
    n, b = _building_blocks.sizes(num_examples, batch_size)
    dtype = _validate.wide_float_dtype("dtype", dtype)
    size = _validate.positive_int("support_size", support_size, maximum=n)
    _validate.one_of("matching", matching, ("total", "gaussian"))
    if matching == "total":
        _check_support(size, minimum=-(-b * n // (n + b)))
        variance = size / b - 1 + size / n
    else:
        variance = size / b
    scale = math.sqrt(max(variance, 0.0))  # at the smallest support, rounding can go below 0

    covariance = _building_blocks.subset_covariance(n, size) + _building_blocks.normals_covariance(
        n, size, scale / size
    )
    name = f"sparse_fisher({n}, {b}, support_size={size}, matching={matching!r})"
    return MNoise(name, n, size, covariance, bound(_draw_sparse, n, size, scale, False, dtype))


def sparse_cov(
    num_examples: int,
    batch_size: int,
    *,
    support_size: int,
    matching: Literal["total", "gaussian"] = "total",
    dtype: Any = jnp.float32,
) -> MNoise:
    """[M-SGD-Cov]-B: a mini-batch of B examples times centred Gaussian weights (section 5.3).

    ``W = (1 + s (eps_i - mean_T eps))/B`` on a uniform subset T of B examples, 0 elsewhere; the
    weights of every draw add up to one.

    * ``matching="total"``: the moments, including those of the subset draw, are exactly those of
      `cov`. Then ``s^2 = B (B(N-1)/b - (N-B)) / (N(B-1))``.
    * ``matching="gaussian"``: the Gaussian part alone has the covariance of `cov`, and the
      covariance of the subset draw adds to it. Then ``s^2 = B^2 (N-1) / (bN(B-1))``.

    Args:
        num_examples: N, at least 2.
        batch_size: b, the batch size of the SGD whose covariance the noise has, between 1 and N.
        support_size: B, the number of examples that a step computes, between 2 (for "total" also at
          least bN/(N-1+b)) and N.
        matching: "total" or "gaussian".
        dtype: of the weights, float32 or float64.

    Raises:
        TypeError: if `num_examples`, `batch_size` or `support_size` is not an integer.
        ValueError: if one of them is out of its range (the error names the smallest support),
            `matching` is unknown, or `dtype` is neither float32 nor float64.
    """
    n, b = _building_blocks.sizes(num_examples, batch_size, smallest=2)
    dtype = _validate.wide_float_dtype("dtype", dtype)
    size = _validate.positive_int("support_size", support_size, minimum=2, maximum=n)
    _validate.one_of("matching", matching, ("total", "gaussian"))
    if matching == "total":
        _check_support(size, minimum=-(-b * n // (n - 1 + b)))
        variance = size * (size * (n - 1) / b - (n - size)) / (n * (size - 1))
    else:
        variance = size**2 * (n - 1) / (b * n * (size - 1))
    scale = math.sqrt(max(variance, 0.0))  # at the smallest support, rounding can go below 0

    covariance = _building_blocks.subset_covariance(
        n, size
    ) + _building_blocks.centred_normals_covariance(n, size, scale / size)
    name = f"sparse_cov({n}, {b}, support_size={size}, matching={matching!r})"
    return MNoise(name, n, size, covariance, bound(_draw_sparse, n, size, scale, True, dtype))


def _draw_sparse(
    n: int, size: int, scale: float, centred: bool, dtype: jnp.dtype, key: Key[Array, ""]
) -> Weights:
    """(1 + scale * eps)/B on a subset of B examples, 0 elsewhere."""
    subset, noise = _building_blocks.subset_and_normals(key, n, size, dtype)
    noise = _building_blocks.centre_normals(noise) if centred else noise
    return Weights((1 + scale * noise) / size, subset, n)


def _check_support(size: int, minimum: int) -> None:
    """Raises ValueError if the subset draw alone is noisier than the noise to be matched."""
    if size < minimum:
        raise ValueError(
            f"support_size must be at least {minimum} for matching='total', got {size}: drawing so "
            "few examples is already noisier than SGD of the given batch_size."
        )
