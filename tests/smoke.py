"""A user's first minutes with the installed package.

`make package` runs this outside the checkout, in an environment with the core dependencies alone.
"""

import importlib.metadata
import pathlib

import jax
import jax.numpy as jnp
import optax

import msgd_jax
from msgd_jax import covariance, loss, noise, sde, train, transform


def main() -> None:
    """Trains for a few steps, and checks that the loss has fallen."""
    assert "site-packages" in pathlib.Path(msgd_jax.__file__).parts, msgd_jax.__file__
    installed = sorted(entry.name for entry in importlib.metadata.distributions())
    extras = {"flax", "lineax", "grain", "matplotlib", "scikit-learn", "tyro", "tqdm", "pytest"}
    assert not extras & set(installed), installed

    # Logistic regression, through optax. At the start each loss is ln 2 = 0.69.
    x = jax.random.normal(jax.random.key(0), (200, 5))
    data = {"x": x, "y": jnp.sign(x.sum(1))}
    losses = loss.per_example(lambda w, e: jax.nn.softplus(-e["y"] * (e["x"] @ w)))
    law, params = noise.cov(200, batch_size=20), jnp.zeros(5)
    optimizer = optax.chain(
        transform.multiplicative_noise(law, jax.random.key(1)), optax.adam(0.05)
    )
    state = optimizer.init(params)
    for _ in range(50):
        updates, state = optimizer.update((), state, params, loss_vector_fn=losses, data=data)
        params = optax.apply_updates(params, updates)
    trained = float(losses(params, data).mean())
    assert trained < 0.4, trained

    # One call of each of the other parts.
    loop = train.make_loop(train.make_step(losses, optax.sgd(0.1), law), max_steps=10)
    loop(train.init(params, optax.sgd(0.1), jax.random.key(2)), data, 10)
    vector = loss.LossVector(losses, data)
    covariance.spectrum(vector, params, law)
    options = {"learning_rate": 0.1, "num_steps": 2, "key": jax.random.key(3)}
    sde.euler_maruyama(vector, params, law, **options)
    print(f"msgd_jax {msgd_jax.__version__} works; with it came: {', '.join(installed)}")


if __name__ == "__main__":
    main()
