"""Named types for annotations.

A pytree is any nesting of containers around arrays. Neither jax's type for pytrees nor `Any` says
which pytree is meant; the names here do.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Array, Float, Integer

PyTree: TypeAlias = Any
"""Any pytree."""

Params: TypeAlias = Any
"""Parameters: a pytree of floating-point arrays, of the user's own structure."""

Gradients: TypeAlias = Any
"""A pytree like the parameters: a gradient, a direction, or another vector in their space."""

PerExampleGradients: TypeAlias = Any
"""A pytree like the parameters, with leaves ``[N, *parameter shape]``."""

Data: TypeAlias = Any
"""Examples: a pytree of arrays that share their leading axis, [N, ...]."""

Batch: TypeAlias = Any
"""Some of the examples: a pytree of arrays [B, ...]."""

Example: TypeAlias = Any
"""One example: the data without their leading axis."""

ModelState: TypeAlias = Any
"""Mutable statistics of a model, such as the running means of batch norm: a pytree of arrays."""

OptState: TypeAlias = Any
"""The state of an optax transformation."""

Updates: TypeAlias = Any
"""What an optax transformation takes and returns: a pytree like the parameters."""

DType: TypeAlias = Any
"""Anything that jax accepts as a dtype: ``jnp.float32``, ``"float32"``, ``np.dtype(...)``."""

PositiveInt: TypeAlias = int | np.integer[Any]
"""A positive integer that is known when a program is built."""

Scalar: TypeAlias = float | Float[Array, ""]
"""A real number that may be traced."""

Step: TypeAlias = int | np.integer[Any] | Integer[Array, ""] | Integer[np.ndarray, ""]
"""A step: an integer of any type from 0 to 2^31 - 1, or a traced one."""

LossVectorFn: TypeAlias = Callable[..., Any]
"""``loss_vector_fn(params, batch) -> losses [B]``; with mutable statistics, keys and extra outputs
``loss_vector_fn(params, batch[, state][, keys]) -> (losses [B][, state][, aux])``."""

ValueAndGrad: TypeAlias = Callable[[Params], tuple[Float[Array, ""], Gradients]]
"""``f(params) -> (value, gradient)``."""

ValueAndGradOfData: TypeAlias = Callable[..., tuple[Any, Gradients]]
"""``f(params, data, ...) -> (value, gradient)``; the value in a tuple with state and outputs."""
