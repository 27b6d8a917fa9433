"""Per-example gradients added up with the weights of a law."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key
from optax.experimental import aggregating

from msgd_jax import _dtypes, _laws, _optimizers, _validate
from msgd_jax._typing import Params, Updates
from msgd_jax.noise import BatchLaw, MNoise
from msgd_jax.sharding import check_key_agrees


class AggregateState(NamedTuple):
    """State of `aggregate_per_example`.

    Attributes:
        step: the number of updates made so far, which is the step of the next draw of weights.
        key: the PRNG key of the run, the same at every step.
    """

    step: Int[Array, ""]
    key: Key[Array, ""]


def aggregate_per_example(law: MNoise | BatchLaw, key: Key[Array, ""]) -> aggregating.Aggregator:
    """Adds up per-example gradients with the weights of a law.

    It is the counterpart of `multiplicative_noise` for code that has per-example gradients already,
    for example to clip them: an aggregator as `optax.experimental.aggregating` defines it, which
    takes updates with a leading axis of N examples and returns updates without it. The sum is in
    float32 or wider.

    Inside ``optax.masked`` it gets the selected leaves only. ``optax.MultiSteps`` belongs behind it
    in a chain, not around it.

    Args:
        law: the law of the weights. The num_examples of an `MNoise` must be the leading axis of the
          updates; with a `BatchLaw` the updates are those of a batch that a loader drew, of any
          size.
        key: a typed PRNG key, copied into the state by ``init``.

    Returns:
        An aggregator with ``update(per_example_gradients, state, params)``. It raises ValueError if
        `params` is missing, or if the shape of a leaf, which the error names, is not ``(N,
        *parameter shape)``: gradients that are averaged already are refused.

    Raises:
        TypeError: if `law` is not a law, or `key` is not a typed PRNG key.
        ValueError: if `key` is an array of keys.

    Example:
        >>> from msgd_jax import noise, transform
        >>> gradients = jnp.asarray([2.0, 0.0, -4.0, -6.0])  # of four examples
        >>> theta = jnp.asarray(1.0)
        >>> aggregator = transform.aggregate_per_example(noise.gd(4), jax.random.key(0))
        >>> update, state = aggregator.update(gradients, aggregator.init(theta), theta)
        >>> float(update)
        -2.0
    """
    _laws.of_steps("law", law)
    _validate.prng_key("key", key)

    def init_fn(params: Params) -> AggregateState:
        del params
        check_key_agrees("key", key)
        return AggregateState(jnp.zeros((), jnp.int32), jnp.copy(jax.random.clone(key)))

    def update_fn(
        updates: Updates, state: Any, params: Params = None, **extra_args: Any
    ) -> tuple[Updates, AggregateState]:
        del extra_args
        size = _optimizers.check_per_example(updates, params)
        weights = _laws.of_data(law, size).sample(state.key, state.step)

        def weighted_sum(gradients: Float[Array, "..."]) -> Float[Array, "..."]:
            if weights.indices is not None:
                gradients = gradients[weights.indices]
            dtype = _dtypes.accumulator(gradients.dtype, weights.values.dtype)
            total = jnp.tensordot(
                weights.values.astype(dtype),
                gradients.astype(dtype),
                axes=1,
                precision=jax.lax.Precision.HIGHEST,
            )
            return total.astype(gradients.dtype)

        return jax.tree.map(weighted_sum, updates), AggregateState(state.step + 1, state.key)

    return aggregating.Aggregator(init_fn, update_fn)
