"""Laws that are made of other laws: their draws, their exact covariances, and bad input.

The covariances are held at one step and between two steps: estimates from independent keys
against the stated numbers, and the stated numbers against algebra on those of the laws inside.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from msgd_jax import noise, train
from msgd_jax.noise import _algebra
from tests.library.test_train import PROBLEM
from tests.support.mistakes import assert_told
from tests.support.problems import loss_vector_fn
from tests.support.statistics import assert_agree

N, B = 6, 2
COV, SGD = noise.cov(N, B), noise.sgd(N, B)
KEY = jax.random.key(7)


def draws(law, steps, num_keys):
    """Draws the weights of the given steps under many keys: [keys, steps, N], float64."""
    keys = jax.random.split(jax.random.key(11), num_keys)

    def of_key(key):
        return jax.vmap(lambda step: law.sample(key, step).dense())(jnp.asarray(steps))

    return np.asarray(jax.vmap(of_key)(keys), np.float64)


def assert_covariance(law, step, other, num_keys=20_000):
    """Asserts that the draws have the two numbers that the law states of Cov(W_s, W_t).

    Each number is estimated by the mean over all its entries. Returns what the law states.
    """
    w = draws(law, [step, other], num_keys) - 1 / N
    products = w[:, 0, :, None] * w[:, 1, None, :]
    same = np.eye(N, dtype=bool)
    exact = law.covariance_between(step, other)
    for entries, expected in ((same, exact.diagonal), (~same, exact.off_diagonal)):
        means = products[:, entries].mean(1)  # one number per key, and keys are independent
        spread = means.std(ddof=1) / np.sqrt(num_keys)
        assert_agree(means.mean(), expected, spread, comparisons=2, slack=1e-12)
    return exact


class TestScaled:
    def test_deviations_of_the_weights_are_scaled(self):
        law = noise.scaled(COV, 0.5)
        own, base = law.sample(KEY, 3).values, COV.sample(KEY, 3).values
        np.testing.assert_allclose(own - 1 / N, 0.5 * (base - 1 / N), atol=2e-8)
        assert (law.covariance.diagonal, law.covariance.off_diagonal) == (
            0.25 * COV.covariance.diagonal,
            0.25 * COV.covariance.off_diagonal,
        )

    def test_scaling_by_one_leaves_the_law_as_it_is(self):
        weights, expected = noise.scaled(SGD, 1.0).sample(KEY, 5), SGD.sample(KEY, 5)
        assert (weights.indices == expected.indices).all()
        assert noise.scaled(SGD, 1).support_size == B

    def test_a_scaled_sparse_law_is_dense(self):
        law = noise.scaled(SGD, 2.0)
        expected = 2 * SGD.sample(KEY, 1).dense() - 1 / N
        np.testing.assert_allclose(law.sample(KEY, 1).values, expected, atol=3e-8)
        assert law.support_size == N

    def test_a_sweep_compiles_once(self):
        traces = []

        @jax.jit
        def weights(scale):
            traces.append(scale)
            return noise.scaled(COV, scale).sample(KEY, 2).values

        scales = np.array([0.0, 0.3, 2.0], np.float32)
        each = [weights(scale) for scale in scales]
        assert len(traces) == 1
        np.testing.assert_array_equal(jax.vmap(weights)(scales), each)
        np.testing.assert_allclose(each[0], 1 / N, rtol=1e-6)

    def test_the_scale_may_be_a_schedule(self):
        law = noise.scaled(COV, optax.linear_schedule(1.0, 0.0, 4))
        for step, factor in ((0, 1.0), (1, 0.75), (4, 0.0), (9, 0.0)):
            base = COV.sample(KEY, step).values
            np.testing.assert_allclose(
                law.sample(KEY, step).values - 1 / N, factor * (base - 1 / N), atol=3e-8
            )
            assert law.covariance_between(step, step).diagonal == pytest.approx(
                factor**2 * COV.covariance.diagonal
            )
        assert law.moments is None
        assert law.covariance_between(0, 1).diagonal == 0

    def test_a_schedule_scales_covariances_between_dependent_steps(self):
        base = noise.random_reshuffling(N, B)
        law = noise.scaled(base, optax.exponential_decay(1.0, 1, 0.5))
        exact = assert_covariance(law, 0, 2)
        assert exact.diagonal == pytest.approx(base.covariance_between(0, 2).diagonal / 4)


class TestSums:
    def test_covariances_of_dependent_steps_add_up(self):
        shuffled = noise.random_reshuffling(N, B)
        law = noise.sum_of(shuffled, noise.coloured(COV, (1.0, -1.0)))
        exact = assert_covariance(law, 0, 1)
        expected = shuffled.covariance_between(0, 1).diagonal - COV.covariance.diagonal
        assert exact.diagonal == pytest.approx(expected)

    def test_equal_laws_in_a_sum_draw_independently(self):
        law = noise.sum_of(COV, COV)
        assert_covariance(law, 0, 0)
        assert law.covariance.diagonal == 2 * COV.covariance.diagonal

    def test_a_sum_of_full_gradients_is_the_full_gradient(self):
        weights = noise.sum_of(noise.gd(N), noise.gd(N), noise.gd(N)).sample(KEY, 0).values
        np.testing.assert_allclose(weights, 1 / N, rtol=1e-6)


class TestMixtures:
    def test_covariance(self):
        law = noise.mixture([SGD, noise.sgd(N, 1)], [0.6, 0.4])
        assert_covariance(law, 0, 0)
        assert law.support_size == B

    def test_each_law_is_chosen_with_its_probability(self):
        law = noise.mixture([noise.gd(N), noise.sgd(N, 1)], [0.75, 0.25])
        chosen = (draws(law, [0], 4_000)[:, 0].max(1) > 0.5).mean()
        assert_agree(chosen, 0.25, np.sqrt(0.25 * 0.75 / 4_000))

    def test_small_probabilities_are_those_of_32_bits(self):
        """A uniform float32 never chose a law of probability 2^-24, and 2^-21 too often."""
        for share in (2.0**-30, 2.0**-24, 2.0**-21):
            first = 2**32 - round(share * 2**32)
            bits = np.asarray([0, first - 1, first, 2**32 - 1], np.uint32)
            found = [int(_algebra._chosen(jnp.asarray(b), (1 - share, share))) for b in bits]
            assert found == [0, 0, 1, 1]
        last = jnp.asarray(2**32 - 1, jnp.uint32)
        assert int(_algebra._chosen(last, (0.5, 0.5, 0.0))) == 1
        assert int(_algebra._chosen(jnp.asarray(0, jnp.uint32), (0.0, 1.0))) == 1

    def test_a_law_of_probability_one_is_always_chosen(self):
        law = noise.mixture([SGD, COV], [0.0, 1.0])
        assert law.covariance == COV.covariance
        # The draws of SGD have two values; Gaussian weights are all different.
        assert np.unique(draws(law, [0], 50)).size > 100


class TestColoured:
    COEFFICIENTS = (1.0, 0.5, -0.25)
    # The sum over i of c_i c_(i + lag), for lags 0 to 3.
    RHO = (1.3125, 0.375, -0.25, 0.0)

    @pytest.mark.parametrize("base", [COV, SGD], ids=["cov", "sgd"])
    @pytest.mark.parametrize("lag", [0, 1, 2, 3])
    def test_covariances_per_lag(self, base, lag):
        law = noise.coloured(base, self.COEFFICIENTS)
        exact = assert_covariance(law, 1, 1 + lag)
        assert exact.diagonal == pytest.approx(self.RHO[lag] * base.covariance.diagonal)

    def test_stationary_from_the_first_step(self):
        assert_covariance(noise.coloured(COV, self.COEFFICIENTS), 0, 0)
        assert_covariance(noise.coloured(COV, self.COEFFICIENTS), 0, 1)

    def test_deviations_are_sums_over_the_law_inside(self):
        law = noise.coloured(COV, (1.0, -1.0))
        v = [COV.sample(KEY, step).values for step in range(4)]
        for step in (1, 2, 3):
            np.testing.assert_allclose(
                law.sample(KEY, step).values - 1 / N, v[step] - v[step - 1], atol=5e-8
            )

    def test_anti_pgd_sums_stay_bounded(self):
        law = noise.coloured(COV, (1.0, -1.0))
        total = np.asarray(
            jax.vmap(lambda t: law.sample(KEY, t).values)(jnp.arange(200)), np.float64
        )
        # The sum telescopes to the difference of two independent draws. With independent steps its
        # variance would be 200 times as large.
        standard_error = np.sqrt(2 * COV.covariance.diagonal)
        assert_agree((total - 1 / N).sum(0), 0, standard_error, slack=1e-6)

    def test_with_one_coefficient_it_is_the_law_inside(self):
        weights, expected = noise.coloured(SGD, [1.0]).sample(KEY, 3), SGD.sample(KEY, 3)
        assert (weights.indices == expected.indices).all()
        assert (weights.values == expected.values).all()

    def test_it_is_sparse_if_the_coefficients_add_up_to_one(self):
        assert noise.coloured(SGD, (0.75, 0.25)).support_size == 2 * B
        assert noise.coloured(SGD, (1.0, -1.0)).support_size == N


class TestReweighted:
    FACTORS = np.array([0.0, 0.5, 0.5, 1.0, 1.0, 3.0])

    @pytest.mark.parametrize("law", [SGD, COV, noise.random_reshuffling(N, B)])
    def test_weights(self, law):
        own = noise.reweighted(law, self.FACTORS)
        for step in (0, 4):
            expected = law.sample(KEY, step).dense() * self.FACTORS
            np.testing.assert_allclose(own.sample(KEY, step).dense(), expected, rtol=1e-6)
        assert own.support_size == law.support_size

    def test_factors_may_depend_on_the_step(self):
        law = noise.reweighted(noise.gd(N), lambda indices, step: jnp.where(indices <= step, 2, 0))
        assert (law.sample(KEY, 2).values > 0).tolist() == [True] * 3 + [False] * 3

    def test_training_minimises_the_loss_of_the_examples_that_have_weights(self):
        n = jax.tree.leaves(PROBLEM.data)[0].shape[0]
        factors = np.where(np.arange(n) < n // 2, n / (n // 2), 0.0)
        step = train.make_step(
            loss_vector_fn, optax.sgd(0.1), noise.reweighted(noise.gd(n), factors)
        )
        state, metrics = step(train.init(PROBLEM.params, optax.sgd(0.1), KEY), PROBLEM.data)
        losses = loss_vector_fn(PROBLEM.params, PROBLEM.data)
        assert float(metrics.loss) == pytest.approx(float(losses[: n // 2].mean()), rel=1e-5)
        assert int(state.step) == 1


class TestAnyScale:
    @pytest.mark.parametrize(
        "make",
        [
            noise.fisher,
            noise.cov,
            lambda n, b: noise.estimated_cov(n, b, estimate_size=3),
            lambda n, b: noise.estimated_fisher(n, b, estimate_size=3),
            lambda n, b: noise.student_t(n, b, degrees_of_freedom=9),
        ],
    )
    @pytest.mark.parametrize("b", [0.25, 2.5, 100])
    def test_covariance(self, make, b):
        exact = assert_covariance(make(N, b), 0, 0, 10_000)
        one = make(N, 1).covariance
        assert exact.diagonal == pytest.approx(one.diagonal / b)

    def test_whole_numbers_are_one_value(self):
        assert noise.cov(N, 2.0) == noise.cov(N, 2)
        assert hash(noise.scaled(COV, 2.0)) == hash(noise.scaled(COV, np.float32(2)))


def test_laws_compare_by_value():
    for make in (
        lambda: noise.scaled(COV, 0.3),
        lambda: noise.sum_of(COV, SGD),
        lambda: noise.mixture([COV, SGD], [0.5, 0.5]),
        lambda: noise.coloured(SGD, (1, -1)),
        lambda: noise.reweighted(COV, TestReweighted.FACTORS),
    ):
        assert make() == make()
        assert hash(make()) == hash(make())
    assert noise.scaled(COV, 0.3) != noise.scaled(COV, 0.4)
    assert noise.reweighted(COV, np.ones(N)) != noise.reweighted(COV, TestReweighted.FACTORS)


MISTAKES = [
    ("scale", lambda: noise.scaled(COV, -1.0), "at least 0, got -1.0"),
    ("scale", lambda: noise.scaled(COV, float("nan")), "finite and at least 0, got nan"),
    ("scale", lambda: noise.scaled(COV, jnp.ones(2)), "must be a scalar"),
    ("scale", lambda: noise.scaled(COV, "big"), "must be a number, got 'big'"),
    ("scale(0)", lambda: noise.scaled(COV, lambda step: -1.0), "at least 0"),
    ("scale(0)", lambda: noise.scaled(COV, lambda step: jnp.ones(3)), "must be a scalar"),
    ("law", lambda: noise.scaled(0.5, COV), "must be a noise.MNoise"),
    ("laws", lambda: noise.sum_of(), "at least one law"),
    ("laws[1]", lambda: noise.sum_of(COV, 1), "must be a noise.MNoise"),
    ("laws", lambda: noise.sum_of(COV, noise.gd(7)), "same number of examples, got [6, 7]"),
    ("probabilities", lambda: noise.mixture([COV, SGD], [0.5]), "2 numbers"),
    ("probabilities", lambda: noise.mixture([COV, SGD], [0.9, 0.2]), "add up to 1"),
    ("probabilities", lambda: noise.mixture([COV, SGD], [1.5, -0.5]), "at least 0"),
    ("law", lambda: noise.mixture([noise.random_reshuffling(N, B)], [1.0]), "independent steps"),
    ("law", lambda: noise.coloured(noise.random_reshuffling(N, B), [1.0]), "independent steps"),
    ("coefficients", lambda: noise.coloured(COV, []), "at least one number"),
    ("coefficients", lambda: noise.coloured(COV, 1.0), "at least one number"),
    ("coefficients[1]", lambda: noise.coloured(COV, [1.0, float("inf")]), "must be finite"),
    ("coefficients[0]", lambda: noise.coloured(COV, ["a"]), "must be a number"),
    ("factors", lambda: noise.reweighted(COV, np.ones(5)), "shape (6,)"),
    ("factors", lambda: noise.reweighted(COV, 2 * np.ones(6)), "mean 1, got 2"),
    ("factors", lambda: noise.reweighted(COV, [2, 2, 2, 2, -2, 0]), "got -2.0 at example 4"),
    ("factors", lambda: noise.reweighted(COV, "classes"), "array of numbers or a function"),
    ("batch_size", lambda: noise.cov(N, 0), "above 0, got 0"),
    ("batch_size", lambda: noise.cov(N, 2e12 * N), "at most 1e12 x num_examples"),
    ("batch_size", lambda: noise.fisher(N, float("nan")), "above 0, got nan"),
    ("batch_size", lambda: noise.fisher(N, True), "must be a number"),
    ("law", lambda: noise.matching_scale(noise.reweighted(COV, np.ones(N))), "two numbers"),
    ("law", lambda: noise.reweighted(COV, np.ones(N)).covariance_between(0, 1), "two numbers"),
]


@pytest.mark.usefixtures("user_errors")
@pytest.mark.parametrize(("name", "call", "wrong"), MISTAKES, ids=[m[2] for m in MISTAKES])
def test_messages_name_the_argument_and_are_short(name, call, wrong):
    assert_told(call, name, wrong)
