"""Measurements of gradient noise: its scale, its shape, its tails, and its memory.

Most functions take a loss vector, the parameters at which to measure, and some a law of weights.
Numbers come with standard errors, and with their exact values where these are known. Under
`jax.jit` and `jax.vmap` the numbers are arrays, and errors that depend on values are not raised.

* Scale: `noise_scale`, `noise_scale_from_draws`, `microbatch_moments`, and, without further
  gradients, `noise_scale_monitor` in training; `squared_gradient_norms` and
  `probed_gradient_norms` per example.
* Shape: `hessian_product`, `hessian_trace`, `hessian_eigenvalues` and `hessian_density` of any loss
  vector; `alignment` of the noise of a law with the Hessian, `ranks`, `batch_sharpness`.
* Tails: `noise_projections`, whose draws cost no gradient; `excess_kurtosis` and its exact values;
  `gaussianity_test`; `hill_index` and `block_index`, with their values for Gaussian noise.
* Memory: `noise_autocorrelation` with its exact value, and `autocorrelation` of recorded noise.
"""

from msgd_jax._estimate import Estimate
from msgd_jax.measure._hessian import (
    HessianTrace,
    hessian_operator,
    hessian_product,
    hessian_trace,
)
from msgd_jax.measure._lanczos import (
    Ritz,
    SpectralDensity,
    hessian_density,
    hessian_eigenvalues,
    lanczos,
)
from msgd_jax.measure._memory import Autocorrelation, autocorrelation, noise_autocorrelation
from msgd_jax.measure._monitor import (
    NoiseScaleState,
    monitored_noise_scale,
    noise_scale_monitor,
)
from msgd_jax.measure._norms import ProbedNorms, probed_gradient_norms, squared_gradient_norms
from msgd_jax.measure._scale import (
    MicrobatchMoments,
    NoiseScale,
    Scale,
    microbatch_moments,
    noise_scale,
    noise_scale_from_draws,
    pooled_noise_scale,
)
from msgd_jax.measure._shape import (
    Alignment,
    BatchSharpness,
    Ranks,
    alignment,
    batch_sharpness,
    ranks,
)
from msgd_jax.measure._tail_index import TailIndex, block_index, hill_index
from msgd_jax.measure._tails import (
    GaussianityTest,
    Projections,
    excess_kurtosis,
    gaussianity_test,
    independent_kurtosis,
    mardia_kurtosis,
    noise_projections,
    random_directions,
    sgd_kurtosis,
    student_t_kurtosis,
)

__all__ = [
    "Alignment",
    "Autocorrelation",
    "BatchSharpness",
    "Estimate",
    "GaussianityTest",
    "HessianTrace",
    "MicrobatchMoments",
    "NoiseScale",
    "NoiseScaleState",
    "ProbedNorms",
    "Projections",
    "Ranks",
    "Ritz",
    "Scale",
    "SpectralDensity",
    "TailIndex",
    "alignment",
    "autocorrelation",
    "batch_sharpness",
    "block_index",
    "excess_kurtosis",
    "gaussianity_test",
    "hessian_density",
    "hessian_eigenvalues",
    "hessian_operator",
    "hessian_product",
    "hessian_trace",
    "hill_index",
    "independent_kurtosis",
    "lanczos",
    "mardia_kurtosis",
    "microbatch_moments",
    "monitored_noise_scale",
    "noise_autocorrelation",
    "noise_projections",
    "noise_scale",
    "noise_scale_from_draws",
    "noise_scale_monitor",
    "pooled_noise_scale",
    "probed_gradient_norms",
    "random_directions",
    "ranks",
    "sgd_kurtosis",
    "squared_gradient_norms",
    "student_t_kurtosis",
]
