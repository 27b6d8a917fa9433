"""The supremum over the ball by projected gradient ascent, with measures of its quality."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from msgd_jax import _dtypes, _validate, loss
from msgd_jax._typing import Batch, Gradients, Params, PyTree, ValueAndGrad
from msgd_jax.noise import Weights


@dataclasses.dataclass(frozen=True)
class Ascent:
    """Settings of the search for the supremum, by projected gradient ascents of both signs.

    Attributes:
        num_starts: the number of ascents per sign, at least 1. The first one starts where the
            linearised losses are largest, the others at random points of the sphere.
        num_steps: the number of steps per ascent; 0 for the linearisation only (as in
            sharpness-aware minimisation).
        optimizer: an optax transformation that descends on minus the objective, in coordinates in
            which the ball has radius 1; its steps are projected back into the ball. None for steps
            along the normalised gradient with a length that decays from 1 to 0. (With methods that
            scale each coordinate, such as Adam, projected ascents do not settle at maxima.)
        at_once: the number of ascents that `local_complexity` runs at the same time by vmap, of
            ``2 * num_starts`` per draw; None for all of them.

    Raises:
        TypeError: if a number is not an integer, or `optimizer` is not an
            `optax.GradientTransformation`.
        ValueError: if a number is too small.
    """

    num_starts: int = 2
    num_steps: int = 30
    optimizer: optax.GradientTransformation | None = None
    at_once: int | None = None

    def __post_init__(self) -> None:
        _validate.positive_int("num_starts", self.num_starts)
        _validate.positive_int("num_steps", self.num_steps, minimum=0)
        _validate.optional_positive_int("at_once", self.at_once)
        if self.optimizer is not None and not isinstance(
            self.optimizer, optax.GradientTransformation
        ):
            raise TypeError(
                "optimizer must be an optax.GradientTransformation or None, got "
                f"{type(self.optimizer).__name__}."
            )

    def transformation(self) -> optax.GradientTransformation:
        """The optimizer, or the default one."""
        return default_optimizer(self.num_steps) if self.optimizer is None else self.optimizer


def checked(ascent: "Ascent") -> "Ascent":
    """Returns `ascent` if it is an `Ascent`; else raises TypeError."""
    if not isinstance(ascent, Ascent):
        raise TypeError(f"ascent must be a complexity.Ascent, got {_validate.shown(ascent)}.")
    return ascent


def objective(
    losses: loss.LossVector,
    centre: Params,
    weights: Weights,
    dtype: jnp.dtype,
    centred: bool | Bool[Array, ""] = False,
) -> ValueAndGrad:
    """Value and gradient of ``L . w`` as a function of parameters near `centre`.

    The mean c of the losses at the centre is subtracted, since a large constant would round away
    the differences: ``sum_i w_i l_i = sum_i w_i (l_i - c) + c sum_i w_i``. If the weights add up to
    zero, c does not contribute. With `centred` they do, so a computed sum other than 0 is ignored
    as rounding.
    """
    support = weights.values.shape[0]
    equal = jnp.full(support, 1 / support, weights.values.dtype)
    mean_of_support = Weights(equal, weights.indices, weights.num_examples)
    constant, _ = losses.value_and_grad(centre, mean_of_support)
    constant = jax.lax.stop_gradient(constant)
    loss_vector_fn = losses.loss_vector_fn

    # The constant is an argument, since arrays spread over devices may not be closed over.
    def less_the_constant(
        both: tuple[Params, Float[Array, ""]], batch: Batch
    ) -> Float[Array, " batch"]:
        params, constant = both
        values = loss_vector_fn(params, batch)
        _validate.loss_vector(values, _validate.leading_axis("batch", batch))
        wide = _dtypes.accumulator(values.dtype)
        return values.astype(wide) - constant.astype(wide)

    differences = losses.replace(less_the_constant)
    total = jnp.where(centred, 0, _sum(jnp.asarray(weights.values))).astype(dtype)
    offset = constant.astype(dtype) * total

    def value_and_grad(params: Params) -> tuple[Float[Array, ""], Gradients]:
        value, (gradient, _) = differences.value_and_grad((params, constant), weights)
        return value.astype(dtype) + offset, gradient

    return value_and_grad


def _sum(values: Float[Array, " support"]) -> Float[Array, ""]:
    """The sum of weights; exactly 0 if it is 0 up to the rounding of the sum."""
    total = jnp.sum(values)
    rounding = 4 * jnp.finfo(values.dtype).eps * jnp.sum(jnp.abs(values))
    return jnp.where(jnp.abs(total) <= rounding, 0, total)


class Peak(NamedTuple):
    """The highest point of one ascent.

    Attributes:
        value: the value there, times the sign.
        gradient: the gradient there, a pytree like the parameters in wide dtypes.
        last_gain: the gain of `value` in the last step, relative to `value`.
        gap: the largest further gain in the ball of a linear function with this gradient. It is 0
            at a stationary point, and bounds the distance to the supremum if the objective is
            concave.
        finite: whether all values and gradients along the ascent were finite.
    """

    value: Float[Array, ""]
    gradient: Gradients
    last_gain: Float[Array, ""]
    gap: Float[Array, ""]
    finite: Bool[Array, ""]


class Centre(NamedTuple):
    """Value, gradient and its Euclidean norm at the centre of the ball."""

    value: Float[Array, ""]
    gradient: Gradients
    norm: Float[Array, ""]

    @classmethod
    def of(cls, value_and_grad: ValueAndGrad, params: Params) -> "Centre":
        """All of them at `params`, in wide dtypes."""
        value, gradient = value_and_grad(params)
        return cls(value, *_dtypes.with_norm(jax.tree.map(_dtypes.wide, gradient)))


def default_optimizer(num_steps: int) -> optax.GradientTransformation:
    """Steps along the normalised gradient, whose length decays from the radius to 0."""
    return optax.chain(
        optax.stateless(lambda updates, _: direction(updates)),
        optax.scale_by_learning_rate(optax.cosine_decay_schedule(1.0, max(num_steps, 1))),
    )


def start(
    centre: Centre,
    sign: Float[Array, ""],
    index: Int[Array, ""],
    num_starts: int,
    key: Key[Array, ""],
) -> Gradients:
    """The starting point of ascent `index` of `num_starts`, in units of the radius.

    The first ascent starts at the maximum of the linearised objective. If that is constant, it
    starts in a fixed direction, since an ascent never leaves a critical point. The others start at
    uniformly distributed points of the sphere.
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


def _somewhere(like: Gradients) -> Gradients:
    """A fixed direction without symmetries: cosines of multiples of one radian."""
    leaves, structure = jax.tree.flatten(like)
    patterns = [
        jnp.cos(1.0 + i + jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape)
        for i, leaf in enumerate(leaves)
    ]
    return direction(structure.unflatten(patterns))


def climb(
    value_and_grad: ValueAndGrad,
    params: Params,
    radius: Float[Array, ""],
    sign: Float[Array, ""],
    centre: Centre,
    start: Gradients,
    ascent: Ascent,
) -> Peak:
    """Ascends sign * value within the ball, in the coordinates of the unit ball.

    The optimizer gets the gradient of -sign * value(params + radius * z) with respect to z, and its
    step is projected back by `optax.projections.projection_l2_ball`. The result is the highest
    point of the ascent and the centre.
    """
    optimizer = ascent.transformation()

    def step(carry: PyTree, _: None) -> tuple[PyTree, None]:
        # Evaluate, then move: the losses are compiled once, and the last move is not used.
        z, state, peak = carry
        value, gradient = value_and_grad(displaced(params, z, radius))
        gradient = _times(sign, jax.tree.map(_dtypes.wide, gradient))
        value = sign.astype(value.dtype) * value
        norm = _dtypes.with_norm(gradient)[1]
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
    at_centre = Peak(
        value,
        _times(sign, centre.gradient),
        jnp.zeros_like(value),
        radius * centre.norm.astype(radius.dtype),
        jnp.isfinite(value) & jnp.isfinite(centre.norm),
    )
    carry = (start, optimizer.init(start), at_centre)
    (_, _, peak), _ = jax.lax.scan(step, carry, length=ascent.num_steps + 1)
    return peak


def displaced(params: Params, z: Gradients, radius: Float[Array, ""]) -> Gradients:
    """The parameters plus radius * z, in the dtypes of the parameters."""
    return jax.tree.map(
        lambda p, d: (p.astype(d.dtype) + radius.astype(d.dtype) * d).astype(p.dtype), params, z
    )


def direction(tree: Gradients) -> Gradients:
    """The tree scaled to length 1, or zeros if it is all zeros; safe for very small entries."""
    largest = functools.reduce(jnp.maximum, [jnp.abs(leaf).max() for leaf in jax.tree.leaves(tree)])
    scaled = jax.tree.map(
        lambda leaf: leaf / jnp.where(largest > 0, largest, 1).astype(leaf.dtype), tree
    )
    norm = jnp.where(largest > 0, optax.tree.norm(scaled), 1)
    return jax.tree.map(lambda leaf: leaf / norm.astype(leaf.dtype), scaled)


def _times(factor: Float[Array, ""], tree: Gradients) -> Gradients:
    return jax.tree.map(lambda leaf: factor.astype(leaf.dtype) * leaf, tree)
