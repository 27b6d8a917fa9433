"""Examples spread over the devices of a mesh: rows filled up, placed, and one reduction a step.

Everything takes a sharding that may be None, for arrays that are not spread: one code path.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from msgd_jax import _dtypes, _validate


def check(name: str, sharding: Any) -> NamedSharding | None:
    """Returns `sharding` if it spreads a leading axis (or is None); raises."""
    if sharding is None:
        return None
    if not isinstance(sharding, NamedSharding):
        raise TypeError(
            f"{name} must be a jax.sharding.NamedSharding such as "
            f'NamedSharding(mesh, PartitionSpec("data")), or None, got {_validate.shown(sharding)}.'
        )
    spec = tuple(sharding.spec)
    if not spec or not axes(sharding) or any(spec[1:]):
        raise ValueError(
            f"{name} must spread the leading axis, that of the examples, and no other: "
            f'PartitionSpec("data") or PartitionSpec(("data", "fsdp")), got {sharding.spec}.'
        )
    return sharding


def axes(sharding: NamedSharding) -> tuple[str, ...]:
    """The mesh axes that the examples are spread over."""
    names = sharding.spec[0]
    return (names,) if isinstance(names, str) else tuple(names or ())


def count(sharding: NamedSharding | None) -> int:
    """How many parts the examples are in."""
    return 1 if sharding is None else math.prod(sharding.mesh.shape[a] for a in axes(sharding))


def missing(size: int, sharding: NamedSharding | None) -> int:
    """How many rows fill `size` up to equal parts."""
    return -size % count(sharding)


def as_words(leaf: Any) -> tuple[Any, Any]:
    """Arrays as numpy has them: of PRNG keys their words, and the implementation (else None)."""
    if not isinstance(leaf, jax.Array) or not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf, None
    return np.asarray(jax.random.key_data(jax.random.clone(leaf))), jax.random.key_impl(leaf)


def from_words(words: Any, implementation: Any) -> Any:
    """What `as_words` was given, on the devices that `words` are on."""
    if implementation is None:
        return words
    return jax.random.wrap_key_data(words, impl=implementation)


def fill(rows: Shaped[Array, "size *rest"], num_rows: int) -> Shaped[Array, "filled *rest"]:
    """Repeats the last row: a real example, at which every loss is as finite as elsewhere."""
    if num_rows == 0:
        return rows
    return jnp.concatenate([rows, jnp.broadcast_to(rows[-1:], (num_rows, *rows.shape[1:]))])


def fill_zeros(rows: Shaped[Array, "size *rest"], num_rows: int) -> Shaped[Array, "filled *rest"]:
    """Appends zeros, the weights of rows that `fill` appends."""
    return jnp.pad(rows, [(0, num_rows)] + [(0, 0)] * (rows.ndim - 1))


def spread(function: Callable[..., Any], sharding: NamedSharding | None) -> Callable[..., Any]:
    """`function` with the rows of its results spread, and computed where they go.

    XLA's partitioner sees to that: a draw of N weights becomes draws of the shards, gathering from
    spread data becomes gathering where they are.
    """
    if sharding is None:
        return function
    rows = NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0]))
    if AxisType.Explicit in sharding.mesh.axis_types:
        function = jax.sharding.auto_axes(function, out_sharding=rows)
    return jax.jit(function, out_shardings=rows)


def summed(
    terms_of: Callable[..., tuple[Any, Any]], sharding: NamedSharding | None
) -> Callable[..., tuple[Any, Any]]:
    """Adds up ``terms_of(params, rows, aux, order) -> (terms, aux)`` over the parts of the rows.

    Parameters come whole along the mesh axes of the examples, and stay as they are along the
    others. The sum of the terms, in float32 or wider, is the one reduction; statistics are averaged
    with it.
    """
    if sharding is None:
        return terms_of
    names = axes(sharding)
    explicit = AxisType.Explicit in sharding.mesh.axis_types

    def of_part(params: Any, rows: Any, aux: Any, order: Any) -> tuple[Any, Any]:
        terms, aux = terms_of(params, rows, aux, order)
        terms = jax.tree.map(lambda x: x.astype(_dtypes.accumulator(x.dtype)), terms)
        return jax.lax.psum(terms, names), jax.tree.map(functools.partial(_agreed, names), aux)

    everywhere, rows = PartitionSpec(), PartitionSpec(sharding.spec[0])
    # Without varying-axes types: loss functions are the users', and know nothing of them.
    mapped = jax.shard_map(
        of_part,
        mesh=sharding.mesh,
        in_specs=(everywhere, rows, everywhere, everywhere),
        out_specs=everywhere,
        axis_names=set(names),
        check_vma=False,
    )

    def total(params: Any, rows: Any, aux: Any, order: Any) -> tuple[Any, Any]:
        if explicit:  # in the other modes XLA gathers what is spread over these axes
            params, aux = jax.tree.map(functools.partial(_whole, names), (params, aux))
        return mapped(params, rows, aux, order)

    return jax.jit(total)


def like(leaf: Any, value: Array) -> Array:
    """`value` in the dtype of `leaf`, and in its layout where that is part of its type."""
    value = value.astype(jnp.result_type(leaf))
    layout = jax.typeof(leaf).sharding
    if layout.mesh.empty or AxisType.Explicit not in layout.mesh.axis_types:
        return value
    return jax.sharding.reshard(value, layout)


def _whole(names: tuple[str, ...], leaf: Any) -> Any:
    """Gathers a leaf that is spread over these axes of an explicit mesh."""
    layout = jax.typeof(leaf).sharding
    if layout.mesh.empty:
        return leaf

    def others(entry: Any) -> Any:
        kept = [a for a in ((entry,) if isinstance(entry, str) else entry or ()) if a not in names]
        return tuple(kept) or None

    whole = PartitionSpec(*map(others, layout.spec))
    return jax.sharding.reshard(leaf, NamedSharding(layout.mesh, whole))


def _agreed(names: tuple[str, ...], leaf: Array) -> Array:
    """One value for all parts: the mean of statistics; counters are the same everywhere."""
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
        return jax.lax.pmean(leaf, names)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise TypeError("aux must be numbers when examples are spread over devices, got PRNG keys.")
    return jax.lax.pmax(leaf, names)
