"""Multiplicative-noise SGD: noisy gradients as a loss vector times a random weight vector."""

from msgd_jax import loss, noise, train, transform

__all__ = ["loss", "noise", "train", "transform"]
__version__ = "0.1.0"
