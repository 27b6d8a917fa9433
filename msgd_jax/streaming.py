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
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Key

from msgd_jax import _laws, _mesh, _sources, _validate
from msgd_jax import loss as loss_lib
from msgd_jax._loaders import LoaderEnded, batches
from msgd_jax._sources import ArraySource, BatchSource, Source
from msgd_jax._typing import Batch, PositiveInt
from msgd_jax.noise import MNoise
from msgd_jax.train import StepMetrics, TrainState, in_turn, step_of

__all__ = ["ArraySource", "BatchSource", "LoaderEnded", "Source", "batches", "make_loop"]

# The number of programs that may be on the device: one that runs and one that is ready to run.
_IN_FLIGHT = 2

# One call of a program makes at most so many steps, whose examples take at most so many bytes:
# calling a program costs as much as a small step.
_STEPS_IN_ONE_CALL = 16
_BYTES_IN_ONE_CALL = 2**21
# The steps of a call are read in two parts: to hand a part from thread to thread takes as long as
# to read a small step, but a slow source is read by several threads from the first call on.
_READS_FOR_ONE_CALL = 2

# The indices of so many steps are drawn together, but at most so many indices.
_STEPS_AT_ONCE = 128
_INDICES_AT_ONCE = 2**16


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
    on one device. (The reported losses may differ in the last bit. On several devices gradients may
    too, since each device computes the examples that it holds.) One call of a compiled program
    makes up to 16 small steps. Which examples are read is a function of the state's key and step,
    so a loop can continue from any state, also in another process, and nothing else has to be
    saved.

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
        `num_threads` threads; of small steps, up to eight are read in place of one. The loop raises
        whatever reading raises, and ValueError if examples differ in structure, shape or dtype.
        `state` is copied, not donated, so that after a failure to read you can continue from it.

    Raises:
        ImportError: if grain is not installed (``pip install 'msgd-jax[streaming]'``).
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
    step = jax.jit(
        step_of(loss_vector_fn, evaluate, takes, optimizer, None)
    )  # traced once for both
    programs = _Programs(jax.jit(step, donate_argnums=0), jax.jit(_in_turn(step), donate_argnums=0))
    copied = jax.jit(lambda state: jax.tree.map(jnp.copy, state))

    def loop(
        state: TrainState,
        num_steps: PositiveInt,
        *,
        prefetch: PositiveInt = 4,
        num_threads: PositiveInt = 4,
    ) -> tuple[TrainState, StepMetrics]:
        prefetch = _validate.positive_int("prefetch", prefetch)
        num_threads = _validate.positive_int("num_threads", num_threads)
        _validate.instance("state", state, TrainState, "train.TrainState")
        first = int(state.step)
        most = _validate.MAX_STEP - first
        num_steps = _validate.positive_int("num_steps", num_steps, maximum=most)
        state = copied(state)
        read = reader.of_key(state.key)
        batch = read(np.array([first]))
        together = _steps_in_one_call(programs.step, state, _sources.only(batch), sharding)
        plan = _sources.Plan(first, num_steps, together, min(_READS_FOR_ONE_CALL, together))

        def planned(number: int) -> Batch:
            steps = plan.steps(int(number))
            if number > 0:
                return read(steps)
            # The first step has been read.
            return _sources.joined(batch, read(steps[1:])) if len(steps) > 1 else batch

        # Threads read the examples of the next steps while earlier steps are computed.
        reads = grain.MapDataset.range(plan.num_reads).map(planned)
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
        return _run(programs, state, iter(reads.to_iter_dataset(options)), plan, reader.place)

    return loop


def _steps_in_one_call(
    step: Callable[..., Any], state: TrainState, batch: Batch, sharding: NamedSharding | None
) -> int:
    """Several small steps, or a large one.

    This does not depend on `num_steps`, so that a continued run uses the same machine code.
    """
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(batch))
    together = max(1, min(_STEPS_IN_ONE_CALL, _BYTES_IN_ONE_CALL // max(size, 1)))
    # The state of some optimizers changes its kind in the first step; a loop refuses that.
    if sharding is not None or _changes_its_kind(step, state, batch):
        return 1
    return together


class _Programs(NamedTuple):
    """The compiled functions of a loop.

    Attributes:
        step: ``step(state, batch)``, one step.
        in_turn: ``in_turn(state, stacked, count)``, the first `count` of the steps whose batches
            are stacked; any number runs the same machine code.
    """

    step: Callable[..., tuple[TrainState, StepMetrics]]
    in_turn: Callable[..., tuple[TrainState, StepMetrics]]


def _in_turn(step: Callable[..., Any]) -> Callable[..., tuple[TrainState, StepMetrics]]:
    def steps(
        state: TrainState, stacked: Batch, count: Int[Array, ""]
    ) -> tuple[TrainState, StepMetrics]:
        def at(i: int | Int[Array, ""]) -> Batch:
            # The barrier keeps reading out of the computation, whose last bits it could change.
            return jax.lax.optimization_barrier(jax.tree.map(lambda leaf: leaf[i], stacked))

        room = jax.tree.leaves(stacked)[0].shape[0]
        _, shapes = jax.eval_shape(lambda: step(state, at(0)))
        return in_turn(lambda state, i: step(state, at(i)), state, count, room, shapes)

    return steps


def _run(
    programs: _Programs,
    state: TrainState,
    reads: Iterator[Batch],
    plan: _sources.Plan,
    place: Callable[[Batch], Batch],
) -> tuple[TrainState, StepMetrics]:
    """Makes all steps: several small ones per call of a program, or one large one."""
    if plan.together == 1:
        return _call(
            lambda state, batch: programs.step(state, place(_sources.only(batch))), state, reads
        )
    state, metrics = _call(
        lambda state, some: programs.in_turn(state, place(some[0]), some[1]),
        state,
        _sources.in_calls(reads, plan),
    )
    join = lambda x: x.reshape(-1, *x.shape[2:])[: plan.num_steps]  # noqa: E731
    return state, jax.tree.map(join, metrics)


def _changes_its_kind(step: Callable[..., Any], state: TrainState, batch: Batch) -> bool:
    after, _ = jax.eval_shape(step, state, batch)
    return _validate.first_difference("state", state, after) is not None


def _call(
    advance: Callable[[TrainState, Any], tuple[TrainState, StepMetrics]],
    state: TrainState,
    inputs: Iterator[Any],
) -> tuple[TrainState, StepMetrics]:
    """Calls a program for one input after the other; metrics get a leading axis of calls."""
    metrics: list[StepMetrics] = []
    in_flight: collections.deque[StepMetrics] = collections.deque()
    for given in inputs:
        if len(in_flight) == _IN_FLIGHT:  # so that batches do not pile up on the device
            jax.block_until_ready(in_flight.popleft())
        state, new = advance(state, given)
        metrics.append(new)
        in_flight.append(new)
    return state, jax.tree.map(lambda *values: jnp.stack(values), *metrics)


class _Reader:
    """Reads the examples of a step that belong to this process, and places them on its devices."""

    def __init__(self, law: MNoise, source: Source, sharding: NamedSharding | None) -> None:
        size = law.support_size
        self._source = source
        self._num_read = size + _mesh.missing(size, sharding)
        # Indices are drawn by a program of its own; calling it for many steps at once is faster.
        self._steps_at_once = max(1, min(_STEPS_AT_ONCE, _INDICES_AT_ONCE // max(size, 1)))
        self._indices = jax.jit(
            jax.vmap(lambda key, step: law.sample(key, step).indices, in_axes=(None, 0))
        )
        self._layout = None
        own = np.arange(self._num_read)
        if sharding is not None:
            self._layout = NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0]))
            parts = self._layout.addressable_devices_indices_map((self._num_read,)).values()
            own = np.unique(np.concatenate([own[part] for part in parts if part is not None]))
        self._own = own  # the positions that this process needs, ascending

    def of_key(self, key: Key[Array, ""]) -> Callable[[Int[np.ndarray, " steps"]], Batch]:
        """A function that reads the examples of some steps which this process computes.

        Its batches have leading axes [steps, examples].
        """
        # Weights are drawn on the host, so as not to wait for the devices that train.
        key = _sources.on_the_host(*_mesh.as_words(key))

        @functools.lru_cache(maxsize=8)  # of this key alone: threads read steps next to each other
        def draw(block: int) -> Int[np.ndarray, "steps size"]:
            # A last block may reach beyond the last step there can be.
            steps = block * self._steps_at_once + np.arange(self._steps_at_once)
            steps = np.minimum(steps, _validate.MAX_STEP).astype(np.int32)
            return np.asarray(self._indices(jax.random.clone(key), steps))

        def read(steps: Int[np.ndarray, " steps"]) -> Batch:
            blocks, places = np.divmod(steps, self._steps_at_once)
            indices = np.stack([draw(int(b))[p] for b, p in zip(blocks, places, strict=True)])
            filled = indices[:, np.minimum(self._own, indices.shape[1] - 1)]
            batch = _sources.read_batch(self._source, filled.ravel())
            return jax.tree.map(lambda x: x.reshape(*filled.shape, *x.shape[1:]), batch)

        return read

    def place(self, batch: Batch) -> Batch:
        """Places the batch on the device; if it is spread, each part on its own device."""

        def on_devices(leaf: Any) -> Array:
            words, made_of = _mesh.as_words(leaf)
            _validate.fits_int32("source", words)
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
