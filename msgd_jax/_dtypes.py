"""The types that sums are kept in."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np


def accumulator(*dtypes: Any) -> jnp.dtype:
    """The narrowest type that holds all of these and is float32 or wider.

    By numpy's rules, so that it works under jax's strict promotion too.
    """
    return functools.reduce(np.promote_types, map(jnp.dtype, dtypes), jnp.dtype("float32"))
