r"""The continuous side: the SDE of an M-noise, its paths, and how far the iteration is from it.

The iteration ``theta - eta grad(L(theta) . W)`` has the SDE (Eqs. 12 and 68) ::

    dTheta = -grad L dt + sqrt(eta) C(Theta) dW,    C C^T = Cov(grad(L . W)),

with a Brownian motion W in R^N and C = G A, G the matrix of per-example gradients and A the root of
the weights' covariance. C times a vector is one backward pass (`diffusion`), so that paths of any
model can be simulated.

* `euler_maruyama` integrates it on a Brownian path that is a function of a key, can be refined at
  will, and is the one that `noise.fisher` and `noise.cov` follow when trained with the same key;
* `underdamped` integrates the SDE of momentum on the same path;
* `diffrax_terms` hands it to diffrax, in the interpretation that the solver converges to;
* `strong_error` and `weak_error` measure the distance between iteration and SDE against the
  learning rate, path by path (Theorem 3) and in expectation (Theorem 2);
* `stationary_covariance` and `stationary_covariance_of_sde` are where both settle on a quadratic;
* `exit_time` is when, and where, they leave a region.

The noise of the SDE has independent increments, as the steps of a law must have. The steps of
`noise.random_reshuffling` depend on each other; over many of them their covariances do not add up,
and such laws are refused. What an epoch of m steps leaves per step is
``sum_{s, t < m} law.covariance_between(s, t) / m`` (0 where the batches use up all examples): these
two moments in a `noise.Exchangeable` give the SDE the noise of many epochs. It is of weak order 1
whatever the drift, since the correlation of steps also moves the mean, by O(eta).
"""

from msgd_jax._estimate import Estimate
from msgd_jax.sde._brownian import brownian_increments
from msgd_jax.sde._diffrax import diffrax_terms
from msgd_jax.sde._dynamics import Scheme, coupling, diffusion, drift
from msgd_jax.sde._euler_maruyama import Path, euler_maruyama
from msgd_jax.sde._exit import ExitTimes, exit_time
from msgd_jax.sde._fits import ErrorModel, ErrorSweep, Fit, fit_line
from msgd_jax.sde._stationary import stationary_covariance, stationary_covariance_of_sde
from msgd_jax.sde._strong import strong_error
from msgd_jax.sde._sweeps import Sweep
from msgd_jax.sde._underdamped import Moving, UnderdampedPath, underdamped
from msgd_jax.sde._weak import weak_error

__all__ = [
    "ErrorModel",
    "ErrorSweep",
    "Estimate",
    "ExitTimes",
    "Fit",
    "Moving",
    "Path",
    "Scheme",
    "Sweep",
    "UnderdampedPath",
    "brownian_increments",
    "coupling",
    "diffrax_terms",
    "diffusion",
    "drift",
    "euler_maruyama",
    "exit_time",
    "fit_line",
    "stationary_covariance",
    "stationary_covariance_of_sde",
    "strong_error",
    "underdamped",
    "weak_error",
]
