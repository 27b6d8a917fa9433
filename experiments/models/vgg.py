"""VGG-11 without batch norm."""

from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from experiments.models.conv import max_pool
from experiments.models.layers import Conv, batch_last, check_images, flat, linear


class VGG11(nnx.Module):
    """VGG-11 without batch norm for 32x32 colour images (B.2, B.3), with 9,225,610 parameters.

    Simonyan and Zisserman 2015, configuration A, with one fully connected layer as usual for images
    of this size: eight 3x3 convolutions with 64, 128, 256, 256, 512, 512, 512, 512 channels, each
    with ReLU, max-pooling after the first, second, fourth, sixth and eighth.

    The paper does not say how parameters are initialised. Ours are those of `Conv`: under PyTorch's
    default, as in `LeNet`, images are forgotten on the way through eight layers.

    Attributes:
        image_shape: height and width (pixels) and channels of the images.
        num_classes: number of logits.
    """

    image_shape: ClassVar[tuple[int, int, int]] = (32, 32, 3)
    num_classes: ClassVar[int] = 10

    def __init__(
        self,
        *,
        rngs: nnx.Rngs,
        width: int = 64,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        """Draws the parameters.

        Args:
            rngs: the keys to draw the parameters with.
            width: channels of the first convolution, the others in proportion.
            dtype: type to compute in, and of the logits; None for the type that images and
                parameters promote to.
            param_dtype: type of the parameters.
        """
        kwargs = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.conv1 = Conv(3, width, 3, **kwargs)
        self.conv2 = Conv(width, 2 * width, 3, **kwargs)
        self.conv3 = Conv(2 * width, 4 * width, 3, **kwargs)
        self.conv4 = Conv(4 * width, 4 * width, 3, **kwargs)
        self.conv5 = Conv(4 * width, 8 * width, 3, **kwargs)
        self.conv6 = Conv(8 * width, 8 * width, 3, **kwargs)
        self.conv7 = Conv(8 * width, 8 * width, 3, **kwargs)
        self.conv8 = Conv(8 * width, 8 * width, 3, **kwargs)
        self.fc = linear(8 * width, self.num_classes, **kwargs)

    def __call__(self, images: Float[Array, "batch 32 32 3"]) -> Float[Array, "batch num_classes"]:
        """Returns the logits.

        Args:
            images: floating-point array of shape [B, 32, 32, 3], pixels in [0, 1].

        Returns:
            Array of shape [B, 10].

        Raises:
            ValueError: if the images have another shape or are not floating point.
        """
        check_images(images, self.image_shape)
        hidden = batch_last(images)
        stages = (
            (self.conv1,), (self.conv2,), (self.conv3, self.conv4), (self.conv5, self.conv6),
            (self.conv7, self.conv8),
        )  # fmt: skip
        for stage in stages:
            for conv in stage:
                hidden = nnx.relu(conv(hidden))
            hidden = max_pool(hidden)
        return self.fc(flat(hidden))
