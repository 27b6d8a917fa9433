"""Sums over examples in float32, for models that compute in float16 or bfloat16.

Where an array is used for many examples at once, its gradient is a sum over these uses, and jax
adds it up in the type of the array: in bfloat16, which has eight bits, a thousand terms of 1 add up
to 256. Products of matrices and convolutions add up in float32 on every platform. Three kinds of
operations do not: `gather` (looking up an embedding), operations that repeat an array (adding a
bias, `jnp.tile`), and arrays that a loop uses in every iteration. Their transposes are a
scatter-add, a sum and a running sum. This module computes these operations in float32 and rounds
the result: the values are the same to the last bit, and the transposes sum in float32 and round
once.
"""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from msgd_jax import _dtypes

if TYPE_CHECKING:
    from jax.extend.core import Jaxpr, JaxprEqn
else:  # jax.extend imports Pallas: not for `import msgd_jax`
    Jaxpr = JaxprEqn = Any

# Operations whose transposes are sums.
_SPREADING = ("gather", "broadcast_in_dim", "tile")
# Operations that repeat an operand along axes of size 1; the transpose of that is a sum too.
_ELEMENTWISE = ("add", "sub", "mul", "div", "max", "min", "pow")
# Calls of a named function, which are replaced by the function's body.
_CALLS = ("jit", "pjit", "closed_call", "core_call")
# Operations with derivatives of their own, which are not changed.
_CUSTOM = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_lin")


def wide_sums(function: Callable[[Any], Any], params: Any) -> tuple[Callable[[Any], Any], bool]:
    """The function with the sums of its gradient in float32, and whether any type in it is narrow.

    `function` is traced once, at the shapes of `params`. If it computes in float32 or wider
    throughout, it is returned unchanged.
    """
    traced, shapes = jax.make_jaxpr(function, return_shape=True)(params)
    if not _is_narrow(traced.jaxpr):
        return function, False

    def widened(params: Any) -> Any:
        leaves = _evaluate(traced.jaxpr, traced.consts, jax.tree.leaves(params))
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves)

    return widened, True


def scale(weights: Float[Array, " batch"]) -> Float[Array, ""]:
    """A power of two that brings the weights of a pass into the range of float16.

    Weights of 1/N vanish in float16 from N = 4e7 on, and lose digits from 16,000 on. Multiplied by
    the scale, the largest of m weights is about 1/sqrt(m) and the sum of m weights sqrt(m): equally
    far from both ends of the range. The scale is a power of two, so that nothing is rounded.
    """
    largest = jnp.max(jnp.abs(weights)).astype(jnp.float32)
    _, exponent = jnp.frexp(jnp.where(largest > 0, largest, 1))
    half = round(math.log2(weights.shape[0]) / 2)
    return jnp.ldexp(jnp.ones((), jnp.float32), jnp.clip(-exponent - half, -100, 100))


def scaled(weights: Float[Array, " batch"], scale: Float[Array, ""] | None) -> Array:
    """The weights times the scale; unchanged if the scale is None."""
    return weights if scale is None else weights * scale.astype(weights.dtype)


def unscaled(tree: Any, scale: Float[Array, ""] | None) -> Any:
    """The tree divided by the scale, in float32 or wider; unchanged if the scale is None."""
    if scale is None:
        return tree

    def divide(leaf: Float[Array, "..."]) -> Float[Array, "..."]:
        dtype = _dtypes.accumulator(leaf.dtype)
        return leaf.astype(dtype) / scale.astype(dtype)

    return jax.tree.map(divide, tree)


def _core() -> Any:
    """The module with the types of jaxprs."""
    from jax.extend import core

    return core


def _evaluate(jaxpr: Jaxpr, consts: Any, args: Any) -> list[Any]:
    """Evaluates a jaxpr; operations whose transposes are sums are computed in float32 or wider."""
    values: dict[Any, Any] = dict(
        zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True)
    )

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, _core().Literal) else values[atom]

    for eqn in jaxpr.eqns:
        with eqn.ctx.manager, jax.named_scope(str(eqn.source_info.name_stack)):
            out = _apply(eqn, [read(atom) for atom in eqn.invars])
        values.update(zip(eqn.outvars, out, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _apply(eqn: JaxprEqn, args: list[Any]) -> list[Any]:
    name, params = eqn.primitive.name, eqn.params
    if name in _CALLS and "jaxpr" in params:
        return _evaluate(params["jaxpr"].jaxpr, params["jaxpr"].consts, args)
    if name in _SPREADING and _spreads_narrow(eqn):
        # In float32 the gathered or repeated numbers are the same, and the transpose sums in it.
        wide = eqn.primitive.bind(args[0].astype(jnp.float32), *args[1:], **params)
        return [wide.astype(args[0].dtype)]
    if name in _ELEMENTWISE and _spreads_narrow(eqn):
        args = [_repeated(arg, _shape(eqn.outvars[0])) for arg in args]
    if name == "scan" and _spreads_narrow(eqn):
        args, params = _scan(eqn, args)
    elif name not in _CUSTOM and any(map(_has_narrow_spreading, _inner(params))):
        params = {key: _rewritten(value) for key, value in params.items()}
    bound = eqn.primitive.get_bind_params(params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)  # functions: jax 0.9
    out = eqn.primitive.bind(*functions, *args, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def _scan(eqn: JaxprEqn, args: list[Any]) -> tuple[list[Any], dict[str, Any]]:
    """A loop's arguments and parameters, its constants in float32.

    The gradient of a constant is a sum over the iterations.
    """
    wide = frozenset(i for i, v in enumerate(_constants(eqn)) if _narrow(v.aval))
    args = [arg.astype(jnp.float32) if i in wide else arg for i, arg in enumerate(args)]
    return args, {**eqn.params, "jaxpr": _rewritten(eqn.params["jaxpr"], wide)}


def _constants(eqn: JaxprEqn) -> list[Any]:
    """The arguments of a loop that are the same in every iteration."""
    return eqn.invars[: eqn.params["num_consts"]]


def _rewritten(value: Any, wide: frozenset[int] = frozenset()) -> Any:
    """A parameter of a loop or a branch, with its jaxprs (one, or a tuple of them) rewritten.

    The arguments whose numbers are in `wide` are passed in float32 and rounded inside.
    """
    if isinstance(value, tuple):
        return tuple(map(_rewritten, value))
    if not isinstance(value, (_core().Jaxpr, _core().ClosedJaxpr)):
        return value
    closed = value if isinstance(value, _core().ClosedJaxpr) else _core().ClosedJaxpr(value, ())
    avals = [v.aval for v in closed.jaxpr.invars]

    def evaluate(*args: Any) -> list[Any]:
        rounded = [arg.astype(avals[i].dtype) if i in wide else arg for i, arg in enumerate(args)]
        return _evaluate(closed.jaxpr, closed.consts, rounded)

    shapes = [
        jax.ShapeDtypeStruct(aval.shape, jnp.float32 if i in wide else aval.dtype)
        for i, aval in enumerate(avals)
    ]
    new = jax.make_jaxpr(evaluate)(*shapes)
    return new if isinstance(value, _core().ClosedJaxpr) else new.jaxpr


def _repeated(operand: Any, shape: tuple[int, ...]) -> Any:
    """An operand in the shape of the result; if it has to be repeated, it is in float32."""
    if jnp.shape(operand) == shape:
        return operand
    operand = jnp.asarray(operand)
    axes = range(operand.ndim)  # none for a scalar; other operands have the axes of the result
    wide = jax.lax.broadcast_in_dim(operand.astype(jnp.float32), shape, axes)
    return wide.astype(operand.dtype)


def _spreads_narrow(eqn: JaxprEqn) -> bool:
    """Whether the transpose of an operation is a sum in a narrow type."""
    if eqn.primitive.name in _SPREADING:
        operands = eqn.invars[:1]
    elif eqn.primitive.name in _ELEMENTWISE:
        shape = _shape(eqn.outvars[0])
        operands = [v for v in eqn.invars if _shape(v) != shape]
    elif eqn.primitive.name == "scan":
        operands = _constants(eqn)
    else:
        operands = []
    return any(not isinstance(v, _core().Literal) and _narrow(v.aval) for v in operands)


def _shape(atom: Any) -> tuple[int, ...]:
    return atom.aval.shape


def _narrow(aval: Any) -> bool:
    dtype = getattr(aval, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32


def _equations(jaxpr: Any) -> Iterator[JaxprEqn]:
    """The equations of a jaxpr and of all jaxprs inside it."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn
        for inner in _inner(eqn.params):
            yield from _equations(inner)


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs among an equation's parameters: bodies of loops, branches, calls."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, (_core().Jaxpr, _core().ClosedJaxpr)):
                yield getattr(item, "jaxpr", item)


def _has_narrow_spreading(jaxpr: Any) -> bool:
    return any(map(_spreads_narrow, _equations(jaxpr)))


def float_types(jaxpr: Jaxpr) -> set[str]:
    """The names of the floating-point types in which anything is computed."""
    variables = (v for e in _equations(jaxpr) for v in (*e.invars, *e.outvars))
    dtypes = (getattr(v.aval, "dtype", None) for v in variables)
    return {str(d) for d in dtypes if d is not None and jnp.issubdtype(d, jnp.floating)}


def _is_narrow(jaxpr: Jaxpr) -> bool:
    """Whether anything is computed in a type narrower than float32."""
    return any(_narrow(v.aval) for e in _equations(jaxpr) for v in (*e.invars, *e.outvars))
