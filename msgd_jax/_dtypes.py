"""The types that sums are kept in."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def accumulator(*dtypes: Any) -> jnp.dtype:
    """The narrowest type that holds all of these and is float32 or wider.

    By numpy's rules, so that it works under jax's strict promotion too.
    """
    return functools.reduce(np.promote_types, map(jnp.dtype, dtypes), jnp.dtype("float32"))


def not_yet(params: Any) -> Float[Array, ""]:
    """Infinity, for a value that the first update will compute, in its type."""
    dtypes = [jnp.result_type(leaf) for leaf in jax.tree.leaves(params)]
    return jnp.full((), jnp.inf, accumulator(*dtypes))
