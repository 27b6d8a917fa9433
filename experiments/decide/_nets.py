"""The nets of `experiments.models` as functions of parameters, with a choice of convolution.

Under `jax.vmap` over seeds a convolution has a kernel per seed and becomes a grouped one. Here it
can be a batched matrix product of patches instead, on every platform. Initial parameters are those
of `experiments.models`, and so are the logits, up to rounding.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt8

from experiments import models
from experiments.decide import _datasets
from experiments.decide.settings import Setting
from experiments.models.conv import max_pool

Convolution = Literal["product", "lax"]
"""A product of patches, for images with the batch last, or `jax.lax.conv`, for images in NHWC."""

_STAGES = (("conv1",), ("conv2",), ("conv3", "conv4"), ("conv5", "conv6"), ("conv7", "conv8"))


class Net(NamedTuple):
    """A net as pure functions.

    Attributes:
        init: maps a PRNG key to parameters.
        logits: ``logits(params, images)`` maps uint8 images [B, H, W, C] to logits [B, 10].
    """

    init: Callable[[Key[Array, ""]], Any]
    logits: Callable[[Any, UInt8[Array, "batch height width channels"]], Float[Array, "batch 10"]]


def make(setting: Setting, convolution: Convolution = "product", groups: int = 1) -> Net:
    """Makes the net of a setting.

    Args:
        setting: names the net and its width.
        convolution: how convolutions are computed.
        groups: the number of equal parts into which the images of a pass are divided, if it divides
            their number. Each part has a copy of the parameters, so that the gradient of a kernel
            is computed as several short sums in parallel instead of a long one. Results change by
            rounding only.

    Raises:
        ValueError: if there is no such convolution, or `groups` is below 1.
    """
    if convolution not in get_args(Convolution):
        raise ValueError(f"convolution must be product or lax, got {convolution!r}.")
    if groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}.")
    forward = _vgg11 if setting.net == "vgg11" else _digits_net
    layout = _Product() if convolution == "product" else _Lax()
    scale = _datasets.max_value(setting)

    def plain(params: Any, images: Array) -> Array:
        return forward(params, layout.enter(images.astype(jnp.float32) / scale), layout)

    def logits(params: Any, images: Array) -> Array:
        size = images.shape[0]
        if groups == 1 or size % groups or size == groups:
            return plain(params, images)
        # The barrier keeps the compiler from moving the sum over groups into the product again.
        copies = jax.tree.map(lambda x: jnp.broadcast_to(x, (groups, *x.shape)), params)
        runs = images.reshape(groups, size // groups, *images.shape[1:])
        return jax.vmap(plain)(jax.lax.optimization_barrier(copies), runs).reshape(size, -1)

    kwargs = {"width": setting.width} if setting.net == "vgg11" else {}
    return Net(models.functional(models.MODELS[setting.net], **kwargs).init, logits)


class _Product:
    """Operations on images [C, H, W, B], as in `experiments.models.conv`."""

    def enter(self, images: Array) -> Array:
        return images.transpose(3, 1, 2, 0)

    def leave(self, features: Array) -> Array:
        return features.transpose(1, 2, 0, 3).reshape(-1, features.shape[3]).T

    def bias(self, values: Array) -> Array:
        return values[:, None, None, None]

    def conv(self, images: Array, kernel: Array, padding: int) -> Array:
        high, wide, _, out_channels = kernel.shape
        spatial = ((0, 0), (padding, padding), (padding, padding), (0, 0))
        images = jnp.pad(images, spatial)
        rows, columns = images.shape[1] - high + 1, images.shape[2] - wide + 1
        # One patch per output pixel, in the order of the kernel: row, column, channel.
        patches = jnp.concatenate(
            [images[:, i : i + rows, j : j + columns] for i in range(high) for j in range(wide)]
        )
        products = kernel.reshape(-1, out_channels).T @ patches.reshape(patches.shape[0], -1)
        return products.reshape(out_channels, rows, columns, images.shape[3])


class _Lax:
    """Operations on images [B, H, W, C], with which the libraries of graphics cards are fastest."""

    def enter(self, images: Array) -> Array:
        return images

    def leave(self, features: Array) -> Array:
        return features.reshape(features.shape[0], -1)

    def bias(self, values: Array) -> Array:
        return values[None, None, None, :]

    def conv(self, images: Array, kernel: Array, padding: int) -> Array:
        return jax.lax.conv_general_dilated(
            images,
            kernel,
            (1, 1),
            ((padding, padding),) * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


def _vgg11(params: Any, hidden: Array, layout: _Product | _Lax) -> Array:
    for stage in _STAGES:
        for name in stage:
            layer = params[name]
            hidden = layout.conv(hidden, layer["kernel"], padding=1) + layout.bias(layer["bias"])
            hidden = jax.nn.relu(hidden)
        hidden = max_pool(hidden)  # The axes 1 and 2 are the pixels in both layouts.
    return _linear(params["fc"], layout.leave(hidden))


def _digits_net(params: Any, hidden: Array, layout: _Product | _Lax) -> Array:
    layer = params["conv1"]
    hidden = max_pool(layout.conv(hidden, layer["kernel"], padding=0))
    hidden = jax.nn.relu(hidden + layout.bias(layer["bias"]))
    hidden = jax.nn.relu(_linear(params["fc1"], layout.leave(hidden)))
    return _linear(params["fc2"], hidden)


def _linear(layer: Any, inputs: Array) -> Array:
    return inputs @ layer["kernel"] + layer["bias"][None]
