"""What a supremum is sought of, and how: checked arguments, as pytrees."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from msgd_jax import _dtypes, _validate, loss
from msgd_jax.complexity import _ascent


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Problem:
    """The losses, with data that are there or a function that draws them."""

    params: Any
    data: Any
    loss_vector_fn: loss.LossVectorFn = dataclasses.field(metadata={"static": True})
    sample_data: Callable[[Any], Any] | None = dataclasses.field(metadata={"static": True})
    num_examples: int = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    microbatch_size: int | None = dataclasses.field(metadata={"static": True})

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
        sample_data = data if callable(data) else None
        if sample_data is None:
            num_examples = _validate.leading_axis("data", data)
        else:
            shapes, data = jax.eval_shape(sample_data, jax.random.key(0)), None
            num_examples = _validate.leading_axis("data(key)", shapes)
        params = jax.tree.map(jnp.asarray, params)
        dtype = _dtypes.accumulator(*(leaf.dtype for leaf in jax.tree.leaves(params)))
        return cls(params, data, loss_vector_fn, sample_data, num_examples, dtype, microbatch_size)

    def value_and_grad(self) -> Callable[..., tuple[Any, Any]]:
        """Of ``L . w``, as a function of params, data and weights."""
        return loss.weighted_value_and_grad(
            self.loss_vector_fn, microbatch_size=self.microbatch_size
        )

    def examples(self, key: Any) -> Any:
        """The data, drawn with this key where they are drawn."""
        return self.data if self.sample_data is None else self.sample_data(key)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
    """How the supremum is sought; the radius may be traced."""

    radius: Any
    num_starts: int = dataclasses.field(metadata={"static": True})
    num_steps: int = dataclasses.field(metadata={"static": True})
    optimizer: optax.GradientTransformation = dataclasses.field(metadata={"static": True})
    ascents_per_pass: int | None = dataclasses.field(metadata={"static": True})

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
