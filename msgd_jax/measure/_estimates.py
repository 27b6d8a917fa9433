"""Estimates with standard errors: of means, of statistics by the jackknife, of ratios of means."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from msgd_jax import _dtypes
from msgd_jax import loss as loss_lib
from msgd_jax._estimate import Estimate, t_quantile
from msgd_jax._typing import Params, PyTree


def estimate(
    value: Any,
    standard_error: Any = 0.0,
    degrees_of_freedom: Any = math.inf,
    *,
    positive: bool = False,
) -> Estimate:
    """An `Estimate` of Python floats, or of scalar arrays if the numbers are traced."""
    if not any(isinstance(x, Tracer) for x in (value, standard_error, degrees_of_freedom)):
        value, standard_error = float(value), float(standard_error)
        degrees_of_freedom = float(degrees_of_freedom)
    return Estimate(value, standard_error, degrees_of_freedom, positive)


def of_sample(values: Float[Array, " K"], *, positive: bool = False) -> Estimate:
    """The mean of K independent values, with its standard error."""
    size = values.shape[0]
    return estimate(
        values.mean(), values.std(ddof=1) / math.sqrt(size), size - 1, positive=positive
    )


def jackknife(
    statistic: Callable[[Float[Array, " K"]], Float[Array, ""]], size: int, dtype: Any
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """A statistic of K weighted draws, and its jackknife standard error.

    Args:
        statistic: a function of the weights of the draws, [K], which are 0 for draws left out and 1
            for the others.
        size: K.
        dtype: of the weights.
    """
    all_ = jnp.ones(size, dtype)
    without = jax.lax.map(lambda k: statistic(all_.at[k].set(0)), jnp.arange(size))
    return statistic(all_), spread_without(without)


def spread_without(without: Float[Array, " K"]) -> Float[Array, ""]:
    """The jackknife standard error, from the values of a statistic without each draw in turn."""
    size = without.shape[0]
    return jnp.sqrt((size - 1) / size * jnp.square(without - without.mean()).sum())


class MeanPair(NamedTuple):
    """Means T and U of two numbers, and the covariance of these means.

    Attributes:
        trace: T.
        squared: U.
        var_trace: the variance of T.
        covariance: the covariance of T and U.
        var_squared: the variance of U.
    """

    trace: Float[Array, " *parts"]
    squared: Float[Array, " *parts"]
    var_trace: Float[Array, " *parts"]
    covariance: Float[Array, " *parts"]
    var_squared: Float[Array, " *parts"]


def unless_underflown(pair: MeanPair, num_samples: Any) -> MeanPair:
    """The pair of means of this many samples, with infinite variances where these underflow.

    Variances are as small as the square of the larger mean over the number of samples. Where that
    is hardly a normal number, they have lost their digits, or are 0 as if the means were exact.
    """
    size = jnp.maximum(jnp.abs(pair.trace), jnp.abs(pair.squared))
    least = 100 * float(jnp.finfo(pair.trace.dtype).tiny)
    lost = (size > 0) & (size < jnp.sqrt(jnp.asarray(least * num_samples, size.dtype)))
    return MeanPair(
        pair.trace,
        pair.squared,
        jnp.where(lost, jnp.inf, pair.var_trace),
        jnp.where(lost, 0, pair.covariance),
        jnp.where(lost, jnp.inf, pair.var_squared),
    )


class Ratio(NamedTuple):
    """T / U with its standard error and Fieller's 95 % interval."""

    value: Float[Array, " *parts"]
    standard_error: Float[Array, " *parts"]
    low: Float[Array, " *parts"]
    high: Float[Array, " *parts"]


def ratio(pair: MeanPair, degrees_of_freedom: Any) -> Ratio:
    """The ratio of two means, T >= 0 over U: infinite if U is not above 0, and 0 if T is 0.

    The standard error is that of the delta method. The interval is Fieller's: all B >= 0 with
    ``|T - B U| <= q s.e.(T - B U)``, where q is the 97.5 % quantile of Student's t with the
    `degrees_of_freedom` of the standard errors; it has no upper end if U cannot be told from 0.
    If U is known exactly, the interval is that of an `Estimate` which is positive. What depends on
    a NaN is NaN.
    """
    q = t_quantile(degrees_of_freedom)
    # Values that are not traced are computed on the host, in float64.
    xp: Any = jnp
    if not any(isinstance(leaf, Tracer) for leaf in pair):
        xp, pair = np, MeanPair(*(np.asarray(leaf, np.float64) for leaf in pair))  # type: ignore[arg-type]
    # In units of the larger mean, since powers up to the fourth of the means are compared.
    unit = xp.maximum(abs(pair.trace), abs(pair.squared))
    unit = xp.where((unit > 0) & (unit < xp.inf), unit, 1)
    pair = MeanPair(*(part / unit for part in pair[:2]), *(part / unit / unit for part in pair[2:]))
    t, u = pair.trace, pair.squared
    present = u > 0
    safe = xp.where(present, u, 1)
    value = xp.where(t == 0, 0.0, xp.where(present, t / safe, xp.inf))
    finite = xp.where(present, t / safe, 0.0)
    of_u = xp.where(finite == 0, 0, finite**2 * pair.var_squared)
    variance = pair.var_trace - 2 * finite * pair.covariance + of_u
    error = xp.sqrt(xp.maximum(variance, 0)) / safe
    exact = (pair.var_trace == 0) & (pair.var_squared == 0)
    error = xp.where(present | (t == 0) | exact, error, xp.inf)
    # The ends solve a B^2 - 2 b B + c = 0, in a form in which the lower one has no pole at a = 0.
    a = u**2 - q**2 * pair.var_squared
    b = t * u - q**2 * pair.covariance
    c = t**2 - q**2 * pair.var_trace
    root = xp.sqrt(xp.maximum(b**2 - a * c, 0))
    sum_ = b + root
    low = xp.where(sum_ > 0, xp.maximum(c, 0) / xp.where(sum_ > 0, sum_, 1), 0.0)
    bounded = (a > 0) & present
    high = xp.where(bounded, sum_ / xp.where(bounded, a, 1), xp.inf)
    # If only T varies, the interval is that of log T, as of every positive estimate: T is skew.
    only_t = (pair.var_squared == 0) & (t > 0) & present
    factor = xp.exp(xp.minimum(q * xp.sqrt(pair.var_trace) / xp.where(t > 0, t, 1), 700.0))
    low, high = xp.where(only_t, value / factor, low), xp.where(only_t, value * factor, high)
    # If the ratio is known exactly, both ends of the interval are the ratio.
    low, high = (xp.where(exact, value, end) for end in (low, high))
    high = xp.where((t == 0) & exact, 0.0, high)
    # Comparisons with NaN are false: without this, a NaN would become 0 or infinity above.
    unknown = xp.isnan(t) | xp.isnan(u)
    unsure = unknown | xp.isnan(pair.var_trace + pair.covariance + pair.var_squared)
    ends = (xp.where(unsure, xp.nan, end) for end in (error, low, high))
    return Ratio(xp.where(unknown, xp.nan, value), *ends)


def root(values: Any) -> Any:
    """The square root, computed on the host if the values are not traced."""
    return jnp.sqrt(values) if isinstance(values, Tracer) else np.sqrt(np.asarray(values))


def check_finite(losses: loss_lib.LossVector, params: Params, result: PyTree) -> None:
    """Raises ValueError, naming an example, if a result is NaN; traced results are not checked.

    Only in that case the losses are evaluated, to find the example.
    """
    leaves = jax.tree.leaves(result)
    if any(isinstance(leaf, Tracer) for leaf in leaves):
        return
    if all(np.isfinite(np.asarray(leaf)).all() for leaf in leaves):
        return
    for what, values in (
        ("losses", lambda: losses(params)),
        ("the gradients of losses", lambda: largest_entries(losses, params)),
    ):
        found = np.asarray(values())
        wrong = np.flatnonzero(~np.isfinite(found))
        if wrong.size:
            others = f" and of {wrong.size - 1} others" if wrong.size > 1 else ""
            raise ValueError(
                f"{what} must be finite at params, got {found[wrong[0]]} of example "
                f"{wrong[0]}{others}."
            )
    raise ValueError(
        "losses give a result at params that is not finite, although all losses and gradients are: "
        "a square overflows. Rescale the losses, or use float64."
    )


def check_range(losses: loss_lib.LossVector, params: Params, pair: MeanPair) -> None:
    """Raises ValueError if squares of squared gradients underflow; traced ones are not checked.

    Only where all squares are 0 the gradients are evaluated, to see whether they are 0, too.
    """
    if isinstance(pair.trace, Tracer):
        return
    size = float(pair.trace[-1]) + float(pair.squared[-1])
    info = jnp.finfo(pair.trace.dtype)
    if size > math.sqrt(info.tiny) or (size == 0 and not largest_entries(losses, params).any()):
        return
    raise ValueError(
        f"losses have gradients at params whose squares underflow in {info.dtype}: tr S + |g|^2 is "
        f"{size:.3g}. Multiply the losses by a factor, which leaves the noise scale as it is, or "
        "use float64."
    )


def largest_entries(losses: loss_lib.LossVector, params: Params) -> Float[Array, " N"]:
    """The largest absolute entry of the gradient of each example; NaN where one is NaN."""

    def largest(leaf: Float[Array, "B *shape"]) -> Float[Array, " B"]:
        return jnp.abs(_dtypes.wide(leaf)).reshape(leaf.shape[0], -1).max(1, initial=0.0)

    return _of_gradients(losses, params, lambda rows: functools.reduce(jnp.maximum, rows), largest)


def per_example_squares(losses: loss_lib.LossVector, params: Params) -> Float[Array, " N"]:
    """The squared norms of all examples' gradients, with one micro-batch of them in memory."""
    return _of_gradients(losses, params, sum, of_rows)


def _of_gradients(
    losses: loss_lib.LossVector,
    params: Params,
    together: Callable[[list[Float[Array, " B"]]], Any],
    of_leaf: Callable[[Float[Array, "B *shape"]], Float[Array, " B"]],
) -> Float[Array, " N"]:
    """A number of each example's gradient, from one of each of its leaves."""
    loss_vector_fn = losses.loss_vector_fn

    def numbers(params: Params, batch: Any) -> Float[Array, " B"]:
        gradients = loss_lib.LossVector(loss_vector_fn, batch).gradient_matrix(params)
        return together([of_leaf(leaf) for leaf in jax.tree.leaves(gradients)])

    return losses.replace(numbers)(params)


def of_rows(leaf: Float[Array, "B *shape"]) -> Float[Array, " B"]:
    """The sum of squares of each entry of the leading axis, in float32 or wider."""
    return dot_rows(leaf, leaf)


def dot_rows(leaf: Float[Array, "B *shape"], other: Float[Array, "B *shape"]) -> Float[Array, " B"]:
    """The inner product of each pair of entries of the leading axis, in float32 or wider."""
    dtype = _dtypes.accumulator(leaf.dtype, other.dtype)
    products = leaf.astype(dtype) * other.astype(dtype)
    return products.reshape(leaf.shape[0], -1).sum(1)


def with_total(parts: list[Float[Array, "*shape"]]) -> Float[Array, "*shape parts"]:
    """One number per leaf and then their sum, along a new last axis."""
    dtype = _dtypes.accumulator(*(part.dtype for part in parts))
    wide = [part.astype(dtype) for part in parts]
    return jnp.stack([*wide, functools.reduce(jnp.add, wide)], axis=-1)


def squared_norms(tree: PyTree) -> Float[Array, " parts"]:
    """The sum of squares of each leaf, and last the sum of all of them."""
    return with_total([jnp.square(leaf).sum() for leaf in jax.tree.leaves(tree)])


def samples(name: str, values: Array, minimum: int) -> int:
    """The number of samples; raises ValueError if it is below `minimum`, or some are not finite.

    Traced samples are not checked for the latter.
    """
    if jnp.ndim(values) < 1 or values.shape[0] < minimum:
        raise ValueError(
            f"{name} must be at least {minimum} along the leading axis, got shape "
            f"{jnp.shape(values)}."
        )
    size = values.shape[0]
    if not isinstance(values, Tracer):
        wrong = ~np.asarray(jnp.isfinite(values).reshape(size, -1).all(1))
        if wrong.any():
            raise ValueError(
                f"{name} must be finite, got {int(wrong.sum())} of {size} with entries that are "
                f"not, number {int(wrong.argmax())} first."
            )
    return size
