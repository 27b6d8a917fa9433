"""Norms of the gradients of all examples: exact, or by random probes in forward mode."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from msgd_jax import _dtypes, _validate
from msgd_jax import loss as loss_lib
from msgd_jax._estimate import Estimate
from msgd_jax._streams import Stream, derive, signs
from msgd_jax._typing import Data, Gradients, Params, PositiveInt
from msgd_jax.measure import _estimates


def squared_gradient_norms(losses: loss_lib.LossVector, params: Params) -> Float[Array, " N"]:
    """The exact squared norm of the gradient of each example.

    It costs N per-example gradients, of which one micro-batch is in memory at a time. Each eager
    call compiles a program: put the function under `jax.jit` to call it more than once.

    Args:
        losses: the loss vector.
        params: a pytree of floating-point arrays.

    Returns:
        [N], in float32 or wider.

    Raises:
        TypeError: if `losses` is not a `loss.LossVector`, or a parameter is not floating point.
        ValueError: outside of `jax.jit`, if a loss or a gradient is not finite; the error names the
            example.

    Example:
        >>> from msgd_jax import loss, measure
        >>> fn = loss.per_example(lambda theta, x: (theta - x) ** 2 / 2)
        >>> losses = loss.LossVector(fn, jnp.asarray([0.0, 2.0]))
        >>> measure.squared_gradient_norms(losses, jnp.asarray(3.0)).tolist()
        [9.0, 1.0]
    """
    loss_lib.checked(losses, params)
    squares = _estimates.per_example_squares(losses, params)
    _estimates.check_finite(losses, params, squares)
    return squares


class ProbedNorms(NamedTuple):
    """Gradient norms of all examples from K random probes.

    Attributes:
        squared: unbiased estimates of the squared norms, [N].
        norm: unbiased estimates of the norms, [N].
        relative_error: the exact relative standard error of each entry of `squared`, sqrt(2 / K).
        trace: tr S, from the same probes.
    """

    squared: Float[Array, " N"]
    norm: Float[Array, " N"]
    relative_error: float
    trace: Estimate


def probed_gradient_norms(
    losses: loss_lib.LossVector, params: Params, key: Key[Array, ""], *, num_probes: PositiveInt
) -> ProbedNorms:
    """Gradient norms of all N examples from K forward passes, for any number of parameters.

    For z ~ N(0, I), one forward-mode pass gives u_i = z . g_i for all examples; its square has the
    mean ``|g_i|^2`` and the variance ``2 |g_i|^4``. The root of a mean of K squares is too low by
    the factor sqrt(2/K) Gamma((K+1)/2) / Gamma(K/2), by which it is divided. The variance of the
    u_i over examples, ``z^T S z``, has the mean tr S.

    It costs K forward-mode passes over the N examples, and neither a backward pass nor per-example
    gradients. Each eager call compiles a program.

    Args:
        losses: the loss vector.
        params: a pytree of floating-point arrays.
        key: a typed PRNG key; probe k is a function of (key, k).
        num_probes: K, at least 2.

    Raises:
        TypeError: as `squared_gradient_norms`, or if `key` is not a typed PRNG key.
        ValueError: as `squared_gradient_norms`, or if `num_probes` is below 2.
    """
    loss_lib.checked(losses, params)
    k = _validate.positive_int("num_probes", num_probes, minimum=2)
    _validate.prng_key("key", key)

    def probed(
        params: Params, data: Data, key: Key[Array, ""]
    ) -> tuple[Float[Array, " N"], Float[Array, " K"]]:
        own = losses.replace(data=data)

        def add(
            total: Float[Array, " N"], number: Int[Array, ""]
        ) -> tuple[Float[Array, " N"], Float[Array, ""]]:
            slopes = own.slopes(params, probe(key, number, params))
            return total + jnp.square(slopes).astype(total.dtype), slopes.var()

        zero = jnp.zeros_like(own(params))
        total, spreads = jax.lax.scan(add, zero, jnp.arange(k))
        return total / k, spreads

    squared, spreads = jax.jit(probed)(params, losses.data, key)
    _estimates.check_finite(losses, params, squared)
    bias = math.sqrt(2 / k) * math.exp(math.lgamma((k + 1) / 2) - math.lgamma(k / 2))
    trace = _estimates.of_sample(spreads, positive=True)
    return ProbedNorms(squared, jnp.sqrt(squared) / bias, math.sqrt(2 / k), trace)


def probe(
    key: Key[Array, ""], number: Int[Array, ""] | int, params: Params, kind: str = "gaussian"
) -> Gradients:
    """A random direction like the parameters: independent normals or signs, one key per leaf."""
    leaves, structure = jax.tree.flatten(params)

    def of_leaf(position: int, leaf: Array) -> Array:
        own = derive(key, Stream.PROBES, number, position)
        dtype, shape = jnp.result_type(leaf), jnp.shape(leaf)
        if kind == "gaussian":
            drawn = jax.random.normal(own, shape, _dtypes.accumulator(dtype))
        else:
            drawn = signs(own, math.prod(shape), jnp.dtype("float32")).reshape(shape)
        return drawn.astype(dtype)

    return structure.unflatten([of_leaf(i, leaf) for i, leaf in enumerate(leaves)])
