"""The mark `optimized` decides how much effort XLA takes, for a reason that `conftest.py` gives."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import LITTLE_EFFORT

X = np.random.default_rng(0).normal(size=(3, 1000)).astype(np.float32)
EFFORT = "import jax; print(jax.config.read('jax_disable_most_optimizations'))"


def roundings_of_a_product_and_a_sum() -> int:
    """How many of 1,000 numbers differ between one program and two.

    With all optimizations, XLA fuses a product and a sum into one operation with one rounding.
    """
    together = jax.jit(lambda a, b, c: a * b + c)(*X)
    return int((together != jax.jit(jnp.add)(jax.jit(jnp.multiply)(*X[:2]), X[2])).sum())


def said_by_another_process() -> str:
    """The setting that another process has, which inherits it by the environment."""
    asked = subprocess.run(
        [sys.executable, "-c", EFFORT], env=os.environ, capture_output=True, text=True, check=True
    )
    return asked.stdout.strip()


@pytest.mark.optimized
def test_exact_bits_are_those_of_users_programs():
    assert roundings_of_a_product_and_a_sum() > 0
    assert said_by_another_process() == "False"


@pytest.mark.skipif(not LITTLE_EFFORT, reason="everything is compiled as users' programs are")
def test_other_programs_are_compiled_quickly():
    assert roundings_of_a_product_and_a_sum() == 0
    assert said_by_another_process() == "True"
