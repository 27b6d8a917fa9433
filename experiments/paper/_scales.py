"""What each scale changes of a panel, with reasons.

"large" is for one graphics card, and "medium" for two cores; both are meant to show what the panel
shows. "small" shows that the panel can be made.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments.training.algorithms import NoiseSettings
from experiments.training.config import TrainConfig


class Reduction(NamedTuple):
    """What a smaller scale changes.

    Attributes:
        changes: the new values by the name of the setting. Learning rates decay at the same
            fraction of the steps, unless `decay_at` is among them; the sizes of batches are upper
            bounds.
        why: the choices in words, for the page.
        noise_floor: whether SGD is run with another key as well, which shows how far apart two
            runs of one algorithm are.
        constant_first: whether runs are also compared at the last evaluation before the learning
            rate falls, since the paper's is constant.
    """

    changes: Mapping[str, Any]
    why: tuple[str, ...] = ()
    noise_floor: bool = False
    constant_first: bool = False


def reduced(run: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    """A run with fewer steps, images and channels."""
    steps = changes.get("steps", run.steps)
    decay_at = tuple(round(at * steps / run.steps) for at in run.decay_at)
    settings = dataclasses.replace(run.noise, **_sizes(run.noise, changes))
    kept = {k: v for k, v in changes.items() if k not in _SIZES}
    return dataclasses.replace(run, **{"decay_at": decay_at, "noise": settings, **kept})


_SIZES = ("batch_size", "estimate_size", "support_size")


def _sizes(settings: NoiseSettings, changes: Mapping[str, Any]) -> dict[str, int]:
    return {k: min(getattr(settings, k), changes[k]) for k in _SIZES if k in changes}


OWN_SUBSETS = (
    "each seed draws training images of its own, so that intervals are not about one subset"
)
END = "the learning rate is multiplied by 0.1 after 70 % of the steps, for a quiet end"

AS_PUBLISHED = Reduction({})
LENET_SMALL = Reduction(
    {"learning_rate": 0.1, "steps": 600, "eval_every": 60, "num_test": 5_000, "seeds": 3}
)
LENET_MEDIUM = Reduction(
    {
        "steps": 7_000,
        "decay_at": (6_000,),
        "eval_every": 500,
        "subset_per_seed": True,
        "seeds": 10,
    },
    (
        OWN_SUBSETS,
        "ten seeds",
        "6,000 iterations at the paper's constant rate, at the end of which all are compared, and "
        "1,000 more at a tenth of it, for a quiet end",
    ),
    noise_floor=True,
    constant_first=True,
)
LENET_LARGE = Reduction(
    {
        **LENET_MEDIUM.changes,
        "steps": 12_000,
        "decay_at": (10_000,),
        "seeds": 20,
        "microbatch_size": None,
    },
    (
        OWN_SUBSETS,
        "twenty seeds, each step in one pass",
        "10,000 iterations at the paper's constant rate, at the end of which all are compared, and "
        "2,000 more at a tenth of it, for a quiet end",
    ),
    noise_floor=True,
    constant_first=True,
)
LENET_CONVERGED_MEDIUM = Reduction(
    {"decay_at": (2_100,), "subset_per_seed": True}, (OWN_SUBSETS, END), noise_floor=True
)
LENET_CONVERGED_LARGE = Reduction(
    {**LENET_CONVERGED_MEDIUM.changes, "seeds": 20, "microbatch_size": None},
    (OWN_SUBSETS, LENET_LARGE.why[1], END),
    noise_floor=True,
)

COLOUR_SMALL = Reduction(
    {
        "num_train": 500,
        "num_test": 1_000,
        "width": 8,
        "steps": 200,
        "eval_every": 50,
        "seeds": 2,
        "batch_size": 50,
        "estimate_size": 50,
        "support_size": 250,
        "microbatch_size": 50,
        "checkpoint_every": 50,
    }
)
SVHN_MEDIUM = Reduction(
    {
        "num_train": 1_000,
        "subset_per_seed": True,
        "width": 8,
        "steps": 1_500,
        "decay_at": (1_050,),
        "eval_every": 150,
        "seeds": 5,
        "batch_size": 50,
        "estimate_size": 50,
        "support_size": 250,
        "microbatch_size": 50,
        "checkpoint_every": 300,
    },
    (
        "width 8 and N = 1,000: a full gradient takes a seventh of a second on two cores",
        "1,500 steps, as in the experiment that decides",
        "b = 50 and a large batch of 250: N is divided by 25, but a b of 4 would be another regime",
        OWN_SUBSETS,
        END,
    ),
    noise_floor=True,
)
CIFAR_VGG_MEDIUM = Reduction(
    {
        **{k: v for k, v in SVHN_MEDIUM.changes.items() if k != "decay_at"},
        "num_test": 5_000,
    },
    (*SVHN_MEDIUM.why[:-1], "5,000 of the test images, the same ones for all"),
    noise_floor=True,
)
CIFAR_RESNET_MEDIUM = Reduction(
    {
        **CIFAR_VGG_MEDIUM.changes,
        "num_test": 2_000,
        "width": 4,
        "steps": 300,
        "eval_every": 50,
        "checkpoint_every": 100,
    },
    (
        "width 4, N = 1,000 and 300 steps: a full gradient takes half a second on two cores",
        "ghost batches of 50, as large as the batches of SGD",
        SVHN_MEDIUM.why[2],
        OWN_SUBSETS,
        "2,000 of the test images, the same ones for all",
    ),
    noise_floor=True,
)
_IN_ONE_PASS = {"width": 16, "microbatch_size": None, "num_test": None, "checkpoint_every": 500}
SVHN_LARGE = Reduction(
    {**SVHN_MEDIUM.changes, **_IN_ONE_PASS},
    ("width 16 and N = 1,000, in one pass", *SVHN_MEDIUM.why[1:]),
    noise_floor=True,
)
CIFAR_VGG_LARGE = Reduction(
    {**CIFAR_VGG_MEDIUM.changes, **_IN_ONE_PASS},
    (SVHN_LARGE.why[0], *CIFAR_VGG_MEDIUM.why[1:-1]),
    noise_floor=True,
)
CIFAR_RESNET_LARGE = Reduction(
    {
        **CIFAR_VGG_LARGE.changes,
        "width": 8,
        "steps": 1_000,
        "eval_every": 100,
        "ghost_batch_size": 50,
    },
    (
        "width 8, N = 1,000 and 1,000 steps, in one pass of twenty ghost batches of 50",
        *CIFAR_VGG_LARGE.why[2:],
    ),
    noise_floor=True,
)
