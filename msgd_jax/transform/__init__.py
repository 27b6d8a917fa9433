"""Laws of weights as optax gradient transformations, with the key in the optimizer's state.

There are two ways to the same update for the same law, key and step:

* `multiplicative_noise` computes the noisy gradient itself, with one backward pass, from the loss
  vector function and the data that ``update`` is given (the fast algorithm). `with_noise` puts any
  optimizer behind it, and `msgd` a learning rate and momentum.
* `aggregate_per_example` takes per-example gradients that you have computed already, and adds them
  up with the weights of the law.
"""

from msgd_jax.transform._aggregate import AggregateState, aggregate_per_example
from msgd_jax.transform._noisy import (
    MultiplicativeNoiseState,
    msgd,
    multiplicative_noise,
    with_noise,
)

__all__ = [
    "AggregateState",
    "MultiplicativeNoiseState",
    "aggregate_per_example",
    "msgd",
    "multiplicative_noise",
    "with_noise",
]
