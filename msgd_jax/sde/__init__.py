r"""The continuous side: the SDE of an M-noise, its paths, and how far the iteration is from it.

The iteration ``theta - eta grad(L(theta) . W)`` has the SDE (Eqs. 12 and 68) ::

    dTheta = -grad L dt + sqrt(eta) C(Theta) dW,    C C^T = Cov(grad(L . W)),

with a Brownian motion W in R^N and C = G A, G the matrix of per-example gradients and A the root of
the weights' covariance. C times a vector is one backward pass (`diffusion`), so that paths of any
model can be simulated.

* `euler_maruyama` integrates it on a Brownian path that is a function of a key, can be refined at
  will, and is the one that `noise.fisher` and `noise.cov` follow when trained with the same key;
* `diffrax_terms` hands it to diffrax;
* `strong_error` and `weak_error` measure the distance between iteration and SDE against the
  learning rate, path by path (Theorem 3) and in expectation (Theorem 2).
"""

from msgd_jax._estimate import Estimate
from msgd_jax.sde._brownian import brownian_increments
from msgd_jax.sde._diffrax import diffrax_terms
from msgd_jax.sde._dynamics import coupling, diffusion, drift
from msgd_jax.sde._euler_maruyama import Path, euler_maruyama
from msgd_jax.sde._fits import ErrorModel, ErrorSweep, Fit, fit_line
from msgd_jax.sde._strong import strong_error
from msgd_jax.sde._weak import weak_error

__all__ = [
    "ErrorModel",
    "ErrorSweep",
    "Estimate",
    "Fit",
    "Path",
    "brownian_increments",
    "coupling",
    "diffrax_terms",
    "diffusion",
    "drift",
    "euler_maruyama",
    "fit_line",
    "strong_error",
    "weak_error",
]
