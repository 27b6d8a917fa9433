"""The loss vector L(theta) of a data set: an object whose parts are checked once."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Key

from msgd_jax import _programs, _validate
from msgd_jax._typing import (
    Batch,
    Data,
    Gradients,
    LossVectorFn,
    ModelState,
    Params,
    PerExampleGradients,
    PositiveInt,
    PyTree,
    ValueAndGradOfData,
)
from msgd_jax.loss import _drawn, _fixed, _gradients, _many_draws, _walker, _weights
from msgd_jax.loss._examples import (
    gradients_of_batch,
    losses_of_batch,
    slopes_of_batch,
    sum_over_examples,
)
from msgd_jax.noise import Weights


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, init=False, eq=False)
class LossVector:
    """The loss vector L(theta) in R^N of N examples: a loss vector function with its data.

    The functions of `covariance`, `sde` and `complexity` take it::

      losses = loss.LossVector(loss_vector_fn, data, microbatch_size=100)
      losses(params)                          # [N], the loss of every example
      losses.value_and_grad(params, weights)  # of L . W, by one forward and one backward pass

    A loss vector is a pytree whose leaves are the data, so it may be an argument of `jax.jit`,
    `jax.vmap` or `jax.lax.scan`. Its other attributes are static and compare by value: a function
    that was compiled for one loss vector needs no new compilation for other data of these shapes.
    (Data that a compiled function uses without taking them as an argument are copied into its
    program.)

    jax keeps the static part of arguments in its caches: after a loss vector was an argument of
    `jax.jit`, its `loss_vector_fn`, and all that it holds, stay in memory until `jax.clear_caches`.
    If you use many loss vector functions, make the data the argument instead:
    ``jax.jit(lambda params, data: losses.replace(data=data).mean(params))``. The library's own
    functions do so.

    Eager calls of its methods run programs that are compiled once per set of shapes. The programs
    are freed with this object. Values that `loss_vector_fn` reads from outside (globals,
    attributes) are read at the first call only. Calls inside `jax.jit` are traced.

    L is a function of the parameters only, and losses must not depend on each other.

    * A model with mutable statistics (batch norm) has a loss vector at fixed statistics,
      `model_state`, leaves of the pytree too. The model must be in evaluation mode; it is refused
      if it returns statistics that depend on the batch.
    * Losses with keys (dropout, label noise) have a loss vector at fixed keys: given `key`, every
      example has one key, that of step 0 of a run with this key, at all evaluations. Results are
      for this one draw. The data become a `WithKeys`, with the keys (8 bytes per example).

    Args:
        loss_vector_fn: ``loss_vector_fn(params, batch)`` returns the losses of the batch, [B].
        data: a pytree of arrays [N, ...]. Their values are not checked; a NaN shows in the results.
        microbatch_size: examples in one pass, on each device; None for all of them at once.
        sharding: how the examples are spread over devices, as in `weighted_value_and_grad`; None if
            they are not.
        num_examples: N, if `sharding.shard_examples` filled up the data for the devices; None for
            the length of their leading axis.
        model_state: statistics, as those of `train.TrainState`, if it is
            ``loss_vector_fn(params, batch, state) -> (losses, state)``; None or () if it is not.
        key: a typed PRNG key if it takes, as its last argument, one key per example, [B].

    Raises:
        TypeError: if `loss_vector_fn` is not a function, it takes statistics or keys but
            `model_state` or `key` is None or the reverse, `key` is not a typed PRNG key, a leaf of
            `data` holds neither numbers nor PRNG keys, or `sharding` is not a `NamedSharding`.
        ValueError: if `data` are empty or their leaves have different lengths, `microbatch_size` is
            not positive, `sharding` does not spread the leading axis alone, or `num_examples`, once
            filled up for the devices, is not the length of the data.

    Example:
        >>> import jax.numpy as jnp
        >>> from msgd_jax import loss, noise
        >>> fn = loss.per_example(lambda theta, x: (theta - x) ** 2)
        >>> losses = loss.LossVector(fn, jnp.asarray([0.0, 1.0, 3.0, 4.0]))
        >>> losses(jnp.asarray(1.0)).tolist(), losses.num_examples
        ([1.0, 0.0, 4.0, 9.0], 4)
        >>> weights = noise.gd(4).sample(jax.random.key(0), step=0)
        >>> value, gradient = losses.value_and_grad(jnp.asarray(1.0), weights)
        >>> float(value), float(gradient)  # the mean loss, 2 (theta - mean of x)
        (3.5, -2.0)
    """

    loss_vector_fn: LossVectorFn
    data: Data
    microbatch_size: int | None
    sharding: NamedSharding | None
    _num_examples: int | None = dataclasses.field(repr=False)
    # The function of (params, batch[, state]), and its statistics: none or one pytree of them.
    _function: LossVectorFn = dataclasses.field(repr=False)
    _state: tuple[ModelState, ...] = dataclasses.field(repr=False)

    def __init__(
        self,
        loss_vector_fn: LossVectorFn,
        data: Data,
        *,
        microbatch_size: PositiveInt | None = None,
        sharding: NamedSharding | None = None,
        num_examples: PositiveInt | None = None,
        model_state: ModelState | None = None,
        key: Key[Array, ""] | None = None,
    ) -> None:
        size = _drawn.check_arguments(loss_vector_fn, microbatch_size, sharding)
        length = _validate.leading_axis("data", data)
        if num_examples is not None:
            num_examples = _validate.positive_int("num_examples", num_examples)
            _weights.check_length(num_examples, length, sharding)
        loss_vector_fn, data, state = _fixed.at_fixed(
            loss_vector_fn, data, model_state, key, sharding
        )
        self._set(data, state, (loss_vector_fn, size, sharding, num_examples))

    def _set(self, data: Data, state: tuple[ModelState, ...], static: tuple[Any, ...]) -> None:
        function, *rest = static
        # The functions that use a loss vector see losses of (params, batch) only.
        loss_vector_fn = _fixed.at_fixed_state(function, *state) if state else function
        values = (loss_vector_fn, data, *rest, function, state)
        for field, value in zip(dataclasses.fields(self), values, strict=True):
            object.__setattr__(self, field.name, value)

    @property
    def _static(self) -> tuple[Any, ...]:
        return self._function, self.microbatch_size, self.sharding, self._num_examples

    def tree_flatten_with_keys(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """For jax: the data and the statistics are leaves, and everything else is static."""
        key = jax.tree_util.GetAttrKey
        return ((key("data"), self.data), (key("model_state"), self._state)), self._static

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, ...], leaves: Any) -> "LossVector":
        """For jax. Leaves are not checked, since jax also puts other objects in place of arrays."""
        made, (data, state) = object.__new__(cls), leaves
        made._set(data, state, static)
        return made

    @property
    def num_examples(self) -> int:
        """N, the number of examples, without those that fill up the devices."""
        given = self._num_examples
        return _validate.leading_axis("data", self.data) if given is None else given

    def replace(
        self,
        loss_vector_fn: LossVectorFn | None = None,
        data: Data | None = None,
        model_state: ModelState | None = None,
    ) -> "LossVector":
        """A loss vector of another function, other data or statistics, in the same layout.

        Data must be of the kind that this one holds: with keys if it was given a key. Another
        function is one of (params, batch), or of (params, batch, state) if `model_state` is given.

        Raises:
            TypeError, ValueError: as the constructor.
        """
        if loss_vector_fn is None:
            loss_vector_fn = self._function
            model_state = (*self._state, None)[0] if model_state is None else model_state
        return LossVector(
            loss_vector_fn,
            self.data if data is None else data,
            model_state=model_state,
            microbatch_size=self.microbatch_size,
            sharding=self.sharding,
            num_examples=self._num_examples,
        )

    # What is computed ----------------------------------------------------------------------------

    def __call__(self, params: Params) -> Float[Array, " N"]:
        """L(params): the loss of every example, [N], in float32 or wider.

        Raises:
            TypeError, ValueError: if `loss_vector_fn` does not return [B] floating-point losses.
        """
        _validate.arrays(params)
        return self._losses(params, self.data)

    def value_and_grad(
        self, params: Params, weights: Weights | Float[Array, " N"]
    ) -> tuple[Float[Array, ""], Gradients]:
        """The value and the gradient of ``L(params) . weights``, as `weighted_value_and_grad` does.

        Args:
            params: a pytree of floating-point arrays.
            weights: a draw of a law, or any array [N]. Sparse weights compute their examples only.

        Returns:
            The value, a scalar in float32 or wider, and the gradient, like `params`.

        Raises:
            TypeError, ValueError: if `params` are not floating point, the weights are for another
                number of examples, or `loss_vector_fn` does not return [B] floating-point losses.
        """
        return self._value_and_grad(params, self.data, self._weights(params, weights))

    def values_and_grads(
        self, params: Params, weights: Weights, *, draws_per_pass: PositiveInt = 1
    ) -> tuple[Float[Array, " draws"], Gradients]:
        """The same for K draws of weights at one point, as `weighted_values_and_grads` does.

        Args:
            params: a pytree of floating-point arrays.
            weights: K draws, whose arrays have a leading axis of K.
            draws_per_pass: the number of draws whose backward passes run at once.

        Returns:
            The values, [K], and the gradients, like `params` with a leading axis of K.

        Raises:
            TypeError, ValueError: as `value_and_grad`, or if `draws_per_pass` is not positive.
        """
        if draws_per_pass not in self._many:
            self._many[draws_per_pass] = _many_draws.weighted_values_and_grads(
                self.loss_vector_fn,
                microbatch_size=self.microbatch_size,
                draws_per_pass=draws_per_pass,
                sharding=self.sharding,
            )
        return self._many[draws_per_pass](params, self.data, weights)

    def mean(self, params: Params) -> Float[Array, ""]:
        """The mean loss, in float32 or wider; raises as `value_and_grad`."""
        return self._value_and_grad(params, self.data, self._weights(params, None))[0]

    def gradient(
        self, params: Params, weights: Weights | Float[Array, " N"] | None = None
    ) -> Gradients:
        """The gradient of ``L . weights``, like `params`; without weights, of the mean loss.

        Raises:
            TypeError, ValueError: as `value_and_grad`.
        """
        return self._value_and_grad(params, self.data, self._weights(params, weights))[1]

    def slopes(self, params: Params, direction: Gradients) -> Float[Array, " N"]:
        """The derivative of every loss along a direction: the gradient matrix times a vector, [N].

        It takes one forward-mode pass for any number of parameters.

        Args:
            params: a pytree of floating-point arrays.
            direction: a pytree like `params`.

        Raises:
            TypeError, ValueError: as `value_and_grad`.
        """
        _validate.arrays(params)
        return self._slopes((params, direction), self.data)

    def hessian_product(
        self,
        params: Params,
        direction: Gradients,
        weights: Weights | Float[Array, " N"] | None = None,
    ) -> Gradients:
        """The Hessian of ``L . weights`` times a vector like `params`; without, of the mean loss.

        It is computed forward over reverse. Raises as `value_and_grad`.
        """
        return self._hessian_product(params, self.data, self._weights(params, weights), direction)

    def gradient_matrix(self, params: Params) -> PerExampleGradients:
        """The gradient of every example's loss: the paper's nabla L, transposed.

        It takes N times the memory of the parameters, so it is for few parameters or few examples.
        `loss_vector_fn` is called with batches of one example; with `microbatch_size`, that many
        gradients are computed at once.

        Args:
            params: a pytree of floating-point arrays.

        Returns:
            A pytree like `params`, with leaves ``[N, *parameter shape]``.

        Raises:
            TypeError, ValueError: as `value_and_grad`.

        Example:
            >>> import jax.numpy as jnp
            >>> from msgd_jax import loss
            >>> fn = loss.per_example(lambda theta, x: (theta @ x) ** 2 / 2)
            >>> losses = loss.LossVector(fn, jnp.asarray([[1.0, 0.0], [0.0, 2.0]]))
            >>> losses.gradient_matrix(jnp.asarray([1.0, 1.0])).tolist()
            [[1.0, 0.0], [0.0, 4.0]]
        """
        _validate.floating_params(params)
        return self._gradient_matrix(params, self.data)

    def sum_over_gradients(
        self,
        of_batch: Callable[..., PyTree],
        params: Params,
        *rest: PyTree,
    ) -> PyTree:
        """Adds up a function of per-example gradients, of which one micro-batch is in memory.

        Eager calls with micro-batches compile anew each time: put the function under `jax.jit` to
        call it more than once.

        Args:
            of_batch: ``of_batch(gradients, weights, *rest)``, with the gradients of B examples,
                leaves ``[B, *parameter shape]``, and their weights, [B]: 1, or 0 for an example
                that only fills up a micro-batch. It returns a pytree of floating-point arrays.
            params: a pytree of floating-point arrays.
            *rest: further pytrees that `of_batch` needs. (It may not close over arrays that are
                spread over an explicit mesh.)

        Returns:
            The sum over all micro-batches, in float32 or wider.

        Raises:
            TypeError, ValueError: as `value_and_grad`.
        """
        _validate.floating_params(params)
        loss_vector_fn = self.loss_vector_fn

        def one_batch(given: tuple[Params, ...], batch: Batch, weights: Array) -> PyTree:
            params, *rest = given
            return of_batch(gradients_of_batch(loss_vector_fn, params, batch), weights, *rest)

        return self.sum_over(one_batch, (params, *rest))

    def sum_over(
        self, of_batch: Callable[[Params, Batch, Float[Array, " B"]], PyTree], params: Params
    ) -> PyTree:
        """`sum_over_examples` of the data, in the micro-batches and layout of this loss vector."""
        layout = {"microbatch_size": self.microbatch_size, "sharding": self.sharding}
        n = self.num_examples
        return sum_over_examples(of_batch, params, self.data, num_examples=n, **layout)

    # Weights --------------------------------------------------------------------------------------

    def _weights(self, params: Params, weights: Weights | Float[Array, " N"] | None) -> Weights:
        _validate.arrays(params)
        n = self.num_examples
        return _weights.as_weights(_weights.equal(n, params) if weights is None else weights, n)

    # Programs; they hold the function only, since one that held this object would keep it alive ---

    @functools.cached_property
    def _losses(self) -> Callable[[Params, Data], Float[Array, " N"]]:
        return self._map(functools.partial(losses_of_batch, self.loss_vector_fn))

    @functools.cached_property
    def _slopes(self) -> Callable[[tuple[Params, Gradients], Data], Float[Array, " N"]]:
        return self._map(functools.partial(slopes_of_batch, self.loss_vector_fn))

    @functools.cached_property
    def _gradient_matrix(self) -> Callable[[Params, Data], PerExampleGradients]:
        return self._map(functools.partial(gradients_of_batch, self.loss_vector_fn))

    @functools.cached_property
    def _value_and_grad(self) -> ValueAndGradOfData:
        return _programs.compiled_if(True, self._of_weights())

    @functools.cached_property
    def _hessian_product(self) -> Callable[[Params, Data, Weights, Gradients], Gradients]:
        return _programs.compiled_if(True, _gradients.hessian_product_of(self._of_weights()))

    def _of_weights(self) -> ValueAndGradOfData:
        return _gradients.weighted_value_and_grad(
            self.loss_vector_fn, microbatch_size=self.microbatch_size, sharding=self.sharding
        )

    @functools.cached_property
    def _many(self) -> dict[PositiveInt, ValueAndGradOfData]:
        return {}

    def _map(self, of_batch: Callable[[Any, Batch], PyTree]) -> Callable[[Any, Data], Any]:
        mapped = _walker.maps(of_batch, self.microbatch_size, self.sharding)
        given = self._num_examples

        def first(params: Params, data: Data) -> PyTree:
            size = _validate.leading_axis("data", data) if given is None else given
            return mapped(params, data, size)

        return _programs.compiled_if(True, first)
