"""Colour images, from files in their original formats to trained nets with batch norm."""

import dataclasses
import json
import shlex

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments import data, models, terminal, training
from experiments.__main__ import main
from experiments.data import datasets
from experiments.training import loop
from experiments.training.algorithms import NoiseSettings
from experiments.training.config import TrainConfig
from tests.experiments.data.cifar_files import write_tiny_cifar10
from tests.experiments.data.svhn_files import write_tiny_svhn
from tests.experiments.models.test_deep_models import OneBlock

PLAN = TrainConfig(
    algorithm="m-sgd-sparse-cov",
    dataset="cifar10",
    width=4,
    steps=6,
    learning_rate=0.05,
    momentum=0.9,
    weight_decay=5e-4,
    decay_at=(3,),
    augment=True,
    seeds=2,
    eval_every=2,
    checkpoint_every=2,
    microbatch_size=5,
    noise=NoiseSettings(batch_size=5, support_size=10),
)
TWO_STEPS = "--steps 2 --eval-every 1 --microbatch-size 5 --noise.batch-size 5"


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with a tiny SVHN and a tiny CIFAR-10 in their original formats."""
    folder = tmp_path / "files"
    tiny = (write_tiny_svhn(folder, num_train=10)[0], write_tiny_cifar10(folder)[0])
    named = {original.name: original for original in tiny}
    monkeypatch.setattr(datasets, "DATASETS", {**datasets.DATASETS, **named})
    return folder


@pytest.fixture
def one_block(monkeypatch):
    """ResNet-18 shrunk to one of its blocks, which compiles in seconds."""
    training.model_functions.cache_clear()
    monkeypatch.setattr(models, "MODELS", {**models.MODELS, "resnet18": OneBlock})
    yield
    training.model_functions.cache_clear()


class Progress(terminal.Silent):
    """Progress that interrupts the run once it has counted `last` steps."""

    def __init__(self, last=None):
        self.count, self.last = 0, last

    def update(self, count=1):
        self.count += count
        if self.last and self.count >= self.last:
            raise KeyboardInterrupt


def final_state(path):
    """The parameters, the statistics and the optimizer's state in the last checkpoint."""
    with ocp.CheckpointManager(path / "checkpoints") as manager:
        assert manager.latest_step() == PLAN.steps
        state = manager.restore(PLAN.steps, args=ocp.args.StandardRestore())["state"]
    return {
        name: jax.tree.map(np.asarray, state[name])
        for name in ("params", "model_state", "opt_state")
    }


@pytest.mark.optimized
@pytest.mark.slow
def test_cifar10_with_batch_norm_goes_on_as_if_it_had_not_been_stopped(
    files, one_block, tmp_path, monkeypatch
):
    dataset = data.load("cifar10", data_dir=files)
    trainer = training.make_trainer(PLAN, dataset)  # All runs share its compiled programs.
    monkeypatch.setattr("experiments.training.trainer.make_trainer", lambda *_, **__: trainer)
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    evaluations = loop.run(PLAN, dataset, straight, Progress())
    assert [e.step for e in evaluations] == [0, 2, 4, 6]
    with pytest.raises(KeyboardInterrupt):
        loop.run(PLAN, dataset, resumed, Progress(3))
    loop.run(PLAN, dataset, resumed, Progress())
    ends = [final_state(path) for path in (straight, resumed)]
    jax.tree.map(np.testing.assert_array_equal, *ends)
    # The statistics of the ghost batches have moved the running ones, differently for each seed.
    means = ends[0]["model_state"]["block"]["norm1"]["mean"]
    assert (means[0] != means[1]).all()
    metrics = [(path / "metrics.jsonl").read_text().splitlines() for path in (straight, resumed)]
    for before, after in zip(*metrics, strict=True):
        assert json.loads(before)["test_loss"] == json.loads(after)["test_loss"]


@pytest.mark.slow
def test_svhn_from_the_command_line(files, one_block, tmp_path):
    path = tmp_path / "run"
    command = "train --dataset svhn --model resnet18 --width 4"
    main([*shlex.split(f"{command} {TWO_STEPS}"), "--data-dir", str(files), "--out", str(path)])
    drawn = json.loads((path / "train_images.json").read_text())["train_indices"]
    assert len(set(drawn)) == 10
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    # Accuracies are multiples of one in twelve: the test images of this file.
    counts = np.array([line["test_accuracy"][0] for line in lines]) * 12
    np.testing.assert_allclose(counts, np.round(counts), atol=1e-3)


@pytest.mark.slow  # Compiling the nets takes a minute.
@pytest.mark.parametrize(("dataset", "model"), [("svhn", "vgg11"), ("cifar10", "resnet18")])
def test_the_papers_nets_from_the_command_line(dataset, model, files, tmp_path):
    path = tmp_path / "run"
    command = f"train --dataset {dataset} --width 2 --augment"
    main([*shlex.split(f"{command} {TWO_STEPS}"), "--data-dir", str(files), "--out", str(path)])
    assert json.loads((path / "summary.json").read_text())["step"] == 2
    assert json.loads((path / "config.json").read_text())["dataset"] == dataset
    plan = TrainConfig(dataset=dataset)
    assert plan.model_name == model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"microbatch_size": 3}, "microbatch_size must divide the 10 examples of a step"),
        (
            {"microbatch_size": None, "ghost_batch_size": 3},
            "ghost_batch_size must divide the 10 examples of a pass, got 3",
        ),
        ({"algorithm": "langevin-diagonal-fisher"}, "needs loss_vector_fn"),
        ({"num_train": 16}, "num_train must be between 1 and 15, or None, got 16"),
        ({"num_test": 4}, "num_test must be between 1 and 3, or None, got 4"),
    ],
)
def test_what_batch_norm_and_few_images_do_not_allow(changes, message, files, one_block):
    plan = dataclasses.replace(PLAN, data_dir=files, **changes)
    with pytest.raises(ValueError, match=message):
        training.make_trainer(plan, loop.load(plan))


def test_width_is_for_nets_that_have_one():
    with pytest.raises(ValueError, match="width is for vgg11 and resnet18, got 3 with lenet"):
        TrainConfig(width=3)


def test_subsets_are_drawn_by_the_seed(files):
    whole = data.load("cifar10", data_dir=files)
    some, again, other = (data.subset(whole, 7, 2, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(some.train.image, again.train.image)
    np.testing.assert_array_equal(some.train.image, whole.train.image[some.train_indices])
    assert set(some.train_indices) != set(other.train_indices)
    np.testing.assert_array_equal(some.test.image, other.test.image)
    assert len(some.test.label) == 2
