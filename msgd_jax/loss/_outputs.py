"""The state, keys and extra outputs that a loss vector function may take and return."""

import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import KeyPath
from jaxtyping import Array, Bool, Key

from msgd_jax import _dtypes, _validate
from msgd_jax._typing import Batch, LossVectorFn, ModelState, Params, PyTree


class Outputs(NamedTuple):
    """Extra outputs of the forward pass, and how those of several micro-batches are combined.

    A loss vector function with `has_aux` returns an `Outputs`, and the combined `Outputs` comes
    with the value. An array of shape [B, ...] is averaged over the examples if it is in `averaged`,
    and kept whole if it is in `stacked`::

      correct = logits.argmax(-1) == batch["label"]
      return losses, loss.Outputs(averaged={"accuracy": correct}, stacked={"logits": logits})

    Attributes:
        averaged: a pytree of per-example arrays [B, ...] of numbers or booleans. The result is
            their plain mean over the examples that the step evaluates, [...], in float32 or wider.
            It is not weighted by W. An example that a sparse law lists twice counts twice, and
            examples that only fill up a micro-batch or a device do not count.
        stacked: a pytree of arrays of numbers of any shapes [...]. The result holds one array per
            micro-batch, [M, ...], in the order in which the micro-batches are computed; M = 1
            without micro-batches. If examples are spread over D devices it is [D, M, ...], each
            part on its own device. Per-example arrays in it include the examples that only fill up
            the last micro-batch or the devices.
    """

    averaged: PyTree = ()
    stacked: PyTree = ()


class Constants(NamedTuple):
    """A part of the mutable statistics that no step changes, such as the frozen layers of a net.

    It is part of the state and so an argument of the compiled step. (An array that the loss reads
    from outside would be copied into each compiled program.) The loss returns a `Constants` of the
    same structure, whose values are ignored: the state keeps its own, bit for bit. Constants are
    not averaged over devices, and are laid out on them as the parameters are. A state that holds
    constants only makes no ghost batches::

      def loss_vector_fn(params, batch, state):
          features = backbone(state.arrays, batch["x"])
          return losses_of(head(params, features), batch["y"]), state

      train.init(params, optimizer, key, model_state=loss.Constants(backbone_params))

    Attributes:
        arrays: a pytree of arrays.
    """

    arrays: PyTree = ()


def without_constants(state: ModelState) -> tuple[ModelState, list[Constants]]:
    """The statistics with each `Constants` replaced by an empty one, and the list of constants."""
    entries, structure = jax.tree.flatten(state, is_leaf=_are_constants)
    constants = [entry for entry in entries if _are_constants(entry)]
    moving = [Constants() if _are_constants(entry) else entry for entry in entries]
    return jax.tree.unflatten(structure, moving), constants


def with_constants(moving: ModelState, constants: list[Constants]) -> ModelState:
    """The inverse of `without_constants`."""
    entries, structure = jax.tree.flatten(moving, is_leaf=_are_constants)
    ours = iter(constants)
    whole = [next(ours) if _are_constants(entry) else entry for entry in entries]
    return jax.tree.unflatten(structure, whole)


def _are_constants(entry: Any) -> bool:
    return isinstance(entry, Constants)


class Takes(NamedTuple):
    """Which optional arguments a loss vector function takes, and which optional results it returns.

    Their order is fixed: ``loss_vector_fn(params, batch[, state][, keys])`` returns ``losses``, or
    a tuple ``(losses[, state][, aux])``.
    """

    has_state: bool = False
    has_aux: bool = False
    has_keys: bool = False

    @property
    def nothing(self) -> bool:
        """Whether it is ``loss_vector_fn(params, batch) -> losses``."""
        return not any(self)


def check_takes(loss_vector_fn: LossVectorFn, takes: Takes, hint: str = "") -> None:
    """Raises TypeError unless `loss_vector_fn` can be called with the arguments in `takes`."""
    for name, flag in takes._asdict().items():
        if not isinstance(flag, (bool, np.bool_)):
            raise TypeError(f"{name} must be True or False, got {_validate.shown(flag)}.")
    names = ["params", "batch"]
    names += ["state"] * takes.has_state + ["keys"] * takes.has_keys
    try:
        signature = inspect.signature(loss_vector_fn)
    except (TypeError, ValueError):  # functions written in C have no signature
        return
    try:
        signature.bind(*names)
    except TypeError:
        flags = f"has_state = {takes.has_state} and has_keys = {takes.has_keys} say"
        raise TypeError(
            f"loss_vector_fn must take the arguments ({', '.join(names)}), as {hint or flags}, "
            f"got a function of {str(signature)[:120]}."
        ) from None


def call(
    loss_vector_fn: LossVectorFn,
    takes: Takes,
    params: Params,
    batch: Batch,
    size: int,
    state: ModelState,
    keys: Key[Array, " B"] | None,
) -> tuple[Array, ModelState, Outputs]:
    """The checked losses of a batch of this size, the new statistics, and the extra outputs.

    Raises:
        TypeError: if `loss_vector_fn` does not return the tuple that `takes` says, or its losses or
            extra outputs are not numbers.
        ValueError: if the losses or extra outputs do not have one entry per example, or the
            statistics change their structure, shapes or dtypes.
    """
    given = [state] * takes.has_state + [keys] * takes.has_keys
    found = loss_vector_fn(params, batch, *given)
    expected = ["losses"] + ["state"] * takes.has_state + ["aux"] * takes.has_aux
    if len(expected) == 1:
        losses, rest = found, []
    elif isinstance(found, tuple) and len(found) == len(expected):
        losses, *rest = found
    else:
        got = f"a tuple of {len(found)}" if isinstance(found, tuple) else type(found).__name__
        raise TypeError(
            f"loss_vector_fn must return ({', '.join(expected)}), as has_state = "
            f"{takes.has_state} and has_aux = {takes.has_aux} say, got {got}."
        )
    _validate.loss_vector(losses, size)
    if takes.has_state:
        new, *rest = rest
        _validate.same_kind("loss_vector_fn", "model_state", state, new)
        state = new
    outputs = checked_outputs(rest[0], size) if takes.has_aux else Outputs()
    return losses, state, outputs


def checked_outputs(aux: Any, size: int) -> Outputs:
    """Returns `aux` with arrays as leaves if it is an `Outputs`; raises TypeError or ValueError."""
    if not isinstance(aux, Outputs):
        raise TypeError(
            "aux must be a loss.Outputs(averaged=..., stacked=...), which says of each array "
            "whether it is averaged over the examples, [B, ...], or kept whole for each "
            f"micro-batch, got {_validate.shown(aux)}."
        )

    def check(name: str, path: KeyPath, leaf: Any) -> Array:
        where = _validate.place(f"aux.{name}", path)
        dtype = _validate.leaf_dtype(where, leaf)
        if not (jnp.issubdtype(dtype, jnp.number) or dtype == jnp.bool_):
            raise TypeError(f"{where} must hold numbers or booleans, got {dtype}.")
        if name == "averaged" and jnp.shape(leaf)[:1] != (size,):
            raise ValueError(
                f"{where} must have one entry per example of the batch, shape ({size}, ...), got "
                f"{jnp.shape(leaf)}. Arrays of other shapes belong in loss.Outputs(stacked=)."
            )
        return jnp.asarray(leaf)

    return Outputs(
        *(
            jax.tree_util.tree_map_with_path(lambda *at, n=name: check(n, *at), tree)
            for name, tree in aux._asdict().items()
        )
    )


def sums(averaged: PyTree, real: Bool[Array, " B"] | None) -> PyTree:
    """The sums over the examples of a batch, without the examples that only fill it up."""

    def total(leaf: Array) -> Array:
        inexact = jnp.issubdtype(leaf.dtype, jnp.inexact)
        leaf = leaf.astype(_dtypes.accumulator(leaf.dtype) if inexact else jnp.float32)
        if real is None:
            return leaf.sum(0)
        counted = real.reshape(-1, *[1] * (leaf.ndim - 1))
        return jnp.where(counted, leaf, jnp.zeros((), leaf.dtype)).sum(0)

    return jax.tree.map(total, averaged)
