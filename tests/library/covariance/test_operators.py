"""Operators that need no matrices: products and solves, against dense algebra in float64."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from msgd_jax import covariance, loss, noise
from tests.library.covariance.test_covariance import by_hand, close, dense
from tests.support import problems
from tests.support.programs import assert_arrays_go, compilations, resources

N = 10
OPERATORS = {
    "fisher": covariance.fisher_operator,
    "sgd_covariance": covariance.sgd_covariance_operator,
    "cov": lambda *args: covariance.noise_covariance_operator(*args, noise.cov(N, 4)),
    "rademacher": lambda *args: covariance.noise_covariance_operator(
        *args, noise.rademacher(N, 2.0)
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
        losses = loss.LossVector(problems.loss_vector_fn, data, microbatch_size=microbatch_size)
        operator = OPERATORS[name](losses, params)
        return operator.mv(vector), operator.as_matrix()

    vector = {"w": jnp.arange(5.0), "b": jnp.asarray(-2.0)}
    product, matrix = product_and_matrix(problem.params, problem.data, vector)
    close(matrix, wanted(name))
    close(ravel_pytree(product)[0], wanted(name) @ np.array([-2.0, 0, 1, 2, 3, 4]))


@pytest.mark.usefixtures("x64")
def test_damped_solves_by_conjugate_gradients_are_dense_solves():
    """The operator is added to another one, S + 0.1 I, and solved for a vector of ones."""
    problem = problems.regression(N, dtype=jnp.float64)
    right = {"w": jnp.ones(5), "b": jnp.asarray(1.0)}

    @jax.jit
    def solve(params, data):
        operator = covariance.sgd_covariance_operator(
            loss.LossVector(problems.loss_vector_fn, data), params
        )
        identity = lineax.IdentityLinearOperator(operator.in_structure())
        tag = lineax.positive_semidefinite_tag
        damped = operator + lineax.TaggedLinearOperator(0.1 * identity, tag)
        return lineax.linear_solve(damped, right, lineax.CG(rtol=1e-12, atol=1e-12)).value

    found = ravel_pytree(solve(problem.params, problem.data))[0]
    close(found, np.linalg.solve(wanted("sgd_covariance") + 0.1 * np.eye(6), np.ones(6)), 1e-9)


def test_operators_are_symmetric_and_positive_and_keep_narrow_types():
    problem = problems.regression(N, dtype=jnp.bfloat16)
    losses = loss.LossVector(problems.loss_vector_fn, problem.data)
    operator = covariance.fisher_operator(losses, problem.params)
    assert lineax.is_symmetric(operator)
    assert lineax.is_positive_semidefinite(operator)
    product = operator.T.mv(problem.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(product)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("microbatch_size", [None, 3])
def test_parameters_may_be_plain_numbers(microbatch_size):
    problem = problems.regression(N)
    plain = {"w": np.asarray(problem.params["w"]), "b": float(problem.params["b"])}
    losses = loss.LossVector(problems.loss_vector_fn, problem.data, microbatch_size=microbatch_size)
    operator = covariance.fisher_operator(losses, plain)
    close(operator.as_matrix(), wanted("fisher"), 1e-5)


@pytest.mark.usefixtures("user_errors")
def test_bad_input_is_refused():
    problem = problems.regression(N)
    wrong = loss.LossVector(lambda p, b: p["b"], problem.data)
    with pytest.raises(ValueError, match=r"one loss per example, shape \(10,\), got shape \(\)"):
        covariance.fisher_operator(wrong, problem.params)


# Types --------------------------------------------------------------------------------------------

MIXED = [
    ("float32", "bfloat16", 2e-2, "float32"),
    ("float32", "float64", 1e-5, "float64"),
    ("float16", "bfloat16", 2e-2, "float32"),
    ("bfloat16", "float64", 2e-2, "float64"),
]


@pytest.mark.parametrize("microbatch_size", [None, 3])
@pytest.mark.parametrize(("first", "second", "tolerance", "wide"), MIXED)
@pytest.mark.usefixtures("x64")
def test_parameters_of_several_types_have_a_matrix(first, second, tolerance, wide, microbatch_size):
    """The matrix has a type wide enough for all leaves, and products have the type of each leaf."""
    problem = problems.regression(N, dtype=jnp.float64)
    params = {"w": problem.params["w"].astype(first), "b": problem.params["b"].astype(second)}

    def losses(params, batch):
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
        return problems.loss_vector_fn(params, batch)

    vector = loss.LossVector(losses, problem.data, microbatch_size=microbatch_size)
    operator = covariance.fisher_operator(vector, params)
    for matrix in (operator.as_matrix(), jax.jit(lambda: operator.as_matrix())()):
        assert matrix.dtype == wide
        close(matrix, wanted("fisher"), tolerance)
    product = operator.mv(params)
    assert jax.tree.map(lambda leaf: leaf.dtype, product) == {"w": first, "b": second}
    assert lineax.is_positive_semidefinite(operator)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("microbatch_size", [None, 700])
@pytest.mark.parametrize("name", ["fisher", "rademacher"])
def test_sums_of_narrow_models_are_in_float32(name, microbatch_size, dtype):
    """Of 2,000 examples that look up an embedding, a sum in bfloat16 would count about 256."""
    size = 2000
    rng = np.random.default_rng(0)
    x = rng.uniform(0.5, 1.5, size)
    token = rng.integers(0, 2, size) * 2  # the second of three words is not used

    def losses(params, batch):
        table = params.astype(dtype)
        return table[batch["token"], 0] * batch["x"].astype(dtype)

    data = {"token": jnp.asarray(token), "x": jnp.asarray(x, jnp.float32)}
    law = noise.rademacher(size, 2.0) if name == "rademacher" else name
    vector = loss.LossVector(losses, data, microbatch_size=microbatch_size)
    operator = covariance.noise_covariance_operator(vector, jnp.ones((3, 1)), law)
    rows = np.zeros((size, 3))
    rows[np.arange(size), token] = x
    close(operator.as_matrix(), dense(law, rows), 0.02)
    narrow = covariance.noise_covariance_operator(vector, jnp.ones((3, 1), dtype), law)
    assert narrow.mv(jnp.ones((3, 1), dtype)).dtype == dtype
    close(narrow.as_matrix().astype(jnp.float32), dense(law, rows), 0.02)


# Programs -----------------------------------------------------------------------------------------

CAPTURED = 8 << 20  # bytes of the array in each fresh loss
PARAMS = {"w": jnp.ones(5), "b": jnp.ones(())}


def fresh(seed):
    """A loss vector function that holds an array of its own, and data for it."""
    held = jnp.full(CAPTURED // 4, seed, jnp.float32)
    data = problems.regression(60).data
    data = {**data, "x": data["x"] + seed}
    return lambda p, b: problems.loss_vector_fn(p, b) * (1 + held[0]), data


def samples(matrix, vector):
    for make in (covariance.svd_sampler, covariance.eigh_sampler, covariance.cholesky_sampler):
        make(matrix).sample(jax.random.key(0), 0)
    covariance.diagonal_sampler(jnp.diag(matrix)).sample(jax.random.key(0), 0)
    covariance.gradient_sampler(vector, PARAMS, "fisher").sample(jax.random.key(0), 0)


def of_gradients(losses, data):
    vector = loss.LossVector(losses, data)
    loss.LossVector(losses, data, microbatch_size=20).gradient_matrix(PARAMS)
    covariance.spectrum(vector, PARAMS, "sgd_covariance")
    covariance.diagonal(vector, PARAMS, "sgd_covariance")
    samples(covariance.noise_covariance(vector, PARAMS, noise.cov(60, 4)), vector)


def of_operator(losses, data, **options):
    vector = loss.LossVector(losses, data, **options)
    operator = covariance.sgd_covariance_operator(vector, PARAMS)
    operator.mv(PARAMS)
    operator.as_matrix()


USES = {
    "gradient matrix": of_gradients,
    "operator": of_operator,
    "micro-batched": lambda losses, data: of_operator(losses, data, microbatch_size=20),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", USES)
def test_arrays_of_dropped_losses_are_freed(name):
    assert_arrays_go(lambda seed: USES[name](*fresh(float(seed))), CAPTURED)


@pytest.mark.parametrize("name", ["gradient matrix", "operator"])
def test_programs_of_dropped_losses_are_freed(name):
    """A loop outside of `jax.jit` would leave its program behind, with ten memory maps per call.

    The bound leaves room for programs of lineax, which keeps some of its own.
    """
    USES[name](*fresh(0.0))
    _, before = resources()
    for seed in range(1, 5):
        USES[name](*fresh(float(seed)))
    assert resources()[1] - before < 20


@pytest.mark.parametrize("microbatch_size", [None, 20, 25])
def test_a_second_eager_product_compiles_nothing(microbatch_size):
    losses, data = fresh(1.0)
    vector = loss.LossVector(losses, data, microbatch_size=microbatch_size)
    operator = covariance.sgd_covariance_operator(vector, PARAMS)
    operator.mv(PARAMS)
    other = jax.tree.map(lambda leaf: leaf + 1, PARAMS)
    with compilations() as compiled:
        operator.mv(PARAMS)
        operator.mv(other)
    assert not compiled


def test_without_lineax_the_error_states_what_to_install():
    script = (
        "import sys; sys.modules['lineax'] = None\n"
        "from msgd_jax import covariance\n"
        "covariance.fisher_operator(None, None)\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "pip install 'msgd-jax[solvers]'" in ran.stderr
