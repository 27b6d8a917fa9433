"""The reference for convolutions and their derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def assert_equal_to_float64(conv, images_shape, kernel_shape, stride):
    """Asserts that values and derivatives in float32 are those of XLA's convolution in float64.

    The longest sums have 3,200 products and round by about ``sqrt(3200) 2^-24 = 3e-6`` of their
    size, and derivatives of derivatives have some sums in a row: 2e-5 is six times that.

    Args:
        conv: a function of images, a kernel and ``stride=``.
        images_shape: [B, H, W, C].
        kernel_shape: [h, w, C, O], with odd h and w.
        stride: the same stride along height and width.
    """
    random = np.random.default_rng(0)
    images, kernel = random.normal(size=images_shape), random.normal(size=kernel_shape)
    padding = [(size // 2, size // 2) for size in kernel_shape[:2]]
    strides, layout = (stride, stride), ("NHWC", "HWIO", "NHWC")

    def xlas(images, kernel):
        return jax.lax.conv_general_dilated(
            images, kernel, strides, padding, dimension_numbers=layout
        )

    def derivatives(f, images, kernel, cotangent):
        """Values, forward-mode derivatives, gradients, and products with the Hessian."""

        def gradients(images, kernel):
            return jax.grad(lambda *args: (jnp.tanh(f(*args)) * cotangent).sum(), (0, 1))(
                images, kernel
            )

        tangents = images**2, jnp.cos(kernel)
        return (
            jax.jvp(f, (images, kernel), tangents),
            jax.vjp(f, images, kernel)[1](cotangent),
            jax.jvp(gradients, (images, kernel), tangents)[1],
        )

    def single(x):
        return jnp.asarray(x, jnp.float32)

    cotangent = random.normal(size=jax.eval_shape(xlas, single(images), single(kernel)).shape)
    ours = jax.jit(functools.partial(derivatives, functools.partial(conv, stride=stride)))
    found = ours(single(images), single(kernel), single(cotangent))
    with jax.enable_x64(True):
        expected = derivatives(xlas, *map(jnp.asarray, (images, kernel, cotangent)))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())
