"""The networks of the experiments: flax NNX modules, and the pure functions made from them.

A module maps images [B, H, W, C], floating point in [0, 1], to logits [B, num_classes]. The
library trains functions, not modules: `functional` makes them from a module class.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from experiments.layers import ConvMaxPool, batch_last, check_images, flat, linear
from experiments.resnet import ResNet18
from experiments.vgg import VGG11

__all__ = [
    "MODELS",
    "VGG11",
    "DigitsNet",
    "LeNet",
    "Model",
    "ResNet18",
    "functional",
    "num_parameters",
]

Params = dict[str, Any]
Stats = dict[str, Any]


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
        self.fc1 = linear(4 * 4 * 10, 50, **kwargs)
        self.fc2 = linear(50, self.num_classes, **kwargs)

    def __call__(self, images: Float[Array, "batch 28 28 1"]) -> Float[Array, "batch num_classes"]:
        """Returns the logits.

        Args:
            images: floating-point array of shape [B, 28, 28, 1], pixels in [0, 1].

        Returns:
            Array of shape [B, 10].

        Raises:
            ValueError: if the images have another shape or are not floating point.
        """
        check_images(images, self.image_shape)
        hidden = nnx.relu(self.conv1(batch_last(images)))
        hidden = nnx.relu(self.conv2(hidden))
        hidden = nnx.relu(self.fc1(flat(hidden)))
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
        self.fc1 = linear(3 * 3 * 16, 32, **kwargs)
        self.fc2 = linear(32, self.num_classes, **kwargs)

    def __call__(self, images: Float[Array, "batch 8 8 1"]) -> Float[Array, "batch num_classes"]:
        """Returns the logits.

        Args:
            images: floating-point array of shape [B, 8, 8, 1], pixels in [0, 1].

        Returns:
            Array of shape [B, 10].

        Raises:
            ValueError: if the images have another shape or are not floating point.
        """
        check_images(images, self.image_shape)
        hidden = nnx.relu(self.conv1(batch_last(images)))
        hidden = nnx.relu(self.fc1(flat(hidden)))
        return self.fc2(hidden)


MODELS: Mapping[str, Callable[..., nnx.Module]] = {
    "lenet": LeNet,
    "digits_net": DigitsNet,
    "vgg11": VGG11,
    "resnet18": ResNet18,
}
"""The networks by name."""


class Model(NamedTuple):
    """A network as pure functions, for `jax.jit`, `jax.grad` and `jax.vmap`.

    Attributes:
        init: maps a PRNG key to parameters: a nested dict of arrays. The same key gives the same
            parameters; `jax.vmap(init)(keys)` stacks those of several keys.
        init_stats: makes the initial running statistics of batch norm: a nested dict of arrays,
            the same for every key; {} for a network without any.
        apply: ``apply(params, stats, images, *, training=False) -> (logits, stats)`` maps images
            [B, H, W, C] to logits [B, num_classes]. In training, batch norm normalises with the
            statistics of these images, which are one ghost batch, and moves the running ones;
            otherwise it uses the running ones and leaves them. Raises ValueError if parameters or
            statistics do not have the names and shapes of the initial ones.
    """

    init: Callable[[Key[Array, ""]], Params]
    init_stats: Callable[[], Stats]
    apply: Callable[..., tuple[Float[Array, "batch num_classes"], Stats]]


def functional(module_class: Callable[..., nnx.Module], **kwargs: Any) -> Model:
    """Turns a module class into pure functions.

    Args:
        module_class: makes a module from ``rngs=nnx.Rngs(key)`` and `kwargs`; the module's state
            must be `nnx.Param` and `nnx.BatchStat` (no dropout), and calling it with images, and
            with ``training=`` if it has `nnx.BatchStat`, gives logits.
        **kwargs: passed to `module_class`.

    Returns:
        A `Model`.

    Raises:
        ValueError: if the module has other state.
    """

    def build(key: Any) -> nnx.Module:
        return module_class(rngs=nnx.Rngs(key), **kwargs)

    abstract = nnx.eval_shape(lambda: build(0))
    graphdef, *templates, other = nnx.split(abstract, nnx.Param, nnx.BatchStat, ...)
    if jax.tree.leaves(other):
        names = sorted(nnx.to_pure_dict(other))
        raise ValueError(
            "all state of the module must be nnx.Param or nnx.BatchStat, got other state in "
            f"{names}."
        )
    shapes = [jax.tree.map(jnp.shape, nnx.to_pure_dict(template)) for template in templates]

    def init(key: Key[Array, ""]) -> Params:
        return nnx.to_pure_dict(nnx.state(build(key), nnx.Param))

    @jax.jit  # which leaves out the parameters that are drawn along with them
    def constants() -> Stats:
        return nnx.to_pure_dict(nnx.state(build(0), nnx.BatchStat))

    def init_stats() -> Stats:
        return dict(constants()) if shapes[1] else {}

    def apply(
        params: Params,
        stats: Stats,
        images: Float[Array, "batch height width channels"],
        *,
        training: bool = False,
    ) -> tuple[Float[Array, "batch num_classes"], Stats]:
        states = [
            _filled(name, template, wanted, values)
            for name, template, wanted, values in zip(
                ("params", "stats"), templates, shapes, (params, stats), strict=True
            )
        ]
        module = nnx.merge(graphdef, *states)
        if not shapes[1]:
            return module(images), {}
        logits = module(images, training=training)
        return logits, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))

    return Model(init, init_stats, apply)


def _filled(name: str, template: Any, wanted: Any, values: Any) -> Any:
    """The state of a module with these values in it."""
    got = jax.tree.map(jnp.shape, values)
    if got != wanted:
        raise ValueError(f"{name} must have the names and shapes {wanted}, got {got}.")
    state = jax.tree.map(lambda leaf: leaf, template)  # a copy, for what follows fills it in
    nnx.replace_by_pure_dict(state, values)
    return state


def num_parameters(params: Any) -> int:
    """The number of scalars in a pytree of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
