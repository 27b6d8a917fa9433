"""One row for every law: the contract tests run over this table."""

import functools
from collections.abc import Callable
from typing import NamedTuple

from msgd_jax import noise


class Row(NamedTuple):
    """How to build a law for N examples at batch size b, and what its draws may be.

    Attributes:
        make: maps N, b and ``dtype=`` to the law.
        smallest: the fewest examples for which the law is defined.
        repeats: whether a draw can list an example more than once.
    """

    make: Callable[..., noise.MNoise]
    smallest: int = 1
    repeats: bool = False


def _half(n: int) -> int:
    """Half of the examples, and two at least, since a sample covariance needs two."""
    return max(2, (n + 1) // 2)


ROWS: dict[str, Row] = {
    "gd": Row(lambda n, b, **kw: noise.gd(n, **kw)),
    "sgd": Row(noise.sgd),
    "sgd_replace": Row(lambda n, b, **kw: noise.sgd(n, b, replace=True, **kw), repeats=True),
    "fisher": Row(noise.fisher),
    "cov": Row(noise.cov),
    "bernoulli": Row(noise.bernoulli),
    "rademacher": Row(
        lambda n, b, **kw: noise.rademacher(n, noise.matching_scale(noise.fisher(n, b)), **kw)
    ),
    "estimated_fisher": Row(
        lambda n, b, **kw: noise.estimated_fisher(n, b, estimate_size=(n + 1) // 2, **kw)
    ),
    "estimated_cov": Row(
        lambda n, b, **kw: noise.estimated_cov(n, b, estimate_size=_half(n), **kw), smallest=2
    ),
    "sparse_fisher": Row(
        lambda n, b, **kw: noise.sparse_fisher(n, b, support_size=max(b, (n + 1) // 2), **kw)
    ),
    "sparse_fisher_gaussian": Row(
        lambda n, b, **kw: noise.sparse_fisher(n, b, support_size=b, matching="gaussian", **kw)
    ),
    "sparse_cov": Row(
        lambda n, b, **kw: noise.sparse_cov(n, b, support_size=max(b, _half(n)), **kw), smallest=2
    ),
    "sparse_cov_gaussian": Row(
        lambda n, b, **kw: noise.sparse_cov(
            n, b, support_size=max(b, 2), matching="gaussian", **kw
        ),
        smallest=2,
    ),
    "random_reshuffling": Row(
        lambda n, b, **kw: noise.random_reshuffling(n, b, drop_remainder=True, **kw)
    ),
    "student_t": Row(functools.partial(noise.student_t, degrees_of_freedom=10)),
    "scaled": Row(lambda n, b, **kw: noise.scaled(noise.cov(n, b, **kw), 0.7)),
    "scaled_reshuffling": Row(
        lambda n, b, **kw: noise.scaled(
            noise.random_reshuffling(n, b, drop_remainder=True, **kw), 1.5
        )
    ),
    "sum_of": Row(lambda n, b, **kw: noise.sum_of(noise.sgd(n, b, **kw), noise.fisher(n, b, **kw))),
    "mixture": Row(
        lambda n, b, **kw: noise.mixture([noise.sgd(n, b, **kw), noise.sgd(n, 1, **kw)], [0.6, 0.4])
    ),
    "coloured": Row(lambda n, b, **kw: noise.coloured(noise.cov(n, b, **kw), (1.0, 0.5, -0.25))),
    "coloured_sparse": Row(
        lambda n, b, **kw: noise.coloured(noise.sgd(n, b, **kw), (0.75, 0.25)), repeats=True
    ),
    "svag": Row(lambda n, b, **kw: noise.svag(noise.sgd(n, b, **kw), refinement=3), repeats=True),
}


def cases(*sizes: tuple[int, int]) -> list[tuple[str, int, int]]:
    """(name, N, b) for every law and every given (N, b) for which the law is defined."""
    return [(name, n, b) for name, row in ROWS.items() for n, b in sizes if n >= row.smallest]
