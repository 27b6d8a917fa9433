"""A module of NNX, taken apart and put together."""

import dataclasses
import operator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from msgd_jax import _validate
from msgd_jax import loss as loss_lib
from msgd_jax._typing import Params
from msgd_jax.flax_nnx._types import Carried


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Parts:
    """How a module is taken apart and put together.

    Attributes:
        filters: the NNX filters of the streams, the parameters, the statistics and the frozen
            parts.
        graph: the structure of the module, without arrays.
        rngs: the streams of random numbers when the module was taken apart.
        nothing: the `Carried` of a module without statistics and frozen parts.
    """

    filters: tuple[Any, ...]
    graph: Any
    rngs: Any
    nothing: Carried

    def of(self, module: Any) -> tuple[Params, Carried, Any, Any]:
        return taken_apart(module, self.filters)

    def merged(self, params: Params, carried: Carried, rngs: Any) -> Any:
        parts = (rngs, params, carried.stats, carried.frozen.arrays)
        return nnx.merge(self.graph, *parts, copy=True)

    def write(self, module: Any, *states: Any) -> None:
        nnx.update(module, *states)

    def after(self, module: Any, carried: Carried) -> Carried:
        """The module's statistics after a loss was computed; raises if a frozen part changed."""
        # Variables that the call creates (`sow`) are dropped: only those from before are read.
        now = dict(variables(nnx.state(module)))
        for path, given in (*variables(carried.stats), *variables(carried.frozen.arrays)):
            if path not in now:
                raise TypeError(f"loss_fn must not delete {named(path, given)}, nor replace it.")
        for path, given in variables(carried.frozen.arrays):
            if not is_same(now[path], given):
                raise TypeError(
                    f"loss_fn must not change {named(path, given)}, which is frozen: statistics "
                    f"that change are given to trainable as mutable={kind_of(given)}."
                )
        stats = [value_of(now[path]) for path, _ in variables(carried.stats)]
        return carried._replace(stats=_with_values(carried.stats, stats))


def taken_apart(module: Any, filters: tuple[Any, ...]) -> tuple[Params, Carried, Any, Any]:
    """``(params, carried, graph, rngs)`` of a module, in new variables."""
    if not isinstance(module, nnx.Module):
        raise TypeError(f"module must be a flax.nnx.Module, got {_validate.shown(module)}.")
    graph, *states, rest = nnx.split(module, *filters, ...)
    if left := [named(path, variable) for path, variable in variables(rest)]:
        more = f", and {len(left) - 2} more" if len(left) > 2 else ""
        raise ValueError(
            f"module must hold only variables that are trained, mutable or frozen, got "
            f"{', '.join(left[:2])[:150]}{more}. Give their type as mutable= if they change from "
            "batch to batch, as frozen= if they never do, or as wrt= to train them."
        )
    # New variables, since the module's own change when the module does.
    rngs, params, stats, frozen = jax.tree.map(lambda x: x, states)
    return params, Carried(stats, loss_lib.Constants(frozen)), graph, rngs


def checked_filter(name: str, given: Any) -> Any:
    """The NNX filter as a predicate; raises TypeError if it is none."""
    try:
        return nnx.filterlib.to_predicate(given)
    except (TypeError, ValueError):  # the latter since flax fails to format its own message
        raise TypeError(
            f"{name} must be an NNX filter, such as nnx.Param or nnx.PathContains('head'), or "
            f"None, got {_validate.shown(given)}."
        ) from None


def variables(state: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """The variables of a state with their paths, in one fixed order."""
    flat = nnx.to_flat_state(state)
    return list(zip(flat.paths, flat.leaves, strict=True))


def value_of(leaf: Any) -> Any:
    """The value of a variable, a pytree; an array that no variable holds is its own value."""
    return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf


def is_same(one: Any, other: Any) -> bool:
    """Whether two variables hold the same arrays, as objects: nothing was written into one."""
    leaves, others = (jax.tree.leaves(value_of(x)) for x in (one, other))
    return len(leaves) == len(others) and all(map(operator.is_, leaves, others))


def _with_values(state: Any, values: list[Any]) -> Any:
    """A state like `state`, in new variables with the given values."""
    new = [
        (path, x.replace(value) if isinstance(x, nnx.Variable) else value)
        for (path, x), value in zip(variables(state), values, strict=True)
    ]
    return nnx.from_flat_state(new)


def kind_of(leaf: Any) -> str:
    """The NNX filter of a leaf's kind, as a user writes it."""
    return "jax.Array" if isinstance(leaf, jax.Array) else type(leaf).__name__


def named(path: tuple[Any, ...], leaf: Any) -> str:
    return f"{'.'.join(map(str, path))} ({kind_of(leaf)})"


def streams_of(rngs: Any, key: Key[Array, ""], has_keys: bool) -> tuple[Any, tuple[Array, ...]]:
    """The streams of a module, started from an example's key, and a tuple of keys for the loss."""
    values = [value_of(x) for _, x in variables(rngs)]
    is_key = [jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in values]
    if not any(is_key):
        return rngs, (key,) * has_keys
    new = iter(jax.random.split(key, sum(is_key) + has_keys))
    own = (next(new),) if has_keys else ()

    def started(value: Array, is_key: bool) -> Array:
        if not is_key:
            return jnp.zeros_like(value)
        # Layers under `nnx.vmap` or `nnx.scan` have an array of keys.
        return jax.random.split(next(new), value.shape) if value.shape else next(new)

    started_all = [started(x, k) for x, k in zip(values, is_key, strict=True)]
    return _with_values(rngs, started_all), own
