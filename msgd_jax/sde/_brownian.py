"""The Brownian motion W in R^N: a pure function of (key, iteration) that can be refined."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from msgd_jax import _dtypes, _validate
from msgd_jax._laws import Law
from msgd_jax._streams import Stream, derive
from msgd_jax._typing import DType, PositiveInt, Step
from msgd_jax.noise import MNoise

MAX_SUBSTEPS = 2**16


def brownian_increments(
    key: Key[Array, ""],
    step: Step,
    num_examples: PositiveInt,
    *,
    substeps: PositiveInt = 1,
    dtype: DType = jnp.float32,
) -> Float[Array, "substeps N"]:
    """The increments of W over the substeps of one iteration, in units of sqrt(learning rate).

    They are independent, each with law N(0, I/substeps): over a substep of h = eta/substeps, the
    Brownian motion itself moves by sqrt(eta) times this. The path is a function of key and step.
    Doubling `substeps` refines it (Lévy's midpoint construction), and coarse increments are the
    sums of fine ones to the last bit, because all of them are multiples of 2^-20 (2^-48 in float64)
    that add up without rounding. Each iteration can be drawn alone, so nothing is stored.

    The increment over a whole iteration is minus the standard normals that `noise.fisher` and
    `noise.cov` draw at (key, step), up to that rounding: **the discrete iteration with the same key
    follows the same path.** (The minus sign makes Eq. 16 agree with Eq. 67; the sign printed in
    Eq. 71 does not follow from Eq. 70.)

    Args:
        key: a typed PRNG key, the same for the whole path.
        step: the number of the step, from 0, which may be traced: the increments are those over
            iteration ``step + 1``, from ``step * eta`` to ``(step + 1) * eta``.
        num_examples: N, the dimension of W.
        substeps: a power of two, at most 65,536.
        dtype: float32 or float64.

    Returns:
        Array of shape [substeps, N], in the order of time.

    Raises:
        TypeError: if `key` is not a typed PRNG key, or `step`, `num_examples` or `substeps` is not
            an integer.
        ValueError: if `step` or `num_examples` is out of range, `substeps` is not a power of two up
            to 65,536, or `dtype` is neither float32 nor float64.
    """
    _validate.prng_key("key", key)
    step = _validate.step(step)
    num_examples = _validate.positive_int("num_examples", num_examples)
    substeps = check_substeps(substeps)
    dtype = _validate.wide_float_dtype("dtype", dtype)

    return _draw(key, step, num_examples, substeps, dtype)


def check_substeps(substeps: PositiveInt) -> int:
    """Returns `substeps` if it is a power of two in range; raises TypeError or ValueError."""
    substeps = _validate.positive_int("substeps", substeps, maximum=MAX_SUBSTEPS)
    if substeps & (substeps - 1):
        raise ValueError(
            f"substeps must be a power of two, got {substeps}: an iteration is halved again and "
            "again, so that every refinement is of the same Brownian path."
        )
    return substeps


def path_dtype(law: Law, dtype: jnp.dtype) -> jnp.dtype:
    """The dtype in which the path of a law is drawn: that of its weights, as in training.

    Normals drawn in float32 and in float64 are different numbers. A `noise.Exchangeable` has no
    weights: then it is `dtype`, that of the parameters.
    """
    if not isinstance(law, MNoise):
        return dtype
    values = jax.eval_shape(lambda key: law.draw(key).values, jax.random.key(0))
    return _dtypes.accumulator(values.dtype)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _draw(
    key: Key[Array, ""], step: Int[Array, ""], num_examples: int, substeps: int, dtype: jnp.dtype
) -> Float[Array, "substeps N"]:
    # Compiled also for eager calls, since fused and unfused arithmetic round differently.
    quantum = 2.0**-48 if dtype == jnp.dtype("float64") else 2.0**-20

    def normals(key: Key[Array, ""], count: int, deviation: float) -> Float[Array, "count N"]:
        # Rounded to whole quanta before anything is added, and not fused with other operations, so
        # that programs with different numbers of substeps draw the same numbers.
        draws = jax.random.normal(key, (count, num_examples), dtype)
        return jnp.round(jax.lax.optimization_barrier(draws) * (deviation / quantum))

    increments = -normals(derive(key, Stream.WEIGHTS, step), 1, 1.0)
    refine_key = derive(key, Stream.REFINEMENT, step)
    for level in range(substeps.bit_length() - 1):
        # Given the whole increment, its first half is normal with mean half of it and variance
        # length/4.
        level_key = jax.random.fold_in(refine_key, level)
        bridge = normals(level_key, 2**level, 0.5 * 2.0 ** (-level / 2))
        first = jnp.floor(0.5 * increments) + bridge
        increments = jnp.stack([first, increments - first], 1).reshape(-1, num_examples)
    return increments * quantum
