"""Calling optax: optimizers get the extra arguments that they take, and masks are handled."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.tree_util import KeyPath
from jaxtyping import Array, Float

from msgd_jax import _dtypes, _validate
from msgd_jax._typing import (
    Batch,
    Gradients,
    LossVectorFn,
    OptState,
    Params,
    Updates,
    ValueAndGrad,
)


def updater(optimizer: optax.GradientTransformation) -> Callable[..., tuple[Any, Any]]:
    """``update(grads, state, params, **offered)``, which passes on the arguments that are taken.

    optax has two kinds of transformations, with and without extra arguments; the one of
    `optax.contrib.sam` takes certain extra arguments and no others.
    """
    _validate.optimizer("optimizer", optimizer)
    takes = _keywords(optimizer)

    def update(
        grads: Gradients, state: OptState, params: Params, **offered: Any
    ) -> tuple[Updates, OptState]:
        passed = {k: v for k, v in offered.items() if takes is None or k in takes}
        try:
            return optimizer.update(grads, state, params, **passed)
        except (AttributeError, TypeError, ValueError) as error:
            error.add_note(
                "The optimizer was given one noisy gradient, like params, and "
                f"{', '.join(passed) or 'nothing besides'}. If it needs a gradient for each "
                "example, use transform.aggregate_per_example; optax.lookahead needs params = "
                "optax.LookaheadParams.init_synced(params); optax.contrib.sam goes around a chain, "
                "not into it."
            )
            raise

    return update


def offers(
    value_and_grad: ValueAndGrad, value: Float[Array, ""], grads: Gradients
) -> dict[str, Any]:
    """The arguments that optimizers may take besides the gradient; a function costs nothing unused.

    All of them use the weights of the same step. `value` and `grad` are taken at its parameters.
    Functions of other parameters are ``value_fn(params)`` (line searches, L-BFGS), ``obj_fn``, the
    same function under another name (Sophia), and ``grad_fn(params, i)`` (SAM).
    """
    value_fn = _differentiable(value_and_grad)

    def grad_fn(params: Params, iteration: Any = None) -> Gradients:
        del iteration
        return value_and_grad(params)[1]

    return {
        "value": value,
        "grad": grads,
        "value_fn": value_fn,
        "obj_fn": value_fn,
        "grad_fn": grad_fn,
    }


def _differentiable(value_and_grad: ValueAndGrad) -> Callable[..., Float[Array, ""]]:
    """The value as a function that can be differentiated forwards, backwards, and twice.

    Its derivative is defined as the gradient that was summed over micro-batches: automatic
    differentiation would keep the residuals of all micro-batches in memory.
    """

    @jax.custom_jvp
    def of_params(params: Params) -> Float[Array, ""]:
        return value_and_grad(params)[0]

    @of_params.defjvp
    def _(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Array, Array]:
        value, grads = value_and_grad(*primals)
        return value, jax.tree.reduce(
            jnp.add, jax.tree.map(lambda g, t: _product(g, t, value.dtype), grads, tangents[0])
        )

    # optax's line searches require a function that takes every extra argument they were given.
    def value_fn(
        params: Params,
        *,
        data: Any = None,
        loss_vector_fn: Any = None,
        obj_fn: Any = None,
        grad_fn: Any = None,
    ) -> Float[Array, ""]:
        del data, loss_vector_fn, obj_fn, grad_fn
        return of_params(params)

    return value_fn


def _product(gradient: Array, tangent: Array, dtype: jnp.dtype) -> Float[Array, ""]:
    wide = _dtypes.accumulator(gradient.dtype, dtype)
    return jnp.sum(gradient.astype(wide) * tangent.astype(wide)).astype(dtype)


def _keywords(optimizer: Any) -> set[str] | None:
    """The names of the extra arguments that an ``update`` takes; None if it takes any."""
    plain = isinstance(optimizer, optax.GradientTransformation)
    if plain and not isinstance(optimizer, optax.GradientTransformationExtraArgs):
        return set()
    parameters = inspect.signature(optimizer.update).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters if p.kind is not inspect.Parameter.POSITIONAL_ONLY} - {
        "updates",
        "state",
        "params",
        "grads",
    }


def keep_last(make: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    """``made(function, arguments)``: ``make(function)``, kept until `function` is another one.

    Where an argument is traced, the result is made each time and not kept: the function may hold
    traced values, and there is nothing to compile.
    """
    last: tuple[Any, Any] = (None, None)

    def made(function: Any, arguments: Any) -> Any:
        nonlocal last
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(arguments)):
            return make(function)
        kept = last
        if kept[0] is not function:
            last = kept = function, make(function)
        return kept[1]

    return made


def _is_masked(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)


def has_masked(params: Params) -> bool:
    """Whether optax.masked or optax.partition hides some of the parameters."""
    return any(map(_is_masked, jax.tree.leaves(params, is_leaf=_is_masked)))


def check_no_updates(updates: Updates, params: Params, extra_args: dict[str, Any]) -> None:
    """Raises ValueError if updates are passed in although no mask hides any parameters.

    They would be lost, since `multiplicative_noise` makes the gradient itself. With a mask they are
    the updates of the parameters that it hides.
    """
    if not jax.tree.leaves(updates) or has_masked(params):
        return
    if "grad_fn" in extra_args:
        raise ValueError(
            "multiplicative_noise makes the gradient itself, and so does the function that this "
            "optimizer was given to (train.make_step, streaming.make_loop, transform.with_noise): "
            "give it the optimizer alone, such as optax.sgd(0.1) instead of "
            "transform.msgd(0.1, law, key)."
        )
    raise ValueError(
        "multiplicative_noise makes the gradient itself and would discard the updates passed to "
        "it: pass () and put it first in the chain. MultiSteps (microbatch_size bounds memory), "
        "apply_if_finite, conditionally_transform, lookahead and sam cannot go around it, since "
        "they need a gradient: put them behind it, "
        "transform.with_noise(optax.MultiSteps(...), law, key)."
    )


def unmasked(loss_vector_fn: LossVectorFn, full_params: Params) -> LossVectorFn:
    """The loss vector function as a function of the parameters that optax.masked lets through."""
    if full_params is None:
        raise ValueError(
            "multiplicative_noise inside optax.masked sees only some of the parameters, and the "
            "loss needs all of them: call update(..., full_params=params)."
        )

    def of_visible(visible: Params, batch: Batch, *rest: Any) -> Any:
        merged = jax.tree.map(
            lambda leaf, full: full if _is_masked(leaf) else leaf,
            visible,
            full_params,
            is_leaf=_is_masked,
        )
        return loss_vector_fn(merged, batch, *rest)

    return of_visible


def check_per_example(updates: Updates, params: Params) -> int:
    """The number of examples of per-example gradients: like `params` after a leading axis.

    Raises ValueError or TypeError if `updates` are not of that kind.
    """
    _validate.passed_to_update("aggregate_per_example", params=params)
    given, expected = (len(jax.tree.leaves(tree)) for tree in (updates, params))
    if given != expected:
        raise ValueError(
            "aggregate_per_example needs updates that are gradients like params, with an axis of "
            f"examples in front, got {given} leaves instead of {expected}."
        )
    size: int | None = None

    def check(path: KeyPath, update: Array, param: Array) -> None:
        nonlocal size
        shape = jnp.shape(update)
        size = shape[0] if size is None and shape else size
        if shape != (size, *jnp.shape(param)):
            expected = ", ".join(map(str, ("N" if size is None else size, *jnp.shape(param))))
            raise ValueError(
                f"aggregate_per_example needs one gradient per example, shape ({expected}) at "
                f"{_validate.place('updates', path)}, got {shape}. A gradient that is "
                "averaged already has no examples left to weigh (optax.MultiSteps around the "
                "aggregator averages them too: chain it behind)."
            )
        if not jnp.issubdtype(jnp.result_type(update), jnp.floating):
            raise TypeError(
                "aggregate_per_example needs floating-point gradients, got "
                f"{jnp.result_type(update)} at {_validate.place('updates', path)}."
            )

    jax.tree_util.tree_map_with_path(check, updates, params)
    return size or 0
