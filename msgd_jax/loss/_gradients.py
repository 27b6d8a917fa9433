"""Values and gradients of weighted losses, with the data as an argument."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int, Key

from msgd_jax import _dtypes, _laws, _mesh, _narrow, _programs, _validate
from msgd_jax._streams import Stream, derive
from msgd_jax._typing import (
    Batch,
    Data,
    Gradients,
    LossVectorFn,
    Params,
    PositiveInt,
    PyTree,
    Statistics,
    Step,
    ValueAndGradOfData,
)
from msgd_jax.loss import _walker
from msgd_jax.noise import BatchLaw, MNoise, Weights


def weighted_value_and_grad(
    loss_vector_fn: LossVectorFn,
    *,
    microbatch_size: PositiveInt | None = None,
    has_aux: bool = False,
    sharding: NamedSharding | None = None,
) -> ValueAndGradOfData:
    """The value and the gradient of ``loss_vector_fn(params, data) . weights``.

    One forward and one backward pass over the examples that have weights. Sparse weights gather
    only their examples. Gradients are returned in the parameters' types.

    The sum over examples is in float32 or wider. That is so between micro-batches and devices, and
    also inside one pass of a model that computes in float16 or bfloat16: matrix products and
    convolutions add up in float32 on every platform, and an embedding that is looked up, a bias
    that is added or whatever else is used by many examples has its gradient added up in float32 and
    rounded once. Weights of 1/N, which vanish in float16, enter the backward pass times a power of
    two that is taken out again in float32. (What a custom derivative of yours does inside stays as
    it is.) With parameters of this kind the error of the gradient is below 2 % at up to 1e7
    examples in one pass.

    With `microbatch_size`, `optax.microbatching` walks through the examples in order, in runs of
    that many; memory for activations is that of one run, and without `has_aux` nothing else
    changes but the rounding. If it does not divide the number of examples, the last run is filled
    up with examples from the first, at weight 0.

    With `has_aux`, mutable statistics are carried through the micro-batches: a micro-batch is a
    ghost batch. Only here can losses depend on each other, within one ghost batch. The examples
    come in the order of the weights; `noisy_value_and_grad` and `train` draw an order for each
    step, so that dense laws have other ghost batches at each.

    Called eagerly with `microbatch_size` or `sharding`, the function that is returned compiles
    itself as `jax.jit` would: once for each set of shapes, reading what `loss_vector_fn` takes from
    outside (globals, attributes) at the first call only. Called inside your own `jax.jit` it is
    traced with the rest.

    With `sharding`, the examples are spread over devices: each computes the losses of its own, in
    its own micro-batches, with its own part of the weights (XLA draws each part where it is used),
    and one reduction adds up the gradients. The result is that of one device up to rounding.
    Parameters enter whole along the axes of the examples and keep their layout along the other axes
    of the mesh. Examples that the devices do not divide are filled up at weight 0, on each call; to
    do it once, see `sharding.shard_examples`. Sparse weights send the examples they list to the
    devices that compute them. Statistics pass through the micro-batches of each device from the
    same start, and are averaged over devices then: they depend on the number of devices.

    Args:
        loss_vector_fn: ``loss_vector_fn(params, batch)`` returns the losses of the batch, [B]; with
          `has_aux`, ``loss_vector_fn(params, batch, aux)`` returns ``(losses, aux)``.
        microbatch_size: examples in one pass, on each device; None for all of them at once.
        has_aux: whether `loss_vector_fn` takes and returns mutable statistics.
        sharding: how the examples are spread, ``NamedSharding(mesh, PartitionSpec("data"))`` for
          the axis "data" of a mesh; None if they are not.

    Returns:
        ``f(params, data, weights) -> (value, grads)``, or with `has_aux`
        ``f(params, data, weights, aux) -> ((value, aux), grads)``: `params` is a pytree of
        floating-point arrays, `data` a pytree of arrays [N, ...], `weights` a `noise.Weights`,
        `value` a scalar, and `grads` is like `params`. When traced, `f` raises TypeError or
        ValueError if `params` are not floating point, the leading axes of `data` disagree or are
        not the weights' num_examples, `loss_vector_fn` does not return [B] floating-point losses,
        or `aux` comes back with another structure, shape or dtype.

    Raises:
        TypeError, ValueError: if `loss_vector_fn` is not a function, `microbatch_size` is not a
            positive integer, or `sharding` does not spread the leading axis alone.

    Example:
        >>> from msgd_jax import loss, noise
        >>> losses = loss.per_example(lambda theta, x: (theta - x) ** 2)
        >>> x = jnp.asarray([0.0, 1.0, 3.0, 4.0])
        >>> weights = noise.gd(4).sample(jax.random.key(0), step=0)
        >>> value, gradient = loss.weighted_value_and_grad(losses)(jnp.asarray(1.0), x, weights)
        >>> float(value), float(gradient)  # the mean loss, 2 (theta - mean of x)
        (3.5, -2.0)
    """
    microbatch_size = check_arguments(loss_vector_fn, microbatch_size, sharding)

    value_and_grad = _of_drawn(loss_vector_fn, microbatch_size, has_aux, sharding)

    def of_weights(
        params: Params, data: Data, weights: Weights, aux: Statistics = None
    ) -> tuple[PyTree, Gradients]:
        leaves, made_of = jax.tree.flatten(weights)
        return value_and_grad(params, data, lambda *x: jax.tree.unflatten(made_of, x), leaves, aux)

    return _programs.compiled_if(microbatch_size is not None or sharding is not None, of_weights)


def noisy_value_and_grad(
    loss_vector_fn: LossVectorFn,
    law: MNoise | BatchLaw,
    *,
    microbatch_size: PositiveInt | None = None,
    has_aux: bool = False,
    sharding: NamedSharding | None = None,
) -> ValueAndGradOfData:
    """`weighted_value_and_grad` at the weights that a law draws for one step (Algorithm 1).

    With `has_aux` and `microbatch_size`, the examples of a step go through the micro-batches in an
    order that is drawn for (key, step), on each device those that it holds: which examples share a
    ghost batch changes from step to step, for dense laws as for sparse ones.

    Where examples are spread over devices, each draws its own part of the weights: what
    ``law.sample(key, step)`` says there, bit for bit.

    Args:
        loss_vector_fn: as in `weighted_value_and_grad`.
        law: the law of the weights. The num_examples of an `MNoise` must be the leading axis of the
          data; with a `BatchLaw` the data are a batch that a loader drew, of any size.
        microbatch_size: as in `weighted_value_and_grad`.
        has_aux: as in `weighted_value_and_grad`.
        sharding: as in `weighted_value_and_grad`.

    Returns:
        ``f(params, data, key, step) -> (value, grads)``, or with `has_aux`
        ``f(params, data, key, step, aux) -> ((value, aux), grads)``; raises as that of
        `weighted_value_and_grad`.

    Raises:
        TypeError, ValueError: if `loss_vector_fn` is not a function, `microbatch_size` is not a
            positive integer, or `sharding` does not spread the leading axis alone. When traced, if
            the data have another number of examples than `law`, or too few of them.
    """
    law = _laws.of_steps("law", law)
    return drawn_value_and_grad(
        loss_vector_fn,
        lambda size: _laws.of_data(law, size, sharding).sample,
        microbatch_size=microbatch_size,
        has_aux=has_aux,
        sharding=sharding,
    )


def drawn_value_and_grad(
    loss_vector_fn: LossVectorFn,
    draw_for: Callable[[int], Callable[[Key[Array, ""], Int[Array, ""]], Weights]],
    *,
    microbatch_size: PositiveInt | None,
    has_aux: bool,
    sharding: NamedSharding | None,
) -> ValueAndGradOfData:
    """`noisy_value_and_grad` at the weights ``draw_for(size)(key, step)`` of data of this size."""
    microbatch_size = check_arguments(loss_vector_fn, microbatch_size, sharding)
    value_and_grad = _of_drawn(loss_vector_fn, microbatch_size, has_aux, sharding)

    def of_step(
        params: Params,
        data: Data,
        key: Key[Array, ""],
        step: Int[Array, ""],
        aux: Statistics = None,
    ) -> tuple[PyTree, Gradients]:
        # Losses of one ghost batch depend on each other: which examples share one is random.
        order = derive(key, Stream.ORDER, step) if has_aux else None
        draw = draw_for(_validate.leading_axis("data", data))
        return value_and_grad(params, data, draw, (key, step), aux, order)

    compiled = _programs.compiled_if(microbatch_size is not None or sharding is not None, of_step)

    def of_checked_step(
        params: Params, data: Data, key: Key[Array, ""], step: Step, aux: Statistics = None
    ) -> tuple[PyTree, Gradients]:
        _validate.prng_key("key", key)
        return compiled(params, data, key, _validate.step(step), aux)

    return of_checked_step


def weighted_values_and_grads(
    loss_vector_fn: LossVectorFn,
    *,
    microbatch_size: PositiveInt | None = None,
    draws_per_pass: PositiveInt = 1,
    sharding: NamedSharding | None = None,
) -> Callable[[Params, Data, Weights], tuple[Float[Array, " draws"], Gradients]]:
    """The values and the gradients of ``loss_vector_fn(params, data) . W`` for K draws of W.

    What K calls of `weighted_value_and_grad` at the same parameters give, up to rounding, with one
    forward pass instead of K: the losses are linearised once, then each draw is one backward pass,
    `draws_per_pass` of them in memory at a time. For the statistics of the noise at one point::

      draws = jax.vmap(law.sample, in_axes=(None, 0))(key, jnp.arange(K))
      values, grads = loss.weighted_values_and_grads(loss_vector_fn)(params, data, draws)

    All N losses are computed, also for sparse weights: different draws need different examples.
    Called eagerly it compiles itself, as `weighted_value_and_grad` does in micro-batches.

    Args:
        loss_vector_fn: ``loss_vector_fn(params, batch)`` returns the losses of the batch, [B].
        microbatch_size: examples in one pass, as in `weighted_value_and_grad`; None for all.
        draws_per_pass: draws whose backward passes are made at once, by `jax.vmap`: more memory,
            fewer passes, and nothing else changes but the rounding.
        sharding: how the examples are spread over devices, as in `weighted_value_and_grad`.

    Returns:
        ``f(params, data, weights) -> (values, grads)``: `weights` is a `noise.Weights` with leading
        axes of K draws, `values` is [K], and `grads` is like `params` with leading axes of K. When
        traced, `f` raises TypeError or ValueError as that of `weighted_value_and_grad` does.

    Raises:
        TypeError, ValueError: if `loss_vector_fn` is not a function, `microbatch_size` is not a
            positive integer, or `sharding` does not spread the leading axis alone.

    Example:
        >>> from msgd_jax import loss, noise
        >>> losses = loss.per_example(lambda theta, x: (theta - x) ** 2)
        >>> x, key = jnp.asarray([0.0, 1.0, 3.0, 4.0]), jax.random.key(0)
        >>> draws = jax.vmap(noise.fisher(4, 2).sample, in_axes=(None, 0))(key, jnp.arange(10))
        >>> values, gradients = loss.weighted_values_and_grads(losses)(jnp.asarray(1.0), x, draws)
        >>> values.shape, gradients.shape
        ((10,), (10,))
    """
    microbatch_size = check_arguments(loss_vector_fn, microbatch_size, sharding)
    draws_per_pass = _validate.positive_int("draws_per_pass", draws_per_pass)

    def one_batch(
        params: Params, batch: Batch, values: Float[Array, "batch draws"], aux: Statistics
    ) -> _walker.Terms:
        def losses_of(params: Params) -> Float[Array, " batch"]:
            losses = loss_vector_fn(params, batch)
            _validate.loss_vector(losses, values.shape[0])
            return losses

        wide_losses_of, narrow = _narrow.wide_sums(losses_of, params)
        losses, pull_back = jax.vjp(wide_losses_of, params)
        dtype = _dtypes.accumulator(losses.dtype, values.dtype)

        def one_draw(values: Float[Array, " batch"]) -> tuple[Float[Array, ""], Gradients]:
            value = jnp.sum(losses.astype(dtype) * values.astype(dtype))
            scale = _narrow.scale(values) if narrow else None
            scaled = _narrow.scaled(values, scale).astype(losses.dtype)
            return value, _narrow.unscaled(pull_back(scaled)[0], scale)

        # One draw at a time is a plain scan, without a `vmap` over one inside.
        at_once = None if draws_per_pass == 1 else draws_per_pass
        totals, grads = jax.lax.map(one_draw, values.T, batch_size=at_once)
        return _walker.Terms(totals, grads, aux)

    total = _walker.sums(one_batch, microbatch_size, sharding)

    def values_and_grads(
        params: Params, data: Data, weights: Weights
    ) -> tuple[Float[Array, " draws"], Gradients]:
        _validate.floating_params(params)
        _walker.check_weights(weights, _validate.leading_axis("data", data), sharding, stacked=True)

        leaves, made_of = jax.tree.flatten(weights)

        def dense(*leaves: Array) -> tuple[Array, None]:
            return jax.vmap(Weights.dense)(jax.tree.unflatten(made_of, leaves)).T, None

        examples = _walker.weighted_examples(data, dense, tuple(leaves), sharding)
        (totals, grads), _ = total(params, examples, (), None)
        return totals, _like(params, grads)

    return _programs.compiled_if(True, values_and_grads)


def _of_drawn(
    loss_vector_fn: LossVectorFn,
    microbatch_size: int | None,
    has_aux: bool,
    sharding: NamedSharding | None,
) -> ValueAndGradOfData:
    """``f(params, data, draw, args, aux)``: value and gradient at the weights ``draw(*args)``."""

    def one_batch(
        params: Params, batch: Batch, values: Float[Array, " batch"], aux: Statistics
    ) -> _walker.Terms:
        def losses_of(params: Params) -> tuple[Float[Array, " batch"], Statistics]:
            if has_aux:
                losses, new_aux = loss_vector_fn(params, batch, aux)
                _validate.same_kind("loss_vector_fn", "aux", aux, new_aux)
            else:
                losses, new_aux = loss_vector_fn(params, batch), aux
            _validate.loss_vector(losses, values.shape[0])
            return losses, new_aux

        wide_losses_of, narrow = _narrow.wide_sums(losses_of, params)
        scale = _narrow.scale(values) if narrow else None

        def weighted_loss(params: Params) -> tuple[Float[Array, ""], Statistics]:
            losses, new_aux = wide_losses_of(params)
            dtype = _dtypes.accumulator(losses.dtype, values.dtype)
            weights = _narrow.scaled(values.astype(dtype), scale)
            return jnp.sum(losses.astype(dtype) * weights), new_aux

        (value, new_aux), grads = jax.value_and_grad(weighted_loss, has_aux=True)(params)
        value, grads = _narrow.unscaled((value, grads), scale)
        return _walker.Terms(value, grads, new_aux)

    total = _walker.sums(one_batch, microbatch_size, sharding)

    def value_and_grad(
        params: Params,
        data: Data,
        draw: Callable[..., Weights],
        args: Sequence[Any],
        aux: Statistics,
        order: _walker.Order = None,
    ) -> tuple[PyTree, Gradients]:
        _validate.floating_params(params)
        data_size = _validate.leading_axis("data", data)

        def checked(*args: Any) -> tuple[Array, Array | None]:
            weights = draw(*args)
            _walker.check_weights(weights, data_size, sharding)
            indices = None if weights.indices is None else jnp.asarray(weights.indices)
            return jnp.asarray(weights.values), indices

        examples = _walker.weighted_examples(data, checked, tuple(args), sharding)
        (value, grads), aux = total(params, examples, aux, order)
        grads = _like(params, grads)
        return ((value, aux), grads) if has_aux else (value, grads)

    return value_and_grad


def _like(params: Params, grads: Gradients) -> Gradients:
    """The gradients, summed in wide types, in the types of the parameters."""
    return jax.tree.map(_mesh.like, params, grads)


def check_arguments(
    loss_vector_fn: LossVectorFn,
    microbatch_size: PositiveInt | None,
    sharding: NamedSharding | None,
) -> int | None:
    """Returns the size of a micro-batch as an int; raises TypeError or ValueError."""
    _validate.function("loss_vector_fn", loss_vector_fn)
    _mesh.check("sharding", sharding)
    if microbatch_size is None:
        return None
    return _validate.positive_int("microbatch_size", microbatch_size)
