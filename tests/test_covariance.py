"""Gradient matrix, covariances, spectrum and conversions, against numpy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msgd_jax import covariance, noise
from tests import problems
from tests.noises import ROWS, cases

LAWS = ["fisher", "sgd_covariance", noise.Exchangeable(0.3, 0.1), noise.Exchangeable(0.5, -0.01)]


@functools.cache
def by_hand(num_examples: int, dim: int = 5) -> np.ndarray:
    """The gradient matrix in numpy, [N, D], in the order of ravel_pytree ("b" before "w")."""
    with jax.enable_x64(True):
        leaves = problems.regression(num_examples, dim, jnp.float64).gradient_matrix()
    return np.concatenate([leaves["b"][:, None], leaves["w"]], axis=1)


def moments(law, num_examples: int) -> tuple[float, float]:
    if law == "fisher":
        return 1 / num_examples, 0.0
    if law == "sgd_covariance":
        return 1 / num_examples, -1 / num_examples**2
    law = getattr(law, "covariance", law)
    return law.alpha, law.beta


def dense(law, rows: np.ndarray) -> np.ndarray:
    """The definition, alpha G^T G + beta (G^T 1)(G^T 1)^T."""
    alpha, beta = moments(law, len(rows))
    total = rows.sum(0)
    return alpha * rows.T @ rows + beta * np.outer(total, total)


def close(got, wanted, tolerance=1e-12):
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("microbatch_size", [None, 1, 3, 100])
@pytest.mark.usefixtures("x64", "strict_dtypes")
def test_gradient_matrix_is_every_examples_gradient(microbatch_size):
    problem = problems.regression(10, dtype=jnp.float64)
    matrix = jax.jit(
        functools.partial(
            covariance.gradient_matrix, problems.loss_vector_fn, microbatch_size=microbatch_size
        )
    )
    gradients = matrix(problem.params, problem.data)
    jax.tree.map(close, gradients, problem.gradient_matrix())
    close(covariance.flatten(gradients), by_hand(10))
    first = jax.tree.map(lambda leaf: leaf[0], gradients)
    np.testing.assert_array_equal(
        covariance.flatten(gradients)[0], jax.flatten_util.ravel_pytree(first)[0]
    )


@pytest.mark.usefixtures("x64", "strict_dtypes")
def test_both_forms_of_the_gradient_covariance_agree_and_equal_numpys():
    rows = by_hand(40)
    wanted = np.cov(rows.T, bias=True)
    centred, definition = (
        jax.jit(functools.partial(covariance.sgd_covariance, form=form))(rows)
        for form in ("centred", "definition")
    )
    close(centred, definition)  # Eq. 15 and the definition, to 1e-12
    close(centred, wanted)
    close(covariance.fisher(rows), rows.T @ rows / 40)
    close(centred, centred.T)


@pytest.mark.parametrize("num_examples", [1, 3, 40])
@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.usefixtures("x64", "strict_dtypes")
def test_covariance_diagonal_and_spectrum_of_any_law(law, num_examples):
    rows = by_hand(num_examples)
    wanted = dense(law, rows)
    scale = max(np.abs(wanted).max(), 1e-3)
    np.testing.assert_allclose(covariance.noise_covariance(law, rows), wanted, atol=1e-13 * scale)
    np.testing.assert_allclose(covariance.diagonal(law, rows), np.diag(wanted), atol=1e-13 * scale)
    found = jax.jit(functools.partial(covariance.spectrum, law))(rows)
    size = min(rows.shape)
    eigenvalues = np.linalg.eigvalsh(wanted)[::-1]
    np.testing.assert_allclose(found.eigenvalues, eigenvalues[:size], atol=1e-12 * scale)
    np.testing.assert_allclose(eigenvalues[size:], 0, atol=1e-12 * scale)
    rebuilt = (found.eigenvectors.T * found.eigenvalues[None]) @ found.eigenvectors
    np.testing.assert_allclose(rebuilt, wanted, atol=1e-11 * scale)
    kept = np.asarray(found.eigenvectors)[np.asarray(jnp.any(found.eigenvectors != 0, axis=1))]
    np.testing.assert_allclose(kept @ kept.T, np.eye(len(kept)), atol=1e-6)


@pytest.mark.usefixtures("x64", "strict_dtypes")
def test_gram_spectrum_of_many_parameters_equals_the_dense_one():
    rows = np.random.default_rng(0).normal(size=(12, 60)) + 1
    found = covariance.spectrum("sgd_covariance", rows)
    assert found.eigenvalues.shape == (12,)
    values, vectors = np.linalg.eigh(np.cov(rows.T, bias=True))
    np.testing.assert_allclose(found.eigenvalues, values[::-1][:12], atol=1e-13 * values[-1])
    assert (np.asarray(found.eigenvectors[-1]) == 0).all()  # centred: one direction fewer
    overlaps = np.abs(np.sum(found.eigenvectors[:11] * vectors.T[::-1][:11], axis=1))
    np.testing.assert_allclose(overlaps, 1, atol=1e-10)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.floats(0, 3), st.floats(0, 3))
def test_any_covariance_of_weights_gives_a_positive_covariance(n, d, along, across):
    law = noise.Exchangeable(across + (along - across) / n, (along - across) / n)
    rows = np.random.default_rng(n * 10 + d).normal(size=(n, d)).astype(np.float32)
    matrix = np.asarray(covariance.noise_covariance(law, rows), np.float64)
    scale = (along + across + 1) * np.square(rows).sum()
    np.testing.assert_allclose(matrix, dense(law, rows.astype(np.float64)), atol=1e-5 * scale)
    assert np.linalg.eigvalsh(matrix).min() >= -1e-5 * scale


# The conversions see the weights alone: every law once, extreme sizes with one of each kind.
@pytest.mark.parametrize(
    ("name", "n", "b"),
    [
        *cases((7, 3)),
        *((name, *size) for name in ("sgd", "cov") for size in ((7, 7), (7, 1), (1, 1))),
    ],
)
@pytest.mark.usefixtures("x64", "strict_dtypes")
def test_weights_to_additive_noise_and_back(name, n, b):
    rows = np.random.default_rng(3).normal(size=(n, 20))  # independent gradients: N <= D
    weights = ROWS[name].make(n, b, dtype=jnp.float64).sample(jax.random.key(0), 0)
    additive = covariance.to_additive(weights, rows)
    wanted = rows.T @ (np.asarray(weights.dense()) - 1 / n)
    np.testing.assert_allclose(additive, wanted, atol=1e-13)
    back = jax.jit(covariance.to_multiplicative)(additive, rows)
    np.testing.assert_allclose(back.weights.dense(), weights.dense(), atol=1e-13)
    assert back.residual < 1e-12


@pytest.mark.usefixtures("x64", "strict_dtypes")
def test_back_from_additive_noise_where_it_is_not_unique_or_not_possible():
    rng = np.random.default_rng(4)
    rows = rng.normal(size=(20, 7))  # dependent gradients: the weights of least norm
    additive = jnp.asarray(rng.normal(size=7))
    found = covariance.to_multiplicative(additive, rows)
    close(covariance.to_additive(found.weights, rows), additive)
    assert found.residual < 1e-12
    deviations = np.asarray(found.weights.dense()) - 1 / 20
    close(deviations, np.linalg.pinv(rows.T) @ additive)
    few = rng.normal(size=(3, 7))  # three gradients do not span seven dimensions
    found = covariance.to_multiplicative(additive, few)
    outside = additive - few.T @ np.linalg.pinv(few.T) @ additive
    close(found.residual, np.linalg.norm(outside) / np.linalg.norm(additive))


@pytest.mark.usefixtures("strict_dtypes")
def test_narrow_gradients_are_multiplied_in_float32():
    gradients = {"w": jnp.ones((300, 4), jnp.bfloat16), "b": jnp.ones(300, jnp.bfloat16)}
    matrix = covariance.fisher(gradients)  # in bfloat16 the sum would stop at 256
    assert matrix.dtype == jnp.float32
    np.testing.assert_allclose(matrix, np.ones((5, 5)), rtol=1e-6)


def test_under_vmap_over_gradients_and_over_draws():
    rows = jnp.asarray(by_hand(7), jnp.float32)
    law = noise.sgd(7, 3)
    scaled = jnp.arange(1.0, 4.0)[:, None, None] * rows[None]
    many = jax.vmap(functools.partial(covariance.noise_covariance, law))(scaled)
    for k in range(3):
        close(many[k], (k + 1) ** 2 * dense(law, np.asarray(rows, np.float64)), 1e-5)
    draws = jax.vmap(law.sample, in_axes=(None, 0))(jax.random.key(0), jnp.arange(3))
    additive = jax.vmap(covariance.to_additive, in_axes=(0, None))(draws, rows)
    weights = np.asarray(jax.vmap(noise.Weights.dense)(draws), np.float64)
    close(additive, (weights - 1 / 7) @ np.asarray(rows, np.float64), 1e-5)


@pytest.mark.usefixtures("user_errors")
def test_bad_input_is_refused():
    rows = jnp.ones((4, 3))
    problem = problems.regression(4)
    with pytest.raises(ValueError, match="form must be one of 'centred', 'definition', got 'x'"):
        covariance.sgd_covariance(rows, form="x")
    with pytest.raises(ValueError, match="num_examples = 5, but the gradients are of 4 examples"):
        covariance.noise_covariance(noise.gd(5), rows)
    with pytest.raises(ValueError, match="noise must be one of 'fisher', 'sgd_covariance', got"):
        covariance.spectrum("hessian", rows)
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="noise must have finite alpha >= 0"):
            covariance.noise_covariance(noise.Exchangeable(value, 0.0), rows)
    with pytest.raises(ValueError, match="gradients must have at least 1 example"):
        covariance.fisher(jnp.ones((0, 3)))
    with pytest.raises(ValueError, match="data must have at least 1 example"):
        covariance.gradient_matrix(problems.loss_vector_fn, problem.params, jnp.ones((0, 3)))
    with pytest.raises(TypeError, match=r"'fisher' or 'sgd_covariance', got 1\.0 of type float"):
        covariance.diagonal(1.0, rows)
    for law in (noise.Exchangeable(0.1, 0.2), noise.Exchangeable(0.1, -0.09)):
        with pytest.raises(ValueError, match="to be a covariance of N = 4 weights, got alpha"):
            covariance.noise_covariance(law, rows)
    with pytest.raises(TypeError, match="gradients must be floating point"):
        covariance.fisher(jnp.ones((4, 3), int))
    with pytest.raises(ValueError, match="All leaves of gradients must share the leading axis"):
        covariance.flatten({"a": rows, "b": jnp.ones(3)})
    with pytest.raises(ValueError, match="length D = 3, got shape"):
        covariance.to_multiplicative(jnp.ones(4), rows)
    with pytest.raises(ValueError, match="num_examples = 5, but the gradients are of 4"):
        covariance.to_additive(noise.gd(5).sample(jax.random.key(0), 0), rows)
    with pytest.raises(TypeError, match=r"weights must be a noise\.Weights, got"):
        covariance.to_additive(jnp.ones(4), rows)
    draws = jax.vmap(noise.sgd(4, 2).sample, (None, 0))(jax.random.key(0), jnp.arange(3))
    with pytest.raises(ValueError, match=r"one draw, got weights\.values of shape \(3, 2\)"):
        covariance.to_additive(draws, rows)
    with pytest.raises(ValueError, match=r"one loss per example, shape \(1,\), got shape \(\)"):
        covariance.gradient_matrix(lambda p, b: p.sum(), jnp.ones(2), rows)
    with pytest.raises(ValueError, match="microbatch_size must be at least 1, got 0"):
        covariance.gradient_matrix(
            problems.loss_vector_fn, problem.params, problem.data, microbatch_size=0
        )


SWAPPED = {
    "noise_covariance": covariance.noise_covariance,
    "diagonal": covariance.diagonal,
    "spectrum": covariance.spectrum,
    "gradient_sampler": covariance.gradient_sampler,
}
# Long reprs, of which a message shows the beginning.
GRADIENTS = {"array": jnp.ones((4, 3)), "layers": {f"layer_{i}": jnp.ones(4) for i in range(40)}}


@pytest.mark.usefixtures("user_errors")
@pytest.mark.parametrize("gradients", GRADIENTS.values(), ids=GRADIENTS)
@pytest.mark.parametrize("name", SWAPPED)
def test_swapped_arguments_are_told_their_order(name, gradients):
    for law in (noise.sgd(4, 2), noise.Exchangeable(0.3, 0.1), "fisher"):
        for wrong in ((gradients, law), (law, law)):
            with pytest.raises(TypeError, match=rf"order is {name}\(noise, gradients\)") as error:
                SWAPPED[name](*wrong)
            assert len(str(error.value)) <= 400
    with pytest.raises(ValueError, match="must be one of 'fisher', 'sgd_covariance', got") as error:
        SWAPPED[name]("x" * 1000, gradients)
    assert len(str(error.value)) <= 400


@pytest.mark.usefixtures("user_errors")
def test_swapped_arguments_of_the_conversions_are_told_their_order():
    rows, weights = jnp.ones((4, 3)), noise.sgd(4, 2).sample(jax.random.key(0), 0)
    with pytest.raises(TypeError, match=r"order is to_additive\(weights, gradients\)"):
        covariance.to_additive(rows, weights)
    with pytest.raises(ValueError, match=r"order is to_multiplicative\(additive, gradients\)"):
        covariance.to_multiplicative(rows, jnp.ones(3))


@pytest.mark.usefixtures("user_errors")
@pytest.mark.parametrize("bad", ["float32", ["x" * 1000], {"w": jax.nn.relu}], ids=type)
def test_what_is_no_array_is_named(bad):
    for function in (covariance.flatten, covariance.fisher, covariance.sgd_covariance):
        with pytest.raises(TypeError, match=r"gradients.* must be an array, got") as error:
            function(bad)
        assert len(str(error.value)) <= 400
    with pytest.raises(ValueError, match="form must be one of") as long:
        covariance.sgd_covariance(jnp.ones((4, 3)), form="x" * 1000)
    assert len(str(long.value)) <= 400


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_an_example_may_use_a_parameter_many_times(dtype):
    """A text of one word: in bfloat16 its gradient would be 256 or so instead of 2,000."""

    def losses(params, tokens):
        looked_up = params.astype(dtype)[tokens, 0] / 2000
        return looked_up.astype(jnp.float32).sum(1)

    tokens = jnp.zeros((3, 2000), jnp.int32)
    for microbatch_size in (None, 2):
        found = covariance.gradient_matrix(
            losses, jnp.ones((1, 1)), tokens, microbatch_size=microbatch_size
        )
        np.testing.assert_allclose(found.ravel(), 1, rtol=0.02)


@pytest.mark.usefixtures("x64", "strict_dtypes")
def test_correlated_steps_have_the_covariance_of_one_step():
    rows, law = by_hand(12), noise.random_reshuffling(12, 3)
    close(covariance.noise_covariance(law, rows), dense(law, rows))
    steps = jnp.arange(0, 8000, 5)  # each of an epoch of its own
    draws = jax.jit(jax.vmap(law.sample, in_axes=(None, 0)))(jax.random.key(0), steps)
    weights = np.asarray(draws.dense())
    found = np.cov(rows.T @ weights.T)
    wanted = dense(law, rows)
    assert np.abs(found - wanted).max() < 5 * np.abs(wanted).max() * np.sqrt(2 / len(weights))
