"""The name of the axis of examples, and the parts of a module that are not trained."""

from typing import Any, NamedTuple

from msgd_jax import loss as loss_lib

EXAMPLES = "examples"
"""The value of `flax_nnx.EXAMPLES`."""


class Carried(NamedTuple):
    """The `model_state` of a module.

    Attributes:
        stats: an `nnx.State` of the variables that change from batch to batch.
        frozen: a `loss.Constants` of an `nnx.State` of the variables that never change.
    """

    stats: Any
    frozen: loss_lib.Constants
