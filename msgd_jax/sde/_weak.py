"""The weak error: the difference of expectations under the iteration and under the SDE."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from msgd_jax import _laws, _validate, loss
from msgd_jax._laws import Law
from msgd_jax._streams import Stream, derive
from msgd_jax._typing import Data, Gradients, Params, PyTree, Scalar
from msgd_jax.noise import MNoise, Weights, scaled
from msgd_jax.sde import _dynamics, _euler_maruyama, _fits, _motions, _schedules, _sweeps
from msgd_jax.sde._dynamics import Equation, Scheme
from msgd_jax.sde._rules import Adam, RMSprop
from msgd_jax.sde._sweeps import Sweep

TestFn = Callable[[Params, Data], Float[Array, ""]]
"""g, ``test_fn(params, data)``: a differentiable scalar whose expectation is compared."""


def weak_error(
    losses: loss.LossVector,
    params: Params,
    law: Law,
    sweep: Sweep,
    *,
    key: Key[Array, ""],
    scheme: Scheme = Scheme(),  # noqa: B008 (frozen)
    iterate: MNoise | None = None,
    test_fn: TestFn | None = None,
    control_variate: bool = True,
) -> _fits.ErrorSweep:
    """E g(theta_K) - E g(Theta_T), of the iteration and of the SDE at a fixed time (Theorem 2).

    **An order of 1 says nothing about the noise**: gradient flow without noise has order 1 too,
    since the noise changes expectations by O(eta) only. With a scheme of order 2 the SDE has the
    drift ``-grad(L + eta/4 |grad L|^2)``, and the error has order 2 if the SDE has the iteration's
    covariance, and order 1 if not. So use a scheme of order 2 to test the noise.

    Each call compiles one program per side, for all learning rates, and frees it afterwards.

    Both sides are sampled, with independent paths. The control variate is grad g . y, where y is
    the linear response of the path to its noise along the noise-free path, so that E y = 0 exactly.
    It is subtracted from g, and lowers the standard error from O(sqrt(eta)) to O(eta), at the cost
    of a Hessian-vector product and a gradient per step. It has no effect if grad g = 0, as at a
    minimum of L for g = L. It is not used with `Adam` and `RMSprop`, whose response to their noise
    is not nearly linear.

    With a rule in the sweep, iteration and SDE are those of the rule: the order is 1/2 in eta for
    `Momentum`, and 2 in eta, which is 1 in the time of an iteration, for `Adam` and `RMSprop`.

    Args:
        losses: the loss vector.
        params: the starting point of all paths: a pytree of float32 or float64 arrays.
        law: the law whose covariance the SDE has: a `noise.MNoise` with independent steps, or a
            `noise.Exchangeable`.
        sweep: the learning rates, their schedule, the time, and the number of paths.
        key: a typed PRNG key.
        scheme: the number of substeps per iteration, and the order of the SDE. The SDE is sampled
            with an error of its own, O(eta/substeps) for order 1 and O(eta^2/substeps) for order 2.
            With a rule, order 1.
        iterate: the law of the iteration's weights (its steps may depend on each other); None for
            `law`, which must then be a `noise.MNoise`.
        test_fn: g, ``test_fn(params, data)`` returns a differentiable scalar; None for the mean
            loss L.
        control_variate: whether to use the control variate.

    Returns:
        The differences with their standard errors, and the order that fits their sizes.

    Raises:
        TypeError: if `losses` is not a `loss.LossVector`, `params` are not float32 or float64, a
            law is not a law, `sweep` is not a `Sweep`, `scheme` is not a `Scheme`, `test_fn` is not
            a function, or `key` is not a typed PRNG key.
        ValueError: if a law is for another number of examples, the steps of `law` depend on each
            other, it states no covariance, `scheme` does not fit the rule, or a path becomes
            infinite or NaN; the error then names the learning rate and the iteration.
    """
    equation = Equation.of(losses, params, law, scheme)
    _sweeps.checked(sweep)
    _validate.prng_key("key", key)
    iterate = law if iterate is None and isinstance(law, MNoise) else iterate
    if not isinstance(iterate, MNoise):
        raise TypeError(
            "iterate must be the noise.MNoise that the iteration draws, or None if law is one, "
            f"got {_validate.shown(iterate)}."
        )
    _laws.of_size("iterate", iterate, losses.num_examples)
    _sweeps.check_rule(sweep.rule, scheme)
    params = jax.tree.map(jnp.asarray, params)
    if test_fn is not None:
        _check_test_fn(test_fn, params, losses.data)

    # The response of an adaptive rule to noise is not nearly linear: its noise-free path divides by
    # the squares of gradients without noise.
    linear = control_variate and not isinstance(sweep.rule, Adam | RMSprop)

    # One program per side for all learning rates, which are freed after the call.
    def program(side: MNoise | None) -> Callable[..., tuple[Array, Array]]:
        @jax.jit
        def final_values(
            params: Params,
            data: Data,
            rate: Scalar,
            numbers: dict[str, Scalar],
            steps: Int[Array, ""],
            key: Key[Array, ""],
        ) -> tuple[Float[Array, " paths"], Int[Array, " paths"]]:
            own = equation.with_data(data)
            rate_at = sweep.rate_at(rate, numbers["time"], equation.dtype)
            if sweep.rule is None:
                motion = _identity
                if side is None:
                    advance = _sde(own, rate_at, linear)
                else:
                    advance = _iteration(own.losses, side, rate_at, linear)
            else:
                motion, advance = _by_rule(sweep.rule, own, side, rate_at, linear, numbers)
            one_path = _one_path(own.losses, motion, advance, test_fn, linear, params, steps)
            return sweep.over_paths(one_path, key)

        return final_values

    sides = {"iteration": program(iterate), "SDE": program(None)}
    what = "the mean loss" if test_fn is None else "test_fn"
    errors, standard_errors, freedom = [], [], []
    for index, (rate, steps) in enumerate(zip(sweep.learning_rates, sweep.num_steps, strict=True)):
        means, spreads = [], []
        keys = jax.random.split(derive(key, Stream.PATHS, index))
        for (side, final_values), side_key in zip(sides.items(), keys, strict=True):
            numbers = sweep.numbers(rate)
            values, left_at = final_values(params, losses.data, rate, numbers, steps, side_key)
            _sweeps.check_finite(left_at, rate, side)
            values = _sweeps.check_values(values, rate, f"{what} (less its control variate)")
            mean, spread = _sweeps.mean_and_spread(values)
            means.append(mean)
            spreads.append(spread)
        errors.append(means[0] - means[1])
        standard_errors.append(math.hypot(*spreads))
        freedom.append(_fits.satterthwaite(spreads, sweep.num_paths - 1))
    return _fits.ErrorSweep(
        sweep.rates, np.array(errors), np.array(standard_errors), np.array(freedom)
    )


def _check_test_fn(test_fn: TestFn, params: Params, data: Data) -> None:
    """Raises TypeError or ValueError unless `test_fn` returns a real scalar."""
    _validate.function("test_fn", test_fn)
    value = jax.eval_shape(test_fn, params, data)
    got = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", value)
    if not hasattr(value, "dtype") or not jnp.issubdtype(value.dtype, jnp.floating) or value.shape:
        raise ValueError(
            "test_fn must return a scalar of floating-point numbers, for parameters and all data, "
            f"got {_validate.shown(got)}."
        )


class _State(NamedTuple):
    """A path, the noise-free path, the linear response, and when the path diverged, or -1."""

    point: PyTree
    centre: PyTree
    response: PyTree
    left_at: Int[Array, ""]


Advance = Callable[[Key[Array, ""], Int[Array, ""], _State], _State]


def _one_path(
    losses: loss.LossVector,
    motion: _motions.Motion,
    advance: Advance,
    test_fn: TestFn | None,
    control_variate: bool,
    params: Params,
    num_steps: Int[Array, ""],
) -> Callable[[Key[Array, ""]], tuple[Float[Array, ""], Int[Array, ""]]]:
    """A function from a key to g at the end of its path, less the control variate."""

    def g(point: PyTree) -> Float[Array, ""]:
        params = motion.params_of(point)
        return losses.mean(params) if test_fn is None else test_fn(params, losses.data)

    def one_path(key: Key[Array, ""]) -> tuple[Float[Array, ""], Int[Array, ""]]:
        def advance_and_check(step: Int[Array, ""], state: _State) -> _State:
            new = advance(key, step, state)
            finite = _euler_maruyama.all_finite(new.point)
            return new._replace(left_at=_sweeps.left_at(state.left_at, step, finite))

        point = motion.start(params)
        quiet = (point, optax.tree.zeros_like(point)) if control_variate else ((), ())
        start = _State(point, *quiet, jnp.asarray(-1, jnp.int32))
        end = jax.lax.fori_loop(0, num_steps, advance_and_check, start)
        value = g(end.point)
        if control_variate:
            value = value - jax.jvp(g, (end.centre,), (end.response,))[1]
        return value, end.left_at

    return one_path


def _by_rule(
    rule: _motions.Rule,
    equation: Equation,
    iterate: MNoise | None,
    rate_at: _schedules.RateAt,
    control_variate: bool,
    numbers: dict[str, Scalar],
) -> tuple[_motions.Motion, Advance]:
    """How the SDE of a rule, or training with it by the law `iterate`, moves from step to step."""
    losses, size = equation.losses, equation.losses.num_examples
    if iterate is None:
        motion, draw = _motions.equation_of(rule, equation, numbers), equation.increments
    else:
        by_weights = _motions.training(rule, losses, numbers)
        law = iterate
        if "ratio" in numbers:  # of an adaptive rule, whose law is another at each learning rate
            law = scaled(iterate, jnp.asarray(numbers["ratio"], equation.dtype) ** -0.5)

        def draw(key: Key[Array, ""], step: Int[Array, ""]) -> Float[Array, " N"]:
            return law.sample(key, step).dense() - 1 / size

        def trained(point: PyTree, drawn: Array, step: Array, rate: Array) -> PyTree:
            return by_weights.advance(point, Weights(1 / size + drawn, None, size), step, rate)

        motion = by_weights._replace(advance=trained)

    def advance(key: Key[Array, ""], step: Int[Array, ""], state: _State) -> _State:
        drawn, rate = draw(key, step), rate_at(step)
        point = motion.advance(state.point, drawn, step, rate)
        if not control_variate:
            return state._replace(point=point)

        def move(point: PyTree, drawn: Array) -> PyTree:
            return motion.advance(point, drawn, step, rate)

        # The noise-free path, and the response of the path to its noise, to first order.
        quiet = state.centre, jnp.zeros_like(drawn)
        centre, response = jax.jvp(move, quiet, (state.response, drawn))
        return _State(point, centre, response, state.left_at)

    return motion, advance


def _plain(point: PyTree, *_: Any) -> PyTree:
    return point


_identity = _motions.Motion(start=_plain, params_of=_plain, advance=_plain)


def _iteration(
    losses: loss.LossVector, law: MNoise, rate_at: _schedules.RateAt, control_variate: bool
) -> Advance:
    """The step theta - eta grad(L . W), and the same linearised around gradient descent."""

    def advance(key: Key[Array, ""], step: Int[Array, ""], state: _State) -> _State:
        weights, rate = law.sample(key, step), rate_at(step)
        noisy_gradient = losses.gradient(state.point, weights)
        moved = _dynamics.step_along(state.point, noisy_gradient, -rate)
        if not control_variate:
            return state._replace(point=moved)
        # The noise-free path, and the response of the path to its noise, to first order.
        gradient = losses.gradient(state.centre)
        noise = jax.tree.map(jnp.subtract, gradient, losses.gradient(state.centre, weights))
        return _State(
            moved,
            _dynamics.step_along(state.centre, gradient, -rate),
            _respond(losses, state, noise, noise_scale=rate, time=rate),
            state.left_at,
        )

    return advance


def _sde(equation: Equation, rate_at: _schedules.RateAt, control_variate: bool) -> Advance:
    """One iteration of the SDE in substeps, and the same linearised around the noise-free path."""
    losses, root, length = equation.losses, equation.root, 1 / equation.scheme.substeps
    quiet = jnp.zeros(losses.num_examples, equation.dtype)

    def substep(
        rate: Float[Array, ""], state: _State, increment: Float[Array, " N"]
    ) -> tuple[_State, None]:
        coloured = root(increment)
        moved = equation.substep(state.point, coloured, rate)
        if not control_variate:
            return state._replace(point=moved), None
        noise = losses.gradient(state.centre, coloured)
        new = _State(
            moved,
            equation.substep(state.centre, quiet, rate),
            _respond(losses, state, noise, noise_scale=rate, time=length * rate),
            state.left_at,
        )
        return new, None

    def advance(key: Key[Array, ""], step: Int[Array, ""], state: _State) -> _State:
        one = functools.partial(substep, rate_at(step))
        return jax.lax.scan(one, state, equation.increments(key, step))[0]

    return advance


def _respond(
    losses: loss.LossVector, state: _State, noise: Gradients, *, noise_scale: Scalar, time: Scalar
) -> Gradients:
    """The linear response after a step: y - time H y + scale * noise, H and noise at the centre."""
    curved = losses.hessian_product(state.centre, state.response)
    response = _dynamics.step_along(state.response, curved, -time)
    return _dynamics.step_along(response, noise, noise_scale)
