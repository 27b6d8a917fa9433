"""The algorithms of the paper's appendix B by name: the same training step with different laws."""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

from experiments.training._ghost_cov import ghost_cov
from msgd_jax import noise


@dataclasses.dataclass(frozen=True)
class NoiseSettings:
    """The numbers that the noises are built from.

    Attributes:
        batch_size: The batch size b of SGD, which sets the scale of every other noise.
        estimate_size: The number of examples from which [Fisher-b] and [Cov-b] estimate their
            matrices.
        support_size: The number of examples that a step of [M-SGD-Fisher]-b, [M-SGD-Cov]-b and
            SGD-b computes: their large batch, called b in the paper too. It is a multiple of 100
            for [M-SGD-Cov]-b as the authors' own code has it.
        rademacher_scale: The factor of the Rademacher regulariser; None stands for the one at which
            its variances are those of M-SGD-Fisher. The paper tunes it and does not say to what.
        refresh_every: The number of steps for which isotropic noise and the diagonal Langevin
            baseline keep their variances.
    """

    batch_size: int = 50
    estimate_size: int = 50
    support_size: int = 100
    rademacher_scale: float | None = None
    refresh_every: int = 10

    def __post_init__(self):
        if self.refresh_every < 1:
            raise ValueError(f"refresh_every must be at least 1, got {self.refresh_every}.")
        scale = self.rademacher_scale
        if scale is not None and not (math.isfinite(scale) and scale >= 0):
            raise ValueError(
                f"rademacher_scale must be finite and at least 0, or None, got {scale}."
            )


Additive = Literal["none", "diagonal-fisher", "isotropic"]
"""Gaussian noise that is added to the gradient: with the diagonal of F/b, or with the trace of S/b
divided equally among all parameters, as covariance. Neither is multiplicative noise."""


class Algorithm(NamedTuple):
    """An algorithm: its name in figures, and its law of weights for N examples.

    Attributes:
        label: the name; ``{b}`` stands for `batch_size`, ``{M}`` for `support_size`.
        make: makes the law for N examples.
        additive: Gaussian noise that is added to the gradient, for baselines.
    """

    label: str
    make: Callable[[int, NoiseSettings], noise.MNoise]
    additive: Additive = "none"

    def name(self, settings: NoiseSettings) -> str:
        """The label with its numbers."""
        return self.label.format(b=settings.batch_size, M=settings.support_size)


def _rademacher(n: int, settings: NoiseSettings) -> noise.MNoise:
    scale = settings.rademacher_scale
    if scale is None:
        scale = noise.matching_scale(noise.fisher(n, settings.batch_size))
    return noise.rademacher(n, scale)


ALGORITHMS: dict[str, Algorithm] = {
    "gd": Algorithm("GD", lambda n, s: noise.gd(n)),
    "sgd": Algorithm("SGD-{b}", lambda n, s: noise.sgd(n, s.batch_size)),
    "m-sgd-fisher": Algorithm("M-SGD-Fisher", lambda n, s: noise.fisher(n, s.batch_size)),
    "m-sgd-cov": Algorithm("M-SGD-Cov", lambda n, s: noise.cov(n, s.batch_size)),
    "m-sgd-bernoulli": Algorithm("M-SGD-Bernoulli", lambda n, s: noise.bernoulli(n, s.batch_size)),
    "gd-rademacher": Algorithm("GD-Rademacher", _rademacher),
    "m-sgd-estimated-fisher": Algorithm(
        "M-SGD-[Fisher-b]",
        lambda n, s: noise.estimated_fisher(n, s.batch_size, estimate_size=s.estimate_size),
    ),
    "m-sgd-estimated-cov": Algorithm(
        "M-SGD-[Cov-b]",
        lambda n, s: noise.estimated_cov(n, s.batch_size, estimate_size=s.estimate_size),
    ),
    "m-sgd-sparse-fisher": Algorithm(
        "[M-SGD-Fisher]-{M}",
        lambda n, s: noise.sparse_fisher(n, s.batch_size, support_size=s.support_size),
    ),
    "m-sgd-sparse-cov": Algorithm(
        "[M-SGD-Cov]-{M}",
        lambda n, s: noise.sparse_cov(n, s.batch_size, support_size=s.support_size),
    ),
    "m-sgd-ghost-cov": Algorithm(
        "[M-SGD-Cov]-{M}, centred in hundreds",
        lambda n, s: ghost_cov(n, s.batch_size, support_size=s.support_size),
    ),
    "sgd-b": Algorithm("SGD-{M}", lambda n, s: noise.sgd(n, s.support_size)),
    "langevin-diagonal-fisher": Algorithm(
        "Langevin, diagonal Fisher", lambda n, s: noise.gd(n), additive="diagonal-fisher"
    ),
    "gd-isotropic": Algorithm(
        "GD + isotropic noise", lambda n, s: noise.gd(n), additive="isotropic"
    ),
}
