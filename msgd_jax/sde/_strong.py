"""The strong error: the distance between the iteration and the SDE, path by path."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from msgd_jax import _laws, _validate, loss
from msgd_jax._laws import Law
from msgd_jax._streams import Stream, derive
from msgd_jax._typing import Data, Params, PyTree, Scalar
from msgd_jax.noise import MNoise, Weights
from msgd_jax.sde import _dynamics, _euler_maruyama, _fits, _motions, _schedules, _sweeps
from msgd_jax.sde._dynamics import Equation, Scheme
from msgd_jax.sde._sweeps import Sweep


def strong_error(
    losses: loss.LossVector,
    params: Params,
    law: Law,
    sweep: Sweep,
    *,
    key: Key[Array, ""],
    scheme: Scheme = Scheme(),  # noqa: B008 (frozen)
    iterate: MNoise | _dynamics.Coupling | None = None,
) -> _fits.ErrorSweep:
    """The root mean square distance between iteration and SDE at a fixed time (Theorem 3).

    For each eta, the SDE with its own ``sqrt(eta) C`` (Eq. 68) is integrated in substeps, side by
    side with the iteration. By default the iteration is M-SGD-Gaussian on the same Brownian path,
    and the square of the error is ``a^2 eta^2 + c eta^3`` (`ErrorSweep.error_model`): a eta is the
    Euler error of gradient descent without noise, and the noise adds an error of order 3/2. So the
    order is 1 if a dominates, and up to 3/2 if the noise does. With a scheme of order 2 the error
    of the drift is gone and the order is 3/2. Without a shared path it is 1/2.

    With a rule in the sweep, iteration and SDE are those of the rule. The order is 1/2 in eta for
    `Momentum`, and 1 in eta for `Adam` and `RMSprop`.

    Each call compiles one program for all learning rates and frees it afterwards.

    The reference is computed by Euler steps too, so a is about 1 - 1/substeps times its value for
    the exact SDE.

    Args:
        losses: the loss vector.
        params: the starting point of all paths: a pytree of float32 or float64 arrays.
        law: the law whose covariance the SDE has: a `noise.MNoise` with independent steps, or a
            `noise.Exchangeable`.
        sweep: the learning rates, their schedule, the time, and the number of paths.
        key: a typed PRNG key; each eta has paths of its own.
        scheme: the number of substeps per iteration, and the order of the SDE, which is 1 with a
            rule.
        iterate: the weights of the iteration. None for ``coupling(law, N)``, M-SGD-Gaussian on the
            path of the SDE; for another coupling, a function from the Brownian increment over the
            iteration, [N] in units of sqrt(eta), to weights [N]; or a `noise.MNoise`, whose draws
            do not depend on the path (its steps may depend on each other). With an adaptive rule,
            None.

    Returns:
        The errors with their standard errors, and the order that fits them.

    Raises:
        TypeError: if `losses` is not a `loss.LossVector`, `params` are not float32 or float64,
            `law` is not a law, `sweep` is not a `Sweep`, `scheme` is not a `Scheme`, `iterate` is
            neither a law nor a function, or `key` is not a typed PRNG key.
        ValueError: if a law is for another number of examples, the steps of `law` depend on each
            other, it states no covariance, `scheme` or `iterate` does not fit the rule, or a path
            becomes infinite or NaN; the error then names the learning rate and the iteration.
    """
    equation = Equation.of(losses, params, law, scheme)
    _sweeps.checked(sweep)
    _validate.prng_key("key", key)
    if isinstance(iterate, MNoise):
        _laws.of_size("iterate", iterate, losses.num_examples)
    elif iterate is not None:
        _validate.function("iterate", iterate)
    _sweeps.check_rule(sweep.rule, scheme, iterate)
    params = jax.tree.map(jnp.asarray, params)

    # One program for all learning rates, which is freed after the call.
    @jax.jit
    def distances_of_all(
        params: Params,
        data: Data,
        rate: Scalar,
        numbers: dict[str, Scalar],
        steps: Int[Array, ""],
        key: Key[Array, ""],
    ) -> tuple[_Distance, Int[Array, " paths"]]:
        own = equation.with_data(data)
        rate_at = sweep.rate_at(rate, numbers["time"], equation.dtype)
        sides = (
            _motions.equation_of(sweep.rule, own, numbers),
            _motions.training(sweep.rule, own.losses, numbers),
        )
        driven = _motions.scaled_equation(own, numbers)  # whose noise drives the iteration
        one_path = _one_path(driven, sides, iterate, params, rate_at, steps)
        return sweep.over_paths(one_path, key)

    errors, standard_errors = [], []
    for index, (rate, steps) in enumerate(zip(sweep.learning_rates, sweep.num_steps, strict=True)):
        own_key = derive(key, Stream.PATHS, index)
        numbers = sweep.numbers(rate)
        distances, left_at = distances_of_all(params, losses.data, rate, numbers, steps, own_key)
        _sweeps.check_finite(left_at, rate, "iteration and SDE")
        error, standard_error = _root_mean_square(distances.on_host(rate))
        errors.append(error)
        standard_errors.append(standard_error)
    freedom = sweep.num_paths - 1
    return _fits.ErrorSweep(sweep.rates, np.array(errors), np.array(standard_errors), freedom)


class _Distance(NamedTuple):
    """The norm of a difference as a product of two numbers, since it may overflow or vanish."""

    largest: Float[Array, "*paths"]
    ratio: Float[Array, "*paths"]

    @classmethod
    def between(cls, one: Params, other: Params) -> "_Distance":
        """The distance of two finite points."""
        # Half of the difference never overflows, and halving is exact.
        halves = jax.tree.map(lambda a, b: 0.5 * a - 0.5 * b, one, other)
        largest = optax.tree.norm(halves, ord=jnp.inf)
        divisor = jnp.where(largest > 0, largest, 1)
        ratio = optax.tree.norm(jax.tree.map(lambda x: x / divisor.astype(x.dtype), halves))
        return cls(largest, ratio)

    def on_host(self, learning_rate: float) -> Float[np.ndarray, " paths"]:
        """The norms, in float64."""
        largest, ratio = (np.asarray(x, np.float64) for x in self)
        return _sweeps.check_values(2 * (largest * ratio), learning_rate, "their distance")


def _root_mean_square(distances: Float[np.ndarray, " paths"]) -> tuple[float, float]:
    """The root mean square, with its standard error by the derivative of the root."""
    scale = float(distances.max())
    if scale == 0:
        return 0.0, 0.0
    square, spread = _sweeps.mean_and_spread((distances / scale) ** 2)
    error = math.sqrt(square)
    return scale * error, scale * spread / (2 * error)


class _Pair(NamedTuple):
    """SDE and iteration, and the number of the iteration in which one became infinite or NaN."""

    sde: PyTree
    msgd: PyTree
    left_at: Int[Array, ""]


def _one_path(
    equation: Equation,
    sides: tuple[_motions.Motion, _motions.Motion],
    iterate: MNoise | _dynamics.Coupling | None,
    params: Params,
    rate_at: _schedules.RateAt,
    num_steps: Int[Array, ""],
) -> Callable[[Key[Array, ""]], tuple[_Distance, Int[Array, ""]]]:
    """A function from a key to the distance at the end, and to when a path diverged, or -1."""
    losses, root = equation.losses, equation.root
    sde_side, msgd_side = sides

    def weights(
        increment: Float[Array, " N"], own_key: Key[Array, ""], step: Int[Array, ""]
    ) -> Weights:
        if isinstance(iterate, MNoise):
            return iterate.sample(own_key, step)
        coupled = iterate or (lambda increment: 1 / losses.num_examples - root(increment))
        return Weights(coupled(increment), None, losses.num_examples)

    def one_path(key: Key[Array, ""]) -> tuple[_Distance, Int[Array, ""]]:
        path_key, own_key = jax.random.split(key)

        def advance(step: Int[Array, ""], pair: _Pair) -> _Pair:
            # Both over one iteration; the iteration is driven by the sum of the SDE's increments.
            increments, rate = equation.increments(path_key, step), rate_at(step)
            drawn = weights(increments.sum(0), own_key, step)
            sde = sde_side.advance(pair.sde, increments, step, rate)
            msgd = msgd_side.advance(pair.msgd, drawn, step, rate)
            finite = _euler_maruyama.all_finite((sde, msgd))
            return _Pair(sde, msgd, _sweeps.left_at(pair.left_at, step, finite))

        starts = sde_side.start(params), msgd_side.start(params)
        pair = _Pair(starts[0], starts[1], jnp.asarray(-1, jnp.int32))
        pair = jax.lax.fori_loop(0, num_steps, advance, pair)
        ends = sde_side.params_of(pair.sde), msgd_side.params_of(pair.msgd)
        return _Distance.between(*ends), pair.left_at

    return one_path
