"""Intervals and tests of equivalence, compared with Student's t integrated by quadrature."""

import csv

import numpy as np
import pytest

from experiments.paper import accuracies
from experiments.paper.accuracies import Result


def t_above(statistic: float, freedom: int) -> float:
    """``P(T > statistic)`` of Student's t, by integrating its density in float64."""
    from math import gamma, pi, sqrt

    scale = gamma((freedom + 1) / 2) / (sqrt(freedom * pi) * gamma(freedom / 2))
    angles = np.linspace(np.arctan(statistic / sqrt(freedom)), pi / 2, 200_001)
    # With t = sqrt(freedom) tan(a), the density becomes a power of the cosine.
    return float(np.trapezoid(scale * sqrt(freedom) * np.cos(angles) ** (freedom - 1), angles))


def result(label: str, final: list[float]) -> Result:
    """A run of two evaluations whose last accuracies are these, one per seed."""
    accuracy = np.stack([np.full(len(final), 0.1), np.array(final)])
    return Result(label, np.array([0, 10]), 1 - accuracy, accuracy, accuracy, 1.0)


REFERENCE = result("SGD-50", [0.780, 0.790, 0.785, 0.795, 0.788])
CLOSE = result("close", [0.781, 0.789, 0.787, 0.794, 0.790])
WORSE = result("worse", [0.751, 0.759, 0.757, 0.764, 0.760])
SPREAD = result("spread", [0.760, 0.815, 0.770, 0.820, 0.780])


def test_equivalence_is_by_two_one_sided_tests():
    differences = CLOSE.test_accuracy[-1] - REFERENCE.test_accuracy[-1]
    error = differences.std(ddof=1) / np.sqrt(5)
    above = t_above((differences.mean() + 0.01) / error, 4)
    below = t_above((0.01 - differences.mean()) / error, 4)
    found = accuracies.equivalence(differences, 0.01)
    assert found == pytest.approx(max(above, below), rel=1e-5)
    # A mean at the edge of the margin is as likely on either side of it.
    assert accuracies.equivalence(differences - differences.mean() + 0.01, 0.01) == pytest.approx(
        0.5
    )
    assert np.isnan(accuracies.equivalence(np.array([0.001]), 0.01))


def test_intervals_cover_95_percent_of_students_t():
    width = accuracies.half_width(REFERENCE.test_accuracy[-1])
    error = REFERENCE.test_accuracy[-1].std(ddof=1) / np.sqrt(5)
    assert t_above(width / error, 4) == pytest.approx(0.025, rel=1e-5)
    assert np.isnan(accuracies.half_width(np.array([0.5])))


def test_verdicts_say_what_the_tests_have_shown():
    rows = accuracies.compare([CLOSE, REFERENCE, WORSE, SPREAD], "SGD-50")
    verdicts = {row.label: row.verdict for row in rows}
    assert verdicts == {
        "close": "equivalent",
        "SGD-50": "the reference",
        "worse": "different",
        "spread": "undecided",
    }
    steps = np.array([0.002, 0.003, 0.002, 0.003, 0.002])
    slightly = result("slightly", (REFERENCE.test_accuracy[-1] + steps).tolist())
    assert accuracies.compare([REFERENCE, slightly], "SGD-50")[1].verdict == (
        "equivalent, though different"
    )


def test_p_values_are_adjusted_over_the_comparisons_of_a_table():
    """Holm's method is written out here, and verdicts are by the adjusted p-values.

    "Apart" is different by itself, with p = 0.023, and not as one of three.
    """
    apart = (0.002, 0.011, 0.004, 0.013, 0.007)
    shifted = [x + y for x, y in zip(REFERENCE.test_accuracy[-1], apart, strict=True)]
    others = [CLOSE, result("apart", shifted), SPREAD]
    rows = {row.label: row for row in accuracies.compare([REFERENCE, *others], "SGD-50")}
    alone = {}
    for other in others:
        differences = other.test_accuracy[-1] - REFERENCE.test_accuracy[-1]
        error = differences.std(ddof=1) / np.sqrt(5)
        sides = [t_above((0.01 + sign * differences.mean()) / error, 4) for sign in (-1, 1)]
        two_sided = 2 * t_above(abs(differences.mean()) / error, 4)
        alone[other.label] = (two_sided, max(sides))
    for which, name in enumerate(("adjusted_difference_p", "adjusted_equivalence_p")):
        expected = 0.0
        order = sorted(alone, key=lambda label: alone[label][which])
        for times, label in zip((3, 2, 1), order, strict=True):
            expected = max(expected, min(1.0, times * alone[label][which]))
            assert getattr(rows[label], name) == pytest.approx(expected, rel=1e-4)
    assert np.isnan(rows["SGD-50"].adjusted_difference_p)
    assert alone["apart"][0] < 0.05 < rows["apart"].adjusted_difference_p
    assert abs(rows["apart"].difference) > rows["apart"].difference_half_width
    assert rows["apart"].verdict == "undecided"


def test_tables_have_the_means_and_differences(tmp_path):
    rows = accuracies.compare([REFERENCE, WORSE], "SGD-50")
    table = accuracies.markdown_table(rows).splitlines()
    assert table[0].startswith("| algorithm | train loss | train accuracy % | test accuracy % |")
    assert "| minus SGD-50 |" in table[0]
    assert "| 78.76 ± " in table[2]
    assert "the reference" in table[2]
    assert "| -2.94 ± " in table[3]
    p_values = rows[1].adjusted_difference_p, rows[1].adjusted_equivalence_p
    assert table[3].endswith(f"| {p_values[0]:.2g} | {p_values[1]:.2g} | different |")
    accuracies.write_csv(rows, tmp_path / "table.csv")
    with open(tmp_path / "table.csv", newline="") as file:
        reference, worse = csv.DictReader(file)
    assert float(worse["difference"]) == rows[1].difference
    assert float(reference["test_accuracy"]) == pytest.approx(0.7876)
    assert worse["verdict"] == "different"


def test_seeds_of_several_runs_stand_side_by_side():
    from experiments.training import Evaluation

    def evaluation(step, *values):
        return Evaluation(step, *[np.array(values)] * 4, 2.0)

    parts = [
        [evaluation(0, 0.1, 0.2), evaluation(5, 0.3, 0.4)],
        [evaluation(0, 0.5), evaluation(5, 0.6)],
    ]
    joined = accuracies.of_evaluations("SGD", parts)
    np.testing.assert_array_equal(joined.test_accuracy, [[0.1, 0.2, 0.5], [0.3, 0.4, 0.6]])
    assert joined.seconds == 8.0
    np.testing.assert_array_equal(joined.steps, [0, 5])


def test_bad_input():
    with pytest.raises(ValueError, match=r"reference must be one of SGD-50, got 'GD'"):
        accuracies.compare([REFERENCE], "GD")
    with pytest.raises(ValueError, match="few has 2 seeds and SGD-50 has 5"):
        accuracies.compare([REFERENCE, result("few", [0.7, 0.8])], "SGD-50")
    with pytest.raises(ValueError, match="last must be between 1 and the 2 evaluations of SGD-50"):
        accuracies.compare([REFERENCE], "SGD-50", last=3)


def test_averages_over_the_last_evaluations():
    """A spike of one seed in the last evaluation widens its interval, and hardly the average's."""
    rng = np.random.default_rng(0)
    steady = 0.785 + 0.001 * rng.normal(size=(12, 5))
    spiked = steady + 0.001 * rng.normal(size=(12, 5))
    spiked[-1, 2] -= 0.07
    steps = np.arange(12)
    results = [
        Result(label, steps, 1 - accuracy, accuracy, accuracy, 1.0)
        for label, accuracy in (("SGD", steady), ("noise", spiked))
    ]
    last, averaged = (accuracies.compare(results, "SGD", k)[1] for k in (1, 5))
    assert averaged.test_accuracy == pytest.approx(spiked[7:].mean())
    assert averaged.difference == pytest.approx((spiked[7:] - steady[7:]).mean())
    assert averaged.train_loss == pytest.approx(1 - spiked[7:].mean())
    assert averaged.difference_half_width < 0.3 * last.difference_half_width


def test_long_runs_have_both_tables(tmp_path):
    from experiments.paper import _section
    from experiments.training.config import TrainConfig

    for evaluations, expected in ((12, True), (10, False)):
        accuracy = np.linspace(0.1, 0.8, evaluations)[:, None] + np.zeros(3)
        found = [
            Result(label, np.arange(evaluations), 1 - accuracy, accuracy, accuracy, 1.0)
            for label in ("SGD-50", "GD")
        ]
        folder = tmp_path / str(evaluations)
        folder.mkdir()
        text = _section.write(folder, "x", "Title", TrainConfig(), found)
        assert (folder / "x-averaged.csv").exists() == expected
        assert text.count("| SGD-50 | ") == 1 + expected
        assert f"| SGD-50 | {0.2 + 0.7 * 2 / 11:.4f} |" in text or not expected


def test_runs_are_compared_where_the_rate_was_constant_too(tmp_path):
    from experiments.paper import _section
    from experiments.training.config import TrainConfig

    seeds = np.array([-0.01, 0.0, 0.02])

    def of_steps(steps):
        return [
            Result(label, steps, 1 - accuracy, accuracy, accuracy, 1.0)
            for label, slope in (("SGD-50", 0.010), ("GD", 0.008))
            for accuracy in [slope * steps[:, None] + seeds]
        ]

    found = of_steps(np.arange(0, 80, 10))
    plan = TrainConfig(steps=70, decay_at=(60,))
    text = _section.write(tmp_path, "x", "Title", plan, found, constant_until=60)
    with open(tmp_path / "x-constant.csv") as file:
        rows = {row["label"]: row for row in csv.DictReader(file)}
    assert {row["steps"] for row in rows.values()} == {"60"}
    assert float(rows["GD"]["test_accuracy"]) == pytest.approx(0.48 + seeds.mean())
    assert float(rows["GD"]["difference"]) == pytest.approx(-0.12)
    assert "After 60 iterations, before the learning rate falls:" in text
    assert text.count("| SGD-50 | ") == 2
    assert not (tmp_path / "x-averaged.csv").exists()
    text = _section.write(tmp_path, "y", "Title", plan, of_steps(np.arange(0, 75, 5)), 60)
    with open(tmp_path / "y-averaged.csv") as file:
        rows = {row["label"]: row for row in csv.DictReader(file)}
    assert float(rows["GD"]["test_accuracy"]) == pytest.approx(0.008 * 50 + seeds.mean())
    assert "of each seed before the learning rate falls, since" in text
    with pytest.raises(ValueError, match="step must be one of SGD-50's evaluations, got 65"):
        _section.write(tmp_path, "x", "Title", plan, found, constant_until=65)


def test_sparse_laws_are_compared_with_sgd_of_their_batch_size_too(tmp_path):
    from experiments.paper import _section
    from experiments.training.config import TrainConfig

    finals = {
        "SGD-50": [0.50, 0.52, 0.51],
        "SGD-250": [0.46, 0.49, 0.46],
        "SGD-250, rate x root": [0.40, 0.43, 0.40],
        "[M-SGD-Cov]-250": [0.50, 0.51, 0.52],
        "SGD-50, another key": [0.51, 0.50, 0.50],
    }
    found = [result(label, final) for label, final in finals.items()]
    plan = TrainConfig(
        dataset="cifar10",
        model="vgg11",
        width=8,
        steps=1_500,
        momentum=0.9,
        decay_at=(750, 1_125),
        augment=True,
    )
    text = _section.write(tmp_path, "x", "Title", plan, found)
    with open(tmp_path / "x-large-batches.csv") as file:
        large, sparse = csv.DictReader(file)
    assert large["verdict"] == "the reference"
    assert (large["label"], sparse["label"]) == ("SGD-250", "[M-SGD-Cov]-250")
    assert float(sparse["difference"]) == pytest.approx(0.12 / 3)
    setting = (
        "Cifar10, vgg11 of width 8, b = 50, 1,500 iterations at learning rate 0.01 (times "
        "0.1 after 750 and 1,125), momentum 0.9, augmented images; 3 seeds;"
    )
    assert setting in text
    # Without sparse laws, there is nothing to compare.
    _section.write(tmp_path, "y", "Title", plan, found[:3])
    assert not (tmp_path / "y-large-batches.csv").exists()
