"""The authors' own form of [M-SGD-Cov]-B, whose normals are centred within ghost batches."""

import itertools

import jax
import numpy as np
import pytest

from experiments.training import ALGORITHMS, NoiseSettings
from experiments.training._ghost_cov import ghost_cov
from msgd_jax import noise
from msgd_jax._streams import Stream, derive
from tests.support.statistics import assert_agree, assert_rejected

N, B, SIZE, GHOST = 7, 2, 4, 2


def draws_of(law, count):
    """Dense weights of the first steps, [count, N]."""
    key = jax.random.key(0)
    return np.asarray(jax.vmap(lambda step: law.sample(key, step).dense())(np.arange(count)))


def second_moments(weights):
    """The mean square of W_i - 1/N and the mean product of two of them, with standard errors."""
    centred = weights - 1 / N
    squares = (centred**2).mean(1)
    products = (centred.sum(1) ** 2 - (centred**2).sum(1)) / (N * (N - 1))
    both = np.stack([squares, products])
    return both.mean(1), both.std(1, ddof=1) / np.sqrt(len(weights))


def test_moments_are_those_of_cov():
    """The variance and the covariance of 40,000 draws; a near miss has b = 2.1 for b = 2."""
    found, error = second_moments(
        draws_of(ghost_cov(N, B, support_size=SIZE, ghost_size=GHOST), 40_000)
    )
    exact, wrong = (
        [law.covariance.diagonal, law.covariance.beta]
        for law in (noise.cov(N, B), noise.cov(N, 2.1))
    )
    assert_agree(found, exact, error)
    assert_rejected(found, wrong, error)


def test_the_scale_is_that_of_an_enumeration():
    """All ordered draws of B of N examples, with the normals integrated by hand, add up to cov."""
    law = ghost_cov(N, B, support_size=SIZE, ghost_size=GHOST)
    projection = np.kron(np.eye(SIZE // GHOST), np.eye(GHOST) - 1 / GHOST)
    # The scale itself, from draws: B W - 1 = s (eps - mean), whose mean square is s^2 (m - 1)/m.
    key = jax.random.key(1)
    values = jax.vmap(lambda step: law.sample(key, step).values)(np.arange(1))[0]
    normal_key = derive(law_key(key), Stream.CASES, 1)
    normals = np.asarray(jax.random.normal(normal_key, (SIZE // GHOST, GHOST)))
    centred = (normals - normals.mean(1, keepdims=True)).reshape(-1)
    (scale,) = np.linalg.lstsq(centred[:, None], np.asarray(values) * SIZE - 1)[0]
    total = np.zeros((N, N))
    orders = list(itertools.permutations(range(N), SIZE))
    for order in orders:
        place = np.eye(N)[:, list(order)]
        mean = place.sum(1) / SIZE - 1 / N
        total += np.outer(mean, mean) + place @ projection @ place.T * (scale / SIZE) ** 2
    exact = noise.cov(N, B).covariance.matrix(N)
    np.testing.assert_allclose(total / len(orders), exact, rtol=1e-5, atol=1e-7)


def law_key(key):
    """The key that `sample` gives to a draw at step 0."""
    seen = []

    def draw(own):
        seen.append(jax.random.key_data(own))
        return noise.gd(N).draw(own)

    with jax.disable_jit():
        noise.MNoise("spy", N, N, noise.Exchangeable(0.0, 0.0), draw).sample(key, 0)
    return jax.random.wrap_key_data(seen[-1])  # the first is of the law's own check


def test_each_ghost_batch_has_its_share_of_the_weight():
    """In the paper's form, only all of the weights of a step add up to a constant."""
    settings = NoiseSettings(batch_size=10, support_size=300)
    sums = {}
    for name in ("m-sgd-ghost-cov", "m-sgd-sparse-cov"):
        law = ALGORITHMS[name].make(1000, settings)
        weights = law.sample(jax.random.key(0), 3)
        assert np.unique(weights.indices).size == 300
        sums[name] = np.asarray(weights.values, np.float64).reshape(3, 100).sum(1)
    np.testing.assert_allclose(sums["m-sgd-ghost-cov"], 1 / 3, rtol=1e-5)
    assert np.ptp(sums["m-sgd-sparse-cov"]) > 0.05
    np.testing.assert_allclose(sums["m-sgd-sparse-cov"].sum(), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 11, 4, 2), "batch_size must be between 1 and 10, got 11"),
        ((10, 2, 5, 2), "support_size must be a multiple of 2 .* up to 10, got 5"),
        ((10, 2, 12, 2), "support_size must be a multiple of 2 .* up to 10, got 12"),
        ((10, 2, 4, 1), "ghost_size must be at least 2, got 1"),
        ((100, 50, 10, 2), "support_size must be at least 34, got 10"),
    ],
)
def test_bad_numbers(arguments, message):
    n, b, size, ghost = arguments
    with pytest.raises(ValueError, match=message):
        ghost_cov(n, b, support_size=size, ghost_size=ghost)
