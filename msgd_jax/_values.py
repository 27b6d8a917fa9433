"""Functions that compare by value, of which laws are made."""

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Bound:
    """A function with its first arguments given; equal where function and arguments are."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    def __call__(self, *rest: Any) -> Any:
        """Calls the function on the arguments given and the rest."""
        return self.function(*self.arguments, *rest)


def bound(function: Callable[..., Any], *arguments: Any) -> Bound:
    """`function` with its first arguments given."""
    return Bound(function, arguments)
