"""Covariances as lineax operators: products with a vector, no matrix formed.

A product is one forward-mode pass (G v, [N]) and one backward pass (G^T of that), the same price at
any N and D.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from msgd_jax import _dtypes, _narrow, _validate
from msgd_jax import loss as loss_lib
from msgd_jax.covariance import _matrices
from msgd_jax.noise import Exchangeable, MNoise, Weights


def fisher_operator(
    loss_vector_fn: loss_lib.LossVectorFn,
    params: Any,
    data: Any,
    *,
    microbatch_size: int | None = None,
) -> Any:
    """The empirical Fisher matrix F; otherwise as `noise_covariance_operator`."""
    return noise_covariance_operator(
        "fisher", loss_vector_fn, params, data, microbatch_size=microbatch_size
    )


def sgd_covariance_operator(
    loss_vector_fn: loss_lib.LossVectorFn,
    params: Any,
    data: Any,
    *,
    microbatch_size: int | None = None,
) -> Any:
    """The gradient covariance S (Sigma_sgd); otherwise as `noise_covariance_operator`."""
    return noise_covariance_operator(
        "sgd_covariance", loss_vector_fn, params, data, microbatch_size=microbatch_size
    )


def noise_covariance_operator(
    noise: MNoise | Exchangeable | str,
    loss_vector_fn: loss_lib.LossVectorFn,
    params: Any,
    data: Any,
    *,
    microbatch_size: int | None = None,
) -> Any:
    """The covariance of ``grad(L . W)`` as a matrix-free operator on pytrees like `params`.

    For `lineax`: ``operator.mv(v)``, ``operator.as_matrix()`` where D is small, iterative solves.
    The matrix is singular if N <= D, so solve with damping::

      damped = operator + lineax.TaggedLinearOperator(
          damping * lineax.IdentityLinearOperator(operator.in_structure()),
          lineax.positive_semidefinite_tag,
      )

    Args:
        noise: as in `noise_covariance`.
        loss_vector_fn: ``loss_vector_fn(params, batch)`` returns the losses of the batch, [B].
        params: a pytree of floating-point arrays.
        data: a pytree of arrays [N, ...].
        microbatch_size: examples in one pass, as in `loss.weighted_value_and_grad`. None for all,
            and then all products share one forward pass. In micro-batches, products outside of
            `jax.jit` leave a program of each operator with jax for good.

    Returns:
        A `lineax.FunctionLinearOperator`, tagged symmetric and positive semi-definite. Products are
        in the types of `params`; where these differ, ``as_matrix()`` is in the narrowest type that
        holds all of them and is float32 or wider.

    Raises:
        ImportError: if lineax is not installed (``pip install 'msgd-jax[solvers]'``).
        TypeError, ValueError: if an argument is not as described.
    """
    try:
        import lineax
    except ImportError as error:
        raise ImportError(
            "matrix-free operators need lineax: pip install 'msgd-jax[solvers]'."
        ) from error
    order = "noise_covariance_operator(noise, loss_vector_fn, params, data)"
    _matrices.check_noise(noise, order)
    if not callable(loss_vector_fn):
        raise TypeError(
            f"loss_vector_fn must be a function, got {_validate.shown(loss_vector_fn)}; the order "
            f"is {order}, and without noise for F and S."
        )
    _matrices.numbers("params", params)
    _validate.floating_params(params)
    num_examples = _validate.leading_axis("data", data)
    across, along = _matrices.weight_eigenvalues(noise, num_examples)
    if microbatch_size is not None:
        _validate.positive_int("microbatch_size", microbatch_size)
    params = jax.tree.map(jnp.asarray, params)
    if microbatch_size is None or microbatch_size >= num_examples:
        forward, backward = _linear_maps(loss_vector_fn, params, data)
    else:
        forward, backward = _microbatched_maps(loss_vector_fn, params, data, microbatch_size)

    def product(vector: Any) -> Any:
        # In the accumulator's type: the sum of N terms below cancels if the noise is centred.
        slopes = forward(vector)
        mean = slopes.mean()
        return backward(across * (slopes - mean) + along * mean)

    structure = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    tags = frozenset((lineax.symmetric_tag, lineax.positive_semidefinite_tag))
    if len({p.dtype for p in jax.tree.leaves(params)}) > 1:
        from msgd_jax.covariance._mixed import MixedLinearOperator

        return MixedLinearOperator(product, structure, tags)
    return lineax.FunctionLinearOperator(product, structure, tags)


LinearMaps = tuple[Callable[[Any], Float[Array, " N"]], Callable[[Float[Array, " N"]], Any]]


def _linear_maps(loss_vector_fn: Any, params: Any, data: Any) -> LinearMaps:
    """The maps ``v -> G v`` and ``w -> G^T w``, from one linearisation."""
    num_examples = _validate.leading_axis("data", data)

    def losses_of(params: Any) -> Float[Array, " N"]:
        losses = loss_vector_fn(params, data)
        _validate.loss_vector(losses, num_examples)
        return losses.astype(_dtypes.accumulator(losses.dtype))

    wide_losses_of, narrow = _narrow.wide_sums(losses_of, params)
    losses, forward = jax.linearize(wide_losses_of, params)
    transposed = jax.linear_transpose(forward, params)

    def backward(weights: Float[Array, " N"]) -> Any:
        scale = _narrow.scale(weights) if narrow else None
        weights = weights.astype(losses.dtype)
        grads = _narrow.unscaled(transposed(_narrow.scaled(weights, scale))[0], scale)
        return jax.tree.map(lambda p, g: g.astype(p.dtype), params, grads)

    return forward, backward


def _microbatched_maps(
    loss_vector_fn: Any, params: Any, data: Any, microbatch_size: int
) -> LinearMaps:
    """The same in micro-batches: memory is that of one."""
    num_examples = _validate.leading_axis("data", data)
    value_and_grad = loss_lib.weighted_value_and_grad(
        loss_vector_fn, microbatch_size=microbatch_size
    )
    runs = -(-num_examples // microbatch_size)
    positions = jnp.arange(runs * microbatch_size).reshape(runs, microbatch_size)

    def forward(vector: Any) -> Float[Array, " N"]:
        def one_run(positions: Array) -> Float[Array, " B"]:
            batch = jax.tree.map(lambda x: jnp.take(x, positions, axis=0, mode="clip"), data)

            def losses_of(params: Any) -> Float[Array, " B"]:
                losses = loss_vector_fn(params, batch)
                _validate.loss_vector(losses, microbatch_size)
                return losses.astype(_dtypes.accumulator(losses.dtype))

            return jax.jvp(losses_of, (params,), (vector,))[1]

        return jax.lax.map(one_run, positions).reshape(-1)[:num_examples]

    def backward(weights: Float[Array, " N"]) -> Any:
        return value_and_grad(params, data, Weights(weights, None, num_examples))[1]

    return forward, backward
