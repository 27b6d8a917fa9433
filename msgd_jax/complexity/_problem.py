"""What a supremum is sought of, and how: checked arguments.

These are no pytrees: functions among a program's arguments, static ones too, are kept by jax for as
long as it likes. The program of a call closes over the functions, and is given the arrays.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from msgd_jax import _dtypes, _validate, loss
from msgd_jax.complexity import _ascent
from msgd_jax.noise import Weights


@dataclasses.dataclass(frozen=True)
class Problem:
    """The losses, with data that are there or a function that draws them."""

    params: Any
    data: Any
    loss_vector_fn: loss.LossVectorFn
    sample_data: Callable[[Any], Any] | None
    num_examples: int
    dtype: Any
    microbatch_size: int | None

    @classmethod
    def of(
        cls, loss_vector_fn: Any, params: Any, data: Any, microbatch_size: int | None
    ) -> "Problem":
        """Checks them; values are wide, float64 where a parameter is."""
        _validate.function("loss_vector_fn", loss_vector_fn)
        _validate.floating_params(params)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            if jnp.finfo(jnp.result_type(leaf)).bits < 32:
                raise TypeError(
                    f"params{jax.tree_util.keystr(path)} must be float32 or float64, got "
                    f"{jnp.result_type(leaf)}: small moves in the ball would be rounded away."
                )
        if microbatch_size is not None:
            _validate.positive_int("microbatch_size", microbatch_size)
        num_examples = number_of_examples(data)
        sample_data, data = (data, None) if callable(data) else (None, data)
        params = jax.tree.map(jnp.asarray, params)
        dtype = _dtypes.accumulator(*(leaf.dtype for leaf in jax.tree.leaves(params)))
        return cls(params, data, loss_vector_fn, sample_data, num_examples, dtype, microbatch_size)

    def objective(
        self, examples: Any, weights: Weights, centred: bool | Bool[Array, ""]
    ) -> _ascent.ValueAndGrad:
        """Value and gradient of ``L . w`` as a function of parameters."""
        return objective(
            self.loss_vector_fn, self.params, examples, weights, self.dtype, self.microbatch_size,
            centred,
        )  # fmt: skip

    def examples(self, key: Any) -> Any:
        """The data, drawn with this key where they are drawn."""
        return self.data if self.sample_data is None else self.sample_data(key)


def number_of_examples(data: Any) -> int:
    """N of data that are there, or of what a function draws."""
    if not callable(data):
        return _validate.leading_axis("data", data)
    # In a function of its own: jax remembers the shapes of those that it has seen.
    shapes = jax.eval_shape(lambda key: data(key), jax.random.key(0))
    return _validate.leading_axis("data(key)", shapes)


def objective(
    loss_vector_fn: loss.LossVectorFn,
    centre: Any,
    examples: Any,
    weights: Weights,
    dtype: Any,
    microbatch_size: int | None,
    centred: bool | Bool[Array, ""] = False,
) -> _ascent.ValueAndGrad:
    """Value and gradient of ``L . w`` as a function of parameters near `centre`.

    What all losses have in common is taken out of the sum, which would lose the differences
    otherwise: ``sum_i w_i l_i = sum_i w_i (l_i - c) + c sum_i w_i``, with c their mean at the
    centre. Where the weights add up to zero, c has no part in the result, however large it is:
    with `centred` they do, and what they seem to add up to is rounding.
    """
    support = weights.values.shape[0]
    equal = jnp.full(support, 1 / support, weights.values.dtype)
    mean_loss = loss.weighted_value_and_grad(loss_vector_fn, microbatch_size=microbatch_size)
    constant, _ = mean_loss(centre, examples, Weights(equal, weights.indices, weights.num_examples))
    constant = jax.lax.stop_gradient(constant)

    def less_the_constant(params: Any, batch: Any) -> Float[Array, " batch"]:
        losses = loss_vector_fn(params, batch)
        _validate.loss_vector(losses, _validate.leading_axis("batch", batch))
        wide = _dtypes.accumulator(losses.dtype)
        return losses.astype(wide) - constant.astype(wide)

    weighted = loss.weighted_value_and_grad(less_the_constant, microbatch_size=microbatch_size)
    total = jnp.where(centred, 0, _sum(jnp.asarray(weights.values))).astype(dtype)
    offset = constant.astype(dtype) * total

    def value_and_grad(params: Any) -> tuple[Float[Array, ""], Any]:
        value, gradient = weighted(params, examples, weights)
        return value.astype(dtype) + offset, gradient

    return value_and_grad


def _sum(values: Float[Array, " support"]) -> Float[Array, ""]:
    """The sum of weights; exactly 0 where it is 0 up to the rounding of the sum."""
    total = jnp.sum(values)
    rounding = 4 * jnp.finfo(values.dtype).eps * jnp.sum(jnp.abs(values))
    return jnp.where(jnp.abs(total) <= rounding, 0, total)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the supremum is sought; the radius may be traced."""

    radius: Any
    num_starts: int
    num_steps: int
    optimizer: optax.GradientTransformation
    ascents_per_pass: int | None

    @classmethod
    def of(
        cls,
        radius: Any,
        num_starts: Any,
        num_steps: Any,
        optimizer: Any,
        ascents_per_pass: Any,
        dtype: Any,
    ) -> "Settings":
        """Checks them."""
        _validate.nonnegative_scalar("radius", radius)
        _validate.positive_int("num_starts", num_starts)
        _validate.positive_int("num_steps", num_steps, minimum=0)
        if ascents_per_pass is not None:
            _validate.positive_int("ascents_per_pass", ascents_per_pass)
        if optimizer is None:
            optimizer = _ascent.default_optimizer(num_steps)
        elif not isinstance(optimizer, optax.GradientTransformation):
            raise TypeError(
                "optimizer must be an optax.GradientTransformation or None, got "
                f"{type(optimizer).__name__}."
            )
        return cls(jnp.asarray(radius, dtype), num_starts, num_steps, optimizer, ascents_per_pass)
