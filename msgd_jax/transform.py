"""Laws of weights as optax gradient transformations: keys live in the state, chains work as usual.

There are two routes to the same update, for the same law, key and step:

* `multiplicative_noise` computes the noisy gradient itself, with one backward pass, from the loss
  vector function and the data that ``update`` is given (the fast algorithm; `with_noise` puts any
  optimizer behind it, `msgd` a learning rate and momentum);
* `aggregate_per_example` takes per-example gradients that you have already, and adds them up with
  the law's weights.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int, Key
from optax.experimental import aggregating

from msgd_jax import _dtypes, _laws, _mesh, _optimizers, _validate
from msgd_jax import loss as loss_lib
from msgd_jax._typing import (
    Data,
    DType,
    Gradients,
    LossVectorFn,
    OptState,
    Params,
    PositiveInt,
    Scalar,
    Updates,
)
from msgd_jax.noise import BatchLaw, MNoise
from msgd_jax.sharding import check_key_agrees

__all__ = [
    "AggregateState",
    "MultiplicativeNoiseState",
    "aggregate_per_example",
    "msgd",
    "multiplicative_noise",
    "with_noise",
]

_HINT = (
    " What optax's lookahead and sam go around gets no such arguments: put them behind the noise, "
    "transform.with_noise(optimizer, law, key)."
)


class MultiplicativeNoiseState(NamedTuple):
    """State of `multiplicative_noise`.

    Attributes:
        step: updates made so far; the step whose weights the next update draws.
        key: the PRNG key of the run, the same at every step.
        value: the weighted loss of the last update, an unbiased estimate of the mean loss at the
          parameters it was given; infinite before the first.
    """

    step: Int[Array, ""]
    key: Key[Array, ""]
    value: Float[Array, ""]


class AggregateState(NamedTuple):
    """State of `aggregate_per_example`.

    Attributes:
        step: updates made so far; the step whose weights the next update draws.
        key: the PRNG key of the run, the same at every step.
    """

    step: Int[Array, ""]
    key: Key[Array, ""]


def multiplicative_noise(
    law: MNoise | BatchLaw,
    key: Key[Array, ""],
    *,
    microbatch_size: PositiveInt | None = None,
    sharding: NamedSharding | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Makes the noisy gradient ``grad(L(params) . W)`` with one backward pass (Algorithm 1).

    First in a chain, since it makes the gradient that the rest of the chain works on::

      optimizer = optax.chain(multiplicative_noise(law, key), optax.adam(1e-3))
      state = optimizer.init(params)
      updates, state = optimizer.update(
          (), state, params, loss_vector_fn=loss_vector_fn, data=data
      )

    There are no updates to pass in yet, hence the ``()`` (None is as good). Optimizers that take
    more than the gradient do not get it in such a chain: see `with_noise`.

    What it composes with:

    * ``optax.masked`` and ``optax.partition``: only the selected parameters get the noisy gradient,
      the others keep the updates passed in. Give ``full_params=params`` besides, since optax hides
      the other parameters from the transformations inside.
    * ``optax.MultiSteps`` behind it in a chain averages noisy gradients over several steps. Around
      it there is nothing to accumulate, which is an error: use `microbatch_size` for memory. The
      same holds for ``apply_if_finite``, ``conditionally_transform``, ``lookahead`` and ``sam``:
      ``with_noise(optax.apply_if_finite(optax.adam(1e-3), 5), noise, key)``.
    * ``optax.inject_hyperparams(msgd, static_args=("law", "key"))``.

    Models with mutable statistics need `train` or `loss.weighted_value_and_grad` instead. The
    program of eager calls is kept for the last `loss_vector_fn`.

    Args:
        law: the law of the weights. The num_examples of an `MNoise` must be the leading axis of the
          data; with a `BatchLaw` the data are a batch that a loader drew, of any size.
        key: a typed PRNG key, copied into the state by ``init``.
        microbatch_size: examples in one pass, as in `loss.weighted_value_and_grad`.
        sharding: how the examples are spread over devices, as in `loss.weighted_value_and_grad`.

    Returns:
        A transformation with ``update((), state, params, *, loss_vector_fn, data)``: the update is
        like `params`. It raises ValueError if a gradient is passed in, if `params`,
        `loss_vector_fn` or `data` is missing, and as `loss.weighted_value_and_grad` does.

    Raises:
        TypeError, ValueError: if `law` is no law, `key` is no typed PRNG key,
            `microbatch_size` is not positive, or `sharding` does not spread the leading axis alone.

    Example:
        >>> from msgd_jax import loss, noise, transform
        >>> losses = loss.per_example(lambda theta, x: (theta - x) ** 2)
        >>> x, theta = jnp.asarray([0.0, 1.0, 3.0, 4.0]), jnp.asarray(1.0)
        >>> noisy = transform.multiplicative_noise(noise.cov(4, batch_size=2), jax.random.key(0))
        >>> optimizer = optax.chain(noisy, optax.adam(0.1))
        >>> state = optimizer.init(theta)
        >>> options = dict(loss_vector_fn=losses, data=x)
        >>> updates, state = optimizer.update((), state, theta, **options)
        >>> int(state[0].step), updates.shape
        (1, ())
    """
    alone = optax.identity()
    whole = with_noise(alone, law, key, microbatch_size=microbatch_size, sharding=sharding)

    def init_fn(params: Params) -> MultiplicativeNoiseState:
        state: Any = whole.init(params)
        return state[0]

    def update_fn(
        updates: Updates, state: Any, params: Params = None, **extra_args: Any
    ) -> tuple[Updates, MultiplicativeNoiseState]:
        both: Any = state, alone.init(params)
        updates, both = whole.update(updates, both, params, **extra_args)
        return updates, both[0]

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def with_noise(
    optimizer: optax.GradientTransformation,
    law: MNoise | BatchLaw,
    key: Key[Array, ""],
    *,
    microbatch_size: PositiveInt | None = None,
    sharding: NamedSharding | None = None,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer behind `multiplicative_noise`, with all that it may ask for.

    Updates and state are those of ``optax.chain(multiplicative_noise(law, key), optimizer)``,
    where nobody tells the optimizer the loss. Here those that take more get it, all with the
    weights of the step, as from `train.make_step`: ``value=`` (``polyak_sgd``, ``momo``,
    ``reduce_on_plateau``), ``grad=`` and ``value_fn=`` (line searches, ``lbfgs``), ``obj_fn=``
    (``sophia``), ``grad_fn=`` (``sam``), and `loss_vector_fn` and `data` as they are.

    Args:
        optimizer: any optax transformation of a gradient, a chain of several, say.
        law: the law of the weights. The num_examples of an `MNoise` must be the leading axis of the
          data; with a `BatchLaw` the data are a batch that a loader drew, of any size.
        key: a typed PRNG key, copied into the state by ``init``.
        microbatch_size: examples in one pass, as in `loss.weighted_value_and_grad`.
        sharding: how the examples are spread over devices, as in `loss.weighted_value_and_grad`.

    Returns:
        A transformation with ``update((), state, params, *, loss_vector_fn, data)``; see
        `multiplicative_noise`.

    Raises:
        TypeError, ValueError: as `multiplicative_noise`, or if `optimizer` is not an optax
            transformation.

    Example:
        >>> from msgd_jax import loss, noise, transform
        >>> losses = loss.per_example(lambda theta, x: (theta - x) ** 2)
        >>> x, theta = jnp.asarray([0.0, 1.0, 3.0, 4.0]), jnp.asarray(1.0)
        >>> optimizer = transform.with_noise(optax.lbfgs(), noise.gd(4), jax.random.key(0))
        >>> state = optimizer.init(theta)
        >>> updates, state = optimizer.update((), state, theta, loss_vector_fn=losses, data=x)
        >>> round(float(optax.apply_updates(theta, updates)), 3)
        2.0
    """
    behind = _optimizers.updater(optimizer)
    init_fn, noisy_gradient = _noisy_gradient(law, key, microbatch_size, sharding)

    def update_fn(
        updates: Updates,
        state: Any,
        params: Params = None,
        *,
        loss_vector_fn: LossVectorFn | None = None,
        data: Data = None,
        full_params: Params = None,
        **extra_args: Any,
    ) -> tuple[Updates, tuple[MultiplicativeNoiseState, OptState]]:
        _optimizers.check_no_updates(updates, params, extra_args)
        at = noisy_gradient(state[0], params, loss_vector_fn, data, full_params)
        value, grads = at(params)
        offers = extra_args | _optimizers.offers(at, value, grads)
        updates, opt_state = behind(
            grads, state[1], params, **offers, loss_vector_fn=loss_vector_fn, data=data
        )
        value = value.astype(state[0].value.dtype)
        state = MultiplicativeNoiseState(state[0].step + 1, state[0].key, value), opt_state
        return updates, state

    return optax.GradientTransformationExtraArgs(
        lambda params: (init_fn(params), optimizer.init(params)), update_fn
    )


def aggregate_per_example(law: MNoise | BatchLaw, key: Key[Array, ""]) -> aggregating.Aggregator:
    """Adds up per-example gradients with the weights of a law.

    The counterpart of `multiplicative_noise` for code that has per-example gradients already, to
    clip them, say: an aggregator as `optax.experimental.aggregating` defines it, whose updates
    come with a leading axis of N examples and leave without it. The sum is in float32 or wider.

    Inside ``optax.masked`` it sees the selected leaves only; ``optax.MultiSteps`` belongs behind it
    in a chain, not around it.

    Args:
        law: the law of the weights. The num_examples of an `MNoise` must be the leading axis of the
          updates; with a `BatchLaw` they are of a batch that a loader drew, of any size.
        key: a typed PRNG key, copied into the state by ``init``.

    Returns:
        An aggregator with ``update(per_example_gradients, state, params)``. It raises ValueError if
        `params` is missing, and, naming the leaf, if the shape of a leaf is not
        ``(N, *parameter shape)``: a gradient that is averaged already is refused.

    Raises:
        TypeError, ValueError: if `law` is no law, or `key` is no typed PRNG key.

    Example:
        >>> from msgd_jax import noise, transform
        >>> gradients = jnp.asarray([2.0, 0.0, -4.0, -6.0])  # of four examples
        >>> theta = jnp.asarray(1.0)
        >>> aggregator = transform.aggregate_per_example(noise.gd(4), jax.random.key(0))
        >>> update, state = aggregator.update(gradients, aggregator.init(theta), theta)
        >>> float(update)
        -2.0
    """
    _check_law_and_key(law, key)

    def init_fn(params: Params) -> AggregateState:
        del params
        check_key_agrees("key", key)
        return AggregateState(jnp.zeros((), jnp.int32), jnp.copy(jax.random.clone(key)))

    def update_fn(
        updates: Updates, state: Any, params: Params = None, **extra_args: Any
    ) -> tuple[Updates, AggregateState]:
        del extra_args
        size = _optimizers.check_per_example(updates, params)
        weights = _laws.of_data(law, size).sample(state.key, state.step)

        def weighted_sum(gradients: Float[Array, "..."]) -> Float[Array, "..."]:
            if weights.indices is not None:
                gradients = gradients[weights.indices]
            dtype = _dtypes.accumulator(gradients.dtype, weights.values.dtype)
            total = jnp.tensordot(
                weights.values.astype(dtype),
                gradients.astype(dtype),
                axes=1,
                precision=jax.lax.Precision.HIGHEST,
            )
            return total.astype(gradients.dtype)

        return jax.tree.map(weighted_sum, updates), AggregateState(state.step + 1, state.key)

    return aggregating.Aggregator(init_fn, update_fn)


def msgd(
    learning_rate: optax.ScalarOrSchedule,
    law: MNoise | BatchLaw,
    key: Key[Array, ""],
    momentum: Scalar | None = None,
    nesterov: bool = False,
    *,
    accumulator_dtype: DType = None,
    microbatch_size: PositiveInt | None = None,
    sharding: NamedSharding | None = None,
) -> optax.GradientTransformationExtraArgs:
    """M-SGD (Eq. 6): `optax.sgd` on the noisy gradient of `multiplicative_noise`.

    Args:
        learning_rate: eta, a number or a schedule.
        law: the law of the weights.
        key: a typed PRNG key, copied into the state by ``init``.
        momentum: decay rate of the momentum, or None for none.
        nesterov: whether the momentum is Nesterov's.
        accumulator_dtype: of the momentum; None for the parameters' own.
        microbatch_size: examples in one pass, as in `loss.weighted_value_and_grad`.
        sharding: how the examples are spread over devices, as in `loss.weighted_value_and_grad`.

    Returns:
        A transformation with ``update((), state, params, *, loss_vector_fn, data)``; see
        `multiplicative_noise`.

    Raises:
        TypeError, ValueError: as `multiplicative_noise`, or if `learning_rate` or `momentum` is
            negative, or `accumulator_dtype` is not a floating-point type.

    Example:
        >>> from msgd_jax import loss, noise, transform
        >>> losses = loss.per_example(lambda theta, x: (theta - x) ** 2)
        >>> x, theta = jnp.asarray([0.0, 1.0, 3.0, 4.0]), jnp.asarray(1.0)
        >>> optimizer = transform.msgd(0.1, noise.gd(4), jax.random.key(0))
        >>> state = optimizer.init(theta)
        >>> updates, state = optimizer.update((), state, theta, loss_vector_fn=losses, data=x)
        >>> round(float(optax.apply_updates(theta, updates)), 6)
        1.2
    """
    for name, value in (("learning_rate", learning_rate), ("momentum", momentum)):
        # Arrays may be traced (optax.inject_hyperparams, vmap): they are taken on trust.
        if value is not None and not callable(value) and not isinstance(value, jax.Array):
            _validate.finite_nonnegative(name, value)
    if accumulator_dtype is not None:
        _validate.float_dtype("accumulator_dtype", accumulator_dtype)
    optimizer = optax.sgd(learning_rate, momentum, nesterov, accumulator_dtype)
    return with_noise(optimizer, law, key, microbatch_size=microbatch_size, sharding=sharding)


def _noisy_gradient(
    law: MNoise | BatchLaw,
    key: Key[Array, ""],
    microbatch_size: PositiveInt | None,
    sharding: NamedSharding | None,
) -> tuple[Callable[..., MultiplicativeNoiseState], Callable[..., _optimizers.ValueAndGrad]]:
    """How the state begins, and what gives value and gradient at the weights of a step."""
    _check_law_and_key(law, key)
    microbatch_size = _validate.optional_positive_int("microbatch_size", microbatch_size)
    _mesh.check("sharding", sharding)

    def init_fn(params: Params) -> MultiplicativeNoiseState:
        if jax.tree.leaves(params):  # a mask may hide them all
            _validate.floating_params(params)
        check_key_agrees("key", key)
        own = jnp.copy(jax.random.clone(key))  # the caller's is not to be donated with the state
        return MultiplicativeNoiseState(jnp.zeros((), jnp.int32), own, _dtypes.not_yet(params))

    def make(loss_vector_fn: LossVectorFn) -> Callable[..., Any]:
        return loss_lib.noisy_value_and_grad(
            loss_vector_fn, law, microbatch_size=microbatch_size, sharding=sharding
        )

    # It owns the program of eager calls.
    made = _optimizers.keep_last(make)

    def noisy_gradient(
        state: Any, params: Params, loss_vector_fn: LossVectorFn, data: Data, full_params: Params
    ) -> _optimizers.ValueAndGrad:
        _validate.passed_to_update(
            "multiplicative_noise", _HINT, params=params, loss_vector_fn=loss_vector_fn, data=data
        )
        if _optimizers.has_masked(params):
            value_and_grad = make(_optimizers.unmasked(loss_vector_fn, full_params))
        else:
            value_and_grad = made(loss_vector_fn, (params, data, state))

        key = _optimizers.repeated(state.key)

        def at(params: Params) -> tuple[Float[Array, ""], Gradients]:
            return value_and_grad(params, data, key(), state.step)

        return at

    return init_fn, noisy_gradient


def _check_law_and_key(law: MNoise | BatchLaw, key: Key[Array, ""]) -> None:
    _laws.of_steps("law", law)
    _validate.prng_key("key", key)
