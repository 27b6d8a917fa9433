"""Calls leave nothing behind, compile no more than they need, and see what has changed."""

import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msgd_jax import complexity, noise
from tests.support.affine import of_problem, penalty_of
from tests.support.programs import compilations, growth, resources

KEY = jax.random.key(5)
N = 8
THETA = jnp.ones(3)
QUICK = {"radius": 0.5, "key": KEY, "num_draws": 2, "num_starts": 1, "num_steps": 0}


class Losses:
    """A loss vector function with an array of its own, which can be watched."""

    def __init__(self, size=1000):
        self.held = jnp.ones(size)

    def __call__(self, theta, batch):
        return (batch @ theta) ** 2 * self.held[0]


def data(seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(N, 3)), jnp.float32)


def added(losses):
    law = complexity.rademacher(N, 4)
    addition = complexity.add_local_complexity(law, KEY, radius=0.5, ascent=complexity.Ascent(1, 0))
    state = addition.init(THETA)
    return addition.update(
        jnp.zeros(3), state, THETA, loss_vector_fn=losses, data=data(), value=None
    )[0]


def penalised(losses):
    v = complexity.from_noise(noise.cov(N, 2)).sample(KEY, 0)
    return penalty_of(losses, radius=0.5, microbatch_size=3)(THETA, data(), v)


def differentiated(losses):
    """The gradient of the penalty, without `jax.jit` around it."""
    v = complexity.gaussian(N).sample(KEY, 0)
    return jax.grad(penalty_of(losses, radius=0.5))(THETA, data(), v)


def drawn_by(losses):
    """Draws from a law whose function holds the array of the losses, and must be freed."""
    held = losses.held

    def draw(key):
        return noise.Weights(jax.random.normal(key, (N,)) * held[0], None, N)

    weak = weakref.ref(draw)
    values = complexity.Multipliers("own", N, draw).sample(KEY, 0).values
    del draw
    assert weak() is None
    return values


def drawn_data(losses):
    """A complexity whose data are drawn by a function that holds the array of the losses."""
    return of_problem(
        complexity.local_complexity,
        lambda theta, batch: batch @ theta,
        THETA,
        lambda key: jax.random.normal(key, (N, 3)) * losses.held[0],
        complexity.gaussian(N),
        **QUICK,
    ).draws


def measured(losses):
    law, ways = complexity.gaussian(N), {"microbatch_size": 3, "at_once": 1}
    return of_problem(
        complexity.local_complexity, losses, THETA, data(), law, **QUICK, **ways
    ).draws


CALLS = {
    "local_complexity": measured,
    "of drawn data": drawn_data,
    "gaussian_inequalities": lambda losses: (
        of_problem(complexity.gaussian_inequalities, losses, THETA, data(), **QUICK)[0].left.draws
    ),
    "sgd_inequality": lambda losses: (
        of_problem(
            complexity.sgd_inequality, losses, THETA, data(), batch_size=4, **QUICK
        ).left.draws
    ),
    "theorem1": lambda losses: (
        of_problem(complexity.theorem1, losses, THETA, data(), batch_size=4, **QUICK).sgd.left.draws
    ),
    "penalty": penalised,
    "its gradient": differentiated,
    "add_local_complexity": added,
    "Multipliers.sample": drawn_by,
}


@pytest.mark.parametrize("name", CALLS)
def test_losses_and_their_arrays_are_freed_when_the_call_returns(name):
    """They are freed at once: no cycle of references holds them until they are collected."""
    losses = Losses()
    gone = weakref.ref(losses), weakref.ref(losses.held)
    CALLS[name](losses)
    del losses
    assert [weak() for weak in gone] == [None, None]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["penalty", "its gradient", "add_local_complexity"])
def test_programs_are_freed(name):
    """If a loop ran outside of `jax.jit`, jax would keep its program: a hundred maps per call."""
    CALLS[name](Losses())
    _, before = resources()
    for _ in range(3):
        CALLS[name](Losses())
    assert resources()[1] - before < 60


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_a_hundred_calls_take_no_more_memory_than_ten(name):
    """Each call has fresh losses, with 4 MB, and a fresh law and data.

    A program takes some ten memory maps: if they were kept, 90 calls would add 900 maps and 360 MB.
    """
    memory, maps = growth(lambda i: CALLS[name](Losses(size=1 << 20)))
    assert memory < 40
    assert maps < 100


@pytest.mark.parametrize(
    ("measure", "programs"),
    [("local_complexity", 1), ("gaussian_inequalities", 1), ("sgd_inequality", 2), ("theorem1", 2)],
)
def test_laws_over_the_same_examples_share_a_program(measure, programs):
    """`theorem1` has four complexities, three of which are over all examples."""
    CALLS[measure](Losses())  # jax compiles small programs of a shape once and for all
    with compilations() as compiled:
        CALLS[measure](Losses())
    assert len(compiled) == programs


@pytest.mark.slow
def test_laws_that_share_a_program_have_their_own_draws():
    """The complexities in `theorem1` agree with the same ones by themselves."""
    options = QUICK | {"num_draws": 5}
    found = of_problem(complexity.theorem1, Losses(), THETA, data(), batch_size=2, **options)
    for side, law in (
        (found.gaussian_lower.right, complexity.gaussian(N)),
        (found.sgd.left, complexity.sgd(N, 2)),
        (found.sgd.right, complexity.rademacher(N, 2)),
    ):
        alone = of_problem(complexity.local_complexity, Losses(), THETA, data(), law, **options)
        np.testing.assert_allclose(side.draws, alone.draws, rtol=1e-5)
        np.testing.assert_allclose(side.first_order, alone.first_order, rtol=1e-5)


def test_a_changed_number_of_examples_is_seen():
    """The function that draws the data is the same object in both calls."""
    size = [5]

    def sample(key):
        return jax.random.normal(key, (size[0], 3))

    for n in (5, 7):
        size[0] = n
        law = complexity.gaussian(n)
        found = of_problem(
            complexity.local_complexity, lambda p, x: x @ p, THETA, sample, law, **QUICK
        )
        assert found.draws.shape == (2,)


@pytest.mark.optimized
@pytest.mark.parametrize("name", ["rademacher", "gaussian", "sgd", "cov"])
def test_a_draw_has_the_same_bits_in_any_program(name):
    n = 1000
    law = {
        "rademacher": complexity.rademacher(n, 300),
        "gaussian": complexity.gaussian(n),
        "sgd": complexity.sgd(n, 300),
        "cov": complexity.from_noise(noise.cov(n, 300)),
    }[name]
    alone = law.sample(KEY, 7)
    inside, _ = jax.jit(lambda key: (law.sample(key, 7), law.sample(key, 7).dense() * 3 + 1))(KEY)
    np.testing.assert_array_equal(inside.values, alone.values)
    several = jax.vmap(law.sample, in_axes=(None, 0))(KEY, jnp.arange(9))
    np.testing.assert_array_equal(several.values[7], alone.values)
