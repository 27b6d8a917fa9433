"""``python -m experiments theory-study network``: the nets, the paths, the fit, and the report."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from experiments.theory_study import NetworkConfig, _net, _network_report, network
from msgd_jax import noise
from tests.support.statistics import FALSE_ALARMS

TINY = {"num_train": 20, "batch_size": 5, "iterations": 4, "points": 2, "seeds": 1}


def examples(seed=0, count=6):
    """Random patches of images, as `_net.images` makes them, and the images themselves."""
    rng = np.random.Generator(np.random.Philox(seed))
    pixels = rng.standard_normal((count, 14, 14))
    labels = rng.integers(0, 10, count)
    batch = {
        "x": jnp.asarray(_net._patches(pixels), jnp.float32),
        "y": jnp.asarray(labels, jnp.int32),
    }
    return batch, pixels, labels


@pytest.mark.parametrize("name", ["relu-max", "tanh-average", "relu-average", "tanh-max"])
def test_losses_are_those_of_a_convolution_in_float64(name):
    """An independent net in numpy: pixel loops, pooling over windows, softmax."""
    batch, pixels, labels = examples()
    params = _net.initial(jax.random.key(1))
    wide = {key: np.asarray(value, np.float64) for key, value in params.items()}
    bend = {"relu": lambda x: np.maximum(x, 0), "tanh": np.tanh}[name.split("-")[0]]
    pool = {"max": np.max, "average": np.mean}[name.split("-")[1]]
    expected = []
    for image, label in zip(pixels, labels, strict=True):
        kernel = wide["kernel"].reshape(5, 5, 10)
        features = np.empty((10, 10, 10))
        for i in range(10):
            for j in range(10):
                features[i, j] = np.einsum("ab,abc->c", image[i : i + 5, j : j + 5], kernel)
        pooled = np.empty((5, 5, 10))
        for i in range(5):
            for j in range(5):
                pooled[i, j] = pool(features[2 * i : 2 * i + 2, 2 * j : 2 * j + 2], axis=(0, 1))
        hidden = bend(pooled + wide["b0"]).reshape(-1)
        logits = bend(hidden @ wide["w1"] + wide["b1"]) @ wide["w2"] + wide["b2"]
        expected.append(np.log(np.exp(logits).sum()) - logits[label])
    np.testing.assert_allclose(_net.losses_of(name)(params, batch), expected, rtol=1e-4)


def test_all_nets_begin_with_the_same_parameters():
    params = _net.initial(jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 8_622
    assert float(jnp.abs(params["w1"]).max()) <= 1 / np.sqrt(250)
    assert float(jnp.abs(params["w1"]).max()) > 0.99 / np.sqrt(250)


def test_a_smooth_net_follows_the_sde_of_its_path():
    """Distances on the shared path are a third or less of those with draws of its own."""
    config = NetworkConfig(**TINY, learning_rates=(0.05, 0.025, 0.0125))
    batch, _, _ = examples(count=20)
    record = network.path(config, network.beside(config, "tanh-average"), "tanh-average", 0, batch)
    shared, own, moved = (np.array(record[kind]) for kind in ("shared", "own", "displacement"))
    assert shared.shape == own.shape == moved.shape == (3, 2)
    assert (own > 3 * shared).all()
    # Order 1: from the first rate to the last one, distances fall by 4 on the shared path.
    assert 3 < shared[0, -1] / shared[-1, -1] < 6


def test_training_in_parts_is_training_in_one_go():
    losses, law = _net.losses_of("tanh-average"), noise.fisher(20, 5)
    batch, _, _ = examples(count=20)
    train = jax.jit(network.trainer(losses, law))
    start, key, rate = _net.initial(jax.random.key(0)), jax.random.key(3), jnp.float32(0.1)
    whole = train(start, batch, key, rate, 0, 6)
    parts = train(train(start, batch, key, rate, 0, 4), batch, key, rate, 4, 6)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), whole, parts))


X = np.log([0.1, 0.05, 0.025, 0.0125])


def drawn(seeds, bend=0.0, slope=1.0, seed=0):
    """Values of seeds around a line, with noise that is common to neighbouring points."""
    rng = np.random.Generator(np.random.Philox(seed))
    mixed = rng.standard_normal((seeds, 4)) @ np.array(
        [[1, 0.8, 0.3, 0], [0, 1, 0.8, 0.3], [0, 0, 1, 0.8], [0, 0, 0, 1]]
    )
    return slope * X + bend * (X - X.mean()) ** 2 + 0.1 * mixed


def test_slopes_are_those_of_least_squares():
    values = drawn(6)
    found = _network_report.line(X, values)
    expected = [scipy.stats.linregress(X, own).slope for own in values]
    np.testing.assert_allclose(found.slopes, expected)
    assert found.degrees == 2


def test_the_test_of_a_line_has_its_level_for_dependent_points():
    """2,000 samples on a line: p is uniform; a small curvature is rejected in most of them."""
    values = [_network_report.line(X, drawn(20, seed=i)).p_value for i in range(2_000)]
    assert scipy.stats.kstest(values, "uniform").pvalue > FALSE_ALARMS
    curved = [_network_report.line(X, drawn(20, 0.1, seed=i)).p_value for i in range(200)]
    assert np.mean(np.array(curved) < 0.05) > 0.5


def test_too_few_seeds_give_no_test():
    assert np.isnan(_network_report.line(X, drawn(2)).p_value)


def records_of(net, order, wobble=0.0):
    """Distances of five seeds with an exact order, but for a factor per seed and rate."""
    rates = np.array([0.4, 0.2, 0.1])
    found = []
    for seed in range(5):
        factor = np.exp(wobble * np.sin(1 + 7 * seed + np.arange(3)))
        shared = (0.3 + seed) * rates**order * factor
        two = np.stack([shared, 2 * shared], axis=1)
        own = np.stack([rates**0.5] * 2, axis=1)
        kinds = {"shared": two, "own": own, "displacement": own}
        found.append({"net": net, "seed": seed} | {k: v.tolist() for k, v in kinds.items()})
    return found


SETTINGS = {"learning_rates": [0.4, 0.2, 0.1], "iterations": 10, "points": 2}


def test_the_report_finds_orders_and_differences(tmp_path):
    found = [*records_of("relu-max", 0.7, 0.1), *records_of("tanh-average", 1.0, 0.02)]
    rows = _network_report.rows(found, SETTINGS)
    times = {row["time"] for row in rows if "net" in row}
    assert times == {2.0, 4.0}
    order = {(row["net"], row["kind"]): row["order"][0] for row in rows if row.get("time") == 4.0}
    assert order["relu-max", "shared"] == pytest.approx(0.7, abs=0.1)
    assert order["tanh-average", "shared"] == pytest.approx(1.0, abs=0.02)
    assert order["tanh-average", "own"] == pytest.approx(0.5)
    (compared,) = (row for row in rows if "compared" in row)
    differences = [
        scipy.stats.linregress(np.log([0.4, 0.2, 0.1]), np.log(np.array(b["shared"])[:, 1])).slope
        - scipy.stats.linregress(np.log([0.4, 0.2, 0.1]), np.log(np.array(a["shared"])[:, 1])).slope
        for a, b in zip(found[:5], found[5:], strict=True)
    ]
    assert compared["difference"][0] == pytest.approx(np.mean(differences))
    # One comparison of a declared family of three.
    alone = scipy.stats.ttest_1samp(differences, 0).pvalue
    assert compared["p"] == pytest.approx(min(3 * alone, 1))
    assert "tanh, average pooling" in _network_report.table(rows)
    _network_report.draw(found, SETTINGS, tmp_path / "network.png")
    assert (tmp_path / "network.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"nets": ()}, "nets must name one or more, each once"),
        ({"num_train": 10_001}, "num_train must be at most 10000, got 10001"),
        ({"batch_size": 301}, "batch_size must be at most num_train = 300, got 301"),
        ({"substeps": 3}, "substeps must be a power of two, got 3"),
        ({"learning_rates": (0.1, 0.05)}, "learning_rates must be at least 3"),
        ({"learning_rates": (0.1, 0.06, 0.05)}, "the first one divided by integers"),
        ({"points": 7}, "points must divide the 80 iterations, got 7"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
    ],
)
def test_bad_settings(wrong, message):
    with pytest.raises(ValueError, match=message):
        NetworkConfig(**wrong)
