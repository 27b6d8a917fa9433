"""The panels have the paper's numbers, and every run of them can be made."""

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
    pytest.param(run, id=f"{name}-{scale}-{i}")
    for name, panel in panels.PANELS.items()
    for scale in typing.get_args(panels.Scale)
    for i, run in enumerate(panel.at_scale(scale))
]


def test_names_on_the_command_line_are_those_of_the_panels():
    assert typing.get_args(paper_config.PanelName) == tuple(panels.PANELS)


def test_every_algorithm_of_the_paper_is_in_a_panel():
    """The one that is in no panel is the authors' own form of [M-SGD-Cov]-b."""
    used = {run.algorithm for p in panels.PANELS.values() for run in p.runs}
    assert set(ALGORITHMS) - used == {"m-sgd-ghost-cov"}


RECIPE = "dataset model learning_rate b momentum decay_at augment weight_decay"
DECAYS = (40_000, 60_000)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        # These are the numbers of Appendices B.1, B.2 and B.3, in the order of RECIPE.
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
    at_once = min(run.microbatch_size or law.support_size, law.support_size)
    ghost = min(run.ghost_batch_size or at_once, at_once)
    assert run.model != "resnet18" or law.support_size % at_once == at_once % ghost == 0
    assert all(0 < at < run.total_steps for at in run.decay_at)
    assert _optimizers.scaled_learning_rate(run) >= run.learning_rate
    assert run.total_steps % run.eval_every == 0


@pytest.mark.parametrize("scale", typing.get_args(panels.Scale))
def test_the_runs_of_a_panel_differ_in_their_algorithm_alone(scale):
    """What belongs to an algorithm are its noise and how its learning rate is scaled."""
    own = {"algorithm", "noise", "noise_draw", "learning_rate_scaling"}
    for panel in panels.PANELS.values():
        runs = panel.at_scale(scale)
        shared = [{k: v for k, v in dataclasses.asdict(r).items() if k not in own} for r in runs]
        assert all(record == shared[0] for record in shared)
        assert len({run.noise.batch_size for run in runs}) == 1
        assert len({run.label for run in runs}) == len(runs)
        assert sum(run.algorithm == "sgd" and not run.noise_draw for run in runs) == 1
        assert panel.assumptions


@pytest.mark.parametrize("scale", ["medium", "large"])
def test_a_scale_that_is_to_show_something_can_tell(scale):
    """It has five seeds or more with their own images, N from 1,000 on, a rate that decays at the
    end, and SGD with two keys.
    """
    for name, panel in panels.PANELS.items():
        for run in panel.at_scale(scale):
            n = run.num_train or EXAMPLES[run.dataset]
            assert run.seeds >= 5
            assert run.subset_per_seed
            assert 1_000 <= n <= 2_000
            assert 0 < max(run.decay_at) <= 6 / 7 * run.steps
        assert panel.choices(scale)[: len(panel.assumptions)] == panel.assumptions
        assert len(panel.choices(scale)) > len(panel.choices("paper")), name
        assert [run.noise_draw for run in panel.at_scale(scale) if run.algorithm == "sgd"] == [0, 1]


@pytest.mark.parametrize(("scale", "seeds"), [("medium", 10), ("large", 20)])
def test_lenet_is_compared_at_the_papers_rate_too(scale, seeds):
    """It is constant up to an evaluation, at which runs are compared."""
    for name, panel in panels.PANELS.items():
        until = panel.constant_until(scale)
        assert panel.constant_until("paper") is panel.constant_until("small") is None
        assert (until is not None) == (name in ("1a", "1b"))
        for run in panel.at_scale(scale) if until else ():
            assert (run.learning_rate, run.seeds, run.decay_at) == (0.01, seeds, (until,))
            assert until % run.eval_every == 0


def test_medium_panels_of_one_data_set_share_runs():
    """The runs of SGD in 1(d), 1(e) and 1(f) are the same, so that they are made once."""
    first, *others = (panels.PANELS[name].at_scale("medium") for name in ("1d", "1e", "1f"))
    for runs in others:
        assert next(run for run in runs if run.algorithm == "sgd") in [
            dataclasses.replace(run, noise=runs[0].noise) for run in first
        ]
