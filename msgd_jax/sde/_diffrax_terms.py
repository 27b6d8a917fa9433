"""The two terms of `diffrax_terms`. Importing this module imports diffrax, so it is done late."""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from msgd_jax import _validate, loss
from msgd_jax._laws import Law
from msgd_jax._typing import Batch, Example, Gradients, Params, PyTree
from msgd_jax.sde import _dynamics


class SDE(equinox.Module):
    """The parts of both terms; diffrax passes the loss vector in each call, as `args`."""

    law: Law = equinox.field(static=True)
    learning_rate: Any
    schedule: Callable[[Any], Any] | None = equinox.field(static=True)
    order: int = equinox.field(static=True)
    interpretation: str = equinox.field(static=True)

    def parts(
        self, time: Any, params: Params, losses: loss.LossVector
    ) -> tuple[_dynamics.Root, Float[Array, ""], Float[Array, ""]]:
        """The root of the weights' covariance, eta, and the SDE's time per unit of `time`."""
        loss.checked_kind(losses, "args")
        loss.checked(losses, params, wide=True)
        dtype = _dynamics.wide_dtype(params)
        moments = _dynamics.eigenvalues(self.law, losses.num_examples)
        root = _dynamics.Root.cast(moments, dtype)
        if self.schedule is None:
            return root, jnp.asarray(self.learning_rate, dtype), jnp.ones((), dtype)
        # Time is in iterations, and the rate is constant within each.
        rate = jnp.asarray(self.schedule(jnp.floor(time).astype(jnp.int32)), dtype)
        return root, rate, rate

    def drift(self, time: Any, params: Params, losses: loss.LossVector) -> Gradients:
        """The drift for the interpretation that the solver converges to."""
        root, rate, pace = self.parts(time, params, losses)
        value = _dynamics.drift_at(losses, params, self.order, rate)
        if self.interpretation == "stratonovich":
            value = _dynamics.step_along(value, _trace_gradient(losses, root, params), -0.25 * rate)
        return jax.tree.map(lambda x: pace.astype(x.dtype) * x, value)

    def product(
        self, time: Any, params: Params, losses: loss.LossVector, increment: Float[Array, " N"]
    ) -> Gradients:
        """sqrt(eta) C times an increment, by one backward pass."""
        root, rate, pace = self.parts(time, params, losses)
        return losses.gradient(params, jnp.sqrt(rate * pace) * root(increment.astype(rate.dtype)))

    def matrix(self, time: Any, params: Params, losses: loss.LossVector) -> PyTree:
        """sqrt(eta) C itself, a pytree of [*parameter, N], from the gradients of all examples."""
        root, rate, pace = self.parts(time, params, losses)

        def coloured(param: Array, gradients: Float[Array, "N ..."]) -> Float[Array, "..."]:
            columns = jnp.sqrt(rate * pace) * root(gradients.astype(rate.dtype))
            return jnp.moveaxis(columns, 0, -1).astype(jnp.result_type(param))

        return jax.tree.map(coloured, params, losses.gradient_matrix(params))


def _trace_gradient(losses: loss.LossVector, root: _dynamics.Root, params: Params) -> Gradients:
    """The gradient of tr(C C^T) = alpha sum_i |g_i|^2 + beta |sum_i g_i|^2."""
    loss_vector_fn, size = losses.loss_vector_fn, losses.num_examples

    def products(params: Params, batch: Batch, weights: Float[Array, " B"]) -> Gradients:
        def own_product(example: Example) -> Gradients:
            """The Hessian of one loss times its gradient, from a batch of one example."""
            alone = jax.tree.map(lambda x: x[None], example)

            def loss_of_one(params: Params) -> Float[Array, ""]:
                values = loss_vector_fn(params, alone)
                _validate.loss_vector(values, 1)
                return values[0]

            gradient_fn = jax.grad(loss_of_one)
            return jax.jvp(gradient_fn, (params,), (gradient_fn(params),))[1]

        return jax.tree.map(
            lambda x: jnp.tensordot(weights.astype(x.dtype), x, 1), jax.vmap(own_product)(batch)
        )

    own = losses.sum_over(products, params)
    mean_product = losses.hessian_product(params, losses.gradient(params))
    alone = jax.tree.map(lambda p, x: (2 * root.across).astype(p.dtype) * x, params, own)
    return _dynamics.step_along(alone, mean_product, 2 * size * (root.along - root.across))


class Diffusion(diffrax.AbstractTerm):
    """The term sqrt(eta) C dW.

    For solvers that need products only (`vf_prod`), a product is one backward pass and C is never
    formed. Solvers that need the vector field (`vf`), to add it up or differentiate it, get C.
    """

    sde: SDE
    control: diffrax.AbstractPath

    def vf(self, t: Any, y: Any, args: Any) -> Any:
        """C, a pytree like the parameters with leaves [*parameter, N]."""
        return self.sde.matrix(t, y, args)

    def contr(self, t0: Any, t1: Any, **kwargs: Any) -> Any:
        """The increment of the control."""
        return self.control.evaluate(t0, t1, **kwargs)

    def prod(self, vf: Any, control: Any) -> Any:
        """C times an increment."""
        return jax.tree.map(lambda c: jnp.tensordot(c, control.astype(c.dtype), 1), vf)

    def vf_prod(self, t: Any, y: Any, args: Any, control: Any) -> Any:
        """C times an increment, without forming C."""
        size = loss.checked_kind(args, "args").num_examples
        if jnp.shape(control) != (size,):
            raise ValueError(
                f"control must have increments of shape ({size},), one for each example of args, "
                f"got {jnp.shape(control)}."
            )
        return self.sde.product(t, y, args, control)

    def is_vf_expensive(self, t0: Any, t1: Any, y: Any, args: Any) -> bool:
        """True, since two products are cheaper than C."""
        del t0, t1, y, args
        return True


def terms(sde: SDE, control: Any) -> diffrax.MultiTerm:
    """Drift and diffusion, for `diffrax.diffeqsolve`."""
    return diffrax.MultiTerm(diffrax.ODETerm(sde.drift), Diffusion(sde, control))
