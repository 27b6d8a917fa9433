"""The randomness of the Brownian path.

It is independent of everything that a user may draw from the same key, and it is that of the law,
in the law's type.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from msgd_jax import noise, sde, train
from tests.support.problems import loss_vector_fn, of_sde, regression
from tests.support.statistics import bound

N, B = 20, 4


def user_draws(key, size):
    """Normals that a user may draw from the same key, its children and its folds."""
    keys = [jax.random.clone(key)]
    keys += [jax.random.split(jax.random.clone(key), count)[i] for count in (2, 3) for i in (0, 1)]
    keys += [jax.random.fold_in(jax.random.clone(key), i) for i in (0, 1, 2, 2**31 - 1, 2**32 - 1)]
    return [jax.random.normal(key, (size,)) for key in keys]


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("size", [1_000, 1_001, 4_096])
def test_increments_are_uncorrelated_with_what_a_user_draws(impl, size):
    """Coarse and fine increments of two iterations; a correlation's standard error is 1/sqrt(N)."""
    key = jax.random.key(0, impl=impl)
    theirs = np.stack(user_draws(key, size))
    ours = [
        increments
        for step in (0, 1)
        for substeps in (1, 4)
        for increments in sde.brownian_increments(key, step, size, substeps=substeps)
    ]
    r = np.corrcoef(np.concatenate([theirs, np.stack(ours)]))[: len(theirs), len(theirs) :]
    assert np.abs(r).max() < bound(r.size) / math.sqrt(size)


@pytest.mark.slow
def test_paths_of_strong_and_weak_errors_are_uncorrelated_with_what_a_user_draws(monkeypatch):
    """The increments that the functions simulate are collected by a callback."""
    from msgd_jax.sde import _brownian

    seen = []
    original = _brownian.brownian_increments

    def watched(key, step, num_examples, **options):
        increments = original(key, step, num_examples, **options)
        jax.debug.callback(lambda x: seen.append(np.asarray(x).sum(-2)), increments)
        return increments

    monkeypatch.setattr(_brownian, "brownian_increments", watched)
    size, key = 1_000, jax.random.key(0)
    problem = regression(size)
    for measure in (sde.strong_error, sde.weak_error):
        of_sde(
            measure,
            loss_vector_fn,
            problem.params,
            problem.data,
            noise.cov(size, B),
            learning_rates=[0.1],
            horizon=0.2,
            num_paths=4,
            key=key,
            substeps=2,
        )
    jax.effects_barrier()
    ours = np.concatenate([np.atleast_2d(x) for x in seen])
    assert len(ours) >= 16
    own = [sde.brownian_increments(key, step, size)[0] for step in (0, 1)]
    # The keys of the paths are no descendants of the user's key.
    children = jax.random.split(jax.random.fold_in(jax.random.clone(key), 0), 4)
    own += [
        jax.random.normal(
            jax.random.fold_in(jax.random.split(jax.random.clone(child))[0], step), (size,)
        )
        for child in children
        for step in (0, 1)
    ]
    theirs = np.stack([*user_draws(key, size), *own])
    r = np.corrcoef(np.concatenate([theirs, ours]))[: len(theirs), len(theirs) :]
    assert np.abs(r).max() < bound(r.size) / math.sqrt(size)


def test_the_first_increments_are_uncorrelated_with_initial_parameters():
    """Users draw parameters from the key of the run, or from one of its children.

    The increments of the first iteration are those in the first weights, and correlated with none
    of these draws.
    """
    key = jax.random.key(3)
    weights = noise.fisher(1_000, 10).sample(key, 0).values
    increments = -math.sqrt(10 * 1_000) * (np.asarray(weights) - 1 / 1_000)
    np.testing.assert_allclose(sde.brownian_increments(key, 0, 1_000)[0], increments, atol=1e-3)
    theirs = user_draws(key, 1_000)
    for drawn in theirs:
        most = bound(len(theirs)) / math.sqrt(1_000)
        assert abs(np.corrcoef(drawn, increments)[0, 1]) < most


@pytest.mark.optimized
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("substeps", [1, 8])
def test_float32_increments_are_the_same_bits_with_x64(impl, substeps):
    draw = functools.partial(sde.brownian_increments, num_examples=1_000, substeps=substeps)
    key = jax.random.key(1, impl=impl)
    narrow = np.asarray(draw(key, 7))
    for step in (7, np.int64(7), np.uint8(7)):
        with jax.enable_x64(True):
            wide = draw(jax.random.key(1, impl=impl), step)
        assert wide.dtype == jnp.float32
        np.testing.assert_array_equal(narrow, wide)


def trained(problem, law, key, steps, rate):
    optimizer = optax.sgd(rate)
    step = train.make_step(loss_vector_fn, optimizer, law)
    state = train.init(problem.params, optimizer, key)
    for _ in range(steps):
        state, _ = step(state, problem.data)
    return state.params


@pytest.mark.parametrize(
    ("params", "weights", "tolerance"),
    [
        (jnp.float64, jnp.float32, 2e-6),
        (jnp.float64, jnp.float64, 1e-13),
        (jnp.float32, jnp.float64, 2e-6),
        (jnp.float32, jnp.float32, 2e-6),
    ],
)
@pytest.mark.parametrize("name", ["fisher", "cov"])
def test_training_follows_the_path_for_all_types(x64, name, params, weights, tolerance):
    """They agree up to rounding: the increments are multiples of 2^-20, or of 2^-48 in float64."""
    problem, key = regression(N, dtype=params), jax.random.key(6)
    law = getattr(noise, name)(N, B, dtype=weights)
    end = trained(problem, law, key, 10, 0.2)
    walk = functools.partial(
        of_sde,
        sde.euler_maruyama,
        loss_vector_fn,
        problem.params,
        problem.data,
        learning_rate=0.2,
        num_steps=10,
        substeps=1,
    )
    path = walk(law, key=key)
    for leaf, other in zip(jax.tree.leaves(end), jax.tree.leaves(path.last_params), strict=True):
        assert other.dtype == params
        np.testing.assert_allclose(leaf, other, atol=tolerance, rtol=0)
    # A near miss, the path of another key, is far away.
    other = walk(law, key=jax.random.key(7)).last_params
    assert np.abs(np.asarray(other["w"] - end["w"])).max() > 1e4 * tolerance


def test_without_a_law_the_path_has_the_type_of_the_parameters(x64):
    """A covariance has no type: it gives the path of the law in the type of the parameters."""
    problem, key = regression(N, dtype=jnp.float64), jax.random.key(6)
    law = noise.fisher(N, B, dtype=jnp.float64)
    ends = [
        of_sde(
            sde.euler_maruyama,
            loss_vector_fn,
            problem.params,
            problem.data,
            given,
            learning_rate=0.2,
            num_steps=3,
            key=key,
            substeps=2,
        ).last_params["w"]
        for given in (law, law.covariance)
    ]
    np.testing.assert_array_equal(*ends)
