"""The size of gradient noise: tr S, the squared mean gradient, and the simple noise scale."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Key

from msgd_jax import _dtypes, _validate
from msgd_jax import loss as loss_lib
from msgd_jax._estimate import Estimate
from msgd_jax._typing import (
    Data,
    Gradients,
    Params,
    PerExampleGradients,
    PositiveInt,
    PyTree,
    Scalar,
    Step,
)
from msgd_jax.measure import _draws, _estimates
from msgd_jax.noise import MNoise


class Scale(NamedTuple):
    """The size of the noise of one example's gradient, for all parameters or for one leaf.

    Attributes:
        trace: tr S, the variance of the gradient of one random example, summed over parameters.
        squared_gradient: the squared norm of the mean gradient. Unbiased estimates of it may be
            negative: average them before dividing.
        noise_scale: ``tr S / |grad L|^2``, the "simple" noise scale of McCandlish et al. 2018
            (arXiv:1812.06162), in examples. Infinite if the squared gradient is not above 0; 0 if
            tr S is 0.
        interval: the two ends of Fieller's 95 % interval of the noise scale. The upper end is
            infinite if the squared gradient cannot be told from 0.
    """

    trace: Estimate
    squared_gradient: Estimate
    noise_scale: Estimate
    interval: tuple[float, float]


class NoiseScale(NamedTuple):
    """The scale of gradient noise, in total and per leaf of the parameters.

    Attributes:
        total: the `Scale` for all parameters.
        leaves: a pytree like the parameters, with one `Scale` per leaf.
    """

    total: Scale
    leaves: PyTree


def noise_scale(
    losses: loss_lib.LossVector, params: Params, *, population: bool = False
) -> NoiseScale:
    """The exact noise scale from the gradients of all examples.

    S has the divisor N: it is the covariance of the gradient of one random example of the data.
    With `population`, the data are N independent examples of a population, whose numbers are
    estimated without bias, with standard errors to first order.

    It costs one forward and backward pass over the N examples, and N per-example gradients, of
    which one micro-batch is in memory at a time. Each eager call compiles a program: put the
    function under `jax.jit` to call it more than once.

    Args:
        losses: the loss vector.
        params: a pytree of floating-point arrays.
        population: whether the data are a sample of a population.

    Returns:
        The scale, in float32 or wider; without `population`, standard errors are 0.

    Raises:
        TypeError: if `losses` is not a `loss.LossVector`, or a parameter is not floating point.
        ValueError: outside of `jax.jit`, if a loss or a gradient is not finite (the error names the
            example) or squares of all of them underflow; or if there is only one example with
            `population`.

    Example:
        >>> from msgd_jax import loss, measure
        >>> fn = loss.per_example(lambda theta, x: (theta - x) ** 2 / 2)
        >>> losses = loss.LossVector(fn, jnp.asarray([0.0, 2.0]))
        >>> scale = measure.noise_scale(losses, jnp.asarray(3.0)).total  # gradients 3 and 1
        >>> scale.trace.value, scale.squared_gradient.value, scale.noise_scale.value
        (1.0, 4.0, 0.25)
    """
    loss_lib.checked(losses, params)
    n = losses.num_examples
    if population and n < 2:
        raise ValueError(f"losses must have at least 2 examples for population=True, got {n}.")

    def moments(params: Params, data: Data) -> _estimates.MeanPair:
        own = losses.replace(data=data)
        mean = jax.tree.map(_dtypes.wide, own.gradient(params))
        sums = own.sum_over_gradients(_deviations, params, mean)
        squared = _estimates.squared_norms(mean)
        trace, d2, dc, c2 = (value / n for value in sums)
        if not population:
            zero = jnp.zeros_like(trace)
            return _estimates.MeanPair(trace, squared, zero, zero, zero)
        # To first order, |g|^2 varies like the mean of 2 g . (g_i - g).
        return _estimates.MeanPair(
            trace * (n / (n - 1)),
            squared - trace / (n - 1),
            (d2 - trace**2) / n,
            dc / n,
            c2 / n,
        )

    pair = jax.jit(moments)(params, losses.data)
    _estimates.check_finite(losses, params, pair)
    _estimates.check_range(losses, params, pair)
    if not population:
        return assembled(params, pair, jnp.inf)
    if n == 2:  # both are equally far from their mean, whatever the variance is
        unknown = jnp.where(pair.trace > 0, jnp.inf, pair.var_trace)
        pair = pair._replace(var_trace=unknown)
    return assembled(params, pair, n - 1)


def noise_scale_from_draws(
    losses: loss_lib.LossVector,
    params: Params,
    law: MNoise,
    key: Key[Array, ""],
    *,
    num_draws: PositiveInt,
    first_step: Step = 0,
    draws_per_pass: PositiveInt = 1,
) -> NoiseScale:
    """The noise scale from K noisy gradients of any law that states its covariance.

    For each draw, ``|grad(L . W) - (1 . W) grad L|^2 / (alpha N)`` is an unbiased estimate of tr S.
    It only uses the weights across the all-ones vector, so laws that are not centred
    (`noise.fisher`, `noise.bernoulli`) work too. ``|grad L|^2`` is exact.

    The relative standard error for Gaussian laws is sqrt(2 / (K p)), with p the participation ratio
    of S (`ranks`). It costs one forward pass over the N examples and K + 1 backward passes, and
    memory for K + 1 gradients.

    Args:
        losses: the loss vector.
        params: a pytree of floating-point arrays.
        law: a law for N examples with independent steps, for example `noise.cov`.
        key: a typed PRNG key; draw k is ``law.sample(key, first_step + k)``.
        num_draws: K, at least 2.
        first_step: the step of the first draw.
        draws_per_pass: the number of draws whose backward passes run at once.

    Raises:
        TypeError: if `losses` is not a `loss.LossVector`, a parameter is not floating point, `law`
            is not a `noise.MNoise`, or `key` is not a typed PRNG key.
        ValueError: if the law is for another number of examples, has no noise (`noise.gd`), states
            no covariance, or has steps that depend on each other, `num_draws` is below 2, or,
            outside of `jax.jit`, a loss or a gradient is not finite or all squares underflow.
    """
    loss_lib.checked(losses, params)
    num_draws = _validate.positive_int("num_draws", num_draws, minimum=2)
    n = losses.num_examples
    of_s = _draws.moments_of(_draws.independent(law, n), n).of_s
    drawn = _draws.draw(
        losses,
        params,
        law,
        key,
        first_step=first_step,
        num_draws=num_draws,
        draws_per_pass=draws_per_pass,
    )
    pair = _pair_of_draws(drawn, of_s)
    _estimates.check_finite(losses, params, pair)
    _estimates.check_range(losses, params, pair)
    return assembled(params, pair, num_draws - 1, exact_gradient=True)


@jax.jit  # arrays only, so jax keeps one program per set of shapes, as for functions of jnp
def _pair_of_draws(drawn: _draws.Draws, of_s: Scalar) -> _estimates.MeanPair:
    """The trace of S with the variance of its mean, and ``|g|^2``, per leaf and in total."""
    leaves = jax.tree.leaves(drawn.centred())
    squares = _estimates.with_total([_estimates.of_rows(leaf) for leaf in leaves]) / of_s
    squared = _estimates.squared_norms(drawn.mean_gradient)
    zero = jnp.zeros_like(squared)
    variance = squares.var(0, ddof=1) / squares.shape[0]
    return _estimates.MeanPair(squares.mean(0), squared, variance, zero, zero)


class MicrobatchMoments(NamedTuple):
    """Unbiased estimates from the micro-batches of one step, per leaf and in total.

    Attributes:
        trace: estimates of tr S, [leaves + 1]: for each leaf, and last for all parameters.
        squared_gradient: estimates of ``|grad L|^2``, [leaves + 1]; they may be negative.
    """

    trace: Float[Array, "*steps parts"]
    squared_gradient: Float[Array, "*steps parts"]


def microbatch_moments(
    gradients: PerExampleGradients,
    sizes: PositiveInt | Int[np.ndarray, " K"] | tuple[int, ...],
    *,
    num_examples: PositiveInt | None = None,
) -> MicrobatchMoments:
    """Unbiased estimates of tr S and ``|grad L|^2`` from the K micro-batches of one step.

    Let m_k be the mean gradients of b_k examples each, n = sum b_k, and q the weighted variance
    ``sum b_k |m_k - m|^2 / (K - 1)``. For examples that were drawn independently, the estimates are
    q and ``|m|^2 - q / n``. For n distinct ones of N examples, split at random into any sizes, they
    are ``q (N - 1) / N`` and ``|m|^2 - (1/n - 1/N) q``. They cost no gradient. Average them over
    steps before you divide one by the other: `pooled_noise_scale` does that.

    Args:
        gradients: a pytree like the parameters with a leading axis of K: the gradient of the mean
            loss of each micro-batch.
        sizes: b_k, one number for all micro-batches or K numbers.
        num_examples: N, if the n examples of the step are distinct; None if they were drawn
            independently (with replacement, or from a stream).

    Raises:
        TypeError: if `gradients` are not floating point, or a size is not an integer.
        ValueError: if there are fewer than 2 gradients, or `sizes` are not positive, not K numbers,
            or add up to more than `num_examples`.
    """
    _validate.floating_params(gradients, "gradients")
    k = _validate.positive_int(
        "the leading axis of gradients", _validate.leading_axis("gradients", gradients), minimum=2
    )
    b = np.broadcast_to(np.asarray(sizes), (k,)) if np.ndim(sizes) == 0 else np.asarray(sizes)
    if b.shape != (k,) or not np.issubdtype(b.dtype, np.integer) or (b < 1).any():
        raise ValueError(f"sizes must be one positive integer or {k} of them, got {sizes}.")
    n = int(b.sum())
    if num_examples is not None:
        num_examples = _validate.positive_int("num_examples", num_examples, minimum=n)
    spread, squared = [], []
    for leaf in jax.tree.leaves(gradients):
        wide = _dtypes.wide(leaf)
        shares = jnp.asarray(b / n, wide.dtype)
        mean = jnp.tensordot(shares, wide, 1)
        spread.append(n * (shares @ _estimates.of_rows(wide - mean[None])) / (k - 1))
        squared.append(jnp.square(mean).sum())
    q, total = _estimates.with_total(spread), _estimates.with_total(squared)
    return MicrobatchMoments(*unbiased_of_spread(q, total, n, num_examples))


def unbiased_of_spread(
    q: Float[Array, "*parts"], squared: Float[Array, "*parts"], n: int, num_examples: int | None
) -> tuple[Float[Array, "*parts"], Float[Array, "*parts"]]:
    """Both estimates, from the variance q of n examples' gradients and their mean's square."""
    if num_examples is None:
        return q, squared - q / n
    return q * ((num_examples - 1) / num_examples), squared - (1 / n - 1 / num_examples) * q


def pooled_noise_scale(params: Params, moments: MicrobatchMoments) -> NoiseScale:
    """The noise scale from the `microbatch_moments` of R steps, as a ratio of their means.

    The mean of R ratios would be useless, since a ratio whose denominator can be near 0 has no
    mean. The ratio of means is biased upwards by order 1/R. If the upper end of `Scale.interval` is
    infinite, R is too small. Standard errors assume that steps are independent. (For independent
    steps, with a noise scale of 12 and 16 examples per step, the interval covered the truth in
    97 % of cases at R = 4, where it was infinite in 75 %, and in 95 % at R = 10, 30 and 100.)

    Args:
        params: the parameters, whose structure is used.
        moments: the moments of R steps, with a leading axis of R, at least 2.

    Raises:
        ValueError: if there are fewer than 2 steps, or the leaves are not those of `params`.
    """
    trace, squared = moments
    if trace.ndim != 2 or trace.shape[0] < 2:
        raise ValueError(
            "moments must have a leading axis of at least 2 steps, got shape "
            f"{trace.shape}: stack them, by jax.vmap or jax.lax.scan."
        )
    steps = trace.shape[0]
    t, u = trace - trace.mean(0)[None], squared - squared.mean(0)[None]
    scale = steps * (steps - 1)
    pair = _estimates.MeanPair(
        trace.mean(0),
        squared.mean(0),
        jnp.square(t).sum(0) / scale,
        (t * u).sum(0) / scale,
        jnp.square(u).sum(0) / scale,
    )
    return assembled(params, pair, steps - 1)


def assembled(
    params: Params,
    pair: _estimates.MeanPair,
    degrees_of_freedom: Any,
    *,
    exact_gradient: bool = False,
) -> NoiseScale:
    """The results per leaf, [leaves + 1], in the structure of the parameters.

    Args:
        params: the parameters.
        pair: the means of tr S and of ``|g|^2``.
        degrees_of_freedom: one less than the number of samples of the means; infinite if both are
            exact.
        exact_gradient: whether ``|g|^2`` is exact although tr S is not.
    """
    structure = jax.tree.structure(params)
    if pair.trace.shape != (structure.num_leaves + 1,):
        raise ValueError(
            f"moments must be of the {structure.num_leaves} leaves of params and in total, got "
            f"{pair.trace.shape[-1]} numbers."
        )
    if isinstance(degrees_of_freedom, Tracer) or not math.isinf(degrees_of_freedom):
        known = _estimates.unless_underflown(pair, degrees_of_freedom + 1)
        pair = known._replace(var_squared=pair.var_squared) if exact_gradient else known
    if not any(isinstance(leaf, Tracer) for leaf in pair):
        pair = jax.tree.map(np.asarray, pair)
    quotient = _estimates.ratio(pair, degrees_of_freedom)
    errors = [_estimates.root(variance) for variance in (pair.var_trace, pair.var_squared)]

    def part(i: int) -> Scale:
        at = functools.partial(_estimates.estimate, degrees_of_freedom=degrees_of_freedom)
        ends = (quotient.low[i], quotient.high[i])
        if not any(isinstance(end, Tracer) for end in ends):
            ends = tuple(float(end) for end in ends)
        return Scale(
            at(pair.trace[i], errors[0][i], positive=True),
            at(pair.squared[i], errors[1][i]),
            at(quotient.value[i], quotient.standard_error[i], positive=True),
            ends,  # type: ignore[arg-type]
        )

    parts = [part(i) for i in range(structure.num_leaves)]
    return NoiseScale(part(structure.num_leaves), jax.tree.unflatten(structure, parts))


def _deviations(
    gradients: PerExampleGradients, weights: Float[Array, " B"], mean: Gradients
) -> tuple[Float[Array, " parts"], ...]:
    """Sums of d, d d, d c and c c, with ``d = |g_i - g|^2`` and ``c = 2 g . (g_i - g)``."""
    squares, slopes = [], []
    for leaf, centre in zip(jax.tree.leaves(gradients), jax.tree.leaves(mean), strict=True):
        deviations = leaf.astype(centre.dtype) - centre[None]
        squares.append(_estimates.of_rows(deviations))
        slopes.append(2 * jnp.tensordot(deviations, centre, centre.ndim))
    d, c = _estimates.with_total(squares), _estimates.with_total(slopes)
    return tuple(weights.astype(d.dtype) @ term for term in (d, d * d, d * c, c * c))
