"""The panels of the paper's Figures 1, 2 and 3, and three of ours, with all their numbers.

Each has four scales: the paper's own, one for a single graphics card, and two that two cores can
compute. "large" and "medium" are meant to show what the panel shows, in a few minutes on a card or
in up to three hours on two cores; "small" shows that the panel can be made.

A comment names the section of the paper that a number is from. Numbers that the paper does not give
are our choice; they are listed in `assumptions`, which the pages of the figures print.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from experiments.paper import _scales
from experiments.training.algorithms import NoiseSettings
from experiments.training.config import AlgorithmName, TrainConfig

Scale = Literal["paper", "large", "medium", "small"]


@dataclasses.dataclass(frozen=True)
class Panel:
    """The runs that are drawn in one figure.

    Attributes:
        title: the title of the figure.
        runs: the training runs, in the order of the legend; the others are compared with the first
            one whose algorithm is "sgd".
        large: the changes that `--scale large` makes to each run.
        medium: the changes that `--scale medium` makes to each run.
        small: the changes that `--scale small` makes to each run.
        assumptions: our choices where the paper does not give a number.
    """

    title: str
    runs: tuple[TrainConfig, ...]
    large: _scales.Reduction
    medium: _scales.Reduction
    small: _scales.Reduction
    assumptions: tuple[str, ...]

    def at_scale(self, scale: Scale) -> tuple[TrainConfig, ...]:
        """The runs in full, or reduced so that one card, or two cores, can make them."""
        reduction = self._reduction(scale)
        runs = [_scales.reduced(run, reduction.changes) for run in self.runs]
        if reduction.noise_floor:
            (sgd,) = (run for run in runs if run.algorithm == "sgd")
            runs.append(dataclasses.replace(sgd, noise_draw=1))
        return tuple(runs)

    def constant_until(self, scale: Scale) -> int | None:
        """The step until which the rate is the paper's, if runs are compared there as well."""
        if not self._reduction(scale).constant_first:
            return None
        return self.at_scale(scale)[0].decay_at[0]

    def choices(self, scale: Scale) -> tuple[str, ...]:
        """What is our choice at a scale."""
        return self.assumptions + self._reduction(scale).why

    def _reduction(self, scale: Scale) -> _scales.Reduction:
        scales = {"large": self.large, "medium": self.medium, "small": self.small}
        return scales.get(scale, _scales.AS_PUBLISHED)


def _each(base: TrainConfig, *algorithms: AlgorithmName, **changes: Any) -> tuple[TrainConfig, ...]:
    return tuple(dataclasses.replace(base, algorithm=name, **changes) for name in algorithms)


def _regularisation(base: TrainConfig) -> tuple[TrainConfig, ...]:
    """The algorithms of panels (a) and (d), and a baseline that is often used for comparison."""
    return _each(
        base,
        "gd",
        "sgd",
        "m-sgd-fisher",
        "m-sgd-cov",
        "m-sgd-bernoulli",
        "gd-rademacher",
        "langevin-diagonal-fisher",
    )


def _estimation(base: TrainConfig) -> tuple[TrainConfig, ...]:
    """The algorithms of panels (b) and (e)."""
    return _each(
        base, "sgd", "m-sgd-fisher", "m-sgd-cov", "m-sgd-estimated-fisher", "m-sgd-estimated-cov"
    )


def _large_batch(base: TrainConfig, *sizes: int) -> tuple[TrainConfig, ...]:
    """SGD with b and with larger batches, and sparse laws with the noise of b in these batches."""
    runs = list(_each(base, "sgd"))
    for size in sizes:
        noise = dataclasses.replace(base.noise, support_size=size)
        runs += _each(base, "sgd-b", noise=noise)
        runs += _each(base, "sgd-b", noise=noise, learning_rate_scaling="sqrt")
        runs += _each(base, "m-sgd-sparse-fisher", "m-sgd-sparse-cov", noise=noise)
    return tuple(runs)


_LENET = TrainConfig(
    dataset="fashion_mnist",  # B.1: 1,000 original test images to train, 60,000 to test
    model="lenet",  # B.1
    learning_rate=0.01,  # B.1
    noise=NoiseSettings(batch_size=50),  # B.1
    steps=10_000,  # ours
    seeds=5,  # ours
)
_LENET_CONVERGED = dataclasses.replace(  # ours
    _LENET, learning_rate=0.1, steps=3_000, eval_every=150
)

_SVHN = TrainConfig(
    dataset="svhn",  # B.2: 25,000 original test images to train, 73,257 to test
    model="vgg11",  # B.2, without batch norm
    learning_rate=0.05,  # B.2
    noise=NoiseSettings(batch_size=100, estimate_size=100),  # B.2
    steps=20_000,  # ours
    eval_every=500,
    seeds=3,  # ours
)
_CIFAR_VGG = TrainConfig(
    dataset="cifar10",  # B.3: standard
    model="vgg11",  # B.3, without batch norm
    learning_rate=0.01,  # B.3
    momentum=0.9,  # B.3
    decay_at=(40_000, 60_000),  # B.3
    decay_factor=0.1,  # B.3
    noise=NoiseSettings(batch_size=100, estimate_size=100),  # B.3
    steps=80_000,  # ours
    eval_every=1_000,
    seeds=3,  # ours
)
_CIFAR_RESNET = dataclasses.replace(
    _CIFAR_VGG,
    model="resnet18",  # B.3, with ghost batch norm
    learning_rate=0.1,  # B.3
)
_CIFAR_RESNET_BEST = dataclasses.replace(
    _CIFAR_RESNET,
    augment=True,  # B.3
    weight_decay=5e-4,  # B.3
)

_ALL = (
    "number of iterations and of seeds",
    "the scale of GD-Rademacher: the variances of M-SGD-Fisher (tuned in the paper, to what is not "
    "said)",
    "[Fisher-b] and [Cov-b] estimate from as many examples as the b of SGD",
)
_INITIAL_LENET = "initial weights: PyTorch 1.0's default, uniform on ±1/sqrt(fan-in)"
_INITIAL_VGG = "initial weights: normal with variance 2/fan-in (He et al. 2015), biases 0"
_GHOST = "ghost batches of 100 if no other size is named; running statistics with momentum 0.1"
_LARGE = (
    "which of the paper's 2,000 and 5,000 the large batch is",
    "the learning rate of SGD-b: as for b, and scaled with the root of the batch size (Hoffer et "
    "al. 2017); regime adaptation keeps the number of iterations",
)
_AUGMENTED = "augmentation: zero-padding by 4, random crops, horizontal flips"
_CONVERGED = (
    "learning rate 0.1 instead of 0.01, with which the training loss is still 0.1, and falling, "
    "after 10,000 iterations"
)

PANELS: Mapping[str, Panel] = {
    "1a": Panel(
        "FashionMNIST, LeNet: which noises regularise as SGD's",
        _regularisation(_LENET),
        _scales.LENET_LARGE,
        _scales.LENET_MEDIUM,
        _scales.LENET_SMALL,
        (*_ALL, _INITIAL_LENET),
    ),
    "1b": Panel(
        "FashionMNIST, LeNet: covariances estimated from b examples",
        _estimation(_LENET),
        _scales.LENET_LARGE,
        _scales.LENET_MEDIUM,
        _scales.LENET_SMALL,
        (*_ALL, _INITIAL_LENET),
    ),
    "1c": Panel(
        "CIFAR-10, ResNet-18, augmentation and weight decay: large batches",
        _large_batch(_CIFAR_RESNET_BEST, 5_000),
        _scales.CIFAR_RESNET_LARGE,
        _scales.CIFAR_RESNET_MEDIUM,
        _scales.COLOUR_SMALL,
        (*_ALL, *_LARGE, _GHOST, _AUGMENTED),
    ),
    "1d": Panel(
        "SVHN, VGG-11: which noises regularise as SGD's",
        (*_regularisation(_SVHN), *_each(_SVHN, "gd-isotropic")),
        _scales.SVHN_LARGE,
        _scales.SVHN_MEDIUM,
        _scales.COLOUR_SMALL,
        (*_ALL, _INITIAL_VGG),
    ),
    "1e": Panel(
        "SVHN, VGG-11: covariances estimated from b examples",
        _estimation(_SVHN),
        _scales.SVHN_LARGE,
        _scales.SVHN_MEDIUM,
        _scales.COLOUR_SMALL,
        (*_ALL, _INITIAL_VGG),
    ),
    "1f": Panel(
        "SVHN, VGG-11: large batches",
        _large_batch(_SVHN, 2_000),
        _scales.SVHN_LARGE,
        _scales.SVHN_MEDIUM,
        _scales.COLOUR_SMALL,
        (*_ALL, *_LARGE, _INITIAL_VGG),
    ),
    "2a": Panel(
        "CIFAR-10, VGG-11: which noises regularise as SGD's",
        (*_regularisation(_CIFAR_VGG), *_each(_CIFAR_VGG, "gd-isotropic")),
        _scales.CIFAR_VGG_LARGE,
        _scales.CIFAR_VGG_MEDIUM,
        _scales.COLOUR_SMALL,
        (*_ALL, _INITIAL_VGG),
    ),
    "2b": Panel(
        "CIFAR-10, VGG-11: large batches",
        _large_batch(_CIFAR_VGG, 2_000),
        _scales.CIFAR_VGG_LARGE,
        _scales.CIFAR_VGG_MEDIUM,
        _scales.COLOUR_SMALL,
        (*_ALL, *_LARGE, _INITIAL_VGG),
    ),
    "3a": Panel(
        "CIFAR-10, ResNet-18: which noises regularise as SGD's",
        tuple(
            run
            for run in _regularisation(_CIFAR_RESNET)
            if run.algorithm != "langevin-diagonal-fisher"
        ),
        _scales.CIFAR_RESNET_LARGE,
        _scales.CIFAR_RESNET_MEDIUM,
        _scales.COLOUR_SMALL,
        (*_ALL, _GHOST, "no additive noise: batch norm has no losses of single examples"),
    ),
    "3b": Panel(
        "CIFAR-10, ResNet-18: large batches",
        _large_batch(_CIFAR_RESNET, 2_000),
        _scales.CIFAR_RESNET_LARGE,
        _scales.CIFAR_RESNET_MEDIUM,
        _scales.COLOUR_SMALL,
        (*_ALL, *_LARGE, _GHOST),
    ),
    "1a-converged": Panel(
        "FashionMNIST, LeNet, to convergence: which noises regularise as SGD's",
        _regularisation(_LENET_CONVERGED),
        _scales.LENET_CONVERGED_LARGE,
        _scales.LENET_CONVERGED_MEDIUM,
        _scales.LENET_SMALL,
        (*_ALL, _INITIAL_LENET, _CONVERGED),
    ),
    "1b-converged": Panel(
        "FashionMNIST, LeNet, to convergence: covariances estimated from b",
        _estimation(_LENET_CONVERGED),
        _scales.LENET_CONVERGED_LARGE,
        _scales.LENET_CONVERGED_MEDIUM,
        _scales.LENET_SMALL,
        (*_ALL, _INITIAL_LENET, _CONVERGED),
    ),
    "large-batch": Panel(
        "FashionMNIST, LeNet, to convergence: large batches",
        (
            *_large_batch(_LENET_CONVERGED, 500),
            *_each(_LENET_CONVERGED, "gd", "m-sgd-fisher", "m-sgd-cov"),
        ),
        _scales.LENET_CONVERGED_LARGE,
        _scales.LENET_CONVERGED_MEDIUM,
        _scales.LENET_SMALL,
        (*_ALL, _INITIAL_LENET, _CONVERGED, "the panel itself"),
    ),
}
"""The panels by name."""
