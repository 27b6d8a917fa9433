"""Whether gradient noise is Gaussian: its kurtosis, and a test with an exact level.

The functions take samples: projections of the noise on a few directions, from
`noise_projections` or from elsewhere.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Key

from msgd_jax import _dtypes, _validate
from msgd_jax import loss as loss_lib
from msgd_jax._estimate import Estimate
from msgd_jax._streams import Stream, derive
from msgd_jax._typing import Data, Gradients, Params, PositiveInt, Step
from msgd_jax.measure import _draws, _estimates, _norms
from msgd_jax.noise import MNoise

_HIGHEST = jax.lax.Precision.HIGHEST


class Projections(NamedTuple):
    """The noise of a law along J directions.

    Attributes:
        noise: the noise of K draws, ``u_j . (grad(L . W_k) - grad L)``, [K, J].
        slopes: the slopes of the N losses along the directions, ``u_j . g_i``, [J, N], which give
            the exact values.
    """

    noise: Float[Array, "K J"]
    slopes: Float[Array, "J N"]


def random_directions(
    params: Params, key: Key[Array, ""], num_directions: PositiveInt
) -> Gradients:
    """J orthonormal random directions, like the parameters with a leading axis of J.

    They cost memory for J vectors like the parameters, and no gradient.

    Raises:
        TypeError: if `params` are not floating point, or `key` is not a typed PRNG key.
        ValueError: if the number of directions is not from 1 to the number of parameters.
    """
    _validate.floating_params(params)
    _validate.prng_key("key", key)
    params = jax.tree.map(jnp.asarray, params)
    leaves, structure = jax.tree.flatten(params)
    sizes = [leaf.size for leaf in leaves]
    count = _validate.positive_int("num_directions", num_directions, maximum=sum(sizes))
    drawn = jax.vmap(lambda k: _norms.probe(key, k, params))(jnp.arange(count))
    dtype = _dtypes.accumulator(*(leaf.dtype for leaf in leaves))
    flat = [leaf.reshape(count, -1).astype(dtype) for leaf in jax.tree.leaves(drawn)]
    basis = jnp.linalg.qr(jnp.concatenate(flat, axis=1).T)[0].T
    parts = jnp.split(basis, np.cumsum(sizes)[:-1], axis=1)
    shaped = [
        part.reshape(count, *leaf.shape).astype(leaf.dtype)
        for part, leaf in zip(parts, leaves, strict=True)
    ]
    return structure.unflatten(shaped)


def noise_projections(
    losses: loss_lib.LossVector,
    params: Params,
    law: MNoise,
    key: Key[Array, ""],
    *,
    directions: Gradients,
    num_draws: PositiveInt,
    first_step: Step = 0,
) -> Projections:
    """The noise of K draws of a law along J directions, at the cost of J forward-mode passes.

    A projection of the noise is ``V . (G u)``, and G u does not depend on the draw. So after one
    forward-mode pass over the N examples per direction, a draw costs J N multiplications and no
    gradient: 10,000 draws cost hardly more than ten. Each eager call compiles a program.

    Args:
        losses: the loss vector.
        params: a pytree of floating-point arrays.
        law: a law for N examples with independent steps; it need not state a covariance.
        key: a typed PRNG key; draw k is ``law.sample(key, first_step + k)``.
        directions: like `params` with a leading axis of J, for example from `random_directions`;
            they must be chosen independently of the draws.
        num_draws: K, at least 2.
        first_step: the step of the first draw.

    Raises:
        TypeError: if `losses` is not a `loss.LossVector`, a parameter is not floating point, `law`
            is not a `noise.MNoise`, or `key` is not a typed PRNG key.
        ValueError: if `directions` are not like `params`, `law` is for another number of examples
            or has steps that depend on each other, `num_draws` is below 2, or, outside of
            `jax.jit`, a loss or a slope is not finite.
    """
    loss_lib.checked(losses, params)
    num_draws = _validate.positive_int("num_draws", num_draws, minimum=2)
    _draws.independent(law, losses.num_examples)
    _validate.prng_key("key", key)
    first = _validate.step(first_step, "first_step")
    slopes = slopes_along(losses, params, directions)
    noise = jax.jit(lambda: draws_along(slopes, law, key, first, num_draws))()
    return Projections(noise, slopes)


def slopes_along(
    losses: loss_lib.LossVector, params: Params, directions: Gradients
) -> Float[Array, "J N"]:
    """The slopes of all losses along J directions, by one forward-mode pass per direction."""
    _validate.leading_axis("directions", directions)
    one = jax.tree.map(lambda leaf: jnp.asarray(leaf)[0], directions)
    _validate.same_kind("directions", "params", jax.tree.map(jnp.asarray, params), one)

    def measured(params: Params, data: Data, directions: Gradients) -> Float[Array, "J N"]:
        own = losses.replace(data=data)
        return jax.lax.map(lambda u: own.slopes(params, u), directions)

    slopes = jax.jit(measured)(params, losses.data, directions)
    _estimates.check_finite(losses, params, slopes)
    return slopes


def draws_along(
    slopes: Float[Array, "J N"], law: MNoise, key: Key[Array, ""], first: Step, num_draws: int
) -> Float[Array, "K J"]:
    """The projected noise of K steps: the product of the weights of each draw with the slopes."""
    mean = slopes.mean(1)
    # With centred slopes, so that no large terms cancel in a sum of N terms.
    centred = (slopes - mean[:, None]).T

    def of_draw(step: Int[Array, ""]) -> Float[Array, " J"]:
        weights = law.sample(key, step)
        values = weights.values.astype(centred.dtype)
        rows = centred if weights.indices is None else centred[weights.indices]
        excess = values.sum() - 1
        return jnp.matmul(values, rows, precision=_HIGHEST) + excess * mean

    steps = first + jnp.arange(num_draws, dtype=jnp.int32)
    return jax.lax.map(of_draw, steps, batch_size=min(64, num_draws))


# Kurtosis -----------------------------------------------------------------------------------------


def excess_kurtosis(samples: Float[Array, " K"]) -> Estimate:
    """The excess kurtosis of K independent samples, 0 for a normal law, with its standard error.

    It is the fourth central moment divided by the squared variance, less 3, with its standard error
    to first order. It is at most K - 2 + 1/(K - 1), and its standard error means little if the
    eighth moment is infinite, so it cannot show an infinite kurtosis. It costs no gradient.

    Raises:
        ValueError: if there are fewer than 4 samples, or, outside of `jax.jit`, one is not finite.
    """
    size = _estimates.samples("samples", samples, 4)
    scaled = _dtypes.in_unit(samples)
    deviations = scaled - scaled.mean()
    # Equal samples deviate by rounding, and have no kurtosis.
    equal = jnp.abs(deviations).max() <= 8 * jnp.finfo(deviations.dtype).eps
    deviations = jnp.where(equal, jnp.nan, deviations)
    second = jnp.square(deviations).mean()
    unit = deviations / jnp.sqrt(second)
    fourth = (unit**4).mean()
    # The first-order effect of each sample on the ratio, including its effect on the mean.
    moved = unit**4 - fourth - 2 * fourth * (jnp.square(unit) - 1) - 4 * (unit**3).mean() * unit
    return _estimates.estimate(fourth - 3, moved.std(ddof=1) / math.sqrt(size), size - 1)


def independent_kurtosis(slopes: Float[Array, "*J N"], weight_kurtosis: float) -> Array:
    """The exact excess kurtosis of projected noise of independent weights.

    Args:
        slopes: a_i = u . g_i, [N] or [J, N].
        weight_kurtosis: the excess kurtosis of one weight: 0 for `noise.fisher`, -2 for
            `noise.rademacher`, (1 - 6 p (1 - p)) / (p (1 - p)) with p = b/N for `noise.bernoulli`.

    Returns:
        ``weight_kurtosis * sum a^4 / (sum a^2)^2``, a scalar or [J].
    """
    return weight_kurtosis * _concentration(slopes)


def student_t_kurtosis(slopes: Float[Array, "*J N"], degrees_of_freedom: float) -> Array:
    """The exact excess kurtosis of the projected noise of `noise.student_t`.

    It is infinite for up to 4 degrees of freedom.

    Args:
        slopes: a_i = u . g_i, [N] or [J, N].
        degrees_of_freedom: the degrees of freedom of the law.
    """
    if degrees_of_freedom <= 4:
        return jnp.full(slopes.shape[:-1], jnp.inf, slopes.dtype)
    return 6 / (degrees_of_freedom - 4) * _concentration(_centred(slopes))


def sgd_kurtosis(
    slopes: Float[Array, "*J N"], batch_size: PositiveInt, *, replace: bool = False
) -> Array:
    """The exact excess kurtosis of the projected noise of `noise.sgd`.

    With replacement it is (kappa - 3) / b, with kappa the kurtosis of the N slopes. Without, it
    follows from the fourth moment of the mean of b of N numbers.

    Args:
        slopes: a_i = u . g_i, [N] or [J, N].
        batch_size: b, between 1 and N.
        replace: whether the law draws with replacement.

    Raises:
        TypeError: if b is not an integer.
        ValueError: if b is not from 1 to N, or, without replacement, N is below 4, or b is N, so
            that there is no noise.
    """
    n = slopes.shape[-1]
    b = _validate.positive_int("batch_size", batch_size, maximum=None if replace else n - 1)
    centred = _dtypes.in_unit(_centred(slopes), axis=-1)
    second, fourth = jnp.square(centred).mean(-1), (centred**4).mean(-1)
    if replace:
        return (fourth / jnp.square(second) - 3) / b
    if n < 4:
        raise ValueError(f"slopes must be of at least 4 examples, got {n}.")
    factor = (n - b) / (b**3 * (n - 1) * (n - 2) * (n - 3))
    of_fourth = n**2 - 6 * b * n + n + 6 * b**2
    of_second = 3 * n * (n - b - 1) * (b - 1)
    variance = (n - b) / (n - 1) / b
    moment = factor * (of_fourth * fourth / jnp.square(second) + of_second)
    return moment / variance**2 - 3


def _centred(slopes: Float[Array, "*J N"]) -> Float[Array, "*J N"]:
    wide = _dtypes.wide(slopes)
    return wide - wide.mean(-1, keepdims=True)


def _concentration(slopes: Float[Array, "*J N"]) -> Array:
    scaled = _dtypes.in_unit(slopes, axis=-1)
    return (scaled**4).sum(-1) / jnp.square(jnp.square(scaled).sum(-1))


# A test -------------------------------------------------------------------------------------------


class GaussianityTest(NamedTuple):
    """Mardia's test of whether the noise is Gaussian.

    Attributes:
        kurtosis: Mardia's multivariate kurtosis b.
        expected: its mean for Gaussian noise, J (J + 2) (K - 1) / (K + 1), exact.
        p_value: the two-sided p-value. For Gaussian noise it is at most 0.05 with probability 0.05,
            exactly, if 40 divides M + 1 for M simulations.
    """

    kurtosis: Float[Array, ""]
    expected: float
    p_value: Float[Array, ""]


def mardia_kurtosis(samples: Float[Array, "K J"]) -> Float[Array, ""]:
    """The mean of the fourth powers of the samples' Mahalanobis distances from their mean.

    It is NaN if the samples do not span all J directions up to rounding, since there are no
    distances then.
    """
    deviations = samples - samples.mean(0)[None]
    # Distances come from an orthonormal basis of the columns, so that no covariance is inverted.
    # Columns are scaled to length 1, so that directions of little noise do not count as missing.
    lengths = jnp.linalg.norm(deviations, axis=0)
    columns = deviations / jnp.where(lengths > 0, lengths, 1)[None]
    basis, rest = jnp.linalg.qr(columns)
    missing = jnp.abs(jnp.diag(rest)).min() <= 100 * jnp.finfo(samples.dtype).eps
    kurtosis = jnp.square(samples.shape[0] * jnp.square(basis).sum(1)).mean()
    return jnp.where(missing, jnp.nan, kurtosis)


def gaussianity_test(
    samples: Float[Array, "K J"], key: Key[Array, ""], *, num_simulations: PositiveInt = 199
) -> GaussianityTest:
    """Tests whether K independent draws along J directions are Gaussian, with an exact level.

    It is one test for all directions, for any mean and covariance: Mardia's kurtosis does not
    change under affine maps, so for Gaussian noise its distribution depends on (J, K) only, and is
    simulated. (The usual normal approximation has a level of 2.9 % instead of 5 % at J = 3,
    K = 100.) Separate tests per direction would depend on each other. For several layers or steps,
    correct the p-values by Holm's rule.

    A test that does not reject proves nothing: the power against SGD of batch size 8 of 40 without
    replacement, whose excess kurtosis is -0.08, is 7 %. It costs no gradient.

    Args:
        samples: the draws, [K, J] with K > J + 1, for example `Projections.noise`; J must be at
            most the rank of the covariance.
        key: a typed PRNG key, for the simulations.
        num_simulations: M, at least 39.

    Raises:
        TypeError: if `key` is not a typed PRNG key, or `num_simulations` is not an integer.
        ValueError: if `samples` are not [K, J] with K > J + 1, or, outside of `jax.jit`, do not
            span all J directions, or `num_simulations` is below 39.
    """
    if samples.ndim != 2 or samples.shape[0] <= samples.shape[1] + 1:
        raise ValueError(
            f"samples must be K draws along J directions, [K, J] with K > J + 1, got shape "
            f"{samples.shape}."
        )
    m = _validate.positive_int("num_simulations", num_simulations, minimum=39)
    _validate.prng_key("key", key)
    k, j = samples.shape
    dtype = _dtypes.accumulator(samples.dtype)

    def simulated(number: Int[Array, ""]) -> Float[Array, ""]:
        own = derive(key, Stream.PROBES, number)
        return mardia_kurtosis(jax.random.normal(own, (k, j), dtype))

    null = jax.lax.map(simulated, jnp.arange(m))
    found = mardia_kurtosis(samples.astype(dtype))
    above, below = (null >= found).sum(), (null <= found).sum()
    p_value = jnp.minimum(1.0, 2 * (1 + jnp.minimum(above, below)) / (m + 1))
    if not isinstance(found, Tracer) and not np.isfinite(found):
        raise ValueError(
            f"samples must be finite and span all {j} directions: take at most as many directions "
            "as the covariance has rank."
        )
    p_value = jnp.where(jnp.isfinite(found), p_value, jnp.nan)
    return GaussianityTest(found, j * (j + 2) * (k - 1) / (k + 1), p_value)
