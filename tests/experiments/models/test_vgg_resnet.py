"""VGG-11 and ResNet-18 as a whole: every batch norm in training, names, shapes and types."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import models
from experiments.models import layers

STAGES = ((1, 1, 1), (2, 1, 1), (3, 1, 2), (4, 2, 1), (5, 2, 2), (6, 4, 1), (7, 4, 2), (8, 8, 1))
"""The number, the input channels as a multiple of the width, and the stride of each block."""

each_net = pytest.mark.parametrize("name", ["vgg11", "resnet18"])


def convolve(images, kernel, stride=1):
    """The convolution in NHWC, padded by half the kernel, as a sum over the kernel's places."""
    size, rows, columns = len(kernel), *images.shape[1:3]
    padded = np.pad(images, ((0, 0), *((size // 2, size // 2),) * 2, (0, 0)))
    return sum(
        padded[:, i : i + rows : stride, j : j + columns : stride] @ kernel[i, j]
        for i, j in np.ndindex(size, size)
    )


def resnet_in_training(params, stats, images):
    """Logits and new statistics of ResNet-18 in float64, by numpy.

    Every norm uses the means and variances of these images.
    """

    def norm(values, layer, running):
        mean, variance = values.mean((0, 1, 2)), values.var((0, 1, 2))
        now = {"mean": mean, "variance": values.var((0, 1, 2), ddof=1)}
        moved = {name: 0.9 * running[name] + 0.1 * now[name] for name in now}
        return (values - mean) / np.sqrt(variance + 1e-5) * layer["scale"] + layer["bias"], moved

    new = {}
    hidden, new["norm"] = norm(
        convolve(images, params["conv"]["kernel"]), params["norm"], stats["norm"]
    )
    hidden = np.maximum(hidden, 0)
    for number, _, stride in STAGES:
        block, old = params[f"block{number}"], stats[f"block{number}"]
        new[f"block{number}"] = moved = {}
        branch = convolve(hidden, block["conv1"]["kernel"], stride)
        branch, moved["norm1"] = norm(branch, block["norm1"], old["norm1"])
        branch = convolve(np.maximum(branch, 0), block["conv2"]["kernel"])
        branch, moved["norm2"] = norm(branch, block["norm2"], old["norm2"])
        if stride == 2:
            hidden = convolve(hidden, block["shortcut"]["kernel"], stride)
            hidden, moved["shortcut_norm"] = norm(
                hidden, block["shortcut_norm"], old["shortcut_norm"]
            )
        hidden = np.maximum(hidden + branch, 0)
    return hidden.mean((1, 2)) @ params["fc"]["kernel"] + params["fc"]["bias"], new


def test_resnet_in_training_is_a_network_in_numpy():
    """Logits and the running statistics of each of the 20 norms are those of the reference."""
    model = models.functional(models.ResNet18, width=2)
    rng = np.random.default_rng(0)

    def draw(leaf):
        return rng.normal(size=leaf.shape) * np.sqrt(2 / max(np.prod(leaf.shape[:-1]), 1))

    params = jax.tree.map(draw, jax.eval_shape(model.init, jax.random.key(0)))
    # These differ from the initial statistics, so that the test sees whether they are used.
    stats = jax.tree.map(lambda leaf: rng.uniform(1, 2, leaf.shape), model.init_stats())
    images = rng.uniform(size=(4, 32, 32, 3))
    expected, moved = resnet_in_training(params, stats, images)

    narrow = [jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), x) for x in (params, stats)]
    apply = jax.jit(model.apply, static_argnames="training")
    logits, new = apply(*narrow, jnp.asarray(images, jnp.float32), training=True)
    assert len(jax.tree.leaves(new)) == 40
    # Twenty norms in a row enlarge rounding, and the last ones see 4 images of 4 x 4 pixels alone.
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3 * abs(expected).max())
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)  # noqa: E731
    jax.tree.map(close, new, moved)


def shapes_of_vgg():
    """The shapes of all parameters of VGG-11, from its table of channels."""
    channels = (3, 64, 128, 256, 256, 512, 512, 512, 512)
    shapes = {
        f"conv{number}": {"kernel": (3, 3, *channels[number - 1 : number + 1]), "bias": (last,)}
        for number, last in enumerate(channels[1:], 1)
    }
    return shapes | {"fc": {"kernel": (512, 10), "bias": (10,)}}


def shapes_of_resnet():
    """The shapes of all parameters of ResNet-18, from its table of blocks."""

    def kernel(size, *channels):
        return {"kernel": (size, size, *channels)}

    def norm(channels):
        return {"scale": (channels,), "bias": (channels,)}

    shapes = {"conv": kernel(3, 3, 64), "norm": norm(64), "fc": shapes_of_vgg()["fc"]}
    for number, widths, stride in STAGES:
        before, after = 64 * widths, 64 * widths * stride
        shapes[f"block{number}"] = block = {
            "conv1": kernel(3, before, after),
            "norm1": norm(after),
            "conv2": kernel(3, after, after),
            "norm2": norm(after),
        }
        if stride == 2:
            block |= {"shortcut": kernel(1, before, after), "shortcut_norm": norm(after)}
    return shapes


@each_net
def test_names_and_shapes_of_parameters(name):
    params = jax.eval_shape(models.functional(models.MODELS[name]).init, jax.random.key(0))
    expected = {"vgg11": shapes_of_vgg, "resnet18": shapes_of_resnet}[name]()
    assert jax.tree.map(lambda leaf: leaf.shape, params) == expected


@each_net
def test_types_of_parameters_logits_statistics_and_gradients(name):
    images = jax.ShapeDtypeStruct((3, 32, 32, 3), jnp.float32)

    def types_of(tree):
        return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}

    for dtype, param_dtype in (("bfloat16", "float32"), (None, "bfloat16")):
        module_class = models.MODELS[name]
        model = models.functional(module_class, width=2, dtype=dtype, param_dtype=param_dtype)
        params = jax.eval_shape(model.init, jax.random.key(0))
        stats = jax.eval_shape(model.init_stats)

        def total(params, stats, images):
            logits, stats = model.apply(params, stats, images, training=True)  # noqa: B023
            return logits.sum(), (logits, stats)

        gradient = jax.grad(total, has_aux=True)
        gradients, (logits, new) = jax.eval_shape(gradient, params, stats, images)
        assert types_of(params) == types_of(gradients) == {param_dtype}
        assert logits.dtype == (dtype or "float32")
        assert types_of(new) == types_of(stats) == (set() if name == "vgg11" else {"float32"})


@each_net
def test_the_type_to_compute_in_reaches_every_convolution(name):
    """Logits of the right dtype are not enough, since the last layer alone decides theirs."""
    model = models.functional(models.MODELS[name], width=2, dtype=jnp.bfloat16)
    params = jax.eval_shape(model.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((3, 32, 32, 3), jnp.float32)
    traced = jax.jit(model.apply).trace(params, jax.eval_shape(model.init_stats), images)
    lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    results = [
        line.rsplit("->", 1)[1] for line in lowered.splitlines() if "stablehlo.convolution(" in line
    ]
    assert len(results) == {"vgg11": 8, "resnet18": 20}[name]
    assert all("bf16" in result for result in results)


def test_batch_norm_begins_as_the_identity():
    norm = layers.GhostBatchNorm(3)
    for leaf, value in ((norm.scale, 1), (norm.bias, 0), (norm.mean, 0), (norm.variance, 1)):
        np.testing.assert_array_equal(leaf[...], np.full(3, value, np.float32))


class TestNormalised:
    """The derivative of batch norm is written by hand; the reference differentiates its formula."""

    def formula(self, values, scale, bias):
        mean, variance = values.mean(0), values.var(0)
        normal = (values - mean[None]) / jnp.sqrt(variance + 1e-5)[None]
        return normal * scale[None] + bias[None], mean, variance

    @pytest.fixture
    def point(self, x64):
        """Values [30, 4], scale and bias, and a direction for each."""
        draws = np.random.default_rng(0).normal(size=(2, 32, 4))
        point, direction = ((a[:30] + 3.0, a[30], a[31]) for a in map(jnp.asarray, draws))
        return point, direction

    def test_forward_and_backward(self, point):
        at, along = point
        found = jax.jvp(layers._normalised, at, along)
        expected = jax.jvp(self.formula, at, along)
        out, pull = jax.vjp(layers._normalised, *at)
        back = jax.vjp(self.formula, *at)[1]
        cotangent = jax.tree.map(lambda leaf: jnp.cos(3 * leaf), out)
        pairs = ((found, expected), (pull(cotangent), back(cotangent)))
        for mine, theirs in pairs:
            for one, other in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)

    def test_second_derivatives_also_over_ghost_batches(self, point):
        (values, scale, bias), (along, *_) = point

        def slope(function):
            each = jax.vmap(function, in_axes=(0, None, None))

            def groups(v):
                return each(v.reshape(3, 10, 4), scale, bias)

            def value(v):
                return sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves(groups(v)))

            return jax.jvp(jax.grad(value), (values,), (along,))[1]

        found, expected = slope(layers._normalised), slope(self.formula)
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)

    def test_the_gradient_takes_two_sums_over_the_values(self, point):
        """Of the gradient, and of its product with the centred values; two more are forward."""
        at, _ = point

        def loss(values, scale, bias):
            return jnp.sin(layers._normalised(values, scale, bias)[0]).sum()

        text = str(jax.jit(jax.grad(loss, (0, 1, 2))).lower(*at).compile().as_text())
        assert sum(" reduce(" in line for line in text.splitlines()) == 4
