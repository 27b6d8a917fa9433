"""Today's code computes what the records say, at the first evaluation of a record of each kind.

The studies of `decide` were computed on a GPU with products in TF32. After hundreds of steps only
about two digits agree, which is enough to tell a record from one of another noise key.
"""

import dataclasses
import os
import pathlib

import jax
import numpy as np
import pytest

import experiments
from experiments import records, training
from experiments.decide import _datasets, _records, _runs, settings
from experiments.noise_study import EdgeConfig, _problem, edge
from experiments.paper import accuracies, panels, report
from experiments.theory import ComplexityConfig, SDEConfig, complexity, sde
from experiments.theory_study import NetworkConfig, RegularizerConfig, _net, network, regularizer
from experiments.training import loop, runs
from tests.support.fashion import fashion_mnist_or_skip

# Records were computed by programs that were compiled as users' are.
pytestmark = pytest.mark.optimized

RESULTS = pathlib.Path(experiments.__file__).parent / "results"


def agrees_with_its_record_alone(setting, images, name, other, seeds):
    """How far losses computed today are from two records, after the first steps of a study.

    Args:
        setting: the study.
        images: its images, whose checksum is compared with that of the record.
        name: the contestant that is trained here, up to the first evaluation of the record.
        other: the near miss, a contestant that differs in its noise key alone.
        seeds: the seeds that are trained.

    Returns:
        The mean over the seeds of the absolute difference of log losses, from the record of `name`
        and from that of `other`.
    """
    lines = _records.lines(_records.path_of(RESULTS / "decide", setting), setting)
    assert _datasets.checksum(images) == lines[0]["data"]
    runner = _runs.Runner(setting, images, _runs.Options())
    state, advance = runner._started(name, seeds, None)
    (step, *_) = settings.CONTESTANTS[name].evaluation_steps(setting)
    found = jax.device_get(runner._evaluate(advance(state, 0, step)).train_loss)
    recorded = _records.curves(lines)
    apart = {}
    for contestant in (name, other):
        curves = [recorded[_records.Run(contestant, 1.0, seed)] for seed in seeds]
        assert {int(curve.steps[0]) for curve in curves} == {step}
        losses = np.array([curve.train_loss[0] for curve in curves])
        apart[contestant] = np.abs(np.log(found / losses)).mean()
    return apart[name], apart[other]


def test_the_digits_with_wrong_labels():
    """Losses of SGD after 667 steps are the recorded ones within 5 % on average.

    The difference was 2.3 % when this was written, and 10 % for the near miss.
    """
    images = _datasets.load(settings.DIGITS)
    own, other = agrees_with_its_record_alone(
        settings.DIGITS, images, "sgd", "sgd-other-key", range(100, 108)
    )
    assert own < 0.05 < other


@pytest.mark.slow
@pytest.mark.skipif("SVHN_PART" not in os.environ, reason="SVHN_PART must name svhn_part.npz")
def test_the_part_of_svhn():
    """Losses of SGD after 125 steps are three times closer to the record than to the near miss.

    The images are not in the repository.
    """
    images = _datasets.load(settings.SVHN, pathlib.Path(os.environ["SVHN_PART"]))
    own, other = agrees_with_its_record_alone(
        settings.SVHN, images, "sgd", "sgd-other-key", range(100, 104)
    )
    assert own < other / 3


@pytest.mark.slow
@pytest.mark.skipif("SVHN_PART" not in os.environ, reason="SVHN_PART must name svhn_part.npz")
def test_a_panel_on_the_part_of_svhn():
    """Losses of SGD at the start and after 150 steps are those that another device recorded.

    The near miss is SGD with another key, which has the same start. Its record was 1.9 times as
    far from the losses when this was written; it must be 1.3 times, and would be 0.5 times if the
    code drew its noise.
    """
    plans = panels.PANELS["1d"].at_scale("large")
    own, other = (plan for plan in plans if plan.algorithm == "sgd")
    given = pathlib.Path(os.environ["SVHN_PART"])
    plan, near = report._of_file([own, other], given, RESULTS / "runs")
    recorded, found = records_of([plan, near]), training.train_seeds(plan, loop.load(plan))
    agree_at_the_start(next(found), recorded[0])
    own_record, near_record = distances(next(found), recorded, step=150)
    assert own_record < near_record / 1.3


@pytest.mark.slow
@pytest.mark.skipif("CIFAR10" not in os.environ, reason="CIFAR10 must name tfds's folder with it")
@pytest.mark.parametrize("panel", ["1c", "2b", "3a", "3b"])
def test_a_panel_on_cifar10(panel):
    """Losses of SGD at the start, and with VGG-11 after 150 steps, are those of the record.

    The near miss is SGD with another key, which has the same start, and from whose record the
    losses are more than twice as far. In 50 steps of the ResNet at its large rate, rounding grows
    to half of that distance: there the start alone is compared. Panel 2(a) has 2(b)'s SGD.
    """
    recorded, found = of_sgd_and_another_key(panel, "medium", data_dir=cifar10())
    agree_at_the_start(next(found), recorded[0])
    if panel == "2b":
        own_record, near_record = distances(next(found), recorded, step=150)
        assert own_record < near_record / 2


@pytest.mark.slow
@pytest.mark.skipif("CIFAR10" not in os.environ, reason="CIFAR10 must name tfds's folder with it")
@pytest.mark.parametrize("panel", ["1c", "2a", "3b"])
def test_the_start_of_a_panel_on_cifar10_that_a_graphics_card_made(panel):
    """Losses and accuracies before the first step, in full precision here and in TF32 there."""
    recorded, found = of_sgd_and_another_key(panel, "large", data_dir=cifar10())
    agree_at_the_start(next(found), recorded[0])


def of_sgd_and_another_key(panel, scale, **changes):
    """The records of both, and the evaluations of SGD made again with some settings changed."""
    plans = panels.PANELS[panel].at_scale(scale)
    own, other = (plan for plan in plans if plan.algorithm == "sgd")
    plan = dataclasses.replace(own, **changes)
    return records_of([own, other]), training.train_seeds(plan, loop.load(plan))


def records_of(plans):
    return [accuracies.of_finished(report.run_folder(RESULTS / "runs", plan)) for plan in plans]


def cifar10():
    return pathlib.Path(os.environ["CIFAR10"])


def agree_at_the_start(found, recorded, rtol=1e-3):
    """The losses and accuracies of the first evaluation are the record's, for as many seeds."""
    _, start = found
    seeds = len(start.train_loss)
    np.testing.assert_allclose(start.train_loss, recorded[0].train_loss[:seeds], rtol=rtol)
    np.testing.assert_allclose(start.test_accuracy, recorded[0].test_accuracy[:seeds], atol=1e-3)


def distances(found, recorded, *, step):
    """How far the losses of the second evaluation, at a step, are from those of each record."""
    _, first = found
    assert first.step == recorded[0][1].step == step
    seeds = len(first.train_loss)
    return [
        np.abs(np.log(first.train_loss / record[1].train_loss[:seeds])).mean()
        for record in recorded
    ]


@pytest.mark.slow
def test_a_panel_on_fashion_mnist():
    """Losses of SGD at the start and after 500 steps are those that another device recorded.

    The near miss is SGD with another key, from whose record they are a hundred times as far.
    """
    fashion_mnist_or_skip()
    recorded, found = of_sgd_and_another_key("1a", "large", seeds=3)
    agree_at_the_start(next(found), recorded[0], rtol=1e-5)
    own_record, near_record = distances(next(found), recorded, step=500)
    assert own_record < near_record / 20


@pytest.mark.slow
def test_the_noise_study():
    """All quantities at the start, and the loss after 500 steps of SGD, are the recorded ones.

    The record was computed on another machine: the tolerances are for its rounding, which grows in
    500 steps. A near miss, the loss of another seed, differs by more than twice the tolerance.
    """
    config, lines = study_config(EdgeConfig, RESULTS / "noise_study" / "edge", seeds=2)
    (line,) = (
        line
        for line in lines
        if (line["noise"], line["learning_rate"]) == ("sgd", config.learning_rate)
    )
    shortened = _OnlyFirst(**dataclasses.asdict(config))
    first = edge.train(
        shortened,
        _problem.digits(range(config.seed, config.seed + config.seeds)),
        "sgd",
        config.learning_rate,
    )
    for quantity in ("eigenvalue", "sgd_sharpness", "own_sharpness"):
        np.testing.assert_allclose(first[quantity][0], line[quantity][0][:2], rtol=1e-3)
    np.testing.assert_allclose(first["loss"][1], line["loss"][1][:2], rtol=1e-2)
    assert abs(first["loss"][1][0] / line["loss"][1][1] - 1) > 0.02


class _OnlyFirst(EdgeConfig):
    """The settings of the study, with its first two measurements alone."""

    @property
    def measured_at(self):
        return super().measured_at[:2]


def study_config(kind, folder, **changes):
    """The options of a recorded study, and its records."""
    asked = records.read_object(folder / "config.json")
    assert asked["draws"] == runs.DRAWS
    known = {field.name for field in dataclasses.fields(kind)}
    elsewhere = {"out": None, "collect": (), "data_dir": None}
    values = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in (asked | elsewhere | changes).items()
        if name in known
    }
    return kind(**values), records.read_lines(folder / f"{folder.name}.jsonl")


@pytest.mark.slow
def test_the_study_of_the_regulariser():
    """GD with the first two seeds to its end: losses within 1 %, and far from those exchanged."""
    config, lines = study_config(RegularizerConfig, RESULTS / "theory_study" / "regularizer")
    rate = config.learning_rate
    own = [line for line in lines if (line["case"], line["rate"]) == ("gd", rate)]
    recorded = {line["seed"]: line for line in own}
    first, second = regularizer.train(config, "gd", rate, range(2))
    for found in (first, second):
        wanted = recorded[found["seed"]]
        assert found["test_loss"] == pytest.approx(wanted["test_loss"], rel=0.01)
        assert found["test_accuracy"] == pytest.approx(wanted["test_accuracy"], abs=0.003)
    assert abs(first["test_loss"] / recorded[1]["test_loss"] - 1) > 0.02


@pytest.mark.slow
def test_the_nets_beside_their_sde():
    """The distances of a path of the tanh net are the recorded ones, and not another seed's."""
    config, lines = study_config(NetworkConfig, RESULTS / "theory_study" / "network")
    recorded = {line["seed"]: line for line in lines if line["net"] == "tanh-average"}
    fashion_mnist_or_skip()
    (images,) = _net.images([0], config.num_train)
    compiled = network.beside(config, "tanh-average")
    found = network.path(config, compiled, "tanh-average", 0, images, lambda gradients: None)
    for kind in ("shared", "own"):
        np.testing.assert_allclose(found[kind], recorded[0][kind], rtol=1e-2)
        apart = np.abs(np.log(np.divide(recorded[1][kind], recorded[0][kind])))
        assert apart.mean() > 0.1


@pytest.mark.slow
def test_the_orders_of_the_sde():
    """The first distances to the SDE are the recorded ones, and not those of another seed."""
    recorded = records.read_object(RESULTS / "sde" / "summary.json")["strong"][0]
    found, other = (next(sde.strong(SDEConfig(seed=seed))) for seed in (0, 1))
    assert found["label"] == recorded["label"]
    np.testing.assert_allclose(found["errors"], recorded["errors"], rtol=1e-4)
    assert abs(other["errors"][0] / recorded["errors"][0] - 1) > 1e-3


@pytest.mark.slow
def test_the_inequalities_of_theorem_1(monkeypatch):
    """The ratios of affine losses, and of those whose draws are enumerated, are the recorded ones.

    The near miss is another class of affine losses.
    """
    recorded = records.read_object(RESULTS / "complexity" / "summary.json")["theorem1"]
    cases = [case for case in complexity.settings(ComplexityConfig()) if "net" not in case.label]
    chosen = [cases[0], *(case for case in cases if case.label.startswith("one loss"))]
    monkeypatch.setattr(complexity, "settings", lambda config: chosen)
    found = list(complexity.theorem1_rows(ComplexityConfig()))
    assert [row["label"] for row in found] == ["affine", "one loss, b = 2", "one loss, b = 4"]
    for row in found:
        (line,) = (other for other in recorded if other["label"] == row["label"])
        for name, inequality in line["inequalities"].items():
            assert row["inequalities"][name]["violated"] == inequality["violated"]
            ratio = row["inequalities"][name]["ratio"]["value"]
            assert ratio == pytest.approx(inequality["ratio"]["value"], rel=1e-4)
    other = recorded[3]["inequalities"]["without"]["ratio"]["value"]
    assert abs(found[0]["inequalities"]["without"]["ratio"]["value"] / other - 1) > 0.01


def test_every_recorded_run_is_one_of_todays_draws():
    """Those of older draws could not be made again."""
    found = list(runs.find(RESULTS / "runs"))
    assert len(found) > 40
    assert {runs.draws(path) for path in found} == {runs.DRAWS}
