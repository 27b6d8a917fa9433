"""The laws of the M-noises: moments against Monte Carlo and exact enumeration, and determinism."""

import dataclasses
import functools
import itertools
from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from msgd_jax import noise
from tests.noises import ROWS, cases

pytestmark = pytest.mark.usefixtures("strict_dtypes")

KEY = jax.random.key(20240229)
NUM_DRAWS = 40_000
Z = 4.5  # two-sided 6.8e-6 for each statistic; about 120 of them below: 0.1 % in all


@functools.cache
def draws(name: str, n: int, b: int) -> np.ndarray:
    """NUM_DRAWS weight vectors, [NUM_DRAWS, N] in float64, drawn in float32."""
    law = ROWS[name].make(n, b)
    sample = jax.jit(jax.vmap(lambda step: law.sample(KEY, step).dense()))
    return np.asarray(sample(jnp.arange(NUM_DRAWS)), np.float64)


def z_scores(w: np.ndarray, covariance: noise.Exchangeable) -> dict[str, float]:
    """How many standard errors the sample moments are from the stated ones.

    Every draw gives one number for each moment (pooled over exchangeable entries); their standard
    error comes from the spread over draws. Rounding of float32 weights is allowed for on top.
    """
    n = w.shape[1]
    deviation = w - 1 / n
    squares = (deviation**2).mean(1)
    statistics = {"mean": (deviation.mean(1), 0.0), "diagonal": (squares, covariance.diagonal)}
    if n > 1:
        products = (deviation.sum(1) ** 2 - (deviation**2).sum(1)) / (n * (n - 1))
        statistics["off_diagonal"] = (products, covariance.off_diagonal)
    rounding = 1e-6 * max(1 / n**2, covariance.diagonal)
    scores = {}
    for name, (values, expected) in statistics.items():
        allowed = rounding if name != "mean" else 1e-6 / n
        error = max(abs(values.mean() - expected) - allowed, 0.0)
        spread = values.std(ddof=1) / np.sqrt(len(values))
        scores[name] = error / spread if error > 0 else 0.0
    return scores


@pytest.mark.parametrize(("name", "n", "b"), cases((1, 1), (7, 3), (100, 10)))
def test_moments_agree_with_monte_carlo(name, n, b):
    scores = z_scores(draws(name, n, b), ROWS[name].make(n, b).covariance)
    assert max(scores.values()) < Z, scores


@pytest.mark.parametrize(("name", "n", "b"), cases((7, 3), (100, 10)))
def test_every_entry_has_its_moments(name, n, b):
    """No entry and no pair of entries is special: entrywise z, Bonferroni over n^2 entries."""
    w = draws(name, n, b)
    covariance = ROWS[name].make(n, b).covariance
    deviation = w - 1 / n
    error = deviation.T @ deviation / len(w) - covariance.matrix(n)
    variance = (deviation**2).T @ (deviation**2) / len(w) - (deviation.T @ deviation / len(w)) ** 2
    spread = np.sqrt(np.maximum(variance, 0) / len(w)) + 1e-7 * max(1 / n**2, covariance.diagonal)
    # At most 10^4 entries with z = 6.2 each (5.6e-10): below 1e-5 for a noise.
    assert np.abs(error / spread).max() < 6.2
    mean_spread = np.sqrt(covariance.diagonal / len(w)) + 1e-7 / n
    assert np.abs(deviation.mean(0) / mean_spread).max() < 5.5


@pytest.mark.parametrize("name", [name for name in ROWS if name != "gd"])
def test_wrong_variances_are_rejected(name):
    stated = ROWS[name].make(100, 10).covariance
    for factor in (0.95, 1.05):
        wrong = noise.Exchangeable(stated.diagonal * factor, stated.off_diagonal)
        assert z_scores(draws(name, 100, 10), wrong)["diagonal"] > Z


def test_near_misses_of_the_paper_are_rejected():
    # Section 5.2 prints Bernoulli weights 1/N + 1/b and 1/N: their mean is 2/N.
    printed = draws("bernoulli", 100, 10) + 1 / 100
    assert z_scores(printed, noise.bernoulli(100, 10).covariance)["mean"] > Z
    # Without Bessel's correction [Cov-m] is too small by (m-1)N/(m(N-1)).
    naive = noise.Exchangeable(*(x * 49 * 100 / (50 * 99) for x in _pair("estimated_cov")))
    assert z_scores(draws("estimated_cov", 100, 10), naive)["diagonal"] > Z
    # Fisher is not centred, and cov is.
    assert z_scores(draws("fisher", 100, 10), noise.cov(100, 10).covariance)["off_diagonal"] > Z
    assert z_scores(draws("cov", 100, 10), noise.fisher(100, 10).covariance)["off_diagonal"] > Z


def _pair(name: str) -> tuple[float, float]:
    covariance = ROWS[name].make(100, 10).covariance
    return covariance.diagonal, covariance.off_diagonal


@pytest.mark.parametrize("name", [name for name in ROWS if name != "gd"])
def test_draws_differ_across_steps_keys_and_examples(name):
    law = ROWS[name].make(100, 10)
    first, other_step = law.sample(KEY, 0).dense(), law.sample(KEY, 1).dense()
    other_key = law.sample(jax.random.key(1), 0).dense()
    assert (first != other_step).any()
    assert (first != other_key).any()
    assert np.unique(first).size > 1


# Exact moments, by enumeration in rational arithmetic ---------------------------------------------


def subset_law(n: int, size: int, outside: Fraction, inside: Fraction, variance, centred: bool):
    """Diagonal and off-diagonal covariance of: `inside` + Gaussian on a uniform subset.

    `variance` is that of one Gaussian entry before it is centred over the subset. Enumerates all
    subsets; the Gaussian part is integrated by hand.
    """
    subsets = list(itertools.combinations(range(n), size))
    second = {(0, 0): Fraction(0), (0, 1): Fraction(0)}
    for subset in subsets:
        mean = [inside if i in subset else outside for i in range(n)]
        for i, j in second:
            if j >= n:
                continue
            gaussian = Fraction(0)
            if i in subset and j in subset:
                gaussian = variance * ((i == j) - (Fraction(1, size) if centred else 0))
            second[i, j] += (mean[i] * mean[j] + gaussian) / len(subsets)
    mean = Fraction(1, n)
    return second[0, 0] - mean**2, second[0, 1] - mean**2 if n > 1 else Fraction(0)


def agree(covariance: noise.Exchangeable, exact: tuple[Fraction, Fraction]) -> bool:
    stated = (covariance.diagonal, covariance.off_diagonal)
    return np.allclose(stated, [float(x) for x in exact], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("n", range(1, 8))
def test_covariances_are_exact(n):
    """Every stated covariance against enumeration over all subsets, N up to 7 and every b, m, B."""
    for b in range(1, n + 1):
        zero, one_nth = Fraction(0), Fraction(1, n)
        unit = Fraction(1, b * n)
        assert agree(noise.gd(n).covariance, (zero, zero))
        exact = subset_law(n, b, zero, Fraction(1, b), zero, False)
        assert agree(noise.sgd(n, b).covariance, exact)
        with_replacement = (Fraction(n - 1, b * n**2), -Fraction(1, b * n**2) if n > 1 else zero)
        assert agree(noise.sgd(n, b, replace=True).covariance, with_replacement)
        fisher = subset_law(n, n, zero, one_nth, unit, False)
        assert agree(noise.fisher(n, b).covariance, fisher)
        cov = subset_law(n, n, zero, one_nth, unit, True)
        assert agree(noise.cov(n, b).covariance, cov)
        p = Fraction(b, n)
        assert agree(noise.bernoulli(n, b).covariance, (p * (1 - p) / b**2, zero))
        for m in range(1, n + 1):
            made = noise.estimated_fisher(n, b, estimate_size=m).covariance
            exact = subset_law(n, m, one_nth, one_nth, Fraction(1, b * m), False)
            assert agree(made, exact)
            assert agree(made, fisher)
            if m >= 2:
                made = noise.estimated_cov(n, b, estimate_size=m).covariance
                scale = Fraction(n - 1, b * n * (m - 1))
                assert agree(made, subset_law(n, m, one_nth, one_nth, scale, True))
                assert agree(made, cov)


@pytest.mark.parametrize("n", range(1, 8))
def test_sparse_covariances_are_exact(n):
    zero = Fraction(0)
    checked = 0
    for b, size in itertools.product(range(1, n + 1), repeat=2):
        total = Fraction(size, b) - 1 + Fraction(size, n)
        for matching, scale in (("total", total), ("gaussian", Fraction(size, b))):
            if scale < 0:
                with pytest.raises(ValueError, match="support_size"):
                    noise.sparse_fisher(n, b, support_size=size, matching=matching)
                continue
            made = noise.sparse_fisher(n, b, support_size=size, matching=matching).covariance
            inside = Fraction(1, size)
            assert agree(made, subset_law(n, size, zero, inside, scale * inside**2, False))
            if matching == "total":
                assert made.diagonal == pytest.approx(1 / (b * n), rel=1e-12)
            checked += 1
        if size < 2:
            continue
        total = size * (Fraction(size * (n - 1), b) - (n - size)) / (n * (size - 1))
        alone = Fraction(size**2 * (n - 1), b * n * (size - 1))
        for matching, scale in (("total", total), ("gaussian", alone)):
            if scale < 0:
                with pytest.raises(ValueError, match="support_size"):
                    noise.sparse_cov(n, b, support_size=size, matching=matching)
                continue
            made = noise.sparse_cov(n, b, support_size=size, matching=matching).covariance
            inside = Fraction(1, size)
            assert agree(made, subset_law(n, size, zero, inside, scale * inside**2, True))
            if matching == "total":
                assert made.diagonal == pytest.approx((n - 1) / (b * n**2), rel=1e-12)
            checked += 1
    assert checked >= n


def test_matching_scale():
    for target in (noise.fisher(50, 7), noise.cov(50, 7), noise.sgd(50, 7)):
        scale = noise.matching_scale(target)
        matched = noise.rademacher(50, scale).covariance
        assert matched.diagonal == pytest.approx(target.covariance.diagonal, rel=1e-12)
    assert noise.matching_scale(noise.sgd(50, 7)) == pytest.approx(np.sqrt(43 / 7), rel=1e-12)


# Shapes and supports ------------------------------------------------------------------------------


@hypothesis.settings(max_examples=15, deadline=None, derandomize=True)
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
        if name != "sgd_replace":
            assert np.unique(weights.indices).size == law.support_size


CENTRED = ("gd", "sgd", "sgd_replace", "cov", "estimated_cov", "sparse_cov", "sparse_cov_gaussian")


@pytest.mark.parametrize("name", list(ROWS))
def test_which_noises_are_centred(name):
    """The sum of the weights has variance N (alpha + N beta)."""
    covariance = ROWS[name].make(100, 10).covariance
    assert (covariance.alpha + 100 * covariance.beta < 1e-15) == (name in CENTRED)


@pytest.mark.parametrize(
    ("name", "n", "b"),
    [case for case in cases((1, 1), (7, 7), (1000, 10), (100_000, 100)) if case[0] in CENTRED],
)
def test_centred_noises_add_up_to_one(name, n, b):
    law = ROWS[name].make(n, b)
    weights = np.asarray(law.sample(KEY, 0).values, np.float64)
    # Each weight is rounded to float32, and the mean in fixed point to 2^-23 sqrt(N).
    tolerance = 2.0**-22 * np.abs(weights).sum() + 2.0**-23 * np.sqrt(law.covariance.diagonal * n)
    assert abs(weights.sum() - 1) < tolerance


def test_float64_weights(x64):
    law = noise.cov(1000, 10, dtype=jnp.float64)
    weights = law.sample(jax.random.key(0), 0)
    assert weights.values.dtype == jnp.float64
    assert abs(float(weights.values.sum()) - 1) < 1e-12
    single = noise.cov(1000, 10).sample(jax.random.key(0), 0)
    assert single.values.dtype == jnp.float32


def test_small_bernoulli_probabilities_are_exact():
    """At b/N = 2e-8 a 23-bit uniform chooses six times too many.

    The count over 4 draws is Poisson with mean 4: 18 or more have probability 3e-7.
    """
    law = noise.bernoulli(50_000_000, 1)
    counts = [int((law.sample(KEY, step).values > 0).sum()) for step in range(4)]
    assert sum(counts) < 18


# Determinism --------------------------------------------------------------------------------------


def ulps(a, b) -> int:
    """The largest distance in units in the last place."""
    a, b = (np.asarray(x, np.float32).view(np.int32).astype(np.int64) for x in (a, b))
    return int(np.abs(a - b).max())


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
    law = ROWS[name].make(n, 8)
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
    """Why the centred noises sum in fixed point: this is what they would do otherwise."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    sharded = NamedSharding(mesh, PartitionSpec("data"))

    def centred(step):
        normals = jax.random.normal(jax.random.fold_in(KEY, step), (100_000,))
        return normals - normals.mean()

    one, many = jax.jit(centred), jax.jit(centred, out_shardings=sharded)
    assert any((np.asarray(one(s)) != np.asarray(many(s))).any() for s in range(5))


def test_noise_is_a_static_argument():
    traces = []

    @jax.jit
    def draw(law, key):
        traces.append(law.name)
        return law.sample(key, 0).values

    law = noise.fisher(10, 2)
    np.testing.assert_array_equal(draw(law, KEY), draw(law, KEY))
    assert len(traces) == 1
    assert law != dataclasses.replace(law)  # identity: two laws of one name may differ


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("user_errors")
class TestBadInput:
    @pytest.mark.parametrize("name", [name for name in ROWS if name not in ("gd", "rademacher")])
    @pytest.mark.parametrize("batch_size", [0, -1, 8])
    def test_batch_size_out_of_range(self, name, batch_size):
        with pytest.raises(ValueError, match=f"between 1 and 7, got {batch_size}"):
            getattr(noise, _constructor(name))(7, batch_size, **_extra(name, 4))

    @pytest.mark.parametrize("value", [2.0, True, "3", None, np.float32(2)])
    def test_sizes_must_be_integers(self, value):
        with pytest.raises(TypeError, match="batch_size must be an integer"):
            noise.fisher(7, value)
        with pytest.raises(TypeError, match="num_examples must be an integer"):
            noise.gd(value)

    def test_numpy_integers_are_welcome(self):
        assert noise.fisher(np.int64(7), np.int32(2)).num_examples == 7

    @pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf")])
    def test_scale(self, scale):
        with pytest.raises(ValueError, match="scale must be finite and at least 0"):
            noise.rademacher(7, scale)

    @pytest.mark.parametrize("size", [0, 8])
    def test_subset_sizes(self, size):
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

    def test_matching(self):
        with pytest.raises(ValueError, match="matching must be one of 'total', 'gaussian'"):
            noise.sparse_fisher(7, 2, support_size=4, matching="both")

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int32])
    def test_narrow_dtypes(self, dtype):
        with pytest.raises(ValueError, match="dtype must be float32 or float64"):
            noise.fisher(7, 2, dtype=dtype)

    def test_float64_needs_x64(self):
        with pytest.raises(ValueError, match="jax_enable_x64"):
            noise.fisher(7, 2, dtype=jnp.float64)

    @pytest.mark.parametrize("key", [None, 0, True, np.zeros(2, np.uint32)])
    def test_untyped_keys(self, key):
        with pytest.raises(TypeError, match="key must be a typed PRNG key"):
            noise.fisher(7, 2).sample(key, 0)

    def test_old_style_key(self):
        with pytest.raises(TypeError, match="wrap_key_data"):
            noise.fisher(7, 2).sample(jax.random.PRNGKey(0), 0)

    def test_array_of_keys(self):
        with pytest.raises(ValueError, match="single key"):
            noise.fisher(7, 2).sample(jax.vmap(jax.random.key)(jnp.arange(2)), 0)

    @pytest.mark.parametrize("step", [0.0, True])
    def test_step_must_be_an_integer(self, step):
        with pytest.raises(TypeError, match="step must be an integer"):
            noise.fisher(7, 2).sample(KEY, step)

    def test_a_law_of_your_own(self):
        law = noise.fisher(7, 2)
        with pytest.raises(ValueError, match="support_size must be at least 1, got 0"):
            dataclasses.replace(law, support_size=0)
        with pytest.raises(TypeError, match=r"covariance must be a noise\.Exchangeable, got float"):
            dataclasses.replace(law, covariance=0.1)
        with pytest.raises(TypeError, match="draw must be a function"):
            dataclasses.replace(law, draw=None)

    def test_negative_step(self):
        with pytest.raises(ValueError, match="step must be at least 0, got -1"):
            noise.fisher(7, 2).sample(KEY, -1)


def _constructor(name: str) -> str:
    return name.removesuffix("_replace").removesuffix("_gaussian")


def _extra(name: str, size: int) -> dict[str, int]:
    if name.startswith("estimated"):
        return {"estimate_size": size}
    return {"support_size": size} if name.startswith("sparse") else {}
