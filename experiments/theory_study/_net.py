"""A small convolutional net with a choice of activation and pooling, and its images.

14x14x1 => convolution 5x5, 10 channels => pooling 2x2 => activation => 32 units => activation => 10
classes, with 8,622 parameters. With tanh and average pooling the losses are smooth, as Theorem 3
assumes; with ReLU and max-pooling they are not. All four nets have the same parameters.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key

from experiments import data
from experiments._typing import Batch, Params
from msgd_jax import loss
from msgd_jax._streams import Stream, derive

NetName = Literal["relu-max", "tanh-average", "relu-average", "tanh-max"]
POOL = 10_000
"""The number of images from which each seed draws, FashionMNIST's original test images."""
NUM_CLASSES, _CHANNELS, _KERNEL, _HIDDEN = 10, 10, 5, 32
# Pixels per side: of the images, of the convolution's output, and after pooling.
_SIDE, _CONVOLVED, _POOLED = 14, 10, 5


def losses_of(name: NetName) -> loss.LossVectorFn:
    """The cross-entropies (nats) of a net: a function of parameters and examples."""
    activation, pooling = name.split("-")
    bend: Callable[[Array], Array] = {"relu": jax.nn.relu, "tanh": jnp.tanh}[activation]
    pooled: Callable[..., Array] = {"max": jnp.max, "average": jnp.mean}[pooling]

    def losses(params: Params, batch: Batch) -> Float[Array, " batch"]:
        patches = batch["x"]
        size = patches.shape[0]
        # The convolution as one product, since all patches of the images are in the data.
        features = patches.reshape(-1, _KERNEL**2) @ params["kernel"]
        windows = features.reshape(size, _POOLED, 2, _POOLED, 2, _CHANNELS)
        hidden = pooled(windows, axis=(2, 4)) + params["b0"][None, None, None]
        hidden = bend(hidden).reshape(size, -1)
        hidden = bend(hidden @ params["w1"] + params["b1"][None])
        logits = hidden @ params["w2"] + params["b2"][None]
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])

    return losses


def initial(key: Key[Array, ""]) -> Params:
    """Uniform on [-1/sqrt(fan_in), 1/sqrt(fan_in)), as PyTorch initialises; biases are 0."""
    shapes = {
        "kernel": (_KERNEL**2, _CHANNELS),
        "w1": (_POOLED**2 * _CHANNELS, _HIDDEN),
        "w2": (_HIDDEN, NUM_CLASSES),
    }
    params: Params = {}
    for place, (name, shape) in enumerate(shapes.items()):
        own = derive(key, Stream.PARAMETERS, place)
        uniform = jax.random.uniform(own, shape, jnp.float32, -1.0, 1.0)
        params[name] = uniform / shape[0] ** 0.5
    sizes = {"b0": _CHANNELS, "b1": _HIDDEN, "b2": NUM_CLASSES}
    return params | {name: jnp.zeros(size, jnp.float32) for name, size in sizes.items()}


def images(
    seeds: Iterable[int], num_examples: int, data_dir: Any = None
) -> list[dict[str, Float[Array, "..."]]]:
    """The training examples of each seed, drawn anew: "x", all patches of the images, and "y".

    Pixels are averaged over squares of 2 x 2; over the images of a seed, their mean is 0 and their
    variance 1.
    """
    whole = data.load("fashion_mnist", data_dir=data_dir, whole=True)
    found = []
    for seed in seeds:
        drawn = data.subset(whole, num_examples, 1, seed=seed).train
        pixels = drawn.image.reshape(num_examples, _SIDE, 2, _SIDE, 2).mean((2, 4))
        pixels = (pixels - pixels.mean()) / pixels.std()
        found.append(
            {
                "x": jnp.asarray(_patches(pixels), jnp.float32),
                "y": jnp.asarray(drawn.label, jnp.int32),
            }
        )
    return found


def _patches(pixels: Float[np.ndarray, "N height width"]) -> Float[np.ndarray, "N places pixels"]:
    """The pixels under the kernel at each of its places."""
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (_KERNEL, _KERNEL), axis=(1, 2))
    return windows.reshape(len(pixels), _CONVOLVED**2, _KERNEL**2)
