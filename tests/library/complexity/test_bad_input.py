"""Bad input to the local complexities is refused with a clear message."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from msgd_jax import complexity, noise
from tests.support.affine import (
    EXACT,
    KEY,
    affine_losses,
    examples,
    of_problem,
    on_device,
    sample_data,
)


@pytest.mark.usefixtures("user_errors")
class TestBadInput:
    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"radius": -0.1}, "radius must be finite and at least 0, got -0.1"),
            ({"radius": math.nan}, "radius must be finite and at least 0, got nan"),
            ({"radius": np.array([0.1])}, r"radius must be a scalar, got shape \(1,\)"),
            ({"num_draws": 0}, "num_draws must be at least 2, got 0"),
            ({"num_starts": 0}, "num_starts must be at least 1, got 0"),
            ({"num_steps": -1}, "num_steps must be at least 0, got -1"),
            ({"key": None}, "key is needed to draw at random"),
            ({"smoothness": -1.0}, "smoothness must be finite and at least 0, got -1.0"),
            ({"law": complexity.gaussian(5)}, "num_examples = 5, but the data have 7 examples"),
            ({"law": noise.gd(8)}, "num_examples = 8, but the data have 7 examples"),
            ({"l": np.nan}, "not finite at params"),
        ],
    )
    def test_bad_values_are_refused(self, wrong, message):
        law = wrong.pop("law", complexity.gaussian(7))
        data = {**examples(7), "l": examples(7)["l"] * wrong.pop("l", 1.0)}
        options = {"radius": 1.0, "num_draws": 2, "key": KEY, **EXACT, **wrong}
        with pytest.raises(ValueError, match=message):
            of_problem(
                complexity.local_complexity,
                affine_losses,
                jnp.zeros(4),
                on_device(data),
                law,
                **options,
            )

    def test_wrong_types_are_refused(self):
        options = {"radius": 1.0, "num_draws": 2, "key": KEY}
        data, law = on_device(examples(7)), complexity.gaussian(7)
        for changed, message in (
            (
                {"multipliers": "gaussian"},
                "multipliers must be a complexity",
            ),
            ({"optimizer": "adam"}, "optimizer must be an optax.GradientTransformation or None"),
            ({"params": jnp.arange(4)}, "params must be floating point"),
            ({"params": jnp.zeros(4, jnp.bfloat16)}, "params must be float32 or float64"),
        ):
            arguments = {"params": jnp.zeros(4), "multipliers": law, **options, **changed}
            with pytest.raises(TypeError, match=message):
                of_problem(complexity.local_complexity, affine_losses, data=data, **arguments)
        with pytest.raises(TypeError, match="law must be a noise"):
            complexity.from_noise(law)

    @pytest.mark.slow
    def test_losses_must_be_finite_in_the_ball(self):
        def log_losses(params, batch):
            return jnp.log(1 + affine_losses(params, batch))

        data = {"l": jnp.zeros(3), "g": jnp.ones((3, 4))}
        with pytest.raises(ValueError, match="inside the ball: choose a smaller radius"):
            of_problem(
                complexity.local_complexity,
                log_losses,
                jnp.zeros(4),
                data,
                complexity.rademacher(3),
                radius=5.0,
                num_draws=None,
            )

    def test_enumeration_needs_data_that_are_not_drawn(self):
        with pytest.raises(ValueError, match=r"losses must be a loss\.LossVector, not"):
            of_problem(
                complexity.local_complexity,
                affine_losses,
                jnp.zeros(4),
                sample_data,
                complexity.rademacher(32),
                radius=1.0,
                num_draws=None,
            )
