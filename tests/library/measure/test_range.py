"""Gradients whose squares leave the range of float32: the noise scale is right, or says so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msgd_jax import loss, measure, noise

KEY = jax.random.key(0)
ROWS = np.random.default_rng(0).normal(1, 2, size=(20, 3)).astype(np.float32)


def in_unit(factor, rows=ROWS):
    """Linear losses: the gradient of an example is its row times the factor."""
    return loss.LossVector(lambda theta, g: factor * (g @ theta), jnp.asarray(rows))


def from_draws(losses):
    return measure.noise_scale_from_draws(losses, jnp.ones(3), noise.cov(20, 2), KEY, num_draws=5)


WAYS = {
    "exact": lambda losses: measure.noise_scale(losses, jnp.ones(3)),
    "of a population": lambda losses: measure.noise_scale(losses, jnp.ones(3), population=True),
    "from draws": from_draws,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("factor", [1e-9, 1e8])
def test_the_noise_scale_has_no_unit(way, factor):
    usual, other = (WAYS[way](in_unit(unit)).total for unit in (1.0, factor))
    assert other.noise_scale.value == pytest.approx(usual.noise_scale.value, rel=1e-4)
    np.testing.assert_allclose(other.interval, usual.interval, rtol=1e-3)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("factor", [1e-11, 1e-22])
def test_gradients_whose_squares_underflow_are_refused(way, factor):
    with pytest.raises(ValueError, match="gradients at params whose squares underflow in float32"):
        WAYS[way](in_unit(factor))


@pytest.mark.parametrize("way", WAYS)
def test_of_gradients_whose_squares_overflow_the_squares_are_said_to(way):
    with pytest.raises(ValueError, match="although all losses and gradients are: a square overfl"):
        WAYS[way](in_unit(1e20))


@pytest.mark.parametrize("way", WAYS)
def test_gradients_that_are_zero_are_taken(way):
    assert WAYS[way](in_unit(1.0, 0 * ROWS)).total.noise_scale.value == 0


@pytest.mark.parametrize("way", WAYS)
def test_under_jit_a_gradient_that_is_nan_makes_the_noise_scale_nan(way):
    """It was infinite, as that of a gradient of 0 is. Outside of `jax.jit` it is refused."""
    rows = ROWS.copy()
    rows[4, 1] = np.nan
    scale = jax.jit(lambda: WAYS[way](in_unit(1.0, rows)).total)()
    estimate = scale.noise_scale
    assert np.isnan(jnp.stack([estimate.value, estimate.standard_error, *scale.interval])).all()
