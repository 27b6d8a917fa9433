"""Noise at the outputs of a net: random cotangents, in the backward pass that there is anyway."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from msgd_jax import _validate
from msgd_jax._typing import Batch, Example, LossVectorFn, Params, Scalar

OutputLoss: TypeAlias = Callable[[Any, Example], Any]
"""``loss_of_outputs(outputs, example)``: the loss of one example, a scalar."""

Cotangents: TypeAlias = Callable[[Key[Array, ""], Any, Example, OutputLoss], Any]
"""``cotangents(key, outputs, example, loss_of_outputs)``: what is added to the derivative of the
loss by the outputs, an array like them; mean 0."""


def with_output_noise(
    outputs_fn: Callable[[Params, Example], Float[Array, "*outputs"]],
    loss_of_outputs: OutputLoss,
    cotangents: Cotangents,
) -> LossVectorFn:
    """A loss vector function whose gradient has noise that enters at the outputs of the net.

    With f_i the outputs for example i, J_i their Jacobian by the parameters, and z_i a random
    cotangent with mean 0 and covariance C_i, the gradient of loss i becomes grad l_i + J_i^T z_i,
    by the one backward pass through the net that there is anyway. The losses themselves are what
    they were.

    The z of different examples and steps are independent, and independent of the weights W. So the
    noise that they add to the gradient of L . W is uncorrelated with that of the weights, and its
    covariance is exactly ::

      N E[W_i^2] G,   G = mean of J_i^T C_i J_i,   N E[W_i^2] = 1/N + N (alpha + beta)

    with Cov(W) = alpha I + beta 1 1^T: G/N for `noise.gd`, G/b for SGD of b examples (with noise of
    its own besides). For noise at the outputs alone, of covariance G/b, use `noise.gd` and a scale
    of sqrt(N/b).

    Args:
        outputs_fn: ``outputs_fn(params, example)`` returns the outputs for one example.
        loss_of_outputs: ``loss_of_outputs(outputs, example)`` returns their loss, a scalar.
        cotangents: `label_noise`, `sampled_labels`, `gauss_newton`, or a function of yours,
          ``cotangents(key, outputs, example, loss_of_outputs)``, that returns an array like the
          outputs and has mean 0.

    Returns:
        ``loss_vector_fn(params, batch, keys)`` with a typed PRNG key per example, keys [B]: a loss
        with ``has_keys=True``.

    Raises:
        TypeError: if an argument is not a function. When traced, ValueError if the loss is not a
            scalar, or the cotangents do not have the shape of the outputs.

    Example:
        >>> from msgd_jax import loss
        >>> squares = loss.with_output_noise(
        ...     lambda theta, e: theta * e["x"],
        ...     lambda output, e: (output - e["y"]) ** 2 / 2,
        ...     loss.label_noise(0.1),
        ... )
        >>> batch = {"x": jnp.asarray([1.0, 2.0]), "y": jnp.asarray([0.0, 1.0])}
        >>> keys = jax.random.split(jax.random.key(0), 2)
        >>> squares(jnp.asarray(1.0), batch, keys)
        Array([0.5, 0.5], dtype=float32)
    """
    for name, value in (
        ("outputs_fn", outputs_fn),
        ("loss_of_outputs", loss_of_outputs),
        ("cotangents", cotangents),
    ):
        _validate.function(name, value)

    def of_one(params: Params, example: Example, key: Key[Array, ""]) -> Float[Array, ""]:
        outputs = jnp.asarray(outputs_fn(params, example))
        value = jnp.asarray(loss_of_outputs(outputs, example))
        if value.shape != ():
            raise ValueError(
                f"loss_of_outputs must return a scalar for one example, got shape {value.shape}."
            )
        # The outputs are given: nothing of the noise is differentiated but what it multiplies.
        fixed = jax.lax.stop_gradient(outputs)
        added = jax.lax.stop_gradient(jnp.asarray(cotangents(key, fixed, example, loss_of_outputs)))
        if added.shape != outputs.shape:
            raise ValueError(
                f"cotangents must return an array like the outputs, shape {outputs.shape}, got "
                f"shape {added.shape}."
            )
        # Zero, with the derivative that is added.
        nothing = jnp.sum(added.astype(outputs.dtype) * (outputs - fixed))
        return value + nothing.astype(value.dtype)

    def loss_vector_fn(
        params: Params, batch: Batch, keys: Key[Array, " batch"]
    ) -> Float[Array, " batch"]:
        return jax.vmap(of_one, in_axes=(None, 0, 0))(params, batch, keys)

    return loss_vector_fn


def label_noise(scale: Scalar | int) -> Cotangents:
    """Cotangents ``scale * eps``, eps normal and independent for each output: C_i = scale^2 I.

    For half the square of f - y that is exactly normal noise of this standard deviation on the
    labels y, drawn anew at each step, and G = scale^2 mean of J_i^T J_i. As in HaoChen, Wei, Lee
    and Ma (2020), *Shape matters: understanding the implicit bias of the noise covariance*.

    Args:
        scale: the standard deviation, a number or a traced array, at least 0.

    Raises:
        TypeError, ValueError: if `scale` is not a finite number of at least 0.
    """
    _validate.nonnegative_scalar("scale", scale)

    def cotangents(key: Key[Array, ""], outputs: Any, example: Any, loss: Any) -> Any:
        return scale * jax.random.normal(key, outputs.shape, outputs.dtype)

    return cotangents


def sampled_labels(
    resample: Callable[[Key[Array, ""], Any, Example], Example],
    scale: Scalar | int = 1.0,
) -> Cotangents:
    """Cotangents ``scale * d loss(f, y')/df`` at labels y' that the net itself predicts.

    Where the loss is the negative logarithm of the likelihood that y' is drawn from, they have
    mean 0, C_i is scale^2 times the Fisher matrix of the likelihood at the outputs (for the cross-
    entropy of logits diag(p) - p p^T), and G is scale^2 times the true Fisher matrix of the net,
    with no labels of the data in it. The loss of the data's own labels stays what it was.

    Args:
        resample: ``resample(key, outputs, example)`` returns the example with a label drawn from
          the likelihood: ``lambda key, logits, example: example | {"y":
          jax.random.categorical(key, logits)}``, say.
        scale: a factor, a number or a traced array, at least 0.

    Raises:
        TypeError, ValueError: if `resample` is not a function, or `scale` not a finite number of
            at least 0.
    """
    _validate.function("resample", resample)
    _validate.nonnegative_scalar("scale", scale)

    def cotangents(
        key: Key[Array, ""], outputs: Any, example: Any, loss_of_outputs: OutputLoss
    ) -> Any:
        sampled = resample(key, outputs, example)
        return scale * jax.grad(lambda f: loss_of_outputs(f, sampled))(outputs)

    return cotangents


def gauss_newton(scale: Scalar | int = 1.0) -> Cotangents:
    """Normal cotangents whose covariance is the second derivative of the loss by the outputs.

    C_i = scale^2 H_i with H_i = d^2 l_i/df^2, so that G is scale^2 times the generalised
    Gauss-Newton matrix. (Where H_i has negative eigenvalues, for losses that are not convex in the
    outputs, they count as 0.) For cross-entropies and squares that is the true Fisher matrix of
    `sampled_labels`, with normal noise.

    The root of H_i is taken by its eigenvalues: with C outputs C^3 operations and C^2 numbers per
    example, for some hundreds of outputs at most.

    Args:
        scale: a factor, a number or a traced array, at least 0.

    Raises:
        TypeError, ValueError: if `scale` is not a finite number of at least 0.
    """
    _validate.nonnegative_scalar("scale", scale)

    def cotangents(
        key: Key[Array, ""], outputs: Any, example: Any, loss_of_outputs: OutputLoss
    ) -> Any:
        wide = jnp.ravel(outputs).astype(jnp.promote_types(outputs.dtype, jnp.float32))
        hessian = jax.hessian(lambda f: loss_of_outputs(f.reshape(outputs.shape), example))(wide)
        values, vectors = jnp.linalg.eigh(hessian)
        normal = jax.random.normal(key, wide.shape, wide.dtype)
        drawn = vectors @ (jnp.sqrt(jnp.maximum(values, 0)) * normal)
        return (scale * drawn).reshape(outputs.shape)

    return cotangents
