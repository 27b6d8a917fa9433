"""Bad input to `strong_error` and `weak_error` is refused with a clear message."""

import jax
import pytest

from msgd_jax import loss, noise, sde
from tests.library.sde.test_errors import COV, LOGISTIC
from tests.support.problems import of_sde


@pytest.mark.usefixtures("user_errors")
class TestBadInput:
    good = {  # noqa: RUF012
        "learning_rates": [0.1],
        "horizon": 0.2,
        "num_paths": 4,
        "key": jax.random.key(0),
    }

    @pytest.mark.parametrize("measure", [sde.strong_error, sde.weak_error])
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (
                {"learning_rates": [0.1, 0.0]},
                ValueError,
                "learning_rates must be finite and above 0",
            ),
            ({"learning_rates": []}, ValueError, "at least one"),
            ({"learning_rates": 0.1}, TypeError, "learning_rates must be a sequence .* got 0.1"),
            ({"learning_rates": "0.1"}, TypeError, "learning_rates must be a sequence"),
            (
                {"learning_rates": [0.15]},
                ValueError,
                "must divide horizon = 0.2 .* got 0.15, which makes 1.33",
            ),
            ({"learning_rates": [0.4]}, ValueError, "must divide horizon"),
            ({"horizon": -1.0}, ValueError, "horizon must be finite and above 0, got -1.0"),
            ({"num_paths": 3}, ValueError, "num_paths must be at least 4, got 3"),
            ({"at_once": 0}, ValueError, "at_once must be at least 1"),
            ({"substeps": 12}, ValueError, "substeps must be a power of two, got 12"),
            ({"order": 0}, ValueError, "order must be between 1 and 2"),
            (
                {"iterate": noise.cov(7, 2)},
                ValueError,
                "iterate is for num_examples = 7, but the data have 32",
            ),
            ({"iterate": "cov"}, TypeError, "iterate must be"),
            (
                {"learning_rates": [1e6], "horizon": 1e8},
                ValueError,
                "at 1e\\+06, .* left the finite",
            ),
        ],
    )
    def test_bad_arguments_are_refused(self, measure, change, error, message):
        problem = LOGISTIC
        if "horizon" in change and change["horizon"] > 1e6:  # needs a loss that can diverge
            problem = problem._replace(
                loss_vector_fn=loss.per_example(lambda theta, x: (theta @ theta - x[1]) ** 4)
            )
        with pytest.raises(error, match=message):
            of_sde(measure, *problem, COV, **{**self.good, **change})

    @pytest.mark.parametrize(
        ("test_fn", "got"),
        [
            (lambda params, data: params, r"float32\[5\]"),
            (lambda params, data: params.sum() > 0, r"bool\[\]"),
            (lambda params, data: (params.sum(), 0), "tuple"),
        ],
    )
    def test_test_functions_must_return_a_scalar(self, test_fn, got):
        with pytest.raises(ValueError, match=f"test_fn must return a scalar .*{got}"):
            of_sde(sde.weak_error, *LOGISTIC, COV, test_fn=test_fn, **self.good)

    def test_a_weak_error_needs_a_law_that_draws(self):
        with pytest.raises(TypeError, match=r"iterate must be the noise\.MNoise"):
            of_sde(sde.weak_error, *LOGISTIC, noise.Exchangeable(0.1, 0.0), **self.good)
