"""ResNet-18 with ghost batch norm."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from experiments._typing import Images, ImageShape, Logits
from experiments.models.layers import (
    Conv,
    Cost,
    GhostBatchNorm,
    Net,
    check_images,
    linear,
)


class ResidualBlock(nnx.Module):
    """Two 3x3 convolutions with batch norm around a shortcut (He et al. 2016)."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, **kwargs: Any):
        """Draws the parameters; the shortcut is a 1x1 convolution where sizes differ."""
        norm = {k: v for k, v in kwargs.items() if k != "rngs"}
        conv = {"use_bias": False, **{k: v for k, v in kwargs.items() if k != "ghost_size"}}
        self.conv1 = Conv(in_channels, out_channels, 3, stride=stride, **conv)
        self.norm1 = GhostBatchNorm(out_channels, **norm)
        self.conv2 = Conv(out_channels, out_channels, 3, **conv)
        self.norm2 = GhostBatchNorm(out_channels, **norm)
        self.projects = stride != 1 or in_channels != out_channels
        if self.projects:
            self.shortcut = Conv(in_channels, out_channels, 1, stride=stride, **conv)
            self.shortcut_norm = GhostBatchNorm(out_channels, **norm)

    def __call__(self, images: Float[Array, "..."], *, training: bool) -> Float[Array, "..."]:
        """Returns the feature maps, [B, H / stride, W / stride, O]."""
        hidden = nnx.relu(self.norm1(self.conv1(images), training=training))
        hidden = self.norm2(self.conv2(hidden), training=training)
        if self.projects:
            images = self.shortcut_norm(self.shortcut(images), training=training)
        return nnx.relu(hidden + images)


class ResNet18(Net):
    """ResNet-18 with ghost batch norm for 32x32 colour images (B.3), with 11,173,962 parameters.

    He et al. 2016, with the stem that is usual for images of this size: 3x3, stride 1, no pooling;
    four stages of two blocks with 64, 128, 256, 512 channels, the mean over pixels, one fully
    connected layer. It is initialised as `Conv` says, and the last layer as in `LeNet`.
    """

    image_shape = (32, 32, 3)
    num_classes = 10
    full_width = 64
    has_batch_norm = True
    one_seed_at_a_time = True
    cost = Cost(8, 1.5e-3, 5e-4, 60)

    def __init__(
        self,
        *,
        rngs: nnx.Rngs,
        image_shape: ImageShape = (32, 32, 3),
        num_classes: int = 10,
        width: int = 64,
        ghost_size: int | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        """Draws the parameters.

        Args:
            rngs: the keys to draw the parameters with.
            image_shape: height and width (pixels) and channels of the images.
            num_classes: number of logits.
            width: channels of the first stage; those of the others are in proportion.
            ghost_size: the images in one ghost batch, if the net is given several of them at once
                in training; None for all the images that it is given.
            dtype: type to compute in, and of the logits; None for the type that images and
                parameters promote to.
            param_dtype: type of the parameters.
        """
        self.image_shape, self.num_classes = image_shape, num_classes
        kwargs = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.conv = Conv(image_shape[2], width, 3, use_bias=False, **kwargs)
        norm = {"ghost_size": ghost_size, "dtype": dtype, "param_dtype": param_dtype}
        self.norm = GhostBatchNorm(width, **norm)
        block = {"ghost_size": ghost_size, **kwargs}
        self.block1 = ResidualBlock(width, width, stride=1, **block)
        self.block2 = ResidualBlock(width, width, stride=1, **block)
        self.block3 = ResidualBlock(width, 2 * width, stride=2, **block)
        self.block4 = ResidualBlock(2 * width, 2 * width, stride=1, **block)
        self.block5 = ResidualBlock(2 * width, 4 * width, stride=2, **block)
        self.block6 = ResidualBlock(4 * width, 4 * width, stride=1, **block)
        self.block7 = ResidualBlock(4 * width, 8 * width, stride=2, **block)
        self.block8 = ResidualBlock(8 * width, 8 * width, stride=1, **block)
        self.fc = linear(8 * width, self.num_classes, **kwargs)

    def __call__(self, images: Images, *, training: bool = False) -> Logits:
        """Returns the logits.

        Args:
            images: floating-point array of shape [B, H, W, C], pixels in [0, 1].
            training: whether batch norm takes the statistics of these images, by ghost batches, and
                moves its running statistics.

        Returns:
            Array of shape [B, num_classes].

        Raises:
            ValueError: if the images have another shape or are not floating point.
        """
        check_images(images, self.image_shape)
        hidden = nnx.relu(self.norm(self.conv(images), training=training))
        for block in (
            self.block1,
            self.block2,
            self.block3,
            self.block4,
            self.block5,
            self.block6,
            self.block7,
            self.block8,
        ):
            hidden = block(hidden, training=training)
        return self.fc(hidden.mean((1, 2)))
