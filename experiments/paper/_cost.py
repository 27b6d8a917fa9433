"""How long training will take on two cores: said before it begins."""

from typing import NamedTuple

from experiments.training import loop
from experiments.training.algorithms import ALGORITHMS
from experiments.training.config import ModelName, TrainConfig


class Cost(NamedTuple):
    """Seconds on two cores, as measured at a width; of other widths by its square.

    Attributes:
        width: of the net; None where it has one only.
        step: of one image in one step of one seed.
        evaluation: of one image of one seed.
        compiling: of one run, before its first step and evaluation.
    """

    width: int | None
    step: float
    evaluation: float
    compiling: float


COSTS: dict[ModelName, Cost] = {
    "digits_net": Cost(None, 4e-6, 2e-6, 8),
    "lenet": Cost(None, 35e-6, 15e-6, 12),
    "vgg11": Cost(8, 0.6e-3, 0.5e-3, 35),
    "resnet18": Cost(8, 5e-3, 2e-3, 150),
}
_FULL_WIDTH = 64


def seconds(plan: TrainConfig) -> float:
    """Of a run: compilation, steps and evaluations."""
    cost = COSTS[plan.model_name]
    train, test = loop.sizes(plan)
    per_step = ALGORITHMS[plan.algorithm].make(train, plan.noise).support_size
    evaluations = -(-plan.total_steps // plan.eval_every) + 1
    wider = 1.0 if cost.width is None else ((plan.width or _FULL_WIDTH) / cost.width) ** 2
    work = plan.total_steps * per_step * cost.step + evaluations * (train + test) * cost.evaluation
    return cost.compiling + plan.seeds * work * wider


def sentence(plans: list[TrainConfig], out_of: int) -> str:
    """What will be run, and about how long it takes."""
    steps = sum(plan.total_steps for plan in plans)
    wide = any(COSTS[p.model_name].width and p.width is None for p in plans)
    return (
        f"{len(plans)} of {out_of} runs are to be made, {steps:,} steps in all: "
        f"about {duration(sum(map(seconds, plans)))} on two cores"
        f"{', reckoned from a narrower net: these are for a GPU' if wide else ''}."
    )


def duration(seconds: float) -> str:
    """In the unit that fits, from seconds to years."""
    for size, unit in (
        (31_536_000, "year"),
        (86_400, "day"),
        (3_600, "hour"),
        (60, "minute"),
        (1, "second"),
    ):
        if seconds >= 2 * size or size == 1:
            return f"{max(round(seconds / size), 1):,} {unit}s"
    raise AssertionError
