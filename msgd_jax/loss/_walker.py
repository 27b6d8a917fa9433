"""The walker: through the examples in micro-batches, on one device or on many.

Everything that is computed of many examples goes through here, by one of two functions:

* `sums` adds up what the micro-batches give (losses, gradients, squares), each example weighted;
* `maps` puts together what they give for each example ([N, ...]).

Both take the examples in runs of `microbatch_size`, on each device those that it holds, and fill
up the last run with examples of other runs: real ones, at which every loss is as finite as
elsewhere. In a sum these count at weight 0, and of a map they are cut off. What is walked is
positions and weights; data are read run by run and never copied:

* in the order they are in as slices, for compilers of accelerators lay out anew whatever is
  gathered from, which is all examples (`optax.microbatching` deals examples out like cards, and
  its micro-batches are no slices);
* listed or shuffled ones by gathering;
* listed ones that are spread over devices where they are, by the device that holds them (`_held`).
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
    equal_parts: bool = True,
) -> WeightedExamples:
    """The data and the weights ``values, indices = weights_of(*args)``, in parts if spread.

    What draws the weights belongs into `weights_of`: then each device draws its part only. With
    `read`, the data are the examples that the indices list, and nothing else. `numbered` and
    `marked` ask for `numbers` and `real`. Spread examples that are listed are sent to where their
    weights are, in equal parts; or, without `equal_parts`, stay where they are, and their weights
    are drawn on every device.
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

    Also the statistics at the end, and the arrays of each micro-batch, with an axis of them in
    front, behind one of devices where the examples are spread.
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

            def add(params: Params, terms: Terms, run: WeightedExamples) -> Terms:
                return _plus(terms, of_run(params, run, model_state))

            def zero(run: WeightedExamples) -> Terms:
                return _zero(jax.eval_shape(of_run, params, run, model_state), model_state)

            terms = _held.total(add, zero, params, examples, microbatch_size, sharding)
        elif microbatch_size is None or microbatch_size >= support:
            terms = of_run(params, examples, model_state)
            terms = terms._replace(stacked=jax.tree.map(lambda x: x[None], terms.stacked))
        else:
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
    """Of listed examples the data alone are spread, all else is the same on every device."""
    parts, everywhere = PartitionSpec(sharding.spec[0]), PartitionSpec()
    if examples.indices is None:
        return parts
    return jax.tree.map(lambda _: everywhere, examples)._replace(data=parts)


def keys_of_examples(
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
        starts = jnp.minimum(jnp.arange(0, size, microbatch_size), size - microbatch_size)
        cut = functools.partial(_slice, size=microbatch_size)
        found = jax.lax.map(lambda start: one_batch(params, cut(data, start)), starts)
        seen = -size % microbatch_size  # of the last run, which starts so much earlier
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
    """The examples of run k, as a function of k, and how many runs there are.

    `terms` are the shapes of what a run gives.
    """
    support = examples.values.shape[0]
    missing = -support % microbatch_size
    num_runs = (support + missing) // microbatch_size
    cut = functools.partial(_slice, size=microbatch_size)

    # Statistics and stacked arrays tell what a last run is filled up with: from the first ones.
    told = missing and jax.tree.leaves((terms.model_state, terms.stacked))
    if order is None and examples.indices is None and not told:

        def slices(k: Int[Array, ""]) -> WeightedExamples:
            # The last run starts earlier, and what it has in common with the one before is seen.
            seen = jnp.maximum(k * microbatch_size - (support - microbatch_size), 0)
            run = cut(examples, k * microbatch_size - seen)
            if missing == 0:
                return run
            new = jnp.arange(microbatch_size, dtype=jnp.int32) >= seen
            draws = (1,) * (run.values.ndim - 1)
            values = jnp.where(new.reshape(-1, *draws), run.values, 0)
            return run._replace(values=values, real=None if run.real is None else run.real & new)

        return slices, num_runs

    # Whole runs: examples are filled up from the first ones, weights with zeros.
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
    of_run: Callable[[WeightedExamples, ModelState], Terms],
    run_of: Callable[[Int[Array, ""]], WeightedExamples],
    num_runs: int,
    zero: Terms,
) -> Terms:
    """Sums `of_run` over the runs in order, the statistics threaded through."""

    def add(terms: Terms, k: Int[Array, ""]) -> tuple[Terms, PyTree]:
        new = of_run(run_of(k), terms.model_state)
        return _plus(terms, new), new.stacked

    terms, stacked = jax.lax.scan(add, zero, jnp.arange(num_runs, dtype=jnp.int32))
    return terms._replace(stacked=stacked)


def _zero(shapes: Terms, model_state: ModelState) -> Terms:
    """No terms yet: totals are float32 or wider, whatever the micro-batches give."""
    value, grads = jax.tree.map(
        lambda x: _mesh.zeros(x, _dtypes.accumulator(x.dtype)), (shapes.value, shapes.grads)
    )
    return Terms(value, grads, model_state)


def _plus(terms: Terms, new: Terms) -> Terms:
    """The totals with those of one more run, and the statistics after it."""
    value, grads = jax.tree.map(
        lambda total, term: total + term.astype(total.dtype),
        (terms.value, terms.grads),
        (new.value, new.grads),
    )
    return Terms(value, grads, new.model_state)


def _fill_up(data: Data, missing: int) -> Data:
    """The data in equal parts for the devices: the last example is repeated."""
    return jax.tree.map(lambda x: _mesh.fill(jnp.asarray(x), missing), data)


def take(data: Data, indices: Int[Array, " size"] | None) -> Batch:
    """The examples at these indices, all of them for None."""
    if indices is None:
        return data
    return jax.tree.map(lambda x: jnp.take(x, indices, axis=0, mode="clip"), data)


def _slice(tree: PyTree, start: Int[Array, ""], size: int) -> PyTree:
    """So many entries from a place on, of all leaves."""
    cut = lambda x: jax.lax.dynamic_slice_in_dim(jnp.asarray(x), start, size)  # noqa: E731
    return jax.tree.map(cut, tree)
