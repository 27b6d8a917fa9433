"""The random vectors v of a local complexity: Rademacher, Gaussian, SGD, or of any law."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from msgd_jax import _laws, _validate, noise
from msgd_jax._streams import Stream, derive, signs
from msgd_jax._typing import DType, Step
from msgd_jax._values import bound
from msgd_jax.noise import MNoise, Weights

MAX_ENUMERATED = 200_000

Enumerated = tuple[Float[np.ndarray, "M N"], Float[np.ndarray, " M"]]
"""All vectors that can be drawn, [M, N], and their probabilities, [M], in float64."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Multipliers:
    """A law of random vectors v in R^N with mean 0, whose complexity is measured (section 3).

    `rademacher`, `gaussian`, `sgd` and `from_noise` make such laws, and so can you: only `draw` has
    to be written. Like a `noise.MNoise` a `Multipliers` holds no arrays, compares by value, and
    owns its compiled program.

    Attributes:
        name: the constructor and its arguments, for messages.
        num_examples: N, the number of examples.
        draw: maps one PRNG key to v as `noise.Weights`: its values are the v_i. Examples that are
            not among its indices have v_i = 0, and their losses are not computed.
        enumerate: returns all vectors that can be drawn with their probabilities; None if there
            are infinitely many.
        centred: whether the v_i of every draw add up to 0, as those of SGD do. A constant in all
            losses then does not contribute, not even by rounding.

    Raises:
        TypeError: if `num_examples` is not an integer, or `draw` or `enumerate` is not a function.
        ValueError: if `num_examples` is not positive.
    """

    name: str
    num_examples: int
    draw: Callable[[Key[Array, ""]], Weights] = dataclasses.field(repr=False)
    enumerate: Callable[[], Enumerated] | None = dataclasses.field(repr=False, default=None)
    centred: bool = False

    def __post_init__(self) -> None:
        _validate.positive_int("num_examples", self.num_examples)
        _validate.function("draw", self.draw)
        if self.enumerate is not None:
            _validate.function("enumerate", self.enumerate)

    def sample(self, key: Key[Array, ""], step: Step) -> Weights:
        """Draws the vector of one step, as `noise.MNoise.sample` draws weights.

        You may use the same key for a law of weights and for other things: multipliers have a
        stream of their own.

        Args:
            key: a typed PRNG key, the same for all steps.
            step: the number of the step, from 0 to 2^31 - 1; it may be traced.

        Raises:
            TypeError: if `key` is not a typed PRNG key, or `step` is not an integer.
            ValueError: if `key` is an array of keys, or `step` is out of range or not a scalar.
        """
        _validate.prng_key("key", key)
        return self._compiled(key, _validate.step(step))

    def drawn(self, key: Key[Array, ""], step: Int[Array, ""]) -> Weights:
        """The same draw as that of `sample`, without checks, as part of another program."""
        return _drawn(self.draw, key, step)

    @functools.cached_property
    def _compiled(self) -> Callable[[Key[Array, ""], Int[Array, ""]], Weights]:
        # The program holds `draw` only: if it held the law, it would keep itself alive.
        return jax.jit(functools.partial(_drawn, self.draw))


def _drawn(
    draw: Callable[[Key[Array, ""]], Weights], key: Key[Array, ""], step: Int[Array, ""]
) -> Weights:
    # Not fused with the code that uses the draw: different fusion rounds differently.
    return jax.lax.optimization_barrier(draw(derive(key, Stream.MULTIPLIERS, step)))


def rademacher(
    num_examples: int,
    subset_size: int | None = None,
    *,
    replace: bool = False,
    dtype: DType = jnp.float32,
) -> Multipliers:
    """v_i = +-1 with equal probability: the local Rademacher complexity R(A, N).

    With `subset_size` b it is the complexity of b of the N examples, R(A, b) of Theorem 1 (2): v is
    (N/b) a on b examples drawn uniformly. Then (1/N) sum v_i l_i is (1/b) sum a_j l_j over those b
    examples, and only their losses are computed.

    Args:
        num_examples: N, at least 1.
        subset_size: b, between 1 and N; None for all N examples, each once.
        replace: whether the b examples are drawn with replacement.
        dtype: of v, float32 or float64.

    Raises:
        TypeError: if a size is not an integer.
        ValueError: if a size is out of its range, or `dtype` is neither float32 nor float64.
    """
    n = _validate.positive_int("num_examples", num_examples)
    dtype = _validate.wide_float_dtype("dtype", dtype)
    if subset_size is None:
        draw = bound(_draw_signs, n, dtype)
        return Multipliers(f"rademacher({n})", n, draw, bound(_signs, n))
    b = _validate.positive_int("subset_size", subset_size, maximum=n)
    sampling = noise.sgd(n, b, replace=replace, dtype=dtype)
    draw = bound(_draw_signed_subset, sampling, b, dtype)
    name = f"rademacher({n}, {b}, replace={replace})"
    return Multipliers(name, n, draw, bound(_signed_subsets, n, b, replace))


def _draw_signs(n: int, dtype: jnp.dtype, key: Key[Array, ""]) -> Weights:
    return Weights(signs(key, n, dtype), None, n)


def _draw_signed_subset(sampling: MNoise, b: int, dtype: jnp.dtype, key: Key[Array, ""]) -> Weights:
    subset_key, sign_key = jax.random.split(key)
    subset = sampling.draw(subset_key)  # with weights of 1/b
    n = sampling.num_examples
    return Weights(n * subset.values * signs(sign_key, b, dtype), subset.indices, n)


def gaussian(num_examples: int, *, dtype: DType = jnp.float32) -> Multipliers:
    """v_i standard normal: the local Gaussian complexity R(G, N).

    The multipliers of M-SGD-Fisher are sqrt(N/b) times these (`from_noise`); the paper leaves this
    factor out.

    Args:
        num_examples: N, at least 1.
        dtype: of v, float32 or float64.

    Raises:
        TypeError: if `num_examples` is not an integer.
        ValueError: if `num_examples` is below 1, or `dtype` is neither float32 nor float64.
    """
    n = _validate.positive_int("num_examples", num_examples)
    dtype = _validate.wide_float_dtype("dtype", dtype)
    return Multipliers(f"gaussian({n})", n, bound(_draw_normals, n, dtype))


def _draw_normals(n: int, dtype: jnp.dtype, key: Key[Array, ""]) -> Weights:
    return Weights(jax.random.normal(key, (n,), dtype), None, n)


def sgd(
    num_examples: int,
    batch_size: int,
    *,
    replace: bool = False,
    dtype: DType = jnp.float32,
) -> Multipliers:
    """V = N W - 1 of mini-batch SGD: the local SGD complexity R(V_sgd, N).

    Without replacement, v_i is N/b - 1 on the batch and -1 off it.

    Args:
        num_examples: N, at least 1.
        batch_size: b, between 1 and N.
        replace: whether an example can be drawn more than once.
        dtype: of v, float32 or float64.

    Raises:
        TypeError: if a size is not an integer.
        ValueError: if a size is out of its range, or `dtype` is neither float32 nor float64.
    """
    law = from_noise(noise.sgd(num_examples, batch_size, replace=replace, dtype=dtype))
    all_batches = bound(_batches, law.num_examples, int(batch_size), replace)
    return dataclasses.replace(law, name=f"V of {law.name}", enumerate=all_batches)


def from_noise(law: MNoise) -> Multipliers:
    """V = N W - 1 of a law W: L(theta) . W is the mean loss plus (1/N) sum v_i l_i.

    All N losses are computed: an example that is not drawn has v_i = -1.

    Args:
        law: the law of the weights W.

    Raises:
        TypeError: if `law` is not a `noise.MNoise`.
    """
    n, moments = _laws.drawable("law", law).num_examples, law.covariance
    # Decided by the covariance, since the N W - 1 of a draw add up to 0 only up to rounding.
    centred = abs(moments.alpha + n * moments.beta) <= 1e-12 * abs(moments.alpha)
    draw = bound(_draw_deviations, law)
    return Multipliers(law.name, n, draw, centred=centred)


def _draw_deviations(law: MNoise, key: Key[Array, ""]) -> Weights:
    n = law.num_examples
    return Weights(n * law.draw(key).dense() - 1, None, n)


def of(multipliers: Multipliers | MNoise, num_examples: int | None = None) -> Multipliers:
    """Returns `multipliers` as `Multipliers`, for `num_examples` if that is given; raises."""
    if isinstance(multipliers, MNoise):
        multipliers = from_noise(multipliers)
    if not isinstance(multipliers, Multipliers):
        raise TypeError(
            "multipliers must be a complexity.Multipliers or a noise.MNoise, got "
            f"{type(multipliers).__name__}."
        )
    if num_examples is not None and multipliers.num_examples != num_examples:
        raise ValueError(
            f"multipliers are for num_examples = {multipliers.num_examples}, but the data have "
            f"{num_examples} examples."
        )
    return multipliers


def looks(multipliers: Multipliers) -> tuple[Any, ...]:
    """The structure, shapes and dtypes of a draw, which determine the compiled program."""
    shapes = jax.eval_shape(lambda key: multipliers.draw(key), jax.random.key(0))
    leaves, structure = jax.tree.flatten(shapes)
    return structure, *((leaf.shape, leaf.dtype) for leaf in leaves)


def all_draws(multipliers: Multipliers) -> Enumerated:
    """All different vectors with their probabilities.

    Raises:
        ValueError: if there are infinitely many, or more than `MAX_ENUMERATED`.
    """
    if multipliers.enumerate is None:
        raise ValueError(
            f"num_draws = None takes every draw, but those of {multipliers.name} cannot be "
            "enumerated: give num_draws."
        )
    vectors, probabilities = multipliers.enumerate()
    vectors, groups = np.unique(vectors, axis=0, return_inverse=True)
    probabilities = np.bincount(groups.ravel(), weights=probabilities)
    return vectors, probabilities.astype(np.float64)  # no change, for type checkers


def _signs(n: int) -> Enumerated:
    _check_count(f"rademacher({n})", 2**n)
    vectors = np.array(list(itertools.product((1.0, -1.0), repeat=n)))
    return vectors, np.full(2**n, 2.0**-n)


def _batches(n: int, b: int, replace: bool) -> Enumerated:
    counts, probabilities = _counts(n, b, replace)
    return n / b * counts - 1, probabilities


def _signed_subsets(n: int, b: int, replace: bool) -> Enumerated:
    if replace:  # b draws of 2N signed examples
        counts, probabilities = _counts(2 * n, b, True)
        return n / b * (counts[:, :n] - counts[:, n:]), probabilities
    _check_count(f"rademacher({n}, {b})", math.comb(n, b) << b)
    counts, _ = _counts(n, b, False)
    signs, _ = _signs(b)
    vectors = np.zeros((len(counts), len(signs), n))
    for vector, count in zip(vectors, counts, strict=True):
        vector[:, count > 0] = n / b * signs
    return vectors.reshape(-1, n), np.full(vectors.shape[0] * len(signs), 1 / vectors[..., 0].size)


def _counts(n: int, b: int, replace: bool) -> Enumerated:
    """The counts of n examples in all possible samples of b, and their probabilities."""
    _check_count(f"samples of {b} out of {n}", math.comb(n + b - 1 if replace else n, b))
    choose = itertools.combinations_with_replacement if replace else itertools.combinations
    samples = np.array(list(choose(range(n), b)))
    counts = np.stack([np.bincount(sample, minlength=n) for sample in samples])
    if not replace:
        return counts.astype(np.float64), np.full(len(counts), 1 / len(counts))
    factorials = np.array([math.factorial(i) for i in range(b + 1)], np.float64)
    orders = factorials[b] / factorials[counts].prod(1)
    return counts.astype(np.float64), orders / float(n) ** b


def _check_count(name: str, count: int) -> None:
    if count > MAX_ENUMERATED:
        raise ValueError(
            f"num_draws = None takes every draw, but {name} has {count}, more than "
            f"{MAX_ENUMERATED}: give num_draws."
        )
