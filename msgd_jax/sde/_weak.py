"""The weak error: how far expectations under the iteration are from those under the SDE."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from msgd_jax import _validate
from msgd_jax._streams import Stream, derive
from msgd_jax.loss import LossVectorFn
from msgd_jax.noise import MNoise
from msgd_jax.sde import _dynamics, _euler_maruyama, _fits, _sweeps


def weak_error(
    loss_vector_fn: LossVectorFn,
    params: Any,
    data: Any,
    noise: _dynamics.Law,
    *,
    learning_rates: Sequence[float],
    horizon: float,
    num_paths: int,
    key: Key[Array, ""],
    substeps: int = 8,
    iterate: MNoise | None = None,
    order: int = 1,
    test_fn: Callable[[Any, Any], Float[Array, ""]] | None = None,
    control_variate: bool = True,
    microbatch_size: int | None = None,
    paths_per_pass: int | None = None,
) -> _fits.ErrorSweep:
    """E g(theta_K) - E g(Theta_T), of the iteration and of the SDE at a fixed time (Theorem 2).

    **Of order 1 this says nothing about the noise**: gradient flow without any noise passes too,
    for the noise moves expectations by O(eta) only. With ``order=2`` the SDE has the drift
    ``-grad(L + eta/4 |grad L|^2)``, and the error is of order 2 if the SDE has the iteration's
    covariance, and of order 1 if not: that is the test to make.

    It is compiled anew on each call, once for all learning rates, and nothing is kept.

    Both sides are sampled, with independent paths. The control variate is the linear response y of
    the path to its noise along the noise-free path, for which E y = 0 exactly: grad g . y is
    subtracted from g. It lowers the standard error from O(sqrt(eta)) to O(eta), at the price of a
    Hessian-vector product and a gradient in each step; where grad g = 0, as at a minimum of L for
    g = L, it does nothing.

    Args:
        loss_vector_fn: ``loss_vector_fn(params, batch)`` returns the losses of the batch, [B].
        params: where all paths start: a pytree of float32 or float64 arrays.
        data: a pytree of arrays [N, ...].
        noise: whose covariance the SDE has: a `noise.MNoise` with independent steps, or a
            `noise.Exchangeable`.
        learning_rates: eta, each a whole fraction of `horizon`.
        horizon: T, the time at which expectations are taken, above 0.
        num_paths: paths for each eta and each side, at least 4.
        key: a typed PRNG key.
        substeps: of the SDE in one iteration, a power of two. The SDE is sampled with an error of
            its own, O(eta/substeps) for order 1 and O(eta^2/substeps) for order 2.
        iterate: the M-noise of the iteration, drawn by its own sampling (its steps may depend on
            each other); None for `noise`, which must be an MNoise then.
        order: of the SDE, as in `euler_maruyama`.
        test_fn: g, ``test_fn(params, data)`` returns a differentiable scalar; None for the mean
            loss L.
        control_variate: whether to use it.
        microbatch_size: examples in one pass, as in `loss.weighted_value_and_grad`; None for all.
        paths_per_pass: paths in memory at once; None for all.

    Returns:
        The differences with their standard errors, and the order that their sizes fit.

    Raises:
        TypeError, ValueError: if an argument is not as described, or a path leaves the finite
            numbers: then with the learning rate and the iteration.
    """
    problem = _sweeps.Problem.of(
        loss_vector_fn, params, data, noise, substeps, order, microbatch_size
    )
    rates, num_steps = _sweeps.whole_steps(learning_rates, horizon)
    _sweeps.check_paths(num_paths, paths_per_pass)
    _validate.prng_key("key", key)
    iterate = noise if iterate is None and isinstance(noise, MNoise) else iterate
    if not isinstance(iterate, MNoise):
        raise TypeError(
            "iterate must be the noise.MNoise that the iteration draws, or None if noise is one, "
            f"got {_validate.shown(iterate)}."
        )
    _dynamics.check_size(iterate, problem.num_examples, "iterate")
    if test_fn is not None:
        _check_test_fn(test_fn, problem)

    # Two programs for all learning rates, which nobody holds when this call is over.
    def program(side: MNoise | None) -> Any:
        @jax.jit
        def final_values(
            params: Any, data: Any, rate: Any, steps: Any, key: Key[Array, ""]
        ) -> tuple[Float[Array, " paths"], Int[Array, " paths"]]:
            one_path = _one_path(problem, side, test_fn, control_variate, params, data, rate, steps)
            return _sweeps.over_paths(one_path, key, num_paths, paths_per_pass)

        return final_values

    sides = {"iteration": program(iterate), "SDE": program(None)}
    errors, standard_errors, freedom = [], [], []
    for index, (rate, steps) in enumerate(zip(rates, num_steps, strict=True)):
        means, spreads = [], []
        keys = jax.random.split(derive(key, Stream.PATHS, index))
        for (side, final_values), side_key in zip(sides.items(), keys, strict=True):
            values, left_at = final_values(problem.params, problem.data, rate, steps, side_key)
            _sweeps.check_finite(left_at, rate, side)
            what = "the mean loss" if test_fn is None else "test_fn"
            values = _sweeps.check_values(values, rate, f"{what} (less its control variate)")
            mean, spread = _sweeps.mean_and_spread(values)
            means.append(mean)
            spreads.append(spread)
        errors.append(means[0] - means[1])
        standard_errors.append(math.hypot(*spreads))
        freedom.append(_fits.satterthwaite(spreads, num_paths - 1))
    return _fits.ErrorSweep(rates, np.array(errors), np.array(standard_errors), np.array(freedom))


def _check_test_fn(test_fn: Any, problem: _sweeps.Problem) -> None:
    """Raises TypeError or ValueError unless `test_fn` returns a real scalar."""
    _validate.function("test_fn", test_fn)
    value = jax.eval_shape(test_fn, problem.params, problem.data)
    got = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", value)
    if not hasattr(value, "dtype") or not jnp.issubdtype(value.dtype, jnp.floating) or value.shape:
        raise ValueError(
            "test_fn must return a scalar of floating-point numbers, for parameters and all data, "
            f"got {_validate.shown(got)}."
        )


class _State(NamedTuple):
    """A path, the noise-free path, the linear response, and when the path left finite numbers."""

    params: Any
    centre: Any
    response: Any
    left_at: Int[Array, ""]


def _one_path(
    problem: _sweeps.Problem,
    iterate: MNoise | None,
    test_fn: Any,
    control_variate: bool,
    params: Any,
    data: Any,
    rate: Any,
    num_steps: Any,
) -> Callable[[Key[Array, ""]], tuple[Float[Array, ""], Int[Array, ""]]]:
    """Of a key: g at the end less its control variate; of the SDE where `iterate` is None."""
    field = problem.field(data)
    rate = jnp.asarray(rate, field.dtype)
    if iterate is None:
        advance = _sde(field, problem, rate, control_variate)
    else:
        advance = _iteration(field, iterate, rate, control_variate)

    def g(params: Any) -> Float[Array, ""]:
        return field.loss(params) if test_fn is None else test_fn(params, data)

    def one_path(key: Key[Array, ""]) -> tuple[Float[Array, ""], Int[Array, ""]]:
        def advance_and_check(step: Any, state: _State) -> _State:
            new = advance(key, step, state)
            finite = _euler_maruyama.all_finite(new.params)
            return new._replace(left_at=_sweeps.left_at(state.left_at, step, finite))

        start = _State(params, params, optax.tree.zeros_like(params), jnp.asarray(-1, jnp.int32))
        end = jax.lax.fori_loop(0, num_steps, advance_and_check, start)
        value = g(end.params)
        if control_variate:
            value = value - jax.jvp(g, (end.centre,), (end.response,))[1]
        return value, end.left_at

    return one_path


Advance = Callable[[Key[Array, ""], Any, _State], _State]


def _iteration(field: _dynamics.Field, law: MNoise, rate: Any, control_variate: bool) -> Advance:
    """The step theta - eta grad(L . W), and the same linearised around gradient descent."""

    def advance(key: Key[Array, ""], step: Any, state: _State) -> _State:
        weights = law.sample(key, step)

        def noisy_gradient(params: Any) -> Any:
            return field.value_and_grad(params, field.data, weights)[1]

        moved = _dynamics.step_along(state.params, noisy_gradient(state.params), -rate)
        if not control_variate:
            return state._replace(params=moved)
        gradient = field.gradient(state.centre)
        noise = jax.tree.map(jnp.subtract, gradient, noisy_gradient(state.centre))
        return _State(
            moved,
            _dynamics.step_along(state.centre, gradient, -rate),
            _respond(field, state, noise, noise_scale=rate, time=rate),
            state.left_at,
        )

    return advance


def _sde(
    field: _dynamics.Field, problem: _sweeps.Problem, rate: Any, control_variate: bool
) -> Advance:
    """One iteration of the SDE in substeps, and the same linearised around the noise-free path."""
    root, order, length = problem.root(field.dtype), problem.order, 1 / problem.substeps
    quiet = jnp.zeros(field.num_examples, field.dtype)

    def substep(state: _State, increment: Float[Array, " N"]) -> tuple[_State, None]:
        coloured = root(increment)
        moved = field.substep(state.params, coloured, rate, length, order)
        if not control_variate:
            return state._replace(params=moved), None
        noise = field.weighted_gradient(state.centre, coloured)
        new = _State(
            moved,
            field.substep(state.centre, quiet, rate, length, order),
            _respond(field, state, noise, noise_scale=rate, time=length * rate),
            state.left_at,
        )
        return new, None

    def advance(key: Key[Array, ""], step: Any, state: _State) -> _State:
        return jax.lax.scan(substep, state, problem.increments(key, step, field.dtype))[0]

    return advance


def _respond(
    field: _dynamics.Field, state: _State, noise: Any, *, noise_scale: Any, time: Any
) -> Any:
    """The linear response a step later: y - time H y + scale * noise, H and noise at the centre."""
    curved = field.hessian_product(state.centre, state.response)
    response = _dynamics.step_along(state.response, curved, -time)
    return _dynamics.step_along(response, noise, noise_scale)
