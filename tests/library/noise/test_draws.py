"""Draws of the laws: their shapes, the same draw on any number of devices, and bad input."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from msgd_jax import noise
from tests.support.noises import ROWS, cases

pytestmark = pytest.mark.usefixtures("strict_dtypes")

KEY = jax.random.key(20240229)


# Shapes and supports ------------------------------------------------------------------------------


@hypothesis.settings(max_examples=10, deadline=None, derandomize=True)
@hypothesis.given(
    name=st.sampled_from(sorted(ROWS)), n=st.integers(1, 40), fraction=st.floats(0, 1)
)
def test_shapes_dtypes_and_supports(name, n, fraction):
    row = ROWS[name]
    n = max(n, row.smallest)
    b = 1 + round(fraction * (n - 1))
    law = row.make(n, b)
    weights = law.sample(KEY, 5)
    dense = np.asarray(weights.dense())
    assert weights.values.shape == (law.support_size,)
    assert weights.values.dtype == jnp.float32
    assert dense.shape == (n,)
    assert np.isfinite(dense).all()
    assert 0 <= law.covariance.diagonal < np.inf
    if weights.indices is None:
        assert law.support_size == n
    else:
        assert weights.indices.shape == (law.support_size,)
        assert 0 <= int(weights.indices.min()) <= int(weights.indices.max()) < n
        if not row.repeats:
            assert np.unique(weights.indices).size == law.support_size


def is_centred(name: str, n: int, b: int) -> bool:
    """Whether the stated variance of the sum of the weights, N (alpha + N beta), is zero."""
    covariance = ROWS[name].make(n, b).covariance
    return abs(covariance.alpha + n * covariance.beta) < 1e-15


@pytest.mark.parametrize(
    ("name", "n", "b"),
    [case for case in cases((1, 1), (7, 7), (1000, 10), (100_000, 100)) if is_centred(*case)],
)
def test_weights_of_centred_laws_add_up_to_one(name, n, b):
    law = ROWS[name].make(n, b)
    weights = np.asarray(law.sample(KEY, 0).values, np.float64)
    # Each weight is rounded to float32, and the mean is rounded in fixed point to 2^-23 sqrt(N).
    tolerance = 2.0**-22 * np.abs(weights).sum() + 2.0**-23 * np.sqrt(law.covariance.diagonal * n)
    assert abs(weights.sum() - 1) < tolerance


@pytest.mark.parametrize(("name", "refinement"), [("sgd", 2), ("sgd_replace", 100), ("cov", 3)])
def test_svag_is_two_draws_of_its_base(name, refinement):
    """The weights are p W1 + q W2, where W1 and W2 are drawn with the two halves of the key."""
    base = ROWS[name].make(7, 3)
    law = noise.svag(base, refinement)
    weights = law.draw(jax.random.key(5))
    first, second = (base.draw(key) for key in jax.random.split(jax.random.key(5)))
    p, q = ((1 + sign * np.sqrt(2 * refinement - 1)) / 2 for sign in (1, -1))
    wanted = p * np.asarray(first.dense(), np.float64) + q * np.asarray(second.dense(), np.float64)
    np.testing.assert_allclose(weights.dense(), wanted, rtol=1e-6, atol=1e-6 * p)
    assert weights.values.shape == (law.support_size,)
    assert weights.values.dtype == first.values.dtype
    if first.indices is None or second.indices is None:
        assert weights.indices is None
        assert law.support_size == 7
    else:
        np.testing.assert_array_equal(weights.indices, [*first.indices, *second.indices])
        assert law.support_size == 2 * base.support_size


@pytest.mark.parametrize("name", ["sgd", "cov"])
def test_svag_of_one_step_is_its_base(name):
    base = ROWS[name].make(7, 3)
    law = noise.svag(base, 1)
    assert (law.support_size, law.covariance) == (base.support_size, base.covariance)
    first, second = (x.draw(jax.random.key(5)) for x in (law, base))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


def test_svag_of_svag():
    base = noise.sgd(7, 3)
    law = noise.svag(noise.svag(base, 2), 3)
    assert law.support_size == 4 * base.support_size
    assert law.covariance.diagonal == pytest.approx(6 * base.covariance.diagonal, rel=1e-15)
    assert float(law.draw(jax.random.key(5)).values.sum()) == pytest.approx(1, abs=1e-6)


def test_svag_of_float64_weights(x64):
    weights = noise.svag(noise.cov(7, 3, dtype=jnp.float64), 5).draw(jax.random.key(0))
    assert weights.values.dtype == jnp.float64
    assert abs(float(weights.values.sum()) - 1) < 1e-12


def test_float64_weights(x64):
    law = noise.cov(1000, 10, dtype=jnp.float64)
    weights = law.sample(jax.random.key(0), 0)
    assert weights.values.dtype == jnp.float64
    assert abs(float(weights.values.sum()) - 1) < 1e-12
    single = noise.cov(1000, 10).sample(jax.random.key(0), 0)
    assert single.values.dtype == jnp.float32


@pytest.mark.slow
def test_small_bernoulli_probabilities_are_exact():
    """At b/N = 2e-8, uniforms of 23 bits would choose six times as many examples.

    The count over 4 draws is Poisson with mean 4: that it is 18 or more has probability 3e-7.
    """
    law = noise.bernoulli(50_000_000, 1)
    counts = [int((law.sample(KEY, step).values > 0).sum()) for step in range(4)]
    assert sum(counts) < 18


# Determinism --------------------------------------------------------------------------------------


def ulps(a, b) -> int:
    """The largest distance between entries, in units in the last place."""
    a, b = (np.asarray(x, np.float32).view(np.int32).astype(np.int64) for x in (a, b))
    return int(np.abs(a - b).max())


@pytest.mark.optimized
@pytest.mark.parametrize(("name", "n", "b"), cases((1000, 50)))
def test_same_draw_under_jit_and_vmap(name, n, b):
    law = ROWS[name].make(n, b)
    keys = jax.vmap(jax.random.key)(jnp.arange(3))
    eager = [law.sample(key, 11) for key in keys]
    compiled = jax.jit(law.sample)
    jitted = [compiled(key, 11) for key in keys]
    mapped = jax.vmap(lambda key: law.sample(key, 11))(keys)
    mapped_jit = jax.jit(jax.vmap(lambda key: law.sample(key, 11)))(keys)
    for i, expected in enumerate(eager):
        row = [jax.tree.map(lambda x, i=i: x[i], m) for m in (mapped, mapped_jit)]
        for weights in (jitted[i], *row):
            assert ulps(weights.values, expected.values) <= 2
            if expected.indices is not None:
                np.testing.assert_array_equal(weights.indices, expected.indices)


@pytest.mark.parametrize(("n", "num_devices"), [(1000, 8), (4040, 2)])
@pytest.mark.parametrize("name", list(ROWS))
def test_bit_identical_on_many_devices(name, n, num_devices):
    assert_bit_identical(ROWS[name].make(n, 8), num_devices)


def test_svag_of_dense_weights_is_bit_identical_on_many_devices():
    assert_bit_identical(noise.svag(noise.cov(1000, 8), 3), 8)


def assert_bit_identical(law: noise.MNoise, num_devices: int) -> None:
    one = jax.jit(law.sample)(KEY, 3)
    mesh = Mesh(np.array(jax.devices()[:num_devices]), ("data",))
    sharded = NamedSharding(mesh, PartitionSpec("data"))
    replicated = NamedSharding(mesh, PartitionSpec())
    layouts = [replicated]
    if law.support_size % num_devices == 0:
        layouts.append(sharded)
    for layout in layouts:
        many = jax.jit(law.sample, out_shardings=layout)(KEY, 3)
        assert len(many.values.sharding.device_set) == num_devices
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_a_plain_mean_would_not_be_bit_identical():
    """A mean in floating point depends on the number of devices: centred laws use fixed point."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    sharded = NamedSharding(mesh, PartitionSpec("data"))

    def centred(step):
        normals = jax.random.normal(jax.random.fold_in(KEY, step), (100_000,))
        return normals - normals.mean()

    one, many = jax.jit(centred), jax.jit(centred, out_shardings=sharded)
    assert any((np.asarray(one(s)) != np.asarray(many(s))).any() for s in range(5))


def test_a_law_is_a_static_argument_of_jit():
    traces = []

    @jax.jit
    def draw(law, key):
        traces.append(law.name)
        return law.sample(key, 0).values

    law = noise.fisher(10, 2)
    np.testing.assert_array_equal(draw(law, KEY), draw(law, KEY))
    assert len(traces) == 1
    assert law == dataclasses.replace(law)
    # A law of the same name that has another function is another law.
    assert law != dataclasses.replace(law, draw=lambda key: law.draw(key))


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("user_errors")
class TestBadInput:
    # The laws whose batch size is only a scale take any number above 0.
    SCALED = (
        "fisher",
        "cov",
        "rademacher",
        "estimated_fisher",
        "estimated_cov",
        "student_t",
        "scaled",
        "coloured",
    )

    @pytest.mark.parametrize("name", [name for name in ROWS if name != "gd"])
    @pytest.mark.parametrize("batch_size", [0, -1, 8])
    def test_batch_size_out_of_range(self, name, batch_size):
        if name in self.SCALED and batch_size > 0:
            assert ROWS[name].make(7, batch_size).num_examples == 7
            return
        allowed = "finite and above 0" if name in self.SCALED else "between 1 and 7"
        with pytest.raises(ValueError, match=f"{allowed}, got {batch_size}"):
            ROWS[name].make(7, batch_size)

    @pytest.mark.parametrize("value", [True, "3", None])
    def test_sizes_must_be_numbers(self, value):
        with pytest.raises(TypeError, match="batch_size must be a number"):
            noise.fisher(7, value)

    @pytest.mark.parametrize("value", [2.0, True, "3", None, np.float32(2)])
    def test_sizes_must_be_integers(self, value):
        with pytest.raises(TypeError, match="batch_size must be an integer"):
            noise.sgd(7, value)
        with pytest.raises(TypeError, match="num_examples must be an integer"):
            noise.gd(value)

    def test_numpy_integers_are_welcome(self):
        assert noise.fisher(np.int64(7), np.int32(2)).num_examples == 7

    @pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf")])
    def test_scales_out_of_range(self, scale):
        with pytest.raises(ValueError, match="scale must be finite and at least 0"):
            noise.rademacher(7, scale)

    @pytest.mark.parametrize("size", [0, 8])
    def test_subset_sizes_out_of_range(self, size):
        with pytest.raises(ValueError, match="estimate_size must be between 1 and 7"):
            noise.estimated_fisher(7, 2, estimate_size=size)
        with pytest.raises(ValueError, match="support_size must be between 2 and 7"):
            noise.sparse_cov(7, 2, support_size=size)

    def test_a_support_too_small_names_the_smallest(self):
        with pytest.raises(ValueError, match="support_size must be at least 25"):
            noise.sparse_fisher(100, 33, support_size=24)
        assert noise.sparse_fisher(100, 33, support_size=25).support_size == 25

    def test_one_example_has_no_sample_covariance(self):
        with pytest.raises(ValueError, match="num_examples must be at least 2, got 1"):
            noise.sparse_cov(1, 1, support_size=1)

    def test_matching_must_be_one_of_two_words(self):
        with pytest.raises(ValueError, match="matching must be one of 'total', 'gaussian'"):
            noise.sparse_fisher(7, 2, support_size=4, matching="both")

    def test_refinement_must_be_an_integer_of_at_least_one(self):
        for value in (0, -1):
            with pytest.raises(ValueError, match=f"refinement must be at least 1, got {value}"):
                noise.svag(noise.sgd(7, 2), value)
        for value in (2.0, True, "3", None):
            with pytest.raises(TypeError, match=f"refinement must be an integer, got {value!r}"):
                noise.svag(noise.sgd(7, 2), value)

    @pytest.mark.parametrize("base", [None, 3, "sgd", noise.sgd, noise.Exchangeable(1.0, 0.0)])
    @pytest.mark.parametrize("refinement", [1, 3])
    def test_the_base_of_svag_must_be_a_law(self, base, refinement):
        with pytest.raises(TypeError, match=r"base must be a noise\.MNoise, got "):
            noise.svag(base, refinement)

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int32])
    def test_narrow_dtypes_are_refused(self, dtype):
        with pytest.raises(ValueError, match="dtype must be float32 or float64"):
            noise.fisher(7, 2, dtype=dtype)

    def test_float64_needs_x64(self):
        with pytest.raises(ValueError, match="jax_enable_x64"):
            noise.fisher(7, 2, dtype=jnp.float64)

    @pytest.mark.parametrize("key", [None, 0, True, np.zeros(2, np.uint32)])
    def test_untyped_keys_are_refused(self, key):
        with pytest.raises(TypeError, match="key must be a typed PRNG key"):
            noise.fisher(7, 2).sample(key, 0)

    def test_an_old_style_key_is_told_how_to_wrap_it(self):
        with pytest.raises(TypeError, match="wrap_key_data"):
            noise.fisher(7, 2).sample(jax.random.PRNGKey(0), 0)

    def test_an_array_of_keys_is_refused(self):
        with pytest.raises(ValueError, match="single key"):
            noise.fisher(7, 2).sample(jax.vmap(jax.random.key)(jnp.arange(2)), 0)

    @pytest.mark.parametrize("step", [0.0, True])
    def test_step_must_be_an_integer(self, step):
        with pytest.raises(TypeError, match="step must be an integer"):
            noise.fisher(7, 2).sample(KEY, step)

    def test_fields_of_a_law_of_the_users_own_are_checked(self):
        law = noise.fisher(7, 2)
        with pytest.raises(ValueError, match="support_size must be at least 1, got 0"):
            dataclasses.replace(law, support_size=0)
        with pytest.raises(
            TypeError, match=r"moments must be a noise\.Exchangeable or None, got float"
        ):
            dataclasses.replace(law, moments=0.1)
        with pytest.raises(TypeError, match="draw must be a function"):
            dataclasses.replace(law, draw=None)

    def test_a_negative_step_is_refused(self):
        with pytest.raises(ValueError, match=r"step must be between 0 and .*, got -1"):
            noise.fisher(7, 2).sample(KEY, -1)
