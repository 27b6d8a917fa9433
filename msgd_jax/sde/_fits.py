"""Orders of convergence: lines fitted to measured errors, with their uncertainties."""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from msgd_jax import _validate
from msgd_jax._estimate import Estimate

MODEL_PATHS = 32  # with fewer skewed squares, the interval of a mean covers less than 92 %

Numbers = Float[np.ndarray, " E"]


class Fit(NamedTuple):
    """A line fitted by least squares, with points weighted by their standard errors.

    Attributes:
        intercept: the value of the line at 0.
        slope: the slope of the line.
        chi_square: the sum of squared residuals in units of standard errors; nan if these are 0.
        degrees_of_freedom: the degrees of freedom of `chi_square`: the number of points less 2.
        p_value: the probability of a `chi_square` at least this large if the points are on a line;
            nan if there are two points, or their standard errors are 0.
    """

    intercept: Estimate
    slope: Estimate
    chi_square: float
    degrees_of_freedom: int
    p_value: float


@dataclasses.dataclass(frozen=True, eq=False)
class ErrorSweep:
    """Errors at several learning rates.

    The single errors have standard errors but no intervals, since an interval for a root mean
    square of few skewed distances cannot be trusted. Orders have intervals: see `fit_line`.

    Attributes:
        learning_rates: eta, [E].
        errors: for `strong_error`, root mean squares over paths, [E]; for `weak_error`, differences
            of expectations, iteration less SDE, which have a sign.
        standard_errors: the standard errors of `errors`, [E]; 0 if nothing is random.
        degrees_of_freedom: those of `standard_errors`, [E] or one number for all; infinite if the
            standard errors are known exactly.
    """

    learning_rates: Float[np.ndarray, " E"]
    errors: Float[np.ndarray, " E"]
    standard_errors: Float[np.ndarray, " E"]
    degrees_of_freedom: Any = math.inf

    @property
    def order(self) -> Estimate:
        """The slope of ``log |error|`` against log eta, which is the slope of `order_fit`.

        Raises:
            ValueError: if there are fewer than two learning rates, or an error is 0.
        """
        return self.order_fit.slope

    @property
    def order_fit(self) -> Fit:
        """The line through ``log |error|`` against log eta, by `fit_line`.

        A small `p_value` says that the points are on a curve: then there is no single order, and
        the interval of the slope is widened by the distance of the points from the line.
        """
        size = np.abs(self.errors)
        if not (size > 0).all():
            raise ValueError(f"errors must not be 0 to have an order, got {self.errors}.")
        relative = self.standard_errors / size
        return fit_line(
            np.log(self.learning_rates), np.log(size), relative, self.degrees_of_freedom
        )

    @property
    def error_model(self) -> "ErrorModel":
        """The fit of ``errors^2 = a^2 eta^2 + c eta^3``, for the errors of `strong_error`.

        The deterministic Euler error of the drift is a * eta, the same for every law; the error
        that the noise adds is of order 3/2.

        Raises:
            ValueError: if there are fewer than two learning rates, or the standard errors come from
                fewer than 32 paths. Squares are skewed: with fewer of them, intervals of their
                means cover less than 92 %, and means weighted by standard errors are too low.
        """
        random = (self.standard_errors > 0).any()
        paths = 1 + np.min(self.degrees_of_freedom)
        if random and paths < MODEL_PATHS:
            raise ValueError(
                f"num_paths must be at least {MODEL_PATHS} for an error_model, got {paths:g}: "
                "squared distances are skewed, so means of few of them are less certain than "
                "their standard errors say."
            )
        rates = self.learning_rates
        ratios = np.abs(self.errors) / rates
        scale = float(ratios.max()) or 1.0  # scaled, since squares could overflow or vanish
        ratios = ratios / scale
        deviations = 2 * ratios * (self.standard_errors / (rates * scale))
        line = fit_line(rates, ratios**2, deviations, self.degrees_of_freedom)
        square, spread, freedom, _ = line.intercept
        a = math.sqrt(max(square, 0.0))
        spread = spread / (2 * a) if square > spread else math.sqrt(spread)
        noise = line.slope
        return ErrorModel(
            Estimate(scale * a, scale * spread, freedom),
            Estimate(
                scale * (scale * noise.value),
                scale * (scale * noise.standard_error),
                noise.degrees_of_freedom,
            ),
            *line[2:],
        )


class ErrorModel(NamedTuple):
    """The fit of ``errors^2 = a^2 eta^2 + c eta^3``.

    Attributes:
        deterministic: a.
        noise: c.
        chi_square: as in `Fit`.
        degrees_of_freedom: the number of points less 2.
        p_value: as in `Fit`.
    """

    deterministic: Estimate
    noise: Estimate
    chi_square: float
    degrees_of_freedom: int
    p_value: float


def fit_line(
    x: Numbers, y: Numbers, standard_errors: Numbers, degrees_of_freedom: Any = math.inf
) -> Fit:
    """Weighted least squares, with intervals that depend on how well the line fits.

    * If the residuals are no larger than the standard errors say, the standard errors of the
      coefficients follow from those of the points, with Satterthwaite's degrees of freedom.
    * If they are larger, the points are not on a line or their errors are larger than stated: the
      standard errors are multiplied by Birge's ratio sqrt(chi_square / (points - 2)), and
      Student's t has points - 2 degrees of freedom.
    * If a standard error is 0, the fit is unweighted and its errors follow from the residuals, with
      points - 2 degrees of freedom; for two such points the standard errors are nan.

    With four points and at least 4 draws for each, 95 % intervals cover 93 to 98 %, also for skewed
    draws. Two points are always on a line: the interval counts the sampling errors only, with the
    smaller of the points' degrees of freedom instead of Satterthwaite's, since no third point shows
    whether skewed draws have errors beyond their standard errors. It covers 92 to 98 % (98.5 % for
    4 draws that are little skewed).

    Args:
        x: the abscissae, [points], at least two different ones.
        y: the ordinates, [points].
        standard_errors: the standard errors of `y`, [points].
        degrees_of_freedom: those of `standard_errors`, [points] or one for all: one less than the
            number of draws that they come from; infinite if they are known exactly.

    Raises:
        ValueError: if there are not two different abscissae, or a number is not finite.
    """
    x, y, errors = (np.asarray(values, np.float64) for values in (x, y, standard_errors))
    freedoms = np.broadcast_to(np.asarray(degrees_of_freedom, np.float64), x.shape)
    if np.unique(x).size < 2:
        raise ValueError(
            f"learning_rates must hold two different ones to fit a line, got {_validate.shown(x)}."
        )
    for name, values in (("x", x), ("y", y), ("standard_errors", errors)):
        if not np.isfinite(values).all():
            raise ValueError(f"{name} must be finite to fit a line, got {values}.")
    known = bool((errors > 0).all())
    weights = (
        (errors.min() / errors) ** 2 if known else np.ones_like(x)
    )  # as ratios, which do not overflow
    centre = weights @ x / weights.sum()
    slopes = weights * (x - centre)
    slopes = slopes / (slopes @ (x - centre))
    intercepts = weights / weights.sum() - centre * slopes
    coefficients = np.array([intercepts @ y, slopes @ y])
    residuals = y - coefficients[0] - coefficients[1] * x
    degrees = x.size - 2
    if known:
        chi_square = float(((residuals / errors) ** 2).sum())
        ratio = math.sqrt(chi_square / degrees) if degrees else 1.0
    else:
        chi_square = math.nan
        ratio = math.sqrt(residuals @ residuals / degrees) if degrees else math.nan
        errors, freedoms = np.ones_like(x), np.full_like(x, math.inf)

    def estimate(value: float, parts: Float[np.ndarray, " E"]) -> Estimate:
        # By `hypot`, since squares of small errors vanish.
        error, freedom = math.hypot(*parts), satterthwaite(parts, freedoms)
        if not degrees:
            freedom = float(freedoms.min())
        if known and ratio <= 1:
            return Estimate(value, error, freedom)
        return Estimate(value, ratio * error, min(freedom, degrees))

    intercept, slope = (
        estimate(float(value), of_each * errors)
        for value, of_each in zip(coefficients, (intercepts, slopes), strict=True)
    )
    return Fit(intercept, slope, chi_square, degrees, _p_value(chi_square, degrees, freedoms))


def satterthwaite(parts: Any, degrees_of_freedom: Any) -> float:
    """The degrees of freedom of the root of a sum of squares (Satterthwaite 1946)."""
    parts = np.abs(np.asarray(parts, np.float64))
    if not (parts > 0).any():
        return math.inf
    squares = (parts / parts.max()) ** 2
    rest = float((squares**2 / degrees_of_freedom).sum())
    return float(squares.sum()) ** 2 / rest if rest > 0 else math.inf


def _p_value(chi_square: float, degrees: int, freedoms: Float[np.ndarray, " E"]) -> float:
    """The p-value by the F distribution, which is chi-square if standard errors are known."""
    from scipy import stats  # imported here, since scipy.stats is slow to import

    if degrees == 0 or math.isnan(chi_square):
        return math.nan
    if np.isinf(freedoms).all():
        return float(stats.chi2.sf(chi_square, degrees))
    return float(stats.f.sf(chi_square / degrees, degrees, float(freedoms.min())))
