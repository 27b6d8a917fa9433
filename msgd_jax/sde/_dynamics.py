"""The two sides of the coupling: drift and diffusion of the SDE, and the weights of the iteration.

Everything is a weighted loss: the drift is ``-grad(L . 1/N)`` and the diffusion ``grad(L . A w)``,
with A A^T = Cov(W) a matrix of two eigenvalues, so that neither C nor a covariance is formed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from msgd_jax import _dtypes, _validate, loss
from msgd_jax.noise import Exchangeable, MNoise, Weights

Law = MNoise | Exchangeable
"""Whose covariance the diffusion has: an M-noise with independent steps, or two exact moments."""

Coupling = Callable[[Float[Array, " N"]], Float[Array, " N"]]
"""Weights [N] from the Brownian increment over one iteration [N], in units of sqrt(eta)."""


def drift(
    loss_vector_fn: loss.LossVectorFn,
    params: Any,
    data: Any,
    *,
    order: int = 1,
    learning_rate: float | Float[Array, ""] | None = None,
    microbatch_size: int | None = None,
) -> Any:
    """The drift of the SDE: -grad L, or of order 2, ``-grad(L + eta/4 |grad L|^2)``.

    The second is the stochastic modified equation of Li, Tai and E (2017): an approximation of weak
    order 2 to the iteration. It costs a Hessian-vector product more.

    It runs eagerly, and with micro-batches is compiled anew on each call: put it under `jax.jit` to
    call it again.

    Args:
        loss_vector_fn: ``loss_vector_fn(params, batch)`` returns the losses of the batch, [B].
        params: a pytree of floating-point arrays.
        data: a pytree of arrays [N, ...].
        order: 1 or 2.
        learning_rate: eta, above 0; needed for order 2 only.
        microbatch_size: examples in one pass, as in `loss.weighted_value_and_grad`; None for all.

    Returns:
        A pytree like `params`.

    Raises:
        TypeError, ValueError: if an argument is not as described.
    """
    check_order(order)
    if order == 2:
        _validate.positive_scalar("learning_rate", learning_rate)
    check_problem(loss_vector_fn, params, data, microbatch_size)

    def value(params: Any, data: Any, rate: Any) -> Any:
        field = Field.of(loss_vector_fn, params, data, microbatch_size)
        rate = None if rate is None else jnp.asarray(rate, field.dtype)
        return field.drift(params, order, rate)

    return _one_shot(value, microbatch_size)(params, data, learning_rate)


def diffusion(
    loss_vector_fn: loss.LossVectorFn,
    params: Any,
    data: Any,
    noise: Law,
    vector: Float[Array, " N"],
    *,
    microbatch_size: int | None = None,
) -> Any:
    """C(theta) w, matrix-free, where C C^T is the covariance of ``grad(L . W)`` (Eq. 68).

    For `noise.fisher` it is ``grad(L . w)/sqrt(bN)``; for `noise.cov` (Eq. 15) the same with
    ``w - mean(w)``; for any exchangeable noise, ``grad(L . A w)`` with A A^T = Cov(W). One forward
    and one backward pass. The SDE multiplies it by sqrt(eta): the learning rate is not in here.

    It runs eagerly, and with micro-batches is compiled anew on each call: put it under `jax.jit` to
    call it again.

    Args:
        loss_vector_fn: ``loss_vector_fn(params, batch)`` returns the losses of the batch, [B].
        params: a pytree of floating-point arrays.
        data: a pytree of arrays [N, ...].
        noise: a `noise.MNoise` with independent steps, or a `noise.Exchangeable`: only its
            covariance matters.
        vector: w, [N].
        microbatch_size: examples in one pass, as in `loss.weighted_value_and_grad`; None for all.

    Returns:
        A pytree like `params`.

    Raises:
        TypeError, ValueError: if an argument is not as described.
    """
    num_examples = check_problem(loss_vector_fn, params, data, microbatch_size)
    if jnp.shape(vector) != (num_examples,):
        raise ValueError(
            f"vector must have shape ({num_examples},), one entry for each example, got "
            f"{jnp.shape(vector)}."
        )
    moments = eigenvalues(noise, num_examples)

    def value(params: Any, data: Any, vector: Any) -> Any:
        field = Field.of(loss_vector_fn, params, data, microbatch_size)
        root = Root.cast(moments, field.dtype)
        return field.weighted_gradient(params, root(jnp.asarray(vector, field.dtype)))

    return _one_shot(value, microbatch_size)(params, data, vector)


def _one_shot(function: Callable[..., Any], microbatch_size: int | None) -> Callable[..., Any]:
    """As it is; with micro-batches, compiled for this call alone.

    jax compiles a loop that runs eagerly, too, and keeps that program for good.
    """
    return function if microbatch_size is None else jax.jit(function)


def coupling(noise: Law, num_examples: int) -> Coupling:
    """The weights of the iteration that shares the SDE's Brownian path: W = 1/N - A dW.

    The iteration ``theta - eta grad(L . W)`` with the weights of
    ``coupling(noise, N)(increment)``, where `increment` is that of `brownian_increments` over the
    iteration, is M-SGD-Gaussian (Eq. 67) driven by the SDE's own path. It is linear in `increment`
    around 1/N: to study another coupling, compose it with another function.

    Args:
        noise: a `noise.MNoise` with independent steps, or a `noise.Exchangeable`: only its
            covariance matters.
        num_examples: N.

    Returns:
        A function from increments [N] to weights [N].

    Raises:
        TypeError, ValueError: if an argument is not as described.
    """
    num_examples = _validate.positive_int("num_examples", num_examples)
    moments = eigenvalues(noise, num_examples)

    def weights(increment: Float[Array, " N"]) -> Float[Array, " N"]:
        return 1 / num_examples - Root.cast(moments, increment.dtype)(increment)

    return weights


class Root(NamedTuple):
    """The matrix A with A A^T = Cov(W), as a function of vectors; its eigenvalues may be traced."""

    across: Float[Array, ""]
    along: Float[Array, ""]

    @classmethod
    def of(cls, noise: Any, num_examples: int, dtype: Any) -> "Root":
        """Checks that `noise` is a law of N weights."""
        return cls.cast(eigenvalues(noise, num_examples), dtype)

    @classmethod
    def cast(cls, eigenvalues: tuple[Any, Any], dtype: Any) -> "Root":
        """From the eigenvalues of Cov(W), across the all-ones vector and along it."""
        across, along = (jnp.asarray(value, dtype) for value in eigenvalues)
        return cls(across, along)

    def __call__(self, vector: Float[Array, "N *rest"]) -> Float[Array, "N *rest"]:
        mean = vector.mean(0, keepdims=True)
        return jnp.sqrt(self.across) * (vector - mean) + jnp.sqrt(self.along) * mean


class Field(NamedTuple):
    """Weighted gradients of one problem: what drift, diffusion and iteration are made of."""

    value_and_grad: Callable[..., tuple[Any, Any]]
    data: Any
    num_examples: int
    dtype: Any

    @classmethod
    def of(
        cls, loss_vector_fn: loss.LossVectorFn, params: Any, data: Any, microbatch_size: int | None
    ) -> "Field":
        """`dtype`, of the weights, is float32, or float64 where a parameter is."""
        return cls(
            loss.weighted_value_and_grad(loss_vector_fn, microbatch_size=microbatch_size),
            data,
            _validate.leading_axis("data", data),
            wide_dtype(params),
        )

    def weighted_gradient(self, params: Any, weights: Float[Array, " N"]) -> Any:
        """grad(L . w)."""
        return self.value_and_grad(params, self.data, Weights(weights, None, self.num_examples))[1]

    def gradient(self, params: Any) -> Any:
        """The gradient of the mean loss L."""
        mean = jnp.full(self.num_examples, 1 / self.num_examples, self.dtype)
        return self.weighted_gradient(params, mean)

    def loss(self, params: Any) -> Float[Array, ""]:
        """The mean loss L."""
        mean = jnp.full(self.num_examples, 1 / self.num_examples, self.dtype)
        weights = Weights(mean, None, self.num_examples)
        return self.value_and_grad(params, self.data, weights)[0]

    def hessian_product(self, params: Any, vector: Any) -> Any:
        """(grad^2 L) v, forward over reverse."""
        return jax.jvp(self.gradient, (params,), (vector,))[1]

    def drift(self, params: Any, order: int, learning_rate: Any) -> Any:
        """-grad L, or -(grad L + eta/2 (grad^2 L) grad L)."""
        gradient = self.gradient(params)
        if order == 1:
            return jax.tree.map(jnp.negative, gradient)
        curved = self.hessian_product(params, gradient)
        return jax.tree.map(
            lambda g, h: -(g + (0.5 * learning_rate).astype(h.dtype) * h), gradient, curved
        )

    def substep(
        self, params: Any, coloured: Float[Array, " N"], learning_rate: Any, length: Any, order: int
    ) -> Any:
        """One substep of `length` (in units of eta) of Euler-Maruyama; order 2 drifts by Heun.

        `coloured` is A times the Brownian increment in units of sqrt(eta), so the noise is
        ``eta grad(L . coloured)``. Of order 1, drift and noise are one backward pass.
        """
        if order == 1:
            weights = learning_rate * (length / self.num_examples - coloured)
            return step_along(params, self.weighted_gradient(params, weights), -1.0)
        noisy = step_along(params, self.weighted_gradient(params, learning_rate * coloured), 1.0)
        time = length * learning_rate
        start = self.drift(params, 2, learning_rate)
        end = self.drift(step_along(noisy, start, time), 2, learning_rate)
        return step_along(step_along(noisy, start, 0.5 * time), end, 0.5 * time)


def wide_dtype(params: Any) -> jnp.dtype:
    """Float32, or float64 where a parameter is."""
    return _dtypes.accumulator(*(jnp.result_type(leaf) for leaf in jax.tree.leaves(params)))


def step_along(params: Any, direction: Any, length: Any) -> Any:
    """Moves params by length * direction, in the types of the parameters."""
    return jax.tree.map(lambda p, d: p + jnp.asarray(length, p.dtype) * d, params, direction)


def eigenvalues(noise: Any, num_examples: int) -> tuple[float, float]:
    """The eigenvalues of Cov(W), across the all-ones vector and along it, checked."""
    check_law(noise)
    if isinstance(noise, Exchangeable):
        return noise.eigenvalues(num_examples)
    check_size(noise, num_examples)
    return noise.covariance.eigenvalues(num_examples)


def check_law(noise: Any) -> None:
    """Raises unless `noise` has a covariance, the same over every step and none between them."""
    if isinstance(noise, Exchangeable):
        return
    if not isinstance(noise, MNoise):
        raise TypeError(
            f"noise must be a noise.MNoise or a noise.Exchangeable, got {_validate.shown(noise)}."
        )
    if noise.draw_at is not None:
        raise ValueError(
            f"noise must have independent steps, as the increments of the SDE are, got {noise.name}"
            ": its steps are correlated, and add up to another covariance than that of one step. "
            "Use noise.sgd(N, b), or a noise.Exchangeable given on purpose, such as that of a "
            "whole epoch divided by its steps."
        )


def check_size(noise: MNoise, num_examples: int, name: str = "noise") -> None:
    """Raises ValueError unless this is a law of so many weights."""
    if noise.num_examples != num_examples:
        raise ValueError(
            f"{name} is for num_examples = {noise.num_examples}, but data has {num_examples} "
            "examples on its leading axis."
        )


def check_order(order: Any) -> None:
    """Raises unless `order` is 1 or 2."""
    _validate.positive_int("order", order, maximum=2)


def check_problem(
    loss_vector_fn: Any, params: Any, data: Any, microbatch_size: Any = None, wide: bool = False
) -> int:
    """Returns N; raises TypeError or ValueError if these do not make a loss vector.

    With `wide`, parameters must be float32 or wider.
    """
    _validate.function("loss_vector_fn", loss_vector_fn)
    _validate.floating_params(params)
    if microbatch_size is not None:
        _validate.positive_int("microbatch_size", microbatch_size)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if wide and jnp.finfo(jnp.result_type(leaf)).bits < 32:
            raise TypeError(
                f"params{jax.tree_util.keystr(path)} must be float32 or float64, got "
                f"{jnp.result_type(leaf)}: the small steps of a fine path would be rounded away."
            )
    return _validate.leading_axis("data", data)
