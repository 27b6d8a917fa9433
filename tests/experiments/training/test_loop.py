"""Runs that are interrupted at any moment end as if they had not been interrupted."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments import data, records, terminal, training
from experiments.__main__ import main
from experiments.training import loop, runs
from experiments.training.config import TrainConfig

PLAN = TrainConfig(
    algorithm="m-sgd-sparse-cov",
    dataset="digits",
    steps=60,
    learning_rate=0.1,
    momentum=0.9,
    seeds=2,
    eval_every=20,
    checkpoint_every=20,
    microbatch_size=None,
)
OPTIONS = shlex.split(
    "train --algorithm m-sgd-sparse-cov --dataset digits --steps 60 --learning-rate 0.1 "
    "--momentum 0.9 --seeds 2 --eval-every 20 --checkpoint-every 20 --microbatch-size None"
)


class Progress(terminal.Silent):
    """Progress that calls a function once it has counted so many steps."""

    def __init__(self, step=None, act=None):
        self.count, self.step, self.act = 0, step, act

    def update(self, count=1):
        self.count += count
        if self.act and self.step is not None and self.count >= self.step:
            self.act()


class Killed(BaseException):
    """Stands for the end of the process: nothing in the library catches it."""


def kill():
    raise Killed


def metrics(path):
    """The records of all evaluations, without their times."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def final_params(path):
    """The bytes of all parameters in the last checkpoint."""
    with ocp.CheckpointManager(path / "checkpoints") as manager:
        state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore())["state"]
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state["params"])]


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.fixture(scope="module", autouse=True)
def compiled_once(digits):
    """All runs of this file have the same plan, and share one compiled trainer."""
    trainer, make = training.make_trainer(PLAN, digits), training.make_trainer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experiments.training.trainer.make_trainer", lambda *_, **__: trainer)
        yield
    assert training.make_trainer is make


@pytest.fixture(scope="module")
def straight(tmp_path_factory, digits):
    """The folder of the run that is not interrupted."""
    path = tmp_path_factory.mktemp("straight") / "run"
    loop.run(PLAN, digits, path, Progress())
    return path


def check_same(path, straight):
    """Asserts that a run has ended as the one that was not interrupted, to the last bit."""
    assert metrics(path) == metrics(straight)
    assert [record["step"] for record in metrics(path)] == [0, 20, 40, 60]
    assert final_params(path) == final_params(straight)
    assert runs.state(path) == "finished"


def test_a_run_learns_and_keeps_its_record(straight, digits):
    losses = [np.mean(record["train_loss"]) for record in metrics(straight)]
    assert losses[-1] < 0.8 * losses[0]
    record = records.read_json(straight / "config.json")
    assert TrainConfig.of_record(record) == PLAN.resolved()
    drawn = records.read_json(straight / "train_images.json")["train_indices"]
    assert drawn == digits.train_indices.tolist()
    names = {p.name for p in straight.iterdir()}
    assert names >= {"config.json", "metrics.jsonl", "summary.json", "checkpoints", "tensorboard"}


@pytest.mark.parametrize("step", [1, 27, 40])
def test_interrupted_anywhere_it_ends_the_same(step, tmp_path, straight, digits):
    """The steps after the last checkpoint are taken again, and half a line is ignored."""
    path = tmp_path / "run"
    with pytest.raises(Killed):
        loop.run(PLAN, digits, path, Progress(step, kill))
    assert runs.state(path) == "stopped"
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"step": 59, "train_loss": [0.1')
    loop.run(PLAN, digits, path, Progress())
    check_same(path, straight)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_between_evaluations(number, tmp_path, straight, digits):
    path = tmp_path / "run"
    handler = signal.getsignal(number)
    stopping = Progress(27, lambda: os.kill(os.getpid(), number))
    with pytest.raises(loop.Stopped, match="the same command goes on") as stopped:
        loop.run(PLAN, digits, path, stopping)
    assert stopped.value.code == 128 + number
    assert signal.getsignal(number) == handler
    with ocp.CheckpointManager(path / "checkpoints") as manager:
        assert manager.latest_step() == stopping.count
    going_on = Progress()
    loop.run(PLAN, digits, path, going_on)
    assert going_on.count == 60
    check_same(path, straight)


def test_killed_as_a_process_it_goes_on_with_the_same_command(tmp_path, straight):
    """The process gets SIGKILL, which it cannot catch."""
    path = tmp_path / "run"
    command = [sys.executable, "-m", "experiments", *OPTIONS, "--out", str(path)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (path / "checkpoints" / "20").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    main([*OPTIONS, "--out", str(path)])
    check_same(path, straight)


def test_tensorboard_has_every_evaluation_once(tmp_path, digits, monkeypatch):
    """This also holds for a run that goes on within a second, which is the unit of file names.

    The events are read here by TensorBoard's rule: a start deletes what was logged from its step
    on.
    """
    from tensorboardX import event_file_writer
    from tensorboardX.proto import event_pb2

    stopped_clock = types.SimpleNamespace(time=lambda: 1.7e9)
    monkeypatch.setattr(event_file_writer, "time", stopped_clock)  # Other modules keep theirs.
    path = tmp_path / "run"
    with pytest.raises(Killed):
        loop.run(PLAN, digits, path, Progress(47, kill))
    loop.run(PLAN, digits, path, Progress())
    scalars = {}
    for file in sorted((path / "tensorboard").iterdir()):
        content = file.read_bytes()
        while content:  # Length, its checksum (8 + 4 bytes), the event, and its checksum (4 bytes).
            length = int.from_bytes(content[:8], "little")
            event = event_pb2.Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            if event.session_log.status == event_pb2.SessionLog.START:
                scalars = {k: v for k, v in scalars.items() if k[1] < event.step}
            for value in event.summary.value:
                scalars[value.tag, event.step] = value.simple_value
    evaluations = metrics(path)
    assert len(scalars) == 4 * 2 * len(evaluations)  # Four quantities of two seeds.
    for record in evaluations:
        for seed in range(2):
            found = scalars[f"test_accuracy/seed_{seed}", record["step"]]
            assert found == pytest.approx(record["test_accuracy"][seed])


def test_divergence_names_step_and_seeds_and_keeps_the_last_good_checkpoint(
    tmp_path, digits, monkeypatch
):
    """Seed 1 is given a loss that is not a number in its step 33."""
    make = training.make_trainer

    def poisoned(*args, **_):
        trainer = make(*args)

        def advance(state, num_steps):
            state, metrics = trainer.advance(state, num_steps)
            loss = metrics.loss
            if int(state.step[0]) > 33:
                row = 33 - (int(state.step[0]) - num_steps)
                loss = loss.at[max(row, 0), 1].set(np.nan)
            return state, metrics._replace(loss=loss)

        return trainer._replace(advance=advance)

    monkeypatch.setattr("experiments.training.trainer.make_trainer", poisoned)
    path = tmp_path / "run"
    with pytest.raises(training.DivergedError, match=r"not finite after 33 steps \(seed 1\)"):
        loop.run(PLAN, digits, path, Progress())
    assert runs.state(path) == "diverged at 33"
    assert [record["step"] for record in metrics(path)] == [0, 20]
    with ocp.CheckpointManager(path / "checkpoints") as manager:
        assert manager.latest_step() == 20
    with pytest.raises(FileExistsError, match="diverged after 33 steps, and would again"):
        loop.run(PLAN, digits, path, Progress())


# The folder ---------------------------------------------------------------------------------------


def test_a_finished_run_is_never_written_to(straight, digits):
    before = {p: p.read_bytes() for p in straight.rglob("*") if p.is_file() and p.name != ".lock"}
    with pytest.raises(FileExistsError, match="exists already, and results are never overwritten"):
        loop.run(PLAN, digits, straight, Progress())
    assert all(p.read_bytes() == content for p, content in before.items())


def test_a_run_of_another_plan_is_not_mixed_in(tmp_path):
    runs.RunFolder(tmp_path / "run", PLAN).close()
    other = TrainConfig.of_record(records.read_json(tmp_path / "run" / "config.json") | {"seed": 5})
    with pytest.raises(FileExistsError, match="differs in seed, and results are never overwritten"):
        runs.RunFolder(tmp_path / "run", other)


def test_a_folder_has_one_writer_at_a_time(tmp_path):
    folder = runs.RunFolder(tmp_path / "run", PLAN)
    assert runs.state(tmp_path / "run") == "running"
    with pytest.raises(FileExistsError, match="being written by another process"):
        runs.RunFolder(tmp_path / "run", PLAN)
    folder.close()
    assert runs.state(tmp_path / "run") == "stopped"
    runs.RunFolder(tmp_path / "run", PLAN).close()


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists already"):
        runs.RunFolder(tmp_path, PLAN)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_other_versions_are_warned_of(tmp_path, monkeypatch):
    runs.RunFolder(tmp_path / "run", PLAN).close()
    monkeypatch.setattr(runs, "versions", lambda: {"jax": "0.0"})
    with pytest.warns(UserWarning, match="begun with other versions"):
        runs.RunFolder(tmp_path / "run", PLAN).close()


def test_a_run_begun_with_other_draws_does_not_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "DRAWS", 1)
    runs.RunFolder(tmp_path / "run", PLAN).close()
    monkeypatch.undo()
    with pytest.raises(FileExistsError, match="a seed drew something else, so it cannot go on"):
        runs.RunFolder(tmp_path / "run", PLAN)


def test_a_run_of_another_command_does_not_go_on(tmp_path):
    runs.RunFolder(tmp_path / "run", PLAN, "distributed").close()
    with pytest.raises(FileExistsError, match="a run of `distributed`, not of `train`"):
        runs.RunFolder(tmp_path / "run", PLAN)


@pytest.mark.parametrize("damage", ["metrics", "checkpoint", "config"])
def test_a_damaged_run_is_named(damage, tmp_path, digits):
    path = tmp_path / "run"
    with pytest.raises(Killed):
        loop.run(PLAN, digits, path, Progress(40, kill))
    if damage == "metrics":
        (path / "metrics.jsonl").unlink()
    elif damage == "config":
        (path / "config.json").write_text('{"steps": 60, ')
    else:
        for file in (path / "checkpoints").rglob("*"):
            if file.is_file() and file.name != "_CHECKPOINT_METADATA":
                file.write_bytes(b"")
    wrong = {"checkpoint": "checkpoint .*/20 cannot be read", "metrics": "no evaluation up to"}
    with pytest.raises(
        records.DamagedRecordError, match=wrong.get(damage, "config.json is not JSON")
    ):
        loop.run(PLAN, digits, path, Progress())
