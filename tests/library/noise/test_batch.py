"""Laws of weights for batches that a loader drew: their total covariances, and bad input.

The total covariance includes the draw of the batch, over which the references enumerate.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msgd_jax import noise
from tests.support.mistakes import assert_told
from tests.support.statistics import assert_agree

KEY = jax.random.key(3)


def total_moments(law, n, size):
    """Mean and covariance of the weights of all examples, over all batches of distinct ones.

    Examples outside the batch have weight 0.
    """
    inside = law.of(size).covariance.matrix(size)
    mean, second = np.zeros(n), np.zeros((n, n))
    batches = list(itertools.combinations(range(n), size))
    for batch in batches:
        index = np.ix_(batch, batch)
        mean[list(batch)] += 1 / size / len(batches)
        second[index] += (inside + 1 / size**2) / len(batches)
    return mean, second - np.outer(mean, mean)


@pytest.mark.parametrize(("n", "b", "size"), [(6, 2, 3), (6, 2, 6), (7, 1.5, 4), (5, 8, 5)])
def test_total_covariance_of_batch_cov_is_that_of_cov(n, b, size):
    mean, covariance = total_moments(noise.batch_cov(n, b), n, size)
    np.testing.assert_allclose(mean, 1 / n)
    np.testing.assert_allclose(covariance, noise.cov(n, b).covariance.matrix(n), atol=1e-15)


@pytest.mark.parametrize(("n", "b", "size"), [(6, 2, 4), (6, 2, 6), (7, 1.5, 4), (5, 1, 4)])
def test_total_covariance_of_batch_fisher_is_that_of_fisher(n, b, size):
    mean, covariance = total_moments(noise.batch_fisher(n, b), n, size)
    np.testing.assert_allclose(mean, 1 / n)
    np.testing.assert_allclose(covariance, noise.fisher(n, b).covariance.matrix(n), atol=1e-15)


@pytest.mark.parametrize(
    ("make", "target"), [(noise.batch_cov, noise.cov), (noise.batch_fisher, noise.fisher)]
)
def test_matching_gaussian_adds_the_target_to_the_draw_of_the_batch(make, target):
    """The total covariance less that of the batch's draw is the target's."""
    n, b, size = 6, 2, 3
    _, covariance = total_moments(make(n, b, matching="gaussian"), n, size)
    draw = noise.sgd(n, size).covariance.matrix(n)
    np.testing.assert_allclose(covariance - draw, target(n, b).covariance.matrix(n), atol=1e-15)


@pytest.mark.parametrize("make", [noise.batch_cov, noise.batch_fisher])
@pytest.mark.parametrize("matching", ["total", "gaussian"])
def test_covariance_of_the_gradient_on_independent_examples(make, matching):
    """Enumerates all batches of three out of four examples, drawn with replacement.

    The expected covariances are the S or F of the four gradients, over b.
    """
    b, size = 1.5, 3
    gradients = np.array([[1.0, 0.0, 2.0], [-1.0, 0.5, 1.0], [0.0, 3.0, -1.0], [2.0, 1.0, 1.0]])
    law = make(None, b, matching=matching).of(size)
    second = law.covariance.matrix(size) + 1 / size**2
    expected = np.zeros((3, 3))
    for batch in itertools.product(range(4), repeat=size):
        g = gradients[list(batch)]
        expected += g.T @ second @ g / 4**size
    mean = gradients.mean(0)
    covariance = expected - np.outer(mean, mean)
    fisher = gradients.T @ gradients / 4
    s = fisher - np.outer(mean, mean)
    target = s if make is noise.batch_cov else fisher
    sampling = s / size if matching == "gaussian" else 0
    np.testing.assert_allclose(covariance, target / b + sampling, atol=1e-14)


def test_scales_agree_with_those_worked_out_by_hand():
    """For N = 40 and b = 4, alpha and beta of the vector B W, B the size of the batch."""

    def squared(law, size):
        covariance = law.of(size).covariance
        return covariance.alpha * size**2, covariance.beta * size**2

    cov = noise.batch_cov(40, 4)
    assert squared(cov, 8)[0] == pytest.approx(1.3142857142857143)
    assert squared(cov, 16)[0] == pytest.approx(3.52)
    fisher = noise.batch_fisher(40, 4)
    assert squared(fisher, 8) == pytest.approx((1.0857142857142857, 0.1142857142857143))
    assert squared(fisher, 16) == pytest.approx((3.36, 0.04))
    assert squared(noise.batch_cov(40, 4, matching="gaussian"), 8)[0] == pytest.approx(
        2.2285714285714286
    )
    assert (cov.smallest, fisher.smallest) == (4, 5)


@pytest.mark.parametrize("make", [noise.batch_cov, noise.batch_fisher])
def test_draws_have_the_stated_moments(make):
    law = make(20, 3).of(6)
    w = jax.vmap(lambda step: law.sample(KEY, step).values)(jnp.arange(20_000))
    w = np.asarray(w, np.float64) - 1 / 6
    products = np.einsum("ki,kj->kij", w, w)
    spread = products.std(0) / np.sqrt(len(w))
    assert_agree(products.mean(0), law.covariance.matrix(6), spread, slack=1e-9)
    assert_agree(w.mean(0), 0, w.std(0) / np.sqrt(len(w)))


def test_laws_compare_by_value():
    assert noise.batch_cov(100, 5).of(20) == noise.batch_cov(100, 5.0).of(20)
    assert hash(noise.batch_cov(100, 5)) == hash(noise.batch_cov(100, 5))
    assert noise.batch_cov(100, 5) != noise.batch_fisher(100, 5)


MISTAKES = [
    ("at least 4 examples", lambda: noise.batch_cov(40, 4).of(3), "got 3"),
    ("at least 5 examples", lambda: noise.batch_fisher(40, 4).of(4), "drop_last"),
    ("at most num_examples = 40", lambda: noise.batch_cov(40, 4).of(41), "without replacement"),
    ("at least 4 examples", lambda: noise.batch_cov(None, 4).of(3), "batch_cov(None, 4"),
    ("num_examples", lambda: noise.batch_cov(1, 1), "at least 2"),
    ("batch_size", lambda: noise.batch_cov(40, -1), "above 0"),
    ("batch_size", lambda: noise.batch_cov(40, float("nan")), "above 0, got nan"),
    ("matching", lambda: noise.batch_cov(40, 4, matching="half"), "total"),
    ("number of examples", lambda: noise.batch_cov(40, 4).of(8.0), "must be an integer"),
    ("dtype", lambda: noise.batch_cov(40, 4, dtype=jnp.int32), "float"),
]


@pytest.mark.usefixtures("user_errors")
@pytest.mark.parametrize(("name", "call", "wrong"), MISTAKES, ids=[m[2] for m in MISTAKES])
def test_messages_name_the_argument_and_are_short(name, call, wrong):
    assert_told(call, name, wrong)
