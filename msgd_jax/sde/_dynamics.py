"""Drift and diffusion of the SDE, and the weights of the iteration that is coupled to it.

All of them are gradients of weighted losses: the drift is ``-grad(L . 1/N)`` and the diffusion
``grad(L . A w)``. ``A A^T = Cov(W)`` has two eigenvalues, so neither C nor a covariance is formed.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from msgd_jax import _dtypes, _laws, _validate, loss
from msgd_jax._laws import Law
from msgd_jax._typing import Data, Gradients, Params, PositiveInt, Scalar, Step
from msgd_jax.noise import Exchangeable, MNoise
from msgd_jax.sde import _brownian

Coupling = Callable[[Float[Array, " N"]], Float[Array, " N"]]
"""Weights [N] from the Brownian increment over one iteration [N], in units of sqrt(eta)."""


def drift(
    losses: loss.LossVector,
    params: Params,
    *,
    order: int = 1,
    learning_rate: Scalar | None = None,
) -> Gradients:
    """The drift of the SDE: -grad L, or for order 2, ``-grad(L + eta/4 |grad L|^2)``.

    The drift of order 2 is that of the stochastic modified equation of Li, Tai and E (2017), which
    approximates the iteration with weak order 2. It costs one more Hessian-vector product.

    Args:
        losses: the loss vector.
        params: a pytree of floating-point arrays.
        order: 1 or 2.
        learning_rate: eta, above 0; needed for order 2 only. With a schedule, give its value at the
            step: ``schedule(step)``.

    Returns:
        A pytree like `params`.

    Raises:
        TypeError: if `losses` is not a `loss.LossVector`, or a parameter is not floating point.
        ValueError: if `order` is neither 1 nor 2, or is 2 without a positive learning rate.
    """
    check_order(order)
    loss.checked(losses, params)
    if order == 2:
        _validate.positive_scalar("learning_rate", learning_rate)
    rate = None if learning_rate is None else jnp.asarray(learning_rate, wide_dtype(params))
    return drift_at(losses, params, order, rate)


def diffusion(
    losses: loss.LossVector, params: Params, law: Law, vector: Float[Array, " N"]
) -> Gradients:
    """``C(theta) w``, matrix-free, where ``C C^T`` is the covariance of ``grad(L . W)`` (Eq. 68).

    For `noise.fisher` it is ``grad(L . w)/sqrt(bN)``; for `noise.cov` (Eq. 15) the same with
    ``w - mean(w)``; for any exchangeable law, ``grad(L . A w)`` with ``A A^T = Cov(W)``. It takes
    one forward and one backward pass. It does not include the factor ``sqrt(eta)`` of the SDE.

    Args:
        losses: the loss vector.
        params: a pytree of floating-point arrays.
        law: a `noise.MNoise` with independent steps, or a `noise.Exchangeable`; only its covariance
            is used.
        vector: w, [N].

    Returns:
        A pytree like `params`.

    Raises:
        TypeError: if `losses` is not a `loss.LossVector`, a parameter is not floating point, or
            `law` is neither of these.
        ValueError: if the law is for another number of examples, its steps depend on each other, it
            states no covariance, or `vector` is not of shape [N].
    """
    num_examples = loss.checked(losses, params).num_examples
    if jnp.shape(vector) != (num_examples,):
        raise ValueError(
            f"vector must have shape ({num_examples},), one entry per example, got "
            f"{jnp.shape(vector)}."
        )
    dtype = wide_dtype(params)
    root = Root.cast(eigenvalues(law, num_examples), dtype)
    return losses.gradient(params, root(jnp.asarray(vector, dtype)))


def coupling(law: Law, num_examples: PositiveInt) -> Coupling:
    """The weights of the iteration that shares the SDE's Brownian path: W = 1/N - A dW.

    The iteration ``theta - eta grad(L . W)`` with the weights W = ``coupling(law, N)(increment)``,
    where `increment` is that of `brownian_increments` over the iteration, is M-SGD-Gaussian
    (Eq. 67) driven by the path of the SDE. W - 1/N is linear in `increment`. To study another
    coupling, compose it with another function.

    Args:
        law: a `noise.MNoise` with independent steps, or a `noise.Exchangeable`; only its covariance
            is used.
        num_examples: N.

    Returns:
        A function from increments [N] to weights [N].

    Raises:
        TypeError, ValueError: as `diffusion`, or if `num_examples` is not a positive integer.
    """
    num_examples = _validate.positive_int("num_examples", num_examples)
    moments = eigenvalues(law, num_examples)

    def weights(increment: Float[Array, " N"]) -> Float[Array, " N"]:
        return 1 / num_examples - Root.cast(moments, increment.dtype)(increment)

    return weights


class Root(NamedTuple):
    """A with ``A A^T = Cov(W)``, as a function of vectors; its eigenvalues may be traced."""

    across: Float[Array, ""]
    along: Float[Array, ""]

    @classmethod
    def cast(cls, eigenvalues: tuple[Scalar, Scalar], dtype: jnp.dtype) -> "Root":
        """The root for these eigenvalues of Cov(W), across the all-ones vector and along it."""
        across, along = (jnp.asarray(value, dtype) for value in eigenvalues)
        return cls(across, along)

    def __call__(self, vector: Float[Array, "N *rest"]) -> Float[Array, "N *rest"]:
        mean = vector.mean(0, keepdims=True)
        return jnp.sqrt(self.across) * (vector - mean) + jnp.sqrt(self.along) * mean


@dataclasses.dataclass(frozen=True)
class Scheme:
    """The order of the SDE that is integrated, and the number of substeps.

    Attributes:
        substeps: the number of Euler-Maruyama steps per iteration: a power of two, at most 65,536.
        order: 1, or 2 for the drift ``-grad(L + eta/4 |grad L|^2)``, which is integrated by Heun's
            method (the error of Euler's method would be as large as the correction).

    Raises:
        TypeError: if `substeps` is not an integer.
        ValueError: if `substeps` is not a power of two up to 65,536, or `order` is neither 1 nor 2.
    """

    substeps: int = 8
    order: int = 1

    def __post_init__(self) -> None:
        _brownian.check_substeps(self.substeps)
        check_order(self.order)


class Equation(NamedTuple):
    """The SDE of a loss vector and a law, with its Brownian paths; its parts are checked."""

    losses: loss.LossVector
    moments: tuple[Scalar, Scalar]
    dtype: jnp.dtype
    path_dtype: jnp.dtype
    scheme: Scheme

    @classmethod
    def of(cls, losses: loss.LossVector, params: Params, law: Law, scheme: Scheme) -> "Equation":
        """The equation of these arguments, after checks; raises TypeError or ValueError."""
        loss.checked(losses, params, wide=True)
        moments, dtype = eigenvalues(law, losses.num_examples), wide_dtype(params)
        if not isinstance(scheme, Scheme):
            raise TypeError(f"scheme must be an sde.Scheme, got {_validate.shown(scheme)}.")
        return cls(losses, moments, dtype, _brownian.path_dtype(law, dtype), scheme)

    def with_data(self, data: Data) -> "Equation":
        """The same equation for other data, which may be traced."""
        return self._replace(losses=self.losses.replace(data=data))

    @property
    def root(self) -> Root:
        """The root of the weights' covariance."""
        return Root.cast(self.moments, self.dtype)

    def increments(self, key: Key[Array, ""], step: Step) -> Float[Array, "substeps N"]:
        """The increments of the Brownian path over one iteration, drawn in the dtype of the law."""
        return _brownian.brownian_increments(
            key,
            step,
            self.losses.num_examples,
            substeps=self.scheme.substeps,
            dtype=self.path_dtype,
        ).astype(self.dtype)

    def iteration(
        self,
        params: Params,
        increments: Float[Array, "substeps N"],
        learning_rate: Float[Array, ""],
    ) -> Params:
        """One iteration of Euler-Maruyama, with one substep per increment."""
        root = self.root

        def substep(params: Params, increment: Float[Array, " N"]) -> tuple[Params, None]:
            return self.substep(params, root(increment), learning_rate), None

        return jax.lax.scan(substep, params, increments)[0]

    def substep(
        self, params: Params, coloured: Float[Array, " N"], learning_rate: Float[Array, ""]
    ) -> Params:
        """One substep of Euler-Maruyama; for order 2 the drift is integrated by Heun's method.

        `coloured` is A times the Brownian increment in units of sqrt(eta), so the noise is
        ``eta grad(L . coloured)``. For order 1, drift and noise take one backward pass together.
        """
        losses, length = self.losses, 1 / self.scheme.substeps
        if self.scheme.order == 1:
            weights = learning_rate * (length / losses.num_examples - coloured)
            return step_along(params, losses.gradient(params, weights), -1.0)
        # Add the noise first, then the average of the drifts before the step and at its end.
        noisy = step_along(params, losses.gradient(params, learning_rate * coloured), 1.0)
        time = length * learning_rate
        start = drift_at(losses, params, 2, learning_rate)
        end = drift_at(losses, step_along(noisy, start, time), 2, learning_rate)
        return step_along(step_along(noisy, start, 0.5 * time), end, 0.5 * time)


def drift_at(
    losses: loss.LossVector, params: Params, order: int, learning_rate: Array | None
) -> Gradients:
    """-grad L, or -(grad L + eta/2 (grad^2 L) grad L)."""
    gradient = losses.gradient(params)
    if order == 1 or learning_rate is None:
        return jax.tree.map(jnp.negative, gradient)
    curved = losses.hessian_product(params, gradient)
    return jax.tree.map(
        lambda g, h: -(g + (0.5 * learning_rate).astype(h.dtype) * h), gradient, curved
    )


def wide_dtype(params: Params) -> jnp.dtype:
    """float64 if a parameter is float64, else float32."""
    return _dtypes.accumulator(*(jnp.result_type(leaf) for leaf in jax.tree.leaves(params)))


def step_along(params: Params, direction: Gradients, length: Scalar) -> Params:
    """The parameters moved by length * direction, in their own dtypes."""
    return jax.tree.map(lambda p, d: p + jnp.asarray(length, p.dtype) * d, params, direction)


def eigenvalues(law: Law, num_examples: int) -> tuple[float, float]:
    """The eigenvalues of Cov(W), across the all-ones vector and along it.

    Raises:
        TypeError: if `law` is not a law.
        ValueError: if the law is for another number of examples, its steps depend on each other, or
            it does not state the same covariance for all steps.
    """
    check_independent(law)
    return _laws.eigenvalues("law", law, num_examples)


def check_independent(law: Law) -> None:
    """Raises TypeError unless `law` is a law, and ValueError unless its steps are independent."""
    if not isinstance(law, (MNoise, Exchangeable)):
        raise TypeError(
            f"law must be a noise.MNoise or a noise.Exchangeable, got {_validate.shown(law)}."
        )
    if isinstance(law, MNoise) and law.draw_at is not None:
        raise ValueError(
            f"law must have independent steps, all alike, since the SDE has such increments, got "
            f"{law.name}, whose steps depend on each other or differ: the covariance of their sum "
            "is not that of one step times their number. Use noise.sgd(N, b), or a "
            "noise.Exchangeable, such as the covariance of a whole epoch divided by its steps."
        )


def check_order(order: int) -> None:
    """Raises ValueError unless `order` is 1 or 2."""
    _validate.positive_int("order", order, maximum=2)
