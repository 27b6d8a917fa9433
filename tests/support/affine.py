"""Affine and quadratic losses, whose suprema over a ball have closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from msgd_jax import complexity, loss

# One step from one start finds the exact supremum of an affine function over a ball.
EXACT = {"num_starts": 1, "num_steps": 1}
KEY = jax.random.key(3)
ASCENT = ("num_starts", "num_steps", "optimizer", "at_once")  # options of `complexity.Ascent`


def affine_losses(params, batch):
    """Losses with the values "l" [N] at zero and the slopes "g" [N, D]."""
    return batch["l"] + batch["g"] @ params


def quadratic_losses(params, batch):
    """The affine losses with the Hessians "h" [N, D, D]."""
    return affine_losses(params, batch) + 0.5 * jnp.einsum("nij,i,j->n", batch["h"], params, params)


@functools.cache
def examples(n, dim=4, seed=0):
    """Values [N], slopes [N, D] and symmetric Hessians [N, D, D] of N losses, in float64."""
    rng = np.random.default_rng(seed)
    h = rng.normal(size=(n, dim, dim))
    return {"l": rng.normal(size=n), "g": rng.normal(size=(n, dim)), "h": h + h.transpose(0, 2, 1)}


@functools.cache  # Multipliers compare by identity: sharing the object shares the programs.
def gaussian(n, dtype=jnp.float32):
    """Gaussian multipliers of N examples, the same object for the same arguments."""
    return complexity.gaussian(n, dtype=dtype)


def of_problem(function, loss_vector_fn, params, data, *rest, microbatch_size=None, **options):
    """Calls ``function(losses, params, *rest, ascent=..., **options)``.

    The options that belong to the ascents become one `complexity.Ascent`, and the loss vector is
    made of the function and the data; where data are a function of a key, so is the loss vector.
    """
    own = {name: options.pop(name) for name in ASCENT if name in options}
    if own:
        quick = {"num_starts": 1, "num_steps": 1} if function is complexity.penalty else {}
        options["ascent"] = complexity.Ascent(**{**quick, **own})

    def losses_of(data):
        return loss.LossVector(loss_vector_fn, data, microbatch_size=microbatch_size)

    losses = (lambda key: losses_of(data(key))) if callable(data) else losses_of(data)
    return function(losses, params, *rest, **options)


def penalty_of(loss_vector_fn, **options):
    """The penalty as a function of parameters, data, multipliers and a key."""
    return lambda params, data, multipliers, key=None: of_problem(
        complexity.penalty, loss_vector_fn, params, data, multipliers, key=key, **options
    )


def on_device(data):
    """The data as arrays of jax."""
    return jax.tree.map(jnp.asarray, data)


def affine(n, law, radius=0.7, num_draws=None, **options):
    """The local complexity of the affine losses of N examples in four dimensions, at zero."""
    return of_problem(
        complexity.local_complexity,
        affine_losses,
        jnp.zeros(4),
        on_device(examples(n)),
        law,
        radius=radius,
        num_draws=num_draws,
        **{**EXACT, **options},
    )


def affine_supremum(n, v, radius):
    """The exact supremum, ``(|v . l| + radius ||G v||) / N``, in float64 by hand."""
    data = examples(n)
    return (abs(data["l"] @ v) + radius * np.linalg.norm(data["g"].T @ v)) / n


def trust_region(hessian, slope, radius):
    """The maximum of ``x^T H x / 2 + s . x`` over ``||x|| <= radius``, by the secular equation.

    In the eigenvectors of H, the maximiser is ``x = s / (shift - eigenvalues)``, where the shift
    is at least the largest eigenvalue and zero.
    """
    values, vectors = np.linalg.eigh(hessian)
    turned = vectors.T @ slope
    length = lambda shift: np.linalg.norm(turned / (shift - values))  # noqa: E731
    if values[-1] < 0 and length(0) <= radius:
        x = turned / -values  # The maximum is inside the ball.
    else:
        # The maximum is on the sphere: the shift is the one that gives x the length `radius`.
        lowest = max(values[-1], 0) + 1e-12
        highest = lowest + np.linalg.norm(slope) / radius + np.abs(values).max()
        x = turned / (optimize.brentq(lambda s: length(s) - radius, lowest, highest) - values)
    return 0.5 * x @ (values * x) + turned @ x


def sample_data(key):
    """Fresh affine losses of 32 examples, as a random function of the key."""
    loss_key, slope_key = jax.random.split(key)
    return {"l": jax.random.normal(loss_key, (32,)), "g": jax.random.normal(slope_key, (32, 4))}
