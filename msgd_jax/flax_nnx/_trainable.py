"""A module of NNX and its loss, as a loss vector function for `train` and `transform`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from msgd_jax import _validate
from msgd_jax import loss as loss_lib
from msgd_jax._typing import LossVectorFn, ModelState, Params
from msgd_jax.flax_nnx._types import Carried


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Trainable:
    """A module taken apart, and its loss as a function of the parts.

    Attributes:
        loss_vector_fn: maps ``(params, batch[, model_state][, keys])`` to ``losses``, or to a tuple
            ``(losses[, model_state][, aux])``.
        params: the parameters to train, an `nnx.State`, for `train.init` or the ``init`` of an
            optax transformation.
        model_state: a `Carried` of the statistics and frozen parts; () if there are none.
        takes: which optional arguments and results `loss_vector_fn` has, as keyword arguments for
            `train.make_step`, `streaming.make_loop`, `loss.noisy_value_and_grad`, ...: a dictionary
            of has_state, has_aux and has_keys.
    """

    loss_vector_fn: LossVectorFn
    params: Params
    model_state: ModelState
    takes: dict[str, bool]
    _parts: Any = dataclasses.field(repr=False)

    def split(self, module: Any) -> tuple[Params, ModelState]:
        """``(params, model_state)`` with the current arrays of a module of the same structure.

        Raises:
            TypeError: if `module` is not an `nnx.Module`.
            ValueError: if it holds variables that the module given to `trainable` did not hold.
        """
        params, carried, _, _ = self._parts.of(module)
        _same("params", self.params, params)
        return params, carried if self.takes["has_state"] else ()

    def merge(self, params: Params, model_state: ModelState = ()) -> Any:
        """A module with these arrays, for an evaluation or for saving.

        Its mode, ``train()`` or ``eval()``, and its streams of random numbers are those of the
        module when it was given to `trainable`. The method can be called inside `jax.jit`.

        Raises:
            ValueError: if the structure, a shape or a dtype of `params` or `model_state` differs
                from that of the attributes.
        """
        self._check(params, model_state)
        return self._parts.merged(params, self._carried(model_state), self._parts.rngs)

    def update(self, module: Any, params: Params, model_state: ModelState = ()) -> None:
        """Writes parameters and statistics into a module; its frozen parts are not changed.

        The arrays are copied, so that the training state that holds them can be donated.

        Raises:
            TypeError, ValueError: as `split` and `merge`.
        """
        self._check(params, model_state)
        self.split(module)
        copies = jax.tree.map(jnp.copy, (params, self._carried(model_state).stats))
        self._parts.write(module, *copies)

    def _carried(self, model_state: ModelState) -> Carried:
        return model_state if self.takes["has_state"] else self._parts.nothing

    def _check(self, params: Params, model_state: ModelState) -> None:
        _same("params", self.params, params)
        _same("model_state", self.model_state, model_state)


def trainable(
    module: Any,
    loss_fn: Callable[..., Any],
    *,
    wrt: Any = None,
    mutable: Any = None,
    frozen: Any = None,
    of_batch: bool = False,
    has_aux: bool = False,
    has_keys: bool = False,
) -> Trainable:
    """Makes a loss vector function of an NNX module and a loss of (module, example).

    Each call of the loss gets a new module, in the mode in which `module` is now: call
    ``module.train()`` first. The given module is only read.

    *Dropout*, and everything else that draws from `nnx.Rngs` inside the module, draws from the key
    of the example: each stream starts anew from it, at count 0. The result is a function of (run,
    step, example), in any micro-batches, on any number of devices, and after a resume. The counters
    of the module are not used and do not change.

    *Batch norm* couples the examples of a micro-batch, which is a ghost batch. `nnx.BatchNorm`
    layers take their means over the examples of the micro-batch, and their running statistics are
    in the `model_state`. Other layers with statistics must take means along the axis `EXAMPLES`, or
    need `of_batch`.

    *Parameters* that a loss writes into, as `nnx.SpectralNorm` does, have these values for the rest
    of the call only: an optimizer alone changes them.

    *Frozen parts* are the `nnx.Param` that `wrt` leaves out. They are in the `model_state` too, in
    a `loss.Constants`: they are not copied into compiled programs, have no gradient, and never
    change.

    Args:
        module: an `nnx.Module`.
        loss_fn: ``loss_fn(module, example)`` returns a scalar, for an example without its leading
          axis.
        wrt: an NNX filter of the variables to train: None for ``nnx.Param``; ``nnx.LoRAParam``, or
          ``nnx.All(nnx.Param, nnx.PathContains("head"))``.
        mutable: an NNX filter of the statistics that change from batch to batch: None for
          ``nnx.BatchStat``.
        frozen: an NNX filter of variables that never change, in addition to ``nnx.Param``; None for
          no others.
        of_batch: whether it is ``loss_fn(module, batch)`` and returns the losses [B]. The loss may
          then not draw from the streams of the module, since their keys are not per example.
        has_aux: whether `loss_fn` returns ``(loss, aux)``, with `aux` a pytree of arrays to be
          averaged over the examples; with `of_batch`, ``(losses, loss.Outputs(...))``.
        has_keys: whether it is ``loss_fn(module, example, key)``, with a key for augmentation, for
          example; with `of_batch` it takes the keys of the batch, [B].

    Returns:
        A `Trainable`.

    Raises:
        ImportError: if flax is not installed (``pip install 'msgd-jax[flax]'``).
        TypeError: if `module` is not an `nnx.Module`, `loss_fn` is not a function, `wrt`, `mutable`
            or `frozen` is not an NNX filter, or a parameter is not floating point; when traced, if
            a frozen variable is changed, a variable that is not trained is deleted, or with
            `of_batch` the loss draws from a stream.
        ValueError: if `wrt` picks no variables, or a variable of the module is neither trained, nor
            mutable, nor frozen; when traced, if the losses or `aux` have a wrong shape, or
            statistics differ between the examples of a micro-batch.

    Example:
        >>> import optax
        >>> from flax import nnx
        >>> from msgd_jax import flax_nnx, noise, train
        >>> class Net(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.inner, self.drop = nnx.Linear(3, 4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        ...     def __call__(self, x):
        ...         return self.drop(jnp.tanh(self.inner(x))).sum()
        >>> net = flax_nnx.trainable(Net(nnx.Rngs(0)), lambda model, x: (model(x) - 1.0) ** 2)
        >>> step = jax.jit(
        ...     train.make_step(net.loss_vector_fn, optax.adam(0.1), noise.cov(6, 2), **net.takes)
        ... )
        >>> state = train.init(net.params, optax.adam(0.1), jax.random.key(0), net.model_state)
        >>> state, metrics = step(state, jnp.ones((6, 3)))
        >>> sorted(net.merge(state.params, state.model_state).inner.kernel.shape), net.takes
        ([3, 4], {'has_state': False, 'has_aux': False, 'has_keys': True})
    """
    try:
        from flax import nnx

        from msgd_jax.flax_nnx import _losses, _parts
    except ImportError as error:
        raise ImportError("flax_nnx.trainable needs flax: pip install 'msgd-jax[flax]'.") from error
    _validate.function("loss_fn", loss_fn)
    wrt = nnx.Param if wrt is None else wrt
    trained = _parts.checked_filter("wrt", wrt)
    changing = _parts.checked_filter("mutable", nnx.BatchStat if mutable is None else mutable)
    kept = _parts.checked_filter("frozen", frozen)  # of None, nothing
    # A variable belongs to the first filter that takes it: the last gets what `wrt` leaves out.
    filters = (nnx.RngState, trained, changing, nnx.Any(nnx.Param, kept))
    params, carried, graph, rngs = _parts.taken_apart(module, filters)
    if not jax.tree.leaves(params):
        raise ValueError(f"wrt must pick variables of the module to train, {wrt} picks none.")
    _validate.floating_params(params, "the parameters that wrt picks, module")
    nothing = Carried(nnx.State({}), loss_lib.Constants(nnx.State({})))
    parts = _parts.Parts(filters=filters, graph=graph, rngs=rngs, nothing=nothing)
    takes = loss_lib.Takes(
        has_state=bool(jax.tree.leaves(carried)),
        has_aux=has_aux,
        has_keys=has_keys or (bool(jax.tree.leaves(rngs)) and not of_batch),
    )
    if of_batch:
        loss_vector_fn = _losses.of_batch(parts, loss_fn, takes)
    else:
        loss_vector_fn = _losses.of_examples(parts, loss_fn, takes, has_keys)
    return Trainable(
        loss_vector_fn=loss_vector_fn,
        params=params,
        model_state=carried if takes.has_state else (),
        takes=takes._asdict(),
        _parts=parts,
    )


def _same(name: str, expected: Any, given: Any) -> None:
    """Raises ValueError unless `given` has the structure, shapes and dtypes of `expected`."""
    if (difference := _validate.first_difference(name, expected, given)) is not None:
        raise ValueError(
            f"{name} must be of the module that trainable was given: expected {difference[0]}, got "
            f"{difference[1]}."
        )
