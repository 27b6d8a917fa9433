"""Checks of laws: of weights that are drawn, and of covariances that are used."""

from typing import Any

from msgd_jax import _validate
from msgd_jax.noise import Exchangeable, MNoise

Law = MNoise | Exchangeable
"""A law of weights where only its covariance counts: an `MNoise`, or its two exact moments."""


def drawable(name: str, law: Any) -> MNoise:
    """Returns `law` if weights can be drawn from it; raises TypeError."""
    _validate.instance(name, law, MNoise, "noise.MNoise")
    return law


def of_size(name: str, law: MNoise, num_examples: int) -> None:
    """Raises ValueError unless this is a law of so many weights."""
    if law.num_examples != num_examples:
        raise ValueError(
            f"{name} is for num_examples = {law.num_examples}, but the data have {num_examples} "
            "examples."
        )


def eigenvalues(name: str, law: Any, num_examples: int) -> tuple[float, float]:
    """The eigenvalues of Cov(W): across the all-ones vector, and along it.

    Raises:
        TypeError, ValueError: unless `law` is an `MNoise` of so many weights or an `Exchangeable`,
            and is a covariance.
    """
    if isinstance(law, Exchangeable):
        return law.eigenvalues(num_examples)
    if not isinstance(law, MNoise):
        raise TypeError(
            f"{name} must be a noise.MNoise or a noise.Exchangeable, got {_validate.shown(law)}."
        )
    of_size(name, law, num_examples)
    return law.covariance.eigenvalues(num_examples)
