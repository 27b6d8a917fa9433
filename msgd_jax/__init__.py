"""Multiplicative-noise SGD: noisy gradients as a loss vector times a random weight vector."""

from msgd_jax import covariance, loss, noise, sde, train, transform

__all__ = ["covariance", "loss", "noise", "sde", "train", "transform"]
__version__ = "0.1.0"
