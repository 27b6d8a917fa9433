"""Compiled programs that are owned by a function that the user has made."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer


def compiled_if(condition: bool, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`; if `condition` holds, eager calls run a compiled program that the result owns.

    Calls with traced arguments are traced anew, as part of the surrounding program.
    """
    if not condition:
        return function
    compiled = jax.jit(function)

    @functools.wraps(function)
    def either(*args: Any, **named: Any) -> Any:
        traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((args, named)))
        return (function if traced else compiled)(*args, **named)

    return either
