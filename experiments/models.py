"""The networks of the experiments: flax NNX modules, and the pure functions made from them.

A module maps images [B, H, W, C], floating point in [0, 1], to logits [B, num_classes]. The
library trains functions, not modules: `functional` turns a module class into a pair of them.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from experiments.conv import conv_max_pool

__all__ = ["MODELS", "ConvMaxPool", "DigitsNet", "LeNet", "Model", "functional", "num_parameters"]

Params = dict[str, Any]


class ConvMaxPool(nnx.Module):
    """A convolution with bias, then 2x2 max-pooling.

    Stride 1, no padding, square kernel; initialised as `LeNet` says.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        """Draws kernel [kernel_size, kernel_size, in_channels, out_channels] and bias.

        Args:
            in_channels: channels of the images.
            out_channels: channels of the output.
            kernel_size: height and width of the kernel, pixels.
            rngs: the keys to draw the parameters with.
            dtype: type to compute in; None for the type that images and parameters promote to.
            param_dtype: type of the parameters.
        """
        initializer = _uniform(in_channels * kernel_size**2)
        kernel_shape = (kernel_size, kernel_size, in_channels, out_channels)
        self.kernel = nnx.Param(initializer(rngs.params(), kernel_shape, param_dtype))
        self.bias = nnx.Param(initializer(rngs.params(), (out_channels,), param_dtype))
        self.dtype = dtype

    def __call__(
        self, images: Float[Array, "in_channels height width batch"]
    ) -> Float[Array, "out_channels out_height out_width batch"]:
        """Returns the pooled feature maps, [O, (H - k + 1) // 2, (W - k + 1) // 2, B]."""
        kernel, bias = self.kernel[...], self.bias[...]
        dtype = jnp.result_type(images, kernel, bias) if self.dtype is None else self.dtype
        # All values of a window get the same bias, so it can be added after the maximum.
        pooled = conv_max_pool(images.astype(dtype), kernel.astype(dtype))
        return pooled + bias.astype(dtype).reshape(-1, 1, 1, 1)


class LeNet(nnx.Module):
    """The network of the paper's appendix B.1, with 11,330 parameters.

    28x28x1 => conv1 => max_pool => ReLU => conv2 => max_pool => ReLU => fc1 => ReLU => fc2:
    kernels 5x5, 10 channels, no padding, pooling 2x2, 50 hidden units, 10 classes.

    The paper does not say how parameters are initialised. Our assumption is the default of the
    PyTorch 1.0.0 that it used: kernels and biases independent and uniform on
    [-1/sqrt(fan_in), 1/sqrt(fan_in)), where fan_in is the number of inputs of one output unit.

    Attributes:
        image_shape: height and width (pixels) and channels of the images.
        num_classes: number of logits.
    """

    image_shape: ClassVar[tuple[int, int, int]] = (28, 28, 1)
    num_classes: ClassVar[int] = 10

    def __init__(
        self,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        """Draws the parameters.

        Args:
            rngs: the keys to draw the parameters with.
            dtype: type to compute in, and of the logits; None for the type that images and
                parameters promote to.
            param_dtype: type of the parameters.
        """
        kwargs = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.conv1 = ConvMaxPool(1, 10, 5, **kwargs)
        self.conv2 = ConvMaxPool(10, 10, 5, **kwargs)
        self.fc1 = _linear(4 * 4 * 10, 50, **kwargs)
        self.fc2 = _linear(50, self.num_classes, **kwargs)

    def __call__(self, images: Float[Array, "batch 28 28 1"]) -> Float[Array, "batch num_classes"]:
        """Returns the logits.

        Args:
            images: floating-point array of shape [B, 28, 28, 1], pixels in [0, 1].

        Returns:
            Array of shape [B, 10].

        Raises:
            ValueError: if the images have another shape or are not floating point.
        """
        _check_images(images, self.image_shape)
        hidden = nnx.relu(self.conv1(_batch_last(images)))
        hidden = nnx.relu(self.conv2(hidden))
        hidden = nnx.relu(self.fc1(_flat(hidden)))
        return self.fc2(hidden)


class DigitsNet(nnx.Module):
    """A small network for scikit-learn's digits, with 5,130 parameters.

    8x8x1 => conv1 => max_pool => ReLU => fc1 => ReLU => fc2: kernel 3x3, 16 channels, no padding,
    pooling 2x2, 32 hidden units, 10 classes. Initialised as `LeNet`.

    Attributes:
        image_shape: height and width (pixels) and channels of the images.
        num_classes: number of logits.
    """

    image_shape: ClassVar[tuple[int, int, int]] = (8, 8, 1)
    num_classes: ClassVar[int] = 10

    def __init__(
        self,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        """Draws the parameters.

        Args:
            rngs: the keys to draw the parameters with.
            dtype: type to compute in, and of the logits; None for the type that images and
                parameters promote to.
            param_dtype: type of the parameters.
        """
        kwargs = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.conv1 = ConvMaxPool(1, 16, 3, **kwargs)
        self.fc1 = _linear(3 * 3 * 16, 32, **kwargs)
        self.fc2 = _linear(32, self.num_classes, **kwargs)

    def __call__(self, images: Float[Array, "batch 8 8 1"]) -> Float[Array, "batch num_classes"]:
        """Returns the logits.

        Args:
            images: floating-point array of shape [B, 8, 8, 1], pixels in [0, 1].

        Returns:
            Array of shape [B, 10].

        Raises:
            ValueError: if the images have another shape or are not floating point.
        """
        _check_images(images, self.image_shape)
        hidden = nnx.relu(self.conv1(_batch_last(images)))
        hidden = nnx.relu(self.fc1(_flat(hidden)))
        return self.fc2(hidden)


MODELS: Mapping[str, type[LeNet] | type[DigitsNet]] = {"lenet": LeNet, "digits_net": DigitsNet}
"""The networks by name."""


class Model(NamedTuple):
    """A network as pure functions, for `jax.jit`, `jax.grad` and `jax.vmap`.

    Attributes:
        init: maps a PRNG key to parameters: a nested dict of arrays. The same key gives the same
            parameters; `jax.vmap(init)(keys)` stacks those of several keys.
        apply: maps parameters and images [B, H, W, C] to logits [B, num_classes]. Raises
            ValueError if the parameters do not have the names and shapes that `init` gives.
    """

    init: Callable[[Key[Array, ""]], Params]
    apply: Callable[
        [Params, Float[Array, "batch height width channels"]], Float[Array, "batch num_classes"]
    ]


def functional(module_class: Callable[..., nnx.Module], **kwargs: Any) -> Model:
    """Turns a module class into two pure functions.

    Args:
        module_class: makes a module from ``rngs=nnx.Rngs(key)`` and `kwargs`; all of the module's
            state must be `nnx.Param` (no running statistics, no dropout), and calling it with
            images gives logits.
        **kwargs: passed to `module_class`.

    Returns:
        A `Model`.

    Raises:
        ValueError: if the module has other state than parameters.
    """

    def build(key: Any) -> nnx.Module:
        return module_class(rngs=nnx.Rngs(key), **kwargs)

    abstract = nnx.eval_shape(lambda: build(0))
    graphdef, template, other = nnx.split(abstract, nnx.Param, ...)
    if jax.tree.leaves(other):
        names = sorted(nnx.to_pure_dict(other))
        raise ValueError(f"all state of the module must be nnx.Param, got other state in {names}.")
    shapes = jax.tree.map(jnp.shape, nnx.to_pure_dict(template))

    def init(key: Key[Array, ""]) -> Params:
        return nnx.to_pure_dict(nnx.state(build(key), nnx.Param))

    def apply(
        params: Params, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch num_classes"]:
        got = jax.tree.map(jnp.shape, params)
        if got != shapes:
            raise ValueError(f"params must have the names and shapes {shapes}, got {got}.")
        state = jax.tree.map(lambda leaf: leaf, template)  # a copy, for what follows fills it in
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graphdef, state)(images)

    return Model(init, apply)


def num_parameters(params: Any) -> int:
    """The number of scalars in a pytree of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _batch_last(
    images: Float[Array, "batch height width channels"],
) -> Float[Array, "channels height width batch"]:
    """The layout that `experiments.conv` works in."""
    return images.transpose(3, 1, 2, 0)


def _flat(
    features: Float[Array, "channels height width batch"],
) -> Float[Array, "batch height*width*channels"]:
    """One row for each image: its pixels in row-major order, the channels of a pixel together."""
    return features.transpose(1, 2, 0, 3).reshape(-1, features.shape[3]).T


def _linear(in_features: int, out_features: int, **kwargs: Any) -> nnx.Linear:
    initializer = _uniform(in_features)
    return nnx.Linear(
        in_features, out_features, kernel_init=initializer, bias_init=initializer, **kwargs
    )


def _uniform(fan_in: int) -> nnx.Initializer:
    """Draws uniformly from [-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    bound = fan_in**-0.5

    def initializer(key: Any, shape: Any, dtype: Any = jnp.float32, _: Any = None) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return initializer


def _check_images(images: Array, image_shape: tuple[int, int, int]) -> None:
    if images.ndim != 4 or images.shape[1:] != image_shape:
        allowed = ", ".join(map(str, image_shape))
        raise ValueError(f"images must have shape [B, {allowed}], got shape {images.shape}.")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"images must be floating point, scaled to [0, 1], got type {images.dtype}."
        )
