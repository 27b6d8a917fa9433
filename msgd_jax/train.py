"""Training: a state that is one pytree, a pure step, and many steps in one compiled loop.

It works with any model and any optax optimizer, line searches included: the noise is in the
weights, so the optimizer needs no change. To train several seeds at once, ``jax.vmap`` the step::

  def start(key):
      params_key, run_key = jax.random.split(key)
      return init(model_init(params_key), optimizer, run_key)

  step = make_step(loss_vector_fn, optimizer, law)
  states = jax.vmap(start)(jax.random.split(key, 5))
  loop = make_loop(jax.vmap(step, in_axes=(0, None)), max_steps=100)
  states, metrics = loop(states, data, 100)
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.tree_util import KeyPath
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key

from msgd_jax import _dtypes, _laws, _mesh, _optimizers, _validate
from msgd_jax import loss as loss_lib
from msgd_jax._streams import repeated
from msgd_jax._typing import (
    Data,
    Gradients,
    ModelState,
    OptState,
    Params,
    PositiveInt,
    PyTree,
    Updates,
)
from msgd_jax.noise import BatchLaw, MNoise, Weights
from msgd_jax.sharding import check_key_agrees

__all__ = ["StepDetails", "StepMetrics", "TrainState", "init", "make_loop", "make_step"]


class TrainState(NamedTuple):
    """Everything that a run needs to continue, as one pytree of arrays that can be saved.

    Attributes:
        params: the parameters, any pytree of floating-point arrays.
        opt_state: the state of the optimizer.
        model_state: mutable statistics, such as the running means of batch norm; () if the model
            has none.
        key: the PRNG key of the run, the same at every step.
        step: the number of steps made so far.
    """

    params: Params
    opt_state: OptState
    model_state: ModelState
    key: Key[Array, ""]
    step: Int[Array, ""]


class StepMetrics(NamedTuple):
    """What one step reports.

    Attributes:
        loss: the weighted loss, an unbiased estimate of the mean loss before the step.
        gradient_norm: the Euclidean norm of the noisy gradient, in float32 or wider.
        aux: the extra outputs of the forward pass, a `loss.Outputs`; () without `has_aux`.
        extra: the result of `metrics_fn`; () without `metrics_fn`.
    """

    loss: Float[Array, "*steps"]
    gradient_norm: Float[Array, "*steps"]
    aux: PyTree = ()
    extra: PyTree = ()


class StepDetails(NamedTuple):
    """What a step passes to `metrics_fn`; attributes that it does not use cost nothing.

    Attributes:
        weights: the weights W that were drawn for the step.
        gradient: the noisy gradient, a pytree like the parameters.
        updates: the optimizer's updates, which are added to the parameters.
        params: the parameters before the step.
        step: the number of the step, from 0.
    """

    weights: Weights
    gradient: Gradients
    updates: Updates
    params: Params
    step: Int[Array, ""]


State = TypeVar("State")
Metrics = TypeVar("Metrics")
StepFn = Callable[[State, Data], tuple[State, Metrics]]


def init(
    params: Params,
    optimizer: optax.GradientTransformation,
    key: Key[Array, ""],
    model_state: ModelState = (),
) -> TrainState:
    """The state before the first step.

    Every leaf is a copy on the device of the original, so that the state can be donated: your
    arrays are not deleted, and no array is deleted twice if the optimizer's state holds the
    parameters too. Numbers become arrays.

    Args:
        params: a pytree of floating-point arrays; for `optax.lookahead`
          ``optax.LookaheadParams.init_synced(params)``.
        optimizer: an optax transformation.
        key: a typed PRNG key.
        model_state: mutable statistics of the model, if it has any.

    Raises:
        TypeError: if a parameter is not floating point, `optimizer` is not an optax transformation,
          `key` is not a typed PRNG key, or a leaf of the statistics or of the optimizer's state is
          not an array.
        ValueError: if `params` is empty, `key` is an array of keys, or not the same in all
          processes of `jax.distributed`.
    """
    _validate.floating_params(params)
    _validate.optimizer("optimizer", optimizer)
    check_key_agrees("key", key)
    params, model_state = _own("params", params), _own("model_state", model_state)
    opt_state = _own("optimizer.init(params)", optimizer.init(params))
    return TrainState(params, opt_state, model_state, _own("key", key), jnp.zeros((), jnp.int32))


def _own(name: str, tree: PyTree) -> PyTree:
    """Copies of the leaves, in buffers of their own and with strong types.

    The type of a Python number is weak and that of an update is strong: a loop would be compiled
    once for each of them.
    """

    def copy(path: KeyPath, leaf: ArrayLike) -> Array:
        place = _validate.place(name, path)
        dtype = _validate.leaf_dtype(place, leaf)
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(f"{place} must be an array, got a shape without values: {leaf}.")
        if jnp.issubdtype(dtype, jax.dtypes.prng_key):
            return jnp.copy(jax.random.clone(leaf))
        return jnp.array(leaf, jax.dtypes.canonicalize_dtype(dtype), copy=True)

    return jax.tree_util.tree_map_with_path(copy, tree)


def make_step(
    loss_vector_fn: loss_lib.LossVectorFn,
    optimizer: optax.GradientTransformation,
    law: MNoise | BatchLaw,
    *,
    microbatch_size: PositiveInt | None = None,
    has_state: bool = False,
    has_aux: bool = False,
    has_keys: bool = False,
    sharding: NamedSharding | None = None,
    metrics_fn: Callable[[StepDetails], PyTree] | None = None,
) -> Callable[[TrainState, Data], tuple[TrainState, StepMetrics]]:
    """One step of M-SGD (Eq. 6) under any optimizer, as a pure function of state and data.

    Args:
        loss_vector_fn: as in `loss.weighted_value_and_grad`.
        optimizer: an optax transformation of the noisy gradient. It also gets the extra arguments
          that it takes, all for the weights W and the keys of the same step: ``value=`` and
          ``grad=``; ``value_fn=`` for line searches and L-BFGS (``obj_fn=`` for Sophia), which is
          L(params) . W at any parameters; ``grad_fn=`` for SAM, the gradient of that; ``data=``;
          and ``loss_vector_fn=`` if that is a function of (params, batch) that returns losses
          alone. With `has_state` these functions do not change the statistics.
        law: the law of the weights. The num_examples of an `MNoise` must be the leading axis of the
          data; with a `BatchLaw` the data are a batch that a loader drew, of any size.
        microbatch_size: examples in one pass, as in `loss.weighted_value_and_grad`.
        has_state: whether `loss_vector_fn` takes and returns mutable statistics, which the state
          keeps as `model_state`.
        has_aux: whether `loss_vector_fn` returns extra outputs, a `loss.Outputs`, which the metrics
          report.
        has_keys: whether `loss_vector_fn` takes one key per example, a function of (key of the run,
          step, example).
        sharding: how the examples are spread over devices, as in `loss.weighted_value_and_grad`.
        metrics_fn: ``metrics_fn(details)`` returns a pytree of arrays that the metrics report as
          `extra`, of a `StepDetails`: ``lambda of: {"indices": of.weights.indices}``.

    Returns:
        ``step(state, data) -> (state, metrics)``, not compiled: give it to ``jax.jit`` (with
        ``donate_argnums=0``), ``jax.vmap``, or `make_loop`.

    Raises:
        TypeError: if `loss_vector_fn` is not a function of the arguments that `has_state` and
            `has_keys` say, `optimizer` is not an optax transformation, `law` is not a law,
            `sharding` is not a `NamedSharding`, or `metrics_fn` is not a function.
        ValueError: if `microbatch_size` is not positive, or `sharding` does not spread the leading
            axis alone.

    Example:
        >>> from msgd_jax import loss, noise, train
        >>> losses = loss.per_example(lambda theta, x: (theta - x) ** 2)
        >>> x, optimizer = jnp.asarray([0.0, 1.0, 3.0, 4.0]), optax.sgd(0.1)
        >>> step = jax.jit(train.make_step(losses, optimizer, noise.gd(4)))
        >>> state, metrics = step(train.init(jnp.asarray(1.0), optimizer, jax.random.key(0)), x)
        >>> round(float(state.params), 6), float(metrics.loss)
        (1.2, 3.5)
    """
    microbatch_size = _validate.optional_positive_int("microbatch_size", microbatch_size)
    law = _laws.of_steps("law", law)
    takes = loss_lib.Takes(has_state, has_aux, has_keys)
    evaluate = loss_lib.evaluated(
        loss_vector_fn,
        lambda size: _laws.of_data(law, size, sharding).sample,
        takes,
        microbatch_size=microbatch_size,
        sharding=sharding,
        reports_weights=metrics_fn is not None,
    )
    return step_of(loss_vector_fn, evaluate, takes, optimizer, metrics_fn)


def step_of(
    loss_vector_fn: loss_lib.LossVectorFn,
    evaluate: Callable[..., loss_lib.Evaluated],
    takes: loss_lib.Takes,
    optimizer: optax.GradientTransformation,
    metrics_fn: Callable[[StepDetails], PyTree] | None,
) -> Callable[[TrainState, Data], tuple[TrainState, StepMetrics]]:
    """A step along the gradient from ``evaluate(params, data, key, step, model_state)``."""
    update = _optimizers.updater(optimizer)
    if metrics_fn is not None:
        _validate.function("metrics_fn", metrics_fn)
    problem = {"loss_vector_fn": loss_vector_fn} if takes.nothing else {}

    def step(state: TrainState, data: Data) -> tuple[TrainState, StepMetrics]:
        _validate.instance("state", state, TrainState, "train.TrainState")
        key = repeated(state.key)

        def at(params: Params) -> loss_lib.Evaluated:
            return evaluate(params, data, key(), state.step, state.model_state)

        def value_and_grad(params: Params) -> tuple[Float[Array, ""], Gradients]:
            found = at(params)
            return found.value, found.grads

        # The gradient, and the extra arguments of the optimizer: all for the same draw of weights.
        found = at(_moving(state.params))
        grads, norm = _dtypes.with_norm(found.grads)
        found = found._replace(grads=grads)
        offers = _optimizers.offers(value_and_grad, found.value, found.grads)
        updates, opt_state = update(
            found.grads, state.opt_state, state.params, **offers, **problem, data=data
        )
        params = optax.apply_updates(state.params, updates)
        metrics = StepMetrics(found.value, norm)
        if takes.has_aux:
            metrics = metrics._replace(aux=found.aux)
        if metrics_fn is not None and found.weights is not None:
            of_step = StepDetails(found.weights, found.grads, updates, state.params, state.step)
            metrics = metrics._replace(extra=jax.tree.map(_strong, metrics_fn(of_step)))
        # Strong types, so that a loop is compiled once: see `_own`.
        model_state = found.model_state if takes.has_state else state.model_state
        params, opt_state, model_state = jax.tree.map(_strong, (params, opt_state, model_state))
        return TrainState(params, opt_state, model_state, state.key, state.step + 1), metrics

    return step


def _moving(params: Params) -> Params:
    """The parameters at which the gradient is taken: `optax.lookahead` keeps a second set."""
    return params.fast if isinstance(params, optax.LookaheadParams) else params


def _strong(leaf: ArrayLike) -> Array:
    """A leaf with a strong type, as `init` makes it, even if an optimizer returns a number."""
    leaf = jnp.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf
    return jax.lax.convert_element_type(leaf, leaf.dtype)


def make_loop(
    step: StepFn[State, Metrics], *, max_steps: PositiveInt
) -> Callable[[State, Data, PositiveInt], tuple[State, Metrics]]:
    """Many steps in one compiled loop, without a return to Python between them.

    The number of steps is an argument of the compiled loop, not a constant in it: any number up
    to `max_steps` runs the same machine code. So stopping anywhere and continuing from the state
    gives bit-identical parameters, and nothing is compiled twice.

    Args:
        step: ``step(state, data) -> (state, metrics)``, from `make_step` or vmapped from it.
        max_steps: the largest number of steps per call; memory for their metrics is allocated.

    Returns:
        ``loop(state, data, num_steps) -> (state, metrics)``, a compiled function that donates
        `state`. Every array in `metrics` has a new leading axis of length `num_steps`. To see
        metrics along the way, call the loop several times with fewer steps.

    Raises:
        TypeError: if `step` is not a function, or `max_steps` (in `loop`, `num_steps`) is not an
            integer.
        ValueError: if `max_steps` is below 1, or, in `loop`, `num_steps` is below 1 or above
            `max_steps`, or `step` changes the structure, a shape or a dtype of the state.

    Example:
        >>> from msgd_jax import loss, noise, train
        >>> losses = loss.per_example(lambda theta, x: (theta - x) ** 2)
        >>> x, optimizer = jnp.asarray([0.0, 1.0, 3.0, 4.0]), optax.sgd(0.1)
        >>> step = train.make_step(losses, optimizer, noise.sgd(4, 2))
        >>> loop = train.make_loop(step, max_steps=100)
        >>> state = train.init(jnp.asarray(1.0), optimizer, jax.random.key(0))
        >>> state, metrics = loop(state, x, 60)
        >>> int(state.step), metrics.loss.shape
        (60, (60,))
    """
    _validate.function("step", step)
    max_steps = _validate.positive_int("max_steps", max_steps, maximum=_validate.MAX_STEP)

    @functools.partial(jax.jit, donate_argnums=0)
    def compiled(state: State, data: Data, num_steps: Int[Array, ""]) -> tuple[State, Metrics]:
        after, shapes = jax.eval_shape(step, state, data)
        if (difference := _validate.first_difference("state", state, after)) is not None:
            raise ValueError(
                f"step must return a state of the kind it was given: given {difference[0]}, "
                f"returned {difference[1]}. If this is the optimizer's state (as optax.monitor's), "
                "make the first step by jax.jit(step), and the others in the loop."
            )
        return in_turn(lambda state, _: step(state, data), state, num_steps, max_steps, shapes)

    def loop(state: State, data: Data, num_steps: PositiveInt) -> tuple[State, Metrics]:
        num_steps = _validate.positive_int("num_steps", num_steps, maximum=max_steps)
        state, history = compiled(state, data, jnp.asarray(num_steps, jnp.int32))
        return state, jax.tree.map(lambda h: h[:num_steps], history)

    return loop


def in_turn(
    step: Callable[[State, Int[Array, ""]], tuple[State, Metrics]],
    state: State,
    num_steps: Int[Array, ""],
    room: int,
    shapes: Metrics,
) -> tuple[State, Metrics]:
    """The state after ``step(state, i)`` for i below `num_steps`, and the metrics of these steps.

    The metrics, whose `shapes` are those of one step, get a leading axis of `room` places, of which
    those from `num_steps` on are zeros.
    """

    def body(i: Int[Array, ""], carry: PyTree) -> PyTree:
        state, history = carry
        state, metrics = step(state, i)
        put = lambda h, m: jax.lax.dynamic_update_index_in_dim(h, m, i, 0)  # noqa: E731
        return state, jax.tree.map(put, history, metrics)

    history = jax.tree.map(lambda x: _mesh.zeros(x, x.dtype, room), shapes)
    return jax.lax.fori_loop(0, num_steps, body, (state, history))
