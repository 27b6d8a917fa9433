"""Modules of flax NNX: a module and a loss of it become what `train` and `transform` take.

`trainable` takes a module apart, once: parameters that are trained, statistics that change from
batch to batch (batch norm's), frozen parts, and streams of random numbers (dropout's). The loss is
of (module, example), as if there were one example::

  def loss_fn(model, example):
      logits = model(example["x"])
      return optax.losses.softmax_cross_entropy_with_integer_labels(logits, example["y"])

  net = flax_nnx.trainable(model, loss_fn)
  step = train.make_step(net.loss_vector_fn, optimizer, law, **net.takes)
  state = train.init(net.params, optimizer, key, model_state=net.model_state)
  ...
  net.update(model, state.params, state.model_state)

flax is imported when `trainable` is called (``pip install flax``); the other modules of the library
do without it.
"""

from msgd_jax.flax_nnx._trainable import Trainable, trainable
from msgd_jax.flax_nnx._types import EXAMPLES as _EXAMPLES
from msgd_jax.flax_nnx._types import Carried

__all__ = ["EXAMPLES", "Carried", "Trainable", "trainable"]

EXAMPLES: str = _EXAMPLES
"""The name of the `jax.vmap` axis along which the examples of a micro-batch lie in a loss of one
example. `nnx.BatchNorm` layers get it as their `axis_name`; a layer of your own with statistics can
take its means along it, by ``jax.lax.pmean(x, flax_nnx.EXAMPLES)``."""
