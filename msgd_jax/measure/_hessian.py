"""Products with the Hessian of any weighted loss, and its trace by random probes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from msgd_jax import _dtypes, _validate
from msgd_jax import loss as loss_lib
from msgd_jax._estimate import Estimate
from msgd_jax._typing import Data, Gradients, Params, PositiveInt
from msgd_jax.measure import _estimates, _norms
from msgd_jax.noise import Weights

PROBES = ("rademacher", "gaussian")


def hessian_product(
    losses: loss_lib.LossVector,
    params: Params,
    weights: Weights | Float[Array, " N"] | None = None,
) -> Callable[[Gradients], Gradients]:
    """The map ``v -> H v``, with H the Hessian of the mean loss, or of ``L . weights``.

    It is `loss.LossVector.hessian_product` at these parameters and weights, computed forward over
    reverse: a product costs about three gradients of the examples that have weights, and no D x D
    matrix is formed.

    Args:
        losses: the loss vector.
        params: a pytree of floating-point arrays.
        weights: a draw of a law, or any array [N]; None for 1/N each.

    Returns:
        A linear function of pytrees like `params`, which `lanczos` takes too.

    Raises:
        TypeError: if `losses` is not a `loss.LossVector`, or a parameter is not floating point.
        ValueError: in a call of the function, if the weights are for another number of examples.

    Example:
        >>> from msgd_jax import loss, measure
        >>> fn = loss.per_example(lambda theta, x: x * theta[0] ** 2 + theta[0] * theta[1])
        >>> losses = loss.LossVector(fn, jnp.asarray([1.0, 3.0]))
        >>> product = measure.hessian_product(losses, jnp.zeros(2))
        >>> product(jnp.asarray([1.0, 0.0])).tolist()
        [4.0, 1.0]
    """
    loss_lib.checked(losses, params)
    params = jax.tree.map(jnp.asarray, params)
    return lambda vector: losses.hessian_product(params, vector, weights)


def hessian_operator(
    losses: loss_lib.LossVector,
    params: Params,
    weights: Weights | Float[Array, " N"] | None = None,
) -> Any:
    """`hessian_product` as a `lineax.FunctionLinearOperator`, tagged symmetric.

    The Hessian is in general not positive semi-definite.

    Raises:
        ImportError: if lineax is not installed (``pip install 'msgd-jax[solvers]'``), which
            `hessian_product` does not need.
        TypeError: as `hessian_product`.
        ValueError: as `hessian_product`, or if the parameters have several dtypes.
    """
    try:
        import lineax
    except ImportError as error:
        raise ImportError(
            "hessian_operator needs lineax: pip install 'msgd-jax[solvers]'. hessian_product is "
            "the same as a plain function."
        ) from error
    product = hessian_product(losses, params, weights)
    params = jax.tree.map(jnp.asarray, params)
    structure = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    dtypes = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(structure)})
    if len(dtypes) > 1:
        raise ValueError(
            f"params must be of one type for a lineax operator, got {', '.join(dtypes)}: use "
            "hessian_product."
        )
    return lineax.FunctionLinearOperator(product, structure, lineax.symmetric_tag)


class HessianTrace(NamedTuple):
    """Estimates by random probes for the Hessian H of the mean loss.

    Attributes:
        trace: tr H.
        squared_norm: the sum of the squares of all entries of H, ``|H|_F^2``.
    """

    trace: Estimate
    squared_norm: Estimate


def hessian_trace(
    losses: loss_lib.LossVector,
    params: Params,
    key: Key[Array, ""],
    *,
    num_probes: PositiveInt,
    kind: str = "rademacher",
) -> HessianTrace:
    """The trace of the Hessian of the mean loss by Hutchinson's estimator, and its norm.

    For random z with independent entries, ``E z^T H z = tr H`` and ``E |H z|^2 = |H|_F^2``. The
    variance of ``z^T H z`` is ``2 |H|_F^2`` for Gaussian probes; for random signs it is lower by
    twice the sum of the squares of the diagonal of H.

    It costs `num_probes` Hessian-vector products, each about three gradients of the N examples.
    Each eager call compiles a program.

    Args:
        losses: the loss vector.
        params: a pytree of floating-point arrays.
        key: a typed PRNG key; probe k is a function of (key, k).
        num_probes: the number of probes, at least 2.
        kind: "rademacher" or "gaussian".

    Raises:
        TypeError: if `losses` is not a `loss.LossVector`, a parameter is not floating point, or
            `key` is not a typed PRNG key.
        ValueError: if `num_probes` is below 2, `kind` is neither of the two, or, outside of
            `jax.jit`, a loss or a gradient is not finite.
    """
    loss_lib.checked(losses, params)
    k = _validate.positive_int("num_probes", num_probes, minimum=2)
    _validate.one_of("kind", kind, PROBES)
    _validate.prng_key("key", key)
    program = jax.jit(lambda *args: probed(losses, *args, num_probes=k, kind=kind))
    quadratic, squares = program(params, losses.data, key)
    _estimates.check_finite(losses, params, (quadratic, squares))
    return HessianTrace(
        _estimates.of_sample(quadratic), _estimates.of_sample(squares, positive=True)
    )


def probed(
    losses: loss_lib.LossVector,
    params: Params,
    data: Data,
    key: Key[Array, ""],
    *,
    num_probes: int,
    kind: str,
) -> tuple[Float[Array, " K"], Float[Array, " K"]]:
    """z^T H z and ``|H z|^2`` for K random z."""
    own = losses.replace(data=data)

    def one(number: Int[Array, ""]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        z = _norms.probe(key, number, params, kind)
        image = own.hessian_product(params, z)
        return dot(z, image), dot(image, image)

    return jax.lax.map(one, jnp.arange(num_probes))


def dot(one: Gradients, other: Gradients) -> Float[Array, ""]:
    """The inner product of two pytrees like the parameters, in float32 or wider."""
    pairs = list(zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))
    dtype = _dtypes.accumulator(*(leaf.dtype for pair in pairs for leaf in pair))
    products = [(a.astype(dtype) * b.astype(dtype)).sum() for a, b in pairs]
    return jnp.stack(products).sum()
