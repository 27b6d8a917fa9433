"""Draws of the noise of a law at one point, and checks of the law."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from msgd_jax import _dtypes, _laws, _validate
from msgd_jax import loss as loss_lib
from msgd_jax._typing import Gradients, Params, PositiveInt, Step
from msgd_jax.noise import MNoise, Weights


class Moments(NamedTuple):
    """The factors of S and of the mean gradient g in ``Cov(grad(L . W)) = s S + m g g^T``.

    Attributes:
        of_s: ``s = alpha N``.
        of_mean: ``m = alpha N + beta N^2``; 0 for centred laws.
    """

    of_s: float
    of_mean: float


def moments_of(law: MNoise, num_examples: int) -> Moments:
    """The two factors of a law; raises ValueError if the law has no noise."""
    across, along = _laws.eigenvalues("law", law, num_examples)
    if across <= 0:
        raise ValueError(
            "law must have noise, alpha > 0 in Cov(W) = alpha I + beta 1 1^T, got "
            f"{law.name[:200]} with alpha = {across}."
        )
    return Moments(num_examples * across, num_examples * along)


def independent(law: Any, num_examples: int) -> MNoise:
    """Returns `law` if it is for `num_examples` examples and its steps are independent.

    Raises:
        TypeError: if `law` is not a `noise.MNoise`.
        ValueError: if it is for another number of examples, or its steps depend on each other.
    """
    _laws.drawable("law", law)
    _laws.of_size("law", law, num_examples)
    if law.draw_at is not None:
        raise ValueError(
            f"law must have independent steps, got {law.name[:120]}, whose steps depend on each "
            "other, so that standard errors would be wrong. dataclasses.replace(law, draw_at=None, "
            "between=None) draws steps independently."
        )
    return law


def weights_of_steps(law: MNoise, key: Key[Array, ""], first_step: Step, num_draws: int) -> Weights:
    """K draws of weights, ``law.sample(key, first_step + k)``, with a leading axis of K."""
    _validate.prng_key("key", key)
    steps = _validate.step(first_step, "first_step") + jnp.arange(num_draws, dtype=jnp.int32)
    return jax.vmap(law.sample, in_axes=(None, 0))(key, steps)


class Draws(NamedTuple):
    """K noisy gradients at one point.

    Attributes:
        gradients: the gradients, like the parameters with a leading axis of K, in float32 or wider.
        mean_gradient: g, the gradient of the mean loss, in float32 or wider.
        sums: the sum of the weights of each draw, [K]; 1 for all draws of a centred law.
    """

    gradients: Gradients
    mean_gradient: Gradients
    sums: Float[Array, " K"]

    def noise(self) -> Gradients:
        """``grad(L . W_k) - g``, with a leading axis of K; its covariance is that of the law."""
        return jax.tree.map(lambda d, g: d - g[None], self.gradients, self.mean_gradient)

    def centred(self) -> Gradients:
        """``grad(L . W_k) - (1 . W_k) g``, whose covariance is alpha N S for every law."""
        return jax.tree.map(
            lambda d, g: d - _along(self.sums, d) * g[None], self.gradients, self.mean_gradient
        )


def draw(
    losses: loss_lib.LossVector,
    params: Params,
    law: MNoise,
    key: Key[Array, ""],
    *,
    first_step: Step,
    num_draws: int,
    draws_per_pass: PositiveInt,
) -> Draws:
    """K noisy gradients and the mean gradient, by one forward and K + 1 backward passes."""
    drawn = weights_of_steps(law, key, first_step, num_draws).dense()
    n = losses.num_examples
    weights = jnp.concatenate([drawn, jnp.full((1, n), 1 / n, drawn.dtype)])
    _, gradients = losses.values_and_grads(
        params, Weights(weights, None, n), draws_per_pass=draws_per_pass
    )
    wide = jax.tree.map(_dtypes.wide, gradients)
    return Draws(
        jax.tree.map(lambda leaf: leaf[:-1], wide),
        jax.tree.map(lambda leaf: leaf[-1], wide),
        drawn.sum(1),
    )


def _along(values: Float[Array, " K"], leaf: Float[Array, "K *shape"]) -> Array:
    return values.astype(leaf.dtype).reshape(-1, *(1,) * (leaf.ndim - 1))
