"""Paths of the SDE by Euler-Maruyama, on the Brownian path that the discrete iteration follows."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from msgd_jax import _validate
from msgd_jax.loss import LossVectorFn
from msgd_jax.sde import _brownian, _dynamics


class Path(NamedTuple):
    """A path at the iterations asked for; under `jax.vmap` over keys, one for each key.

    Attributes:
        steps: the iterations, [saved].
        times: t = steps * learning_rate, [saved].
        params: a pytree like `params` with a leading axis [saved]. NaN from `diverged_at` on.
        diverged_at: the first iteration whose end is not finite; -1 if there is none.
        last_params: a pytree like `params`: the last finite point, at iteration `diverged_at` - 1
            or at the end.
    """

    steps: Int[Array, "*paths saved"]
    times: Float[Array, "*paths saved"]
    params: Any
    diverged_at: Int[Array, "*paths"]
    last_params: Any


def euler_maruyama(
    loss_vector_fn: LossVectorFn,
    params: Any,
    data: Any,
    noise: _dynamics.Law,
    *,
    learning_rate: float | Float[Array, ""],
    num_steps: int,
    key: Key[Array, ""],
    substeps: int = 8,
    save_at: Sequence[int] | None = None,
    first_step: int = 0,
    order: int = 1,
    microbatch_size: int | None = None,
) -> Path:
    """A path of the SDE of an M-noise, dTheta = -grad L dt + sqrt(eta) C dW (Eqs. 12 and 68).

    Each of `num_steps` iterations covers the time eta in `substeps` equal steps; each of these is
    one backward pass. C C^T is the covariance of ``grad(L . W)``; C is never formed. W has N
    dimensions and is drawn as the path goes along, by `brownian_increments`: memory is that of one
    iteration and of the points saved.

    With ``substeps=1`` this *is* M-SGD-Gaussian (Eq. 67). With the same key, more substeps follow
    the same Brownian path, and so does training with `noise.fisher` or `noise.cov`::

      law = noise.cov(N, b)
      options = dict(learning_rate=0.1, num_steps=20, key=key)
      sde = euler_maruyama(losses, params, data, law, substeps=64, **options)
      msgd = euler_maruyama(losses, params, data, law, substeps=1, **options)

    Args:
        loss_vector_fn: ``loss_vector_fn(params, batch)`` returns the losses of the batch, [B].
        params: where the path starts: a pytree of float32 or float64 arrays.
        data: a pytree of arrays [N, ...].
        noise: a `noise.MNoise`, or a `noise.Exchangeable`: only its covariance matters.
        learning_rate: eta, above 0; may be traced.
        num_steps: the iteration at which the path ends, at t = num_steps * eta; at least 1.
        key: a typed PRNG key; `jax.vmap` over keys for several paths.
        substeps: a power of two, at most 65,536.
        save_at: the iterations after which the path is kept, ascending, from `first_step` (the
            start) to num_steps; None for num_steps alone.
        first_step: the iteration that `params` stand at, below num_steps: a path continued from one
            of its points is the same path to the last bit.
        order: 1, or 2 for the drift ``-grad(L + eta/4 |grad L|^2)``, which is integrated by Heun's
            method (Euler's own error would be as large as the correction).
        microbatch_size: examples in one pass, as in `loss.weighted_value_and_grad`; None for all.

    Returns:
        The path. If it leaves the finite numbers it stops there, and says when.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Example:
        >>> from msgd_jax import loss, noise, sde
        >>> losses = loss.per_example(lambda theta, x: (theta - x) ** 2 / 2)
        >>> x, law = jnp.asarray([0.0, 1.0, 3.0, 4.0]), noise.fisher(4, batch_size=2)
        >>> options = dict(learning_rate=0.1, num_steps=10, key=jax.random.key(0))
        >>> fine = sde.euler_maruyama(losses, jnp.asarray(1.0), x, law, substeps=16, **options)
        >>> float(fine.times[0]), fine.params.shape, int(fine.diverged_at)
        (1.0, (1,), -1)
    """
    num_examples = _dynamics.check_problem(loss_vector_fn, params, data, microbatch_size, wide=True)
    across, along = _dynamics.eigenvalues(noise, num_examples)
    _validate.positive_scalar("learning_rate", learning_rate)
    num_steps = _validate.positive_int("num_steps", num_steps, maximum=2**31 - 1)
    _validate.prng_key("key", key)
    substeps = _brownian.check_substeps(substeps)
    _dynamics.check_order(order)
    _validate.positive_int("first_step", first_step, num_steps - 1, minimum=0)
    targets = _check_save_at(save_at, first_step, num_steps)
    return _integrate(
        loss_vector_fn, jax.tree.map(jnp.asarray, params), data, (across, along), learning_rate,
        first_step, num_steps, targets, key, substeps, order, microbatch_size,
    )  # fmt: skip


def _check_save_at(save_at: Any, first_step: int, num_steps: int) -> Int[np.ndarray, " saved"]:
    if save_at is None:
        return np.array([num_steps], np.int32)
    steps = [_validate.positive_int("save_at", step, num_steps, first_step) for step in save_at]
    if not steps or any(after <= before for before, after in itertools.pairwise(steps)):
        raise ValueError(
            f"save_at must name at least one iteration, in ascending order, got {steps}."
        )
    return np.array(steps, np.int32)


class _State(NamedTuple):
    """Where a path stands: `params` after `step` iterations, or the last finite ones."""

    params: Any
    step: Int[Array, ""]
    finite: Bool[Array, ""]


@functools.partial(
    jax.jit, static_argnames=("loss_vector_fn", "substeps", "order", "microbatch_size")
)
def _integrate(
    loss_vector_fn: Any,
    params: Any,
    data: Any,
    eigenvalues: tuple[Any, Any],
    learning_rate: Any,
    first_step: Any,
    num_steps: Any,
    targets: Int[Array, " saved"],
    key: Key[Array, ""],
    substeps: int,
    order: int,
    microbatch_size: int | None,
) -> Path:
    field = _dynamics.Field.of(loss_vector_fn, params, data, microbatch_size)
    rate = jnp.asarray(learning_rate, field.dtype)
    root = _dynamics.Root(*(jnp.asarray(value, field.dtype) for value in eigenvalues))

    def iterate(state: _State) -> _State:
        increments = _brownian.brownian_increments(
            key, state.step, field.num_examples, substeps=substeps, dtype=field.dtype
        )
        moved = iteration(field, state.params, increments, root, rate, order)
        finite = all_finite(moved)
        kept = jax.tree.map(functools.partial(jnp.where, finite), moved, state.params)
        return _State(kept, state.step + 1, finite)

    def run_to(state: _State, target: Any) -> tuple[_State, Any]:
        state = jax.lax.while_loop(lambda s: s.finite & (s.step < target), iterate, state)
        saved = jax.tree.map(lambda p: jnp.where(state.finite, p, jnp.nan), state.params)
        return state, saved

    start = _State(params, jnp.asarray(first_step, jnp.int32), jnp.asarray(True))
    state, saved = jax.lax.scan(run_to, start, targets)
    state, _ = run_to(state, num_steps)
    return Path(
        steps=targets,
        times=targets.astype(rate.dtype) * rate,
        params=saved,
        diverged_at=jnp.where(state.finite, -1, state.step),
        last_params=state.params,
    )


def iteration(
    field: _dynamics.Field,
    params: Any,
    increments: Float[Array, "substeps N"],
    root: _dynamics.Root,
    learning_rate: Any,
    order: int,
) -> Any:
    """One iteration of Euler-Maruyama, in as many substeps as there are increments."""
    length = 1 / increments.shape[0]

    def substep(params: Any, increment: Float[Array, " N"]) -> tuple[Any, None]:
        return field.substep(params, root(increment), learning_rate, length, order), None

    return jax.lax.scan(substep, params, increments)[0]


def all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether every number of every leaf is finite."""
    leaves = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]
    return functools.reduce(jnp.logical_and, leaves)
