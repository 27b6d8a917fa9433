"""Checks of weights against the examples that they are for."""

import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array

from msgd_jax import _mesh, _validate
from msgd_jax.noise import Weights


def check_length(num_examples: int, length: int, sharding: NamedSharding | None) -> None:
    """Raises ValueError unless data of this length are so many examples, filled up or not."""
    filled = num_examples + _mesh.missing(num_examples, sharding)
    if length not in (num_examples, filled):
        raise ValueError(
            f"num_examples must be the length of the data, {length}, before they were filled up "
            f"for the devices, got {num_examples}."
        )


def as_weights(weights: Weights | Array, num_examples: int) -> Weights:
    """What stands for weights, as weights of so many examples; their shape is checked later."""
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
    """Raises TypeError or ValueError unless these are weights of the data, or a stack of such.

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
