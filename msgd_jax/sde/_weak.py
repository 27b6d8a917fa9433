"""The weak error: how far expectations under the iteration are from those under the SDE."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from msgd_jax import _validate
from msgd_jax.loss import LossVectorFn
from msgd_jax.noise import MNoise
from msgd_jax.sde import _brownian, _dynamics, _euler_maruyama, _fits, _sweeps


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

    Both sides are sampled, with independent paths. The control variate is the linear response y of
    the path to its noise along the noise-free path, for which E y = 0 exactly: grad g . y is
    subtracted from g. It lowers the standard error from O(sqrt(eta)) to O(eta), at the price of a
    Hessian-vector product and a gradient in each step; where grad g = 0, as at a minimum of L for
    g = L, it does nothing.

    Args:
        loss_vector_fn: ``loss_vector_fn(params, batch)`` returns the losses of the batch, [B].
        params: where all paths start: a pytree of float32 or float64 arrays.
        data: a pytree of arrays [N, ...].
        noise: whose covariance the SDE has: a `noise.MNoise` or a `noise.Exchangeable`.
        learning_rates: eta, each a whole fraction of `horizon`.
        horizon: T, the time at which expectations are taken, above 0.
        num_paths: paths for each eta and each side, at least 2.
        key: a typed PRNG key.
        substeps: of the SDE in one iteration, a power of two. The SDE is sampled with an error of
            its own, O(eta/substeps) for order 1 and O(eta^2/substeps) for order 2.
        iterate: the M-noise of the iteration; None for `noise`, which must be an MNoise then.
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
            f"got {type(iterate).__name__}."
        )
    _dynamics.eigenvalues(iterate, _validate.leading_axis("data", data))
    if test_fn is not None:
        _validate.function("test_fn", test_fn)
    errors, standard_errors = [], []
    for index, (rate, steps) in enumerate(zip(rates, num_steps, strict=True)):
        moments = []
        keys = jax.random.split(jax.random.fold_in(key, index))
        for side, side_key, what in zip((iterate, None), keys, ("iteration", "SDE"), strict=True):
            values, left_at = _final_values(
                *problem, side, test_fn, control_variate, rate, steps, side_key, num_paths,
                paths_per_pass,
            )  # fmt: skip
            _sweeps.check_finite(left_at, rate, what)
            values = np.asarray(values, np.float64)
            moments.append((values.mean(), values.std(ddof=1) / math.sqrt(num_paths)))
        (iteration, iteration_spread), (sde, sde_spread) = moments
        errors.append(iteration - sde)
        standard_errors.append(math.hypot(iteration_spread, sde_spread))
    return _fits.ErrorSweep(rates, np.array(errors), np.array(standard_errors))


class _State(NamedTuple):
    """A path, the noise-free path, the linear response, and when the path left finite numbers."""

    params: Any
    centre: Any
    response: Any
    left_at: Int[Array, ""]


@functools.partial(
    jax.jit,
    static_argnames=(
        "loss_vector_fn", "substeps", "order", "microbatch_size", "iterate", "test_fn",
        "control_variate", "num_paths", "paths_per_pass",
    ),
)  # fmt: skip
def _final_values(
    loss_vector_fn: Any,
    params: Any,
    data: Any,
    eigenvalues: tuple[Any, Any],
    substeps: int,
    order: int,
    microbatch_size: int | None,
    iterate: MNoise | None,
    test_fn: Any,
    control_variate: bool,
    learning_rate: Any,
    num_steps: Any,
    key: Key[Array, ""],
    num_paths: int,
    paths_per_pass: int | None,
) -> tuple[Float[Array, " paths"], Int[Array, " paths"]]:
    """Of every path, g at the end less its control variate; of the SDE where `iterate` is None."""
    field = _dynamics.Field.of(loss_vector_fn, params, data, microbatch_size)
    rate = jnp.asarray(learning_rate, field.dtype)
    root = _dynamics.Root(*(jnp.asarray(value, field.dtype) for value in eigenvalues))
    if iterate is None:
        advance = _sde(field, root, rate, order, substeps, control_variate)
    else:
        advance = _iteration(field, iterate, rate, control_variate)

    def g(params: Any) -> Float[Array, ""]:
        return field.loss(params) if test_fn is None else test_fn(params, data)

    def one_path(key: Key[Array, ""]) -> tuple[Float[Array, ""], Int[Array, ""]]:
        def advance_and_check(step: Any, state: _State) -> _State:
            new = advance(key, step, state)
            left = (new.left_at < 0) & ~_euler_maruyama.all_finite(new.params)
            return new._replace(left_at=jnp.where(left, step, new.left_at))

        start = _State(params, params, optax.tree.zeros_like(params), jnp.asarray(-1, jnp.int32))
        end = jax.lax.fori_loop(0, num_steps, advance_and_check, start)
        value = g(end.params)
        if control_variate:
            value = value - jax.jvp(g, (end.centre,), (end.response,))[1]
        return value, end.left_at

    return _sweeps.over_paths(one_path, key, num_paths, paths_per_pass)


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
    field: _dynamics.Field,
    root: _dynamics.Root,
    rate: Any,
    order: int,
    substeps: int,
    control_variate: bool,
) -> Advance:
    """One iteration of the SDE in substeps, and the same linearised around the noise-free path."""
    length = 1 / substeps
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
        increments = _brownian.brownian_increments(
            key, step, field.num_examples, substeps=substeps, dtype=field.dtype
        )
        return jax.lax.scan(substep, state, increments)[0]

    return advance


def _respond(
    field: _dynamics.Field, state: _State, noise: Any, *, noise_scale: Any, time: Any
) -> Any:
    """The linear response a step later: y - time H y + scale * noise, H and noise at the centre."""
    curved = field.hessian_product(state.centre, state.response)
    response = _dynamics.step_along(state.response, curved, -time)
    return _dynamics.step_along(response, noise, noise_scale)
