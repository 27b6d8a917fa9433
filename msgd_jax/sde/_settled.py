"""The stationary covariance along directions, from products with the Hessian and the noise."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int

from msgd_jax import _dtypes, _validate, loss
from msgd_jax._laws import Law
from msgd_jax._typing import Data, Gradients, Params, PositiveInt, Scalar
from msgd_jax.sde import _dynamics, _stationary

_HIGHEST = jax.lax.Precision.HIGHEST


class Settled(NamedTuple):
    """The stationary covariance along k directions, and how far it has converged.

    Attributes:
        covariance: ``u_i^T X u_j`` for the directions u, [k, k], in float64.
        last_change: the largest change by the last quarter of the products, as a fraction of the
            largest entry.
    """

    covariance: Float[np.ndarray, "k k"]
    last_change: float


def stationary_covariance_along(
    losses: loss.LossVector,
    params: Params,
    law: Law,
    directions: Gradients,
    *,
    learning_rate: Scalar,
    momentum: Scalar = 0.0,
    nesterov: bool = False,
    num_products: PositiveInt = 40,
) -> Settled:
    """The stationary covariance of M-SGD along directions, without matrices: ``u_i^T X u_j``.

    X is that of `stationary_covariance` with the Hessian of the mean loss and the covariance of the
    noisy gradient at `params`, a minimum. For each direction, Lanczos' iteration with full
    reorthogonalisation makes m Ritz pairs of H, and the equation of X is solved in these, where the
    noise enters by its covariance between Ritz vectors (projection on Krylov spaces, as in
    Simoncini 2016, Computational Methods for Linear Matrix Equations). It is exact if m is the
    number of parameters, and before that where the Ritz values have converged. It takes k m
    products with the Hessian, as many forward passes, and memory for m vectors like the parameters.

    It is computed by compiled programs that are freed after the call, and not under `jax.jit`.

    Args:
        losses: the loss vector.
        params: the minimum, where the gradient is 0: a pytree of float32 or float64 arrays.
        law: a `noise.MNoise` with independent steps, or a `noise.Exchangeable`; only its covariance
            is used.
        directions: a pytree like `params` with a leading axis [k]; none may be 0.
        learning_rate: eta, above 0.
        momentum: mu, in [0, 1).
        nesterov: whether to use Nesterov's momentum.
        num_products: m, the number of products with the Hessian per direction; it is at most the
            number of parameters.

    Returns:
        The covariance along the directions.

    Raises:
        TypeError: if `losses` is not a `loss.LossVector`, `params` are not float32 or float64,
            `law` is not a law, or a number is traced or has the wrong type.
        ValueError: if the law is for another number of examples, its steps depend on each other, it
            states no covariance, `directions` are not like `params` with a leading axis, are not
            finite, or one is 0, a number is out of its range, a Ritz value of the Hessian is not
            positive, or the learning rate is too large for one; the error names the value.

    Example:
        >>> from msgd_jax import loss, noise, sde
        >>> fn = loss.per_example(lambda theta, x: theta @ theta - x @ theta)
        >>> losses = loss.LossVector(fn, jnp.asarray([[-1.0, 0.0], [1.0, 0.0]]))
        >>> settled = sde.stationary_covariance_along(
        ...     losses, jnp.zeros(2), noise.cov(2, 1), jnp.eye(2), learning_rate=0.1,
        ... )
        >>> settled.covariance.round(6).tolist()  # eta s2 / (h (2 - eta h)), with h = 2, s2 = 1
        [[0.027778, 0.0], [0.0, 0.0]]
    """
    loss.checked(losses, params, wide=True)
    moments = _dynamics.eigenvalues(law, losses.num_examples)
    eta, mu = _stationary.check_rates(learning_rate, momentum)
    params = jax.tree.map(jnp.asarray, params)
    starts = _flat_directions(params, directions)
    steps = min(_validate.positive_int("num_products", num_products), starts.shape[1])

    @jax.jit
    def projected(
        params: Params, data: Data, start: Float[Array, " D"]
    ) -> tuple[Float[Array, " m"], Float[Array, " m"], Float[Array, "m N"]]:
        own = losses.replace(data=data)
        unravel = ravel_pytree(params)[1]

        def product(vector: Float[Array, " D"]) -> Float[Array, " D"]:
            return ravel_pytree(own.hessian_product(params, unravel(vector)))[0]

        basis, diagonal, off_diagonal = _lanczos(product, start, steps)
        root = _dynamics.Root.cast(moments, start.dtype)
        # The noise of the gradient along a vector has the standard normals' coefficients A G v.
        noises = jax.lax.map(lambda v: root(own.slopes(params, unravel(v))), basis)
        return diagonal, off_diagonal, noises

    found = [
        [np.asarray(x, np.float64) for x in projected(params, losses.data, start)]
        for start in starts
    ]
    lengths = np.linalg.norm(np.asarray(starts, np.float64), axis=1)

    def solved(count: int) -> Float[np.ndarray, "k k"]:
        parts = [_ritz(a, b, noises, count) for a, b, noises in found]
        values = np.concatenate([part[0] for part in parts])
        rounding = steps * float(jnp.finfo(starts.dtype).eps)
        _stationary.check_positive(float(values.min()), float(values.max()), rounding)
        _stationary.check_stable(np.sort(values), eta, mu, nesterov)
        # One row per direction: the parts of its Ritz vectors.
        shares = np.zeros((len(parts), len(values)))
        for i, (part, length) in enumerate(zip(parts, lengths, strict=True)):
            before = sum(len(other[0]) for other in parts[:i])
            shares[i, before : before + len(part[0])] = length * part[1]
        noises = np.concatenate([part[2] for part in parts])
        X = _stationary.in_eigenbasis(values, noises @ noises.T, eta, mu, nesterov)
        covariance = shares @ X @ shares.T
        return (covariance + covariance.T) / 2

    whole = solved(steps)
    before = solved(max(steps - max(steps // 4, 1), 1)) if steps < starts.shape[1] else whole
    scale = np.abs(whole).max()
    return Settled(whole, float(np.abs(whole - before).max() / scale) if scale else 0.0)


def _flat_directions(params: Params, directions: Any) -> Float[Array, "k D"]:
    """The directions as rows, [k, D]; raises ValueError if they do not fit the parameters."""
    directions = jax.tree.map(jnp.asarray, directions)
    counts = {x.shape[0] if x.ndim else None for x in jax.tree.leaves(directions)}
    if len(counts) != 1 or not (count := next(iter(counts))):
        raise ValueError(
            "directions must be like params with one leading axis [k] on all leaves, got the "
            f"lengths {sorted(counts, key=str)}."
        )
    first = jax.tree.map(lambda x: x[0], directions)
    if (gap := _validate.first_difference("directions", params, first)) is not None:
        raise ValueError(
            f"directions must be like params with a leading axis, {gap[0]}, got {gap[1]}."
        )
    rows = jnp.stack(
        [ravel_pytree(jax.tree.map(lambda x, i=i: x[i], directions))[0] for i in range(count)]
    )
    lengths = np.linalg.norm(np.asarray(rows, np.float64), axis=1)
    wrong = ~(np.isfinite(lengths) & (lengths > 0))
    if wrong.any():
        i = int(wrong.argmax())
        raise ValueError(
            f"directions must be finite and not 0, got one of length {lengths[i]:g} at {i}."
        )
    return rows


def _lanczos(
    product: Any, start: Float[Array, " D"], num_steps: int
) -> tuple[Float[Array, "m D"], Float[Array, " m"], Float[Array, " m"]]:
    """The basis, and the diagonal and the off-diagonal of the operator in it.

    (`measure.lanczos` continues in random directions where the space is exhausted; here nothing
    more is reached, and the off-diagonal is 0 from there on.)
    """
    tiny = 10 * jnp.finfo(start.dtype).eps * start.size**0.5

    def step(i: Int[Array, ""], carry: tuple[Array, ...]) -> tuple[Array, ...]:
        basis, vector, diagonal, off_diagonal, scale = carry
        basis = basis.at[i].set(vector)
        rest = image = product(vector)
        along = jnp.dot(vector, image, precision=_HIGHEST)
        for _ in range(2):  # once is not exact because of rounding, twice is enough (Kahan)
            parts = jnp.matmul(basis, rest, precision=_HIGHEST)
            rest = rest - jnp.matmul(parts, basis, precision=_HIGHEST)
        length = _dtypes.norm(rest)
        scale = jnp.maximum(scale, jnp.abs(along) + length)
        exhausted = length <= tiny * scale
        vector = jnp.where(exhausted, 0, rest / jnp.where(exhausted, 1, length))
        off_diagonal = off_diagonal.at[i].set(jnp.where(exhausted, 0, length))
        return basis, vector, diagonal.at[i].set(along), off_diagonal, scale

    empty = jnp.zeros(num_steps, start.dtype)
    basis = jnp.zeros((num_steps, start.size), start.dtype)
    carry = basis, start / _dtypes.norm(start), empty, empty, jnp.zeros((), start.dtype)
    basis, _, diagonal, off_diagonal, _ = jax.lax.fori_loop(0, num_steps, step, carry)
    return basis, diagonal, off_diagonal


def _ritz(
    diagonal: Float[np.ndarray, " m"],
    off_diagonal: Float[np.ndarray, " m"],
    noises: Float[np.ndarray, "m N"],
    count: int,
) -> tuple[Float[np.ndarray, " r"], Float[np.ndarray, " r"], Float[np.ndarray, "r N"]]:
    """Ritz values of `count` steps, the parts of the start in their vectors, and their noises."""
    ends = np.flatnonzero(off_diagonal[: count - 1] == 0)
    count = int(ends[0]) + 1 if len(ends) else count  # an invariant space, beyond which is nothing
    from scipy.linalg import eigh_tridiagonal  # imported here, since scipy is slow to import

    values, vectors = eigh_tridiagonal(diagonal[:count], off_diagonal[: count - 1])
    return values, vectors[0], vectors.T @ noises[:count]
