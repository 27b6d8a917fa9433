"""Eigenvalues and spectral densities of symmetric operators, by Lanczos' iteration."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, Key

from msgd_jax import _dtypes, _validate
from msgd_jax import loss as loss_lib
from msgd_jax._streams import Stream, derive
from msgd_jax._typing import Data, Gradients, Params, PositiveInt, Scalar
from msgd_jax.measure import _estimates, _hessian

_HIGHEST = jax.lax.Precision.HIGHEST


class Ritz(NamedTuple):
    """The results of m steps of Lanczos' iteration for a symmetric operator.

    Attributes:
        values: the Ritz values in descending order, [m]. The first is never above the largest
            eigenvalue, and the last is never below the smallest.
        residuals: for each value, the distance within which there is an eigenvalue, [m]; the
            rounding of the products is not counted.
        weights: the weight of each value in the spectral measure of the start, [m]; they add up to
            1.
    """

    values: Float[Array, "*starts m"]
    residuals: Float[Array, "*starts m"]
    weights: Float[Array, "*starts m"]


def lanczos(
    product: Callable[[Gradients], Gradients],
    params: Params,
    key: Key[Array, ""],
    *,
    num_steps: PositiveInt,
    start: Gradients | None = None,
) -> Ritz:
    """Lanczos' iteration with full reorthogonalisation, for any symmetric linear function.

    It finds the ends of the spectrum first: a few dozen steps give the largest and the smallest
    eigenvalues, and `Ritz.residuals` says how accurately. (Power iteration finds only the
    eigenvalue of the largest modulus, which may be negative for a Hessian.) If the iteration has
    used all directions that it can reach from its start, it continues in a new random direction, so
    that it also works for repeated eigenvalues and singular operators.

    It costs `num_steps` products, and memory for as many vectors like the parameters.

    Args:
        product: a symmetric linear function of pytrees like `params`: `hessian_product`, or the
            ``mv`` of an operator of `covariance`.
        params: the parameters, whose shapes and dtypes are used.
        key: a typed PRNG key, for the start and for new directions.
        num_steps: m, at most the number of parameters.
        start: the first direction, like `params`; None for a random one, which almost surely is not
            orthogonal to any eigenvector.

    Returns:
        Ritz values in float32 or wider.

    Raises:
        TypeError: if `product` is not a function, or `key` is not a typed PRNG key.
        ValueError: if `num_steps` is not from 1 to the number of parameters, or `start` is not like
            `params`.
    """
    _validate.function("product", product)
    _validate.floating_params(params)
    _validate.prng_key("key", key)
    params = jax.tree.map(jnp.asarray, params)
    wide = _dtypes.accumulator(*(leaf.dtype for leaf in jax.tree.leaves(params)))
    like, unravel = ravel_pytree(params)
    num_steps = _validate.positive_int("num_steps", num_steps, maximum=like.size)
    if start is not None:
        _validate.same_kind("lanczos", "start", params, start)

    def flat_product(vector: Float[Array, " D"]) -> Float[Array, " D"]:
        image = product(unravel(vector.astype(like.dtype)))
        return ravel_pytree(image)[0].astype(wide)

    def random(number: Int[Array, ""] | int) -> Float[Array, " D"]:
        own = derive(key, Stream.PROBES, number)
        return jax.random.normal(own, like.shape, wide)

    first = random(0) if start is None else ravel_pytree(start)[0].astype(wide)
    diagonal, off_diagonal = _tridiagonal(flat_product, first, random, num_steps)
    matrix = jnp.diag(diagonal) + jnp.diag(off_diagonal[:-1], 1) + jnp.diag(off_diagonal[:-1], -1)
    # Residuals and weights are the last and first entries of the tridiagonal's eigenvectors.
    values, vectors = jnp.linalg.eigh(matrix)
    return Ritz(
        values[::-1],
        off_diagonal[-1] * jnp.abs(vectors[-1, ::-1]),
        jnp.square(vectors[0, ::-1]),
    )


def _tridiagonal(
    product: Callable[[Float[Array, " D"]], Float[Array, " D"]],
    start: Float[Array, " D"],
    random: Callable[[Int[Array, ""]], Float[Array, " D"]],
    num_steps: int,
) -> tuple[Float[Array, " m"], Float[Array, " m"]]:
    """The diagonal and the off-diagonal of the operator in the basis of Lanczos.

    (matfree has the same iteration, but divides by 0 if the start spans an invariant subspace, as
    happens with dead units and singular covariances.)
    """
    dtype = start.dtype
    tiny = 10 * jnp.finfo(dtype).eps

    def orthogonal(vector: Float[Array, " D"], basis: Float[Array, "m D"]) -> Float[Array, " D"]:
        for _ in range(2):  # once is not exact because of rounding, twice is enough (Kahan)
            parts = jnp.matmul(basis, vector, precision=_HIGHEST)
            vector = vector - jnp.matmul(parts, basis, precision=_HIGHEST)
        return vector

    def unit(vector: Float[Array, " D"]) -> Float[Array, " D"]:
        return vector / _dtypes.norm(vector)

    def step(i: Int[Array, ""], carry: tuple[Array, ...]) -> tuple[Array, ...]:
        basis, vector, diagonal, off_diagonal, scale = carry
        basis = basis.at[i].set(vector)
        image = product(vector)
        along = jnp.dot(vector, image, precision=_HIGHEST)
        rest = orthogonal(image, basis)
        length = _dtypes.norm(rest)
        scale = jnp.maximum(scale, jnp.abs(along) + length)
        # If only rounding is left, the space is exhausted: continue in a new random direction.
        exhausted = length <= tiny * scale
        length = jnp.where(exhausted, 0, length)
        onwards = rest / jnp.where(exhausted, 1, length)
        vector = jnp.where(exhausted, unit(orthogonal(random(i + 1), basis)), onwards)
        return (
            basis,
            vector,
            diagonal.at[i].set(along),
            off_diagonal.at[i].set(length),
            scale,
        )

    empty = jnp.zeros(num_steps, dtype)
    basis = jnp.zeros((num_steps, start.size), dtype)
    carry = basis, unit(start), empty, empty, jnp.zeros((), dtype)
    _, _, diagonal, off_diagonal, _ = jax.lax.fori_loop(0, num_steps, step, carry)
    return diagonal, off_diagonal


def hessian_eigenvalues(
    losses: loss_lib.LossVector, params: Params, key: Key[Array, ""], *, num_steps: PositiveInt
) -> Ritz:
    """The ends of the spectrum of the Hessian of the mean loss, by `lanczos`.

    ``.values[0]`` is the sharpness. It costs `num_steps` Hessian-vector products, each about three
    gradients of the N examples. Each eager call compiles a program: put the function under
    `jax.jit` to call it more than once.

    Args:
        losses: the loss vector.
        params: a pytree of floating-point arrays.
        key: a typed PRNG key, for the start.
        num_steps: m; 20 to 50 give the largest eigenvalue of most nets to three digits.

    Raises:
        TypeError: as `lanczos` and `hessian_product`.
        ValueError: as `lanczos` and `hessian_product`, or, outside of `jax.jit`, if a loss or a
            gradient is not finite.
    """
    loss_lib.checked(losses, params)

    def measured(params: Params, data: Data, key: Key[Array, ""]) -> Ritz:
        product = _hessian.hessian_product(losses.replace(data=data), params)
        return lanczos(product, params, key, num_steps=num_steps)

    ritz = jax.jit(measured)(params, losses.data, key)
    _estimates.check_finite(losses, params, ritz.values)
    return ritz


class SpectralDensity(NamedTuple):
    """The density of eigenvalues, as weighted points.

    Attributes:
        ritz: the results for each random start, with a leading axis of starts.
    """

    ritz: Ritz

    def density(
        self, at: Float[Array, " points"], *, width: Scalar
    ) -> tuple[Float[Array, " points"], Float[Array, " points"]]:
        """The share of eigenvalues per unit, smoothed by a Gaussian, with its standard error.

        Args:
            at: the points at which the density is computed, in units of eigenvalues.
            width: the standard deviation of the Gaussian, in the same units.
        """
        values, weights = self.ritz.values, self.ritz.weights
        distance = (at[:, None, None] - values[None]) / width
        bumps = jnp.exp(-jnp.square(distance) / 2) / (width * jnp.sqrt(2 * jnp.pi))
        of_starts = (weights[None] * bumps).sum(-1)
        starts = values.shape[0]
        return of_starts.mean(1), of_starts.std(1, ddof=1) / jnp.sqrt(float(starts))


def hessian_density(
    losses: loss_lib.LossVector,
    params: Params,
    key: Key[Array, ""],
    *,
    num_steps: PositiveInt,
    num_starts: PositiveInt = 4,
) -> SpectralDensity:
    """The spectral density of the Hessian of the mean loss: stochastic Lanczos quadrature.

    Averaged over Gaussian starts, the weighted Ritz values give the mean of every polynomial of the
    eigenvalues up to degree 2 m - 1, except for a bias of O(1/D) from normalising the starts. It
    costs ``num_starts * num_steps`` Hessian-vector products.

    Args:
        losses: the loss vector.
        params: a pytree of floating-point arrays.
        key: a typed PRNG key; start k is a function of (key, k).
        num_steps: m, the number of Ritz values per start.
        num_starts: the number of random starts, at least 2.

    Raises:
        TypeError, ValueError: as `hessian_eigenvalues`, or if `num_starts` is below 2.
    """
    loss_lib.checked(losses, params)
    num_starts = _validate.positive_int("num_starts", num_starts, minimum=2)
    _validate.prng_key("key", key)

    def measured(params: Params, data: Data, key: Key[Array, ""]) -> Ritz:
        product = _hessian.hessian_product(losses.replace(data=data), params)

        def of_start(number: Int[Array, ""]) -> Ritz:
            own = derive(key, Stream.PROBES, number)
            return lanczos(product, params, own, num_steps=num_steps)

        return jax.lax.map(of_start, jnp.arange(num_starts))

    ritz = jax.jit(measured)(params, losses.data, key)
    _estimates.check_finite(losses, params, ritz.values)
    return SpectralDensity(ritz)
