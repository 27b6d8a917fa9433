"""The types that sums are kept in, and sums that keep to them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from msgd_jax._typing import DType, Params, PyTree


def accumulator(*dtypes: DType) -> jnp.dtype:
    """The narrowest type that holds all of these and is float32 or wider.

    By numpy's rules, so that it works under jax's strict promotion too.
    """
    return functools.reduce(np.promote_types, map(jnp.dtype, dtypes), jnp.dtype("float32"))


def wide(values: ArrayLike) -> Array:
    """An array in float32 or wider."""
    values = jnp.asarray(values)
    return values.astype(accumulator(values.dtype))


def not_yet(params: Params) -> Float[Array, ""]:
    """Infinity, for a value that the first update will compute, in its type."""
    dtypes = [jnp.result_type(leaf) for leaf in jax.tree.leaves(params)]
    return jnp.full((), jnp.inf, accumulator(*dtypes))


def norm(tree: PyTree) -> Float[Array, ""]:
    """The Euclidean norm of all leaves, in float32 or wider; no square overflows or underflows."""
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    dtype = accumulator(*(leaf.dtype for leaf in leaves))
    wide = [leaf.astype(dtype) for leaf in leaves if leaf.size]
    largest = functools.reduce(
        jnp.maximum, (jnp.max(jnp.abs(leaf)) for leaf in wide), jnp.zeros((), dtype)
    )
    # The inverse, by which XLA multiplies, has to be a normal number too.
    tiny = jnp.finfo(dtype).tiny
    unit = jnp.clip(largest, tiny, 1 / tiny)
    squares = (jnp.sum(jnp.square(leaf / unit)) for leaf in wide)
    return unit * jnp.sqrt(functools.reduce(jnp.add, squares, jnp.zeros((), dtype)))
