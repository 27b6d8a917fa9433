"""Trains a small transformer on text, as a user's job does, and can kill itself in the middle.

The command is ``python -m tests.support.text_job FOLDER STEPS KILLED_AT``.
"""

import os
import pathlib
import pydoc_data.topics
import signal
import sys
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from msgd_jax import flax_nnx, noise, train

LENGTH, WIDTH, BATCH = 16, 16, 16
TEXT = pydoc_data.topics.topics["assignment"].encode("ascii", "replace")
SEQUENCES = np.frombuffer(TEXT, np.uint8).astype(np.int32)
SEQUENCES = SEQUENCES[: len(SEQUENCES) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1)


class Decoder(nnx.Module):
    """A transformer of one block, computed in bfloat16, with dropout."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        kind: dict[str, Any] = {"dtype": jnp.bfloat16, "rngs": rngs}
        self.letters = nnx.Embed(128, WIDTH, **kind)
        self.places = nnx.Embed(LENGTH, WIDTH, **kind)
        self.first, self.second = nnx.LayerNorm(WIDTH, **kind), nnx.LayerNorm(WIDTH, **kind)
        self.attention = nnx.MultiHeadAttention(2, WIDTH, dropout_rate=0.1, decode=False, **kind)
        self.up, self.down = nnx.Linear(WIDTH, 32, **kind), nnx.Linear(32, WIDTH, **kind)
        self.drop = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, letters: jax.Array) -> jax.Array:
        x = self.letters(letters) + self.places(jnp.arange(LENGTH))
        causal = nnx.make_causal_mask(letters)
        x = x + self.drop(self.attention(self.first(x), mask=causal))
        x = x + self.drop(self.down(nnx.gelu(self.up(self.second(x)))))
        return self.letters.attend(x).astype(jnp.float32)


def loss_fn(model: Decoder, sequence: jax.Array) -> jax.Array:
    """The mean cross-entropy of the next letter, over the letters of one sequence."""
    logits = model(sequence[:-1])
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, sequence[1:])
    return losses.mean()


def run(folder: pathlib.Path, num_steps: int, killed_at: int | None) -> tuple[Any, list[float]]:
    """Trains, and writes the state at every third step.

    Args:
        folder: where the state is; training continues from it if there is one.
        num_steps: the number of steps of the whole job, those before the file included.
        killed_at: the step after which the process kills itself, or None.

    Returns:
        The last state, and the loss of each step that this call took.
    """
    model = Decoder(nnx.Rngs(0))
    model.train()
    net = flax_nnx.trainable(model, loss_fn)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 5, 60)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
    law = noise.batch_cov(len(SEQUENCES), BATCH // 8)  # Batches of 16 with the noise of 2.
    step = jax.jit(train.make_step(net.loss_vector_fn, optimizer, law, **net.takes))
    batches = grain.MapDataset.source(SEQUENCES).shuffle(seed=0).repeat().batch(BATCH)
    state = train.init(net.params, optimizer, jax.random.key(1))
    if (file := folder / "state.npz").exists():
        arrays = [jnp.asarray(array) for array in np.load(file).values()]
        state = jax.tree.unflatten(jax.tree.structure(state), arrays)
        state = state._replace(key=jax.random.wrap_key_data(state.key))
    losses = []
    while state.step < num_steps:
        state, metrics = step(state, batches[int(state.step)])
        losses.append(float(metrics.loss))
        if state.step % 3 == 0:
            np.savez(file, *jax.tree.leaves(state._replace(key=jax.random.key_data(state.key))))
        if state.step == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
    return state, losses


if __name__ == "__main__":
    run(pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
