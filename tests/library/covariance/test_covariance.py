"""Gradient matrix, covariances, spectrum and conversions of noise, against numpy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msgd_jax import covariance, loss, noise
from tests.support import problems
from tests.support.noises import ROWS, cases
from tests.support.problems import linear
from tests.support.statistics import assert_agree

LAWS = ["fisher", "sgd_covariance", noise.Exchangeable(0.3, 0.1), noise.Exchangeable(0.5, -0.01)]


@functools.cache
def by_hand(num_examples: int, dim: int = 5) -> np.ndarray:
    """The gradient matrix by numpy, [N, D], in the order of `ravel_pytree`: "b" before "w"."""
    with jax.enable_x64(True):
        leaves = problems.regression(num_examples, dim, jnp.float64).gradient_matrix()
    return np.concatenate([leaves["b"][:, None], leaves["w"]], axis=1)


def moments(law, num_examples: int) -> tuple[float, float]:
    """Alpha and beta of a law, or of a covariance by name."""
    if law == "fisher":
        return 1 / num_examples, 0.0
    if law == "sgd_covariance":
        return 1 / num_examples, -1 / num_examples**2
    law = getattr(law, "covariance", law)
    return law.alpha, law.beta


def dense(law, rows: np.ndarray) -> np.ndarray:
    """The definition of the covariance, ``alpha G^T G + beta (G^T 1)(G^T 1)^T``."""
    alpha, beta = moments(law, len(rows))
    total = rows.sum(0)
    return alpha * rows.T @ rows + beta * np.outer(total, total)


def close(got, wanted, tolerance=1e-12):
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("microbatch_size", [None, 1, 3, 100])
@pytest.mark.usefixtures("x64", "strict_dtypes")
def test_the_gradient_matrix_has_the_gradient_of_every_example(microbatch_size):
    problem = problems.regression(10, dtype=jnp.float64)
    losses = loss.LossVector(problems.loss_vector_fn, problem.data, microbatch_size=microbatch_size)
    gradients = losses.gradient_matrix(problem.params)
    jax.tree.map(close, gradients, problem.gradient_matrix())
    close(covariance.flatten(gradients), by_hand(10))
    first = jax.tree.map(lambda leaf: leaf[0], gradients)
    np.testing.assert_array_equal(
        covariance.flatten(gradients)[0], jax.flatten_util.ravel_pytree(first)[0]
    )


@pytest.mark.usefixtures("x64", "strict_dtypes")
def test_both_forms_of_the_gradient_covariance_are_that_of_numpy():
    rows = by_hand(40)
    wanted = np.cov(rows.T, bias=True)
    centred, definition = (
        jax.jit(functools.partial(covariance.sgd_covariance, form=form))(*linear(rows))
        for form in ("centred", "definition")
    )
    close(centred, definition)
    close(centred, wanted)
    close(covariance.fisher(*linear(rows)), rows.T @ rows / 40)
    close(centred, centred.T)


@pytest.mark.parametrize("num_examples", [1, 3, 40])
@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.usefixtures("x64", "strict_dtypes")
def test_covariance_diagonal_and_spectrum_agree_with_numpy(law, num_examples):
    rows = by_hand(num_examples)
    wanted = dense(law, rows)
    scale = max(np.abs(wanted).max(), 1e-3)
    np.testing.assert_allclose(
        covariance.noise_covariance(*linear(rows), law), wanted, atol=1e-13 * scale
    )
    np.testing.assert_allclose(
        covariance.diagonal(*linear(rows), law), np.diag(wanted), atol=1e-13 * scale
    )
    # There are min(N, D) eigenvalues: the others of the dense matrix are 0.
    found = jax.jit(covariance.spectrum, static_argnums=2)(*linear(rows), law)
    size = min(rows.shape)
    eigenvalues = np.linalg.eigvalsh(wanted)[::-1]
    np.testing.assert_allclose(found.eigenvalues, eigenvalues[:size], atol=1e-12 * scale)
    np.testing.assert_allclose(eigenvalues[size:], 0, atol=1e-12 * scale)
    # Eigenvectors of an eigenvalue of 0 may be missing, which is a vector of zeros; the others are
    # orthonormal.
    rebuilt = (found.eigenvectors.T * found.eigenvalues[None]) @ found.eigenvectors
    np.testing.assert_allclose(rebuilt, wanted, atol=1e-11 * scale)
    kept = np.asarray(found.eigenvectors)[np.asarray(jnp.any(found.eigenvectors != 0, axis=1))]
    np.testing.assert_allclose(kept @ kept.T, np.eye(len(kept)), atol=1e-6)


@pytest.mark.usefixtures("x64", "strict_dtypes")
def test_the_spectrum_by_the_gram_matrix_is_the_dense_one():
    rows = np.random.default_rng(0).normal(size=(12, 60)) + 1
    found = covariance.spectrum(*linear(rows), "sgd_covariance")
    assert found.eigenvalues.shape == (12,)
    values, vectors = np.linalg.eigh(np.cov(rows.T, bias=True))
    np.testing.assert_allclose(found.eigenvalues, values[::-1][:12], atol=1e-13 * values[-1])
    # Centred gradients span one direction fewer than there are examples.
    assert (np.asarray(found.eigenvectors[-1]) == 0).all()
    overlaps = np.abs(np.sum(found.eigenvectors[:11] * vectors.T[::-1][:11], axis=1))
    np.testing.assert_allclose(overlaps, 1, atol=1e-10)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(1, 6), st.integers(1, 6), st.floats(0, 3), st.floats(0, 3))
def test_any_covariance_of_weights_gives_a_positive_covariance(n, d, along, across):
    law = noise.Exchangeable(across + (along - across) / n, (along - across) / n)
    rows = np.random.default_rng(n * 10 + d).normal(size=(n, d)).astype(np.float32)
    matrix = np.asarray(covariance.noise_covariance(*linear(rows), law), np.float64)
    scale = (along + across + 1) * np.square(rows).sum()
    np.testing.assert_allclose(matrix, dense(law, rows.astype(np.float64)), atol=1e-5 * scale)
    assert np.linalg.eigvalsh(matrix).min() >= -1e-5 * scale


# The conversions depend on nothing of a law but its weights: every law is taken at one size, and
# extreme sizes are taken with a sparse and a dense law.
@pytest.mark.parametrize(
    ("name", "n", "b"),
    [
        *cases((7, 3)),
        *((name, *size) for name in ("sgd", "cov") for size in ((7, 7), (7, 1), (1, 1))),
    ],
)
@pytest.mark.usefixtures("x64", "strict_dtypes")
def test_weights_become_additive_noise_and_back(name, n, b):
    rows = np.random.default_rng(3).normal(size=(n, 20))  # gradients are independent: N <= D
    weights = ROWS[name].make(n, b, dtype=jnp.float64).sample(jax.random.key(0), 0)
    additive = covariance.to_additive(*linear(rows), weights)
    wanted = rows.T @ (np.asarray(weights.dense()) - 1 / n)
    np.testing.assert_allclose(additive, wanted, atol=1e-13)
    back = jax.jit(covariance.to_multiplicative)(*linear(rows), additive)
    np.testing.assert_allclose(back.weights.dense(), weights.dense(), atol=1e-13)
    assert back.residual < 1e-12


@pytest.mark.usefixtures("x64", "strict_dtypes")
def test_weights_for_additive_noise_are_those_of_least_norm_and_nearest():
    rng = np.random.default_rng(4)
    # Dependent gradients have many such weights, of which those of least norm are returned.
    rows = rng.normal(size=(20, 7))
    additive = jnp.asarray(rng.normal(size=7))
    found = covariance.to_multiplicative(*linear(rows), additive)
    close(covariance.to_additive(*linear(rows), found.weights), additive)
    assert found.residual < 1e-12
    deviations = np.asarray(found.weights.dense()) - 1 / 20
    close(deviations, np.linalg.pinv(rows.T) @ additive)
    # Three gradients do not span seven dimensions: the residual is what they cannot make.
    few = rng.normal(size=(3, 7))
    found = covariance.to_multiplicative(*linear(few), additive)
    outside = additive - few.T @ np.linalg.pinv(few.T) @ additive
    close(found.residual, np.linalg.norm(outside) / np.linalg.norm(additive))


@pytest.mark.usefixtures("strict_dtypes")
def test_narrow_gradients_are_multiplied_in_float32():
    losses = loss.LossVector(lambda p, g: g @ p["w"] + p["b"], jnp.ones((300, 4), jnp.bfloat16))
    params = {"w": jnp.zeros(4, jnp.bfloat16), "b": jnp.zeros((), jnp.bfloat16)}
    matrix = covariance.fisher(losses, params)  # in bfloat16, the sum of 300 would stop at 256
    diagonal = covariance.diagonal(losses, params, "fisher")
    assert {leaf.dtype for leaf in jax.tree.leaves(diagonal)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(diagonal["w"], 1, rtol=1e-6)
    assert matrix.dtype == jnp.float32
    np.testing.assert_allclose(matrix, np.ones((5, 5)), rtol=1e-6)


def test_gradients_and_draws_may_be_mapped():
    rows = jnp.asarray(by_hand(7), jnp.float32)
    law = noise.sgd(7, 3)
    scaled = jnp.arange(1.0, 4.0)[:, None, None] * rows[None]
    many = jax.vmap(lambda rows: covariance.noise_covariance(*linear(rows), law))(scaled)
    for k in range(3):
        close(many[k], (k + 1) ** 2 * dense(law, np.asarray(rows, np.float64)), 1e-5)
    draws = jax.vmap(law.sample, in_axes=(None, 0))(jax.random.key(0), jnp.arange(3))
    additive = jax.vmap(covariance.to_additive, in_axes=(None, None, 0))(*linear(rows), draws)
    weights = np.asarray(jax.vmap(noise.Weights.dense)(draws), np.float64)
    close(additive, (weights - 1 / 7) @ np.asarray(rows, np.float64), 1e-5)


# The functions of a loss vector, with their other arguments.
WEIGHTS = noise.sgd(4, 2).sample(jax.random.key(0), 0)
FUNCTIONS = {
    "fisher": (covariance.fisher,),
    "sgd_covariance": (covariance.sgd_covariance,),
    "noise_covariance": (covariance.noise_covariance, "fisher"),
    "diagonal": (covariance.diagonal, "fisher"),
    "spectrum": (covariance.spectrum, "fisher"),
    "gradient_sampler": (covariance.gradient_sampler, "fisher"),
    "noise_covariance_operator": (covariance.noise_covariance_operator, "fisher"),
    "to_additive": (covariance.to_additive, WEIGHTS),
    "to_multiplicative": (covariance.to_multiplicative, jnp.ones(3)),
}
OF_A_LAW = [name for name, (_, *rest) in FUNCTIONS.items() if rest == ["fisher"]]


@pytest.mark.usefixtures("user_errors")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_wrong_losses_and_parameters_are_refused(name):
    function, *rest = FUNCTIONS[name]
    losses, params = linear(jnp.ones((4, 3)))
    for wrong in (losses.loss_vector_fn, jnp.ones((4, 3)), "x" * 1000, None):
        with pytest.raises(TypeError, match=r"losses must be a loss\.LossVector, such") as error:
            function(wrong, params, *rest)
        assert len(str(error.value)) <= 400
    for bad, kind in ((jnp.ones(3, int), TypeError), ({}, ValueError), ("x" * 1000, TypeError)):
        with pytest.raises(kind, match="params ") as error:
            function(losses, bad, *rest)
        assert len(str(error.value)) <= 400


@pytest.mark.usefixtures("user_errors")
@pytest.mark.parametrize("name", OF_A_LAW)
def test_wrong_laws_are_refused(name):
    function, problem = FUNCTIONS[name][0], linear(jnp.ones((4, 3)))
    for value in (1.0, problem[0], WEIGHTS):
        with pytest.raises(TypeError, match=r"law must be a noise\.MNoise.* or 'sgd_covariance'"):
            function(*problem, value)
    with pytest.raises(ValueError, match="law must be one of 'fisher', 'sgd_covariance', got"):
        function(*problem, "x" * 1000)
    with pytest.raises(ValueError, match="num_examples = 5, but the data have 4 examples"):
        function(*problem, noise.gd(5))
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="must have finite alpha >= 0"):
            function(*problem, noise.Exchangeable(value, 0.0))
    for law in (noise.Exchangeable(0.1, 0.2), noise.Exchangeable(0.1, -0.09)):
        with pytest.raises(ValueError, match="to be a covariance of N = 4 weights, got alpha"):
            function(*problem, law)


@pytest.mark.usefixtures("user_errors")
def test_bad_input_is_refused():
    problem = linear(jnp.ones((4, 3)))
    with pytest.raises(ValueError, match="form must be one of 'centred', 'definition', got 'x"):
        covariance.sgd_covariance(*problem, form="x" * 1000)
    with pytest.raises(ValueError, match="All leaves of gradients must share the leading axis"):
        covariance.flatten({"a": jnp.ones((4, 3)), "b": jnp.ones(3)})
    with pytest.raises(TypeError, match=r"gradients.* must be an array, got"):
        covariance.flatten({"w": jax.nn.relu})
    with pytest.raises(ValueError, match="length D = 3, got shape"):
        covariance.to_multiplicative(*problem, jnp.ones(4))
    with pytest.raises(ValueError, match="num_examples = 5, but the data have 4"):
        covariance.to_additive(*problem, noise.gd(5).sample(jax.random.key(0), 0))
    with pytest.raises(TypeError, match=r"weights must be a noise\.Weights, got"):
        covariance.to_additive(*problem, jnp.ones(4))
    draws = jax.vmap(noise.sgd(4, 2).sample, (None, 0))(jax.random.key(0), jnp.arange(3))
    with pytest.raises(ValueError, match=r"one draw, got weights\.values of shape \(3, 2\)"):
        covariance.to_additive(*problem, draws)


@pytest.mark.parametrize("microbatch_size", [None, 3, 4])
@pytest.mark.parametrize("law", ["fisher", "sgd_covariance", noise.sgd(10, 3)], ids=str)
@pytest.mark.usefixtures("x64", "strict_dtypes")
def test_the_diagonal_is_accurate_far_from_zero(law, microbatch_size):
    """Gradients near 1e5 have variances near 1: a difference of squares would lose ten digits."""
    rows = by_hand(10) + 1e5
    losses, params = linear(rows)
    losses = loss.LossVector(losses.loss_vector_fn, losses.data, microbatch_size=microbatch_size)
    found = covariance.diagonal(losses, params, law)
    variance = {"fisher": (rows**2).mean(0), "sgd_covariance": rows.var(0)}
    wanted = variance[law] if isinstance(law, str) else 7 / 9 * rows.var(0) / 3
    np.testing.assert_allclose(found, wanted, rtol=1e-7)


@pytest.mark.parametrize("microbatch_size", [None, 2])
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_examples_may_be_spread_over_devices(microbatch_size, kind):
    problem, types = problems.regression(10), (getattr(jax.sharding.AxisType, kind),)
    spread = jax.NamedSharding(jax.make_mesh((4,), ("data",), axis_types=types), jax.P("data"))
    options = {"microbatch_size": microbatch_size, "sharding": spread}
    losses = loss.LossVector(problems.loss_vector_fn, problem.data, **options)
    matrix = covariance.noise_covariance(losses, problem.params, "sgd_covariance")
    close(matrix, dense("sgd_covariance", by_hand(10)), 1e-5)
    diagonal = covariance.diagonal(losses, problem.params, "sgd_covariance")
    wanted = np.diag(dense("sgd_covariance", by_hand(10)))
    close(jax.flatten_util.ravel_pytree(diagonal)[0], wanted, 1e-5)
    if kind == "Auto":
        operator = covariance.sgd_covariance_operator(losses, problem.params)
        close(operator.as_matrix(), dense("sgd_covariance", by_hand(10)), 1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_an_example_may_use_a_parameter_many_times(dtype):
    """In a text of 2,000 equal words, a gradient in bfloat16 would count about 256 of them."""

    def losses(params, tokens):
        looked_up = params.astype(dtype)[tokens, 0] / 2000
        return looked_up.astype(jnp.float32).sum(1)

    tokens = jnp.zeros((3, 2000), jnp.int32)
    for microbatch_size in (None, 2):
        vector = loss.LossVector(losses, tokens, microbatch_size=microbatch_size)
        found = vector.gradient_matrix(jnp.ones((1, 1)))
        np.testing.assert_allclose(found.ravel(), 1, rtol=0.02)


@pytest.mark.usefixtures("x64", "strict_dtypes")
def test_laws_of_dependent_steps_have_the_covariance_of_one_step():
    rows, law = by_hand(12), noise.random_reshuffling(12, 3)
    close(covariance.noise_covariance(*linear(rows), law), dense(law, rows))
    steps = jnp.arange(0, 8000, 5)  # epochs have 4 steps: these are independent
    draws = jax.jit(jax.vmap(law.sample, in_axes=(None, 0)))(jax.random.key(0), steps)
    weights = np.asarray(draws.dense())
    found = np.cov(rows.T @ weights.T)
    wanted = dense(law, rows)
    # The largest standard error that an entry has, if the draws are nearly Gaussian.
    assert_agree(found, wanted, np.abs(wanted).max() * np.sqrt(2 / len(weights)))
