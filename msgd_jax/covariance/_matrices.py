"""The gradient matrix, the covariances made of it, and their exact spectrum."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from msgd_jax import _dtypes, _narrow, _validate
from msgd_jax.loss import LossVectorFn
from msgd_jax.noise import Exchangeable, MNoise

FORMS = ("centred", "definition")
NAMED = ("fisher", "sgd_covariance")


def gradient_matrix(
    loss_vector_fn: LossVectorFn, params: Any, data: Any, *, microbatch_size: int | None = None
) -> Any:
    """The gradient of every example's loss, one row an example (the paper's nabla L, transposed).

    Takes N times the memory of the parameters: for few parameters or few examples. With
    `microbatch_size` it is compiled anew on each call, and freed after it: to call it again, put it
    under `jax.jit`.

    Args:
        loss_vector_fn: ``loss_vector_fn(params, batch)`` returns the losses of the batch, [B]. It
            is given batches of one example, so losses must not depend on each other.
        params: a pytree of floating-point arrays.
        data: a pytree of arrays [N, ...].
        microbatch_size: examples whose gradients are computed at once; None for all.

    Returns:
        A pytree like `params`, with leaves ``[N, *parameter shape]``.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Example:
        >>> from msgd_jax import covariance, loss
        >>> losses = loss.per_example(lambda theta, x: (theta @ x) ** 2 / 2)
        >>> x = jnp.asarray([[1.0, 0.0], [0.0, 2.0]])
        >>> gradients = covariance.gradient_matrix(losses, jnp.asarray([1.0, 1.0]), x)
        >>> gradients.tolist(), covariance.fisher(gradients).tolist()
        ([[1.0, 0.0], [0.0, 4.0]], [[0.5, 0.0], [0.0, 8.0]])
    """
    _validate.function("loss_vector_fn", loss_vector_fn)
    _validate.floating_params(params)
    _validate.leading_axis("data", data)
    if microbatch_size is not None:
        _validate.positive_int("microbatch_size", microbatch_size)

    def one_gradient(params: Any, example: Any) -> Any:
        batch = jax.tree.map(lambda x: x[None], example)

        def loss_of_one(params: Any) -> Float[Array, ""]:
            losses = loss_vector_fn(params, batch)
            _validate.loss_vector(losses, 1)
            return losses[0]

        # An example may use a parameter many times, as a text does a word.
        return jax.grad(_narrow.wide_sums(loss_of_one, params)[0])(params)

    if microbatch_size is None:
        return jax.vmap(one_gradient, in_axes=(None, 0))(params, data)

    def in_runs(params: Any, data: Any) -> Any:
        one = functools.partial(one_gradient, params)
        return jax.lax.map(one, data, batch_size=microbatch_size)

    # A program of this call: that of a loop outside of jit would be kept for good.
    return jax.jit(in_runs)(params, data)


def flatten(gradients: Any) -> Float[Array, "N D"]:
    """The gradient matrix as one array, in float32 or wider.

    Args:
        gradients: a pytree with leaves ``[N, *parameter shape]``.

    Returns:
        Array of shape [N, D]; a row is `jax.flatten_util.ravel_pytree` of one example's gradient.

    Raises:
        TypeError, ValueError: if the leaves are not floating point or disagree on N.
    """
    numbers("gradients", gradients)
    _validate.floating_params(gradients, name="gradients")
    num_examples = _validate.leading_axis("gradients", gradients)
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(gradients)]
    dtype = _dtypes.accumulator(*(leaf.dtype for leaf in leaves))
    rows = [leaf.reshape(num_examples, -1).astype(dtype) for leaf in leaves]
    return jnp.concatenate(rows, axis=1)


def fisher(gradients: Any) -> Float[Array, "D D"]:
    """The empirical Fisher matrix F = sum_i g_i g_i^T / N, dense.

    Args:
        gradients: a gradient matrix, [N, D] or a pytree with leaves ``[N, *parameter shape]``.
    """
    rows = flatten(gradients)
    return _product(rows.T, rows) / rows.shape[0]


def sgd_covariance(gradients: Any, *, form: str = "centred") -> Float[Array, "D D"]:
    """The covariance S of one random example's gradient (Sigma_sgd), dense.

    Args:
        gradients: a gradient matrix, [N, D] or a pytree with leaves ``[N, *parameter shape]``.
        form: "centred" for the paper's Eq. 15, the product of centred gradients, which is always
            positive semi-definite; "definition" for F - grad L grad L^T, which cancels where the
            mean gradient is large.

    Raises:
        ValueError: if `form` is neither.
    """
    _named("form", form, FORMS)
    rows = flatten(gradients)
    mean = rows.mean(0)
    if form == "definition":
        return fisher(rows) - jnp.outer(mean, mean)
    centred = rows - mean[None]
    return _product(centred.T, centred) / rows.shape[0]


def noise_covariance(noise: MNoise | Exchangeable | str, gradients: Any) -> Float[Array, "D D"]:
    """The covariance of the noisy gradient ``grad(L . W)``, exact and dense.

    It is ``alpha G^T G + beta (G^T 1)(G^T 1)^T``, computed from centred gradients so that nothing
    cancels. It is the covariance of one step. Where steps depend on each other, as those of
    `noise.random_reshuffling`, each by itself has it, exactly, but their sum has not the sum of
    these (see `noise.MNoise.covariance_between`).

    Args:
        noise: an M-noise or its covariance (or "fisher", "sgd_covariance": F and S).
        gradients: a gradient matrix, [N, D] or a pytree with leaves ``[N, *parameter shape]``.

    Raises:
        TypeError, ValueError: if `noise` is not as described, is for another number of examples, or
            is no covariance (negative somewhere).
    """
    factor = root_of("noise_covariance", noise, gradients)
    return _product(factor.T, factor)


def diagonal(noise: MNoise | Exchangeable | str, gradients: Any) -> Float[Array, " D"]:
    """The diagonal of `noise_covariance`, without the matrix.

    Args:
        noise: as in `noise_covariance`.
        gradients: a gradient matrix, [N, D] or a pytree with leaves ``[N, *parameter shape]``.

    Raises:
        TypeError, ValueError: as `noise_covariance`.
    """
    return jnp.square(root_of("diagonal", noise, gradients)).sum(0)


class Spectrum(NamedTuple):
    """The eigenvalues of a covariance that can differ from 0, and their eigenvectors.

    Attributes:
        eigenvalues: [k], descending, k = min(N, D); the other D - k are 0.
        eigenvectors: [k, D], one a row, orthonormal, in the order of `flatten`; rows whose
            eigenvalue is 0 up to rounding are 0, since nothing determines them.
    """

    eigenvalues: Float[Array, " k"]
    eigenvectors: Float[Array, "k D"]


def spectrum(noise: MNoise | Exchangeable | str, gradients: Any) -> Spectrum:
    """The exact spectrum of a covariance, from an N x N matrix where N < D.

    A covariance A^T A has the eigenvalues of the Gram matrix A A^T: no D x D matrix is formed where
    there are more parameters than examples. Eigenvalues are exact to rounding relative to the
    largest.

    Args:
        noise: as in `noise_covariance`.
        gradients: a gradient matrix, [N, D] or a pytree with leaves ``[N, *parameter shape]``.

    Raises:
        TypeError, ValueError: as `noise_covariance`.

    Example:
        >>> from msgd_jax import covariance, noise
        >>> gradients = jnp.asarray([[1.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
        >>> result = covariance.spectrum(noise.fisher(2, batch_size=1), gradients)
        >>> [round(float(value), 6) for value in result.eigenvalues]
        [8.0, 0.5]
    """
    factor = root_of("spectrum", noise, gradients)
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


def weight_eigenvalues(noise: Any, num_examples: int) -> tuple[float, float]:
    """The two eigenvalues of Cov(W), checked: across the all-ones vector, and along it."""
    return _moments(noise, num_examples).eigenvalues(num_examples)


def check_noise(noise: Any, order: str) -> None:
    """Raises unless `noise` may stand for a covariance of weights, and says the order if not."""
    if isinstance(noise, str):
        _named("noise", noise, NAMED)
    elif not isinstance(noise, (MNoise, Exchangeable)):
        raise TypeError(
            "noise must be a noise.MNoise, a noise.Exchangeable, 'fisher' or 'sgd_covariance', got "
            f"{_validate.shown(noise)}; the order is {order}."
        )


def numbers(name: str, tree: Any) -> None:
    """Raises TypeError, naming the leaf, unless all leaves are arrays or numbers."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not isinstance(leaf, (bool, int, float, complex)) and not hasattr(leaf, "dtype"):
            where = jax.tree_util.keystr(path)
            raise TypeError(f"{name}{where} must be an array, got {_validate.shown(leaf)}.")


def root_of(caller: str, noise: Any, gradients: Any) -> Float[Array, "N D"]:
    """A with A^T A the covariance: the root of Cov(W), which has two eigenvalues, times G."""
    order = f"{caller}(noise, gradients)"
    check_noise(noise, order)
    if isinstance(gradients, (MNoise, Exchangeable, str)):
        raise TypeError(
            "gradients must be an array or a pytree of arrays, got "
            f"{_validate.shown(gradients)}; the order is {order}."
        )
    rows = flatten(gradients)
    across, along = weight_eigenvalues(noise, rows.shape[0])
    mean = rows.mean(0)[None]
    return math.sqrt(across) * (rows - mean) + math.sqrt(along) * mean


def _named(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        listed = ", ".join(map(repr, allowed))
        raise ValueError(f"{name} must be one of {listed}, got {_validate.shown(value)}.")


def _moments(noise: Any, num_examples: int) -> Exchangeable:
    """The covariance of the weights that `noise` stands for."""
    if isinstance(noise, str):
        off_diagonal = 0.0 if noise == "fisher" else -1 / num_examples**2
        return Exchangeable(1 / num_examples + off_diagonal, off_diagonal)
    if isinstance(noise, MNoise):
        if noise.num_examples != num_examples:
            raise ValueError(
                f"noise is for num_examples = {noise.num_examples}, but the gradients are of "
                f"{num_examples} examples."
            )
        return noise.covariance
    return noise


def _product(left: Float[Array, "i j"], right: Float[Array, "j k"]) -> Float[Array, "i k"]:
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)
