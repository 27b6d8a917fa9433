"""Convolution that keeps the size of its images, for the nets with many channels.

Images are NHWC, with the channels last, the layout in which the libraries of graphics cards and
XLA's own convolutions on CPU are fastest. Kernels are HWIO. On platforms other than CPU this is
`jax.lax.conv_general_dilated` and nothing else. On CPU that function is fast for some sizes, but
not for all three products of a training step (forward, the gradient of the images, the gradient of
the kernel). There, float32 images on one device take the compiled convolutions of `_native`, where
these have been compiled. For everything else each product is computed in the way that is fastest
for its sizes:

- a single image: a product of patches, which under `jax.vmap` over examples is a batched product;
- images of at most four pixels: one matrix product that holds the kernel at every output pixel,
  since most of a patch would be padding;
- images of at most sixteen pixels and many channels: a product for each row of the kernel, without
  the rows that are padding;
- kernels of one pixel: a matrix product;
- strides: a product of patches, since the gradient would otherwise be a convolution of zeros;
- the gradient of a kernel from large images: products of patches, a few images at a time, so that
  the patches stay in the cache.

The results of these ways differ by rounding only. Everything can be differentiated in forward and
reverse mode, to any order. Under `jax.vmap` over kernels a convolution becomes a grouped one, which
is slow: nets with these convolutions are trained one after another (`jax.lax.map`).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from experiments.models import _native
from experiments.models.conv import check_arrays

__all__ = ["conv_same"]

Images = Float[Array, "batch height width in_channels"]
Kernel = Float[Array, "kernel_height kernel_width in_channels out_channels"]
Outputs = Float[Array, "batch out_height out_width out_channels"]

# The bytes that patches may take at a time, which are the second-level caches of two cores.
_CACHE = 4_000_000


def conv_same(images: Images, kernel: Kernel, *, stride: int = 1) -> Outputs:
    """Convolves (in fact correlates) images that are zero-padded by half the kernel on every side.

    Args:
        images: floating-point array of shape [B, H, W, C].
        kernel: array of shape [h, w, C, O], h and w odd, of the same type as `images`.
        stride: distance between the centres of neighbouring outputs, in pixels.

    Returns:
        Array of shape [B, ceil(H / stride), ceil(W / stride), O], of the type of `images`.

    Raises:
        ValueError: if the arrays do not have four axes each, equal channels and one type, or the
            kernel is not odd, or the stride is below 1.
    """
    _check(images, kernel, stride)
    on_cpu, elsewhere = (functools.partial(f, stride=stride) for f in (_on_cpu, _by_xla))
    return jax.lax.platform_dependent(images, kernel, cpu=on_cpu, default=elsewhere)


def _by_xla(images: Images, kernel: Kernel, stride: int) -> Outputs:
    return _with_layout(images, kernel, ("NHWC", "HWIO", "NHWC"), stride)


def _with_layout(
    images: Float[Array, "..."],
    kernel: Float[Array, "..."],
    layout: tuple[str, str, str],
    stride: int = 1,
) -> Float[Array, "..."]:
    """XLA's convolution; the layout names the axes of images, kernel and outputs."""
    high, wide = (kernel.shape[layout[1].index(axis)] // 2 for axis in "HW")
    return jax.lax.conv_general_dilated(
        images,
        kernel,
        (stride, stride),
        ((high, high), (wide, wide)),
        dimension_numbers=layout,
    )


def _on_cpu(images: Images, kernel: Kernel, stride: int) -> Outputs:
    if kernel.shape[:2] == (1, 1):
        return _product(images[:, ::stride, ::stride], kernel[0, 0])
    if images.shape[0] == 1:
        return _by_patches(images, kernel, stride)
    if _native.is_usable(images):
        return _native.conv(images, kernel, stride)
    if math.prod(images.shape[1:3]) <= 4 and stride == 1:
        return _with_kernel_at_every_pixel(images, kernel)
    if math.prod(images.shape[1:3]) <= 16 and stride == 1 and _is_wide(kernel, 2**14):
        return _row_by_row(images, kernel)
    return _by_sizes(images, kernel, stride)


def _product(images: Images, matrix: Float[Array, "in_channels out_channels"]) -> Outputs:
    """Multiplies the channels of every pixel by a matrix."""
    products = images.reshape(-1, images.shape[3]) @ matrix
    return products.reshape(*images.shape[:3], matrix.shape[1])


def _with_kernel_at_every_pixel(images: Images, kernel: Kernel) -> Outputs:
    """One product with a matrix from all input pixels to all output pixels."""
    batch, height, width, channels = images.shape
    high, wide, _, out_channels = kernel.shape
    # The kernel seen from output pixel (p, q) is a window of the kernel among zeros.
    top, left = max(height - 1 - high // 2, 0), max(width - 1 - wide // 2, 0)
    padded = jnp.pad(kernel, ((top, top), (left, left), (0, 0), (0, 0)))
    windows = [
        padded[
            (start := high // 2 + top - p) : start + height,
            (begin := wide // 2 + left - q) : begin + width,
        ]
        for p in range(height)
        for q in range(width)
    ]
    matrix = jnp.stack(windows, axis=3).reshape(height * width * channels, -1)
    return (images.reshape(batch, -1) @ matrix).reshape(batch, height, width, out_channels)


def _row_by_row(images: Images, kernel: Kernel) -> Outputs:
    """A product per row of the kernel, with the rows of the images that it meets.

    In images of four rows, a sixth of the rows that a kernel of three rows meets is padding.
    """
    height, high, wide = images.shape[1], *kernel.shape[:2]
    row_patches = _patches(images, kernel[:1], 1)
    outputs = jnp.zeros((*images.shape[:3], kernel.shape[3]), images.dtype)
    for i in range(max(0, high // 2 - height + 1), min(high, high // 2 + height)):
        shift = i - high // 2  # How far below its output the row of the images is.
        seen = row_patches[:, max(0, shift) : height + min(0, shift)]
        product = _product(seen, kernel[i].reshape(wide * kernel.shape[2], -1))
        outputs += jnp.pad(product, ((0, 0), (max(0, -shift), max(0, shift)), (0, 0), (0, 0)))
    return outputs


def _is_wide(kernel: Kernel, least: int) -> bool:
    """Whether the products over channels are large enough to outweigh the overhead."""
    return kernel.shape[2] * kernel.shape[3] >= least


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _by_sizes(images: Images, kernel: Kernel, stride: int) -> Outputs:
    """The convolution, linear in each argument; its derivative says how gradients are computed."""
    return _by_xla(images, kernel, stride) if stride == 1 else _by_patches(images, kernel, stride)


@functools.partial(_by_sizes.defjvp, symbolic_zeros=True)
def _by_sizes_jvp(stride, primals, tangents):
    images, kernel = primals
    of_images, of_kernel = tangents
    terms = []
    # The images of the first layer are data and have no tangent.
    if not isinstance(of_images, jax.custom_derivatives.SymbolicZero):
        terms.append(_of_images(of_images, kernel, stride))
    if not isinstance(of_kernel, jax.custom_derivatives.SymbolicZero):
        terms.append(_of_kernel(images, of_kernel, stride))
    outputs = _by_sizes(images, kernel, stride)
    return outputs, sum(terms) if terms else jnp.zeros_like(outputs)


def _of_images(images: Images, kernel: Kernel, stride: int) -> Outputs:
    """The convolution written so that its transpose with respect to the images is fast."""
    if stride > 1:
        return _by_patches(images, kernel, stride)
    layout = ("NHWC", "HWOI", "NHWC")
    return _with_layout(images, kernel.transpose(0, 1, 3, 2), layout)


def _of_kernel(images: Images, kernel: Kernel, stride: int) -> Outputs:
    """The convolution written so that its transpose with respect to the kernel is fast."""
    batch, height, width, channels = images.shape
    if stride > 1 or (channels < 8 and kernel.shape[3] >= 32):
        return _by_transposed_patches(images, kernel, stride)
    if height * width < 256 or not _is_wide(kernel, 2**12):
        layout = ("CHWN", "IHWO", "HWNC")
        images, kernel = images.transpose(3, 1, 2, 0), kernel.transpose(2, 0, 1, 3)
        return _with_layout(images, kernel, layout).transpose(2, 0, 1, 3)
    if jax.__version_info__ < (0, 10):  # It cannot transpose the code below.
        return _by_transposed_patches(images, kernel, stride)
    size = math.prod(kernel.shape[:3]) * height * width * images.dtype.itemsize
    most = max(1, _CACHE // size)
    count = next(count for count in range(min(most, batch), 0, -1) if batch % count == 0)
    runs = images.reshape(batch // count, count, height, width, channels)

    # Patches are made again for the gradient, since keeping those of all images is slow.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def of_run(_: None, run: Images) -> tuple[None, Outputs]:
        return None, _by_transposed_patches(run, kernel, 1)

    _, outputs = jax.lax.scan(of_run, None, runs)
    return outputs.reshape(batch, height, width, kernel.shape[3])


def _by_patches(images: Images, kernel: Kernel, stride: int) -> Outputs:
    patches = _patches(images, kernel, stride)
    return _product(patches, kernel.reshape(-1, kernel.shape[3]))


def _by_transposed_patches(images: Images, kernel: Kernel, stride: int) -> Outputs:
    """The same as `_by_patches`, with the factors of the product exchanged.

    In the gradient of the kernel, the gradient of the outputs is then the first factor, in a layout
    in which the product is two to four times faster. The barrier keeps the compiler from exchanging
    the factors again.
    """
    patches = _patches(images, kernel, stride)
    matrix = kernel.reshape(-1, kernel.shape[3]).T
    contracted = (((1,), (1,)), ((), ()))
    products = jax.lax.dot_general(matrix, patches.reshape(-1, patches.shape[3]), contracted)
    return jax.lax.optimization_barrier(products).T.reshape(*patches.shape[:3], -1)


def _patches(
    images: Images, kernel: Kernel, stride: int
) -> Float[Array, "batch out_height out_width patch"]:
    """The pixels under the kernel at every output, in the order of the kernel."""
    high, wide = kernel.shape[:2]
    _, height, width, _ = images.shape
    rows, columns = -(-height // stride), -(-width // stride)
    padding = ((0, 0), (high // 2, high // 2), (wide // 2, wide // 2), (0, 0))
    padded = jnp.pad(images, padding)
    slices = [
        padded[:, i : i + stride * rows : stride, j : j + stride * columns : stride]
        for i in range(high)
        for j in range(wide)
    ]
    return jnp.concatenate(slices, axis=-1)


def _check(images: Images, kernel: Kernel, stride: int) -> None:
    check_arrays(images, kernel, "BHWC")
    if not (kernel.shape[0] % 2 and kernel.shape[1] % 2):
        raise ValueError(f"kernel must have odd height and width, got shape {kernel.shape}.")
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}.")
