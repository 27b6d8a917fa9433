"""A module of NNX and its loss, as what `train` and `transform` take."""

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
        loss_vector_fn: ``(params, batch[, model_state][, keys])`` to ``losses``, or to a tuple
            ``(losses[, model_state][, aux])``.
        params: the parameters to train, an `nnx.State`, for `train.init` or an optax
            transformation's.
        model_state: a `Carried` of what else the module holds; () if that is nothing.
        takes: which of these `loss_vector_fn` takes and returns, as keyword arguments for
            `train.make_step`, `streaming.make_loop`, `loss.noisy_value_and_grad`, ...: a dictionary
            of has_state, has_aux and has_keys.
    """

    loss_vector_fn: LossVectorFn
    params: Params
    model_state: ModelState
    takes: dict[str, bool]
    _parts: Any = dataclasses.field(repr=False)

    def split(self, module: Any) -> tuple[Params, ModelState]:
        """``(params, model_state)`` of a module of the same structure, its arrays now.

        Raises:
            TypeError: if `module` is no `nnx.Module`.
            ValueError: if it holds something that the module of `trainable` did not.
        """
        params, carried, _, _ = self._parts.of(module)
        _same("params", self.params, params)
        return params, carried if self.takes["has_state"] else ()

    def merge(self, params: Params, model_state: ModelState = ()) -> Any:
        """A module of these arrays, for an evaluation or to be saved.

        It is in the mode, ``train()`` or ``eval()``, in which the module of `trainable` was, and
        its random numbers start where those did. It can be called inside `jax.jit`.

        Raises:
            ValueError: if parameters or statistics are not of the structure they had.
        """
        self._check(params, model_state)
        return self._parts.merged(params, self._carried(model_state), self._parts.rngs)

    def update(self, module: Any, params: Params, model_state: ModelState = ()) -> None:
        """Writes parameters and statistics into a module; its frozen parts stay as they are.

        They are copied, so that the state they are from can be donated to the next step.

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

    The loss is called with a module of its own at each call, in the mode in which `module` was
    here: call ``module.train()`` first. The given module is only read.

    *Dropout*, and whatever else draws from `nnx.Rngs` inside the module, draws from the key of the
    example: each stream starts anew from it, at count 0. The result is a function of (run, step,
    example), in any micro-batches, on any number of devices, after a resume; the counters of the
    module are not used, and do not move.

    *Batch norm* couples examples: a micro-batch is its batch, a ghost batch. Its layers
    (`nnx.BatchNorm`) take their means over the examples of the micro-batch, and the running
    statistics are carried along as `model_state`. Other layers with statistics do the same along
    the axis `EXAMPLES`, or need `of_batch`.

    *Frozen parts*: the `nnx.Param` that `wrt` leaves out. They are in the `model_state` too, in a
    `loss.Constants`: no copy in the compiled program, no gradient, the same bits for ever.

    Args:
        module: an `nnx.Module`.
        loss_fn: ``loss_fn(module, example)`` returns a scalar, for an example without its leading
          axis.
        wrt: an NNX filter of the variables to train: None for ``nnx.Param``; ``nnx.LoRAParam``, or
          ``nnx.All(nnx.Param, nnx.PathContains("head"))``.
        mutable: an NNX filter of the statistics that change from batch to batch: None for
          ``nnx.BatchStat``.
        frozen: an NNX filter of what never changes, besides ``nnx.Param``; None for nothing else.
        of_batch: whether it is ``loss_fn(module, batch)`` instead, and returns the losses [B]. The
          streams of the module cannot be drawn from then: they would not know the examples.
        has_aux: whether it returns ``(loss, aux)``, `aux` a pytree of arrays to be averaged over
          the examples; with `of_batch` ``(losses, loss.Outputs(...))``.
        has_keys: whether it takes a key of its own, ``loss_fn(module, example, key)``, for
          augmentation, say; with `of_batch` the keys of the batch, [B].

    Returns:
        A `Trainable`.

    Raises:
        ImportError: if flax is not installed.
        TypeError: if `module` is no `nnx.Module`, `loss_fn` is not a function, or a parameter is
            not floating point; when traced, if a frozen variable is changed, or with `of_batch` a
            stream drawn from.
        ValueError: if `wrt` picks nothing, or a variable of the module is neither trained, nor
            mutable, nor frozen; when traced, if the losses or `aux` have another shape, or
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
        raise ImportError("flax_nnx.trainable needs flax: pip install flax.") from error
    _validate.function("loss_fn", loss_fn)
    wrt = nnx.Param if wrt is None else wrt
    mutable = nnx.BatchStat if mutable is None else mutable
    frozen = nnx.Param if frozen is None else nnx.Any(nnx.Param, frozen)
    filters = (nnx.RngState, wrt, mutable, frozen)
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
    """Raises ValueError unless a part is of the structure, shapes and dtypes it had."""
    if (difference := _validate.first_difference(name, expected, given)) is not None:
        raise ValueError(
            f"{name} must be of the module that trainable was given: expected {difference[0]}, got "
            f"{difference[1]}."
        )
