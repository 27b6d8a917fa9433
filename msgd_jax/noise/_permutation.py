"""Random permutations of up to 2^31 - 1 examples, computed one position at a time without sorting.

A generalised Feistel network (Black and Rogaway 2002, Ciphers with Arbitrary Finite Domains) is a
keyed bijection of a grid that has hardly more than N cells. Applying it again and again until the
result is below N gives a bijection of range(N). Time and memory are proportional to the number of
positions asked for.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Integer, Key, UInt32

from msgd_jax import _validate
from msgd_jax._streams import Stream, derive, threefry

# Up to this N, the whole permutation is made: exactly uniform and quick.
SORTED_UP_TO = 1024

# Twelve rounds leave the law of any two positions within 1e-7 of uniform, in total variation, for
# every N above SORTED_UP_TO (computed exactly in the tests, round functions taken as random).
ROUNDS = 12


def permute(
    key: Key[Array, ""],
    positions: int | Integer[Array, "*shape"] | Integer[np.ndarray, "*shape"],
    num_examples: int,
) -> Int[Array, "*shape"]:
    """The values of a random permutation of range(N) at the given positions.

    `key` fixes the whole permutation. Any part of it can be computed alone, on any device, at a
    cost that does not grow with N: positions 0 to b-1 are a mini-batch without replacement, and
    positions tb to (t+1)b - 1 are the t-th batch of a shuffled epoch. Distinct positions always
    have distinct values.

    Up to N = 1,024 the permutation is uniform over all N! permutations. Above, it is a
    pseudo-random permutation: a Feistel network of twelve rounds of Threefry, applied until the
    value is below N (format-preserving encryption). The value at one position is uniform and the
    values at two positions are within 1e-7 of uniform in total variation, to the extent that
    Threefry's outputs are independent and uniform.

    Args:
        key: a typed PRNG key; the permutation is independent of what `jax.random` makes of it.
        positions: integers in [0, N), of any shape and integer type; traced positions out of range
            are clipped.
        num_examples: N, between 1 and 2^31 - 1.

    Returns:
        int32 indices in [0, N), of the same shape.

    Raises:
        TypeError: if `key` is not a typed PRNG key, or `positions` or `num_examples` are not
            integers.
        ValueError: if `key` is an array of keys, or `num_examples` or a position is out of its
            range.

    Example:
        >>> from msgd_jax import noise
        >>> key = jax.random.key(0)
        >>> batch = noise.permute(key, jnp.arange(50), 2_000_000_000)
        >>> len(set(batch.tolist()))  # without replacement
        50
        >>> bool(noise.permute(key, jnp.asarray(7), 2_000_000_000) == batch[7])
        True
    """
    _validate.prng_key("key", key)
    n = _validate.num_examples("num_examples", num_examples)
    return _permute(key, _validate.positions("positions", positions, n), n)


@functools.partial(jax.jit, static_argnames="n")
def _permute(key: Key[Array, ""], positions: Int[Array, "*shape"], n: int) -> Int[Array, "*shape"]:
    # jax keeps one compiled program per N and shape of this, as it does for functions of jnp.
    key = derive(key, Stream.PERMUTATION)
    if n <= SORTED_UP_TO:
        order = _order(jax.random.bits(jax.random.split(key)[1], (n,), jnp.uint32))
        return order[positions].astype(jnp.int32)
    grid = _grid(n)
    words = jax.random.bits(key, (ROUNDS, 2), jnp.uint32)

    def unfinished(state: tuple[Array, Array]) -> Array:
        return jnp.any(state[1])

    def walk(state: tuple[Array, Array]) -> tuple[Array, Array]:
        values, outside = state
        values = jnp.where(outside, _encrypt(grid, words, values), values)
        return values, values >= n

    start = (positions.astype(jnp.uint32), jnp.full(positions.shape, True))
    return jax.lax.while_loop(unfinished, walk, start)[0].astype(jnp.int32)


def _order(words: UInt32[Array, " n"]) -> UInt32[Array, " n"]:
    """The positions of at most `SORTED_UP_TO` words in ascending order, equal ones by position.

    The permutation is that of `jax.random.permutation`, in a third of the time on CPUs: one array
    is sorted, of words whose lowest bits are replaced by their positions. For 1,000 words that
    leaves neighbours in the wrong order in one of eight draws, whose upper bits are equal. They are
    exchanged until none are left. (More words would leave too many.)
    """
    n = words.shape[0]
    low = max((n - 1).bit_length(), 1)
    sorted_by_upper_bits = jnp.sort(words >> low << low | jnp.arange(n, dtype=jnp.uint32))
    order = sorted_by_upper_bits & jnp.uint32(2**low - 1)

    def wrong(state: tuple[Array, Array]) -> Array:
        return jnp.any(state[1][:-1] > state[1][1:])

    def exchange(state: tuple[Array, Array]) -> tuple[Array, Array]:
        # The pairs that begin at even places, then those that begin at odd ones.
        return _exchange(*_exchange(*state, 0), 1)

    return jax.lax.while_loop(wrong, exchange, (order, words[order]))[0]


def _exchange(
    order: UInt32[Array, " n"], words: UInt32[Array, " n"], first: int
) -> tuple[UInt32[Array, " n"], UInt32[Array, " n"]]:
    """Puts every second pair of neighbours, from the place `first` on, in order of its words."""
    end = words.shape[0] - (words.shape[0] - first) % 2
    pairs = words[first:end].reshape(-1, 2)
    swap = pairs[:, :1] > pairs[:, 1:]

    def exchanged(values: Array) -> Array:
        own = values[first:end].reshape(-1, 2)
        own = jnp.where(swap, own[:, ::-1], own).reshape(-1)
        return jnp.concatenate([values[:first], own, values[end:]])

    return exchanged(order), exchanged(words)


class _Grid(NamedTuple):
    """A rectangle of at least N cells, nearly square."""

    rows: int
    columns: int


@functools.cache
def _grid(n: int) -> _Grid:
    """The grid whose sides have a ratio of at most 16 to 9 and which exceeds N by the fewest cells.

    It exceeds N by a few cells only, and by none if N has a suitable divisor. So nearly every value
    is below N after one application, and the time does not depend on N. The smallest square would
    exceed N by up to 2 sqrt(N) cells.
    """
    most = math.isqrt(n - 1) + 1
    rows = np.arange(-(-3 * most // 4), most + 1)
    too_many = -n % rows
    best = int(rows[np.flatnonzero(too_many == too_many.min())[-1]])  # the most nearly square
    return _Grid(best, -(-n // best))


def _encrypt(
    grid: _Grid, words: UInt32[Array, "rounds 2"], values: UInt32[Array, "*shape"]
) -> UInt32[Array, "*shape"]:
    """The keyed bijection of the cells 0, ..., rows * columns - 1."""
    # With dtypes, so that nothing is promoted to 64 bits.
    num_rows, num_columns = jnp.uint32(grid.rows), jnp.uint32(grid.columns)

    def two_rounds(i: Int[Array, ""], cell: tuple[Array, Array]) -> tuple[Array, Array]:
        row, column = cell
        row = (row + _random_below(grid.rows, words[2 * i], column)) % num_rows
        return row, (column + _random_below(grid.columns, words[2 * i + 1], row)) % num_columns

    cell = (values // num_columns, values % num_columns)
    row, column = jax.lax.fori_loop(0, ROUNDS // 2, two_rounds, cell)
    return row * num_columns + column


def _random_below(
    size: int, words: UInt32[Array, "2"], values: UInt32[Array, "*shape"]
) -> UInt32[Array, "*shape"]:
    """A random function of the values into range(size), size below 2^16.

    The result is Threefry's 64 bits modulo the size: all results are equally likely to within
    2^-48.
    """
    zeros = values * jnp.uint32(0)  # so that it has the axes of the values under vmap too
    high, low = threefry(words[0] + zeros, words[1] + zeros, values, zeros)
    modulus = jnp.uint32(size)
    return (high % modulus * jnp.uint32(2**32 % size) + low % modulus) % modulus
