"""The laws of sections 2 to 5.2: gradient descent, SGD, and independent or centred weights."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from msgd_jax import _validate
from msgd_jax._streams import signs
from msgd_jax._values import bound
from msgd_jax.noise import _building_blocks
from msgd_jax.noise._types import Exchangeable, MNoise, Weights


def gd(num_examples: int, *, dtype: Any = jnp.float32) -> MNoise:
    """Gradient descent: W = 1/N, no noise at all.

    Args:
        num_examples: N, at least 1.
        dtype: of the weights, float32 or float64.

    Raises:
        TypeError: if `num_examples` is not an integer.
        ValueError: if `num_examples` is below 1, or `dtype` is neither float32 nor float64.
    """
    n = _validate.num_examples("num_examples", num_examples)
    dtype = _validate.wide_float_dtype("dtype", dtype)

    return MNoise(f"gd({n})", n, n, Exchangeable(0.0, 0.0), bound(_draw_gd, n, dtype))


def _draw_gd(n: int, dtype: jnp.dtype, key: Key[Array, ""]) -> Weights:
    del key
    return Weights(jnp.full(n, 1 / n, dtype), None, n)


def sgd(
    num_examples: int, batch_size: int, *, replace: bool = False, dtype: Any = jnp.float32
) -> MNoise:
    """Mini-batch SGD: weight 1/b on each of b examples drawn uniformly (Proposition 1).

    Without replacement the covariance has diagonal ``(N-b)/(bN^2)`` (Eq. 5); with replacement
    ``(N-1)/(bN^2)`` (Eq. 4). Both are centred: the weights of every draw add up to one.

    Args:
        num_examples: N, at least 1.
        batch_size: b, between 1 and N.
        replace: whether an example can be drawn more than once.
        dtype: of the weights, float32 or float64.

    Raises:
        TypeError: if `num_examples` or `batch_size` is not an integer.
        ValueError: if one of them is out of its range, or `dtype` is neither float32 nor float64.

    Example:
        >>> from msgd_jax import noise
        >>> law = noise.sgd(1000, batch_size=50)
        >>> weights = law.sample(jax.random.key(0), step=0)
        >>> weights.indices.shape, round(float(weights.values[0]), 6)
        ((50,), 0.02)
        >>> law.covariance.diagonal, law.support_size
        (1.9e-05, 50)
    """
    n, b = _building_blocks.sizes(num_examples, batch_size)
    dtype = _validate.wide_float_dtype("dtype", dtype)

    covariance = (
        _building_blocks.centred_covariance(n, (n - 1) / (b * n**2))
        if replace
        else _building_blocks.subset_covariance(n, b)
    )
    name = f"sgd({n}, {b}, replace={replace})"
    return MNoise(name, n, b, covariance, bound(_draw_sgd, n, b, replace, dtype))


def _draw_sgd(n: int, b: int, replace: bool, dtype: jnp.dtype, key: Key[Array, ""]) -> Weights:
    # The dtype is given, since jax's default, and with it the draw, depends on the x64 flag.
    if replace:
        indices = jax.random.randint(key, (b,), 0, n, jnp.int32)
    else:
        indices = _building_blocks.subset(key, n, b)
    return Weights(jnp.full(b, 1 / b, dtype), indices, n)


def fisher(num_examples: int, batch_size: float | int, *, dtype: Any = jnp.float32) -> MNoise:
    """M-SGD-Fisher: W = 1/N + eps/sqrt(bN), eps standard normal (Eq. 17).

    The gradient noise is Gaussian with covariance F/b, F the empirical Fisher matrix.

    Args:
        num_examples: N, at least 1.
        batch_size: b, the batch size of the SGD whose scale the noise has: in (0, 10^12 N],
            which may be fractional or above N.
        dtype: of the weights, float32 or float64.

    Raises:
        TypeError: if `num_examples` is not an integer, or `batch_size` is not a number.
        ValueError: if one of them is out of its range, or `dtype` is neither float32 nor float64.
    """
    n, b = _building_blocks.scale(num_examples, batch_size)
    dtype = _validate.wide_float_dtype("dtype", dtype)

    covariance = Exchangeable(1 / (b * n), 0.0)
    return MNoise(f"fisher({n}, {b})", n, n, covariance, bound(_draw_fisher, n, b, dtype))


def _draw_fisher(n: int, b: float | int, dtype: jnp.dtype, key: Key[Array, ""]) -> Weights:
    noise = _building_blocks.normals(key, n, dtype)
    return Weights(1 / n + noise / math.sqrt(b * n), None, n)


def cov(num_examples: int, batch_size: float | int, *, dtype: Any = jnp.float32) -> MNoise:
    """M-SGD-Cov: W = 1/N + (eps - mean eps)/sqrt(bN), eps standard normal (Eq. 16).

    The gradient noise is Gaussian with covariance S/b, exactly that of SGD with replacement.

    Args:
        num_examples: N, at least 1; with N = 1 there is nothing to vary and W = 1.
        batch_size: b, the batch size of the SGD whose covariance the noise has: in (0, 10^12 N],
            which may be fractional or above N.
        dtype: of the weights, float32 or float64.

    Raises:
        TypeError: if `num_examples` is not an integer, or `batch_size` is not a number.
        ValueError: if one of them is out of its range, or `dtype` is neither float32 nor float64.

    Example:
        >>> from msgd_jax import noise
        >>> weights = noise.cov(1000, batch_size=50).sample(jax.random.key(0), step=0)
        >>> weights.values.shape, weights.indices is None  # all examples, in order
        ((1000,), True)
        >>> noise.cov(1000, 50).covariance == noise.sgd(1000, 50, replace=True).covariance
        True
    """
    n, b = _building_blocks.scale(num_examples, batch_size)
    dtype = _validate.wide_float_dtype("dtype", dtype)

    covariance = _building_blocks.centred_covariance(n, (n - 1) / (b * n**2))
    return MNoise(f"cov({n}, {b})", n, n, covariance, bound(_draw_cov, n, b, dtype))


def _draw_cov(n: int, b: float | int, dtype: jnp.dtype, key: Key[Array, ""]) -> Weights:
    noise = _building_blocks.centre_normals(_building_blocks.normals(key, n, dtype))
    return Weights(1 / n + noise / math.sqrt(b * n), None, n)


def bernoulli(num_examples: int, batch_size: int, *, dtype: Any = jnp.float32) -> MNoise:
    """M-SGD-Bernoulli: each example independently has weight 1/b with probability b/N, else 0.

    The diagonal of the covariance, ``(N-b)/(bN^2)``, is that of SGD without replacement. (The
    values printed in section 5.2 of the paper, 1/N + 1/b and 1/N, have mean 2/N.) The number of
    non-zero weights is random with mean b, so all N losses are computed.

    Args:
        num_examples: N, at least 1.
        batch_size: b, the expected number of non-zero weights, between 1 and N.
        dtype: of the weights, float32 or float64.

    Raises:
        TypeError: if `num_examples` or `batch_size` is not an integer.
        ValueError: if one of them is out of its range, or `dtype` is neither float32 nor float64.
    """
    n, b = _building_blocks.sizes(num_examples, batch_size)
    dtype = _validate.wide_float_dtype("dtype", dtype)

    covariance = Exchangeable((n - b) / (b * n**2), 0.0)
    return MNoise(f"bernoulli({n}, {b})", n, n, covariance, bound(_draw_bernoulli, n, b, dtype))


def _draw_bernoulli(n: int, b: int, dtype: jnp.dtype, key: Key[Array, ""]) -> Weights:
    # mode="high", because a 23-bit uniform would misstate probabilities b/N below about 1e-5. The
    # dtype of the probability is given, since jax's default depends on the x64 flag.
    probability = jnp.asarray(b / n, jnp.float32)
    chosen = jax.random.bernoulli(key, probability, (n,), mode="high")
    return Weights(chosen.astype(dtype) / b, None, n)


def rademacher(num_examples: int, scale: float, *, dtype: Any = jnp.float32) -> MNoise:
    """GD-Rademacher: W = 1/N + scale a/N, a_i = +-1 with equal probability.

    This is gradient descent on the loss plus `scale` times the empirical Rademacher regulariser
    without its supremum and absolute value, as in Figure 1 (a) and (d). `matching_scale` gives the
    scale at which the weights have the variances of another law.

    Args:
        num_examples: N, at least 1.
        scale: the factor of the regulariser, finite and at least 0.
        dtype: of the weights, float32 or float64.

    Raises:
        TypeError: if `num_examples` is not an integer, or `scale` is not a number.
        ValueError: if one of them is out of its range, or `dtype` is neither float32 nor float64.
    """
    n = _validate.num_examples("num_examples", num_examples)
    dtype = _validate.wide_float_dtype("dtype", dtype)
    scale = _validate.finite_nonnegative("scale", scale)

    covariance = Exchangeable((scale / n) ** 2, 0.0)
    draw = bound(_draw_rademacher, n, scale, dtype)
    return MNoise(f"rademacher({n}, {scale:g})", n, n, covariance, draw)


def _draw_rademacher(n: int, scale: float, dtype: jnp.dtype, key: Key[Array, ""]) -> Weights:
    return Weights(1 / n + scale / n * signs(key, n, dtype), None, n)


def matching_scale(target: MNoise) -> float:
    """The scale at which `rademacher` has the variances Var(W_i) of `target`.

    It is N sqrt(Var(W_i)): sqrt(N/b) for `fisher`, sqrt((N-1)/b) for `cov`, sqrt((N-b)/b) for
    `sgd` without replacement.

    Raises:
        ValueError: if `target` states no `covariance`.
    """
    return target.num_examples * math.sqrt(target.covariance.diagonal)
