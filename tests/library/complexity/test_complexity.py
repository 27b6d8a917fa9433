"""Local complexities against closed forms, trust regions in float64, and enumeration."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from msgd_jax import complexity, noise
from tests.support.affine import (
    EXACT,
    KEY,
    affine,
    affine_losses,
    affine_supremum,
    examples,
    gaussian,
    of_problem,
    on_device,
    quadratic_losses,
    sample_data,
    trust_region,
)
from tests.support.statistics import assert_agree


def drawn(law, num_draws, key=KEY):
    """The vectors that `local_complexity` draws with this key, in float64: [num_draws, N]."""
    draws = jax.vmap(law.sample, in_axes=(None, 0))(key, jnp.arange(num_draws))
    return np.asarray(draws.dense(), np.float64)


class TestAgainstClosedForms:
    @pytest.mark.parametrize("radius", [0.0, 1e-3, 10.0])
    def test_the_suprema_of_affine_losses_are_exact(self, radius):
        """One step of the ascent is exact up to rounding."""
        law = gaussian(9)
        found = affine(9, law, radius, num_draws=8, key=KEY)
        expected = [affine_supremum(9, v, radius) for v in drawn(law, 8)]
        np.testing.assert_allclose(found.draws, expected, rtol=2e-6, atol=1e-7)
        np.testing.assert_allclose(found.first_order, expected, rtol=2e-6, atol=1e-7)
        assert (np.asarray(found.gap) < 1e-5).all()
        assert (np.asarray(found.agreeing) == 1).all()

    @pytest.mark.parametrize("radius", [0.3, 3.0])
    def test_the_suprema_of_quadratic_losses_are_those_of_the_trust_region(self, x64, radius):
        """The reference is the global solution of the trust region problem, by its equation."""
        n, law = 6, gaussian(6, jnp.float64)
        data = examples(n)
        smoothness = max(np.linalg.norm(h, 2) for h in data["h"])
        found = of_problem(
            complexity.local_complexity,
            quadratic_losses,
            jnp.zeros(4),
            on_device(data),
            law,
            radius=radius,
            num_draws=16,
            key=KEY,
            num_starts=4,
            num_steps=60,
            smoothness=smoothness,
        )
        expected = []
        for v in drawn(law, 16) / n:
            hessian, slope = np.einsum("n,nij->ij", v, data["h"]), v @ data["g"]
            high, low = trust_region(hessian, slope, radius), trust_region(-hessian, -slope, radius)
            expected.append(max(high + v @ data["l"], low - v @ data["l"]))
        np.testing.assert_allclose(found.draws, expected, rtol=1e-3)
        assert (found.draws <= np.array(expected) * (1 + 1e-9)).all()  # ascents find lower bounds
        assert (np.asarray(found.upper) >= expected).all()
        v = np.abs(drawn(law, 16))
        np.testing.assert_allclose(
            np.asarray(found.upper) - found.first_order,
            smoothness * radius**2 / 2 * v.mean(1),
            rtol=1e-9,
        )
        assert (found.gap < 0.01).all()
        if radius > 1:  # there are several local maxima: starts disagree, and the result says so
            assert found.agreeing.min() < 4
        else:
            assert (found.agreeing == 4).all()

    def test_the_complexity_of_one_example(self):
        """For N = 1 it is ``|v| (|l| + radius |g|)``, and Theorem 1 needs 2 examples."""
        found = affine(1, complexity.rademacher(1))
        assert found.draws.shape == (2,)
        assert found.mean == pytest.approx(affine_supremum(1, np.ones(1), 0.7), rel=1e-6)
        with pytest.raises(ValueError, match="at least 2 examples"):
            of_problem(
                complexity.sgd_inequality,
                affine_losses,
                jnp.zeros(4),
                on_device(examples(1)),
                batch_size=1,
                radius=1.0,
                num_draws=None,
            )

    def test_too_few_steps_are_reported(self):
        """Without a step, gaps are large, and the value is below that of a long ascent."""
        settings = {"radius": 3.0, "num_draws": 6, "key": KEY, "num_starts": 1}
        problem = (quadratic_losses, jnp.zeros(4), on_device(examples(6)), gaussian(6))
        short, long = (
            of_problem(complexity.local_complexity, *problem, num_steps=steps, **settings)
            for steps in (0, 40)
        )
        assert (long.draws >= short.draws).all()
        assert short.gap.max() > 10 * long.gap.max()
        assert (np.asarray(long.last_gain) < 1e-3).all()

    @pytest.mark.slow
    def test_the_optimizer_of_the_ascent_may_be_chosen(self):
        """Plain gradient ascent, in place of normalised steps, ends at the same height."""
        problem = (quadratic_losses, jnp.zeros(4), on_device(examples(6)), gaussian(6))
        settings = {"radius": 0.5, "num_draws": 6, "key": KEY, "num_starts": 1, "num_steps": 40}
        usual = of_problem(complexity.local_complexity, *problem, **settings)
        plain = of_problem(
            complexity.local_complexity, *problem, optimizer=optax.sgd(1.0), **settings
        )
        np.testing.assert_allclose(plain.draws, usual.draws, rtol=1e-3)
        settings |= {"num_steps": 1}  # after one step they differ: the choice is not ignored
        usual = of_problem(complexity.local_complexity, *problem, **settings)
        plain = of_problem(
            complexity.local_complexity, *problem, optimizer=optax.sgd(1.0), **settings
        )
        assert np.abs(plain.draws / usual.draws - 1).max() > 1e-3


class TestEnumeration:
    @pytest.mark.parametrize("n", [1, 3, 12])
    def test_rademacher_enumerates_all_signs(self, n):
        found = affine(n, complexity.rademacher(n))
        assert found.draws.shape == (2**n,)
        signs = itertools.product((1, -1), repeat=n)
        expected = np.mean([affine_supremum(n, np.array(s), 0.7) for s in signs])
        assert found.mean == pytest.approx(expected, rel=1e-5)
        assert found.standard_error == 0

    @pytest.mark.parametrize(("n", "b"), [(4, 1), (12, 5), (6, 6)])
    def test_sgd_without_replacement_enumerates_all_subsets(self, n, b):
        found = affine(n, complexity.sgd(n, b))
        assert found.draws.shape == (math.comb(n, b),)
        expected = []
        for subset in itertools.combinations(range(n), b):
            v = -np.ones(n)
            v[list(subset)] = n / b - 1
            expected.append(affine_supremum(n, v, 0.7))
        assert found.mean == pytest.approx(np.mean(expected), rel=1e-5, abs=1e-6)

    @pytest.mark.parametrize("signed", [False, True])
    def test_draws_with_replacement_are_enumerated_with_their_probabilities(self, signed):
        """The reference is a loop over all N^b ordered samples, with 2^b signs each if signed."""
        n, b = 4, 3
        law = (
            complexity.rademacher(n, b, replace=True)
            if signed
            else complexity.sgd(n, b, replace=True)
        )
        found, expected = affine(n, law), []
        for sample in itertools.product(range(n), repeat=b):
            for signs in itertools.product((1, -1) if signed else (1,), repeat=b):
                v = np.zeros(n) if signed else -np.ones(n)
                np.add.at(v, list(sample), n / b * np.array(signs))
                expected.append(affine_supremum(n, v, 0.7))
        assert found.mean == pytest.approx(np.mean(expected), rel=1e-5)
        assert found.probabilities.sum() == pytest.approx(1, rel=1e-6)
        assert found.draws.size < len(expected)  # equal vectors are computed once

    def test_rademacher_of_subsets_enumerates_subsets_and_signs(self):
        n, b = 5, 2
        expected = [
            affine_supremum(n, n / b * np.array(v), 0.7)
            for v in itertools.product((-1, 0, 1), repeat=n)
            if np.abs(v).sum() == b
        ]
        found = affine(n, complexity.rademacher(n, b))
        assert found.draws.size == len(expected) == 40
        assert found.mean == pytest.approx(np.mean(expected), rel=1e-5)

    @pytest.mark.parametrize(
        ("law", "message"),
        [
            (complexity.gaussian(9), "cannot be enumerated: give num_draws"),
            (noise.sgd(9, 2), "cannot be enumerated"),
            (complexity.rademacher(30), "has 1073741824, more than 200000"),
        ],
    )
    def test_what_cannot_be_enumerated_is_refused(self, law, message):
        with pytest.raises(ValueError, match=message):
            affine(law.num_examples, law)


LAWS = [
    complexity.rademacher(6, 2),
    complexity.sgd(6, 2, replace=True),
    complexity.rademacher(6),
    complexity.rademacher(6, 2, replace=True),
    complexity.sgd(6, 2),
]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_sampling_agrees_with_enumeration(law):
    """The mean of 400 draws is within its standard error of the enumerated one."""
    exact = affine(6, law)
    sampled = affine(6, law, num_draws=400, key=KEY)
    assert_agree(sampled.mean, exact.mean, sampled.standard_error)
    deviations = np.asarray(sampled.draws, np.float64).std(ddof=1)
    assert sampled.standard_error == pytest.approx(deviations / 20, rel=1e-4)


def test_gaussian_and_fisher_differ_by_the_factor_the_paper_leaves_out():
    """The v of M-SGD-Fisher is sqrt(N/b) g, and that of M-SGD-Cov is the same, centred."""
    n, b = 8, 2
    v = {
        name: drawn(complexity.from_noise(law), 3)
        for name, law in (("fisher", noise.fisher(n, b)), ("cov", noise.cov(n, b)))
    }
    g = drawn(complexity.gaussian(n), 3)
    np.testing.assert_allclose(v["fisher"], 2 * g, atol=2e-6)
    np.testing.assert_allclose(v["cov"], 2 * (g - g.mean(1, keepdims=True)), atol=2e-6)


def test_multipliers_of_a_subset_list_the_subset_only():
    """They are b values with their indices, so that no other losses are computed."""
    law = complexity.rademacher(50, 3)
    weights = law.sample(KEY, 0)
    assert weights.values.shape == (3,)
    assert np.unique(np.asarray(weights.indices)).size == 3
    np.testing.assert_allclose(np.abs(weights.values), 50 / 3, rtol=1e-6)


class TestDataDrawnAnew:
    def test_the_expectation_is_over_examples_too(self):
        """For standard normal losses l and slopes G, v . l and G v are normal, whatever v is.

        ``||G v|| / N`` is a chi with 4 degrees of freedom over sqrt(N), and ``|v . l| / N`` the
        size of a normal over sqrt(N). The two are independent.
        """
        found = of_problem(
            complexity.local_complexity,
            affine_losses,
            jnp.zeros(4),
            sample_data,
            complexity.rademacher(32),
            radius=10.0,
            key=KEY,
            num_draws=2000,
            **EXACT,
        )
        chi = math.sqrt(2) * math.gamma(2.5) / math.gamma(2)
        expected = (math.sqrt(2 / math.pi) + 10 * chi) / math.sqrt(32)
        assert_agree(found.mean, expected, found.standard_error, comparisons=2)
        variance = ((1 - 2 / math.pi) + 100 * (4 - chi**2)) / 32
        squares = (np.asarray(found.draws, np.float64) - expected) ** 2
        error = squares.std(ddof=1) / math.sqrt(2000)
        assert_agree(squares.mean(), variance, error, comparisons=2)
        assert error < 0.05 * variance

    @pytest.mark.slow
    def test_equal_keys_draw_the_same_data(self):
        """The draws for v = 2 are twice those for v = 1, bit for bit."""
        one, two = (
            complexity.Multipliers(
                "constant", 32, lambda key, c=c: noise.Weights(jnp.full(32, c), None, 32)
            )
            for c in (1.0, 2.0)
        )
        a, b = (
            of_problem(
                complexity.local_complexity,
                affine_losses,
                jnp.zeros(4),
                sample_data,
                law,
                radius=1.0,
                key=KEY,
                num_draws=3,
                **EXACT,
            ).draws
            for law in (one, two)
        )
        np.testing.assert_array_equal(2 * a, b)
        assert np.unique(a).size == 3


class TestSameNumbers:
    law = noise.fisher(7, 7)  # sqrt(N/b) = 1, so that v is that of `complexity.gaussian`

    def options(self, **changed):
        return {
            "radius": 1.0,
            "num_draws": 3,
            "key": KEY,
            "num_starts": 2,
            "num_steps": 5,
        } | changed

    def found(self, **changed):
        return of_problem(
            complexity.local_complexity,
            quadratic_losses,
            jnp.ones(4),
            on_device(examples(7)),
            self.law,
            **self.options(**changed),
        )

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "changed",
        [
            {"at_once": 5, "microbatch_size": 3},
            {"at_once": 1},
        ],
    )
    def test_passes_and_micro_batches_change_only_the_rounding(self, changed):
        np.testing.assert_allclose(self.found(**changed).draws, self.found().draws, rtol=2e-5)

    @pytest.mark.slow
    def test_draws_do_not_depend_on_their_number(self):
        np.testing.assert_allclose(self.found(num_draws=6).draws[:3], self.found().draws, rtol=1e-6)

    def test_radii_may_be_mapped_under_jit(self):
        params = jnp.ones(4)

        def mean(params, radius):
            return of_problem(
                complexity.local_complexity,
                quadratic_losses,
                params,
                on_device(examples(7)),
                self.law,
                **self.options(radius=radius),
            ).mean

        both = jax.jit(jax.vmap(mean, in_axes=(None, 0)))(params, jnp.array([0.5, 1.0]))
        np.testing.assert_allclose(both[1], self.found().mean, rtol=1e-5)
        assert both[0] < both[1]

    def test_parameters_may_be_pytrees(self):
        data = on_device(examples(7))

        def losses(params, batch):
            return quadratic_losses(jnp.concatenate([params["a"], params["b"][None]]), batch)

        params = {"a": jnp.ones(3), "b": jnp.ones(())}
        found = of_problem(
            complexity.local_complexity, losses, params, data, gaussian(7), **self.options()
        )
        np.testing.assert_allclose(found.first_order, self.found().first_order, rtol=1e-5)
        # The random starts differ, and end a little apart.
        np.testing.assert_allclose(found.draws, self.found().draws, rtol=0.01)
