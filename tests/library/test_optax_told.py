"""Optimizers are given the loss and its derivatives too, all with the weights of one draw."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from msgd_jax import loss, noise, train, transform
from tests.library.test_optax import DATA, KEY, LAW, LOSSES, PARAMS, SGD, losses_at

NOISY = noise.fisher(8, 2)  # so much noise that the weights of another step give other numbers


def asks(names: str) -> optax.GradientTransformationExtraArgs:
    """An optimizer that passes gradients on, and keeps what it is given, by name.

    Functions are evaluated at ELSEWHERE.
    """

    def answer(extra):
        told = {"value": extra["value"], "grad": extra["grad"]}
        told["value_fn"], told["slope"] = jax.value_and_grad(extra["value_fn"])(ELSEWHERE)
        told["grad_fn"] = extra["grad_fn"](ELSEWHERE, 0)
        ones = jax.tree.map(jnp.ones_like, ELSEWHERE)
        told["curvature"] = jax.jvp(jax.grad(extra["obj_fn"]), (ELSEWHERE,), (ones,))[1]
        return {name: told[name] for name in names.split()}

    def update(updates, state, params=None, **extra):
        return updates, answer(extra)

    def init(params):
        like = dict.fromkeys(("grad", "slope", "grad_fn", "curvature"), params)
        like |= dict.fromkeys(("value", "value_fn"), jnp.zeros(()))
        return {name: like[name] for name in names.split()}

    return optax.GradientTransformationExtraArgs(init, update)


ALL = "value grad value_fn slope grad_fn curvature"
ELSEWHERE = jax.tree.map(lambda leaf: jnp.asarray(leaf - 0.3), PARAMS)


def expected(step: int, params) -> dict[str, Any]:
    """L . W, its gradient, and its Hessian times ones, by numpy in float64."""
    weights = np.asarray(NOISY.sample(KEY, step).dense(), np.float64)
    x, y = (np.asarray(DATA[name], np.float64) for name in "xy")
    w, b = (np.asarray(params[name], np.float64) for name in "wb")
    errors = 2 * weights[:, None] * (x @ w + b - y)
    turned = 2 * weights[:, None] * (x.sum(1, keepdims=True) + np.ones((1, 2)))
    return {
        "value": weights @ losses_at(params),
        "gradient": {"w": x.T @ errors, "b": errors.sum(0)},
        "curvature": {"w": x.T @ turned, "b": turned.sum(0)},
    }


def assert_told(told: dict[str, Any], step: int, params) -> None:
    here, there = expected(step, params), expected(step, ELSEWHERE)
    pairs = [
        (told["value"], here["value"]),
        (told["grad"], here["gradient"]),
        (told["value_fn"], there["value"]),
        (told["slope"], there["gradient"]),
        (told["grad_fn"], there["gradient"]),
        (told["curvature"], there["curvature"]),
    ]
    for got, right in pairs:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), got, right
        )


def spread() -> NamedSharding:
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    return NamedSharding(mesh, PartitionSpec("data"))


@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize("options", [{}, {"microbatch_size": 3}, {"sharding": spread()}])
def test_all_that_an_optimizer_is_given_has_the_weights_of_one_draw(options, has_state):
    """Statistics are those from before the step, whenever the optimizer evaluates the loss."""

    def with_state(params, batch, calls):
        return LOSSES(params, batch) + 0.0 * calls, calls + 1

    optimizer = asks(ALL)
    losses = with_state if has_state else LOSSES
    step = jax.jit(train.make_step(losses, optimizer, NOISY, has_state=has_state, **options))
    state = train.init(PARAMS, optimizer, KEY, jnp.zeros(()) if has_state else ())
    for number in range(2):
        before = state.params
        state, _ = step(state, DATA)
        assert_told(state.opt_state, number, before)
    if has_state:  # calls by the optimizer are not counted
        assert float(state.model_state) == (6 if "microbatch_size" in options else 2)


def test_the_transformation_gives_an_optimizer_the_same():
    optimizer = transform.with_noise(asks(ALL), NOISY, KEY)
    state, params = optimizer.init(PARAMS), PARAMS
    for number in range(2):
        told = {"loss_vector_fn": LOSSES, "data": DATA}
        updates, state = optimizer.update((), state, params, **told)
        assert_told(state[1], number, params)
        params = optax.apply_updates(params, updates)


def test_line_searches_of_several_seeds_may_be_mapped():
    optimizer = optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(8))
    step = train.make_step(LOSSES, optimizer, NOISY)
    states = jax.vmap(lambda seed: train.init(PARAMS, optimizer, jax.random.key(seed)))(
        jnp.arange(3)
    )
    states, _ = jax.jit(jax.vmap(step, in_axes=(0, None)))(states, DATA)
    for seed in range(3):
        alone, _ = jax.jit(step)(train.init(PARAMS, optimizer, jax.random.key(seed)), DATA)
        np.testing.assert_allclose(states.params["w"][seed], alone.params["w"], rtol=1e-4)


@pytest.mark.parametrize("microbatch_size", [None, 3])
def test_a_line_search_decreases_the_loss_with_the_weights_of_its_step(microbatch_size):
    """Armijo's condition must hold by numpy: with other weights it, or the value, would not."""
    search = optax.scale_by_backtracking_linesearch(20, slope_rtol=0.1, store_grad=True)
    optimizer = optax.chain(optax.sgd(1.0), search)
    step = jax.jit(train.make_step(LOSSES, optimizer, NOISY, microbatch_size=microbatch_size))
    state = train.init(PARAMS, optimizer, KEY)
    for number in range(3):
        before = expected(number, state.params)
        state, metrics = step(state, DATA)
        after = expected(number, state.params)
        found = state.opt_state[1]
        squares = sum((leaf**2).sum() for leaf in before["gradient"].values())
        rate = float(found.learning_rate)
        assert after["value"] <= before["value"] - 0.1 * rate * squares + 1e-4
        np.testing.assert_allclose(found.value, after["value"], rtol=1e-4)
        np.testing.assert_allclose(found.grad["w"], after["gradient"]["w"], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(metrics.loss, before["value"], rtol=1e-4)


def test_lbfgs_solves_least_squares():
    optimizer = optax.lbfgs()
    loop = train.make_loop(train.make_step(LOSSES, optimizer, noise.gd(8)), max_steps=25)
    state, metrics = loop(train.init(PARAMS, optimizer, KEY), DATA, 25)
    np.testing.assert_allclose(state.params["w"], np.ones((4, 2)), atol=1e-3)
    assert metrics.loss[-1] < 1e-6 * metrics.loss[0]


def test_sam_takes_the_gradient_of_its_step_at_the_adversary():
    rho = 0.05
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(rho))
    optimizer = optax.contrib.sam(optax.sgd(0.1), adversary, opaque_mode=True)
    step = jax.jit(train.make_step(LOSSES, optimizer, NOISY))
    state, _ = step(train.init(PARAMS, optimizer, KEY), DATA)
    gradient = expected(0, PARAMS)["gradient"]
    norm = np.sqrt(sum((leaf**2).sum() for leaf in gradient.values()))
    there = {name: PARAMS[name] + rho * leaf / norm for name, leaf in gradient.items()}
    for name, leaf in expected(0, there)["gradient"].items():
        np.testing.assert_allclose(
            state.params[name], PARAMS[name] - 0.1 * leaf, rtol=1e-4, atol=1e-5
        )


def test_sam_in_a_chain_is_refused_with_advice():
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    optimizer = optax.chain(optax.clip(1.0), optax.contrib.sam(SGD, adversary))
    step = train.make_step(LOSSES, optimizer, LAW)
    with pytest.raises(TypeError, match="unexpected keyword argument") as caught:
        step(train.init(PARAMS, optimizer, KEY), DATA)
    assert "sam goes around a chain" in caught.value.__notes__[0]


@pytest.mark.parametrize("make", [optax.polyak_sgd, optax.contrib.momo])
def test_optimizers_that_take_the_value_stand_behind_the_noise(make):
    """They make the same updates as in `train`, which gives them the value too."""
    optimizer = optax.chain(make(), optax.contrib.reduce_on_plateau(patience=1))
    behind = transform.with_noise(optimizer, NOISY, KEY)

    @jax.jit
    def update(params, state):
        updates, state = behind.update((), state, params, loss_vector_fn=LOSSES, data=DATA)
        return optax.apply_updates(params, updates), state

    step = jax.jit(train.make_step(LOSSES, optimizer, NOISY))
    trained, params, state = train.init(PARAMS, optimizer, KEY), PARAMS, behind.init(PARAMS)
    for _ in range(3):
        trained, metrics = step(trained, DATA)
        params, state = update(params, state)
    np.testing.assert_allclose(params["w"], trained.params["w"], rtol=1e-5)
    np.testing.assert_allclose(state[0].value, metrics.loss, rtol=1e-5)


def test_what_an_optimizer_does_not_take_costs_nothing():
    """With an optimizer that takes the gradient only, the loss is traced as for the gradient."""
    traced = []

    def counting(params, batch):
        traced.append(1)
        return LOSSES(params, batch)

    optimizer = optax.chain(optax.clip(1.0), SGD)
    gradient = loss.noisy_value_and_grad(counting, LAW)
    jax.make_jaxpr(lambda params: gradient(params, DATA, KEY, 0))(PARAMS)
    alone = len(traced)
    step = train.make_step(counting, optimizer, LAW)
    jax.make_jaxpr(step)(train.init(PARAMS, optimizer, KEY), DATA)
    assert len(traced) == 2 * alone
