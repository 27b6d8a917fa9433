"""A measured number with its standard error."""

from typing import NamedTuple

_Z95 = 1.959963984540054  # of a two-sided 95 % interval


class Estimate(NamedTuple):
    """A measured number with its standard error."""

    value: float
    standard_error: float

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval, of a normal."""
        margin = _Z95 * self.standard_error
        return self.value - margin, self.value + margin

    def __str__(self) -> str:
        return f"{self.value:.4g} ± {self.standard_error:.2g}"
