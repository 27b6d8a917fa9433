"""Laws of weights as optax gradient transformations: keys live in the state, chains work as usual.

There are two routes to the same update, for the same law, key and step:

* `multiplicative_noise` computes the noisy gradient itself, with one backward pass, from the loss
  vector function and the data that ``update`` is given (the fast algorithm; `with_noise` puts any
  optimizer behind it, `msgd` a learning rate and momentum);
* `aggregate_per_example` takes per-example gradients that you have already, and adds them up with
  the law's weights.
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
