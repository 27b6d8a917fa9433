"""Every stream of randomness that is drawn from a user's key, here and in the experiments.

The user may use a key elsewhere too: to initialise the parameters, to split it, fold it or draw
from it. So the library never draws from the key itself. Each purpose has a stream, and the key of a
stream differs from all keys that `jax.random.split` and `jax.random.fold_in` make of the user's
key. This is the only file that derives keys from a user's key. What happens inside a stream
(folding in the step, splitting for two draws) is up to the code that uses the stream.
"""

import enum
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt32

Words = UInt32[Array, "*shape"]

# The high word of the counter. In the counters that jax itself uses, it is a small number.
_TAG = int.from_bytes(b"msgd")


@enum.unique
class Stream(enum.IntEnum):
    """What a key is for. Results depend on these numbers, so none may ever be changed or reused."""

    WEIGHTS = 0  # the weights of a step, or the Brownian increments of an iteration
    REFINEMENT = 1  # the refinement of a Brownian path inside one iteration
    ORDER = 2  # the order in which the examples of a step go through the micro-batches
    PERMUTATION = 3  # the permutation of `noise.permute`
    ADDITIVE = 4  # Gaussian noise in the space of parameters
    PATHS = 5  # the paths from which an error of the SDE is estimated
    MULTIPLIERS = 6  # the vectors v of a local complexity
    COMPLEXITY_DATA = 7  # the examples of a local complexity, where they are random
    ASCENTS = 8  # the starting points of the ascents of a local complexity
    LOSSES = 9  # the losses' own randomness: dropout, augmentation, label noise
    CHECK = 11  # the check of a loss vector function
    PROBES = 20  # the random directions of `measure`
    # Streams of the experiments.
    PARAMETERS = 100  # the parameters before the first step
    EXAMPLES = 101  # the examples of a data set that a run is trained on
    AUGMENTATION = 102
    LANGEVIN = 103
    REGULARIZER = 104
    CASES = 105  # the cases of an experiment that draws several things in turn


def derive(key: Key[Array, ""], stream: Stream, *counters: Any) -> Key[Array, ""]:
    """The key of a stream, with each counter (a step, a draw, a leaf, ...) folded in, in turn.

    The key is the same for any number of devices and any x64 flag, under jit or not. For a given
    key Threefry permutes the 64-bit counters, so that different counters never give the same key.
    The high word of jax's own counters (`split`, `fold_in`, the blocks of a draw) is 0, or the
    number of the block in a draw of more than 2^32; the high word of ours is the tag.
    """
    # A key of the other implementations (rbg) is two Threefry keys side by side.
    words = jax.random.key_data(jax.random.clone(key))
    blocks = words.reshape(-1, 2)
    tag, number = (jnp.full(blocks.shape[0], n, jnp.uint32) for n in (_TAG, stream))
    blocks = jnp.stack(threefry(blocks[:, 0], blocks[:, 1], tag, number), axis=1)
    own = jax.random.wrap_key_data(blocks.reshape(words.shape), impl=jax.random.key_impl(key))
    for counter in counters:
        own = jax.random.fold_in(own, counter)
    return own


def threefry(
    key_high: Words, key_low: Words, count_high: Words, count_low: Words
) -> tuple[Words, Words]:
    """Threefry's 64 random bits for keys and counters of two words each, as two words."""
    from jax.extend.random import threefry2x32_p  # jax.extend imports Pallas: not for `import`

    high, low = threefry2x32_p.bind(key_high, key_low, count_high, count_low)
    return high, low


def of_examples(key: Key[Array, ""], examples: Int[Array, " B"]) -> Key[Array, " B"]:
    """One key per example; each depends on `key` and on the number of the example only."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, examples)


def repeated(key: Key[Array, ""]) -> Callable[[], Key[Array, ""]]:
    """A function that returns `key` at each call, also in loops, where a key may be used once."""
    words, implementation = jax.random.key_data(jax.random.clone(key)), jax.random.key_impl(key)
    return lambda: jax.random.wrap_key_data(words, impl=implementation)


def signs(key: Key[Array, ""], size: int, dtype: jnp.dtype) -> Float[Array, " {size}"]:
    """Independent +1 or -1 with equal probability, from one bit each: no x64 flag changes them."""
    bits = jax.random.bits(key, (size,), jnp.uint8) >> 7
    return 1 - 2 * bits.astype(dtype)
