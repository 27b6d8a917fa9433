"""The SDE as diffrax terms: any solver, Brownian motion, step control and saving of diffrax."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from msgd_jax import _validate
from msgd_jax.loss import LossVectorFn
from msgd_jax.sde import _dynamics

INTERPRETATIONS = ("ito", "stratonovich")


def diffrax_terms(
    loss_vector_fn: LossVectorFn,
    noise: _dynamics.Law,
    control: Any,
    *,
    learning_rate: float | Float[Array, ""],
    order: int = 1,
    interpretation: str = "ito",
    microbatch_size: int | None = None,
) -> Any:
    """The SDE dTheta = -grad L dt + sqrt(eta) C dW (Eqs. 12 and 68) for `diffrax.diffeqsolve`.

    The diffusion is a `lineax` operator that takes increments of W in R^N to parameters by one
    backward pass; C is never formed. `args` are the data, so that they are not constants of the
    compiled program::

      motion = diffrax.VirtualBrownianTree(0, T, tol=eta / 64, shape=(N,), key=key)
      terms = sde.diffrax_terms(losses, noise.cov(N, b), motion, learning_rate=eta)
      solution = diffrax.diffeqsolve(
          terms, diffrax.Euler(), 0, T, dt0=eta / 8, y0=params, args=data,
          saveat=diffrax.SaveAt(ts=times),
      )

    **The paper's SDE is Itô's.** `diffrax.Euler` solves it as it is; most others, among them all
    with adaptive steps (`diffrax.Heun`, `diffrax.EulerHeun`, `diffrax.SPaRK`, ...), converge to
    Stratonovich solutions: ask for ``interpretation="stratonovich"``, which adds
    -eta/4 grad tr(C C^T) to the drift to have the same solution; that costs a Hessian-vector
    product for every example.

    Args:
        loss_vector_fn: ``loss_vector_fn(params, batch)`` returns the losses of the batch, [B]. For
            "stratonovich" it is given batches of one example, and losses must not depend on each
            other.
        noise: whose covariance the SDE has: a `noise.MNoise` or a `noise.Exchangeable`.
        control: a diffrax path of increments [N], such as a `diffrax.VirtualBrownianTree`.
        learning_rate: eta, above 0.
        order: 1, or 2 for the drift ``-grad(L + eta/4 |grad L|^2)``.
        interpretation: "ito" or "stratonovich": what the solver converges to.
        microbatch_size: examples in one pass, as in `loss.weighted_value_and_grad`; None for all.

    Returns:
        A `diffrax.MultiTerm` of an `ODETerm` and a `ControlTerm`.

    Raises:
        ImportError: if diffrax is not installed (``pip install 'msgd-jax[solvers]'``).
        TypeError, ValueError: if an argument is not as described; when traced, if `args` are not N
            examples.
    """
    try:
        import diffrax
        import lineax
    except ImportError as error:
        raise ImportError(
            "diffrax_terms needs diffrax: pip install 'msgd-jax[solvers]'."
        ) from error
    _validate.function("loss_vector_fn", loss_vector_fn)
    _validate.positive_scalar("learning_rate", learning_rate)
    _dynamics.check_order(order)
    _validate.one_of("interpretation", interpretation, INTERPRETATIONS)
    if microbatch_size is not None:
        _validate.positive_int("microbatch_size", microbatch_size)

    def parts(params: Any, data: Any) -> tuple[_dynamics.Field, _dynamics.Root, Any]:
        size = _dynamics.check_problem(loss_vector_fn, params, data, wide=True)
        field = _dynamics.Field.of(loss_vector_fn, params, data, microbatch_size)
        root = _dynamics.Root.of(noise, size, field.dtype)
        return field, root, jnp.asarray(learning_rate, field.dtype)

    def drift(time: Any, params: Any, data: Any) -> Any:
        del time
        field, root, rate = parts(params, data)
        value = field.drift(params, order, rate)
        if interpretation == "ito":
            return value
        correction = _trace_gradient(loss_vector_fn, field, root, params, microbatch_size)
        return _dynamics.step_along(value, correction, -0.25 * rate)

    def diffusion(time: Any, params: Any, data: Any) -> Any:
        del time
        field, root, rate = parts(params, data)

        def product(increment: Float[Array, " N"]) -> Any:
            coloured = root(increment.astype(field.dtype))
            return field.weighted_gradient(params, jnp.sqrt(rate) * coloured)

        structure = jax.ShapeDtypeStruct((field.num_examples,), field.dtype)
        return lineax.FunctionLinearOperator(product, structure)

    return diffrax.MultiTerm(diffrax.ODETerm(drift), diffrax.ControlTerm(diffusion, control))


def _trace_gradient(
    loss_vector_fn: LossVectorFn,
    field: _dynamics.Field,
    root: _dynamics.Root,
    params: Any,
    microbatch_size: int | None,
) -> Any:
    """The gradient of tr(C C^T), where tr(C C^T) = alpha sum_i |g_i|^2 + beta |sum_i g_i|^2."""
    size = field.num_examples
    at_once = size if microbatch_size is None else min(microbatch_size, size)
    runs = -(-size // at_once)

    def own_product(params: Any, position: Any) -> Any:
        batch = jax.tree.map(lambda x: jnp.take(x, position[None], axis=0, mode="clip"), field.data)

        def loss_of_one(params: Any) -> Float[Array, ""]:
            losses = loss_vector_fn(params, batch)
            _validate.loss_vector(losses, 1)
            return losses[0]

        gradient_fn = jax.grad(loss_of_one)
        product = jax.jvp(gradient_fn, (params,), (gradient_fn(params),))[1]
        return jax.tree.map(lambda x: jnp.where(position < size, x, 0), product)

    def add_run(total: Any, positions: Any) -> tuple[Any, None]:
        products = jax.vmap(own_product, in_axes=(None, 0))(params, positions)
        return jax.tree.map(lambda t, x: t + x.sum(0), total, products), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    own, _ = jax.lax.scan(add_run, zeros, jnp.arange(runs * at_once).reshape(runs, at_once))
    mean_product = field.hessian_product(params, field.gradient(params))
    alone = _dynamics.step_along(zeros, own, 2 * root.across)
    return _dynamics.step_along(alone, mean_product, 2 * size * (root.along - root.across))
