"""The optimizers of noisy gradients: optax chains and schedules made from a configuration."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key

from experiments.training.algorithms import Additive
from experiments.training.config import TrainConfig
from msgd_jax import covariance, loss, noise
from msgd_jax._streams import Stream, derive


def scaled_learning_rate(config: TrainConfig) -> float:
    """The initial learning rate, scaled with the batch size if the configuration says so."""
    power = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}[config.learning_rate_scaling]
    return config.learning_rate * config.batch_ratio**power


def schedule(config: TrainConfig) -> optax.Schedule:
    """The learning rate at each iteration: constant between the decays."""
    decays = {config.in_regime(at): config.decay_factor for at in config.decay_at}
    return optax.piecewise_constant_schedule(scaled_learning_rate(config), decays)


def make(
    config: TrainConfig, *before: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Gradient descent with the momentum, weight decay and schedule of a configuration.

    Weight decay is added to the noisy gradient, so it is part of the momentum (as in PyTorch, which
    the paper used) but not of the noise.

    Args:
        config: the configuration of the run.
        *before: transformations that are applied to the noisy gradient first.
    """
    rate = schedule(config) if config.decay_at else scaled_learning_rate(config)
    decay = [optax.add_decayed_weights(config.weight_decay)] if config.weight_decay else []
    return optax.chain(*before, *decay, optax.sgd(rate, momentum=config.momentum or None))


class AdditiveNoiseState(NamedTuple):
    """State of `additive_noise`.

    Attributes:
        step: the number of updates made.
        key: the PRNG key, the same at every step.
        variances: b times the variances of the noise when they were last computed, like the
            parameters.
    """

    step: Int[Array, ""]
    key: Key[Array, ""]
    variances: Any


def additive_noise(
    key: Key[Array, ""],
    kind: Additive,
    *,
    batch_size: int,
    refresh_every: int = 10,
    microbatch_size: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adds Gaussian noise without correlations; its variances are refreshed regularly.

    Two common baselines (Zhu et al. 2019): the covariance is ``diag(F) / b`` ("GLD diag"), or the
    isotropic one with the trace of SGD's, ``trace(S) / (b d) I`` for d parameters. ``update`` needs
    ``loss_vector_fn`` and ``data``, which `msgd_jax.train.make_step` passes on.

    Args:
        key: a typed PRNG key, the key of the run.
        kind: "diagonal-fisher" or "isotropic"; the two draw different normals from a key.
        batch_size: b, the batch size of the SGD whose scale the noise has.
        refresh_every: the number of steps for which the diagonal is kept.
        microbatch_size: the number of examples whose gradients are in memory at the same time; None
            for all.

    Raises:
        ValueError: if there is no such kind of noise; from ``update``, if it is not given the
            losses of single examples.
    """
    if kind not in ("diagonal-fisher", "isotropic"):
        raise ValueError(f"kind must be diagonal-fisher or isotropic, got {kind!r}.")

    def init(params: Any) -> AdditiveNoiseState:
        zeros = optax.tree.zeros_like(params)
        # Copied, since a training loop donates the state's key and may not donate a buffer twice.
        own = jnp.copy(jax.random.clone(key))
        return AdditiveNoiseState(jnp.zeros((), jnp.int32), own, zeros)

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        loss_vector_fn: Any = None,
        data: Any = None,
        **_: Any,
    ) -> tuple[Any, AdditiveNoiseState]:
        if loss_vector_fn is None:
            raise ValueError(
                "additive_noise needs loss_vector_fn: losses of single examples, which a net "
                "with batch norm does not have."
            )

        def refreshed() -> Any:
            losses = loss.LossVector(loss_vector_fn, data, microbatch_size=microbatch_size)
            if kind == "diagonal-fisher":
                return covariance.diagonal(losses, params, "fisher")
            single = noise.sgd(losses.num_examples, batch_size=1)
            diagonal = covariance.diagonal(losses, params, single)  # The diagonal of S.
            mean = optax.tree.sum(diagonal) / optax.tree.size(diagonal)
            return jax.tree.map(lambda leaf: jnp.full_like(leaf, mean), diagonal)

        due = state.step % refresh_every == 0
        variances = jax.lax.cond(due, refreshed, lambda: state.variances)
        leaves, structure = jax.tree.flatten(variances)
        # The numbers of the isotropic noise's leaves follow those of the diagonal one.
        first = len(leaves) if kind == "isotropic" else 0

        def normals(i: int, leaf: Array) -> Array:
            own = derive(state.key, Stream.LANGEVIN, state.step, i)
            return jnp.sqrt(leaf / batch_size) * jax.random.normal(own, leaf.shape, leaf.dtype)

        noises = [normals(first + i, leaf) for i, leaf in enumerate(leaves)]
        noisy = jax.tree.map(jnp.add, updates, jax.tree.unflatten(structure, noises))
        return noisy, AdditiveNoiseState(state.step + 1, state.key, variances)

    return optax.GradientTransformationExtraArgs(init, update)
