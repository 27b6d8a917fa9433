"""Convolution with 2x2 max-pooling and ReLU, fast on CPU and on other platforms.

On CPU, XLA's convolutions and the backward pass of max-pooling are slow, and under `jax.vmap` over
kernels (several seeds trained at once) a convolution becomes a grouped one, which is slower still.
There, for float32 images on one device, convolution, bias, pooling and ReLU are one compiled
function (`_native_pool`), where it has been compiled. For all else a convolution on CPU, and every
one on an NVIDIA card, is one matrix product: its output is seen as blocks of 2x2, and the product
has a column per block and a row per output channel and place in the block. The patch that a block
needs is only one pixel larger than the kernel. The left factor contains the kernel four times, once
per place, zero-padded to the size of the patch. Max-pooling takes the largest of the four places.

This is fast for few channels, where memory is the limit; `conv_same` is for nets with many. A step
of 20 seeds of LeNet on 1,000 images each, mapped with `jax.vmap`, takes 4.5 ms on an H200, and with
grouped convolutions 9.8 ms.

On other platforms this is `jax.lax.conv_general_dilated`. Kernels are HWIO, and images are CHWN,
with the batch last: then patches are copied in long stretches and added up in vector instructions,
and no layer transposes for the next one. (A training step of the LeNet-like net takes 20 % less
time than with NHWC; on other platforms XLA chooses the layout itself.) Everything can be
differentiated in forward and reverse mode and mapped with `jax.vmap` over images, kernels or both.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from experiments.models import _native, _native_pool

__all__ = ["check_arrays", "conv_pool_relu", "max_pool"]

Images = Float[Array, "in_channels height width batch"]
Kernel = Float[Array, "kernel_height kernel_width in_channels out_channels"]
Bias = Float[Array, " out_channels"]
Outputs = Float[Array, "out_channels out_height out_width batch"]


def conv_pool_relu(images: Images, kernel: Kernel, bias: Bias) -> Outputs:
    """Convolves, takes the maximum over disjoint windows of 2x2, and applies ReLU.

    The convolution (in fact a correlation) has stride 1 and no padding. A last row or column of it
    that fills no window is dropped. Among equal maxima of a window, the first in row-major order
    gets the whole gradient, on every platform. A value that is not finite makes every output that
    it has a part in NaN or infinite, and on CPU possibly every channel of that output's pixel.

    Args:
        images: floating-point array of shape [C, H, W, B].
        kernel: array of shape [h, w, C, O], of the same type as `images`.
        bias: array of shape [O], of the same type, which is added before ReLU.

    Returns:
        Array of shape [O, (H - h + 1) // 2, (W - w + 1) // 2, B], of the type of `images`.

    Raises:
        ValueError: if images and kernel do not have four axes each, equal channels and one type, or
            the bias does not fit, or the images are too small for one window.
    """
    _check(images, kernel)
    if bias.shape != kernel.shape[3:] or bias.dtype != kernel.dtype:
        raise ValueError(
            f"bias must have shape [{kernel.shape[3]}] and type {kernel.dtype}, for the channels "
            f"and of the type of the kernel, got shape {bias.shape} and type {bias.dtype}."
        )
    # The platform that the code is compiled for, which need not be the default one.
    return jax.lax.platform_dependent(
        images, kernel, bias, cpu=_on_cpu, cuda=_as_product, default=_by_xla
    )


def max_pool(images: Images) -> Images:
    """The maximum over disjoint windows of 2x2; a last odd row or column is dropped.

    Args:
        images: array of shape [C, H, W, B] or [B, H, W, C], at least 2x2 pixels.

    Returns:
        Array of the same layout, with H // 2 and W // 2 pixels. Among equal maxima of a window, the
        first in row-major order gets the whole gradient.
    """
    channels, height, width, batch = images.shape
    rows, columns = height // 2, width // 2
    images = images[:, : 2 * rows, : 2 * columns]
    blocks = images.reshape(channels, rows, 2, columns, 2, batch).transpose(2, 4, 0, 1, 3, 5)
    return _max_of_four(blocks.reshape(4, channels, rows, columns, batch))


def _by_xla(images: Images, kernel: Kernel, bias: Bias) -> Outputs:
    layout = ("CHWN", "HWIO", "CHWN")
    outputs = jax.lax.conv_general_dilated(
        images, kernel, (1, 1), "VALID", dimension_numbers=layout
    )
    return _relu(max_pool(outputs), bias)


def _relu(pooled: Outputs, bias: Bias) -> Outputs:
    # All values of a window get the same bias, so it can be added after the maximum.
    return jax.nn.relu(pooled + bias[:, None, None, None])


def _on_cpu(images: Images, kernel: Kernel, bias: Bias) -> Outputs:
    # A single image may be one of many that are mapped over, with a gradient of its own each. Then
    # a product is better, which becomes a batched one.
    if images.shape[3] > 1 and _native.is_usable(images):
        return _native_pool.conv_pool_relu(images, kernel, bias)
    return _as_product(images, kernel, bias)


def _as_product(images: Images, kernel: Kernel, bias: Bias) -> Outputs:
    channels, height, width = _output_shape(images, kernel)
    rows, columns = height // 2, width // 2
    pooled = _max_of_four(_blocks(images, kernel, rows, columns))
    return _relu(pooled.reshape(channels, rows, columns, images.shape[3]), bias)


def _blocks(
    images: Images, kernel: Kernel, rows: int, columns: int
) -> Float[Array, "4 out_channels blocks"]:
    """The convolution as blocks of 2x2 outputs.

    Args:
        images: array of shape [C, H, W, B].
        kernel: array of shape [h, w, C, O].
        rows: rows of blocks in an image.
        columns: columns of blocks in an image.

    Returns:
        Array of shape [4, O, rows * columns * B]: place in the block (row-major), channel, block.
        The last axis is long, which makes the maximum over the places fast.
    """
    # A cell is 2x2 pixels. A block needs h + 1 rows of pixels, so h // 2 + 1 rows of cells.
    high, wide = (size // 2 + 1 for size in kernel.shape[:2])
    cells = _cells(images, rows + high - 1, columns + wide - 1)
    slices = [cells[:, i : i + rows, j : j + columns] for i in range(high) for j in range(wide)]
    shifts = _four_shifts(kernel, high, wide)
    products = jnp.matmul(shifts.T, jnp.concatenate(slices).reshape(shifts.shape[0], -1))
    return products.reshape(4, kernel.shape[3], -1)


def _cells(
    images: Images, rows: int, columns: int
) -> Float[Array, "4*in_channels rows columns batch"]:
    """The pixels of each cell of 2x2 as channels; images are cut or zero-padded at the end."""
    images = images[:, : 2 * rows, : 2 * columns]
    channels, height, width, batch = images.shape
    missing = ((0, 0), (0, 2 * rows - height), (0, 2 * columns - width), (0, 0))
    cells = jnp.pad(images, missing).reshape(channels, rows, 2, columns, 2, batch)
    return cells.transpose(2, 4, 0, 1, 3, 5).reshape(4 * channels, rows, columns, batch)


def _four_shifts(kernel: Kernel, high: int, wide: int) -> Float[Array, "patch 4*out_channels"]:
    """The kernel at each place of a block, zero-padded to high x wide cells, ordered as patches."""
    height, width, in_channels, out_channels = kernel.shape
    bottom, right = 2 * high - height, 2 * wide - width
    places = [
        jnp.pad(kernel, ((i, bottom - i), (j, right - j), (0, 0), (0, 0)))
        for i in (0, 1)
        for j in (0, 1)
    ]
    shifts = jnp.stack(places, axis=3).reshape(high, 2, wide, 2, in_channels, 4 * out_channels)
    return shifts.transpose(0, 2, 1, 3, 4, 5).reshape(-1, 4 * out_channels)


@jax.custom_jvp
def _max_of_four(candidates: Float[Array, "4 *shape"]) -> Float[Array, "*shape"]:
    """The maximum over the leading axis; the first of equal maxima gets the whole gradient."""
    # Maxima of pairs, since XLA fuses no reduction here: with jnp.max a step takes twice as long.
    first, second, third, fourth = candidates
    return jnp.maximum(jnp.maximum(first, second), jnp.maximum(third, fourth))


@_max_of_four.defjvp
def _max_of_four_jvp(
    primals: tuple[Float[Array, "4 *shape"]], tangents: tuple[Float[Array, "4 *shape"]]
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    # JAX's own rule splits the gradient among equal maxima, and so costs a step 15 % more.
    (candidates,), (tangent,) = primals, tangents
    places = jax.lax.broadcasted_iota(jnp.int32, candidates.shape, 0)
    wins = places == _first_maximum(candidates)[None]
    return _max_of_four(candidates), jnp.where(wins, tangent, jnp.zeros_like(tangent)).sum(axis=0)


def _first_maximum(candidates: Float[Array, "4 *shape"]) -> Int[Array, "*shape"]:
    """The first index of the maximum, by elementwise operations, which XLA can fuse (no argmax)."""
    first, second, third, fourth = candidates
    top = jnp.where(second > first, 1, 0)
    bottom = jnp.where(fourth > third, 3, 2)
    is_bottom = jnp.maximum(third, fourth) > jnp.maximum(first, second)
    return jnp.where(is_bottom, bottom, top).astype(jnp.int32)


def _output_shape(images: Images, kernel: Kernel) -> tuple[int, int, int]:
    """Channels, height and width of the convolution."""
    _, height, width, _ = images.shape
    return kernel.shape[3], height - kernel.shape[0] + 1, width - kernel.shape[1] + 1


def check_arrays(images: Array, kernel: Array, axes: str) -> None:
    """Raises ValueError unless images, with axes such as "CHWB", and a kernel fit together."""
    if images.ndim != 4:
        raise ValueError(f"images must have shape [{', '.join(axes)}], got shape {images.shape}.")
    channels = images.shape[axes.index("C")]
    if kernel.ndim != 4 or kernel.shape[2] != channels:
        raise ValueError(
            f"kernel must have shape [h, w, C, O] with C = {channels}, the channels of the "
            f"images, got shape {kernel.shape}."
        )
    if images.dtype != kernel.dtype or not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            "images and kernel must have the same floating-point type, got "
            f"{images.dtype} and {kernel.dtype}."
        )


def _check(images: Images, kernel: Kernel) -> None:
    check_arrays(images, kernel, "CHWB")
    if min(_output_shape(images, kernel)[1:]) < 2:
        least = tuple(size + 1 for size in kernel.shape[:2])
        raise ValueError(
            f"images must be at least {least[0]} x {least[1]} pixels for a kernel of "
            f"{kernel.shape[0]} x {kernel.shape[1]}, got {images.shape[1]} x {images.shape[2]}."
        )
