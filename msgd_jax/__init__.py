"""Multiplicative-noise SGD: noisy gradients as a loss vector times a random weight vector.

A noisy gradient is ``grad(L(theta) . W)``: L(theta) is the vector of the losses of all N examples,
and W a random weight vector with mean 1/N that does not depend on theta. The law of W decides the
covariance of the noise, and each law costs one backward pass per step. Draws are functions of
(key, step). The modules, in the order in which most readers need them:

* `noise`: laws of W: GD, SGD, Gaussian, Bernoulli, sparse, heavy tails; their exact moments.
* `loss`: loss vectors, and the gradient of a loss vector times W, in micro-batches if need be.
* `transform`: laws as optax transformations, for an optax chain of your own.
* `train`: a state, a step of any optax optimizer, and many steps in one compiled loop.
* `flax_nnx`: a module of flax NNX and its loss, made ready for `train` and `transform`.
* `sharding`: examples spread over many devices, and the same key in all processes.
* `streaming`: training on examples that are read from a source when they are needed.
* `covariance`: the covariance of the noisy gradient: matrices, spectra, operators, samplers.
* `measure`: the noise of a given training: its scale, shape, tails and memory.
* `sde`: the SDE of a law: paths, strong and weak errors, stationary covariances, exit times.
* `complexity`: local complexities, the implicit regularisers of the noise.

Example: least squares by full gradients with the noise of batches of 10, in one compiled loop.

>>> import jax, jax.numpy as jnp, optax
>>> from msgd_jax import loss, noise, train
>>> losses, data = loss.per_example(lambda w, x: (w - x) ** 2), jnp.linspace(0.0, 1.0, 100)
>>> step = train.make_step(losses, optax.sgd(0.01), noise.cov(num_examples=100, batch_size=10))
>>> state = train.init(jnp.array(3.0), optax.sgd(0.01), jax.random.key(0))
>>> state, metrics = train.make_loop(step, max_steps=500)(state, data, 500)
>>> print(f"{state.params:.1f}", metrics.loss.shape)
0.5 (500,)

``help(msgd_jax.noise)`` and the like say more. Extras of the package: ``flax``, ``solvers`` (lineax
and diffrax), ``streaming``, ``cuda`` and ``tpu``, as in ``pip install 'msgd-jax[solvers]'``.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
__version__ = "0.2.0.dev0"


def __getattr__(name: str) -> ModuleType:
    """Imports a module when it is first used, so that a program waits for those that it uses."""
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__all__", "__doc__", "__version__"])
