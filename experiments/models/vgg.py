"""VGG-11 without batch norm."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from experiments._typing import Images, ImageShape, Logits
from experiments.models.conv import max_pool
from experiments.models.layers import Conv, Cost, Net, check_images, linear


class VGG11(Net):
    """VGG-11 without batch norm for 32x32 colour images (B.2, B.3), with 9,225,610 parameters.

    Simonyan and Zisserman 2015, configuration A, with one fully connected layer as usual for images
    of this size: eight 3x3 convolutions with 64, 128, 256, 256, 512, 512, 512, 512 channels, each
    with ReLU, max-pooling after the first, second, fourth, sixth and eighth.

    The paper does not say how parameters are initialised. Ours are initialised as `Conv` says:
    under PyTorch's default, which `LeNet` has, the outputs of eight layers hardly depend on the
    images.
    """

    image_shape = (32, 32, 3)
    num_classes = 10
    smallest_side = 32
    full_width = 64
    one_seed_at_a_time = True
    cost = Cost(8, 1.5e-4, 6e-5, 20)

    def __init__(
        self,
        *,
        rngs: nnx.Rngs,
        image_shape: ImageShape = (32, 32, 3),
        num_classes: int = 10,
        width: int = 64,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        """Draws the parameters.

        Args:
            rngs: the keys to draw the parameters with.
            image_shape: height and width (pixels) and channels of the images.
            num_classes: number of logits.
            width: channels of the first convolution; those of the others are in proportion.
            dtype: type to compute in, and of the logits; None for the type that images and
                parameters promote to.
            param_dtype: type of the parameters.
        """
        self.image_shape, self.num_classes = image_shape, num_classes
        kwargs = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        height, breadth = (side // 32 for side in image_shape[:2])  # 1 of 32
        self.conv1 = Conv(image_shape[2], width, 3, **kwargs)
        self.conv2 = Conv(width, 2 * width, 3, **kwargs)
        self.conv3 = Conv(2 * width, 4 * width, 3, **kwargs)
        self.conv4 = Conv(4 * width, 4 * width, 3, **kwargs)
        self.conv5 = Conv(4 * width, 8 * width, 3, **kwargs)
        self.conv6 = Conv(8 * width, 8 * width, 3, **kwargs)
        self.conv7 = Conv(8 * width, 8 * width, 3, **kwargs)
        self.conv8 = Conv(8 * width, 8 * width, 3, **kwargs)
        self.fc = linear(height * breadth * 8 * width, self.num_classes, **kwargs)

    def __call__(self, images: Images) -> Logits:
        """Returns the logits.

        Args:
            images: floating-point array of shape [B, H, W, C], pixels in [0, 1].

        Returns:
            Array of shape [B, num_classes].

        Raises:
            ValueError: if the images have another shape or are not floating point.
        """
        check_images(images, self.image_shape)
        hidden = images
        stages = (
            (self.conv1,),
            (self.conv2,),
            (self.conv3, self.conv4),
            (self.conv5, self.conv6),
            (self.conv7, self.conv8),
        )
        for stage in stages:
            for conv in stage:
                hidden = nnx.relu(conv(hidden))
            hidden = max_pool(hidden)
        return self.fc(hidden.reshape(len(images), -1))
