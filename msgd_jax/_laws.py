"""Checks of laws, before weights are drawn from them or their covariances are used."""

from typing import Any

from jax.sharding import NamedSharding

from msgd_jax import _mesh, _validate
from msgd_jax.noise import BatchLaw, Exchangeable, MNoise

Law = MNoise | Exchangeable
"""A law of weights, for code that only uses its covariance: an `MNoise` or an `Exchangeable`."""


def drawable(name: str, law: Any) -> MNoise:
    """Returns `law` if it is an `MNoise`, which weights can be drawn from; raises TypeError."""
    if isinstance(law, BatchLaw):
        raise TypeError(
            f"{name} must be a noise.MNoise, got {law.name}, which has no number of examples of "
            "its own: the law of a batch of B examples is law.of(B)."
        )
    _validate.instance(name, law, MNoise, "noise.MNoise")
    return law


def of_steps(name: str, law: Any) -> MNoise | BatchLaw:
    """Returns `law` if it is an `MNoise` or a `BatchLaw`; else raises TypeError."""
    if not isinstance(law, MNoise | BatchLaw):
        raise TypeError(
            f"{name} must be a noise.MNoise or a noise.BatchLaw, got {_validate.shown(law)}."
        )
    return law


def of_data(
    law: MNoise | BatchLaw, num_examples: int, sharding: NamedSharding | None = None
) -> MNoise:
    """The law of the weights of data with `num_examples` examples, known when a step is traced.

    Raises:
        ValueError: if `law` is for another number of examples. The error says which law to use for
            the batches of a loader.
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
    """Raises ValueError unless `law` is for `num_examples` examples."""
    if law.num_examples != num_examples:
        raise ValueError(
            f"{name} is for num_examples = {law.num_examples}, but the data have {num_examples} "
            "examples."
        )


def eigenvalues(name: str, law: Any, num_examples: int) -> tuple[float, float]:
    """The eigenvalues of Cov(W): across the all-ones vector, and along it.

    Raises:
        TypeError: if `law` is neither an `MNoise` nor an `Exchangeable`.
        ValueError: if `law` is for another number of examples, states no covariance, or its two
            numbers are not the covariance of `num_examples` weights.
    """
    if isinstance(law, Exchangeable):
        return law.eigenvalues(num_examples)
    if not isinstance(law, MNoise):
        raise TypeError(
            f"{name} must be a noise.MNoise or a noise.Exchangeable, got {_validate.shown(law)}."
        )
    of_size(name, law, num_examples)
    return law.covariance.eigenvalues(num_examples)
