"""What drift, diffusion and Euler-Maruyama refuse, and what they say."""

import math

import jax
import jax.numpy as jnp
import pytest

from experiments.sde_problems import logistic
from msgd_jax import noise, sde

N, B = 20, 4


@pytest.mark.usefixtures("user_errors")
class TestBadInput:
    problem = logistic(N)
    good = {"learning_rate": 0.1, "num_steps": 3, "key": jax.random.key(0)}  # noqa: RUF012

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (
                {"learning_rate": 0.0},
                ValueError,
                "learning_rate must be finite and above 0, got 0.0",
            ),
            ({"learning_rate": -1}, ValueError, "got -1"),
            ({"learning_rate": math.nan}, ValueError, "got nan"),
            ({"learning_rate": "0.1"}, TypeError, "learning_rate must be a number"),
            ({"learning_rate": jnp.ones(2)}, ValueError, "learning_rate must be a scalar"),
            ({"num_steps": 0}, ValueError, "num_steps must be at least 1|between 1"),
            ({"num_steps": 2.0}, TypeError, "num_steps must be an integer"),
            ({"substeps": 3}, ValueError, "substeps must be a power of two, got 3"),
            ({"substeps": 0}, ValueError, "substeps must be between 1 and 65536, got 0"),
            ({"save_at": [4]}, ValueError, "save_at must be between 0 and 3, got 4"),
            ({"save_at": [2, 1]}, ValueError, "ascending"),
            ({"first_step": 3}, ValueError, "first_step must be between 0 and 2, got 3"),
            ({"save_at": [0], "first_step": 1}, ValueError, "save_at must be between 1 and 3"),
            ({"save_at": []}, ValueError, "at least one"),
            ({"order": 3}, ValueError, "order must be between 1 and 2, got 3"),
            ({"key": 0}, TypeError, "key must be a typed PRNG key"),
            ({"microbatch_size": 0}, ValueError, "microbatch_size must be at least 1"),
        ],
    )
    def test_arguments(self, change, error, message):
        with pytest.raises(error, match=message):
            sde.euler_maruyama(*self.problem, noise.cov(N, B), **{**self.good, **change})

    @pytest.mark.parametrize(
        ("params", "message"),
        [
            (jnp.arange(5), "must be floating point"),
            (jnp.ones(5, jnp.bfloat16), "must be float32 or float64, got bfloat16"),
        ],
    )
    def test_parameters(self, params, message):
        with pytest.raises(TypeError, match=message):
            sde.euler_maruyama(
                self.problem.loss_vector_fn, params, self.problem.data, noise.cov(N, B), **self.good
            )

    def test_noise(self):
        with pytest.raises(ValueError, match=r"num_examples = 7, but data has 20"):
            sde.euler_maruyama(*self.problem, noise.cov(7, 2), **self.good)
        with pytest.raises(
            TypeError, match=r"noise must be a noise.MNoise or a noise.Exchangeable"
        ):
            sde.euler_maruyama(*self.problem, "cov", **self.good)
        impossible = noise.Exchangeable(1.0, -1.0)
        with pytest.raises(ValueError, match="alpha \\+ N beta >= 0"):
            sde.euler_maruyama(*self.problem, impossible, **self.good)

    def test_diffusion_and_drift(self):
        with pytest.raises(ValueError, match=r"vector must have shape \(20,\)"):
            sde.diffusion(*self.problem, noise.cov(N, B), jnp.ones(3))
        with pytest.raises(TypeError, match="learning_rate must be a number, got None"):
            sde.drift(*self.problem, order=2)
