"""The value and gradient of L . W, with W drawn inside; `train` and `transform` use it too."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int, Key

from msgd_jax import _dtypes, _mesh, _narrow, _programs, _validate
from msgd_jax._streams import Stream, derive
from msgd_jax._typing import (
    Batch,
    Data,
    Gradients,
    LossVectorFn,
    ModelState,
    Params,
    PositiveInt,
    PyTree,
    Step,
)
from msgd_jax.loss import _outputs, _walker, _weights
from msgd_jax.loss._outputs import Constants, Outputs, Takes
from msgd_jax.noise import Weights

NO_KEYS = "there is no has_keys here (keys that stay the same: loss.LossVector(..., key=key))"


class Evaluated(NamedTuple):
    """The results of one forward and backward pass.

    Attributes:
        value: the weighted loss, a scalar.
        grads: its gradient, a pytree like the parameters.
        model_state: the statistics afterwards; unchanged if the loss takes none.
        aux: the extra outputs; without arrays if the loss returns none.
        weights: the weights that were drawn; None unless they were asked for.
    """

    value: Float[Array, ""]
    grads: Gradients
    model_state: ModelState
    aux: Outputs
    weights: Weights | None


def presented(found: Evaluated, takes: Takes) -> tuple[PyTree, Gradients]:
    """``(value, grads)``, where the value is in a tuple with the statistics and extra outputs.

    If the loss vector function returns losses only, the value is not in a tuple, as with
    `jax.value_and_grad`.
    """
    rest = [found.model_state] * takes.has_state + [found.aux] * takes.has_aux
    return ((found.value, *rest) if rest else found.value), found.grads


def evaluated(
    loss_vector_fn: LossVectorFn,
    draw_for: Callable[[int], Callable[[Key[Array, ""], Int[Array, ""]], Weights]],
    takes: Takes,
    *,
    microbatch_size: PositiveInt | None,
    sharding: NamedSharding | None,
    read: bool = False,
    reports_weights: bool = False,
) -> Callable[..., Evaluated]:
    """``f(params, data, key, step, model_state)``, with the weights ``draw_for(size)(key, step)``.

    `size` is the number of examples of the data. With `read`, the data are the examples that the
    weights list, in their order.
    """
    microbatch_size = check_arguments(loss_vector_fn, microbatch_size, sharding)
    _outputs.check_takes(loss_vector_fn, takes)
    of_drawn = at_drawn(
        loss_vector_fn, takes, microbatch_size, sharding, read=read, reports_weights=reports_weights
    )

    def of_step(
        params: Params,
        data: Data,
        key: Key[Array, ""],
        step: Int[Array, ""],
        model_state: ModelState = None,
    ) -> Evaluated:
        # Losses in a ghost batch depend on each other, so examples are put into them at random.
        moving, constants = _outputs.without_constants(model_state)
        coupled = takes.has_state and (jax.tree.leaves(moving) or not constants)
        order = derive(key, Stream.ORDER, step) if coupled else None
        keys = _walker.Keys(order, losses_key(key, step) if takes.has_keys else None)
        draw = draw_for(_validate.leading_axis("data", data))
        return of_drawn(params, data, draw, (key, step), model_state, keys)

    compiled = _programs.compiled_if(microbatch_size is not None or sharding is not None, of_step)

    def of_checked_step(
        params: Params, data: Data, key: Key[Array, ""], step: Step, model_state: ModelState = None
    ) -> Evaluated:
        _validate.prng_key("key", key)
        return compiled(params, data, key, _validate.step(step), model_state)

    return of_checked_step


def losses_key(key: Key[Array, ""], step: Step | None) -> Key[Array, ""]:
    """The key from which the keys of the examples of a step are derived."""
    return derive(key, Stream.LOSSES, step)


def at_drawn(
    loss_vector_fn: LossVectorFn,
    takes: Takes,
    microbatch_size: int | None,
    sharding: NamedSharding | None,
    *,
    read: bool = False,
    reports_weights: bool = False,
) -> Callable[..., Evaluated]:
    """``f(params, data, draw, args, model_state, keys)``, with the weights ``draw(*args)``."""

    def one_batch(
        held: tuple[Params, list[Constants]],
        batch: Batch,
        entries: _walker.Entries,
        moving: ModelState,
    ) -> _walker.Terms:
        (params, constants), values = held, entries.values
        model_state = _outputs.with_constants(moving, constants)

        def losses_of(params: Params) -> tuple[Float[Array, " batch"], tuple[ModelState, Outputs]]:
            losses, new_state, outputs = _outputs.call(
                loss_vector_fn, takes, params, batch, values.shape[0], model_state, entries.keys
            )
            return losses, (new_state, outputs)

        # Sums over examples are in float32 or wider, also if the model computes in a narrow type.
        wide_losses_of, narrow = _narrow.wide_sums(losses_of, params)
        scale = _narrow.scale(values) if narrow else None

        def weighted_loss(params: Params) -> tuple[Float[Array, ""], tuple[ModelState, Outputs]]:
            losses, rest = wide_losses_of(params)
            dtype = _dtypes.accumulator(losses.dtype, values.dtype)
            weights = _narrow.scaled(values.astype(dtype), scale)
            return jnp.sum(losses.astype(dtype) * weights), rest

        (value, rest), grads = jax.value_and_grad(weighted_loss, has_aux=True)(params)
        value, grads = _narrow.unscaled((value, grads), scale)
        new_state, outputs = rest
        moving, _ = _outputs.without_constants(new_state)
        sums = _outputs.sums(outputs.averaged, entries.real)
        return _walker.Terms((value, sums), grads, moving, outputs.stacked)

    total = _walker.sums(one_batch, microbatch_size, sharding)

    def needs_runs(
        held: tuple[Params, list[Constants]], data: Data, moving: ModelState, keys: _walker.Keys
    ) -> bool:
        """Whether the number of runs has to be known: of ghost batches, of stacked arrays."""
        if takes.has_state and (jax.tree.leaves(moving) or not held[1]):
            return True
        if not takes.has_aux:
            return False
        one = jnp.zeros(1, jnp.int32)

        def of_one(data: Data) -> PyTree:
            entries = _walker.Entries(
                jnp.zeros(1), _walker.keys_of_examples(keys.losses)(one), None
            )
            return one_batch(held, _walker.take(data, one), entries, moving).stacked

        return bool(jax.tree.leaves(jax.eval_shape(of_one, data)))

    def value_and_grad(
        params: Params,
        data: Data,
        draw: Callable[..., Weights],
        args: Sequence[Any],
        model_state: ModelState,
        keys: _walker.Keys,
    ) -> Evaluated:
        _validate.floating_params(params)
        data_size = _validate.leading_axis("data", data)

        def checked(*args: Any) -> tuple[Array, Array | None]:
            weights = draw(*args)
            _weights.check(weights, data_size, sharding, read=read)
            indices = None if weights.indices is None else jnp.asarray(weights.indices)
            return jnp.asarray(weights.values), indices

        # Constants are treated like the parameters: unchanged in micro-batches, on all devices.
        moving, constants = _outputs.without_constants(model_state)
        held = (params, constants)
        examples = _walker.weighted_examples(
            data,
            checked,
            tuple(args),
            sharding,
            read=read,
            numbered=takes.has_keys or reports_weights,
            marked=takes.has_aux,
            equal_parts=sharding is not None and needs_runs(held, data, moving, keys),
        )
        ((value, sums), grads), moving, stacked = total(held, examples, moving, keys)
        model_state = _outputs.with_constants(moving, constants)
        grads = like(params, grads)
        if not (takes.has_aux or reports_weights):
            return Evaluated(value, grads, model_state, Outputs(), None)
        # Extra outputs are averaged over the examples that the weights list.
        shapes = jax.eval_shape(draw, *args)
        size = shapes.values.shape[0]
        averaged = jax.tree.map(lambda x: x / size, sums)
        weights = _cut(examples, shapes) if reports_weights else None
        return Evaluated(value, grads, model_state, Outputs(averaged, stacked), weights)

    return value_and_grad


def _cut(examples: _walker.WeightedExamples, drawn: Weights) -> Weights:
    """The weights that were drawn, without the zeros for the examples that fill up the devices."""
    size = drawn.values.shape[0]
    listed = None if drawn.indices is None else examples.numbers
    values, indices = jax.tree.map(lambda x: _mesh.cut(x, size), (examples.values, listed))
    return Weights(values, indices, drawn.num_examples)


def like(params: Params, grads: Gradients) -> Gradients:
    """The gradients, which were summed in wide types, converted to the types of the parameters."""
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
