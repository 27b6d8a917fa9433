"""References for convolutions and their derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def assert_equal_to_float64(conv, images_shape, kernel_shape, stride):
    """Asserts that values and derivatives in float32 are those of XLA's convolution in float64.

    Args:
        conv: a function of images, a kernel and ``stride=``.
        images_shape: [B, H, W, C].
        kernel_shape: [h, w, C, O], with odd h and w.
        stride: the same stride along height and width.
    """
    padding = [(size // 2, size // 2) for size in kernel_shape[:2]]
    strides, layout = (stride, stride), ("NHWC", "HWIO", "NHWC")

    def xlas(images, kernel):
        return jax.lax.conv_general_dilated(
            images, kernel, strides, padding, dimension_numbers=layout
        )

    ours = functools.partial(conv, stride=stride)
    assert_derivatives_equal_those_in_float64(ours, xlas, images_shape, kernel_shape)


def assert_derivatives_equal_those_in_float64(function, reference, *shapes):
    """Asserts that values and derivatives at random arrays of these shapes agree.

    The second is the kernel. Outputs have about the size 1, as in a net: at larger ones, the second
    derivatives of tanh are so small that rounding the outputs changes them by more than sums round.
    The longest sums have 3,200 products and round by about ``sqrt(3200) 2^-24 = 3e-6`` of their
    size, less where they are summed in parts; 5e-6 is three times the largest difference found.
    """
    random = np.random.default_rng(0)
    arrays = [random.normal(size=shape) for shape in shapes]
    arrays[1] /= np.sqrt(np.prod(shapes[1][:3]))

    def derivatives(f, arrays, cotangent):
        """Values, tangents in forward mode, gradients, and products with the Hessian."""

        def gradients(*arrays):
            every = range(len(arrays))
            return jax.grad(lambda *args: (jnp.tanh(f(*args)) * cotangent).sum(), every)(*arrays)

        tangents = tuple(jnp.cos(x) if i else x**2 for i, x in enumerate(arrays))
        return (
            jax.jvp(f, arrays, tangents),
            jax.vjp(f, *arrays)[1](cotangent),
            jax.jvp(gradients, arrays, tangents)[1],
        )

    def single(x):
        return jnp.asarray(x, jnp.float32)

    cotangent = random.normal(size=jax.eval_shape(reference, *map(single, arrays)).shape)
    ours = jax.jit(functools.partial(derivatives, function))
    found = ours(tuple(map(single, arrays)), single(cotangent))
    with jax.enable_x64(True):
        in_float64 = tuple(map(jnp.asarray, arrays))
        wanted = jax.jit(functools.partial(derivatives, reference))
        expected = wanted(in_float64, jnp.asarray(cotangent))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=5e-6 * np.abs(b).max())
