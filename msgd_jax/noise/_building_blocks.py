"""The pieces that noises are made of: subsets, centred normals, and the covariances they add."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from msgd_jax import _validate
from msgd_jax.noise._permutation import permute
from msgd_jax.noise._types import Exchangeable


def sizes(num_examples: int, batch_size: int, *, smallest: int = 1) -> tuple[int, int]:
    """Checks smallest <= N and 1 <= b <= N."""
    n = _validate.num_examples("num_examples", num_examples, minimum=smallest)
    return n, _validate.positive_int("batch_size", batch_size, maximum=n)


def scale(
    num_examples: int, batch_size: float | int, *, smallest: int = 1
) -> tuple[int, float | int]:
    """Checks smallest <= N and 0 < b, for laws in which b is but the scale of the noise."""
    n = _validate.num_examples("num_examples", num_examples, minimum=smallest)
    if not 0 < _validate.real("batch_size", batch_size) < math.inf:
        raise ValueError(f"batch_size must be finite and above 0, got {batch_size}.")
    whole = int(batch_size)
    return n, whole if whole == batch_size else float(batch_size)


def subset(key: Key[Array, ""], num_examples: int, size: int) -> Int[Array, " {size}"]:
    """A uniform subset of `size` of the N examples, in random order."""
    return permute(key, jnp.arange(size), num_examples)


def normals(key: Key[Array, ""], size: int, dtype: jnp.dtype) -> Float[Array, " {size}"]:
    """Standard normals, the same bits in any program: never fused with what is done to them."""
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
    """Subtracts the mean of standard normals: the same bits for any sharding of the axis.

    A floating-point sum depends on its order, and so on the number of devices; an integer sum does
    not. The normals are summed in fixed point, in 32 bits (64 for float64), with as many fractional
    bits as leave room for a sum of 8 standard deviations (beyond that with probability 1e-15).
    What rounding leaves in the mean is below a 2^-12th of the mean's own standard deviation at
    any size up to 2^31, and a 2^-23rd at 1,000.
    """
    size = normals.shape[0]
    fractional_bits = _fractional_bits(normals)
    total = _rounded_sum(normals * 2.0**fractional_bits)
    return normals - total * (2.0**-fractional_bits / size)


def centre_symmetric(values: Float[Array, " size"]) -> Float[Array, " size"]:
    """Subtracts the mean of independent symmetric values, however heavy their tails.

    As `centre_normals`, the same bits for any sharding of the axis. Given their absolute values,
    the sum of symmetric values is one of random signs: above 8 sqrt(size) times the largest with
    probability 3e-14. So the largest value, which depends on no order, sets the fixed point, and
    what rounding to it leaves is added up in a second fixed point.
    """
    size = values.shape[0]
    fractional_bits = _fractional_bits(values)
    unit = _power_of_two_above(jnp.max(jnp.abs(values))) * 2.0**-fractional_bits
    counts = values / unit  # exact: a power of two
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
    """How many leave room for a sum of 8 sqrt(size): 2^root is at least sqrt(size)."""
    root = math.ceil(math.log2(values.shape[0]) / 2)
    return min(60 - root, 50) if values.dtype == jnp.dtype("float64") else 28 - root


def _rounded_sum(values: Float[Array, " size"]) -> Float[Array, ""]:
    """The sum of the nearest integers, as one integer until it is complete."""
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
