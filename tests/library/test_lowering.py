"""Programs for GPUs, lowered where there is none: for CUDA and for ROCm."""

import jax
import jax.numpy as jnp
import optax
import pytest

from msgd_jax import loss, train
from tests.support.noises import ROWS

PLATFORMS = ("cuda", "rocm")
losses = loss.per_example(lambda theta, x: jnp.sum((theta - x) ** 2))


@pytest.mark.parametrize("name", list(ROWS))
def test_every_law_and_a_step_of_it(name):
    law = ROWS[name].make(2_000, 50)  # permutations of more than 1,024 are walked
    step = train.make_step(losses, optax.adam(0.1), law, microbatch_size=10)
    state = train.init(jnp.zeros(3), optax.adam(0.1), jax.random.key(0))
    traced = jax.jit(step).trace(state, jnp.ones((2_000, 3)))
    for platform in PLATFORMS:
        # Raises where an operation has no rule for the platform.
        program = traced.lower(lowering_platforms=(platform,)).as_text()
        assert "stablehlo.while" in program  # micro-batches
