"""Noise at the outputs of a net: random cotangents, without a further backward pass."""

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
"""``cotangents(key, outputs, example, loss_of_outputs)``: a random array like the outputs, with
mean 0, that is added to the derivative of the loss with respect to the outputs."""


def with_output_noise(
    outputs_fn: Callable[[Params, Example], Float[Array, "*outputs"]],
    loss_of_outputs: OutputLoss,
    cotangents: Cotangents,
) -> LossVectorFn:
    """A loss vector function whose gradient has noise that enters at the outputs of the net.

    With f_i the outputs for example i, J_i their Jacobian with respect to the parameters, and z_i a
    random cotangent with mean 0 and covariance C_i, the gradient of loss i becomes grad l_i +
    J_i^T z_i. It still takes one backward pass through the net. The losses themselves do not
    change.

    The z of different examples and steps are independent, and independent of the weights W. So the
    noise that they add to the gradient of L . W is uncorrelated with that of the weights, and its
    covariance is exactly ::

      N E[W_i^2] G,   G = mean_i J_i^T C_i J_i,   N E[W_i^2] = 1/N + N (alpha + beta)

    with ``Cov(W) = alpha I + beta 1 1^T``: G/N for `noise.gd`, and G/b for SGD of b examples (in
    addition to the noise of SGD). For noise at the outputs only, of covariance G/b, use `noise.gd`
    and a scale of ``sqrt(N/b)``.

    Args:
        outputs_fn: ``outputs_fn(params, example)`` returns the outputs for one example.
        loss_of_outputs: ``loss_of_outputs(outputs, example)`` returns their loss, a scalar.
        cotangents: `label_noise(...)`, `sampled_labels(...)`, `gauss_newton(...)`, or a function of
          yours, ``cotangents(key, outputs, example, loss_of_outputs)``, that returns a random array
          like the outputs with mean 0.

    Returns:
        ``loss_vector_fn(params, batch, keys)`` with one typed PRNG key per example, keys [B]: a
        loss with ``has_keys=True``.

    Raises:
        TypeError: if an argument is not a function.
        ValueError: when traced, if the loss is not a scalar, or the cotangents do not have the
            shape of the outputs.

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
        # The noise is a constant: only the outputs that it multiplies are differentiated.
        fixed = jax.lax.stop_gradient(outputs)
        added = jax.lax.stop_gradient(jnp.asarray(cotangents(key, fixed, example, loss_of_outputs)))
        if added.shape != outputs.shape:
            raise ValueError(
                f"cotangents must return an array like the outputs, shape {outputs.shape}, got "
                f"shape {added.shape}."
            )
        # A term whose value is 0 and whose derivative is the noise.
        nothing = jnp.sum(added.astype(outputs.dtype) * (outputs - fixed))
        return value + nothing.astype(value.dtype)

    def loss_vector_fn(
        params: Params, batch: Batch, keys: Key[Array, " batch"]
    ) -> Float[Array, " batch"]:
        return jax.vmap(of_one, in_axes=(None, 0, 0))(params, batch, keys)

    return loss_vector_fn


def label_noise(scale: Scalar | int) -> Cotangents:
    """Cotangents ``scale * eps``, eps normal and independent for each output: C_i = scale^2 I.

    If the loss is half the square of f - y, this is exactly normal noise of this standard deviation
    on the labels y, drawn anew at each step, and G = scale^2 mean of J_i^T J_i. It is the label
    noise of HaoChen, Wei, Lee and Ma (2020), *Shape matters: understanding the implicit bias of the
    noise covariance*.

    Args:
        scale: the standard deviation, a number or a traced array, at least 0.

    Raises:
        TypeError: if `scale` is not a number.
        ValueError: if `scale` is not finite or below 0.
    """
    _validate.nonnegative_scalar("scale", scale)

    def cotangents(key: Key[Array, ""], outputs: Any, example: Any, loss: Any) -> Any:
        return scale * jax.random.normal(key, outputs.shape, outputs.dtype)

    return cotangents


def sampled_labels(
    resample: Callable[[Key[Array, ""], Any, Example], Example],
    scale: Scalar | int = 1.0,
) -> Cotangents:
    """Cotangents ``scale * d loss(f, y')/df`` at labels y' drawn from the net's own predictions.

    If the loss is the negative logarithm of the likelihood that y' is drawn from, the cotangents
    have mean 0. C_i is then scale^2 times the Fisher matrix of the likelihood at the outputs (for
    the cross-entropy of logits, diag(p) - p p^T), and G is scale^2 times the true Fisher matrix of
    the net, which does not depend on the labels of the data. The loss is still that of the data's
    own labels.

    Args:
        resample: ``resample(key, outputs, example)`` returns the example with a label drawn from
          the likelihood, such as ``lambda key, logits, example: example | {"y":
          jax.random.categorical(key, logits)}``.
        scale: a factor, a number or a traced array, at least 0.

    Raises:
        TypeError: if `resample` is not a function, or `scale` is not a number.
        ValueError: if `scale` is not finite or below 0.
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
    """Normal cotangents whose covariance is the second derivative of the loss in the outputs.

    C_i = scale^2 H_i with H_i = d^2 l_i/df^2, so G is scale^2 times the generalised Gauss-Newton
    matrix. (If the loss is not convex in the outputs, negative eigenvalues of H_i count as 0.) For
    cross-entropies and squares G is the true Fisher matrix, as with `sampled_labels`; the noise is
    normal.

    The root of H_i is computed from its eigendecomposition. C outputs cost C^3 operations and C^2
    numbers per example, so use it for some hundreds of outputs at most.

    Args:
        scale: a factor, a number or a traced array, at least 0.

    Raises:
        TypeError: if `scale` is not a number.
        ValueError: if `scale` is not finite or below 0.
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
