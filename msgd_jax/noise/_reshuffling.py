"""Random reshuffling: batches from shuffled epochs, which most training loops use."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from msgd_jax import _validate
from msgd_jax._values import bound
from msgd_jax.noise import _building_blocks
from msgd_jax.noise._permutation import permute
from msgd_jax.noise._types import Exchangeable, MNoise, Weights


def random_reshuffling(
    num_examples: int, batch_size: int, *, drop_remainder: bool = False, dtype: Any = jnp.float32
) -> MNoise:
    """SGD through shuffled epochs: weight 1/b on the examples of one batch of a partition.

    An epoch is N/b steps, and its batches partition the examples; each epoch has a permutation of
    its own. The batch of step t is a function of (key, t), computed in O(b) time and memory for any
    N (see `permute`), so runs can resume anywhere.

    A single step has exactly the law, and so the covariance, of `sgd` without replacement. The
    steps of one epoch are not independent, since an example is in one batch of the epoch only: for
    s != t, Cov(W_s,i, W_t,i) = -1/N^2 and Cov(W_s,i, W_t,j) = 1/(N^2 (N-1)). Steps of different
    epochs are independent. `covariance_between` states these numbers. They are exact for
    N <= 1,024; above, they hold to within the deviation that `permute` states.

    Args:
        num_examples: N, between 1 and 2^31 - 1.
        batch_size: b, between 1 and N.
        drop_remainder: whether an epoch may leave out N mod b examples, which differ from epoch to
            epoch; if not, b must divide N.
        dtype: of the weights, float32 or float64.

    Raises:
        TypeError: if `num_examples` or `batch_size` is not an integer.
        ValueError: if one of them is out of its range, b does not divide N and `drop_remainder` is
            false, or `dtype` is neither float32 nor float64.

    Example:
        >>> from msgd_jax import noise
        >>> law, key = noise.random_reshuffling(6, batch_size=2), jax.random.key(0)
        >>> sorted(int(i) for step in range(3) for i in law.sample(key, step).indices)
        [0, 1, 2, 3, 4, 5]
        >>> law.covariance_between(0, 1).diagonal < 0, law.covariance_between(2, 3).diagonal
        (True, 0.0)
    """
    n, b = _building_blocks.sizes(num_examples, batch_size)
    dtype = _validate.wide_float_dtype("dtype", dtype)
    if n % b and not drop_remainder:
        raise ValueError(
            f"batch_size must divide num_examples = {n}, got {b}, which leaves {n % b} examples "
            "over: drop_remainder=True leaves out that many per epoch, chosen anew in each."
        )
    steps = n // b  # per epoch
    return MNoise(
        f"random_reshuffling({n}, {b}, drop_remainder={drop_remainder})",
        n,
        b,
        _building_blocks.subset_covariance(n, b),
        bound(_draw, n, b, dtype),
        bound(_draw_at, n, b, steps, dtype),
        bound(_between, n, steps),
    )


def _draw(n: int, b: int, dtype: jnp.dtype, key: Key[Array, ""]) -> Weights:
    return _weights(n, b, dtype, _building_blocks.subset(key, n, b))


def _draw_at(
    n: int, b: int, steps: int, dtype: jnp.dtype, key: Key[Array, ""], step: Int[Array, ""]
) -> Weights:
    epoch, batch = jnp.divmod(step, steps)
    positions = batch * b + jnp.arange(b, dtype=jnp.int32)
    return _weights(n, b, dtype, permute(jax.random.fold_in(key, epoch), positions, n))


def _weights(n: int, b: int, dtype: jnp.dtype, indices: Int[Array, " batch"]) -> Weights:
    return Weights(jnp.full(b, 1 / b, dtype), indices, n)


def _between(n: int, steps: int, step: int, other: int) -> Exchangeable:
    if step // steps == other // steps:
        return _building_blocks.centred_covariance(n, -1 / n**2)
    return Exchangeable(0.0, 0.0)
