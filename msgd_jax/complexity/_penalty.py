"""The regulariser of Eq. 8 in training, supremum and absolute value included."""

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

# One step from one start of each sign: the price of a regulariser in every step of training.
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

    The random term of Eq. 8 as it stands, for a given v. Its gradient is that of
    ``|sum v_i l_i| / N`` where the ascents found the supremum, the move from the centre held fixed
    (Danskin's theorem); second derivatives are 0. So, with `multipliers` from the ``sample`` of
    `rademacher` or another::

      def objective(params):
          return losses.mean(params) + scale * penalty(losses, params, multipliers, radius=0.1)

      jax.grad(objective)(params)

    With the default of one step from one start of each sign it costs 5 forward and backward passes,
    in general ``1 + 2 * num_starts * (num_steps + 1)``, and one forward pass more;
    `add_local_complexity` is the same as an optax transformation, which draws v too. Called eagerly
    it is compiled anew on each call: put it under `jax.jit` to call it again.

    Args:
        losses: the loss vector.
        params: the centre of the ball: a pytree of floating-point arrays.
        multipliers: v, as `noise.Weights` of N.
        radius: of the ball, at least 0.
        key: for the random starts, needed with ``num_starts`` > 1 only.
        ascent: how the supremum is sought, ``at_once`` left aside.

    Returns:
        A scalar that can be differentiated.

    Raises:
        TypeError: if `losses` is not a `loss.LossVector`, `multipliers` is not a `noise.Weights`, a
            parameter is not floating point, or `ascent` is not an `Ascent`.
        ValueError: if `radius` is negative, `multipliers` are for another number of examples, or a
            key is needed.
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
    key = jax.random.key(0) if key is None else key  # the first start is not random
    fixed = jax.lax.stop_gradient

    # A program of this call, which goes with it; under the user's jit it is part of that.
    @jax.jit
    def highest(
        params: Params, data: Data, multipliers: Weights, key: Key[Array, ""]
    ) -> tuple[Array, Gradients]:
        return _supremum(losses.replace(data=data), params, multipliers, radius, key, ascent)

    found = highest(fixed(params), fixed(losses.data), fixed(multipliers), key)
    value, gradient = fixed(found)
    # Zero, with the gradient found: nothing is differentiated through the ascent.
    moves = jax.tree.map(lambda p: p - fixed(p), params)
    products = jax.tree.map(
        lambda g, m: jnp.sum(g * m.astype(g.dtype)).astype(value.dtype), gradient, moves
    )
    return value + jax.tree.reduce(jnp.add, products)


class LocalComplexityState(NamedTuple):
    """State of `add_local_complexity`.

    Attributes:
        step: updates made so far; the step whose v the next update draws.
        key: the PRNG key of the run, the same at every step.
        value: of the regulariser at the last update, without `scale`; infinite before the first.
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

    The full regulariser of Eq. 8 for optax, as `optax.add_decayed_weights` is for weight decay.
    Behind any M-noise (`noise.gd` for the objective of Eq. 8 itself), before any optimizer::

      optimizer = optax.chain(
          transform.multiplicative_noise(noise.sgd(N, b), noise_key),
          complexity.add_local_complexity(complexity.rademacher(N, b), key, radius=0.1),
          optax.adam(1e-3),
      )
      state = optimizer.init(params)
      updates, state = optimizer.update(
          (), state, params, loss_vector_fn=loss_vector_fn, data=data
      )

    An update outside of `jax.jit` is compiled anew each time, as a call of `penalty` is.

    `train.make_step` passes loss vector function and data along, so there it goes before the
    optimizer in a chain of its own. With ``rademacher(N, b)`` a step takes b examples, so that it
    stays in proportion to a mini-batch. What the paper calls GD-Rademacher leaves supremum and
    absolute value out: that is `noise.rademacher`, and costs nothing more than a plain step.

    Args:
        multipliers: the law of v, for the N examples of the data.
        key: a typed PRNG key, copied into the state by ``init``. It may be the one of the M-noise:
            the draws come from other streams.
        radius: of the ball, at least 0.
        scale: the factor of the regulariser, at least 0.
        ascent: how the supremum is sought, as in `penalty`, which has the costs too.
        microbatch_size: examples in one pass, as in `loss.weighted_value_and_grad`; None for all.

    Returns:
        A transformation with ``update(updates, state, params, *, loss_vector_fn, data)``. It raises
        ValueError if one of these is missing, or if some parameters are hidden by `optax.masked`.

    Raises:
        TypeError, ValueError: if `multipliers` is no law, `key` is no typed PRNG key, `radius` or
            `scale` is negative, `ascent` is not an `Ascent`, or `microbatch_size` is not a positive
            integer.
    """
    law = _multipliers.of(multipliers)
    _validate.prng_key("key", key)
    _validate.nonnegative_scalar("radius", radius)
    _validate.nonnegative_scalar("scale", scale)
    _ascent.checked(ascent)
    _validate.optional_positive_int("microbatch_size", microbatch_size)

    def init_fn(params: Params) -> LocalComplexityState:
        check_key_agrees("key", key)
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

        # A program of this call, as in `penalty`.
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
    """The supremum, and the gradient there, as far as the ascents reach."""
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

    # Both signs from each start, one after the other: memory is that of one ascent.
    peaks = jax.lax.map(one_ascent, jnp.arange(2 * ascent.num_starts))
    best = peaks.value.argmax()
    return peaks.value[best], jax.tree.map(lambda g: g[best], peaks.gradient)
