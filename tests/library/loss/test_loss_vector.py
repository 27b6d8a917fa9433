"""The loss vector as an object: what it computes, how jax sees it, and what it refuses."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import msgd_jax
from msgd_jax import complexity, loss, noise, sde
from tests.support.problems import loss_vector_fn, regression
from tests.support.programs import assert_arrays_go, assert_nothing_stays, compilations

KEY = jax.random.key(0)
N = 13
MESH = jax.make_mesh((4,), ("data",))
SPREAD = jax.NamedSharding(MESH, jax.P("data"))
# The micro-batches divide N or do not; the devices do not.
WAYS = {
    "one pass": {},
    "micro-batches": {"microbatch_size": 5},
    "one by one": {"microbatch_size": 1},
    "spread": {"sharding": SPREAD},
    "spread in micro-batches": {"sharding": SPREAD, "microbatch_size": 3},
}
ways = pytest.mark.parametrize("way", WAYS)


def made(way="one pass", dtype=jnp.float32, **options):
    problem = regression(N, dtype=dtype)
    losses = loss.LossVector(loss_vector_fn, problem.data, **WAYS[way], **options)
    return problem, losses


def close(got, wanted, rtol=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6), got, wanted)


# What it computes ---------------------------------------------------------------------------------


@ways
def test_losses_slopes_and_gradients_are_those_by_hand(way):
    problem, losses = made(way)
    rows, direction = problem.gradient_matrix(), {"w": jnp.arange(5.0), "b": jnp.asarray(-2.0)}
    close(losses(problem.params), problem.losses())
    slopes = rows["w"] @ np.arange(5.0) - 2 * rows["b"]
    close(losses.slopes(problem.params, direction), slopes)
    close(losses.gradient_matrix(problem.params), rows)
    squares = losses.sum_over_gradients(
        lambda g, w: jax.tree.map(lambda x: jnp.tensordot(w, x**2, 1), g), problem.params
    )
    close(squares, {k: (v**2).sum(0) for k, v in rows.items()})
    close(losses.mean(problem.params), problem.losses().mean())
    close(losses.gradient(problem.params), {k: v.mean(0) for k, v in rows.items()})


@ways
@pytest.mark.parametrize("law", [noise.cov(N, 3), noise.sgd(N, 3)], ids=lambda law: law.name)
def test_weighted_values_and_gradients_are_those_by_hand(way, law):
    problem, losses = made(way)
    weights = law.sample(KEY, 0)
    dense = np.asarray(weights.dense(), np.float64)
    wanted = {k: np.tensordot(dense, v, 1) for k, v in problem.gradient_matrix().items()}
    for given in (weights, weights.dense()):
        value, gradient = losses.value_and_grad(problem.params, given)
        close(value, dense @ problem.losses())
        close(gradient, wanted)
    draws = jax.vmap(law.sample, in_axes=(None, 0))(KEY, jnp.arange(2))
    values, gradients = losses.values_and_grads(problem.params, draws)
    assert values.shape == (2,)
    close(jax.tree.map(lambda g: g[0], gradients), wanted)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("way", ["one pass", "micro-batches", "spread"])
def test_the_hessian_product_is_that_of_the_mean_loss(way):
    problem, losses = made(way, jnp.float64)
    direction = jax.tree.map(jnp.ones_like, problem.params)
    mean = lambda p: loss_vector_fn(p, problem.data).mean()  # noqa: E731
    wanted = jax.jvp(jax.grad(mean), (problem.params,), (direction,))[1]
    close(losses.hessian_product(problem.params, direction), wanted, 1e-10)


def test_examples_that_fill_up_the_devices_are_left_out():
    problem = regression(N)
    placed = msgd_jax.sharding.shard_examples(problem.data, SPREAD)
    assert placed["x"].shape[0] == 16
    losses = loss.LossVector(loss_vector_fn, placed, sharding=SPREAD, num_examples=N)
    assert losses.num_examples == N
    close(losses(problem.params), problem.losses())
    close(losses.gradient_matrix(problem.params), problem.gradient_matrix())
    close(losses.mean(problem.params), problem.losses().mean())


@ways
def test_a_sum_over_examples_counts_each_once(way):
    data = jnp.arange(1.0, N + 1)
    found = loss.sum_over_examples(
        lambda factor, batch, weights: {"sum": factor * weights @ batch, "count": weights.sum()},
        2.0,
        data,
        **WAYS[way],
    )
    assert (float(found["sum"]), float(found["count"])) == (N * (N + 1), N)


# How jax sees it ----------------------------------------------------------------------------------


def test_data_are_the_leaves_and_everything_else_is_static():
    problem, losses = made("micro-batches")
    leaves, structure = jax.tree.flatten(losses)
    assert [leaf.shape for leaf in leaves] == [(N, 5), (N,)]
    other = loss.LossVector(loss_vector_fn, regression(7).data, microbatch_size=np.int64(5))
    assert jax.tree.structure(other) == structure
    assert hash(jax.tree.structure(other)) == hash(structure)
    for change in ({"microbatch_size": 4}, {"microbatch_size": 5, "sharding": SPREAD}):
        changed = loss.LossVector(loss_vector_fn, problem.data, **change)
        assert jax.tree.structure(changed) != structure
    assert jax.tree.structure(losses.replace(lambda p, b: b["y"])) != structure
    # jax rebuilds the object with placeholders for the data, which must not be checked.
    empty = jax.tree.unflatten(structure, [object(), None])
    assert isinstance(empty, loss.LossVector)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(losses)]
    assert paths == [".data['x']", ".data['y']"]


@ways
def test_fresh_data_of_the_same_shapes_run_the_same_program(way):
    problem, losses = made(way)
    weights = noise.cov(N, 3).sample(KEY, 0)
    program = jax.jit(lambda losses, params, w: (losses(params), losses.value_and_grad(params, w)))
    program(losses, problem.params, weights)
    fresh = jax.tree.map(lambda x: x + 1, problem.data)
    other = loss.LossVector(loss_vector_fn, fresh, **WAYS[way])
    with compilations() as compiled:
        found, _ = program(other, problem.params, weights)
    assert not compiled
    close(found, loss_vector_fn(problem.params, fresh))


METHODS = {
    "losses": lambda losses, params: losses(params),
    "value_and_grad": lambda losses, params: losses.value_and_grad(
        params, noise.Weights(jnp.ones(2), jnp.arange(2), N)
    ),
    "values_and_grads": lambda losses, params: losses.values_and_grads(
        params, noise.Weights(jnp.ones((2, N)), None, N)
    ),
    "slopes": lambda losses, params: losses.slopes(params, params),
    "hessian_product": lambda losses, params: losses.hessian_product(params, params),
    "gradient_matrix": lambda losses, params: losses.gradient_matrix(params),
    "mean": lambda losses, params: losses.mean(params),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("way", ["one pass", "spread in micro-batches"])
def test_a_second_eager_call_compiles_nothing(name, way):
    problem, losses = made(way)
    METHODS[name](losses, problem.params)
    other = jax.tree.map(lambda x: x + 1, problem.params)
    with compilations() as compiled:
        METHODS[name](losses, other)
    assert not compiled


CAPTURED = 8 << 20  # bytes of the array in each fresh loss


def fresh_call(name, seed):
    held = jnp.full(CAPTURED // 4, float(seed), jnp.float32)
    losses = loss.LossVector(
        lambda p, b: loss_vector_fn(p, b) + held[0], regression(N).data, microbatch_size=5
    )
    return METHODS[name](losses, regression(N).params)


@pytest.mark.parametrize("name", ["losses", "hessian_product"])
def test_arrays_of_dropped_loss_vectors_are_freed(name):
    assert_arrays_go(functools.partial(fresh_call, name), CAPTURED)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_hundred_loss_vectors_leave_nothing_behind(name):
    assert_nothing_stays(functools.partial(fresh_call, name))


def test_parameters_and_data_may_be_mapped_and_scanned():
    problem, losses = made("micro-batches")
    many = jax.tree.map(lambda x: jnp.stack([x, x + 1]), problem.params)
    mapped = jax.vmap(losses)(many)
    _, scanned = jax.lax.scan(lambda c, params: (c, losses(params)), None, many)
    second = jax.tree.map(lambda x: x[1], many)
    for found in (mapped, scanned):
        close(found[1], loss_vector_fn(second, problem.data))
    stacked = jax.tree.map(lambda x: jnp.stack([x, x + 1]), losses)
    over_data = jax.vmap(lambda losses: losses(problem.params))(stacked)
    close(over_data[0], problem.losses())
    _, carried = jax.lax.scan(lambda c, losses: (c, losses.mean(second)), None, stacked)
    close(carried[0], loss_vector_fn(second, problem.data).mean())


# What it refuses ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("user_errors")
class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"loss_vector_fn": 3}, TypeError, "loss_vector_fn must be a function, got 3"),
            ({"data": {}}, ValueError, "data has no leaves"),
            ({"data": jnp.ones((0, 3))}, ValueError, "data must have at least 1 example"),
            (
                {"data": {"x": jnp.ones(3), "y": jnp.ones(4)}},
                ValueError,
                r"leaves of data must share the leading axis, got 3 at data\['x'\] and 4 at",
            ),
            ({"data": jnp.ones(())}, ValueError, "data is a scalar"),
            ({"data": "images"}, TypeError, "data must be an array, got 'images'"),
            ({"microbatch_size": 0}, ValueError, "microbatch_size must be at least 1, got 0"),
            ({"microbatch_size": 2.0}, TypeError, "microbatch_size must be an integer"),
            ({"sharding": "data"}, TypeError, "sharding must be a jax.sharding.NamedSharding"),
            (
                {"sharding": jax.NamedSharding(MESH, jax.P(None, "data"))},
                ValueError,
                "sharding must spread the leading axis",
            ),
            ({"num_examples": 7}, ValueError, "num_examples must be the length of the data, 4,"),
            ({"num_examples": -1}, ValueError, "num_examples must be at least 1, got -1"),
        ],
        ids=str,
    )
    def test_bad_input_is_refused_at_construction(self, change, error, message):
        good = {"loss_vector_fn": loss_vector_fn, "data": jnp.ones((4, 3))}
        with pytest.raises(error, match=message) as caught:
            loss.LossVector(**{**good, **change})
        assert len(str(caught.value)) <= 400

    def test_a_nan_is_not_looked_for(self):
        losses = loss.LossVector(lambda p, b: p * b, jnp.asarray([1.0, jnp.nan]))
        assert np.isnan(losses(jnp.ones(()))).tolist() == [False, True]

    @pytest.mark.parametrize(
        ("weights", "error", "message"),
        [
            (
                noise.Weights(jnp.ones(4), None, 4),
                ValueError,
                "num_examples = 4, but the data have",
            ),
            (jnp.ones(4), ValueError, r"must have shape \(13,\).* got \(4,\)"),
            (jnp.ones(N, int), TypeError, "weights must be floating point, got int32"),
            (noise.cov(N, 3), TypeError, "weights must be a noise.Weights or an array of one"),
        ],
        ids=["N", "shape", "integers", "law"],
    )
    def test_weights_of_another_kind_are_refused(self, weights, error, message):
        problem, losses = made()
        with pytest.raises(error, match=message):
            losses.value_and_grad(problem.params, weights)

    def test_the_function_must_return_one_loss_per_example(self):
        problem, losses = made("micro-batches")
        for fn, message in (
            (lambda p, b: b["x"], r"one loss per example, shape \(5,\), got shape \(5, 5\)"),
            (lambda p, b: b["y"].sum(), r"one loss per example, shape \(\d,\), got shape \(\)"),
        ):
            for method in (METHODS["losses"], METHODS["mean"], METHODS["gradient_matrix"]):
                with pytest.raises(ValueError, match="one loss per example"):
                    method(losses.replace(fn), problem.params)
            with pytest.raises(ValueError, match=message):
                losses.replace(fn)(problem.params)
        with pytest.raises(TypeError, match="params must be floating point"):
            losses.gradient_matrix(jnp.ones(3, int))


LAW = noise.cov(N, 3)
SWEEP = sde.Sweep([0.1], 0.1, 4)
BALL = {"radius": 0.1, "key": KEY, "num_draws": 2}
# The functions that take a loss vector. Those of `covariance` have a test of their own.
TAKERS = {
    "drift": lambda losses, params: sde.drift(losses, params),
    "diffusion": lambda losses, params: sde.diffusion(losses, params, LAW, jnp.ones(N)),
    "euler_maruyama": lambda losses, params: sde.euler_maruyama(
        losses, params, LAW, learning_rate=0.1, num_steps=1, key=KEY
    ),
    "underdamped": lambda losses, params: sde.underdamped(
        losses, params, LAW, learning_rate=0.1, momentum=0.9, num_steps=1, key=KEY
    ),
    "adaptive": lambda losses, params: sde.adaptive(
        losses, params, LAW, sde.Adam(0.1), num_steps=1, key=KEY
    ),
    "exit_time": lambda losses, params: sde.exit_time(
        losses, params, LAW, jnp.any, sde.Trials(2, 1), learning_rate=0.1, key=KEY
    ),
    "stationary_covariance_along": lambda losses, params: sde.stationary_covariance_along(
        losses, params, LAW, params, learning_rate=0.1
    ),
    "strong_error": lambda losses, params: sde.strong_error(losses, params, LAW, SWEEP, key=KEY),
    "weak_error": lambda losses, params: sde.weak_error(losses, params, LAW, SWEEP, key=KEY),
    "local_complexity": lambda losses, params: complexity.local_complexity(
        losses, params, LAW, **BALL
    ),
    "theorem1": lambda losses, params: complexity.theorem1(losses, params, batch_size=2, **BALL),
    "gaussian_inequalities": lambda losses, params: complexity.gaussian_inequalities(
        losses, params, **BALL
    ),
    "sgd_inequality": lambda losses, params: complexity.sgd_inequality(
        losses, params, batch_size=2, **BALL
    ),
    "penalty": lambda losses, params: complexity.penalty(
        losses, params, LAW.sample(KEY, 0), radius=0.1
    ),
}


@pytest.mark.usefixtures("user_errors")
@pytest.mark.parametrize("name", TAKERS)
def test_functions_of_a_loss_vector_refuse_anything_else(name):
    problem, losses = made()
    for wrong in (problem.data, "x" * 1000, None):
        with pytest.raises(TypeError, match=r"losses must be a loss\.LossVector, such") as caught:
            TAKERS[name](wrong, problem.params)
        assert len(str(caught.value)) <= 400
    with pytest.raises(TypeError, match="params must be floating point"):
        TAKERS[name](losses, jnp.ones(3, int))


@pytest.mark.usefixtures("user_errors")
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: complexity.Ascent(num_starts=0), ValueError, "num_starts must be at least 1"),
        (lambda: complexity.Ascent(at_once=0), ValueError, "at_once must be at least 1, got 0"),
        (lambda: complexity.Ascent(optimizer=0.1), TypeError, "optimizer must be an optax.Grad"),
        (lambda: sde.Scheme(substeps=3), ValueError, "substeps must be a power of two, got 3"),
        (lambda: sde.Scheme(order=3), ValueError, "order must be between 1 and 2, got 3"),
        (lambda: sde.Sweep([0.1], 0.1, 3), ValueError, "num_paths must be at least 4, got 3"),
        (lambda: sde.Sweep([0.3], 1.0, 4), ValueError, "must divide horizon = 1.0"),
        (
            lambda: sde.euler_maruyama(
                made()[1], made()[0].params, LAW, learning_rate=0.1, num_steps=1, key=KEY, scheme=8
            ),
            TypeError,
            r"scheme must be an sde\.Scheme, got 8",
        ),
        (
            lambda: sde.strong_error(made()[1], made()[0].params, LAW, [0.1], key=KEY),
            TypeError,
            r"sweep must be an sde\.Sweep, got \[0\.1\]",
        ),
        (
            lambda: complexity.local_complexity(lambda key: 3, made()[0].params, LAW, **BALL),
            TypeError,
            "a function from a PRNG key to one, got a function that returns",
        ),
    ],
)
def test_options_of_other_modules_are_checked(make, error, message):
    with pytest.raises(error, match=message):
        make()


# Signatures ---------------------------------------------------------------------------------------

MOST_PARAMETERS = 9


def public_functions():
    """Every public function, and every public method of a public class, by name."""
    for module in msgd_jax.__all__:
        for name in getattr(msgd_jax, module).__all__:
            value = getattr(getattr(msgd_jax, module), name)
            if inspect.isfunction(value):
                yield f"{module}.{name}", value
            elif inspect.isclass(value) and not issubclass(value, tuple):
                methods = inspect.getmembers(value, inspect.isfunction)
                for method, function in methods:
                    if not method.startswith("_") or method in ("__init__", "__call__"):
                        yield f"{module}.{name}.{method}", function


def test_no_public_function_has_more_than_nine_parameters():
    counts = {
        name: len([p for p in inspect.signature(function).parameters if p != "self"])
        for name, function in public_functions()
    }
    assert len(counts) > 60
    assert not {name: count for name, count in counts.items() if count > MOST_PARAMETERS}
