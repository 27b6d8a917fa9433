"""Code as users write it. A type checker that sees the wheel alone must agree with every line."""

from typing import Any, assert_type

import jax
import jax.numpy as jnp
import optax
from jax import Array

from msgd_jax import complexity, covariance, loss, noise, sde, sharding, train, transform

law = noise.sgd(1000, batch_size=50)
assert_type(law, noise.MNoise)
assert_type(noise.student_t(1000, 50, degrees_of_freedom=3), noise.MNoise)
assert_type(law.covariance.alpha, float)

key = jax.random.key(0)
weights = law.sample(key, 0)
assert_type(weights, noise.Weights)
assert_type(weights.values, Array)
assert_type(weights.indices, Array | None)
assert_type(noise.permute(key, jnp.arange(3), 10), Array)


def loss_of_one(params: Any, example: Any) -> Array:
    return (params - example) ** 2


loss_vector_fn = loss.per_example(loss_of_one)
value, gradient = loss.weighted_value_and_grad(loss_vector_fn)(jnp.zeros(()), jnp.ones(9), weights)

optimizer = optax.chain(
    transform.multiplicative_noise(law, key, microbatch_size=10), optax.adam(1e-3)
)
assert_type(transform.msgd(0.1, law, key), optax.GradientTransformationExtraArgs)
transform.msgd(optax.schedules.cosine_decay_schedule(0.1, 100), law, key, momentum=0.9)

state = train.init(jnp.zeros(()), optax.sgd(0.1), key)
assert_type(state, train.TrainState)
step = train.make_step(loss_vector_fn, optax.sgd(0.1), law)
state, metrics = step(state, jnp.ones(1000))
assert_type(metrics, train.StepMetrics)
assert_type(metrics.loss, Array)
state, history = train.make_loop(step, max_steps=10)(state, jnp.ones(1000), 10)

losses = loss.LossVector(loss_vector_fn, jnp.ones(1000), microbatch_size=100)
assert_type(losses, loss.LossVector)
assert_type(losses(jnp.zeros(())), Array)
assert_type(losses.num_examples, int)
assert_type(covariance.fisher(losses, jnp.zeros(())), Array)
assert_type(covariance.spectrum(losses, jnp.zeros(()), law), covariance.Spectrum)

path = sde.euler_maruyama(
    losses, jnp.zeros(()), law, learning_rate=0.1, num_steps=3, key=key, scheme=sde.Scheme(4)
)
assert_type(path, sde.Path)

local = complexity.local_complexity(
    losses, jnp.zeros(()), law, radius=0.1, key=key, num_draws=3, ascent=complexity.Ascent(1)
)
assert_type(local, complexity.LocalComplexity)
sharding.check_key_agrees("key", key)
