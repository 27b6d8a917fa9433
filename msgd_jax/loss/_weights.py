"""Checks that weights fit the examples that they are for."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from msgd_jax import _dtypes, _mesh, _validate
from msgd_jax._typing import Params
from msgd_jax.noise import Weights


def check_length(num_examples: int, length: int, sharding: NamedSharding | None) -> None:
    """Raises ValueError unless data of this length hold `num_examples`, filled up or not."""
    filled = num_examples + _mesh.missing(num_examples, sharding)
    if length not in (num_examples, filled):
        raise ValueError(
            f"num_examples must be the length of the data, {length}, before they were filled up "
            f"for the devices, got {num_examples}."
        )


def equal(num_examples: int, params: Params) -> Float[Array, " N"]:
    """Weights of 1/N in float32, or in float64 if a parameter is float64."""
    dtypes = [jnp.result_type(leaf) for leaf in jax.tree.leaves(params)]
    return jnp.full(num_examples, 1 / num_examples, _dtypes.accumulator(*dtypes))


def as_weights(weights: Weights | Array, num_examples: int) -> Weights:
    """Weights, or an array of them, as weights of `num_examples`; their shape is checked later."""
    if not isinstance(weights, Weights):
        if not hasattr(weights, "shape") or not hasattr(weights, "dtype"):
            raise TypeError(
                "weights must be a noise.Weights or an array of one weight per example, got "
                f"{_validate.shown(weights)}."
            )
        if not jnp.issubdtype(weights.dtype, jnp.floating):
            raise TypeError(f"weights must be floating point, got {weights.dtype}.")
        weights = Weights(jnp.asarray(weights), None, num_examples)
    if weights.num_examples != num_examples:
        raise ValueError(
            f"weights are for num_examples = {weights.num_examples}, but the data have "
            f"{num_examples} examples."
        )
    return weights


def check(
    weights: Weights,
    data_size: int,
    sharding: NamedSharding | None,
    stacked: bool = False,
    read: bool = False,
) -> None:
    """Raises TypeError or ValueError unless these are weights of the data.

    With `stacked`, they must be a stack of weights, with a leading axis of draws.
    With `read`, the data are the examples that the weights list.
    """
    if not isinstance(weights, Weights):
        raise TypeError(f"weights must be a noise.Weights, got {type(weights).__name__}.")
    num_examples = weights.values.shape[-1] if read else weights.num_examples
    filled = num_examples + _mesh.missing(num_examples, sharding)
    if data_size not in (num_examples, filled):
        or_filled = f" ({filled} when filled up for its devices)" if filled > num_examples else ""
        hint = (
            f" Weights for a batch that a loader drew from {num_examples} examples are draws of "
            f"noise.batch_cov({num_examples}, batch_size).of({data_size}), or of batch_fisher's."
        )
        raise ValueError(
            f"weights are for num_examples = {num_examples}{or_filled}, but data has {data_size} "
            f"examples on its leading axis.{hint if data_size < num_examples else ''}"
        )
    shape, indices = weights.values.shape, weights.indices
    dims, draws = (2, "(draws, ") if stacked else (1, "(")
    if indices is None and (len(shape) != dims or shape[-1] != num_examples):
        comma = "" if stacked else ","
        raise ValueError(
            f"weights.values must have shape {draws}{num_examples}{comma}), one for each example, "
            f"got {shape}."
        )
    if indices is not None and (len(shape) != dims or indices.shape != shape):
        kind = "stacks of vectors" if stacked else "vectors"
        raise ValueError(
            f"weights.values and weights.indices must be {kind} of the same length, "
            f"got shapes {shape} and {indices.shape}."
        )
