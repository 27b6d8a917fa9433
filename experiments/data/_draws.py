"""What is drawn of a data set with a seed: the same on every machine, for ever."""

import numpy as np

MAX_SEED = 2**31 - 1
"""The largest seed: of larger ones jax drops the high bits, so that 2^32 would be 0 again."""

# What is drawn with a seed, apart from each other: an order is never used twice.
SPLIT, SUBSET, TEST_SUBSET = range(3)


def check_seed(seed: int) -> None:
    """Raises ValueError unless the seed is one that jax keeps whole."""
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed must be between 0 and 2^31 - 1 = {MAX_SEED}, got {seed}.")


def permutation(num_examples: int, seed: int, draw: int) -> np.ndarray:
    """A random order of the numbers below `num_examples`, int64, a pure function of seed and draw.

    NumPy promises the integers that Philox makes of a key to every later version, but not what
    `Generator.permutation` makes of them; so the integers themselves are sorted.

    Args:
        num_examples: N.
        seed: from 0 to `MAX_SEED`.
        draw: `SPLIT`, `SUBSET` or `TEST_SUBSET`: what the order is used for.
    """
    # Heavy, and not needed for reading files alone.
    import jax

    from msgd_jax._streams import Stream, derive

    # The implementation is named, since the default may be another: every machine draws the same.
    key = derive(jax.random.key(seed, impl="threefry2x32"), Stream.EXAMPLES, draw)
    words = np.asarray(jax.random.key_data(key), np.uint64)
    draws = np.random.Philox(key=words).random_raw(num_examples)
    return np.argsort(draws, kind="stable").astype(np.int64)
