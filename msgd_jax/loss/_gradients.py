"""Values and gradients of weighted losses, with the data as an argument."""

from collections.abc import Callable

import jax
from jax.sharding import NamedSharding
from jaxtyping import Array, Key

from msgd_jax import _laws, _programs, _validate
from msgd_jax._typing import (
    Data,
    Gradients,
    LossVectorFn,
    ModelState,
    Params,
    PositiveInt,
    PyTree,
    Step,
    ValueAndGradOfData,
)
from msgd_jax.loss import _drawn, _outputs, _walker
from msgd_jax.noise import BatchLaw, MNoise, Weights


def weighted_value_and_grad(
    loss_vector_fn: LossVectorFn,
    *,
    microbatch_size: PositiveInt | None = None,
    has_state: bool = False,
    has_aux: bool = False,
    has_keys: bool = False,
    sharding: NamedSharding | None = None,
) -> ValueAndGradOfData:
    """The value and the gradient of ``loss_vector_fn(params, data) . weights``.

    One forward and one backward pass over the examples that have weights. Sparse weights gather
    only their examples. Gradients are returned in the parameters' types.

    The sum over examples is in float32 or wider: between micro-batches and devices, and
    also inside one pass of a model that computes in float16 or bfloat16: matrix products and
    convolutions add up in float32 on every platform, and an embedding that is looked up, a bias
    that is added or whatever else is used by many examples has its gradient added up in float32 and
    rounded once. Weights of 1/N, which vanish in float16, enter the backward pass times a power of
    two that is taken out again in float32. (What a custom derivative of yours does inside stays as
    it is.) With parameters of this kind the error of the gradient is below 2 % at up to 1e7
    examples in one pass.

    With `microbatch_size`, the examples are walked through in order, in runs of that many; memory
    for activations is that of one run, and without `has_state` nothing else changes but the
    rounding. If it does not divide the number of examples, the last run is filled up with examples
    of other runs, at weight 0.

    With `has_state`, mutable statistics are carried through the micro-batches: a micro-batch is a
    ghost batch. Only here can losses depend on each other, within one ghost batch. The examples
    come in the order of the weights; `noisy_value_and_grad` and `train` draw an order for each
    step, so that dense laws have other ghost batches at each.

    With `has_aux`, the forward pass may return more than losses, accuracies or logits, say, as a
    `loss.Outputs`: per-example arrays, which are averaged over the examples, and whole ones, which
    are stacked over the micro-batches. `Outputs` has the shapes.

    With `has_keys`, the losses have randomness of their own (dropout, augmentation, label noise):
    the loss vector function takes a key per example. It is a function of the run's key, the step
    and the example's position in the data alone, so the same in any micro-batches, on any number of
    devices, after a resume, and whether a law lists the example or all of them. An example that a
    law lists twice has the same key both times. In the batch of a loader, the position is that in
    the batch, so an example that a loader draws twice has two keys. The keys come from a stream of
    their own and are derived micro-batch by micro-batch. With independent keys the covariance of
    the noisy gradient is that of the mean losses, plus ``N E[W_i^2]`` times the mean covariance of
    one example's gradient over its keys.

    Called eagerly with `microbatch_size` or `sharding`, the function that is returned compiles
    itself as `jax.jit` would: once for each set of shapes, reading what `loss_vector_fn` takes from
    outside (globals, attributes) at the first call only. Called inside your own `jax.jit` it is
    traced with the rest.

    With `sharding`, the examples are spread over devices: each computes the losses of its own, in
    its own micro-batches, with its own part of the weights (XLA draws each part where it is used),
    and one reduction adds up the gradients. The result is that of one device up to rounding.
    Parameters enter whole along the axes of the examples and keep their layout along the other axes
    of the mesh. Examples that the devices do not divide are filled up at weight 0, on each call; to
    do it once, see `sharding.shard_examples`. Of sparse weights, which are drawn on every
    device, each computes the examples that it holds, in as many runs as that takes: no example
    moves, and a device has the more to do the more of them it holds by chance. (With `has_state`,
    or arrays stacked over the micro-batches, every device needs equally many: then the examples are
    sent around.) Statistics pass through the micro-batches of each device from the
    same start, and are averaged over devices then: they depend on the number of devices.

    Args:
        loss_vector_fn: ``loss_vector_fn(params, batch)`` returns the losses of the batch, [B]. What
          the three flags add comes in one fixed order: ``(params, batch[, state][, keys])`` are the
          arguments, and ``(losses[, state][, aux])`` the result.
        microbatch_size: examples in one pass, on each device; None for all of them at once.
        has_state: whether `loss_vector_fn` takes and returns mutable statistics.
        has_aux: whether it returns extra outputs, a `loss.Outputs`.
        has_keys: whether it takes a typed PRNG key per example, [B].
        sharding: how the examples are spread, ``NamedSharding(mesh, PartitionSpec("data"))`` for
          the axis "data" of a mesh; None if they are not.

    Returns:
        ``f(params, data, weights[, model_state], *, key, step) -> (value, grads)``: `params` is a
        pytree of floating-point arrays, `data` a pytree of arrays [N, ...], `weights` a
        `noise.Weights`, `value` a scalar, and `grads` is like `params`. `key` and `step`, those of
        the run, are given with `has_keys` and not without. With `has_state` or `has_aux` the value
        is a tuple, ``(value[, model_state][, aux])``. When traced, `f` raises TypeError or
        ValueError if `params` are not floating point, the leading axes of `data` disagree or are
        not the weights' num_examples, `loss_vector_fn` does not return [B] floating-point losses
        and what the flags say, or `model_state` comes back with another structure, shape or dtype.

    Raises:
        TypeError, ValueError: if `loss_vector_fn` is not a function of so many arguments,
            `microbatch_size` is not a positive integer, or `sharding` does not spread the leading
            axis alone.

    Example:
        >>> import jax.numpy as jnp
        >>> from msgd_jax import loss, noise
        >>> losses = loss.per_example(lambda theta, x: (theta - x) ** 2)
        >>> x = jnp.asarray([0.0, 1.0, 3.0, 4.0])
        >>> weights = noise.gd(4).sample(jax.random.key(0), step=0)
        >>> value, gradient = loss.weighted_value_and_grad(losses)(jnp.asarray(1.0), x, weights)
        >>> float(value), float(gradient)  # the mean loss, 2 (theta - mean of x)
        (3.5, -2.0)
    """
    microbatch_size = _drawn.check_arguments(loss_vector_fn, microbatch_size, sharding)
    takes = _outputs.Takes(has_state, has_aux, has_keys)
    _outputs.check_takes(loss_vector_fn, takes)
    of_drawn = _drawn.at_drawn(loss_vector_fn, takes, microbatch_size, sharding)

    def of_weights(
        params: Params,
        data: Data,
        weights: Weights,
        model_state: ModelState,
        key: Key[Array, ""] | None,
        step: Step | None,
    ) -> tuple[PyTree, Gradients]:
        leaves, made_of = jax.tree.flatten(weights)
        draw = lambda *leaves: jax.tree.unflatten(made_of, leaves)  # noqa: E731
        keys = _walker.Keys(losses=None if key is None else _drawn.losses_key(key, step))
        found = of_drawn(params, data, draw, leaves, model_state, keys)
        return _drawn.presented(found, takes)

    one_pass = microbatch_size is None and sharding is None
    compiled = _programs.compiled_if(not one_pass, of_weights)

    def of_checked(
        params: Params,
        data: Data,
        weights: Weights,
        model_state: ModelState = None,
        *,
        key: Key[Array, ""] | None = None,
        step: Step | None = None,
    ) -> tuple[PyTree, Gradients]:
        _check_key_and_step(has_keys, key, step)
        step = None if step is None else _validate.step(step)
        return compiled(params, data, weights, model_state, key, step)

    return of_checked


def _check_key_and_step(has_keys: bool, key: Key[Array, ""] | None, step: Step | None) -> None:
    """Raises TypeError or ValueError unless key and step are given exactly if losses take keys."""
    for name, value in (("key", key), ("step", step)):
        if has_keys and value is None:
            raise TypeError(
                f"{name} must be given, since has_keys=True says that losses take keys: "
                "f(params, data, weights, key=key, step=step), got None."
            )
        if not has_keys and value is not None:
            raise TypeError(
                f"{name} must not be given, since losses take no keys without has_keys=True, got "
                f"{_validate.shown(value)}."
            )
    if has_keys:
        _validate.prng_key("key", key)


def noisy_value_and_grad(
    loss_vector_fn: LossVectorFn,
    law: MNoise | BatchLaw,
    *,
    microbatch_size: PositiveInt | None = None,
    has_state: bool = False,
    has_aux: bool = False,
    has_keys: bool = False,
    sharding: NamedSharding | None = None,
) -> ValueAndGradOfData:
    """`weighted_value_and_grad` at the weights that a law draws for one step (Algorithm 1).

    With `has_state` and `microbatch_size`, the examples of a step go through the micro-batches in
    an order that is drawn for (key, step), on each device those that it holds: which examples share
    a ghost batch changes from step to step, for dense laws as for sparse ones.

    Where examples are spread over devices, each draws its own part of the weights: what
    ``law.sample(key, step)`` says there, bit for bit.

    Args:
        loss_vector_fn: as in `weighted_value_and_grad`.
        law: the law of the weights. The num_examples of an `MNoise` must be the leading axis of the
          data; with a `BatchLaw` the data are a batch that a loader drew, of any size.
        microbatch_size: as in `weighted_value_and_grad`.
        has_state: as in `weighted_value_and_grad`.
        has_aux: as in `weighted_value_and_grad`.
        has_keys: as in `weighted_value_and_grad`; key and step are those of the draw.
        sharding: as in `weighted_value_and_grad`.

    Returns:
        ``f(params, data, key, step[, model_state]) -> (value, grads)``, with `has_state` or
        `has_aux` ``((value[, model_state][, aux]), grads)``; raises as that of
        `weighted_value_and_grad`.

    Raises:
        TypeError, ValueError: if `loss_vector_fn` is not a function of so many arguments,
            `microbatch_size` is not a positive integer, or `sharding` does not spread the leading
            axis alone. When traced, if the data have another number of examples than `law`, or too
            few of them.
    """
    takes = _outputs.Takes(has_state, has_aux, has_keys)
    law = _laws.of_steps("law", law)
    of_step = _drawn.evaluated(
        loss_vector_fn,
        lambda size: _laws.of_data(law, size, sharding).sample,
        takes,
        microbatch_size=microbatch_size,
        sharding=sharding,
    )

    def value_and_grad(
        params: Params, data: Data, key: Key[Array, ""], step: Step, model_state: ModelState = None
    ) -> tuple[PyTree, Gradients]:
        return _drawn.presented(of_step(params, data, key, step, model_state), takes)

    return value_and_grad


def hessian_product_of(
    value_and_grad: ValueAndGradOfData,
) -> Callable[[Params, Data, Weights, Gradients], Gradients]:
    """The Hessian of the weighted loss times a vector, forward over reverse."""

    def product(params: Params, data: Data, weights: Weights, direction: Gradients) -> Gradients:
        def gradient(params: Params) -> Gradients:
            return value_and_grad(params, data, weights)[1]

        return jax.jvp(gradient, (params,), (direction,))[1]

    return product
