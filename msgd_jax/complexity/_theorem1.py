"""Measurements of Theorem 1: local Gaussian, Rademacher and SGD complexities bound one another."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Key

from msgd_jax import _validate, loss
from msgd_jax._estimate import Estimate
from msgd_jax._typing import Params, PositiveInt, Scalar
from msgd_jax.complexity import _multipliers
from msgd_jax.complexity._ascent import Ascent
from msgd_jax.complexity._local import LocalComplexity, LossVectors, local_complexities, looked_at
from msgd_jax.complexity._multipliers import Multipliers

_ROUNDING = 1e-5  # the rounding of float32 sums, used if there is no sampling error


class Inequality(NamedTuple):
    """``left <= factor * right`` between two measured complexities.

    Attributes:
        name: the inequality as text.
        left: the complexity that is bounded.
        right: the complexity in the bound.
        factor: the constant in the bound.
        ratio: ``left / (factor * right)``, at most 1 if the inequality holds. Its standard error
            takes into account that the two complexities share draws, and its interval is by
            Student's t on the logarithm.
    """

    name: str
    left: LocalComplexity
    right: LocalComplexity
    factor: float
    ratio: Estimate

    @property
    def violated(self) -> bool:
        """Whether the 95 % confidence interval of `ratio` lies above 1."""
        return self.ratio.interval[0] > 1 + _ROUNDING

    def __str__(self) -> str:
        verdict = "VIOLATED" if self.violated else "holds"
        return f"{self.name}: ratio {self.ratio}, {verdict}"


class Theorem1(NamedTuple):
    """The three inequalities of Theorem 1.

    Attributes:
        gaussian_lower: sqrt(2/pi) R(A, N) <= R(G, N), the left of Eq. 10.
        gaussian_upper: ``R(G, N) <= E max|g_i| R(A, N)``, the right of Eq. 10.
        sgd: R(V_sgd, N) <= 2 (1 - b/N) R(A, b), Eq. 11 or its corrected form.
    """

    gaussian_lower: Inequality
    gaussian_upper: Inequality
    sgd: Inequality

    @property
    def violated(self) -> tuple[Inequality, ...]:
        """The inequalities whose confidence interval lies above 1."""
        return tuple(inequality for inequality in self if inequality.violated)


def expected_max_normal(num_examples: int) -> float:
    """``E max |g_i|`` over N independent standard normals: the constant of Eq. 10, right side.

    It is at most sqrt(2 ln(2N)), which grows more slowly than the paper's C ln N. The bound with it
    is attained if each loss can be raised without the others. Computed by quadrature, to 1e-6.

    Args:
        num_examples: N, at least 1.

    Raises:
        TypeError: if `num_examples` is not an integer.
        ValueError: if `num_examples` is not positive.
    """
    n = _validate.positive_int("num_examples", num_examples)
    x = np.linspace(0.0, 12.0, 24_001)
    tails = np.array([math.erfc(t / math.sqrt(2)) for t in x])
    beyond = -np.expm1(n * np.log1p(-np.minimum(tails, 1 - 1e-16)))  # P(max |g_i| > x)
    return float((beyond[1:] + beyond[:-1]).sum() / 2 * (x[1] - x[0]))


def gaussian_inequalities(
    losses: LossVectors,
    params: Params,
    *,
    radius: Scalar,
    key: Key[Array, ""],
    num_draws: PositiveInt,
    ascent: Ascent = Ascent(),  # noqa: B008 (frozen)
) -> tuple[Inequality, Inequality]:
    """Both sides of Eq. 10: ``sqrt(2/pi) R(A, N) <= R(G, N) <= E max|g_i| R(A, N)``.

    They hold for every class of losses, for fixed examples and so for random ones. (The paper's
    C ln N on the right is false for N = 1, and needs C >= 1.63 for larger N.) As with
    `local_complexity`, each call compiles a program and frees it; the two laws share it.

    Args:
        losses: the loss vector, or a function from a PRNG key to one.
        params: the centre of the ball: a pytree of float32 or float64 arrays.
        radius: the radius of the ball, at least 0.
        key: a typed PRNG key, the same for both complexities: their draws and data are paired.
        num_draws: the number of draws per complexity, at least 2.
        ascent: the settings of the search for the suprema.

    Returns:
        The left inequality and the right one. The complexities are too low if the ascents do not
        reach the suprema; the attributes of `LocalComplexity` say how close they come.

    Raises:
        TypeError, ValueError: as `local_complexity`, or if both complexities are 0.
    """
    n = _number_of_examples(losses)
    found = local_complexities(
        losses,
        params,
        _gaussian_laws(n),
        radius=radius,
        key=key,
        num_draws=num_draws,
        ascent=ascent,
    )
    return _gaussian_inequalities(n, *found)


def sgd_inequality(
    losses: LossVectors,
    params: Params,
    *,
    batch_size: PositiveInt,
    radius: Scalar,
    key: Key[Array, ""] | None = None,
    num_draws: PositiveInt | None,
    replace: bool = False,
    bound: str = "corrected",
    ascent: Ascent = Ascent(),  # noqa: B008 (frozen)
) -> Inequality:
    """The local SGD complexity against a Rademacher complexity of b examples, Eq. 11.

    For fixed data R(A, b) is the average over all subsets of b of the N examples. The bounds are:

    ===========  ==================  ======================================================
    bound        sampling            R(V_sgd, N) is at most
    ===========  ==================  ======================================================
    "paper"      either              2 (1 - b/N) R(A, b), for N = k b, k > 1: proved without
                                     replacement, **false with**
    "corrected"  without             the same for every b <= N/2; 2 (1 - b/N) R(A, N - b)
                                     for N/2 < b < N
    "corrected"  with replacement    2 (1 - 1/N) R(A, b), the b drawn with replacement
    ===========  ==================  ======================================================

    A counterexample is the case that all losses but one are 0. Then with replacement the ratio of
    "paper" is (1 - 1/N)^b / (1 - b/N) > 1 for b > 1. As with `local_complexity`, each call compiles
    programs and frees them.

    Args:
        losses: the loss vector, or a function from a PRNG key to one.
        params: the centre of the ball: a pytree of float32 or float64 arrays.
        batch_size: b, between 1 and N - 1.
        radius: the radius of the ball, at least 0.
        key: a typed PRNG key, the same for both complexities.
        num_draws: the number of draws per complexity, at least 2; None for all draws, for small N.
        replace: whether SGD draws with replacement.
        bound: "corrected" or "paper".
        ascent: the settings of the search for the suprema.

    Raises:
        TypeError: as `local_complexity`.
        ValueError: as `local_complexity`; if b is not between 1 and N - 1, or does not divide N
            with the paper's bound; or if both complexities are 0.
    """
    bounded = _SGDBound.of(_number_of_examples(losses), batch_size, replace, bound)
    found = local_complexities(
        losses,
        params,
        bounded.laws,
        radius=radius,
        key=key,
        num_draws=num_draws,
        ascent=ascent,
    )
    return _inequality(bounded.name, found[0], found[1], bounded.factor)


def theorem1(
    losses: LossVectors,
    params: Params,
    *,
    batch_size: PositiveInt,
    radius: Scalar,
    key: Key[Array, ""],
    num_draws: PositiveInt,
    replace: bool = False,
    bound: str = "corrected",
    ascent: Ascent = Ascent(),  # noqa: B008 (frozen)
) -> Theorem1:
    """Measures how tight both parts of Theorem 1 are, with explicit constants.

    As with `local_complexity`, each call compiles programs and frees them: one for the laws over
    all N examples, and one for the signs on a batch.

    Args:
        losses: the loss vector, or a function from a PRNG key to one.
        params: the centre of the ball: a pytree of float32 or float64 arrays.
        batch_size: b of SGD, between 1 and N - 1.
        radius: the radius of the ball, at least 0.
        key: a typed PRNG key.
        num_draws: the number of draws per complexity, at least 2.
        replace: whether SGD draws with replacement.
        bound: the bound on the SGD complexity, as in `sgd_inequality`.
        ascent: the settings of the search for the suprema.

    Raises:
        TypeError, ValueError: as `gaussian_inequalities` and `sgd_inequality`.
    """
    n = _number_of_examples(losses)
    bounded = _SGDBound.of(n, batch_size, replace, bound)
    laws = (*_gaussian_laws(n), *bounded.laws)
    *found, left, right = local_complexities(
        losses,
        params,
        laws,
        radius=radius,
        key=key,
        num_draws=num_draws,
        ascent=ascent,
    )
    sgd = _inequality(bounded.name, left, right, bounded.factor)
    return Theorem1(*_gaussian_inequalities(n, *found), sgd)


def _number_of_examples(losses: LossVectors) -> int:
    return loss.checked_kind(looked_at(losses)).num_examples


def _gaussian_laws(n: int) -> tuple[Multipliers, Multipliers]:
    return _multipliers.rademacher(n), _multipliers.gaussian(n)


def _gaussian_inequalities(
    n: int, rademacher: LocalComplexity, gaussian: LocalComplexity
) -> tuple[Inequality, Inequality]:
    return (
        _inequality("sqrt(2/pi) R(A, N) <= R(G, N)", rademacher, gaussian, math.sqrt(math.pi / 2)),
        _inequality("R(G, N) <= E max|g| R(A, N)", gaussian, rademacher, expected_max_normal(n)),
    )


class _SGDBound(NamedTuple):
    """The two laws that `sgd_inequality` compares, and the constant."""

    name: str
    laws: tuple[Multipliers, Multipliers]
    factor: float

    @classmethod
    def of(cls, n: int, batch_size: PositiveInt, replace: bool, bound: str) -> "_SGDBound":
        """The bound for these arguments; raises TypeError or ValueError if they do not fit."""
        _validate.one_of("bound", bound, ("corrected", "paper"))
        if n < 2:
            raise ValueError("data must have at least 2 examples to have batches of fewer, got 1.")
        b = _validate.positive_int("batch_size", batch_size, maximum=n - 1)
        if bound == "paper" and n % b:
            raise ValueError(
                "batch_size must divide N: Theorem 1 (2) needs N = k b with k > 1, got batch_size "
                f"= {b} and N = {n}. bound='corrected' holds for every b below N."
            )
        with_replacement = replace and bound == "corrected"
        if with_replacement:
            size, factor, constant = b, 2 * (1 - 1 / n), "2 (1 - 1/N)"
        else:
            size, factor, constant = min(b, n - b), 2 * (1 - b / n), "2 (1 - b/N)"
        of = "R(A, b)" if size == b else "R(A, N - b)"
        how = "with" if replace else "without"
        drawn = ", b drawn with replacement" if with_replacement else ""
        laws = (
            _multipliers.sgd(n, b, replace=replace),
            _multipliers.rademacher(n, size, replace=with_replacement),
        )
        return cls(f"R(V_sgd {how} replacement, N) <= {constant} {of}{drawn}", laws, factor)


def _inequality(
    name: str, left: LocalComplexity, right: LocalComplexity, factor: float
) -> Inequality:
    """The inequality, with the standard error of the ratio by the delta method on paired draws."""
    above, below = (np.asarray(x.draws, np.float64) for x in (left, right))
    means = left.estimate.value, right.estimate.value
    if means[1] == 0:
        raise ValueError(
            "The complexities are 0, so they have no ratio: every loss is 0 in the ball, or "
            "radius = 0 and every loss is 0 at params."
        )
    ratio = means[0] / means[1]
    if left.exhaustive:
        return Inequality(name, left, right, factor, Estimate(ratio / factor, 0.0, positive=True))
    residuals = (above - ratio * below) / means[1]
    error = float(residuals.std(ddof=1) / math.sqrt(len(residuals)))
    estimate = Estimate(ratio / factor, error / factor, len(residuals) - 1, positive=True)
    return Inequality(name, left, right, factor, estimate)
