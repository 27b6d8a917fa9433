"""Examples that are spread over a mesh: they are filled up, placed, and reduced once per step.

Every function takes a sharding, which is None for arrays that are not spread, so that callers need
one code path only.
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
from msgd_jax._typing import Data, ModelState, Params, PyTree


def check(name: str, sharding: Any) -> NamedSharding | None:
    """Returns `sharding` if it is None or spreads a leading axis; else raises an error."""
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
    """The number of parts that the examples are divided into."""
    return 1 if sharding is None else math.prod(sharding.mesh.shape[a] for a in axes(sharding))


def missing(size: int, sharding: NamedSharding | None) -> int:
    """The number of examples to add to `size` so that all parts are equal."""
    return -size % count(sharding)


def as_words(leaf: Any) -> tuple[Any, Any]:
    """The array and None; for PRNG keys, their words as a numpy array and their implementation."""
    if not isinstance(leaf, jax.Array) or not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf, None
    return np.asarray(jax.random.key_data(jax.random.clone(leaf))), jax.random.key_impl(leaf)


def from_words(words: Any, implementation: Any) -> Any:
    """The inverse of `as_words`: the array or the keys, on the devices of `words`."""
    if implementation is None:
        return words
    return jax.random.wrap_key_data(words, impl=implementation)


def fill(values: Shaped[Array, "size *rest"], missing: int) -> Shaped[Array, "filled *rest"]:
    """Repeats the last example: a real example, at which the loss is as finite as at others."""
    if missing == 0:
        return values
    if jnp.issubdtype(values.dtype, jax.dtypes.prng_key):
        # Keys are copied as words, so that jax's checker of keys does not count them as used.
        words = fill(jax.random.key_data(jax.random.clone(values)), missing)
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(values))
    return jnp.concatenate([values, jnp.broadcast_to(values[-1:], (missing, *values.shape[1:]))])


def fill_zeros(values: Shaped[Array, "size *rest"], missing: int) -> Shaped[Array, "filled *rest"]:
    """Appends zeros, the weights of the examples that `fill` appends."""
    if missing == 0:
        return values
    return jnp.pad(values, [(0, missing)] + [(0, 0)] * (values.ndim - 1))


def spread(function: Callable[..., Any], sharding: NamedSharding | None) -> Callable[..., Any]:
    """`function`, with its results spread, and each part computed on the device that holds it.

    XLA's partitioner does that: each device draws its part of the N weights, and data are gathered
    on the devices that hold them.
    """
    if sharding is None:
        return function
    layout = NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0]))
    if AxisType.Explicit in sharding.mesh.axis_types:
        function = jax.sharding.auto_axes(function, out_sharding=layout)
    return jax.jit(function, out_shardings=layout)


def everywhere(function: Callable[..., Any], sharding: NamedSharding) -> Callable[..., Any]:
    """`function`, with its whole results on every device, and computed there."""
    layout = NamedSharding(sharding.mesh, PartitionSpec())
    if AxisType.Explicit in sharding.mesh.axis_types:
        function = jax.sharding.auto_axes(function, out_sharding=layout)
    return jax.jit(function, out_shardings=layout)


def summed(
    terms_of: Callable[..., tuple[PyTree, ModelState, PyTree]],
    sharding: NamedSharding | None,
    layout: Callable[[PyTree, NamedSharding], PyTree],
) -> Callable[..., tuple[PyTree, ModelState, PyTree]]:
    """Adds up ``terms_of(params, examples, model_state, keys)`` over the devices.

    ``layout(examples, sharding)`` gives how the leaves of the examples are spread, as a prefix of
    their tree. `terms_of` returns ``(terms, model_state, arrays)``. It gets whole parameters along
    the mesh axes of the examples, in the layout that they have along the other axes. The sum of the
    terms, in float32 or wider, is the only reduction; the statistics in `model_state` are averaged
    in it. The arrays stay on their devices and get a leading axis of devices.
    """
    if sharding is None:
        return terms_of
    names = axes(sharding)

    def of_part(
        params: Params, examples: PyTree, model_state: ModelState, keys: Any
    ) -> tuple[PyTree, ModelState, PyTree]:
        terms, model_state, arrays = terms_of(params, examples, model_state, keys)
        terms = jax.tree.map(lambda x: x.astype(_dtypes.accumulator(x.dtype)), terms)
        model_state = jax.tree.map(functools.partial(_agreed, names), model_state)
        return jax.lax.psum(terms, names), model_state, jax.tree.map(lambda x: x[None], arrays)

    everywhere, parts = PartitionSpec(), PartitionSpec(sharding.spec[0])

    def total(
        params: Params, examples: PyTree, model_state: ModelState, keys: Any
    ) -> tuple[PyTree, ModelState, PyTree]:
        params, model_state = _whole(sharding, (params, model_state))
        places = (everywhere, layout(examples, sharding), everywhere, everywhere)
        on_parts = _on_parts(of_part, sharding, places, (everywhere, everywhere, parts))
        return on_parts(params, examples, model_state, keys)

    return jax.jit(total)


def mapped(
    of_part: Callable[[Params, Data], PyTree], sharding: NamedSharding | None
) -> Callable[[Params, Data], PyTree]:
    """``of_part(params, data)`` on each device; its results have a leading axis of examples.

    `of_part` gets the parameters as in `summed`; the results stay on the devices of their examples.
    """
    if sharding is None:
        return of_part
    parts = PartitionSpec(sharding.spec[0])
    on_parts = _on_parts(of_part, sharding, (PartitionSpec(), parts), parts)
    return jax.jit(lambda params, data: on_parts(_whole(sharding, params), data))


def gathered(leaf: Array) -> Array:
    """The whole leaf on every device if layouts are part of types; otherwise the leaf as it is."""
    layout = jax.typeof(leaf).sharding
    if layout.mesh.empty or AxisType.Explicit not in layout.mesh.axis_types:
        return leaf
    return jax.sharding.reshard(leaf, NamedSharding(layout.mesh, PartitionSpec()))


def cut(values: Shaped[Array, "filled *rest"], size: int) -> Shaped[Array, "size *rest"]:
    """The first `size` entries, without those that `fill` appended."""
    return values if values.shape[0] == size else gathered(values)[:size]


def _on_parts(
    function: Callable[..., Any], sharding: NamedSharding, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """`function` applied to the part of each device, along the mesh axes of the examples."""
    # The check of varying-axes types is off, since users' loss functions are not written for it.
    return jax.shard_map(
        function,
        mesh=sharding.mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(axes(sharding)),
        check_vma=False,
    )


def like(leaf: Any, value: Array) -> Array:
    """`value` in the dtype of `leaf`, and in its layout where that is part of its type."""
    dtype = jnp.result_type(leaf)
    # Without `cast_here`, the reduction that made `value` would be in the narrow type on TPUs.
    value = (cast_here(value) if jnp.finfo(dtype).bits < 32 else value).astype(dtype)
    layout = jax.typeof(leaf).sharding
    if layout.mesh.empty or AxisType.Explicit not in layout.mesh.axis_types:
        return value
    return jax.sharding.reshard(value, layout)


def cast_here(value: Array) -> Array:
    """`value`, so that a cast of it stays behind the operation that makes it.

    XLA moves casts to narrow types forward: through the reduction whose result is cast, or out of
    the loop in which a part of an array is cast. It does not move them through this operation,
    which rounds float32 to float32.
    """
    if value.dtype != jnp.float32:
        return value
    return jax.lax.reduce_precision(value, exponent_bits=8, mantissa_bits=23)


def zeros(like: jax.ShapeDtypeStruct, dtype: Any, *sizes: int) -> Array:
    """Zeros of the shape of `like`, with axes of these sizes in front.

    They have the layout of `like` if layouts are part of types.
    """
    zeros, layout = jnp.zeros((*sizes, *like.shape), dtype), getattr(like, "sharding", None)
    if layout is None or layout.mesh.empty or AxisType.Explicit not in layout.mesh.axis_types:
        return zeros
    spec = PartitionSpec(*(None,) * len(sizes), *layout.spec)
    return jax.sharding.reshard(zeros, NamedSharding(layout.mesh, spec))


def _whole(sharding: NamedSharding, tree: PyTree) -> PyTree:
    """Gathers the leaves that are spread over the axes of the examples, if layouts are in types.

    In the other modes of a mesh, XLA gathers them by itself.
    """
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return tree
    names = axes(sharding)

    def others(entry: Any) -> tuple[str, ...] | None:
        kept = [a for a in ((entry,) if isinstance(entry, str) else entry or ()) if a not in names]
        return tuple(kept) or None

    def gathered(leaf: Array) -> Array:
        layout = jax.typeof(leaf).sharding
        if layout.mesh.empty:
            return leaf
        whole = PartitionSpec(*map(others, layout.spec))
        return jax.sharding.reshard(leaf, NamedSharding(layout.mesh, whole))

    return jax.tree.map(gathered, tree)


def _agreed(names: tuple[str, ...], leaf: Array) -> Array:
    """One value for all parts: the mean of a statistic, or the counter that all parts share."""
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
        return jax.lax.pmean(leaf, names)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise TypeError(
            "model_state must be numbers when examples are spread over devices, got PRNG keys."
        )
    return jax.lax.pmax(leaf, names)
