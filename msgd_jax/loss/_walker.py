"""The walker goes through the examples in micro-batches, on one device or on many.

Everything that is computed from many examples goes through here, by one of two functions:

* `sums` adds up what the micro-batches give (losses, gradients, squares), with weights;
* `maps` puts together what they give per example ([N, ...]).

Both take the examples in runs of `microbatch_size`, where each device takes those that it holds.
They fill up the last run with examples of other runs: real ones, at which every loss is as finite
as elsewhere. These have weight 0 in a sum, and are cut off from a map. The walker moves positions
and weights; the data are read run by run and never copied as a whole:

* Examples in the order of the data are read as slices, because the compilers of accelerators change
  the layout of any array that is gathered from, and so would copy all examples. (The micro-batches
  of `optax.microbatching` take every M-th example, and so are not slices.)
* Examples that are listed or shuffled are gathered.
* Listed examples that are spread over devices are computed where they are, by the device that holds
  them (`_held`).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from msgd_jax import _dtypes, _mesh, _validate
from msgd_jax._streams import of_examples, repeated
from msgd_jax._typing import Batch, Data, ModelState, Params, PyTree
from msgd_jax.loss import _held
from msgd_jax.noise import permute


class Keys(NamedTuple):
    """Keys of a step, the same on all devices; None where nothing is drawn.

    Attributes:
        order: the key of the order in which the micro-batches take the examples; with None they
            take them in the order of the data.
        losses: the key from which the keys of the examples are derived.
    """

    order: Key[Array, ""] | None = None
    losses: Key[Array, ""] | None = None


class Entries(NamedTuple):
    """What comes with the examples of one batch, with one entry per example.

    Attributes:
        values: their weights.
        keys: their keys; None if the losses take no keys.
        real: False where an example only fills up a micro-batch or a device; None unless it was
            asked for.
    """

    values: Float[Array, "B *draws"]
    keys: Key[Array, " B"] | None
    real: Bool[Array, " B"] | None


class Terms(NamedTuple):
    """What one micro-batch adds to the value and the gradients, and its statistics and arrays."""

    value: PyTree
    grads: PyTree
    model_state: ModelState
    stacked: PyTree = ()


class WeightedExamples(NamedTuple):
    """Examples and their weights, with one entry per example.

    Attributes:
        data: the arrays that hold the examples.
        indices: entry k is example ``indices[k]`` of `data`; with None it is example k.
        values: the weights.
        numbers: the position of each entry's example in the data set, also where `data` are a part
            of it; None unless they were asked for.
        real: False where an entry only fills up the devices; None unless it was asked for.
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
    equal_parts: bool = True,
) -> WeightedExamples:
    """The data and the weights ``values, indices = weights_of(*args)``, in parts if spread.

    The weights should be drawn inside `weights_of`, so that each device draws its part only. With
    `read`, the data are the examples that the indices list, and nothing else. `numbered` and
    `marked` ask for `numbers` and `real`. Spread examples that are listed are sent to the devices
    of their weights, in equal parts. Without `equal_parts` they stay where they are, and their
    weights are drawn on every device.
    """

    def in_equal_parts(data: Data, *args: Any) -> WeightedExamples:
        values, indices = weights_of(*args)
        indices = None if indices is None else indices.astype(jnp.int32)
        support, numbers, real = values.shape[0], None, None
        missing = _mesh.missing(support, sharding)
        # Positions are counted to the filled-up length, so that each device counts its own part.
        positions = jnp.arange(support + missing, dtype=jnp.int32)
        if numbered:
            own = jnp.minimum(positions, support - 1)
            numbers = own if indices is None else _mesh.fill(indices, missing)
        if marked:
            real = positions < support
        indices = None if read else indices
        if sharding is None:
            return WeightedExamples(data, indices, values, numbers, real)
        # Spread examples must be where their weights are, so listed ones are gathered first.
        if indices is not None:
            data = take(data, _mesh.fill(indices, missing))
        elif _validate.leading_axis("data", data) == support:
            data = _fill_up(data, missing)
        return WeightedExamples(data, None, _mesh.fill_zeros(values, missing), numbers, real)

    def where_they_are(sharding: NamedSharding) -> WeightedExamples:
        values, indices = _mesh.everywhere(weights_of, sharding)(*args)
        indices = indices.astype(jnp.int32)
        missing = _mesh.missing(_validate.leading_axis("data", data), sharding)
        filled = _mesh.spread(functools.partial(_fill_up, missing=missing), sharding)(data)
        real = jnp.ones(values.shape, bool) if marked else None
        return WeightedExamples(filled, indices, values, indices if numbered else None, real)

    if sharding is None or read or equal_parts or jax.eval_shape(weights_of, *args)[1] is None:
        return _mesh.spread(in_equal_parts, sharding)(data, *args)
    return where_they_are(sharding)


def sums(
    one_batch: Callable[..., Terms], microbatch_size: int | None, sharding: NamedSharding | None
) -> Callable[
    [Params, WeightedExamples, ModelState, Keys],
    tuple[tuple[PyTree, PyTree], ModelState, PyTree],
]:
    """The sum of ``one_batch(params, batch, entries, model_state)`` over all examples.

    The results are the sums, the statistics after the last micro-batch, and the arrays of each
    micro-batch. The arrays have a leading axis of micro-batches, and in front of it an axis of
    devices if the examples are spread.
    """

    def terms_of(
        params: Params, examples: WeightedExamples, model_state: ModelState, keys: Keys
    ) -> tuple[tuple[PyTree, PyTree], ModelState, PyTree]:
        keys_of = keys_of_examples(keys.losses)
        support = examples.values.shape[0]

        def of_run(params: Params, run: WeightedExamples, model_state: ModelState) -> Terms:
            batch = take(run.data, run.indices)
            entries = Entries(run.values, keys_of(run.numbers), run.real)
            return one_batch(params, batch, entries, model_state)

        if sharding is not None and examples.indices is not None:
            # Each device walks through the listed examples that it holds.

            def add(params: Params, terms: Terms, run: WeightedExamples) -> Terms:
                return _plus(terms, of_run(params, run, model_state))

            def zero(run: WeightedExamples) -> Terms:
                return _zero(jax.eval_shape(of_run, params, run, model_state), model_state)

            terms = _held.total(add, zero, params, examples, microbatch_size, sharding)
        elif microbatch_size is None or microbatch_size >= support:
            # One pass over all examples.
            terms = of_run(params, examples, model_state)
            terms = terms._replace(stacked=jax.tree.map(lambda x: x[None], terms.stacked))
        else:
            # The shapes of what one run gives are needed before the loop over the runs.
            listed = examples.indices is not None
            part = examples._replace(data=()) if listed else examples
            size = microbatch_size
            run = jax.eval_shape(lambda part: _slice(part, jnp.int32(0), size), part)
            run = run._replace(data=examples.data) if listed else run
            shapes = jax.eval_shape(of_run, params, run, model_state)
            run_of, num_runs = _runs(examples, keys.order, shapes, microbatch_size, sharding)
            of_run_at = functools.partial(of_run, params)
            terms = _accumulate(of_run_at, run_of, num_runs, _zero(shapes, model_state))
        return (terms.value, terms.grads), terms.model_state, terms.stacked

    return _mesh.summed(terms_of, sharding, _layout)


def _layout(examples: WeightedExamples, sharding: NamedSharding) -> PyTree:
    """How examples are spread: of listed ones only the data, and all else is on every device."""
    parts, everywhere = PartitionSpec(sharding.spec[0]), PartitionSpec()
    if examples.indices is None:
        return parts
    return jax.tree.map(lambda _: everywhere, examples)._replace(data=parts)


def keys_of_examples(
    key: Key[Array, ""] | None,
) -> Callable[[Int[Array, " B"] | None], Key[Array, " B"] | None]:
    """A function from the numbers of a batch's examples to their keys.

    The keys of all examples are never in memory at once.
    """
    if key is None:
        return lambda numbers: None
    again = repeated(key)
    return lambda numbers: None if numbers is None else of_examples(again(), numbers)


def maps(
    one_batch: Callable[[Params, Batch], PyTree],
    microbatch_size: int | None,
    sharding: NamedSharding | None,
) -> Callable[[Params, Data, int], PyTree]:
    """A function of (params, data, N): ``one_batch(params, batch)`` of the first N examples.

    `one_batch` returns arrays [B, ...], and the function returns [N, ...].
    """

    def of_part(params: Params, data: Data) -> PyTree:
        size = _validate.leading_axis("data", data)
        if microbatch_size is None or microbatch_size >= size:
            return one_batch(params, data)
        # The last run starts earlier if it would reach beyond the end; what it repeats is cut off.
        starts = jnp.minimum(jnp.arange(0, size, microbatch_size), size - microbatch_size)
        cut = functools.partial(_slice, size=microbatch_size)
        found = jax.lax.map(lambda start: one_batch(params, cut(data, start)), starts)
        seen = -size % microbatch_size
        ends = lambda x: [x[:-1].reshape(-1, *x.shape[2:]), x[-1, seen:]]  # noqa: E731
        return jax.tree.map(lambda x: jnp.concatenate(ends(x)), found)

    mapped = _mesh.mapped(of_part, sharding)

    def of_all(params: Params, data: Data, num_examples: int) -> PyTree:
        if sharding is not None:
            missing = _mesh.missing(_validate.leading_axis("data", data), sharding)
            data = _mesh.spread(lambda data: _fill_up(data, missing), sharding)(data)
        return jax.tree.map(lambda x: _mesh.cut(x, num_examples), mapped(params, data))

    return of_all


def _runs(
    examples: WeightedExamples,
    order: Key[Array, ""] | None,
    terms: Terms,
    microbatch_size: int,
    sharding: NamedSharding | None,
) -> tuple[Callable[[Int[Array, ""]], WeightedExamples], int]:
    """The examples of run k, as a function of k, and the number of runs.

    `terms` are the shapes of what a run gives.

    The last run is filled up by one of two rules, which cannot be one. Slices of the data cannot
    wrap around without a copy, so the last slice starts earlier, and the examples that it shares
    with the run before have weight 0. Where the examples that fill up can be seen (statistics
    depend on them, and stacked arrays contain them), they come from the first run and stand at the
    end, so that the first N entries of stacked arrays are the N examples. A slice that starts
    earlier has them in front. Runs that are gathered can follow the second rule at no cost, so all
    of them do.
    """
    support = examples.values.shape[0]
    missing = -support % microbatch_size
    num_runs = (support + missing) // microbatch_size
    cut = functools.partial(_slice, size=microbatch_size)

    told = missing and jax.tree.leaves((terms.model_state, terms.stacked))
    if order is None and examples.indices is None and not told:

        def slices(k: Int[Array, ""]) -> WeightedExamples:
            # `seen` is the number of examples that the last run shares with the run before.
            seen = jnp.maximum(k * microbatch_size - (support - microbatch_size), 0)
            run = cut(examples, k * microbatch_size - seen)
            if missing == 0:
                return run
            new = jnp.arange(microbatch_size, dtype=jnp.int32) >= seen
            draws = (1,) * (run.values.ndim - 1)
            values = jnp.where(new.reshape(-1, *draws), run.values, 0)
            return run._replace(values=values, real=None if run.real is None else run.real & new)

        return slices, num_runs

    # The lists of examples are filled up with the first ones, and the weights with zeros.
    examples = _in_order(examples, order, sharding)
    repeat = lambda x: jnp.concatenate([x, x[:missing]])  # noqa: E731
    indices, numbers = jax.tree.map(repeat, (examples.indices, examples.numbers))
    zeros = lambda x: _mesh.fill_zeros(x, missing)  # noqa: E731
    values, real = jax.tree.map(zeros, (examples.values, examples.real))
    filled = WeightedExamples((), indices, values, numbers, real)
    of_run = lambda k: cut(filled, k * microbatch_size)  # noqa: E731
    return lambda k: of_run(k)._replace(data=examples.data), num_runs


def _in_order(
    examples: WeightedExamples, order: Key[Array, ""] | None, sharding: NamedSharding | None
) -> WeightedExamples:
    """The entries of this device in the order of their runs, with the indices of their examples."""
    positions = jnp.arange(examples.values.shape[0], dtype=jnp.int32)
    if order is None:
        indices = positions if examples.indices is None else examples.indices
        return examples._replace(indices=indices)
    # Each device shuffles its own examples, so that nothing moves between devices.
    part = 0 if sharding is None else jax.lax.axis_index(_mesh.axes(sharding))
    positions = permute(jax.random.fold_in(order, part), positions, positions.shape[0])
    indices = positions if examples.indices is None else examples.indices[positions]
    entries = (examples.values, examples.numbers, examples.real)
    return WeightedExamples(examples.data, indices, *jax.tree.map(lambda x: x[positions], entries))


def _accumulate(
    of_run: Callable[[WeightedExamples, ModelState], Terms],
    run_of: Callable[[Int[Array, ""]], WeightedExamples],
    num_runs: int,
    zero: Terms,
) -> Terms:
    """The sum of `of_run` over the runs in order; each gets the statistics of the one before."""

    def add(terms: Terms, k: Int[Array, ""]) -> tuple[Terms, PyTree]:
        new = of_run(run_of(k), terms.model_state)
        return _plus(terms, new), new.stacked

    terms, stacked = jax.lax.scan(add, zero, jnp.arange(num_runs, dtype=jnp.int32))
    return terms._replace(stacked=stacked)


def _zero(shapes: Terms, model_state: ModelState) -> Terms:
    """Terms of zero, in float32 or wider, whatever the micro-batches give."""
    value, grads = jax.tree.map(
        lambda x: _mesh.zeros(x, _dtypes.accumulator(x.dtype)), (shapes.value, shapes.grads)
    )
    return Terms(value, grads, model_state)


def _plus(terms: Terms, new: Terms) -> Terms:
    """The totals with the terms of one more run, and the statistics after it."""
    value, grads = jax.tree.map(
        lambda total, term: total + term.astype(total.dtype),
        (terms.value, terms.grads),
        (new.value, new.grads),
    )
    return Terms(value, grads, new.model_state)


def _fill_up(data: Data, missing: int) -> Data:
    """The data with the last example repeated, so that the devices get equal parts."""
    return jax.tree.map(lambda x: _mesh.fill(jnp.asarray(x), missing), data)


def take(data: Data, indices: Int[Array, " size"] | None) -> Batch:
    """The examples at these indices; with None, all examples."""
    if indices is None:
        return data
    return jax.tree.map(lambda x: jnp.take(x, indices, axis=0, mode="clip"), data)


def _slice(tree: PyTree, start: Int[Array, ""], size: int) -> PyTree:
    """The `size` entries from `start` on, of each leaf."""
    cut = lambda x: jax.lax.dynamic_slice_in_dim(jnp.asarray(x), start, size)  # noqa: E731
    return jax.tree.map(cut, tree)
