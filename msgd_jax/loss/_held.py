"""Listed examples that are spread over devices: each device computes those that it holds.

No example moves. Every device knows the indices and the weights of all listed examples, which are
a few numbers per example. It walks in runs through the examples that it holds. Their number is
random, and so each device has its own number of runs. The sum is that of one device, grouped by the
devices that hold the examples.
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
    """Calls ``add(params, terms, run)`` for each run of a device, starting from ``zero(run)``.

    `examples` are `WeightedExamples` whose data are those of this device, and whose entries are
    those of all devices. All runs have equally many entries. Entries that only fill up a run have
    weight 0.
    """
    support = examples.values.shape[0]
    size = _run_size(support, microbatch_size, sharding)
    held, before = _held(examples, sharding)
    num_runs = -(-before[-1] // size)
    if set(sharding.mesh.axis_names) != set(_mesh.axes(sharding)):
        # A run may communicate along the other axes of the mesh, which needs all devices: they must
        # make equally many runs.
        num_runs = jax.lax.pmax(num_runs, _mesh.axes(sharding))
    run_of = functools.partial(_run, size=size)

    def step(k: Int[Array, ""], terms: PyTree, params: Params, held: Any, before: Array) -> PyTree:
        return add(params, terms, run_of(held, before, k))

    start = zero(jax.eval_shape(run_of, held, before, num_runs))
    # Arrays that the losses read from outside become arguments, so that derivatives with respect to
    # them are computed too.
    first = jnp.zeros((), jnp.int32)
    step, taken = _with_arguments(step, first, start, params, held, before)
    return _repeated(step, -(-support // size))(num_runs, start, params, held, before, *taken)


def _run_size(support: int, microbatch_size: int | None, sharding: NamedSharding) -> int:
    """The number of entries in one run: a device's share, and some more for a device that has more.

    The number of examples that a device holds has a standard deviation of at most the square root
    of its share. Three standard deviations suffice in 99.9 % of the cases; in the others there is
    another run.
    """
    share = -(-support // _mesh.count(sharding))
    size = min(share + 3 * math.isqrt(share), support)
    return size if microbatch_size is None else min(size, microbatch_size)


def _held(examples: Any, sharding: NamedSharding) -> tuple[Any, Int[Array, " support"]]:
    """The entries with their places on this device, and how many of the first k it holds."""
    length = _validate.leading_axis("data", examples.data)
    first = jax.lax.axis_index(_mesh.axes(sharding)) * length
    # An index out of range means the nearest one in range, as for `jnp.take` on one device.
    places = jnp.clip(examples.indices, 0, _mesh.count(sharding) * length - 1) - first
    is_held = (places >= 0) & (places < length)
    return examples._replace(indices=places), jnp.cumsum(is_held, dtype=jnp.int32)


def _run(held: Any, before: Int[Array, " support"], k: Int[Array, ""], *, size: int) -> Any:
    """Run k of the entries that this device holds, in the order in which they are listed.

    They are found by a binary search. A sort that brings them to the front would take the compiler
    of TPUs half a minute. What fills up the run is the last of them at weight 0, and no example
    that is not listed, whose loss may be infinite.
    """
    numbers = k * size + jnp.arange(size, dtype=jnp.int32)
    real = numbers < before[-1]
    entries = jnp.searchsorted(before, jnp.minimum(numbers + 1, before[-1]))
    taken = jax.tree.map(lambda x: x[entries], held._replace(data=()))
    batch = jax.tree.map(lambda x: jnp.take(x, taken.indices, axis=0, mode="clip"), held.data)
    return taken._replace(
        # Without this, XLA would cast all examples at once on TPUs, which is a copy of the data.
        data=jax.tree.map(_mesh.cast_here, batch),
        indices=None,
        values=jnp.where(real, taken.values, 0),
        real=None if held.real is None else real,
    )


def _with_arguments(
    function: Callable[..., PyTree], *arguments: PyTree
) -> tuple[Callable[..., PyTree], list[Any]]:
    """`function` as one that takes what it reads from outside as further arguments, and these.

    `jax.closure_convert` does the same, but keeps the function and what it reads for ever.
    """
    from jax.extend.core import ClosedJaxpr, jaxpr_as_fun  # it imports Pallas: not for `import`

    closed, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
    made_of = jax.tree.structure(shape)

    def converted(*given: PyTree) -> PyTree:
        own, taken = given[: len(arguments)], given[len(arguments) :]
        evaluate = jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, taken))
        results = evaluate(*jax.tree.leaves(own))
        return jax.tree.unflatten(made_of, results)

    return converted, closed.consts


def _repeated(step: Callable[..., PyTree], most: int) -> Callable[..., PyTree]:
    """``f(n, terms, *args)``: the terms after ``step(k, terms, *args)`` for k below n <= most.

    Values are computed by a loop of n iterations, which has no reverse-mode derivative. So
    derivatives of any order and mode are those of a loop of `most` iterations. Its iterations from
    n on do nothing, and each iteration computes its values again in the backward pass, so that they
    need not be kept.
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
        # Nothing is computed for arguments that do not vary, such as the examples.
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
