"""The parts of nets: their base class, and layers.

Between layers images are NHWC, except around `ConvPoolReLU`, where they are CHWN, the layout of
`conv`.
"""

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from experiments.models._conv_same import conv_same
from experiments.models.conv import conv_pool_relu

__all__ = [
    "Conv",
    "ConvPoolReLU",
    "Cost",
    "GhostBatchNorm",
    "Net",
    "batch_last",
    "check_images",
    "flat",
    "linear",
    "uniform",
]

Features = Float[Array, "batch height width channels"]

EPSILON = 1e-5  # added to the variances of batch norm


class Cost(NamedTuple):
    """Seconds on two cores, measured at one width; they grow with the square of the width.

    Attributes:
        width: the width of the net that was measured; None for a net of one width only.
        step: seconds per image, step and seed.
        evaluation: seconds per image and seed.
        compiling: seconds per run, before its first step and evaluation.
    """

    width: int | None
    step: float
    evaluation: float
    compiling: float


class Net(nnx.Module):
    """The base class of nets, with what is known of a net before it is made.

    A net is made by ``Class(rngs=nnx.Rngs(key), image_shape=..., num_classes=..., width=...)``, of
    which only `rngs` is required; `width` is for nets with a `full_width`.

    Attributes:
        image_shape: height and width (pixels) and channels of the images.
        num_classes: number of logits.
        smallest_side: the smallest height and width of images, in pixels.
        full_width: channels of its first layer as published; None for a net of one width only.
        has_batch_norm: whether it normalises over ghost batches, so that there are no losses of
            single examples.
        one_seed_at_a_time: whether several seeds train one after another, since convolutions with
            the kernels of several nets at once are slow (`conv_same`).
        cost: how long its training takes.
    """

    image_shape: tuple[int, int, int]
    num_classes: int = 10
    smallest_side: ClassVar[int] = 1
    full_width: ClassVar[int | None] = None
    has_batch_norm: ClassVar[bool] = False
    one_seed_at_a_time: ClassVar[bool] = False
    cost: ClassVar[Cost]


class ConvPoolReLU(nnx.Module):
    """A convolution with bias, then 2x2 max-pooling, then ReLU.

    The stride is 1, there is no padding, and the kernel is square. It is initialised as `uniform`
    says.
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
        initializer = uniform(in_channels * kernel_size**2)
        kernel_shape = (kernel_size, kernel_size, in_channels, out_channels)
        self.kernel = nnx.Param(initializer(rngs.params(), kernel_shape, param_dtype))
        self.bias = nnx.Param(initializer(rngs.params(), (out_channels,), param_dtype))
        self.dtype = dtype

    def __call__(
        self, images: Float[Array, "in_channels height width batch"]
    ) -> Float[Array, "out_channels out_height out_width batch"]:
        """Returns the feature maps, [O, (H - k + 1) // 2, (W - k + 1) // 2, B]."""
        kernel, bias = self.kernel[...], self.bias[...]
        dtype = jnp.result_type(images, kernel, bias) if self.dtype is None else self.dtype
        return conv_pool_relu(images.astype(dtype), kernel.astype(dtype), bias.astype(dtype))


class Conv(nnx.Module):
    """A convolution that keeps the size of its images, divided by the stride.

    The kernel is square and of odd size, and images are zero-padded by half of it. The kernel is
    initialised from a normal distribution of variance 2 / fan-in (He et al. 2015, for the ReLU that
    follows), and the bias with 0.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        use_bias: bool = True,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        """Draws kernel [kernel_size, kernel_size, in_channels, out_channels], and makes the bias.

        Args:
            in_channels: channels of the images.
            out_channels: channels of the output.
            kernel_size: height and width of the kernel, pixels, odd.
            stride: distance between the centres of neighbouring outputs, pixels.
            use_bias: whether there is a bias; before batch norm it would have no effect.
            rngs: the keys to draw the parameters with.
            dtype: type to compute in; None for the type that images and parameters promote to.
            param_dtype: type of the parameters.
        """
        shape = (kernel_size, kernel_size, in_channels, out_channels)
        initializer = nnx.initializers.he_normal()
        self.kernel = nnx.Param(initializer(rngs.params(), shape, param_dtype))
        if use_bias:
            self.bias = nnx.Param(jnp.zeros((out_channels,), param_dtype))
        self.use_bias, self.stride, self.dtype = use_bias, stride, dtype

    def __call__(self, images: Features) -> Features:
        """Returns the feature maps, [B, ceil(H / stride), ceil(W / stride), O]."""
        kernel = self.kernel[...]
        dtype = jnp.result_type(images, kernel) if self.dtype is None else self.dtype
        features = conv_same(images.astype(dtype), kernel.astype(dtype), stride=self.stride)
        return (
            features + self.bias[...].astype(dtype)[None, None, None] if self.use_bias else features
        )


class GhostBatchNorm(nnx.Module):
    """Batch norm over ghost batches (Hoffer et al. 2017): the images it is given, or parts of them.

    The running statistics move by a tenth of the difference with every ghost batch, in order, and
    the variance has Bessel's correction: this is the convention of PyTorch, which the paper used.
    Statistics are computed in float32 or wider, and the variance around the mean, so that no digits
    cancel.
    """

    momentum = 0.1

    def __init__(
        self,
        channels: int,
        *,
        ghost_size: int | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        """Makes scale 1, bias 0, and running mean 0 and variance 1, [channels] each.

        Args:
            channels: channels of the images.
            ghost_size: the images in one ghost batch: every so many images, in order, of those that
                the layer is given in training; None for all of them.
            dtype: type of the output; None for the type that images and parameters promote to.
            param_dtype: type of the parameters.
        """
        self.scale = nnx.Param(jnp.ones((channels,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((channels,), param_dtype))
        self.mean = nnx.BatchStat(jnp.zeros((channels,), jnp.float32))
        self.variance = nnx.BatchStat(jnp.ones((channels,), jnp.float32))
        self.ghost_size, self.dtype = ghost_size, dtype

    def __call__(self, images: Features, *, training: bool) -> Features:
        """Normalises every channel.

        Args:
            images: array of shape [B, H, W, C].
            training: whether to normalise with the statistics of these images, and move the
                running ones; otherwise the running ones are used.

        Returns:
            Array of shape [B, H, W, C].

        Raises:
            ValueError: in training, if there is one value per channel, which has no variance, or
                the images cannot be divided into whole ghost batches.
        """
        scale, bias = self.scale[...], self.bias[...]
        dtype = jnp.result_type(images, scale, bias) if self.dtype is None else self.dtype
        values = images.astype(jnp.promote_types(images.dtype, jnp.float32))
        values = values.reshape(-1, images.shape[3])
        ghosts = self._num_ghosts(images.shape[0]) if training else 1
        if not training:
            normal = _scaled(values, self.mean[...], self.variance[...], scale, bias)
        elif ghosts == 1:  # apart, since XLA's loops over two axes are the faster ones on CPU
            normal, mean, variance = _normalised(values, scale, bias)
            self._move(mean[None], variance[None], len(values))
        else:
            groups = values.reshape(ghosts, -1, images.shape[3])
            each = jax.vmap(_normalised, in_axes=(0, None, None))
            normal, mean, variance = each(groups, scale, bias)
            self._move(mean, variance, groups.shape[1])
        return normal.reshape(images.shape).astype(dtype)

    def _num_ghosts(self, num_images: int) -> int:
        if self.ghost_size is None or num_images <= self.ghost_size:
            return 1
        if num_images % self.ghost_size:
            raise ValueError(
                f"images must be divisible into ghost batches of {self.ghost_size}, got "
                f"{num_images} of them."
            )
        return num_images // self.ghost_size

    def _move(
        self,
        means: Float[Array, "ghosts channels"],
        variances: Float[Array, "ghosts channels"],
        count: int,
    ) -> None:
        """Moves the running statistics by each ghost batch of `count` values, in order."""
        if count == 1:
            raise ValueError(
                "a ghost batch must have more than one value per channel, got one image of one "
                "pixel: choose a larger microbatch_size."
            )
        # The share of a ghost batch shrinks with every one that comes after it.
        ghosts = len(means)
        shares = self.momentum * (1 - self.momentum) ** np.arange(ghosts - 1, -1, -1)
        unbiased = variances * (count / (count - 1))
        for running, now in ((self.mean, means), (self.variance, unbiased)):
            weights = jnp.asarray(shares, jnp.float32)[:, None]
            added = (weights * jax.lax.stop_gradient(now)).sum(0)
            moved = (1 - self.momentum) ** ghosts * running[...] + added
            running[...] = moved.astype(jnp.float32)


def _scaled(
    values: Float[Array, "values channels"],
    mean: Float[Array, " channels"],
    variance: Float[Array, " channels"],
    scale: Float[Array, " channels"],
    bias: Float[Array, " channels"],
) -> Float[Array, "values channels"]:
    """The values, less the mean, over the standard deviation, times scale plus bias."""
    factor = scale * jax.lax.rsqrt(variance + EPSILON)
    return (values - mean[None]) * factor[None] + bias[None]


@jax.custom_jvp
def _normalised(
    values: Float[Array, "values channels"],
    scale: Float[Array, " channels"],
    bias: Float[Array, " channels"],
) -> tuple[Float[Array, "values channels"], Float[Array, " channels"], Float[Array, " channels"]]:
    """The values with mean 0 and variance 1, times scale plus bias; their mean and variance."""
    mean = values.mean(0)
    variance = jnp.square(values - mean[None]).mean(0)
    return _scaled(values, mean, variance, scale, bias), mean, variance


@_normalised.defjvp
def _normalised_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    """The derivative with as few sums over values as there can be, two forward and two backward.

    The mean and the variance are functions of the values too: with `c` the values minus the mean, a
    tangent loses its mean and its part along `c`. All tangents of one channel are added up before
    they meet the values, so that the transpose has the sums of the gradient and of its product with
    `c`, from which the gradients of scale and bias are made too. Automatic differentiation of
    `_normalised` has more, and a ResNet-18 takes 5 % longer on CPU.
    """
    values, scale, _ = primals
    tangent, of_scale, of_bias = tangents
    out, mean, variance = _normalised(*primals)
    inverse = jax.lax.rsqrt(variance + EPSILON)
    centred, scaled = values - mean[None], (scale * inverse)[None] * tangent
    along = (centred * scaled).mean(0) * inverse**2
    moved = scaled + (of_bias - scaled.mean(0))[None]
    moved = moved + centred * (of_scale * inverse - along)[None]
    of_statistics = tangent.mean(0), 2 * (centred * tangent).mean(0)
    return (out, mean, variance), (moved, *of_statistics)


def batch_last(
    images: Float[Array, "batch height width channels"],
) -> Float[Array, "channels height width batch"]:
    """The images in the layout of `conv`, CHWN."""
    return images.transpose(3, 1, 2, 0)


def flat(
    features: Float[Array, "channels height width batch"],
) -> Float[Array, "batch height*width*channels"]:
    """One vector per image: pixels in row-major order, with the channels of a pixel together."""
    return features.transpose(1, 2, 0, 3).reshape(-1, features.shape[3]).T


def linear(in_features: int, out_features: int, **kwargs: Any) -> nnx.Linear:
    """A fully connected layer, initialised as `uniform` says."""
    initializer = uniform(in_features)
    return nnx.Linear(
        in_features, out_features, kernel_init=initializer, bias_init=initializer, **kwargs
    )


def uniform(fan_in: int) -> nnx.Initializer:
    """Draws uniformly from [-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    bound = fan_in**-0.5

    def initializer(key: Any, shape: Any, dtype: Any = jnp.float32, _: Any = None) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return initializer


def check_images(images: Array, image_shape: tuple[int, int, int]) -> None:
    """Raises ValueError unless the images are floating point and of this shape."""
    if images.ndim != 4 or images.shape[1:] != image_shape:
        allowed = ", ".join(map(str, image_shape))
        raise ValueError(f"images must have shape [B, {allowed}], got shape {images.shape}.")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"images must be floating point, scaled to [0, 1], got type {images.dtype}."
        )
