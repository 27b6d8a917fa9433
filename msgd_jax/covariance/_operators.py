"""Covariances as lineax operators: products with a vector, without forming a matrix.

A product takes one forward-mode pass (G v, [N]) and one backward pass (G^T times that), for any N
and D.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from msgd_jax import _dtypes, _narrow, _validate
from msgd_jax import loss as loss_lib
from msgd_jax._typing import Gradients, Params
from msgd_jax.covariance import _matrices


def fisher_operator(losses: loss_lib.LossVector, params: Params) -> Any:
    """The `noise_covariance_operator` of the empirical Fisher matrix F."""
    return noise_covariance_operator(losses, params, "fisher")


def sgd_covariance_operator(losses: loss_lib.LossVector, params: Params) -> Any:
    """The `noise_covariance_operator` of the gradient covariance S (Sigma_sgd)."""
    return noise_covariance_operator(losses, params, "sgd_covariance")


def noise_covariance_operator(
    losses: loss_lib.LossVector, params: Params, law: _matrices.CovarianceLaw
) -> Any:
    """The covariance of ``grad(L . W)`` as a matrix-free operator on pytrees like `params`.

    Use it with `lineax`: ``operator.mv(v)``, ``operator.as_matrix()`` for small D, and iterative
    solves. The matrix is singular if N <= D, so solve with damping::

      damped = operator + lineax.TaggedLinearOperator(
          damping * lineax.IdentityLinearOperator(operator.in_structure()),
          lineax.positive_semidefinite_tag,
      )

    If the losses are computed in one pass on one device, all products share one forward pass. With
    micro-batches, products outside of `jax.jit` leave one program per operator in jax's caches for
    good. Meshes with explicit axes are not supported: use axes of type Auto.

    Args:
        losses: the loss vector.
        params: a pytree of floating-point arrays.
        law: as in `noise_covariance`.

    Returns:
        A `lineax.FunctionLinearOperator`, tagged symmetric and positive semi-definite. Products are
        in the dtypes of `params`; if these differ, ``as_matrix()`` is in the narrowest dtype that
        holds all of them and is float32 or wider.

    Raises:
        ImportError: if lineax is not installed (``pip install 'msgd-jax[solvers]'``).
        TypeError, ValueError: as `noise_covariance`.
    """
    try:
        import lineax
    except ImportError as error:
        raise ImportError(
            "matrix-free operators need lineax: pip install 'msgd-jax[solvers]'."
        ) from error
    loss_lib.checked(losses, params)
    num_examples = losses.num_examples
    across, along = _matrices.weight_eigenvalues(law, num_examples)
    params = jax.tree.map(jnp.asarray, params)
    one_pass = losses.microbatch_size is None or losses.microbatch_size >= num_examples
    maps = _linear_maps if one_pass and losses.sharding is None else _walked_maps
    forward, backward = maps(losses, params)

    def product(vector: Gradients) -> Gradients:
        # In the wide type, since the N terms below cancel in the sum if the law is centred.
        slopes = forward(vector)
        mean = slopes.mean()
        return backward(across * (slopes - mean) + along * mean)

    structure = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    tags = frozenset((lineax.symmetric_tag, lineax.positive_semidefinite_tag))
    if len({p.dtype for p in jax.tree.leaves(params)}) > 1:
        from msgd_jax.covariance._mixed import MixedLinearOperator

        return MixedLinearOperator(product, structure, tags)
    return lineax.FunctionLinearOperator(product, structure, tags)


LinearMaps = tuple[
    Callable[[Gradients], Float[Array, " N"]], Callable[[Float[Array, " N"]], Gradients]
]


def _walked_maps(losses: loss_lib.LossVector, params: Params) -> LinearMaps:
    """The maps ``v -> G v`` and ``w -> G^T w``, each through all micro-batches."""
    return functools.partial(losses.slopes, params), functools.partial(losses.gradient, params)


def _linear_maps(losses: loss_lib.LossVector, params: Params) -> LinearMaps:
    """The same two maps, both from one linearisation of the losses."""

    def losses_of(params: Params) -> Float[Array, " N"]:
        values = losses.loss_vector_fn(params, losses.data)
        _validate.loss_vector(values, losses.num_examples)
        return _dtypes.wide(values)

    wide_losses_of, narrow = _narrow.wide_sums(losses_of, params)
    values, forward = jax.linearize(wide_losses_of, params)
    transposed = jax.linear_transpose(forward, params)

    def backward(weights: Float[Array, " N"]) -> Gradients:
        scale = _narrow.scale(weights) if narrow else None
        weights = weights.astype(values.dtype)
        grads = _narrow.unscaled(transposed(_narrow.scaled(weights, scale))[0], scale)
        return jax.tree.map(lambda p, g: g.astype(p.dtype), params, grads)

    return forward, backward
