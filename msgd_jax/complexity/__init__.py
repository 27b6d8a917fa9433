r"""Local complexities, the implicit regularisers of M-SGD: measured and in training (section 3).

With W = (1 + V)/N, an M-SGD step is a gradient step on the mean loss plus ``(1/N) sum v_i
l_i(theta)``. The supremum of the latter over a ball has the expectation ::

    R(V, theta, radius, N) = E sup_{||theta' - theta|| <= radius} |sum_i v_i l_i(theta')| / N,

which is the local Rademacher complexity for random signs v, the local Gaussian complexity for
normals, and the local SGD complexity for the V of SGD (after Eq. 9).

* `local_complexity` measures it for any loss vector, by Monte Carlo over v (and over the data) and
  gradient ascent in the ball, and reports how close to a maximum the ascents ended.
* `theorem1`, `gaussian_inequalities` and `sgd_inequality` measure how tight Theorem 1 is, with
  correct constants, and with a bound that also holds for sampling with replacement, for which the
  paper's does not.
* `penalty` and `add_local_complexity` add the regulariser to training.

====================================  =================================================
law of v                              v
====================================  =================================================
``rademacher(N)``                     +-1
``rademacher(N, b)``                  (N/b) times +-1 on b random examples: R(A, b)
``gaussian(N)``                       standard normal
``sgd(N, b)``                         N W - 1 of mini-batch SGD
``from_noise(noise)``                 N W - 1 of any M-noise
====================================  =================================================
"""

from msgd_jax._estimate import Estimate
from msgd_jax.complexity._ascent import Ascent
from msgd_jax.complexity._local import LocalComplexity, local_complexity
from msgd_jax.complexity._multipliers import Multipliers, from_noise, gaussian, rademacher, sgd
from msgd_jax.complexity._penalty import LocalComplexityState, add_local_complexity, penalty
from msgd_jax.complexity._theorem1 import (
    Inequality,
    Theorem1,
    expected_max_normal,
    gaussian_inequalities,
    sgd_inequality,
    theorem1,
)

__all__ = [
    "Ascent",
    "Estimate",
    "Inequality",
    "LocalComplexity",
    "LocalComplexityState",
    "Multipliers",
    "Theorem1",
    "add_local_complexity",
    "expected_max_normal",
    "from_noise",
    "gaussian",
    "gaussian_inequalities",
    "local_complexity",
    "penalty",
    "rademacher",
    "sgd",
    "sgd_inequality",
    "theorem1",
]
