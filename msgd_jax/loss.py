"""The fast algorithm (Algorithm 1): per-example losses, weighted, in one backward pass.

A **loss vector function** maps ``(params, batch)`` to one loss per example of the batch, [B]. The
gradient of its product with a weight vector is the noisy gradient: no gradient matrix, no
covariance matrix, nothing larger than the gradient itself.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Shaped

from msgd_jax import _dtypes, _validate
from msgd_jax.noise import Weights

__all__ = [
    "LossVectorFn",
    "per_example",
    "weighted_value_and_grad",
    "weighted_values_and_grads",
]

LossVectorFn = Callable[..., Any]
"""``loss_vector_fn(params, batch) -> losses [B]``, or with mutable statistics
``loss_vector_fn(params, batch, aux) -> (losses [B], new aux)``."""


def per_example(loss_fn: Callable[[Any, Any], Float[Array, ""]]) -> LossVectorFn:
    """Turns the loss of one example into the losses of a batch.

    Args:
        loss_fn: maps ``(params, example)`` to a scalar, where an example is the data without its
          leading axis.

    Returns:
        A loss vector function: ``jax.vmap`` of `loss_fn` over the examples.

    Raises:
        TypeError: if `loss_fn` is not a function.
        ValueError: when traced, if `loss_fn` does not return a scalar.
    """
    _validate.function("loss_fn", loss_fn)

    def loss_vector_fn(params: Any, batch: Any) -> Float[Array, " batch"]:
        losses = jax.vmap(loss_fn, in_axes=(None, 0))(params, batch)
        if not isinstance(losses, jax.Array) or losses.ndim != 1:
            got = jax.tree.map(lambda x: x.shape[1:], losses)
            raise ValueError(f"loss_fn must return a scalar for one example, got shape {got}.")
        return losses

    return loss_vector_fn


def weighted_value_and_grad(
    loss_vector_fn: LossVectorFn, *, microbatch_size: int | None = None, has_aux: bool = False
) -> Callable[..., tuple[Any, Any]]:
    """The value and the gradient of ``loss_vector_fn(params, data) . weights``.

    One forward and one backward pass over the examples that have weights. Sparse weights gather
    only their examples. The sum over examples is in float32 or wider, across micro-batches too,
    also when parameters and losses are narrower; gradients are returned in the parameters' types.

    With `microbatch_size`, `optax.microbatching` walks through the examples in order, in runs of
    that many; memory for activations is that of one run, and without `has_aux` nothing else
    changes but the rounding. If it does not divide the number of examples, the last run is filled
    up with examples from the first, at weight 0.

    With `has_aux`, mutable statistics are carried through the micro-batches in order: a micro-batch
    is a ghost batch. Only here can losses depend on each other, within one ghost batch.

    Args:
        loss_vector_fn: ``loss_vector_fn(params, batch)`` returns the losses of the batch, [B]; with
          `has_aux`, ``loss_vector_fn(params, batch, aux)`` returns ``(losses, aux)``.
        microbatch_size: examples in one pass; None for all of them at once.
        has_aux: whether `loss_vector_fn` takes and returns mutable statistics.

    Returns:
        ``f(params, data, weights) -> (value, grads)``, or with `has_aux`
        ``f(params, data, weights, aux) -> ((value, aux), grads)``: `params` is a pytree of
        floating-point arrays, `data` a pytree of arrays [N, ...], `weights` a `noise.Weights`,
        `value` a scalar, and `grads` is like `params`. When traced, `f` raises TypeError or
        ValueError if `params` are not floating point, the leading axes of `data` disagree or are
        not the weights' num_examples, `loss_vector_fn` does not return [B] floating-point losses,
        or `aux` comes back with another structure, shape or dtype.

    Raises:
        TypeError, ValueError: if an argument is not as described.
    """
    _validate.function("loss_vector_fn", loss_vector_fn)
    if microbatch_size is not None:
        _validate.positive_int("microbatch_size", microbatch_size)

    def one_batch(params: Any, batch: Any, values: Float[Array, " batch"], aux: Any) -> "_Terms":
        def weighted_loss(params: Any) -> tuple[Float[Array, ""], Any]:
            if has_aux:
                losses, new_aux = loss_vector_fn(params, batch, aux)
                _check_aux(aux, new_aux)
            else:
                losses, new_aux = loss_vector_fn(params, batch), aux
            _validate.loss_vector(losses, values.shape[0])
            dtype = _dtypes.accumulator(losses.dtype, values.dtype)
            return jnp.sum(losses.astype(dtype) * values.astype(dtype)), new_aux

        (value, new_aux), grads = jax.value_and_grad(weighted_loss, has_aux=True)(params)
        return _Terms(value, grads, new_aux)

    def value_and_grad(params: Any, data: Any, weights: Weights, aux: Any = None) -> Any:
        _validate.floating_params(params)
        _check_weights(weights, _validate.leading_axis("data", data))
        support = weights.values.shape[0]
        if microbatch_size is None or microbatch_size >= support:
            batch = _take(data, weights.indices)
            terms = one_batch(params, batch, weights.values, aux)
        else:
            indices = jnp.arange(support) if weights.indices is None else weights.indices
            terms = _accumulate(
                one_batch, params, data, indices, weights.values, aux, microbatch_size
            )
        return ((terms.value, terms.aux), terms.grads) if has_aux else (terms.value, terms.grads)

    return value_and_grad


def weighted_values_and_grads(
    loss_vector_fn: LossVectorFn, *, microbatch_size: int | None = None, draws_per_pass: int = 1
) -> Callable[[Any, Any, Weights], tuple[Float[Array, " draws"], Any]]:
    """The values and the gradients of ``loss_vector_fn(params, data) . W`` for K draws of W.

    What K calls of `weighted_value_and_grad` at the same parameters give, up to rounding, with one
    forward pass instead of K: the losses are linearised once, then each draw is one backward pass,
    `draws_per_pass` of them in memory at a time. For the statistics of the noise at one point::

      draws = jax.vmap(law.sample, in_axes=(None, 0))(key, jnp.arange(K))
      values, grads = loss.weighted_values_and_grads(loss_vector_fn)(params, data, draws)

    All N losses are computed, also for sparse weights: different draws need different examples.

    Args:
        loss_vector_fn: ``loss_vector_fn(params, batch)`` returns the losses of the batch, [B].
        microbatch_size: examples in one pass, as in `weighted_value_and_grad`; None for all.
        draws_per_pass: draws whose backward passes are made at once, by `jax.vmap`: more memory,
            fewer passes, and nothing else changes but the rounding.

    Returns:
        ``f(params, data, weights) -> (values, grads)``: `weights` is a `noise.Weights` with leading
        axes of K draws, `values` is [K], and `grads` is like `params` with leading axes of K. When
        traced, `f` raises TypeError or ValueError as that of `weighted_value_and_grad` does.

    Raises:
        TypeError, ValueError: if an argument is not as described.
    """
    _validate.function("loss_vector_fn", loss_vector_fn)
    if microbatch_size is not None:
        _validate.positive_int("microbatch_size", microbatch_size)
    _validate.positive_int("draws_per_pass", draws_per_pass)

    def one_batch(
        params: Any, batch: Any, values: Float[Array, "batch draws"], aux: Any
    ) -> "_Terms":
        def losses_of(params: Any) -> Float[Array, " batch"]:
            losses = loss_vector_fn(params, batch)
            _validate.loss_vector(losses, values.shape[0])
            return losses

        losses, pull_back = jax.vjp(losses_of, params)
        dtype = _dtypes.accumulator(losses.dtype, values.dtype)

        def one_draw(values: Float[Array, " batch"]) -> tuple[Float[Array, ""], Any]:
            value = jnp.sum(losses.astype(dtype) * values.astype(dtype))
            return value, pull_back(values.astype(losses.dtype))[0]

        # One draw at a time is a plain scan, without a `vmap` over one inside.
        at_once = None if draws_per_pass == 1 else draws_per_pass
        totals, grads = jax.lax.map(one_draw, values.T, batch_size=at_once)
        return _Terms(totals, grads, aux)

    def values_and_grads(
        params: Any, data: Any, weights: Weights
    ) -> tuple[Float[Array, " draws"], Any]:
        _validate.floating_params(params)
        num_examples = _validate.leading_axis("data", data)
        _check_weights(weights, num_examples, stacked=True)
        values = jax.vmap(Weights.dense)(weights).T
        if microbatch_size is None or microbatch_size >= num_examples:
            terms = one_batch(params, data, values, ())
        else:
            positions = jnp.arange(num_examples)
            terms = _accumulate(one_batch, params, data, positions, values, (), microbatch_size)
        return terms.value, terms.grads

    return values_and_grads


class _Terms(NamedTuple):
    """What one micro-batch adds to values and gradients, and the statistics after it."""

    value: Float[Array, "*draws"]
    grads: Any
    aux: Any


def _accumulate(
    one_batch: Callable[..., _Terms],
    params: Any,
    data: Any,
    indices: Int[Array, " support"],
    values: Float[Array, "support *draws"],
    aux: Any,
    microbatch_size: int,
) -> _Terms:
    """Sums `one_batch` over micro-batches in order, the statistics threaded through."""
    missing = -indices.shape[0] % microbatch_size
    positions = jnp.concatenate([indices, indices[:missing]])
    values = jnp.concatenate([values, jnp.zeros((missing, *values.shape[1:]), values.dtype)])
    # What is micro-batched is positions and weights: data are gathered run by run, never copied.
    runs = (
        _for_microbatching(positions, microbatch_size),
        _for_microbatching(values, microbatch_size),
    )

    def add(terms: Any, run: Any, _: Any) -> Any:
        positions, values = run
        new = one_batch(params, _take(data, positions), values, terms.aux)
        value, grads = jax.tree.map(
            lambda total, term: total + term.astype(total.dtype),
            (terms.value, terms.grads),
            (new.value, new.grads),
        )
        return _Terms(value, grads, new.aux)

    def zero(run: Any) -> Any:
        def first_terms(positions: Array, values: Array) -> _Terms:
            return one_batch(params, _take(data, positions), values, aux)

        shapes = jax.eval_shape(first_terms, *run)
        value, grads = jax.tree.map(
            lambda x: jnp.zeros(x.shape, _dtypes.accumulator(x.dtype)), (shapes.value, shapes.grads)
        )
        return _Terms(value, grads, aux)

    def finish(terms: Any) -> Any:
        grads = jax.tree.map(lambda g, p: g.astype(jnp.result_type(p)), terms.grads, params)
        return terms._replace(grads=grads)

    accumulator = optax.microbatching.Accumulator(
        init=zero, update=add, finalize=finish, aggregate=lambda terms: terms
    )
    walk = optax.microbatching.microbatch(
        lambda positions, values: (positions, values),
        argnums=(0, 1),
        microbatch_size=microbatch_size,
        accumulator=accumulator,
    )
    return walk(*runs)


def _for_microbatching(values: Shaped[Array, "size *rest"], microbatch_size: int) -> Array:
    """Orders entries so that optax's micro-batch k holds its k-th run of consecutive entries.

    `optax.microbatching` deals entries out like cards (column-major), to keep shardings in place.
    """
    runs = values.reshape(-1, microbatch_size, *values.shape[1:])
    return runs.swapaxes(0, 1).reshape(values.shape)


def _take(data: Any, indices: Int[Array, " size"] | None) -> Any:
    """The examples at these indices, all of them for None."""
    if indices is None:
        return data
    return jax.tree.map(lambda x: jnp.take(x, indices, axis=0, mode="clip"), data)


def _check_weights(weights: Weights, num_examples: int, stacked: bool = False) -> None:
    if not isinstance(weights, Weights):
        raise TypeError(f"weights must be a noise.Weights, got {type(weights).__name__}.")
    if weights.num_examples != num_examples:
        raise ValueError(
            f"weights are for num_examples = {weights.num_examples}, "
            f"but data has {num_examples} examples on its leading axis."
        )
    shape, indices = weights.values.shape, weights.indices
    dims, draws = (2, "(draws, ") if stacked else (1, "(")
    if indices is None and (len(shape) != dims or shape[-1] != num_examples):
        comma = "" if stacked else ","
        raise ValueError(
            f"weights.values must have shape {draws}{num_examples}{comma}), one for each example, "
            f"got {shape}."
        )
    if indices is not None and (len(shape) != dims or indices.shape != shape):
        kind = "stacks of vectors" if stacked else "vectors"
        raise ValueError(
            f"weights.values and weights.indices must be {kind} of the same length, "
            f"got shapes {shape} and {indices.shape}."
        )


def _check_aux(old: Any, new: Any) -> None:
    shapes = [jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), aux) for aux in (old, new)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "loss_vector_fn must return aux with the structure, shapes and dtypes it was given: "
            f"given {shapes[0]}, returned {shapes[1]}."
        )
