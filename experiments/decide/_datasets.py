"""The images of a setting, and the examples that each seed draws from them."""

import hashlib
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key, UInt8

from experiments.data import npz
from experiments.decide.settings import Setting
from msgd_jax import noise
from msgd_jax._streams import Stream, derive

_IMAGE_SHAPES = {"digits_net": (8, 8, 1), "vgg11": (32, 32, 3)}
_MAX_VALUES = {"digits_net": 16.0, "vgg11": 255.0}
# The order of the digits is fixed, so that the pool and the test images are the same for all seeds.
_DIGITS_ORDER = 0
_NUM_CLASSES = 10
# The draws that a seed makes from its stream of cases.
_LABELS, _NOISE = range(2)


class Images(NamedTuple):
    """The pool that seeds draw their training images from, and the test images of all seeds.

    Attributes:
        pool_images: uint8, [pool, H, W, C].
        pool_labels: int32, [pool], classes from 0 to 9.
        test_images: uint8, [num_test, H, W, C].
        test_labels: int32, [num_test].
    """

    pool_images: UInt8[Array | np.ndarray, "pool height width channels"]
    pool_labels: Int[Array | np.ndarray, " pool"]
    test_images: UInt8[Array | np.ndarray, "tests height width channels"]
    test_labels: Int[Array | np.ndarray, " tests"]


def max_value(setting: Setting) -> float:
    """The number by which pixels are divided."""
    return _MAX_VALUES[setting.net]


def load(setting: Setting, path: pathlib.Path | None = None) -> Images:
    """Loads the images of a setting into the computer's memory.

    Args:
        setting: the setting, which determines the images and their number.
        path: a `.npz` file with ``x_train, y_train, x_test, y_test``, images as uint8 [N, H, W, C]
            and labels from 0 to 9 (Keras' convention); None for the digits.

    Raises:
        ValueError: if the file is missing, not needed, or does not hold such images.
    """
    if setting.data == "digits":
        if path is not None:
            raise ValueError(f"dataset must be left out for {setting.name}, got {path}.")
        parts = _digits(setting.pool)
        trained, tested = parts["train"], parts["test"]
    else:
        if path is None:
            raise ValueError(f"dataset must name a .npz file for {setting.name}.")
        parts = _npz(path)
        trained = parts[setting.train_part]
        tested = parts["test" if setting.train_part == "train" else "train"]
    wanted = _IMAGE_SHAPES[setting.net]
    for name, (images, labels) in parts.items():
        if images.shape[1:] != wanted:
            raise ValueError(
                f"dataset must hold images of shape {list(wanted)}, got x_{name} of shape "
                f"{list(images.shape[1:])}."
            )
        if labels.max() >= _NUM_CLASSES:
            raise ValueError(
                f"dataset must have labels from 0 to 9, got {labels.max()} in y_{name}."
            )
    if len(trained[0]) < setting.pool:
        raise ValueError(
            f"dataset must have at least {setting.pool:,} images to train on for {setting.name}, "
            f"got {len(trained[0]):,}."
        )
    return Images(
        trained[0][: setting.pool],
        trained[1][: setting.pool].astype(np.int32),
        tested[0][: setting.num_test],
        tested[1][: setting.num_test].astype(np.int32),
    )


def checksum(images: Images) -> str:
    """The checksum of the images and labels that are used, 16 hexadecimal digits."""
    total = hashlib.sha256()
    for part in images:
        total.update(np.ascontiguousarray(part).tobytes())
    return total.hexdigest()[:16]


def _digits(pool: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    import sklearn.datasets

    pixels, labels = sklearn.datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(_DIGITS_ORDER).permutation(len(labels))
    images = pixels.reshape(-1, 8, 8, 1).astype(np.uint8)[order]
    labels = labels[order]
    return {"train": (images[:pool], labels[:pool]), "test": (images[pool:], labels[pool:])}


def _npz(path: pathlib.Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    splits = npz.open_npz(path).splits
    return {part: (splits[part].images, splits[part].labels) for part in ("train", "test")}


class Sample(NamedTuple):
    """The training examples of a seed.

    Attributes:
        positions: the positions of its N images in the pool, int32, [N].
        labels: the labels that it is given, int32, [N].
    """

    positions: Int[Array, " N"]
    labels: Int[Array, " N"]


def draw(setting: Setting, key: Key[Array, ""], pool_labels: Any) -> Sample:
    """A seed's training subset and its labels with noise, which depend on the seed's key only."""
    subset_key, label_key = derive(key, Stream.EXAMPLES), derive(key, Stream.CASES, _LABELS)
    positions = noise.permute(subset_key, jnp.arange(setting.num_train), setting.pool)
    labels = pool_labels[positions]
    # Exactly this many labels are replaced by one of the other classes, all equally likely.
    flipped = round(setting.label_noise * setting.num_train)
    places_key, classes_key = jax.random.split(label_key)
    if flipped:
        places = noise.permute(places_key, jnp.arange(flipped), setting.num_train)
        shifts = jax.random.randint(classes_key, (flipped,), 1, _NUM_CLASSES, jnp.int32)
        labels = labels.at[places].set((labels[places] + shifts) % _NUM_CLASSES)
    return Sample(positions, labels)


def noise_key(key: Key[Array, ""], name: int | Int[Array, ""]) -> Key[Array, ""]:
    """The key from which a contestant's weights are drawn, by the number of its name."""
    return derive(key, Stream.CASES, _NOISE, name)
