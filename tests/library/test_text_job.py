"""A job like those of users, from end to end: it continues with the same bits after a kill."""

import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.support import text_job


@pytest.mark.optimized
@pytest.mark.slow
def test_a_killed_transformer_continues_with_the_same_bits(tmp_path):
    kept, alone = tmp_path / "kept", tmp_path / "alone"
    kept.mkdir()
    alone.mkdir()
    command = [sys.executable, "-m", "tests.support.text_job", str(kept), "40", "8"]
    killed = subprocess.run(command, env=os.environ, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with np.load(kept / "state.npz") as saved:
        assert 6 in [int(array) for array in saved.values() if array.shape == ()]
    resumed, losses = text_job.run(kept, 40, None)
    assert len(losses) == 34
    through, all_losses = text_job.run(alone, 40, None)
    assert losses == all_losses[6:]
    for got, want in zip(
        jax.tree.leaves(resumed._replace(key=())),
        jax.tree.leaves(through._replace(key=())),
        strict=True,
    ):
        np.testing.assert_array_equal(got, want)
    # It also learns: the loss falls by a quarter, from that of guessing among 128 letters.
    assert np.mean(losses[-5:]) < 0.75 * all_losses[0]
