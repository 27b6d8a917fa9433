"""What the parts of a module are called."""

from typing import Any, NamedTuple

from msgd_jax import loss as loss_lib

EXAMPLES = "examples"
"""What `flax_nnx.EXAMPLES` is."""


class Carried(NamedTuple):
    """The `model_state` of a module.

    Attributes:
        stats: an `nnx.State` of the variables that change from batch to batch.
        frozen: a `loss.Constants` of an `nnx.State` of those that never do.
    """

    stats: Any
    frozen: loss_lib.Constants
