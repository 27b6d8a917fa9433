"""Laws made of laws: scaled, added up, and mixed."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Key, UInt32

from msgd_jax import _validate
from msgd_jax._values import bound
from msgd_jax.noise._types import Exchangeable, MNoise, Weights, is_sparse, weights_of_step

Scale = float | int | np.generic | Float[Array, ""] | Callable[[Int[Array, ""]], Any]


def scaled(law: MNoise, scale: Scale) -> MNoise:
    """The noise of a law multiplied by a number: ``W = 1/N + c (W' - 1/N)``, W' a draw of `law`.

    The mean stays 1/N and the covariance is c^2 times that of `law`. W' is the draw of `law` for
    the same key and step, so different scales give multiples of the same noise.

    If `law` is sparse, the scaled law is dense, since the examples that a draw leaves out need
    weights too for their mean to be 1/N: a step computes all N losses, unless c is the number 1.

    Args:
        law: the law that W' is drawn from.
        scale: c, a finite number of at least 0, or an array of shape () that may be traced. With a
            traced scale the law is built inside a function, which `jax.vmap` can map over scales
            and which compiles once; the law then states no `covariance`. Or a schedule like those
            of optax, a function from the step (an int32 array of shape ()) to such a number: the
            covariance then changes from step to step and is stated by `covariance_between`.

    Raises:
        TypeError: if `law` is not a law or `scale` is neither a number nor a function.
        ValueError: if `scale`, or the value of a schedule at step 0, is negative, not finite or not
            a scalar; traced values are not checked.

    Example:
        >>> from msgd_jax import noise
        >>> law = noise.scaled(noise.cov(100, batch_size=10), 0.5)
        >>> round(law.covariance.diagonal / noise.cov(100, 10).covariance.diagonal, 6)
        0.25
        >>> import optax
        >>> annealed = noise.scaled(noise.cov(100, 10), optax.cosine_decay_schedule(1.0, 1000))
        >>> annealed.covariance_between(1000, 1000).diagonal
        0.0
    """
    _validate.instance("law", law, MNoise, "noise.MNoise")
    if callable(scale):
        _validate.nonnegative_scalar("scale(0)", scale(jnp.zeros((), jnp.int32)))
        shown = getattr(scale, "__name__", type(scale).__name__)
    else:
        _validate.nonnegative_scalar("scale", scale)
        scale = scale if isinstance(scale, Tracer) else float(scale)
        if isinstance(scale, float) and scale == 1:
            return dataclasses.replace(law, name=f"scaled({law.name}, 1)")
        shown = f"{scale:g}" if isinstance(scale, float) else "traced"
    moments = draw_at = between = None
    if law.moments is not None and isinstance(scale, float):
        moments = scale**2 * law.moments
    if callable(scale) or law.draw_at is not None:
        draw_at = bound(_scaled_draw_at, law, scale)
        if callable(scale) or (law.between is not None and isinstance(scale, float)):
            between = bound(_scaled_between, law, scale)
    n = law.num_examples
    draw = bound(_scaled_draw, law, scale)
    return MNoise(f"scaled({law.name}, {shown})", n, n, moments, draw, draw_at, between)


def sum_of(*laws: MNoise) -> MNoise:
    """The noises of several laws added up: W = 1/N + sum over k of (W_k - 1/N), independent W_k.

    The covariances add up. The law is dense, as those of `scaled` are, so a step computes all N
    losses. The key of a step is split into one key per law, so W_k differs from the draw of its law
    alone with the same key.

    Args:
        laws: at least one law, all for the same number of examples.

    Raises:
        TypeError: if an argument is not a law.
        ValueError: if there are no laws, or their numbers of examples differ.

    Example:
        >>> from msgd_jax import noise
        >>> law = noise.sum_of(noise.sgd(100, batch_size=10), noise.fisher(100, batch_size=20))
        >>> law.covariance == noise.sgd(100, 10).covariance + noise.fisher(100, 20).covariance
        True
    """
    n = _check_laws(laws)
    moments = _moments(laws, [1.0] * len(laws))
    draw_at = between = None
    if any(law.draw_at is not None for law in laws):
        draw_at = bound(_sum_draw_at, laws)
        stated = all(law.moments is not None or law.between is not None for law in laws)
        between = bound(_sum_between, laws) if stated else None
    name = f"sum_of({', '.join(law.name for law in laws)})"
    return MNoise(name, n, n, moments, bound(_sum_draw, laws), draw_at, between)


def mixture(laws: Sequence[MNoise], probabilities: Any) -> MNoise:
    """Draws each step from one of several laws, which is chosen at random.

    The mean is 1/N and the covariance is the average of those of the laws. If all laws are sparse,
    the mixture is sparse too: its draws list as many examples as the largest of the laws does, and
    those left over have weight 0. If one law is dense, the mixture is dense.

    Args:
        laws: at least one law of independent steps, all for the same number of examples.
        probabilities: one per law, at least 0, adding up to 1.

    Raises:
        TypeError: if one of `laws` is not a law, or one of `probabilities` is not a number.
        ValueError: if there are no laws, their numbers of examples differ, the steps of a law are
            not independent, or there is not one probability per law, one is below 0, or they do
            not add up to 1.

    Example:
        >>> from msgd_jax import noise
        >>> law = noise.mixture([noise.sgd(100, 10), noise.sgd(100, 1)], [0.9, 0.1])
        >>> law.support_size  # a step computes ten losses, even if it uses one of them
        10
    """
    laws = tuple(laws)
    n = _check_laws(laws)
    for law in laws:
        check_independent(law)
    shares = np.asarray(list(probabilities), np.float64)
    if shares.shape != (len(laws),) or not (shares >= 0).all() or abs(shares.sum() - 1) > 1e-6:
        raise ValueError(
            f"probabilities must be {len(laws)} numbers of at least 0, one per law, that add up to "
            f"1, got {_validate.shown(list(probabilities))}."
        )
    shares = tuple(float(share) for share in shares / shares.sum())
    moments = _moments(laws, shares)
    sparse = all(is_sparse(law) for law in laws)
    size = max(law.support_size for law in laws) if sparse else n
    pairs = ", ".join(f"{share:g} {law.name}" for share, law in zip(shares, laws, strict=True))
    draw = bound(_mixture_draw, laws, shares, size if sparse else None)
    return MNoise(f"mixture({pairs})", n, size, moments, draw)


# Draws --------------------------------------------------------------------------------------------


def weights_at(law: MNoise, key: Key[Array, ""], step: Int[Array, ""]) -> Weights:
    """The weights of a step, from the key of the stream, as `MNoise.sample` draws them."""
    return weights_of_step(law.draw, law.draw_at, key, step)


def _stretched(weights: Weights, scale: Any) -> Weights:
    """1/N + scale (W - 1/N), dense."""
    values = jax.lax.optimization_barrier(weights.dense())
    scale = jnp.asarray(scale, values.dtype)
    return Weights((1 - scale) / weights.num_examples + scale * values, None, weights.num_examples)


def _at(scale: Scale, step: Int[Array, ""]) -> Any:
    """The scale of a step."""
    return scale(step) if callable(scale) else scale


def _scaled_draw(law: MNoise, scale: Scale, key: Key[Array, ""]) -> Weights:
    # A draw without a step takes the scale of the schedule at step 0.
    return _stretched(law.draw(key), _at(scale, jnp.zeros((), jnp.int32)))


def _scaled_draw_at(
    law: MNoise, scale: Scale, key: Key[Array, ""], step: Int[Array, ""]
) -> Weights:
    return _stretched(weights_at(law, key, step), _at(scale, step))


def _sum_draw(laws: tuple[MNoise, ...], key: Key[Array, ""]) -> Weights:
    keys = jax.random.split(key, len(laws))
    return _summed([law.draw(own) for law, own in zip(laws, keys, strict=True)])


def _sum_draw_at(laws: tuple[MNoise, ...], key: Key[Array, ""], step: Int[Array, ""]) -> Weights:
    keys = jax.random.split(key, len(laws))
    return _summed([weights_at(law, own, step) for law, own in zip(laws, keys, strict=True)])


def _summed(draws: list[Weights]) -> Weights:
    return combined(draws, [1.0] * len(draws), 1.0 - len(draws))


def combined(draws: list[Weights], coefficients: Sequence[float], rest: float) -> Weights:
    """The dense sum of ``rest / N`` and the draws times their coefficients."""
    n = draws[0].num_examples
    total = jnp.full(n, rest / n, draws[0].values.dtype)
    dense = jax.lax.optimization_barrier([draw.dense() for draw in draws])
    for coefficient, values in zip(coefficients, dense, strict=True):
        total = total + coefficient * values
    return Weights(total, None, n)


def _mixture_draw(
    laws: tuple[MNoise, ...], shares: tuple[float, ...], size: int | None, key: Key[Array, ""]
) -> Weights:
    choice_key, draw_key = jax.random.split(key)
    chosen = _chosen(jax.random.bits(choice_key, (), jnp.uint32), shares)
    implementation = str(jax.random.key_impl(draw_key))
    draws = [bound(_padded, law, size, implementation) for law in laws]
    # As words: jax's checker of reused keys cannot know that only one branch uses the key.
    return jax.lax.switch(chosen, draws, jax.random.key_data(draw_key))


def _chosen(bits: UInt32[Array, ""], shares: tuple[float, ...]) -> Int[Array, ""]:
    """The index of a law that has this share of all 2^32 numbers.

    A uniform float32 has 23 bits: it would never choose a share below 2^-24.
    """
    below = np.cumsum(shares)[:-1]
    bounds = np.minimum(np.round(below * 2.0**32), 2.0**32 - 1).astype(np.uint32)
    # The index is the number of cumulative shares that the number exceeds; it exceeds none of 1.
    return jnp.sum((bits >= bounds) & (below < 1), dtype=jnp.int32)


def _padded(
    law: MNoise, size: int | None, implementation: str, words: UInt32[Array, " words"]
) -> Weights:
    """A draw that lists `size` examples; dense if `size` is None.

    It is padded with its last example at weight 0, and with no other, whose loss may be infinite.
    """
    weights = law.draw(jax.random.wrap_key_data(words, impl=implementation))
    if size is None or weights.indices is None:
        return Weights(weights.dense(), None, weights.num_examples)
    rest = (0, size - weights.values.shape[0])
    indices = jnp.pad(weights.indices.astype(jnp.int32), rest, mode="edge")
    return Weights(jnp.pad(weights.values, rest), indices, weights.num_examples)


# Covariances --------------------------------------------------------------------------------------


def _moments(laws: Sequence[MNoise], factors: Sequence[float]) -> Exchangeable | None:
    """The sum of the covariances times their factors; None if a law states no covariance."""
    total = Exchangeable(0.0, 0.0)
    for factor, law in zip(factors, laws, strict=True):
        if law.moments is None:
            return None
        total = total + factor * law.moments
    return total


def _scaled_between(law: MNoise, scale: Scale, step: int, other: int) -> Exchangeable:
    factor = math.prod(float(_at(scale, jnp.asarray(t, jnp.int32))) for t in (step, other))
    return factor * law.covariance_between(step, other)


def _sum_between(laws: tuple[MNoise, ...], step: int, other: int) -> Exchangeable:
    total = Exchangeable(0.0, 0.0)
    for law in laws:
        total = total + law.covariance_between(step, other)
    return total


# Checks -------------------------------------------------------------------------------------------


def _check_laws(laws: Sequence[Any]) -> int:
    """The number of examples that all laws are for."""
    if not laws:
        raise ValueError("laws must hold at least one law, got none.")
    for position, law in enumerate(laws):
        _validate.instance(f"laws[{position}]", law, MNoise, "noise.MNoise")
    sizes = [law.num_examples for law in laws]
    if len(set(sizes)) > 1:
        raise ValueError(f"laws must all be for the same number of examples, got {sizes}.")
    return sizes[0]


def check_independent(law: MNoise) -> None:
    if law.draw_at is not None:
        raise ValueError(
            f"law must have independent steps, got {law.name}, whose steps depend on each other."
        )
