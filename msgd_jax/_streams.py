"""Every stream of randomness that is drawn from a user's key, here and in the experiments.

A key is the user's: the same one may initialise the parameters, be split, folded and drawn from. So
nothing is drawn from it as it is. Each purpose has a stream, and the key of a stream is one that
neither `jax.random.split` nor `jax.random.fold_in` makes of the same key. This is the only file
that derives keys from a user's; what is done inside a stream (folding in the step, splitting for
two draws) concerns nobody else.
"""

import enum
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p
from jaxtyping import Array, Float, Int, Key

# The high word of the counter. What jax makes of a key itself has a small number there.
_TAG = int.from_bytes(b"msgd")


@enum.unique
class Stream(enum.IntEnum):
    """What a key is for. The numbers are part of every result: none is ever given out again."""

    WEIGHTS = 0  # of a step of a law; of an iteration, the Brownian increments that they follow
    REFINEMENT = 1  # of a Brownian path, inside one iteration
    ORDER = 2  # in which the examples of a step go through the micro-batches
    PERMUTATION = 3  # of `noise.permute`
    ADDITIVE = 4  # Gaussian noise in the space of parameters
    PATHS = 5  # the paths of an error of the SDE
    MULTIPLIERS = 6  # the vectors v of a local complexity
    COMPLEXITY_DATA = 7  # the examples of a local complexity, where they are random
    ASCENTS = 8  # where the ascents of a local complexity start
    LOSSES = 9  # what the losses of a step draw themselves: dropout, augmentation, label noise
    CHECK = 11  # of a loss vector function
    PROBES = 20  # the random directions of `measure`
    # Of the experiments.
    PARAMETERS = 100  # before the first step
    EXAMPLES = 101  # which of a data set a run is trained on
    AUGMENTATION = 102
    LANGEVIN = 103
    REGULARIZER = 104
    CASES = 105  # of an experiment that draws several things by turns


def derive(key: Key[Array, ""], stream: Stream, *counters: Any) -> Key[Array, ""]:
    """The key of a stream, with each counter (a step, a draw, a leaf, ...) folded in, in turn.

    With any number of devices and any x64 flag, under jit or not, the same key. For a given key
    Threefry permutes the 64-bit counters, so that different counters never give the same key: jax's
    own (`split`, `fold_in`, the blocks of a draw) have a high word of 0, or of the number of the
    block in a draw of more than 2^32; ours have the tag there.
    """
    # Keys of the other implementations (rbg) are two such keys side by side.
    words = jax.random.key_data(jax.random.clone(key))
    blocks = words.reshape(-1, 2)
    tag, number = (jnp.full(blocks.shape[0], n, jnp.uint32) for n in (_TAG, stream))
    blocks = jnp.stack(threefry2x32_p.bind(blocks[:, 0], blocks[:, 1], tag, number), axis=1)
    own = jax.random.wrap_key_data(blocks.reshape(words.shape), impl=jax.random.key_impl(key))
    for counter in counters:
        own = jax.random.fold_in(own, counter)
    return own


def of_examples(key: Key[Array, ""], examples: Int[Array, " B"]) -> Key[Array, " B"]:
    """One key per example, a function of the key and of the example's number alone."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, examples)


def repeated(key: Key[Array, ""]) -> Callable[[], Key[Array, ""]]:
    """The same key as often as it is asked for: also in loops, where keys may be used once only."""
    words, implementation = jax.random.key_data(jax.random.clone(key)), jax.random.key_impl(key)
    return lambda: jax.random.wrap_key_data(words, impl=implementation)


def signs(key: Key[Array, ""], size: int, dtype: jnp.dtype) -> Float[Array, " {size}"]:
    """+1 or -1 with equal probability: a bit each, so the same with any x64 flag."""
    bits = jax.random.bits(key, (size,), jnp.uint8) >> 7
    return 1 - 2 * bits.astype(dtype)
