"""LeNet, the net of the digits and their convolutions, compared with scipy, numpy and XLA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.signal
import scipy.stats
import sklearn.datasets
from flax import nnx
from jax.test_util import check_grads

from experiments import models
from experiments.models import conv, layers
from tests.support.statistics import FALSE_ALARMS, assert_agree, assert_rejected

# Images [C, H, W, B], height and width of the kernel, and channels out. Some heights and widths are
# odd after the convolution, so that pooling drops the last row or column.
SHAPES = [
    ((1, 8, 8, 2), (3, 3), 16),
    ((10, 12, 12, 3), (5, 5), 10),
    ((2, 7, 9, 2), (3, 3), 4),
    ((3, 7, 8, 1), (2, 5), 1),
    ((2, 5, 4, 2), (1, 1), 3),
]
LAYER_SIZES = {"conv1": 260, "conv2": 2510, "fc1": 8050, "fc2": 510}
WAYS = {"cpu": conv._as_product, "elsewhere": conv._by_xla}

each_model = pytest.mark.parametrize("name", ["lenet", "digits_net"])


def operands(shape, kernel_size, out_channels, dtype="float64"):
    """Random images and a random kernel."""
    rng = np.random.default_rng(sum(shape) + out_channels)
    images = rng.normal(size=shape)
    kernel = rng.normal(size=(*kernel_size, shape[0], out_channels))
    bias = rng.normal(size=out_channels)
    return tuple(jnp.asarray(x, dtype) for x in (images, kernel, bias))


def reference(images, kernel, bias) -> np.ndarray:
    """Convolves by scipy in float64, one image and one output at a time, and pools by a loop."""
    images, kernel, bias = (np.asarray(x, np.float64) for x in (images, kernel, bias))
    correlate = functools.partial(scipy.signal.correlate, mode="valid", method="direct")
    each_image, each_channel = np.moveaxis(images, 3, 0), kernel.transpose(3, 2, 0, 1)
    outputs = np.array([[correlate(x, k)[0] for x in each_image] for k in each_channel])
    rows, columns = outputs.shape[2] // 2, outputs.shape[3] // 2
    pooled = np.empty((*outputs.shape[:2], rows, columns))
    for i, j in np.ndindex(rows, columns):
        pooled[:, :, i, j] = outputs[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].max((2, 3))
    return np.moveaxis(np.maximum(pooled + bias.reshape(-1, 1, 1, 1), 0), 1, 3)


def by_lax(images, kernel, bias):
    """The same by XLA's convolution and its window reduction, whose gradients are XLA's too."""
    outputs = jax.lax.conv_general_dilated(
        images, kernel, (1, 1), "VALID", dimension_numbers=("CHWN", "HWIO", "CHWN")
    )
    window = (1, 2, 2, 1)
    outputs = jax.lax.reduce_window(outputs, -jnp.inf, jax.lax.max, window, window, "VALID")
    return jax.nn.relu(outputs + bias.reshape(-1, 1, 1, 1))


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.usefixtures("x64", "strict_dtypes")
def test_values_and_gradients_are_those_of_plain_convolutions(shapes):
    """Values are scipy's, and gradients are XLA's, on the CPU and elsewhere, in float64."""
    arrays = operands(*shapes)
    expected = reference(*arrays)
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=expected.shape))

    @jax.jit
    def values_and_gradients(*arrays):
        functions = (by_lax, *WAYS.values())
        pairs = [jax.vjp(function, *arrays) for function in functions]
        return [(value, pull_back(cotangent)) for value, pull_back in pairs]

    (_, gradients), *ours = values_and_gradients(*arrays)
    for value, our_gradients in ours:
        np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-12)
        for got, wanted in zip(our_gradients, gradients, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.usefixtures("x64", "strict_dtypes")
def test_every_type_is_kept_and_as_exact_as_it_can_be(dtype):
    """A sum is off by at most the number of its terms times eps times the sum of their sizes.

    Sums of bfloat16 are accumulated in float32, so that only the result is rounded.
    """
    arrays = operands(*SHAPES[2], dtype=dtype)
    # The largest sum of absolute values; bfloat16 sums are accumulated in float32.
    scale = reference(*map(abs, arrays)).max()
    # The convolution is rounded to bfloat16 before the bias is added.
    terms = 2 if dtype == "bfloat16" else arrays[1][..., 0].size + 1
    outputs = conv.conv_pool_relu(*arrays)
    assert outputs.dtype == dtype
    error = abs(np.asarray(outputs, np.float64) - reference(*arrays)).max()
    assert error <= terms * float(jnp.finfo(dtype).eps) * scale


@pytest.mark.usefixtures("x64", "strict_dtypes")
def test_forward_and_reverse_mode_equal_finite_differences():
    function = jax.jit(conv.conv_pool_relu)
    check_grads(function, operands((2, 5, 6, 2), (2, 3), 2), order=1, modes=("fwd", "rev"))


@pytest.mark.parametrize("function", WAYS.values(), ids=WAYS)
def test_first_of_equal_maxima_gets_the_gradient(function):
    image = jnp.array([[3, 3, 1, 2], [3, 3, 2, 2], [0, 5, 7, 7], [5, 1, 6, 7]], jnp.float32)
    expected = np.array([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]])
    kernel_and_bias = jnp.ones((1, 1, 1, 1)), jnp.ones(1)
    total = lambda image: function(image.reshape(1, 4, 4, 1), *kernel_and_bias).sum()  # noqa: E731
    np.testing.assert_array_equal(jax.jit(jax.grad(total))(image), expected)


def test_cpus_and_nvidia_cards_get_the_matrix_product():
    gradient = jax.grad(lambda *args: conv.conv_pool_relu(*args).sum(), 1)
    traced = jax.jit(gradient).trace(*operands(*SHAPES[0], dtype="float32"))
    has_convolution = {
        platform: "stablehlo.convolution" in traced.lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "cuda", "rocm", "tpu")
    }
    assert has_convolution == {"cpu": False, "cuda": False, "rocm": True, "tpu": True}


@pytest.mark.usefixtures("x64")
def test_mapping_over_kernels_or_images_equals_a_loop():
    operation = conv.conv_pool_relu
    images, kernel, bias = operands((2, 6, 5, 3), (3, 2), 4)
    kernels = jnp.stack([kernel, kernel**2, -kernel])
    close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)

    gradient = jax.jit(jax.grad(lambda x, k: jnp.sin(operation(x, k, bias)).sum(), (0, 1)))
    loop = [gradient(images, k) for k in kernels]
    mapped = jax.jit(jax.vmap(gradient, (None, 0)))(images, kernels)
    jax.tree.map(close, mapped, jax.tree.map(lambda *leaves: np.stack(leaves), *loop))

    singly = jax.jit(jax.vmap(operation, (3, None, None), 3))(images[..., None], kernel, bias)
    close(singly[..., 0], operation(images, kernel, bias))


def test_wrong_operands_are_refused():
    operation = conv.conv_pool_relu
    images, kernel, bias = jnp.zeros((3, 8, 8, 2)), jnp.zeros((3, 3, 3, 4)), jnp.zeros(4)
    with pytest.raises(ValueError, match=r"\[C, H, W, B\], got shape \(8, 8, 2\)"):
        operation(images[0], kernel, bias)
    with pytest.raises(ValueError, match=r"C = 3, .* got shape \(3, 3, 2, 4\)"):
        operation(images, kernel[:, :, :2], bias)
    with pytest.raises(ValueError, match=r"\[h, w, C, O\] .* got shape \(3, 3, 3\)"):
        operation(images, kernel[..., 0], bias)
    for one, other in (("float32", "bfloat16"), ("uint8", "uint8")):
        with pytest.raises(ValueError, match=f"floating-point type, got {one} and {other}"):
            operation(images.astype(one), kernel.astype(other), bias.astype(other))


def test_a_bias_must_be_one_of_the_kernel():
    images, kernel, bias = jnp.zeros((3, 8, 8, 2)), jnp.zeros((3, 3, 3, 4)), jnp.zeros(4)
    for wrong in (bias[:3], bias.astype(jnp.bfloat16)):
        got = rf"shape \[4\] and type float32.* got shape \({wrong.size},\) and type {wrong.dtype}"
        with pytest.raises(ValueError, match=got):
            conv.conv_pool_relu(images, kernel, wrong)


def test_images_must_hold_the_kernel_and_one_window():
    kernel, bias = jnp.zeros((5, 3, 1, 2)), jnp.zeros(2)
    smallest = jnp.zeros((1, 6, 4, 1))
    assert jax.eval_shape(conv.conv_pool_relu, smallest, kernel, bias).shape == (2, 1, 1, 1)
    for images in (smallest[:, 1:], smallest[:, :, 1:]):
        with pytest.raises(ValueError, match="at least 6 x 4 pixels"):
            conv.conv_pool_relu(images, kernel, bias)


@functools.cache
def params_of(name: str):
    """The initial parameters of a net."""
    return jax.jit(models.functional(models.MODELS[name]).init)(jax.random.key(1))


def some_images(name: str, num_images: int = 4):
    """Random images for a net, [B, H, W, C]."""
    shape = (num_images, *models.MODELS[name].image_shape)
    return jnp.asarray(np.random.default_rng(7).uniform(size=shape), jnp.float32)


def logits_fn(model):
    """The function that maps parameters and images to logits, for nets without statistics."""
    return lambda params, images: model.apply(params, {}, images)[0]


def types_of(tree) -> set[str]:
    """The dtypes of all leaves."""
    return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}


def test_lenet_has_the_papers_parameters():
    params = jax.eval_shape(models.functional(models.LeNet).init, jax.random.key(0))
    assert models.num_parameters(params) == 11_330
    assert {name: models.num_parameters(layer) for name, layer in params.items()} == LAYER_SIZES
    assert params["conv1"]["kernel"].shape == (5, 5, 1, 10)
    assert params["conv2"]["kernel"].shape == (5, 5, 10, 10)


@each_model
def test_logits_equal_a_network_in_numpy_also_for_stacked_params(name):
    """Logits of size one are off by at most ten roundings of float32."""
    images = some_images(name)
    apply = logits_fn(models.functional(models.MODELS[name]))
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf, -leaf]), params_of(name))
    mapped = jax.jit(jax.vmap(apply, (0, None)))(stacked, images)
    assert mapped.shape == (3, len(images), models.MODELS[name].num_classes)
    for seed, logits in enumerate(mapped):
        hidden = np.asarray(images)
        for layer, leaves in stacked.items():
            kernel, bias = (np.asarray(leaves[leaf][seed]) for leaf in ("kernel", "bias"))
            if layer.startswith("conv"):
                features = reference(hidden.transpose(3, 1, 2, 0), kernel, bias)
                hidden = features.transpose(3, 1, 2, 0)
            else:
                hidden = hidden.reshape(len(hidden), -1) @ kernel + bias
                hidden = hidden if layer == "fc2" else np.maximum(hidden, 0)
        np.testing.assert_allclose(logits, hidden, atol=10 * np.finfo(np.float32).eps)


def test_init_is_a_pure_function_of_the_key():
    def keys():  # A key may be used once, so that each use makes it anew.
        return jax.random.split(jax.random.key(0), 2)

    model_of = functools.partial(models.functional, layers.ConvPoolReLU)
    init = model_of(in_channels=2, out_channels=3, kernel_size=2).init
    one, other = init(keys()[0]), init(keys()[1])
    assert type(one) is dict
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(one))
    assert all((leaf != one[name]).all() for name, leaf in other.items())
    again = model_of(in_channels=2, out_channels=3, kernel_size=2).init
    jax.tree.map(np.testing.assert_array_equal, one, jax.jit(again)(keys()[0]))
    stacked = {name: np.stack([leaf, other[name]]) for name, leaf in one.items()}
    jax.tree.map(np.testing.assert_array_equal, stacked, jax.jit(jax.vmap(init))(keys()))


@each_model
def test_init_is_uniform_within_one_over_the_root_of_fan_in(name):
    scaled = []
    for layer in jax.tree.map(np.asarray, params_of(name)).values():
        bound = np.prod(layer["kernel"].shape[:-1]) ** -0.5
        assert all(abs(leaf).max() <= bound for leaf in layer.values())
        scaled += [leaf.ravel() / bound for leaf in layer.values()]
    sample = np.concatenate(scaled)
    assert scipy.stats.kstest(sample, "uniform", (-1, 2)).pvalue > FALSE_ALARMS / 2
    # The mean square is a third of the squared bound. Laws that are 5 % too wide or too narrow are
    # rejected by it. Its standard error is from the fourth moment, 1/5 - 1/9 = 4/45.
    square, error = (sample**2).mean(), np.sqrt(4 / 45 / sample.size)
    assert_agree(square, 1 / 3, error, comparisons=2)
    for wrong in (1.05, 0.95):
        assert_rejected(square, wrong**2 / 3, error, comparisons=2)
    # No two leaves share their draws, but float32 draws meet by chance now and then.
    assert len(np.unique(sample)) > 0.998 * len(sample)


@each_model
def test_types_of_parameters_logits_and_gradients(name):
    images = some_images(name)
    for dtype, param_dtype in (("bfloat16", "float32"), (None, "float32"), (None, "bfloat16")):
        kwargs = {"dtype": dtype, "param_dtype": param_dtype}
        model = models.functional(models.MODELS[name], **kwargs)
        apply = logits_fn(model)
        params = jax.eval_shape(model.init, jax.random.key(0))
        assert types_of(params) == {param_dtype}
        # Without a dtype for the computation, bfloat16 and float32 promote to float32.
        assert types_of(jax.eval_shape(apply, params, images)) == {dtype or "float32"}
        gradient = jax.grad(lambda params: apply(params, images).sum())  # noqa: B023
        assert types_of(jax.eval_shape(gradient, params)) == {param_dtype}


def test_pooled_features_have_the_type_of_the_computation():
    layer = layers.ConvPoolReLU(1, 2, 3, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    assert jax.eval_shape(layer, some_images("digits_net").T).dtype == jnp.bfloat16


@each_model
def test_wrong_images_and_params_are_refused(name):
    model = models.functional(models.MODELS[name])
    params, images = params_of(name), some_images(name)
    allowed = ", ".join(map(str, images.shape[1:]))
    for wrong in (images[0], images[..., 0], images[:, 1:], images[:, :, :, [0, 0]]):
        expected = rf"shape \[B, {allowed}\], got shape \({wrong.shape[0]}, {wrong.shape[1]}"
        with pytest.raises(ValueError, match=expected):
            model.apply(params, {}, wrong)
    with pytest.raises(ValueError, match=r"floating point, scaled to \[0, 1\], got type uint8"):
        model.apply(params, {}, images.astype(jnp.uint8))
    layer = params["fc2"]
    for wrong in ({"fc2": layer}, {**params, "fc3": layer}, {**params, "fc1": layer}):
        with pytest.raises(ValueError, match="params must have the names and shapes"):
            model.apply(wrong, {}, images)


class WithDropout(nnx.Module):
    """A net with state that is neither a parameter nor a statistic: the keys of its dropout."""

    def __init__(self, *, rngs):
        self.weight = nnx.Param(rngs.params.uniform((3,)))
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


def test_modules_with_other_state_are_refused():
    with pytest.raises(ValueError, match=r"nnx.BatchStat, got other state in \['dropout'\]"):
        models.functional(WithDropout)


def test_digits_net_learns_the_digits():
    """After 800 steps, 97.6 % of the other digits are right; with other draws, 96.7 % or more."""
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images = jnp.asarray(images[order].reshape(-1, 8, 8, 1) / 16)
    labels = jnp.asarray(labels[order])
    apply = logits_fn(models.functional(models.DigitsNet))

    def loss(params, images, labels):
        logits = apply(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(params, drawn):
        gradients = jax.grad(loss)(params, images[drawn], labels[drawn])
        return jax.tree.map(lambda p, g: p - 0.2 * g, params, gradients), None

    batches = np.random.default_rng(1).integers(1000, size=(800, 50))
    params, _ = jax.jit(functools.partial(jax.lax.scan, step))(params_of("digits_net"), batches)
    right = jax.jit(apply)(params, images[1000:]).argmax(1) == labels[1000:]
    assert right.mean() > 0.96
