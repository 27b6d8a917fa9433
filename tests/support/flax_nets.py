"""A small module of flax NNX with the layers that need care, its loss, and examples."""

from typing import Any

import jax
import optax
from flax import nnx

N = 16
DATA = {
    "x": jax.random.normal(jax.random.key(1), (N, 3)),
    "y": jax.random.randint(jax.random.key(2), (N,), 0, 4),
}


class Net(nnx.Module):
    """A net of two layers, with batch norm, dropout and a low-rank addition if asked for."""

    def __init__(self, rngs, *, norm=False, drop=False, lora=False):
        self.inner = nnx.Linear(3, 8, rngs=rngs)
        self.norm: Any = nnx.BatchNorm(8, momentum=0.9, rngs=rngs) if norm else None
        self.drop: Any = nnx.Dropout(0.5, rngs=rngs) if drop else None
        self.lora: Any = nnx.LoRA(8, 2, 4, rngs=rngs) if lora else None
        self.outer = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        hidden = self.inner(x)
        if self.norm is not None:
            hidden = self.norm(hidden)
        hidden = nnx.tanh(hidden)
        if self.drop is not None:
            hidden = self.drop(hidden)
        added = 0.0 if self.lora is None else self.lora(hidden)
        return self.outer(hidden) + added


def cross_entropy(model, example):
    """The loss of one example."""
    logits = model(example["x"])
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, example["y"])


def losses_of(net):
    """The loss vector [N] of a net, given its statistics if it takes any."""
    return net.loss_vector_fn(net.params, DATA, *[net.model_state] * net.takes["has_state"])
