"""Checks of laws: of weights that are drawn, and of covariances that are used."""

from typing import Any

from jax.sharding import NamedSharding

from msgd_jax import _mesh, _validate
from msgd_jax.noise import BatchLaw, Exchangeable, MNoise

Law = MNoise | Exchangeable
"""A law of weights where only its covariance counts: an `MNoise`, or its two exact moments."""


def drawable(name: str, law: Any) -> MNoise:
    """Returns `law` if weights can be drawn from it; raises TypeError."""
    if isinstance(law, BatchLaw):
        raise TypeError(
            f"{name} must be a noise.MNoise, got {law.name}, which has no number of examples of "
            "its own: the law of a batch of B examples is law.of(B)."
        )
    _validate.instance(name, law, MNoise, "noise.MNoise")
    return law


def of_steps(name: str, law: Any) -> MNoise | BatchLaw:
    """Returns `law` if it has weights for data that are given at each step; raises TypeError."""
    if not isinstance(law, MNoise | BatchLaw):
        raise TypeError(
            f"{name} must be a noise.MNoise or a noise.BatchLaw, got {_validate.shown(law)}."
        )
    return law


def of_data(
    law: MNoise | BatchLaw, num_examples: int, sharding: NamedSharding | None = None
) -> MNoise:
    """The law of the weights of data with so many examples, known when a step is traced.

    Raises:
        ValueError: if there is none: the error says which law there is for the batches of a loader.
    """
    if isinstance(law, BatchLaw):
        return law.of(num_examples)
    n = law.num_examples
    filled = n + _mesh.missing(n, sharding)
    if num_examples in (n, filled):
        return law
    or_filled = f" ({filled} when filled up for its devices)" if filled > n else ""
    hint = ""
    if num_examples < n:
        hint = (
            f" For batches that a loader draws from {n} examples, of any size, give as the law "
            f"noise.batch_cov({n}, batch_size) or noise.batch_fisher({n}, batch_size)."
        )
    raise ValueError(
        f"law is for num_examples = {n}{or_filled}, but the data have {num_examples} examples on "
        f"their leading axis.{hint}"
    )


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
