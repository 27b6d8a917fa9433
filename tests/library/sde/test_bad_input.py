"""Bad input to drift, diffusion and `euler_maruyama` is refused with a clear message."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msgd_jax import noise, sde
from tests.support.problems import of_sde
from tests.support.sde_problems import logistic

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
            ({"num_steps": 0}, ValueError, "num_steps must be between 1 and .*, got 0"),
            ({"num_steps": 2.0}, TypeError, "num_steps must be an integer"),
            ({"substeps": 3}, ValueError, "substeps must be a power of two, got 3"),
            ({"substeps": 0}, ValueError, "substeps must be between 1 and 65536, got 0"),
            ({"save_at": [4]}, ValueError, "save_at must be between 0 and 3, got 4"),
            ({"save_at": [2, 1]}, ValueError, "ascending"),
            ({"first_step": 3}, ValueError, "first_step must be between 0 and 2, got 3"),
            ({"save_at": [0], "first_step": 1}, ValueError, "save_at must be between 1 and 3"),
            ({"save_at": []}, ValueError, "at least one"),
            ({"save_at": 3}, TypeError, r"save_at must be a sequence of .*\[10, 20\].*got 3 of ty"),
            ({"save_at": "3"}, TypeError, "save_at must be a sequence of iterations"),
            ({"save_at": np.array(3)}, TypeError, "save_at must be a sequence of iterations"),
            ({"save_at": np.ones((2, 2), int)}, TypeError, "save_at must be .*an array of shape"),
            ({"save_at": [1.5]}, TypeError, "save_at must be an integer, got 1.5"),
            ({"num_steps": jnp.ones(2, int)}, ValueError, "num_steps must be a scalar"),
            ({"num_steps": jnp.int32(0)}, ValueError, "num_steps must be between 1 and"),
            ({"first_step": -1}, ValueError, "first_step must be between 0 and 2, got -1"),
            ({"first_step": True}, TypeError, "first_step must be an integer"),
            ({"order": 3}, ValueError, "order must be between 1 and 2, got 3"),
            ({"key": 0}, TypeError, "key must be a typed PRNG key"),
            ({"microbatch_size": 0}, ValueError, "microbatch_size must be at least 1"),
        ],
    )
    def test_bad_arguments_are_refused(self, change, error, message):
        with pytest.raises(error, match=message):
            of_sde(sde.euler_maruyama, *self.problem, noise.cov(N, B), **{**self.good, **change})

    @pytest.mark.parametrize(
        ("params", "message"),
        [
            (jnp.arange(5), "must be floating point"),
            (jnp.ones(5, jnp.bfloat16), "must be float32 or float64, got bfloat16"),
        ],
    )
    def test_parameters_must_be_float32_or_float64(self, params, message):
        with pytest.raises(TypeError, match=message):
            of_sde(
                sde.euler_maruyama,
                self.problem.loss_vector_fn,
                params,
                self.problem.data,
                noise.cov(N, B),
                **self.good,
            )

    def test_a_law_that_does_not_fit_is_refused(self):
        with pytest.raises(ValueError, match=r"num_examples = 7, but the data have 20"):
            of_sde(sde.euler_maruyama, *self.problem, noise.cov(7, 2), **self.good)
        with pytest.raises(TypeError, match=r"law must be a noise.MNoise or a noise.Exchangeable"):
            of_sde(sde.euler_maruyama, *self.problem, "cov", **self.good)
        with pytest.raises(TypeError, match="got <function cov at") as refused:
            of_sde(sde.euler_maruyama, *self.problem, noise.cov, **self.good)
        assert len(str(refused.value)) < 400
        impossible = noise.Exchangeable(1.0, -1.0)
        with pytest.raises(ValueError, match="alpha \\+ N beta >= 0"):
            of_sde(sde.euler_maruyama, *self.problem, impossible, **self.good)

    @pytest.mark.parametrize("where", ["array", "jax"])
    def test_iterations_may_be_integers_of_any_kind(self, where):
        save_at = np.array([1, 3], np.uint8) if where == "array" else jnp.array([1, 3])
        options = {**self.good, "num_steps": np.int64(3), "save_at": save_at}
        path = of_sde(sde.euler_maruyama, *self.problem, noise.cov(N, B), **options)
        assert path.steps.tolist() == [1, 3]

    @pytest.mark.parametrize(
        "call",
        {
            "coupling": lambda problem, law: sde.coupling(law, N),
            "diffusion": lambda problem, law: of_sde(sde.diffusion, *problem, law, jnp.ones(N)),
            "euler_maruyama": lambda problem, law: of_sde(
                sde.euler_maruyama, *problem, law, **TestBadInput.good
            ),
            **{
                measure.__name__: lambda problem, law, measure=measure: of_sde(
                    measure,
                    *problem,
                    law,
                    learning_rates=[0.1],
                    horizon=0.1,
                    num_paths=4,
                    key=jax.random.key(0),
                )
                for measure in (sde.strong_error, sde.weak_error)
            },
        }.items(),
        ids=lambda item: item[0],
    )
    def test_laws_of_dependent_steps_are_refused(self, call):
        """The covariance of one step does not describe them, but may be given on purpose."""
        law = noise.random_reshuffling(N, B)
        message = r"independent steps, .* got random_reshuffling\(20, 4.* Use noise.sgd\(N, b\)"
        with pytest.raises(ValueError, match=message) as refused:
            call[1](self.problem, law)
        assert len(str(refused.value)) <= 400
        if call[0] != "weak_error":  # which draws the iteration, and needs a law for that
            call[1](self.problem, law.covariance)

    def test_bad_arguments_of_diffusion_and_drift_are_refused(self):
        with pytest.raises(ValueError, match=r"vector must have shape \(20,\)"):
            of_sde(sde.diffusion, *self.problem, noise.cov(N, B), jnp.ones(3))
        with pytest.raises(TypeError, match="learning_rate must be a number, got None"):
            of_sde(sde.drift, *self.problem, order=2)
