"""The convolutions of wide nets and their derivatives, compared with XLA's own in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models._conv_same import conv_same
from tests.experiments.models.convolutions import assert_equal_to_float64

# Shapes of images and kernel and the stride, for each way in which `conv_same` may compute.
SIZES_OF_CONV = {
    "a single image": ((1, 7, 6, 3), (3, 3, 3, 4), 1),
    "two by two": ((2, 2, 2, 3), (3, 3, 3, 4), 1),
    "one by three, a larger kernel": ((2, 1, 3, 3), (5, 5, 3, 4), 1),
    "four by four, wide": ((3, 4, 4, 128), (3, 3, 128, 128), 1),
    "two by eight, wide, a larger kernel": ((2, 2, 8, 128), (5, 5, 128, 128), 1),
    "a pixel": ((2, 7, 6, 3), (1, 1, 3, 4), 2),
    "strides": ((2, 7, 6, 3), (3, 3, 3, 4), 2),
    "few channels to many": ((2, 7, 6, 3), (3, 3, 3, 32), 1),
    "convolutions": ((2, 7, 6, 8), (3, 3, 8, 4), 1),
    "runs of images": ((6, 16, 16, 64), (3, 3, 64, 64), 1),
}


@pytest.mark.parametrize("name", SIZES_OF_CONV)
def test_conv_same_and_its_derivatives_equal_those_in_float64(name):
    assert_equal_to_float64(conv_same, *SIZES_OF_CONV[name])


@pytest.mark.parametrize("name", ["two by two", "strides", "convolutions"])
def test_conv_same_under_vmap_over_kernels(name):
    images_shape, kernel_shape, stride = SIZES_OF_CONV[name]
    random = np.random.default_rng(1)
    images = jnp.asarray(random.normal(size=(2, *images_shape)), jnp.float32)
    kernels = jnp.asarray(random.normal(size=(2, *kernel_shape)), jnp.float32)
    mapped = jax.vmap(functools.partial(conv_same, stride=stride))(images, kernels)
    for found, image, kernel in zip(mapped, images, kernels, strict=True):
        expected = conv_same(image, kernel, stride=stride)
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_in_a_loop_the_gradients_are_convolutions_that_the_cpu_is_fast_with():
    """All three convolutions have the layout with which XLA calls its fast routines.

    XLA changes layouts outside of loops alone, and training steps are loops of micro-batches.
    """
    images, kernel = jnp.ones((2, 4, 8, 8, 8)), jnp.ones((3, 3, 8, 8))

    def gradients(kernel, images):
        def of_run(total, run):
            loss_fn = lambda kernel, run: jnp.sum(conv_same(run, kernel) ** 2)  # noqa: E731
            of_kernel, of_images = jax.grad(loss_fn, (0, 1))(kernel, run)
            return total + of_kernel, of_images

        return jax.lax.scan(of_run, jnp.zeros_like(kernel), images)

    text = str(jax.jit(gradients).lower(kernel, images).compile().as_text())
    lines = [line for line in text.splitlines() if " convolution(" in line]
    layouts = [line.split("dim_labels=")[1].split(",")[0] for line in lines]
    assert len(layouts) == 3
    assert set(layouts) == {"b01f_01io->b01f"}


@pytest.mark.parametrize(
    ("kernel_shape", "stride", "message"),
    [
        ((2, 3, 2, 4), 1, r"odd height and width, got shape \(2, 3, 2, 4\)"),
        ((3, 3, 2, 4), 0, "stride must be at least 1, got 0"),
        ((3, 3, 1, 4), 1, "with C = 2"),
    ],
)
def test_wrong_convolutions_are_refused(kernel_shape, stride, message):
    with pytest.raises(ValueError, match=message):
        conv_same(jnp.zeros((1, 6, 6, 2)), jnp.zeros(kernel_shape), stride=stride)
