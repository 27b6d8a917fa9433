r"""The SDE of a law of weights: its paths, and the distance of the iteration from it.

The iteration ``theta - eta grad(L(theta) . W)`` has the SDE (Eqs. 12 and 68) ::

    dTheta = -grad L dt + sqrt(eta) C(Theta) dW,    C C^T = Cov(grad(L . W)),

with a Brownian motion W in R^N and C = G A, where G is the matrix of per-example gradients and A
the root of the weights' covariance. C times a vector takes one backward pass (`diffusion`), so
paths can be simulated for any model.

* `euler_maruyama` integrates the SDE on a Brownian path that is a function of a key. The path can
  be refined, and training with `noise.fisher` or `noise.cov` and the same key follows it.
* `underdamped` integrates the SDE of momentum on the same path.
* `adaptive` integrates the SDE of Adam and RMSprop on the same path. `Adam.scaled` is the square
  root scaling rule.
* `diffrax_terms` makes terms for diffrax, in the interpretation that the solver converges to.
* `strong_error` and `weak_error` measure the distance between iteration and SDE as a function of
  the learning rate, path by path (Theorem 3) and in expectation (Theorem 2), for plain M-SGD and
  for a rule: `Momentum`, `Adam` or `RMSprop`.
* `stationary_covariance` and `stationary_covariance_of_sde` are the stationary covariances of the
  iteration and of the SDE on a quadratic loss; `stationary_covariance_along` is the first along
  directions, for nets, without matrices.
* `exit_time` measures when, and where, paths leave a region.

The increments of the SDE's noise are independent, so the steps of the law must be independent too.
The steps of `noise.random_reshuffling` depend on each other, so the covariance of their sum is not
the sum of their covariances, and such laws are refused. The covariance of an epoch of m steps,
divided by m, is ``sum_{s, t < m} law.covariance_between(s, t) / m`` (0 if the batches use all
examples). A `noise.Exchangeable` with these two moments gives the SDE the noise of many epochs. It
is of weak order 1 for either drift, since the correlation of steps also changes the mean by O(eta).
"""

from msgd_jax._estimate import Estimate
from msgd_jax.sde._adaptive import AdaptivePath, AdaptiveState, adaptive
from msgd_jax.sde._brownian import brownian_increments
from msgd_jax.sde._diffrax import diffrax_terms
from msgd_jax.sde._dynamics import Scheme, coupling, diffusion, drift
from msgd_jax.sde._euler_maruyama import Path, euler_maruyama
from msgd_jax.sde._exit import ExitTimes, Trials, exit_time
from msgd_jax.sde._fits import ErrorModel, ErrorSweep, Fit, fit_line
from msgd_jax.sde._rules import Adam, Momentum, RMSprop
from msgd_jax.sde._settled import Settled, stationary_covariance_along
from msgd_jax.sde._stationary import stationary_covariance, stationary_covariance_of_sde
from msgd_jax.sde._strong import strong_error
from msgd_jax.sde._sweeps import Sweep
from msgd_jax.sde._underdamped import Moving, UnderdampedPath, underdamped
from msgd_jax.sde._weak import weak_error

__all__ = [
    "Adam",
    "AdaptivePath",
    "AdaptiveState",
    "ErrorModel",
    "ErrorSweep",
    "Estimate",
    "ExitTimes",
    "Fit",
    "Momentum",
    "Moving",
    "Path",
    "RMSprop",
    "Scheme",
    "Settled",
    "Sweep",
    "Trials",
    "UnderdampedPath",
    "adaptive",
    "brownian_increments",
    "coupling",
    "diffrax_terms",
    "diffusion",
    "drift",
    "euler_maruyama",
    "exit_time",
    "fit_line",
    "stationary_covariance",
    "stationary_covariance_along",
    "stationary_covariance_of_sde",
    "strong_error",
    "underdamped",
    "weak_error",
]
