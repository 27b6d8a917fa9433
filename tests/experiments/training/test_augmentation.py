"""Crops and flips are those of numpy, and uniform."""

import jax
import numpy as np

from experiments import data
from experiments.training import _augmentation
from tests.support.statistics import assert_agree

EXAMPLES = data.Examples(
    image=np.random.default_rng(0).integers(0, 256, (40, 9, 7, 3), dtype=np.uint8),
    label=np.arange(40, dtype=np.int32),
)
KEY = jax.random.key(5)


def test_crops_and_flips_are_numpys():
    """The images are those of `np.pad` and of slices at the drawn shifts."""
    batch = _augmentation.draw(KEY, 3, EXAMPLES)
    images = np.asarray(jax.jit(_augmentation.apply)(batch))
    assert images.dtype == np.uint8
    for i, (image, shift, flip) in enumerate(
        zip(EXAMPLES.image, np.asarray(batch.shift), np.asarray(batch.flip), strict=True)
    ):
        padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
        crop = padded[shift[0] : shift[0] + 9, shift[1] : shift[1] + 7]
        np.testing.assert_array_equal(images[i], crop[:, ::-1] if flip else crop)
    np.testing.assert_array_equal(batch.label, EXAMPLES.label)


def test_draws_are_uniform_and_independent_of_the_axis():
    """Each of the 9 shifts has the probability 1/9 along both axes, and a flip has 1/2.

    The 20 comparisons are 9 shifts for each of two axes, their correlation, and the flips.
    """
    many = data.Examples(np.zeros((5_000, 1, 1, 1), np.uint8), np.zeros(5_000, np.int32))
    batch = _augmentation.draw(KEY, 0, many)
    shifts = np.asarray(batch.shift)
    for axis in range(2):
        counts = np.bincount(shifts[:, axis], minlength=9)
        assert counts.size == 9
        assert_agree(counts, 5_000 / 9, np.sqrt(5_000 * 8 / 81), comparisons=20)
    assert_agree(np.corrcoef(shifts.T)[0, 1], 0, 1 / np.sqrt(5_000), comparisons=20)
    flipped = np.asarray(batch.flip).mean()
    assert_agree(flipped, 0.5, 0.5 / np.sqrt(5_000), comparisons=20)


def test_a_step_draws_the_same_again_and_another_step_something_else():
    first, again, other = (_augmentation.draw(KEY, step, EXAMPLES) for step in (1, 1, 2))
    np.testing.assert_array_equal(first.shift, again.shift)
    np.testing.assert_array_equal(first.flip, again.flip)
    assert (np.asarray(first.shift) != np.asarray(other.shift)).any()
