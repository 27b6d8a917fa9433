"""Listed examples that are spread over devices: each device computes those that it holds.

No example moves. Every device knows which examples are listed and their weights, a few numbers
each, and walks through those it holds in runs, as often as *it* needs: how many it holds is random.
The sum is that of one device, grouped by the devices that hold the examples.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import NamedSharding
from jaxtyping import Array, Int

from msgd_jax import _mesh, _validate
from msgd_jax._typing import Params, PyTree


def total(
    add: Callable[[Params, PyTree, Any], PyTree],
    zero: Callable[[Any], PyTree],
    params: Params,
    examples: Any,
    microbatch_size: int | None,
    sharding: NamedSharding,
) -> PyTree:
    """``add(params, terms, run)`` over the runs of a device, from ``zero(run)`` on.

    `examples` are `WeightedExamples`: the data those of this device, the entries those of all. A
    run is such examples of equally many entries, at weight 0 those that only fill it up.
    """
    support = examples.values.shape[0]
    size = _run_size(support, microbatch_size, sharding)
    held, before = _held(examples, sharding)
    num_runs = -(-before[-1] // size)
    if set(sharding.mesh.axis_names) != set(_mesh.axes(sharding)):
        # What a run sends along the other axes of the mesh needs all devices, equally often.
        num_runs = jax.lax.pmax(num_runs, _mesh.axes(sharding))
    run_of = functools.partial(_run, size=size)

    def step(k: Int[Array, ""], terms: PyTree, params: Params, held: Any, before: Array) -> PyTree:
        return add(params, terms, run_of(held, before, k))

    start = zero(jax.eval_shape(run_of, held, before, num_runs))
    # What the losses take from outside becomes an argument, so that it has derivatives too.
    first = jnp.zeros((), jnp.int32)
    step, taken = jax.closure_convert(step, first, start, params, held, before)
    return _repeated(step, -(-support // size))(num_runs, start, params, held, before, *taken)


def _run_size(support: int, microbatch_size: int | None, sharding: NamedSharding) -> int:
    """Entries in one run: a device's share, with room for the chance by which it holds more.

    The number that it holds has a standard deviation of at most the root of its share: three of
    these suffice in 99.9 of a hundred cases, and otherwise there is another run.
    """
    share = -(-support // _mesh.count(sharding))
    size = min(share + 3 * math.isqrt(share), support)
    return size if microbatch_size is None else min(size, microbatch_size)


def _held(examples: Any, sharding: NamedSharding) -> tuple[Any, Int[Array, " support"]]:
    """The entries with their places on this device, and how many up to each of them it holds."""
    length = _validate.leading_axis("data", examples.data)
    first = jax.lax.axis_index(_mesh.axes(sharding)) * length
    # As `jnp.take` does on one device, an index out of range stands for the nearest in it.
    places = jnp.clip(examples.indices, 0, _mesh.count(sharding) * length - 1) - first
    is_held = (places >= 0) & (places < length)
    return examples._replace(indices=places), jnp.cumsum(is_held, dtype=jnp.int32)


def _run(held: Any, before: Int[Array, " support"], k: Int[Array, ""], *, size: int) -> Any:
    """Run k of the entries that this device holds, in the order in which they are listed.

    A sort would bring them to the front, but takes a TPU's compiler half a minute.
    """
    numbers = k * size + jnp.arange(size, dtype=jnp.int32)
    entries = jnp.searchsorted(before, numbers + 1)
    entries = jnp.minimum(entries, before.shape[0] - 1)
    real = numbers < before[-1]
    taken = jax.tree.map(lambda x: x[entries], held._replace(data=()))
    places = jnp.where(real, taken.indices, 0)
    batch = jax.tree.map(lambda x: jnp.take(x, places, axis=0, mode="clip"), held.data)
    return taken._replace(
        # Or XLA would cast all examples at once, for TPUs: a copy of the data.
        data=jax.tree.map(_mesh.cast_here, batch),
        indices=None,
        values=jnp.where(real, taken.values, 0),
        real=None if held.real is None else real,
    )


def _repeated(step: Callable[..., PyTree], most: int) -> Callable[..., PyTree]:
    """``f(n, terms, *args)``: the terms after ``step(k, terms, *args)`` for k below n <= most.

    Values come from a loop of n iterations. It could not be differentiated backwards: derivatives,
    of any order and mode, come from one of `most` iterations, of which the last do nothing, and
    where each computes its values again instead of keeping them.
    """

    @jax.custom_jvp
    def looped(n: Int[Array, ""], terms: PyTree, args: tuple[Any, ...]) -> PyTree:
        return jax.lax.fori_loop(0, n, lambda k, terms: step(k, terms, *args), terms)

    def scanned(n: Int[Array, ""], terms: PyTree, args: tuple[Any, ...]) -> PyTree:
        @jax.checkpoint
        def body(terms: PyTree, k: Int[Array, ""]) -> tuple[PyTree, None]:
            stays = lambda terms: terms  # noqa: E731
            return jax.lax.cond(k < n, lambda terms: step(k, terms, *args), stays, terms), None

        return jax.lax.scan(body, terms, jnp.arange(most, dtype=jnp.int32))[0]

    def rule(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[PyTree, PyTree]:
        # Along what does not vary, the examples above all, nothing is computed.
        leaves, made_of = jax.tree.flatten(primals)
        slopes = jax.tree.leaves(tangents, is_leaf=lambda x: isinstance(x, SymbolicZero))
        varying = [i for i, slope in enumerate(slopes) if not isinstance(slope, SymbolicZero)]

        def of_varying(*given: Array) -> PyTree:
            merged = list(leaves)
            for i, leaf in zip(varying, given, strict=True):
                merged[i] = leaf
            return scanned(*jax.tree.unflatten(made_of, merged))

        return jax.jvp(of_varying, [leaves[i] for i in varying], [slopes[i] for i in varying])

    looped.defjvp(rule, symbolic_zeros=True)
    return lambda n, terms, *args: looped(n, terms, args)
