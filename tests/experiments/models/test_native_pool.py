"""The compiled convolutions with pooling: values and derivatives, and where they are used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from experiments.models import _native as native
from experiments.models import _native_pool, conv
from tests.experiments.models.convolutions import assert_derivatives_equal_those_in_float64

pytestmark = pytest.mark.skipif(
    not native.is_compiled(), reason="no C++ compiler: `python -m experiments.models` says more"
)

# Shapes of images and kernel: examples that fill vectors and some that do not, sizes of tiles and
# others, images whose last row or column is in no window.
SIZES = {
    "LeNet's second layer": ((10, 12, 12, 35), (5, 5, 10, 10)),
    "fewer examples than lanes": ((1, 8, 8, 3), (3, 3, 1, 16)),
    "odd images": ((3, 9, 7, 18), (2, 3, 3, 4)),
    "odd convolutions": ((2, 7, 10, 16), (3, 2, 2, 7)),
    "wide kernels, one window": ((2, 3, 8, 5), (2, 7, 2, 3)),
    "kernels of a pixel": ((13, 5, 6, 17), (1, 1, 13, 23)),
    "more blocks of examples than parts of the sum": ((1, 4, 4, 290), (3, 2, 1, 2)),
}


def by_xla(images, kernel, bias):
    layout = ("CHWN", "HWIO", "CHWN")
    outputs = jax.lax.conv_general_dilated(
        images, kernel, (1, 1), "VALID", dimension_numbers=layout
    )
    height, width = (2 * (side // 2) for side in outputs.shape[1:3])
    outputs = outputs[:, :height, :width]
    corners = [outputs[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
    return jax.nn.relu(jnp.stack(corners).max(0) + bias[:, None, None, None])


@pytest.mark.parametrize("name", SIZES)
def test_values_and_derivatives_equal_those_in_float64(name):
    images, kernel = SIZES[name]
    ours = _native_pool.conv_pool_relu
    assert_derivatives_equal_those_in_float64(ours, by_xla, images, kernel, kernel[3:])


@pytest.mark.parametrize("mapped", [(0, None, None), (3, 0, 1), (None, 2, None), (None, None, 0)])
def test_mapped_over_images_kernels_biases_or_all(mapped):
    shapes = (2, 6, 7, 5), (3, 3, 2, 4), (4,)
    count = 3
    keys = jax.random.split(jax.random.key(0), 3)
    stacked = [
        jax.random.normal(key, shape if axis is None else (count, *shape))
        for key, shape, axis in zip(keys, shapes, mapped, strict=True)
    ]
    arguments = [
        x if axis is None else jnp.moveaxis(x, 0, axis)
        for x, axis in zip(stacked, mapped, strict=True)
    ]

    def products(*arrays):
        """Outputs, and a product with the Hessian, which uses every operation."""
        f = _native_pool.conv_pool_relu
        gradients = jax.grad(lambda *args: jnp.sum(f(*args) ** 3), (0, 1, 2))
        return f(*arrays), jax.jvp(gradients, arrays, arrays)[1]

    found = jax.jit(jax.vmap(products, mapped))(*arguments)
    for i in range(count):
        one = [x if axis is None else x[i] for x, axis in zip(stacked, mapped, strict=True)]
        close = lambda x, y: np.testing.assert_allclose(x[i], y, rtol=2e-5, atol=1e-4)  # noqa: B023, E731
        jax.tree.map(close, found, products(*one))


def test_first_of_equal_maxima_gets_the_gradient_and_none_gets_that_of_relu():
    image = jnp.array([[3, 3, 1, 2], [3, 3, 2, 2], [0, 5, -7, -8], [5, 1, -8, -7]], jnp.float32)
    expected = np.array([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]])

    def total(image):
        images = jnp.tile(image[None, :, :, None], (1, 1, 1, 20))
        return _native_pool.conv_pool_relu(images, jnp.ones((1, 1, 1, 1)), jnp.zeros(1))[
            ..., 17
        ].sum()

    np.testing.assert_array_equal(jax.grad(total)(image), expected)


@pytest.mark.parametrize("place", [(0, 0), (1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_what_is_not_finite_is_seen(place, value):
    images = jnp.ones((1, 2, 2, 3)).at[0, *place, 1].set(value)
    outputs = _native_pool.conv_pool_relu(images, jnp.ones((1, 1, 1, 1)), jnp.zeros(1)).ravel()
    expected = 1 if value == -jnp.inf else value
    np.testing.assert_array_equal(outputs, jnp.array([1, expected, 1]))


def uses_the_library(*arrays, function=conv.conv_pool_relu):
    return "msgd_Pool" in str(jax.jit(function).lower(*arrays).compile().as_text())


def test_several_devices_use_it_on_what_each_of_them_holds():
    images, kernel, bias = jnp.ones((3, 6, 6, 16)), jnp.ones((3, 3, 3, 8)), jnp.ones(8)
    assert jax.device_count() == 8
    assert not uses_the_library(images, kernel, bias)
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec(None, None, None, "batch")
    local = jax.shard_map(
        conv.conv_pool_relu,
        mesh=mesh,
        in_specs=(spec, PartitionSpec(), PartitionSpec()),
        out_specs=spec,
        check_vma=False,
    )
    assert uses_the_library(images, kernel, bias, function=local)
    expected = conv.conv_pool_relu(images, kernel, bias)
    np.testing.assert_allclose(jax.jit(local)(images, kernel, bias), expected, 1e-6)
