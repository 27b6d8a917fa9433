"""The covariance of grad(L . W) over many draws, and that of the samplers, entry by entry."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msgd_jax import covariance, loss, noise
from tests.support.noises import ROWS
from tests.support.problems import linear
from tests.support.statistics import bound

DRAWS = 20_000
N, B = 12, 4
Z = bound(300)  # 23 entries of the mean and 23 * 24 / 2 = 276 of the covariance


@functools.cache
def small_net():
    """Two layers with tanh and squared errors: 23 parameters and 12 examples."""
    rng = np.random.default_rng(0)
    shapes = {"w1": (3, 4), "b1": (4,), "w2": (4,), "b2": (3,)}
    params = {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}
    data = {"x": rng.normal(size=(N, 3)), "y": 2 + rng.normal(size=N)}
    data = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), data)

    @loss.per_example
    def loss_vector_fn(params, example):
        hidden = jnp.tanh((example["x"] + params["b2"]) @ params["w1"] + params["b1"])
        return (hidden @ params["w2"] - example["y"]) ** 2

    return loss_vector_fn, params, data


def by_hand() -> np.ndarray:
    """The gradient matrix of the small net by the chain rule, in numpy's float64: [N, D]."""
    _, params, data = small_net()
    p, d = (jax.tree.map(lambda x: np.asarray(x, np.float64), tree) for tree in (params, data))
    inputs = d["x"] + p["b2"]
    hidden = np.tanh(inputs @ p["w1"] + p["b1"])
    slope = 2 * (hidden @ p["w2"] - d["y"])[:, None]
    back = slope * p["w2"] * (1 - hidden**2)
    leaves = [back, back @ p["w1"].T, np.einsum("ni,nj->nij", inputs, back), slope * hidden]
    return np.concatenate([leaf.reshape(N, -1) for leaf in leaves], axis=1)  # b1, b2, w1, w2


def z_scores(draws: np.ndarray, mean: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """The largest distances of mean and covariance from the wanted ones, in standard errors.

    The standard errors come from the draws. Entries that are the same in all draws must be right
    to rounding.
    """
    deviations = np.asarray(draws, np.float64) - mean
    squares, count = deviations**2, len(deviations)
    covariance_found = deviations.T @ deviations / count
    # This needs no array of all products, [draws, D, D]:
    # Var(d_i d_j) = E d_i^2 d_j^2 - (E d_i d_j)^2.
    variance = np.maximum(squares.T @ squares / count - covariance_found**2, 0)
    rounding = 2e-6 * np.abs(mean).max()
    scores = []
    for found, spread, target, atol in (
        (deviations.mean(0), deviations.std(0), 0 * mean, rounding),
        (
            covariance_found,
            np.sqrt(variance),
            wanted,
            rounding**2 + 1e-6 * np.abs(wanted).max(),
        ),
    ):
        error = spread / np.sqrt(count) + atol / Z
        difference = np.abs(found - target)
        scores.append(np.divide(difference, error, where=difference > 0, out=0 * error).max())
    return scores[0], scores[1]


@functools.cache
def noisy_gradients(name: str) -> np.ndarray:
    """20,000 draws of grad(L . W): [draws, D]."""
    loss_vector_fn, params, data = small_net()
    law = ROWS[name].make(N, B)

    @jax.jit
    def draw(key):
        weights = jax.vmap(law.sample, in_axes=(None, 0))(key, jnp.arange(DRAWS))
        one = loss.weighted_value_and_grad(loss_vector_fn)
        grads = jax.vmap(lambda w: one(params, data, w)[1])(weights)
        return covariance.flatten(grads)

    return np.asarray(draw(jax.random.key(7)))


def target(law) -> np.ndarray:
    """The closed form, ``alpha G^T G + beta (G^T 1)(G^T 1)^T``, in numpy's float64."""
    rows, moments = by_hand(), law.covariance
    total = rows.sum(0)
    return moments.alpha * rows.T @ rows + moments.beta * np.outer(total, total)


def test_noise_covariance_is_the_closed_form_by_hand():
    loss_vector_fn, params, data = small_net()
    losses = loss.LossVector(loss_vector_fn, data)
    gradients = losses.gradient_matrix(params)
    np.testing.assert_allclose(covariance.flatten(gradients), by_hand(), atol=2e-5)
    for row in ROWS.values():
        law = row.make(N, B)
        wanted = target(law)
        atol = 1e-5 * max(np.abs(wanted).max(), 1e-3)
        found = covariance.noise_covariance(losses, params, law)
        np.testing.assert_allclose(found, wanted, atol=atol)


@pytest.mark.parametrize("name", list(ROWS))
def test_noisy_gradients_have_the_closed_form_as_covariance(name):
    law = ROWS[name].make(N, B)
    mean, wanted = by_hand().mean(0), target(law)
    of_mean, of_covariance = z_scores(noisy_gradients(name), mean, wanted)
    assert of_mean < Z
    assert of_covariance < Z


@pytest.mark.parametrize("name", ["sgd", "fisher", "cov", "sparse_cov"])
def test_near_misses_of_the_covariance_are_rejected(name):
    rows, law = by_hand(), ROWS[name].make(N, B)
    mean, draws = rows.mean(0), noisy_gradients(name)
    total = rows.sum(0)
    # One near miss is 8 % too large. The other is the empirical Fisher in place of the gradient
    # covariance, or the reverse.
    beta = -law.covariance.alpha / N if law.covariance.beta == 0 else 0.0
    swapped = law.covariance.alpha * rows.T @ rows + beta * np.outer(total, total)
    for wrong in (1.08 * target(law), swapped):
        assert z_scores(draws, mean, wrong)[1] > Z


SAMPLERS = {
    "svd": lambda matrix, rows: covariance.svd_sampler(matrix),
    "eigh": lambda matrix, rows: covariance.eigh_sampler(matrix),
    "cholesky": lambda matrix, rows: covariance.cholesky_sampler(matrix),
    "gradient matrix": lambda matrix, rows: covariance.gradient_sampler(
        *linear(rows), noise.cov(N, B)
    ),
    "diagonal": lambda matrix, rows: covariance.diagonal_sampler(jnp.diag(matrix)),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_have_the_covariance_of_the_cov_law(name):
    """Gradients with weights from `noise.cov` and draws of the samplers have the same, S/b."""
    rows = by_hand()
    wanted = np.cov(rows.T, bias=True) / B
    if name == "diagonal":
        wanted = np.diag(np.diag(wanted))
    else:
        assert z_scores(noisy_gradients("cov"), rows.mean(0), wanted)[1] < Z

    @jax.jit
    def draws(rows, key):
        sampler = SAMPLERS[name](covariance.sgd_covariance(*linear(rows)) / B, rows)
        return jax.vmap(sampler.sample, in_axes=(None, 0))(key, jnp.arange(DRAWS))

    drawn = draws(jnp.asarray(rows, jnp.float32), jax.random.key(3))
    assert max(z_scores(drawn, 0 * rows[0], wanted)) < Z
    assert z_scores(drawn, 0 * rows[0], 1.08 * wanted)[1] > Z


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.usefixtures("x64", "strict_dtypes")
def test_factors_multiply_to_the_covariance(name):
    rows = by_hand()
    wanted = np.cov(rows.T, bias=True) / B
    factor = np.asarray(SAMPLERS[name](jnp.asarray(wanted), jnp.asarray(rows)).factor)
    product = np.diag(factor**2) if name == "diagonal" else factor @ factor.T
    wanted = np.diag(np.diag(wanted)) if name == "diagonal" else wanted
    np.testing.assert_allclose(product, wanted, atol=1e-12 * np.abs(wanted).max())


def test_a_draw_is_a_pure_function_of_key_and_step():
    sampler = covariance.svd_sampler(jnp.diag(jnp.arange(3.0)))
    draw = jax.jit(sampler.sample)
    first = sampler.sample(jax.random.key(5), 2)
    np.testing.assert_allclose(draw(jax.random.key(5), 2), first, rtol=1e-6)
    assert (first[1:] != sampler.sample(jax.random.key(5), 3)[1:]).all()
    assert first[0] == 0


@pytest.mark.parametrize("name", SAMPLERS)
def test_narrow_covariances_are_factored_in_float32(name):
    rows = jnp.asarray(by_hand(), jnp.bfloat16)
    matrix = jnp.diag(jnp.arange(1.0, 4.0)).astype(jnp.bfloat16)
    sampler = SAMPLERS[name](matrix, rows)
    drawn = sampler.sample(jax.random.key(0), 0)
    assert (sampler.factor.dtype, drawn.dtype) == (jnp.float32, jnp.float32)
    assert jnp.isfinite(drawn).all()
