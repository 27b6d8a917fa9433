"""The authors' own form of [M-SGD-Cov]-B, which centres its normals within ghost batches of 100.

The paper's text centres them over all B examples of a step, as `noise.sparse_cov` does. The
covariance of the weights is the same; given the examples of a step, the noise lacks the differences
between ghost batches.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from msgd_jax import noise
from msgd_jax._streams import Stream, derive

GHOST_SIZE = 100
"""The examples over which the authors centre: those of one pass of their code."""


def ghost_cov(
    num_examples: int, batch_size: int, *, support_size: int, ghost_size: int = GHOST_SIZE
) -> noise.MNoise:
    """[M-SGD-Cov]-B with normals that are centred within ghost batches of m examples.

    ``W = (1 + s (eps_i - mean_g eps))/B`` on a uniform subset of B examples, divided at random into
    ghost batches g of m, and 0 elsewhere. As in `noise.sparse_cov`, s is chosen so that the moments
    of W are exactly those of `noise.cov`: ``s^2 = m (B(N-1)/b - (N-B)) / (N(m-1))``.

    Args:
        num_examples: N, at least 2.
        batch_size: b, the batch size of the SGD whose covariance the noise has, between 1 and N.
        support_size: B, the number of examples that a step computes, a multiple of m up to N, for
            which s^2 is not negative.
        ghost_size: m, at least 2.

    Raises:
        ValueError: if a number is out of its range.
    """
    n, b, size, ghost = num_examples, batch_size, support_size, ghost_size
    if not 1 <= b <= n:
        raise ValueError(f"batch_size must be between 1 and {n}, got {b}.")
    if ghost < 2:
        raise ValueError(f"ghost_size must be at least 2, got {ghost}.")
    if not 1 <= size <= n or size % ghost:
        raise ValueError(
            f"support_size must be a multiple of {ghost} examples, within which the normals are "
            f"centred, up to {n}, got {size}."
        )
    variance = ghost * (size * (n - 1) / b - (n - size)) / (n * (ghost - 1))
    if variance < 0:
        raise ValueError(
            f"support_size must be at least {-(-b * n // (n - 1 + b))}, got {size}: drawing so few "
            "examples is already noisier than SGD of the given batch_size."
        )
    scale = math.sqrt(variance)

    def draw(key: Key[Array, ""]) -> noise.Weights:
        subset_key, normal_key = (derive(key, Stream.CASES, which) for which in range(2))
        # The subset is in random order, so that consecutive examples are a random ghost batch.
        subset = noise.permute(subset_key, jnp.arange(size), n)
        normals = jax.random.normal(normal_key, (size // ghost, ghost), jnp.float32)
        centred = normals - normals.mean(1, keepdims=True)
        return noise.Weights((1 + scale * centred.reshape(size)) / size, subset, n)

    name = f"ghost_cov({n}, {b}, support_size={size}, ghost_size={ghost})"
    return noise.MNoise(name, n, size, noise.cov(n, b).covariance, draw)
