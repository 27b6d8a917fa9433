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
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from msgd_jax import _dtypes, _mesh, _validate
from msgd_jax._streams import of_examples, repeated
from msgd_jax._typing import Batch, Data, ModelState, Params, PyTree
from msgd_jax.noise import Weights, permute


class Keys(NamedTuple):
    """Keys of a step, the same on all devices; None where nothing is drawn.

    Attributes:
        order: for the order in which micro-batches take the examples; None: the order they are in.
        losses: what the keys of the examples are derived from.
    """

    order: Key[Array, ""] | None = None
    losses: Key[Array, ""] | None = None


class Entries(NamedTuple):
    """What comes with the examples of one batch, an entry each.

    Attributes:
        values: their weights.
        keys: their keys, if the losses take some.
        real: False where an example only fills up a micro-batch or a device, if that was asked for.
    """

    values: Float[Array, "B *draws"]
    keys: Key[Array, " B"] | None
    real: Bool[Array, " B"] | None


class Terms(NamedTuple):
    """What one micro-batch adds to values and gradients, the statistics then, and its arrays."""

    value: PyTree
    grads: PyTree
    model_state: ModelState
    stacked: PyTree = ()


class WeightedExamples(NamedTuple):
    """Examples and their weights, an entry each.

    Attributes:
        data: where the examples are.
        indices: entry k is example ``indices[k]`` of `data`; None: they are in order.
        values: the weights.
        numbers: which example of the data set an entry is, whatever `data` are; None where nobody
            asked.
        real: False where an entry only fills up the devices; None where nobody asked.
    """

    data: Data
    indices: Int[Array, " support"] | None
    values: Float[Array, "support *draws"]
    numbers: Int[Array, " support"] | None = None
    real: Bool[Array, " support"] | None = None


def weighted_examples(
    data: Data,
    weights_of: Callable[..., tuple[Array, Array | None]],
    args: tuple[Any, ...],
    sharding: NamedSharding | None,
    *,
    read: bool = False,
    numbered: bool = False,
    marked: bool = False,
) -> WeightedExamples:
    """The data and the weights ``values, indices = weights_of(*args)``, in equal parts if spread.

    What draws the weights belongs into `weights_of`: then each device draws its part only. With
    `read`, the data are the examples that the indices list, and nothing else. `numbered` and
    `marked` ask for `numbers` and `real`.
    """

    def in_equal_parts(data: Data, *args: Any) -> WeightedExamples:
        values, indices = weights_of(*args)
        indices = None if indices is None else indices.astype(jnp.int32)
        support, numbers, real = values.shape[0], None, None
        missing = _mesh.missing(support, sharding)
        # Counted, not filled up, so that each device counts its own part.
        positions = jnp.arange(support + missing, dtype=jnp.int32)
        if numbered:
            own = jnp.minimum(positions, support - 1)
            numbers = own if indices is None else _mesh.fill(indices, missing)
        if marked:
            real = positions < support
        indices = None if read else indices
        if sharding is None:
            return WeightedExamples(data, indices, values, numbers, real)
        # Spread, an example lies where its weight is: the listed ones are gathered first.
        if indices is not None:
            data = take(data, _mesh.fill(indices, missing))
        elif _validate.leading_axis("data", data) == support:
            data = _fill_up(data, missing)
        return WeightedExamples(data, None, _mesh.fill_zeros(values, missing), numbers, real)

    return _mesh.spread(in_equal_parts, sharding)(data, *args)


def sums(
    one_batch: Callable[..., Terms], microbatch_size: int | None, sharding: NamedSharding | None
) -> Callable[
    [Params, WeightedExamples, ModelState, Keys],
    tuple[tuple[PyTree, PyTree], ModelState, PyTree],
]:
    """The sum of ``one_batch(params, batch, entries, model_state)`` over all examples.

    Also the statistics at the end, and the arrays of each micro-batch, with an axis of them in
    front, behind one of devices where the examples are spread.
    """

    def terms_of(
        params: Params, examples: WeightedExamples, model_state: ModelState, keys: Keys
    ) -> tuple[tuple[PyTree, PyTree], ModelState, PyTree]:
        keys_of = _keys_of_examples(keys.losses)
        support = examples.values.shape[0]
        if microbatch_size is None or microbatch_size >= support:
            batch = take(examples.data, examples.indices)
            entries = Entries(examples.values, keys_of(examples.numbers), examples.real)
            terms = one_batch(params, batch, entries, model_state)
            terms = terms._replace(stacked=jax.tree.map(lambda x: x[None], terms.stacked))
        else:
            examples = _in_order(examples, keys.order, sharding)
            terms = _accumulate(one_batch, params, examples, keys_of, model_state, microbatch_size)
        return (terms.value, terms.grads), terms.model_state, terms.stacked

    return _mesh.summed(terms_of, sharding)


def _keys_of_examples(
    key: Key[Array, ""] | None,
) -> Callable[[Int[Array, " B"] | None], Key[Array, " B"] | None]:
    """The keys of a batch from the numbers of its examples: never those of all at once."""
    if key is None:
        return lambda numbers: None
    again = repeated(key)
    return lambda numbers: None if numbers is None else of_examples(again(), numbers)


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
    examples: WeightedExamples, order: Key[Array, ""] | None, sharding: NamedSharding | None
) -> WeightedExamples:
    """The entries of this device in the order to visit them, and where their examples are."""
    positions = jnp.arange(examples.values.shape[0], dtype=jnp.int32)
    if order is None:
        indices = positions if examples.indices is None else examples.indices
        return examples._replace(indices=indices)
    # Each device shuffles what it has: nothing moves between devices.
    part = 0 if sharding is None else jax.lax.axis_index(_mesh.axes(sharding))
    positions = permute(jax.random.fold_in(order, part), positions, positions.shape[0])
    indices = positions if examples.indices is None else examples.indices[positions]
    entries = (examples.values, examples.numbers, examples.real)
    return WeightedExamples(examples.data, indices, *jax.tree.map(lambda x: x[positions], entries))


def _accumulate(
    one_batch: Callable[..., Terms],
    params: Params,
    examples: WeightedExamples,
    keys_of: Callable[[Int[Array, " B"] | None], Key[Array, " B"] | None],
    model_state: ModelState,
    microbatch_size: int,
) -> Terms:
    """Sums `one_batch` over micro-batches in order, the statistics threaded through."""
    # Whole runs: examples are filled up from the first ones, weights with zeros.
    data, missing = examples.data, -examples.values.shape[0] % microbatch_size
    repeat = lambda x: _filled_up(x, microbatch_size)  # noqa: E731
    zeros = lambda x: _mesh.fill_zeros(x, missing)  # noqa: E731
    filled = (
        *jax.tree.map(repeat, (examples.indices, examples.numbers)),
        *jax.tree.map(zeros, (examples.values, examples.real)),
    )
    runs = jax.tree.map(lambda x: _for_microbatching(x, microbatch_size), filled)
    num_runs = (examples.values.shape[0] + missing) // microbatch_size

    def of_run(run: PyTree, model_state: ModelState) -> Terms:
        indices, numbers, values, real = run
        entries = Entries(values, keys_of(numbers), real)
        return one_batch(params, take(data, indices), entries, model_state)

    def add(terms: Any, run: PyTree, index: Any) -> Terms:
        new = of_run(run, terms.model_state)
        value, grads = jax.tree.map(
            lambda total, term: total + term.astype(total.dtype),
            (terms.value, terms.grads),
            (new.value, new.grads),
        )
        stacked = jax.tree.map(lambda all, x: all.at[index].set(x), terms.stacked, new.stacked)
        return Terms(value, grads, new.model_state, stacked)

    def zero(run: PyTree) -> Terms:
        # Totals are float32 or wider, whatever the micro-batches give.
        shapes = jax.eval_shape(of_run, run, model_state)
        value, grads = jax.tree.map(
            lambda x: jnp.zeros(x.shape, _dtypes.accumulator(x.dtype)), (shapes.value, shapes.grads)
        )
        stacked = jax.tree.map(lambda x: jnp.zeros((num_runs, *x.shape), x.dtype), shapes.stacked)
        return Terms(value, grads, model_state, stacked)

    accumulator = optax.microbatching.Accumulator(
        init=zero, update=add, finalize=lambda terms: terms, aggregate=lambda terms: terms
    )
    walk = optax.microbatching.microbatch(
        lambda *run: run,
        argnums=(0, 1, 2, 3),
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


def as_weights(weights: Weights | Array, num_examples: int) -> Weights:
    """What stands for weights, as weights of so many examples; their shape is checked later."""
    if not isinstance(weights, Weights):
        if not hasattr(weights, "shape") or not hasattr(weights, "dtype"):
            raise TypeError(
                "weights must be a noise.Weights or an array of one weight per example, got "
                f"{_validate.shown(weights)}."
            )
        if not jnp.issubdtype(weights.dtype, jnp.floating):
            raise TypeError(f"weights must be floating point, got {weights.dtype}.")
        weights = Weights(jnp.asarray(weights), None, num_examples)
    if weights.num_examples != num_examples:
        raise ValueError(
            f"weights are for num_examples = {weights.num_examples}, but the data have "
            f"{num_examples} examples."
        )
    return weights


def check_weights(
    weights: Weights,
    data_size: int,
    sharding: NamedSharding | None,
    stacked: bool = False,
    read: bool = False,
) -> None:
    """Raises TypeError or ValueError unless these are weights of the data, or a stack of such.

    With `read`, the data are the examples that the weights list.
    """
    if not isinstance(weights, Weights):
        raise TypeError(f"weights must be a noise.Weights, got {type(weights).__name__}.")
    num_examples = weights.values.shape[-1] if read else weights.num_examples
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
