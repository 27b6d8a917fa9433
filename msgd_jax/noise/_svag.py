"""SVAG: the covariance of a law amplified, so that the iteration approaches its SDE.

Li, Malladi and Arora (2021), On the Validity of Modeling SGD with Stochastic Differential Equations
(SDEs), arXiv:2102.12470.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from msgd_jax import _validate
from msgd_jax._values import bound
from msgd_jax.noise._types import MNoise, Weights, is_sparse


def svag(base: MNoise, refinement: int) -> MNoise:
    """SVAG (Li, Malladi and Arora 2021, Eq. 5): the covariance of a law amplified by two draws.

    ``W = p W1 + q W2`` with W1, W2 independent draws of `base` and p, q = (1 +- sqrt(2l-1))/2,
    where l is the refinement. As p + q = 1 and ``p^2 + q^2 = l``, the mean is 1/N and the
    covariance is l times that of `base`. If the weights of `base` add up to 1, so do these, up to
    rounding.

    Use it in plain SGD with learning rate eta/l and l times as many steps. These cover the same
    time, with the same drift and covariance per unit of time. As l grows, the iteration approaches
    in law the SDE of `base` at learning rate eta, d theta = -grad L dt + sqrt(eta Cov(grad(L .
    W1))) dB, and the weak error decreases like 1/l (Theorem 4.3)::

      law = noise.svag(noise.sgd(N, b), refinement=l)
      step = train.make_step(losses, optax.sgd(eta / l), law)
      loop = train.make_loop(step, max_steps=l * num_steps)
      state, metrics = loop(state, data, l * num_steps)

    The key of a step is split into one for W1 and one for W2. At l = 1, p = 1 and q = 0: then only
    one vector is drawn, from the key itself, and the weights are those of `base` bit for bit.

    Args:
        base: any law of independent steps; `sgd` in the paper. The weights have its dtype. If it is
          sparse, W lists the values and indices of both draws one after the other (the weights of
          an example that is listed twice add up), and a step computes twice as many losses. If it
          is dense, W is dense.
        refinement: l, at least 1: the number of steps that replace one step of `base`.

    Raises:
        TypeError: if `base` is not a law, or `refinement` is not an integer.
        ValueError: if the steps of `base` are not independent, or `refinement` is below 1.
    """
    _validate.instance("base", base, MNoise, "noise.MNoise")
    if base.draw_at is not None:
        raise ValueError(
            f"base must have independent steps, got {base.name}, whose steps depend on each other."
        )
    refinement = _validate.positive_int("refinement", refinement)
    name = f"svag({base.name}, {refinement})"
    if refinement == 1:
        return dataclasses.replace(base, name=name)

    support_size = base.support_size * (2 if is_sparse(base) else 1)
    moments = None if base.moments is None else refinement * base.moments
    draw = bound(_draw, base.draw, base.num_examples, refinement)
    return MNoise(name, base.num_examples, support_size, moments, draw)


def _draw(
    draw_base: Callable[[Key[Array, ""]], Weights],
    num_examples: int,
    refinement: int,
    key: Key[Array, ""],
) -> Weights:
    root = math.sqrt(2 * refinement - 1)
    p, q = (1 + root) / 2, (1 - root) / 2
    first_key, second_key = jax.random.split(key)
    first, second = draw_base(first_key), draw_base(second_key)
    if first.indices is None or second.indices is None:
        return Weights(p * first.values + q * second.values, None, num_examples)
    values = jnp.concatenate([p * first.values, q * second.values])
    return Weights(values, jnp.concatenate([first.indices, second.indices]), num_examples)
