"""Additive Gaussian noise with a given covariance, and the way between additive and M-noise."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Key

from msgd_jax import _dtypes, _validate
from msgd_jax.covariance import _matrices
from msgd_jax.noise import Exchangeable, MNoise, Weights


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GaussianSampler:
    """Additive Gaussian noise with mean 0: white noise, coloured by a factor of the covariance.

    Attributes:
        factor: [D, k] with covariance ``factor @ factor.T``; or [D], the standard deviations of
            independent components.
    """

    factor: Float[Array, "D *k"]

    def sample(self, key: Key[Array, ""], step: int | Int[Array, ""]) -> Float[Array, " D"]:
        """Draws the noise of one step, in the order of `flatten`; a pure function of (key, step).

        Args:
            key: a typed PRNG key, the same for the whole run (it is folded with `step`).
            step: which step, at least 0.

        Raises:
            TypeError, ValueError: if an argument is not as described.
        """
        _validate.prng_key("key", key)
        _validate.step(step)
        key = jax.random.fold_in(key, step)
        white = jax.random.normal(key, self.factor.shape[-1:], self.factor.dtype)
        if self.factor.ndim == 1:
            return self.factor * white
        return jnp.matmul(self.factor, white, precision=jax.lax.Precision.HIGHEST)


def svd_sampler(matrix: Float[Array, "D D"]) -> GaussianSampler:
    """The usual way, as the paper's section 5.1 describes it: ``U Lambda^(1/2) eps``, by SVD.

    O(D^3) time and O(D^2) memory, to be paid again whenever the parameters move.

    Args:
        matrix: a covariance, [D, D]; `sgd_covariance` / b for the noise of SGD.

    Raises:
        ValueError: if `matrix` is not a square matrix of floating-point numbers.
    """
    matrix = _square(matrix)
    vectors, values, _ = jnp.linalg.svd(matrix)
    return GaussianSampler(vectors * jnp.sqrt(values)[None])


def eigh_sampler(matrix: Float[Array, "D D"]) -> GaussianSampler:
    """As `svd_sampler`, by the symmetric eigendecomposition, which is several times cheaper.

    Args:
        matrix: a covariance, [D, D]. Eigenvalues that come out below 0 by rounding count as 0.

    Raises:
        ValueError: if `matrix` is not a square matrix of floating-point numbers.
    """
    matrix = _square(matrix)
    values, vectors = jnp.linalg.eigh(matrix)
    return GaussianSampler(vectors * jnp.sqrt(jnp.maximum(values, 0))[None])


def cholesky_sampler(
    matrix: Float[Array, "D D"], *, jitter: float | None = None
) -> GaussianSampler:
    """As `svd_sampler`, by a Cholesky factorisation: cheaper still, but for regular matrices.

    Covariances of gradients are singular if N <= D, so a multiple of the identity is added.

    Args:
        matrix: a covariance, [D, D].
        jitter: what is added to the diagonal, as a fraction of the trace; None for 8 times the
            rounding of the type, which raises the total variance by D times that fraction (by 1 %
            at D = 11,000 in float32).

    Raises:
        ValueError: if `matrix` is not a square matrix of floating-point numbers, `jitter` is
            negative, or, outside of jit, the factorisation fails; under jit the factor is NaN then.
    """
    matrix = _square(matrix)
    if jitter is None:
        jitter = 8 * float(jnp.finfo(matrix.dtype).eps)
    jitter = _validate.finite_nonnegative("jitter", jitter)
    added = jitter * jnp.trace(matrix) * jnp.eye(matrix.shape[0], dtype=matrix.dtype)
    factor = jnp.linalg.cholesky(matrix + added)
    if not isinstance(factor, Tracer) and not bool(jnp.isfinite(factor).all()):
        raise ValueError(
            f"matrix is not positive definite even with jitter = {jitter} of its trace: raise "
            "jitter, or use eigh_sampler."
        )
    return GaussianSampler(factor)


def diagonal_sampler(variances: Float[Array, " D"]) -> GaussianSampler:
    """Independent components: the approximation that the field compares with.

    Args:
        variances: [D], from `diagonal`.

    Raises:
        ValueError: if `variances` is not a vector of floating-point numbers.
    """
    if jnp.ndim(variances) != 1 or not jnp.issubdtype(jnp.result_type(variances), jnp.floating):
        raise ValueError(
            "variances must be a vector of floating-point numbers, got shape "
            f"{jnp.shape(variances)} and dtype {jnp.result_type(variances)}."
        )
    return GaussianSampler(jnp.sqrt(jnp.maximum(_widen(variances), 0)))


def gradient_sampler(noise: MNoise | Exchangeable | str, gradients: Any) -> GaussianSampler:
    """The product of white noise in R^N with the explicit gradient matrix: no D x D matrix.

    Gaussian with the covariance of the noise, whatever the noise's own law.

    Args:
        noise: as in `noise_covariance`.
        gradients: a gradient matrix, [N, D] or a pytree with leaves ``[N, *parameter shape]``.

    Raises:
        TypeError, ValueError: as `noise_covariance`.
    """
    return GaussianSampler(_matrices.root(noise, _matrices.flatten(gradients)).T)


class Multiplicative(NamedTuple):
    """An additive noise as weights.

    Attributes:
        weights: W of all examples, [N]; ``grad(L . W)`` is the mean gradient plus the noise.
        residual: the Euclidean norm of what no weights can make, relative to that of the noise: 0
            up to rounding if the noise is in the span of the gradients.
    """

    weights: Weights
    residual: Float[Array, ""]


def to_additive(weights: Weights, gradients: Any) -> Float[Array, " D"]:
    """The additive noise (A-noise) that weights make: ``G^T (W - 1/N)`` (section 2 of the paper).

    Args:
        weights: one draw of an M-noise.
        gradients: a gradient matrix, [N, D] or a pytree with leaves ``[N, *parameter shape]``.

    Returns:
        The noisy gradient minus the mean gradient, [D], in the order of `flatten`.

    Raises:
        TypeError: if `weights` is not a `noise.Weights`.
        ValueError: if the weights are for another number of examples, or are several draws (use
            `jax.vmap`).
    """
    rows = _matrices.flatten(gradients)
    if not isinstance(weights, Weights):
        raise TypeError(f"weights must be a noise.Weights, got {type(weights).__name__}.")
    if weights.values.ndim != 1:
        raise ValueError(
            f"weights must be one draw, got weights.values of shape {weights.values.shape}; use "
            "jax.vmap for several draws at once."
        )
    if weights.num_examples != rows.shape[0]:
        raise ValueError(
            f"weights are for num_examples = {weights.num_examples}, but the gradients are of "
            f"{rows.shape[0]} examples."
        )
    deviations = weights.dense() - 1 / weights.num_examples
    return _apply(deviations.astype(rows.dtype), rows)


def to_multiplicative(additive: Float[Array, " D"], gradients: Any) -> Multiplicative:
    """The weights of least norm that make an additive noise: ``W = 1/N + pinv(G^T) v``.

    The way back from `to_additive` is exact if the noise is in the span of the gradients. It finds
    the same weights only if these are independent, N <= D (so "Gaussian noise, hence Gaussian
    weights" needs that too); else other weights make the same noise.

    Args:
        additive: v, [D], in the order of `flatten`.
        gradients: a gradient matrix, [N, D] or a pytree with leaves ``[N, *parameter shape]``.

    Raises:
        ValueError: if `additive` is not a vector of length D.
    """
    rows = _matrices.flatten(gradients)
    num_examples, dim = rows.shape
    if jnp.shape(additive) != (dim,):
        raise ValueError(
            f"additive must be a vector of length D = {dim}, got shape {jnp.shape(additive)}."
        )
    additive = jnp.asarray(additive, rows.dtype)
    deviations = jnp.linalg.lstsq(rows.T, additive)[0]
    residual = jnp.linalg.norm(_apply(deviations, rows) - additive)
    norm = jnp.linalg.norm(additive)
    relative = residual / jnp.where(norm > 0, norm, 1)
    return Multiplicative(Weights(1 / num_examples + deviations, None, num_examples), relative)


def _apply(deviations: Float[Array, " N"], rows: Float[Array, "N D"]) -> Float[Array, " D"]:
    return jnp.matmul(deviations, rows, precision=jax.lax.Precision.HIGHEST)


def _square(matrix: Any) -> Float[Array, "D D"]:
    shape = jnp.shape(matrix)
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(f"matrix must be square, got shape {shape}.")
    dtype = jnp.result_type(matrix)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"matrix must be floating point, got {dtype}.")
    return _widen(matrix)


def _widen(values: Any) -> Float[Array, "..."]:
    """In float32 or wider: factorisations and normals have no use for less."""
    values = jnp.asarray(values)
    return values.astype(_dtypes.accumulator(values.dtype))
