"""The room of nets: flax NNX modules, and the pure functions made from them.

A module maps images [B, H, W, C], floating point in [0, 1], to logits [B, num_classes]. The
library trains functions, not modules: `functional` makes them from a module class. `MODELS` has the
nets by name: a new one is a file here and a line there.
"""

from collections.abc import Mapping

from experiments.models._functional import Model, functional, num_parameters
from experiments.models.layers import Net
from experiments.models.lenet import DigitsNet, LeNet
from experiments.models.resnet import ResNet18
from experiments.models.vgg import VGG11

__all__ = [
    "MODELS",
    "VGG11",
    "DigitsNet",
    "LeNet",
    "Model",
    "Net",
    "ResNet18",
    "fitting",
    "functional",
    "num_parameters",
]

MODELS: Mapping[str, type[Net]] = {
    "lenet": LeNet,
    "digits_net": DigitsNet,
    "vgg11": VGG11,
    "resnet18": ResNet18,
}
"""The nets by name."""


def fitting(image_shape: tuple[int, int, int]) -> list[str]:
    """The names of the nets that take images of this shape: height, width and channels."""
    side = min(image_shape[:2])
    return [name for name, net in MODELS.items() if net.smallest_side <= side]
