"""Two processes with four devices each, connected by `jax.distributed` on this machine."""

import jax
import numpy as np
import optax
import pytest

from msgd_jax import noise, train
from tests.library.test_sharding import assert_is_dense_gradient
from tests.support import process_worker
from tests.support.noises import ROWS
from tests.support.problems import loss_vector_fn, regression
from tests.support.processes import PATIENCE, free_address, processes


def both(task: str, folder) -> None:
    """Runs a task of `process_worker.py` in two processes, which write to the folder."""
    address = free_address()
    commands = [
        ["tests.support.process_worker", task, address, str(i), str(folder)] for i in range(2)
    ]
    with processes(*commands) as started:
        for process in started:
            output, _ = process.communicate(timeout=PATIENCE)
            assert process.returncode == 0, output


@pytest.mark.optimized
def test_two_processes_use_the_bits_of_one_device(tmp_path):
    """Weights agree bit for bit, gradients up to rounding: `assert_is_dense_gradient`."""
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


@pytest.mark.slow
def test_each_process_reads_the_examples_of_its_own_devices(tmp_path):
    """Each reads 8 of the 16 examples of a batch; the training is that of one process."""
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
