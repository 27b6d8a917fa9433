"""LeNet, the small net of the paper, and a smaller one for scikit-learn's digits."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from experiments._typing import Images, ImageShape, Logits
from experiments.models.layers import (
    ConvPoolReLU,
    Cost,
    Net,
    batch_last,
    check_images,
    flat,
    linear,
)


class LeNet(Net):
    """The network of the paper's appendix B.1, with 11,330 parameters.

    28x28x1 => conv1 => max_pool => ReLU => conv2 => max_pool => ReLU => fc1 => ReLU => fc2:
    kernels 5x5, 10 channels, no padding, pooling 2x2, 50 hidden units, 10 classes.

    The paper does not say how parameters are initialised. Our assumption is the default of the
    PyTorch 1.0.0 that it used: kernels and biases independent and uniform on
    [-1/sqrt(fan_in), 1/sqrt(fan_in)), where fan_in is the number of inputs of one output unit.
    """

    image_shape = (28, 28, 1)
    num_classes = 10
    smallest_side = 16
    cost = Cost(None, 35e-6, 15e-6, 12)

    def __init__(
        self,
        *,
        rngs: nnx.Rngs,
        image_shape: ImageShape = (28, 28, 1),
        num_classes: int = 10,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        """Draws the parameters.

        Args:
            rngs: the keys to draw the parameters with.
            image_shape: height and width (pixels) and channels of the images.
            num_classes: number of logits.
            dtype: type to compute in, and of the logits; None for the type that images and
                parameters promote to.
            param_dtype: type of the parameters.
        """
        self.image_shape, self.num_classes = image_shape, num_classes
        kwargs = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        height, width = (((side - 4) // 2 - 4) // 2 for side in image_shape[:2])  # 4 of 28
        self.conv1 = ConvPoolReLU(image_shape[2], 10, 5, **kwargs)
        self.conv2 = ConvPoolReLU(10, 10, 5, **kwargs)
        self.fc1 = linear(height * width * 10, 50, **kwargs)
        self.fc2 = linear(50, self.num_classes, **kwargs)

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
        hidden = self.conv1(batch_last(images))
        hidden = self.conv2(hidden)
        hidden = nnx.relu(self.fc1(flat(hidden)))
        return self.fc2(hidden)


class DigitsNet(Net):
    """A small network for scikit-learn's digits, with 5,130 parameters.

    8x8x1 => conv1 => max_pool => ReLU => fc1 => ReLU => fc2: kernel 3x3, 16 channels, no padding,
    pooling 2x2, 32 hidden units, 10 classes. It is initialised as `LeNet`.
    """

    image_shape = (8, 8, 1)
    num_classes = 10
    smallest_side = 4
    cost = Cost(None, 4e-6, 2e-6, 8)

    def __init__(
        self,
        *,
        rngs: nnx.Rngs,
        image_shape: ImageShape = (8, 8, 1),
        num_classes: int = 10,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        """Draws the parameters.

        Args:
            rngs: the keys to draw the parameters with.
            image_shape: height and width (pixels) and channels of the images.
            num_classes: number of logits.
            dtype: type to compute in, and of the logits; None for the type that images and
                parameters promote to.
            param_dtype: type of the parameters.
        """
        self.image_shape, self.num_classes = image_shape, num_classes
        kwargs = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        height, width = ((side - 2) // 2 for side in image_shape[:2])  # 3 of 8
        self.conv1 = ConvPoolReLU(image_shape[2], 16, 3, **kwargs)
        self.fc1 = linear(height * width * 16, 32, **kwargs)
        self.fc2 = linear(32, self.num_classes, **kwargs)

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
        hidden = self.conv1(batch_last(images))
        hidden = nnx.relu(self.fc1(flat(hidden)))
        return self.fc2(hidden)
