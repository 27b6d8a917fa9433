"""A measured number with its standard error."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def t_quantile(degrees_of_freedom: Any) -> Any:
    """The 97.5 % quantile of Student's t; for a traced number interpolated, to 4 digits."""
    from scipy.special import stdtrit  # imported here, since it takes time

    if not isinstance(degrees_of_freedom, Tracer):
        return float(stdtrit(float(degrees_of_freedom), 0.975))
    inverse = np.linspace(0, 1, 257)
    with np.errstate(divide="ignore"):
        logs = np.log(stdtrit(1 / inverse, 0.975))
    return jnp.exp(jnp.interp(1 / degrees_of_freedom, inverse, logs))


class Estimate(NamedTuple):
    """A measured number with its standard error.

    Attributes:
        value: the number.
        standard_error: its standard error, itself estimated from the same sample.
        degrees_of_freedom: the degrees of freedom of the standard error: one less than the number
            of draws that it is estimated from; infinite where the standard error is known exactly.
        positive: whether the number cannot be negative. If so, the interval is computed for its
            logarithm, which covers better where few draws of a skew distribution are averaged.
    """

    value: float
    standard_error: float
    degrees_of_freedom: float = math.inf
    positive: bool = False

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval, by Student's t with these degrees of freedom.

        Where the standard error is infinite, or the value is infinite and its standard error is not
        0, the interval excludes nothing: it is the whole line, or [0, inf) for a positive number.
        """
        if self.standard_error and (math.isinf(self.value) or math.isinf(self.standard_error)):
            return (0.0 if self.positive else -math.inf), math.inf
        margin = t_quantile(self.degrees_of_freedom) * self.standard_error
        if not self.positive or self.value <= 0:
            return self.value - margin, self.value + margin
        factor = math.exp(min(margin / self.value, 700.0))
        return self.value / factor, self.value * factor

    def __str__(self) -> str:
        return f"{self.value:.4g} ± {self.standard_error:.2g}"
