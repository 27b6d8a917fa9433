"""Random crops and horizontal flips inside the compiled step, as functions of (key, step).

`draw` makes two small integers and a bit per training example. They are part of the examples, so
they are gathered and divided into micro-batches with the images, and `apply` shifts and flips only
the images that a step computes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key, UInt8

from msgd_jax._streams import Stream, derive

PADDING = 4

Images = UInt8[Array, "batch height width channels"]


class Augmented(NamedTuple):
    """Examples with their shifts and flips in one step.

    Attributes:
        image: as in `data.Examples`.
        label: as in `data.Examples`.
        shift: the first row and column of the crop in the padded image, from 0 to twice `PADDING`.
        flip: whether left and right are exchanged.
    """

    image: Images
    label: Int[Array, " batch"]
    shift: Int[Array, "batch 2"]
    flip: Bool[Array, " batch"]


def draw(key: Key[Array, ""], step: Int[Array, ""], examples: Any) -> Augmented:
    """Draws shifts and flips for every example.

    Args:
        key: the key of the run.
        step: the number of the iteration.
        examples: `data.Examples`, [N, ...].
    """
    shift_key, flip_key = (derive(key, Stream.AUGMENTATION, step, i) for i in range(2))
    n = examples.label.shape[0]
    # The dtypes are given, so that the draws are the same with and without 64-bit types.
    shift = jax.random.randint(shift_key, (n, 2), 0, 2 * PADDING + 1, jnp.int32)
    flip = jax.random.bernoulli(flip_key, jnp.float32(0.5), (n,))
    return Augmented(examples.image, examples.label, shift, flip)


def apply(batch: Augmented) -> Images:
    """The images, cropped from their zero-padded versions, and flipped."""

    def one(image: Array, shift: Array, flip: Array) -> Array:
        height, width, _ = image.shape
        padded = jnp.pad(image, ((PADDING, PADDING), (PADDING, PADDING), (0, 0)))
        crop = jax.lax.dynamic_slice(padded, (*shift, 0), (height, width, image.shape[2]))
        return jnp.where(flip, crop[:, ::-1], crop)

    return jax.vmap(one)(batch.image, batch.shift, batch.flip)
