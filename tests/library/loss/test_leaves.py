"""Every function of the losses names a leaf of the parameters that is no array, compiled or not."""

import jax
import jax.numpy as jnp
import pytest

from msgd_jax import loss, noise

pytestmark = pytest.mark.usefixtures("user_errors")


@pytest.mark.parametrize("microbatch_size", [None, 2])
@pytest.mark.parametrize(
    "use",
    [
        lambda losses, params, _: losses(params),
        lambda losses, params, _: losses.mean(params),
        lambda losses, params, _: losses.gradient(params),
        lambda losses, params, weights: losses.value_and_grad(params, weights),
        lambda losses, params, _: losses.slopes(params, params),
        lambda losses, params, _: losses.hessian_product(params, params),
        lambda losses, params, _: losses.gradient_matrix(params),
        lambda losses, params, weights: losses.values_and_grads(
            params, jax.tree.map(lambda leaf: leaf[None], weights)
        ),
        lambda losses, params, weights: loss.weighted_value_and_grad(
            losses.loss_vector_fn, microbatch_size=losses.microbatch_size
        )(params, losses.data, weights),
        lambda losses, params, _: loss.noisy_value_and_grad(
            losses.loss_vector_fn, noise.sgd(4, 2), microbatch_size=losses.microbatch_size
        )(params, losses.data, jax.random.key(0), 0),
        lambda losses, params, _: loss.sum_over_examples(
            lambda p, batch, weights: weights @ losses.loss_vector_fn(p, batch),
            params,
            losses.data,
            microbatch_size=losses.microbatch_size,
        ),
    ],
)
def test_a_leaf_that_is_no_array_is_named(use, microbatch_size):
    losses = loss.LossVector(
        lambda p, batch: p["w"] * batch, jnp.ones(4), microbatch_size=microbatch_size
    )
    params = {"w": jnp.ones(()), "act": jax.nn.relu}
    weights = noise.sgd(4, 2).sample(jax.random.key(0), 0)
    with pytest.raises(TypeError, match=r"params\['act'\] must be an array, got <") as caught:
        use(losses, params, weights)
    assert len(str(caught.value)) <= 400
