"""Batches that a user's data loader hands over, for a training loop of the user's own."""

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.tree_util import KeyPath

from msgd_jax import _validate
from msgd_jax._typing import Batch, PositiveInt


class LoaderEnded(RuntimeError):  # noqa: N818 (as StopIteration)
    """A loader ended before `batches` had taken `num_steps` batches from it.

    Attributes:
        num_batches: how many batches the loader had.
    """

    def __init__(self, message: str, num_batches: int) -> None:
        super().__init__(message)
        self.num_batches = num_batches


def batches(
    loader: Iterable[Batch], num_steps: PositiveInt, *, first_step: int = 0
) -> Iterator[Batch]:
    """Yields `num_steps` batches of a data loader, as arrays that jax takes.

    Any iterable is a loader: PyTorch's ``DataLoader``, grain's datasets, tf.data by
    ``as_numpy_iterator()``, a generator of your own. You keep the state of the training::

      law = noise.batch_cov(len(dataset), batch_size=32)
      step = jax.jit(train.make_step(loss_vector_fn, optimizer, law), donate_argnums=0)
      for batch in streaming.batches(loader, 1000, first_step=int(state.step)):
          state, metrics = step(state, batch)

    If the loader ends early, `LoaderEnded` is raised in place of the next batch: `state` is then
    the one after the last step made, and training can continue from it with another loader. If the
    loader has more batches, they are not read. Exceptions that the loader raises are passed on,
    with a note that names the step.

    Args:
        loader: batches, pytrees of arrays with a leading axis of examples. Tensors of PyTorch in
          memory, and whatever else numpy reads without a copy, become numpy arrays.
        num_steps: how many batches to take.
        first_step: the step that the first batch is for; it is used in messages only.

    Yields:
        Batches, pytrees of numpy or jax arrays [B, ...].

    Raises:
        TypeError: if `loader` is not an iterable, or a leaf of a batch is not an array of numbers.
        ValueError: if `num_steps` is not positive, or the leaves of a batch do not share their
            leading axis.
        LoaderEnded: if the loader has fewer than `num_steps` batches; the error says how many it
            had, and at which step it ended.

    Example:
        >>> from msgd_jax import streaming
        >>> loader = [np.zeros((12, 3)), np.zeros((12, 3)), np.zeros((4, 3))]
        >>> [len(batch) for batch in streaming.batches(loader, 2)]
        [12, 12]
        >>> [len(batch) for batch in streaming.batches(loader, 5, first_step=100)]
        Traceback (most recent call last):
        msgd_jax._loaders.LoaderEnded: loader ended at step 103: it had 3 batches for 5 steps...
    """
    num_steps = _validate.positive_int("num_steps", num_steps)
    first_step = _validate.positive_int("first_step", first_step, minimum=0)
    if not isinstance(loader, Iterable):
        raise TypeError(f"loader must be an iterable of batches, got {_validate.shown(loader)}.")
    return _taken(loader, num_steps, first_step)


def _taken(loader: Iterable[Batch], num_steps: int, first_step: int) -> Iterator[Batch]:
    iterator = iter(loader)
    for number in range(num_steps):
        try:
            batch = jax.tree_util.tree_map_with_path(_array, next(iterator))
            _validate.leading_axis("batch", batch)
        except StopIteration:
            raise LoaderEnded(
                f"loader ended at step {first_step + number}: it had {number} batches for "
                f"{num_steps} steps. The state is the one after the last step made: continue from "
                "it with another epoch of the loader, or with a loader that repeats.",
                number,
            ) from None
        except Exception as error:
            error.add_note(f"This was batch {number} of the loader, for step {first_step + number}")
            raise
        yield batch


def _array(path: KeyPath, leaf: Any) -> Any:
    """A leaf of a batch; an array of a type unknown to jax as a numpy array of the same memory."""
    if isinstance(leaf, jax.Array | np.ndarray | np.generic) or not hasattr(leaf, "__array__"):
        return leaf
    try:
        return np.asarray(leaf)
    except (RuntimeError, TypeError) as error:
        raise TypeError(
            f"{_validate.place('batch', path)} must be an array that numpy can read, got "
            f"{type(leaf).__name__}: {str(error)[:100]} Give tensors of PyTorch as "
            "tensor.detach().cpu(), in a type that numpy has."
        ) from error
