"""Mistakes that a type checker must find: an error per line that is marked, and no other error."""

import jax
import optax

from msgd_jax import loss, noise, sharding, train, transform

key = jax.random.key(0)
law = noise.sgd(1000, "50")  # error
law = noise.sgd(1000)  # error
law = noise.sgd(1000, 50, True)  # error
law = noise.student_t(1000, 50)  # error
law = noise.fisher(1000, 50)
law.sample(key)  # error
law.sample(key, 0.5)  # error
print(law.covarianse)  # error
law.covariance.alpha = 3.0  # error
transform.multiplicative_noise(law)  # error
transform.multiplicative_noise(key, law)  # error
transform.msgd("0.1", law, key)  # error
loss.per_example(3)  # error
loss.LossVector(lambda params, batch: batch)  # error
loss.LossVector(lambda params, batch: batch, {}, microbatch_size="10")  # error
loss.noisy_value_and_grad(lambda params, batch: batch, law, microbatch_size="10")  # error
train.make_step(lambda params, batch: batch, optax.sgd(0.1), "sgd")  # error
train.make_loop(lambda state, data: (state, data))  # error
sharding.shard_examples({}, "data")  # error
