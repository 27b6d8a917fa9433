"""Covariances computed from the gradients of all examples, and their exact spectrum."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from msgd_jax import _dtypes, _laws, _mesh, _validate
from msgd_jax import loss as loss_lib
from msgd_jax._typing import Data, Gradients, Params, PerExampleGradients, PyTree
from msgd_jax.noise import Exchangeable, MNoise

FORMS = ("centred", "definition")
NAMED = ("fisher", "sgd_covariance")

CovarianceLaw = MNoise | Exchangeable | str
"""A law, its two moments, or the name of a covariance: "fisher" for F, "sgd_covariance" for S."""


def flatten(gradients: PerExampleGradients) -> Float[Array, "N D"]:
    """A gradient matrix as one array, in float32 or wider.

    Args:
        gradients: a pytree with leaves ``[N, *parameter shape]``, from
            `loss.LossVector.gradient_matrix`.

    Returns:
        Array of shape [N, D]; entry i is `jax.flatten_util.ravel_pytree` of example i's gradient.

    Raises:
        TypeError: if a leaf is not floating point.
        ValueError: if there are no leaves, or their leading axes differ.
    """
    numbers("gradients", gradients)
    _validate.floating_params(gradients, name="gradients")
    num_examples = _validate.leading_axis("gradients", gradients)
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(gradients)]
    dtype = _dtypes.accumulator(*(leaf.dtype for leaf in leaves))
    blocks = [leaf.reshape(num_examples, -1).astype(dtype) for leaf in leaves]
    return jnp.concatenate(blocks, axis=1)


def fisher(losses: loss_lib.LossVector, params: Params) -> Float[Array, "D D"]:
    """The empirical Fisher matrix ``F = sum_i g_i g_i^T / N``, dense.

    Args:
        losses: the loss vector.
        params: a pytree of floating-point arrays.

    Raises:
        TypeError, ValueError: as `noise_covariance`.

    Example:
        >>> from msgd_jax import covariance, loss
        >>> fn = loss.per_example(lambda theta, x: (theta @ x) ** 2 / 2)
        >>> losses = loss.LossVector(fn, jnp.asarray([[1.0, 0.0], [0.0, 2.0]]))
        >>> covariance.fisher(losses, jnp.asarray([1.0, 1.0])).tolist()
        [[0.5, 0.0], [0.0, 8.0]]
    """
    matrix = matrix_of(losses, params)
    return _product(matrix.T, matrix) / matrix.shape[0]


def sgd_covariance(
    losses: loss_lib.LossVector, params: Params, *, form: str = "centred"
) -> Float[Array, "D D"]:
    """The covariance S of one random example's gradient (Sigma_sgd), dense.

    Args:
        losses: the loss vector.
        params: a pytree of floating-point arrays.
        form: "centred" for the paper's Eq. 15, the product of centred gradients, which is always
            positive semi-definite; "definition" for ``F - grad L grad L^T``, which cancels where
            the mean gradient is large.

    Raises:
        TypeError: as `noise_covariance`.
        ValueError: as `noise_covariance`, or if `form` is neither "centred" nor "definition".
    """
    _named("form", form, FORMS)
    matrix = matrix_of(losses, params)
    mean = matrix.mean(0)
    if form == "definition":
        return _product(matrix.T, matrix) / matrix.shape[0] - jnp.outer(mean, mean)
    centred = matrix - mean[None]
    return _product(centred.T, centred) / matrix.shape[0]


def noise_covariance(
    losses: loss_lib.LossVector, params: Params, law: CovarianceLaw
) -> Float[Array, "D D"]:
    """The covariance of the noisy gradient ``grad(L . W)``, exact and dense.

    It is ``alpha G^T G + beta (G^T 1)(G^T 1)^T``, computed from centred gradients so that nothing
    cancels. It is the covariance of a single step. If steps depend on each other, as with
    `noise.random_reshuffling`, the covariance of their sum is not the sum of their covariances (see
    `noise.MNoise.covariance_between`).

    Args:
        losses: the loss vector.
        params: a pytree of floating-point arrays.
        law: the law of the weights, its `noise.Exchangeable`, "fisher" for F, or "sgd_covariance"
            for S.

    Raises:
        TypeError: if `losses` is not a `loss.LossVector`, a parameter is not floating point, or
            `law` is none of these.
        ValueError: if `law` is for another number of examples, states no covariance, or is an
            `Exchangeable` with a negative eigenvalue.
    """
    factor = root_of(losses, params, law)
    return _product(factor.T, factor)


def diagonal(losses: loss_lib.LossVector, params: Params, law: CovarianceLaw) -> Gradients:
    """The diagonal of `noise_covariance`: the variance of each entry of the noisy gradient.

    One micro-batch of per-example gradients is in memory at a time. Each eager call compiles a
    program and frees it afterwards: put the function under `jax.jit` to call it more than once.

    Args:
        losses: the loss vector.
        params: a pytree of floating-point arrays.
        law: as in `noise_covariance`.

    Returns:
        A pytree like `params`, in float32 or wider.

    Raises:
        TypeError, ValueError: as `noise_covariance`.
    """
    loss_lib.checked(losses, params)
    across, along = weight_eigenvalues(law, losses.num_examples)

    def variances(params: Params, data: Data) -> Gradients:
        own = losses.replace(data=data)
        # With equal eigenvalues (F), the variances are sums of squares. Otherwise gradients are
        # centred first, since a difference of large squares would be mostly rounding.
        if across == along:
            mean = jax.tree.map(lambda p: jnp.zeros_like(_dtypes.wide(p)), params)
        else:
            mean = jax.tree.map(_dtypes.wide, own.gradient(params))

        def squares(
            gradients: PerExampleGradients, weights: Float[Array, " B"], mean: Gradients
        ) -> Gradients:
            def of_leaf(gradients: Array, mean: Array) -> Array:
                deviations = gradients.astype(mean.dtype) - mean[None]
                return jnp.tensordot(weights.astype(mean.dtype), jnp.square(deviations), 1)

            return jax.tree.map(of_leaf, gradients, mean)

        total = own.sum_over_gradients(squares, params, mean)
        size = losses.num_examples
        return jax.tree.map(lambda t, m: across * t + along * size * jnp.square(m), total, mean)

    # The loss function is not an argument, which jax would keep: this program is freed at the end.
    return jax.jit(variances)(params, losses.data)


class Spectrum(NamedTuple):
    """The eigenvalues of a covariance that can differ from 0, and their eigenvectors.

    Attributes:
        eigenvalues: [k], in descending order, k = min(N, D); the other D - k eigenvalues are 0.
        eigenvectors: [k, D], one per eigenvalue, orthonormal, with entries in the order of
            `flatten`; where the eigenvalue is 0 up to rounding, the vector is not determined and is
            set to 0.
    """

    eigenvalues: Float[Array, " k"]
    eigenvectors: Float[Array, "k D"]


def spectrum(losses: loss_lib.LossVector, params: Params, law: CovarianceLaw) -> Spectrum:
    """The exact spectrum of a covariance, from an N x N matrix if N < D.

    A covariance ``A^T A`` has the nonzero eigenvalues of the Gram matrix ``A A^T``, so no D x D
    matrix is formed if there are more parameters than examples. Eigenvalues are exact up to
    rounding relative to the largest one.

    Args:
        losses: the loss vector.
        params: a pytree of floating-point arrays.
        law: as in `noise_covariance`.

    Raises:
        TypeError, ValueError: as `noise_covariance`.

    Example:
        >>> from msgd_jax import covariance, loss, noise
        >>> gradients = jnp.asarray([[1.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
        >>> losses = loss.LossVector(lambda theta, gradient: gradient @ theta, gradients)
        >>> result = covariance.spectrum(losses, jnp.zeros(3), noise.fisher(2, batch_size=1))
        >>> [round(float(value), 6) for value in result.eigenvalues]
        [8.0, 0.5]
    """
    factor = root_of(losses, params, law)
    num_examples, dim = factor.shape
    through_gram = num_examples < dim
    matrix = _product(factor, factor.T) if through_gram else _product(factor.T, factor)
    values, vectors = jnp.linalg.eigh(matrix)
    values, vectors = jnp.maximum(values[::-1], 0), vectors[:, ::-1].T
    floor = values[0] * max(num_examples, dim) * jnp.finfo(values.dtype).eps
    if through_gram:
        lengths = jnp.sqrt(jnp.where(values > floor, values, 1))
        vectors = _product(vectors, factor) / lengths[:, None]
    return Spectrum(values, jnp.where(values[:, None] > floor, vectors, 0))


def weight_eigenvalues(law: CovarianceLaw, num_examples: int) -> tuple[float, float]:
    """The two eigenvalues of Cov(W), after checks: across the all-ones vector, and along it."""
    if isinstance(law, str):
        _named("law", law, NAMED)
        off_diagonal = 0.0 if law == "fisher" else -1 / num_examples**2
        law = Exchangeable(1 / num_examples + off_diagonal, off_diagonal)
    if not isinstance(law, (MNoise, Exchangeable)):
        raise TypeError(
            "law must be a noise.MNoise, a noise.Exchangeable, 'fisher' or 'sgd_covariance', got "
            f"{_validate.shown(law)}."
        )
    return _laws.eigenvalues("law", law, num_examples)


def numbers(name: str, tree: PyTree) -> None:
    """Raises TypeError, naming the leaf, unless all leaves are arrays or numbers."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not isinstance(leaf, (bool, int, float, complex)) and not hasattr(leaf, "dtype"):
            where = _validate.place(name, path)
            raise TypeError(f"{where} must be an array, got {_validate.shown(leaf)}.")


def matrix_of(losses: loss_lib.LossVector, params: Params) -> Float[Array, "N D"]:
    """The gradient matrix as one array, [N, D]."""
    matrix = loss_lib.checked(losses, params).gradient_matrix(params)
    return flatten(jax.tree.map(_mesh.gathered, matrix))


def root_of(losses: loss_lib.LossVector, params: Params, law: CovarianceLaw) -> Float[Array, "N D"]:
    """A with ``A^T A`` the covariance: the root of Cov(W), which has two eigenvalues, times G."""
    loss_lib.checked(losses, params)
    across, along = weight_eigenvalues(law, losses.num_examples)
    matrix = matrix_of(losses, params)
    mean = matrix.mean(0)[None]
    return math.sqrt(across) * (matrix - mean) + math.sqrt(along) * mean


def _named(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        listed = ", ".join(map(repr, allowed))
        raise ValueError(f"{name} must be one of {listed}, got {_validate.shown(value)}.")


def _product(left: Float[Array, "i j"], right: Float[Array, "j k"]) -> Float[Array, "i k"]:
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)
