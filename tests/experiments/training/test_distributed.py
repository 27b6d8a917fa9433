"""``python -m experiments distributed`` in two processes of four devices each, on this machine."""

import json
import signal
import time

import numpy as np
import pytest

from experiments import records
from experiments.training import runs
from tests.support.processes import PATIENCE, free_address, processes


def training(out, *arguments: str) -> list[str]:
    """The command of a run of 40 steps with nine evaluations, as arguments of ``python -m``."""
    plan = "--dataset digits --algorithm m-sgd-cov --learning-rate 0.1 --steps 40 --num-train 203"
    more = "--checkpoint-every 5 --microbatch-size 13 --noise.batch-size 20 --num-test 100"
    every = ["--eval-every", "5"]
    options = [*plan.split(), *more.split(), *every, "--out", str(out), *arguments]
    return ["experiments", "distributed", *options]


def of_two(out) -> list[list[str]]:
    """The commands of two processes that share a run."""
    shared = ["--coordinator", free_address(), "--num-processes", "2", "--heartbeat-timeout", "10"]
    return [training(out, *shared, "--process-id", str(i)) for i in range(2)]


def losses(out) -> np.ndarray:
    """The training loss at every evaluation."""
    return np.array([record["train_loss"] for record in records.read_lines(out / "metrics.jsonl")])


def wait_for_lines(path, number: int) -> None:
    """Waits until a file has so many lines."""
    deadline = time.monotonic() + PATIENCE
    while not path.exists() or len(path.read_text().splitlines()) < number:
        assert time.monotonic() < deadline, f"{path} has fewer than {number} lines"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_is_killed_the_other_stops_and_another_number_of_devices_goes_on(tmp_path, victim):
    """A run of two processes, one of them killed, is finished by one process with two devices.

    It ends as a run of one process with one device that was never stopped, up to rounding.
    """
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    with processes(training(whole), devices=1) as (process,):
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, output
    with processes(*of_two(broken)) as started:
        wait_for_lines(broken / "metrics.jsonl", 2)
        started[victim].send_signal(signal.SIGKILL)
        output, _ = started[1 - victim].communicate(timeout=PATIENCE)  # The other one ends too.
        assert started[1 - victim].returncode not in (0, None)
        assert "another task died" in output or "Gloo" in output
    assert len(losses(broken)) < 9
    with processes(training(broken), devices=2) as (process,):
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, output
    # Sums over devices round differently. Other weights at a step change losses by about 10 %.
    np.testing.assert_allclose(losses(broken), losses(whole), rtol=1e-4)
    steps = [record["step"] for record in records.read_lines(broken / "metrics.jsonl")]
    assert steps == list(range(0, 41, 5))
    ends = [json.loads((out / "summary.json").read_text()) for out in (whole, broken)]
    # Rounding may change the class of two of the 100 test images.
    assert ends[0]["test_accuracy"] == pytest.approx(ends[1]["test_accuracy"], abs=0.02)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_and_the_same_command_goes_on(tmp_path):
    """Both processes write a checkpoint and exit with the code of the signal, as `train` does."""
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


def test_bad_input(tmp_path, capsys):
    from experiments.__main__ import main

    out = ("--out", str(tmp_path / "x"))
    for arguments, message in (
        ([], "out must be given"),
        ([*out, "--seeds", "2"], "seeds must be 1 where a run is spread"),
        ([*out, "--augment"], "augment and the baselines with additive noise"),
        ([*out, "--num-processes", "2"], "needs coordinator and process_id, got None"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["distributed", "--dataset", "digits", *arguments])
        # Older versions of tyro print the message in a frame; with newer ones it is the exit code.
        said = str(stopped.value.code) + "".join(capsys.readouterr()).replace("│", "")
        assert message in " ".join(said.split())
    assert not (tmp_path / "x").exists()
