r"""Laws of random weight vectors W in R^N with mean 1/N, drawn by pure functions of (key, step).

A noisy gradient is ``grad(L(theta) . W)``, a vector of per-example losses times a weight vector
that does not depend on theta (the paper's Eq. 6), the M-noise of the paper. All laws in this table
are exchangeable, so the covariance of W is given by two numbers that are known exactly,
``Cov(W) = alpha I + beta 1 1^T``. The noisy gradient then has covariance ``alpha N F + beta N^2
grad L grad L^T``, with F the empirical Fisher matrix.

==========================  =====================================  ===========  ====================
law                         W                                      evaluations  ``Cov(grad(L . W))``
==========================  =====================================  ===========  ====================
:func:`gd`                  ``1/N``                                N            0
:func:`sgd`                 ``1/b`` on b examples                  b            ``(N-b)/(N-1) S/b``
:func:`sgd`, replacing      ``counts/b``                           b            ``S/b``
:func:`fisher`              ``1/N + eps/sqrt(bN)``                 N            ``F/b``
:func:`cov`                 ``1/N + (eps - mean eps)/sqrt(bN)``    N            ``S/b``
:func:`bernoulli`           ``z/b``, z ~ Bernoulli(b/N)            N            ``(1 - b/N) F/b``
:func:`rademacher`          ``1/N + scale a/N, a = +-1``           N            ``scale^2 F/N``
:func:`estimated_fisher`    ``1/N + s eps`` on m examples          N            ``F/b``
:func:`estimated_cov`       ``1/N + s (eps - mean eps)`` on m      N            ``S/b``
:func:`sparse_fisher`       ``(1 + s eps)/B`` on B examples        B            see the function
:func:`sparse_cov`          ``(1 + s (eps - mean eps))/B`` on B    B            ``S/b``
:func:`random_reshuffling`  ``1/b`` on an epoch's next b examples  b            ``(N-b)/(N-1) S/b``
:func:`student_t`           ``1/N + s (t - mean t)``, heavy tails  N            ``S/b``
:func:`svag`                ``p W1 + q W2``, any base twice        2b for sgd   l times the base's
==========================  =====================================  ===========  ====================

New laws can be made of others: :func:`scaled` multiplies the noise W - 1/N of a law by a number, a
traced array or a schedule, :func:`sum_of` adds the independent noises of several laws,
:func:`mixture` draws each step from one of several laws, :func:`coloured` correlates the noise over
steps, and :func:`reweighted` lets examples count more or less. Their covariances are exact too,
where two numbers can state them.

For batches of a data loader, of any size, there are :func:`batch_cov` and :func:`batch_fisher`:
they count the draw of the batch as part of the noise.

``F = G G^T / N`` is the empirical Fisher matrix, ``S = F - grad L grad L^T`` the gradient
covariance, and `batch_size` (b) always means the scale: the batch size of the SGD that the noise
imitates.
"""

from msgd_jax.noise._algebra import mixture, scaled, sum_of
from msgd_jax.noise._basic import bernoulli, cov, fisher, gd, matching_scale, rademacher, sgd
from msgd_jax.noise._batch import BatchLaw, batch_cov, batch_fisher
from msgd_jax.noise._coloured import coloured
from msgd_jax.noise._permutation import permute
from msgd_jax.noise._reshuffling import random_reshuffling
from msgd_jax.noise._reweighted import reweighted
from msgd_jax.noise._student_t import student_t
from msgd_jax.noise._subset import estimated_cov, estimated_fisher, sparse_cov, sparse_fisher
from msgd_jax.noise._svag import svag
from msgd_jax.noise._types import Exchangeable, MNoise, Weights

__all__ = [
    "BatchLaw",
    "Exchangeable",
    "MNoise",
    "Weights",
    "batch_cov",
    "batch_fisher",
    "bernoulli",
    "coloured",
    "cov",
    "estimated_cov",
    "estimated_fisher",
    "fisher",
    "gd",
    "matching_scale",
    "mixture",
    "permute",
    "rademacher",
    "random_reshuffling",
    "reweighted",
    "scaled",
    "sgd",
    "sparse_cov",
    "sparse_fisher",
    "student_t",
    "sum_of",
    "svag",
]
