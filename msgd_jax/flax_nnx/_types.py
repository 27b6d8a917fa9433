"""What the parts of a module are called."""

from typing import Any, NamedTuple

from msgd_jax import loss as loss_lib

EXAMPLES = "examples"
"""The name of the `jax.vmap` axis along which the examples of a micro-batch lie in a loss of one
example. `nnx.BatchNorm` layers get it as their `axis_name`; a layer of your own with statistics can
take its means along it, by ``jax.lax.pmean(x, flax_nnx.EXAMPLES)``."""


class Carried(NamedTuple):
    """The `model_state` of a module.

    Attributes:
        stats: an `nnx.State` of the variables that change from batch to batch.
        frozen: a `loss.Constants` of an `nnx.State` of those that never do.
    """

    stats: Any
    frozen: loss_lib.Constants
