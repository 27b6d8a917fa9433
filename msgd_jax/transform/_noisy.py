"""The noisy gradient as an optax transformation, alone and with an optimizer behind it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int, Key

from msgd_jax import _dtypes, _laws, _mesh, _optimizers, _validate
from msgd_jax import loss as loss_lib
from msgd_jax._streams import repeated
from msgd_jax._typing import (
    Data,
    DType,
    Gradients,
    LossVectorFn,
    ModelState,
    OptState,
    Params,
    PositiveInt,
    PyTree,
    Scalar,
    Updates,
)
from msgd_jax.noise import BatchLaw, MNoise
from msgd_jax.sharding import check_key_agrees

_HINT = (
    " optax's lookahead and sam do not pass such arguments on to what is inside them: put them "
    "behind the noise, transform.with_noise(optimizer, law, key)."
)


class MultiplicativeNoiseState(NamedTuple):
    """State of `multiplicative_noise`.

    Attributes:
        step: the number of updates made so far, which is the step of the next draw of weights.
        key: the PRNG key of the run, the same at every step.
        value: the weighted loss of the last update, an unbiased estimate of the mean loss at the
          parameters it was given; infinite before the first update.
        model_state: the mutable statistics after the last update; () if there are none.
        aux: the extra outputs of the last update, a `loss.Outputs`; () if there are none, and zeros
          before the first update.
    """

    step: Int[Array, ""]
    key: Key[Array, ""]
    value: Float[Array, ""]
    model_state: ModelState = ()
    aux: PyTree = ()


def multiplicative_noise(
    law: MNoise | BatchLaw,
    key: Key[Array, ""],
    *,
    microbatch_size: PositiveInt | None = None,
    sharding: NamedSharding | None = None,
    model_state: ModelState = None,
    aux: loss_lib.Outputs | None = None,
    has_keys: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Makes the noisy gradient ``grad(L(params) . W)`` with one backward pass (Algorithm 1).

    Put it first in a chain, since it makes the gradient that the rest of the chain uses::

      optimizer = optax.chain(multiplicative_noise(law, key), optax.adam(1e-3))
      state = optimizer.init(params)
      updates, state = optimizer.update((), state, params, loss_vector_fn=loss_vector_fn, data=data)

    There are no updates to pass in yet, so pass ``()`` or None. In such a chain, optimizers that
    take extra arguments do not get them: see `with_noise`.

    It works with:

    * ``optax.masked`` and ``optax.partition``: only the selected parameters get the noisy gradient,
      the others keep the updates passed in. Pass ``full_params=params`` too, since optax hides the
      other parameters from the transformations inside.
    * ``optax.MultiSteps`` behind it in a chain, which averages noisy gradients over several steps.
      (To save memory, use `microbatch_size`.) It is an error to put MultiSteps around it, and so
      for ``apply_if_finite``, ``conditionally_transform``, ``lookahead`` and ``sam``, since they
      need a gradient: ``with_noise(optax.apply_if_finite(optax.adam(1e-3), 5), law, key)``.
    * ``optax.inject_hyperparams(msgd, static_args=("law", "key"))``.

    The state contains the statistics and extra outputs, and optax fixes its structure at ``init``.
    So give their initial values and shapes here (`train` does not need the shapes). The compiled
    program of eager calls is kept for the last `loss_vector_fn`.

    Args:
        law: the law of the weights. The num_examples of an `MNoise` must be the leading axis of the
          data; with a `BatchLaw` the data are a batch that a loader drew, of any size.
        key: a typed PRNG key, copied into the state by ``init``.
        microbatch_size: examples in one pass, as in `loss.weighted_value_and_grad`.
        sharding: how the examples are spread over devices, as in `loss.weighted_value_and_grad`.
        model_state: for losses with mutable statistics, their initial values: a pytree of arrays,
          copied into the state by ``init``. None if the losses have none.
        aux: for losses with extra outputs, a `loss.Outputs` of arrays or `jax.ShapeDtypeStruct`
          with the shapes of the results: ``loss.Outputs(averaged={"accuracy": jnp.zeros(())})``.
          None if there are none.
        has_keys: whether losses take one key per example, as in `loss.weighted_value_and_grad`; it
          depends on the key and the step in the state.

    Returns:
        A transformation with ``update((), state, params, *, loss_vector_fn, data)``: the update is
        like `params`. It raises ValueError if a gradient is passed in, if `params`,
        `loss_vector_fn` or `data` is missing, and as `loss.weighted_value_and_grad` does.

    Raises:
        TypeError: if `law` is not a law, `key` is not a typed PRNG key, `sharding` is not a
            `NamedSharding`, or `aux` is not a `loss.Outputs`.
        ValueError: if `microbatch_size` is not positive, or `sharding` does not spread the leading
            axis alone; in ``update``, if statistics or outputs have another structure, shape or
            dtype than was given here.

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
    whole = with_noise(
        optax.identity(),
        law,
        key,
        microbatch_size=microbatch_size,
        sharding=sharding,
        model_state=model_state,
        aux=aux,
        has_keys=has_keys,
    )

    def init_fn(params: Params) -> MultiplicativeNoiseState:
        state: Any = whole.init(params)
        return state[0]

    def update_fn(
        updates: Updates, state: Any, params: Params = None, **extra_args: Any
    ) -> tuple[Updates, MultiplicativeNoiseState]:
        both: Any = state, optax.EmptyState()
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
    model_state: ModelState = None,
    aux: loss_lib.Outputs | None = None,
    has_keys: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer behind `multiplicative_noise`, with the extra arguments that it takes.

    Updates and state are those of ``optax.chain(multiplicative_noise(law, key), optimizer)``. In a
    chain the optimizer gets no extra arguments; here it gets those that it takes, all with the
    weights of the step, as in `train.make_step`: ``value=`` (``polyak_sgd``, ``momo``,
    ``reduce_on_plateau``), ``grad=`` and ``value_fn=`` (line searches, ``lbfgs``), ``obj_fn=``
    (``sophia``), ``grad_fn=`` (``sam``), `data`, and `loss_vector_fn` if that is a function of
    (params, batch) that returns losses only.

    Args:
        optimizer: any optax transformation of a gradient, for example a chain of several.
        law: the law of the weights. The num_examples of an `MNoise` must be the leading axis of the
          data; with a `BatchLaw` the data are a batch that a loader drew, of any size.
        key: a typed PRNG key, copied into the state by ``init``.
        microbatch_size: examples in one pass, as in `loss.weighted_value_and_grad`.
        sharding: how the examples are spread over devices, as in `loss.weighted_value_and_grad`.
        model_state: as in `multiplicative_noise`.
        aux: as in `multiplicative_noise`.
        has_keys: as in `multiplicative_noise`.

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
    takes = loss_lib.Takes(model_state is not None, aux is not None, has_keys)
    init_fn, noisy_gradient = _noisy_gradient(law, key, microbatch_size, sharding, takes)
    start = _start(model_state, aux)

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
        found = at(params)

        def value_and_grad(params: Params) -> tuple[Float[Array, ""], Gradients]:
            elsewhere = at(params)
            return elsewhere.value, elsewhere.grads

        offers = extra_args | _optimizers.offers(value_and_grad, found.value, found.grads)
        problem = {"loss_vector_fn": loss_vector_fn} if takes.nothing else {}
        updates, opt_state = behind(found.grads, state[1], params, **offers, **problem, data=data)
        new = _after(state[0], found, takes)
        return updates, (new, opt_state)

    def start_fn(params: Params) -> tuple[MultiplicativeNoiseState, OptState]:
        return init_fn(params)._replace(**start()), optimizer.init(params)

    return optax.GradientTransformationExtraArgs(start_fn, update_fn)


def _start(model_state: ModelState, aux: loss_lib.Outputs | None) -> Callable[[], dict[str, Any]]:
    """A function that makes the initial statistics and extra outputs, in buffers of their own."""
    if aux is not None and not isinstance(aux, loss_lib.Outputs):
        raise TypeError(
            "aux must be a loss.Outputs(averaged=..., stacked=...) like that of the losses, or "
            f"None, got {_validate.shown(aux)}."
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path((model_state, aux)):
        name = ("model_state", "aux")[path[0].idx]
        _validate.leaf_dtype(_validate.place(name, path[1:]), leaf)

    def dtype_of(leaf: Any) -> Any:
        return jax.dtypes.canonicalize_dtype(_validate.leaf_dtype("leaf", leaf))

    def own(leaf: Any) -> Array:
        return jnp.array(leaf, dtype_of(leaf), copy=True)

    def room(like: Any) -> Array:
        return jnp.zeros(jnp.shape(like), dtype_of(like))

    def start() -> dict[str, Any]:
        parts = {}
        if model_state is not None:
            parts["model_state"] = jax.tree.map(own, model_state)
        if aux is not None:
            parts["aux"] = jax.tree.map(room, aux)
        return parts

    return start


def _after(state: Any, found: loss_lib.Evaluated, takes: loss_lib.Takes) -> Any:
    """The `MultiplicativeNoiseState` after an update."""
    state = state._replace(step=state.step + 1, value=found.value.astype(state.value.dtype))
    if takes.has_state:
        state = state._replace(model_state=found.model_state)
    if not takes.has_aux:
        return state
    if (difference := _validate.first_difference("aux", state.aux, found.aux)) is not None:
        raise ValueError(
            "aux must be given with the structure, shapes and dtypes of the losses' outputs, since "
            f"the state of an optax transformation keeps them: given {difference[0]}, returned "
            f"{difference[1]}. (train.make_step needs no aux.)"
        )
    return state._replace(aux=found.aux)


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
    has_keys: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """M-SGD (Eq. 6): `optax.sgd` on the noisy gradient of `multiplicative_noise`.

    For losses with statistics or extra outputs use ``with_noise(optax.sgd(...), ...)``.

    Args:
        learning_rate: eta, a number or a schedule.
        law: the law of the weights.
        key: a typed PRNG key, copied into the state by ``init``.
        momentum: the decay rate of the momentum, or None for no momentum.
        nesterov: whether to use Nesterov's momentum.
        accumulator_dtype: the dtype of the momentum; None for that of the parameters.
        microbatch_size: examples in one pass, as in `loss.weighted_value_and_grad`.
        sharding: how the examples are spread over devices, as in `loss.weighted_value_and_grad`.
        has_keys: as in `multiplicative_noise`.

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
        # Arrays may be traced (optax.inject_hyperparams, vmap), so they are not checked.
        if value is not None and not callable(value) and not isinstance(value, jax.Array):
            _validate.finite_nonnegative(name, value)
    if accumulator_dtype is not None:
        _validate.float_dtype("accumulator_dtype", accumulator_dtype)
    optimizer = optax.sgd(learning_rate, momentum, nesterov, accumulator_dtype)
    return with_noise(
        optimizer,
        law,
        key,
        microbatch_size=microbatch_size,
        sharding=sharding,
        has_keys=has_keys,
    )


def _noisy_gradient(
    law: MNoise | BatchLaw,
    key: Key[Array, ""],
    microbatch_size: PositiveInt | None,
    sharding: NamedSharding | None,
    takes: loss_lib.Takes,
) -> tuple[Callable[..., MultiplicativeNoiseState], Callable[..., Any]]:
    """Functions that make the initial state, and the value and gradient at a step's weights."""
    _laws.of_steps("law", law)
    _validate.prng_key("key", key)
    microbatch_size = _validate.optional_positive_int("microbatch_size", microbatch_size)
    _mesh.check("sharding", sharding)

    def init_fn(params: Params) -> MultiplicativeNoiseState:
        if jax.tree.leaves(params):  # a mask may hide them all
            _validate.floating_params(params)
        check_key_agrees("key", key)
        own = jnp.copy(jax.random.clone(key))  # so that the caller's key is not donated
        return MultiplicativeNoiseState(jnp.zeros((), jnp.int32), own, _dtypes.not_yet(params))

    def make(loss_vector_fn: LossVectorFn) -> Callable[..., loss_lib.Evaluated]:
        return loss_lib.evaluated(
            loss_vector_fn,
            lambda size: _laws.of_data(law, size, sharding).sample,
            takes,
            microbatch_size=microbatch_size,
            sharding=sharding,
        )

    # `made` owns the compiled program of eager calls.
    made = _optimizers.keep_last(make)

    def noisy_gradient(
        state: Any, params: Params, loss_vector_fn: LossVectorFn, data: Data, full_params: Params
    ) -> Callable[[Params], loss_lib.Evaluated]:
        _validate.passed_to_update(
            "multiplicative_noise", _HINT, params=params, loss_vector_fn=loss_vector_fn, data=data
        )
        if _optimizers.has_masked(params):
            evaluate = make(_optimizers.unmasked(loss_vector_fn, full_params))
        else:
            evaluate = made(loss_vector_fn, (params, data, state))

        key = repeated(state.key)

        def at(params: Params) -> loss_lib.Evaluated:
            return evaluate(params, data, key(), state.step, state.model_state)

        return at

    return init_fn, noisy_gradient
