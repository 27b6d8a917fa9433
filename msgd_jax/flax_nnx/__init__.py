"""Modules of flax NNX, as loss vector functions for `train` and `transform`.

`trainable` takes a module apart, once: parameters to train, statistics that change from batch to
batch (as in batch norm), frozen parts, and streams of random numbers (as in dropout). The loss is a
function of (module, example), for a single example::

  def loss_fn(model, example):
      logits = model(example["x"])
      return optax.losses.softmax_cross_entropy_with_integer_labels(logits, example["y"])

  net = flax_nnx.trainable(model, loss_fn)
  step = train.make_step(net.loss_vector_fn, optimizer, law, **net.takes)
  state = train.init(net.params, optimizer, key, model_state=net.model_state)
  ...
  net.update(model, state.params, state.model_state)

flax is imported when `trainable` is called (``pip install 'msgd-jax[flax]'``); no
other module of the library needs it.
"""

from msgd_jax.flax_nnx._trainable import Trainable, trainable
from msgd_jax.flax_nnx._types import EXAMPLES as _EXAMPLES
from msgd_jax.flax_nnx._types import Carried

__all__ = ["EXAMPLES", "Carried", "Trainable", "trainable"]

EXAMPLES: str = _EXAMPLES
"""The name of the `jax.vmap` axis of the examples of a micro-batch, inside a loss of one example.
`nnx.BatchNorm` layers get it as their `axis_name`; a layer of your own with statistics can take
means along it by ``jax.lax.pmean(x, flax_nnx.EXAMPLES)``."""
