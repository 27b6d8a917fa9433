"""Calls keep nothing: no arrays, no functions, no programs; each one sees the loss as it is."""

import gc
import os
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest

from msgd_jax import loss, noise, sde
from tests.support.problems import loss_vector_fn as _loss_vector_fn
from tests.support.problems import of_sde, regression
from tests.support.programs import trim

N = 16
OPTIONS = {"learning_rates": [0.1], "horizon": 0.2, "num_paths": 4, "substeps": 2}
FACTOR = 1.0


def diffrax_terms(losses, problem, law, key):
    import diffrax

    motion = diffrax.VirtualBrownianTree(0.0, 1.0, tol=0.1, shape=(N,), key=key)
    terms = sde.diffrax_terms(law, motion, diffrax.Heun(), learning_rate=0.1)

    def drift(params, data):
        return terms.vf(0.0, params, loss.LossVector(losses, data))[0]

    return jax.jit(drift)(problem.params, problem.data)


CALLS = {
    "brownian_increments": lambda losses, problem, law, key: sde.brownian_increments(key, 0, N),
    "coupling": lambda losses, problem, law, key: sde.coupling(law, N)(jnp.ones(N)),
    "diffrax_terms": diffrax_terms,
    "diffusion": lambda losses, problem, law, key: of_sde(
        sde.diffusion,
        losses,
        problem.params,
        problem.data,
        law,
        jnp.arange(float(N)),
        microbatch_size=4,
    ),
    "drift": lambda losses, problem, law, key: of_sde(
        sde.drift,
        losses,
        problem.params,
        problem.data,
        order=2,
        learning_rate=0.1,
        microbatch_size=4,
    ),
    "euler_maruyama": lambda losses, problem, law, key: (
        of_sde(
            sde.euler_maruyama,
            losses,
            problem.params,
            problem.data,
            law,
            learning_rate=0.1,
            num_steps=3,
            key=key,
        ).last_params
    ),
    "underdamped": lambda losses, problem, law, key: (
        sde.underdamped(
            loss.LossVector(losses, problem.data),
            problem.params,
            law,
            learning_rate=0.1,
            momentum=0.9,
            num_steps=3,
            key=key,
        ).last_params
    ),
    "adaptive": lambda losses, problem, law, key: (
        sde.adaptive(
            loss.LossVector(losses, problem.data),
            problem.params,
            law,
            # Without a large eps, Adam would not see that the loss has another scale.
            sde.Adam(0.1, b1=0.5, b2=0.5, eps=1.0),
            num_steps=3,
            key=key,
        ).last.params
    ),
    "exit_time": lambda losses, problem, law, key: (
        sde.exit_time(
            loss.LossVector(losses, problem.data),
            problem.params,
            law,
            lambda params: jnp.isfinite(params["b"]),
            sde.Trials(num_paths=2, max_steps=3),
            learning_rate=0.1,
            key=key,
        ).points
    ),
    "stationary_covariance_along": lambda losses, problem, law, key: (
        sde.stationary_covariance_along(
            loss.LossVector(losses, problem.data),
            problem.params,
            law,
            jax.tree.map(lambda p: jnp.ones((1, *p.shape), p.dtype), problem.params),
            learning_rate=0.01,
            num_products=2,
        ).covariance
    ),
    "strong_error": lambda losses, problem, law, key: (
        of_sde(
            sde.strong_error, losses, problem.params, problem.data, law, key=key, **OPTIONS
        ).errors
    ),
    "weak_error": lambda losses, problem, law, key: (
        of_sde(sde.weak_error, losses, problem.params, problem.data, law, key=key, **OPTIONS).errors
    ),
}
WITH_A_LOSS = sorted(CALLS.keys() - {"brownian_increments", "coupling"})


def fresh(seed, size=1_000):
    """A loss that captures an array, a problem, a law, and that array."""
    captured = jnp.full(size, 1.0 + seed)

    def losses(params, batch):
        return _loss_vector_fn(params, batch) * captured[0]

    problem = regression(N)
    problem = problem._replace(data=jax.tree.map(lambda x: x + 0.01 * seed, problem.data))
    return losses, problem, noise.cov(N, 4), captured


@pytest.mark.parametrize("name", CALLS)
def test_calls_keep_no_reference_to_their_arguments(name):
    losses, problem, law, captured = fresh(0)
    CALLS[name](losses, problem, law, jax.random.key(0))
    held = [weakref.ref(x) for x in (losses, captured, problem.data["x"])]
    del losses, problem, law, captured
    gc.collect()
    assert [reference() for reference in held] == [None] * len(held)


@pytest.mark.parametrize("name", WITH_A_LOSS)
def test_each_call_sees_the_loss_as_it_is(name, monkeypatch):
    def losses(params, batch):
        return FACTOR * _loss_vector_fn(params, batch)

    problem, law = regression(N), noise.cov(N, 4)
    first = CALLS[name](losses, problem, law, jax.random.key(0))
    monkeypatch.setitem(globals(), "FACTOR", 2.0)
    second = CALLS[name](losses, problem, law, jax.random.key(0))
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert np.abs(np.asarray(other) - np.asarray(one)).max() > 1e-3 * np.abs(one).max()


def footprint():
    """The memory of the process in MiB, its memory maps, and the arrays that are alive."""
    trim()
    process = psutil.Process()
    with open(f"/proc/{os.getpid()}/maps") as maps:
        return process.memory_info().rss / 2**20, len(maps.readlines()), len(jax.live_arrays())


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc")
@pytest.mark.parametrize("name", CALLS)
def test_a_hundred_calls_take_no_more_memory_than_ten(name):
    """Each call has a fresh loss with 8 MB, data and a law: if they were kept, 720 MB."""
    for call in range(100):
        losses, problem, law, captured = fresh(call, size=2_000_000)
        CALLS[name](losses, problem, law, jax.random.key(call))
        del losses, problem, law, captured
        if call == 9:
            memory, maps, arrays = footprint()
    later = footprint()
    assert later[0] < memory + 60
    assert later[1] < maps + 30
    assert later[2] <= arrays + 2


@pytest.mark.slow
def test_parts_of_a_path_share_a_program():
    """Under `jax.jit`, with traced numbers of iterations, a path is traced once for all parts."""
    traces = []

    def losses(params, batch):
        traces.append(None)
        return _loss_vector_fn(params, batch)

    problem, law, key = regression(N), noise.cov(N, 4), jax.random.key(0)

    @jax.jit
    def walk(params, data, first_step, num_steps):
        return of_sde(
            sde.euler_maruyama,
            losses,
            params,
            data,
            law,
            learning_rate=0.1,
            key=key,
            first_step=first_step,
            num_steps=num_steps,
        )

    position = problem.params
    for before, after in ((0, 2), (2, 3), (3, 7)):
        path = walk(position, problem.data, before, after)
        position = path.last_params
        assert path.steps.tolist() == [after]
        count = len(traces) if before == 0 else count
    assert len(traces) == count
    whole = of_sde(
        sde.euler_maruyama,
        losses,
        problem.params,
        problem.data,
        law,
        learning_rate=0.1,
        key=key,
        num_steps=7,
    )
    for one, other in zip(
        jax.tree.leaves(position), jax.tree.leaves(whole.last_params), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-6)
