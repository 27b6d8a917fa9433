"""Keyed permutations and the epochs that they shuffle.

Permutations must be bijections, uniform over keys, the same on any number of devices, and need
memory that does not grow with N. The reference is the same network in Python's integers.
"""

import itertools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from msgd_jax import noise
from msgd_jax._streams import Stream, derive
from msgd_jax.noise import _permutation
from tests.library.noise.test_exact import agree
from tests.support.statistics import FALSE_ALARMS, assert_agree

pytestmark = pytest.mark.usefixtures("strict_dtypes")

LARGEST = 2**31 - 1


def key() -> jax.Array:
    return jax.random.key(20240229)


# Permutations -------------------------------------------------------------------------------------


# Sizes around the one up to which permutations are sorted, squares and their neighbours, a prime,
# and a power of 2.
@pytest.mark.parametrize("n", [1, 2, 1024, 1025, 1088, 1089, 1090, 10_007, 65_536])
def test_permutations_are_bijections(n):
    values = np.asarray(noise.permute(key(), jnp.arange(n), n))
    assert values.dtype == np.int32
    np.testing.assert_array_equal(np.sort(values), np.arange(n))
    if n > 2:
        assert (values != np.arange(n)).any()


@pytest.mark.parametrize("n", [1, 2, 7, 1000, 1024])
def test_small_permutations_are_those_of_jax_from_the_key_of_the_stream(n):
    expected = jax.random.permutation(derive(key(), Stream.PERMUTATION), n)
    np.testing.assert_array_equal(noise.permute(key(), jnp.arange(n), n), expected)


@pytest.mark.parametrize("bits", [0, 1, 8, 16, 20, 32])
@pytest.mark.parametrize("shift", [0, 12])
def test_words_are_ordered_stably(bits, shift):
    """Few bits make many equal words; shifted ones differ in upper bits, lower bits or both.

    Up to a thousand words differ in their lowest bits only, which is the longest way to go.
    """
    for n in (1, 2, 3, 1000, _permutation.SORTED_UP_TO):
        drawn = np.random.default_rng(n).integers(0, 2**bits, n, np.uint64)
        words = ((drawn << shift) % 2**32).astype(np.uint32)
        found = _permutation._order(jnp.asarray(words))
        np.testing.assert_array_equal(found, np.argsort(words, kind="stable"))


def threefry2x32(key: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """Threefry-2x32 with 20 rounds, in Python's integers (Salmon et al., 2011)."""
    mask = 2**32 - 1
    schedule = [*key, key[0] ^ key[1] ^ 0x1BD11BDA]
    x = [(block[i] + schedule[i]) & mask for i in range(2)]
    rotations = ((13, 15, 26, 6), (17, 29, 16, 24))
    for group in range(5):
        for r in rotations[group % 2]:
            x[0] = (x[0] + x[1]) & mask
            x[1] = ((x[1] << r) | (x[1] >> (32 - r))) & mask
            x[1] ^= x[0]
        x[0] = (x[0] + schedule[(group + 1) % 3]) & mask
        x[1] = (x[1] + schedule[(group + 2) % 3] + group + 1) & mask
    return x[0], x[1]


def reference(words: list[list[int]], position: int, n: int) -> int:
    """The network that the docstring of `permute` describes, in Python's integers.

    `words` are two words of key per round.
    """
    # Of the grids at most 16 by 9, the one that has fewest cells, then the one nearest a square.
    side = math.isqrt(n - 1) + 1
    rows = min(range(-(-3 * side // 4), side + 1), key=lambda r: (r * -(-n // r), -r))
    columns = -(-n // rows)
    while True:
        row, column = divmod(position, columns)
        for i, key in enumerate(words):
            half, size = (column, rows) if i % 2 == 0 else (row, columns)
            high, low = threefry2x32((key[0], key[1]), (half, 0))
            shift = ((high << 32) + low) % size
            if i % 2 == 0:
                row = (row + shift) % rows
            else:
                column = (column + shift) % columns
        position = row * columns + column
        if position < n:
            return position


def test_the_key_of_a_stream_is_threefry_of_a_counter_that_jax_does_not_use():
    """The counter's high word spells msgd, where jax has a small number: fold_in has 0."""
    key = jax.random.key(2**40 + 5)
    words = tuple(map(int, jax.random.key_data(key)))
    for stream in Stream:
        own = tuple(map(int, jax.random.key_data(derive(key, stream))))
        assert own == threefry2x32(words, (int.from_bytes(b"msgd"), int(stream)))
        folded = tuple(map(int, jax.random.key_data(jax.random.fold_in(key, int(stream)))))
        assert folded == threefry2x32(words, (0, int(stream)))


@pytest.mark.parametrize("n", [1025, 1090, LARGEST])
def test_values_are_those_of_the_network_in_python_integers(n):
    own = derive(key(), Stream.PERMUTATION)
    words = np.asarray(jax.random.bits(own, (12, 2), jnp.uint32)).tolist()
    some = np.array([0, 1, 2, n // 3, n - 2, n - 1], np.int32)
    # All positions of a small N: some of them leave [0, N), and go through the network again.
    positions = np.arange(n) if n < 2_000 else some
    expected = [reference(words, int(position), n) for position in positions]
    values = noise.permute(key(), jnp.asarray(positions), n)
    np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize("n", [100, 10_000])
def test_a_program_may_read_its_positions_from_outside(n):
    """They are checked while it is traced."""
    positions = jnp.arange(5)
    found = jax.jit(lambda k: noise.permute(k, positions, n))(key())
    np.testing.assert_array_equal(found, noise.permute(key(), positions, n))
    with pytest.raises(ValueError, match=r"positions must be in \[0, 4\), got values from 0 to 4"):
        jax.jit(lambda k: noise.permute(k, positions, 4))(key())


def test_a_program_may_read_the_indices_of_weights_from_outside():
    indices = jnp.array([2, 0])
    dense = jax.jit(lambda values: noise.Weights(values, indices, 3).dense())(
        jnp.array([0.25, 0.75])
    )
    np.testing.assert_array_equal(dense, [0.75, 0, 0.25])
    with pytest.raises(ValueError, match=r"indices must be in \[0, 2\)"):
        jax.jit(lambda values: noise.Weights(values, indices, 2).dense())(jnp.ones(2))


@pytest.mark.parametrize("n", [10**6, LARGEST])
def test_distinct_positions_have_distinct_values(n):
    """With replacement, 300,000 of 2^31 would have no repeat with a probability of 1e-9."""
    start = n - 300_000
    values = np.asarray(noise.permute(key(), start + jnp.arange(300_000), n))
    assert np.unique(values).size == 300_000
    assert 0 <= values.min() <= values.max() < n


NUM_KEYS = 20_000


def images(n: int, positions: list[int]) -> np.ndarray:
    """The values of NUM_KEYS permutations at some positions: [NUM_KEYS, positions]."""
    keys = jax.random.split(key(), NUM_KEYS)
    draw = jax.jit(jax.vmap(lambda k: noise.permute(k, jnp.array(positions), n)))
    return np.asarray(draw(keys))


@pytest.mark.parametrize("n", [50, 1025, 10**6, LARGEST])
def test_singles_and_pairs_are_uniform(n):
    """Chi-square tests over keys, with bins that split [0, N) evenly: 8 tests per size."""
    positions = [0, 1, n // 2, n - 1]
    values = images(n, positions)
    for column in values.T:
        assert uniformity(column, n, 25) > FALSE_ALARMS / 8
    bins = np.minimum(values.astype(np.int64) * 5 // n, 4)
    shares = np.bincount(np.minimum(np.arange(n) * 5 // n, 4)) if n < 2000 else np.full(5, n / 5)
    for i, j in ((0, 1), (0, 3), (1, 2), (2, 3)):
        counts = np.bincount(bins[:, i] * 5 + bins[:, j], minlength=25)
        pairs = np.outer(shares, shares) - np.diag(shares)  # two values are never the same
        expected = (pairs / (n * (n - 1))).ravel() * NUM_KEYS
        assert scipy.stats.chisquare(counts, expected).pvalue > FALSE_ALARMS / 8


def uniformity(values: np.ndarray, n: int, bins: int) -> float:
    """The p-value of a chi-square test, whose bins are as even as N allows."""
    edges = np.arange(bins + 1) * n // bins
    counts = np.histogram(values, edges)[0]
    return scipy.stats.chisquare(counts, np.diff(edges) / n * len(values)).pvalue


def test_neighbours_within_one_permutation_are_uniform():
    """Chi-square test on 200,000 pairs of adjacent values of one permutation, in 2,500 bins."""
    n = 10**9
    values = np.asarray(noise.permute(key(), jnp.arange(400_000), n)).reshape(-1, 2)
    bins = values.astype(np.int64) * 50 // n
    counts = np.bincount(bins[:, 0] * 50 + bins[:, 1], minlength=2_500)
    assert scipy.stats.chisquare(counts).pvalue > FALSE_ALARMS / 2
    # Of a counter with a constant step, these differences would all be the same.
    steps = np.diff(values[:, 0].astype(np.int64)) % n
    assert uniformity(steps, n, 100) > FALSE_ALARMS / 2


def distance_from_uniform(rows: int, columns: int, rounds: int) -> float:
    """The total variation between the law of two cells' difference and the uniform law, at worst.

    If the functions of the rounds are random, the first cell is uniform after two rounds, and the
    difference of two cells is a Markov chain. A round that adds to the rows makes the difference of
    the rows uniform where the columns differ, and leaves it where they do not. The next round does
    the same with rows and columns exchanged.
    """
    worst = 0.0
    for start in ((0, 1), (1, 0), (1, 1)):
        law = np.zeros((rows, columns))
        law[start] = 1
        for i in range(rounds):
            if i % 2 == 0:
                law[:, 1:] = law[:, 1:].mean(0)
            else:
                law[1:] = law[1:].mean(1, keepdims=True)
        uniform = np.full((rows, columns), 1 / (rows * columns - 1))
        uniform[0, 0] = 0
        worst = max(worst, np.abs(law - uniform).sum() / 2)
    return worst


@pytest.mark.parametrize("n", [1025, 1089, 5000])
def test_enough_rounds_for_pairs(n):
    """The distance that the docstring of `permute` states, on the whole grid.

    Grids that have more cells than N make some positions go through the network again, which only
    brings them nearer to uniform.
    """
    grid = _permutation._grid(n)
    assert grid.rows * grid.columns >= n
    assert distance_from_uniform(*grid, _permutation.ROUNDS) < 1e-7
    assert distance_from_uniform(*grid, 4) > 1e-4, "four rounds are too few"


@pytest.mark.parametrize("n", [1000, 10**6])
def test_the_same_under_jit_vmap_and_on_eight_devices(n):
    positions = jnp.arange(64, dtype=jnp.int32)
    expected = np.asarray(noise.permute(key(), positions, n))
    mesh = Mesh(np.array(jax.devices()), ("data",))
    sharded = NamedSharding(mesh, PartitionSpec("data"))

    def draw(positions):
        return noise.permute(key(), positions, n)

    one_by_one = jax.vmap(draw)(positions)
    on_eight = jax.jit(draw, out_shardings=sharded)(jax.device_put(positions, sharded))
    halves = jnp.concatenate([draw(positions[:32]), draw(positions[32:])])
    for values in (jax.jit(draw)(positions), one_by_one, on_eight, halves):
        np.testing.assert_array_equal(values, expected)


def test_memory_does_not_grow_with_n():
    """The scratch memory of the compiled draw of 100 indices, up to the largest N."""

    def temporaries(n: int) -> int:
        draw = jax.jit(noise.sgd(n, 100).sample)
        analysis = draw.lower(key(), 0).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    small = temporaries(2_000)
    assert temporaries(LARGEST) <= 1.1 * small
    assert small < 100 * 4 * 200, "more than 200 words per index"


# Shuffled epochs ----------------------------------------------------------------------------------


def epoch(law: noise.MNoise, first_step: int, num_steps: int) -> np.ndarray:
    steps = first_step + jnp.arange(num_steps)
    sample = jax.jit(jax.vmap(lambda step: law.sample(key(), step).indices))
    return np.asarray(sample(steps))


@pytest.mark.parametrize(("n", "b"), [(1, 1), (24, 4), (24, 24), (1200, 100), (4800, 1)])
def test_batches_of_an_epoch_partition_the_examples(n, b):
    law = noise.random_reshuffling(n, b)
    first, second = (epoch(law, k * n // b, n // b) for k in (0, 1))
    for batches in (first, second):
        np.testing.assert_array_equal(np.sort(batches.ravel()), np.arange(n))
    if n > 1:
        assert (first != second).any()


def test_every_epoch_drops_another_remainder():
    law = noise.random_reshuffling(10, 4, drop_remainder=True)
    left_out = set()
    # That an example is in all of 100 epochs has a probability of 10 * 0.8^100 = 2e-9.
    for batches in epoch(law, 0, 200).reshape(100, 8):
        assert np.unique(batches).size == 8
        left_out |= set(range(10)) - set(batches.tolist())
    assert left_out == set(range(10))


def test_steps_go_up_to_the_largest_integer():
    law = noise.random_reshuffling(10**9, 1000)
    indices = np.asarray(law.sample(key(), LARGEST).indices)
    assert np.unique(indices).size == 1000
    assert 0 <= indices.min() <= indices.max() < 10**9


@pytest.mark.parametrize(("n", "b"), [(1, 1), (2, 1), (4, 2), (5, 2), (6, 2)])
def test_covariances_between_steps_are_exact(n, b):
    """The reference enumerates all orders of N examples, in rational arithmetic."""
    law = noise.random_reshuffling(n, b, drop_remainder=True)
    orders = list(itertools.permutations(range(n)))
    epoch_length = n // b
    for s, t in itertools.product(range(2 * epoch_length), repeat=2):
        same, different = Fraction(0), Fraction(0)
        if s // epoch_length == t // epoch_length:
            for order in orders:
                one, other = (
                    [i in order[k * b : (k + 1) * b] for i in range(n)]
                    for k in (s % epoch_length, t % epoch_length)
                )
                same += Fraction(one[0] * other[0], b**2 * len(orders))
                different += Fraction(one[0] * other[-1] if n > 1 else 0, b**2 * len(orders))
            exact = same - Fraction(1, n**2), different - Fraction(1, n**2) if n > 1 else different
        else:
            exact = same, different  # both are zero: epochs are independent
        assert agree(law.covariance_between(s, t), exact)


def test_covariances_between_steps_are_those_of_the_draws():
    """Each of 20,000 keys gives one number per moment, the mean over its entries."""
    n, b, num_keys = 12, 3, 20_000
    law = noise.random_reshuffling(n, b)
    sample = jax.jit(jax.vmap(lambda k: jnp.stack([law.sample(k, t).dense() for t in (0, 1, 5)])))
    w = np.asarray(sample(jax.random.split(key(), num_keys)), np.float64) - 1 / n
    for i, j, steps in ((0, 1, (0, 1)), (1, 2, (1, 5))):
        stated = law.covariance_between(*steps)
        products = w[:, i] * w[:, j]
        both = w[:, i].sum(1) * w[:, j].sum(1)
        diagonal, off_diagonal = products.mean(1), (both - products.sum(1)) / (n * (n - 1))
        for values, expected in ((diagonal, stated.diagonal), (off_diagonal, stated.off_diagonal)):
            error = values.std() / np.sqrt(num_keys)
            assert_agree(values.mean(), expected, error, comparisons=4, slack=1e-9)


def test_independent_steps_have_no_covariance_between_them():
    law = noise.fisher(10, 2)
    assert law.covariance_between(3, 3) == law.covariance
    assert law.covariance_between(3, 4) == noise.Exchangeable(0.0, 0.0)


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("user_errors")
class TestBadInput:
    def test_more_examples_than_indices(self):
        for make in (
            noise.gd,
            lambda n: noise.sgd(n, 8),
            lambda n: noise.fisher(n, 8),
            lambda n: noise.permute(key(), jnp.arange(3), n),
        ):
            with pytest.raises(ValueError, match=r"at most 2\^31 - 1 = 2147483647, .*int32.*got"):
                make(2**31)

    @pytest.mark.parametrize("position", [-1, 10])
    def test_positions_out_of_range(self, position):
        with pytest.raises(ValueError, match=rf"positions must be in \[0, 10\), got .*{position}"):
            noise.permute(key(), jnp.array([position, 3]), 10)

    def test_positions_must_be_integers(self):
        with pytest.raises(TypeError, match="positions must be an integer, got an array"):
            noise.permute(key(), jnp.ones(3), 10)

    def test_an_untyped_key_is_refused(self):
        with pytest.raises(TypeError, match="key must be a typed PRNG key"):
            noise.permute(jnp.zeros(2, jnp.uint32), jnp.arange(3), 10)

    def test_remainders_are_dropped_only_on_request(self):
        with pytest.raises(ValueError, match=r"must divide num_examples = 10, got 4, .* 2"):
            noise.random_reshuffling(10, 4)

    def test_covariances_of_negative_steps_are_refused(self):
        with pytest.raises(ValueError, match="other must be at least 0, got -1"):
            noise.gd(3).covariance_between(0, -1)

    def test_svag_needs_independent_steps(self):
        with pytest.raises(ValueError, match="base must have independent steps, got random_resh"):
            noise.svag(noise.random_reshuffling(10, 5), 2)

    def test_a_law_of_dependent_steps_needs_both_functions(self):
        law = noise.sgd(3, 1)
        with pytest.raises(ValueError, match="draw_at and between must be given together"):
            noise.MNoise("mine", 3, 1, law.covariance, law.draw, draw_at=law.sample)
