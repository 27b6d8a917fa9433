"""An estimate of how long training will take on two cores, which is shown before it begins."""

from experiments import models, terminal
from experiments.training import loop
from experiments.training.algorithms import ALGORITHMS
from experiments.training.config import TrainConfig


def seconds(plan: TrainConfig) -> float:
    """The expected seconds of a run: compilation, steps and evaluations."""
    net = models.MODELS[plan.model_name]
    cost = net.cost
    train, test = loop.sizes(plan)
    per_step = ALGORITHMS[plan.algorithm].make(train, plan.noise).support_size
    evaluations = -(-plan.total_steps // plan.eval_every) + 1
    wider = (
        1.0
        if cost.width is None
        else ((plan.width or net.full_width or cost.width) / cost.width) ** 2
    )
    work = plan.total_steps * per_step * cost.step + evaluations * (train + test) * cost.evaluation
    return cost.compiling + plan.seeds * work * wider


def sentence(plans: list[TrainConfig], out_of: int) -> str:
    """A sentence that says how many runs will be made, and about how long they take."""
    steps = sum(plan.total_steps for plan in plans)
    wide = any(models.MODELS[p.model_name].cost.width and p.width is None for p in plans)
    return (
        f"{len(plans)} of {out_of} runs are to be made, {steps:,} steps in all: "
        f"about {terminal.duration(sum(map(seconds, plans)))} on two cores"
        f"{', reckoned from a narrower net: these are for a GPU' if wide else ''}."
    )
