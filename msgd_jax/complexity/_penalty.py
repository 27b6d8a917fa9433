"""The regulariser of Eq. 8 in training, supremum and absolute value included."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from msgd_jax import _dtypes, _validate, loss
from msgd_jax._streams import Stream, derive
from msgd_jax.complexity import _ascent, _multipliers
from msgd_jax.complexity._problem import Settings, objective
from msgd_jax.noise import MNoise, Weights
from msgd_jax.sharding import check_key_agrees

Penalty = Callable[..., Float[Array, ""]]
"""``penalty(params, data, multipliers, key=None)``, a scalar that can be differentiated."""


def penalty(
    loss_vector_fn: loss.LossVectorFn,
    *,
    radius: float | Float[Array, ""],
    num_steps: int = 1,
    num_starts: int = 1,
    optimizer: optax.GradientTransformation | None = None,
    microbatch_size: int | None = None,
) -> Penalty:
    """Turns a loss vector function into ``sup |sum v_i l_i| / N`` over a ball, to be minimised.

    The random term of Eq. 8 as it stands, for a given v. Its gradient is that of
    ``|sum v_i l_i| / N`` where the ascents found the supremum, the move from the centre held fixed
    (Danskin's theorem); second derivatives are 0. So, with `multipliers` from the ``sample`` of
    `rademacher` or another::

      penalty = complexity.penalty(loss_vector_fn, radius=0.1)
      objective = lambda params: mean_loss(params) + scale * penalty(params, data, multipliers)
      jax.grad(objective)(params)

    With the default of one step from one start of each sign it costs 5 forward and backward passes,
    in general ``1 + 2 * num_starts * (num_steps + 1)``, and one forward pass more;
    `add_local_complexity` is the same as an optax transformation, which draws v too.

    Args:
        loss_vector_fn: ``loss_vector_fn(params, batch)`` returns the losses of the batch, [B].
        radius: of the ball, at least 0.
        num_steps: of each ascent; 0 for the losses' linearisation (as in sharpness-aware
            minimisation).
        num_starts: ascents of each sign.
        optimizer: of the ascents, as in `local_complexity`.
        microbatch_size: examples in one pass, as in `loss.weighted_value_and_grad`; None for all.

    Returns:
        ``penalty(params, data, multipliers, key=None)``, a scalar: `params` a pytree of
        floating-point arrays, `data` a pytree of arrays [N, ...], `multipliers` v as a
        `noise.Weights` of N, and `key` for the random starts, needed with `num_starts` > 1 only.

    Raises:
        TypeError, ValueError: if an argument is not as described.
    """
    options = (radius, num_steps, num_starts, optimizer, microbatch_size)
    ascend = _ascender(loss_vector_fn, *options)

    def of_params(params: Any, data: Any, multipliers: Weights, key: Any = None) -> Array:
        _check(params, data, multipliers)
        if key is None and num_starts > 1:
            raise ValueError("key is needed for the random starts of num_starts > 1.")
        key = jax.random.key(0) if key is None else key  # the first start is not random
        fixed = jax.lax.stop_gradient
        # A program of this call, which goes with it; under the user's jit it is part of that.
        program = jax.jit(lambda *arguments: ascend(*arguments))
        value, gradient = fixed(program(fixed(params), fixed(data), fixed(multipliers), key))
        # Zero, with the gradient found: nothing is differentiated through the ascent.
        moves = jax.tree.map(lambda p: p - fixed(p), params)
        products = jax.tree.map(
            lambda g, m: jnp.sum(g * m.astype(g.dtype)).astype(value.dtype), gradient, moves
        )
        return value + jax.tree.reduce(jnp.add, products)

    return of_params


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
    radius: float | Float[Array, ""],
    scale: float | Float[Array, ""] = 1.0,
    num_steps: int = 1,
    num_starts: int = 1,
    optimizer: optax.GradientTransformation | None = None,
    microbatch_size: int | None = None,
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
        num_steps: of each ascent, as in `penalty`, which has the costs too.
        num_starts: ascents of each sign.
        optimizer: of the ascents, as in `local_complexity`.
        microbatch_size: examples in one pass, as in `loss.weighted_value_and_grad`; None for all.

    Returns:
        A transformation with ``update(updates, state, params, *, loss_vector_fn, data)``. It raises
        ValueError if one of these is missing, or if some parameters are hidden by `optax.masked`.

    Raises:
        TypeError, ValueError: if an argument is not as described.
    """
    law = _multipliers.of(multipliers)
    _validate.prng_key("key", key)
    _validate.nonnegative_scalar("scale", scale)
    options = (radius, num_steps, num_starts, optimizer, microbatch_size)
    _ascender(len, *options)  # so that errors come now

    def init_fn(params: Any) -> LocalComplexityState:
        check_key_agrees("key", key)
        copied, value = jnp.copy(jax.random.clone(key)), _dtypes.not_yet(params)
        return LocalComplexityState(jnp.zeros((), jnp.int32), copied, value)

    def update_fn(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        loss_vector_fn: Any = None,
        data: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, LocalComplexityState]:
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
        _multipliers.of(law, _validate.leading_axis("data", data))
        ascend = _ascender(loss_vector_fn, *options, centred=law.centred)

        def of_step(params: Any, data: Any, key: Key[Array, ""], step: Int[Array, ""]) -> Any:
            start_key = derive(key, Stream.ASCENTS, step)
            return ascend(params, data, law.drawn(key, step), start_key)

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


def _ascender(
    loss_vector_fn: Any,
    radius: Any,
    num_steps: Any,
    num_starts: Any,
    optimizer: Any,
    microbatch_size: int | None,
    centred: bool = False,
) -> Callable[..., tuple[Array, Any]]:
    """The supremum and the gradient there, as a function of params, data, v and a key."""
    _validate.function("loss_vector_fn", loss_vector_fn)
    if microbatch_size is not None:
        _validate.positive_int("microbatch_size", microbatch_size)
    settings = Settings.of(radius, num_starts, num_steps, optimizer, None, jnp.float32)

    def ascend(
        params: Any, data: Any, multipliers: Weights, key: Key[Array, ""]
    ) -> tuple[Array, Any]:
        params = jax.tree.map(jnp.asarray, params)
        n = multipliers.num_examples
        weights = Weights(multipliers.values / n, multipliers.indices, n)
        dtype = _dtypes.accumulator(*(leaf.dtype for leaf in jax.tree.leaves(params)))
        ball = jnp.asarray(radius, dtype)

        value_and_grad = objective(
            loss_vector_fn, params, data, weights, dtype, microbatch_size, centred
        )
        centre = _ascent.Centre.of(value_and_grad, params)

        def one_ascent(position: Int[Array, ""]) -> _ascent.Peak:
            sign = jnp.where(position % 2 == 0, 1, -1).astype(dtype)
            start_key = derive(key, Stream.ASCENTS, position)
            start = _ascent.start(centre, sign, position // 2, num_starts, start_key)
            return _ascent.climb(
                value_and_grad, params, ball, sign, centre, start,
                settings.optimizer, settings.num_steps,
            )  # fmt: skip

        peaks = jax.lax.map(one_ascent, jnp.arange(2 * num_starts))
        best = peaks.value.argmax()
        return peaks.value[best], jax.tree.map(lambda g: g[best], peaks.gradient)

    return ascend


def _check(params: Any, data: Any, multipliers: Any) -> None:
    _validate.floating_params(params)
    _validate.leading_axis("data", data)
    if not isinstance(multipliers, Weights):
        raise TypeError(
            "multipliers must be a noise.Weights, as `sample` draws them, got "
            f"{type(multipliers).__name__}."
        )
