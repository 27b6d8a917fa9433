r"""The covariance view: what the noise of `grad(L . W)` looks like in parameter space.

G is the matrix of per-example gradients ([N, D] here, one gradient after the other; the paper has
them as columns), from `loss.LossVector.gradient_matrix`. An exchangeable law of weights with
``Cov(W) = alpha I + beta 1 1^T`` makes the noisy gradient's covariance
``alpha G^T G + beta (G^T 1)(G^T 1)^T``; the empirical Fisher matrix F has (1/N, 0), the gradient
covariance S (the paper's Sigma_sgd) has (1/N, -1/N^2). Where a function takes a `law`, it takes any
of them: a law, its `noise.Exchangeable`, "fisher", or "sgd_covariance".

Everything here takes a loss vector and the parameters at which it is looked at. Gradients that you
have already are the loss vector ``loss.LossVector(lambda theta, gradient: gradient @ theta, G)``
of gradients [N, D], at any theta [D].

Training needs none of this: a noisy gradient costs one backward pass (`loss`). Here are

* the dense matrices, for few parameters, and the exact spectrum, for few examples or parameters;
* matrix-free products with them, as `lineax` operators, for any size;
* the samplers of additive Gaussian noise that the paper replaces, as baselines;
* the way between additive noise and weights, and back.
"""

from msgd_jax.covariance._matrices import (
    Spectrum,
    diagonal,
    fisher,
    flatten,
    noise_covariance,
    sgd_covariance,
    spectrum,
)
from msgd_jax.covariance._operators import (
    fisher_operator,
    noise_covariance_operator,
    sgd_covariance_operator,
)
from msgd_jax.covariance._samplers import (
    GaussianSampler,
    Multiplicative,
    cholesky_sampler,
    diagonal_sampler,
    eigh_sampler,
    gradient_sampler,
    svd_sampler,
    to_additive,
    to_multiplicative,
)

__all__ = [
    "GaussianSampler",
    "Multiplicative",
    "Spectrum",
    "cholesky_sampler",
    "diagonal",
    "diagonal_sampler",
    "eigh_sampler",
    "fisher",
    "fisher_operator",
    "flatten",
    "gradient_sampler",
    "noise_covariance",
    "noise_covariance_operator",
    "sgd_covariance",
    "sgd_covariance_operator",
    "spectrum",
    "svd_sampler",
    "to_additive",
    "to_multiplicative",
]
