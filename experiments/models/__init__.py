"""The room of nets: flax NNX modules, and the pure functions made from them.

A module maps images [B, H, W, C], floating point in [0, 1], to logits [B, num_classes]. The
library trains functions, not modules: `functional` makes them from a module class. `MODELS` has the
nets by name.
"""

from collections.abc import Callable, Mapping

from flax import nnx

from experiments.models._functional import Model, functional, num_parameters
from experiments.models.lenet import DigitsNet, LeNet
from experiments.models.resnet import ResNet18
from experiments.models.vgg import VGG11

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

MODELS: Mapping[str, Callable[..., nnx.Module]] = {
    "lenet": LeNet,
    "digits_net": DigitsNet,
    "vgg11": VGG11,
    "resnet18": ResNet18,
}
"""The nets by name."""
