"""Matrix-free operators: products and solves, against dense numpy in float64."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from msgd_jax import covariance, noise
from tests import problems
from tests.test_covariance import by_hand, close, dense

N = 10
OPERATORS = {
    "fisher": covariance.fisher_operator,
    "sgd_covariance": covariance.sgd_covariance_operator,
    "cov": lambda *args, **kw: covariance.noise_covariance_operator(noise.cov(N, 4), *args, **kw),
    "rademacher": lambda *args, **kw: covariance.noise_covariance_operator(
        noise.rademacher(N, 2.0), *args, **kw
    ),
}


def wanted(name: str) -> np.ndarray:
    laws = {"cov": noise.cov(N, 4), "rademacher": noise.rademacher(N, 2.0)}
    return dense(laws.get(name, name), by_hand(N))


@pytest.mark.parametrize("microbatch_size", [None, 1, 3, 5, 100])
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.usefixtures("x64", "strict_dtypes")
def test_products_are_those_of_the_dense_matrix(name, microbatch_size):
    problem = problems.regression(N, dtype=jnp.float64)

    @jax.jit
    def product_and_matrix(params, data, vector):
        operator = OPERATORS[name](
            problems.loss_vector_fn, params, data, microbatch_size=microbatch_size
        )
        return operator.mv(vector), operator.as_matrix()

    vector = {"w": jnp.arange(5.0), "b": jnp.asarray(-2.0)}
    product, matrix = product_and_matrix(problem.params, problem.data, vector)
    close(matrix, wanted(name))
    close(ravel_pytree(product)[0], wanted(name) @ np.array([-2.0, 0, 1, 2, 3, 4]))


@pytest.mark.usefixtures("x64")
def test_damped_solves_by_conjugate_gradients():
    problem = problems.regression(N, dtype=jnp.float64)
    right = {"w": jnp.ones(5), "b": jnp.asarray(1.0)}

    @jax.jit
    def solve(params, data):
        operator = covariance.sgd_covariance_operator(problems.loss_vector_fn, params, data)
        identity = lineax.IdentityLinearOperator(operator.in_structure())
        tag = lineax.positive_semidefinite_tag
        damped = operator + lineax.TaggedLinearOperator(0.1 * identity, tag)
        return lineax.linear_solve(damped, right, lineax.CG(rtol=1e-12, atol=1e-12)).value

    found = ravel_pytree(solve(problem.params, problem.data))[0]
    close(found, np.linalg.solve(wanted("sgd_covariance") + 0.1 * np.eye(6), np.ones(6)), 1e-9)


def test_operators_are_symmetric_positive_and_keep_narrow_types():
    problem = problems.regression(N, dtype=jnp.bfloat16)
    operator = covariance.fisher_operator(problems.loss_vector_fn, problem.params, problem.data)
    assert lineax.is_symmetric(operator)
    assert lineax.is_positive_semidefinite(operator)
    product = operator.T.mv(problem.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(product)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("microbatch_size", [None, 3])
def test_parameters_may_be_plain_numbers(microbatch_size):
    problem = problems.regression(N)
    plain = {"w": np.asarray(problem.params["w"]), "b": float(problem.params["b"])}
    operator = covariance.fisher_operator(
        problems.loss_vector_fn, plain, problem.data, microbatch_size=microbatch_size
    )
    close(operator.as_matrix(), wanted("fisher"), 1e-5)


@pytest.mark.usefixtures("user_errors")
def test_bad_input_is_refused():
    problem = problems.regression(N)
    args = (problems.loss_vector_fn, problem.params, problem.data)
    with pytest.raises(ValueError, match="num_examples = 5, but the gradients are of 10 examples"):
        covariance.noise_covariance_operator(noise.gd(5), *args)
    with pytest.raises(ValueError, match="microbatch_size must be at least 1, got 0"):
        covariance.fisher_operator(*args, microbatch_size=0)
    with pytest.raises(TypeError, match="loss_vector_fn must be a function"):
        covariance.fisher_operator(None, problem.params, problem.data)
    with pytest.raises(ValueError, match=r"one loss per example, shape \(10,\), got shape \(\)"):
        covariance.fisher_operator(lambda p, b: p["b"], problem.params, problem.data)


def test_without_lineax_the_error_says_what_to_install():
    script = (
        "import sys; sys.modules['lineax'] = None\n"
        "from msgd_jax import covariance\n"
        "covariance.fisher_operator(None, None, None)\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "pip install 'msgd-jax[solvers]'" in ran.stderr
