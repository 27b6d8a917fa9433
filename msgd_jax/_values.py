"""Functions that compare by value; laws are made of them, so that laws do too."""

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Bound:
    """A function with its first arguments given; equal if function and arguments are equal."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    def __call__(self, *rest: Any) -> Any:
        """Calls the function on the arguments given and the rest."""
        return self.function(*self.arguments, *rest)


def bound(function: Callable[..., Any], *arguments: Any) -> Bound:
    """`function` with its first arguments given."""
    return Bound(function, arguments)
