"""Two processes of four devices each, over `jax.distributed` on this machine."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import optax
import pytest

from experiments import records
from experiments.training import runs
from msgd_jax import noise, train
from tests.library.test_sharding import assert_is_dense_gradient
from tests.support import process_worker
from tests.support.noises import ROWS
from tests.support.problems import loss_vector_fn, regression

PATIENCE = 300  # seconds, for a busy machine


def free_address() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listener.getsockname()[1]}"


@contextlib.contextmanager
def processes(*commands: list[str], devices: int = 4):
    """Python processes with so many devices each; none is left behind."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", *command], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for command in commands
    ]  # fmt: skip
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def both(task: str, folder) -> None:
    address = free_address()
    commands = [
        ["tests.support.process_worker", task, address, str(i), str(folder)] for i in range(2)
    ]
    with processes(*commands) as started:
        for process in started:
            output, _ = process.communicate(timeout=PATIENCE)
            assert process.returncode == 0, output


def test_two_processes_use_the_bits_of_one_device(tmp_path):
    """Weights to the bit, gradients to the rounding that `assert_is_dense_gradient` derives."""
    both("weights", tmp_path)
    first, second = (np.load(tmp_path / f"{i}.npz") for i in range(2))
    key, problem = jax.random.key(314), regression(1003)
    for name in process_worker.LAWS:
        expected = np.asarray(ROWS[name].make(1003, 16).sample(key, 3).dense())
        assert first[f"{name} weights"].tobytes() == expected.tobytes(), name
    loaded = noise.batch_cov(1003, 4).of(16).sample(key, 3).values
    assert first["loaded"].tobytes() == np.asarray(loaded).tobytes()
    for name in first.files:
        assert first[name].tobytes() == second[name].tobytes(), name
    grads = {leaf: first[f"grad {leaf}"] for leaf in problem.params}
    weights = ROWS["cov"].make(1003, 16).sample(key, 3)
    assert_is_dense_gradient(problem, weights, first["value"], grads)


def test_each_process_reads_the_examples_of_its_own_devices(tmp_path):
    both("streaming", tmp_path)
    first, second = (np.load(tmp_path / f"{i}.npz") for i in range(2))
    law, optimizer, problem = noise.sgd(1003, 16), optax.sgd(0.5), regression(1003)
    for step, halves in enumerate(zip(first["read"], second["read"], strict=True)):
        assert [half.shape for half in halves] == [(8,), (8,)]
        indices = law.sample(jax.random.key(314), step).indices
        np.testing.assert_array_equal(np.concatenate(halves), indices)
    loop = train.make_loop(train.make_step(loss_vector_fn, optimizer, law), max_steps=3)
    state, metrics = loop(
        train.init(problem.params, optimizer, jax.random.key(314)), problem.data, 3
    )
    for half in (first, second):
        np.testing.assert_allclose(half["loss"], metrics.loss, rtol=1e-5)
        for leaf, value in state.params.items():
            np.testing.assert_allclose(half[leaf], value, rtol=1e-5, atol=1e-6)


def test_keys_that_differ_between_processes_are_refused(tmp_path):
    both("keys", tmp_path)
    for i in range(2):
        lines = (tmp_path / f"{i}.txt").read_text().splitlines()
        assert len(lines) == 4
        for line in lines:
            assert "key must be the same in all processes, got [0, 0] in process 0" in line
            assert f"others in [1]; process {i} has [0, {i}]" in line


def training(out, *arguments: str) -> list[str]:
    plan = "--dataset digits --algorithm m-sgd-cov --learning-rate 0.1 --steps 40 --num-train 203"
    more = "--checkpoint-every 5 --microbatch-size 13 --noise.batch-size 20 --num-test 100"
    every = ["--eval-every", "5"]
    return ["experiments", "distributed", *plan.split(), *more.split(), *every, "--out", str(out),
            *arguments]  # fmt: skip


def of_two(out) -> list[list[str]]:
    shared = ["--coordinator", free_address(), "--num-processes", "2", "--heartbeat-timeout", "10"]
    return [training(out, *shared, "--process-id", str(i)) for i in range(2)]


def losses(out) -> np.ndarray:
    """The training loss at every evaluation."""
    return np.array([record["train_loss"] for record in records.read_lines(out / "metrics.jsonl")])


def wait_for_lines(path, number: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while not path.exists() or len(path.read_text().splitlines()) < number:
        assert time.monotonic() < deadline, f"{path} has not got {number} lines"
        time.sleep(0.05)


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_one_is_killed_the_other_stops_and_another_number_of_devices_goes_on(tmp_path, victim):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    with processes(training(whole), devices=1) as (process,):
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, output
    with processes(*of_two(broken)) as started:
        wait_for_lines(broken / "metrics.jsonl", 2)
        started[victim].send_signal(signal.SIGKILL)
        output, _ = started[1 - victim].communicate(timeout=PATIENCE)  # it does not hang
        assert started[1 - victim].returncode not in (0, None)
        assert "another task died" in output or "Gloo" in output
    assert len(losses(broken)) < 9
    with processes(training(broken), devices=2) as (process,):
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, output
    # The same weight vectors at every step: other ones would change losses by some 10 %.
    np.testing.assert_allclose(losses(broken), losses(whole), rtol=1e-4)
    steps = [record["step"] for record in records.read_lines(broken / "metrics.jsonl")]
    assert steps == list(range(0, 41, 5))
    ends = [json.loads((out / "summary.json").read_text()) for out in (whole, broken)]
    assert ends[0]["test_accuracy"] == pytest.approx(ends[1]["test_accuracy"], abs=0.02)


def test_a_signal_to_one_process_stops_both_and_the_same_command_goes_on(tmp_path):
    """As `train` does: a checkpoint, the exit code of the signal, no work lost."""
    out = tmp_path / "run"
    endless = ["--steps", "100000"]
    with processes(*[[*command, *endless] for command in of_two(out)]) as started:
        wait_for_lines(out / "metrics.jsonl", 2)
        started[1].send_signal(signal.SIGTERM)
        for process in started:
            output, _ = process.communicate(timeout=PATIENCE)
            assert process.returncode == 128 + signal.SIGTERM, output
            assert "the same command goes on from there" in output
    assert runs.state(out) == "stopped"
    saved = max(int(path.name) for path in (out / "checkpoints").glob("[0-9]*"))
    assert f"stopped after {saved} steps" in output


def test_bad_input(tmp_path):
    from experiments.__main__ import main

    out = ("--out", str(tmp_path / "x"))
    for arguments, message in (
        ([], "out must be given"),
        ([*out, "--seeds", "2"], "seeds must be 1 where a run is spread"),
        ([*out, "--augment"], "augment and the diagonal Langevin"),
        ([*out, "--num-processes", "2"], "needs coordinator and process_id, got None"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["distributed", "--dataset", "digits", *arguments])
    assert not (tmp_path / "x").exists()
