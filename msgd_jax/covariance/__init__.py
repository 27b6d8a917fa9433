r"""The covariance of the noisy gradient `grad(L . W)`, in parameter space.

G is the matrix of per-example gradients, [N, D] here with one gradient per row (they are columns in
the paper), from `loss.LossVector.gradient_matrix`. With an exchangeable law of weights,
``Cov(W) = alpha I + beta 1 1^T``, the noisy gradient has covariance
``alpha G^T G + beta (G^T 1)(G^T 1)^T``. The empirical Fisher matrix F has (alpha, beta) = (1/N, 0),
and the gradient covariance S (the paper's Sigma_sgd) has (1/N, -1/N^2). An argument `law` may be a
law, its `noise.Exchangeable`, "fisher" for F, or "sgd_covariance" for S.

All functions take a loss vector and the parameters at which the covariance is wanted. For gradients
[N, D] that you have already, use the loss vector
``loss.LossVector(lambda theta, gradient: gradient @ theta, G)`` at any theta [D].

Training needs none of this: a noisy gradient costs one backward pass (`loss`). This module has

* dense matrices, for few parameters, and exact spectra, for few examples or few parameters;
* matrix-free products with them, as `lineax` operators, for any size;
* samplers of additive Gaussian noise, which the paper replaces, as baselines;
* conversions between additive noise and weights.
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
