"""Draws of the library are independent of everything that a user draws from the same key.

A correlation of n independent pairs has a standard error of 1/sqrt(n). The keys are fixed.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msgd_jax import loss, noise
from msgd_jax._streams import Stream, derive
from tests.support.noises import ROWS
from tests.support.statistics import bound

IMPLEMENTATIONS = ["threefry2x32", "rbg"]
INTEGERS = [np.dtype(kind + size) for kind in "iu" for size in "1248"]


def words(keys):
    return np.asarray(jax.random.key_data(keys)).reshape(-1, jax.random.key_data(keys).shape[-1])


def keys_of_a_user(key):
    """The key itself, its children by `split` and `fold_in`, and the children of these."""
    children = [jax.random.split(key, 50), jax.vmap(jax.random.fold_in, (None, 0))(key, np.r_[:50])]
    grandchildren = [jax.vmap(lambda k: jax.random.split(k, 20))(keys).ravel() for keys in children]
    return [key.reshape(1), *children, *grandchildren]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_keys_of_streams_are_none_of_a_users(impl):
    key = jax.random.key(7, impl=impl)
    steps = jnp.arange(50)
    ours = [words(derive(key, stream)[None]) for stream in Stream]
    ours += [words(jax.vmap(lambda t, s=s: derive(key, s, t))(steps)) for s in Stream]
    ours = {tuple(row) for row in np.concatenate(ours).tolist()}
    assert len(ours) == len(Stream) * 51
    theirs = {tuple(row) for row in np.concatenate(list(map(words, keys_of_a_user(key)))).tolist()}
    assert not ours & theirs


def draws_of_a_user(key, size):
    """Numbers that a user may draw from a key, its children, or at a step: [kinds, size]."""
    first, second = jax.random.split(key)
    keys = [key, first, second, jax.random.fold_in(key, 2), jax.random.fold_in(first, 0)]
    kinds = [jax.random.normal, jax.random.uniform, jax.random.rademacher]
    drawn = [
        kind(jax.random.clone(key), (size,)).astype(jnp.float32)
        for kind, key in itertools.product(kinds, keys)
    ]
    # A subset of the examples as users draw it: those that are in it have a 1.
    orders = [jax.random.permutation(jax.random.clone(key), size) for key in keys]
    subsets = [jnp.zeros(size).at[order[: -(-size // 5)]].set(1) for order in orders]
    return jnp.stack(drawn + subsets)


def correlations(draw, size, num_keys, impl):
    """Correlations of ``draw(key)`` with `draws_of_a_user`, in standard errors: [kinds]."""

    def pair(seed):
        key = jax.random.key(seed, impl=impl)
        return draw(key), draws_of_a_user(jax.random.clone(key), size)

    # This is a loop, since keys of implementations other than threefry may differ under vmap.
    ours, theirs = jax.jit(lambda: jax.lax.map(pair, jnp.arange(num_keys)))()
    ours = np.asarray(ours, np.float64).ravel()
    theirs = np.asarray(theirs, np.float64).swapaxes(0, 1).reshape(-1, ours.size)
    ours, theirs = ours - ours.mean(), theirs - theirs.mean(1, keepdims=True)
    scale = np.sqrt((ours**2).sum() * (theirs**2).sum(1))
    return theirs @ ours / scale * np.sqrt(ours.size)


DRAWN = [
    ("threefry2x32", 6, 300),
    ("threefry2x32", 1500, 4),
    ("rbg", 6, 300),
    ("rbg", 1500, 4),
]


@pytest.mark.parametrize(("impl", "size", "num_keys"), DRAWN)
@pytest.mark.parametrize("name", sorted(set(ROWS) - {"gd"}))
def test_weights_are_uncorrelated_with_what_a_user_draws(name, impl, size, num_keys):
    law = ROWS[name].make(size, -(-size // 5))
    z = correlations(lambda key: law.sample(key, 2).dense(), size, num_keys, impl)
    assert np.abs(z).max() < bound(z.size)


def test_an_untagged_draw_would_be_seen():
    def untagged(key):
        return jax.random.normal(jax.random.fold_in(key, 2), (6,))

    assert np.abs(correlations(untagged, 6, 300, "threefry2x32")).max() > 20


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("size", [50, 3000])
def test_permutations_are_independent_of_a_users(size, impl):
    """Two independent permutations agree at one position on average, with variance 1."""

    def agreements(seed):
        key = jax.random.key(seed, impl=impl)
        keys = [key, *jax.random.split(key), jax.random.fold_in(key, 0)]
        ours = noise.permute(key, jnp.arange(size), size)
        return jnp.stack(
            [(ours == jax.random.permutation(jax.random.clone(k), size)).sum() for k in keys]
        )

    counts = jax.jit(lambda: jax.lax.map(agreements, jnp.arange(50)))()
    z = (np.asarray(counts).mean(0) - 1) * np.sqrt(50)
    assert np.abs(z).max() < bound(z.size)


def test_one_key_may_be_used_for_parameters_and_noise():
    """Many scripts draw the parameters from a key, and then train with it."""
    key = jax.random.key(0)
    start = jax.random.normal(jax.random.split(key)[0], (500,))
    weights = noise.fisher(500, 10).sample(key, 0).values
    assert abs(np.corrcoef(start, weights)[0, 1]) < bound() / np.sqrt(500)


@pytest.mark.optimized
@pytest.mark.parametrize("size", [6, 1500])
@pytest.mark.parametrize("name", ROWS)
def test_the_x64_flag_changes_no_draw(name, size):
    law = ROWS[name].make(size, -(-size // 5), dtype=jnp.float32)
    key = jax.random.key(3)
    plain = law.sample(key, 4)
    with jax.enable_x64(True):
        wide = ROWS[name].make(size, -(-size // 5), dtype=jnp.float32).sample(key, 4)
    assert wide.values.dtype == plain.values.dtype
    np.testing.assert_array_equal(plain.values, wide.values)
    np.testing.assert_array_equal(
        *(np.zeros(1) if w.indices is None else w.indices for w in (plain, wide))
    )


# Integers -----------------------------------------------------------------------------------------

LAWS = [noise.fisher(20, 5), noise.random_reshuffling(1000, 100)]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_a_step_of_any_integer_type_is_that_step(law, dtype):
    key = jax.random.key(0)
    expected = law.sample(key, 103)
    draws = [law.sample(key, step) for step in (dtype.type(103), np.asarray(103, dtype))]
    with jax.enable_x64(True):
        draws.append(law.sample(key, jnp.asarray(103, dtype)))
        draws.append(jax.jit(law.sample)(key, jnp.asarray(103, dtype)))
    for draw in draws:
        jax.tree.map(np.testing.assert_array_equal, draw, expected)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("size", [100, 5000])
def test_positions_may_be_integers_of_any_type(size, dtype):
    key = jax.random.key(0)
    expected = noise.permute(key, jnp.arange(5), size)
    assert len(set(expected.tolist())) == 5
    positions = np.arange(5).astype(dtype)
    np.testing.assert_array_equal(noise.permute(key, positions, size), expected)
    with jax.enable_x64(True):
        traced = jax.jit(noise.permute, static_argnums=2)(key, jnp.asarray(positions), size)
    np.testing.assert_array_equal(traced, expected)
    assert traced.dtype == jnp.int32


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_sizes_of_micro_batches_may_be_integers_of_any_type(dtype):
    """There are 500 examples in micro-batches of 100, which int8 cannot add up."""
    losses = loss.per_example(lambda theta, x: (theta - x) ** 2)
    x, weights = jnp.linspace(0, 1, 500), noise.cov(500, 10).sample(jax.random.key(0), 0)
    size = dtype.type(100)
    of_weights = loss.weighted_value_and_grad(losses, microbatch_size=size)
    plain = loss.weighted_value_and_grad(losses, microbatch_size=100)
    one = jnp.asarray(1.0)
    jax.tree.map(np.testing.assert_array_equal, of_weights(one, x, weights), plain(one, x, weights))
    stacked = jax.tree.map(lambda leaf: leaf[None], weights)
    many = loss.weighted_values_and_grads(losses, microbatch_size=size, draws_per_pass=size)
    np.testing.assert_allclose(many(one, x, stacked)[1][0], plain(one, x, weights)[1], rtol=1e-5)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_indices_may_be_integers_of_any_type(dtype):
    with jax.enable_x64(True):
        indices = jnp.asarray([3, 99, 3], dtype)
    weights = noise.Weights(jnp.asarray([0.5, 0.25, 0.25], jnp.float32), indices, 5000)
    dense = np.zeros(5000, np.float32)
    dense[[3, 99]] = 0.75, 0.25
    np.testing.assert_array_equal(weights.dense(), dense)
    np.testing.assert_array_equal(jax.jit(noise.Weights.dense)(weights), dense)


@pytest.mark.usefixtures("user_errors")
@pytest.mark.parametrize(
    "step",
    [-1, np.int8(-1), jnp.asarray(-1), np.int64(2**32), np.uint32(2**31), 2**31, np.uint64(2**40)],
    ids=repr,
)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_steps_out_of_range_are_refused(law, step):
    with pytest.raises(ValueError, match="step must be between 0 and"):
        law.sample(jax.random.key(0), step)


@pytest.mark.usefixtures("user_errors")
@pytest.mark.parametrize("indices", [[0, 5], [-1, 2], np.asarray([0, 2**40])], ids=str)
def test_indices_out_of_range_are_refused(indices):
    with pytest.raises(ValueError, match=r"indices must be in \[0, 5\), got values from"):
        noise.Weights(jnp.ones(2), np.asarray(indices), 5)


def test_traced_indices_out_of_range_count_for_nothing():
    @jax.jit
    def dense(indices):
        return noise.Weights(jnp.ones(3), indices, 4).dense()

    np.testing.assert_array_equal(dense(jnp.asarray([-1, 4, 2])), [0, 0, 1, 0])


@pytest.mark.parametrize("name", ROWS)
def test_stacked_draws_become_stacked_vectors(name):
    law, key = ROWS[name].make(6, 2), jax.random.key(0)
    steps = jnp.arange(3)
    stacked = jax.vmap(law.sample, in_axes=(None, 0))(key, steps)
    one_by_one = np.stack([law.sample(key, int(step)).dense() for step in steps])
    np.testing.assert_array_equal(stacked.dense(), one_by_one)


# Laws as values -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROWS)
def test_laws_compare_by_value(name):
    make = ROWS[name].make
    law = make(6, 2)
    assert law == make(6, 2)
    assert hash(law) == hash(make(6, 2))
    others = [make(7, 2)]
    if name != "gd":
        others.append(make(6, 3))
    assert all(law != other for other in others)
    with jax.enable_x64(True):
        assert law != make(6, 2, dtype=jnp.float64)


def test_close_scales_are_different_laws():
    """They have the same name, which is for people."""
    law, other = noise.rademacher(5, 1.0), noise.rademacher(5, 1.0 + 1e-9)
    assert law.name == other.name
    assert law != other


def test_equal_laws_share_a_compiled_step():
    traces = []

    @jax.jit
    def draw(key, law):
        traces.append(law)
        return law.sample(key, 0).values

    for _ in range(3):
        draw(jax.random.key(0), noise.sparse_cov(100, 5, support_size=20))
    assert len(traces) == 1
