"""Draws of examples from a data set with a seed, which are the same on every machine."""

import numpy as np

MAX_SEED = 2**31 - 1
"""The largest seed: jax drops the high bits of larger ones, so that 2^32 would be the same as 0."""

# The separate draws of a seed, so that an order is never used twice.
SPLIT, SUBSET, TEST_SUBSET, WRONG_LABELS = range(4)


def check_seed(seed: int) -> None:
    """Raises ValueError unless the seed is from 0 to `MAX_SEED`."""
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed must be between 0 and 2^31 - 1 = {MAX_SEED}, got {seed}.")


def permutation(num_examples: int, seed: int, draw: int) -> np.ndarray:
    """A random order of the numbers below `num_examples`, int64, a pure function of seed and draw.

    NumPy promises that later versions draw the same integers from a Philox key, but not that
    `Generator.permutation` uses them in the same way; so the integers themselves are sorted.

    Args:
        num_examples: N.
        seed: from 0 to `MAX_SEED`.
        draw: the use of the order: `SPLIT`, `SUBSET` or `TEST_SUBSET`.
    """
    return np.argsort(integers(num_examples, seed, draw), kind="stable").astype(np.int64)


def integers(count: int, seed: int, draw: int) -> np.ndarray:
    """Independent uint64 numbers of all 64 bits, [count], a pure function of seed and draw."""
    # Imported here, since jax is slow to import and not needed to read files.
    import jax

    from msgd_jax._streams import Stream, derive

    # The implementation is named, so that a machine with another default draws the same.
    key = derive(jax.random.key(seed, impl="threefry2x32"), Stream.EXAMPLES, draw)
    words = np.asarray(jax.random.key_data(key), np.uint64)
    return np.random.Philox(key=words).random_raw(count)
