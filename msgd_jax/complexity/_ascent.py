"""The supremum over the ball: projected gradient ascent, and what can be said of its result."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from msgd_jax import _dtypes

ValueAndGrad = Callable[[Any], tuple[Float[Array, ""], Any]]


class Peak(NamedTuple):
    """The highest point that one ascent met.

    Attributes:
        value: there, times the sign.
        gradient: of the value there, like the parameters, in wide types.
        last_gain: what the last step added to `value`, relative to it.
        gap: the most that a linear function with this gradient could still gain in the ball. Zero
            at a stationary point; where the objective is concave, it bounds what is missing.
        finite: whether every value and gradient met was finite.
    """

    value: Float[Array, ""]
    gradient: Any
    last_gain: Float[Array, ""]
    gap: Float[Array, ""]
    finite: Bool[Array, ""]


class Centre(NamedTuple):
    """Value and gradient at the centre of the ball."""

    value: Float[Array, ""]
    gradient: Any

    @classmethod
    def of(cls, value_and_grad: ValueAndGrad, params: Any) -> "Centre":
        """At `params`, in wide types."""
        value, gradient = value_and_grad(params)
        return cls(value, widened(gradient))


def default_optimizer(num_steps: int) -> optax.GradientTransformation:
    """Steps along the normalised gradient, from the whole radius down to nothing."""
    return optax.chain(
        optax.normalize_by_update_norm(eps=1e-30),
        optax.scale_by_learning_rate(optax.cosine_decay_schedule(1.0, max(num_steps, 1))),
    )


def start(
    centre: Centre,
    sign: Float[Array, ""],
    index: Int[Array, ""],
    num_starts: int,
    key: Key[Array, ""],
) -> Any:
    """Where ascent `index` of `num_starts` starts, in units of the radius.

    The first at the maximum of the linearised objective, or, where that is constant, in a fixed
    direction: at a critical point an ascent would never leave. The others start uniformly on the
    sphere.
    """
    critical = optax.tree.norm(direction(centre.gradient)) == 0
    steepest = jax.tree.map(
        lambda fixed, steepest: jnp.where(critical, fixed, steepest),
        _somewhere(centre.gradient),
        direction(_times(sign, centre.gradient)),
    )
    if num_starts == 1:
        return steepest
    leaves, structure = jax.tree.flatten(centre.gradient)
    keys = jax.random.split(key, len(leaves))
    normals = [jax.random.normal(k, g.shape, g.dtype) for k, g in zip(keys, leaves, strict=True)]
    random = direction(structure.unflatten(normals))
    return jax.tree.map(lambda a, b: jnp.where(index == 0, a, b), steepest, random)


def _somewhere(like: Any) -> Any:
    """A direction without any symmetry, the same each time: cosines of multiples of one radian."""
    leaves, structure = jax.tree.flatten(like)
    patterns = [
        jnp.cos(1.0 + i + jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape)
        for i, leaf in enumerate(leaves)
    ]
    return direction(structure.unflatten(patterns))


def climb(
    value_and_grad: ValueAndGrad,
    params: Any,
    radius: Float[Array, ""],
    sign: Float[Array, ""],
    centre: Centre,
    start: Any,
    optimizer: optax.GradientTransformation,
    num_steps: int,
) -> Peak:
    """Ascends sign * value within the ball, in the coordinates of the unit ball.

    The optimizer is given the gradient of -sign * value(params + radius * z) with respect to z, and
    its step is projected back by `optax.projections.projection_l2_ball`. The centre counts as met.
    """

    def step(carry: Any, _: None) -> tuple[Any, None]:
        # Evaluation, then move: one copy of the losses to compile, and the last move is not used.
        z, state, peak = carry
        value, gradient = value_and_grad(displaced(params, z, radius))
        gradient = _times(sign, widened(gradient))
        value = sign.astype(value.dtype) * value
        norm = optax.tree.norm(gradient)
        missed = jnp.maximum(norm - optax.tree.vdot(gradient, z), 0)
        higher = value > peak.value
        best, best_gradient, best_gap = jax.tree.map(
            lambda new, old: jnp.where(higher, new, old),
            (value, gradient, radius * missed.astype(radius.dtype)),
            (peak.value, peak.gradient, peak.gap),
        )
        gain = (best - peak.value) / jnp.maximum(jnp.abs(best), jnp.finfo(best.dtype).tiny)
        finite = peak.finite & jnp.isfinite(value) & jnp.isfinite(norm)
        descent = _times(-radius, gradient)
        updates, state = optimizer.update(descent, state, z)
        moved = optax.projections.projection_l2_ball(optax.apply_updates(z, updates))
        z = jax.tree.map(lambda new, old: new.astype(old.dtype), moved, z)
        return (z, state, Peak(best, best_gradient, gain, best_gap, finite)), None

    value = sign.astype(centre.value.dtype) * centre.value
    norm = optax.tree.norm(centre.gradient)
    at_centre = Peak(
        value,
        _times(sign, centre.gradient),
        jnp.zeros_like(value),
        radius * norm.astype(radius.dtype),
        jnp.isfinite(value) & jnp.isfinite(norm),
    )
    carry = (start, optimizer.init(start), at_centre)
    (_, _, peak), _ = jax.lax.scan(step, carry, length=num_steps + 1)
    return peak


def displaced(params: Any, z: Any, radius: Float[Array, ""]) -> Any:
    """Params + radius * z, in the types of the parameters."""
    return jax.tree.map(
        lambda p, d: (p.astype(d.dtype) + radius.astype(d.dtype) * d).astype(p.dtype), params, z
    )


def direction(tree: Any) -> Any:
    """The tree at length 1, or zeros where it is all zeros; safe for very small entries."""
    largest = functools.reduce(jnp.maximum, [jnp.abs(leaf).max() for leaf in jax.tree.leaves(tree)])
    scaled = jax.tree.map(
        lambda leaf: leaf / jnp.where(largest > 0, largest, 1).astype(leaf.dtype), tree
    )
    norm = jnp.where(largest > 0, optax.tree.norm(scaled), 1)
    return jax.tree.map(lambda leaf: leaf / norm.astype(leaf.dtype), scaled)


def widened(tree: Any) -> Any:
    """Every leaf in float32 or wider."""
    return jax.tree.map(lambda leaf: leaf.astype(_dtypes.accumulator(leaf.dtype)), tree)


def _times(factor: Float[Array, ""], tree: Any) -> Any:
    return jax.tree.map(lambda leaf: factor.astype(leaf.dtype) * leaf, tree)
