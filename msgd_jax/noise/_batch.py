"""Laws for a batch that was drawn elsewhere: by a data loader, a generator or a stream."""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from msgd_jax import _validate
from msgd_jax._values import bound
from msgd_jax.noise import _building_blocks
from msgd_jax.noise._types import Exchangeable, MNoise, Weights


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class BatchLaw:
    """The laws of the weights of loaded batches of any size; see `batch_cov` and `batch_fisher`.

    The batch is random and so part of the noise: its weights add only the rest. `of` gives the law
    of the weights of B examples, an `MNoise` of B examples with mean 1/B.

    `train`, `transform` and `loss` take a batch law directly: B is then the length of the data of
    each step, which is known when the step is traced. A smaller last batch has a law of its own,
    with the scale for its size, and ``jax.jit`` compiles the step once per size.

    Attributes:
        num_examples: N, how many examples the loader draws from; None for a stream.
        batch_size: b, the batch size of the SGD whose noise is wanted.
        centred: whether the covariance wanted is S/b, as in `cov`, or F/b, as in `fisher`.
        matching: the part of the noise that has this covariance, "total" or "gaussian".
        dtype: of the weights, float32 or float64.
    """

    num_examples: int | None
    batch_size: float | int
    centred: bool
    matching: str
    dtype: Any

    @property
    def name(self) -> str:
        """The constructor and its arguments, for messages."""
        kind = "batch_cov" if self.centred else "batch_fisher"
        return f"{kind}({self.num_examples}, {self.batch_size}, matching={self.matching!r})"

    @property
    def smallest(self) -> int:
        """The smallest number of examples in a batch for which the law exists."""
        n, b = self.num_examples, self.batch_size
        if self.matching == "gaussian":
            return 2 if self.centred else 1
        if self.centred:
            return 1 if b == 1 else max(2, math.ceil(b if n is None else b * n / (n - 1 + b)))
        return max(2, math.ceil(b + 1 if n is None else n * (b + 1) / (n + b)))

    def of(self, size: int) -> MNoise:
        """The law of the weights of a batch of `size` examples.

        Its `covariance` is the one of the weights given the batch, [B, B].

        Raises:
            TypeError: if `size` is not an integer.
            ValueError: if `size` is above `num_examples`, or below `smallest`, so that drawing the
                batch is already noisier than the noise that is wanted.
        """
        size = _validate.positive_int("the number of examples in a batch", size)
        if size not in self._laws:
            self._laws[size] = self._of(size)
        return self._laws[size]

    @functools.cached_property
    def _laws(self) -> dict[int, MNoise]:
        # A law owns its compiled program, so a second law of the same size would compile it again.
        return {}

    def _of(self, size: int) -> MNoise:
        n, b = self.num_examples, self.batch_size
        if n is not None and size > n:
            raise ValueError(
                f"a batch must have at most num_examples = {n} examples, got {size}: they are "
                "drawn without replacement."
            )
        if size < self.smallest:
            raise ValueError(
                f"a batch must have at least {self.smallest} examples for {self.name}, got {size}: "
                "drawing so few is noisier than SGD of that batch_size. Drop the last batch of an "
                "epoch (drop_remainder, drop_last), load more, or raise batch_size."
            )
        # The weights are (1 + sigma eps_i + tau xi)/B. `each` is sigma^2 and `together` is tau^2,
        # the variances that are left to add after the draw of the batch.
        rest = 1.0 if n is None else (n - size) / n  # of the variance of a draw from a stream
        one = 1 if n is None else (n - 1) / n  # the same factor for one example, b = 1
        together = 0.0
        if self.matching == "gaussian":
            each = size**2 * one / (b * (size - 1)) if self.centred else size / b
        elif size == 1:  # SGD of batch size 1, to which nothing is added
            each = 0.0
        elif self.centred:
            each = size * (size * one / b - rest) / (size - 1)
        else:
            together = rest / (size - 1)
            each = size * (1 / b - together)
        each = max(each, 0.0)  # at the smallest size, rounding can go below 0
        if self.centred:
            inside = each * (size - 1) / size / size**2
            covariance = _building_blocks.centred_covariance(size, inside)
        else:
            covariance = Exchangeable((each + together) / size**2, together / size**2)
        draw = bound(_draw, size, math.sqrt(each), math.sqrt(together), self.centred, self.dtype)
        return MNoise(f"{self.name}.of({size})", size, size, covariance, draw)


def batch_cov(
    num_examples: int | None,
    batch_size: float | int,
    *,
    matching: Literal["total", "gaussian"] = "total",
    dtype: Any = jnp.float32,
) -> BatchLaw:
    """SGD's noise at another batch size, for the batches of a data loader: total covariance S/b.

    The loader gives B examples, drawn uniformly from N: any B of them, or the next B of a shuffled
    epoch. Their weights are (1 + s (eps - mean eps))/B. s is such that the gradient of a step,
    including the draw of its batch, has mean grad L and covariance exactly S/b. So large batches
    are as noisy as small ones, by the formula of `sparse_cov` with the subset given.

    * ``matching="total"``: every single step has covariance S/b. Needs B >= bN/(N - 1 + b).
    * ``matching="gaussian"``: the noise that the weights add has covariance S/b, and the draw of
      the batch adds to it. Choose this if batches partition an epoch and the sum over epochs
      matters: the draws of an epoch cancel (two of its steps have covariance -S/(N - 1)).

    Args:
        num_examples: N, the number of examples that the loader draws from; None for a stream of
            independent examples or a loader that draws with replacement, where S is the covariance
            of one example of the population.
        batch_size: b, the batch size of the SGD whose covariance is wanted, above 0.
        matching: "total" or "gaussian".
        dtype: of the weights, float32 or float64.

    Raises:
        TypeError: if `num_examples` is neither an integer nor None, or `batch_size` is not a
            number.
        ValueError: if `num_examples` is below 2, `batch_size` is not above 0, `matching` is
            unknown, or `dtype` is neither float32 nor float64.

    Example:
        >>> from msgd_jax import noise
        >>> law = noise.batch_cov(60_000, batch_size=32)
        >>> law.smallest, law.of(1024).covariance == law.of(1000).covariance
        (32, False)
    """
    return _batch_law(num_examples, batch_size, True, matching, dtype)


def batch_fisher(
    num_examples: int | None,
    batch_size: float | int,
    *,
    matching: Literal["total", "gaussian"] = "total",
    dtype: Any = jnp.float32,
) -> BatchLaw:
    """Fisher noise for the batches of a data loader: total covariance F/b.

    Like `batch_cov`, but the weights are (1 + s eps_i + t xi)/B. The normal xi, common to the
    batch, adds the products of different examples' gradients that the draw of the batch lacks.
    ``"total"`` needs B >= N(b + 1)/(N + b).

    Args:
        num_examples: N, the number of examples that the loader draws from; None for a stream of
            independent examples or a loader that draws with replacement.
        batch_size: b, the batch size of the SGD whose scale is wanted, above 0.
        matching: "total" or "gaussian"; with "gaussian" the noise that the weights add has
            covariance F/b.
        dtype: of the weights, float32 or float64.

    Raises:
        TypeError, ValueError: as `batch_cov`.
    """
    return _batch_law(num_examples, batch_size, False, matching, dtype)


def _batch_law(
    num_examples: Any, batch_size: Any, centred: bool, matching: Any, dtype: Any
) -> BatchLaw:
    # A stream always has enough examples.
    n, b = _building_blocks.scale(
        2 if num_examples is None else num_examples, batch_size, smallest=2
    )
    _validate.one_of("matching", matching, ("total", "gaussian"))
    dtype = _validate.wide_float_dtype("dtype", dtype)
    return BatchLaw(None if num_examples is None else n, b, centred, matching, dtype)


def _draw(
    size: int, each: float, together: float, centred: bool, dtype: Any, key: Key[Array, ""]
) -> Weights:
    own_key, common_key = jax.random.split(key)
    noise = _building_blocks.normals(own_key, size, dtype)
    noise = _building_blocks.centre_normals(noise) if centred else noise
    values = 1 + each * noise
    if together:
        values = values + together * _building_blocks.normals(common_key, 1, dtype)
    return Weights(values / size, None, size)
