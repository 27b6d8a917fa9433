"""The memory of gradient noise: its autocorrelation over steps, measured and exact."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from msgd_jax import _dtypes, _laws, _validate
from msgd_jax import loss as loss_lib
from msgd_jax._streams import Stream, derive
from msgd_jax._typing import Gradients, Params, PositiveInt
from msgd_jax.measure import _tails
from msgd_jax.noise import MNoise


class Autocorrelation(NamedTuple):
    """The correlation of noise with itself a number of steps (the lag) later.

    Attributes:
        measured: the value at each lag, from lag 0, where it is 1, [lags + 1].
        standard_error: its standard error by the jackknife over runs, [lags + 1].
        exact: the exact value for the law, [lags + 1]; None if it is not known.
    """

    measured: Float[Array, " lags"]
    standard_error: Float[Array, " lags"]
    exact: Float[Array, " lags"] | None = None


def autocorrelation(series: Float[Array, "R T J"], *, max_lag: PositiveInt) -> Autocorrelation:
    """The autocorrelation of noise that was recorded along R independent runs.

    At lag h it is the mean of ``x_t . x_(t+h)`` over steps and runs, divided by that of
    ``|x_t|^2``. The noise must have mean 0: record ``grad(L . W) - grad L``, or its projections on
    a few directions, not the gradient itself. No mean is subtracted here, since subtracting the
    mean of a short run would remove memory too. It costs no gradient.

    Args:
        series: the noise, [R, T, J]: R runs of T steps with J numbers each; R at least 2.
        max_lag: the largest lag, below T.

    Returns:
        The measured values, whose standard errors need no assumption on the steps of one run.

    Raises:
        TypeError: if `max_lag` is not an integer.
        ValueError: if `series` are not [R, T, J] with R at least 2, or `max_lag` is not from 1 to
            T - 1.
    """
    if jnp.ndim(series) != 3 or series.shape[0] < 2:
        raise ValueError(
            f"series must be [R, T, J], with at least 2 runs, got shape {jnp.shape(series)}."
        )
    runs, steps, _ = series.shape
    series = _dtypes.in_unit(series)
    max_lag = _validate.positive_int("max_lag", max_lag, maximum=steps - 1)
    # [R, lags + 1]: the mean product of each run at each lag.
    products = jnp.stack(
        [
            (series[:, : steps - lag] * series[:, lag:]).sum(-1).mean(1)
            for lag in range(max_lag + 1)
        ],
        axis=1,
    )
    total = products.sum(0)
    without = total[None] - products
    quotients = without / without[:, :1]
    deviations = quotients - quotients.mean(0)[None]
    error = jnp.sqrt((runs - 1) / runs * jnp.square(deviations).sum(0))
    return Autocorrelation(total / total[0], error)


def noise_autocorrelation(
    losses: loss_lib.LossVector,
    params: Params,
    law: MNoise,
    key: Key[Array, ""],
    *,
    directions: Gradients,
    steps: range,
    max_lag: PositiveInt,
    num_runs: PositiveInt,
    momentum: float = 0.0,
) -> Autocorrelation:
    """The autocorrelation of the noise of a law at one point, measured and exact.

    The noise of the given steps of R independent runs, which begin at step 0, is projected on J
    directions. With `momentum` it is the noise of the velocity ``v' = momentum * v + gradient``,
    which starts at 0. For white noise the autocorrelation is 0 at all lags but 0. It is not for
    `noise.coloured` and with momentum, and for `noise.random_reshuffling`, whose batches in one
    epoch are negatively correlated.

    The exact value is ``sum over t of Cov(x_t, x_(t+h))`` divided by that at lag 0, from
    `noise.MNoise.covariance_between`, for the same steps and directions.

    It costs J forward-mode passes over the N examples and no gradient, for any number of runs and
    steps. Each eager call compiles a program.

    Args:
        losses: the loss vector.
        params: a pytree of floating-point arrays.
        law: any law of N weights; its steps may depend on each other.
        key: a typed PRNG key; run r is a function of (key, r).
        directions: like `params` with a leading axis of J, for example from `random_directions`.
        steps: the T consecutive steps that are measured. ``range(40, 60)``, for example, leaves out
          the first 40, after which the start of the velocity at 0 hardly matters.
        max_lag: the largest lag, below T.
        num_runs: R, at least 2.
        momentum: the decay rate of the velocity, from 0 to below 1.

    Raises:
        TypeError: as `noise_projections`.
        ValueError: as `noise_projections` (but steps may depend on each other), or if `steps` is
            not a range of at least 2 consecutive steps from 0 on, `max_lag` is not from 1 to T - 1,
            there are fewer than 2 runs, or `momentum` is out of range.
    """
    loss_lib.checked(losses, params)
    _laws.of_size("law", _laws.drawable("law", law), losses.num_examples)
    if not isinstance(steps, range) or steps.step != 1 or steps.start < 0 or len(steps) < 2:
        raise ValueError(
            "steps must be a range of at least 2 steps from 0 on, one after the other, got "
            f"{_validate.shown(steps)}."
        )
    max_lag = _validate.positive_int("max_lag", max_lag, maximum=len(steps) - 1)
    runs = _validate.positive_int("num_runs", num_runs, minimum=2)
    if not 0 <= _validate.real("momentum", momentum) < 1:
        raise ValueError(f"momentum must be at least 0 and below 1, got {momentum}.")
    _validate.prng_key("key", key)
    total = steps.stop
    ages = np.arange(total)[:, None] - np.arange(total)[None]
    # The coefficients of the noise of each step in the velocity of each measured step.
    filter_ = np.where(ages >= 0, float(momentum) ** np.maximum(ages, 0), 0.0)[steps.start :]

    slopes = _tails.slopes_along(losses, params, directions)

    def of_run(number: Int[Array, ""]) -> Float[Array, "T J"]:
        own = derive(key, Stream.PROBES, number)
        noise = _tails.draws_along(slopes, law, own, 0, total)
        return jnp.matmul(jnp.asarray(filter_, noise.dtype), noise, precision="highest")

    series = jax.jit(lambda: jax.lax.map(of_run, jnp.arange(runs)))()
    measured = autocorrelation(series, max_lag=max_lag)
    return measured._replace(exact=_exact(law, slopes, filter_, max_lag))


def _exact(
    law: MNoise, slopes: Float[Array, "J N"], filter_: np.ndarray, max_lag: int
) -> Float[Array, " lags"] | None:
    """The same quotient of exact covariances; None if the law does not state them."""
    total = filter_.shape[1]
    try:
        pairs = [[law.covariance_between(s, t) for t in range(total)] for s in range(total)]
    except ValueError:
        return None
    n = slopes.shape[-1]
    across = np.array([[pair.alpha for pair in row] for row in pairs])
    along = np.array([[pair.alpha + n * pair.beta for pair in row] for row in pairs])
    # Covariances alpha I + beta 1 1^T of the weights, across and along the all-ones vector.
    means = slopes.mean(-1)
    spread = jnp.square(slopes - means[:, None]).sum()
    shifted = n * jnp.square(means).sum()
    of_lags = [
        [float(np.diagonal(filter_ @ part @ filter_.T, lag).mean()) for part in (across, along)]
        for lag in range(max_lag + 1)
    ]
    covariances = jnp.stack([a * spread + b * shifted for a, b in of_lags])
    return covariances / covariances[0]
