"""The regulariser of Eq. 8 in training, with its supremum and absolute value."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from msgd_jax import _dtypes, _validate, loss
from msgd_jax._streams import Stream, derive
from msgd_jax._typing import Data, Gradients, Params, PositiveInt, Scalar, Updates
from msgd_jax.complexity import _ascent, _multipliers
from msgd_jax.complexity._ascent import Ascent
from msgd_jax.noise import MNoise, Weights
from msgd_jax.sharding import check_key_agrees

# One step from one start per sign, since the regulariser is computed in every step of training.
_QUICK = Ascent(num_starts=1, num_steps=1)


def penalty(
    losses: loss.LossVector,
    params: Params,
    multipliers: Weights,
    *,
    radius: Scalar,
    key: Key[Array, ""] | None = None,
    ascent: Ascent = _QUICK,
) -> Float[Array, ""]:
    """``sup |sum v_i l_i| / N`` over a ball, to be minimised.

    It is the random term of Eq. 8 for a given v. Its gradient is that of ``|sum v_i l_i| / N`` at
    the supremum that the ascents found, with a fixed move from the centre (Danskin's theorem).
    Second derivatives are 0. With `multipliers` from the ``sample`` of `rademacher` or another
    law::

      def objective(params):
          return losses.mean(params) + scale * penalty(losses, params, multipliers, radius=0.1)

      jax.grad(objective)(params)

    It costs ``1 + 2 * num_starts * (num_steps + 1)`` forward and backward passes and one more
    forward pass: with the default of one step from one start per sign, 5 and one.
    `add_local_complexity` is the same as an optax transformation, which also draws v. Eager calls
    compile anew each time: put the function under `jax.jit` to call it more than once.

    Args:
        losses: the loss vector.
        params: the centre of the ball: a pytree of floating-point arrays.
        multipliers: v, a `noise.Weights` for N examples.
        radius: the radius of the ball, at least 0.
        key: a typed PRNG key for the random starts; needed with ``num_starts`` > 1 only.
        ascent: the settings of the search for the supremum; ``at_once`` is ignored.

    Returns:
        A scalar that can be differentiated; NaN if an ascent comes to a value or a gradient that is
        not finite.

    Raises:
        TypeError: if `losses` is not a `loss.LossVector`, `multipliers` is not a `noise.Weights`, a
            parameter is not floating point, or `ascent` is not an `Ascent`.
        ValueError: if `radius` is negative, `multipliers` are for another number of examples, or
            `key` is missing with ``num_starts`` > 1.
    """
    loss.checked(losses, params)
    if not isinstance(multipliers, Weights):
        raise TypeError(
            "multipliers must be a noise.Weights, as `sample` draws them, got "
            f"{type(multipliers).__name__}."
        )
    _validate.nonnegative_scalar("radius", radius)
    _ascent.checked(ascent)
    if key is None and ascent.num_starts > 1:
        raise ValueError("key is needed for the random starts of num_starts > 1.")
    key = jax.random.key(0) if key is None else key  # not used: the first start is not random
    fixed = jax.lax.stop_gradient

    # Compiled here, so that the program is freed after the call (or is part of the user's).
    @jax.jit
    def highest(
        params: Params, data: Data, multipliers: Weights, key: Key[Array, ""]
    ) -> tuple[Array, Gradients]:
        return _supremum(losses.replace(data=data), params, multipliers, radius, key, ascent)

    found = highest(fixed(params), fixed(losses.data), fixed(multipliers), key)
    value, gradient = fixed(found)
    # A term with value 0 and the gradient found, since the ascent is not differentiated.
    moves = jax.tree.map(lambda p: p - fixed(p), params)
    products = jax.tree.map(
        lambda g, m: jnp.sum(g * m.astype(g.dtype)).astype(value.dtype), gradient, moves
    )
    return value + jax.tree.reduce(jnp.add, products)


class LocalComplexityState(NamedTuple):
    """State of `add_local_complexity`.

    Attributes:
        step: the number of updates made so far, which is the step of the next draw of v.
        key: the PRNG key of the run, the same at every step.
        value: the regulariser at the last update, without `scale`; infinite before the first one.
    """

    step: Int[Array, ""]
    key: Key[Array, ""]
    value: Float[Array, ""]


def add_local_complexity(
    multipliers: _multipliers.Multipliers | MNoise,
    key: Key[Array, ""],
    *,
    radius: Scalar,
    scale: Scalar = 1.0,
    ascent: Ascent = _QUICK,
    microbatch_size: PositiveInt | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adds the gradient of ``scale * sup |sum v_i l_i| / N`` to the updates, a new v each step.

    It is the full regulariser of Eq. 8 for optax, as `optax.add_decayed_weights` is for weight
    decay. Put it behind the noise of any law (`noise.gd` for the objective of Eq. 8 itself) and
    before any optimizer::

      optimizer = optax.chain(
          transform.multiplicative_noise(noise.sgd(N, b), noise_key),
          complexity.add_local_complexity(complexity.rademacher(N, b), key, radius=0.1),
          optax.adam(1e-3),
      )
      state = optimizer.init(params)
      updates, state = optimizer.update(
          (), state, params, loss_vector_fn=loss_vector_fn, data=data
      )

    Updates outside of `jax.jit` compile anew each time, as calls of `penalty` do.

    `train.make_step` passes the loss vector function and the data to its optimizer, so there it
    goes before the optimizer, in a chain without `multiplicative_noise`. With ``rademacher(N, b)``
    a step computes b examples, so its cost is like that of a mini-batch. GD-Rademacher in the paper
    leaves out the supremum and the absolute value: that is `noise.rademacher`, which costs as much
    as a plain step.

    Args:
        multipliers: the law of v, for the N examples of the data.
        key: a typed PRNG key, copied into the state by ``init``. It may be the key of
            `multiplicative_noise`, since v is drawn from another stream.
        radius: the radius of the ball, at least 0.
        scale: the factor of the regulariser, at least 0.
        ascent: the settings of the search for the supremum; `penalty` states the costs.
        microbatch_size: examples in one pass, as in `loss.weighted_value_and_grad`; None for all.

    Returns:
        A transformation with ``update(updates, state, params, *, loss_vector_fn, data)``. It raises
        ValueError if one of these is missing, or if `optax.masked` hides some of the parameters.

    Raises:
        TypeError: if `multipliers` is not a law, `key` is not a typed PRNG key, `radius` or `scale`
            is not a number, `ascent` is not an `Ascent`, or `microbatch_size` is not an integer.
        ValueError: if `radius` or `scale` is negative, or `microbatch_size` is not positive.
    """
    law = _multipliers.of(multipliers)
    _validate.prng_key("key", key)
    _validate.nonnegative_scalar("radius", radius)
    _validate.nonnegative_scalar("scale", scale)
    _ascent.checked(ascent)
    _validate.optional_positive_int("microbatch_size", microbatch_size)

    def init_fn(params: Params) -> LocalComplexityState:
        check_key_agrees("key", key)
        _validate.floating_params(params)
        copied, value = jnp.copy(jax.random.clone(key)), _dtypes.not_yet(params)
        return LocalComplexityState(jnp.zeros((), jnp.int32), copied, value)

    def update_fn(
        updates: Updates,
        state: Any,
        params: Params = None,
        *,
        loss_vector_fn: Any = None,
        data: Data = None,
        **extra_args: Any,
    ) -> tuple[Updates, LocalComplexityState]:
        del extra_args
        _validate.passed_to_update(
            "add_local_complexity", params=params, loss_vector_fn=loss_vector_fn, data=data
        )
        hidden = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
        if any(isinstance(leaf, optax.MaskedNode) for leaf in hidden):
            raise ValueError(
                "add_local_complexity needs all parameters, and optax.masked hides some of them: "
                "put it outside."
            )
        losses = loss.LossVector(loss_vector_fn, data, microbatch_size=microbatch_size)
        _multipliers.of(law, losses.num_examples)

        def of_step(
            params: Params, data: Data, key: Key[Array, ""], step: Int[Array, ""]
        ) -> tuple[Array, Gradients]:
            own, start_key = losses.replace(data=data), derive(key, Stream.ASCENTS, step)
            v = law.drawn(key, step)
            return _supremum(own, params, v, radius, start_key, ascent, law.centred)

        # Compiled here, so that the program is freed after the call, as in `penalty`.
        value, gradient = jax.jit(of_step)(params, data, state.key, state.step)
        updates = jax.tree.map(
            lambda u, g: (u.astype(g.dtype) + jnp.asarray(scale, g.dtype) * g).astype(u.dtype),
            updates,
            gradient,
        )
        value = value.astype(state.value.dtype)
        return updates, LocalComplexityState(state.step + 1, state.key, value)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _supremum(
    losses: loss.LossVector,
    params: Params,
    multipliers: Weights,
    radius: Scalar,
    key: Key[Array, ""],
    ascent: Ascent,
    centred: bool = False,
) -> tuple[Float[Array, ""], Gradients]:
    """The largest value that the ascents reach, and the gradient there.

    Both are NaN if an ascent comes to a value or a gradient that is not finite.
    """
    params = jax.tree.map(jnp.asarray, params)
    n = multipliers.num_examples
    weights = Weights(multipliers.values / n, multipliers.indices, n)
    dtype = _dtypes.accumulator(*(leaf.dtype for leaf in jax.tree.leaves(params)))
    ball = jnp.asarray(radius, dtype)
    value_and_grad = _ascent.objective(losses, params, weights, dtype, centred)
    centre = _ascent.Centre.of(value_and_grad, params)

    def one_ascent(position: Int[Array, ""]) -> _ascent.Peak:
        sign = jnp.where(position % 2 == 0, 1, -1).astype(dtype)
        start_key = derive(key, Stream.ASCENTS, position)
        start = _ascent.start(centre, sign, position // 2, ascent.num_starts, start_key)
        return _ascent.climb(value_and_grad, params, ball, sign, centre, start, ascent)

    # All signs and starts one after the other, so that memory holds one ascent.
    peaks = jax.lax.map(one_ascent, jnp.arange(2 * ascent.num_starts))
    best = peaks.value.argmax()
    # Comparisons with a NaN are false, so that an ascent passes by it.
    lost = jnp.where(peaks.finite.all(), 0, jnp.nan)
    gradient = jax.tree.map(lambda g: g[best] + lost.astype(g.dtype), peaks.gradient)
    return peaks.value[best] + lost.astype(peaks.value.dtype), gradient
