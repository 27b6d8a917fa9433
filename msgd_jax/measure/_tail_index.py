"""Estimators of tail indices, with their values for noise without heavy tails."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from msgd_jax import _dtypes, _validate
from msgd_jax._estimate import Estimate
from msgd_jax._typing import PositiveInt
from msgd_jax.measure import _estimates

_HIGHEST = jax.lax.Precision.HIGHEST


class TailIndex(NamedTuple):
    """A tail index, and the value of the estimator for noise without heavy tails.

    Attributes:
        estimate: the estimate of the index, with its standard error for independent samples.
        without_tails: the limit of the estimator for noise without heavy tails. An estimate near
            this value is no evidence of heavy tails, even if it is low.
    """

    estimate: Estimate
    without_tails: float


def hill_index(samples: Float[Array, " K"], *, num_top: PositiveInt) -> TailIndex:
    """Hill's estimator from the largest absolute values of K independent samples.

    It is finite for data without heavy tails too: for Gaussian noise it is 4.7 for the top 10 %,
    6.0 for the top 5 % and 9.0 for the top 1 %, and the result contains this value. A low index is
    a sign of heavy tails if it stays low as `num_top` decreases. Ties at the top (finite sums of
    few examples) make it infinite. Samples must be independent, unlike those of consecutive steps
    of reshuffling. It costs no gradient.

    Args:
        samples: the samples, [K].
        num_top: k, the number of the largest samples that are used, below K.

    Returns:
        The index, with the standard error index / sqrt(k), and its value for Gaussian samples.

    Raises:
        TypeError: if k is not an integer.
        ValueError: if k is not from 1 to K - 1, or, outside of `jax.jit`, a sample is not finite.
    """
    size = _estimates.samples("samples", samples, 2)
    top = _validate.positive_int("num_top", num_top, maximum=size - 1)
    ordered = jnp.sort(jnp.abs(samples))[::-1]
    mean = jnp.log(ordered[:top] / ordered[top]).mean()
    index = jnp.where(mean > 0, 1 / jnp.where(mean > 0, mean, 1), jnp.inf)
    missing = jnp.isnan(ordered).any()
    at_zero = jnp.where((ordered[top] == 0) & ~missing, 0.0, jnp.nan)
    index = jnp.where(jnp.isfinite(mean), index, at_zero)
    return TailIndex(
        _estimates.estimate(index, index / math.sqrt(top), positive=True),
        _hill_of_gaussian(top / size),
    )


def _hill_of_gaussian(share: float) -> float:
    """The limit of Hill's estimator for |N(0, 1)| with the top `share` of the samples."""
    from scipy.integrate import quad
    from scipy.special import erfc, erfcinv

    threshold = math.sqrt(2) * float(erfcinv(share))
    tail, _ = quad(lambda x: erfc(x / math.sqrt(2)) / x, threshold, math.inf, epsrel=1e-10)
    return share / tail


def block_index(samples: Float[Array, "K *J"], *, block_size: PositiveInt) -> TailIndex:
    """The block estimator of Mohammadi et al. 2015, which Simsekli et al. 2019 apply to SGD noise.

    With the sums Y of blocks of K1 samples, ``1 / alpha = (E ln|Y| - E ln|X|) / ln K1``, which is
    exact for alpha-stable noise. For noise of finite variance it tends to
    ``1/2 + (E ln|N(0, C)| - E ln|X|) / ln K1`` instead of 1/2. So without heavy tails the estimate
    is below 2 (or above), by an amount that decreases like 1 / ln K1. The result contains this
    value, for Gaussian block sums of the same covariance. (For SGD of batch size 1 on 40 examples,
    whose noise takes finitely many bounded values, it is 1.6.)

    The samples must be independent draws of the noise. The coordinates of one gradient are not such
    draws: a Gaussian whose coordinates have different scales looks heavy-tailed, and the result
    depends on the order of the parameters. It costs no gradient.

    Args:
        samples: numbers [K] or vectors [K, J] with mean 0; zeros are left out, as in the authors'
            code, and blocks whose sum is 0.
        block_size: K1, at least 2; samples that do not fill a block are left out.

    Returns:
        The index, with a standard error from the variance between blocks. It may be negative, and
        does not depend on the unit of the samples.

    Raises:
        TypeError: if K1 is not an integer.
        ValueError: if there are fewer than 2 blocks, K1 is below 2, or, outside of `jax.jit`, a
            sample is not finite.
    """
    size = _estimates.samples("samples", samples, 4)
    k1 = _validate.positive_int("block_size", block_size, minimum=2)
    blocks = size // k1
    if blocks < 2:
        raise ValueError(
            f"block_size must leave at least 2 blocks of {size} samples, got {block_size}."
        )
    vectors = _dtypes.in_unit(samples)[: blocks * k1].reshape(blocks, k1, -1)
    lengths, sums = _lengths(vectors), _lengths(vectors.sum(1))
    within, used = _mean_log(lengths), sums != 0
    inverse = (jnp.log(jnp.where(used, sums, 1)) - within) / math.log(k1)
    number = used.sum()
    mean = jnp.where(used, inverse, 0).sum() / number
    squares = jnp.where(used, jnp.square(inverse - mean), 0).sum()
    error = jnp.sqrt(squares / (number - 1) / number)
    # The standard error to first order in the error of 1 / alpha.
    found = _estimates.estimate(1 / mean, error / jnp.square(mean), number - 1)
    present = (lengths != 0).any(1)
    typical = jnp.where(present, within, 0).sum() / present.sum()
    limit = 0.5 + (_log_of_gaussian(vectors) - typical) / math.log(k1)
    return TailIndex(found, _estimates.estimate(1 / limit).value)


def _lengths(vectors: Float[Array, "*shape J"]) -> Array:
    return jnp.sqrt(jnp.square(vectors).sum(-1))


def _mean_log(lengths: Float[Array, "blocks K1"]) -> Float[Array, " blocks"]:
    """The mean logarithm per block of the lengths that are not 0."""
    counts = lengths != 0  # true of NaN, which must not be left out like 0
    logarithms = jnp.log(jnp.where(counts, lengths, 1))
    return logarithms.sum(1) / jnp.maximum(counts.sum(1), 1)


def _log_of_gaussian(vectors: Float[Array, "blocks K1 J"]) -> Float[Array, ""]:
    """E ln|N(0, C)| with C the second moments of the samples.

    ln q = int_0^inf (e^(-t) - e^(-t q)) dt / t, and E e^(-t q) of q = |N(0, C)|^2 is the product of
    (1 + 2 t lambda)^(-1/2) over the eigenvalues: a smooth integral in ln t.
    """
    flat = vectors.reshape(-1, vectors.shape[-1])
    # The products of samples have the same eigenvalues but for zeros, in a smaller matrix if J > K.
    rows = flat.T if flat.shape[1] <= flat.shape[0] else flat
    second = jnp.matmul(rows, rows.T, precision=_HIGHEST) / flat.shape[0]
    values = jnp.maximum(jnp.linalg.eigvalsh(second), 0)
    trace = values.sum()
    shares = values / trace
    log_t = jnp.linspace(-30.0, 60.0, 1801, dtype=flat.dtype)
    t = jnp.exp(log_t)
    transform = jnp.exp(-jnp.log1p(2 * t[:, None] * shares[None]).sum(1) / 2)
    integrand = jnp.exp(-t) - transform
    log_q = integrand.sum() * 0.05
    return (jnp.log(trace) + log_q) / 2
