"""The pieces that laws are made of: subsets, centred normals, and the covariances they add."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from msgd_jax import _validate
from msgd_jax.noise._permutation import permute
from msgd_jax.noise._types import Exchangeable


def sizes(num_examples: int, batch_size: int, *, smallest: int = 1) -> tuple[int, int]:
    """Returns N and b if smallest <= N and 1 <= b <= N; else raises TypeError or ValueError."""
    n = _validate.num_examples("num_examples", num_examples, minimum=smallest)
    return n, _validate.positive_int("batch_size", batch_size, maximum=n)


def scale(
    num_examples: int, batch_size: float | int, *, smallest: int = 1
) -> tuple[int, float | int]:
    """Like `sizes` with b any number above 0, for laws in which b is only a scale.

    Numbers above 10^12 N are refused: noise of that size is lost in the rounding of the weights.
    """
    n = _validate.num_examples("num_examples", num_examples, minimum=smallest)
    if not 0 < _validate.real("batch_size", batch_size) < math.inf:
        raise ValueError(f"batch_size must be finite and above 0, got {batch_size}.")
    if batch_size > 1e12 * n:
        raise ValueError(
            f"batch_size must be at most 1e12 x num_examples = {1e12 * n:g}, got {batch_size:g}: "
            "smaller noise is lost in the rounding of the weights. Use noise.gd."
        )
    whole = int(batch_size)
    return n, whole if whole == batch_size else float(batch_size)


def subset(key: Key[Array, ""], num_examples: int, size: int) -> Int[Array, " {size}"]:
    """A uniform subset of `size` of the N examples, in random order."""
    return permute(key, jnp.arange(size), num_examples)


def normals(key: Key[Array, ""], size: int, dtype: jnp.dtype) -> Float[Array, " {size}"]:
    """Standard normals, the same bits in any program: never fused with the code that uses them."""
    return jax.lax.optimization_barrier(jax.random.normal(key, (size,), dtype))


def subset_and_normals(
    key: Key[Array, ""], num_examples: int, size: int, dtype: jnp.dtype
) -> tuple[Int[Array, " {size}"], Float[Array, " {size}"]]:
    """A uniform subset of the N examples and an independent standard normal for each."""
    subset_key, normal_key = jax.random.split(key)
    return subset(subset_key, num_examples, size), normals(normal_key, size, dtype)


def scatter(
    values: Float[Array, " size"], indices: Int[Array, " size"], num_examples: int
) -> Float[Array, " {num_examples}"]:
    """The vector in R^N with the given values at distinct indices, 0 elsewhere."""
    zeros = jnp.zeros(num_examples, values.dtype)
    return zeros.at[indices].set(values, unique_indices=True)


def centre_normals(normals: Float[Array, " size"]) -> Float[Array, " size"]:
    """Subtracts the mean of standard normals; the bits are the same for any sharding of the axis.

    A floating-point sum depends on its order, and so on the number of devices; an integer sum does
    not. So the normals are summed in fixed point, in 32 bits (64 for float64), with as many
    fractional bits as leave room for a sum of 8 standard deviations (which it exceeds with
    probability 1e-15). The rounding error of the mean is below 2^-12 of the mean's own standard
    deviation at any size up to 2^31, and below 2^-23 of it at 1,000.
    """
    size = normals.shape[0]
    fractional_bits = _fractional_bits(normals)
    total = _rounded_sum(normals * 2.0**fractional_bits)
    return normals - total * (2.0**-fractional_bits / size)


def centre_symmetric(values: Float[Array, " size"]) -> Float[Array, " size"]:
    """Subtracts the mean of independent symmetric values, however heavy their tails.

    As in `centre_normals`, the bits are the same for any sharding of the axis. Given their absolute
    values, symmetric values differ by random signs only, so their sum exceeds 8 sqrt(size) times
    the largest one with probability 3e-14. The largest value, which does not depend on the order of
    the values, sets the unit of the fixed point. The remainders of rounding to this unit are summed
    in a second, finer fixed point.
    """
    size = values.shape[0]
    fractional_bits = _fractional_bits(values)
    unit = _power_of_two_above(jnp.max(jnp.abs(values))) * 2.0**-fractional_bits
    counts = values / unit  # exact, since the unit is a power of two
    rest = (counts - jnp.round(counts)) * 2.0**fractional_bits
    total = _rounded_sum(counts) + _rounded_sum(rest) * 2.0**-fractional_bits
    return values - total * (unit / size)


def _power_of_two_above(value: Float[Array, ""]) -> Float[Array, ""]:
    """The smallest power of two above a value, by the exponent of the float32 next to it.

    That may be rounded up to a power of two. (TPUs have no exponents of float64.)
    """
    _, exponent = jnp.frexp(value.astype(jnp.float32))
    power = jnp.ldexp(jnp.ones((), jnp.float32), exponent).astype(value.dtype)
    return jnp.where(power > 2 * value, power / 2, power)


def _fractional_bits(values: Float[Array, " size"]) -> int:
    """The number of fractional bits that leaves room for a sum of 8 sqrt(size)."""
    root = math.ceil(math.log2(values.shape[0]) / 2)  # 2^root is at least sqrt(size)
    return min(60 - root, 50) if values.dtype == jnp.dtype("float64") else 28 - root


def _rounded_sum(values: Float[Array, " size"]) -> Float[Array, ""]:
    """The sum of the values rounded to integers, computed as an integer."""
    integer = jnp.int64 if values.dtype == jnp.dtype("float64") else jnp.int32
    return jnp.sum(jnp.round(values).astype(integer)).astype(values.dtype)


def centred_covariance(num_examples: int, diagonal: float) -> Exchangeable:
    """The covariance with this diagonal whose rows add up to zero: the sum of W is constant."""
    off_diagonal = -diagonal / (num_examples - 1) if num_examples > 1 else 0.0
    return Exchangeable(diagonal, off_diagonal)


def subset_covariance(num_examples: int, size: int) -> Exchangeable:
    """The covariance of 1/size on a uniform subset (Eq. 5)."""
    diagonal = (num_examples - size) / (size * num_examples**2)
    return centred_covariance(num_examples, diagonal)


def normals_covariance(num_examples: int, size: int, scale: float) -> Exchangeable:
    """The covariance of scale * eps on a uniform subset."""
    return Exchangeable(scale**2 * size / num_examples, 0.0)


def centred_normals_covariance(num_examples: int, size: int, scale: float) -> Exchangeable:
    """The covariance of scale * (eps - mean eps) on a uniform subset, the mean taken over it."""
    return centred_covariance(num_examples, scale**2 * (size - 1) / num_examples)
