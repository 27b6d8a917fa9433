"""Functions of a batch made of the user's loss: losses, slopes, gradients and sums."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Key

from msgd_jax import _dtypes, _narrow, _programs, _validate
from msgd_jax._typing import (
    Batch,
    Data,
    Example,
    Gradients,
    LossVectorFn,
    Params,
    PerExampleGradients,
    PositiveInt,
    PyTree,
)
from msgd_jax.loss import _drawn, _outputs, _walker, _weights


def per_example(
    loss_fn: Callable[..., Any], *, has_aux: bool = False, has_keys: bool = False
) -> LossVectorFn:
    """Turns the loss of one example into the losses of a batch.

    Args:
        loss_fn: maps ``(params, example)`` to a scalar, where an example is the data without their
          leading axis.
        has_aux: whether `loss_fn` returns ``(loss, aux)``, with `aux` any pytree of arrays. The
          loss vector function then also returns a `loss.Outputs` with the `aux` of all examples, to
          be averaged.
        has_keys: whether it is ``loss_fn(params, example, key)``, with one typed PRNG key per
          example. The loss vector function then takes the keys of the batch, [B].

    Returns:
        A loss vector function: ``jax.vmap`` of `loss_fn` over the examples.

    Raises:
        TypeError: if `loss_fn` is not a function.
        ValueError: when traced, if `loss_fn` does not return a scalar.

    Example:
        >>> from msgd_jax import loss
        >>> losses = loss.per_example(lambda theta, x: (theta - x) ** 2)
        >>> losses(jnp.asarray(1.0), jnp.asarray([0.0, 1.0, 3.0]))
        Array([1., 0., 4.], dtype=float32)
    """
    _validate.function("loss_fn", loss_fn)

    def of_batch(params: Params, *of_examples: Any) -> Any:
        found = jax.vmap(functools.partial(loss_fn, params))(*of_examples)
        if has_aux and not (isinstance(found, tuple) and len(found) == 2):
            raise TypeError(
                "loss_fn must return (loss, aux), as has_aux = True says, got "
                f"{type(found).__name__}."
            )
        losses, aux = found if has_aux else (found, ())
        if not isinstance(losses, jax.Array) or losses.ndim != 1:
            got = jax.tree.map(lambda x: x.shape[1:], losses)
            raise ValueError(f"loss_fn must return a scalar for one example, got shape {got}.")
        return (losses, _outputs.Outputs(averaged=aux)) if has_aux else losses

    # Two functions, whose signatures say which arguments they take.
    if has_keys:

        def loss_vector_fn_of_keys(params: Params, batch: Batch, keys: Key[Array, " B"]) -> Any:
            return of_batch(params, batch, keys)

        return loss_vector_fn_of_keys

    def loss_vector_fn(params: Params, batch: Batch) -> Any:
        return of_batch(params, batch)

    return loss_vector_fn


def sum_over_examples(
    of_batch: Callable[[Params, Batch, Float[Array, " B"]], PyTree],
    params: Params,
    data: Data,
    *,
    microbatch_size: PositiveInt | None = None,
    sharding: NamedSharding | None = None,
    num_examples: PositiveInt | None = None,
) -> PyTree:
    """Adds up anything over the examples, in micro-batches, such as the counts of an evaluation.

    Eager calls with micro-batches or a sharding compile anew each time: put the function under
    `jax.jit` to call it more than once.

    Args:
        of_batch: ``of_batch(params, batch, weights)`` returns a pytree of floating-point arrays,
            the sums over a batch of B examples with their weights, [B]: 1, or 0 for an example that
            only fills up a micro-batch or a device.
        params: any further pytree that `of_batch` needs.
        data: a pytree of arrays [N, ...].
        microbatch_size: examples in one pass, on each device; None for all of them at once.
        sharding: how the examples are spread over devices, as in `weighted_value_and_grad`.
        num_examples: N, if the data were filled up for the devices; None for their length.

    Returns:
        The sums over all examples, in float32 or wider.

    Raises:
        TypeError: if `of_batch` is not a function, or as `LossVector` for the other arguments.
        ValueError: as `LossVector`.

    Example:
        >>> from msgd_jax import loss
        >>> x = jnp.asarray([0.0, 1.0, 3.0, 4.0])
        >>> count = lambda threshold, batch, weights: weights @ (batch > threshold)
        >>> float(loss.sum_over_examples(count, 0.5, x, microbatch_size=3))
        3.0
    """
    _validate.function("of_batch", of_batch)
    microbatch_size = _drawn.check_arguments(of_batch, microbatch_size, sharding)
    _validate.arrays(params)
    length = _validate.leading_axis("data", data)
    size = length if num_examples is None else int(num_examples)
    _weights.check_length(size, length, sharding)

    def one_batch(
        params: Params, batch: Batch, entries: _walker.Entries, model_state: Any
    ) -> _walker.Terms:
        sums = of_batch(params, batch, entries.values)
        return _walker.Terms((), jax.tree.map(_dtypes.wide, sums), model_state)

    def total(params: Params, data: Data) -> PyTree:
        def one_each() -> tuple[Array, None]:
            return jnp.ones(size, jnp.float32), None

        examples = _walker.weighted_examples(data, one_each, (), sharding)
        total = _walker.sums(one_batch, microbatch_size, sharding)
        (_, sums), _, _ = total(params, examples, (), _walker.Keys())
        return sums

    one_pass = sharding is None and (microbatch_size is None or microbatch_size >= length)
    return _programs.compiled_if(not one_pass, total)(params, data)


def losses_of_batch(
    loss_vector_fn: LossVectorFn, params: Params, batch: Batch
) -> Float[Array, " B"]:
    losses = loss_vector_fn(params, batch)
    _validate.loss_vector(losses, _validate.leading_axis("batch", batch))
    return _dtypes.wide(losses)


def slopes_of_batch(
    loss_vector_fn: LossVectorFn, at: tuple[Params, Gradients], batch: Batch
) -> Float[Array, " B"]:
    params, direction = at
    losses_of = functools.partial(losses_of_batch, loss_vector_fn, batch=batch)
    return jax.jvp(losses_of, (params,), (direction,))[1]


def gradients_of_batch(
    loss_vector_fn: LossVectorFn, params: Params, batch: Batch
) -> PerExampleGradients:
    """The gradient of each loss, from batches of one example."""

    def one_gradient(example: Example) -> Gradients:
        alone = jax.tree.map(lambda x: x[None], example)

        def loss_of_one(params: Params) -> Float[Array, ""]:
            losses = loss_vector_fn(params, alone)
            _validate.loss_vector(losses, 1)
            return losses[0]

        # In float32, since an example may use a parameter many times, as a text uses a word.
        return jax.grad(_narrow.wide_sums(loss_of_one, params)[0])(params)

    return jax.vmap(one_gradient)(batch)
