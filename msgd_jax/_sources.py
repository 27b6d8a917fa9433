"""Examples by their number: the protocols of sources, arrays as one, and batches read from them."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Int

from msgd_jax import _mesh, _validate
from msgd_jax._typing import Batch, Data, Example

__all__ = [
    "ArraySource",
    "BatchSource",
    "Plan",
    "Source",
    "in_calls",
    "joined",
    "on_the_host",
    "only",
    "read_batch",
]


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
        """The examples at these indices, a pytree of arrays [size, ...], numpy's or jax's.

        They are those of one step or of several small ones.
        """
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
        taken = [on_the_host(words[index], made_of) for words, made_of in self._leaves]
        return jax.tree.unflatten(self._structure, taken)

    def read_batch(self, indices: Int[np.ndarray, " size"], /) -> Any:
        """The examples at these indices, [size, ...]."""
        return jax.tree.map(_array, self[indices])


def read_batch(source: Source, indices: Int[np.ndarray, " size"]) -> Batch:
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
    batch = jax.tree.map(functools.partial(_combined, np.stack), *examples)
    _validate.leading_axis(f"source[{indices[0]}]", batch)
    return batch


def _array(leaf: Any) -> Any:
    words, made_of = _mesh.as_words(leaf)
    return np.asarray(words) if made_of is None else leaf


def _combined(combine: Callable[[Any], Any], *leaves: Any) -> Any:
    """Leaves combined by `np.stack` or `np.concatenate`."""
    arrays, made_of = zip(*map(_mesh.as_words, leaves), strict=True)
    return on_the_host(combine(arrays), made_of[0])


def on_the_host(words: Any, made_of: Any) -> Any:
    """`_mesh.from_words` with keys on the CPU, in whatever thread and beside whatever device."""
    if made_of is not None:
        words = jax.device_put(words, jax.local_devices(backend="cpu")[0])
    return _mesh.from_words(words, made_of)


class Plan(NamedTuple):
    """Which steps are read and made together.

    A call of a program makes `together` steps, which are read in `parts` of consecutive ones: to
    read a few steps at once costs as much as to read one.

    Attributes:
        first: the first step.
        num_steps: the number of steps.
        together: the number of steps in one call.
        parts: the number of reads for one call.
    """

    first: int
    num_steps: int
    together: int
    parts: int

    @property
    def num_reads(self) -> int:
        """The number of reads; those of a last call that is not full may be fewer."""
        calls, rest = divmod(self.num_steps, self.together)
        return calls * self.parts + sum(self._begin(i) < rest for i in range(self.parts))

    def _begin(self, part: int) -> int:
        return part * self.together // self.parts

    def steps(self, read: int) -> Int[np.ndarray, " steps"]:
        """The steps of this read."""
        call, part = divmod(read, self.parts)
        begin, end = (call * self.together + self._begin(part + i) for i in range(2))
        return self.first + np.arange(begin, min(end, self.num_steps))


def only(read: Batch) -> Batch:
    """The batch of a read of a single step."""
    return jax.tree.map(lambda leaf: leaf[0], read)


def joined(*reads: Batch) -> Batch:
    """Reads one after another."""
    if len(reads) == 1:
        return reads[0]
    return jax.tree.map(functools.partial(_combined, np.concatenate), *reads)


def in_calls(reads: Iterator[Batch], plan: Plan) -> Iterator[tuple[Batch, np.int32]]:
    """Yields the batches of the steps of one call, stacked, and the number of them that count.

    The last call may have fewer steps. It is filled up, so that it runs the same program.
    """
    while parts := list(itertools.islice(reads, plan.parts)):
        count = sum(jax.tree.leaves(part)[0].shape[0] for part in parts)
        filling = [jax.tree.map(lambda leaf: leaf[-1:], parts[-1])] * (plan.together - count)
        yield joined(*parts, *filling), np.int32(count)
