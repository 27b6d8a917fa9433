"""Loss vectors at fixed statistics, as batch norm has in evaluation mode.

Every method and every function that takes a loss vector must use them. The reference is a loss
vector function that reads the same statistics from outside.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from msgd_jax import complexity, covariance, flax_nnx, loss, measure, noise, sde
from tests.support.flax_nets import DATA, N, Net, cross_entropy
from tests.support.programs import compilations

KEY = jax.random.key(0)
LAW = noise.sgd(N, 3)
STATE = {"mean": jnp.asarray([0.5, -1.0, 0.0]), "scale": jnp.asarray(2.0)}
PARAMS = jnp.asarray([1.0, -2.0, 0.5])
X = np.random.default_rng(0).normal(size=(N, 3)).astype(np.float32)
WAYS = {
    "one pass": lambda: {},
    "micro-batches": lambda: {"microbatch_size": 5},
    "spread": lambda: {"sharding": spread()},
    "explicit": lambda: {"sharding": spread(jax.sharding.AxisType.Explicit), "microbatch_size": 2},
}


def spread(kind=jax.sharding.AxisType.Auto):
    return jax.NamedSharding(jax.make_mesh((3,), ("data",), axis_types=(kind,)), jax.P("data"))


def normalised(params, batch, state):
    """In evaluation mode, the given statistics are used and returned."""
    return ((batch - state["mean"][None]) / state["scale"] @ params) ** 2, state


def in_training_mode(params, batch, state):
    """In training mode, the statistics of the batch are used, and move the running ones."""
    mean = batch.mean(0)
    new = {**state, "mean": 0.9 * state["mean"] + 0.1 * mean}
    return ((batch - mean[None]) / state["scale"] @ params) ** 2, new


def closed(state=STATE):
    """The reference, which computes the same losses and reads the statistics from outside."""
    return loss.LossVector(lambda params, batch: normalised(params, batch, state)[0], X)


def draws():
    return jax.vmap(LAW.sample, in_axes=(None, 0))(KEY, jnp.arange(2))


METHODS = {
    "losses": lambda losses: losses(PARAMS),
    "mean": lambda losses: losses.mean(PARAMS),
    "gradient": lambda losses: losses.gradient(PARAMS, LAW.sample(KEY, 0)),
    "values_and_grads": lambda losses: losses.values_and_grads(PARAMS, draws()),
    "slopes": lambda losses: losses.slopes(PARAMS, PARAMS),
    "hessian_product": lambda losses: losses.hessian_product(PARAMS, PARAMS),
    "gradient_matrix": lambda losses: losses.gradient_matrix(PARAMS),
    "sum": lambda losses: losses.sum_over_gradients(lambda g, w: w @ g, PARAMS),
}


def close(got, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, wanted)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("way", WAYS)
def test_every_method_uses_the_given_statistics(name, way):
    options, state = WAYS[way](), STATE
    if sharding := options.get("sharding"):
        # Training on this mesh leaves statistics that are replicated over it.
        state = jax.device_put(STATE, jax.NamedSharding(sharding.mesh, jax.P()))
    losses = loss.LossVector(normalised, X, model_state=state, **options)
    close(METHODS[name](losses), METHODS[name](closed()))


def test_other_statistics_run_the_same_program():
    program = jax.jit(lambda losses: losses.mean(PARAMS))
    losses = loss.LossVector(normalised, X, model_state=STATE)
    program(losses)
    other = jax.tree.map(lambda leaf: leaf + 1, STATE)
    changed = losses.replace(model_state=other)
    with compilations() as compiled:
        found = program(changed)
    assert not compiled
    close(found, closed(other).mean(PARAMS))
    close(changed.replace(data=2 * X)(PARAMS), closed(other).replace(data=2 * X)(PARAMS))
    close(losses.replace(lambda params, batch: batch @ params)(PARAMS), X @ PARAMS)


def test_statistics_may_be_traced_and_mapped():
    mean = jax.jit(lambda s: loss.LossVector(normalised, X, model_state=s).mean(PARAMS))
    close(mean(STATE), closed().mean(PARAMS))
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 1]), STATE)
    close(jax.vmap(mean)(stacked)[1], closed(jax.tree.map(lambda x: x + 1, STATE)).mean(PARAMS))


def test_a_loss_may_take_statistics_and_keys():
    def with_keys(params, batch, state, keys):
        dropped = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (3,)))(keys)
        return normalised(params, jnp.where(dropped, batch, 0.0), state)

    def reference(params, batch, keys):
        return with_keys(params, batch, STATE, keys)[0]

    losses = loss.LossVector(with_keys, X, model_state=STATE, key=KEY, microbatch_size=5)
    found = losses(PARAMS)
    close(found, loss.LossVector(reference, X, key=KEY)(PARAMS))
    assert not np.allclose(found, closed()(PARAMS))


# A net of flax ------------------------------------------------------------------------------------


def net(training=False):
    model = Net(nnx.Rngs(0), norm=True)
    model.norm.mean[...] = jnp.linspace(-1.0, 1.0, 8)
    model.train() if training else model.eval()
    return flax_nnx.trainable(model, cross_entropy)


TAKERS = {
    "covariance": lambda losses, params: covariance.spectrum(losses, params, LAW),
    "measure": lambda losses, params: measure.noise_scale(losses, params).total.trace,
    "sde": lambda losses, params: sde.euler_maruyama(
        losses, params, LAW, learning_rate=0.1, num_steps=2, key=KEY
    ),
    "complexity": lambda losses, params: complexity.penalty(
        losses, params, LAW.sample(KEY, 0), radius=0.1
    ),
}


@pytest.mark.parametrize("name", TAKERS)
def test_functions_of_a_loss_vector_take_a_batch_norm_net_in_evaluation_mode(name):
    parts = net()
    losses = loss.LossVector(parts.loss_vector_fn, DATA, model_state=parts.model_state)
    by_hand = loss.LossVector(
        lambda params, batch: parts.loss_vector_fn(params, batch, parts.model_state)[0], DATA
    )
    close(TAKERS[name](losses, parts.params), TAKERS[name](by_hand, parts.params))


def test_the_state_of_a_net_without_statistics_is_empty():
    parts = flax_nnx.trainable(Net(nnx.Rngs(0)), cross_entropy)
    assert parts.model_state == ()
    losses = loss.LossVector(parts.loss_vector_fn, DATA, model_state=parts.model_state)
    close(losses(parts.params), parts.loss_vector_fn(parts.params, DATA))


# What it refuses ----------------------------------------------------------------------------------


def counted(params, batch, state):
    losses, state = normalised(params, batch, state)
    return losses, {**state, "scale": state["scale"] + 1}


def told(call, message):
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        call()
    assert len(str(caught.value)) <= 400


@pytest.mark.usefixtures("user_errors")
class TestBadInput:
    @pytest.mark.parametrize("name", METHODS)
    def test_training_mode_is_refused_by_every_method(self, name):
        losses = loss.LossVector(in_training_mode, X, model_state=STATE)
        told(lambda: METHODS[name](losses), "must be in evaluation mode")

    @pytest.mark.parametrize("wrap", [jax.jit, jax.grad], ids=["jit", "grad"])
    def test_traced_statistics_on_an_explicit_mesh(self, wrap):
        sharding = spread(jax.sharding.AxisType.Explicit)
        state = jax.device_put(STATE, jax.NamedSharding(sharding.mesh, jax.P()))

        def mean(state, **options):
            return loss.LossVector(normalised, X, model_state=state, **options).mean(PARAMS)

        told(
            lambda: wrap(lambda state: mean(state, sharding=sharding))(state),
            r"model_state\['mean'\] must not be traced while it is on a mesh with explicit axes",
        )
        jax.jit(wrap(mean))(state)  # as long as the examples are not spread
        made = loss.LossVector(normalised, X, model_state=state, sharding=sharding)
        close(jax.jit(lambda losses: losses.mean(PARAMS))(made), closed().mean(PARAMS))

    @pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint], ids=["jit", "checkpoint"])
    def test_training_mode_is_seen_inside_jit_and_checkpoint(self, wrap):
        losses = loss.LossVector(wrap(in_training_mode), X, model_state=STATE, microbatch_size=5)
        told(lambda: losses.mean(PARAMS), "must be in evaluation mode")

    def test_a_net_in_training_mode_is_refused(self):
        parts = net(training=True)
        losses = loss.LossVector(parts.loss_vector_fn, DATA, model_state=parts.model_state)
        told(lambda: losses.mean(parts.params), "must be in evaluation mode")

    @pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint], ids=["jit", "checkpoint"])
    def test_statistics_that_change_without_the_batch_are_allowed(self, wrap):
        losses = loss.LossVector(wrap(counted), X, model_state=STATE)
        close(losses(PARAMS), closed()(PARAMS))

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (
                lambda: loss.LossVector(normalised, X),
                r"\(params, batch\), as model_state=None and key=None say, got .*state\)",
            ),
            (
                lambda: loss.LossVector(lambda params, batch: batch, X, model_state=STATE),
                r"\(params, batch, state\), as model_state=... and key=None say",
            ),
            (
                lambda: loss.LossVector(normalised, X, model_state={"mean": "x"}),
                r"model_state\['mean'\] must be an array, got 'x'",
            ),
            (
                lambda: loss.LossVector(lambda p, b, s: b @ p, X, model_state=STATE)(PARAMS),
                r"must return \(losses, state\)",
            ),
            (
                lambda: loss.LossVector(lambda p, b, s: (b @ p, {}), X, model_state=STATE)(PARAMS),
                "must return model_state with the structure",
            ),
            (
                lambda: loss.LossVector(normalised, X, model_state=STATE).replace(normalised),
                "as model_state=None",
            ),
        ],
    )
    def test_functions_of_another_signature_are_refused(self, make, message):
        told(make, message)
