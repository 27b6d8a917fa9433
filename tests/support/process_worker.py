"""One process of two. Its arguments are TASK, COORDINATOR, PROCESS_ID and FOLDER."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

LAWS = ("fisher", "cov", "bernoulli", "sgd", "sparse_cov", "random_reshuffling")


def weights(process_id: int, folder: pathlib.Path) -> None:
    """Writes the weights and the gradients of step 3, as this process has them."""
    from msgd_jax import loss, noise, sharding
    from tests.support.noises import ROWS
    from tests.support.problems import loss_vector_fn, regression

    n, key, problem = 1003, jax.random.key(314), regression(1003)
    rows = NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec("data"))
    numbers, placed = sharding.shard_examples((np.arange(n), problem.data), rows)
    assert [shard.data.shape for shard in numbers.addressable_shards] == [(126,)] * 4
    results = {}
    for name in LAWS:
        law = ROWS[name].make(n, 16)
        f = loss.noisy_value_and_grad(lambda theta, i: theta[i], law, sharding=rows)
        results[f"{name} weights"] = jax.jit(f)(np.ones(n, np.float32), numbers, key, 3)[1]
    # The weights of a batch of which the loader of each process drew 8 examples.
    own = sharding.shard_batch(np.arange(8) + 8 * process_id, rows)
    f = loss.noisy_value_and_grad(lambda theta, i: theta[i], noise.batch_cov(n, 4), sharding=rows)
    results["loaded"] = jax.jit(f)(np.ones(16, np.float32), own, key, 3)[1]
    f = loss.noisy_value_and_grad(
        loss_vector_fn, ROWS["cov"].make(n, 16), sharding=rows, microbatch_size=50
    )
    params = jax.tree.map(np.asarray, problem.params)
    results["value"], grads = jax.jit(f)(params, placed, key, 3)
    results |= {f"grad {leaf}": grad for leaf, grad in grads.items()}
    np.savez(folder / f"{process_id}.npz", **{k: np.asarray(v) for k, v in results.items()})


def streaming(process_id: int, folder: pathlib.Path) -> None:
    """Takes three steps on examples read as needed, and writes which ones this process read."""
    from msgd_jax import noise, streaming, train
    from tests.support.problems import loss_vector_fn, regression

    problem, read = regression(1003), []

    class Recorder(streaming.ArraySource):
        """A source that notes which examples are asked for."""

        def read_batch(self, indices):
            read.append(np.array(indices))
            return super().read_batch(indices)

    rows = NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec("data"))
    source = Recorder(jax.tree.map(np.asarray, problem.data))
    optimizer, law = optax.sgd(0.5), noise.sgd(1003, 16)
    loop = streaming.make_loop(loss_vector_fn, optimizer, law, source, sharding=rows)
    params = jax.tree.map(np.asarray, problem.params)
    start = train.init(params, optimizer, jax.random.key(314))
    state, metrics = loop(start, 3, num_threads=1, prefetch=1)
    np.savez(
        folder / f"{process_id}.npz",
        read=np.stack(read),
        loss=np.asarray(metrics.loss),
        **{k: np.asarray(v) for k, v in state.params.items()},
    )


def keys(process_id: int, folder: pathlib.Path) -> None:
    """Writes the errors that refuse a key which is not the same in both processes."""
    from msgd_jax import complexity, noise, train, transform

    key, params = jax.random.key(process_id), jnp.ones(3)
    law, signs = noise.gd(8), complexity.rademacher(8)
    train.init(params, optax.sgd(0.1), jax.random.key(0))  # A key that both have is not refused.
    for start in (
        lambda: train.init(params, optax.sgd(0.1), key),
        lambda: transform.multiplicative_noise(law, key).init(params),
        lambda: transform.aggregate_per_example(law, key).init(params),
        lambda: complexity.add_local_complexity(signs, key, radius=0.1).init(params),
    ):
        try:
            start()
        except ValueError as error:
            with open(folder / f"{process_id}.txt", "a") as file:
                file.write(f"{error}\n")


if __name__ == "__main__":
    task, coordinator, process_id, folder = sys.argv[1:]
    jax.distributed.initialize(coordinator, 2, int(process_id), heartbeat_timeout_seconds=20)
    tasks = {"weights": weights, "streaming": streaming, "keys": keys}
    tasks[task](int(process_id), pathlib.Path(folder))
