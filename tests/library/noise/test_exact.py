"""The covariances that laws state, against exact enumeration in rational arithmetic."""

import itertools
from fractions import Fraction

import jax
import numpy as np
import pytest

from msgd_jax import noise


def subset_law(n: int, size: int, outside: Fraction, inside: Fraction, variance, centred: bool):
    """The two numbers of the covariance of a law that draws a subset, then Gaussian weights on it.

    Weights are `outside` for examples that are not in the subset, and `inside` plus a Gaussian for
    those that are. `variance` is that of one Gaussian before they are centred over the subset. All
    subsets are enumerated, and the Gaussian part is integrated by hand.
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
    """The covariances that laws state, for every b and m, against enumeration over all subsets."""
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
    """The same for the sparse laws, for every b and support size B.

    Where the draw of the support alone varies too much, no Gaussian can match the total: the
    scale by hand is negative, and the law must be refused.
    """
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


# The root of 2 l - 1 is rational here: 1, 3, 5.
@pytest.mark.parametrize("refinement", [1, 5, 13])
@pytest.mark.parametrize("n", range(1, 7))
def test_covariances_of_svag_are_exact(n, refinement):
    """The reference enumerates all pairs of subsets."""
    root = {1: 1, 5: 3, 13: 5}[refinement]
    p, q = Fraction(1 + root, 2), Fraction(1 - root, 2)
    for b in range(1, n + 1):
        subsets = list(itertools.combinations(range(n), b))
        mean, square, product = Fraction(0), Fraction(0), Fraction(0)
        for one, other in itertools.product(subsets, repeat=2):
            first, second = ((p * (i in one) + q * (i in other)) / b for i in range(2))
            mean += first / len(subsets) ** 2
            square += first**2 / len(subsets) ** 2
            product += first * second / len(subsets) ** 2
        assert mean == Fraction(1, n)
        exact = square - mean**2, product - mean**2 if n > 1 else Fraction(0)
        assert agree(noise.svag(noise.sgd(n, b), refinement).covariance, exact)
        stated = noise.svag(noise.cov(n, b), refinement).covariance
        diagonal = refinement * Fraction(n - 1, b * n**2)
        assert agree(stated, (diagonal, -diagonal / (n - 1) if n > 1 else Fraction(0)))


def test_svag_approaches_its_sde_in_law():
    """Fourth moments on losses c_i theta^2 / 2, whose SDE is geometric Brownian motion.

    Every step multiplies theta by 1 - (eta / l) c . W, so the moments are powers of one
    expectation. It is enumerated over all pairs of subsets, with the weights of a draw.
    """
    c, b, eta, num_steps = np.array([0.2, 0.5, 1.1, 2.6]), 2, 0.4, 5
    subsets = np.array(list(itertools.combinations(range(4), b)))
    base = noise.sgd(4, b)
    across = base.covariance.alpha * c @ c + base.covariance.beta * c.sum() ** 2
    exact = np.exp(eta * num_steps * (-4 * c.mean() + 6 * eta * across))

    def error(refinement: int, law: noise.MNoise) -> float:
        drawn = law.draw(jax.random.key(0)).values
        halves = np.asarray(drawn, np.float64).reshape(-1, b)
        products = [c[subsets] @ half for half in halves]
        sums = np.add.outer(*products) if len(products) == 2 else products[0]
        moment = ((1 - eta / refinement * sums) ** 4).mean() ** (refinement * num_steps)
        return abs(moment / exact - 1)

    errors = [error(k, noise.svag(base, k)) for k in (1, 8, 16, 32, 64)]
    assert errors[0] > 0.5
    ratios = np.divide(errors[1:-1], errors[2:])
    assert ((ratios > 1.8) & (ratios < 2.2)).all(), errors  # the weak error falls like 1/l
    # A near miss: SGD itself in smaller steps loses its noise, and approaches gradient flow.
    assert error(64, base) > 0.3


def test_matching_scale_gives_rademacher_the_variance_of_the_target():
    for target in (noise.fisher(50, 7), noise.cov(50, 7), noise.sgd(50, 7)):
        scale = noise.matching_scale(target)
        matched = noise.rademacher(50, scale).covariance
        assert matched.diagonal == pytest.approx(target.covariance.diagonal, rel=1e-12)
    assert noise.matching_scale(noise.sgd(50, 7)) == pytest.approx(np.sqrt(43 / 7), rel=1e-12)
