"""What gradient noise remembers: its autocorrelation over steps, measured and exact."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from msgd_jax import _laws, _validate
from msgd_jax import loss as loss_lib
from msgd_jax._streams import Stream, derive
from msgd_jax._typing import Gradients, Params, PositiveInt
from msgd_jax.measure import _tails
from msgd_jax.noise import MNoise


class Autocorrelation(NamedTuple):
    """The correlation of noise with itself so many steps later, from lag 0 (which is 1) on.

    Attributes:
        measured: of each lag, [lags + 1].
        standard_error: by the jackknife over runs, [lags + 1].
        exact: what the law has, [lags + 1]; None where it is not known.
    """

    measured: Float[Array, " lags"]
    standard_error: Float[Array, " lags"]
    exact: Float[Array, " lags"] | None = None


def autocorrelation(series: Float[Array, "R T J"], *, max_lag: PositiveInt) -> Autocorrelation:
    """The autocorrelation of noise that was recorded along R independent runs.

    At lag h the mean of ``x_t . x_(t+h)`` over the steps and runs, over that of ``|x_t|^2``. The
    noise has mean 0: record ``grad(L . W) - grad L``, or its projections on a few directions, not
    the gradient itself. No mean is taken out here, since that of a short run would take memory with
    it. Costs no gradient.

    Args:
        series: R runs of T steps, J numbers each; R at least 2.
        max_lag: the largest lag, below T.

    Returns:
        The measured values, whose standard errors need no assumption on the steps of one run.

    Raises:
        TypeError, ValueError: if `series` are not [R, T, J] with R at least 2, or `max_lag` is not
            from 1 to T - 1.
    """
    if jnp.ndim(series) != 3 or series.shape[0] < 2:
        raise ValueError(
            f"series must be [R, T, J], with at least 2 runs, got shape {jnp.shape(series)}."
        )
    runs, steps, _ = series.shape
    max_lag = _validate.positive_int("max_lag", max_lag, maximum=steps - 1)
    # [R, lags + 1]: what each run has at each lag.
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
    """What the noise of a law remembers at one place, beside its exact value.

    The noise of these steps of R independent runs, which begin at step 0, is projected on J
    directions; with `momentum` it is that of the velocity ``v' = momentum * v + gradient``,
    which starts at 0. White noise has 0 at every lag but the first; `noise.coloured` and momentum
    remember, and under `noise.random_reshuffling` the batches of one epoch repel each other.

    The exact value is ``sum over t of Cov(x_t, x_(t+h))`` over that of lag 0, from
    `noise.MNoise.covariance_between`, for these very steps and directions.

    Costs J forward-mode passes over the N examples, and no further gradient, whatever the number of
    runs and steps. Compiled anew on each call.

    Args:
        losses: the loss vector.
        params: a pytree of floating-point arrays.
        law: any law of N weights; its steps may depend on each other.
        key: a typed PRNG key; run r is a function of (key, r).
        directions: like `params` with leading axes of J, from `random_directions` say.
        steps: the T steps that count, one after the other: ``range(40, 60)``, say, leaves out the
          first 40, after which the velocity has forgotten that it began at 0.
        max_lag: the largest lag, below T.
        num_runs: R, at least 2.
        momentum: from 0 to below 1.

    Raises:
        TypeError, ValueError: as `noise_projections` (steps that depend on each other are welcome
            here), or if `steps` is not a range of at least 2 steps from 0 on, `max_lag` is not from
            1 to T - 1, there are fewer than 2 runs, or `momentum` is out of range.
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
    # What the velocity of a step has of the noise of each step before it.
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
    """The same quotient of exact covariances; None where two numbers do not state them."""
    total = filter_.shape[1]
    try:
        pairs = [[law.covariance_between(s, t) for t in range(total)] for s in range(total)]
    except ValueError:
        return None
    n = slopes.shape[-1]
    across = np.array([[pair.alpha for pair in row] for row in pairs])
    along = np.array([[pair.alpha + n * pair.beta for pair in row] for row in pairs])
    # Weights of covariance alpha I + beta 1 1^T, across and along the all-ones vector.
    means = slopes.mean(-1)
    spread = jnp.square(slopes - means[:, None]).sum()
    shifted = n * jnp.square(means).sum()
    of_lags = [
        [float(np.diagonal(filter_ @ part @ filter_.T, lag).mean()) for part in (across, along)]
        for lag in range(max_lag + 1)
    ]
    covariances = jnp.stack([a * spread + b * shifted for a, b in of_lags])
    return covariances / covariances[0]
