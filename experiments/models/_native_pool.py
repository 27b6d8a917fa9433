"""Convolution, bias, 2x2 max-pooling and ReLU in one pass on CPU, for nets with few channels.

`_conv_pool_cpu.cc` computes it with an example in each lane of a vector, which is fast for any
number of channels. Here its functions become operations of JAX that can be differentiated to any
order, mapped with `jax.vmap`, and used under `jax.jit` and in `jax.shard_map`. They are compiled
and loaded with those of `_native`, and usable where its `is_usable` says so.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.interpreters import ad, batching, mlir, xla
from jaxtyping import Array, Float, Int8

from experiments.models import _native

__all__ = ["conv_pool_relu"]

Images = Float[Array, "in_channels height width batch"]
Kernel = Float[Array, "kernel_height kernel_width in_channels out_channels"]
Bias = Float[Array, " out_channels"]
Outputs = Float[Array, "out_channels out_height out_width batch"]
Places = Int8[Array, "out_channels out_height out_width batch"]

_NONE = 4  # The place of an output that ReLU made 0.


def conv_pool_relu(images: Images, kernel: Kernel, bias: Bias) -> Outputs:
    """As `conv.conv_pool_relu`, for float32, on CPU alone.

    Args:
        images: float32 array of shape [C, H, W, B].
        kernel: float32 array of shape [h, w, C, O].
        bias: float32 array of shape [O].

    Returns:
        Array of shape [O, (H - h + 1) // 2, (W - w + 1) // 2, B].
    """
    return _with_places(images, kernel, bias)[0]


@jax.custom_jvp
def _with_places(images: Images, kernel: Kernel, bias: Bias) -> tuple[Outputs, Places]:
    """The outputs, and which pixel of its window each is, 0 to 3 in row-major order, or none."""
    sides = ((images.shape[i + 1] - kernel.shape[i] + 1) // 2 for i in (0, 1))
    shape = (kernel.shape[3], *sides, images.shape[3])
    outputs, places = _pool.bind(images, kernel, bias, shape=shape)
    return outputs, places


@functools.partial(_with_places.defjvp, symbolic_zeros=True)
def _with_places_jvp(primals: Any, tangents: Any) -> Any:
    images, kernel, bias = primals
    of_images, of_kernel, of_bias = tangents
    outputs, places = _with_places(images, kernel, bias)
    terms = []
    # The images of the first layer are data and have no tangent.
    if not isinstance(of_images, jax.custom_derivatives.SymbolicZero):
        terms.append(_forward.bind(of_images, kernel, places, shape=outputs.shape))
    if not isinstance(of_kernel, jax.custom_derivatives.SymbolicZero):
        terms.append(_forward.bind(images, of_kernel, places, shape=outputs.shape))
    if not isinstance(of_bias, jax.custom_derivatives.SymbolicZero):
        change = of_bias[:, None, None, None]
        terms.append(jnp.where(places < _NONE, change, jnp.zeros_like(outputs)))
    of_outputs = sum(terms) if terms else jnp.zeros_like(outputs)
    return (outputs, places), (of_outputs, np.zeros(places.shape, jax.dtypes.float0))


# Once places are known, the outputs are bilinear in images and kernel, but for the bias: `_forward`
# is this map, with two transposes, and the three have derivatives of every order. `shape` is that
# of the (first) result.
_pool = jax.extend.core.Primitive("conv_pool_relu")
_pool.multiple_results = True
_forward = jax.extend.core.Primitive("conv_pool_forward")
_of_images = jax.extend.core.Primitive("conv_pool_of_images")
_of_kernel = jax.extend.core.Primitive("conv_pool_of_kernel")

_TRANSPOSES = _native.transposes(_forward, _of_images, _of_kernel)


def _transpose(
    rules: tuple[Callable[..., Any], Callable[..., Any]],
    cotangent: Any,
    first: Any,
    second: Any,
    places: Array,
    *,
    shape: tuple[int, ...],
) -> list[Any]:
    """The cotangents of the arguments, one of the first two of which is not known."""
    del shape
    arguments = (first, second)
    position = 0 if ad.is_undefined_primal(first) else 1
    of: Any = arguments[position].aval
    result = ad.Zero(of)
    if not isinstance(cotangent, ad.Zero):
        primitive, *pair = rules[position](cotangent, *arguments)
        result = primitive.bind(*pair, places, shape=of.shape)
    return [result if i == position else None for i in range(3)]


def _batch(primitive: Any, arguments: Any, axes: Any, *, shape: tuple[int, ...]) -> Any:
    """Folds mapped images into the batch, and computes all else one after another.

    That is faster for mapped kernels as well, since each call uses all cores.
    """
    several = (lambda x: tuple(x)) if primitive.multiple_results else (lambda x: (x,))
    count = _native.mapped_size(arguments, axes)
    # The kernel is the second argument, and a bias the third.
    mapped_only_images = axes[1] is None and (primitive is not _pool or axes[2] is None)
    if primitive is not _of_kernel and mapped_only_images:
        folded = [
            _fold(x, axis, count) if x.ndim - (axis is not None) == 4 and i != 1 else x
            for i, (x, axis) in enumerate(zip(arguments, axes, strict=True))
        ]
        results = several(primitive.bind(*folded, shape=(*shape[:3], count * shape[3])))
        results = [x.reshape(*x.shape[:3], count, -1) for x in results]
        dimensions = [3] * len(results)
    else:

        def each(*operands: Any) -> Any:
            return several(primitive.bind(*operands, shape=shape))

        results = _native.in_turn(each, arguments, axes)
        dimensions = [0] * len(results)
    return (results, dimensions) if primitive.multiple_results else (results[0], dimensions[0])


def _fold(x: Array, axis: int | None, count: int) -> Array:
    """An array per index of the mapped axis as one array with a longer batch."""
    if axis is None:
        return jnp.tile(x, (1, 1, 1, count))
    x = jnp.moveaxis(x, axis, 3)
    return x.reshape(*x.shape[:3], -1)


def _register(primitive: Any, name: str) -> None:
    types = (jnp.float32, jnp.int8) if primitive.multiple_results else (jnp.float32,)

    def results(of: Callable[..., Any], shape: tuple[int, ...]) -> Any:
        every = [of(shape, dtype) for dtype in types]
        return every if primitive.multiple_results else every[0]

    def call(*arguments: Array, shape: tuple[int, ...]) -> Any:
        return jax.ffi.ffi_call(name, results(jax.ShapeDtypeStruct, shape))(*arguments)

    primitive.def_impl(functools.partial(xla.apply_primitive, primitive))
    primitive.def_abstract_eval(lambda *_, shape: results(ShapedArray, shape))
    batching.primitive_batchers[primitive] = functools.partial(_batch, primitive)
    lowering = mlir.lower_fun(call, multiple_results=primitive.multiple_results)
    mlir.register_lowering(primitive, lowering, platform="cpu")
    if (rules := _TRANSPOSES.get(primitive)) is not None:
        first = lambda t, _, second, *more, **kw: primitive.bind(t, second, *more, **kw)  # noqa: E731
        second = lambda t, first, _, *more, **kw: primitive.bind(first, t, *more, **kw)  # noqa: E731
        ad.defjvp(primitive, first, second, None)
        ad.primitive_transposes[primitive] = functools.partial(_transpose, rules)


_register(_pool, _native.target("Pool"))
_register(_forward, _native.target("PoolForward"))
_register(_of_images, _native.target("PoolOfImages"))
_register(_of_kernel, _native.target("PoolOfKernel"))
