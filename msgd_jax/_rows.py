"""Going through weighted examples: micro-batches in order, on one device or many."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int, Key, Shaped

from msgd_jax import _dtypes, _shards, _validate
from msgd_jax.noise import Weights, permute

Order = Key[Array, ""] | None
"""A key for the order in which micro-batches take the examples; None for the order they are in."""


class Terms(NamedTuple):
    """What one micro-batch adds to values and gradients, and the statistics after it."""

    value: Float[Array, "*draws"]
    grads: Any
    aux: Any


class Rows(NamedTuple):
    """Examples and their weights; with indices, row k is example ``indices[k]`` of the data."""

    data: Any
    indices: Int[Array, " support"] | None
    values: Float[Array, "support *draws"]


def spread_rows(
    data: Any,
    weights_of: Callable[..., tuple[Array, Array | None]],
    args: tuple[Any, ...],
    sharding: NamedSharding | None,
) -> Rows:
    """The data and the weights ``values, indices = weights_of(*args)``, in equal parts if spread.

    What draws the weights belongs into `weights_of`: then each device draws its part only.
    """

    def filled(data: Any, *args: Any) -> Rows:
        values, indices = weights_of(*args)
        indices = None if indices is None else indices.astype(jnp.int32)
        if sharding is None:
            return Rows(data, indices, values)
        num_rows = _shards.missing(values.shape[0], sharding)
        if indices is not None:
            data = take(data, _shards.fill(indices, num_rows))
        elif _validate.leading_axis("data", data) == values.shape[0]:
            data = jax.tree.map(lambda x: _shards.fill(jnp.asarray(x), num_rows), data)
        return Rows(data, None, _shards.fill_zeros(values, num_rows))

    return _shards.spread(filled, sharding)(data, *args)


def over_rows(
    one_batch: Callable[..., Terms], microbatch_size: int | None, sharding: NamedSharding | None
) -> Callable[[Any, Rows, Any, Order], tuple[tuple[Array, Any], Any]]:
    """The sum of `one_batch` over all rows, in micro-batches on each device."""

    def terms_of(params: Any, rows: Rows, aux: Any, order: Order) -> tuple[tuple[Array, Any], Any]:
        support = rows.values.shape[0]
        if microbatch_size is None or microbatch_size >= support:
            terms = one_batch(params, take(rows.data, rows.indices), rows.values, aux)
        else:
            indices, values = _in_order(rows, order, sharding)
            terms = _accumulate(one_batch, params, rows.data, indices, values, aux, microbatch_size)
        return (terms.value, terms.grads), terms.aux

    return _shards.summed(terms_of, sharding)


def _in_order(
    rows: Rows, order: Order, sharding: NamedSharding | None
) -> tuple[Int[Array, " support"], Float[Array, "support *draws"]]:
    """Where the examples of this device are, and their weights, in the order to visit them."""
    positions = jnp.arange(rows.values.shape[0], dtype=jnp.int32)
    if order is None:
        return positions if rows.indices is None else rows.indices, rows.values
    # Each device shuffles what it has: nothing moves between devices.
    part = 0 if sharding is None else jax.lax.axis_index(_shards.axes(sharding))
    positions = permute(jax.random.fold_in(order, part), positions, positions.shape[0])
    indices = positions if rows.indices is None else rows.indices[positions]
    return indices, rows.values[positions]


def _accumulate(
    one_batch: Callable[..., Terms],
    params: Any,
    data: Any,
    indices: Int[Array, " support"],
    values: Float[Array, "support *draws"],
    aux: Any,
    microbatch_size: int,
) -> Terms:
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
        new = one_batch(params, take(data, positions), values, terms.aux)
        value, grads = jax.tree.map(
            lambda total, term: total + term.astype(total.dtype),
            (terms.value, terms.grads),
            (new.value, new.grads),
        )
        return Terms(value, grads, new.aux)

    def zero(run: Any) -> Any:
        def first_terms(positions: Array, values: Array) -> Terms:
            return one_batch(params, take(data, positions), values, aux)

        shapes = jax.eval_shape(first_terms, *run)
        value, grads = jax.tree.map(
            lambda x: jnp.zeros(x.shape, _dtypes.accumulator(x.dtype)), (shapes.value, shapes.grads)
        )
        return Terms(value, grads, aux)

    accumulator = optax.microbatching.Accumulator(
        init=zero, update=add, finalize=lambda terms: terms, aggregate=lambda terms: terms
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


def take(data: Any, indices: Int[Array, " size"] | None) -> Any:
    """The examples at these indices, all of them for None."""
    if indices is None:
        return data
    return jax.tree.map(lambda x: jnp.take(x, indices, axis=0, mode="clip"), data)


def check_weights(
    weights: Weights, data_size: int, sharding: NamedSharding | None, stacked: bool = False
) -> None:
    """Raises TypeError or ValueError unless these are weights of the data, or a stack of such."""
    if not isinstance(weights, Weights):
        raise TypeError(f"weights must be a noise.Weights, got {type(weights).__name__}.")
    num_examples = weights.num_examples
    filled = num_examples + _shards.missing(num_examples, sharding)
    if data_size not in (num_examples, filled):
        or_filled = f" ({filled} when filled up for its devices)" if filled > num_examples else ""
        raise ValueError(
            f"weights are for num_examples = {num_examples}{or_filled}, "
            f"but data has {data_size} examples on its leading axis."
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
