"""One iteration of training and of its SDE, for M-SGD, momentum and adaptive rules."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from msgd_jax import loss
from msgd_jax._typing import Params, PyTree, Scalar
from msgd_jax.noise import Weights
from msgd_jax.sde import _adaptive, _dynamics, _underdamped
from msgd_jax.sde._dynamics import Equation
from msgd_jax.sde._rules import Adam, Momentum, RMSprop

Rule = Momentum | Adam | RMSprop


class Motion(NamedTuple):
    """How a point moves; it is a pytree of the parameters and what a rule keeps beside them.

    Attributes:
        start: the point at rest at these parameters.
        params_of: the parameters of a point.
        advance: the point after one iteration, from ``(point, drawn, step, learning_rate)``: what
            is drawn are the weights in training, and the increments of the Brownian path in the
            SDE.
    """

    start: Callable[[Params], PyTree]
    params_of: Callable[[PyTree], Params]
    advance: Callable[[PyTree, PyTree, Int[Array, ""], Float[Array, ""]], PyTree]


def training(rule: Rule | None, losses: loss.LossVector, numbers: dict[str, Scalar]) -> Motion:
    """Training with this rule and its numbers (`Momentum.at`, `Adam.at`), as optax does it."""
    if rule is None:
        optimizer = optax.sgd(1.0)
    elif isinstance(rule, Momentum):
        optimizer = optax.chain(optax.trace(numbers["momentum"]), optax.scale(-1.0))
    else:
        optimizer = dataclasses.replace(_rule_of(rule, numbers), learning_rate=1.0).optimizer()

    def advance(
        point: PyTree, weights: Weights, step: Int[Array, ""], learning_rate: Float[Array, ""]
    ) -> PyTree:
        params, state = point
        gradient = losses.gradient(params, weights)
        updates, state = optimizer.update(gradient, state, params)
        return _dynamics.step_along(params, updates, learning_rate), state

    return Motion(lambda params: (params, optimizer.init(params)), lambda at: at[0], advance)


def equation_of(rule: Rule | None, equation: Equation, numbers: dict[str, Scalar]) -> Motion:
    """The SDE of this rule, integrated in substeps; `equation` has the law's own covariance."""
    if rule is None:

        def move(
            point: PyTree, increments: Array, step: Int[Array, ""], rate: Float[Array, ""]
        ) -> PyTree:
            return equation.iteration(point, increments, rate)

        return Motion(lambda params: params, lambda point: point, move)
    if isinstance(rule, Momentum):
        momentum = jnp.asarray(numbers["momentum"], equation.dtype)

        def swing(
            point: PyTree, increments: Array, step: Int[Array, ""], rate: Float[Array, ""]
        ) -> PyTree:
            return _underdamped.momentum_iteration(equation, point, increments, rate, momentum)

        return Motion(
            lambda params: (params, optax.tree.zeros_like(params)), lambda at: at[0], swing
        )
    scaled, own = scaled_equation(equation, numbers), _rule_of(rule, numbers)

    def adapt(
        point: PyTree, increments: Array, step: Int[Array, ""], rate: Float[Array, ""]
    ) -> PyTree:
        return _adaptive.adaptive_iteration(scaled, own, point, step, increments, rate)

    return Motion(lambda params: _adaptive.at_rest(params, own), lambda at: at.params, adapt)


def scaled_equation(equation: Equation, numbers: dict[str, Scalar]) -> Equation:
    """The equation at another learning rate of an adaptive rule: its covariance over the ratio."""
    if "ratio" not in numbers:
        return equation
    ratio = jnp.asarray(numbers["ratio"], equation.dtype)
    across, along = (jnp.asarray(value, equation.dtype) / ratio for value in equation.moments)
    return equation._replace(moments=(across, along))


def _rule_of(rule: Adam | RMSprop, numbers: dict[str, Scalar]) -> Adam | RMSprop:
    return dataclasses.replace(
        rule, **{name: value for name, value in numbers.items() if name not in ("ratio", "time")}
    )
