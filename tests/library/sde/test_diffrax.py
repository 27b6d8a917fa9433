"""The SDE through diffrax.

On the same increments, its path is that of `euler_maruyama`. Solvers of Itô's and of Stratonovich's
kind find the same solution, and the terms for one kind are wrong for the other.
"""

import functools
import inspect
import math

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from msgd_jax import covariance, loss, noise, sde
from tests.support.problems import loss_vector_fn, of_sde, regression
from tests.support.sde_problems import logistic

# The tree of Brownian increments of diffrax reads a key on two branches, of which one is taken.
pytestmark = pytest.mark.usefixtures("unchecked_key_reuse")

N, B, ETA = 20, 4, 0.2
LAW = noise.cov(N, B)


def motion():
    return diffrax.VirtualBrownianTree(0.0, 1.0, tol=2**-10, shape=(N,), key=jax.random.key(2))


@pytest.mark.slow
@pytest.mark.parametrize("order", [1, 2])
def test_euler_gives_the_path_of_euler_maruyama_on_the_same_increments(x64, order):
    problem, key = logistic(N, dtype=jnp.float64), jax.random.key(0)
    law = noise.cov(N, B, dtype=jnp.float64)
    steps, substeps = 5, 4
    options = {"substeps": substeps, "dtype": jnp.float64}
    drawn = [sde.brownian_increments(key, step, N, **options) for step in range(steps)]
    increments = jnp.concatenate(drawn)
    path = jnp.concatenate([jnp.zeros((1, N)), math.sqrt(ETA) * jnp.cumsum(increments, 0)])
    times = ETA / substeps * jnp.arange(steps * substeps + 1)
    terms = sde.diffrax_terms(
        law,
        diffrax.LinearInterpolation(times, path),
        diffrax.Euler(),
        learning_rate=ETA,
        order=order,
    )
    solution = diffrax.diffeqsolve(
        terms,
        diffrax.Euler(),
        0.0,
        times[-1],
        dt0=None,
        y0=problem.params,
        args=loss.LossVector(problem.loss_vector_fn, problem.data),
        stepsize_controller=diffrax.StepTo(times),
        saveat=diffrax.SaveAt(ts=ETA * jnp.arange(steps + 1)),
    )
    ours = of_sde(
        sde.euler_maruyama,
        *problem,
        law,
        learning_rate=ETA,
        num_steps=steps,
        key=key,
        substeps=substeps,
        save_at=range(steps + 1),
        order=order,
    )
    # At order 2, `euler_maruyama` takes Heun's method for the drift, and diffrax was given Euler's:
    # the two differ, but only by the difference of the methods.
    tolerance = 1e-10 if order == 1 else 0.03
    np.testing.assert_allclose(solution.ys, ours.params, rtol=tolerance)
    if order == 2:
        assert np.abs(np.asarray(solution.ys - ours.params)).max() > 1e-6


@pytest.mark.parametrize(("solver", "order"), [(diffrax.Euler(), 1), (diffrax.Heun(), 2)])
def test_schedules_are_functions_of_the_iteration(x64, solver, order):
    """Euler's path is that of `euler_maruyama`, Heun's is near, that of a constant rate is far."""
    problem, key = logistic(N, dtype=jnp.float64), jax.random.key(0)
    losses, law = problem.losses, noise.fisher(N, B, dtype=jnp.float64)
    schedule = optax.cosine_decay_schedule(ETA, 5, alpha=0.1)
    steps, substeps = 5, 8
    options = {"substeps": substeps, "dtype": jnp.float64}
    drawn = [sde.brownian_increments(key, step, N, **options) for step in range(steps)]
    path = jnp.concatenate([jnp.zeros((1, N)), jnp.cumsum(jnp.concatenate(drawn), 0)])
    times = jnp.arange(steps * substeps + 1) / substeps
    control = diffrax.LinearInterpolation(times, path)

    def solved(rate):
        terms = sde.diffrax_terms(law, control, solver, learning_rate=rate, order=order)
        steps_at = diffrax.StepTo(times)
        solution = diffrax.diffeqsolve(
            terms, solver, 0.0, 5.0, None, problem.params, losses, stepsize_controller=steps_at
        )
        assert solution.ys is not None
        return solution.ys[0]

    walk = functools.partial(sde.euler_maruyama, losses, problem.params, law, num_steps=steps)
    scheme = sde.Scheme(substeps, order)
    ours = walk(learning_rate=schedule, key=key, scheme=scheme).last_params
    distance = np.abs(solved(schedule) - ours).max()
    moved = np.abs(np.asarray(ours - problem.params)).max()
    assert distance < (1e-10 if order == 1 else 0.05) * moved
    assert np.abs(solved(lambda k: ETA) - ours).max() > 0.2 * moved


@pytest.mark.usefixtures("user_errors")
def test_a_schedule_is_checked_along_the_control():
    control = diffrax.VirtualBrownianTree(0.0, 4.0, tol=0.1, shape=(N,), key=jax.random.key(0))
    for schedule, got in ((lambda k: 0.1 - 0.05 * k, "-0.05 at step 3"), (jnp.log, "-inf")):
        with pytest.raises(ValueError, match=f"learning_rate must be finite .*got {got}"):
            sde.diffrax_terms(LAW, control, diffrax.Euler(), learning_rate=schedule)
    with pytest.raises(TypeError, match="learning_rate must be a number"):
        sde.diffrax_terms(LAW, control, diffrax.Euler(), learning_rate="0.1")


def every_solver():
    """All concrete solvers that diffrax exports, in whatever version, by name."""
    classes = [value for value in vars(diffrax).values() if inspect.isclass(value)]
    concrete = [
        value
        for value in classes
        if issubclass(value, diffrax.AbstractSolver) and not value.__name__.startswith("Abstract")
    ]
    inner = {"HalfSolver": (diffrax.EulerHeun(),), "SemiImplicitEuler": ()}
    return {value.__name__: value(*inner.get(value.__name__, ())) for value in concrete}


SOLVERS = every_solver()
ITO = {"Euler", "ItoMilstein"}
STRATONOVICH = {
    "EulerHeun",
    "GeneralShARK",
    "HalfSolver",
    "Heun",
    "Midpoint",
    "Ralston",
    "ReversibleHeun",
    "SPaRK",
    "SlowRK",
    "StratonovichMilstein",
}


def saddle(params, batch):
    """Losses whose noise depends on the parameters, so that Itô and Stratonovich differ."""
    a, b = params["a"], params["b"]
    return batch[:, 0] * jnp.tanh(a) * jnp.cos(b) + batch[:, 1] * jnp.sin(a + b)


SADDLE = {"a": jnp.array(0.5), "b": jnp.array(-0.3)}
SADDLE_DATA = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)), jnp.float32)
SADDLE_LOSSES = loss.LossVector(saddle, SADDLE_DATA)


def tree(key, size=4):
    return diffrax.VirtualBrownianTree(
        0.0, 1.0, tol=2**-12, shape=(size,), key=key, levy_area=diffrax.SpaceTimeLevyArea
    )


def ends(solver, terms_for=None, paths=16):
    """A function from the step size to theta(1), on the same paths for all solvers: [paths, 2].

    `terms_for` is the solver that the terms are made for, None for the one that runs.
    """

    def one(key, step):
        terms = sde.diffrax_terms(
            noise.fisher(4, 1), tree(key), terms_for or solver, learning_rate=1.0
        )
        solution = diffrax.diffeqsolve(
            terms,
            solver,
            0.0,
            1.0,
            dt0=step,
            y0=SADDLE,
            args=SADDLE_LOSSES,
            adjoint=diffrax.DirectAdjoint(),
        )
        assert solution.ys is not None
        return jnp.stack([solution.ys["a"][-1], solution.ys["b"][-1]])

    keys = jax.random.split(jax.random.key(1), paths)
    run = jax.jit(lambda step: jax.lax.map(lambda key: one(key, step), keys))
    return lambda step: np.asarray(run(step), np.float64)


@functools.cache
def ito():
    """The Itô solution on these paths, by Euler's method."""
    return ends(diffrax.Euler())(1 / 2048)


def distance(one, other):
    """The root mean square over paths."""
    return math.sqrt(((one - other) ** 2).sum(1).mean())


@pytest.mark.slow
@pytest.mark.filterwarnings("error:.*not marked as converging")
@pytest.mark.parametrize("name", sorted(ITO | STRATONOVICH))
def test_every_solver_finds_the_solution_of_itos_equation(name):
    """With the terms made for it, its distance from a fine path of Euler's shrinks with the step.

    All solvers are of strong order 1/2 or more. The error of Euler's method at 1/2048 is about
    0.015, so that 0.07 at 1/128 leaves room for a solver whose error is as large as Euler's.
    """
    run = ends(SOLVERS[name])
    coarse, fine = distance(run(1 / 4), ito()), distance(run(1 / 128), ito())
    assert fine < 0.07
    assert fine < 0.5 * coarse


@pytest.mark.slow
def test_terms_for_the_other_kind_have_another_solution():
    """The near miss: with terms for Euler's method, Heun's ends elsewhere at the finest step."""
    wrong = ends(diffrax.EulerHeun(), terms_for=diffrax.Euler())
    assert distance(wrong(1 / 128), ito()) > 0.2


@pytest.mark.usefixtures("user_errors")
@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_works_or_is_refused_with_a_reason(name):
    make = functools.partial(
        sde.diffrax_terms,
        noise.fisher(4, 1),
        tree(jax.random.key(0)),
        SOLVERS[name],
        learning_rate=1.0,
    )
    if name in ITO | STRATONOVICH:
        make()
        return
    with pytest.raises(ValueError, match=f"solver must not be {name}: .*Use diffrax") as refused:
        make()
    assert len(str(refused.value)) <= 400


@pytest.mark.slow
@pytest.mark.parametrize("law", [LAW, noise.fisher(N, B)], ids=["cov", "fisher"])
def test_the_stratonovich_drift_agrees_with_dense_algebra(x64, law):
    """The reference is ``-grad L - eta/4 grad tr(C C^T)``, from a dense covariance."""
    problem = logistic(N, dtype=jnp.float64)

    def trace(params):
        losses = loss.LossVector(problem.loss_vector_fn, problem.data)
        return jnp.trace(covariance.noise_covariance(losses, params, law))

    expected = of_sde(sde.drift, *problem) - ETA / 4 * jax.grad(trace)(problem.params)
    for microbatch_size in (None, 7):
        losses = loss.LossVector(
            problem.loss_vector_fn, problem.data, microbatch_size=microbatch_size
        )
        terms = sde.diffrax_terms(law, motion(), diffrax.Heun(), learning_rate=ETA)
        got = terms.terms[0].vf(0.0, problem.params, losses)
        np.testing.assert_allclose(got, expected, rtol=1e-10)


def test_adaptive_steps_and_saved_points_work_with_pytrees():
    """A smaller tolerance takes more steps, and ends near the same point."""
    problem = regression(N)
    terms = sde.diffrax_terms(LAW, motion(), diffrax.Heun(), learning_rate=ETA)

    @jax.jit
    def solve(tolerance):
        return diffrax.diffeqsolve(
            terms,
            diffrax.Heun(),
            0.0,
            1.0,
            dt0=0.1,
            y0=problem.params,
            args=loss.LossVector(loss_vector_fn, problem.data),
            saveat=diffrax.SaveAt(ts=jnp.linspace(0, 1, 5)),
            stepsize_controller=diffrax.PIDController(rtol=0, atol=tolerance),
        )

    coarse, fine = solve(1e-2), solve(1e-4)
    assert coarse.ys is not None
    assert fine.ys is not None
    assert fine.ys["w"].shape == (5, 5)
    assert fine.stats["num_accepted_steps"] > 2 * coarse.stats["num_accepted_steps"]
    np.testing.assert_allclose(fine.ys["w"][0], problem.params["w"])
    np.testing.assert_allclose(coarse.ys["w"][-1], fine.ys["w"][-1], atol=0.02)


@pytest.mark.parametrize("microbatch_size", [None, 7])
def test_the_diffusion_is_the_same_as_a_product_and_as_a_matrix(x64, microbatch_size):
    """Solvers take either one backward pass, or the matrix C with a column per example."""
    problem = regression(N, dtype=jnp.float64)
    terms = sde.diffrax_terms(LAW, motion(), diffrax.Euler(), learning_rate=ETA)
    losses = loss.LossVector(loss_vector_fn, problem.data, microbatch_size=microbatch_size)
    diffusion = terms.terms[1]
    vector = jax.random.normal(jax.random.key(4), (N,), jnp.float64)
    expected = of_sde(sde.diffusion, loss_vector_fn, problem.params, problem.data, LAW, vector)
    matrix = diffusion.vf(0.0, problem.params, losses)
    assert matrix["w"].shape == (5, N)
    for got in (
        diffusion.vf_prod(0.0, problem.params, losses, vector),
        diffusion.prod(matrix, vector),
    ):
        for name in expected:
            np.testing.assert_allclose(got[name], math.sqrt(ETA) * expected[name], rtol=1e-10)


def test_a_sweep_of_learning_rates_compiles_once():
    """The learning rate is an array of the terms, and not a constant of the program."""
    traces = []

    def losses(params, batch):
        traces.append(None)
        return saddle(params, batch)

    law = noise.fisher(4, 1)
    for rate in (0.1, 0.2, 0.3):
        terms = sde.diffrax_terms(law, tree(jax.random.key(0)), diffrax.Euler(), learning_rate=rate)
        args = loss.LossVector(losses, SADDLE_DATA)
        diffrax.diffeqsolve(terms, diffrax.Euler(), 0.0, 1.0, dt0=0.5, y0=SADDLE, args=args)
        count = len(traces) if rate == 0.1 else count
    assert len(traces) == count


@pytest.mark.usefixtures("user_errors")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"learning_rate": 0}, ValueError, "learning_rate must be finite and above 0, got 0"),
        ({"order": 3}, ValueError, "order must be between 1 and 2"),
        ({"solver": diffrax.Heun}, TypeError, "solver must be a diffrax solver, .* the class Heun"),
        ({"solver": "Heun"}, TypeError, "solver must be a diffrax solver, .* got 'Heun'"),
        (
            {"solver": diffrax.HalfSolver(diffrax.Dopri5())},
            ValueError,
            "solver must not be Dopri5: .* ordinary differential equations",
        ),
        (
            {"solver": diffrax.SPaRK()},
            ValueError,
            r"control .* levy_area=diffrax\.SpaceTimeLevyArea for SPaRK, got a VirtualBrownianTree",
        ),
        ({"control": jax.random.key(0)}, TypeError, "control must be a diffrax path"),
        ({"law": noise.random_reshuffling(N, B)}, ValueError, "law must have independent"),
        ({"law": "cov"}, TypeError, r"law must be a noise\.MNoise"),
    ],
)
def test_bad_input(change, error, message):
    good = {"law": LAW, "control": motion(), "solver": diffrax.Euler(), "learning_rate": ETA}
    with pytest.raises(error, match=message):
        sde.diffrax_terms(**{**good, **change})


@pytest.mark.usefixtures("user_errors")
def test_a_control_of_another_size_is_refused():
    problem = regression(N)
    terms = sde.diffrax_terms(LAW, tree(jax.random.key(0), 7), diffrax.Euler(), learning_rate=ETA)
    solve = functools.partial(
        diffrax.diffeqsolve, terms, diffrax.Euler(), 0.0, 1.0, dt0=0.5, y0=problem.params
    )
    with pytest.raises(ValueError, match=r"control must have increments of shape \(20,\).*\(7,\)"):
        solve(args=loss.LossVector(loss_vector_fn, problem.data))
    with pytest.raises(TypeError, match=r"args must be a loss\.LossVector"):
        solve(args=problem.data)
