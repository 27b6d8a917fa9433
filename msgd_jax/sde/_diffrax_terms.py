"""The two terms of `diffrax_terms`. Importing this needs diffrax: it is imported when used."""

from typing import Any

import diffrax
import equinox
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from msgd_jax import _validate
from msgd_jax.loss import LossVectorFn
from msgd_jax.sde import _dynamics


class SDE(equinox.Module):
    """What both terms are made of; the data come with each call, as diffrax's `args`."""

    loss_vector_fn: LossVectorFn = equinox.field(static=True)
    noise: _dynamics.Law = equinox.field(static=True)
    learning_rate: Any
    order: int = equinox.field(static=True)
    interpretation: str = equinox.field(static=True)
    microbatch_size: int | None = equinox.field(static=True)

    def parts(self, params: Any, data: Any) -> tuple[_dynamics.Field, _dynamics.Root, Any]:
        """Weighted gradients of these data, the root of the covariance, and eta."""
        size = _dynamics.check_problem(self.loss_vector_fn, params, data, wide=True)
        field = _dynamics.Field.of(self.loss_vector_fn, params, data, self.microbatch_size)
        root = _dynamics.Root.of(self.noise, size, field.dtype)
        return field, root, jnp.asarray(self.learning_rate, field.dtype)

    def drift(self, time: Any, params: Any, data: Any) -> Any:
        """Of the interpretation that the solver converges to."""
        del time
        field, root, rate = self.parts(params, data)
        value = field.drift(params, self.order, rate)
        if self.interpretation == "ito":
            return value
        return _dynamics.step_along(value, self._trace_gradient(field, root, params), -0.25 * rate)

    def product(self, params: Any, data: Any, increment: Float[Array, " N"]) -> Any:
        """sqrt(eta) C times an increment: one backward pass."""
        field, root, rate = self.parts(params, data)
        coloured = root(increment.astype(field.dtype))
        return field.weighted_gradient(params, jnp.sqrt(rate) * coloured)

    def matrix(self, params: Any, data: Any) -> Any:
        """sqrt(eta) C itself, a pytree of [*parameter, N]: from the gradient of every example."""
        field, root, rate = self.parts(params, data)

        def own_gradient(position: Any) -> Any:
            return jax.grad(self._loss_of_one(field, position))(params)

        rows = jax.lax.map(
            own_gradient, jnp.arange(field.num_examples), batch_size=self._at_once(field)
        )
        return jax.tree.map(
            lambda p, row: jnp.moveaxis(
                jnp.sqrt(rate) * root(row.astype(field.dtype)), 0, -1
            ).astype(jnp.result_type(p)),
            params,
            rows,
        )

    def _trace_gradient(self, field: _dynamics.Field, root: _dynamics.Root, params: Any) -> Any:
        """The gradient of tr(C C^T) = alpha sum_i |g_i|^2 + beta |sum_i g_i|^2."""
        size = field.num_examples
        at_once = self._at_once(field)
        runs = -(-size // at_once)

        def own_product(params: Any, position: Any) -> Any:
            gradient_fn = jax.grad(self._loss_of_one(field, position))
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

    def _loss_of_one(self, field: _dynamics.Field, position: Any) -> Any:
        """The loss of one example as a function of the parameters: a batch of its own."""
        batch = jax.tree.map(lambda x: jnp.take(x, position[None], axis=0, mode="clip"), field.data)

        def loss_of_one(params: Any) -> Float[Array, ""]:
            losses = self.loss_vector_fn(params, batch)
            _validate.loss_vector(losses, 1)
            return losses[0]

        return loss_of_one

    def _at_once(self, field: _dynamics.Field) -> int:
        size = field.num_examples
        return size if self.microbatch_size is None else min(self.microbatch_size, size)


class Diffusion(diffrax.AbstractTerm):
    """The term sqrt(eta) C dW.

    Solvers that want a product alone (`vf_prod`) get one backward pass, and C is never formed.
    Those that want the vector field itself (`vf`), to add up several or to differentiate it, get C.
    """

    sde: SDE
    control: diffrax.AbstractPath

    def vf(self, t: Any, y: Any, args: Any) -> Any:
        """C, a pytree like the parameters of [*parameter, N]."""
        del t
        return self.sde.matrix(y, args)

    def contr(self, t0: Any, t1: Any, **kwargs: Any) -> Any:
        """The increment of the control."""
        return self.control.evaluate(t0, t1, **kwargs)

    def prod(self, vf: Any, control: Any) -> Any:
        """C times an increment."""
        return jax.tree.map(lambda c: jnp.tensordot(c, control.astype(c.dtype), 1), vf)

    def vf_prod(self, t: Any, y: Any, args: Any, control: Any) -> Any:
        """The same without C."""
        del t
        size = _validate.leading_axis("args", args)
        if jnp.shape(control) != (size,):
            raise ValueError(
                f"control must have increments of shape ({size},), one for each example of args, "
                f"got {jnp.shape(control)}."
            )
        return self.sde.product(y, args, control)

    def is_vf_expensive(self, t0: Any, t1: Any, y: Any, args: Any) -> bool:
        """Yes: it is cheaper to evaluate two products than C."""
        del t0, t1, y, args
        return True


def terms(sde: SDE, control: Any) -> diffrax.MultiTerm:
    """Drift and diffusion, for `diffrax.diffeqsolve`."""
    return diffrax.MultiTerm(diffrax.ODETerm(sde.drift), Diffusion(sde, control))
