"""The values and gradients of many draws of weights at one point."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from msgd_jax import _dtypes, _narrow, _programs, _validate
from msgd_jax._typing import Batch, Data, Gradients, LossVectorFn, ModelState, Params, PositiveInt
from msgd_jax.loss import _drawn, _outputs, _walker, _weights
from msgd_jax.noise import Weights


def weighted_values_and_grads(
    loss_vector_fn: LossVectorFn,
    *,
    microbatch_size: PositiveInt | None = None,
    draws_per_pass: PositiveInt = 1,
    sharding: NamedSharding | None = None,
) -> Callable[[Params, Data, Weights], tuple[Float[Array, " draws"], Gradients]]:
    """The values and the gradients of ``loss_vector_fn(params, data) . W`` for K draws of W.

    Up to rounding it gives the results of K calls of `weighted_value_and_grad` at the same
    parameters, with one forward pass instead of K: the losses are linearised once, and each draw
    takes one backward pass, `draws_per_pass` of them at a time. Use it for the statistics of the
    noise at one point::

      draws = jax.vmap(law.sample, in_axes=(None, 0))(key, jnp.arange(K))
      values, grads = loss.weighted_values_and_grads(loss_vector_fn)(params, data, draws)

    All N losses are computed, also for sparse weights, since different draws use different
    examples. Eager calls run a compiled program, like those of `weighted_value_and_grad` in
    micro-batches.

    Args:
        loss_vector_fn: ``loss_vector_fn(params, batch)`` returns the losses of the batch, [B].
        microbatch_size: examples in one pass, as in `weighted_value_and_grad`; None for all.
        draws_per_pass: the number of draws whose backward passes run at once, by `jax.vmap`. More
            draws take more memory and fewer passes; results change by rounding only.
        sharding: how the examples are spread over devices, as in `weighted_value_and_grad`.

    Returns:
        ``f(params, data, weights) -> (values, grads)``: the arrays of `weights`, a `noise.Weights`,
        have a leading axis of K draws, `values` is [K], and `grads` is like `params` with a leading
        axis of K. When traced, `f` raises TypeError or ValueError as the result of
        `weighted_value_and_grad` does.

    Raises:
        TypeError: if `loss_vector_fn` is not a function, `microbatch_size` or `draws_per_pass` is
            not an integer, or `sharding` is not a `NamedSharding`.
        ValueError: if `microbatch_size` or `draws_per_pass` is not positive, or `sharding` does not
            spread the leading axis alone.

    Example:
        >>> from msgd_jax import loss, noise
        >>> losses = loss.per_example(lambda theta, x: (theta - x) ** 2)
        >>> x, key = jnp.asarray([0.0, 1.0, 3.0, 4.0]), jax.random.key(0)
        >>> draws = jax.vmap(noise.fisher(4, 2).sample, in_axes=(None, 0))(key, jnp.arange(10))
        >>> values, gradients = loss.weighted_values_and_grads(losses)(jnp.asarray(1.0), x, draws)
        >>> values.shape, gradients.shape
        ((10,), (10,))
    """
    microbatch_size = _drawn.check_arguments(loss_vector_fn, microbatch_size, sharding)
    _outputs.check_takes(loss_vector_fn, _outputs.Takes(), _drawn.NO_KEYS)
    draws_per_pass = _validate.positive_int("draws_per_pass", draws_per_pass)

    def one_batch(
        params: Params, batch: Batch, entries: _walker.Entries, model_state: ModelState
    ) -> _walker.Terms:
        values = entries.values

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

        # One draw at a time is a plain scan, without a `vmap` over a single draw inside.
        at_once = None if draws_per_pass == 1 else draws_per_pass
        totals, grads = jax.lax.map(one_draw, values.T, batch_size=at_once)
        return _walker.Terms(totals, grads, model_state)

    total = _walker.sums(one_batch, microbatch_size, sharding)

    def values_and_grads(
        params: Params, data: Data, weights: Weights
    ) -> tuple[Float[Array, " draws"], Gradients]:
        _validate.floating_params(params)
        _weights.check(weights, _validate.leading_axis("data", data), sharding, stacked=True)

        leaves, made_of = jax.tree.flatten(weights)

        def dense(*leaves: Array) -> tuple[Array, None]:
            return jax.vmap(Weights.dense)(jax.tree.unflatten(made_of, leaves)).T, None

        examples = _walker.weighted_examples(data, dense, tuple(leaves), sharding)
        (totals, grads), _, _ = total(params, examples, (), _walker.Keys())
        return totals, _drawn.like(params, grads)

    return _programs.compiled_if(True, values_and_grads)
