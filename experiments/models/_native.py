"""Convolutions on CPU by C++ that is compiled on the machine that runs it.

XLA has no fast convolution on CPU for all sizes and directions. `_conv_cpu.cc` has one, and its two
transposes (Winograd's, in `_conv_winograd.h`, for 3x3 kernels with many channels); here they become
operations of JAX that can be differentiated to any order, mapped with `jax.vmap`, and used under
`jax.jit` and in `jax.shard_map`. `_conv_pool_cpu.cc` has another for few channels, with pooling,
which is in `_native_pool.py`. They need a C++ compiler once: they are compiled in about ten
seconds, when a net first asks for them, or beforehand by

    python -m experiments.models

They go into `build/native`, under a name that depends on the source, the processor and jaxlib, so
that nothing stale or made for another machine is loaded. Without a compiler everything works, by
products of patches (`_conv_same.py`), more slowly.
"""

import concurrent.futures
import ctypes
import functools
import hashlib
import importlib.metadata
import itertools
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.interpreters import ad, batching, mlir, xla
from jaxtyping import Array, Float

__all__ = ["build", "conv", "is_compiled", "is_usable", "library", "target"]

Images = Float[Array, "batch height width in_channels"]
Kernel = Float[Array, "kernel_height kernel_width in_channels out_channels"]
Outputs = Float[Array, "batch out_height out_width out_channels"]

_SOURCES = ("_conv_cpu.cc", "_conv_pool_cpu.cc")
_HEADERS = ("_cpu.h", "_conv_cpu.h", "_conv_winograd.h")
_FUNCTIONS = (
    *("ConvForward", "ConvOfImages", "ConvOfKernel"),
    *("Pool", "PoolForward", "PoolOfImages", "PoolOfKernel"),
)
_FLAGS = ("-std=c++20", "-O3", "-march=native", "-fPIC")


def library() -> pathlib.Path:
    """Where the compiled library of this machine is, or would be."""
    folder = pathlib.Path(__file__).parent
    sources = ((folder / name).read_text() for name in (*_SOURCES, *_HEADERS))
    parts = (*sources, *_FLAGS, importlib.metadata.version("jaxlib"), _processor())
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    return folder.parents[1] / "build" / "native" / f"conv-{digest}.so"


def _processor() -> str:
    """A text that says which instructions this processor has."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.platform() + platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def build() -> pathlib.Path:
    """Compiles the library, with `$CXX` or `c++`, unless it is there already.

    Returns:
        Its path.

    Raises:
        OSError: if there is no compiler, or the folder cannot be written.
        subprocess.CalledProcessError: if it does not compile; `stderr` says why.
    """
    path = library()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # A process that builds at the same time finds no library or a whole one.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = pathlib.Path(folder) / path.name
            with concurrent.futures.ThreadPoolExecutor() as threads:
                objects = list(threads.map(functools.partial(_compile, made.parent), _SOURCES))
            _run("-shared", *objects, "-o", str(made))
            made.replace(path)
    return path


def _compile(folder: pathlib.Path, source: str) -> str:
    """Compiles one source into an object file in the folder; returns its path."""
    made = str(folder / f"{source}.o")
    includes = ("-isystem", jax.ffi.include_dir())
    _run(*includes, "-c", str(pathlib.Path(__file__).with_name(source)), "-o", made)
    return made


def _run(*arguments: str) -> None:
    """Runs the compiler."""
    command = [_compiler(), *_FLAGS, *arguments]
    subprocess.run(command, check=True, capture_output=True, text=True)


def _compiler() -> str:
    return os.environ.get("CXX", "c++")


@functools.cache
def is_compiled() -> bool:
    """Whether this process has the library; compiles it, if it can, when it is asked first."""
    return _load()


def _load() -> bool:
    """Makes the library known to XLA; compiles it before, if it is not there."""
    try:
        if not library().exists() and shutil.which(_compiler()) is not None:
            print("Compiling convolutions for this processor, once ...", file=sys.stderr)
        functions = ctypes.cdll.LoadLibrary(str(build()))
    except OSError:
        return False
    except subprocess.CalledProcessError as error:
        message = "The C++ compiler failed, convolutions will be slower; why, is said by"
        warnings.warn(f"{message} python -m experiments.models: {error}", stacklevel=2)
        return False
    for name in _FUNCTIONS:
        capsule = jax.ffi.pycapsule(getattr(functions, f"Msgd{name}"))
        jax.ffi.register_ffi_target(target(name), capsule, platform="cpu")
    return True


def target(name: str) -> str:
    """The name under which XLA knows a function of the library."""
    return f"msgd_{name}"


def is_usable(images: Images) -> bool:
    """Whether `conv` can be used for these images where this is traced.

    It needs float32, images, and the compiled library. XLA cannot divide the operation among
    devices: it is for a single device, or for what `jax.shard_map` gives one device to do.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        is_local = jax.device_count() == 1
    else:
        is_local = all(kind == jax.sharding.AxisType.Manual for kind in mesh.axis_types)
    fits = is_local and images.dtype == jnp.float32 and images.size > 0
    return fits and is_compiled()


def conv(images: Images, kernel: Kernel, stride: int) -> Outputs:
    """Convolves images zero-padded by half the kernel; as `conv_same`, for float32, on CPU alone.

    Args:
        images: float32 array of shape [B, H, W, C].
        kernel: float32 array of shape [h, w, C, O], h and w odd.
        stride: distance between the centres of neighbouring outputs, in pixels.

    Returns:
        Array of shape [B, ceil(H / stride), ceil(W / stride), O].
    """
    batch, *sides, _ = images.shape
    rows, columns = (-(-side // stride) for side in sides)
    shape = (batch, rows, columns, kernel.shape[3])
    return _forward.bind(images, kernel, shape=shape, stride=stride)


# The convolution and its transposes are bilinear, and transposes of each other: three operations
# have derivatives of every order. `shape` is that of the result.
_forward = jax.extend.core.Primitive("conv_forward")
_of_images = jax.extend.core.Primitive("conv_of_images")
_of_kernel = jax.extend.core.Primitive("conv_of_kernel")


def transposes(forward: Any, of_images: Any, of_kernel: Any) -> dict[Any, tuple[Any, Any]]:
    """How to transpose a convolution and its two transposes: each by another of them.

    By operation, a rule for its first and for its second argument, from the cotangent and both
    arguments to an operation and its arguments.
    """
    return {
        forward: (
            lambda cotangent, _, kernel: (of_images, cotangent, kernel),
            lambda cotangent, images, _: (of_kernel, images, cotangent),
        ),
        of_images: (
            lambda cotangent, _, kernel: (forward, cotangent, kernel),
            lambda cotangent, outputs, _: (of_kernel, cotangent, outputs),
        ),
        of_kernel: (
            lambda cotangent, _, outputs: (of_images, outputs, cotangent),
            lambda cotangent, images, _: (forward, images, cotangent),
        ),
    }


_TRANSPOSES = transposes(_forward, _of_images, _of_kernel)


def mapped_size(arguments: Any, axes: Any) -> int:
    """The size of the mapped axis."""
    return next(x.shape[axis] for x, axis in zip(arguments, axes, strict=True) if axis is not None)


def in_turn(bind: Callable[..., Any], arguments: Any, axes: Any) -> Any:
    """The results of one index of the mapped axis after the other, stacked along a first axis."""
    stacked = [
        x if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(arguments, axes, strict=True)
    ]

    def one(i: Array) -> Any:
        return bind(*(x if axis is None else x[i] for x, axis in zip(stacked, axes, strict=True)))

    return jax.lax.map(one, jnp.arange(mapped_size(arguments, axes)))


def _transpose(position: int, of: Callable[..., Any]) -> Callable[..., Array]:
    """The rule for the argument at this position, as JAX calls it."""

    def rule(cotangent: Array, *arguments: Any, shape: tuple[int, ...], stride: int) -> Array:
        del shape
        primitive, first, second = of(cotangent, *arguments)
        return primitive.bind(first, second, shape=arguments[position].aval.shape, stride=stride)

    return rule


def _batch(
    primitive: Any, arguments: Any, axes: Any, *, shape: tuple[int, ...], stride: int
) -> tuple[Array, int]:
    """Folds mapped images into the batch, and computes all else one after another.

    That is faster for mapped kernels as well, since each call uses all cores.
    """
    bind = functools.partial(primitive.bind, stride=stride)
    if axes[1] is not None or primitive is _of_kernel:
        return in_turn(functools.partial(bind, shape=shape), arguments, axes), 0
    first, second = jnp.moveaxis(arguments[0], axes[0], 0), arguments[1]
    count = first.shape[0]
    folded = first.reshape(-1, *first.shape[2:])
    results = bind(folded, second, shape=(count * shape[0], *shape[1:]))
    return results.reshape(count, *shape), 0


def _register(primitive: Any, name: str) -> None:
    def call(first: Array, second: Array, *, shape: tuple[int, ...], stride: int) -> Array:
        result = jax.ShapeDtypeStruct(shape, jnp.float32)
        return jax.ffi.ffi_call(target(name), result)(first, second, stride=np.int64(stride))

    primitive.def_impl(functools.partial(xla.apply_primitive, primitive))
    primitive.def_abstract_eval(
        lambda first, second, *, shape, stride: ShapedArray(shape, jnp.float32)
    )
    ad.defbilinear(primitive, *itertools.starmap(_transpose, enumerate(_TRANSPOSES[primitive])))
    batching.primitive_batchers[primitive] = functools.partial(_batch, primitive)
    lowering = mlir.lower_fun(call, multiple_results=False)
    mlir.register_lowering(primitive, lowering, platform="cpu")


_register(_forward, "ConvForward")
_register(_of_images, "ConvOfImages")
_register(_of_kernel, "ConvOfKernel")
