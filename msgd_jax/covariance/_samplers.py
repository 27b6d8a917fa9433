"""Additive Gaussian noise with a given covariance, and conversions between it and weights."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key

from msgd_jax import _dtypes, _validate
from msgd_jax import loss as loss_lib
from msgd_jax._streams import Stream, derive
from msgd_jax._typing import Params, Step
from msgd_jax.covariance import _matrices
from msgd_jax.noise import Weights

_HIGHEST = jax.lax.Precision.HIGHEST


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GaussianSampler:
    """Additive Gaussian noise with mean 0: a factor of the covariance times white noise.

    Attributes:
        factor: [D, k] with covariance ``factor @ factor.T``; or [D], the standard deviations of
            independent components.
    """

    factor: Float[Array, "D *k"]

    def sample(self, key: Key[Array, ""], step: Step) -> Float[Array, " D"]:
        """Draws the noise of one step, in the order of `flatten`; a pure function of (key, step).

        Args:
            key: a typed PRNG key, the same for the whole run. You may use it for other things too:
                the noise is independent of what `jax.random` draws from it.
            step: the number of the step, from 0 to 2^31 - 1, of any integer type; it may be traced.

        Raises:
            TypeError: if `key` is not a typed PRNG key, or `step` is not an integer.
            ValueError: if `key` is an array of keys, or `step` is out of range or not a scalar.
        """
        _validate.prng_key("key", key)
        own = derive(key, Stream.ADDITIVE, _validate.step(step))
        white = jax.random.normal(own, self.factor.shape[-1:], self.factor.dtype)
        if self.factor.ndim == 1:
            return self.factor * white
        return jnp.matmul(self.factor, white, precision=_HIGHEST)


def svd_sampler(matrix: Float[Array, "D D"]) -> GaussianSampler:
    """The usual sampler, described in the paper's section 5.1: ``U Lambda^(1/2) eps``, by SVD.

    It takes O(D^3) time and O(D^2) memory, again each time the parameters change.

    Args:
        matrix: a covariance, [D, D]; `sgd_covariance` / b for the noise of SGD.

    Raises:
        ValueError: if `matrix` is not a square matrix of floating-point numbers, or, outside of
            jit, it is not a covariance: not finite, not symmetric, or with an eigenvalue below 0,
            each up to the rounding of its type (7.6e-6 sqrt(D) of its scale in float32). Under jit
            values cannot be checked, and eigenvalues below 0 count as their absolute values.
    """
    given, matrix = matrix, _symmetric(matrix)
    vectors, values, _ = jnp.linalg.svd(matrix)
    if not isinstance(matrix, Tracer) and matrix.size:
        # The left and right vectors of a covariance agree, so U Lambda U^T must be the matrix.
        rebuilt = jnp.matmul(vectors * values[None], vectors.T, precision=_HIGHEST)
        error = float(_dtypes.norm(rebuilt - matrix))
        if error > _tolerance(given) * float(values[0]):
            _semidefinite(given, jnp.linalg.eigvalsh(matrix))
    return GaussianSampler(vectors * jnp.sqrt(values)[None])


def eigh_sampler(matrix: Float[Array, "D D"]) -> GaussianSampler:
    """Like `svd_sampler`, by the symmetric eigendecomposition, which is several times cheaper.

    Args:
        matrix: a covariance, [D, D]. Eigenvalues that are below 0 by rounding count as 0.

    Raises:
        ValueError: as `svd_sampler`. Under jit every eigenvalue below 0 counts as 0.
    """
    given, matrix = matrix, _symmetric(matrix)
    values, vectors = jnp.linalg.eigh(matrix)
    _semidefinite(given, values)
    return GaussianSampler(vectors * jnp.sqrt(jnp.maximum(values, 0))[None])


def cholesky_sampler(
    matrix: Float[Array, "D D"], *, jitter: float | None = None
) -> GaussianSampler:
    """Like `svd_sampler`, by a Cholesky factorisation, which is cheaper but needs a regular matrix.

    Covariances of gradients are singular if N <= D, so a multiple of the identity is added. Whether
    the matrix is a covariance is checked by factoring the sum, so a negative eigenvalue is not
    found if the added multiple is larger. The factor of the matrix 0 is 0.

    Args:
        matrix: a covariance, [D, D].
        jitter: the number added to the diagonal, as a fraction of the trace; None for 8 times the
            rounding of the type. It raises the total variance by D times that fraction (by 1 % at
            D = 11,000 in float32).

    Raises:
        TypeError: if `jitter` is not a number.
        ValueError: if `matrix` is not a square matrix of floating-point numbers, `jitter` is
            negative, or, outside of jit, `matrix` is not finite, not symmetric up to rounding, or
            the factorisation fails; under jit the factor is NaN then.
    """
    given, matrix = matrix, _symmetric(matrix)
    if jitter is None:
        jitter = 8 * float(jnp.finfo(matrix.dtype).eps)
    jitter = _validate.finite_nonnegative("jitter", jitter)
    added = jitter * jnp.trace(matrix) * jnp.eye(matrix.shape[0], dtype=matrix.dtype)
    # The jitter is relative to the trace, so it cannot make the matrix 0 regular.
    factor = jnp.where((matrix == 0).all(), 0, jnp.linalg.cholesky(matrix + added))
    if not isinstance(factor, Tracer) and not bool(jnp.isfinite(factor).all()):
        _semidefinite(given, jnp.linalg.eigvalsh(matrix))
        raise ValueError(
            f"matrix is singular up to rounding even with jitter = {jitter} of its trace: raise "
            "jitter, or use eigh_sampler."
        )
    return GaussianSampler(factor)


def diagonal_sampler(variances: Float[Array, " D"]) -> GaussianSampler:
    """Independent components, a diagonal approximation that is often used for comparison.

    Args:
        variances: [D], such as `jax.flatten_util.ravel_pytree` of a `diagonal`. Variances that are
            below 0 by rounding count as 0.

    Raises:
        ValueError: if `variances` is not a vector of floating-point numbers, or, outside of jit, is
            not finite or below 0. Under jit every variance below 0 counts as 0.
    """
    _matrices.numbers("variances", variances)
    if jnp.ndim(variances) != 1 or not jnp.issubdtype(jnp.result_type(variances), jnp.floating):
        raise ValueError(
            "variances must be a vector of floating-point numbers, got shape "
            f"{jnp.shape(variances)} and dtype {jnp.result_type(variances)}."
        )
    given, variances = variances, _dtypes.wide(variances)
    _finite("variances", variances)
    if not isinstance(variances, Tracer) and variances.size:
        smallest = float(variances.min())
        if smallest < -_rounding(given) * float(jnp.abs(variances).max()):
            raise ValueError(
                f"variances must be at least 0, got {smallest} at position "
                f"{int(variances.argmin())}."
            )
    return GaussianSampler(jnp.sqrt(jnp.maximum(variances, 0)))


def gradient_sampler(
    losses: loss_lib.LossVector, params: Params, law: _matrices.CovarianceLaw
) -> GaussianSampler:
    """The product of white noise in R^N with the explicit gradient matrix, without a D x D matrix.

    The noise is Gaussian with the covariance that `law` gives, even if `law` is not Gaussian.

    Args:
        losses: the loss vector.
        params: a pytree of floating-point arrays.
        law: as in `noise_covariance`.

    Raises:
        TypeError, ValueError: as `noise_covariance`; outside of jit also if the gradients are not
            finite.
    """
    factor = _matrices.root_of(losses, params, law)
    _finite("the gradients of losses", factor)
    return GaussianSampler(factor.T)


class Multiplicative(NamedTuple):
    """Weights that make an additive noise.

    Attributes:
        weights: W of all examples, [N]; ``grad(L . W)`` is the mean gradient plus the noise.
        residual: the Euclidean norm of the part of the noise that no weights can make, relative to
            that of the noise: 0 up to rounding if the noise is in the span of the gradients.
    """

    weights: Weights
    residual: Float[Array, ""]


def to_additive(
    losses: loss_lib.LossVector, params: Params, weights: Weights
) -> Float[Array, " D"]:
    """The additive noise (A-noise) that weights make: ``G^T (W - 1/N)`` (section 2 of the paper).

    It takes one forward and one backward pass, without a gradient matrix.

    Args:
        losses: the loss vector.
        params: a pytree of floating-point arrays.
        weights: one draw of a law.

    Returns:
        The noisy gradient minus the mean gradient, [D], in the order of `flatten`.

    Raises:
        TypeError: if `losses` is not a `loss.LossVector`, a parameter is not floating point, or
            `weights` is not a `noise.Weights`.
        ValueError: if the weights are for another number of examples, or are several draws (use
            `jax.vmap`).
    """
    loss_lib.checked(losses, params)
    if not isinstance(weights, Weights):
        raise TypeError(f"weights must be a noise.Weights, got {_validate.shown(weights)}.")
    if weights.values.ndim != 1:
        raise ValueError(
            f"weights must be one draw, got weights.values of shape {weights.values.shape}; use "
            "jax.vmap for several draws at once."
        )
    if weights.num_examples != losses.num_examples:
        raise ValueError(
            f"weights are for num_examples = {weights.num_examples}, but the data have "
            f"{losses.num_examples} examples."
        )
    deviations = weights.dense() - 1 / weights.num_examples
    gradient = losses.gradient(params, deviations)
    return _matrices.flatten(jax.tree.map(lambda leaf: leaf[None], gradient))[0]


def to_multiplicative(
    losses: loss_lib.LossVector, params: Params, additive: Float[Array, " D"]
) -> Multiplicative:
    """The weights of least norm that make an additive noise: ``W = 1/N + pinv(G^T) v``.

    It is the exact inverse of `to_additive` if the gradients are linearly independent, for which
    N <= D is needed. Otherwise other weights make the same noise, so Gaussian noise need not come
    from Gaussian weights. The noise is made exactly if it is in the span of the gradients.

    Args:
        losses: the loss vector.
        params: a pytree of floating-point arrays.
        additive: v, [D], in the order of `flatten`.

    Raises:
        TypeError: if `losses` is not a `loss.LossVector`, or a parameter is not floating point.
        ValueError: if `additive` is not a vector of length D.
    """
    matrix = _matrices.matrix_of(losses, params)
    num_examples, dim = matrix.shape
    if jnp.shape(additive) != (dim,):
        raise ValueError(
            f"additive must be a vector of length D = {dim}, got shape {jnp.shape(additive)}."
        )
    additive = jnp.asarray(additive, matrix.dtype)
    deviations = jnp.linalg.lstsq(matrix.T, additive)[0]
    made = jnp.matmul(deviations, matrix, precision=_HIGHEST)
    residual, norm = _dtypes.norm(made - additive), _dtypes.norm(additive)
    relative = residual / jnp.where(norm > 0, norm, 1)
    return Multiplicative(Weights(1 / num_examples + deviations, None, num_examples), relative)


def _symmetric(matrix: ArrayLike) -> Float[Array, "D D"]:
    """The matrix in float32 or wider; raises unless it is square, finite and symmetric."""
    given, matrix = matrix, _square(matrix)
    _finite("matrix", matrix)
    if not isinstance(matrix, Tracer) and matrix.size:
        difference, largest = jnp.abs(matrix - matrix.T), float(jnp.abs(matrix).max())
        if float(difference.max()) > _rounding(given) * largest:
            i, j = divmod(int(difference.argmax()), matrix.shape[0])
            raise ValueError(
                "matrix must be symmetric up to rounding to be a covariance, got "
                f"{float(matrix[i, j])} at ({i}, {j}) and {float(matrix[j, i])} at ({j}, {i})."
            )
    return matrix


def _semidefinite(given: ArrayLike, eigenvalues: Float[Array, " D"]) -> None:
    """Raises ValueError unless all eigenvalues are at least 0 up to rounding, or are traced."""
    if isinstance(eigenvalues, Tracer) or not eigenvalues.size:
        return
    smallest, largest = float(eigenvalues.min()), float(jnp.abs(eigenvalues).max())
    if smallest < -_tolerance(given) * largest:
        raise ValueError(
            "matrix must be positive semi-definite to be a covariance: smallest eigenvalue "
            f"{smallest}, largest {float(eigenvalues.max())}. (A covariance computed as a "
            "difference may have lost all its digits: see form='centred' of sgd_covariance.)"
        )


def _finite(name: str, values: Float[Array, "..."]) -> None:
    if not isinstance(values, Tracer) and not bool(jnp.isfinite(values).all()):
        count = int((~jnp.isfinite(values)).sum())
        raise ValueError(f"{name} must be finite, got {count} entries that are not.")


def _rounding(given: ArrayLike) -> float:
    """The rounding error of an entry of a computed covariance, as a fraction of the largest entry.

    Sums of N products in float32 or wider have an error of about sqrt(N) roundings, and one more if
    the result was rounded to a narrow type.
    """
    dtype = jnp.result_type(given)
    wide = _dtypes.accumulator(dtype)
    rounded = 0.0 if dtype == wide else float(jnp.finfo(dtype).eps)
    return 64 * float(jnp.finfo(wide).eps) + rounded


def _tolerance(given: ArrayLike) -> float:
    """The rounding error of an eigenvalue: sqrt(D) times that of an entry, for D^2 entries."""
    return math.sqrt(jnp.shape(given)[0]) * _rounding(given)


def _square(matrix: ArrayLike) -> Float[Array, "D D"]:
    _matrices.numbers("matrix", matrix)
    shape = jnp.shape(matrix)
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(f"matrix must be square, got shape {shape}.")
    dtype = jnp.result_type(matrix)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"matrix must be floating point, got {dtype}.")
    return _dtypes.wide(matrix)
