"""Many devices, many processes: examples spread over a mesh, and one key everywhere.

Everything that computes losses takes ``sharding=NamedSharding(mesh, PartitionSpec("data"))``
(`loss.weighted_value_and_grad` says what it does)::

  mesh = jax.make_mesh((jax.device_count(),), ("data",))
  spread = NamedSharding(mesh, PartitionSpec("data"))
  data = sharding.shard_examples(data, spread)
  step = train.make_step(loss_vector_fn, optimizer, law, sharding=spread)

The same under `jax.distributed`, where every process runs the same lines: devices are then those of
all processes, and each process reads and holds the examples of its own devices only.
"""

from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Key, Shaped

from msgd_jax import _mesh, _validate
from msgd_jax._typing import Data

__all__ = ["check_key_agrees", "shard_batch", "shard_examples"]


def shard_examples(data: Data, sharding: NamedSharding) -> Data:
    """Places examples on the devices of a mesh, in equal parts.

    Where the devices do not divide N, the last example is repeated up to the next multiple: these
    copies have weight 0 in every loss, for any law of N examples. (A `noise.BatchLaw` has no N, and
    would take the copies for examples: place the batches of a loader by `shard_batch`.) Only what
    the devices of this process need is read, so `data` may be memory-mapped, or larger than memory.

    Each device holds examples that follow one another in `data`, and with ``has_state`` its ghost
    batches are made of these: shuffle data that are sorted, by class for example, beforehand.

    Args:
        data: a pytree of arrays [N, ...]: arrays of numpy (also memory-mapped), of jax (also PRNG
          keys), or anything that slices like them. Under `jax.distributed` every process gives all
          of the data.
        sharding: ``NamedSharding(mesh, PartitionSpec("data"))`` for the axis "data" of a mesh; the
          other axes of the examples are not spread.

    Returns:
        The same pytree of `jax.Array`, [N rounded up, ...], of the same dtypes (64-bit ones become
        32-bit unless jax's x64 flag is set).

    Raises:
        TypeError: if a leaf of `data` holds neither numbers nor PRNG keys, or `sharding` is not a
            `NamedSharding`.
        ValueError: if `data` are empty or their leaves have different lengths, integers do not fit
            jax's types, or `sharding` does not spread the leading axis alone.

    Example:
        >>> from msgd_jax import sharding
        >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
        >>> spread = NamedSharding(mesh, PartitionSpec("data"))
        >>> data = sharding.shard_examples({"x": np.ones((1003, 3))}, spread)
        >>> data["x"].shape[0] % jax.device_count()
        0
    """
    if _mesh.check("sharding", sharding) is None:
        raise TypeError("sharding must be a jax.sharding.NamedSharding, got None.")
    num_examples = _validate.leading_axis("data", data)
    filled = num_examples + _mesh.missing(num_examples, sharding)
    layout = NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0]))

    def place(leaf: Any) -> Shaped[Array, "filled *rest"]:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return _mesh.spread(lambda x: _mesh.fill(x, filled - len(x)), sharding)(leaf)
        words, implementation = _mesh.as_words(leaf)
        dtype = jax.dtypes.canonicalize_dtype(words.dtype)

        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(filled)
            own = np.asarray(words[min(start, num_examples - 1) : min(stop, num_examples)])
            _validate.fits_int32("data", own)
            own = own.astype(dtype, copy=False)
            return np.concatenate([own, np.repeat(own[-1:], stop - start - len(own), axis=0)])

        shape = (filled, *words.shape[1:])
        placed = jax.make_array_from_callback(shape, layout, part, dtype=dtype)
        return _mesh.from_words(placed, implementation)

    return jax.tree.map(place, data)


def shard_batch(batch: Data, sharding: NamedSharding) -> Data:
    """Places a batch of a data loader on the devices; each process gives what its loader drew.

    Under `jax.distributed` the batch of a step consists of what all processes give, in the order of
    the processes, and B is its length. Nothing is filled up, so that a `noise.BatchLaw` counts
    examples alone. If the devices do not divide a short last batch, leave it out (drop_remainder,
    drop_last). In one process, give it to the step as it is: the step fills it up, at weight 0.

    Args:
        batch: a pytree of arrays [B / processes, ...], of the same length in each process.
        sharding: ``NamedSharding(mesh, PartitionSpec("data"))`` for the axis "data" of a mesh.

    Returns:
        The same pytree of `jax.Array`, [B, ...].

    Raises:
        TypeError: if a leaf of `batch` holds neither numbers nor PRNG keys, or `sharding` is not a
            `NamedSharding`.
        ValueError: if `batch` is empty or its leaves have different lengths, the devices of this
            process do not divide its length, integers do not fit jax's types, or `sharding` does
            not spread the leading axis alone.

    Example:
        >>> from msgd_jax import sharding
        >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
        >>> spread = NamedSharding(mesh, PartitionSpec("data"))
        >>> batch = sharding.shard_batch(np.ones((2 * jax.device_count(), 3)), spread)
        >>> batch.shape[0] // jax.device_count()
        2
    """
    if _mesh.check("sharding", sharding) is None:
        raise TypeError("sharding must be a jax.sharding.NamedSharding, got None.")
    size = _validate.leading_axis("batch", batch)
    parts, rest = divmod(_mesh.count(sharding), jax.process_count())
    if rest or size % parts:
        raise ValueError(
            f"batch must have a multiple of {parts} examples, one for each part that this process "
            f"holds, got {size}. Leave out the short last batch of an epoch (drop_remainder, "
            "drop_last), or, in one process, give it to the step as it is."
        )
    layout = NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0]))

    def place(leaf: Any) -> Shaped[Array, "batch *rest"]:
        words, implementation = _mesh.as_words(leaf)
        words = np.asarray(words)
        _validate.fits_int32("batch", words)
        words = words.astype(jax.dtypes.canonicalize_dtype(words.dtype), copy=False)
        placed = jax.make_array_from_process_local_data(layout, words)
        return _mesh.from_words(placed, implementation)

    return jax.tree.map(place, batch)


def check_key_agrees(name: str, key: Key[Array, ""]) -> None:
    """Raises unless the key is the same in all processes; with one process it does nothing.

    Each process draws its part of the weights. If each had a key of its own, the parts would belong
    to different vectors, and no result would look wrong. `train.init` and the ``init`` of our optax
    transformations call this function; call it yourself before you draw by `noise.MNoise.sample`.
    All processes have to call it at the same point. A traced key is not checked.

    Raises:
        TypeError, ValueError: if `key` is not a typed PRNG key, or is not the same in all
            processes: the message says which ones differ from the first.
    """
    _validate.prng_key(name, key)
    if jax.process_count() == 1 or isinstance(key, Tracer):
        return
    words = np.asarray(jax.random.key_data(jax.random.clone(key)))
    everywhere = np.asarray(multihost_utils.process_allgather(words))
    differing = np.flatnonzero((everywhere != everywhere[0]).any(axis=1)).tolist()
    if differing:
        more = len(differing) - 10
        shown = f"{differing[:10]}" + (f" and {more} more" if more > 0 else "")
        raise ValueError(
            f"{name} must be the same in all processes, got {everywhere[0].tolist()} in process 0 "
            f"and others in {shown}; process {jax.process_index()} has {words.tolist()}. Make "
            "it from a seed that all of them share."
        )
