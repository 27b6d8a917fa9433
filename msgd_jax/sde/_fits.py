"""Orders of convergence: lines through measured errors, with what the sampling leaves uncertain."""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from msgd_jax._estimate import Estimate


class Fit(NamedTuple):
    """A line fitted by least squares, points weighted by their standard errors.

    Attributes:
        intercept: its value at 0.
        slope: its slope.
        chi_square: sum of squared residuals, in standard errors.
        degrees_of_freedom: what `chi_square` is to be compared with: points less 2.
    """

    intercept: Estimate
    slope: Estimate
    chi_square: float
    degrees_of_freedom: int


@dataclasses.dataclass(frozen=True, eq=False)
class ErrorSweep:
    """Errors against learning rate.

    Attributes:
        learning_rates: eta, [E].
        errors: of `strong_error`, root mean squares over paths, [E]; of `weak_error`, differences
            of expectations, iteration less SDE, which have a sign.
        standard_errors: of `errors`, [E]; 0 where nothing is random.
    """

    learning_rates: Float[NDArray[np.float64], " E"]
    errors: Float[NDArray[np.float64], " E"]
    standard_errors: Float[NDArray[np.float64], " E"]

    @property
    def order(self) -> Estimate:
        """The slope of ``log |error|`` against log eta, weighted by the standard errors.

        Its own standard error is what sampling leaves; a curve through the points is not in it: see
        `order_fit.chi_square`.

        Raises:
            ValueError: if there are fewer than two learning rates, or an error is 0.
        """
        return self.order_fit.slope

    @property
    def order_fit(self) -> Fit:
        """The line through ``log |error|`` against log eta."""
        size = np.abs(self.errors)
        if not (size > 0).all():
            raise ValueError(f"errors must not be 0 to have an order, got {self.errors}.")
        return fit_line(np.log(self.learning_rates), np.log(size), self.standard_errors / size)

    @property
    def error_model(self) -> "ErrorModel":
        """The fit of errors^2 = a^2 eta^2 + c eta^3, for the errors of `strong_error`.

        The deterministic Euler error of the drift is a * eta, the same for every noise; what the
        noise adds is of order 3/2.
        """
        rates = self.learning_rates
        squares = (self.errors / rates) ** 2
        deviations = 2 * np.abs(self.errors) * self.standard_errors / rates**2
        line = fit_line(rates, squares, deviations)
        square, spread = line.intercept[:2]
        a = math.sqrt(max(square, 0.0))
        spread = spread / (2 * a) if square > spread else math.sqrt(spread)
        return ErrorModel(Estimate(a, spread), line.slope, line.chi_square, line.degrees_of_freedom)


class ErrorModel(NamedTuple):
    """errors^2 = a^2 eta^2 + c eta^3.

    Attributes:
        deterministic: a.
        noise: c.
        chi_square: of the fit.
        degrees_of_freedom: points less 2.
    """

    deterministic: Estimate
    noise: Estimate
    chi_square: float
    degrees_of_freedom: int


def fit_line(
    x: Float[NDArray[np.floating[Any]], " E"],
    y: Float[NDArray[np.floating[Any]], " E"],
    standard_errors: Float[NDArray[np.floating[Any]], " E"],
) -> Fit:
    """Weighted least squares; where a standard error is 0, unweighted, judged by its residuals.

    Args:
        x: abscissae, at least two different ones.
        y: ordinates.
        standard_errors: of `y`.

    Raises:
        ValueError: if there are not two different abscissae.
    """
    x, y, errors = (np.asarray(values, np.float64) for values in (x, y, standard_errors))
    if np.unique(x).size < 2:
        raise ValueError(f"learning_rates must hold two different ones to fit a line, got {x}.")
    exact = not (errors > 0).all()
    weights = np.ones_like(x) if exact else errors**-2
    design = np.stack([np.ones_like(x), x], 1)
    covariance = np.linalg.inv(design.T @ (weights[:, None] * design))
    coefficients = covariance @ (design.T @ (weights * y))
    chi_square = float(weights @ (y - design @ coefficients) ** 2)
    freedom = x.size - 2
    if exact:
        covariance = covariance * (chi_square / freedom if freedom else 0.0)
    intercept, slope = (
        Estimate(float(value), math.sqrt(variance))
        for value, variance in zip(coefficients, np.diag(covariance), strict=True)
    )
    return Fit(intercept, slope, chi_square, freedom)
