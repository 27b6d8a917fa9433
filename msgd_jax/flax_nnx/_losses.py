"""Loss vector functions that put the module together and call the user's loss."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from msgd_jax import loss as loss_lib
from msgd_jax._typing import Batch, Example, LossVectorFn, Params
from msgd_jax.flax_nnx import _parts
from msgd_jax.flax_nnx._types import EXAMPLES, Carried


def of_examples(
    parts: _parts.Parts, loss_fn: Callable[..., Any], takes: loss_lib.Takes, has_keys: bool
) -> LossVectorFn:
    """A loss vector function from a loss of (module, example), by `jax.vmap`."""

    def loss_vector_fn(params: Params, batch: Batch, *rest: Any) -> Any:
        carried = rest[0] if takes.has_state else parts.nothing

        def of_one(example: Example, *key: Key[Array, ""]) -> Any:
            rngs, own = _parts.streams_of(parts.rngs, key[0], has_keys) if key else (parts.rngs, ())
            model = parts.merged(params, carried, rngs)
            # Batch norm layers take their means over the examples of the micro-batch.
            model.set_attributes(nnx.BatchNorm, axis_name=EXAMPLES, raise_if_not_found=False)
            found = loss_fn(model, example, *own)
            losses, aux = _in_two(found) if takes.has_aux else (found, ())
            if jnp.shape(losses) != ():
                raise ValueError(
                    "loss_fn must return a scalar for one example, got shape "
                    f"{jnp.shape(losses)}. (Of a whole batch: of_batch=True.)"
                )
            return losses, aux, parts.after(model, carried).stats

        keys = rest[takes.has_state :]
        try:
            losses, aux, stats = jax.vmap(of_one, axis_name=EXAMPLES, out_axes=(0, 0, None))(
                batch, *keys
            )
        except ValueError as error:
            # With out_axes=None, vmap raises if the statistics differ between examples.
            if "out_axes" not in str(error):
                raise
            names = ", ".join(_parts.named(path, x) for path, x in _parts.variables(carried.stats))
            raise ValueError(
                "statistics must be the same for all examples of a micro-batch, but some of "
                f"{names[:120]} differ: take means by jax.lax.pmean(x, flax_nnx.EXAMPLES), as "
                "nnx.BatchNorm does here, or give a loss of the whole batch, of_batch=True."
            ) from error
        outputs = loss_lib.Outputs(averaged=aux)
        return _result(takes, losses, carried._replace(stats=stats), outputs)

    return _with_signature(loss_vector_fn, takes)


def of_batch(
    parts: _parts.Parts, loss_fn: Callable[..., Any], takes: loss_lib.Takes
) -> LossVectorFn:
    """A loss vector function from a loss of (module, batch)."""

    def loss_vector_fn(params: Params, batch: Batch, *rest: Any) -> Any:
        carried = rest[0] if takes.has_state else parts.nothing
        model = parts.merged(params, carried, parts.rngs)
        found = loss_fn(model, batch, *rest[takes.has_state :])
        losses, aux = _in_two(found) if takes.has_aux else (found, loss_lib.Outputs())
        _check_not_drawn(model, parts.rngs)
        return _result(takes, losses, parts.after(model, carried), aux)

    return _with_signature(loss_vector_fn, takes)


def _in_two(found: Any) -> tuple[Any, Any]:
    """The loss and the extra outputs; raises TypeError unless `found` is a tuple of two."""
    if not (isinstance(found, tuple) and len(found) == 2):
        raise TypeError(
            f"loss_fn must return (loss, aux), as has_aux = True says, got {type(found).__name__}."
        )
    return found


def _result(takes: loss_lib.Takes, losses: Any, carried: Carried, aux: loss_lib.Outputs) -> Any:
    """The result of a loss vector function: losses, or a tuple with the state and the outputs."""
    if not (takes.has_state or takes.has_aux):
        return losses
    return (losses, *[carried] * takes.has_state, *[aux] * takes.has_aux)


def _with_signature(loss_vector_fn: LossVectorFn, takes: loss_lib.Takes) -> LossVectorFn:
    """The function with a signature of the arguments in `takes`, so that other steps refuse it."""
    names = ["params", "batch", *["state"] * takes.has_state, *["keys"] * takes.has_keys]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature([inspect.Parameter(name, kind) for name in names])
    loss_vector_fn.__signature__ = signature
    return loss_vector_fn


def _check_not_drawn(model: Any, rngs: Any) -> None:
    """Raises TypeError if a module has drawn from its streams."""
    now = dict(_parts.variables(nnx.state(model, nnx.RngState)))
    for path, given in _parts.variables(rngs):
        if not _parts.is_same(now[path], given):
            raise TypeError(
                f"loss_fn must not draw from {_parts.named(path[:-1], given)} with of_batch=True: "
                "its keys would be the same at each step and for all examples. Give a loss of one "
                "example, or take one key per example by has_keys=True."
            )
