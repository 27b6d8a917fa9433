"""Mistakes with the transformations, and what updates outside of `jax.jit` compile and keep."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from msgd_jax import loss, noise, transform
from tests.library.test_transform_uses import MASK
from tests.support.mistakes import assert_told
from tests.support.problems import loss_vector_fn
from tests.support.programs import compilations
from tests.support.transforms import (
    NOISE,
    PROBLEM,
    assert_trees_close,
    fast_update,
    fresh_key,
    per_example_gradients,
)

# Eager updates ------------------------------------------------------------------------------------


def spread() -> NamedSharding:
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    return NamedSharding(mesh, PartitionSpec("data"))


@pytest.mark.parametrize("options", [{"microbatch_size": 7}, {"sharding": spread()}])
@pytest.mark.parametrize("make", [transform.multiplicative_noise, transform.with_noise])
def test_a_second_eager_update_compiles_nothing(make, options):
    arguments = (NOISE, fresh_key())
    if make is transform.with_noise:
        arguments = (optax.sgd(0.1), *arguments)
    tx = make(*arguments, **options)
    _, state = fast_update(tx, tx.init(PROBLEM.params), PROBLEM.params)
    _, state = fast_update(tx, state, PROBLEM.params)  # the state is now one that a program made
    with compilations() as seen:
        fast_update(tx, state, PROBLEM.params)
    assert len(seen) == 0
    other = loss.per_example(lambda params, example: params["b"] * example["y"])
    told = {"loss_vector_fn": other, "data": PROBLEM.data}
    with compilations() as seen:
        tx.update((), state, PROBLEM.params, **told)
    assert len(seen) > 0


def test_functions_that_hold_traced_arrays_are_not_kept(monkeypatch):
    """Eager calls come before and after one whose loss holds a traced array."""
    made = []
    original = loss.evaluated

    def counting(function, *args, **options):
        made.append(function)
        return original(function, *args, **options)

    monkeypatch.setattr(loss, "evaluated", counting)
    tx = transform.multiplicative_noise(NOISE, fresh_key())
    state = tx.init(PROBLEM.params)

    def scaled(scale):
        def losses(params, batch):
            return scale * loss_vector_fn(params, batch)

        return losses

    for _ in range(3):
        eager, _ = fast_update(tx, state, PROBLEM.params)
    assert made == [loss_vector_fn]

    @jax.jit
    def update(params, scale):
        return tx.update((), state, params, loss_vector_fn=scaled(scale), data=PROBLEM.data)[0]

    doubled = update(PROBLEM.params, 2.0)
    assert_trees_close(doubled, jax.tree.map(lambda leaf: 2 * leaf, eager))
    fast_update(tx, state, PROBLEM.params)
    assert len(made) == 2
    masked = optax.masked(tx, MASK)
    told = {"loss_vector_fn": loss_vector_fn, "data": PROBLEM.data, "full_params": PROBLEM.params}
    for _ in range(2):
        masked.update(PROBLEM.params, masked.init(PROBLEM.params), PROBLEM.params, **told)
    fast_update(tx, state, PROBLEM.params)
    assert len(made) == 4


# Bad input ----------------------------------------------------------------------------------------


def update(optimizer, updates=(), params=PROBLEM.params, **options):
    told = {"loss_vector_fn": loss_vector_fn, "data": PROBLEM.data} | options
    return optimizer.update(updates, optimizer.init(params), params, **told)


def noisy(law=NOISE, key=None, **options):
    return transform.multiplicative_noise(law, fresh_key() if key is None else key, **options)


ZEROS = optax.tree.zeros_like(PROBLEM.params)
ADVERSARY = optax.chain(optax.contrib.normalize(), optax.sgd(0.1))


def always(step):
    return step >= 0


# The name of the argument, a call, and what the message says is wrong with it, or what to do.
MISTAKES = [
    ("law", lambda: noisy(law="sgd"), "of type str"),
    ("key", lambda: noisy(key=jax.random.split(fresh_key())), "a single key"),
    ("microbatch_size", lambda: noisy(microbatch_size="x" * 1000), "must be an integer"),
    ("microbatch_size", lambda: noisy(microbatch_size=np.int8(-3)), "at least 1, got -3"),
    ("sharding", lambda: noisy(sharding=["data"] * 300), "NamedSharding"),
    ("learning_rate", lambda: transform.msgd("0.1", NOISE, fresh_key()), "'0.1' of type str"),
    ("momentum", lambda: transform.msgd(0.1, NOISE, fresh_key(), "0.9"), "'0.9' of type str"),
    (
        "accumulator_dtype",
        lambda: transform.msgd(0.1, NOISE, fresh_key(), 0.9, accumulator_dtype="foo"),
        "got 'foo' of type str",
    ),
    (
        "accumulator_dtype",
        lambda: transform.msgd(0.1, NOISE, fresh_key(), 0.9, accumulator_dtype=int),
        "got int",
    ),
    ("dtype", lambda: noise.fisher(5, 2, dtype="foo"), "float32 or float64, got 'foo'"),
    ("dtype", lambda: noise.fisher(5, 2, dtype=None), "float32 or float64, got None"),
    ("optimizer", lambda: transform.with_noise(optax.adam, NOISE, fresh_key()), "as optax.sgd"),
    ("params['f']", lambda: noisy().init({"f": jnp.tanh}), "equinox.partition"),
    ("params['s']", lambda: noisy().init({"s": "float32"}), "of type str"),
    ("loss_vector_fn", lambda: update(noisy(), loss_vector_fn="losses"), "must be a function"),
    ("data", lambda: update(noisy(), data=None), "update(..., data=...)"),
    ("with_noise", lambda: update(optax.MultiSteps(noisy(), 2), ZEROS), "microbatch_size"),
    ("with_noise", lambda: update(optax.apply_if_finite(noisy(), 2), ZEROS), "apply_if_finite"),
    (
        "with_noise",
        lambda: update(optax.conditionally_transform(noisy(), always), ZEROS),
        "conditionally_transform",
    ),
    ("with_noise", lambda: update(optax.chain(noisy(), noisy())), "put it first in the chain"),
    (
        "with_noise",
        lambda: update(
            optax.chain(optax.lookahead(noisy(), 2, 0.5)),
            params=optax.LookaheadParams.init_synced(PROBLEM.params),
        ),
        "lookahead",
    ),
    (
        "transform.with_noise",
        lambda: update(transform.with_noise(noisy(), NOISE, fresh_key())),
        "the optimizer alone",
    ),
    (
        "updates",
        lambda: transform.aggregate_per_example(NOISE, fresh_key()).update(
            (), None, PROBLEM.params
        ),
        "got 0 leaves instead of 2",
    ),
    (
        "updates['w']",
        lambda: transform.aggregate_per_example(noise.fisher(4, 1), fresh_key()).update(
            {"w": jnp.arange(4)}, None, {"w": jnp.ones(())}
        ),
        "floating-point gradients, got int32",
    ),
    (
        "updates",
        lambda: transform.aggregate_per_example(NOISE, fresh_key()).update(
            {"x" * 500: jnp.ones(3)}, None, {"x" * 500: jnp.ones(3)}
        ),
        "averaged already",
    ),
]


@pytest.mark.usefixtures("user_errors")
class TestBadInput:
    def setup_method(self):
        self.tx = transform.multiplicative_noise(NOISE, fresh_key())
        self.state = self.tx.init(PROBLEM.params)
        self.kwargs = {"loss_vector_fn": loss_vector_fn, "data": PROBLEM.data}

    @pytest.mark.parametrize("missing", ["loss_vector_fn", "data", "params"])
    def test_missing_arguments_are_named(self, missing):
        kwargs = {**self.kwargs, "params": PROBLEM.params}
        del kwargs[missing]
        with pytest.raises(ValueError, match=f"multiplicative_noise needs {missing}"):
            self.tx.update((), self.state, **kwargs)

    def test_a_gradient_in_place_of_an_empty_tree_is_refused(self):
        with pytest.raises(ValueError, match=r"pass \(\) and put it first in the chain"):
            self.tx.update(PROBLEM.params, self.state, PROBLEM.params, **self.kwargs)

    def test_multi_steps_around_the_noise_is_refused(self):
        for tx in (self.tx, transform.msgd(0.1, NOISE, fresh_key())):
            around = optax.MultiSteps(tx, 2)
            state = around.init(PROBLEM.params)
            zeros = optax.tree.zeros_like(PROBLEM.params)
            with pytest.raises(ValueError, match=r"MultiSteps .* cannot go around it"):
                around.update(zeros, state, PROBLEM.params, **self.kwargs)

    def test_multi_steps_around_the_aggregator_is_refused(self):
        around = optax.MultiSteps(transform.aggregate_per_example(NOISE, fresh_key()), 2)
        state = around.init(PROBLEM.params)
        gradients = per_example_gradients(PROBLEM.params)
        with pytest.raises(ValueError, match=r"MultiSteps around the aggregator"):
            around.update(gradients, state, PROBLEM.params)

    def test_masked_needs_full_params(self):
        tx = optax.masked(self.tx, MASK)
        state = tx.init(PROBLEM.params)
        with pytest.raises(ValueError, match="full_params=params"):
            tx.update(PROBLEM.params, state, PROBLEM.params, **self.kwargs)

    def test_integer_params_are_refused(self):
        params = {"w": jnp.ones(5), "b": jnp.ones((), jnp.int32)}
        with pytest.raises(TypeError, match=r"params\['b'\].*int32"):
            self.tx.update((), self.state, params, **self.kwargs)

    def test_the_law_must_be_for_the_number_of_examples(self):
        tx = transform.multiplicative_noise(noise.sgd(101, 10), fresh_key())
        with pytest.raises(ValueError, match=r"num_examples = 101.*100 examples"):
            tx.update((), self.state, PROBLEM.params, **self.kwargs)

    @pytest.mark.parametrize(
        "make", [transform.multiplicative_noise, transform.aggregate_per_example]
    )
    def test_wrong_laws_and_keys_are_refused(self, make):
        with pytest.raises(TypeError, match=r"law must be a noise\.MNoise or .* str"):
            make("fisher", fresh_key())
        with pytest.raises(TypeError, match=r"key must be a typed PRNG key.*got None"):
            make(NOISE, None)
        with pytest.raises(TypeError, match="key must be a typed PRNG key"):
            make(NOISE, jax.random.PRNGKey(0))

    def test_averaged_gradients_are_refused(self):
        """They are refused even where the leading axes of two leaves happen to agree."""
        tx = transform.aggregate_per_example(noise.fisher(4, 1), fresh_key())
        params = {"w": jnp.ones((4, 3)), "b": jnp.ones(4)}
        with pytest.raises(ValueError, match=r"updates\['b'\], got \(4,\).*averaged already"):
            tx.update(params, tx.init(params), params)

    def test_the_aggregator_needs_params(self):
        tx = transform.aggregate_per_example(NOISE, fresh_key())
        gradients = per_example_gradients(PROBLEM.params)
        with pytest.raises(ValueError, match="aggregate_per_example needs params"):
            tx.update(gradients, tx.init(PROBLEM.params))

    @pytest.mark.parametrize(("name", "call", "wrong"), MISTAKES, ids=[m[2] for m in MISTAKES])
    def test_messages_name_the_argument_and_are_short(self, name, call, wrong):
        assert_told(call, name, wrong, hides_frames=True)

    @pytest.mark.parametrize("value", [-0.1, float("nan")])
    def test_hyperparameters_out_of_range(self, value):
        with pytest.raises(ValueError, match="learning_rate must be finite and at least 0"):
            transform.msgd(value, NOISE, fresh_key())
        with pytest.raises(ValueError, match="momentum must be finite and at least 0"):
            transform.msgd(0.1, NOISE, fresh_key(), momentum=value)
        with pytest.raises(ValueError, match="microbatch_size must be at least 1, got 0"):
            transform.msgd(0.1, NOISE, fresh_key(), microbatch_size=0)
