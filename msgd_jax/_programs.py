"""Programs that belong to the function that a user has made."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer


def compiled_if(condition: bool, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, called eagerly as one program that it owns, where `condition` says so.

    Called on traced arguments it is part of the program around it: traced with that, anew.
    """
    if not condition:
        return function
    compiled = jax.jit(function)

    @functools.wraps(function)
    def either(*args: Any, **named: Any) -> Any:
        traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((args, named)))
        return (function if traced else compiled)(*args, **named)

    return either
