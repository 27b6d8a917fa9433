"""``python -m experiments theory-study complexities``: equal losses and multipliers, the report."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from experiments.theory_study import (
    ComplexitiesConfig,
    _complexities_report,
    _net,
    complexities,
)

CONFIG = ComplexitiesConfig(
    num_train=30, batch_size=5, targets=(2.0, 1.5), num_draws=2, ascent_steps=1, most_steps=200
)


def examples():
    """Thirty examples with two labels, which can be told apart by their brightness."""
    rng = np.random.Generator(np.random.Philox(0))
    labels = np.arange(30) % 2
    pixels = rng.standard_normal((30, 14, 14)) + labels[:, None, None]
    return {
        "x": jnp.asarray(_net._patches(pixels), jnp.float32),
        "y": jnp.asarray(labels, jnp.int32),
    }


def fake_measure(params, examples, key):
    """A number that tells keys apart, in place of a complexity."""
    value = jax.random.uniform(key)
    return {law: {"mean": value, "standard_error": value} for law in ("Rademacher", "SGD")}


@pytest.fixture(scope="module")
def reach():
    return complexities.until(CONFIG, complexities.law_of(CONFIG, "gd"))


def start():
    params = _net.initial(jax.random.key(0))
    value = _net.losses_of(complexities.NET)(params, examples()).mean()
    return complexities.Point(params, jnp.asarray(0), value)


def test_a_target_is_reached_at_the_first_evaluation_below_it(reach):
    """The same steps one by one, with the gradient of the mean loss."""
    point = reach(start(), examples(), jax.random.key(1), 2.0)
    losses = _net.losses_of(complexities.NET)
    params, values = start().params, []
    gradient = jax.jit(jax.grad(lambda params: losses(params, examples()).mean()))
    for _ in range(int(point.step)):
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient(params))
        values.append(float(losses(params, examples()).mean()))
    assert float(point.loss) == pytest.approx(values[-1], rel=1e-4)
    seen = values[CONFIG.every - 1 :: CONFIG.every]
    assert seen[-1] <= 2.0
    assert all(value > 2.0 for value in seen[:-1])


def test_a_target_out_of_reach_ends_after_the_allowed_steps(reach):
    point = reach(start(), examples(), jax.random.key(1), 1e-9)
    assert int(point.step) == 200
    assert float(point.loss) > 1e-9


def test_no_two_measurements_share_their_multipliers(reach):
    found = [
        complexities.run(CONFIG, reach, fake_measure, name, seed, examples())
        for name in ("sgd", "cov")
        for seed in (0, 1)
    ]
    values = [line["complexities"]["SGD"]["mean"] for line in found]
    assert len(set(np.ravel(values))) == 8
    again = complexities.run(CONFIG, reach, fake_measure, "cov", 1, examples())
    assert again["complexities"] == found[-1]["complexities"]


def test_targets_that_are_not_reached_are_nan():
    def stuck(point, examples, key, target):
        return point

    found = complexities.run(CONFIG, stuck, fake_measure, "gd", 0, examples())
    assert np.isnan(found["reached"]).all()
    assert np.isnan(found["complexities"]["Rademacher"]["mean"]).all()


@pytest.mark.slow
def test_complexities_are_at_least_those_of_the_centre():
    """Above ``E|sum v_i l_i| / N`` at the parameters, by their own multipliers' law."""
    params = _net.initial(jax.random.key(0))
    found = complexities.measurement(CONFIG)(params, examples(), jax.random.key(0))
    assert set(found) == set(_complexities_report.LAWS)
    for values in found.values():
        assert float(values["mean"]) > 0
        assert np.isfinite(float(values["standard_error"]))


def line_of(name, seed, rademacher):
    values = {"mean": [rademacher, 2 * rademacher]}
    return {
        "algorithm": name,
        "seed": seed,
        "reached": [10 * (seed + 1), float("nan") if name == "cov" and seed == 0 else 90],
        "train_loss": [0.6, 0.4],
        "complexities": {"Rademacher": values, "SGD": values},
    }


def found_lines():
    sgd = [0.05, 0.06, 0.055]
    made = [line_of("gd", seed, value) for seed, value in enumerate([0.1, 0.11, 0.13])]
    made += [line_of("sgd", seed, value) for seed, value in enumerate(sgd)]
    made += [line_of("sgd-other-key", seed, value) for seed, value in enumerate(sgd[::-1])]
    return made


SETTINGS = {"targets": [0.6, 0.4]}


def test_ratios_are_geometric_and_holm_has_the_declared_family(tmp_path):
    rows = _complexities_report.rows(found_lines(), SETTINGS)
    compared = [row for row in rows if "compared" in row]
    declared = [row for row in compared if row["compared"] == ["sgd", "gd"]]
    assert len(declared) == 4
    logs = np.log([0.05 / 0.1, 0.06 / 0.11, 0.055 / 0.13])
    alone = scipy.stats.ttest_1samp(logs, 0)
    for row in declared:
        assert row["ratio"][0] == pytest.approx(np.exp(logs.mean()))
        low = np.exp(alone.confidence_interval().low)
        assert row["ratio"][1] == pytest.approx(low)
        assert row["loss_ratio"] == pytest.approx(1)
        # Four of eight declared comparisons are made, all with the same p-value.
        assert row["p"] == pytest.approx(min(8 * alone.pvalue, 1))
    floor = [row for row in compared if row["compared"] == ["sgd-other-key", "sgd"]]
    assert len(floor) == 4
    assert floor[0]["ratio"][0] == pytest.approx(1)
    assert "SGD, another key / SGD" in _complexities_report.table(rows)
    _complexities_report.draw(found_lines(), SETTINGS, tmp_path / "complexities.png")
    assert (tmp_path / "complexities.png").stat().st_size > 10_000


def test_seeds_that_did_not_reach_a_target_are_left_out():
    lines = [line_of("gd", seed, 0.1 + 0.01 * seed) for seed in range(3)]
    lines += [line_of("sgd", seed, 0.06) for seed in range(3)]
    lines[3]["complexities"]["SGD"] = {"mean": [0.06, float("nan")]}
    rows = _complexities_report.rows(lines, SETTINGS)
    counts = {(row["law"], row["target"]): row["seeds"] for row in rows if "compared" in row}
    assert counts["SGD", 0.4] == 2
    assert counts["SGD", 0.6] == counts["Rademacher", 0.4] == 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"algorithms": ("gd", "gd")}, "algorithms must name one or more, each once"),
        ({"targets": (0.2, 0.4)}, "targets must be in descending order"),
        ({"num_draws": 1}, "num_draws must be at least 2, got 1"),
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"num_train": 10_001}, "num_train must be at most 10000, got 10001"),
        ({"batch_size": 1_001}, "batch_size must be at most num_train = 1000, got 1001"),
        ({"radius": float("nan")}, "radius must be finite and above 0, got nan"),
    ],
)
def test_bad_settings(wrong, message):
    with pytest.raises(ValueError, match=message):
        ComplexitiesConfig(**wrong)
