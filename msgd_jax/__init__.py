"""Multiplicative-noise SGD: noisy gradients as a loss vector times a random weight vector."""

from msgd_jax import (
    complexity,
    covariance,
    flax_nnx,
    loss,
    measure,
    noise,
    sde,
    sharding,
    streaming,
    train,
    transform,
)

__all__ = [
    "complexity",
    "covariance",
    "flax_nnx",
    "loss",
    "measure",
    "noise",
    "sde",
    "sharding",
    "streaming",
    "train",
    "transform",
]
__version__ = "0.1.0"
