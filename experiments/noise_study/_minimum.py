"""A minimum of a small net on the digits, and the exact variances of weights around it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Key

from experiments import data
from experiments._typing import Law
from experiments.noise_study import _problem
from msgd_jax import loss

Examples = dict[str, Array]
Flat = Float[Array, " D"]
_INPUTS = 64
"""The number of pixels of a digit."""


class Minimum(NamedTuple):
    """A minimum of the mean loss, and the noise of gradients there.

    Attributes:
        examples: the N examples.
        params: the parameters of the minimum, [D].
        loss: the mean loss there.
        slope: the length of its gradient there, which is 0 up to rounding.
        curvatures: the eigenvalues of the Hessian in ascending order, [D], in float64.
        basis: its eigenvectors, one per column, [D, D].
        slopes: the slopes of all losses along the eigenvectors, less their means, [N, D].
    """

    examples: Examples
    params: Flat
    loss: float
    slope: float
    curvatures: Float[np.ndarray, " D"]
    basis: Float[np.ndarray, "D D"]
    slopes: Float[np.ndarray, "N D"]


def make_losses(width: int, weight_decay: float) -> Callable[..., Float[Array, " batch"]]:
    """The losses of the small net as a function of its parameters in one vector, [D].

    Args:
        width: the number of units in each of the two hidden layers.
        weight_decay: mu; each loss has ``mu |params|^2 / 2`` added.
    """
    _, tree = ravel_pytree(_problem.initial(jax.random.key(0), _INPUTS, width))

    def losses(params: Flat, examples: Examples) -> Float[Array, " batch"]:
        decay = weight_decay / 2 * jnp.square(params).sum()
        return _problem.losses(tree(params), examples) + decay

    return losses


def make_finder(
    losses: Callable[..., Float[Array, " batch"]],
    *,
    num_examples: int,
    width: int,
    learning_rate: float,
    descent_steps: int,
) -> Callable[[int], Minimum]:
    """A function that trains the net of a seed to a minimum.

    Gradient descent and a quasi-Newton method lead into its neighbourhood, and Newton's method to
    the minimum itself.

    Args:
        losses: as from `make_losses`.
        num_examples: N, the number of training images.
        width: the number of units in each of the two hidden layers.
        learning_rate: that of gradient descent.
        descent_steps: the number of its steps.

    Returns:
        A function of a seed, which determines the images and the initial weights. It raises
        ValueError if an eigenvalue of the Hessian is not positive where it ends.
    """

    def mean_loss(params: Flat, examples: Examples) -> Float[Array, ""]:
        return losses(params, examples).mean()

    value_and_grad = jax.jit(jax.value_and_grad(mean_loss))
    hessian = jax.jit(jax.hessian(mean_loss))

    @jax.jit
    def descend(params: Flat, examples: Examples) -> Flat:
        def step(_: Any, params: Flat) -> Flat:
            return params - learning_rate * value_and_grad(params, examples)[1]

        return jax.lax.fori_loop(0, descent_steps, step, params)

    def find(seed: int) -> Minimum:
        from scipy import optimize

        examples = digits(seed, num_examples)
        start = initial(jax.random.key(seed), width)

        def on_host(params: np.ndarray) -> tuple[float, np.ndarray]:
            value, slope = value_and_grad(jnp.asarray(params, jnp.float32), examples)
            return float(value), np.asarray(slope, float)

        def hessian_on_host(params: np.ndarray) -> np.ndarray:
            return np.asarray(hessian(jnp.asarray(params, jnp.float32), examples), float)

        # In float32, a quasi-Newton method stops at slopes of 1e-4 or so, and few steps of Newton's
        # method in a trust region lead to the minimum.
        near: Any = optimize.minimize(
            on_host,
            np.asarray(descend(start, examples), float),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": 20_000, "maxfun": 40_000, "ftol": 0.0, "gtol": 1e-6, "maxcor": 50},
        )
        found: Any = optimize.minimize(
            on_host,
            near.x,
            jac=True,
            hess=hessian_on_host,
            method="trust-exact",
            options={"gtol": 3e-6, "maxiter": 300, "initial_trust_radius": 0.1},
        )
        curvatures, basis = np.linalg.eigh(hessian_on_host(found.x))
        if not curvatures[0] > 0:
            raise ValueError(
                f"seed {seed} leads to no minimum: the smallest eigenvalue of the Hessian is "
                f"{curvatures[0]:.2g}. Choose another seed or more weight_decay."
            )
        params = jnp.asarray(found.x, jnp.float32)
        gradients = np.asarray(loss.LossVector(losses, examples).gradient_matrix(params), float)
        slopes = gradients @ basis
        slopes -= slopes.mean(0)
        slope = float(np.linalg.norm(found.jac))
        return Minimum(examples, params, found.fun, slope, curvatures, basis, slopes)

    return find


def initial(key: Key[Array, ""], width: int) -> Flat:
    """The initial weights in one vector."""
    return ravel_pytree(_problem.initial(key, _INPUTS, width))[0]


def digits(seed: int, num_examples: int) -> Examples:
    """The first training digits of a seed, with mean grey value 0."""
    drawn = data.load("digits", seed=seed)
    pixels = drawn.train.image.reshape(len(drawn.train.label), -1) / drawn.max_value
    pixels = pixels[:num_examples]
    return {
        "x": jnp.asarray(pixels - pixels.mean(), jnp.float32),
        "y": jnp.asarray(drawn.train.label[:num_examples], jnp.int32),
    }


def predicted_variances(
    law: Law,
    curvatures: Float[np.ndarray, " D"],
    noise: Float[np.ndarray, " D"],
    *,
    learning_rate: float,
    measured_at: Sequence[int],
    cycle: int,
) -> Float[np.ndarray, " D"]:
    """The exact variances of weights on a quadratic, as means over some steps.

    Along an eigenvector u of the Hessian with eigenvalue h, ``x' = (1 - eta h) x - eta n``, from
    x = 0 at step 0. The noise has ``Cov(n_s, n_t) = N alpha(s, t) u^T S u``, where alpha(s, t) is
    that of ``Cov(W_s, W_t) = alpha I + beta 1 1^T``, for a law of centred weights. Hence::

      Var(x') = (1 - eta h)^2 Var(x) - 2 eta (1 - eta h) Cov(x, n) + eta^2 Var(n)
      Cov(x_t, n_t) = -eta sum over s < t of (1 - eta h)^(t - 1 - s) Cov(n_s, n_t)

    Args:
        law: a law of centred weights. Its covariances repeat after `cycle` steps, and are 0 at
            distances above `cycle`.
        curvatures: the eigenvalues h.
        noise: ``u^T S u`` for each eigenvector, the variance of the slopes of the losses.
        learning_rate: eta.
        measured_at: the steps, above 0.
        cycle: the number of steps after which the covariances repeat, such as those of an epoch.

    Returns:
        The mean of the variances over the given steps.
    """
    q, size = 1 - learning_rate * curvatures, law.num_examples * noise
    # Cov(x_t, n_t) / (N u^T S u) in the first cycle, which has no past, and in every later one.
    crossed = np.zeros((2 * cycle, len(q)))
    for t in range(2 * cycle):
        for s in range(max(0, t - cycle), t):
            alpha = law.covariance_between(s, t).alpha
            if alpha:
                crossed[t] -= learning_rate * q ** (t - 1 - s) * alpha
    own = learning_rate**2 * law.covariance.alpha
    variance, total, wanted = np.zeros_like(q), np.zeros_like(q), set(measured_at)
    for t in range(max(wanted)):
        cross = crossed[t if t < cycle else cycle + t % cycle]
        variance = q**2 * variance - 2 * learning_rate * q * cross + own
        if t + 1 in wanted:
            total += variance
    return size * total / len(wanted)
