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
    """What m steps of Lanczos' iteration say of the spectrum of a symmetric operator.

    Attributes:
        values: the Ritz values, descending, [m]. The first never exceeds the largest eigenvalue,
            the last is never below the smallest.
        residuals: some eigenvalue lies within this distance of each value, [m], and the rounding of
            the products, which is not counted.
        weights: of each value in the spectral measure of the start, [m], adding up to 1.
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

    The ends of the spectrum come first: a few dozen steps give the largest and the smallest
    eigenvalues, with `Ritz.residuals` saying how well. (Power iteration finds the eigenvalue of the
    largest modulus only, which for a Hessian may be negative.) Where the iteration has exhausted
    the directions that it can reach from its start, it goes on in a new random one, so that
    repeated eigenvalues and singular operators are no obstacle.

    Costs `num_steps` products; memory for as many vectors like the parameters.

    Args:
        product: a symmetric linear function of pytrees like `params`: `hessian_product`, or the
            ``mv`` of an operator of `covariance`.
        params: the parameters, for their shapes and types.
        key: a typed PRNG key, for the start and for new directions.
        num_steps: m, at most the number of parameters.
        start: where to start; None for a random direction, which no eigenvector is orthogonal to.

    Returns:
        Ritz values in float32 or wider.

    Raises:
        TypeError, ValueError: if `product` is no function, `num_steps` is not from 1 to the number
            of parameters, `start` is not like `params`, or `key` no typed PRNG key.
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

    (matfree has the same iteration, but divides by 0 where the start spans an invariant subspace,
    as dead units and singular covariances make them.)
    """
    dtype = start.dtype
    tiny = 10 * jnp.finfo(dtype).eps

    def orthogonal(vector: Float[Array, " D"], basis: Float[Array, "m D"]) -> Float[Array, " D"]:
        for _ in range(2):  # once leaves rounding behind, twice is enough (Kahan)
            parts = jnp.matmul(basis, vector, precision=_HIGHEST)
            vector = vector - jnp.matmul(parts, basis, precision=_HIGHEST)
        return vector

    def unit(vector: Float[Array, " D"]) -> Float[Array, " D"]:
        return vector / jnp.linalg.norm(vector)

    def step(i: Int[Array, ""], carry: tuple[Array, ...]) -> tuple[Array, ...]:
        basis, vector, diagonal, off_diagonal, scale = carry
        basis = basis.at[i].set(vector)
        image = product(vector)
        along = jnp.dot(vector, image, precision=_HIGHEST)
        rest = orthogonal(image, basis)
        length = jnp.linalg.norm(rest)
        scale = jnp.maximum(scale, jnp.abs(along) + length)
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

    ``.values[0]`` is the sharpness. Costs `num_steps` Hessian-vector products, about three
    gradients of the N examples each. Compiled anew on each call: put it under `jax.jit` to call it
    again.

    Args:
        losses: the loss vector.
        params: a pytree of floating-point arrays.
        key: a typed PRNG key, for the start.
        num_steps: m; 20 to 50 give the largest eigenvalue of most nets to three digits.

    Raises:
        TypeError, ValueError: as `lanczos` and `hessian_product`; or, outside of `jax.jit`, if a
            loss or a gradient is not finite.
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
        ritz: of each random start, with a leading axis of starts.
    """

    ritz: Ritz

    def density(
        self, at: Float[Array, " points"], *, width: Scalar
    ) -> tuple[Float[Array, " points"], Float[Array, " points"]]:
        """The share of eigenvalues per unit, blurred by a Gaussian, with its standard error.

        Args:
            at: where.
            width: the standard deviation of the Gaussian.
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

    Averaged over Gaussian starts, the weighted Ritz values have the mean of every polynomial of the
    eigenvalues up to degree 2 m - 1, up to the bias of normalising the starts, O(1/D). Costs
    ``num_starts * num_steps`` Hessian-vector products.

    Args:
        losses: the loss vector.
        params: a pytree of floating-point arrays.
        key: a typed PRNG key; start k is a function of (key, k).
        num_steps: m, Ritz values per start.
        num_starts: random starts, at least 2.

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
