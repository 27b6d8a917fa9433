"""The panels: the paper's numbers, and that every run of them can be made."""

import dataclasses
import typing

import pytest

from experiments.paper import config as paper_config
from experiments.paper import panels
from experiments.training import _optimizers
from experiments.training.algorithms import ALGORITHMS
from experiments.training.config import TrainConfig

EXAMPLES = {"fashion_mnist": 1_000, "svhn": 25_000, "cifar10": 50_000}
EVERY = [
    pytest.param(run, id=f"{name}-{small}-{i}")
    for name, panel in panels.PANELS.items()
    for small in (False, True)
    for i, run in enumerate(panel.at_scale(small))
]


def test_names_on_the_command_line_are_those_of_the_registry():
    assert typing.get_args(paper_config.PanelName) == tuple(panels.PANELS)


def test_every_algorithm_is_in_a_panel():
    assert {run.algorithm for p in panels.PANELS.values() for run in p.runs} == set(ALGORITHMS)


RECIPE = "dataset model learning_rate b momentum decay_at augment weight_decay"
DECAYS = (40_000, 60_000)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        # Appendix B.1, B.2, B.3, in the order of RECIPE.
        ("1a 1b", ("fashion_mnist", "lenet", 0.01, 50, 0, (), False, 0)),
        ("1d 1e 1f", ("svhn", "vgg11", 0.05, 100, 0, (), False, 0)),
        ("2a 2b", ("cifar10", "vgg11", 0.01, 100, 0.9, DECAYS, False, 0)),
        ("3a 3b", ("cifar10", "resnet18", 0.1, 100, 0.9, DECAYS, False, 0)),
        ("1c", ("cifar10", "resnet18", 0.1, 100, 0.9, DECAYS, True, 5e-4)),
    ],
)
def test_the_papers_numbers(names, expected):
    for name in names.split():
        for run in panels.PANELS[name].runs:
            found = dataclasses.asdict(run) | {"b": run.noise.batch_size}
            assert tuple(found[key] for key in RECIPE.split()) == expected
            assert run.decay_factor == 0.1 or not run.decay_at
            assert run.num_train is None
            assert run.num_test is None


@pytest.mark.parametrize("run", EVERY)
def test_every_run_can_be_made(run: TrainConfig):
    n = min(EXAMPLES[run.dataset], run.num_train or 10**9)
    law = ALGORITHMS[run.algorithm].make(n, run.noise)
    assert law.num_examples == n
    ghost = run.microbatch_size or law.support_size
    assert run.model != "resnet18" or law.support_size % ghost == 0
    assert all(0 < at < run.total_steps for at in run.decay_at)
    assert _optimizers.scaled_learning_rate(run) >= run.learning_rate
    assert run.total_steps % run.eval_every == 0


@pytest.mark.parametrize("small", [False, True])
def test_a_panel_compares_like_with_like(small):
    own = {"algorithm", "noise", "learning_rate_scaling"}
    for panel in panels.PANELS.values():
        runs = panel.at_scale(small)
        shared = [{k: v for k, v in dataclasses.asdict(r).items() if k not in own} for r in runs]
        assert all(record == shared[0] for record in shared)
        assert len({run.noise.batch_size for run in runs}) == 1
        assert len({run.label for run in runs}) == len(runs)
        assert sum(run.algorithm == "sgd" for run in runs) == 1
        assert panel.assumptions
