"""The walker: through the examples in micro-batches, on one device or on many.

Everything that is computed of many examples goes through here, by one of two functions:

* `sums` adds up what the micro-batches give (losses, gradients, squares), each example weighted;
* `maps` puts together what they give for each example ([N, ...]).

Both take the examples in runs of `microbatch_size`, on each device those that it holds, and fill
up the last run from the first examples: real ones, at which every loss is as finite as elsewhere.
In a sum these count at weight 0, and of a map they are cut off. What is walked is positions and
weights; data are gathered run by run and never copied.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int, Key, Shaped

from msgd_jax import _dtypes, _mesh, _validate
from msgd_jax._typing import Batch, Data, Params, PyTree, Statistics
from msgd_jax.noise import Weights, permute

Order = Key[Array, ""] | None
"""A key for the order in which micro-batches take the examples; None for the order they are in."""


class Terms(NamedTuple):
    """What one micro-batch adds to values and gradients, and the statistics after it."""

    value: PyTree
    grads: PyTree
    aux: Statistics


class WeightedExamples(NamedTuple):
    """Examples and their weights; with indices, weight k is of example ``indices[k]``."""

    data: Data
    indices: Int[Array, " support"] | None
    values: Float[Array, "support *draws"]


def weighted_examples(
    data: Data,
    weights_of: Callable[..., tuple[Array, Array | None]],
    args: tuple[Any, ...],
    sharding: NamedSharding | None,
) -> WeightedExamples:
    """The data and the weights ``values, indices = weights_of(*args)``, in equal parts if spread.

    What draws the weights belongs into `weights_of`: then each device draws its part only.
    """

    def in_equal_parts(data: Data, *args: Any) -> WeightedExamples:
        values, indices = weights_of(*args)
        indices = None if indices is None else indices.astype(jnp.int32)
        if sharding is None:
            return WeightedExamples(data, indices, values)
        missing = _mesh.missing(values.shape[0], sharding)
        # Spread, an example lies where its weight is: the listed ones are gathered first.
        if indices is not None:
            data = take(data, _mesh.fill(indices, missing))
        elif _validate.leading_axis("data", data) == values.shape[0]:
            data = _fill_up(data, missing)
        return WeightedExamples(data, None, _mesh.fill_zeros(values, missing))

    return _mesh.spread(in_equal_parts, sharding)(data, *args)


def sums(
    one_batch: Callable[..., Terms], microbatch_size: int | None, sharding: NamedSharding | None
) -> Callable[
    [Params, WeightedExamples, Statistics, Order], tuple[tuple[PyTree, PyTree], Statistics]
]:
    """The sum of ``one_batch(params, batch, weights, aux)`` over all examples."""

    def terms_of(
        params: Params, examples: WeightedExamples, aux: Statistics, order: Order
    ) -> tuple[tuple[PyTree, PyTree], Statistics]:
        support = examples.values.shape[0]
        if microbatch_size is None or microbatch_size >= support:
            batch = take(examples.data, examples.indices)
            terms = one_batch(params, batch, examples.values, aux)
        else:
            indices, values = _in_order(examples, order, sharding)
            terms = _accumulate(
                one_batch, params, examples.data, indices, values, aux, microbatch_size
            )
        return (terms.value, terms.grads), terms.aux

    return _mesh.summed(terms_of, sharding)


def maps(
    one_batch: Callable[[Params, Batch], PyTree],
    microbatch_size: int | None,
    sharding: NamedSharding | None,
) -> Callable[[Params, Data, int], PyTree]:
    """``one_batch(params, batch)``, [B, ...], of the first N examples, [N, ...], N an argument."""

    def of_part(params: Params, data: Data) -> PyTree:
        size = _validate.leading_axis("data", data)
        if microbatch_size is None or microbatch_size >= size:
            return one_batch(params, data)
        positions = _filled_up(jnp.arange(size, dtype=jnp.int32), microbatch_size)
        runs = positions.reshape(-1, microbatch_size)
        found = jax.lax.map(lambda run: one_batch(params, take(data, run)), runs)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:size], found)

    mapped = _mesh.mapped(of_part, sharding)

    def of_all(params: Params, data: Data, num_examples: int) -> PyTree:
        if sharding is not None:
            missing = _mesh.missing(_validate.leading_axis("data", data), sharding)
            data = _mesh.spread(lambda data: _fill_up(data, missing), sharding)(data)
        return jax.tree.map(lambda x: _mesh.cut(x, num_examples), mapped(params, data))

    return of_all


def _in_order(
    examples: WeightedExamples, order: Order, sharding: NamedSharding | None
) -> tuple[Int[Array, " support"], Float[Array, "support *draws"]]:
    """Where the examples of this device are, and their weights, in the order to visit them."""
    positions = jnp.arange(examples.values.shape[0], dtype=jnp.int32)
    if order is None:
        return positions if examples.indices is None else examples.indices, examples.values
    # Each device shuffles what it has: nothing moves between devices.
    part = 0 if sharding is None else jax.lax.axis_index(_mesh.axes(sharding))
    positions = permute(jax.random.fold_in(order, part), positions, positions.shape[0])
    indices = positions if examples.indices is None else examples.indices[positions]
    return indices, examples.values[positions]


def _accumulate(
    one_batch: Callable[..., Terms],
    params: Params,
    data: Data,
    indices: Int[Array, " support"],
    values: Float[Array, "support *draws"],
    aux: Statistics,
    microbatch_size: int,
) -> Terms:
    """Sums `one_batch` over micro-batches in order, the statistics threaded through."""
    # Whole runs: positions are filled up from the first ones, weights with zeros.
    positions = _filled_up(indices, microbatch_size)
    values = _mesh.fill_zeros(values, positions.shape[0] - values.shape[0])
    runs = (
        _for_microbatching(positions, microbatch_size),
        _for_microbatching(values, microbatch_size),
    )

    def add(terms: Any, run: PyTree, _: Any) -> Terms:
        positions, values = run
        new = one_batch(params, take(data, positions), values, terms.aux)
        value, grads = jax.tree.map(
            lambda total, term: total + term.astype(total.dtype),
            (terms.value, terms.grads),
            (new.value, new.grads),
        )
        return Terms(value, grads, new.aux)

    def zero(run: PyTree) -> Terms:
        def first_terms(positions: Array, values: Array) -> Terms:
            return one_batch(params, take(data, positions), values, aux)

        # Totals are float32 or wider, whatever the micro-batches give.
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


def _filled_up(positions: Int[Array, " size"], microbatch_size: int) -> Int[Array, " filled"]:
    """Positions in whole micro-batches: the last one is filled up with the first positions."""
    return jnp.concatenate([positions, positions[: -positions.shape[0] % microbatch_size]])


def _for_microbatching(values: Shaped[Array, "size *rest"], microbatch_size: int) -> Array:
    """Orders entries so that optax's micro-batch k holds its k-th run of consecutive entries.

    `optax.microbatching` deals entries out like cards (column-major), to keep shardings in place.
    """
    runs = values.reshape(-1, microbatch_size, *values.shape[1:])
    return runs.swapaxes(0, 1).reshape(values.shape)


def _fill_up(data: Data, missing: int) -> Data:
    """The data in equal parts for the devices: the last example is repeated."""
    return jax.tree.map(lambda x: _mesh.fill(jnp.asarray(x), missing), data)


def take(data: Data, indices: Int[Array, " size"] | None) -> Batch:
    """The examples at these indices, all of them for None."""
    if indices is None:
        return data
    return jax.tree.map(lambda x: jnp.take(x, indices, axis=0, mode="clip"), data)


def check_length(num_examples: int, length: int, sharding: NamedSharding | None) -> None:
    """Raises ValueError unless data of this length are so many examples, filled up or not."""
    filled = num_examples + _mesh.missing(num_examples, sharding)
    if length not in (num_examples, filled):
        raise ValueError(
            f"num_examples must be the length of the data, {length}, before they were filled up "
            f"for the devices, got {num_examples}."
        )


def check_weights(
    weights: Weights, data_size: int, sharding: NamedSharding | None, stacked: bool = False
) -> None:
    """Raises TypeError or ValueError unless these are weights of the data, or a stack of such."""
    if not isinstance(weights, Weights):
        raise TypeError(f"weights must be a noise.Weights, got {type(weights).__name__}.")
    num_examples = weights.num_examples
    filled = num_examples + _mesh.missing(num_examples, sharding)
    if data_size not in (num_examples, filled):
        or_filled = f" ({filled} when filled up for its devices)" if filled > num_examples else ""
        hint = (
            f" Weights for a batch that a loader drew from {num_examples} examples are draws of "
            f"noise.batch_cov({num_examples}, batch_size).of({data_size}), or of batch_fisher's."
        )
        raise ValueError(
            f"weights are for num_examples = {num_examples}{or_filled}, but data has {data_size} "
            f"examples on its leading axis.{hint if data_size < num_examples else ''}"
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
