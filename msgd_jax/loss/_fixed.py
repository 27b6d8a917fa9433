"""Losses at fixed keys and fixed statistics, so that L is a function of the parameters only."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding
from jax.tree_util import KeyPath
from jaxtyping import Array, Float, Key

from msgd_jax import _mesh, _validate
from msgd_jax._streams import of_examples
from msgd_jax._typing import Batch, Data, LossVectorFn, ModelState, Params, PyTree
from msgd_jax._values import bound
from msgd_jax.loss import _drawn, _outputs


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


def _at_keys_of_batch(
    loss_vector_fn: LossVectorFn, params: Params, batch: WithKeys, *state: ModelState
) -> PyTree:
    if not isinstance(batch, WithKeys):
        raise TypeError(
            "data must be a loss.WithKeys(data, keys), as losses.data is, since this loss vector "
            f"was made with key=, got {_validate.shown(batch)}."
        )
    # Cloned, since every evaluation uses the same keys, which jax's checker of keys forbids.
    return loss_vector_fn(params, batch.data, *state, jax.random.clone(batch.keys))


def at_fixed(
    loss_vector_fn: LossVectorFn,
    data: Data,
    model_state: ModelState | None,
    key: Key[Array, ""] | None,
    sharding: NamedSharding | None,
) -> tuple[LossVectorFn, Data, tuple[ModelState, ...]]:
    """A function of (params, batch[, state]), its data with keys if it takes some, and its state.

    The state is in a tuple, which is empty for None and (). Raises TypeError or ValueError if the
    function takes other arguments, or the state or the key is none.
    """
    stateless = model_state is None or (isinstance(model_state, tuple) and not model_state)
    takes = _outputs.Takes(has_state=not stateless, has_keys=key is not None)
    shown = ["..." if has else None for has in (takes.has_state, takes.has_keys)]
    hint = "model_state={} and key={} say".format(*shown)
    _outputs.check_takes(loss_vector_fn, takes, hint)
    if not stateless:
        checked = functools.partial(_state_leaf, sharding)
        model_state = jax.tree_util.tree_map_with_path(checked, model_state)
    state = () if stateless else (model_state,)
    if key is not None:
        _validate.prng_key("key", key)
        data = with_keys(data, key, sharding)
        loss_vector_fn = bound(_at_keys_of_batch, loss_vector_fn)
    return loss_vector_fn, data, state


def _state_leaf(sharding: NamedSharding | None, path: KeyPath, leaf: Any) -> Any:
    """A checked leaf of the statistics, in host memory if its layout is a part of its type.

    The losses read the statistics from outside, which `jax.shard_map` allows of such arrays only.
    """
    place = _validate.place("model_state", path)
    _validate.leaf_dtype(place, leaf)
    if not isinstance(leaf, jax.Array):
        return leaf
    layout = jax.typeof(leaf).sharding
    if layout.mesh.empty or AxisType.Explicit not in layout.mesh.axis_types:
        return leaf
    if isinstance(leaf, Tracer):
        if sharding is None:
            return leaf
        raise ValueError(
            f"{place} must not be traced while it is on a mesh with explicit axes, since the "
            "examples are spread: make the LossVector outside of jax.jit, and give it to the "
            "compiled function as an argument, or use a mesh with axes of type AxisType.Auto."
        )
    readable = leaf.is_fully_addressable or leaf.is_fully_replicated
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(leaf) if readable and not is_key else leaf


def at_fixed_state(loss_vector_fn: LossVectorFn, model_state: ModelState) -> LossVectorFn:
    """A loss vector function of (params, batch), from one of (params, batch, state)."""

    def losses_of(params: Params, batch: Batch) -> Float[Array, " B"]:
        size, takes = _validate.leading_axis("batch", batch), _outputs.Takes(has_state=True)

        def state_after(batch: Batch) -> ModelState:
            return _outputs.call(loss_vector_fn, takes, params, batch, size, model_state, None)[1]

        _check_independence(state_after, batch)
        return _outputs.call(loss_vector_fn, takes, params, batch, size, model_state, None)[0]

    return losses_of


def _check_independence(state_after: Callable[[Batch], ModelState], batch: Batch) -> None:
    """Raises ValueError if the returned statistics depend on the batch, as in training mode.

    Then the losses are likely to use the statistics of the batch too, and so depend on each other,
    which nothing in the results would show.
    """
    # `jax.vmap` over one batch finds what depends on it, also through the user's own jit or scan.
    try:
        jax.eval_shape(
            jax.vmap(state_after, out_axes=None), jax.tree.map(lambda leaf: leaf[None], batch)
        )
    except ValueError as error:
        if "out_axes" not in str(error):
            raise
        raise ValueError(
            "loss_vector_fn must be in evaluation mode, since a LossVector has fixed statistics, "
            "but the model_state that it returns depends on the batch: call module.eval(), give "
            "train=False, or the like. If the losses use the given statistics alone, return these: "
            "lambda params, batch, state: (f(params, batch, state)[0], state)."
        ) from None
