"""Compiled programs that are owned by a function that the user has made."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer


def compiled_if(condition: bool, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`; if `condition` holds, eager calls run a compiled program that the result owns.

    Calls with traced arguments are traced anew, as part of the surrounding program. A call with a
    leaf that is no array is not compiled: `function` says which one it is, and jax would not.
    """
    if not condition:
        return function
    compiled = jax.jit(function)

    @functools.wraps(function)
    def either(*args: Any, **named: Any) -> Any:
        leaves = jax.tree.leaves((args, named))
        can_be_compiled = all(_is_array(leaf) and not isinstance(leaf, Tracer) for leaf in leaves)
        return (compiled if can_be_compiled else function)(*args, **named)

    return either


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") or isinstance(leaf, bool | int | float | complex)
