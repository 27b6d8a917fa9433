"""A measured number with its standard error."""

import math
from typing import NamedTuple


class Estimate(NamedTuple):
    """A measured number with its standard error.

    Attributes:
        value: the number.
        standard_error: its standard error, itself estimated from the same sample.
        degrees_of_freedom: of the standard error: one less than the draws it comes from. Infinite
            where it is known.
    """

    value: float
    standard_error: float
    degrees_of_freedom: float = math.inf

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval, by Student's t with these degrees of freedom."""
        from scipy.stats import t  # here, since it takes a while to import

        margin = float(t.ppf(0.975, self.degrees_of_freedom)) * self.standard_error
        return self.value - margin, self.value + margin

    def __str__(self) -> str:
        return f"{self.value:.4g} ± {self.standard_error:.2g}"
