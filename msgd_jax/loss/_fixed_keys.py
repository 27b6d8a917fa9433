"""Losses at fixed keys, so that L is a function of the parameters only."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Key

from msgd_jax import _mesh, _validate
from msgd_jax._streams import of_examples
from msgd_jax._typing import Data, LossVectorFn, Params
from msgd_jax._values import Bound, bound
from msgd_jax.loss import _drawn


class WithKeys(NamedTuple):
    """Data with one key per example: the data of a `LossVector` that was given a key.

    Attributes:
        data: the examples, a pytree of arrays [N, ...].
        keys: typed PRNG keys, [N].
    """

    data: Data
    keys: Key[Array, " N"]


def with_keys(data: Data, key: Key[Array, ""], sharding: NamedSharding | None) -> WithKeys:
    """Data with the keys that its examples have at step 0 of a run."""
    size = _validate.leading_axis("data", data)

    def keys_of(key: Key[Array, ""]) -> Key[Array, " N"]:
        return of_examples(_drawn.losses_key(key, 0), jnp.arange(size, dtype=jnp.int32))

    where = None if _mesh.missing(size, sharding) else sharding
    return WithKeys(data, _mesh.spread(keys_of, where)(key))


def at_fixed_keys(loss_vector_fn: LossVectorFn) -> Bound:
    """A loss vector function of batches that contain their keys; it compares by value."""
    return bound(_at_keys_of_batch, loss_vector_fn)


def _at_keys_of_batch(
    loss_vector_fn: LossVectorFn, params: Params, batch: WithKeys
) -> Float[Array, " B"]:
    if not isinstance(batch, WithKeys):
        raise TypeError(
            "data must be a loss.WithKeys(data, keys), as losses.data is, since this loss vector "
            f"was made with key=, got {_validate.shown(batch)}."
        )
    # Cloned, since every evaluation uses the same keys, which jax's checker of keys forbids.
    return loss_vector_fn(params, batch.data, jax.random.clone(batch.keys))
