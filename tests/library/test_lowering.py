"""Programs for GPUs, for CUDA and for ROCm, are lowered without a GPU."""

import jax
import jax.numpy as jnp
import optax
import pytest

from msgd_jax import loss, train
from tests.support.noises import ROWS

PLATFORMS = ("cuda", "rocm")
losses = loss.per_example(lambda theta, x: jnp.sum((theta - x) ** 2))


@pytest.mark.parametrize("name", list(ROWS))
def test_a_step_of_every_law_is_lowered_for_gpus(name):
    law = ROWS[name].make(2_000, 50)  # permutations of up to 1,024 would be sorted instead
    step = train.make_step(losses, optax.adam(0.1), law, microbatch_size=10)
    state = train.init(jnp.zeros(3), optax.adam(0.1), jax.random.key(0))
    traced = jax.jit(step).trace(state, jnp.ones((2_000, 3)))
    for platform in PLATFORMS:
        # This raises if an operation has no rule for the platform.
        program = traced.lower(lowering_platforms=(platform,)).as_text()
        assert "stablehlo.while" in program  # the loop over micro-batches
