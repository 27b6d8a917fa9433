"""The floating-point types that sums are accumulated in, and sums accumulated in them."""

import functools
from collections.abc import Callable, Sequence

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


# Compiled here, since an eager step would compile the choice and the condition below at each call.
@jax.jit
def with_norm(tree: PyTree) -> tuple[PyTree, Float[Array, ""]]:
    """A tree, and its Euclidean norm in float32 or wider; no square overflows or underflows.

    Use the tree that is returned: only where its norm is known may other values take its place in
    memory.
    """

    # TPUs make one pass over each leaf for three sums, which can be that of an optimizer. CPUs
    # would make three passes, and GPUs would wait for a condition. Without the barrier GPUs may
    # begin with the optimizer, and then keep a copy of the gradient for the norm.
    def before_others(norm: Callable[..., Array]) -> Callable[[PyTree], tuple[PyTree, Array]]:
        return lambda tree: jax.lax.optimization_barrier((tree, norm(*_leaves(tree))))

    return jax.lax.platform_dependent(
        tree,
        tpu=lambda tree: (tree, _norm_by_scaled_squares(*_leaves(tree))),
        cpu=before_others(_norm_by_plain_squares),
        default=before_others(_norm_by_largest),
    )


def norm(values: Array) -> Float[Array, ""]:
    """The Euclidean norm of one array; no square overflows or underflows."""
    return _norm_by_largest([values], accumulator(values.dtype))


def in_unit(values: Array, axis: int | None = None) -> Array:
    """The values divided by the largest of them, in float32 or wider; zeros stay zeros.

    What does not depend on their unit is computed from these, whose squares and fourth powers
    neither overflow nor underflow.
    """
    values = wide(values)
    largest = jnp.abs(values).max(axis, keepdims=axis is not None, initial=0.0)
    return values / jnp.where(largest == 0, 1, largest)


def _leaves(tree: PyTree) -> tuple[list[Array], jnp.dtype]:
    """The leaves that have entries, and the type of their norm."""
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    dtype = accumulator(*(leaf.dtype for leaf in leaves))
    return [leaf for leaf in leaves if leaf.size], dtype


def _norm_by_largest(leaves: Sequence[Array], dtype: jnp.dtype) -> Float[Array, ""]:
    """The norm of all numbers divided by the largest, so that their squares are at most 1."""
    sizes = (jnp.max(jnp.abs(leaf.astype(dtype))) for leaf in leaves)
    largest = functools.reduce(jnp.maximum, sizes, jnp.zeros((), dtype))
    # XLA multiplies by the inverse of `unit`, which has to be a normal number too.
    tiny = jnp.finfo(dtype).tiny
    unit = jnp.clip(largest, tiny, 1 / tiny)
    return unit * jnp.sqrt(_sum_of_squares([leaf.astype(dtype) / unit for leaf in leaves], dtype))


def _norm_by_plain_squares(leaves: Sequence[Array], dtype: jnp.dtype) -> Float[Array, ""]:
    """The root of the sum of squares, or `_norm_by_largest` where squares overflow or underflow."""
    plain = _sum_of_squares(leaves, dtype)
    usual = (plain >= _enough(leaves, dtype)) & (plain < jnp.inf)
    of_others = functools.partial(_norm_by_largest, dtype=dtype)
    return jax.lax.cond(usual, lambda _: jnp.sqrt(plain), of_others, leaves)


def _norm_by_scaled_squares(leaves: Sequence[Array], dtype: jnp.dtype) -> Float[Array, ""]:
    """The norm from the one of three sums of squares that neither overflows nor underflows.

    The sums are of the numbers as they are, of them made small, and of them made large: eight
    operations a number, where those that sort the numbers by size make fifteen.
    """
    scale = 2.0 ** (80 * (int(jnp.finfo(dtype).maxexp) // 128))
    plain = _sum_of_squares(leaves, dtype)
    made_small = _sum_of_squares([leaf.astype(dtype) / scale for leaf in leaves], dtype)
    made_large = _sum_of_squares([leaf.astype(dtype) * scale for leaf in leaves], dtype)
    at_least_middling = jnp.where(plain < jnp.inf, jnp.sqrt(plain), scale * jnp.sqrt(made_small))
    is_small = plain < _enough(leaves, dtype)
    return jnp.where(is_small, jnp.sqrt(made_large) / scale, at_least_middling)


def _enough(leaves: Sequence[Array], dtype: jnp.dtype) -> float:
    """A sum of squares to which squares that underflow, were there any, would add no bit."""
    info = jnp.finfo(dtype)
    return sum(leaf.size for leaf in leaves) * float(info.tiny) / float(info.eps)


def _sum_of_squares(leaves: Sequence[Array], dtype: jnp.dtype) -> Float[Array, ""]:
    sums = (jnp.sum(jnp.square(leaf.astype(dtype))) for leaf in leaves)
    return functools.reduce(jnp.add, sums, jnp.zeros((), dtype))
