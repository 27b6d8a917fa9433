"""Noises of equal trace and different shapes, and what their shape says about escape."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Key

from experiments._typing import Params
from experiments.noise_study import _problem
from msgd_jax import covariance, loss, measure
from msgd_jax._streams import Stream, derive

ADDITIVE = ("diagonal", "isotropic", "top_eigenvector")
"""The noises that are added to the gradient; the others are laws of weights."""
# Steps of power iteration, which goes on from the direction found before.
_POWER_STEPS = 20


def spread(
    name: str, params: Params, own: dict[str, Array], batch_size: int, before: Params
) -> Params:
    """The standard deviations of additive noise with the trace of S/b, like the parameters.

    For "top_eigenvector" they are the entries of the one random direction instead.

    Args:
        name: one of `ADDITIVE`.
        params: the parameters.
        own: the examples of one seed.
        batch_size: b.
        before: what this function gave the last time, like the parameters: power iteration for the
            top eigenvector starts there, unless it is 0.
    """
    vector = loss.LossVector(_problem.losses, own)
    if name == "diagonal":
        variances = covariance.diagonal(vector, params, "sgd_covariance")
        return jax.tree.map(lambda v: jnp.sqrt(jnp.maximum(v, 0) / batch_size), variances)
    trace = jnp.asarray(measure.noise_scale(vector, params).total.trace.value) / batch_size
    if name == "isotropic":
        return jax.tree.map(
            lambda p: jnp.full_like(p, jnp.sqrt(trace / optax.tree.size(params))), params
        )
    # The gradient has a part along the top eigenvector; so has its image, a larger one.
    gradient = vector.gradient(params)
    none = optax.tree.norm(before) == 0
    start = jax.tree.map(lambda b, g: jnp.where(none, g, b), before, gradient)

    def product(_: Any, vector_: Params) -> Params:
        image = vector.hessian_product(params, vector_)
        return optax.tree.scale(1 / optax.tree.norm(image), image)

    unit = jax.lax.fori_loop(0, _POWER_STEPS, product, start)
    return optax.tree.scale(jnp.sqrt(trace), unit)


def additive(name: str, key: Key[Array, ""], step: Any, deviations: Params) -> Params:
    """A draw of additive noise, from a separate stream; see `spread`."""
    own = derive(key, Stream.LANGEVIN, step)
    if name == "top_eigenvector":
        normal = jax.random.normal(own)
        return jax.tree.map(lambda s: normal * s, deviations)
    return jax.tree.map(lambda s, z: s * z, deviations, optax.tree.random_like(own, deviations))


def matrices(
    params: Params, own: dict[str, Array]
) -> tuple[Float[Array, "D D"], Float[Array, "D D"]]:
    """The Hessian H of the mean loss and the covariance S of one example's gradient."""
    vector = loss.LossVector(_problem.losses, own)
    flat, unravel = ravel_pytree(params)

    def column(direction: Float[Array, " D"]) -> Float[Array, " D"]:
        return ravel_pytree(vector.hessian_product(params, unravel(direction)))[0]

    hessian = jax.lax.map(column, jnp.eye(flat.size), batch_size=32)
    gradients = vector.gradient_matrix(params)
    rows = jax.vmap(lambda tree: ravel_pytree(tree)[0])(gradients)
    rows = rows - rows.mean(0, keepdims=True)
    return (hessian + hessian.T) / 2, rows.T @ rows / rows.shape[0]


def covariances(
    hessian: Float[Array, "D D"], s: Float[Array, "D D"]
) -> dict[str, Float[Array, "D D"]]:
    """The covariance of each shape, with the trace of S."""
    size, trace = s.shape[0], jnp.trace(s)
    top = jnp.linalg.eigh(hessian)[1][:, -1]
    return {
        "cov": s,
        "diagonal": jnp.diag(jnp.diag(s)),
        "isotropic": trace / size * jnp.eye(size),
        "top_eigenvector": trace * jnp.outer(top, top),
    }


def numbers(
    params: Params, own: dict[str, Array], *, rate: float, batch_size: int, steps: int
) -> dict[str, dict[str, Array]]:
    """The alignment of each shape with the Hessian, and the rise of the loss that it predicts.

    With H and C constant and noise of covariance C/b in each step, the mean loss after k steps
    is above that of GD by ``eta^2 / (2 b) sum_{j < k} tr(H (I - eta H)^(2j) C)``.

    Args:
        params: the parameters.
        own: the examples of one seed.
        rate: the learning rate eta.
        batch_size: b.
        steps: the number of steps; the prediction is for 1, ..., `steps`.

    Returns:
        Per shape, the `alignment` ``D tr(HC) / (tr H tr C)``, the `cosine`
        ``tr(HC) / (|H| |C|)``, and the `rise`, [steps].
    """
    hessian, s = matrices(params, own)
    values, vectors = jnp.linalg.eigh(hessian)
    factors = jnp.square(1 - rate * values)
    found = {}
    for name, c in covariances(hessian, s).items():
        along = jnp.einsum("ij,ik,kj->j", vectors, c, vectors)
        weights = values * along
        powers = factors[None] ** jnp.arange(steps)[:, None]
        found[name] = {
            "alignment": s.shape[0] * weights.sum() / (values.sum() * along.sum()),
            "cosine": weights.sum() / (jnp.linalg.norm(hessian) * jnp.linalg.norm(c)),
            "rise": rate**2 / (2 * batch_size) * jnp.cumsum(powers @ weights),
        }
    return found
