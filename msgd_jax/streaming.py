"""Training on examples that are read when they are needed.

Which examples a step uses is a function of (key, step) for a sparse law. So they are read while
earlier steps are computed, and no other examples are read. Memory holds a few batches, for any N.
The reading threads are those of grain: ``pip install 'msgd-jax[streaming]'``::

  source = streaming.ArraySource((np.load("images.npy", mmap_mode="r"), labels))
  loop = streaming.make_loop(loss_vector_fn, optimizer, noise.sgd(len(source), 50), source)
  state, metrics = loop(train.init(params, optimizer, key), 1000)

If a data loader of yours draws the batches, use the laws `noise.batch_cov` and
`noise.batch_fisher`, and take the batches of the loader by `batches`.
"""

import collections
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Key

from msgd_jax import _laws, _mesh, _validate
from msgd_jax import loss as loss_lib
from msgd_jax._loaders import LoaderEnded, batches
from msgd_jax._typing import Batch, Data, Example, PositiveInt
from msgd_jax.noise import MNoise
from msgd_jax.train import StepMetrics, TrainState, step_of

__all__ = ["ArraySource", "BatchSource", "LoaderEnded", "Source", "batches", "make_loop"]

# How many steps may be on the device at a time: one that runs and one that is ready to run.
_IN_FLIGHT = 2


@runtime_checkable
class Source(Protocol):
    """Examples by their number: grain's and tfds's data sources, grain's ``MapDataset``, or yours.

    ``source[i]`` is one example: a pytree of arrays, numbers or PRNG keys, whose structure, shapes
    and dtypes are the same for all examples. It is called from several threads. A source that reads
    many examples at once more quickly can be a `BatchSource`; no other method is called.
    """

    def __len__(self) -> int:
        """N."""
        ...

    def __getitem__(self, index: Any, /) -> Example:
        """One example."""
        ...


@runtime_checkable
class BatchSource(Source, Protocol):
    """A `Source` that reads many examples at once: one with a method ``read_batch``."""

    def read_batch(self, indices: Int[np.ndarray, " size"], /) -> Any:
        """The examples at these indices, a pytree of arrays [size, ...], numpy's or jax's."""
        ...


class ArraySource:
    """A pytree of arrays [N, ...] as a source: numpy's, memory-mapped ones too, and PRNG keys.

    Raises:
        TypeError: if a leaf of the data is not an array.
        ValueError: if the leading axes of the arrays differ, or there are no arrays.
    """

    def __init__(self, data: Data) -> None:
        self._size = _validate.leading_axis("data", data)
        leaves, self._structure = jax.tree.flatten(data)
        self._leaves = [_mesh.as_words(leaf) for leaf in leaves]

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: Any, /) -> Any:
        taken = [_on_the_host(words[index], made_of) for words, made_of in self._leaves]
        return jax.tree.unflatten(self._structure, taken)

    def read_batch(self, indices: Int[np.ndarray, " size"], /) -> Any:
        """The examples at these indices, [size, ...]."""
        return jax.tree.map(_array, self[indices])


def make_loop(
    loss_vector_fn: loss_lib.LossVectorFn,
    optimizer: optax.GradientTransformation,
    law: MNoise,
    source: Source,
    *,
    microbatch_size: PositiveInt | None = None,
    has_state: bool = False,
    has_aux: bool = False,
    has_keys: bool = False,
    sharding: NamedSharding | None = None,
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """`train.make_step` in a loop, on examples that are read while earlier steps are computed.

    The parameters are bit for bit those of training with the same law and key on data that are all
    on the device: only the place that the examples come from differs. Which examples are read is a
    function of the state's key and step, so a loop can continue from any state, also in another
    process, and nothing else has to be saved.

    Under `jax.distributed` every process reads the examples of its own devices only.

    Args:
        loss_vector_fn: as in `train.make_step`.
        optimizer: as in `train.make_step`.
        law: a sparse law, one whose draws list the examples that they use.
        source: the examples; see `Source`.
        microbatch_size: as in `train.make_step`.
        has_state: as in `train.make_step`.
        has_aux: as in `train.make_step`.
        has_keys: as in `train.make_step`; the key of an example depends on its number in the
          source.
        sharding: as in `train.make_step`; it spreads the examples of each step.

    Returns:
        ``loop(state, num_steps, *, prefetch=4, num_threads=4) -> (state, metrics)``. The arrays in
        `metrics` have a leading axis [num_steps]. `prefetch` steps are read ahead, each by one of
        `num_threads` threads. The loop raises whatever reading raises, and ValueError if examples
        differ in structure, shape or dtype. `state` is copied, not donated, so that after a failure
        to read you can continue from it.

    Raises:
        ImportError: if grain is not installed.
        TypeError: as `train.make_step`, or if `source` has no ``__len__`` and ``__getitem__``.
        ValueError: as `train.make_step`, or if `law` is dense, or is for a number of examples that
            is not the length of `source`.

    Example:
        >>> from msgd_jax import loss, noise, streaming, train
        >>> source = streaming.ArraySource(np.arange(100, dtype=np.float32))
        >>> losses = loss.per_example(lambda theta, x: (theta - x) ** 2)
        >>> optimizer = optax.sgd(0.1)
        >>> loop = streaming.make_loop(losses, optimizer, noise.random_reshuffling(100, 10), source)
        >>> start = train.init(jnp.asarray(0.0), optimizer, jax.random.key(0))
        >>> state, metrics = loop(start, 5)
        >>> int(state.step), metrics.loss.shape
        (5, (5,))
    """
    grain = _grain()
    _check(law, source)
    _mesh.check("sharding", sharding)
    microbatch_size = _validate.optional_positive_int("microbatch_size", microbatch_size)
    reader = _Reader(law, source, sharding)

    takes = loss_lib.Takes(has_state, has_aux, has_keys)
    evaluate = loss_lib.evaluated(
        loss_vector_fn,
        lambda size: law.sample,
        takes,
        microbatch_size=microbatch_size,
        sharding=sharding,
        read=True,
    )
    one_step = step_of(loss_vector_fn, evaluate, takes, optimizer, None)
    step = jax.jit(one_step, donate_argnums=0)

    def loop(
        state: TrainState,
        num_steps: PositiveInt,
        *,
        prefetch: PositiveInt = 4,
        num_threads: PositiveInt = 4,
    ) -> tuple[TrainState, StepMetrics]:
        prefetch = _validate.positive_int("prefetch", prefetch)
        num_threads = _validate.positive_int("num_threads", num_threads)
        if not isinstance(state, TrainState):
            raise TypeError(f"state must be a train.TrainState, got {_validate.shown(state)}.")
        first = int(state.step)
        most = _validate.MAX_STEP - first
        num_steps = _validate.positive_int("num_steps", num_steps, maximum=most)
        # Threads read the examples of the next steps while earlier steps are computed.
        read = reader.of_key(state.key)
        steps = grain.MapDataset.range(first, first + num_steps).map(read)
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
        state = jax.tree.map(jnp.copy, state)
        state, metrics = _run(step, state, iter(steps.to_iter_dataset(options)), reader.place)
        return state, jax.tree.map(lambda *values: jnp.stack(values), *metrics)

    return loop


def _run(
    step: Callable[..., Any],
    state: TrainState,
    batches: Iterator[Batch],
    place: Callable[[Batch], Batch],
) -> tuple[TrainState, list[StepMetrics]]:
    metrics: list[StepMetrics] = []
    in_flight: collections.deque[StepMetrics] = collections.deque()
    for batch in batches:
        if len(in_flight) == _IN_FLIGHT:  # so that batches do not pile up on the device
            jax.block_until_ready(in_flight.popleft())
        state, new = step(state, place(batch))
        metrics.append(new)
        in_flight.append(new)
    return state, metrics


class _Reader:
    """Reads the examples of a step that belong to this process, and places them on its devices."""

    def __init__(self, law: MNoise, source: Source, sharding: NamedSharding | None) -> None:
        size = law.support_size
        self._source = source
        self._num_read = size + _mesh.missing(size, sharding)
        self._indices = jax.jit(lambda key, step: law.sample(key, step).indices)
        self._layout = None
        own = np.arange(self._num_read)
        if sharding is not None:
            self._layout = NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0]))
            parts = self._layout.addressable_devices_indices_map((self._num_read,)).values()
            own = np.unique(np.concatenate([own[part] for part in parts if part is not None]))
        self._own = own  # the positions that this process needs, ascending

    def of_key(self, key: Key[Array, ""]) -> Callable[[int], Batch]:
        """``read(step)``, which returns in memory the examples that this process computes."""
        # Weights are drawn on the host, so as not to wait for the devices that train.
        key = _on_the_host(*_mesh.as_words(key))

        def read(step: int) -> Batch:
            indices = np.asarray(self._indices(jax.random.clone(key), np.int32(step)))
            filled = indices[np.minimum(self._own, len(indices) - 1)]
            return _batch(self._source, filled)

        return read

    def place(self, batch: Batch) -> Batch:
        """The batch on the device; if it is spread, each part on its own device."""

        def on_devices(leaf: Any) -> Array:
            words, made_of = _mesh.as_words(leaf)
            own = (
                jax.device_put(words) if self._layout is None else self._spread(words, self._layout)
            )
            return _mesh.from_words(own, made_of)

        return jax.tree.map(on_devices, batch)

    def _spread(self, own: Any, layout: NamedSharding) -> Array:
        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(self._num_read)
            first = np.searchsorted(self._own, start)
            return own[first : first + stop - start]

        own = np.asarray(own)
        dtype = jax.dtypes.canonicalize_dtype(own.dtype)
        shape = (self._num_read, *own.shape[1:])
        own = own.astype(dtype, copy=False)
        return jax.make_array_from_callback(shape, layout, part, dtype=dtype)


def _batch(source: Source, indices: Int[np.ndarray, " size"]) -> Batch:
    """The examples at these indices, stacked."""
    if isinstance(source, BatchSource):
        batch = source.read_batch(indices)
        size = _validate.leading_axis("source.read_batch(indices)", batch)
        if size != len(indices):
            raise ValueError(
                f"source.read_batch(indices) must return {len(indices)} examples, one for each "
                f"index, got {size}."
            )
        return batch
    examples = [jax.tree.map(_array, source[int(index)]) for index in indices]
    for index, example in zip(indices, examples, strict=True):
        difference = _validate.first_difference("example", examples[0], example)
        if difference is not None:
            raise ValueError(
                "source must have examples of one structure, shape and dtype: "
                f"source[{indices[0]}] has {difference[0]}, source[{index}] has {difference[1]}."
            )
    batch = jax.tree.map(_stacked, *examples)
    _validate.leading_axis(f"source[{indices[0]}]", batch)
    return batch


def _array(leaf: Any) -> Any:
    words, made_of = _mesh.as_words(leaf)
    return np.asarray(words) if made_of is None else leaf


def _stacked(*leaves: Any) -> Any:
    arrays, made_of = zip(*map(_mesh.as_words, leaves), strict=True)
    return _on_the_host(np.stack(arrays), made_of[0])


def _on_the_host(words: Any, made_of: Any) -> Any:
    """`_mesh.from_words` with keys on the CPU, in any thread and with any other devices."""
    if made_of is not None:
        words = jax.device_put(words, jax.local_devices(backend="cpu")[0])
    return _mesh.from_words(words, made_of)


def _check(law: MNoise, source: Source) -> None:
    _laws.drawable("law", law)
    if not isinstance(source, Source):
        raise TypeError(
            "source must have __len__ and __getitem__, such as streaming.ArraySource, got "
            f"{type(source).__name__}."
        )
    if len(source) != law.num_examples:
        raise ValueError(
            f"law is for num_examples = {law.num_examples}, but source has {len(source)}."
        )
    if jax.eval_shape(lambda: law.sample(jax.random.key(0), 0).indices) is None:
        raise ValueError(
            "law must list the examples that it uses, as sgd, random_reshuffling and the sparse "
            f"laws do, got {law.name}, which uses all {law.num_examples}."
        )


def _grain() -> Any:
    try:
        import grain
    except ImportError:
        raise ImportError(
            "msgd_jax.streaming needs grain: pip install 'msgd-jax[streaming]'."
        ) from None
    return grain
