"""Small problems whose gradient matrices are known in closed form or by dense algebra."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from msgd_jax import loss, sde


class Regression(NamedTuple):
    """Logistic regression on N examples, whose parameters are two leaves."""

    params: dict[str, jax.Array]
    data: dict[str, jax.Array]

    @staticmethod
    def loss_fn(params, example):
        """The loss of one example."""
        logit = example["x"] @ params["w"] + params["b"]
        return jax.nn.softplus(-example["y"] * logit)

    def gradient_matrix(self) -> dict[str, np.ndarray]:
        """The gradient of each loss, [N, *leaf], derived by hand in numpy's float64."""
        x, y = (np.asarray(self.data[name], np.float64) for name in ("x", "y"))
        w, b = (np.asarray(self.params[name], np.float64) for name in ("w", "b"))
        slope = -y / (1 + np.exp(y * (x @ w + b)))
        return {"w": slope[:, None] * x, "b": slope}

    def losses(self) -> np.ndarray:
        """The losses, [N], in numpy's float64."""
        x, y = (np.asarray(self.data[name], np.float64) for name in ("x", "y"))
        w, b = (np.asarray(self.params[name], np.float64) for name in ("w", "b"))
        return np.log1p(np.exp(-y * (x @ w + b)))


loss_vector_fn = loss.per_example(Regression.loss_fn)


def regression(num_examples: int = 100, dim: int = 5, dtype=jnp.float32) -> Regression:
    """Random examples with noisy labels, and random parameters."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(num_examples, dim))
    y = np.sign(x.sum(1) + rng.normal(size=num_examples))
    params = {"w": rng.normal(size=dim), "b": rng.normal()}
    cast = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)  # noqa: E731
    return Regression(cast(params), cast({"x": x, "y": y}))


def linear(rows) -> tuple[loss.LossVector, jax.Array]:
    """A loss vector that has this gradient matrix [N, D] at all parameters, and parameters [D]."""
    rows = jnp.asarray(rows)
    losses = loss.LossVector(lambda theta, gradient: gradient @ theta, rows)
    return losses, jnp.zeros(rows.shape[1], rows.dtype)


SWEEP = ("learning_rates", "horizon", "num_paths", "at_once")  # arguments of `sde.Sweep`
SCHEME = ("substeps", "order")  # arguments of `sde.Scheme`


def of_sde(function, loss_vector_fn, params, data, *rest, microbatch_size=None, **options):
    """Calls ``function(losses, params, *rest, sweep, scheme=..., **options)``.

    The loss vector is made of the function and the data, and the options that belong to them become
    one `sde.Sweep` and one `sde.Scheme`.
    """
    losses = loss.LossVector(loss_vector_fn, data, microbatch_size=microbatch_size)
    if function is not sde.drift:
        scheme = {name: options.pop(name) for name in SCHEME if name in options}
        options |= {"scheme": sde.Scheme(**scheme)} if scheme else {}
    sweep = {name: options.pop(name) for name in SWEEP if name in options}
    return function(losses, params, *rest, *([sde.Sweep(**sweep)] if sweep else []), **options)
