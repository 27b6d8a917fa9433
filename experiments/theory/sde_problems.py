"""Small problems on which the SDE is studied: losses, data and a start."""

from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jaxtyping import Array, Float

from msgd_jax import loss


class Problem(NamedTuple):
    """A loss vector function, with parameters to start from and N examples."""

    loss_vector_fn: loss.LossVectorFn
    params: Any
    data: Any

    @property
    def losses(self) -> loss.LossVector:
        """The loss vector."""
        return loss.LossVector(self.loss_vector_fn, self.data)

    @property
    def num_examples(self) -> int:
        """N."""
        return jax.tree.leaves(self.data)[0].shape[0]


def logistic(num_examples: int = 32, dim: int = 5, dtype: Any = jnp.float32) -> Problem:
    """Logistic regression on noisy labels: gradients are bounded and Lipschitz (Theorem 3).

    Args:
        num_examples: N.
        dim: the number of parameters.
        dtype: the dtype of parameters and data.
    """
    rng = _generator(0)
    features = 2 * rng.standard_normal((num_examples, dim))
    noise = 0.7 * rng.standard_normal(num_examples)
    labels = np.sign(features.sum(1) / (2 * np.sqrt(dim)) + noise)
    start = np.resize([-1.5, 1.0, -1.0, 0.5, 1.0], dim)
    return Problem(_LOGISTIC, jnp.asarray(start, dtype), _cast((features, labels), dtype))


def two_wells(num_examples: int = 32, dtype: Any = jnp.float32) -> Problem:
    """A net of one hidden unit, y = a tanh(b x): two parameters, two equal minima, a saddle at 0.

    Args:
        num_examples: N.
        dtype: the dtype of parameters and data.
    """
    rng = _generator(1)
    x = 1.5 * rng.standard_normal(num_examples)
    y = 1.2 * np.tanh(1.3 * x) + 0.5 * rng.standard_normal(num_examples)
    return Problem(_ONE_UNIT, jnp.asarray([-0.95, 0.75], dtype), _cast((x, y), dtype))


def at_minimum(problem: Problem) -> Problem:
    """The same problem, started at the minimum of the mean loss (found by BFGS)."""
    flat, unravel = jax.flatten_util.ravel_pytree(problem.params)

    @jax.jit
    def value_and_grad(flat: Float[Array, " D"]) -> tuple[Array, Array]:
        mean_loss = lambda flat: problem.loss_vector_fn(unravel(flat), problem.data).mean()  # noqa: E731
        return jax.value_and_grad(mean_loss)(flat)

    def on_host(point: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = value_and_grad(jnp.asarray(point, flat.dtype))
        return float(value), np.asarray(gradient, np.float64)

    found = scipy.optimize.minimize(on_host, np.asarray(flat), jac=True, method="BFGS")
    return problem._replace(params=unravel(jnp.asarray(found.x, flat.dtype)))


def _logistic_loss(params: Float[Array, " dim"], example: Any) -> Float[Array, ""]:
    features, label = example
    return jax.nn.softplus(-label * (features @ params))


def _one_unit_loss(params: Float[Array, "2"], example: Any) -> Float[Array, ""]:
    x, y = example
    return 0.5 * (params[0] * jnp.tanh(params[1] * x) - y) ** 2


# One function object per loss, so that compiled programs are found again.
_LOGISTIC = loss.per_example(_logistic_loss)
_ONE_UNIT = loss.per_example(_one_unit_loss)


def _generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def _cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)
