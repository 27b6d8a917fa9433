"""The algorithms of the paper's appendix B by name: one training step, another M-noise each."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from msgd_jax import noise


@dataclasses.dataclass(frozen=True)
class NoiseSettings:
    """The numbers that the noises are built from.

    Attributes:
        batch_size: b, the batch size of SGD, and the scale of every other noise.
        estimate_size: how many examples [Fisher-b] and [Cov-b] estimate their matrices from.
        support_size: how many examples a step of [M-SGD-Fisher]-b and [M-SGD-Cov]-b computes.
        rademacher_scale: the factor of the Rademacher regulariser; None for the one at which its
          variances are those of M-SGD-Fisher. (The paper tunes it and does not say to what.)
    """

    batch_size: int = 50
    estimate_size: int = 50
    support_size: int = 100
    rademacher_scale: float | None = None


class Algorithm(NamedTuple):
    """An algorithm: its name in figures, and its noise for N examples."""

    label: str
    make: Callable[[int, NoiseSettings], noise.MNoise]


def _rademacher(n: int, settings: NoiseSettings) -> noise.MNoise:
    scale = settings.rademacher_scale
    if scale is None:
        scale = noise.matching_scale(noise.fisher(n, settings.batch_size))
    return noise.rademacher(n, scale)


ALGORITHMS: dict[str, Algorithm] = {
    "gd": Algorithm("GD", lambda n, s: noise.gd(n)),
    "sgd": Algorithm("SGD", lambda n, s: noise.sgd(n, s.batch_size)),
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
        "[M-SGD-Fisher]-b",
        lambda n, s: noise.sparse_fisher(n, s.batch_size, support_size=s.support_size),
    ),
    "m-sgd-sparse-cov": Algorithm(
        "[M-SGD-Cov]-b",
        lambda n, s: noise.sparse_cov(n, s.batch_size, support_size=s.support_size),
    ),
}
