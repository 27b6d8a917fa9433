"""The floating-point types that sums are accumulated in, and sums accumulated in them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from msgd_jax._typing import DType, Params, PyTree


def accumulator(*dtypes: DType) -> jnp.dtype:
    """The narrowest type that holds all of these types and is float32 or wider.

    The types are promoted by numpy's rules, which also works under jax's strict promotion.
    """
    return functools.reduce(np.promote_types, map(jnp.dtype, dtypes), jnp.dtype("float32"))


def wide(values: ArrayLike) -> Array:
    """The values as an array in float32 or wider."""
    values = jnp.asarray(values)
    return values.astype(accumulator(values.dtype))


def not_yet(params: Params) -> Float[Array, ""]:
    """Infinity, a placeholder for a value that the first update computes, in that value's type."""
    dtypes = [jnp.result_type(leaf) for leaf in jax.tree.leaves(params)]
    return jnp.full((), jnp.inf, accumulator(*dtypes))


def norm(tree: PyTree) -> Float[Array, ""]:
    """The Euclidean norm of all leaves, in float32 or wider; no square overflows or underflows."""
    # Divide by the largest entry, so that all squares are between 0 and 1.
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    dtype = accumulator(*(leaf.dtype for leaf in leaves))
    wide = [leaf.astype(dtype) for leaf in leaves if leaf.size]
    largest = functools.reduce(
        jnp.maximum, (jnp.max(jnp.abs(leaf)) for leaf in wide), jnp.zeros((), dtype)
    )
    # XLA multiplies by the inverse of `unit`, which has to be a normal number too.
    tiny = jnp.finfo(dtype).tiny
    unit = jnp.clip(largest, tiny, 1 / tiny)
    squares = (jnp.sum(jnp.square(leaf / unit)) for leaf in wide)
    return unit * jnp.sqrt(functools.reduce(jnp.add, squares, jnp.zeros((), dtype)))
