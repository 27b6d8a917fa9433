"""VGG-11, ResNet-18 and ghost batch norm, compared with float64 numpy and XLA's convolutions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments import models
from experiments.models import conv, layers, resnet
from msgd_jax import loss
from msgd_jax.noise import Weights
from tests.support.statistics import assert_agree, assert_rejected

SIZES = {"vgg11": 9_225_610, "resnet18": 11_173_962}  # Numbers of parameters.
each_net = pytest.mark.parametrize("name", SIZES)


class OneBlock(layers.Net):
    """One block of ResNet-18, with a projection in its shortcut, which is quick to compile."""

    image_shape = (32, 32, 3)
    full_width = 64
    has_batch_norm = True

    def __init__(self, *, rngs, width, ghost_size=None):
        self.block = resnet.ResidualBlock(3, width, stride=2, ghost_size=ghost_size, rngs=rngs)
        self.fc = layers.linear(width, 10, rngs=rngs)

    def __call__(self, images, *, training=False):
        features = self.block(images, training=training)
        return self.fc(features.mean((1, 2)))


each_normalised = pytest.mark.parametrize("name", ["one_block", "resnet18"])


@functools.cache
def narrow(name: str):
    """The functions of a net of width 2."""
    return models.functional({**models.MODELS, "one_block": OneBlock}[name], width=2)


def params_of(model, seed: int = 0):
    """Parameters with the usual variances, drawn by numpy, since jax's draws compile slowly."""
    random = np.random.default_rng(seed)

    def draw(leaf):
        fan_in = max(np.prod(leaf.shape[:-1]), 1)
        return jnp.asarray(random.normal(size=leaf.shape) * np.sqrt(2 / fan_in), jnp.float32)

    return jax.tree.map(draw, jax.eval_shape(model.init, jax.random.key(0)))


def some_images(count: int = 6, seed: int = 3):
    """Random images, [count, 32, 32, 3]."""
    return jnp.asarray(np.random.default_rng(seed).uniform(size=(count, 32, 32, 3)), jnp.float32)


@each_net
def test_the_nets_in_full_width_have_their_number_of_parameters(name):
    model = models.functional(models.MODELS[name])
    params = jax.eval_shape(model.init, jax.random.key(0))
    assert models.num_parameters(params) == SIZES[name]


def test_resnet_has_statistics_and_vgg_has_none():
    stats = narrow("resnet18").init_stats()
    means = [x for path, x in jax.tree.leaves_with_path(stats) if "mean" in str(path[-1])]
    assert len(means) == 20  # There is a norm after each convolution, shortcuts included.
    assert all((leaf == 0).all() for leaf in means)
    assert narrow("vgg11").init_stats() == {}


def test_max_pool_drops_an_odd_edge():
    images = np.random.default_rng(1).normal(size=(2, 5, 4, 3)).astype(np.float32)
    expected = images[:, :4].reshape(2, 2, 2, 2, 2, 3).max((2, 4))
    np.testing.assert_array_equal(conv.max_pool(jnp.asarray(images)), expected)


# Ghost batch norm ---------------------------------------------------------------------------------


class Normalised(nnx.Module):
    """A net that is batch norm alone."""

    def __init__(self, *, rngs, **kwargs):
        del rngs
        self.norm = layers.GhostBatchNorm(4, **kwargs)

    def __call__(self, images, *, training=False):
        return self.norm(images, training=training)


NORM = models.functional(Normalised)


def features(seed: int = 0, mean: float = 30.0):
    """Random channels [5, 3, 2, 4] far from zero, where ``E[x^2] - E[x]^2`` cancels in float32."""
    values = np.random.default_rng(seed).normal(mean, 0.5, size=(5, 3, 2, 4))
    return jnp.asarray(values, jnp.float32)


def norm_params():
    """Parameters of the batch norm that are not its initial ones."""
    return {"norm": {"scale": jnp.array([1.0, 2.0, -1.0, 0.5]), "bias": jnp.arange(4.0)}}


def reference_norm(images, params):
    """Normalised images, means and unbiased variances by float64 numpy."""
    values = np.asarray(images, np.float64)
    mean, variance = values.mean((0, 1, 2)), values.var((0, 1, 2))
    scale, bias = (np.asarray(params["norm"][k], np.float64) for k in ("scale", "bias"))
    shape = (1, 1, 1, 4)
    normal = (values - mean.reshape(shape)) / np.sqrt(variance.reshape(shape) + 1e-5)
    return normal * scale.reshape(shape) + bias.reshape(shape), mean, values.var((0, 1, 2), ddof=1)


def test_batch_norm_in_training_is_the_reference():
    images, params = features(), norm_params()
    found, _ = NORM.apply(params, NORM.init_stats(), images, training=True)
    expected, _, _ = reference_norm(images, params)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_gradient_of_batch_norm_is_the_references():
    """The reference's gradient is by central differences in float64 along random directions."""
    random = np.random.default_rng(5)
    images, params = features(mean=1.0), norm_params()
    cotangent = random.normal(size=images.shape)

    def value(images):
        found, _ = NORM.apply(params, NORM.init_stats(), images, training=True)
        return jnp.sum(found * jnp.asarray(cotangent, jnp.float32))

    gradient = np.asarray(jax.grad(value)(images), np.float64)
    for _ in range(5):
        direction = random.normal(size=images.shape)
        ends = [
            (reference_norm(np.asarray(images, np.float64) + h * direction, params)[0] * cotangent)
            for h in (1e-4, -1e-4)
        ]
        slope = (ends[0].sum() - ends[1].sum()) / 2e-4
        np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-4, atol=1e-3)


def test_running_statistics_follow_pytorchs_recursion():
    """The recursion is written out in float64, and evaluation uses the statistics unchanged."""
    stats, params = NORM.init_stats(), norm_params()
    mean, variance = np.zeros(4), np.ones(4)
    for seed in range(3):
        images = features(seed)
        _, stats = NORM.apply(params, stats, images, training=True)
        _, batch_mean, unbiased = reference_norm(images, params)
        mean = 0.9 * mean + 0.1 * batch_mean
        variance = 0.9 * variance + 0.1 * unbiased
    np.testing.assert_allclose(stats["norm"]["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(stats["norm"]["variance"], variance, rtol=1e-4)
    images = features(9)
    found, unchanged = NORM.apply(params, stats, images)
    jax.tree.map(np.testing.assert_array_equal, unchanged, stats)
    shape = (1, 1, 1, 4)
    normal = (np.asarray(images) - mean.reshape(shape)) / np.sqrt(variance.reshape(shape) + 1e-5)
    scale, bias = (np.asarray(params["norm"][k]).reshape(shape) for k in ("scale", "bias"))
    np.testing.assert_allclose(found, normal * scale + bias, rtol=1e-3, atol=1e-3)


def test_ghost_batches_side_by_side_are_those_in_turn():
    """Each part has statistics of its own, and the running ones move by each part, in order."""
    together = models.functional(Normalised, ghost_size=5)
    images, params = (
        jnp.concatenate([features(seed, 10.0 * seed) for seed in range(3)]),
        norm_params(),
    )
    found, stats = together.apply(params, together.init_stats(), images, training=True)
    mean, variance = np.zeros(4), np.ones(4)
    for i in range(3):
        part = slice(5 * i, 5 * i + 5)
        expected, own_mean, unbiased = reference_norm(images[part], params)
        np.testing.assert_allclose(found[part], expected, atol=2e-5)
        mean, variance = 0.9 * mean + 0.1 * own_mean, 0.9 * variance + 0.1 * unbiased
    np.testing.assert_allclose(stats["norm"]["mean"], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stats["norm"]["variance"], variance, rtol=1e-4)


def test_images_that_are_not_whole_ghost_batches_are_refused():
    pairs = models.functional(Normalised, ghost_size=2)
    with pytest.raises(ValueError, match="divisible into ghost batches of 2, got 5"):
        pairs.apply(norm_params(), pairs.init_stats(), features(), training=True)
    pairs.apply(norm_params(), pairs.init_stats(), features())  # Evaluation has no ghost batches.


def test_one_value_per_channel_is_refused_since_it_has_no_variance():
    with pytest.raises(ValueError, match="choose a larger microbatch_size"):
        NORM.apply(norm_params(), NORM.init_stats(), features()[:1, :1, :1], training=True)


def test_statistics_are_float32_when_the_net_is_narrower():
    narrow_norm = models.functional(Normalised, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), norm_params())
    images = features().astype(jnp.bfloat16)
    found, stats = narrow_norm.apply(params, narrow_norm.init_stats(), images, training=True)
    assert found.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(stats)} == {jnp.dtype("float32")}
    exact = np.asarray(images, np.float64)
    np.testing.assert_allclose(stats["norm"]["mean"], 0.1 * exact.mean((0, 1, 2)), rtol=1e-5)


# The nets -----------------------------------------------------------------------------------------


@pytest.mark.slow
@each_normalised
def test_a_step_over_ghost_batches_is_one_over_each(name):
    """Gradients are the sum over the ghost batches, and statistics follow them in order.

    The reference computes the two micro-batches one after the other, without the library's walker.
    """
    model = narrow(name)
    params = params_of(model)

    def losses_and_stats(params, batch, stats):
        logits, stats = model.apply(params, stats, batch["x"], training=True)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"]), stats

    stats = model.init_stats()
    data = {"x": some_images(6), "y": jnp.arange(6)}
    weights = Weights(jnp.array([0.1, 0.3, -0.2, 0.5, 0.2, 0.1]), None, 6)
    step = loss.weighted_value_and_grad(losses_and_stats, microbatch_size=3, has_state=True)
    (value, new_stats), gradient = jax.jit(step)(params, data, weights, stats)

    @jax.jit
    def one(params, stats, batch, weights):
        def weighted(params):
            losses, new = losses_and_stats(params, batch, stats)
            return losses @ weights, new

        return jax.value_and_grad(weighted, has_aux=True)(params)

    total, sums, running = 0.0, jax.tree.map(jnp.zeros_like, params), stats
    for part in (slice(0, 3), slice(3, 6)):
        batch = jax.tree.map(lambda x: x[part], data)  # noqa: B023
        (some, running), grads = one(params, running, batch, weights.values[part])
        total, sums = total + some, jax.tree.map(jnp.add, sums, grads)
    np.testing.assert_allclose(value, total, rtol=1e-5)
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
    jax.tree.map(compare, gradient, sums)
    jax.tree.map(compare, new_stats, running)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@each_normalised
def test_other_images_of_the_batch_count_in_training_and_not_in_evaluation(name):
    model = narrow(name)
    params = params_of(model)
    images, stats = some_images(4), model.init_stats()
    apply = jax.jit(model.apply, static_argnames="training")
    (alone, _), (together, _) = apply(params, stats, images[:2]), apply(params, stats, images)
    np.testing.assert_allclose(alone, together[:2], rtol=1e-4, atol=1e-5)
    alone, together = (apply(params, stats, x, training=True)[0][:2] for x in (images[:2], images))
    assert abs(np.asarray(alone - together)).max() > 0.01


@pytest.mark.parametrize("name", ["one_block", *SIZES])
def test_seeds_side_by_side_have_the_logits_of_each_alone(name):
    model = narrow(name)
    params = jax.tree.map(lambda *x: jnp.stack(x), *(params_of(model, seed) for seed in (1, 2)))
    stats = jax.tree.map(lambda x: jnp.stack([x, x]), model.init_stats())
    images = some_images(3)
    apply = functools.partial(model.apply, training=True)
    logits, _ = jax.jit(jax.vmap(apply, (0, 0, None)))(params, stats, images)
    for seed in range(2):
        own = jax.tree.map(lambda x: x[seed], params)  # noqa: B023
        expected, _ = jax.jit(apply)(own, model.init_stats(), images)
        np.testing.assert_allclose(logits[seed], expected, rtol=1e-3, atol=1e-4)
    assert (logits[0] != logits[1]).any()


def test_resnet_is_the_reference_in_evaluation():
    """The reference is the net written out with XLA's convolutions, in NHWC.

    In evaluation with the initial statistics, batch norm subtracts nothing and divides by about 1.
    """
    model = narrow("resnet18")
    params = params_of(model)
    images = some_images(2)

    def convolve(x, layer, norm, stride=1):
        pad = layer["kernel"].shape[0] // 2
        x = jax.lax.conv_general_dilated(
            x,
            layer["kernel"],
            (stride, stride),
            [(pad, pad)] * 2,
            precision="highest",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        scale, bias = (norm[name][None, None, None] for name in ("scale", "bias"))
        return x / np.sqrt(1 + 1e-5) * scale + bias

    @jax.jit
    def reference(params, images):
        x = jax.nn.relu(convolve(images, params["conv"], params["norm"]))
        for number in range(1, 9):
            block = params[f"block{number}"]
            stride = 2 if number in (3, 5, 7) else 1
            y = jax.nn.relu(convolve(x, block["conv1"], block["norm1"], stride))
            y = convolve(y, block["conv2"], block["norm2"])
            if stride == 2:
                x = convolve(x, block["shortcut"], block["shortcut_norm"], stride)
            x = jax.nn.relu(x + y)
        return x.mean((1, 2)) @ params["fc"]["kernel"] + params["fc"]["bias"][None]

    logits, _ = jax.jit(model.apply)(params, model.init_stats(), images)
    np.testing.assert_allclose(logits, reference(params, images), rtol=1e-4, atol=1e-3)


def test_vgg_is_the_reference():
    """The reference is the net written out with XLA's convolutions, in NHWC."""
    model = narrow("vgg11")
    params = params_of(model)
    images = some_images(2)

    @jax.jit
    def reference(params, images):
        x = images
        for number in range(1, 9):
            layer = params[f"conv{number}"]
            x = jax.lax.conv_general_dilated(
                x,
                layer["kernel"],
                (1, 1),
                "SAME",
                precision="highest",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            x = jax.nn.relu(x + layer["bias"][None, None, None])
            if number in (1, 2, 4, 6, 8):
                n, h, w, c = x.shape
                x = x.reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4))
        return x.reshape(len(x), -1) @ params["fc"]["kernel"] + params["fc"]["bias"][None]

    logits, _ = jax.jit(model.apply)(params, {}, images)
    np.testing.assert_allclose(logits, reference(params, images), rtol=1e-3, atol=1e-5)


@pytest.mark.slow  # The draws of eight kernels take long to compile.
def test_images_are_not_forgotten_on_the_way_through_vgg():
    """Logits of the initial net vary between images by about 0.04, whatever its depth.

    Kernels with half of the variance would give 0.002, and with twice the variance 0.8.
    """
    model = models.functional(models.VGG11, width=16)
    params = jax.jit(model.init)(jax.random.key(3))
    logits, _ = jax.jit(model.apply)(params, {}, some_images(20))
    spread = np.asarray(logits).std(0).mean()
    assert 0.01 < spread < 0.2


def test_kernels_are_drawn_with_variance_two_over_fan_in():
    """The 4,608 draws are truncated normals, whose kurtosis, below 3, bounds the standard error.

    The near miss has 0.774 of the variance, since truncation at two deviations was forgotten.
    """
    layer = layers.Conv(32, 16, 3, rngs=nnx.Rngs(4))
    kernel = np.asarray(layer.kernel[...], np.float64)
    fan_in = 9 * 32
    ratio, error = (kernel**2).mean() * fan_in / 2, np.sqrt(2 / kernel.size)
    assert_agree(ratio, 1, error, comparisons=2)
    assert_rejected(ratio, 0.774, error, comparisons=2)
    assert_agree(kernel.mean(), 0, np.sqrt(2 / fan_in / kernel.size), comparisons=2)
    assert (layer.bias[...] == 0).all()


@each_net
def test_wrong_images_and_params_are_refused(name):
    model = narrow(name)
    params = params_of(model)
    stats = model.init_stats()
    with pytest.raises(ValueError, match=r"images must have shape \[B, 32, 32, 3\], got"):
        model.apply(params, stats, some_images()[:, :28])
    with pytest.raises(ValueError, match="got type uint8"):
        model.apply(params, stats, some_images().astype(jnp.uint8))
    with pytest.raises(ValueError, match="params must have the names and shapes"):
        model.apply({"fc": params["fc"]}, stats, some_images())
    with pytest.raises(ValueError, match="stats must have the names and shapes"):
        model.apply(params, {"norm": {}}, some_images())
